// The body of DiffusionGemma. One set of weights is an encoder (causal; its rows' keys and values
// are what the decoder reads) and a decoder (the open block, which sees everything before it and
// itself); only a scalar a layer is their own. Per layer, with norms around each part,
//   x += norm(o(attend(rotate(norm(q)), rotate(norm(k)), norm(v)))),  q | k | v = qkv(norm(x))
//   x = (x + norm(norm(mlp(norm(x))) + norm(experts(norm(x), router(norm(x)))))) * scalar
// where layers see a window or everything; the latter have heads and angles of their own, and their
// v is k. The decoder's input is norm(embedding + mlp(norm(soft))), soft the mean embedding under
// the last step's prediction, which is kept as its hidden rows. Source: huggingface/transformers,
// models/diffusion_gemma/modeling_diffusion_gemma.py.
#include <cmath>
#include <numeric>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/model/body.h"

namespace cinnabar {
namespace {

// Modulation rows of the scalars.
enum Half : int32_t { kEncoder, kDecoder };

struct GatedMlp {
  std::unique_ptr<Weight> gate_up;
  std::unique_ptr<Weight> down;
};

struct GemmaLayer {
  HeadShape heads;
  bool full = false;
  int32_t kv_layer = 0;
  std::unique_ptr<Buffer> input_norm;
  std::unique_ptr<Weight> qkv;
  std::unique_ptr<Buffer> q_norm;
  std::unique_ptr<Buffer> k_norm;
  std::unique_ptr<Weight> o;
  std::unique_ptr<Buffer> attention_norm;
  std::unique_ptr<Buffer> mlp_input_norm;
  GatedMlp mlp;
  std::unique_ptr<Buffer> mlp_norm;
  std::unique_ptr<Buffer> router_norm;  // with the router's own factor
  std::unique_ptr<Weight> router;
  std::unique_ptr<Buffer> expert_scales;
  std::unique_ptr<Buffer> expert_input_norm;
  std::vector<std::unique_ptr<Weight>> expert_gate_up;
  std::vector<std::unique_ptr<Weight>> expert_down;
  std::unique_ptr<Buffer> expert_norm;
  std::unique_ptr<Buffer> output_norm;
  std::unique_ptr<Buffer> scalars;  // [2]: Half
};

Rows From(const Rows& rows, int64_t row) {
  Rows result = rows;
  result.data = static_cast<char*>(rows.data) + row * rows.stride * BytesOf(rows.dtype);
  return result;
}

class GemmaBody : public Body {
 public:
  GemmaBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend, const ForwardLimits& limits)
      : Body(std::move(spec), std::move(checkpoint), backend, limits) {}

  int64_t SelfConditioningBytes() const override { return PredictionBytes(spec(), backend()); }

 protected:
  absl::Status LoadLayers(WeightLoader& loader) override {
    const WindowSpec& windows = spec().windows;
    CINNABAR_ASSIGN_OR_RETURN(branch_, TakeRows(limits().rows_max, spec().dim, DType::kF32));
    CINNABAR_ASSIGN_OR_RETURN(sum_, TakeRows(limits().rows_max, spec().dim, DType::kF32));
    CINNABAR_ASSIGN_OR_RETURN(soft_,
                              TakeRows(traits().causal_block_length, spec().dim, DType::kF32));
    CINNABAR_ASSIGN_OR_RETURN(full_rotary_,
                              MakeRotaryTable(windows.full_rope_theta, windows.full_head_dim,
                                              windows.full_rotary_angles));
    const std::vector<float> ones(std::max({spec().dim, spec().head_dim, windows.full_head_dim}),
                                  1.0F);
    CINNABAR_ASSIGN_OR_RETURN(ones_, loader.Vector(ones));
    row_indices_.resize(limits().rows_max);
    std::iota(row_indices_.begin(), row_indices_.end(), 0);
    sequences_.reserve(limits().sequences_max);

    const std::string& conditioning = spec().conditioning_prefix;
    CINNABAR_ASSIGN_OR_RETURN(conditioning_norm_,
                              loader.Vector({conditioning + "pre_norm.weight"}));
    CINNABAR_RETURN_IF_ERROR(LoadMlp(loader, conditioning, conditioning_));
    layers_.resize(spec().num_layers);
    int32_t num_full = 0;
    const int32_t num_windowed = KvShapeOf(spec(), 1, KvReuse::kExact).num_layers;
    for (int32_t index = 0; index < spec().num_layers; ++index) {
      GemmaLayer& layer = layers_[index];
      layer.heads = HeadsOf(spec(), index);
      layer.full = windows.full_layers[index];
      layer.kv_layer = layer.full ? num_windowed + num_full : index - num_full;
      num_full += layer.full ? 1 : 0;
      CINNABAR_RETURN_IF_ERROR(LoadLayer(loader, index, layer));
    }
    CINNABAR_ASSIGN_OR_RETURN(final_norm_, loader.Vector({spec().names.final_norm + ".weight"}));
    return absl::OkStatus();
  }

