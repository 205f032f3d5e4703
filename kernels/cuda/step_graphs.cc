#include "kernels/cuda/step_graphs.h"

#include <iterator>
#include <utility>

#include "common/base/status.h"
#include "kernels/cuda/runtime.h"

namespace cinnabar::cuda {
namespace {

// The ladder of row counts, by what else changes a step's shape.
constexpr size_t kGraphsMax = 64;

}  // namespace

absl::Status StepGraphs::Begin() {
  CINNABAR_RETURN_IF_ERROR(errors_.Note(BeginCapture(stream_), "begin a graph"));
  capturing_ = true;
  num_calls_ = 0;
  choices_ = 0;
  return absl::OkStatus();
}

absl::Status StepGraphs::End() {
  capturing_ = false;
  void* graph = nullptr;
  const int error = EndCapture(stream_, &graph);
  captured_.reset(graph);
  return errors_.Note(error, "end a graph");
}

absl::Status StepGraphs::Run() {
  const Graph graph = std::move(captured_);
  if (num_calls_ == 0) return absl::OkStatus();
  return Launch(graph.get(), static_cast<int64_t>(choices_ * 4096 + num_calls_));
}

absl::Status StepGraphs::Launch(void* graph, int64_t shape) {
  GraphExecutable& executable = kept_[shape];
  bool updated = false;
  if (executable != nullptr) {
    CINNABAR_RETURN_IF_ERROR(
        errors_.Note(UpdateGraph(executable.get(), graph, &updated), "put a step into its graph"));
  }
  ++(updated ? hits_ : misses_);
  if (!updated) {
    if (executable != nullptr) {
      executable.reset();
    } else if (kept_.size() > kGraphsMax) {
      // Which one does not matter much: a step's shapes come back.
      const bool first_is_ours = kept_.begin()->first == shape;
      kept_.erase(first_is_ours ? std::next(kept_.begin()) : kept_.begin());
    }
    void* made = nullptr;
    const int error = InstantiateGraph(graph, &made);
    executable.reset(made);
    CINNABAR_RETURN_IF_ERROR(errors_.Note(error, "make a graph"));
  }
  return errors_.Note(LaunchGraph(executable.get(), stream_), "launch a graph");
}

}  // namespace cinnabar::cuda
