// The other side of the queue, played by a test: it leads, dispatches, runs and ends requests of a
// real Redis whose partition is "g".
#ifndef CINNABAR_TESTS_INTEGRATION_GATEWAY_FAKE_WORKER_H_
#define CINNABAR_TESTS_INTEGRATION_GATEWAY_FAKE_WORKER_H_

#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/http/asio.h"
#include "common/queue/queue.h"
#include "tests/support/redis_server.h"

namespace cinnabar {

inline const QueueOptions kGatewayTestQueue = {.partition = "g"};

// Every call CHECKs that it succeeds: a test that cannot play the worker has nothing to say.
class FakeWorker {
 public:
  explicit FakeWorker(const RedisServer& server)
      : redis_(server.client_options()), queue_(redis_, kGatewayTestQueue) {
    Lead();
  }

  Queue& queue() { return queue_; }
  RedisClient& redis() { return redis_; }

  void Lead() {
    const auto leadership = queue_.Lead("s", absl::Minutes(5));
    CINNABAR_CHECK(leadership.ok() && leadership->leading) << leadership.status().ToString();
    epoch_ = leadership->epoch;
  }
  // Takes a waiting request. Its payload.
  std::string Start(const std::string& id) {
    const std::string batch = absl::StrCat("b", epoch_, "-", ++num_batches_);
    const auto sent = queue_.Dispatch(epoch_, {.batch = batch, .requests = {id}});
    CINNABAR_CHECK(sent.ok() && sent->rows.size() == 1 &&
                   sent->rows[0].verdict == DispatchVerdict::kOk)
        << id << " cannot be dispatched";
    const auto pack = queue_.TakePack("any", absl::Seconds(2));
    CINNABAR_CHECK(pack.ok() && pack->has_value());
    const auto started = queue_.Start("w", (*pack)->batch, absl::Minutes(5));
    CINNABAR_CHECK(started.ok() && started->rows.size() == 1);
    leases_[id] = started->rows[0].lease;
    return started->rows[0].payload;
  }
  RowVerdict Step(const std::string& id, int32_t step, std::string delta) {
    PublishReport report;
    report.progress.push_back({.lease = leases_[id],
                               .step = step,
                               .usage = {.forwards = step},
                               .delta = std::move(delta)});
    const auto reply = queue_.Publish("w", report);
    CINNABAR_CHECK(reply.ok()) << reply.status().ToString();
    return reply->progress[0].verdict;
  }
  RowVerdict End(const std::string& id, int32_t last_step, std::string result,
                 bool failed = false) {
    PublishReport report;
    report.finished.push_back({.lease = leases_[id],
                               .last_step = last_step,
                               .failed = failed,
                               .why = failed ? "broken" : "stop",
                               .result = std::move(result)});
    const auto reply = queue_.Publish("w", report);
    CINNABAR_CHECK(reply.ok()) << reply.status().ToString();
    return reply->finished[0].verdict;
  }
  RequestView View(const std::string& id, const std::string& tenant) {
    auto view = queue_.Events(id, tenant, 0, 512);
    CINNABAR_CHECK(view.ok()) << view.status().ToString();
    return *std::move(view);
  }
  // Waits until the request is in this state: gateways cancel without waiting.
  bool Becomes(const std::string& id, const std::string& tenant, RequestState state) {
    const absl::Time until = absl::Now() + absl::Seconds(10);
    while (absl::Now() < until) {
      const auto view = queue_.Events(id, tenant, 0, 1);
      if (view.ok() && view->state == state) return true;
      absl::SleepFor(absl::Milliseconds(5));
    }
    return false;
  }
  // Breaks all subscriptions: pushes are lost until they are made again.
  void DropSubscribers() {
    CINNABAR_CHECK(redis_.Command({"CLIENT", "KILL", "TYPE", "pubsub"}).ok());
  }
  // Redis forgets everything but its functions.
  void Forget() { CINNABAR_CHECK(redis_.Command({"FLUSHALL"}).ok()); }

 private:
  RedisClient redis_;
  Queue queue_;
  int64_t epoch_ = 0;
  int num_batches_ = 0;
  std::map<std::string, RowLease> leases_;
};

// Runs a coroutine to its end on this thread.
inline void RunCoroutine(asio::io_context& io, std::function<asio::awaitable<void>()> body) {
  bool ended = false;
  asio::co_spawn(
      io,
      [&]() -> asio::awaitable<void> {
        co_await body();
        ended = true;
      },
      asio::detached);
  io.restart();
  io.run();
  CINNABAR_CHECK(ended);
}

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_INTEGRATION_GATEWAY_FAKE_WORKER_H_
