// The body of SEDD and MDLM: a transformer whose layer norms and residuals are modulated by the
// noise level (adaLN). With shift, scale and gate from the sequence's sigma, per layer
//   x += gate1 * attn_out(attend(rotate(q), rotate(k), v)),  q | k | v = attn_qkv(modulate1(x))
//   x += gate2 * mlp2(gelu(mlp0(modulate2(x))))
// Sources: DiT (arXiv:2212.09748), SEDD (arXiv:2310.16834).
#include <cmath>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/model/body.h"

namespace cinnabar {
namespace {

// What a layer's modulation holds, in this order, `dim` columns each.
enum Modulation : int64_t { kShift1, kScale1, kGate1, kShift2, kScale2, kGate2, kNumModulations };

struct DiTLayer {
  std::unique_ptr<Buffer> norm1;
  std::unique_ptr<Weight> qkv;
  std::unique_ptr<Weight> attention_out;
  std::unique_ptr<Buffer> norm2;
  std::unique_ptr<Weight> mlp0;
  std::unique_ptr<Buffer> mlp0_bias;
  std::unique_ptr<Weight> mlp2;
  std::unique_ptr<Buffer> mlp2_bias;
};

// sigma -> modulation of every layer, by three products. Kept in float32 on every backend: it is
// one row a sequence, and everything hangs on it.
struct Conditioning {
  std::unique_ptr<Weight> mlp0;
  std::unique_ptr<Buffer> mlp0_bias;
  std::unique_ptr<Weight> mlp2;
  std::unique_ptr<Buffer> mlp2_bias;
  std::unique_ptr<Weight> modulation;  // all layers' adaLN and the last norm's, stacked
  std::unique_ptr<Buffer> modulation_bias;
};

// Cosines first, then sines, of sigma itself (not of its logarithm).
void EmbedSigma(float sigma, absl::Span<float> out) {
  constexpr int32_t kHalf = kSigmaFrequencies / 2;
  for (int32_t i = 0; i < kHalf; ++i) {
    const double angle = sigma * std::exp(-std::log(10000.0) * i / kHalf);
    out[i] = static_cast<float>(std::cos(angle));
    out[kHalf + i] = static_cast<float>(std::sin(angle));
  }
}

class DiTBody : public Body {
 public:
  DiTBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend, const ForwardLimits& limits)
      : Body(std::move(spec), std::move(checkpoint), backend, limits) {}

 protected:
  absl::Status LoadLayers(WeightLoader& loader) override {
    layers_.resize(spec().num_layers);
    for (int32_t layer = 0; layer < spec().num_layers; ++layer) {
      CINNABAR_RETURN_IF_ERROR(LoadLayer(loader, layer));
    }
    CINNABAR_ASSIGN_OR_RETURN(
        final_norm_, loader.Vector({spec().tensor_prefix + "output_layer.norm_final.weight"}));
    return LoadConditioning(loader);
  }

  absl::Status RunLayers(const ForwardBatch& batch) override {
    CINNABAR_RETURN_IF_ERROR(Condition(batch));
    const absl::Span<const SequenceSpan> wanted = WantedSequences(batch, sequences_);
    const auto num_rows = static_cast<int64_t>(batch.ids.size());
    const auto num_wanted = static_cast<int64_t>(batch.wanted_rows.size());
    for (int32_t index = 0; index < spec().num_layers; ++index) {
      const DiTLayer& layer = layers_[index];
      const bool last = index + 1 == spec().num_layers;
      CINNABAR_RETURN_IF_ERROR(
          Modulate(residual_, num_rows, layer.norm1, index, kShift1, sequences_, normed_));
      CINNABAR_RETURN_IF_ERROR(Attention(sequences_, num_rows, index, *layer.qkv, nullptr, nullptr,
                                         nullptr, last && num_wanted == 0));
      if (!last) {
        CINNABAR_RETURN_IF_ERROR(
            FinishLayer(layer, index, num_rows, sequences_, residual_, attention_));
        continue;
      }
      if (num_wanted == 0) return absl::OkStatus();
      CINNABAR_RETURN_IF_ERROR(GatherWanted(batch));
      CINNABAR_RETURN_IF_ERROR(
          FinishLayer(layer, index, num_wanted, wanted, wanted_residual_, wanted_attention_));
    }
    return Modulate(wanted_residual_, num_wanted, final_norm_, spec().num_layers, kShift1, wanted,
                    hidden_);
  }

