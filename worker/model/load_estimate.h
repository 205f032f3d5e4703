// What loading a model will take, before anything is loaded.
#ifndef CINNABAR_WORKER_MODEL_LOAD_ESTIMATE_H_
#define CINNABAR_WORKER_MODEL_LOAD_ESTIMATE_H_

#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

// Denoiser::memory() of LoadDenoiser(directory, backend, options, limits), from headers and config
// alone; the backend's padding of weights is left out. `in_place`: this backend reads embedding
// and experts where they lie in the file (the CPU's), so that they take none of its memory. Errors
// are those of LoadDenoiser.
absl::StatusOr<Denoiser::Memory> EstimateLoad(const std::string& directory, const Backend& backend,
                                              bool in_place, const LoadOptions& options,
                                              const ForwardLimits& limits);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_LOAD_ESTIMATE_H_
