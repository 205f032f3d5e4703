// The body of Llama, Qwen2, Qwen3, LLaDA and their mixtures of experts: per layer
//   x += o(attend(rotate(norm(q)), rotate(norm(k)), v)),  q | k | v = qkv(rms(x))
//   x += mlp(rms(x)),  mlp(h) = down(silu(gate(h)) * up(h)); with experts the weighted sum of those
//        that the router chooses, and the shared one
#include <utility>

#include "common/base/status.h"
#include "worker/model/body.h"

namespace cinnabar {
namespace {

struct DecoderLayer {
  std::unique_ptr<Buffer> attention_norm;
  std::unique_ptr<Weight> qkv;
  std::unique_ptr<Buffer> qkv_bias;
  std::unique_ptr<Buffer> q_norm;
  std::unique_ptr<Buffer> k_norm;
  std::unique_ptr<Weight> o;
  std::unique_ptr<Buffer> o_bias;
  std::unique_ptr<Buffer> mlp_norm;
  // The MLP, or the shared expert; null where there is neither.
  std::unique_ptr<Weight> gate_up;
  std::unique_ptr<Buffer> gate_up_bias;
  std::unique_ptr<Weight> down;
  std::unique_ptr<Buffer> down_bias;
  std::unique_ptr<Weight> router;  // null: no experts
  std::unique_ptr<Buffer> router_bias;
  std::vector<std::unique_ptr<Weight>> expert_gate_up;
  std::vector<std::unique_ptr<Weight>> expert_down;
};

class DecoderBody : public Body {
 public:
  DecoderBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend, const ForwardLimits& limits)
      : Body(std::move(spec), std::move(checkpoint), backend, limits) {}

 protected:
  absl::Status LoadLayers(WeightLoader& loader) override {
    layers_.resize(spec().num_layers);
    for (int32_t layer = 0; layer < spec().num_layers; ++layer) {
      CINNABAR_RETURN_IF_ERROR(LoadLayer(loader, layer));
    }
    CINNABAR_ASSIGN_OR_RETURN(final_norm_, loader.Vector({spec().names.final_norm + ".weight"}));
    return absl::OkStatus();
  }

  absl::Status RunLayers(const ForwardBatch& batch) override {
    const auto num_rows = static_cast<int64_t>(batch.ids.size());
    const auto num_wanted = static_cast<int64_t>(batch.wanted_rows.size());
    for (int32_t index = 0; index < spec().num_layers; ++index) {
      const DecoderLayer& layer = layers_[index];
      const bool last = index + 1 == spec().num_layers;
      CINNABAR_RETURN_IF_ERROR(RmsNorm(residual_, num_rows, layer.attention_norm, normed_));
      CINNABAR_RETURN_IF_ERROR(Attention(batch.sequences, num_rows, index, *layer.qkv,
                                         AsFloats(layer.qkv_bias), AsFloats(layer.q_norm),
                                         AsFloats(layer.k_norm), last && num_wanted == 0));
      if (!last) {
        CINNABAR_RETURN_IF_ERROR(FinishLayer(layer, num_rows, residual_, attention_));
        continue;
      }
      if (num_wanted == 0) return absl::OkStatus();
      CINNABAR_RETURN_IF_ERROR(GatherWanted(batch));
      CINNABAR_RETURN_IF_ERROR(FinishLayer(layer, num_wanted, wanted_residual_, wanted_attention_));
    }
    return RmsNorm(wanted_residual_, num_wanted, final_norm_, hidden_);
  }

