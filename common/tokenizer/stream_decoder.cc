#include "common/tokenizer/stream_decoder.h"

#include <utility>

#include "absl/strings/string_view.h"
#include "common/tokenizer/utf8.h"

namespace cinnabar {

std::string StreamDecoder::Push(int32_t id) {
  if (options_.skip_special && tokenizer_.IsSpecial(id)) return "";
  const absl::string_view bytes = tokenizer_.TokenBytes(id);
  held_.append(bytes.data(), bytes.size());
  size_t at = 0;
  while (at < held_.size()) {
    at = ValidUtf8End(held_, at);
    if (at == held_.size()) break;
    const Utf8Char c = ReadUtf8(held_, at);
    if (c.is_cut) break;
    at += c.num_bytes;  // invalid whatever follows
  }
  const std::string text = ReplaceInvalidUtf8(absl::string_view(held_).substr(0, at));
  held_.erase(0, at);
  return text;
}

std::string StreamDecoder::Flush() { return ReplaceInvalidUtf8(std::exchange(held_, {})); }

}  // namespace cinnabar
