#include "worker/model/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/mapped_file.h"
#include "common/base/philox.h"
#include "common/base/status.h"
#include "common/gguf/gguf.h"
#include "kernels/quantized.h"
#include "worker/model/checkpoint.h"
#include "worker/model/family.h"
#include "worker/model/gguf_model.h"
#include "worker/model/model_spec.h"

namespace cinnabar {
namespace {

namespace fs = std::filesystem;

// The small files that a folder may need.
constexpr absl::string_view kSmallFiles[] = {"config.json",
                                             "generation_config.json",
                                             "tokenizer.json",
                                             "tokenizer_config.json",
                                             "special_tokens_map.json",
                                             "added_tokens.json",
                                             "vocab.json",
                                             "merges.txt",
                                             "chat_template.jinja"};

std::string EmbeddingOf(const ModelSpec& spec) {
  return spec.body == BodyKind::kDiT ? spec.tensor_prefix + "vocab_embed.embedding"
                                     : spec.names.embedding + ".weight";
}

// Small matrices on which much hangs.
bool IsDelicate(const ModelSpec& spec, const std::string& name) {
  if (spec.body == BodyKind::kDiT) {
    return absl::StrContains(name, "sigma_map.") || absl::StrContains(name, "adaLN_modulation");
  }
  return spec.experts.num_experts > 0 && absl::EndsWith(name, spec.names.router + ".weight");
}

DType TargetOf(const ModelSpec& spec, const TensorEntry& tensor, DType dtype) {
  const DType stored = *UsableDType(tensor.dtype);
  if (tensor.shape.size() < 2) return DType::kF32;
  if (IsQuantized(stored) || IsDelicate(spec, tensor.name)) return stored;
  const bool table = tensor.name == EmbeddingOf(spec) ||
                     tensor.name == spec.names.head + ".weight" ||
                     absl::EndsWith(tensor.name, "output_layer.linear.weight");
  if (dtype == DType::kQ4_K && table) dtype = DType::kQ6_K;
  const auto fits = [&](DType d) { return tensor.shape.back() % BlockOf(d).elements == 0; };
  if (fits(dtype)) return dtype;
  return fits(DType::kQ8_0) ? DType::kQ8_0 : stored;
}

absl::Status PrepareFolder(const std::string& out) {
  std::error_code error;
  fs::create_directories(out, error);
  if (error || !fs::is_directory(out)) {
    return absl::FailedPreconditionError(absl::StrCat(out, ": cannot be made a folder"));
  }
  if (!fs::is_empty(out, error) || error) {
    return absl::FailedPreconditionError(absl::StrCat(out, ": holds files; name a new folder"));
  }
  return absl::OkStatus();
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  return file ? absl::OkStatus()
              : absl::UnavailableError(absl::StrCat(path, ": cannot be written"));
}

absl::Status WriteSmallFiles(const std::string& directory, const std::string& out) {
  if (HasGgufEnding(directory)) {
    CINNABAR_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(directory));
    CINNABAR_ASSIGN_OR_RETURN(const GgufHeader header, GgufHeader::Read(file.bytes(), directory));
    CINNABAR_ASSIGN_OR_RETURN(const CheckpointTexts texts, GgufTexts(header));
    CINNABAR_RETURN_IF_ERROR(WriteText(out + "/config.json", texts.config));
    if (texts.tokenizer.empty()) return absl::OkStatus();
    CINNABAR_RETURN_IF_ERROR(WriteText(out + "/tokenizer.json", texts.tokenizer));
    return WriteText(out + "/tokenizer_config.json", texts.tokenizer_config);
  }
  for (const absl::string_view name : kSmallFiles) {
    const std::string from = absl::StrCat(directory, "/", name);
    std::error_code error;
    if (!fs::is_regular_file(from, error)) continue;
    fs::copy_file(from, absl::StrCat(out, "/", name), error);
    if (error) return absl::UnavailableError(absl::StrCat(from, ": ", error.message()));
  }
  return absl::OkStatus();
}

// One tensor in the dtype that it gets, to `file`, padded to the alignment.
absl::Status WriteTensor(const HostMatrix& matrix, DType target, GgufWriter& writer) {
  std::vector<float> row(matrix.cols);
  std::vector<uint8_t> bytes(BytesOf(target, matrix.cols));
  for (int64_t r = 0; r < matrix.rows; ++r) {
    if (target == matrix.dtype) {
      CINNABAR_RETURN_IF_ERROR(writer.Append(
          {static_cast<const uint8_t*>(matrix.data) + r * static_cast<int64_t>(bytes.size()),
           bytes.size()}));
      continue;
    }
    ReadRow(matrix, r, absl::MakeSpan(row));
    if (target == DType::kF32) {
      CINNABAR_RETURN_IF_ERROR(writer.Append(
          {reinterpret_cast<const uint8_t*>(row.data()), row.size() * sizeof(float)}));
      continue;
    }
    QuantizeRow(row, target, bytes.data());
    CINNABAR_RETURN_IF_ERROR(writer.Append(bytes));
  }
  return absl::OkStatus();
}

// --- Cost
// --------------------------------------------------------------------------------------------------

// Logits of the rows that predict `wanted` positions of one window.
absl::StatusOr<std::vector<float>> LogitsOf(Denoiser& model, absl::Span<const TokenId> ids,
                                            const std::vector<int32_t>& rows, float sigma) {
  const ModelTraits& traits = model.traits();
  const auto length = static_cast<int32_t>(ids.size());
  CINNABAR_ASSIGN_OR_RETURN(
      const std::unique_ptr<KvMemory> kv,
      model.backend().AllocateKv(model.SequenceKvShape(length, KvReuse::kExact)));
  const SequenceSpan span{.num_rows = length,
                          .block_length = traits.causal_encoder ? 0 : traits.causal_block_length,
                          .kv = kv.get()};
  CINNABAR_RETURN_IF_ERROR(model.Forward({.ids = ids,
                                          .sequences = absl::MakeConstSpan(&span, 1),
                                          .sigmas = absl::MakeConstSpan(&sigma, 1),
                                          .wanted_rows = rows}));
  std::vector<float> logits(rows.size() * traits.vocab_size);
  CINNABAR_RETURN_IF_ERROR(
      model.Logits(0, static_cast<int32_t>(rows.size()), absl::MakeSpan(logits)));
  return logits;
}

// ln sum exp, the mask token left out: it is never a prediction.
double LogSumExp(absl::Span<const float> logits, TokenId mask) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (static_cast<TokenId>(i) != mask) top = std::max(top, double{logits[i]});
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    if (static_cast<TokenId>(i) != mask) sum += std::exp(logits[i] - top);
  }
  return top + std::log(sum);
}

