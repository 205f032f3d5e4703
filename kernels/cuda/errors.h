// CUDA errors as absl::Status, and the one that a device does not come back from.
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

// The first error of a device that is not for want of memory. It stays, for the device is not to be
// trusted after it. One thread at a time.
class FirstError {
 public:
  // OK while there was none.
  const absl::Status& status() const { return first_; }
  // Gives `status` back as it is; an Unavailable one stays if it is the first.
  absl::Status Remember(absl::Status status);
  // OK for 0; for an error of something enqueued, the status that stays, always Unavailable: a
  // kernel that could not be had for want of memory has not run, and nothing after it is right.
  absl::Status Note(int error, absl::string_view doing);

 private:
  absl::Status first_;
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_ERRORS_H_
