// Dream-7B, Dream-Coder, DiffuCoder: the body of Qwen2.5 with full attention and shifted logits.
// Source: HKUNLP/Dream, apple/ml-diffucoder.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr TokenId kDreamMask = 151666;

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec);
  spec.qkv_bias = true;
  ModelTraits& traits = spec.traits;
  ReadMaskedTokens(config, facts, kDreamMask, traits);
  traits.shift_logits = true;
  traits.default_sampler = "entropy";  // alg="entropy" of the authors' examples
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeDreamFamily() {
  return {.name = "dream", .architectures = {"DreamModel"}, .read = Read};
}

}  // namespace cinnabar
