#include "worker/model/model_spec.h"

#include <algorithm>
#include <functional>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace cinnabar {
namespace {

constexpr size_t kProblemsMax = 50;

class TensorList {
 public:
  void Add(std::string name, std::vector<int64_t> shape) {
    tensors_.push_back({std::move(name), std::move(shape)});
  }
  void AddLinear(const std::string& name, int64_t out, int64_t in, bool bias) {
    Add(name + ".weight", {out, in});
    if (bias) Add(name + ".bias", {out});
  }
  std::vector<ExpectedTensor> Take() { return std::move(tensors_); }

 private:
  std::vector<ExpectedTensor> tensors_;
};

void AddExperts(const ModelSpec& spec, int32_t layer, TensorList& list) {
  const DecoderNames& names = spec.names;
  const ExpertSpec& experts = spec.experts;
  const auto add_mlp = [&](const std::function<std::string(const std::string&)>& name,
                           int64_t mlp_dim) {
    list.AddLinear(name(names.expert_gate), mlp_dim, spec.dim, false);
    list.AddLinear(name(names.expert_up), mlp_dim, spec.dim, false);
    list.AddLinear(name(names.expert_down), spec.dim, mlp_dim, false);
  };
  list.AddLinear(LayerTensor(names.layer_prefix, layer, names.router), experts.num_experts,
                 spec.dim, false);
  if (experts.bias) {
    list.Add(LayerTensor(names.layer_prefix, layer, names.router_bias), {experts.num_experts});
  }
  for (int32_t expert = 0; expert < experts.num_experts; ++expert) {
    add_mlp([&](const std::string& leaf) { return ExpertTensor(names, layer, expert, leaf); },
            experts.mlp_dim);
  }
  if (experts.shared_mlp_dim > 0) {
    add_mlp(
        [&](const std::string& leaf) {
          return LayerTensor(names.layer_prefix, layer, names.shared_expert + leaf);
        },
        experts.shared_mlp_dim);
  }
}

std::vector<ExpectedTensor> DecoderTensors(const ModelSpec& spec) {
  const DecoderNames& names = spec.names;
  const int64_t dim = spec.dim;
  const int64_t q_dim = int64_t{spec.num_heads} * spec.head_dim;
  const int64_t kv_dim = int64_t{spec.num_kv_heads} * spec.head_dim;
  TensorList list;
  list.Add(names.embedding + ".weight", {spec.traits.vocab_size, dim});
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    const auto name = [&](const std::string& leaf) {
      return LayerTensor(names.layer_prefix, layer, leaf);
    };
    list.Add(name(names.attention_norm) + ".weight", {dim});
    if (names.qkv.empty()) {
      list.AddLinear(name(names.q), q_dim, dim, spec.qkv_bias);
      list.AddLinear(name(names.k), kv_dim, dim, spec.qkv_bias);
      list.AddLinear(name(names.v), kv_dim, dim, spec.qkv_bias);
    } else {
      list.AddLinear(name(names.qkv), q_dim + 2 * kv_dim, dim, spec.qkv_bias);
    }
    if (spec.qk_norm) {
      list.Add(name(names.q_norm) + ".weight", {spec.head_dim});
      list.Add(name(names.k_norm) + ".weight", {spec.head_dim});
    }
    list.AddLinear(name(names.o), dim, q_dim, spec.o_bias);
    list.Add(name(names.mlp_norm) + ".weight", {dim});
    if (HasExperts(spec, layer)) {
      AddExperts(spec, layer, list);
      continue;
    }
    list.AddLinear(name(names.gate), spec.mlp_dim, dim, spec.mlp_bias);
    list.AddLinear(name(names.up), spec.mlp_dim, dim, spec.mlp_bias);
    list.AddLinear(name(names.down), dim, spec.mlp_dim, spec.mlp_bias);
  }
  list.Add(names.final_norm + ".weight", {dim});
  if (!spec.tied_head) list.Add(names.head + ".weight", {spec.traits.vocab_size, dim});
  return list.Take();
}

