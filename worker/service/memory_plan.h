// Whether a model fits a device, and how much room is left for sequences: decided before anything
// is loaded, so that nothing runs out of memory in the middle of a batch.
#ifndef CINNABAR_WORKER_SERVICE_MEMORY_PLAN_H_
#define CINNABAR_WORKER_SERVICE_MEMORY_PLAN_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

struct DeviceRoom {
  int64_t total_bytes = -1;  // -1: not known, and then nothing is refused
  int64_t free_bytes = -1;
};

struct RoomWanted {
  int32_t sequences_max = 16;  // at once
  int32_t positions_max = 2048;
  int64_t kv_bytes_max = 0;  // 0: what the sequences above can need, as far as there is room
};

// Any `sequences_max` sequences of `positions_max` fit in `kv_bytes_max`, but for those that reuse
// keys and values other than exactly, or are guided: of these as many as there is room for.
struct RoomPlan {
  int32_t sequences_max = 0;  // at least 1, at most what was wanted
  int64_t kv_bytes_max = 0;
};

// Of the device's memory a fiftieth is left alone, for what its driver and its allocator take.
// InvalidArgument: weights, workspace and one sequence of positions_max are more than the device
// has, whoever else is on it, or more than kv_bytes_max. ResourceExhausted: they are more than what
// is free now. Both messages name `model`, `device`, the numbers and what to change. Pure.
absl::StatusOr<RoomPlan> PlanRoom(absl::string_view model, absl::string_view device,
                                  const Denoiser::Memory& needs, const RoomWanted& wanted,
                                  const DeviceRoom& room);

// "15.02 GiB".
std::string FormatGib(int64_t bytes);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_MEMORY_PLAN_H_
