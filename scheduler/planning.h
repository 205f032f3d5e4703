// What runs next, where, and what is told "no": a pure function of the waiting set, the workers,
// the cost model, the fairness state and the time. No I/O, clock, lock or randomness: the same
// inputs give the same plan, in whatever order the waiting set and the workers are listed.
//
// Who is served first:
//   1. Requests without a deadline that have waited longer than `starvation_wait`, the oldest
//   first, get
//      `starvation_share` of the device time whatever else waits. (One with a deadline cannot
//      starve: it ends there.)
//   2. Lanes by class (interactive, standard, batch) by weight; waiting lifts a request by one
//   class for every
//      `ageing_period`. In a lane, the tenant with the least virtual time; of a tenant, the
//      earliest deadline. Turns are taken while all deadlines can be met with `turn_spare` to
//      spare; after that the earliest deadline of all is served, until they can again.
//   3. When not everything can be done in time, those that keep the most requests from being done
//   (the dearest of
//      the tenant that asks for most) are put off behind the others. They run when there is room
//      after all, and are refused as soon as they could not make it even alone.
// Ties: the lower request id, the lower tenant, the higher class, the lower worker id.
#ifndef CINNABAR_SCHEDULER_PLANNING_H_
#define CINNABAR_SCHEDULER_PLANNING_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "scheduler/cost_model.h"

namespace cinnabar {

using RequestId = int64_t;  // the admission's sequence number: unique, older is lower; kept by a
                            // re-queued request
using TenantIndex = int32_t;

// In the order of urgency; the number is the wire's.
enum class PriorityClass : int8_t { kInteractive = 0, kStandard = 1, kBatch = 2 };
inline constexpr int kNumClasses = 3;

struct PlanRequest {
  RequestId id = 0;
  TenantIndex tenant = 0;
  double tenant_weight = 1.0;  // > 0; equal for all requests of a tenant
  PriorityClass priority = PriorityClass::kStandard;
  WorkKind kind;
  int32_t sequence_tokens = 0;  // > 0; prompt + canvas (+ suffix): recomputed each step
  int32_t canvas_tokens = 0;
  int32_t steps_budget = 0;  // > steps_done
  int32_t steps_done = 0;    // of an earlier attempt: only the rest is paid for
  int32_t steps_min =
      0;  // in (0, steps_budget]: may be degraded down to this under overload; 0: may not
  bool suspect = false;  // of having brought a worker down: runs alone
  absl::Time arrival;
  absl::Time deadline = absl::InfiniteFuture();  // of the finished answer
};

struct RunningRow {
  RequestId id = 0;
  WorkKind kind;
  int32_t sequence_tokens = 0;
  int32_t canvas_tokens = 0;
  int32_t steps_budget = 0;  // as granted
  int32_t steps_done = 0;
  bool suspect = false;
  absl::Time deadline = absl::InfiniteFuture();
};

// A worker between two of its steps, with what was sent to it and has not begun counted among
// `rows`.
struct WorkerState {
  int32_t id = 0;
  int32_t model = 0;
  int32_t rows_max = 0;
  int64_t tokens_max =
      0;  // positions that a batch may hold (memory); longer sequences cannot run here
  int64_t tokens_target =
      0;  // positions of a step beyond which a larger batch gains nothing; <= tokens_max
  bool pads =
      false;  // computes every row at the length of the longest; false: ragged, nothing is padded
  bool accepting = true;  // false: draining, or silent
  std::vector<RunningRow> rows;
};

// Requests that are packed together: one model, lengths within a factor of 2^(1/4), remaining steps
// within 2.
struct Bucket {
  int32_t model = 0;
  int32_t length = 0;
  int32_t steps = 0;

  auto operator<=>(const Bucket&) const = default;
};

// ceil(4 * log2(tokens / 32)), at least 0: (32 * 2^((b-1)/4), 32 * 2^(b/4)].
int32_t LengthBucket(int32_t sequence_tokens);
// ceil(log2(remaining)), at least 0.
int32_t StepsBucket(double remaining_steps);

struct TenantShare {
  int32_t lane = 0;  // a PriorityClass, aged
  TenantIndex tenant = 0;
  double virtual_time = 0.0;  // device seconds received / weight
  bool active = false;        // had a waiting request at the last plan

