#include "kernels/backend.h"

#include "common/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#if defined(CINNABAR_HAS_CUDA)
#include "kernels/cuda/cuda_backend.h"
#endif

namespace cinnabar {

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(BackendKind kind,
                                                     const BackendOptions& options) {
  switch (kind) {
    case BackendKind::kCpu:
      return cpu::MakeCpuBackend(options);
    case BackendKind::kCuda:
#if defined(CINNABAR_HAS_CUDA)
      return cuda::MakeCudaBackend(options);
#else
      return absl::UnimplementedError(
          "this build has no CUDA backend: build it where nvcc is, or use the CPU");
#endif
  }
  CINNABAR_CHECK(false) << "not a backend: " << static_cast<int>(kind);
  return absl::InternalError("");
}

}  // namespace cinnabar
