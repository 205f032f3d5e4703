#include "gateway/relay/queue_executor.h"

#include "common/base/check.h"

namespace cinnabar {

QueueExecutor::QueueExecutor(QueueExecutorOptions options) : options_(std::move(options)) {
  CINNABAR_CHECK(options_.num_threads > 0);
  for (int32_t i = 0; i < options_.num_threads; ++i) threads_.emplace_back([this] { Serve(); });
}

QueueExecutor::~QueueExecutor() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    more_.NotifyAll();
  }
  for (std::thread& thread : threads_) thread.join();
}

bool QueueExecutor::Post(std::function<void(Queue&)> call, bool must) {
  MutexLock lock(mu_);
  if (!must && static_cast<int32_t>(calls_.size()) >= options_.calls_max) {
    ++counters_.refused;
    return false;
  }
  calls_.push_back(std::move(call));
  ++counters_.calls;
  more_.NotifyOne();
  return true;
}

QueueExecutor::Counters QueueExecutor::counters() const {
  MutexLock lock(mu_);
  Counters counters = counters_;
  counters.waiting = static_cast<int64_t>(calls_.size());
  return counters;
}

void QueueExecutor::Serve() {
  RedisClient redis(options_.redis);
  Queue queue(redis, options_.queue);
  int64_t rewinds = 0;
  for (;;) {
    std::function<void(Queue&)> call;
    {
      MutexLock lock(mu_);
      counters_.rewinds += queue.mark().rewinds - rewinds;
      rewinds = queue.mark().rewinds;
      while (calls_.empty() && !stopping_) more_.Wait(mu_);
      if (calls_.empty()) return;
      call = std::move(calls_.front());
      calls_.pop_front();
    }
    call(queue);
  }
}

}  // namespace cinnabar
