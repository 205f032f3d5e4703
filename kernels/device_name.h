// How flags name a device.
#ifndef CINNABAR_KERNELS_DEVICE_NAME_H_
#define CINNABAR_KERNELS_DEVICE_NAME_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"

namespace cinnabar {

struct DeviceName {
  BackendKind kind = BackendKind::kCpu;
  int32_t index = 0;  // among the devices of its kind
};

// "cpu", "cuda" (the first one) or "cuda:N". InvalidArgument.
absl::StatusOr<DeviceName> ParseDeviceName(absl::string_view text);

// BackendOptions::activation by a flag: "auto" is float32 on the CPU and bfloat16 on CUDA, which
// takes "float32" as well. InvalidArgument.
absl::StatusOr<DType> ParseActivation(absl::string_view text, BackendKind kind);

// BackendOptions::products by a flag: "auto", and on CUDA "mma" or "wgmma". InvalidArgument.
absl::StatusOr<Products> ParseProducts(absl::string_view text, BackendKind kind);

// "cpu", "cuda:1".
std::string NameOf(const DeviceName& device);
const char* NameOf(BackendKind kind);  // "cpu", "cuda"

}  // namespace cinnabar

#endif  // CINNABAR_KERNELS_DEVICE_NAME_H_
