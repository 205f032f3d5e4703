#include "common/tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "common/base/check.h"
#include "common/tokenizer/utf8.h"

namespace cinnabar {
namespace {

// utf8proc_map sorts combining marks by swapping neighbours, which is quadratic in a run a stranger
// may choose. So only its tables are used here; the run is sorted with stable_sort, and
// utf8proc_normalize_utf32, which is linear, composes.
void AppendNormalized(absl::string_view text, UnicodeForm form, std::string* out) {
  const bool is_compatibility = form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd;
  const bool is_composed = form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc;
  auto options = static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE |
                                                (is_compatibility ? UTF8PROC_COMPAT : 0));
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = ReadUtf8(text, at);
    at += c.num_bytes;
    utf8proc_int32_t parts[64];  // the longest decomposition, U+FDFA, has 18
    const utf8proc_ssize_t num_parts = utf8proc_decompose_char(
        static_cast<utf8proc_int32_t>(c.code_point), parts, 64, options, nullptr);
    CINNABAR_CHECK(num_parts >= 0 && num_parts <= 64);
    points.insert(points.end(), parts, parts + num_parts);
  }
  const auto combining = [](utf8proc_int32_t point) {
    return utf8proc_get_property(point)->combining_class;
  };
  for (size_t begin = 0; begin < points.size();) {
    if (combining(points[begin]) == 0) {
      ++begin;
      continue;
    }
    size_t end = begin;
    while (end < points.size() && combining(points[end]) != 0) ++end;
    std::stable_sort(
        points.begin() + static_cast<ptrdiff_t>(begin),
        points.begin() + static_cast<ptrdiff_t>(end),
        [&](utf8proc_int32_t a, utf8proc_int32_t b) { return combining(a) < combining(b); });
    begin = end;
  }
  size_t num_points = points.size();
  if (is_composed) {
    options = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    const utf8proc_ssize_t composed =
        utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(num_points), options);
    CINNABAR_CHECK(composed >= 0);
    num_points = static_cast<size_t>(composed);
  }
  for (size_t i = 0; i < num_points; ++i) AppendUtf8(static_cast<char32_t>(points[i]), out);
}

std::string ReplaceRegex(absl::string_view text, const Regex& regex, const std::string& content) {
  std::string out;
  size_t copied = 0;
  size_t from = 0;
  size_t begin = 0;
  size_t end = 0;
  while (from <= text.size() && regex.Find(text, from, &begin, &end) == Regex::Outcome::kMatch) {
    out.append(text.data() + copied, begin - copied);
    out += content;
    copied = end;
    from = end;
    if (begin == end) from += end < text.size() ? ReadUtf8(text, end).num_bytes : 1;
  }
  out.append(text.data() + copied, text.size() - copied);
  return out;
}

absl::string_view StripWhitespace(absl::string_view text, bool left, bool right) {
  while (left && !text.empty()) {
    const Utf8Char c = ReadUtf8(text, 0);
    if (!IsWhitespace(c.code_point)) break;
    text.remove_prefix(c.num_bytes);
  }
  while (right && !text.empty()) {
    size_t at = text.size() - 1;
    while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
    if (!IsWhitespace(ReadUtf8(text, at).code_point)) break;
    text.remove_suffix(text.size() - at);
  }
  return text;
}

}  // namespace

std::string NormalizeUnicode(absl::string_view text, UnicodeForm form) {
  std::string out;
  out.reserve(text.size());
  // ASCII is its own normal form, and an ASCII character never joins the one before it: only runs
  // of other characters, with the ASCII character before each, need work. Below U+0300 NFC changes
  // nothing.
  size_t at = 0;
  while (at < text.size()) {
    size_t run = at;
    while (run < text.size() && static_cast<uint8_t>(text[run]) < 0x80) ++run;
    size_t end = run;
    bool is_below_0300 = true;
    while (end < text.size() && static_cast<uint8_t>(text[end]) >= 0x80) {
      is_below_0300 = is_below_0300 && static_cast<uint8_t>(text[end]) < 0xCC;
      ++end;
    }
    if (run > at) --run;
    out.append(text.data() + at, run - at);
    if (form == UnicodeForm::kNfc && is_below_0300) {
      out.append(text.data() + run, end - run);
    } else {
      AppendNormalized(text.substr(run, end - run), form, &out);
    }
    at = end;
  }
  return out;
}

std::string LowercaseUnicode(absl::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = ReadUtf8(text, at);
    at += c.num_bytes;
    if (c.code_point == 0x130) {
      out += "i\xCC\x87";  // the one character whose lower case is two
    } else {
      AppendUtf8(
          static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c.code_point))),
          &out);
    }
  }
  return out;
}

std::string Normalizer::Apply(absl::string_view text) const {
  std::string out(text);
  for (const NormalizerStep& step : steps_) {
    switch (step.kind) {
      case NormalizerStep::Kind::kUnicode:
        out = NormalizeUnicode(out, step.form);
        break;
      case NormalizerStep::Kind::kLowercase:
        out = LowercaseUnicode(out);
        break;
      case NormalizerStep::Kind::kPrepend:
        if (!out.empty()) out.insert(0, step.content);
        break;
      case NormalizerStep::Kind::kReplaceString:
        out = absl::StrReplaceAll(out, {{step.pattern, step.content}});
        break;
      case NormalizerStep::Kind::kReplaceRegex:
        out = ReplaceRegex(out, *step.regex, step.content);
        break;
      case NormalizerStep::Kind::kStrip:
        out = std::string(StripWhitespace(out, step.strip_left, step.strip_right));
        break;
    }
  }
  return out;
}

}  // namespace cinnabar
