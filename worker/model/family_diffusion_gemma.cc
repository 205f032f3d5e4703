// DiffusionGemma (26B-A4B): blocks of 256 positions that start as uniform noise, a causal encoder
// for what lies before them, self-conditioning, windows, an MLP and experts in each layer. Text
// alone: the tensors that read images are left aside. Source: huggingface/transformers,
// models/diffusion_gemma/configuration_diffusion_gemma.py.
#include "absl/strings/str_cat.h"
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr int64_t kCanvasLength = 256;
constexpr int64_t kFullHeadDim = 512;
constexpr int32_t kLayersPerFullOne = 6;

void ReadLayerTypes(JsonFields& text, ModelSpec& spec) {
  std::vector<bool>& full = spec.windows.full_layers;
  full.assign(spec.num_layers, false);
  const std::vector<std::string> types = text.Strings("layer_types");
  if (!types.empty() && types.size() != full.size()) {
    text.Fail(absl::StatusCode::kInvalidArgument, "layer_types",
              absl::StrCat(types.size(), " types for ", full.size(), " layers"));
    return;
  }
  for (size_t i = 0; i < full.size(); ++i) {
    full[i] = types.empty() ? (i + 1) % kLayersPerFullOne == 0 : types[i] == "full_attention";
    Require(types.empty() || full[i] || types[i] == "sliding_attention", text, "layer_types",
            absl::StrCat("layers of type \"", types.empty() ? "" : types[i].substr(0, 40),
                         "\" are not computed"));
  }
  full.back() = true;  // as the authors' code has it, whatever the config says
}

// Heads of the layers that see everything: two fields, or per_layer_config of newer versions.
void ReadFullHeads(JsonFields& text, ModelSpec& spec) {
  WindowSpec& windows = spec.windows;
  if (!text.Has("per_layer_config")) {
    windows.full_head_dim =
        static_cast<int32_t>(text.Int("global_head_dim", 2, kDimMax, kFullHeadDim));
    windows.full_kv_heads = static_cast<int32_t>(
        text.Int("num_global_key_value_heads", 1, kHeadsMax, spec.num_kv_heads));
    return;
  }
  JsonFields layers = text.Object("per_layer_config");
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    const std::string key = absl::StrCat(layer);
    const bool full = windows.full_layers[layer];
    Require(full || !layers.Has(key), layers, key, "only layers with full attention differ");
    if (!full) continue;
    int32_t head_dim = spec.head_dim, kv_heads = spec.num_kv_heads;
    if (layers.Has(key)) {
      JsonFields fields = layers.Object(key);
      head_dim = static_cast<int32_t>(fields.Int("head_dim", 2, kDimMax, head_dim));
      kv_heads = static_cast<int32_t>(fields.Int("num_key_value_heads", 1, kHeadsMax, kv_heads));
      if (!fields.status().ok()) {
        layers.Fail(fields.status().code(), key, fields.status().message());
      }
    }
    Require(windows.full_head_dim == 0 ||
                (windows.full_head_dim == head_dim && windows.full_kv_heads == kv_heads),
            layers, key, "layers with full attention that differ from each other");
    windows.full_head_dim = head_dim;
    windows.full_kv_heads = kv_heads;
  }
  if (!layers.status().ok()) {
    text.Fail(layers.status().code(), "per_layer_config", layers.status().message());
  }
}

void ReadRope(JsonFields& text, ModelSpec& spec) {
  double factor = 0.25;
  if (text.Has("rope_parameters")) {
    JsonFields rope = text.Object("rope_parameters");
    JsonFields sliding = rope.Object("sliding_attention"), full = rope.Object("full_attention");
    Require(sliding.String("rope_type", "default") == "default", sliding, "rope_type",
            "scaled angles are not computed");
    const std::string type = full.String("rope_type", "proportional");
    Require(type == "proportional" || type == "default", full, "rope_type",
            absl::StrCat("angles of type \"", type.substr(0, 40), "\" are not computed"));
    Require(full.Number("factor", 0.0, 1e6, 1.0) == 1.0, full, "factor",
            "scaled angles are not computed");
    spec.rope_theta = sliding.Number("rope_theta", 1.0, 1e12, spec.rope_theta);
    spec.windows.full_rope_theta = full.Number("rope_theta", 1.0, 1e12, 1e6);
    factor = type == "default" ? 1.0 : full.Number("partial_rotary_factor", 0.0, 1.0, 1.0);
    for (const JsonFields* fields : {&rope, &sliding, &full}) {
      if (!fields->status().ok()) {
        text.Fail(fields->status().code(), "rope_parameters", fields->status().message());
      }
    }
  }
  spec.windows.full_rotary_angles = static_cast<int32_t>(factor * spec.windows.full_head_dim / 2);
}

