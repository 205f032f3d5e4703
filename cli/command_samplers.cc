#include <cstdio>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/commands.h"
#include "common/base/status.h"
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
    {Knob::kSubBlockLength, "sub-block-length"},
    {Knob::kKvReuse, "kv-reuse"},
    {Knob::kCfgScale, "cfg-scale"},
    {Knob::kCooling, "temperature-start, temperature-end"},
    {Knob::kAdaptiveStop, "stable-steps, confident-entropy"},
    {Knob::kEosSwitches, "logits-eos-inf, confidence-eos-eot-inf"},
    {Knob::kEta, "eta"},
    {Knob::kRemaskingWindow, "t-on, t-off, alpha-on"},
    {Knob::kEditing, "edit-threshold, edit-steps"},
    {Knob::kRepeatPenalty, "repeat-penalty"},
    {Knob::kLowThreshold, "low-threshold"},
    {Knob::kEosEarlyStop, "eos-early-stop"},
};

void PrintSamplers() {
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
}

}  // namespace

int RunSamplers(const std::vector<std::string>& args) {
  FlagSet set("cinnabar samplers", "Lists the samplers and the knobs that each one reads.");
  return RunCommand("samplers", set, args, [&]() -> absl::Status {
    CINNABAR_RETURN_IF_ERROR(TakesNoText(set, "it takes none"));
    PrintSamplers();
    return absl::OkStatus();
  });
}

}  // namespace cinnabar