TokenId Best(absl::Span<const float> logits, TokenId mask) {
  TokenId best = mask == 0 ? 1 : 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (static_cast<TokenId>(i) != mask && logits[i] > logits[best]) best = static_cast<TokenId>(i);
  }
  return best;
}

}  // namespace

absl::StatusOr<QuantizeReport> QuantizeModel(const std::string& directory, DType dtype,
                                             const std::string& out,
                                             absl::FunctionRef<void(int64_t, int64_t)> progress) {
  CINNABAR_ASSIGN_OR_RETURN(const CheckpointFacts facts, ReadCheckpointFacts(directory));
  CINNABAR_ASSIGN_OR_RETURN(ModelSpec spec, ReadModelSpec(facts));
  CINNABAR_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  const std::vector<std::string> problems = CheckTensors(checkpoint, spec);
  if (!problems.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(directory, ": ", problems[0]));
  }
  CINNABAR_RETURN_IF_ERROR(PrepareFolder(out));
  CINNABAR_RETURN_IF_ERROR(WriteSmallFiles(directory, out));

  QuantizeReport report;
  std::vector<GgufOutput> outputs;
  std::vector<DType> targets;
  for (const ExpectedTensor& expected : ExpectedTensors(spec)) {
    const TensorEntry& tensor = *checkpoint.Find(expected.name);
    const DType target = TargetOf(spec, tensor, dtype);
    const int64_t bytes = BytesOf(target, tensor.num_elements);
    ++(IsQuantized(target) ? report.num_quantized : report.num_kept);
    report.bytes_before += tensor.end_byte - tensor.begin_byte;
    report.bytes_after += bytes;
    targets.push_back(target);
    outputs.push_back({tensor.name, NameOf(target), tensor.shape, bytes});
  }
  const std::string path = out + "/model.gguf", partial = path + ".partial";
  CINNABAR_ASSIGN_OR_RETURN(GgufWriter writer, GgufWriter::Create(partial, kNamedTensors, outputs));
  for (size_t i = 0; i < outputs.size(); ++i) {
    progress(static_cast<int64_t>(i), static_cast<int64_t>(outputs.size()));
    CINNABAR_ASSIGN_OR_RETURN(const HostMatrix matrix, checkpoint.Matrix(outputs[i].name));
    CINNABAR_RETURN_IF_ERROR(WriteTensor(matrix, targets[i], writer));
    checkpoint.Release(outputs[i].name);
  }
  CINNABAR_RETURN_IF_ERROR(writer.Finish());
  progress(static_cast<int64_t>(outputs.size()), static_cast<int64_t>(outputs.size()));
  std::error_code error;
  fs::rename(partial, path, error);
  if (error) return absl::UnavailableError(absl::StrCat(path, ": ", error.message()));
  return report;
}

