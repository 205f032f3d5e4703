#include "cli/commands.h"

#include <cstdio>

#include "absl/strings/str_cat.h"

namespace cinnabar {

int RunCommand(const std::string& command, FlagSet& set, const std::vector<std::string>& args,
               const std::function<absl::Status()>& body) {
  absl::Status status = set.Parse(args);
  if (set.help_asked()) {
    std::fputs(set.Help().c_str(), stdout);
    return 0;
  }
  if (status.ok()) status = body();
  if (status.ok()) return 0;
  std::fprintf(stderr, "cinnabar %s: %s\n", command.c_str(), std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? 2 : 1;
}

absl::Status TakesNoText(const FlagSet& set, absl::string_view hint) {
  if (set.positional().empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("\"", set.positional()[0], "\" is not a flag; ", hint));
}

}  // namespace cinnabar
