#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "worker/model/inspect.h"

namespace cinnabar {
namespace {

absl::Status Inspect(const FlagSet& set, bool json) {
  if (set.positional().size() != 2 || set.positional()[0] != "inspect") {
    return absl::InvalidArgumentError("say: cinnabar model inspect DIR");
  }
  CINNABAR_ASSIGN_OR_RETURN(const ModelReport report, InspectModel(set.positional()[1]));
  if (json) {
    std::printf("%s\n", ReportToJson(report).dump(2).c_str());
  } else {
    std::printf("%s", FormatReport(report).c_str());
  }
  if (report.problems.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("this model does not load: ", report.problems.front()));
}

}  // namespace

int RunModel(const std::vector<std::string>& args) {
  bool json = false;
  FlagSet set(
      "cinnabar model inspect DIR [--json]",
      "Says what a checkpoint is: family, sizes, dtype, mask token, block length, memory needed, "
      "and what is "
      "not\nsupported and why. Reads headers only; exits with 1 when the model does not load.");
  set.Add("json", &json, "the same as one JSON object");
  return RunCommand("model", set, args, [&] { return Inspect(set, json); });
}

}  // namespace cinnabar
