// Steps as CUDA graphs: what the stream is given between Begin() and End() is captured, and Run()
// launches it as one. Graphs that were made are kept, by the shape of their step; a step of a shape
// that was seen before only has its arguments put into the graph that is kept.
#ifndef CINNABAR_KERNELS_CUDA_STEP_GRAPHS_H_
#define CINNABAR_KERNELS_CUDA_STEP_GRAPHS_H_

#include <atomic>
#include <cstdint>
#include <map>

#include "absl/status/status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/errors.h"

namespace cinnabar::cuda {

// Begin(), End() and Run() return Unavailable for an error of the device, as `errors` keeps it. One
// thread at a time, but for hits() and misses().
class StepGraphs {
 public:
  // Both are borrowed and outlive this.
  StepGraphs(void* stream, FirstError& errors) : stream_(stream), errors_(errors) {}

  absl::Status Begin();
  bool capturing() const { return capturing_; }
  // A step's shape is how many calls it has made while capturing, and which choices it took, in
  // order (the rows of a tile).
  void CountCall() {
    if (capturing_) ++num_calls_;
  }
  void CountChoice(int32_t choice) { choices_ = choices_ * 31 + choice; }
  absl::Status End();
  // What End() has ended; nothing where no call was made.
  absl::Status Run();

  // Runs that found a graph of their shape, and those that had to make one. From any thread.
  int64_t hits() const { return hits_; }
  int64_t misses() const { return misses_; }

 private:
  absl::Status Launch(void* graph, int64_t shape);

  void* const stream_;
  FirstError& errors_;
  bool capturing_ = false;
  int64_t num_calls_ = 0;
  uint64_t choices_ = 0;
  Graph captured_;
  std::map<int64_t, GraphExecutable> kept_;  // by shape
  std::atomic<int64_t> hits_ = 0;
  std::atomic<int64_t> misses_ = 0;
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_STEP_GRAPHS_H_
