#include "common/config/flags.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr size_t kHelpColumn = 30;

std::string Normalise(absl::string_view name) { return absl::StrReplaceAll(name, {{"_", "-"}}); }

// Levenshtein distance, to suggest the flag that was meant.
size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({substituted, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

FlagSet::FlagSet(std::string usage, std::string intro)
    : usage_(std::move(usage)), intro_(std::move(intro)) {}

void FlagSet::AddFlag(Flag flag) {
  flag.name = Normalise(flag.name);
  CINNABAR_CHECK(FindFlag(flag.name) == nullptr) << "--" << flag.name << " is declared twice";
  flag.section = std::exchange(next_section_, "");
  flags_.push_back(std::move(flag));
}

void FlagSet::Add(std::string name, std::string* target, std::string value_name, std::string help) {
  AddFlag({.name = std::move(name),
           .value_name = std::move(value_name),
           .help = std::move(help),
           .default_text = *target,
           .set = [target](absl::string_view text) {
             *target = std::string(text);
             return true;
           }});
}

void FlagSet::Add(std::string name, int32_t* target, std::string value_name, std::string help) {
  AddFlag({.name = std::move(name),
           .value_name = std::move(value_name),
           .help = std::move(help),
           .default_text = *target == 0 ? "" : absl::StrCat(*target),
           .set = [target](absl::string_view text) { return absl::SimpleAtoi(text, target); }});
}

void FlagSet::Add(std::string name, uint64_t* target, std::string value_name, std::string help) {
  AddFlag({.name = std::move(name),
           .value_name = std::move(value_name),
           .help = std::move(help),
           .default_text = absl::StrCat(*target),
           .set = [target](absl::string_view text) { return absl::SimpleAtoi(text, target); }});
}

void FlagSet::Add(std::string name, float* target, std::string value_name, std::string help) {
  AddFlag({.name = std::move(name),
           .value_name = std::move(value_name),
           .help = std::move(help),
           .default_text = absl::StrCat(*target),
           .set = [target](absl::string_view text) { return absl::SimpleAtof(text, target); }});
}

void FlagSet::Add(std::string name, bool* target, std::string help) {
  AddFlag(
      {.name = std::move(name), .help = std::move(help), .set = [target](absl::string_view text) {
         if (text.empty()) {
           *target = true;
           return true;
         }
         return absl::SimpleAtob(text, target);
       }});
}

void FlagSet::Add(std::string name, std::vector<std::string>* target, std::string value_name,
                  std::string help) {
  AddFlag({.name = std::move(name),
           .value_name = std::move(value_name),
           .help = std::move(help),
           .set =
               [target](absl::string_view text) {
                 target->emplace_back(text);
                 return true;
               },
           .repeated = true});
}

void FlagSet::Section(std::string title) { next_section_ = std::move(title); }
void FlagSet::Examples(std::string text) { examples_ = std::move(text); }

FlagSet::Flag* FlagSet::FindFlag(absl::string_view name) {
  const std::string wanted = Normalise(name);
  const auto it = std::find_if(flags_.begin(), flags_.end(),
                               [&](const Flag& flag) { return flag.name == wanted; });
  return it == flags_.end() ? nullptr : &*it;
}

bool FlagSet::Has(absl::string_view name) const {
  const Flag* flag = const_cast<FlagSet*>(this)->FindFlag(name);
  CINNABAR_CHECK(flag != nullptr) << "no flag --" << name;
  return flag->given;
}

std::string FlagSet::Nearest(absl::string_view name) const {
  const Flag* best = nullptr;
  size_t best_distance = 0;
  for (const Flag& flag : flags_) {
    const size_t distance = EditDistance(Normalise(name), flag.name);
    if (best == nullptr || distance < best_distance) {
      best = &flag;
      best_distance = distance;
    }
  }
  return best != nullptr && best_distance <= 3 ? absl::StrCat("; did you mean --", best->name, "?")
                                               : "; --help lists the flags";
}

absl::Status FlagSet::Parse(const std::vector<std::string>& args) {
  for (size_t i = 0; i < args.size(); ++i) {
    absl::string_view arg = args[i];
    if (arg == "--") {
      positional_.insert(positional_.end(), args.begin() + i + 1, args.end());
      return absl::OkStatus();
    }
    if (arg == "-h" || arg == "--help") {
      help_asked_ = true;
      continue;
    }
    if (arg.size() < 2 || arg[0] != '-') {
      positional_.emplace_back(arg);
      continue;
    }
    if (arg[1] != '-') {
      return absl::InvalidArgumentError(
          absl::StrCat(arg, ": flags begin with two dashes", Nearest(arg.substr(1))));
    }
    arg.remove_prefix(2);
    const size_t equals = arg.find('=');
    const absl::string_view name = arg.substr(0, equals);
    Flag* flag = FindFlag(name);
    if (flag == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name, Nearest(name)));
    }
    if (flag->given && !flag->repeated) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag->name, " is given twice; give it once"));
    }
    flag->given = true;
    absl::string_view value;
    if (equals != absl::string_view::npos) {
      value = arg.substr(equals + 1);
    } else if (!flag->value_name.empty()) {
      if (i + 1 == args.size()) {
        return absl::InvalidArgumentError(absl::StrCat("--", flag->name, " needs a value: --",
                                                       flag->name, " ", flag->value_name));
      }
      value = args[++i];
    }
    if (!flag->set(value)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag->name, " ", value, ": not a ",
                       flag->value_name.empty() ? "true or false" : flag->value_name));
    }
  }
  return absl::OkStatus();
}

std::string FlagSet::Help() const {
  std::string text = absl::StrCat("usage: ", usage_, "\n\n", intro_, "\n");
  for (const Flag& flag : flags_) {
    if (!flag.section.empty()) absl::StrAppend(&text, "\n", flag.section, "\n");
    std::string left =
        absl::StrCat("  --", flag.name, flag.value_name.empty() ? "" : " ", flag.value_name);
    left.resize(std::max(left.size() + 2, kHelpColumn), ' ');
    const std::string given_default =
        flag.default_text.empty() ? "" : absl::StrCat(" [", flag.default_text, "]");
    absl::StrAppend(&text, left, flag.help, given_default, "\n");
  }
  if (!examples_.empty()) absl::StrAppend(&text, "\n", examples_);
  return text;
}

}  // namespace cinnabar
