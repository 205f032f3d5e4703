#include "tests/support/simt/emulated.h"

#include "kernels/cuda/cuda_backend.h"

namespace cinnabar::simt {

absl::StatusOr<std::unique_ptr<Backend>> MakeEmulatedBackend(const BackendOptions& options) {
  return cuda::MakeCudaBackend(options);
}

}  // namespace cinnabar::simt
