#include "kernels/backend.h"

#include "common/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#if defined(CINNABAR_HAS_CUDA)
#include "kernels/cuda/cuda_backend.h"
#endif

namespace cinnabar {

const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBf16:
      return "BF16";
    case DType::kQ8_0:
      return "Q8_0";
    case DType::kQ4_0:
      return "Q4_0";
    case DType::kQ4_1:
      return "Q4_1";
    case DType::kQ4_K:
      return "Q4_K";
    case DType::kQ6_K:
      return "Q6_K";
  }
  CINNABAR_CHECK(false) << "not a dtype: " << static_cast<int>(dtype);
  return "";
}

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
