// SEDD, absorbing and uniform graphs. Its config names no architecture: three nested objects tell
// it. Source: louaaron/Score-Entropy-Discrete-Diffusion, arXiv:2310.16834.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr int64_t kGpt2Size = 50257;

// The config itself, or what a wrapper kept under "config".
const nlohmann::json& Unwrap(const nlohmann::json& config) {
  const auto inner = config.find("config");
  return inner != config.end() && inner->is_object() ? *inner : config;
}

bool Claims(const CheckpointFacts& facts) {
  const nlohmann::json& config = Unwrap(facts.config);
  for (const char* key : {"model", "graph", "noise"}) {
    const auto found = config.find(key);
    if (found == config.end() || !found->is_object()) return false;
  }
  return config.contains("tokens");
}

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(Unwrap(facts.config), facts.config_path);
  const auto tokens = static_cast<int32_t>(config.Int("tokens", 1, kVocabularyMax - 1));
  JsonFields model = config.Object("model"), graph = config.Object("graph"),
             noise = config.Object("noise");
  const std::string graph_type = graph.String("type"), noise_type = noise.String("type");
  Require(graph_type == "absorb" || graph_type == "uniform", graph, "type",
          "known graphs are absorb and uniform");
  Require(noise_type == "loglinear" || noise_type == "geometric", noise, "type",
          "known noises are loglinear and geometric");
  const bool absorb = graph_type == "absorb";

  ModelSpec spec;
  spec.body = BodyKind::kDiT;
  spec.dim = static_cast<int32_t>(model.Int("hidden_size", 1, kDimMax));
  spec.num_layers = static_cast<int32_t>(model.Int("n_blocks", 1, kLayersMax));
  spec.num_heads = spec.num_kv_heads = static_cast<int32_t>(model.Int("n_heads", 1, kHeadsMax));
  spec.cond_dim = static_cast<int32_t>(model.Int("cond_dim", 1, kDimMax));
  spec.mlp_dim = 4 * spec.dim;
  spec.norm_eps = 1e-5F;
  spec.scale_by_sigma = model.Bool("scale_by_sigma", absorb);
  Require(absorb || !spec.scale_by_sigma, model, "scale_by_sigma",
          "the uniform graph has no scaling by sigma");
  SettleHeads(model, "n_heads", spec);

  ModelTraits& traits = spec.traits;
  traits.vocab_size = tokens + (absorb ? 1 : 0);
  traits.positions_max = static_cast<int32_t>(model.Int("length", 1, kPositionsMax));
  traits.mask_token = absorb ? tokens : -1;
  traits.eos_tokens = ReadEosTokens(facts);
  if (traits.eos_tokens.empty() && tokens == kGpt2Size) traits.eos_tokens = {kGpt2Size - 1};
  traits.parameterization =
      absorb ? Parameterization::kAbsorbScore : Parameterization::kUniformScore;
  traits.conditioned_on_sigma = true;
  if (noise_type == "geometric") {
    traits.sigma_min = static_cast<float>(noise.Number("sigma_min", 1e-9, 1e3, 1e-3));
    traits.sigma_max = static_cast<float>(noise.Number("sigma_max", 1e-9, 1e3, 1.0));
  }
  traits.default_sampler = "sedd_analytic";
  for (const JsonFields* fields : {&config, &graph, &noise, &model}) {
    if (!fields->status().ok()) return fields->status();
  }
  return spec;
}

}  // namespace

Family MakeSeddFamily() {
  return {.name = "sedd", .architectures = {"SEDD"}, .claims = Claims, .read = Read};
}

}  // namespace cinnabar
