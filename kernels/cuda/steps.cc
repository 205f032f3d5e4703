#include "kernels/cuda/steps.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "kernels/cuda/query_batch.h"
#include "kernels/cuda/runtime.h"

namespace cinnabar::cuda {

Steps::Steps(int32_t device, Stream stream)
    : device_(device), stream_(std::move(stream)), graphs_(stream_.get(), errors_) {}

Steps::~Steps() {
  (void)UseDevice(device_);
  (void)RunCaptured();
  (void)SynchronizeStream(stream());
}

absl::Status Steps::MakeEvent(bool timed, Event* event) {
  void* made = nullptr;
  const int error = CreateEvent(timed, &made);
  event->reset(made);
  return Note(error, "make an event");
}

absl::Status Steps::Start() {
  for (Step& step : steps_) {
    CINNABAR_RETURN_IF_ERROR(MakeEvent(/*timed=*/true, &step.begins));
    CINNABAR_RETURN_IF_ERROR(MakeEvent(/*timed=*/true, &step.ends));
    CINNABAR_RETURN_IF_ERROR(MakeEvent(/*timed=*/false, &step.leaves));
  }
  return absl::OkStatus();
}

absl::Status Steps::TakeMemory(const StepMemory& memory) {
  for (Step& step : steps_) {
    CINNABAR_ASSIGN_OR_RETURN(step.staged, TakePinnedMemory(memory.staged_bytes));
    CINNABAR_ASSIGN_OR_RETURN(
        step.results,
        TakePinnedMemory(memory.answers_max * static_cast<int64_t>(sizeof(DeviceAnswer)) +
                         memory.ids_max * static_cast<int64_t>(sizeof(int32_t))));
    step.staging.Reset(static_cast<char*>(step.staged.get()), memory.staged, memory.staged_bytes);
  }
  answers_max_ = memory.answers_max;
  ++staged_turn_;
  return absl::OkStatus();
}

absl::Status Steps::Ready() {
  if (!errors_.status().ok()) return errors_.status();
  return Note(UseDevice(device_), "use the device");
}

// --- Staging

void Steps::Rewind() {
  step().staging.Rewind();
  ++staged_turn_;
}

absl::Status Steps::MakeRoom(int64_t bytes) {
  if (bytes <= step().staging.bytes_left()) return absl::OkStatus();
  CINNABAR_CHECK(bytes <= step().staging.bytes())
      << bytes << " staged bytes are more than was reserved";
  CINNABAR_RETURN_IF_ERROR(RunCaptured());
  CINNABAR_RETURN_IF_ERROR(Note(SynchronizeStream(stream()), "wait for the device"));
  Rewind();
  return absl::OkStatus();
}

absl::StatusOr<const void*> Steps::StageBytes(const void* data, int64_t bytes) {
  int error = kSuccess;
  const void* device = step().staging.Copy(data, bytes, stream(), &error);
  CINNABAR_RETURN_IF_ERROR(Note(error, "copy to the device"));
  return device;
}

absl::Status Steps::CopyThroughStaging(const void* data, int64_t bytes, void* device) {
  CINNABAR_RETURN_IF_ERROR(MakeRoom(Staging::RoomOf(bytes)));
  CINNABAR_ASSIGN_OR_RETURN(const void* staged, StageBytes(data, bytes));
  return Note(CopyOnDevice(device, staged, bytes, stream()), "copy to the device");
}

// --- Answers and ids

absl::Status Steps::MakeRoomForAnswers() {
  return step().pending.empty() ? absl::OkStatus() : Synchronize();
}

absl::Status Steps::MakeRoomForIds() {
  return step().chosen.empty() ? absl::OkStatus() : Synchronize();
}

absl::Status Steps::BringAnswers(const DeviceAnswer* device, std::vector<int32_t> order,
                                 absl::Span<VocabularyAnswer> answers) {
  const auto bytes = static_cast<int64_t>(order.size() * sizeof(DeviceAnswer));
  CINNABAR_RETURN_IF_ERROR(
      Note(CopyToHost(AnswersOf(step()), device, bytes, stream()), "copy the answers"));
  step().answers = answers;
  step().pending = std::move(order);
  return absl::OkStatus();
}

absl::Status Steps::BringIds(const int32_t* device, absl::Span<int32_t> ids) {
  const auto bytes = static_cast<int64_t>(ids.size() * sizeof(int32_t));
  CINNABAR_RETURN_IF_ERROR(
      Note(CopyToHost(IdsOf(step()), device, bytes, stream()), "copy the chosen ids"));
  step().chosen = ids;
  return absl::OkStatus();
}

absl::Status Steps::Deliver(Step& step) {
  for (size_t i = 0; i < step.pending.size(); ++i) {
    step.answers[step.pending[i]] = AnswerOf(AnswersOf(step)[i]);
  }
  std::copy_n(IdsOf(step), step.chosen.size(), step.chosen.begin());
  if (step.timed) {
    double seconds = 0.0;
    CINNABAR_RETURN_IF_ERROR(
        Note(ElapsedSeconds(step.begins.get(), step.ends.get(), &seconds), "time a step"));
    busy_seconds_ = busy_seconds_ + seconds;
  }
  step.pending.clear();
  step.chosen = {};
  step.timed = step.under_way = false;
  return absl::OkStatus();
}

// --- One step after another

absl::Status Steps::BeginStep() {
  CINNABAR_RETURN_IF_ERROR(Ready());
  CINNABAR_RETURN_IF_ERROR(RunCaptured());
  if (!step().under_way) {
    // What was asked for outside of a step has no end that could be waited for.
    const bool asked = !step().pending.empty() || !step().chosen.empty();
    if (asked) CINNABAR_RETURN_IF_ERROR(Synchronize());
    step().timed = false;
  }
  CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().leaves.get(), stream()), "mark a step"));
  current_ = 1 - current_;
  CINNABAR_CHECK(!step().under_way) << "a third step, before the first was waited for";
  // Long done: it is before the other step, of which the last was waited for.
  CINNABAR_RETURN_IF_ERROR(Note(SynchronizeEvent(step().leaves.get()), "wait for the device"));
  Rewind();
  return use_graphs_ ? graphs_.Begin() : absl::OkStatus();
}

