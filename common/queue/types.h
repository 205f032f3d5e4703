// What the queue speaks of: states and their life cycle, requests, limits, rows, events. Payloads,
// deltas, snapshots, hints and results are bytes that the queue stores and never reads.
#ifndef CINNABAR_COMMON_QUEUE_TYPES_H_
#define CINNABAR_COMMON_QUEUE_TYPES_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace cinnabar {

enum class RequestState {
  kQueued,   // waits in the queue of its class and tenant
  kLeased,   // in a pack on a ready stream; no worker has started it
  kRunning,  // a worker holds it
  kDone,     // the last four are terminal
  kFailed,   // `why` says how; a dead letter exists
  kCancelled,
  kExpired,
};
inline constexpr std::array<RequestState, 7> kRequestStates = {
    RequestState::kQueued, RequestState::kLeased,    RequestState::kRunning, RequestState::kDone,
    RequestState::kFailed, RequestState::kCancelled, RequestState::kExpired};

// The life cycle. A state never moves to itself; nothing leaves a terminal state.
bool MayMove(RequestState from, RequestState to);
bool IsTerminal(RequestState state);
absl::string_view RequestStateName(RequestState state);  // as stored: "queued"
absl::StatusOr<RequestState> ParseRequestState(absl::string_view name);

enum class RequestClass { kInteractive, kStandard, kBatch };
inline constexpr std::array<RequestClass, 3> kRequestClasses = {
    RequestClass::kInteractive, RequestClass::kStandard, RequestClass::kBatch};
absl::string_view RequestClassName(RequestClass request_class);
absl::StatusOr<RequestClass> ParseRequestClass(absl::string_view name);

// What a request has used over all its attempts; a worker continues from the value it is given.
struct Usage {
  int64_t output_tokens = 0;  // committed
  int64_t forwards = 0;       // NFE
  int64_t device_us = 0;      // microseconds of device time, its share of each batch
  int64_t energy_mj = 0;      // millijoules
  bool operator==(const Usage&) const = default;
};
std::string FormatUsage(const Usage& usage);  // "8 1 1000 0"
absl::StatusOr<Usage> ParseUsage(absl::string_view text);

// 0 a minute: no limit. An amount over `burst` passes when the bucket is full, and is paid in full.
struct RateLimit {
  int64_t per_minute = 0;
  int64_t burst = 0;
};

// What admission checks; 0 is no limit. The caller's config decides, Redis only counts.
struct AdmissionLimits {
  int64_t cost_max = 0;             // token-steps of all live requests of the partition
  int64_t queue_requests_max = 0;   // waiting, of this tenant in this class
  int64_t tenant_requests_max = 0;  // live
  int64_t tenant_cost_max = 0;      // token-steps of live requests
  RateLimit requests, tokens, cost;
  std::string budget_period;            // e.g. "2026-11"; another one starts from nothing spent
  int64_t budget_max_microdollars = 0;  // spent and reserved together
};

// Identifiers (id, tenant, gateway, ...) are 1 to 64 of [A-Za-z0-9_.-].
struct EnqueueRequest {
  std::string id;  // 128 random bits from the gateway; the key of idempotency
  std::string tenant;
  RequestClass request_class = RequestClass::kStandard;
  std::string idempotency_key;  // digest of the client's key, or empty
  std::string body_digest;      // of the client's body, <= 64 bytes: another body is a mismatch
  int64_t prompt_tokens = 0;
  int64_t canvas_tokens = 0;                    // what `output_price` is for
  int32_t steps_max = 1;                        // >= 1
  int64_t cost = 0;                             // predicted token-steps
  absl::Duration deadline = absl::Seconds(60);  // from now, by Redis's clock
  absl::Duration keep = absl::Minutes(10);      // the record, after its end
  std::string gateway;                          // told of events; may be empty
  std::string tag;                              // <= 256 bytes for the ledger: key id, model
  std::string hint;  // <= 1024 bytes for the scheduler: sampler, bucket features
  std::string payload;
  bool replay = false;  // accepted before and lost by Redis: passes every limit
  int64_t input_price_microdollars = 0;
  int64_t output_price_microdollars = 0;  // of a full canvas; charged by the committed share
};

