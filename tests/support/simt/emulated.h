// The CUDA backend with its kernels run by the emulator of simt.h: for tests, on any machine.
#ifndef CINNABAR_TESTS_SUPPORT_SIMT_EMULATED_H_
#define CINNABAR_TESTS_SUPPORT_SIMT_EMULATED_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace cinnabar::simt {

absl::StatusOr<std::unique_ptr<Backend>> MakeEmulatedBackend(const BackendOptions& options);

// In which order the threads of a block and the blocks of a grid run; no result may depend on it.
enum class Order : uint8_t { kForward, kReverse, kShuffled };
void SetOrder(Order order);

// Every call of the runtime returns this CUDA error from now on; 0: none.
void FailFromNowOn(int error);
void LimitDeviceMemory(int64_t bytes);  // -1: no limit
void SetComputeCapability(int sm);      // of devices opened from now on; 90 at first
int64_t DeviceMemoryUsed();

struct EmulatedCounts {
  int64_t launches = 0;
  int64_t allocations = 0;
  int64_t synchronizations = 0;  // of the whole stream
  int64_t event_waits = 0;
  int64_t bytes_to_device = 0;
  int64_t bytes_to_host = 0;
  int64_t graphs_made = 0;
  int64_t graphs_launched = 0;
};
EmulatedCounts Counts();

}  // namespace cinnabar::simt

#endif  // CINNABAR_TESTS_SUPPORT_SIMT_EMULATED_H_
