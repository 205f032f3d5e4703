// Sends a worker's steps to Redis, in order, while the next ones are computed. Keeps the deltas of
// a row until its end: when Redis has forgotten some, they are sent again.
#ifndef CINNABAR_WORKER_SERVICE_PUBLISHER_H_
#define CINNABAR_WORKER_SERVICE_PUBLISHER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "common/base/environment.h"
#include "common/base/log.h"
#include "common/base/mutex.h"
#include "common/queue/queue.h"

namespace cinnabar {

struct PublisherCounters {
  int64_t calls = 0;
  int64_t steps = 0;
  int64_t fenced = 0;   // rows that were another worker's by then
  int64_t rewinds = 0;  // rows whose steps were sent again
  int64_t lost = 0;     // rows that Redis no longer knows
  int64_t snapshots = 0;
  int64_t failures = 0;  // calls that found no Redis
  int64_t pending = 0;   // steps not yet sent
};

// Thread-safe. Calls for one row come from one thread, in the order of its steps. A request that
// comes to this worker again while an earlier hold on it still runs is another row: what the
// earlier one still says is ignored.
class Publisher {
 public:
  // `dropped` is told of a row that need not go on (cancelled, expired, taken over): from the
  // thread that sends, without its lock.
  Publisher(std::string boot, absl::Duration lease_for,
            std::function<void(const RowLease& row)> dropped);
  ~Publisher();  // what was not sent is lost: Flush() before
  Publisher(const Publisher&) = delete;

  // From now on a thread of its own sends what there is.
  void Start(const RedisOptions& redis, const QueueOptions& queue, Environment& environment);
  // Sends once what there is, up to a bound; false when Redis was away. Nothing to send: true. From
  // one thread at a time: Start()'s, or the caller's where Start() is not called.
  bool Send(Queue& queue);

  // A row that was started: `deltas` are the steps up to `step` that Redis has (from its snapshot
  // on), for a rewind.
  void Open(const RowLease& lease, int32_t step, std::vector<std::string> deltas);
  // Each row ends with one of these.
  void Finish(FinishRow end);
  void HandBack(HandBackRow row);
  // Forgets a row that is another's business.
  void Drop(const RowLease& lease);

  void Step(ProgressRow row);

  // Waits until no more than `steps_max` steps wait to be sent; false after `timeout`.
  bool AwaitRoom(int64_t steps_max, absl::Duration timeout);
  // Waits until everything is sent and answered; false after `timeout`.
  bool Flush(absl::Duration timeout);

  PublisherCounters counters() const;

 private:
  struct Row {
    RowLease lease;
    int32_t first = 1;              // step of kept.front()
    std::vector<ProgressRow> kept;  // steps first, first + 1 ...
    size_t num_sent = 0;            // of kept: acknowledged, or in the call under way
    std::optional<FinishRow> finish;
    std::optional<HandBackRow> hand_back;
  };

  void Serve(const RedisOptions& redis, const QueueOptions& options, Environment& environment);
  void Settle(const PublishReport& report, const PublishReply& reply);
  Row* Find(const RowLease& lease) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Forget(const RowLease& lease, RowVerdict verdict, std::vector<RowLease>& dropped)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static void Rewind(Row& row, int32_t step);
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::string boot_;
  const absl::Duration lease_for_;
  const std::function<void(const RowLease&)> dropped_;
  mutable Mutex mu_;  // leaf: no call to Redis, and no callback, happens while it is held
  ConditionVariable changed_;
  std::map<std::string, Row> rows_ ABSL_GUARDED_BY(mu_);
  PublisherCounters counters_ ABSL_GUARDED_BY(mu_);
  bool sending_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_PUBLISHER_H_
