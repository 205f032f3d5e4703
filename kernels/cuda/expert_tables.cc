#include "kernels/cuda/expert_tables.h"

#include <cstdint>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/weights.h"

namespace cinnabar::cuda {
namespace {

constexpr size_t kTablesMax = 4096;

const WeightView& ViewOf(const std::unique_ptr<Weight>& weight) {
  return dynamic_cast<const CudaWeight&>(*weight).view();
}

}  // namespace

WeightView CommonView(absl::Span<const std::unique_ptr<Weight>> weights) {
  WeightView view = ViewOf(weights[0]);
  view.data = nullptr;
  // Summed in one piece: a row of an expert has but few others beside it anyway.
  if (view.segment_bytes > 0) view.segment_bytes = view.k_bytes;
  view.num_segments = 1;
  return view;
}

absl::StatusOr<const void* const*> ExpertTables::Of(
    absl::Span<const std::unique_ptr<Weight>> weights, Steps& steps) {
  std::vector<const void*> pointers;
  pointers.reserve(weights.size());
  const WeightView& first = ViewOf(weights[0]);
  for (const auto& weight : weights) {
    const WeightView& view = ViewOf(weight);
    CINNABAR_CHECK(view.element == first.element && view.rows == first.rows &&
                   view.cols == first.cols)
        << "experts differ in shape or dtype";
    pointers.push_back(view.data);
  }
  const auto found = tables_.find(weights.data());
  if (found != tables_.end() && found->second.host == pointers) {
    return static_cast<const void* const*>(found->second.device.get());
  }
  CINNABAR_RETURN_IF_ERROR(steps.RunCaptured());
  if (tables_.size() >= kTablesMax) tables_.clear();
  const auto bytes = static_cast<int64_t>(pointers.size() * sizeof(void*));
  CINNABAR_ASSIGN_OR_RETURN(DeviceMemory memory, TakeDeviceMemory(bytes));
  CINNABAR_RETURN_IF_ERROR(steps.CopyThroughStaging(pointers.data(), bytes, memory.get()));
  Table& table = tables_[weights.data()];
  table = {std::move(pointers), std::move(memory)};
  return static_cast<const void* const*>(table.device.get());
}

}  // namespace cinnabar::cuda
