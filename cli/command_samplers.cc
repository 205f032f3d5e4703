#include <cstdio>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/commands.h"
#include "common/request/sampler_catalog.h"

namespace cinnabar {
namespace {

struct KnobName {
  Knob knob;
  const char* flag;
};
constexpr KnobName kKnobNames[] = {
    {Knob::kNumSteps, "steps"},
    {Knob::kBlockLength, "block-length"},
    {Knob::kTopP, "top-p"},
    {Knob::kTopK, "top-k"},
    {Knob::kThreshold, "threshold"},
    {Knob::kFactor, "factor"},
    {Knob::kEntropyBound, "entropy-bound"},
    {Knob::kAlgTemp, "alg-temp"},
    {Knob::kEps, "eps"},
    {Knob::kCfgScale, "cfg-scale"},
    {Knob::kEosSwitches, "logits-eos-inf, confidence-eos-eot-inf"},
};

}  // namespace

int RunSamplers(const std::vector<std::string>& args) {
  if (!args.empty() && args[0] != "--help" && args[0] != "-h") {
    return ReportError("samplers", absl::InvalidArgumentError("takes no arguments"));
  }
  std::printf("Samplers, for --sampler. All read temperature, seed, eos-penalty and forbid.\n\n");
  for (const SamplerEntry& entry : SamplerCatalog()) {
    std::vector<std::string> knobs;
    for (const KnobName& name : kKnobNames) {
      if ((entry.knobs & static_cast<uint32_t>(name.knob)) != 0) knobs.emplace_back(name.flag);
    }
    const std::string alias = entry.alias.empty() ? "" : absl::StrCat(" (", entry.alias, ")");
    std::printf("  %s%s\n      %s\n      reads %s\n      from %s\n\n",
                std::string(entry.name).c_str(), alias.c_str(), std::string(entry.summary).c_str(),
                knobs.empty() ? "no other" : absl::StrJoin(knobs, ", ").c_str(),
                std::string(entry.source).c_str());
  }
  return 0;
}

int ReportError(const std::string& command, const absl::Status& status) {
  if (status.ok()) return 0;
  std::fprintf(stderr, "cinnabar %s: %s\n", command.c_str(), std::string(status.message()).c_str());
  return status.code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
}

}  // namespace cinnabar
