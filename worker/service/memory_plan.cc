#include "worker/service/memory_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr int64_t kLeftAlone = 50;  // one part in so many

std::string Sum(const Denoiser::Memory& needs, int64_t kv_bytes, int32_t positions) {
  return absl::StrCat("weights ", FormatGib(needs.weights_bytes), " + workspace ",
                      FormatGib(needs.workspace_bytes), " + keys and values ", FormatGib(kv_bytes),
                      " for one sequence of ", positions, " = ",
                      FormatGib(needs.weights_bytes + needs.workspace_bytes + kv_bytes));
}

}  // namespace

std::string FormatGib(int64_t bytes) {
  constexpr double kGib = 1 << 30;
  const double gib = static_cast<double>(bytes) / kGib;
  return gib < 0.1 ? absl::StrFormat("%.1f MiB", gib * 1024) : absl::StrFormat("%.2f GiB", gib);
}

absl::StatusOr<RoomPlan> PlanRoom(absl::string_view model, absl::string_view device,
                                  const Denoiser::Memory& needs, const RoomWanted& wanted,
                                  const DeviceRoom& room) {
  CINNABAR_CHECK(wanted.sequences_max > 0 && wanted.positions_max > 0 && wanted.kv_bytes_max >= 0);
  const auto bytes_of = [&](int64_t bytes_per_position) {
    return std::max<int64_t>(bytes_per_position * wanted.positions_max + needs.prediction_bytes, 1);
  };
  const int64_t sequence_bytes = bytes_of(needs.kv_bytes_per_position);
  const int64_t largest_bytes =
      bytes_of(std::max(needs.kv_bytes_per_position, needs.reused_kv_bytes_per_position));
  const std::string sum = Sum(needs, sequence_bytes, wanted.positions_max);
  if (wanted.kv_bytes_max > 0 && sequence_bytes > wanted.kv_bytes_max) {
    return absl::InvalidArgumentError(absl::StrCat(
        model, ": one sequence of ", wanted.positions_max, " positions has ",
        FormatGib(sequence_bytes), " of keys and values, and --kv-mib allows ",
        FormatGib(wanted.kv_bytes_max), ": raise it, or take --positions-max ",
        std::max<int64_t>(wanted.kv_bytes_max / std::max<int64_t>(needs.kv_bytes_per_position, 1),
                          1)));
  }
  const int64_t fixed_bytes = needs.weights_bytes + needs.workspace_bytes;
  if (room.total_bytes >= 0) {
    const int64_t usable = room.total_bytes - room.total_bytes / kLeftAlone;
    if (fixed_bytes + sequence_bytes > usable) {
      return absl::InvalidArgumentError(absl::StrCat(
          model, " does not fit on ", device, ": ", sum, "; the device has ",
          FormatGib(room.total_bytes), ", of which ", FormatGib(usable),
          " can be used. Take a smaller --dtype, --tokens-max or --positions-max, or a larger "
          "device: one model runs on one device"));
    }
  }
  int64_t kv_bytes =
      wanted.kv_bytes_max > 0 ? wanted.kv_bytes_max : largest_bytes * wanted.sequences_max;
  if (room.free_bytes >= 0) {
    const int64_t spare = std::max<int64_t>(room.total_bytes, 0) / kLeftAlone;
    const int64_t left = room.free_bytes - spare - fixed_bytes;
    if (left < sequence_bytes) {
      return absl::ResourceExhaustedError(absl::StrCat(
          model, " does not fit on ", device, " now: ", sum, "; of its ",
          FormatGib(std::max<int64_t>(room.total_bytes, 0)), " are ", FormatGib(room.free_bytes),
          " free: who else is on the device must make room"));
    }
    kv_bytes = std::min(kv_bytes, left);
  }
  return RoomPlan{.sequences_max = static_cast<int32_t>(
                      std::clamp<int64_t>(kv_bytes / sequence_bytes, 1, wanted.sequences_max)),
                  .kv_bytes_max = kv_bytes};
}

}  // namespace cinnabar