 private:
  absl::Status LoadLayer(WeightLoader& loader, int32_t index) {
    DiTLayer& layer = layers_[index];
    const auto name = [&](absl::string_view leaf) {
      return LayerTensor(spec().tensor_prefix + "blocks.", index, leaf);
    };
    CINNABAR_ASSIGN_OR_RETURN(layer.norm1, loader.Vector({name("norm1.weight")}));
    CINNABAR_ASSIGN_OR_RETURN(layer.qkv, loader.Matrix({name("attn_qkv.weight")}));
    CINNABAR_ASSIGN_OR_RETURN(layer.attention_out, loader.Matrix({name("attn_out.weight")}));
    CINNABAR_ASSIGN_OR_RETURN(layer.norm2, loader.Vector({name("norm2.weight")}));
    CINNABAR_ASSIGN_OR_RETURN(layer.mlp0, loader.Matrix({name("mlp.0.weight")}));
    CINNABAR_ASSIGN_OR_RETURN(layer.mlp0_bias, loader.Vector({name("mlp.0.bias")}));
    CINNABAR_ASSIGN_OR_RETURN(layer.mlp2, loader.Matrix({name("mlp.2.weight")}));
    CINNABAR_ASSIGN_OR_RETURN(layer.mlp2_bias, loader.Vector({name("mlp.2.bias")}));
    return absl::OkStatus();
  }

  absl::Status LoadConditioning(WeightLoader& loader) {
    const std::string& prefix = spec().tensor_prefix;
    std::vector<std::string> weights, biases;
    for (int32_t layer = 0; layer < spec().num_layers; ++layer) {
      weights.push_back(LayerTensor(prefix + "blocks.", layer, "adaLN_modulation.weight"));
      biases.push_back(LayerTensor(prefix + "blocks.", layer, "adaLN_modulation.bias"));
    }
    weights.push_back(prefix + "output_layer.adaLN_modulation.weight");
    biases.push_back(prefix + "output_layer.adaLN_modulation.bias");
    const std::string map = prefix + "sigma_map.mlp.";
    CINNABAR_ASSIGN_OR_RETURN(conditioning_.mlp0, loader.SmallMatrix({map + "0.weight"}));
    CINNABAR_ASSIGN_OR_RETURN(conditioning_.mlp0_bias, loader.Vector({map + "0.bias"}));
    CINNABAR_ASSIGN_OR_RETURN(conditioning_.mlp2, loader.SmallMatrix({map + "2.weight"}));
    CINNABAR_ASSIGN_OR_RETURN(conditioning_.mlp2_bias, loader.Vector({map + "2.bias"}));
    CINNABAR_ASSIGN_OR_RETURN(conditioning_.modulation, loader.SmallMatrix(weights));
    CINNABAR_ASSIGN_OR_RETURN(conditioning_.modulation_bias, loader.Vector(biases));

    const bool conditioned = spec().traits.conditioned_on_sigma;
    const int64_t rows = conditioned ? limits().sequences_max : 1;
    CINNABAR_ASSIGN_OR_RETURN(sigma_rows_, TakeRows(rows, kSigmaFrequencies, DType::kF32));
    CINNABAR_ASSIGN_OR_RETURN(map_rows_, TakeRows(rows, spec().cond_dim, DType::kF32));
    CINNABAR_ASSIGN_OR_RETURN(condition_rows_, TakeRows(rows, spec().cond_dim, DType::kF32));
    CINNABAR_ASSIGN_OR_RETURN(modulation_,
                              TakeRows(rows, conditioning_.modulation->rows(), DType::kF32));
    sigma_host_.resize(rows * kSigmaFrequencies);
    sequences_.reserve(limits().sequences_max);
    if (conditioned) return absl::OkStatus();
    // Always the same: computed once, and its weights are let go.
    const float zero = 0.0F;
    CINNABAR_RETURN_IF_ERROR(ComputeModulation(absl::MakeConstSpan(&zero, 1)));
    CINNABAR_RETURN_IF_ERROR(backend().Synchronize());
    conditioning_ = {};
    return absl::OkStatus();
  }

