#include "worker/model/inspect.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/family.h"

namespace cinnabar {
namespace {

std::string FormatBytes(int64_t bytes) {
  constexpr double kKib = 1024.0;
  const auto size = static_cast<double>(bytes);
  if (size < 10 * kKib) return absl::StrCat(bytes, " B");
  if (size < kKib * kKib) return absl::StrFormat("%.1f KiB", size / kKib);
  if (size < kKib * kKib * kKib) return absl::StrFormat("%.1f MiB", size / kKib / kKib);
  return absl::StrFormat("%.2f GiB", size / kKib / kKib / kKib);
}

// 8015581184 -> "8.02 B".
std::string FormatCount(int64_t count) {
  const auto size = static_cast<double>(count);
  if (size >= 1e9) return absl::StrFormat("%.2f B", size / 1e9);
  if (size >= 1e6) return absl::StrFormat("%.1f M", size / 1e6);
  if (size >= 1e4) return absl::StrFormat("%.1f K", size / 1e3);
  return absl::StrCat(count);
}

// Names come from files, and a terminal obeys control characters.
std::string Printable(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  return text;
}

std::string FormatId(TokenId id) { return id < 0 ? "none" : absl::StrCat(id); }

std::string ParameterizationName(Parameterization parameterization) {
  switch (parameterization) {
    case Parameterization::kMaskPrediction:
      return "mask prediction";
    case Parameterization::kAbsorbScore:
      return "absorbing score";
    case Parameterization::kUniformScore:
      return "uniform score";
    case Parameterization::kUniformPrediction:
      return "uniform prediction";
  }
  return "";
}

std::string Attention(const ModelSpec& spec) {
  const ModelTraits& traits = spec.traits;
  if (traits.causal_encoder) {
    const auto& full = spec.windows.full_layers;
    return absl::StrCat("causal encoder, blocks of ", traits.causal_block_length, ", window ",
                        spec.windows.window, " but in ", std::count(full.begin(), full.end(), true),
                        " layers");
  }
  return traits.causal_block_length == 0
             ? "full"
             : absl::StrCat("block-causal, blocks of ", traits.causal_block_length);
}

std::string Experts(const ModelSpec& spec) {
  const ExpertSpec& experts = spec.experts;
  int32_t layers = 0;
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) layers += HasExperts(spec, layer);
  return absl::StrCat(
      experts.experts_per_token, " of ", experts.num_experts, " a token, MLP ", experts.mlp_dim,
      experts.num_groups > 1
          ? absl::StrCat(", from ", experts.groups_per_token, " of ", experts.num_groups, " groups")
          : "",
      experts.shared_mlp_dim > 0 ? absl::StrCat(", and a shared one of ", experts.shared_mlp_dim)
                                 : "",
      layers < spec.num_layers ? absl::StrCat(", in ", layers, " layers") : "",
      layers == 0 ? ", which no layer uses" : "");
}

void ReadHeaders(const Checkpoint& checkpoint, ModelReport& report) {
  std::map<std::string, ModelReport::DTypeCount> counts;
  for (const TensorEntry& tensor : checkpoint.tensors()) {
    ModelReport::DTypeCount& count = counts[tensor.dtype];
    count.dtype = tensor.dtype;
    ++count.num_tensors;
    count.num_elements += tensor.num_elements;
    if (UsableDType(tensor.dtype).has_value()) report.num_parameters += tensor.num_elements;
  }
  for (const auto& [name, count] : counts) report.dtypes.push_back(count);
  std::stable_sort(report.dtypes.begin(), report.dtypes.end(),
                   [](const auto& a, const auto& b) { return a.num_elements > b.num_elements; });
  report.num_files = static_cast<int64_t>(checkpoint.files().size());
  for (const MappedFile& file : checkpoint.files()) {
    report.file_bytes += static_cast<int64_t>(file.bytes().size());
  }
}

// Weights at 4 and 2 bytes. Vectors (norms, biases) are floats always; the embedding and experts
// are read from the file, and a tied head is packed beside it.
void EstimateMemory(const Checkpoint* checkpoint, ModelReport& report) {
  const ModelSpec& spec = *report.spec;
  const std::string embedding = spec.body == BodyKind::kDiT
                                    ? spec.tensor_prefix + "vocab_embed.embedding"
                                    : spec.names.embedding + ".weight";
  int64_t matrices = 0, vectors = 0, num_parameters = 0;
  for (const ExpectedTensor& tensor : ExpectedTensors(spec)) {
    int64_t size = 1;
    for (const int64_t dimension : tensor.shape) size *= dimension;
    num_parameters += size;
    if (tensor.name == embedding) {
      if (spec.tied_head) matrices += size;
    } else if (spec.experts.num_experts > 0 && absl::StrContains(tensor.name, spec.names.experts)) {
      const TensorEntry* expert = checkpoint == nullptr ? nullptr : checkpoint->Find(tensor.name);
      if (expert != nullptr) report.mapped_bytes += expert->end_byte - expert->begin_byte;
    } else {
      (tensor.shape.size() == 2 ? matrices : vectors) += size;
    }
  }
  report.num_parameters = num_parameters;
  const TensorEntry* table = checkpoint == nullptr ? nullptr : checkpoint->Find(embedding);
  const int64_t fixed = 4 * vectors + (table == nullptr ? 0 : table->end_byte - table->begin_byte);
  report.weights_f32_bytes = 4 * matrices + fixed;
  report.weights_half_bytes = 2 * matrices + fixed;

  const ForwardLimits limits;
  report.workspace_bytes =
      ActivationBytes(spec, limits.rows_max, limits.sequences_max,
                      std::min(limits.positions_max, spec.traits.positions_max), 4);
  const KvShape kv = KvShapeOf(spec, 1, KvReuse::kExact);
  report.kv_bytes_per_position =
      8 * (int64_t{kv.num_layers} * kv.num_kv_heads * kv.head_dim +
           int64_t{kv.num_other_layers} * kv.other_kv_heads * kv.other_head_dim);
}

void AddNotes(const Checkpoint* checkpoint, ModelReport& report) {
  const ModelTraits& traits = report.spec->traits;
  if (traits.tokenizer_size == 0) {
    report.notes.push_back("no tokenizer files: text cannot be encoded, token ids can");
  } else if (traits.mask_token >= traits.tokenizer_size) {
    report.notes.push_back(absl::StrCat("the mask token ", traits.mask_token,
                                        " is not among the tokenizer's ", traits.tokenizer_size,
                                        " ids: it is appended"));
  }
  if (checkpoint == nullptr) return;
  const std::vector<std::string> unused = UnusedTensors(*checkpoint, *report.spec);
  if (unused.empty()) return;
  std::vector<std::string> shown(unused.begin(),
                                 unused.begin() + std::min<size_t>(unused.size(), 5));
  report.notes.push_back(absl::StrCat(
      unused.size(), unused.size() == 1 ? " tensor is" : " tensors are",
      " not read: ", absl::StrJoin(shown, ", "), unused.size() > shown.size() ? ", ..." : ""));
}

// Lines "  label      value".
class Lines {
 public:
  void Add(absl::string_view label, absl::string_view value) {
    absl::StrAppend(&text_, absl::StrFormat("  %-16s %s\n", label, value));
  }
  void Title(absl::string_view title) { absl::StrAppend(&text_, title, "\n"); }
  std::string Take() { return std::move(text_); }

