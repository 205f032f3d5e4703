// Rounding a checkpoint to block formats, and what that costs.
#ifndef CINNABAR_WORKER_MODEL_QUANTIZE_H_
#define CINNABAR_WORKER_MODEL_QUANTIZE_H_

#include <cstdint>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

struct QuantizeReport {
  int64_t bytes_before = 0;  // of the tensors that are read
  int64_t bytes_after = 0;
  int32_t num_quantized = 0;
  int32_t num_kept = 0;  // vectors, routers, what depends on sigma, rows that blocks do not fill
};

// Writes `directory` (a folder or a GGUF file) into the new or empty folder `out`: its small files,
// and model.gguf with the tensors that the network reads under their Hugging Face names. `dtype` is
// kQ8_0 or kQ4_K; with kQ4_K embedding and head become Q6_K, and rows that 256 does not divide
// Q8_0. What is in a block format stays as it is. `progress` hears of tensors done and of how many.
// InvalidArgument for a checkpoint that does not load, FailedPrecondition when `out` holds files.
// Nothing is called model.gguf before it is whole.
absl::StatusOr<QuantizeReport> QuantizeModel(const std::string& directory, DType dtype,
                                             const std::string& out,
                                             absl::FunctionRef<void(int64_t, int64_t)> progress);

// Two networks of one vocabulary on the same text under the same masks.
struct QuantizationCost {
  int64_t num_positions = 0;  // that were predicted
  // Mean of -ln p(token) at masked positions; NaN where the model has no mask token.
  double nll_before = 0.0;
  double nll_after = 0.0;
  // Mean over positions of KL(before || after), nats, and how often both prefer the same token.
  double divergence = 0.0;
  double agreement = 0.0;
};

// `ids` in windows of at most 128; in each, half the positions (chosen by the position's own noise,
// always the same) are masked and predicted. Without a mask token nothing is masked and every
// position is compared. Both networks were loaded for passes of that size. InvalidArgument for
// fewer than two ids.
absl::StatusOr<QuantizationCost> MeasureQuantization(
    absl::Span<const TokenId> ids, Denoiser& before, Denoiser& after,
    absl::FunctionRef<void(int64_t, int64_t)> progress);

inline constexpr int32_t kQuantizationWindow = 128;

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_QUANTIZE_H_
