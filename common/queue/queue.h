// The queue as typed calls. Each call is one Redis Function (queue_functions.lua), so it happens
// whole or not at all, and it may be repeated: twice is once. That is why every call here repeats
// itself after Unavailable by the client's retry policy, and why a caller may repeat it again.
//
//   queued --dispatch--> leased --start--> running --finish--> done | failed
//     ^                    |  not started     |  hand back, lease ran out
//     +--------------------+------------------+      any live state --cancel, deadline--> cancelled
//     | expired
//
// Who calls what: the gateway Enqueue, Cancel, Events, Attach; the leading scheduler Lead,
// Dispatch, Refuse, Reap, ScanWaiting, ReadFeed; a worker TakePack, Start, Publish, HandBack,
// Abandon, Beat, Leave; operators the rest.
//
// Safety: a scheduler is fenced by its epoch; a worker's writes by (boot, batch, attempt), where
// `boot` names one start of one worker process and is never used again. Redis may lose acknowledged
// writes; then Publish answers kRewind (send those steps again) or kGone, and the gateway, whose
// Events answer NotFound, enqueues again with `replay`. mark() counts the rewinds that this client
// has noticed.
//
// Errors: Unavailable (Redis is away: later), ResourceExhausted (Redis is full; only Enqueue and
// Dispatch), InvalidArgument (a bug of the caller), DataLoss (a reply that makes no sense),
// FailedPrecondition (wrong library, wrong data set: an operator must act). Refusals that are part
// of the life of a queue are outcomes and verdicts, not errors.
#ifndef CINNABAR_COMMON_QUEUE_QUEUE_H_
#define CINNABAR_COMMON_QUEUE_QUEUE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/mutex.h"
#include "common/queue/types.h"
#include "common/redis/client.h"

namespace cinnabar {

// The site that the clients of one process have seen: what one knows, all insist on. Thread-safe.
class SiteMemory {
 public:
  std::string Get() const;
  void Set(const std::string& site);

 private:
  mutable Mutex mu_;  // leaf
  std::string site_ ABSL_GUARDED_BY(mu_);
};

struct QueueOptions {
  std::string partition = "default";  // one model pool: [A-Za-z0-9_.-], <= 64
  // Names the data set. Once seen, another one is refused: an empty or foreign Redis is an alarm,
  // not a fresh start. Empty: take what is there.
  std::string site;
  bool may_create_site = true;   // on an empty Redis; with an empty `site` it gets a random name
  bool may_load_library = true;  // false where an admin loads it
  std::shared_ptr<SiteMemory> site_memory;  // of the process; null: each client has its own
};

// Where a client last was in the history of the data set.
struct QueueMark {
  std::string site;
  int64_t generation = 0;  // of the server's starts
  int64_t change = 0;      // highest change number seen
  int64_t rewinds = 0;     // times that Redis was found to have lost a change we had seen
  int64_t restarts = 0;    // times that the generation changed, with or without loss
};

// One thread at a time. `redis` is borrowed, outlives this, and belongs to it (its on_connect is
// taken).
class Queue {
 public:
  Queue(RedisClient& redis, QueueOptions options);

  // Connects, sees to the library and the site. Optional: every call does it.
  absl::Status Open();
  const QueueMark& mark() const { return mark_; }
  RedisClient& redis() { return redis_; }

  // Gateway.
  absl::StatusOr<EnqueueResult> Enqueue(const EnqueueRequest& request,
                                        const AdmissionLimits& limits);
  // NotFound: no such request of this tenant. Returns the state it had when it was terminal
  // already, else kCancelled: the worker learns at its next step, the events end now. With
  // `leaving`, the name of a gateway whose client left, a request that another gateway is told of
  // goes on, and its state is returned.
  absl::StatusOr<RequestState> Cancel(absl::string_view request, absl::string_view tenant,
                                      absl::string_view why, absl::string_view leaving = "");
  // State, and up to `events_max` (<= 1024) events after `after_step`. NotFound as above.
  absl::StatusOr<RequestView> Events(absl::string_view request, absl::string_view tenant,
                                     int32_t after_step, int32_t events_max);
  // As Events, and from now on `gateway` is told of new ones.
  absl::StatusOr<RequestView> Attach(absl::string_view request, absl::string_view tenant,
                                     int32_t after_step, int32_t events_max,
                                     absl::string_view gateway);
  // Events are pushed at most once to this channel, subscribed on another client; one message holds
  // the events of one step of a whole batch. Missing steps show as a gap, and after a lost
  // subscription nothing shows: read Events then.
  std::string EventChannel(absl::string_view gateway) const;
  static absl::StatusOr<std::vector<QueueEvent>> ParseEventMessage(absl::string_view payload);

