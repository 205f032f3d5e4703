// kernels/cuda/runtime.h on the host: ordinary memory, poisoned where CUDA leaves it undefined, a
// stream that runs nothing before it is waited for, and graphs that are lists of what was enqueued.
// FailFromNowOn() plays a device that breaks.
#include "kernels/cuda/runtime.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "tests/support/simt/emulated.h"
#include "tests/support/simt/simt.h"

namespace cinnabar::cuda {
namespace {

using Work = std::vector<std::function<void()>>;

struct State {
  bool capturing = false;
  Work captured;
  std::deque<std::function<void()>> stream;  // enqueued and not run yet
  int64_t num_run = 0;
  int error = 0;  // what every call returns from now on
  int compute_capability = 90;
  int64_t memory_limit = -1;  // device bytes that may be taken; -1: no limit
  int64_t memory_used = 0;
  simt::EmulatedCounts counts;
};
State state;

int Do(std::function<void()> work) {
  if (state.error != 0) return state.error;
  if (state.capturing) {
    state.captured.push_back(std::move(work));
  } else {
    state.stream.push_back(std::move(work));
  }
  return kSuccess;
}

// How much has been given to the stream.
int64_t Position() { return state.num_run + static_cast<int64_t>(state.stream.size()); }

// As late as possible: what the host changes too early shows.
void RunUpTo(int64_t position) {
  while (state.num_run < position) {
    const std::function<void()> work = std::move(state.stream.front());
    state.stream.pop_front();
    ++state.num_run;
    work();
  }
}

// The size is kept in front, so that what is freed can be counted.
constexpr int64_t kHeader = 256;

int Take(int64_t bytes, void** memory) {
  auto* base = static_cast<unsigned char*>(
      std::aligned_alloc(kHeader, (bytes + 2 * kHeader - 1) / kHeader * kHeader));
  if (base == nullptr) return kOutOfMemory;
  std::memcpy(base, &bytes, sizeof(bytes));
  std::memset(base + kHeader, 0xFF, bytes);
  *memory = base + kHeader;
  return kSuccess;
}

}  // namespace

void Enqueue(const LaunchShape& shape, std::function<void()> body) {
  ++state.counts.launches;
  (void)Do([shape, body = std::move(body)] {
    simt::RunGrid({shape.x, shape.y, shape.z}, shape.threads, shape.shared_bytes, body);
  });
}

int CountDevices(int* count) {
  *count = 1;
  return kSuccess;
}
int UseDevice(int /*index*/) { return state.error; }
int OpenDevice(int /*index*/, DeviceFacts* facts) {
  std::strcpy(facts->name, "emulated on the host");
  facts->compute_capability = state.compute_capability;
  facts->num_multiprocessors = 4;
  facts->shared_bytes_max = 227 << 10;
  facts->memory_bytes = int64_t{1} << 30;
  return state.error;
}
int FreeMemory(int64_t* free_bytes) {
  *free_bytes = (int64_t{1} << 30) - state.memory_used;
  return state.error;
}
int CreateStream(void** stream) {
  *stream = &state;
  return state.error;
}
void DestroyStream(void* /*stream*/) { RunUpTo(Position()); }
int SynchronizeStream(void* /*stream*/) {
  ++state.counts.synchronizations;
  if (!state.capturing) RunUpTo(Position());
  return state.capturing ? 900 : state.error;  // cudaErrorStreamCaptureUnsupported
}
int AllocateDevice(int64_t bytes, void** memory) {
  if (state.error != 0) return state.error;
  ++state.counts.allocations;
  if (state.memory_limit >= 0 && state.memory_used + bytes > state.memory_limit) {
    return kOutOfMemory;
  }
  const int error = Take(bytes, memory);
  if (error == kSuccess) state.memory_used += bytes;
  return error;
}
void FreeDevice(void* memory) {
  if (memory == nullptr) return;
  RunUpTo(Position());  // as cudaFree does
  auto* base = static_cast<unsigned char*>(memory) - kHeader;
  int64_t bytes;
  std::memcpy(&bytes, base, sizeof(bytes));
  state.memory_used -= bytes;
  std::free(base);
}
int AllocatePinned(int64_t bytes, void** memory) {
  return state.error != 0 ? state.error : Take(bytes, memory);
}
void FreePinned(void* memory) {
  if (memory == nullptr) return;
  RunUpTo(Position());
  std::free(static_cast<unsigned char*>(memory) - kHeader);
}
// An event is the position at which it was recorded.
int CreateEvent(bool /*timed*/, void** event) {
  *event = new int64_t{0};
  return state.error;
}
void DestroyEvent(void* event) { delete static_cast<int64_t*>(event); }
int RecordEvent(void* event, void* /*stream*/) {
  *static_cast<int64_t*>(event) = Position();
  return state.error;
}
int SynchronizeEvent(void* event) {
  ++state.counts.event_waits;
  RunUpTo(*static_cast<int64_t*>(event));
  return state.error;
}
// A microsecond for each thing that was run.
int ElapsedSeconds(void* from, void* to, double* seconds) {
  *seconds = 1e-6 * static_cast<double>(*static_cast<int64_t*>(to) - *static_cast<int64_t*>(from));
  return state.error;
}
int ClearAsync(void* device, int64_t bytes, void* /*stream*/) {
  return Do([=] { std::memset(device, 0, bytes); });
}
int CopyToDevice(void* device, const void* host, int64_t bytes, void* /*stream*/) {
  state.counts.bytes_to_device += bytes;
  return Do([=] { std::memcpy(device, host, bytes); });
}
int CopyOnDevice(void* to, const void* from, int64_t bytes, void* /*stream*/) {
  return Do([=] { std::memcpy(to, from, bytes); });
}
int CopyToHost(void* host, const void* device, int64_t bytes, void* /*stream*/) {
  state.counts.bytes_to_host += bytes;
  return Do([=] { std::memcpy(host, device, bytes); });
}
int BeginCapture(void* /*stream*/) {
  state.capturing = true;
  state.captured.clear();
  return state.error;
}
int EndCapture(void* /*stream*/, void** graph) {
  state.capturing = false;
  *graph = new Work(std::move(state.captured));
  state.captured.clear();
  return state.error;
}
void DestroyGraph(void* graph) { delete static_cast<Work*>(graph); }
int InstantiateGraph(void* graph, void** executable) {
  ++state.counts.graphs_made;
  *executable = new Work(*static_cast<Work*>(graph));
  return state.error;
}
int UpdateGraph(void* executable, void* graph, bool* updated) {
  auto& held = *static_cast<Work*>(executable);
  const auto& wanted = *static_cast<Work*>(graph);
  *updated = held.size() == wanted.size();
  if (*updated) held = wanted;
  return state.error;
}
int LaunchGraph(void* executable, void* /*stream*/) {
  ++state.counts.graphs_launched;
  for (const auto& work : *static_cast<Work*>(executable)) (void)Do(work);
  return state.error;
}
void DestroyExecutable(void* executable) { delete static_cast<Work*>(executable); }

const char* NameOfError(int error) {
  return error == kOutOfMemory ? "cudaErrorMemoryAllocation" : "cudaErrorEmulated";
}
const char* TextOfError(int /*error*/) { return "an emulated error"; }

}  // namespace cinnabar::cuda

namespace cinnabar::simt {

void FailFromNowOn(int error) {
  cuda::state.error = error;
  if (error == 0) return;
  cuda::state.num_run += static_cast<int64_t>(cuda::state.stream.size());
  cuda::state.stream.clear();  // it runs nothing more
}
void SetComputeCapability(int sm) { cuda::state.compute_capability = sm; }
void LimitDeviceMemory(int64_t bytes) { cuda::state.memory_limit = bytes; }
int64_t DeviceMemoryUsed() { return cuda::state.memory_used; }
EmulatedCounts Counts() { return cuda::state.counts; }

}  // namespace cinnabar::simt