std::vector<ExpectedTensor> DiTTensors(const ModelSpec& spec) {
  const int64_t dim = spec.dim, cond = spec.cond_dim;
  const std::string& prefix = spec.tensor_prefix;
  TensorList list;
  list.Add(prefix + "vocab_embed.embedding", {spec.traits.vocab_size, dim});
  list.AddLinear(prefix + "sigma_map.mlp.0", cond, kSigmaFrequencies, true);
  list.AddLinear(prefix + "sigma_map.mlp.2", cond, cond, true);
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    const auto name = [&](absl::string_view leaf) {
      return LayerTensor(prefix + "blocks.", layer, leaf);
    };
    list.Add(name("norm1.weight"), {dim});
    list.AddLinear(name("attn_qkv"), 3 * dim, dim, false);
    list.AddLinear(name("attn_out"), dim, dim, false);
    list.Add(name("norm2.weight"), {dim});
    list.AddLinear(name("mlp.0"), spec.mlp_dim, dim, true);
    list.AddLinear(name("mlp.2"), dim, spec.mlp_dim, true);
    list.AddLinear(name("adaLN_modulation"), 6 * dim, cond, true);
  }
  list.Add(prefix + "output_layer.norm_final.weight", {dim});
  list.AddLinear(prefix + "output_layer.linear", spec.traits.vocab_size, dim, true);
  list.AddLinear(prefix + "output_layer.adaLN_modulation", 2 * dim, cond, true);
  return list.Take();
}

std::vector<ExpectedTensor> GemmaTensors(const ModelSpec& spec) {
  const DecoderNames& names = spec.names;
  const ExpertSpec& experts = spec.experts;
  const int64_t dim = spec.dim;
  TensorList list;
  const auto add_mlp = [&](const std::function<std::string(const std::string&)>& name) {
    list.AddLinear(name("gate_proj"), spec.mlp_dim, dim, false);
    list.AddLinear(name("up_proj"), spec.mlp_dim, dim, false);
    list.AddLinear(name("down_proj"), dim, spec.mlp_dim, false);
  };
  list.Add(names.embedding + ".weight", {spec.traits.vocab_size, dim});
  list.Add(spec.conditioning_prefix + "pre_norm.weight", {dim});
  add_mlp([&](const std::string& leaf) { return spec.conditioning_prefix + leaf; });
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    const HeadShape heads = HeadsOf(spec, layer);
    const int64_t q_dim = int64_t{heads.num_heads} * heads.head_dim;
    const int64_t kv_dim = int64_t{heads.num_kv_heads} * heads.head_dim;
    const auto name = [&](const std::string& leaf) {
      return LayerTensor(names.layer_prefix, layer, leaf);
    };
    for (const char* norm :
         {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
          "post_feedforward_layernorm_1", "pre_feedforward_layernorm_2",
          "post_feedforward_layernorm_2", "post_feedforward_layernorm"}) {
      list.Add(name(norm) + ".weight", {dim});
    }
    list.AddLinear(name(names.q), q_dim, dim, false);
    list.AddLinear(name(names.k), kv_dim, dim, false);
    if (!spec.windows.full_layers[layer]) list.AddLinear(name(names.v), kv_dim, dim, false);
    list.Add(name(names.q_norm) + ".weight", {heads.head_dim});
    list.Add(name(names.k_norm) + ".weight", {heads.head_dim});
    list.AddLinear(name(names.o), dim, q_dim, false);
    add_mlp([&](const std::string& leaf) { return name("mlp." + leaf); });
    list.AddLinear(name(names.router), experts.num_experts, dim, false);
    list.Add(name("router.scale"), {dim});
    list.Add(name("router.per_expert_scale"), {experts.num_experts});
    list.Add(name(names.experts + "gate_up_proj"),
             {experts.num_experts, 2 * int64_t{experts.mlp_dim}, dim});
    list.Add(name(names.experts + "down_proj"), {experts.num_experts, dim, experts.mlp_dim});
    list.Add(name("layer_scalar"), {1});
    list.Add(LayerTensor(spec.encoder_layer_prefix, layer, "layer_scalar"), {1});
  }
  list.Add(names.final_norm + ".weight", {dim});
  return list.Take();
}

