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
    const int64_t stored_bytes = entry.end_byte - entry.begin_byte;
    const int64_t kept_bytes = options.weight_dtype.has_value()
                                   ? entry.num_elements * BytesOf(*options.weight_dtype)
                                   : stored_bytes;
    const bool expert =
        spec.experts.num_experts > 0 && absl::StrContains(tensor.name, spec.names.experts);
    if (tensor.name == embedding) {
      // Looked up as stored; a tied head is a second copy, in the layout of products.
      memory.weights_bytes +=
          (habits.in_place ? 0 : stored_bytes) + (spec.tied_head ? kept_bytes : 0);
    } else if (tensor.shape.size() == 1) {
      memory.weights_bytes += entry.num_elements * BytesOf(DType::kF32);
    } else if (habits.fp8 && !expert && absl::StartsWith(tensor.name, layers) &&
               !absl::StrContains(tensor.name, "." + spec.names.router + ".weight")) {
      memory.weights_bytes += entry.num_elements + tensor.shape[0] * BytesOf(DType::kF32);
    } else if (!expert || !habits.in_place || kept_bytes != stored_bytes) {
      memory.weights_bytes += kept_bytes;
    }
  }
  memory.workspace_bytes =
      ActivationBytes(spec, within.rows_max, within.sequences_max, within.positions_max,
                      BytesOf(backend.activation_dtype())) +
      LogitsBytes(spec, within) + backend.WorkspaceBytes(WorkspaceFor(spec, within));
  memory.kv_bytes_per_position = KvBytesPerPosition(spec, within.positions_max, backend);
  return memory;
}

}  // namespace cinnabar
