// CUDA errors as absl::Status.
#ifndef CINNABAR_KERNELS_CUDA_ERRORS_H_
#define CINNABAR_KERNELS_CUDA_ERRORS_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace cinnabar::cuda {

// OK for 0. Memory that could not be had is ResourceExhausted, and the device goes on; everything
// else is Unavailable: the context is lost, or must be taken as lost, and the work goes elsewhere.
// The message says what was being done, and what to do next.
absl::Status StatusOfError(int error, absl::string_view doing);
// Why there is no device to use, from what counting devices returned.
absl::Status StatusOfNoDevice(int error);

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_ERRORS_H_