 private:
  std::string text_;
};

}  // namespace

absl::StatusOr<ModelReport> InspectModel(const std::string& directory) {
  ModelReport report;
  report.directory = directory;
  CINNABAR_ASSIGN_OR_RETURN(const CheckpointFacts facts, ReadCheckpointFacts(directory));
  report.architectures = facts.architectures;
  absl::StatusOr<ModelSpec> spec = ReadModelSpec(facts);
  if (spec.ok()) {
    report.spec = *std::move(spec);
  } else {
    report.problems.push_back(absl::StrCat(
        absl::IsUnimplemented(spec.status()) ? "unsupported: " : "", spec.status().message()));
  }
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory);
  if (checkpoint.ok()) {
    ReadHeaders(*checkpoint, report);
  } else {
    report.problems.emplace_back(checkpoint.status().message());
  }
  if (!report.spec.has_value()) return report;
  if (checkpoint.ok()) {
    const std::vector<std::string> problems = CheckTensors(*checkpoint, *report.spec);
    report.problems.insert(report.problems.end(), problems.begin(), problems.end());
  }
  const Checkpoint* tensors = checkpoint.ok() ? &*checkpoint : nullptr;
  EstimateMemory(tensors, report);
  AddNotes(tensors, report);
  return report;
}

std::string FormatReport(const ModelReport& report) {
  Lines lines;
  lines.Title(report.directory);
  lines.Add("architecture", report.architectures.empty()
                                ? "(not named)"
                                : Printable(absl::StrJoin(report.architectures, ", ")));
  if (report.spec.has_value()) lines.Add("family", report.spec->traits.family);
  lines.Add("parameters", FormatCount(report.num_parameters));
  std::vector<std::string> dtypes;
  for (const auto& count : report.dtypes) {
    dtypes.push_back(absl::StrCat(count.dtype, " (", count.num_tensors, " tensors)"));
  }
  lines.Add("stored as",
            absl::StrCat(dtypes.empty() ? "nothing readable" : absl::StrJoin(dtypes, ", "), ", ",
                         FormatBytes(report.file_bytes), " in ", report.num_files,
                         report.num_files == 1 ? " file" : " files"));
  if (report.spec.has_value()) {
    const ModelSpec& spec = *report.spec;
    const ModelTraits& traits = spec.traits;
    lines.Title("\nnetwork");
    lines.Add("layers", absl::StrCat(spec.num_layers));
    lines.Add("width", absl::StrCat(spec.dim, ", MLP ", spec.mlp_dim));
    if (spec.experts.num_experts > 0) lines.Add("experts", Experts(spec));
    lines.Add("heads",
              absl::StrCat(spec.num_heads, " x ", spec.head_dim,
                           spec.num_kv_heads != spec.num_heads
                               ? absl::StrCat(", ", spec.num_kv_heads, " for keys and values")
                               : ""));
    lines.Add("attention", Attention(spec));
    lines.Add("positions",
              absl::StrCat("up to ", traits.positions_max, ", rotary base ", spec.rope_theta));
    lines.Add("output",
              absl::StrCat(ParameterizationName(traits.parameterization),
                           traits.shift_logits ? ", shifted: row i - 1 predicts position i" : "",
                           spec.tied_head ? ", tied to the embedding" : "",
                           traits.conditioned_on_sigma ? ", conditioned on the noise level" : ""));
    lines.Title("\ntokens");
    lines.Add("vocabulary",
              absl::StrCat(traits.vocab_size, " rows",
                           traits.tokenizer_size > 0
                               ? absl::StrCat(", ", traits.tokenizer_size, " with text")
                               : ""));
    lines.Add("mask", FormatId(traits.mask_token));
    lines.Add("end of text",
              traits.eos_tokens.empty() ? "none" : absl::StrJoin(traits.eos_tokens, ", "));
    if (traits.eot_token >= 0) lines.Add("end of turn", FormatId(traits.eot_token));
    if (traits.delete_token >= 0) {
      lines.Add("edits",
                absl::StrCat("delete ", traits.delete_token, ", split ", traits.split_token));
    }
    lines.Add("default sampler", traits.default_sampler);

    const ForwardLimits limits;
    lines.Title("\nmemory (estimate)");
    lines.Add("weights",
              absl::StrCat(FormatBytes(report.weights_f32_bytes), " as F32, ",
                           FormatBytes(report.weights_half_bytes), " as F16 or BF16",
                           report.mapped_bytes > 0
                               ? absl::StrCat("; experts of ", FormatBytes(report.mapped_bytes),
                                              " stay in the file")
                               : ""));
    lines.Add("activations",
              absl::StrCat(FormatBytes(report.workspace_bytes), " for ", limits.rows_max, " rows"));
    lines.Add("keys and values",
              absl::StrCat(FormatBytes(report.kv_bytes_per_position), " a position, ",
                           FormatBytes(report.kv_bytes_per_position *
                                       std::min(traits.positions_max, limits.positions_max)),
                           " for ", std::min(traits.positions_max, limits.positions_max)));
  }
  std::string text = lines.Take();
  for (const std::string& note : report.notes) absl::StrAppend(&text, "\nnote: ", Printable(note));
  if (!report.notes.empty()) text += "\n";
  if (report.problems.empty()) {
    absl::StrAppend(&text, "\nready to serve\n");
  } else {
    absl::StrAppend(&text, "\ncannot be served:\n");
    for (const std::string& problem : report.problems)
      absl::StrAppend(&text, "  ", Printable(problem), "\n");
  }
  return text;
}