  // Scheduler.
  absl::StatusOr<Leadership> Lead(absl::string_view me, absl::Duration lease_for);
  absl::Status Resign(absl::string_view me);
  absl::StatusOr<DispatchResult> Dispatch(int64_t epoch, const PackOrder& order);
  // Several in one round trip, in this order; a result for each. Unavailable leaves open whether
  // that one happened.
  std::vector<absl::StatusOr<DispatchResult>> DispatchAll(int64_t epoch,
                                                          absl::Span<const PackOrder> orders);
  // Ends requests that wait and cannot be served: cancelled for this reason, and free of charge.
  absl::StatusOr<RefuseResult> Refuse(int64_t epoch, absl::string_view why,
                                      absl::Span<const std::string> requests);
  // Takes back what dead workers hold and ends what is late. Call about once a second.
  absl::StatusOr<ReapResult> Reap(int64_t epoch, const ReapLimits& limits);
  // All waiting requests, oldest first within class and tenant, at most `requests_max`; `position`
  // is where to read the feed from. What arrives during the scan may come twice.
  absl::StatusOr<std::vector<WaitingRequest>> ScanWaiting(int64_t requests_max,
                                                          std::string& position);
  // Waits up to `block` for entries after `position`; zero does not wait.
  absl::StatusOr<Feed> ReadFeed(absl::string_view position, int32_t entries_max,
                                absl::Duration block);
  absl::StatusOr<std::vector<WorkerEntry>> Workers();

  // Worker.
  // Waits up to `block` for a pack (zero does not wait). One whose answer is lost is dispatched
  // again after start_within.
  absl::StatusOr<std::optional<Pack>> TakePack(absl::string_view lane, absl::Duration block);
  absl::StatusOr<StartResult> Start(absl::string_view boot, absl::string_view batch,
                                    absl::Duration lease_for);
  // One round trip for a denoising step: steps, then ends. Renews the leases of the rows' batches.
  absl::StatusOr<PublishReply> Publish(absl::string_view boot, const PublishReport& report);
  // Back to the queue without blame: drain, no memory. kStale: it is not this worker's any more.
  absl::StatusOr<std::vector<RowReply>> HandBack(absl::string_view boot,
                                                 absl::Span<const HandBackRow> rows);
  // The device failed under these batches: what still runs of them goes back at the next Reap,
  // which counts it as a crash of each, so that a request that breaks devices ends. Not beside a
  // Publish or Beat that renews them.
  absl::Status Abandon(absl::string_view boot, absl::Span<const std::string> batches);
  // Registers `state` (<= 64 KiB) for `alive_for`, and renews `batches`. Not while the device
  // hangs.
  absl::StatusOr<BeatReply> Beat(absl::string_view boot, absl::string_view state,
                                 absl::Duration alive_for, absl::Duration lease_for,
                                 absl::Span<const std::string> batches);
  absl::Status Leave(absl::string_view boot);

  // Operator.
  // Whose request it is. NotFound.
  absl::StatusOr<std::string> Tenant(absl::string_view request);
  absl::Status Drain(absl::string_view boot);
  absl::StatusOr<QueueStats> Stats();
  // Entries after `position` ("0" is the start), oldest first.
  absl::StatusOr<std::vector<LedgerEntry>> ReadLedger(absl::string_view position,
                                                      int32_t entries_max);
  // Everything up to `position` is exported and may go. Having called this once, an exporter is
  // expected: admission stops when it is five million entries behind.
  absl::Status AckLedger(absl::string_view position);
  // Newest first.
  absl::StatusOr<std::vector<DeadLetter>> DeadLetters(int32_t entries_max);
  // Forgets up to 256 of them by position; how many there were. There is no way to run one again: a
  // request's payload goes when it ends, so its client asks anew.
  absl::StatusOr<int64_t> DropDeadLetters(absl::Span<const std::string> positions);

 private:
  absl::Status Greet(RedisClient& redis);
  std::string Key(absl::string_view name) const;
  // Calls a function and takes its reply apart; the code is element 0, the change number noted.
  absl::StatusOr<std::vector<RedisReply>> Call(absl::string_view function,
                                               absl::Span<const std::string> args);
  absl::StatusOr<std::vector<RedisReply>> Accept(absl::string_view function, RedisReply reply);
  // Whether a pipeline that ended in `status` is to be sent once more; waits before it says so.
  bool PipelineAgain(const absl::Status& status, int32_t attempt);
  absl::StatusOr<RequestView> ReadView(absl::string_view function, absl::string_view request,
                                       absl::Span<const std::string> args);

  RedisClient& redis_;
  const QueueOptions options_;
  const std::string prefix_;
  QueueMark mark_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_QUEUE_QUEUE_H_
