// A2D ("tiny-a2d"): autoregressive checkpoints of Qwen2, Qwen3 and Llama trained on to denoise.
// Names and weights stay, only the attention mask changes. Source: ZHZisZZ/dllm,
// dllm/pipelines/a2d.
#include <algorithm>

#include "absl/strings/match.h"
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  const auto is = [&](absl::string_view kind) {
    return std::any_of(facts.architectures.begin(), facts.architectures.end(),
                       [&](const std::string& name) { return absl::StrContains(name, kind); });
  };
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec);
  if (is("Qwen2")) {
    spec.qkv_bias = true;
  } else {
    spec.qkv_bias = spec.o_bias = config.Bool("attention_bias", false);
  }
  spec.qk_norm = is("Qwen3");
  spec.mlp_bias = is("Llama") && config.Bool("mlp_bias", false);

  ModelTraits& traits = spec.traits;
  traits.mask_token = ReadMaskToken(config, facts, traits.vocab_size, -1);
  if (traits.mask_token < 0) {
    // The authors' loader appends <|mask|> to the tokenizer, so it takes the first free id.
    traits.mask_token = facts.tokenizer.size;
    if (facts.tokenizer.size == 0) {
      config.Fail(absl::StatusCode::kInvalidArgument, "mask_token_id",
                  "missing, and there are no tokenizer files to find the first free id");
    }
  }
  traits.eos_tokens = ReadEosTokens(facts);
  traits.causal_block_length = static_cast<int32_t>(
      config.Int("block_size", 1, kBlockLengthMax, config.Int("bd_size", 1, kBlockLengthMax, 0)));
  // Its authors evaluate with LLaDA's low-confidence remasking; a block-causal one is decoded like
  // SDAR.
  traits.default_sampler = traits.causal_block_length > 0 ? "block_dynamic" : "low_confidence";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeA2dFamily() {
  return {.name = "a2d",
          .architectures = {"A2DQwen2LMHeadModel", "A2DQwen3LMHeadModel", "A2DLlamaLMHeadModel"},
          .read = Read};
}

}  // namespace cinnabar
