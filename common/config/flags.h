// Command-line flags of one subcommand: declared with a target variable, parsed strictly, explained
// by --help. Unknown flags, missing values and values that do not parse are errors that name the
// fix.
#ifndef CINNABAR_COMMON_CONFIG_FLAGS_H_
#define CINNABAR_COMMON_CONFIG_FLAGS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace cinnabar {

class FlagSet {
 public:
  // `usage` is the line after "usage:", `intro` the paragraph below it.
  FlagSet(std::string usage, std::string intro);

  // Each takes the flag's name without dashes, a target that keeps its value when the flag is
  // absent (it is shown as the default), the name of the value in help, and one line of help.
  // Targets outlive the set.
  void Add(std::string name, std::string* target, std::string value_name, std::string help);
  void Add(std::string name, int32_t* target, std::string value_name, std::string help);
  void Add(std::string name, uint64_t* target, std::string value_name, std::string help);
  void Add(std::string name, float* target, std::string value_name, std::string help);
  void Add(std::string name, bool* target,
           std::string help);  // --name sets it, --name=false clears it
  // A flag that may be given several times.
  void Add(std::string name, std::vector<std::string>* target, std::string value_name,
           std::string help);
  // A heading above the flags added next.
  void Section(std::string title);
  // Printed at the end of the help text.
  void Examples(std::string text);

  // Takes "--name value" and "--name=value"; '-' and '_' in names are alike; "--" ends the flags.
  // What is not a flag goes to `positional`. `help_asked` becomes true on --help or -h.
  absl::Status Parse(const std::vector<std::string>& args);

  bool Has(absl::string_view name) const;  // was it given?
  bool help_asked() const { return help_asked_; }
  const std::vector<std::string>& positional() const { return positional_; }
  std::string Help() const;

 private:
  struct Flag {
    std::string name;
    std::string value_name;  // empty: a switch
    std::string help;
    std::string default_text;
    std::function<bool(absl::string_view)> set;  // false: the value does not parse
    bool given = false;
    bool repeated = false;
    std::string section;  // heading printed before it
  };
  void AddFlag(Flag flag);
  Flag* FindFlag(absl::string_view name);
  std::string Nearest(absl::string_view name) const;

  std::string usage_;
  std::string intro_;
  std::string examples_;
  std::string next_section_;
  std::vector<Flag> flags_;
  std::vector<std::string> positional_;
  bool help_asked_ = false;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_CONFIG_FLAGS_H_
