// The CPU backend's threads. The caller takes part; with one thread there is no other.
#ifndef CINNABAR_KERNELS_CPU_THREAD_POOL_H_
#define CINNABAR_KERNELS_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "common/base/mutex.h"

namespace cinnabar::cpu {

// Items are handed out one at a time by an atomic counter, so that a thread whose core is taken
// away holds nobody up for longer than its item. Idle threads spin for a moment and then sleep.
// Calls do not nest and come from one thread at a time; they allocate nothing.
class ThreadPool {
 public:
  using Body = absl::FunctionRef<void(int64_t item, int32_t thread)>;

  explicit ThreadPool(int32_t num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t num_threads() const { return static_cast<int32_t>(threads_.size()) + 1; }

  // Calls body(item, thread) once for each item in [0, num_items), thread in [0, num_threads());
  // returns when all have returned, and then everything they wrote is visible to the caller.
  void ParallelFor(int64_t num_items, Body body);

 private:
  void Work(int32_t thread);
  void TakeItems(int32_t thread);

  std::vector<std::thread> threads_;
  // The job: written before generation_ is raised, read after it was seen.
  const Body* body_ = nullptr;
  int64_t num_items_ = 0;
  std::atomic<int64_t> next_item_{0};
  std::atomic<uint64_t> generation_{0};
  std::atomic<int32_t> num_busy_{0};  // workers that have not finished the current job
  std::atomic<bool> stopping_{false};
  Mutex mu_;
  ConditionVariable wake_;
  std::atomic<int32_t> num_asleep_{0};
};

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_THREAD_POOL_H_
