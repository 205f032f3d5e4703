#include "worker/model/family_common.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace cinnabar {
namespace {

// Scaling of the rotary embedding: only "default" means none.
void RequireNoRopeScaling(JsonFields& config, absl::string_view key) {
  if (!config.Has(key)) return;
  JsonFields scaling = config.Object(key);
  const std::string type = scaling.String("rope_type", scaling.String("type", "default"));
  Require(type == "default", config, key,
          absl::StrCat("rope scaling \"", type.substr(0, 40), "\" is not computed"));
  if (!scaling.status().ok()) config.Fail(absl::StatusCode::kInvalidArgument, key, "not readable");
}

void RequireFullAttentionLayers(JsonFields& config) {
  for (const std::string& type : config.Strings("layer_types")) {
    Require(type == "full_attention", config, "layer_types",
            absl::StrCat("layers of type \"", type.substr(0, 40), "\" are not computed"));
  }
  Require(!config.Bool("use_sliding_window", false) || !config.Has("sliding_window"), config,
          "use_sliding_window", "sliding windows are not computed");
}

}  // namespace

void Require(bool supported, JsonFields& config, absl::string_view key, absl::string_view problem) {
  if (!supported) config.Fail(absl::StatusCode::kUnimplemented, key, problem);
}

void SettleHeads(JsonFields& config, absl::string_view heads_key, ModelSpec& spec) {
  if (!config.status().ok()) return;
  if (spec.head_dim == 0) {
    if (spec.dim % spec.num_heads != 0) {
      config.Fail(absl::StatusCode::kInvalidArgument, heads_key,
                  absl::StrCat(spec.num_heads, " heads do not divide the width ", spec.dim));
      return;
    }
    spec.head_dim = spec.dim / spec.num_heads;
  }
  if (spec.num_heads % spec.num_kv_heads != 0) {
    config.Fail(absl::StatusCode::kInvalidArgument, heads_key,
                absl::StrCat(spec.num_kv_heads, " key-value heads do not divide ", spec.num_heads,
                             " heads"));
  } else if (spec.head_dim % 2 != 0) {
    config.Fail(
        absl::StatusCode::kInvalidArgument, heads_key,
        absl::StrCat("a head dimension of ", spec.head_dim, " cannot be rotated: it is odd"));
  }
}

void ReadTransformersDecoder(JsonFields& config, ModelSpec& spec, const DecoderKeys& keys) {
  spec.body = BodyKind::kDecoder;
  spec.traits.vocab_size = static_cast<int32_t>(config.Int("vocab_size", 1, kVocabularyMax));
  spec.traits.positions_max =
      static_cast<int32_t>(config.Int("max_position_embeddings", 1, kPositionsMax));
  spec.dim = static_cast<int32_t>(config.Int("hidden_size", 1, kDimMax));
  spec.mlp_dim = static_cast<int32_t>(config.Int(keys.mlp_dim, 1, kDimMax));
  spec.num_layers = static_cast<int32_t>(config.Int("num_hidden_layers", 1, kLayersMax));
  spec.num_heads = static_cast<int32_t>(config.Int("num_attention_heads", 1, kHeadsMax));
  spec.num_kv_heads =
      static_cast<int32_t>(config.Int("num_key_value_heads", 1, kHeadsMax, spec.num_heads));
  spec.head_dim = static_cast<int32_t>(config.Int("head_dim", 2, kDimMax, 0));
  spec.norm_eps = static_cast<float>(config.Number("rms_norm_eps", 0.0, 1.0));
  if (config.Has("rope_parameters")) {  // how newer versions of the library write it
    spec.rope_theta = config.Object("rope_parameters").Number("rope_theta", 1.0, 1e12, 0.0);
  }
  if (!config.Has("rope_parameters") || spec.rope_theta == 0.0) {
    spec.rope_theta = config.Number("rope_theta", 1.0, 1e12);
  }
  spec.tied_unless_present = !config.Has("tie_word_embeddings");
  spec.tied_head = config.Bool("tie_word_embeddings", false);

  const std::string activation = config.String("hidden_act", "silu");
  Require(activation == "silu" || activation == "swish", config, "hidden_act",
          absl::StrCat("activation \"", activation.substr(0, 40), "\" is not computed"));
  RequireNoRopeScaling(config, "rope_scaling");
  RequireNoRopeScaling(config, "rope_parameters");
  const double rotated = config.Number("partial_rotary_factor", 0.0, 1.0, 1.0);
  Require(rotated == 1.0 || keys.partial_rotary, config, "partial_rotary_factor",
          "heads are rotated whole");
  RequireFullAttentionLayers(config);
  Require(!config.Has("quantization_config"), config, "quantization_config",
          "quantized weights are not read");
  SettleHeads(config, "num_attention_heads", spec);
  if (rotated == 1.0) return;
  spec.rotary_dim = static_cast<int32_t>(spec.head_dim * rotated);
  if (spec.rotary_dim < 2 || spec.rotary_dim % 2 != 0) {
    config.Fail(absl::StatusCode::kInvalidArgument, "partial_rotary_factor",
                absl::StrCat("rotates ", spec.rotary_dim, " of ", spec.head_dim,
                             " dimensions; it must be an even number of them"));
  }
}

