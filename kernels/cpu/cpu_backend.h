// The CPU backend: always built, and the reference that others are held against.
#ifndef CINNABAR_KERNELS_CPU_CPU_BACKEND_H_
#define CINNABAR_KERNELS_CPU_CPU_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace cinnabar::cpu {

// Unavailable when the processor lacks the instruction set asked for; InvalidArgument for an
// unknown one.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options);

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_CPU_BACKEND_H_
