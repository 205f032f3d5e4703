// UTF-8, one character at a time. Pure; safe from any thread.
//
// "Invalid" is what The Unicode Standard (chapter 3, table 3-7) calls ill-formed: stray
// continuation bytes, overlong forms, surrogates, code points above U+10FFFF and cut sequences.
#ifndef CINNABAR_COMMON_TOKENIZER_UTF8_H_
#define CINNABAR_COMMON_TOKENIZER_UTF8_H_

#include <cstddef>
#include <string>

#include "absl/strings/string_view.h"

namespace cinnabar {

inline constexpr char32_t kReplacementCharacter = 0xFFFD;

struct Utf8Char {
  char32_t code_point = kReplacementCharacter;
  size_t num_bytes = 1;  // >= 1; of an invalid sequence: its maximal subpart
  bool is_valid = false;
  bool is_cut = false;  // invalid only because the text ended: more bytes could complete it
};

// Reads the character at `at` < text.size().
Utf8Char ReadUtf8(absl::string_view text, size_t at);

// Appends a Unicode scalar value.
void AppendUtf8(char32_t code_point, std::string* text);

// One past the last byte of the longest valid run that starts at `from`; `from` when none does.
size_t ValidUtf8End(absl::string_view text, size_t from);

// Valid UTF-8: each maximal subpart of an invalid sequence becomes one U+FFFD, as Python's
// errors="replace" and Rust's from_utf8_lossy have it.
std::string ReplaceInvalidUtf8(absl::string_view bytes);

// The Unicode property White_Space.
bool IsWhitespace(char32_t code_point);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_UTF8_H_
