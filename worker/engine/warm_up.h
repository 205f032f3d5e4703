// Passes before the first request, so that no client waits for a device's kernels to be loaded and
// its graphs to be recorded.
#ifndef CINNABAR_WORKER_ENGINE_WARM_UP_H_
#define CINNABAR_WORKER_ENGINE_WARM_UP_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/engine/engine.h"

namespace cinnabar {

// One denoising step of made-up sequences (everything masked, the model's default sampler) for 16,
// 32, 64, ... rows at a time, as far as the options' limits and KV memory go; the last is the
// fullest batch. Nothing stays: `denoiser` may be used before and after. Returns the number of
// steps. An error is the device's.
absl::StatusOr<int32_t> WarmUp(Denoiser& denoiser, const EngineOptions& options);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_ENGINE_WARM_UP_H_
