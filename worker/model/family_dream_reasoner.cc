// The block-causal Dream: the body of Qwen3, no shift. It shares its model_type with the first Dream and
// nothing else. Source: SJTU-DENG-Lab/Diffulex.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr TokenId kQwen3Mask = 151669;
constexpr int64_t kBlockLength = 32;

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec);
  spec.qkv_bias = spec.o_bias = config.Bool("attention_bias", false);
  spec.qk_norm = true;
  ModelTraits& traits = spec.traits;
  traits.mask_token = ReadMaskToken(config, facts, traits.vocab_size, kQwen3Mask);
  if (traits.mask_token < 0) {
    config.Fail(absl::StatusCode::kInvalidArgument, "mask_token_id",
                "missing, and the tokenizer files name no mask token");
  }
  traits.eos_tokens = ReadEosTokens(facts);
  traits.causal_block_length =
      static_cast<int32_t>(config.Int("block_size", 1, kBlockLengthMax, kBlockLength));
  traits.default_sampler = "block_dynamic";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeDreamReasonerFamily() {
  return {.name = "dream_reasoner", .architectures = {"DreamForCausalLM"}, .read = Read};
}

}  // namespace cinnabar