void ReadMaskedTokens(JsonFields& config, const CheckpointFacts& facts, TokenId mask_fallback,
                      ModelTraits& traits) {
  traits.mask_token = ReadMaskToken(config, facts, traits.vocab_size, mask_fallback);
  if (traits.mask_token < 0) {
    config.Fail(absl::StatusCode::kInvalidArgument, "mask_token_id",
                "missing, and the tokenizer files name no mask token");
  }
  traits.eos_tokens = ReadEosTokens(facts);
}

void SettleExperts(JsonFields& config, ModelSpec& spec) {
  const ExpertSpec& experts = spec.experts;
  const auto fail = [&](absl::string_view key, const std::string& problem) {
    config.Fail(absl::StatusCode::kInvalidArgument, key, problem);
  };
  if (!config.status().ok()) return;
  if (experts.num_groups < 1 || experts.num_experts % experts.num_groups != 0) {
    fail("n_group", absl::StrCat(experts.num_groups, " groups do not divide ", experts.num_experts,
                                 " experts"));
  } else if (experts.groups_per_token > experts.num_groups) {
    fail("topk_group",
         absl::StrCat(experts.groups_per_token, " of ", experts.num_groups, " groups"));
  } else if (experts.experts_per_token >
             experts.num_experts / experts.num_groups * experts.groups_per_token) {
    fail("num_experts_per_tok",
         absl::StrCat(experts.experts_per_token, " experts a token, but only ",
                      experts.num_experts / experts.num_groups * experts.groups_per_token,
                      " can be chosen from"));
  }
}

void ReadQwen3Experts(JsonFields& config, ModelSpec& spec) {
  ExpertSpec& experts = spec.experts;
  experts.num_experts = static_cast<int32_t>(config.Int("num_experts", 1, kExpertsMax));
  experts.experts_per_token =
      static_cast<int32_t>(config.Int("num_experts_per_tok", 1, kExpertsPerRowMax));
  experts.mlp_dim = static_cast<int32_t>(config.Int("moe_intermediate_size", 1, kDimMax));
  experts.renormalize = config.Bool("norm_topk_prob", true);
  // Every decoder_sparse_step-th layer has experts, but those listed.
  const int64_t stride = config.Int("decoder_sparse_step", 1, kLayersMax, 1);
  experts.dense_layers.resize(spec.num_layers);
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    experts.dense_layers[layer] = (layer + 1) % stride != 0;
  }
  for (const int64_t layer : config.Ints("mlp_only_layers", 0, kLayersMax)) {
    if (layer < spec.num_layers) experts.dense_layers[layer] = true;
  }
  SettleExperts(config, spec);
}

void ReadMdlmNetwork(JsonFields& config, const CheckpointFacts& facts, ModelSpec& spec) {
  constexpr int32_t kGpt2Rows = 50258;  // GPT-2's vocabulary and the mask token
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
}

TokenId ReadMaskToken(JsonFields& config, const CheckpointFacts& facts, int32_t vocab_size,
                      TokenId fallback) {
  if (config.Has("mask_token_id")) {
    return static_cast<TokenId>(config.Int("mask_token_id", 0, kVocabularyMax, -1));
  }
  const TokenId told = TokenizerMask(facts.tokenizer);
  if (told >= 0) return told;
  return fallback < vocab_size ? fallback : -1;
}

std::vector<TokenId> ReadEosTokens(const CheckpointFacts& facts) {
  std::vector<TokenId> tokens = facts.eos_tokens;
  for (const absl::string_view text : {"<|im_end|>", "<|eot_id|>", "<|endoftext|>"}) {
    const TokenId id = AddedToken(facts.tokenizer, {text});
    if (id >= 0 && std::find(tokens.begin(), tokens.end(), id) == tokens.end()) {
      tokens.push_back(id);
    }
  }
  return tokens;
}

absl::StatusOr<ModelSpec> ReadBlockCausalQwen3(const CheckpointFacts& facts,
                                               int64_t block_length_default, bool experts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec);
  spec.qkv_bias = spec.o_bias = config.Bool("attention_bias", false);
  spec.qk_norm = true;
  if (experts) ReadQwen3Experts(config, spec);
  ModelTraits& traits = spec.traits;
  ReadMaskedTokens(config, facts, kQwen3Mask, traits);
  traits.causal_block_length =
      static_cast<int32_t>(config.Int("block_size", 1, kBlockLengthMax, block_length_default));
  traits.default_sampler = "block_dynamic";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace cinnabar