  absl::Status RunLayers(const ForwardBatch& batch) override {
    sequences_.assign(batch.sequences.begin(), batch.sequences.end());
    for (SequenceSpan& sequence : sequences_) {
      sequence.modulation_row = sequence.block_length == 0 ? kDecoder : kEncoder;
    }
    CINNABAR_CHECK(batch.self_conditioning.empty() ||
                   batch.self_conditioning.size() == sequences_.size())
        << "one self-conditioning a sequence";
    for (size_t i = 0; i < sequences_.size(); ++i) {
      if (sequences_[i].block_length != 0) continue;
      CINNABAR_RETURN_IF_ERROR(EnterDecoder(sequences_[i], batch.self_conditioning.empty()
                                                               ? SelfConditioning()
                                                               : batch.self_conditioning[i]));
    }
    const auto num_rows = static_cast<int64_t>(batch.ids.size());
    const auto num_wanted = static_cast<int64_t>(batch.wanted_rows.size());
    for (size_t index = 0; index < layers_.size(); ++index) {
      const GemmaLayer& layer = layers_[index];
      const bool last = index + 1 == layers_.size();
      CINNABAR_RETURN_IF_ERROR(Norm(residual_, num_rows, layer.input_norm, normed_));
      CINNABAR_RETURN_IF_ERROR(Attend(layer, num_rows, last && num_wanted == 0));
      if (!last) {
        CINNABAR_RETURN_IF_ERROR(FinishLayer(layer, num_rows, sequences_, residual_, attention_));
        continue;
      }
      if (num_wanted == 0) return absl::OkStatus();
      CINNABAR_RETURN_IF_ERROR(GatherWanted(batch));
      CINNABAR_RETURN_IF_ERROR(FinishLayer(layer, num_wanted, WantedSequences(batch, sequences_),
                                           wanted_residual_, wanted_attention_));
    }
    CINNABAR_RETURN_IF_ERROR(Norm(wanted_residual_, num_wanted, final_norm_, hidden_));
    return KeepPredictions(batch);
  }

 private:
  absl::Status LoadMlp(WeightLoader& loader, const std::string& prefix, GatedMlp& mlp) {
    CINNABAR_ASSIGN_OR_RETURN(
        mlp.gate_up, loader.Matrix({prefix + "gate_proj.weight", prefix + "up_proj.weight"},
                                   RowOrder::kGatedPairs));
    CINNABAR_ASSIGN_OR_RETURN(mlp.down, loader.Matrix({prefix + "down_proj.weight"}));
    return absl::OkStatus();
  }