 private:
  absl::Status LoadLayer(WeightLoader& loader, int32_t index) {
    const DecoderNames& names = spec().names;
    DecoderLayer& layer = layers_[index];
    const auto weight = [&](const std::string& leaf) {
      return LayerTensor(names.layer_prefix, index, leaf) + ".weight";
    };
    const auto bias = [&](const std::string& leaf) {
      return LayerTensor(names.layer_prefix, index, leaf) + ".bias";
    };
    CINNABAR_ASSIGN_OR_RETURN(layer.attention_norm, loader.Vector({weight(names.attention_norm)}));
    const std::vector<std::string> qkv = names.qkv.empty()
                                             ? std::vector<std::string>{names.q, names.k, names.v}
                                             : std::vector<std::string>{names.qkv};
    std::vector<std::string> weights, biases;
    for (const std::string& leaf : qkv) {
      weights.push_back(weight(leaf));
      biases.push_back(bias(leaf));
    }
    CINNABAR_ASSIGN_OR_RETURN(layer.qkv, loader.Matrix(weights));
    if (spec().qkv_bias) {
      CINNABAR_ASSIGN_OR_RETURN(layer.qkv_bias, loader.Vector(biases));
    }
    if (spec().qk_norm) {
      CINNABAR_ASSIGN_OR_RETURN(layer.q_norm, loader.Vector({weight(names.q_norm)}));
      CINNABAR_ASSIGN_OR_RETURN(layer.k_norm, loader.Vector({weight(names.k_norm)}));
    }
    CINNABAR_ASSIGN_OR_RETURN(layer.o, loader.Matrix({weight(names.o)}));
    if (spec().o_bias) {
      CINNABAR_ASSIGN_OR_RETURN(layer.o_bias, loader.Vector({bias(names.o)}));
    }
    CINNABAR_ASSIGN_OR_RETURN(layer.mlp_norm, loader.Vector({weight(names.mlp_norm)}));
    if (HasExperts(spec(), index)) return LoadExperts(loader, index);
    CINNABAR_ASSIGN_OR_RETURN(layer.gate_up, loader.Matrix({weight(names.gate), weight(names.up)},
                                                           RowOrder::kGatedPairs));
    CINNABAR_ASSIGN_OR_RETURN(layer.down, loader.Matrix({weight(names.down)}));
    if (spec().mlp_bias) {
      CINNABAR_ASSIGN_OR_RETURN(layer.gate_up_bias,
                                loader.Vector({bias(names.gate), bias(names.up)}));
      CINNABAR_ASSIGN_OR_RETURN(layer.down_bias, loader.Vector({bias(names.down)}));
    }
    return absl::OkStatus();
  }

  absl::Status LoadExperts(WeightLoader& loader, int32_t index) {
    const DecoderNames& names = spec().names;
    const ExpertSpec& experts = spec().experts;
    DecoderLayer& layer = layers_[index];
    const auto in_layer = [&](const std::string& leaf) {
      return LayerTensor(names.layer_prefix, index, leaf);
    };
    CINNABAR_ASSIGN_OR_RETURN(layer.router,
                              loader.SmallMatrix({in_layer(names.router) + ".weight"}));
    if (experts.bias) {
      CINNABAR_ASSIGN_OR_RETURN(layer.router_bias, loader.Vector({in_layer(names.router_bias)}));
    }
    layer.expert_gate_up.resize(experts.num_experts);
    layer.expert_down.resize(experts.num_experts);
    for (int32_t expert = 0; expert < experts.num_experts; ++expert) {
      const auto weight = [&](const std::string& leaf) {
        return ExpertTensor(names, index, expert, leaf) + ".weight";
      };
      CINNABAR_ASSIGN_OR_RETURN(
          layer.expert_gate_up[expert],
          loader.ExpertMatrix({weight(names.expert_gate), weight(names.expert_up)},
                              RowOrder::kGatedPairs));
      CINNABAR_ASSIGN_OR_RETURN(layer.expert_down[expert],
                                loader.ExpertMatrix({weight(names.expert_down)}));
    }
    if (experts.shared_mlp_dim == 0) return absl::OkStatus();
    const auto shared = [&](const std::string& leaf) {
      return in_layer(names.shared_expert + leaf) + ".weight";
    };
    CINNABAR_ASSIGN_OR_RETURN(
        layer.gate_up,
        loader.Matrix({shared(names.expert_gate), shared(names.expert_up)}, RowOrder::kGatedPairs));
    CINNABAR_ASSIGN_OR_RETURN(layer.down, loader.Matrix({shared(names.expert_down)}));
    return absl::OkStatus();
  }

