// MDLM: SEDD's network under "backbone.", usually without time conditioning, giving plain logits.
// Source: kuleshov-group/mdlm, arXiv:2406.07524.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadMdlmNetwork(config, facts, spec);
  spec.traits.default_sampler = "mdlm_cached";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeMdlmFamily() { return {.name = "mdlm", .architectures = {"MDLM"}, .read = Read}; }

}  // namespace cinnabar