  absl::Status LoadLayer(WeightLoader& loader, int32_t index, GemmaLayer& layer) {
    const DecoderNames& names = spec().names;
    const ExpertSpec& experts = spec().experts;
    const auto name = [&](const std::string& leaf) {
      return LayerTensor(names.layer_prefix, index, leaf);
    };
    const std::pair<std::unique_ptr<Buffer>*, std::string> vectors[] = {
        {&layer.input_norm, "input_layernorm.weight"},
        {&layer.q_norm, names.q_norm + ".weight"},
        {&layer.k_norm, names.k_norm + ".weight"},
        {&layer.attention_norm, "post_attention_layernorm.weight"},
        {&layer.mlp_input_norm, "pre_feedforward_layernorm.weight"},
        {&layer.mlp_norm, "post_feedforward_layernorm_1.weight"},
        {&layer.router_norm, "router.scale"},
        {&layer.expert_scales, "router.per_expert_scale"},
        {&layer.expert_input_norm, "pre_feedforward_layernorm_2.weight"},
        {&layer.expert_norm, "post_feedforward_layernorm_2.weight"},
        {&layer.output_norm, "post_feedforward_layernorm.weight"}};
    for (const auto& [member, leaf] : vectors) {
      CINNABAR_ASSIGN_OR_RETURN(*member, loader.Vector({name(leaf)}));
    }
    CINNABAR_ASSIGN_OR_RETURN(
        layer.scalars,
        loader.Vector({LayerTensor(spec().encoder_layer_prefix, index, "layer_scalar"),
                       name("layer_scalar")}));
    // The router's norm and its factor dim^-1/2 are one vector.
    std::vector<float> factors(spec().dim);
    CINNABAR_RETURN_IF_ERROR(
        backend().Download(layer.router_norm->data(), absl::MakeSpan(factors)));
    for (float& factor : factors) {
      factor = static_cast<float>(factor / std::sqrt(static_cast<double>(spec().dim)));
    }
    CINNABAR_RETURN_IF_ERROR(backend().Upload(factors, layer.router_norm->data()));
    CINNABAR_RETURN_IF_ERROR(backend().Synchronize());

    const std::string v = layer.full ? names.k : names.v;
    CINNABAR_ASSIGN_OR_RETURN(
        layer.qkv,
        loader.Matrix({name(names.q) + ".weight", name(names.k) + ".weight", name(v) + ".weight"}));
    CINNABAR_ASSIGN_OR_RETURN(layer.o, loader.Matrix({name(names.o) + ".weight"}));
    CINNABAR_RETURN_IF_ERROR(LoadMlp(loader, name("mlp."), layer.mlp));
    CINNABAR_ASSIGN_OR_RETURN(layer.router, loader.Matrix({name(names.router) + ".weight"}));
    CINNABAR_ASSIGN_OR_RETURN(layer.expert_gate_up,
                              loader.StackedExperts(name(names.experts + "gate_up_proj"),
                                                    experts.num_experts, 2, RowOrder::kGatedPairs));
    CINNABAR_ASSIGN_OR_RETURN(layer.expert_down,
                              loader.StackedExperts(name(names.experts + "down_proj"),
                                                    experts.num_experts, 1, RowOrder::kStacked));
    return absl::OkStatus();
  }

  absl::Status Norm(const Rows& x, int64_t num_rows, const std::unique_ptr<Buffer>& weight,
                    const Rows& out, bool add = false) {
    return backend().RmsNorm({.x = x,
                              .num_rows = num_rows,
                              .dim = spec().dim,
                              .weight = AsFloats(weight),
                              .eps = spec().norm_eps,
                              .out = out,
                              .add = add});
  }

  absl::Status RunMlp(const GatedMlp& mlp, int64_t num_rows, Epilogue epilogue, const Rows& out) {
    CINNABAR_RETURN_IF_ERROR(backend().Linear({.x = normed_,
                                               .num_rows = num_rows,
                                               .weight = mlp.gate_up.get(),
                                               .epilogue = Epilogue::kGeGlu,
                                               .out = mlp_}));
    return backend().Linear({.x = mlp_,
                             .num_rows = num_rows,
                             .weight = mlp.down.get(),
                             .epilogue = epilogue,
                             .out = out});
  }

