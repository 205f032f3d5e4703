// Open-dCoder: weights of a plain Qwen2ForCausalLM, trained to denoise, with Dream's shift. Only
// its mask token tells it from the autoregressive model. Source: pengzhangzhi/Open-dLLM.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec);
  spec.qkv_bias = true;
  ModelTraits& traits = spec.traits;
  traits.mask_token = ReadMaskToken(config, facts, traits.vocab_size, -1);
  if (traits.mask_token < 0) {
    config.Fail(
        absl::StatusCode::kUnimplemented, "architectures",
        "Qwen2ForCausalLM without a mask token is an autoregressive model, and this engine "
        "denoises. Train it with masked diffusion first (as dLLM's A2D or Open-dLLM do), then add "
        "the mask token to tokenizer_config.json or mask_token_id to config.json, or name the "
        "architecture A2DQwen2LMHeadModel if its logits are not shifted");
  }
  traits.eos_tokens = ReadEosTokens(facts);
  traits.shift_logits = true;
  // Of the samplers its authors use, the one whose result does not hang on a threshold.
  traits.default_sampler = "low_confidence";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeOpenDcoderFamily() {
  return {.name = "open_dcoder", .architectures = {"Qwen2ForCausalLM"}, .read = Read};
}

}  // namespace cinnabar
