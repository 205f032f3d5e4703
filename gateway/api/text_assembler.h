// The text of one answer while its tokens become final in any order.
#ifndef CINNABAR_GATEWAY_API_TEXT_ASSEMBLER_H_
#define CINNABAR_GATEWAY_API_TEXT_ASSEMBLER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/request/decoding_params.h"
#include "common/tokenizer/stream_decoder.h"
#include "common/tokenizer/tokenizer.h"

namespace cinnabar {

enum class FinishReason { kNone, kStop, kLength };
absl::string_view FinishReasonName(FinishReason reason);  // "stop", "length"; kNone: ""

struct TextOptions {
  int32_t begin = 0;  // the answer's span of the sequence
  int32_t end = 0;
  // Tokens of the span known from the start, -1 where undecided; empty: all undecided.
  std::vector<TokenId> given;
  std::vector<TokenId> end_tokens;  // the text ends in front of the first of them
  std::vector<std::string> stop;    // none empty; valid UTF-8
  std::string echo;                 // put in front of the text; no stop string is looked for in it
  // Whether a token that was reported stays until another is: models with a mask token. Where it
  // does not, a position counts as undecided until it is final.
  bool commits_stay = true;
};

// What it gives out is append-safe: pieces of text, each valid UTF-8, that together are the answer
// and never change. A position's token goes out once that position and all before it are final, no
// character is cut in two, and what may be the start of a stop string waits until that is decided.
//
// The answer is: the span's tokens up to the first end token (without it), without special tokens,
// as UTF-8 (U+FFFD for what is none), up to the stop string that is complete first (of two that end
// at the same byte, the longer; without it). It does not depend on how the tokens were cut into
// deltas. Not thread-safe.
class TextAssembler {
 public:
  TextAssembler(Tokenizer tokenizer, TextOptions options);

  // One denoising step (v1::StepDelta): `tokens` of `positions`, -1 where one is masked again;
  // [0, final_end) never changes again. Positions outside the span are ignored, and everything once
  // done(). Returns the text that became certain, often none. DataLoss: lengths differ, or a
  // position is final that never got a token; the assembler has not changed.
  absl::StatusOr<std::string> Add(absl::Span<const int32_t> positions,
                                  absl::Span<const int32_t> tokens, int32_t final_end);

  // v1::WorkResult: the span's tokens, -1 behind the end of text: takes them as final and ends. The
  // text that was still missing. DataLoss: another length, or they contradict what went out.
  absl::StatusOr<std::string> AddResult(absl::Span<const int32_t> tokens);

  // Nothing more comes (cancelled, failed, expired): what was held back. Idempotent.
  std::string Finish();

  // The text can no longer change: it ended by a token or a stop string, all is final, or Finish().
  bool done() const { return done_; }
  // Done by a stop string before all of it was final: what a worker still does is for nothing.
  bool cut_short() const {
    return stop_string_ && final_end_ < static_cast<int32_t>(tokens_.size());
  }
  // kStop: an end token or a stop string; kLength: done without one; kNone: not done.
  FinishReason finish_reason() const { return reason_; }
  // Answer tokens final so far, up to the end token (without it) or the one that completed a stop
  // string (with it).
  int32_t completion_tokens() const { return num_tokens_; }
  // All that went out, `echo` first.
  const std::string& text() const { return text_; }

  // The whole answer as a draft: every undecided position one U+2591 (LIGHT SHADE), up to the first
  // end token that is there. Valid UTF-8. Equal to text() once done(). Linear in the span.
  std::string Snapshot() const;

 private:
  std::string Take(std::string more);
  std::string Emit(size_t num_bytes);
  std::string End(FinishReason reason);
  bool IsEnd(TokenId token) const;
  std::string Advance();

  Tokenizer tokenizer_;
  TextOptions options_;
  StreamDecoder decoder_;
  std::vector<TokenId> tokens_;  // of the span; -1: none yet
  int32_t num_final_ = 0;        // of the span, from its begin: given to the decoder
  int32_t final_end_ = 0;        // of the span
  int32_t num_tokens_ = 0;
  bool done_ = false;
  bool stop_string_ = false;  // one of them ended it
  bool echoed_ = false;
  FinishReason reason_ = FinishReason::kNone;
  std::string text_;
  std::string held_;  // decoded, not given out
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_API_TEXT_ASSEMBLER_H_