  // What the decoder makes of a block's embeddings and of its last prediction.
  absl::Status EnterDecoder(const SequenceSpan& block, const SelfConditioning& conditioning) {
    const Rows rows = From(residual_, block.row_begin);
    CINNABAR_CHECK(block.num_rows <= traits().causal_block_length) << block.num_rows << " rows";
    if (conditioning.previous != nullptr) {
      CINNABAR_RETURN_IF_ERROR(backend().SoftEmbed({.hidden = KeptRows(*conditioning.previous),
                                                    .num_rows = block.num_rows,
                                                    .weight = &head(),
                                                    .logit_cap = spec().logit_cap,
                                                    .temperature = conditioning.temperature,
                                                    .table = &embedding(),
                                                    .scale = embedding_scale(),
                                                    .out = soft_}));
      CINNABAR_RETURN_IF_ERROR(Norm(soft_, block.num_rows, conditioning_norm_, normed_));
      CINNABAR_RETURN_IF_ERROR(RunMlp(conditioning_, block.num_rows, Epilogue::kAdd, rows));
    }
    return Norm(rows, block.num_rows, ones_, rows);
  }

  absl::Status Attend(const GemmaLayer& layer, int64_t num_rows, bool keys_and_values_only) {
    CINNABAR_RETURN_IF_ERROR(backend().Linear(
        {.x = normed_, .num_rows = num_rows, .weight = layer.qkv.get(), .out = qkv_}));
    CINNABAR_RETURN_IF_ERROR(backend().PrepareHeads({.qkv = qkv_,
                                                     .num_rows = num_rows,
                                                     .heads = layer.heads,
                                                     .q_norm = AsFloats(layer.q_norm),
                                                     .k_norm = AsFloats(layer.k_norm),
                                                     .v_norm = AsFloats(ones_),
                                                     .norm_eps = spec().norm_eps,
                                                     .rotary = layer.full ? full_rotary_ : rotary(),
                                                     .sequences = sequences_,
                                                     .layer = layer.kv_layer}));
    if (keys_and_values_only) return absl::OkStatus();
    return backend().Attend({.q = qkv_,
                             .num_rows = num_rows,
                             .heads = layer.heads,
                             .scale = 1.0F,
                             .sequences = sequences_,
                             .layer = layer.kv_layer,
                             .window = layer.full ? 0 : spec().windows.window,
                             .out = attention_});
  }

  // Everything after attention.
  absl::Status FinishLayer(const GemmaLayer& layer, int64_t num_rows,
                           absl::Span<const SequenceSpan> sequences, const Rows& residual,
                           const Rows& attention) {
    CINNABAR_RETURN_IF_ERROR(backend().Linear(
        {.x = attention, .num_rows = num_rows, .weight = layer.o.get(), .out = branch_}));
    CINNABAR_RETURN_IF_ERROR(Norm(branch_, num_rows, layer.attention_norm, residual, /*add=*/true));
    CINNABAR_RETURN_IF_ERROR(Norm(residual, num_rows, layer.mlp_input_norm, normed_));
    CINNABAR_RETURN_IF_ERROR(RunMlp(layer.mlp, num_rows, Epilogue::kStore, branch_));
    CINNABAR_RETURN_IF_ERROR(Norm(branch_, num_rows, layer.mlp_norm, sum_));
    CINNABAR_RETURN_IF_ERROR(RunExperts(layer, num_rows, residual));
    CINNABAR_RETURN_IF_ERROR(Norm(branch_, num_rows, layer.expert_norm, sum_, /*add=*/true));
    return backend().RmsNorm({.x = sum_,
                              .num_rows = num_rows,
                              .dim = spec().dim,
                              .weight = AsFloats(layer.output_norm),
                              .eps = spec().norm_eps,
                              .out = residual,
                              .add = true,
                              .scales = AsFloats(layer.scalars),
                              .sequences = sequences});
  }

