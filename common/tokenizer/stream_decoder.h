// Detokenization of ids that arrive one after the other.
#ifndef CINNABAR_COMMON_TOKENIZER_STREAM_DECODER_H_
#define CINNABAR_COMMON_TOKENIZER_STREAM_DECODER_H_

#include <cstdint>
#include <string>

#include "common/tokenizer/tokenizer.h"

namespace cinnabar {

// Every string it returns is valid UTF-8: a character's bytes are held back (3 at most) until the
// last of them came. All strings together, the one of Flush() last, are Tokenizer::DecodeText(all
// ids). One stream, one thread.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, const DecodeOptions& options = {})
      : tokenizer_(std::move(tokenizer)), options_(options) {}

  // The text that became certain with `id`; often empty.
  std::string Push(int32_t id);
  // What is held back, as U+FFFD; empty when nothing is. Ready for a new stream afterwards.
  std::string Flush();

 private:
  Tokenizer tokenizer_;
  DecodeOptions options_;
  std::string held_;  // the start of one character
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_STREAM_DECODER_H_