  // residual += the chosen experts of normed_.
  absl::Status RunExperts(const DecoderLayer& layer, int64_t num_rows, const Rows& residual) {
    const ExpertSpec& experts = spec().experts;
    auto* chosen = static_cast<int32_t*>(chosen_experts_.data);
    CINNABAR_RETURN_IF_ERROR(backend().Linear(
        {.x = normed_, .num_rows = num_rows, .weight = layer.router.get(), .out = router_logits_}));
    CINNABAR_RETURN_IF_ERROR(backend().Route({.logits = router_logits_,
                                              .num_rows = num_rows,
                                              .num_experts = experts.num_experts,
                                              .experts_per_row = experts.experts_per_token,
                                              .score = experts.score,
                                              .bias = AsFloats(layer.router_bias),
                                              .bias_counts = experts.bias_counts,
                                              .num_groups = experts.num_groups,
                                              .groups_kept = experts.groups_per_token,
                                              .renormalize = experts.renormalize,
                                              .scale = experts.scale,
                                              .experts = chosen,
                                              .weights = expert_weights_.f32()}));
    return backend().Experts({.x = normed_,
                              .num_rows = num_rows,
                              .gate_up = layer.expert_gate_up,
                              .down = layer.expert_down,
                              .experts_per_row = experts.experts_per_token,
                              .experts = chosen,
                              .weights = expert_weights_.f32(),
                              .out = residual});
  }

  absl::Status RmsNorm(const Rows& x, int64_t num_rows, const std::unique_ptr<Buffer>& weight,
                       const Rows& out) {
    return backend().RmsNorm({.x = x,
                              .num_rows = num_rows,
                              .dim = spec().dim,
                              .weight = AsFloats(weight),
                              .eps = spec().norm_eps,
                              .out = out});
  }

  // Everything after attention.
  absl::Status FinishLayer(const DecoderLayer& layer, int64_t num_rows, const Rows& residual,
                           const Rows& attention) {
    CINNABAR_RETURN_IF_ERROR(backend().Linear({.x = attention,
                                               .num_rows = num_rows,
                                               .weight = layer.o.get(),
                                               .bias = AsFloats(layer.o_bias),
                                               .epilogue = Epilogue::kAdd,
                                               .out = residual}));
    CINNABAR_RETURN_IF_ERROR(RmsNorm(residual, num_rows, layer.mlp_norm, normed_));
    if (layer.router != nullptr) {
      CINNABAR_RETURN_IF_ERROR(RunExperts(layer, num_rows, residual));
    }
    if (layer.gate_up == nullptr) return absl::OkStatus();
    CINNABAR_RETURN_IF_ERROR(backend().Linear({.x = normed_,
                                               .num_rows = num_rows,
                                               .weight = layer.gate_up.get(),
                                               .bias = AsFloats(layer.gate_up_bias),
                                               .epilogue = Epilogue::kSwiGlu,
                                               .out = mlp_}));
    return backend().Linear({.x = mlp_,
                             .num_rows = num_rows,
                             .weight = layer.down.get(),
                             .bias = AsFloats(layer.down_bias),
                             .epilogue = Epilogue::kAdd,
                             .out = residual});
  }

  std::vector<DecoderLayer> layers_;
  std::unique_ptr<Buffer> final_norm_;
};

}  // namespace

std::unique_ptr<Body> MakeDecoderBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend,
                                      const ForwardLimits& limits) {
  return std::make_unique<DecoderBody>(std::move(spec), std::move(checkpoint), backend, limits);
}

}  // namespace cinnabar