  // The chosen experts of `residual` into branch_.
  absl::Status RunExperts(const GemmaLayer& layer, int64_t num_rows, const Rows& residual) {
    const ExpertSpec& experts = spec().experts;
    auto* chosen = static_cast<int32_t*>(chosen_experts_.data);
    CINNABAR_RETURN_IF_ERROR(Norm(residual, num_rows, layer.router_norm, normed_));
    CINNABAR_RETURN_IF_ERROR(backend().Linear(
        {.x = normed_, .num_rows = num_rows, .weight = layer.router.get(), .out = router_logits_}));
    CINNABAR_RETURN_IF_ERROR(backend().Route({.logits = router_logits_,
                                              .num_rows = num_rows,
                                              .num_experts = experts.num_experts,
                                              .experts_per_row = experts.experts_per_token,
                                              .score = experts.score,
                                              .renormalize = experts.renormalize,
                                              .expert_scales = AsFloats(layer.expert_scales),
                                              .experts = chosen,
                                              .weights = expert_weights_.f32()}));
    CINNABAR_RETURN_IF_ERROR(Norm(residual, num_rows, layer.expert_input_norm, normed_));
    return backend().Experts({.x = normed_,
                              .num_rows = num_rows,
                              .gate_up = layer.expert_gate_up,
                              .down = layer.expert_down,
                              .experts_per_row = experts.experts_per_token,
                              .experts = chosen,
                              .weights = expert_weights_.f32(),
                              .activation = Epilogue::kGeGlu,
                              .add = false,
                              .out = branch_});
  }

  // The hidden rows of a SelfConditioning buffer.
  Rows KeptRows(const Buffer& buffer) const {
    return {.data = buffer.data(), .stride = spec().dim, .dtype = backend().activation_dtype()};
  }

  // A block's hidden rows are its prediction: what the next step reads.
  absl::Status KeepPredictions(const ForwardBatch& batch) {
    size_t wanted = 0;
    for (size_t i = 0; i < batch.self_conditioning.size(); ++i) {
      const SequenceSpan& block = sequences_[i];
      const size_t begin = wanted;
      const int32_t end = block.row_begin + block.num_rows;
      while (wanted < batch.wanted_rows.size() && batch.wanted_rows[wanted] < end) ++wanted;
      const Buffer* next = batch.self_conditioning[i].next;
      if (next == nullptr) continue;
      CINNABAR_CHECK(block.block_length == 0 &&
                     wanted - begin == static_cast<size_t>(block.num_rows))
          << wanted - begin << " of " << block.num_rows << " rows are wanted";
      CINNABAR_RETURN_IF_ERROR(backend().GatherRows(
          {.x = hidden_,
           .dim = spec().dim,
           .row_indices = absl::MakeConstSpan(row_indices_).subspan(begin, block.num_rows),
           .out = KeptRows(*next)}));
    }
    return absl::OkStatus();
  }

  Rows branch_;  // [rows_max, dim], float32: of attention, MLP or experts before its norm
  Rows sum_;     // [rows_max, dim], float32: of the MLP and the experts
  Rows soft_;    // [causal_block_length, dim], float32
  RotaryTable full_rotary_;
  std::unique_ptr<Buffer> ones_;  // the weight of norms that have none
  std::unique_ptr<Buffer> conditioning_norm_;
  GatedMlp conditioning_;
  std::vector<GemmaLayer> layers_;
  std::unique_ptr<Buffer> final_norm_;
  std::vector<SequenceSpan> sequences_;  // those of the batch, each with its half
  std::vector<int32_t> row_indices_;     // 0, 1, ..
};

}  // namespace

std::unique_ptr<Body> MakeGemmaBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend,
                                    const ForwardLimits& limits) {
  return std::make_unique<GemmaBody>(std::move(spec), std::move(checkpoint), backend, limits);
}

}  // namespace cinnabar