absl::StatusOr<QuantizationCost> MeasureQuantization(
    absl::Span<const TokenId> ids, Denoiser& before, Denoiser& after,
    absl::FunctionRef<void(int64_t, int64_t)> progress) {
  if (ids.size() < 2) return absl::InvalidArgumentError("the text has fewer than two tokens");
  const ModelTraits& traits = before.traits();
  const bool masked = traits.mask_token >= 0;
  constexpr float kSigma = 0.6931472F;  // half the positions are masked
  const int64_t num_windows =
      (static_cast<int64_t>(ids.size()) + kQuantizationWindow - 1) / kQuantizationWindow;
  QuantizationCost cost;
  for (int64_t window = 0; window < num_windows; ++window) {
    progress(window, num_windows);
    const absl::Span<const TokenId> given =
        ids.subspan(window * kQuantizationWindow, kQuantizationWindow);
    std::vector<TokenId> noised(given.begin(), given.end());
    std::vector<int32_t> rows, positions;
    for (size_t i = 0; i < given.size(); ++i) {
      const auto at = static_cast<uint32_t>(window * kQuantizationWindow + static_cast<int64_t>(i));
      if (masked && (Philox4x32({{at, 0, 0, 0}}, 0, 0).word[0] & 1U) == 0) continue;
      if (traits.shift_logits && i == 0) continue;
      if (masked) noised[i] = traits.mask_token;
      positions.push_back(static_cast<int32_t>(i));
      rows.push_back(static_cast<int32_t>(i) - (traits.shift_logits ? 1 : 0));
    }
    if (rows.empty()) continue;
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<float> first,
                              LogitsOf(before, noised, rows, kSigma));
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<float> second,
                              LogitsOf(after, noised, rows, kSigma));
    for (size_t r = 0; r < rows.size(); ++r) {
      const auto vocabulary = static_cast<size_t>(traits.vocab_size);
      const absl::Span<const float> a(first.data() + r * vocabulary, vocabulary);
      const absl::Span<const float> b(second.data() + r * vocabulary, vocabulary);
      const double sum_a = LogSumExp(a, traits.mask_token), sum_b = LogSumExp(b, traits.mask_token);
      for (size_t i = 0; i < vocabulary; ++i) {
        if (static_cast<TokenId>(i) == traits.mask_token) continue;
        const double log_p = a[i] - sum_a;
        cost.divergence += std::exp(log_p) * (log_p - (b[i] - sum_b));
      }
      const TokenId truth = given[positions[r]];
      cost.nll_before += sum_a - a[truth];
      cost.nll_after += sum_b - b[truth];
      cost.agreement += Best(a, traits.mask_token) == Best(b, traits.mask_token) ? 1.0 : 0.0;
      ++cost.num_positions;
    }
  }
  progress(num_windows, num_windows);
  if (cost.num_positions == 0) {
    return absl::InvalidArgumentError("the text is too short: no position was masked");
  }
  const auto count = static_cast<double>(cost.num_positions);
  cost.nll_before = masked ? cost.nll_before / count : std::nan("");
  cost.nll_after = masked ? cost.nll_after / count : std::nan("");
  cost.divergence /= count;
  cost.agreement /= count;
  return cost;
}

}  // namespace cinnabar