std::string LayerPrefix(const ModelSpec& spec) {
  return spec.body == BodyKind::kDiT ? spec.tensor_prefix + "blocks." : spec.names.layer_prefix;
}

// Whether `name` belongs to one of the layers that are computed. A table of rotary frequencies is
// the exception: it is computed here.
bool InsideALayer(const ModelSpec& spec, absl::string_view name) {
  const std::string prefix = LayerPrefix(spec);
  if (!absl::StartsWith(name, prefix) || absl::EndsWith(name, "inv_freq")) return false;
  name.remove_prefix(prefix.size());
  int32_t layer = 0;
  return absl::SimpleAtoi(name.substr(0, name.find('.')), &layer) && layer >= 0 &&
         layer < spec.num_layers;
}

absl::flat_hash_set<std::string> NamesOf(const std::vector<ExpectedTensor>& tensors) {
  absl::flat_hash_set<std::string> names;
  for (const ExpectedTensor& tensor : tensors) names.insert(tensor.name);
  return names;
}

}  // namespace

std::string LayerTensor(absl::string_view prefix, int32_t layer, absl::string_view leaf) {
  return absl::StrCat(prefix, layer, ".", leaf);
}

std::string ExpertTensor(const DecoderNames& names, int32_t layer, int32_t expert,
                         absl::string_view leaf) {
  return absl::StrCat(names.layer_prefix, layer, ".", names.experts, expert, ".", leaf);
}

HeadShape HeadsOf(const ModelSpec& spec, int32_t layer) {
  const WindowSpec& windows = spec.windows;
  const bool full = !windows.full_layers.empty() && windows.full_layers[layer];
  return {.num_heads = spec.num_heads,
          .num_kv_heads = full ? windows.full_kv_heads : spec.num_kv_heads,
          .head_dim = full ? windows.full_head_dim : spec.head_dim};
}

int64_t WidestQ(const ModelSpec& spec) {
  return int64_t{spec.num_heads} * std::max(spec.head_dim, spec.windows.full_head_dim);
}

int64_t WidestKv(const ModelSpec& spec) {
  return std::max(int64_t{spec.num_kv_heads} * spec.head_dim,
                  int64_t{spec.windows.full_kv_heads} * spec.windows.full_head_dim);
}

KvShape KvShapeOf(const ModelSpec& spec, int32_t positions, KvReuse reuse) {
  const WindowSpec& windows = spec.windows;
  const auto num_full = static_cast<int32_t>(
      std::count(windows.full_layers.begin(), windows.full_layers.end(), true));
  const int32_t num_layers = reuse == KvReuse::kExact ? KvLayers(spec) : spec.num_layers;
  return {.num_layers = num_layers - num_full,
          .num_kv_heads = spec.num_kv_heads,
          .head_dim = spec.head_dim,
          .positions_max = positions,
          .num_other_layers = num_full,
          .other_kv_heads = windows.full_kv_heads,
          .other_head_dim = windows.full_head_dim};
}

bool HasExperts(const ModelSpec& spec, int32_t layer) {
  return spec.experts.num_experts > 0 &&
         !(static_cast<size_t>(layer) < spec.experts.dense_layers.size() &&
           spec.experts.dense_layers[layer]);
}

std::vector<ExpectedTensor> ExpectedTensors(const ModelSpec& spec) {
  switch (spec.body) {
    case BodyKind::kDecoder:
      return DecoderTensors(spec);
    case BodyKind::kDiT:
      return DiTTensors(spec);
    case BodyKind::kGemma:
      return GemmaTensors(spec);
  }
  return {};
}

