// BD3-LM: MDLM's network with block-causal attention. Sequences longer than the trained window,
// where the authors' cache slides and positions start again, are refused by length.
// Source: kuleshov-group/bd3lms, arXiv:2503.09573.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadMdlmNetwork(config, facts, spec);
  ModelTraits& traits = spec.traits;
  // Finished blocks would have to be computed again for each noise level.
  Require(!traits.conditioned_on_sigma, config, "time_conditioning",
          "true is not computed for blocks");
  Require(config.Bool("adaln", true), config, "adaln", "false is not computed");
  traits.causal_block_length = static_cast<int32_t>(config.Int("block_size", 1, kBlockLengthMax));
  traits.default_sampler = "bd3lm_first_hitting";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeBd3lmFamily() { return {.name = "bd3lm", .architectures = {"BD3LM"}, .read = Read}; }

}  // namespace cinnabar
