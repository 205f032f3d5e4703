#include "worker/model/gguf_model.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

using nlohmann::json;

struct Names {
  absl::string_view gguf;
  absl::string_view hugging_face;
};

// What dream, llada-moe and rnd1 share; in a layer, without ".weight" and ".bias".
constexpr Names kModelNames[] = {
    {"token_embd", "model.embed_tokens"}, {"output_norm", "model.norm"}, {"output", "lm_head"}};
constexpr Names kLayerNames[] = {
    {"attn_norm", "input_layernorm"},    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},      {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"}, {"attn_q_norm", "self_attn.q_norm"},
    {"attn_k_norm", "self_attn.k_norm"}, {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},       {"ffn_gate_inp", "mlp.gate"}};
constexpr Names kExpertNames[] = {
    {"ffn_gate_exps", "gate_proj"}, {"ffn_up_exps", "up_proj"}, {"ffn_down_exps", "down_proj"}};
constexpr Names kLladaModelNames[] = {{"token_embd", "model.transformer.wte"},
                                      {"output_norm", "model.transformer.ln_f"},
                                      {"output", "model.transformer.ff_out"}};
constexpr Names kLladaLayerNames[] = {
    {"attn_norm", "attn_norm"}, {"attn_q", "q_proj"},        {"attn_k", "k_proj"},
    {"attn_v", "v_proj"},       {"attn_output", "attn_out"}, {"ffn_norm", "ff_norm"},
    {"ffn_gate", "ff_proj"},    {"ffn_up", "up_proj"},       {"ffn_down", "ff_out"}};

struct Architecture {
  absl::string_view name;
  absl::string_view family;  // what config.json calls it
  bool shift_logits;
  bool experts;
  bool interleaved;  // rows of q and k are in the order of interleaved rotation
  absl::Span<const Names> model_names;
  absl::string_view layer_prefix;
  absl::Span<const Names> layer_names;
};

constexpr Architecture kArchitectures[] = {
    {"dream", "DreamModel", true, false, false, kModelNames, "model.layers.", kLayerNames},
    {"llada", "LLaDAModelLM", false, false, true, kLladaModelNames, "model.transformer.blocks.",
     kLladaLayerNames},
    {"llada-moe", "LLaDAMoEModelLM", false, true, false, kModelNames, "model.layers.", kLayerNames},
    {"rnd1", "RND1", true, true, false, kModelNames, "model.layers.", kLayerNames}};

const Architecture* FindArchitecture(absl::string_view name) {
  const auto* found = std::find_if(std::begin(kArchitectures), std::end(kArchitectures),
                                   [&](const Architecture& a) { return a.name == name; });
  return found == std::end(kArchitectures) ? nullptr : found;
}

// Reads the fields of one architecture; the first error is kept.
class Fields {
 public:
  Fields(const GgufHeader& header, absl::string_view architecture)
      : header_(header), architecture_(architecture) {}

  const absl::Status& status() const { return status_; }
  std::string Key(absl::string_view field) const { return absl::StrCat(architecture_, ".", field); }

  std::optional<int64_t> Natural(const std::string& key) { return Keep(header_.Natural(key)); }
  std::optional<double> Number(const std::string& key) { return Keep(header_.Number(key)); }
  std::optional<bool> Bool(const std::string& key) { return Keep(header_.Bool(key)); }
  std::string String(const std::string& key) {
    absl::StatusOr<std::string> text = header_.String(key);
    if (text.ok()) return *std::move(text);
    status_.Update(text.status());
    return "";
  }
  int64_t Required(absl::string_view field) {
    const std::optional<int64_t> value = Natural(Key(field));
    if (!value.has_value()) {
      Fail(absl::StatusCode::kInvalidArgument, Key(field), "missing");
      return 0;
    }
    return *value;
  }
  void Fail(absl::StatusCode code, absl::string_view key, absl::string_view problem) {
    status_.Update(
        absl::Status(code, absl::StrCat(header_.what(), ": field ", key, ": ", problem)));
  }

 private:
  template <typename T>
  std::optional<T> Keep(const absl::StatusOr<std::optional<T>>& value) {
    if (value.ok()) return *value;
    status_.Update(value.status());
    return std::nullopt;
  }

  const GgufHeader& header_;
  std::string architecture_;
  absl::Status status_;
};

absl::Status UnknownArchitecture(const GgufHeader& header, const std::string& name) {
  return absl::UnimplementedError(absl::StrCat(
      header.what(), ": general.architecture is \"", name.substr(0, 100), "\"; supported are ",
      absl::StrJoin(kArchitectures, ", ", [](std::string* out, const Architecture& architecture) {
        absl::StrAppend(out, architecture.name);
      })));
}