  bool operator==(const TenantShare&) const = default;
};

// What fairness remembers from plan to plan. Losing it (a new leader) costs fairness for a moment
// and nothing else.
struct ShareState {
  std::vector<TenantShare> tenants;                // ascending by (lane, tenant)
  std::array<double, kNumClasses> floor = {};      // where a tenant that comes back starts, by lane
  std::array<double, kNumClasses> lane_time = {};  // device seconds received / class weight
  std::array<bool, kNumClasses> lane_active = {};
  double starving_credit = 0.0;  // device seconds that are owed to the starving

  bool operator==(const ShareState&) const = default;
};

struct PlanOptions {
  std::array<double, kNumClasses> class_weight = {8.0, 3.0, 1.0};
  absl::Duration ageing_period = absl::Seconds(60);
  absl::Duration starvation_wait = absl::Seconds(240);
  double starvation_share = 0.1;  // in [0, 1)
  // How much of tokens_target a class may fill. What batch leaves free, an interactive request
  // finds free; what interactive may take beyond it slows the rows that are there.
  std::array<double, kNumClasses> tokens_share = {1.0, 1.0, 0.75};
  // Of the positions of a padding worker's batch, those that may be padding when a row joins, in
  // [0, 1).
  double padding_max = 0.2;
  // Refilling a busy worker waits for company up to this times the pressure; an idle worker never
  // waits.
  absl::Duration window_max = absl::Milliseconds(50);
  // Backlog at which the pressure is 1: the window is at its longest, and requests that may be
  // degraded are.
  absl::Duration pressure_backlog = absl::Seconds(4);
  // A request that fits no running batch's lengths gets a worker drained for it after this.
  absl::Duration drain_after = absl::Milliseconds(200);
  // Turns are taken only while every deadline can be met with this much time to spare; then
  // deadlines decide.
  absl::Duration turn_spare = absl::Seconds(5);
  // At most this part of the workers drains at a time (at least one).
  double drain_share = 0.5;
  // Share of the predicted run that is added to it before it is held against a deadline.
  double deadline_margin = 0.2;
  // How many cheaper requests of class batch one of this class is worth when not all can be in
  // time.
  std::array<double, kNumClasses> class_value = {2.0, 1.5, 1.0};
  bool shed = true;  // rule 3 above; false leaves everything in the order of rules 1 and 2
};

struct PackMember {
  RequestId id = 0;
  int32_t steps_budget = 0;  // lower than the request's where it was degraded
};

// For one worker and of one bucket; members in the order of service.
struct PlannedPack {
  int32_t worker = 0;
  Bucket bucket;
  std::vector<PackMember> members;
  double cost_token_steps = 0.0;  // predicted: sequence tokens x remaining steps
};

enum class RefusalReason : int8_t {
  kDeadlineInfeasible,  // not even alone on an idle worker, at the steps it may be lowered to
  kTooLong,             // no worker that serves the model can hold it
};

struct Refusal {
  RequestId id = 0;
  RefusalReason reason = RefusalReason::kDeadlineInfeasible;
};

struct Plan {
  std::vector<PlannedPack> packs;         // by worker, then in the order of service
  std::vector<Refusal> refused;    // ascending by id
  std::vector<RequestId> expired;  // ascending
  ShareState shares;               // for the next plan
  // Predicted device time of all that waits and runs, over the accepting workers: what Retry-After
  // is made of.
  absl::Duration backlog;
  double pressure = 0.0;    // backlog / pressure_backlog, in [0, 1]
  int32_t num_put_off = 0;  // by rule 3
  // When to plan again though nothing happened: the window of what was held back. InfiniteFuture:
  // on events only.
  absl::Time next = absl::InfiniteFuture();
};

// `waiting` ids and `workers` ids are unique. A model that no accepting worker serves waits (its
// requests may still expire). Refused, expired and packed requests are disjoint; the rest goes on
// waiting. Each worker's rows and positions stay within its limits. O(n log n) for n waiting
// requests, plus n times the workers with room.
Plan PlanPacks(absl::Span<const PlanRequest> waiting, absl::Span<const WorkerState> workers,
               const CostModel& cost, const ShareState& shares, const PlanOptions& options,
               absl::Time now);

}  // namespace cinnabar

#endif  // CINNABAR_SCHEDULER_PLANNING_H_
