#include "kernels/cuda/errors.h"

#include "absl/strings/str_cat.h"
#include "kernels/cuda/runtime.h"

namespace cinnabar::cuda {
namespace {

constexpr int kInsufficientDriver = 35;  // cudaErrorInsufficientDriver
constexpr int kNoDevice = 100;           // cudaErrorNoDevice

}  // namespace

absl::Status StatusOfError(int error, absl::string_view doing) {
  if (error == kSuccess) return absl::OkStatus();
  if (error == kOutOfMemory) {
    return absl::ResourceExhaustedError(absl::StrCat(doing, ": the device's memory is used up"));
  }
  return absl::UnavailableError(
      absl::StrCat(doing, ": ", NameOfError(error), " (", TextOfError(error),
                   "); start the worker again, and look at dmesg and nvidia-smi if it comes back"));
}

absl::Status StatusOfNoDevice(int error) {
  if (error == kInsufficientDriver) {
    return absl::UnavailableError(
        "no NVIDIA driver, or one older than this build needs: nvidia-smi must show CUDA 13.0 or "
        "newer; or use the CPU");
  }
  if (error == kSuccess || error == kNoDevice) {
    return absl::UnavailableError(
        "no CUDA device: see whether nvidia-smi lists one and CUDA_VISIBLE_DEVICES names it; or "
        "use "
        "the CPU");
  }
  return StatusOfError(error, "count the CUDA devices");
}

absl::Status FirstError::Remember(absl::Status status) {
  if (first_.ok() && status.code() == absl::StatusCode::kUnavailable) first_ = status;
  return status;
}

absl::Status FirstError::Note(int error, absl::string_view doing) {
  if (error == kSuccess) return absl::OkStatus();
  const absl::Status status = StatusOfError(error, doing);
  if (first_.ok()) {
    first_ = status.code() == absl::StatusCode::kUnavailable
                 ? status
                 : absl::UnavailableError(status.message());
  }
  return first_;
}

}  // namespace cinnabar::cuda
