// A bounded queue from any thread to one coroutine.
#ifndef CINNABAR_COMMON_HTTP_ASYNC_QUEUE_H_
#define CINNABAR_COMMON_HTTP_ASYNC_QUEUE_H_

#include <chrono>
#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <utility>

#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/http/asio.h"

namespace cinnabar {

// Push and Close from any thread; Pop from one coroutine at a time, which runs on `executor` (one
// thread, or a strand). A Push that comes after the queue is gone is harmless as long as its caller
// holds the queue.
template <typename T>
class AsyncQueue {
 public:
  AsyncQueue(asio::any_io_executor executor, size_t items_max)
      : items_max_(items_max), state_(std::make_shared<State>(executor)) {}

  // False when items_max wait already, or after Close(): the item was dropped.
  bool Push(T item) {
    bool wake = false;
    {
      MutexLock lock(state_->mu);
      if (state_->closed || state_->items.size() >= items_max_) return false;
      state_->items.push_back(std::move(item));
      wake = std::exchange(state_->waiting, false);
    }
    if (wake) Wake();
    return true;
  }

  void Close() {
    bool wake = false;
    {
      MutexLock lock(state_->mu);
      state_->closed = true;
      wake = std::exchange(state_->waiting, false);
    }
    if (wake) Wake();
  }

  // The next item; nullopt after `timeout`, or when the queue is closed and empty. A wait that a
  // Push ended for another reason may come back early with nullopt.
  asio::awaitable<std::optional<T>> Pop(absl::Duration timeout) {
    const std::shared_ptr<State> state = state_;
    {
      MutexLock lock(state->mu);
      if (std::optional<T> item = state->Take(); item.has_value()) co_return item;
      if (state->closed || timeout <= absl::ZeroDuration()) co_return std::nullopt;
      state->waiting = true;
      // Set before the lock goes: a Push from now on cancels this wait and no other.
      state->timer.expires_after(absl::ToChronoNanoseconds(timeout));
    }
    boost::system::error_code ignored;
    co_await state->timer.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
    MutexLock lock(state->mu);
    state->waiting = false;
    co_return state->Take();
  }

 private:
  struct State {
    explicit State(asio::any_io_executor executor) : timer(std::move(executor)) {}
    std::optional<T> Take() {
      if (items.empty()) return std::nullopt;
      std::optional<T> item = std::move(items.front());
      items.pop_front();
      return item;
    }
    Mutex mu;  // leaf
    std::deque<T> items;
    bool waiting = false;
    bool closed = false;
    asio::steady_timer timer;  // touched on its executor only
  };

  // The timer is the coroutine's: it is cancelled where the coroutine runs. Posted, and the
  // coroutine begins its wait without giving up its thread in between, so the cancel finds the wait
  // begun.
  void Wake() {
    asio::post(state_->timer.get_executor(), [state = state_] { state->timer.cancel(); });
  }

  const size_t items_max_;
  std::shared_ptr<State> state_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_HTTP_ASYNC_QUEUE_H_