enum class EnqueueOutcome {
  kAccepted,
  kDuplicate,   // this id, or this idempotency key with the same body, exists: see `id` and `state`
  kMismatch,    // the same id or key with another body or tenant: 422
  kOverloaded,  // cost_max: 503
  kLedgerFull,  // the ledger's exporter is far behind: 503
  kQueueFull,   // queue_requests_max: 429
  kTenantRequests,  // tenant_requests_max: 429
  kTenantCost,      // tenant_cost_max: 429
  kBudget,          // 429, not retryable
  kRate,            // 429 after `retry_after`; `detail` is requests, tokens or cost
};

struct RateRemaining {
  int64_t remaining = -1;  // -1: no limit
  absl::Duration reset;    // until the bucket is full again
};

struct EnqueueResult {
  EnqueueOutcome outcome = EnqueueOutcome::kAccepted;
  std::string id;  // accepted, duplicate, mismatch
  RequestState state = RequestState::kQueued;
  RateRemaining requests, tokens, cost;  // accepted
  int64_t level = 0;           // a refusal: how full what refused is (budget: what is left)
  absl::Duration retry_after;  // kRate
  std::string detail;
};

// A request as the scheduler plans it.
struct WaitingRequest {
  std::string id;
  std::string tenant;
  RequestClass request_class = RequestClass::kStandard;
  int64_t prompt_tokens = 0;
  int64_t canvas_tokens = 0;
  int32_t steps_max = 0;
  int32_t step = 0;  // done already
  int64_t cost = 0;
  int32_t attempts_without_progress = 0;  // > 0: a suspect, which is dispatched alone
  absl::Time not_before;                  // back-off of a suspect
  absl::Time enqueued_at;
  absl::Time deadline;
  int64_t sequence = 0;  // arrival order, kept when it is queued again
  std::string hint;
};

// One line of what the scheduler follows: what starts waiting, what made room, what ended.
struct FeedEntry {
  enum class Kind { kQueued, kPackStarted, kTerminal };
  Kind kind = Kind::kQueued;
  // kQueued: all; kTerminal: id, tenant, request_class, canvas_tokens (0: unknown), step, hint
  WaitingRequest request;
  std::string batch;   // kPackStarted
  std::string worker;  // kPackStarted
  RequestState state = RequestState::kQueued;
  Usage usage;  // kTerminal
};
struct Feed {
  std::vector<FeedEntry> entries;
  std::string position;  // where to read on
  bool gap = false;      // entries may be missing: scan the waiting set again
};

struct PackOrder {
  std::string batch;  // a name never used before, such as "<epoch>-<n>"
  std::string lane = "any";
  int64_t ready_packs_max = 4;                      // on the lane's stream, not yet started
  absl::Duration start_within = absl::Seconds(10);  // then it is queued again, without blame
  std::string info;                                 // bytes for the worker: bucket, estimates
  std::vector<std::string> requests;                // 1 to 256
};
enum class DispatchVerdict { kOk, kGone, kNotQueued, kExpired, kBackoff, kSuspect };
struct DispatchResult {
  enum class Outcome { kOk, kStaleEpoch, kReadyFull };
  Outcome outcome = Outcome::kOk;
  struct Row {
    DispatchVerdict verdict = DispatchVerdict::kOk;
    int64_t attempt = 0;
    int32_t step = 0;
  };
  std::vector<Row> rows;  // as the order's requests; empty unless kOk
};

struct RefuseResult {
  bool stale_epoch = false;
  // kOk, kGone or kNotQueued, as the requests.
  std::vector<DispatchVerdict> rows;
};

struct Leadership {
  bool leading = false;
  int64_t epoch = 0;
  std::string leader;
};

struct ReapLimits {
  int32_t count_max = 64;  // batches, and again requests past their deadline, in one call
  int32_t attempts_without_progress_max = 3;
  int32_t crashes_max = 10;
  absl::Duration backoff = absl::Seconds(1);  // times 1, 4, 16 ... for a suspect
};
struct ReapResult {
  bool stale_epoch = false;
  int64_t requeued = 0;     // their worker's lease ran out
  int64_t not_started = 0;  // queued again from a pack that nobody started
  int64_t dead = 0;
  int64_t expired = 0;
};

struct Pack {
  std::string batch;
  bool solo = false;  // a suspect: run it with no other row
  std::string info;
};

// What a worker holds a request by: every write repeats it, and a stale one is refused.
struct RowLease {
  std::string request;
  std::string batch;
  int64_t attempt = 0;