void RefuseWhatIsNotComputed(const Architecture& architecture, int64_t head_dim, Fields& fields) {
  const auto refuse = [&](const std::string& key, absl::string_view problem) {
    fields.Fail(absl::StatusCode::kUnimplemented, key, problem);
  };
  const std::string scaling = fields.Key("rope.scaling.type");
  const std::string kind = fields.String(scaling);
  if (!kind.empty() && kind != "none") refuse(scaling, "rope scaling is not computed");
  const std::string rotated = fields.Key("rope.dimension_count");
  const std::optional<int64_t> dimensions = fields.Natural(rotated);
  if (dimensions.has_value() && *dimensions != head_dim) {
    refuse(rotated, absl::StrCat(*dimensions, " of ", head_dim, "; heads are rotated whole"));
  }
  const std::string window = fields.Key("attention.sliding_window");
  if (fields.Natural(window).value_or(0) != 0) refuse(window, "sliding windows are not computed");
  const std::optional<bool> shift = fields.Bool("diffusion.shift_logits");
  if (shift.has_value() && *shift != architecture.shift_logits) {
    refuse("diffusion.shift_logits",
           absl::StrCat("networks of ", architecture.name,
                        architecture.shift_logits ? " " : " do not ", "shift their logits"));
  }
  if (fields.Natural("split.count").value_or(1) > 1) {
    refuse("split.count", "split files are not read; join them with llama-gguf-split --merge");
  }
}

json ConfigOf(const GgufHeader& header, const Architecture& architecture, Fields& fields) {
  const int64_t dim = fields.Required("embedding_length");
  const int64_t layers = fields.Required("block_count");
  const int64_t heads = fields.Required("attention.head_count");
  const int64_t kv_heads = fields.Natural(fields.Key("attention.head_count_kv")).value_or(heads);
  const int64_t positions = fields.Required("context_length");
  const std::optional<double> eps = fields.Number(fields.Key("attention.layer_norm_rms_epsilon"));
  if (!eps.has_value()) {
    fields.Fail(absl::StatusCode::kInvalidArgument, fields.Key("attention.layer_norm_rms_epsilon"),
                "missing");
  }
  const double theta = fields.Number(fields.Key("rope.freq_base")).value_or(10000.0);
  const GgufTensor* table = header.FindTensor("token_embd.weight");
  const int64_t rows = table != nullptr ? table->shape.front() : 0;
  const int64_t vocab_size = fields.Natural(fields.Key("vocab_size")).value_or(rows);
  const bool tied = header.FindTensor("output.weight") == nullptr;
  const std::optional<int64_t> width = fields.Natural(fields.Key("feed_forward_length"));
  const int64_t head_dim = fields.Natural(fields.Key("attention.key_length"))
                               .value_or(heads > 0 && dim % heads == 0 ? dim / heads : 0);
  if (fields.Natural(fields.Key("attention.value_length")).value_or(head_dim) != head_dim) {
    fields.Fail(absl::StatusCode::kUnimplemented, fields.Key("attention.value_length"),
                "values are as wide as keys here");
  }
  RefuseWhatIsNotComputed(architecture, head_dim, fields);

  json config = {{"architectures", {std::string(architecture.family)}},
                 {"rms_norm_eps", eps.value_or(0.0)},
                 {"rope_theta", theta},
                 {"vocab_size", vocab_size}};
  for (const auto& [field, name] :
       {std::pair{"mask_token_id", "mask_token_id"}, {"eos_token_id", "eos_token_id"}}) {
    const std::optional<int64_t> id = fields.Natural(absl::StrCat("tokenizer.ggml.", field));
    if (id.has_value()) config[name] = *id;
  }
  if (architecture.name == "llada") {
    config.update({{"d_model", dim},
                   {"n_layers", layers},
                   {"n_heads", heads},
                   {"n_kv_heads", kv_heads},
                   {"weight_tying", tied},
                   {"embedding_size", vocab_size},
                   {"max_sequence_length", positions}});
    if (width.has_value()) config["mlp_hidden_size"] = *width;
    return config;
  }
  config.update({{"hidden_size", dim},
                 {"num_hidden_layers", layers},
                 {"num_attention_heads", heads},
                 {"num_key_value_heads", kv_heads},
                 {"head_dim", head_dim},
                 {"tie_word_embeddings", tied},
                 {"max_position_embeddings", positions}});
  if (width.has_value()) config["intermediate_size"] = *width;
  if (!architecture.experts) return config;
  const std::optional<int64_t> expert_width =
      fields.Natural(fields.Key("expert_feed_forward_length"));
  config.update({{"num_experts", fields.Required("expert_count")},
                 {"num_experts_per_tok", fields.Required("expert_used_count")}});
  if (architecture.name == "rnd1") {
    config["moe_intermediate_size"] = expert_width.value_or(width.value_or(0));
    config["norm_topk_prob"] = true;
    if (!width.has_value()) config["intermediate_size"] = config["moe_intermediate_size"];
  } else {
    config["expert_intermediate_size"] = expert_width.value_or(width.value_or(0));
    config["qk_layernorm"] = true;
  }
  return config;
}

std::string NameIn(absl::Span<const Names> names, absl::string_view leaf) {
  const auto* found = std::find_if(names.begin(), names.end(),
                                   [&](const Names& pair) { return pair.gguf == leaf; });
  return found == names.end() ? "" : std::string(found->hugging_face);
}

