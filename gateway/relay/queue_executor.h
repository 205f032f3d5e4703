// Queue calls for coroutines. A call blocks its thread for a round trip (with `appendfsync always`,
// for an fsync), so it runs on one of a few threads, each with a connection of its own, and the
// coroutine goes on where it was.
#ifndef CINNABAR_GATEWAY_RELAY_QUEUE_EXECUTOR_H_
#define CINNABAR_GATEWAY_RELAY_QUEUE_EXECUTOR_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/mutex.h"
#include "common/http/asio.h"
#include "common/queue/queue.h"

namespace cinnabar {

template <typename T>
using QueueCall = std::function<absl::StatusOr<T>(Queue&)>;

struct QueueExecutorOptions {
  RedisOptions redis;
  QueueOptions queue;
  int32_t num_threads = 8;
  int32_t calls_max = 4096;  // waiting for a thread; beyond it a call is refused
};

// Thread-safe. Calls that wait when it is destroyed are still made.
class QueueExecutor {
 public:
  explicit QueueExecutor(QueueExecutorOptions options);
  ~QueueExecutor();
  QueueExecutor(const QueueExecutor&) = delete;

  // What `call` returns; ResourceExhausted, without a call, when calls_max wait already. Resumes on
  // the coroutine's executor. `call` should not outlive what it refers to even when the coroutine
  // is destroyed meanwhile: it captures by value.
  template <typename T>
  asio::awaitable<absl::StatusOr<T>> Run(QueueCall<T> call);

  // Without an answer. False when calls_max wait already, unless `must` is set (what gives back
  // something that is held: a cancel).
  bool Post(std::function<void(Queue&)> call, bool must = false);

  // Totals over all threads since the start, for the metrics.
  struct Counters {
    int64_t calls = 0;
    int64_t refused = 0;
    int64_t rewinds = 0;  // QueueMark::rewinds
    int64_t waiting = 0;
  };
  Counters counters() const;

 private:
  void Serve();

  const QueueExecutorOptions options_;
  mutable Mutex mu_;  // leaf: no call happens while it is held
  ConditionVariable more_;
  std::deque<std::function<void(Queue&)>> calls_ ABSL_GUARDED_BY(mu_);
  Counters counters_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;
};

template <typename T>
asio::awaitable<absl::StatusOr<T>> QueueExecutor::Run(QueueCall<T> call) {
  // No coroutine itself: g++ 12 destroys temporaries of co_await expressions twice when they
  // capture.
  return asio::async_initiate<const asio::use_awaitable_t<>, void(absl::StatusOr<T>)>(
      [this](auto handler, QueueCall<T> body) {
        // The handler can only be moved, a std::function only copied.
        auto executor = asio::get_associated_executor(handler);
        auto work = std::make_shared<asio::executor_work_guard<decltype(executor)>>(executor);
        auto shared = std::make_shared<decltype(handler)>(std::move(handler));
        const auto resume = [shared, executor, work](absl::StatusOr<T> result) {
          asio::post(executor, [shared, work, result = std::move(result)]() mutable {
            (*shared)(std::move(result));
          });
        };
        const bool taken =
            Post([body = std::move(body), resume](Queue& queue) { resume(body(queue)); });
        if (!taken) {
          resume(absl::ResourceExhaustedError("too many calls wait for Redis; try again"));
        }
      },
      asio::use_awaitable, std::move(call));
}

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_RELAY_QUEUE_EXECUTOR_H_
