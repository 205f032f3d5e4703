// AsyncQueue: from any thread to one coroutine.
#include "common/http/async_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "absl/time/clock.h"

namespace cinnabar {
namespace {

constexpr absl::Duration kLong = absl::Minutes(1);

// Runs `body` to its end on this thread.
void RunCoroutine(asio::io_context& io, std::function<asio::awaitable<void>()> body) {
  asio::co_spawn(io, std::move(body), asio::detached);
  io.restart();
  io.run();
}

TEST(AsyncQueueTest, KeepsTheOrderAndItsBound) {
  asio::io_context io;
  AsyncQueue<int> queue(io.get_executor(), 2);
  EXPECT_TRUE(queue.Push(1));
  EXPECT_TRUE(queue.Push(2));
  EXPECT_FALSE(queue.Push(3));
  std::vector<int> taken;
  RunCoroutine(io, [&]() -> asio::awaitable<void> {
    for (int i = 0; i < 2; ++i) {
      const std::optional<int> item = co_await queue.Pop(kLong);
      taken.push_back(item.value_or(-1));
    }
    // Nothing waits, and no time is given.
    const std::optional<int> none = co_await queue.Pop(absl::ZeroDuration());
    taken.push_back(none.value_or(-1));
  });
  EXPECT_EQ(taken, (std::vector<int>{1, 2, -1}));
  EXPECT_TRUE(queue.Push(4));
}

TEST(AsyncQueueTest, AWaitEndsInTime) {
  asio::io_context io;
  AsyncQueue<int> queue(io.get_executor(), 2);
  const absl::Time begin = absl::Now();
  RunCoroutine(io, [&]() -> asio::awaitable<void> {
    const std::optional<int> none = co_await queue.Pop(absl::Milliseconds(20));
    EXPECT_FALSE(none.has_value());
  });
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(20));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
}

TEST(AsyncQueueTest, AClosedQueueGivesWhatItHas) {
  asio::io_context io;
  AsyncQueue<int> queue(io.get_executor(), 4);
  EXPECT_TRUE(queue.Push(7));
  queue.Close();
  EXPECT_FALSE(queue.Push(8));
  RunCoroutine(io, [&]() -> asio::awaitable<void> {
    const std::optional<int> item = co_await queue.Pop(kLong);
    EXPECT_EQ(item, 7);
    const std::optional<int> none = co_await queue.Pop(kLong);
    EXPECT_FALSE(none.has_value());
  });
}

TEST(AsyncQueueTest, CloseEndsAWait) {
  asio::io_context io;
  AsyncQueue<int> queue(io.get_executor(), 4);
  asio::post(io, [&] { queue.Close(); });  // runs once the coroutine waits, or before: both end it
  const absl::Time begin = absl::Now();
  RunCoroutine(io, [&]() -> asio::awaitable<void> {
    const std::optional<int> none = co_await queue.Pop(kLong);
    EXPECT_FALSE(none.has_value());
  });
  EXPECT_LT(absl::Now() - begin, kLong / 2);
}

// A wake-up that got lost would make a Pop last its whole timeout.
TEST(AsyncQueueTest, ManyThreadsLoseNothing) {
  constexpr int kThreads = 4;
  constexpr int kItems = 5000;
  asio::io_context io;
  AsyncQueue<int> queue(io.get_executor(), 64);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&queue, t] {
      for (int i = 0; i < kItems; ++i) {
        while (!queue.Push(t * kItems + i)) std::this_thread::yield();
      }
    });
  }
  std::vector<int> next(kThreads, 0);
  bool in_order = true;
  const absl::Time begin = absl::Now();
  RunCoroutine(io, [&]() -> asio::awaitable<void> {
    for (int taken = 0; taken < kThreads * kItems;) {
      const std::optional<int> item = co_await queue.Pop(kLong);
      if (!item.has_value()) continue;  // ended for an earlier Push
      in_order = in_order && *item % kItems == next[*item / kItems]++;
      ++taken;
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(in_order);
  EXPECT_LT(absl::Now() - begin, kLong / 2);
}

TEST(AsyncQueueTest, APushAfterTheCoroutineIsGoneIsHarmless) {
  auto queue = std::make_unique<std::shared_ptr<AsyncQueue<int>>>();
  {
    asio::io_context io;
    *queue = std::make_shared<AsyncQueue<int>>(io.get_executor(), 4);
    RunCoroutine(io, [&]() -> asio::awaitable<void> {
      const std::optional<int> none = co_await (**queue).Pop(absl::Milliseconds(1));
      EXPECT_FALSE(none.has_value());
    });
    EXPECT_TRUE((**queue).Push(1));
    queue.reset();
  }
}

}  // namespace
}  // namespace cinnabar
