#include "worker/engine/warm_up.h"

#include <algorithm>
#include <vector>

#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr int32_t kFewestRows = 16;

// A step of as many sequences as together compute `rows` rows, or as fit.
absl::Status StepOf(Denoiser& denoiser, const EngineOptions& options, int32_t rows) {
  Engine engine(denoiser, options);
  const ModelTraits& model = denoiser.traits();
  // A block-causal model computes one block of a sequence that has nothing behind it.
  const int32_t most =
      model.causal_block_length > 0 ? model.causal_block_length : options.limits.positions_max;
  const int32_t length = std::min({rows, most, options.limits.positions_max});
  CINNABAR_ASSIGN_OR_RETURN(
      const SequenceState state,
      MakeSequence(std::vector<TokenId>(length), std::vector<bool>(length, false), {}, model));
  for (int32_t begin = 0; begin < rows; begin += length) {
    const absl::Status added = engine.Add(state).status();
    if (absl::IsResourceExhausted(added) && begin > 0) break;
    CINNABAR_RETURN_IF_ERROR(added);
  }
  StepReport report;
  return engine.Step(absl::InfinitePast(), report);
}

}  // namespace

absl::StatusOr<int32_t> WarmUp(Denoiser& denoiser, const EngineOptions& options) {
  int32_t num_steps = 0;
  for (int32_t rows = std::min(kFewestRows, options.limits.rows_max);; rows *= 2) {
    rows = std::min(rows, options.limits.rows_max);
    CINNABAR_RETURN_IF_ERROR(StepOf(denoiser, options, rows));
    ++num_steps;
    if (rows == options.limits.rows_max) return num_steps;
  }
}

}  // namespace cinnabar
