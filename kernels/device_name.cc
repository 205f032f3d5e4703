#include "kernels/device_name.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr int32_t kDevicesMax = 64;

}  // namespace

absl::StatusOr<DeviceName> ParseDeviceName(absl::string_view text) {
  if (text == "cpu") return DeviceName{};
  if (text == "cuda") return DeviceName{.kind = BackendKind::kCuda};
  absl::string_view number = text;
  int32_t index = 0;
  if (absl::ConsumePrefix(&number, "cuda:") && !number.empty() &&
      std::all_of(number.begin(), number.end(), absl::ascii_isdigit) &&
      absl::SimpleAtoi(number, &index) && index < kDevicesMax) {
    return DeviceName{.kind = BackendKind::kCuda, .index = index};
  }
  return absl::InvalidArgumentError(
      absl::StrCat("\"", text, "\" is no device; take cpu, cuda or cuda:N"));
}

absl::StatusOr<DType> ParseActivation(absl::string_view text, BackendKind kind) {
  const bool cpu = kind == BackendKind::kCpu;
  if (text == "auto") return cpu ? DType::kF32 : DType::kBf16;
  if (text == "float32" || text == "f32") return DType::kF32;
  if (!cpu && (text == "bfloat16" || text == "bf16")) return DType::kBf16;
  return absl::InvalidArgumentError(
      absl::StrCat("activations in \"", text, "\": ", NameOf(kind),
                   cpu ? " takes auto or float32" : " takes auto, bfloat16 or float32"));
}

absl::StatusOr<Products> ParseProducts(absl::string_view text, BackendKind kind) {
  const bool cpu = kind == BackendKind::kCpu;
  if (text == "auto") return Products::kAuto;
  if (!cpu && text == "mma") return Products::kMma;
  if (!cpu && text == "wgmma") return Products::kWgmma;
  return absl::InvalidArgumentError(
      absl::StrCat("products by \"", text, "\": ", NameOf(kind),
                   cpu ? " takes auto" : " takes auto, mma or wgmma"));
}

const char* NameOf(BackendKind kind) {
  switch (kind) {
    case BackendKind::kCpu:
      return "cpu";
    case BackendKind::kCuda:
      return "cuda";
  }
  CINNABAR_CHECK(false) << "not a backend: " << static_cast<int>(kind);
  return "";
}

std::string NameOf(const DeviceName& device) {
  return device.kind == BackendKind::kCpu ? NameOf(device.kind)
                                          : absl::StrCat(NameOf(device.kind), ":", device.index);
}

}  // namespace cinnabar
