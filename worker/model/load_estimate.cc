#include "worker/model/load_estimate.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/model/body.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/family.h"
#include "worker/model/safetensors.h"

namespace cinnabar {
namespace {

// WeightLoader::SmallMatrix()'s.
bool IsSmall(const ModelSpec& spec, absl::string_view name) {
  if (spec.body == BodyKind::kDiT) {
    return absl::StrContains(name, "sigma_map.") || absl::StrContains(name, "adaLN_modulation");
  }
  return spec.body == BodyKind::kDecoder && spec.experts.num_experts > 0 &&
         absl::StrContains(name, absl::StrCat(".", spec.names.router, ".weight"));
}

}  // namespace

absl::StatusOr<Denoiser::Memory> EstimateLoad(const std::string& directory, const Backend& backend,
                                              const BackendHabits& habits,
                                              const LoadOptions& options,
                                              const ForwardLimits& limits) {
  CINNABAR_ASSIGN_OR_RETURN(const CheckpointFacts facts, ReadCheckpointFacts(directory));
  CINNABAR_ASSIGN_OR_RETURN(ModelSpec spec, ReadModelSpec(facts));
  CINNABAR_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  const std::vector<std::string> problems = CheckTensors(checkpoint, spec);
  if (!problems.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(directory, ": ", problems[0]));
  }
  ForwardLimits within = limits;
  within.positions_max = std::min(limits.positions_max, spec.traits.positions_max);

  const bool dit = spec.body == BodyKind::kDiT;
  const std::string embedding =
      dit ? spec.tensor_prefix + "vocab_embed.embedding" : spec.names.embedding + ".weight";
  const std::string layers = dit ? spec.tensor_prefix + "blocks." : spec.names.layer_prefix;
  Denoiser::Memory memory;
  for (const ExpectedTensor& tensor : ExpectedTensors(spec)) {
    const TensorEntry& entry = *checkpoint.Find(tensor.name);
    if (tensor.shape.size() == 1) {
      memory.weights_bytes += entry.num_elements * BytesOf(DType::kF32);
      continue;
    }
    const int64_t cols = tensor.shape.back(), rows = entry.num_elements / cols;
    const DType stored = *UsableDType(entry.dtype);
    const bool expert =
        spec.experts.num_experts > 0 && absl::StrContains(tensor.name, spec.names.experts);
    const bool small = IsSmall(spec, tensor.name);
    const bool quantises = options.weight_dtype.has_value() && IsQuantized(*options.weight_dtype);
    const DType kept =
        KeptDType(stored, cols, small && quantises ? std::nullopt : options.weight_dtype);
    const int64_t kept_bytes = backend.WeightBytes(kept, rows, cols);
    if (tensor.name == embedding) {
      // Looked up as stored; a tied head is a second copy, in the layout of products.
      if (!habits.in_place) memory.weights_bytes += backend.WeightBytes(stored, rows, cols);
      if (spec.tied_head) memory.weights_bytes += kept_bytes;
    } else if (habits.fp8 && !IsQuantized(kept) && !expert && !small &&
               absl::StartsWith(tensor.name, layers)) {
      memory.weights_bytes += entry.num_elements + rows * BytesOf(DType::kF32);
    } else if (!expert || !habits.in_place || kept != stored) {
      memory.weights_bytes += kept_bytes;
    }
  }
  memory.workspace_bytes =
      ActivationBytes(spec, within.rows_max, within.sequences_max, within.positions_max,
                      BytesOf(backend.activation_dtype())) +
      LogitsBytes(spec, within) + backend.WorkspaceBytes(WorkspaceFor(spec, within));
  memory.kv_bytes_per_position =
      KvBytesPerPosition(spec, within.positions_max, KvReuse::kExact, backend);
  memory.reused_kv_bytes_per_position =
      KvBytesPerPosition(spec, within.positions_max, KvReuse::kPrefix, backend);
  memory.prediction_bytes = 2 * PredictionBytes(spec, backend);
  return memory;
}

}  // namespace cinnabar
