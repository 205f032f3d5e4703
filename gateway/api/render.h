// Replies: typed results to the JSON of OpenAI's objects, with the vendor fields of Mercury's API
// and ours, and to server-sent events. Everything that goes out is valid UTF-8. Pure.
#ifndef CINNABAR_GATEWAY_API_RENDER_H_
#define CINNABAR_GATEWAY_API_RENDER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "gateway/api/build_work.h"
#include "gateway/api/parse_request.h"
#include "gateway/api/text_assembler.h"

namespace cinnabar {

// What every object of one reply repeats.
struct ReplyInfo {
  GenerationRequest::Endpoint endpoint = GenerationRequest::Endpoint::kCompletion;
  std::string request_id;
  std::string model;  // the served name
  absl::Time created;
  std::string system_fingerprint;
  std::string service_tier;    // empty: left out
  bool include_usage = false;  // streams: `usage` is in every chunk, null but for the last
  std::vector<std::string> warnings;
};

// "chatcmpl-ID" for chat, "cmpl-ID" otherwise.
std::string ReplyId(GenerationRequest::Endpoint endpoint, absl::string_view request_id);

struct UsageReport {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t reasoning_tokens = 0;
  // Vendor counters, `usage.diffusion`.
  std::string sampler;
  int64_t steps = 0;
  int64_t forwards = 0;
  int64_t tokens_committed = 0;  // positions decided; by `forwards` the tokens per forward
  absl::Duration queue;          // until the first step
  absl::Duration device;
  double price_dollars = 0;
  int64_t degraded_steps = 0;  // taken off the step budget under overload; 0: left out
};
// Adds the choice's counts; `queue` becomes the longer of the two. For choices of one prompt the
// caller counts prompt_tokens once.
void AddUsage(UsageReport& total, const UsageReport& choice);

struct ChoiceResult {
  int32_t index = 0;
  std::string text;
  FinishReason finish_reason = FinishReason::kNone;  // kNone: null
};

// The whole reply: chat.completion, or text_completion.
std::string RenderReply(const ReplyInfo& info, absl::Span<const ChoiceResult> choices,
                        const UsageReport& usage);

// Chunks, one JSON object each. Chat: chat.completion.chunk with `delta`; else text_completion with
// `text`.
//
// The first of a choice: delta {"role":"assistant","content":""}; an empty text.
std::string RenderFirstChunk(const ReplyInfo& info, int32_t index);
// New text, or with `diffusing` the whole text so far.
std::string RenderTextChunk(const ReplyInfo& info, int32_t index, absl::string_view text);
// The last of a choice: an empty delta (or `text`, which the final snapshot needs) with the reason.
// Holds the warnings.
std::string RenderFinishChunk(const ReplyInfo& info, int32_t index, FinishReason reason,
                              absl::string_view text = "");
// `choices: []` and the usage.
std::string RenderUsageChunk(const ReplyInfo& info, const UsageReport& usage);

// One denoising step as a typed frame: a valid chunk whose delta is {} (whose text is empty) with a
// vendor object `diffusion`. Positions count from the answer's begin; those outside of it are left
// out.
struct DiffusionFrame {
  int32_t step = 0;
  int32_t block_begin = 0;  // of the sequence, like `positions` and `final_end`
  int32_t block_end = 0;
  absl::Span<const int32_t> positions;
  absl::Span<const int32_t> tokens;  // as long as positions; -1: masked again
  absl::string_view confidences;     // one byte each: round(255 p); may be empty
  int32_t final_end = 0;
};
std::string RenderFrameChunk(const ReplyInfo& info, int32_t index, const DiffusionFrame& frame,
                             const TextOptions& text, const Tokenizer& tokenizer);

// "id: ID\ndata: JSON\n\n"; no id line when `id` is empty. CHECKs that neither has a line break.
std::string SseEvent(absl::string_view json, absl::string_view id = "");
// A comment, which clients skip: keeps proxies from closing a silent stream.
inline constexpr absl::string_view kSseKeepAlive = ": keep-alive\n\n";
inline constexpr absl::string_view kSseDone = "data: [DONE]\n\n";

// {"id": ..., "object": "request", "state": ...}: the answer to a cancel.
std::string RenderCancelled(absl::string_view request_id, absl::string_view state);

// An entry of the models list, and the list.
std::string RenderModel(const ServedModel& model);
std::string RenderModelList(absl::Span<const ServedModel* const> models);

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_API_RENDER_H_
