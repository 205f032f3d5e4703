#include "kernels/cpu/thread_pool.h"

namespace cinnabar::cpu {
namespace {

// About 20 microseconds: longer than the gap between two ops of one step, far shorter than a time
// slice.
constexpr int kSpins = 4000;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int32_t num_threads) {
  for (int32_t thread = 1; thread < num_threads; ++thread) {
    threads_.emplace_back([this, thread] { Work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const MutexLock lock(mu_);
    stopping_ = true;
    generation_.fetch_add(1);
  }
  wake_.NotifyAll();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::TakeItems(int32_t thread) {
  while (true) {
    const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
    if (item >= num_items_) return;
    (*body_)(item, thread);
  }
}

void ThreadPool::Work(int32_t thread) {
  uint64_t seen = 0;
  while (true) {
    for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin)
      Pause();
    if (generation_.load() == seen) {
      const MutexLock lock(mu_);
      num_asleep_.fetch_add(1);
      while (generation_.load() == seen) wake_.Wait(mu_);
      num_asleep_.fetch_sub(1);
    }
    seen = generation_.load();
    if (stopping_) return;
    TakeItems(thread);
    num_busy_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::ParallelFor(int64_t num_items, Body body) {
  if (threads_.empty() || num_items <= 1) {
    for (int64_t item = 0; item < num_items; ++item) body(item, 0);
    return;
  }
  body_ = &body;
  num_items_ = num_items;
  next_item_.store(0, std::memory_order_relaxed);
  num_busy_.store(static_cast<int32_t>(threads_.size()), std::memory_order_relaxed);
  generation_.fetch_add(
      1);  // sequentially consistent: either we see the sleeper, or it sees the job
  if (num_asleep_.load() > 0) {
    // Under the lock, so that the wake-up cannot fall between a sleeper's look and its wait.
    const MutexLock lock(mu_);
    wake_.NotifyAll();
  }
  TakeItems(0);
  // Every worker passes through each job, late ones without an item; their last is at most one item
  // away.
  for (int spin = 0; num_busy_.load(std::memory_order_acquire) > 0; ++spin) {
    if (spin < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace cinnabar::cpu
