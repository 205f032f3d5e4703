// The normalizers of tokenizer.json that change text before it is split.
#ifndef CINNABAR_COMMON_TOKENIZER_NORMALIZER_H_
#define CINNABAR_COMMON_TOKENIZER_NORMALIZER_H_

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/tokenizer/regex.h"

namespace cinnabar {

enum class UnicodeForm { kNfc, kNfd, kNfkc, kNfkd };

// `text` is valid UTF-8, and so is the result. Linear, up to sorting a run of combining marks. The
// Unicode version is utf8proc's.
std::string NormalizeUnicode(absl::string_view text, UnicodeForm form);

// Unicode lower case, character by character (no final-sigma rule, as the tokenizers library has
// it).
std::string LowercaseUnicode(absl::string_view text);

struct NormalizerStep {
  enum class Kind { kUnicode, kLowercase, kPrepend, kReplaceString, kReplaceRegex, kStrip };
  Kind kind = Kind::kUnicode;
  UnicodeForm form = UnicodeForm::kNfc;
  std::string pattern;         // kReplaceString: what is replaced; not empty
  std::optional<Regex> regex;  // kReplaceRegex
  std::string content;         // kPrepend, kReplace*
  bool strip_left = false;     // kStrip
  bool strip_right = false;
};

// Steps in order; no step means the identity. Immutable; safe from any thread.
class Normalizer {
 public:
  Normalizer() = default;
  explicit Normalizer(std::vector<NormalizerStep> steps) : steps_(std::move(steps)) {}

  bool is_identity() const { return steps_.empty(); }
  // `text` is valid UTF-8.
  std::string Apply(absl::string_view text) const;

 private:
  std::vector<NormalizerStep> steps_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_NORMALIZER_H_
