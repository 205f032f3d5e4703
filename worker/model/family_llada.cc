// LLaDA-8B and LLaDA-1.5: Llama blocks under OLMo's names, full attention, no shift.
// Source: ML-GSAI/LLaDA.
#include "absl/strings/str_cat.h"
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr TokenId kLladaMask = 126336;

// What the config class can say and the released models do not use.
void RefuseWhatIsNotComputed(JsonFields& config) {
  const std::string activation = config.String("activation_type", "silu");
  Require(activation == "silu", config, "activation_type",
          absl::StrCat("activation \"", activation.substr(0, 40), "\" is not computed"));
  const std::string block = config.String("block_type", "llama");
  Require(block == "llama", config, "block_type",
          absl::StrCat("blocks of type \"", block.substr(0, 40), "\" are not computed"));
  const std::string norm = config.String("layer_norm_type", "rms");
  Require(norm == "rms", config, "layer_norm_type",
          absl::StrCat("norms of type \"", norm.substr(0, 40), "\" are not computed"));
  Require(config.Int("block_group_size", 1, kLayersMax, 1) == 1, config, "block_group_size",
          "grouped blocks are not read");
  Require(config.Bool("rope", true), config, "rope", "positions without rotation are not computed");
  Require(config.Bool("layer_norm_with_affine", true), config, "layer_norm_with_affine",
          "norms without weights are not computed");
  Require(!config.Has("clip_qkv"), config, "clip_qkv", "clipping of q, k and v is not computed");
  for (const absl::string_view key : {"alibi", "attention_layer_norm", "bias_for_layer_norm",
                                      "include_bias", "input_emb_norm", "scale_logits"}) {
    Require(!config.Bool(key, false), config, key, "true is not computed");
  }
}

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  spec.body = BodyKind::kDecoder;
  spec.dim = static_cast<int32_t>(config.Int("d_model", 1, kDimMax));
  spec.num_layers = static_cast<int32_t>(config.Int("n_layers", 1, kLayersMax));
  spec.num_heads = static_cast<int32_t>(config.Int("n_heads", 1, kHeadsMax));
  spec.num_kv_heads = static_cast<int32_t>(
      config.Int("n_kv_heads", 1, kHeadsMax,
                 config.Bool("multi_query_attention", false) ? 1 : spec.num_heads));
  spec.mlp_dim = static_cast<int32_t>(
      config.Int("mlp_hidden_size", 1, kDimMax, config.Int("mlp_ratio", 1, 64, 4) * spec.dim));
  spec.norm_eps = static_cast<float>(config.Number("rms_norm_eps", 0.0, 1.0, 1e-5));
  spec.rope_theta = config.Number("rope_theta", 1.0, 1e12);
  spec.tied_head = config.Bool("weight_tying");
  spec.qkv_bias = config.Bool("include_qkv_bias", false);
  RefuseWhatIsNotComputed(config);
  SettleHeads(config, "n_heads", spec);
  spec.names = {
      .embedding = "model.transformer.wte",
      .final_norm = "model.transformer.ln_f",
      .head = "model.transformer.ff_out",  // not the ff_out inside a block, which is `down`
      .layer_prefix = "model.transformer.blocks.",
      .attention_norm = "attn_norm",
      .q = "q_proj",
      .k = "k_proj",
      .v = "v_proj",
      .o = "attn_out",
      .mlp_norm = "ff_norm",
      .gate = "ff_proj",  // the one SiLU applies to
      .up = "up_proj",
      .down = "ff_out"};

  ModelTraits& traits = spec.traits;
  const int64_t vocab_size = config.Int("vocab_size", 1, kVocabularyMax);
  traits.vocab_size =
      static_cast<int32_t>(config.Int("embedding_size", 1, kVocabularyMax, vocab_size));
  traits.positions_max = static_cast<int32_t>(config.Int("max_sequence_length", 1, kPositionsMax));
  traits.mask_token = ReadMaskToken(config, facts, traits.vocab_size, kLladaMask);
  if (traits.mask_token < 0) {
    config.Fail(absl::StatusCode::kInvalidArgument, "mask_token_id",
                "missing, and the tokenizer files name no mask token");
  }
  // The end of a turn is kept apart from the end of text: LLaDA's EOS switches treat them
  // differently.
  traits.eos_tokens = facts.eos_tokens;
  traits.eot_token = AddedToken(facts.tokenizer, {"<|eot_id|>"});
  traits.default_sampler = "low_confidence";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeLladaFamily() {
  return {.name = "llada", .architectures = {"LLaDAModelLM", "LLaDAModel"}, .read = Read};
}

}  // namespace cinnabar
