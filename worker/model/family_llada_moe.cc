// LLaDA-MoE-7B-A1B: a mixture of experts in the manner of OLMoE, full attention, no shift. The
// weights of the chosen experts are their softmax scores as they are.
// Source: ZHZisZZ/dllm, dllm/pipelines/llada/models/modeling_lladamoe.py.
#include "absl/strings/str_cat.h"
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr TokenId kLladaMoeMask = 156895;

// A layer has experts where moe_layer_freq is not 0: one number for all layers, or one a layer.
void ReadLayers(JsonFields& config, ModelSpec& spec) {
  spec.experts.dense_layers.assign(spec.num_layers, false);
  const std::vector<int64_t> wanted = config.Ints("moe_layer_freq", 0, kLayersMax);
  if (wanted.size() > 1 && wanted.size() != static_cast<size_t>(spec.num_layers)) {
    config.Fail(absl::StatusCode::kInvalidArgument, "moe_layer_freq",
                absl::StrCat(wanted.size(), " numbers for ", spec.num_layers, " layers"));
    return;
  }
  for (int32_t layer = 0; layer < spec.num_layers && !wanted.empty(); ++layer) {
    spec.experts.dense_layers[layer] = wanted[wanted.size() > 1 ? layer : 0] == 0;
  }
}

void ReadExperts(JsonFields& config, ModelSpec& spec) {
  ExpertSpec& experts = spec.experts;
  experts.num_experts = static_cast<int32_t>(config.Int("num_experts", 1, kExpertsMax));
  experts.experts_per_token =
      static_cast<int32_t>(config.Int("num_experts_per_tok", 1, kExpertsPerRowMax));
  experts.mlp_dim = static_cast<int32_t>(config.Int("expert_intermediate_size", 1, kDimMax));
  experts.shared_mlp_dim =
      static_cast<int32_t>(config.Int("shared_expert_intermediate_size", 0, kDimMax, 0));
  experts.bias = config.Bool("moe_router_enable_expert_bias", false);
  experts.bias_counts = true;
  ReadLayers(config, spec);
  const std::string score = config.String("moe_router_score_function", "softmax");
  Require(score == "softmax", config, "moe_router_score_function",
          absl::StrCat("scores of \"", score.substr(0, 40), "\" are not computed here"));
  Require(config.Int("router_num_group", 0, kExpertsMax, 1) <= 1, config, "router_num_group",
          "groups of experts are not computed here");
  Require(config.Number("routed_scaling_factor", -1e9, 1e9, 1.0) == 1.0, config,
          "routed_scaling_factor", "scaled experts are not computed here");
  SettleExperts(config, spec);
}

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  // Without dense layers their width may be missing.
  const absl::string_view width = config.Has("dense_intermediate_size") ? "dense_intermediate_size"
                                  : config.Has("intermediate_size")     ? "intermediate_size"
                                                                    : "expert_intermediate_size";
  ReadTransformersDecoder(config, spec, {.mlp_dim = width});
  spec.qkv_bias = spec.o_bias = config.Bool("attention_bias", false);
  spec.qk_norm = config.Bool("qk_layernorm", false);
  Require(!config.Has("clip_qkv"), config, "clip_qkv", "clipping of q, k and v is not computed");
  ReadExperts(config, spec);
  spec.names.router_bias = "mlp.expert_bias";
  spec.names.shared_expert = "shared_expert.";
  ModelTraits& traits = spec.traits;
  ReadMaskedTokens(config, facts, kLladaMoeMask, traits);
  traits.default_sampler = "low_confidence";
  if (!config.status().ok()) return config.status();
  return spec;
}

}  // namespace

Family MakeLladaMoeFamily() {
  return {.name = "llada_moe", .architectures = {"LLaDAMoEModelLM", "LLaDAMoEModel"}, .read = Read};
}

}  // namespace cinnabar
