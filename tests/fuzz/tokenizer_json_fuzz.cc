// Loads a tokenizer from hostile files and, where one loads, checks what the header promises.
// Input: tokenizer.json, a zero byte, tokenizer_config.json (optional), a zero byte, a text
// (optional).
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "common/base/check.h"
#include "common/tokenizer/stream_decoder.h"
#include "common/tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using cinnabar::Tokenizer;
  // StrSplit makes no part at all of a null string_view, which an empty input may be.
  const std::string input = size == 0 ? "" : std::string(reinterpret_cast<const char*>(data), size);
  const std::vector<absl::string_view> parts =
      absl::StrSplit(input, absl::MaxSplits(absl::string_view("\0", 1), 2));
  const absl::StatusOr<Tokenizer> tokenizer =
      Tokenizer::FromJson(parts[0], parts.size() > 1 ? parts[1] : "");
  if (!tokenizer.ok()) return 0;
  std::string text = "the canvas <|im_end|> e\xCC\x81 12\xFF\n\n  x";
  if (parts.size() > 2) text.append(parts[2].data(), parts[2].size());
  for (const bool parse_special : {false, true}) {
    const std::vector<int32_t> ids = tokenizer->Encode(
        text, {.parse_special = parse_special, .add_special_tokens = parse_special});
    std::string streamed;
    cinnabar::StreamDecoder decoder(*tokenizer);
    for (const int32_t id : ids) {
      CINNABAR_CHECK(id >= 0 && id < tokenizer->vocab_size());
      // The symbol of a single byte cannot be kept out of plain text.
      CINNABAR_CHECK(parse_special || !tokenizer->IsSpecial(id) ||
                     tokenizer->TokenBytes(id).size() <= 2);
      streamed += decoder.Push(id);
    }
    streamed += decoder.Flush();
    CINNABAR_CHECK(streamed == tokenizer->DecodeText(ids));
  }
  return 0;
}