absl::Status Steps::EndStep() {
  CINNABAR_RETURN_IF_ERROR(Ready());
  CINNABAR_RETURN_IF_ERROR(RunCaptured());
  CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().ends.get(), stream()), "mark a step"));
  step().under_way = true;
  return absl::OkStatus();
}

absl::Status Steps::WaitStep() {
  CINNABAR_RETURN_IF_ERROR(Ready());
  for (Step* step : {&steps_[1 - current_], &steps_[current_]}) {
    if (!step->under_way) continue;
    CINNABAR_RETURN_IF_ERROR(Note(SynchronizeEvent(step->ends.get()), "wait for the device"));
    return Deliver(*step);
  }
  return Synchronize();
}

absl::Status Steps::Synchronize() {
  CINNABAR_RETURN_IF_ERROR(Ready());
  CINNABAR_RETURN_IF_ERROR(RunCaptured());
  if (step().timed && !step().under_way) {
    CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().ends.get(), stream()), "mark a step"));
  }
  CINNABAR_RETURN_IF_ERROR(Note(SynchronizeStream(stream()), "wait for the device"));
  Rewind();
  for (Step* step : {&steps_[1 - current_], &steps_[current_]}) {
    CINNABAR_RETURN_IF_ERROR(Deliver(*step));
  }
  return absl::OkStatus();
}

absl::Status Steps::RunCaptured() {
  if (!graphs_.capturing()) return absl::OkStatus();
  CINNABAR_RETURN_IF_ERROR(graphs_.End());
  if (!step().timed) {
    CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().begins.get(), stream()), "mark a step"));
    step().timed = true;
  }
  return graphs_.Run();
}

}  // namespace cinnabar::cuda
