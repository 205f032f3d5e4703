// Model families: who recognises a checkpoint, and turns its config into a ModelSpec.
#ifndef CINNABAR_WORKER_MODEL_FAMILY_H_
#define CINNABAR_WORKER_MODEL_FAMILY_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/model_spec.h"

namespace cinnabar {

struct Family {
  absl::string_view name;
  // What config.json may call it; dispatch is on this, never on model_type, which is ambiguous.
  std::vector<absl::string_view> architectures;
  // For families whose config names no architecture; may be null.
  bool (*claims)(const CheckpointFacts& facts) = nullptr;
  // InvalidArgument (a field missing or out of range) or Unimplemented (a feature not computed),
  // naming the field.
  absl::StatusOr<ModelSpec> (*read)(const CheckpointFacts& facts) = nullptr;
};

// The supported families.
const std::vector<const Family*>& Families();

// The spec of a checkpoint. Unimplemented for an architecture that no family reads, saying what is
// missing for those known.
absl::StatusOr<ModelSpec> ReadModelSpec(const CheckpointFacts& facts);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_FAMILY_H_