std::vector<std::string> CheckTensors(const Checkpoint& checkpoint, ModelSpec& spec) {
  if (spec.tied_unless_present) {
    spec.tied_head = checkpoint.Find(spec.names.head + ".weight") == nullptr;
    spec.tied_unless_present = false;
  }
  const std::vector<ExpectedTensor> expected = ExpectedTensors(spec);
  std::vector<std::string> problems;
  for (const ExpectedTensor& tensor : expected) {
    const TensorEntry* found = checkpoint.Find(tensor.name);
    if (found == nullptr) {
      problems.push_back(absl::StrCat("missing tensor: ", tensor.name, " [",
                                      absl::StrJoin(tensor.shape, ", "), "]"));
    } else if (found->shape != tensor.shape) {
      problems.push_back(absl::StrCat("wrong shape: ", tensor.name, " is ", DescribeTensor(*found),
                                      " in ", checkpoint.FileOf(*found), ", the config asks for [",
                                      absl::StrJoin(tensor.shape, ", "), "]"));
    } else if (!UsableDType(found->dtype).has_value()) {
      problems.push_back(absl::StrCat(
          "unsupported: ", tensor.name, " is ", found->dtype, " in ", checkpoint.FileOf(*found),
          "; weights are read as F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K"));
    }
    if (problems.size() == kProblemsMax) return problems;
  }
  const absl::flat_hash_set<std::string> names = NamesOf(expected);
  for (const TensorEntry& tensor : checkpoint.tensors()) {
    if (names.contains(tensor.name) || !InsideALayer(spec, tensor.name)) continue;
    problems.push_back(
        absl::StrCat("unexpected tensor: ", tensor.name, " in ", checkpoint.FileOf(tensor),
                     " is part of a layer, and this architecture would leave it out"));
    if (problems.size() == kProblemsMax) return problems;
  }
  return problems;
}

std::vector<std::string> UnusedTensors(const Checkpoint& checkpoint, const ModelSpec& spec) {
  const absl::flat_hash_set<std::string> names = NamesOf(ExpectedTensors(spec));
  std::vector<std::string> unused;
  for (const TensorEntry& tensor : checkpoint.tensors()) {
    if (!names.contains(tensor.name) && !InsideALayer(spec, tensor.name)) {
      unused.push_back(tensor.name);
    }
  }
  return unused;
}

int64_t ActivationBytes(const ModelSpec& spec, int64_t rows_max, int64_t sequences_max,
                        int64_t positions_max, int64_t activation_bytes) {
  const int64_t q_dim = WidestQ(spec);
  const int64_t kv_dim = WidestKv(spec);
  // Body::TakeWorkspace: two residual streams and an id, then normed, q | k | v, attention, MLP and
  // what is gathered.
  const int64_t a_row =
      4 * (2 * int64_t{spec.dim} + 1) +
      activation_bytes * (2 * int64_t{spec.dim} + 3 * q_dim + 2 * kv_dim +
                          std::max<int64_t>(spec.mlp_dim, spec.experts.shared_mlp_dim)) +
      // Router logits, then chosen experts and their weights.
      4 * (int64_t{spec.experts.num_experts} + 2 * int64_t{spec.experts.experts_per_token});
  const int64_t rotary = 4 * positions_max * (int64_t{spec.head_dim} + spec.windows.full_head_dim);
  int64_t conditioning = 0;
  if (spec.body == BodyKind::kGemma) {  // two branches of every row, and a block's soft embeddings
    conditioning = 4 * int64_t{spec.dim} * (2 * rows_max + spec.traits.causal_block_length);
  }
  if (spec.body == BodyKind::kDiT) {
    const int64_t a_sequence = kSigmaFrequencies + 2 * int64_t{spec.cond_dim} +
                               int64_t{spec.dim} * (6 * int64_t{spec.num_layers} + 2);
    conditioning = 4 * a_sequence * (spec.traits.conditioned_on_sigma ? sequences_max : 1);
  }
  return rows_max * a_row + rotary + conditioning;
}

}  // namespace cinnabar