  // Row s of modulation_ from sigmas[s].
  absl::Status ComputeModulation(absl::Span<const float> sigmas) {
    const auto num_rows = static_cast<int64_t>(sigmas.size());
    for (int64_t row = 0; row < num_rows; ++row) {
      EmbedSigma(sigmas[row],
                 absl::MakeSpan(sigma_host_).subspan(row * kSigmaFrequencies, kSigmaFrequencies));
    }
    CINNABAR_RETURN_IF_ERROR(
        backend().Upload(absl::MakeConstSpan(sigma_host_).subspan(0, num_rows * kSigmaFrequencies),
                         sigma_rows_.data));
    CINNABAR_RETURN_IF_ERROR(backend().Linear({.x = sigma_rows_,
                                               .num_rows = num_rows,
                                               .weight = conditioning_.mlp0.get(),
                                               .bias = AsFloats(conditioning_.mlp0_bias),
                                               .epilogue = Epilogue::kSilu,
                                               .out = map_rows_}));
    CINNABAR_RETURN_IF_ERROR(backend().Linear({.x = map_rows_,
                                               .num_rows = num_rows,
                                               .weight = conditioning_.mlp2.get(),
                                               .bias = AsFloats(conditioning_.mlp2_bias),
                                               .epilogue = Epilogue::kSilu,
                                               .out = condition_rows_}));
    return backend().Linear({.x = condition_rows_,
                             .num_rows = num_rows,
                             .weight = conditioning_.modulation.get(),
                             .bias = AsFloats(conditioning_.modulation_bias),
                             .out = modulation_});
  }

  // Gives every sequence its modulation row.
  absl::Status Condition(const ForwardBatch& batch) {
    const bool conditioned = spec().traits.conditioned_on_sigma;
    sequences_.assign(batch.sequences.begin(), batch.sequences.end());
    for (size_t i = 0; i < sequences_.size(); ++i) {
      sequences_[i].modulation_row = conditioned ? static_cast<int32_t>(i) : 0;
    }
    return conditioned ? ComputeModulation(batch.sigmas) : absl::OkStatus();
  }

  Rows ModulationOf(int32_t layer, int64_t which) const {
    Rows rows = modulation_;
    rows.data = modulation_.f32() + (layer * int64_t{kNumModulations} + which) * spec().dim;
    return rows;
  }

  // `shift` and the scale after it.
  absl::Status Modulate(const Rows& x, int64_t num_rows, const std::unique_ptr<Buffer>& weight,
                        int32_t layer, Modulation shift, absl::Span<const SequenceSpan> sequences,
                        const Rows& out) {
    return backend().LayerNormModulate({.x = x,
                                        .num_rows = num_rows,
                                        .dim = spec().dim,
                                        .weight = AsFloats(weight),
                                        .eps = spec().norm_eps,
                                        .shift = ModulationOf(layer, shift),
                                        .scale = ModulationOf(layer, shift + 1),
                                        .sequences = sequences,
                                        .out = out});
  }

  // Everything after attention.
  absl::Status FinishLayer(const DiTLayer& layer, int32_t index, int64_t num_rows,
                           absl::Span<const SequenceSpan> sequences, const Rows& residual,
                           const Rows& attention) {
    CINNABAR_RETURN_IF_ERROR(backend().Linear({.x = attention,
                                               .num_rows = num_rows,
                                               .weight = layer.attention_out.get(),
                                               .epilogue = Epilogue::kGatedAdd,
                                               .out = residual,
                                               .gate = ModulationOf(index, kGate1),
                                               .sequences = sequences}));
    CINNABAR_RETURN_IF_ERROR(
        Modulate(residual, num_rows, layer.norm2, index, kShift2, sequences, normed_));
    CINNABAR_RETURN_IF_ERROR(backend().Linear({.x = normed_,
                                               .num_rows = num_rows,
                                               .weight = layer.mlp0.get(),
                                               .bias = AsFloats(layer.mlp0_bias),
                                               .epilogue = Epilogue::kGeluTanh,
                                               .out = mlp_}));
    return backend().Linear({.x = mlp_,
                             .num_rows = num_rows,
                             .weight = layer.mlp2.get(),
                             .bias = AsFloats(layer.mlp2_bias),
                             .epilogue = Epilogue::kGatedAdd,
                             .out = residual,
                             .gate = ModulationOf(index, kGate2),
                             .sequences = sequences});
  }

  std::vector<DiTLayer> layers_;
  std::unique_ptr<Buffer> final_norm_;
  Conditioning conditioning_;
  Rows sigma_rows_;      // [sequences_max, kSigmaFrequencies]; one row when not conditioned
  Rows map_rows_;        // [.., cond_dim]
  Rows condition_rows_;  // [.., cond_dim]
  Rows modulation_;      // [.., layers * kNumModulations * dim + 2 * dim]
  std::vector<float> sigma_host_;
  std::vector<SequenceSpan> sequences_;  // the batch's, with their modulation rows
};

}  // namespace

std::unique_ptr<Body> MakeDiTBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend,
                                  const ForwardLimits& limits) {
  return std::make_unique<DiTBody>(std::move(spec), std::move(checkpoint), backend, limits);
}

}  // namespace cinnabar
