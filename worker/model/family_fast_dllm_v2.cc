// Fast-dLLM v2: the body of Qwen2.5 with block-causal attention, and logits shifted inside a block.
// Source: arXiv:2509.26328, modeling.py of Efficient-Large-Model/Fast_dLLM_v2.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr int64_t kBlockLength = 32;

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec);
  spec.qkv_bias = true;
  ModelTraits& traits = spec.traits;
  ReadMaskedTokens(config, facts, kQwen25Mask, traits);
  traits.causal_block_length =
      static_cast<int32_t>(config.Int("bd_size", 1, kBlockLengthMax, kBlockLength));
  traits.shift_logits = true;
  traits.default_sampler = "fast_dllm_v2";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeFastDllmV2Family() {
  return {.name = "fast_dllm_v2", .architectures = {"Fast_dLLM_QwenForCausalLM"}, .read = Read};
}

}  // namespace cinnabar
