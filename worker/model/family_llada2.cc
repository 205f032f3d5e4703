// LLaDA2.0 and 2.1 (mini, flash): block-causal attention, partly rotated heads, one tensor for q, k
// and v, and experts behind a sigmoid router with groups and a bias that steers the choice alone.
// Source: ZHZisZZ/dllm, dllm/pipelines/llada2/models/modeling_llada2_moe.py.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr TokenId kLlada2Mask = 156895;
constexpr int64_t kBlockLength = 32;

void ReadExperts(JsonFields& config, ModelSpec& spec) {
  ExpertSpec& experts = spec.experts;
  experts.num_experts = static_cast<int32_t>(config.Int("num_experts", 1, kExpertsMax));
  experts.experts_per_token =
      static_cast<int32_t>(config.Int("num_experts_per_tok", 1, kExpertsPerRowMax));
  experts.mlp_dim = static_cast<int32_t>(config.Int("moe_intermediate_size", 1, kDimMax));
  const int64_t num_shared = config.Int("num_shared_experts", 0, kExpertsMax, 0);
  if (num_shared * experts.mlp_dim > kDimMax) {
    config.Fail(absl::StatusCode::kInvalidArgument, "num_shared_experts",
                absl::StrCat(num_shared, " of width ", experts.mlp_dim, " are too wide"));
  } else {
    experts.shared_mlp_dim = static_cast<int32_t>(num_shared * experts.mlp_dim);
  }
  const int64_t num_dense = config.Int("first_k_dense_replace", 0, kLayersMax, 0);
  experts.dense_layers.assign(spec.num_layers, false);
  std::fill_n(experts.dense_layers.begin(), std::min<int64_t>(num_dense, spec.num_layers), true);
  experts.score = RouterScore::kSigmoid;
  experts.bias = config.Bool("moe_router_enable_expert_bias", true);
  experts.num_groups = static_cast<int32_t>(config.Int("n_group", 1, kExpertsMax, 1));
  experts.groups_per_token = static_cast<int32_t>(config.Int("topk_group", 1, kExpertsMax, 1));
  // As the authors' code, which does not consult norm_topk_prob.
  experts.renormalize = experts.experts_per_token > 1;
  experts.scale = static_cast<float>(config.Number("routed_scaling_factor", 0.0, 1e6, 1.0));
  const std::string score = config.String("score_function", "sigmoid");
  Require(score == "sigmoid", config, "score_function",
          absl::StrCat("scores of \"", score.substr(0, 40), "\" are not computed here"));
  Require(!config.Has("expert_capacity"), config, "expert_capacity",
          "routing of whole blocks is not computed");
  SettleExperts(config, spec);
}

// What LLaDA2.2 predicts where a token is to go or to be put in; older models have neither.
void ReadEditTokens(JsonFields& config, ModelTraits& traits) {
  const int64_t last = traits.vocab_size - 1;
  traits.delete_token = static_cast<TokenId>(config.Int("delete_token_id", 0, last, -1));
  traits.split_token = static_cast<TokenId>(config.Int("split_token_id", 0, last, -1));
  const auto fail = [&](absl::string_view key, const std::string& problem) {
    config.Fail(absl::StatusCode::kInvalidArgument, key, problem);
  };
  if ((traits.delete_token < 0) != (traits.split_token < 0)) {
    fail(traits.delete_token < 0 ? "delete_token_id" : "split_token_id",
         "missing, but the other of delete_token_id and split_token_id is there");
  } else if (traits.delete_token >= 0 && (traits.delete_token == traits.split_token ||
                                          traits.delete_token == traits.mask_token ||
                                          traits.split_token == traits.mask_token)) {
    fail("delete_token_id",
         absl::StrCat(traits.delete_token, ", split_token_id ", traits.split_token,
                      " and the mask token ", traits.mask_token, " must be three different ids"));
  }
}

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  ReadTransformersDecoder(config, spec, {.partial_rotary = true});
  spec.qkv_bias = config.Bool("use_qkv_bias", false);
  spec.o_bias = config.Bool("use_bias", false);
  spec.qk_norm = config.Bool("use_qk_norm", true);
  ReadExperts(config, spec);
  DecoderNames& names = spec.names;
  names.embedding = "model.word_embeddings";
  names.qkv = "attention.query_key_value";
  names.q_norm = "attention.query_layernorm";
  names.k_norm = "attention.key_layernorm";
  names.o = "attention.dense";
  ModelTraits& traits = spec.traits;
  ReadMaskedTokens(config, facts, kLlada2Mask, traits);
  ReadEditTokens(config, traits);
  traits.causal_block_length =
      static_cast<int32_t>(config.Int("block_size", 1, kBlockLengthMax, kBlockLength));
  traits.default_sampler = "block_dynamic";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeLlada2Family() {
  return {.name = "llada2", .architectures = {"LLaDA2MoeModelLM"}, .read = Read};
}

}  // namespace cinnabar