nlohmann::ordered_json ReportToJson(const ModelReport& report) {
  using nlohmann::ordered_json;
  ordered_json out;
  out["directory"] = report.directory;
  out["architectures"] = report.architectures;
  out["loads"] = report.problems.empty();
  out["parameters"] = report.num_parameters;
  out["files"] = report.num_files;
  out["file_bytes"] = report.file_bytes;
  ordered_json dtypes = ordered_json::object();
  for (const auto& count : report.dtypes) {
    dtypes[count.dtype] = {{"tensors", count.num_tensors}, {"elements", count.num_elements}};
  }
  out["dtypes"] = dtypes;
  out["family"] = nullptr;
  if (report.spec.has_value()) {
    const ModelSpec& spec = *report.spec;
    const ModelTraits& traits = spec.traits;
    out["family"] = traits.family;
    out["network"] = {{"layers", spec.num_layers},
                      {"dim", spec.dim},
                      {"mlp_dim", spec.mlp_dim},
                      {"experts", spec.experts.num_experts},
                      {"experts_per_token", spec.experts.experts_per_token},
                      {"heads", spec.num_heads},
                      {"kv_heads", spec.num_kv_heads},
                      {"head_dim", spec.head_dim},
                      {"rope_theta", spec.rope_theta},
                      {"norm_eps", spec.norm_eps},
                      {"tied_head", spec.tied_head},
                      {"positions_max", traits.positions_max},
                      {"causal_block_length", traits.causal_block_length},
                      {"causal_encoder", traits.causal_encoder},
                      {"shift_logits", traits.shift_logits},
                      {"conditioned_on_sigma", traits.conditioned_on_sigma},
                      {"parameterization", ParameterizationName(traits.parameterization)}};
    const auto id = [](TokenId token) { return token < 0 ? ordered_json() : ordered_json(token); };
    out["tokens"] = {{"vocab_size", traits.vocab_size}, {"tokenizer_size", traits.tokenizer_size},
                     {"mask", id(traits.mask_token)},   {"eos", traits.eos_tokens},
                     {"eot", id(traits.eot_token)},     {"delete", id(traits.delete_token)},
                     {"split", id(traits.split_token)}};
    out["default_sampler"] = traits.default_sampler;
    out["memory"] = {{"weights_f32_bytes", report.weights_f32_bytes},
                     {"weights_half_bytes", report.weights_half_bytes},
                     {"mapped_bytes", report.mapped_bytes},
                     {"workspace_bytes", report.workspace_bytes},
                     {"kv_bytes_per_position", report.kv_bytes_per_position}};
  }
  out["problems"] = report.problems;
  out["notes"] = report.notes;
  return out;
}

}  // namespace cinnabar
