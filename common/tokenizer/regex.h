// The regular expressions of tokenizer.json: written for Oniguruma (Ruby syntax), run by PCRE2.
//
// Compile() rewrites what the two engines read differently, and refuses what it cannot rewrite, so
// that a pattern either means the same here or does not load:
//   \s \S      the Unicode property White_Space (PCRE2's own \s also takes U+180E)
//   ^ $        match at every line, as Ruby has it
//   refused    \w \W \b \B \h \H \R \X \K \G, a bare '[' or "&&" inside a class (nested sets), "}+"
//   (in
//              Ruby a repeated interval, in PCRE2 a possessive one), inline flag m
// Letters and numbers follow the Unicode version of the installed PCRE2 (10.42: Unicode 14).
#ifndef CINNABAR_COMMON_TOKENIZER_REGEX_H_
#define CINNABAR_COMMON_TOKENIZER_REGEX_H_

#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace cinnabar {

// Immutable after Compile(); safe from any thread. Copies share the compiled program.
class Regex {
 public:
  // InvalidArgument: the pattern does not compile. Unimplemented: it means something else in PCRE2.
  static absl::StatusOr<Regex> Compile(absl::string_view pattern);

  enum class Outcome { kMatch, kNoMatch, kGaveUp };
  // The leftmost match at or after `from` in `text` (valid UTF-8); look-behind sees the text before
  // `from`. The match may be empty. kGaveUp: the matching steps of one call ran over their limit,
  // which only a pattern that backtracks without bound can do.
  Outcome Find(absl::string_view text, size_t from, size_t* begin, size_t* end) const;

 private:
  struct Program;
  explicit Regex(std::shared_ptr<const Program> program) : program_(std::move(program)) {}
  std::shared_ptr<const Program> program_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_REGEX_H_
