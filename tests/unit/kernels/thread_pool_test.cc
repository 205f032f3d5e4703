#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace cinnabar::cpu {
namespace {

TEST(ThreadPoolTest, EachItemRunsOnceAndItsWritesAreSeen) {
  for (const int32_t num_threads : {1, 2, 3, 8}) {
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (const int64_t items : {0, 1, 2, 7, 1000}) {
      std::vector<int> done(items);  // not atomic: ThreadSanitizer sees a missing barrier
      for (int round = 1; round <= 20; ++round) {
        pool.ParallelFor(items, [&](int64_t item, int32_t thread) {
          EXPECT_LT(thread, num_threads);
          ++done[item];
        });
        for (const int count : done) ASSERT_EQ(count, round);
      }
    }
  }
}

TEST(ThreadPoolTest, SleepersWakeUp) {
  ThreadPool pool(2);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> sum{0};
    pool.ParallelFor(2, [&](int64_t, int32_t) { sum.fetch_add(1); });
    EXPECT_EQ(sum.load(), 2);
    std::this_thread::sleep_for(
        std::chrono::milliseconds(2));  // long enough for the worker to sleep
  }
}

}  // namespace
}  // namespace cinnabar::cpu