  bool operator==(const RowLease&) const = default;
  auto operator<=>(const RowLease&) const = default;
};

struct StartedRow {
  RowLease lease;
  int32_t step = 0;  // committed in Redis: continue with step + 1
  Usage usage;
  absl::Duration deadline_in;
  int32_t attempts_without_progress = 0;
  std::string payload;
  int32_t snapshot_step = 0;  // 0: none, the canvas is the initial one
  std::string snapshot;
  std::vector<std::string> deltas;  // of steps snapshot_step + 1 ... step
};
struct StartResult {
  enum class Outcome {
    kOk,
    kGone,
    kStale
  };  // gone: planned anew meanwhile; stale: another worker's
  Outcome outcome = Outcome::kOk;
  std::vector<StartedRow> rows;  // those that still are to run, by id
};

struct ProgressRow {
  RowLease lease;
  int32_t step =
      0;        // >= 1: the event's id. A row may come several times in one report, steps ascending
  Usage usage;  // after this step
  std::string delta;
  std::string snapshot;  // of the canvas after this step, or empty
};
struct FinishRow {
  RowLease lease;
  int32_t last_step = 0;  // all steps up to it are published
  bool failed = false;
  Usage usage;
  std::string why;     // <= 256 bytes, no user text: finish reason, or what failed
  std::string result;  // bytes for the gateway
};
struct PublishReport {
  absl::Duration lease_for = absl::Seconds(10);
  std::vector<ProgressRow> progress;
  std::vector<FinishRow> finished;  // applied after all of `progress`
};

enum class RowVerdict {
  kOk,      // also for a step, or an end, that was reported before
  kRewind,  // Redis has only `step`: send what follows again
  kGone,    // the record is lost: drop the row; its gateway enqueues it anew
  kStale,   // another attempt holds it, or it is queued again: drop the row
  kDone,    // terminal already: drop the row
  kFailed,
  kCancelled,
  kExpired,
  kBadStep,  // beyond steps_max, or an end before the last published step: a bug of the caller
};
struct RowReply {
  RowVerdict verdict = RowVerdict::kOk;
  int32_t step = 0;  // the last that Redis has (progress, and an end's kRewind and kBadStep)
};
struct PublishReply {
  std::vector<RowReply> progress;
  std::vector<RowReply> finished;
};

struct HandBackRow {
  RowLease lease;
  int32_t snapshot_step = 0;
  std::string snapshot;  // may be empty
};

struct BeatReply {
  bool drain = false;
  bool registered = true;                 // false: too many workers
  std::vector<std::string> lost_batches;  // of those it named: no longer its own
};

struct WorkerEntry {
  std::string boot;
  std::string state;
};

// One event of a request. `step` is its id: 1, 2, ... and last_step + 1 for the final one.
struct QueueEvent {
  std::string request;
  int32_t step = 0;
  std::optional<RequestState> final_state;  // nullopt: progress
  std::string data;                         // delta; of a final event the result, or why
};

struct RequestView {
  RequestState state = RequestState::kQueued;
  int32_t step = 0;
  int64_t attempt = 0;
  Usage usage;
  std::string why;
  int64_t charge_microdollars = 0;
  std::string result;  // of kDone and kFailed
  absl::Duration age;
  std::vector<QueueEvent> events;
};

struct LedgerEntry {
  std::string position;  // for AckLedger
  std::string request, tenant, tag;
  RequestClass request_class = RequestClass::kStandard;
  RequestState state = RequestState::kDone;
  int64_t prompt_tokens = 0;
  Usage usage;
  int32_t steps = 0;
  int64_t attempts = 0;
  int64_t charge_microdollars = 0;
};

struct DeadLetter {
  std::string position;  // for DropDeadLetters
  std::string request, tenant, tag, why, worker, body_digest;
  int64_t attempts = 0;
  int32_t step = 0;
};

struct QueueStats {
  int64_t live = 0;  // requests not terminal
  int64_t cost = 0;  // their token-steps
  int64_t batches = 0;
  int64_t ready_packs = 0;
  int64_t ledger_entries = 0;
  int64_t dead_letters = 0;
  int64_t workers = 0;
  std::array<int64_t, 3> waiting = {};  // by class
  std::array<absl::Duration, 3> oldest_age = {};
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_QUEUE_TYPES_H_
