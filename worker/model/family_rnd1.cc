// RND1: the body of Qwen3's mixture of experts with full attention and shifted logits.
// Source: RadicalNumerics/RND1.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec);
  spec.qkv_bias = spec.o_bias = config.Bool("attention_bias", false);
  spec.qk_norm = true;
  ReadQwen3Experts(config, spec);
  ModelTraits& traits = spec.traits;
  ReadMaskedTokens(config, facts, kQwen3Mask, traits);
  traits.shift_logits = true;
  traits.default_sampler = "entropy";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeRnd1Family() {
  return {.name = "rnd1", .architectures = {"RND1", "RND1LM"}, .read = Read};
}

}  // namespace cinnabar
