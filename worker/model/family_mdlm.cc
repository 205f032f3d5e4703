// MDLM: SEDD's network under "backbone.", usually without time conditioning, giving plain logits.
// Source: kuleshov-group/mdlm, arXiv:2406.07524.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr int32_t kGpt2Rows = 50258;  // GPT-2's vocabulary and the mask token

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  spec.body = BodyKind::kDiT;
  spec.tensor_prefix = "backbone.";
  spec.dim = static_cast<int32_t>(config.Int("hidden_dim", 1, kDimMax));
  spec.num_layers = static_cast<int32_t>(config.Int("n_blocks", 1, kLayersMax));
  spec.num_heads = spec.num_kv_heads = static_cast<int32_t>(config.Int("n_heads", 1, kHeadsMax));
  // The class default differs from what ports use, so there is none here.
  spec.cond_dim = static_cast<int32_t>(config.Int("cond_dim", 1, kDimMax));
  spec.mlp_dim = 4 * spec.dim;
  spec.norm_eps = 1e-5F;
  Require(!config.Bool("causal", false), config, "causal", "true is not computed");
  SettleHeads(config, "n_heads", spec);

  ModelTraits& traits = spec.traits;
  traits.vocab_size = static_cast<int32_t>(config.Int("vocab_size", 2, kVocabularyMax));
  traits.positions_max = static_cast<int32_t>(config.Int("model_length", 1, kPositionsMax));
  // The mask token is the row after the tokenizer's; a [PAD] that the tokenizer files may show
  // there is it.
  traits.mask_token =
      static_cast<TokenId>(config.Int("mask_token_id", 0, kVocabularyMax, traits.vocab_size - 1));
  traits.eos_tokens = ReadEosTokens(facts);
  if (traits.eos_tokens.empty() && traits.vocab_size == kGpt2Rows) {
    traits.eos_tokens = {kGpt2Rows - 2};
  }
  traits.conditioned_on_sigma = config.Bool("time_conditioning", false);
  traits.default_sampler = "mdlm_cached";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeMdlmFamily() { return {.name = "mdlm", .architectures = {"MDLM"}, .read = Read}; }

}  // namespace cinnabar
