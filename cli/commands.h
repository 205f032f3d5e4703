// The subcommands of `cinnabar`. Each takes the arguments after its name and returns the exit
// status: 0, 1 (it failed; the reason is on stderr) or 2 (the command line is wrong).
#ifndef CINNABAR_CLI_COMMANDS_H_
#define CINNABAR_CLI_COMMANDS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace cinnabar {

int RunBench(const std::vector<std::string>& args);
int RunGenerate(const std::vector<std::string>& args);
int RunKeys(const std::vector<std::string>& args);
int RunLogits(const std::vector<std::string>& args);
int RunModel(const std::vector<std::string>& args);
int RunSamplers(const std::vector<std::string>& args);
int RunUp(const std::vector<std::string>& args);

// Prints "cinnabar COMMAND: MESSAGE" and returns the exit status for it.
int ReportError(const std::string& command, const absl::Status& status);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_COMMANDS_H_
