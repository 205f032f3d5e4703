// What loading a model will take, before anything is loaded.
#ifndef CINNABAR_WORKER_MODEL_LOAD_ESTIMATE_H_
#define CINNABAR_WORKER_MODEL_LOAD_ESTIMATE_H_

#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

// How a backend keeps what it loads.
struct BackendHabits {
  bool in_place = false;  // reads embedding and experts where they lie in the file (the CPU's)
  bool fp8 = false;       // BackendOptions::fp8
};

// Denoiser::memory() of LoadDenoiser(directory, backend, options, limits), from headers and config
// alone; the backend's padding of weights is left out. Errors are those of LoadDenoiser.
absl::StatusOr<Denoiser::Memory> EstimateLoad(const std::string& directory, const Backend& backend,
                                              const BackendHabits& habits,
                                              const LoadOptions& options,
                                              const ForwardLimits& limits);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_LOAD_ESTIMATE_H_
