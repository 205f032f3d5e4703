// The stream and the steps that are enqueued on it. Two may be under way: each has host memory of
// its own for what it stages and for what comes back; on the device they share one area, which
// copies reach in stream order. A step may run as a graph (step_graphs.h).
#ifndef CINNABAR_KERNELS_CUDA_STEPS_H_
#define CINNABAR_KERNELS_CUDA_STEPS_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/status.h"
#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/step_graphs.h"

namespace cinnabar::cuda {

// What a step stages and brings at most.
struct StepMemory {
  char* staged = nullptr;  // on the device, staged_bytes; borrowed
  int64_t staged_bytes = 0;
  int64_t answers_max = 0;
  int64_t ids_max = 0;
};

// Errors of the device are Unavailable, and stay: see FirstError. One thread at a time, but for
// busy_seconds() and graphs()'s counts.
class Steps {
 public:
  Steps(int32_t device, Stream stream);
  // Waits for what is enqueued.
  ~Steps();
  Steps(const Steps&) = delete;
  Steps& operator=(const Steps&) = delete;

  // Once, before all else.
  absl::Status Start();
  // Before anything is staged or brought, and again to change it, while nothing is under way.
  // ResourceExhausted when there is no such memory.
  absl::Status TakeMemory(const StepMemory& memory);

  void* stream() const { return stream_.get(); }
  FirstError& errors() { return errors_; }

  // --- What every op does

  // Every call of the backend begins here, for calls may come from different threads.
  absl::Status Ready();
  // Takes down what a call of the runtime returned.
  absl::Status Note(int error, absl::string_view doing) {
    if (error == kSuccess) graphs_.CountCall();
    return errors_.Note(error, doing);
  }
  // See StepGraphs.
  void CountChoice(int32_t choice) { graphs_.CountChoice(choice); }

  // Makes sure that `bytes` can be staged without waiting. May wait for the stream, and then what
  // was staged before is gone: so an op calls this once, before it stages.
  absl::Status MakeRoom(int64_t bytes);
  // Where `values` will lie on the device; null for an empty span.
  template <typename T>
  absl::StatusOr<const T*> Stage(absl::Span<const T> values) {
    if (values.empty()) return nullptr;
    CINNABAR_ASSIGN_OR_RETURN(
        const void* device,
        StageBytes(values.data(), static_cast<int64_t>(values.size() * sizeof(T))));
    return static_cast<const T*>(device);
  }
  // Into other device memory, by way of the staged bytes: `data` may go at once.
  absl::Status CopyThroughStaging(const void* data, int64_t bytes, void* device);
  // Another number whenever what was staged is gone.
  int64_t staged_turn() const { return staged_turn_; }

  // --- What a step brings

  // The host's copies hold what one call asks for: these wait where an earlier call of this step
  // has asked. Before the call enqueues anything.
  absl::Status MakeRoomForAnswers();
  absl::Status MakeRoomForIds();
  // Brings answers from the device: the i-th will be that of answers[order[i]].
  absl::Status BringAnswers(const DeviceAnswer* device, std::vector<int32_t> order,
                            absl::Span<VocabularyAnswer> answers);
  absl::Status BringIds(const int32_t* device, absl::Span<int32_t> ids);

  // --- As in Backend

  void UseGraphs(bool use) { use_graphs_ = use; }
  absl::Status BeginStep();
  absl::Status EndStep();
  absl::Status WaitStep();
  absl::Status Synchronize();

  // Ends the capture, if there is one, and runs what it holds: before whatever cannot be captured.
  absl::Status RunCaptured();

  double busy_seconds() const { return busy_seconds_; }
  const StepGraphs& graphs() const { return graphs_; }

 private:
  // What the host keeps of a step until it was waited for.
  struct Step {
    PinnedMemory staged;
    Staging staging;
    // Answers and chosen ids, as they come from the device, and where they go.
    PinnedMemory results;
    std::vector<int32_t> pending;  // queries in the order of their device answers
    absl::Span<VocabularyAnswer> answers;
    absl::Span<int32_t> chosen;
    Event begins;  // these two are timed
    Event ends;
    Event leaves;            // nothing staged here is read behind it
    bool timed = false;      // `begins` has been recorded
    bool under_way = false;  // it has ended (`ends` has been recorded), and was not waited for
  };

  Step& step() { return steps_[current_]; }
  DeviceAnswer* AnswersOf(const Step& step) const {
    return static_cast<DeviceAnswer*>(step.results.get());
  }
  int32_t* IdsOf(const Step& step) const {
    return reinterpret_cast<int32_t*>(AnswersOf(step) + answers_max_);
  }
  absl::Status MakeEvent(bool timed, Event* event);
  absl::StatusOr<const void*> StageBytes(const void* data, int64_t bytes);
  // What was staged has been read.
  void Rewind();
  // Hands out what a step that the device is done with has brought.
  absl::Status Deliver(Step& step);

  const int32_t device_;
  const Stream stream_;
  FirstError errors_;
  Step steps_[2];
  int current_ = 0;  // the step that ops belong to
  int64_t answers_max_ = 0;
  int64_t staged_turn_ = 0;
  bool use_graphs_ = true;
  StepGraphs graphs_;
  std::atomic<double> busy_seconds_ = 0.0;
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_STEPS_H_