void ReadText(JsonFields& text, ModelSpec& spec) {
  spec.traits.vocab_size = static_cast<int32_t>(text.Int("vocab_size", 1, kVocabularyMax));
  spec.traits.positions_max =
      static_cast<int32_t>(text.Int("max_position_embeddings", 1, kPositionsMax));
  spec.dim = static_cast<int32_t>(text.Int("hidden_size", 1, kDimMax));
  spec.mlp_dim = static_cast<int32_t>(text.Int("intermediate_size", 1, kDimMax));
  spec.num_layers = static_cast<int32_t>(text.Int("num_hidden_layers", 1, kLayersMax));
  spec.num_heads = static_cast<int32_t>(text.Int("num_attention_heads", 1, kHeadsMax));
  spec.num_kv_heads = static_cast<int32_t>(text.Int("num_key_value_heads", 1, kHeadsMax));
  spec.head_dim = static_cast<int32_t>(text.Int("head_dim", 2, kDimMax));
  spec.norm_eps = static_cast<float>(text.Number("rms_norm_eps", 0.0, 1.0, 1e-6));
  spec.logit_cap = static_cast<float>(text.Number("final_logit_softcapping", 1e-3, 1e6, 30.0));
  spec.windows.window = static_cast<int32_t>(text.Int("sliding_window", 1, kPositionsMax));
  ReadLayerTypes(text, spec);
  ReadFullHeads(text, spec);
  ReadRope(text, spec);

  ExpertSpec& experts = spec.experts;
  experts.num_experts = static_cast<int32_t>(text.Int("num_experts", 1, kExpertsMax));
  experts.experts_per_token = static_cast<int32_t>(text.Int("top_k_experts", 1, kExpertsPerRowMax));
  experts.mlp_dim = static_cast<int32_t>(text.Int("moe_intermediate_size", 1, kDimMax));
  experts.renormalize = true;
  SettleExperts(text, spec);
  SettleHeads(text, "num_attention_heads", spec);
  if (text.status().ok() &&
      (spec.windows.full_head_dim % 2 != 0 || spec.num_heads % spec.windows.full_kv_heads != 0)) {
    text.Fail(absl::StatusCode::kInvalidArgument, "global_head_dim",
              absl::StrCat(spec.windows.full_kv_heads, " heads of ", spec.windows.full_head_dim,
                           " do not go with ", spec.num_heads, " heads"));
  }
  const std::string activation = text.String("hidden_activation", "gelu_pytorch_tanh");
  Require(activation == "gelu_pytorch_tanh", text, "hidden_activation",
          absl::StrCat("activation \"", activation.substr(0, 40), "\" is not computed"));
  Require(!text.Bool("attention_bias", false), text, "attention_bias", "biases are not computed");
  Require(text.String("use_bidirectional_attention", "vision") == "vision", text,
          "use_bidirectional_attention", "an encoder that sees what follows is not computed");
}

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  JsonFields config(facts.config, facts.config_path);
  ModelSpec spec;
  spec.body = BodyKind::kGemma;
  JsonFields text = config.Object("text_config");
  ReadText(text, spec);
  Require(config.Bool("tie_word_embeddings", true), config, "tie_word_embeddings",
          "an encoder with weights of its own is not computed");
  Require(!config.Has("quantization_config"), config, "quantization_config",
          "quantized weights are not read");

  ModelTraits& traits = spec.traits;
  traits.causal_block_length =
      static_cast<int32_t>(config.Int("canvas_length", 1, kBlockLengthMax, kCanvasLength));
  traits.causal_encoder = true;
  traits.parameterization = Parameterization::kUniformPrediction;
  traits.eos_tokens = ReadEosTokens(facts);
  if (traits.eos_tokens.empty()) {
    for (const int64_t id : text.Ints("eos_token_id", 0, kVocabularyMax)) {
      traits.eos_tokens.push_back(static_cast<TokenId>(id));
    }
  }
  traits.default_sampler = "gemma_renoise";

  spec.tied_head = true;
  spec.scaled_embedding = true;
  DecoderNames& names = spec.names;
  names.embedding = "model.decoder.embed_tokens";
  names.final_norm = "model.decoder.norm";
  names.layer_prefix = "model.decoder.layers.";
  names.router = "router.proj";
  names.experts = "experts.";
  spec.encoder_layer_prefix = "model.encoder.language_model.layers.";
  spec.conditioning_prefix = "model.decoder.self_conditioning.";
  for (const JsonFields* fields : {&config, &text}) {
    if (!fields->status().ok()) return fields->status();
  }
  return spec;
}

}  // namespace

Family MakeDiffusionGemmaFamily() {
  return {.name = "diffusion_gemma",
          .architectures = {"DiffusionGemmaForBlockDiffusion"},
          .read = Read};
}

}  // namespace cinnabar