TensorEntry EntryOf(const GgufTensor& tensor, std::string name) {
  return {.name = std::move(name),
          .dtype = tensor.dtype,
          .shape = tensor.shape,
          .num_elements = tensor.num_elements,
          .begin_byte = tensor.begin_byte,
          .end_byte = tensor.end_byte};
}

// A tensor "blk.N.LEAF.KIND" as one or, of experts, as many.
absl::Status AddLayerTensor(const GgufHeader& header, const Architecture& architecture,
                            const GgufTensor& tensor, absl::string_view layer,
                            absl::string_view rest, std::vector<TensorEntry>& entries) {
  const size_t dot = rest.rfind('.');
  const absl::string_view leaf = rest.substr(0, dot);
  const std::string kind(dot == absl::string_view::npos ? "" : rest.substr(dot));
  const std::string prefix = absl::StrCat(architecture.layer_prefix, layer, ".");
  const std::string expert_name = architecture.experts ? NameIn(kExpertNames, leaf) : "";
  if (!expert_name.empty() && tensor.shape.size() == 3) {
    constexpr int64_t kExpertsMax = 4096;
    const int64_t experts = tensor.shape[0];
    if (experts > kExpertsMax) {
      return absl::InvalidArgumentError(
          absl::StrCat(header.what(), ": tensor ", tensor.name, ": ", experts, " experts"));
    }
    const int64_t bytes = (tensor.end_byte - tensor.begin_byte) / experts;
    for (int64_t expert = 0; expert < experts; ++expert) {
      TensorEntry entry =
          EntryOf(tensor, absl::StrCat(prefix, "mlp.experts.", expert, ".", expert_name, kind));
      entry.shape.erase(entry.shape.begin());
      entry.num_elements /= experts;
      entry.begin_byte += expert * bytes;
      entry.end_byte = entry.begin_byte + bytes;
      entries.push_back(std::move(entry));
    }
    return absl::OkStatus();
  }
  const std::string name = NameIn(architecture.layer_names, leaf);
  TensorEntry entry =
      EntryOf(tensor, name.empty() ? absl::StrCat(prefix, rest) : absl::StrCat(prefix, name, kind));
  if (architecture.interleaved && (leaf == "attn_q" || leaf == "attn_k")) {
    Fields fields(header, architecture.name);
    const int64_t heads = fields.Required("attention.head_count");
    const int64_t kv_heads = fields.Natural(fields.Key("attention.head_count_kv")).value_or(heads);
    CINNABAR_RETURN_IF_ERROR(fields.status());
    const int64_t mine = leaf == "attn_q" ? heads : kv_heads;
    if (mine < 1 || mine > std::numeric_limits<int32_t>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat(header.what(), ": tensor ", tensor.name, ": ", mine, " heads"));
    }
    entry.interleaved_heads = static_cast<int32_t>(mine);
  }
  entries.push_back(std::move(entry));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CheckpointTexts> GgufTexts(const GgufHeader& header) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string name, header.String("general.architecture"));
  const Architecture* architecture = FindArchitecture(name);
  if (architecture == nullptr) return UnknownArchitecture(header, name);
  Fields fields(header, name);
  const json config = ConfigOf(header, *architecture, fields);
  CINNABAR_RETURN_IF_ERROR(fields.status());
  CINNABAR_ASSIGN_OR_RETURN(GgufTokenizer tokenizer, ReadGgufTokenizer(header));
  return CheckpointTexts{.config = config.dump(),
                         .tokenizer = std::move(tokenizer.tokenizer),
                         .tokenizer_config = std::move(tokenizer.tokenizer_config)};
}

absl::StatusOr<std::vector<TensorEntry>> GgufTensors(const GgufHeader& header) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string name, header.String("general.architecture"));
  const Architecture* architecture = FindArchitecture(name);
  std::vector<TensorEntry> entries;
  for (const GgufTensor& tensor : header.tensors()) {
    if (architecture == nullptr) {
      entries.push_back(EntryOf(tensor, tensor.name));
      continue;
    }
    if (tensor.name == "rope_freqs.weight") {
      return absl::UnimplementedError(absl::StrCat(
          header.what(), ": tensor rope_freqs.weight scales the rotation; it is not computed"));
    }
    absl::string_view rest = tensor.name;
    int32_t layer = 0;
    if (absl::ConsumePrefix(&rest, "blk.") && absl::StrContains(rest, '.')) {
      const absl::string_view index = rest.substr(0, rest.find('.'));
      if (absl::SimpleAtoi(index, &layer) && layer >= 0 && absl::StrCat(layer) == index) {
        rest.remove_prefix(index.size() + 1);
        CINNABAR_RETURN_IF_ERROR(
            AddLayerTensor(header, *architecture, tensor, index, rest, entries));
        continue;
      }
    }
    const absl::string_view full = tensor.name;
    const size_t dot = full.rfind('.');
    const std::string known = NameIn(architecture->model_names, full.substr(0, dot));
    entries.push_back(
        EntryOf(tensor, known.empty() ? tensor.name : absl::StrCat(known, full.substr(dot))));
  }
  return entries;
}

}  // namespace cinnabar
