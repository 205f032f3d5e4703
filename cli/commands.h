// The subcommands of `cinnabar`. Each takes the arguments after its name and returns the exit
// status: 0, 1 (it failed; the reason is on stderr) or 2 (the command line is wrong).
#ifndef CINNABAR_CLI_COMMANDS_H_
#define CINNABAR_CLI_COMMANDS_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/config/flags.h"

namespace cinnabar {

int RunBench(const std::vector<std::string>& args);
int RunGenerate(const std::vector<std::string>& args);
int RunKeys(const std::vector<std::string>& args);
int RunLogits(const std::vector<std::string>& args);
int RunModel(const std::vector<std::string>& args);
int RunQueue(const std::vector<std::string>& args);
int RunSamplers(const std::vector<std::string>& args);
int RunScore(const std::vector<std::string>& args);
int RunTop(const std::vector<std::string>& args);
int RunUp(const std::vector<std::string>& args);

// What each of them does: parses the flags, answers --help, runs `body`, prints its error as
// "cinnabar COMMAND: MESSAGE". The exit status.
int RunCommand(const std::string& command, FlagSet& set, const std::vector<std::string>& args,
               const std::function<absl::Status()>& body);
// InvalidArgument with this hint when there is something that belongs to no flag.
absl::Status TakesNoText(const FlagSet& set, absl::string_view hint);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_COMMANDS_H_
