#define PCRE2_CODE_UNIT_WIDTH 8
#include "common/tokenizer/regex.h"

#include <pcre2.h>

#include <cctype>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

// A full-cover pattern needs a few steps a character; this is far above any sane piece and still
// stops a catastrophic pattern within about a second.
constexpr uint32_t kMatchStepsMax = 20'000'000;
constexpr size_t kPatternBytesMax = 64 * 1024;
constexpr size_t kJitStackBytesMax = 4 << 20;

// What a thread needs to match; PCRE2 asks for one of each per thread.
struct MatchScratch {
  MatchScratch()
      : data(pcre2_match_data_create(1, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(32 * 1024, kJitStackBytesMax, nullptr)) {
    CINNABAR_CHECK(data != nullptr && context != nullptr);
    pcre2_set_match_limit(context, kMatchStepsMax);
    if (stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~MatchScratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
  MatchScratch(const MatchScratch&) = delete;
  MatchScratch& operator=(const MatchScratch&) = delete;

  pcre2_match_data* data;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

absl::Status Refused(absl::string_view pattern, absl::string_view what) {
  return absl::UnimplementedError(
      absl::StrCat("pattern ", pattern, " uses ", what, ", which PCRE2 reads differently"));
}

absl::StatusOr<std::string> FromOniguruma(absl::string_view pattern) {
  std::string out;
  bool in_class = false;
  size_t class_begin = 0;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    const absl::string_view rest = pattern.substr(i);
    if (c == '\\') {
      if (i + 1 == pattern.size()) return absl::InvalidArgumentError("pattern ends in a backslash");
      const char escaped = pattern[++i];
      if (escaped == 's') {
        out += "\\p{White_Space}";
      } else if (escaped == 'S') {
        out += "\\P{White_Space}";
      } else if (absl::string_view("wWbBhHRXKG").find(escaped) != absl::string_view::npos) {
        return Refused(pattern, absl::StrCat("\\", absl::string_view(&escaped, 1)));
      } else {
        out += {'\\', escaped};
        // \p{..} and \x{..}: the braces are not an interval.
        while (absl::string_view("pPx").find(escaped) != absl::string_view::npos &&
               i + 1 < pattern.size() && (pattern[i + 1] == '{' || out.back() != escaped)) {
          out += pattern[++i];
          if (out.back() == '}') break;
        }
      }
      continue;
    }
    if (in_class) {
      if (c == '[') return Refused(pattern, "'[' inside a class");
      if (rest.substr(0, 2) == "&&") return Refused(pattern, "&& inside a class");
      // A ']' that comes first is a literal in both engines.
      if (c == ']' && i > class_begin) in_class = false;
    } else if (c == '[') {
      in_class = true;
      class_begin = i + 1;
      if (class_begin < pattern.size() && pattern[class_begin] == '^') ++class_begin;
    } else if (rest.substr(0, 2) == "}+") {
      return Refused(pattern, "}+");
    } else if (rest.substr(0, 2) == "(?") {
      for (size_t j = i + 2; j < pattern.size() && (std::isalpha(pattern[j]) || pattern[j] == '-');
           ++j) {
        if (pattern[j] == 'm') return Refused(pattern, "flag m");
      }
    }
    out += c;
  }
  return out;
}

}  // namespace

struct Regex::Program {
  explicit Program(pcre2_code* code_in) : code(code_in) {}
  ~Program() { pcre2_code_free(code); }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  pcre2_code* code;
  bool is_jit = false;
};

absl::StatusOr<Regex> Regex::Compile(absl::string_view pattern) {
  if (pattern.size() > kPatternBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("pattern of ", pattern.size(), " bytes"));
  }
  absl::StatusOr<std::string> translated = FromOniguruma(pattern);
  if (!translated.ok()) return translated.status();
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  CINNABAR_CHECK(context != nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context, 100);
  int error = 0;
  size_t error_offset = 0;
  // PCRE2_NEVER_BACKSLASH_C: \C would cut characters.
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated->data()), translated->size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error,
                    &error_offset, context);
  pcre2_compile_context_free(context);
  if (code == nullptr) {
    PCRE2_UCHAR message[256] = {};
    pcre2_get_error_message(error, message, sizeof(message));
    return absl::InvalidArgumentError(
        absl::StrCat("pattern ", pattern, ": ", reinterpret_cast<const char*>(message)));
  }
  auto program = std::make_shared<Program>(code);
  // Without a JIT for this machine the interpreter gives the same matches, slower.
  program->is_jit = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
  return Regex(std::move(program));
}

Regex::Outcome Regex::Find(absl::string_view text, size_t from, size_t* begin, size_t* end) const {
  thread_local const MatchScratch scratch;
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  int result = 0;
  if (program_->is_jit) {
    result = pcre2_jit_match(program_->code, subject, text.size(), from, 0, scratch.data,
                             scratch.context);
  } else {
    result = pcre2_match(program_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK,
                         scratch.data, scratch.context);
  }
  if (result == PCRE2_ERROR_NOMATCH) return Outcome::kNoMatch;
  if (result < 0) return Outcome::kGaveUp;
  const size_t* offsets = pcre2_get_ovector_pointer(scratch.data);
  *begin = offsets[0];
  *end = offsets[1];
  return Outcome::kMatch;
}

}  // namespace cinnabar
