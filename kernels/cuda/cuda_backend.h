// The CUDA backend: built where nvcc is.
#ifndef CINNABAR_KERNELS_CUDA_CUDA_BACKEND_H_
#define CINNABAR_KERNELS_CUDA_CUDA_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace cinnabar::cuda {

// Unavailable where there is no driver or no such device; InvalidArgument for an activation that is
// neither kBf16 nor kF32; Unimplemented for a device older than sm_80, or fp8 before sm_89.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions& options);

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_CUDA_BACKEND_H_
