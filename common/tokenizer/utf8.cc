#include "common/tokenizer/utf8.h"

#include <cstdint>
#include <cstring>

namespace cinnabar {

Utf8Char ReadUtf8(absl::string_view text, size_t at) {
  const auto byte = [&](size_t index) { return static_cast<uint8_t>(text[index]); };
  const uint8_t lead = byte(at);
  if (lead < 0x80) return {lead, 1, true, false};
  size_t num_bytes = 0;
  // Only the second byte has a narrower range than 80..BF: it excludes overlong forms, surrogates
  // and everything above U+10FFFF.
  uint8_t second_low = 0x80;
  uint8_t second_high = 0xBF;
  char32_t code_point = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    num_bytes = 2;
    code_point = lead & 0x1FU;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    num_bytes = 3;
    code_point = lead & 0x0FU;
    if (lead == 0xE0) second_low = 0xA0;
    if (lead == 0xED) second_high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    num_bytes = 4;
    code_point = lead & 0x07U;
    if (lead == 0xF0) second_low = 0x90;
    if (lead == 0xF4) second_high = 0x8F;
  } else {
    return {};
  }
  for (size_t i = 1; i < num_bytes; ++i) {
    if (at + i >= text.size()) return {kReplacementCharacter, i, false, true};
    const uint8_t next = byte(at + i);
    if (next < (i == 1 ? second_low : 0x80) || next > (i == 1 ? second_high : 0xBF)) {
      return {kReplacementCharacter, i, false, false};
    }
    code_point = (code_point << 6) | (next & 0x3FU);
  }
  return {code_point, num_bytes, true, false};
}

void AppendUtf8(char32_t code_point, std::string* text) {
  const auto put = [text](uint32_t byte) { text->push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

size_t ValidUtf8End(absl::string_view text, size_t from) {
  size_t at = from;
  while (at < text.size()) {
    // Eight ASCII bytes at once: most text is ASCII.
    if (at + 8 <= text.size()) {
      uint64_t word = 0;
      std::memcpy(&word, text.data() + at, 8);
      if ((word & 0x8080808080808080ULL) == 0) {
        at += 8;
        continue;
      }
    }
    const Utf8Char c = ReadUtf8(text, at);
    if (!c.is_valid) break;
    at += c.num_bytes;
  }
  return at;
}

std::string ReplaceInvalidUtf8(absl::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  size_t at = 0;
  while (at < bytes.size()) {
    const size_t end = ValidUtf8End(bytes, at);
    text.append(bytes.data() + at, end - at);
    at = end;
    if (at == bytes.size()) break;
    AppendUtf8(kReplacementCharacter, &text);
    at += ReadUtf8(bytes, at).num_bytes;
  }
  return text;
}

bool IsWhitespace(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

}  // namespace cinnabar
