#include "scheduler/planning.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <queue>
#include <set>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kStarvingCreditMax = 60.0;  // device seconds

// Forecasts by kind, worked out once a plan: a request that has not begun needs a multiplication
// only.
class Forecaster {
 public:
  explicit Forecaster(const CostModel& cost) : cost_(cost) {}

  StepsForecast Forecast(const WorkKind& kind, int32_t canvas_tokens, int32_t steps_budget,
                         int32_t steps_done) {
    constexpr int32_t kUnit = 1 << 20;
    const auto key = std::make_tuple(kind.model, kind.sampler, kind.threshold_percent,
                                     CanvasBucket(canvas_tokens));
    auto [entry, is_new] = known_.try_emplace(key);
    if (is_new) {
      entry->second.fractions = BlendFractions(cost_, kind, canvas_tokens);
      entry->second.unit = ForecastSteps(entry->second.fractions, kUnit, 0);
    }
    if (steps_done > 0) return ForecastSteps(entry->second.fractions, steps_budget, steps_done);
    const double budget = steps_budget;
    const auto scale = [budget](double of_unit) { return std::max(1.0, of_unit / kUnit * budget); };
    const StepsForecast& unit = entry->second.unit;
    return {scale(unit.mean), scale(unit.p25), scale(unit.p50), scale(unit.p75), scale(unit.p90)};
  }

 private:
  struct Known {
    FractionHistogram fractions;
    StepsForecast unit;
  };
  const CostModel& cost_;
  absl::flat_hash_map<std::tuple<int32_t, int32_t, int32_t, int32_t>, Known> known_;
};

// The workers of one model, as one machine.
struct Pool {
  const StepTimeFit* step_time = nullptr;
  int32_t num_workers = 0;       // that accept
  int64_t tokens_max = 0;        // of the largest worker, accepting or not
  double tokens_target = 0.0;    // mean over the accepting
  double rows_max = 0.0;         // mean over the accepting
  double backlog_seconds = 0.0;  // device time of all its requests

  // Rows of this length in a full step, and what such a step takes.
  double RowsAtTarget(double tokens) const {
    return std::max(1.0, std::min(rows_max, std::floor(tokens_target / tokens)));
  }
  double FullStepSeconds(double tokens) const {
    const double rows = RowsAtTarget(tokens);
    return PredictStepSeconds(*step_time, rows, rows * tokens);
  }
  double AloneStepSeconds(double tokens) const {
    return PredictStepSeconds(*step_time, 1.0, tokens);
  }
};

// The waiting requests of a tenant in a lane.
struct Queue {
  size_t share = 0;  // index in the tenants' shares
  double weight = 1.0;
  double virtual_time = 0.0;
  std::vector<int32_t> requests;  // earliest deadline first
  size_t next = 0;
};
struct Candidate {
  const PlanRequest* request = nullptr;
  int32_t pool = -1;         // index; -1: no accepting worker
  int32_t steps_budget = 0;  // as it would be granted
  int32_t lane = 0;          // class after ageing
  double waited_seconds = 0.0;
  double slack_seconds = 0.0;  // until the deadline
  StepsForecast steps;
  double device_seconds = 0.0;  // its share of full steps: what it costs the others
  double run_seconds = 0.0;     // from start to end in a full batch
  bool starving = false;
  bool put_off = false;
  Queue* queue = nullptr;  // its tenant's
  bool pressed = false;  // served before its turn: its deadline, or that of one behind it, needs it
};

bool EarlierDeadline(const Candidate& a, const Candidate& b) {
  return std::tie(a.slack_seconds, a.request->id) < std::tie(b.slack_seconds, b.request->id);
}

// A worker while its plan is made.
struct Slot {
  const WorkerState* worker = nullptr;
  const StepTimeFit* step_time = nullptr;
  int32_t pool = -1;
  int32_t rows = 0;
  int64_t tokens = 0;  // sum over the rows
  int64_t tokens_longest = 0;
  double steps_longest = 0.0;  // median remaining steps of the row that stays longest
  double step_seconds_max =
      kInfinity;                // the slowest step at which every row that can be in time is
  bool closed = false;          // suspect on board, or being drained for somebody
  std::vector<int32_t> placed;  // candidates, in the order of service

  int64_t PositionsWith(int64_t more_tokens) const {
    if (!worker->pads) return tokens + more_tokens;
    return (rows + 1) * std::max(tokens_longest, more_tokens);
  }
  // Of those positions, the ones that would be padding.
  int64_t PaddingWith(int64_t more_tokens) const {
    return PositionsWith(more_tokens) - tokens - more_tokens;
  }
  bool PadsTooMuch(int64_t more_tokens, double padding_max) const {
    return rows > 0 && static_cast<double>(PaddingWith(more_tokens)) >
                           padding_max * static_cast<double>(PositionsWith(more_tokens));
  }
  double StepSeconds() const {
    const int64_t positions = worker->pads ? rows * tokens_longest : tokens;
    return PredictStepSeconds(*step_time, rows, static_cast<double>(positions));
  }
  double DrainSeconds() const { return steps_longest * StepSeconds(); }

  void Add(int64_t more_tokens, double steps_p50, double slack_seconds, double margin,
           bool suspect) {
    ++rows;
    tokens += more_tokens;
    tokens_longest = std::max(tokens_longest, more_tokens);
    steps_longest = std::max(steps_longest, steps_p50);
    // A row that is late already at the present pace holds nobody back.
    const double bound = slack_seconds / (std::max(steps_p50, 1.0) * (1.0 + margin));
    if (bound > StepSeconds()) step_seconds_max = std::min(step_seconds_max, bound);
    closed = closed || suspect;
  }
};

using Queues = std::map<std::pair<int32_t, TenantIndex>, Queue>;

// A request, waiting or running, on the machine that stands for the whole pool.
struct Job {
  double slack_seconds = 0.0;
  RequestId id = 0;
  int32_t candidate = -1;       // -1: runs already
  double device_seconds = 0.0;  // divided by the pool's workers

  bool operator<(const Job& other) const {
    return std::tie(slack_seconds, id) < std::tie(other.slack_seconds, other.id);
  }
};

struct Planner {
  const PlanOptions& options;
  const CostModel& cost;
  const absl::Time now;
  Forecaster forecaster;
  std::vector<Pool> pools;
  std::vector<int32_t> pool_models;    // ascending; pools[i] serves pool_models[i]
  std::vector<Slot> slots;             // of accepting workers, ascending by worker id
  std::vector<Candidate> candidates;   // ascending by id
  std::vector<std::vector<Job>> jobs;  // by pool, then by deadline
  Plan plan;

  Planner(const CostModel& cost_model, const PlanOptions& plan_options, absl::Time time)
      : options(plan_options), cost(cost_model), now(time), forecaster(cost_model) {}

  int32_t PoolOf(int32_t model) const {
    const auto at = std::lower_bound(pool_models.begin(), pool_models.end(), model);
    return at != pool_models.end() && *at == model ? static_cast<int32_t>(at - pool_models.begin())
                                                   : -1;
  }

  void TakeWorkers(absl::Span<const WorkerState> workers);
  void TakeRequests(absl::Span<const PlanRequest> waiting);
  bool Price(Candidate& candidate);
  void Degrade(double backlog_seconds);
  void SortJobs();
  // What the starving earn while others are served, in device seconds for each of theirs.
  double StarvingGain() const {
    return options.starvation_share / (1.0 - options.starvation_share);
  }
  void PutOff(int32_t pool);
  void StartShares(const ShareState& before, const Queues& queues);
  std::vector<int32_t> Order(const ShareState& before, std::vector<TenantShare>& tenants);
  void Place(const std::vector<int32_t>& order);
  void Write(const ShareState& before, std::vector<TenantShare> tenants);
};

void Planner::TakeWorkers(absl::Span<const WorkerState> workers) {
  for (const WorkerState& worker : workers) pool_models.push_back(worker.model);
  std::sort(pool_models.begin(), pool_models.end());
  pool_models.erase(std::unique(pool_models.begin(), pool_models.end()), pool_models.end());
  pools.resize(pool_models.size());
  for (size_t i = 0; i < pools.size(); ++i) pools[i].step_time = &StepTimeOf(cost, pool_models[i]);
  for (const WorkerState& worker : workers) {
    const int32_t pool_index = PoolOf(worker.model);
    Pool& pool = pools[static_cast<size_t>(pool_index)];
    pool.tokens_max = std::max(pool.tokens_max, worker.tokens_max);
    if (!worker.accepting) continue;
    ++pool.num_workers;
    pool.tokens_target += static_cast<double>(std::min(worker.tokens_target, worker.tokens_max));
    pool.rows_max += worker.rows_max;
    Slot slot;
    slot.worker = &worker;
    slot.step_time = pool.step_time;
    slot.pool = pool_index;
    slots.push_back(slot);
  }
  for (Pool& pool : pools) {
    if (pool.num_workers == 0) continue;
    pool.tokens_target /= pool.num_workers;
    pool.rows_max /= pool.num_workers;
  }
  std::sort(slots.begin(), slots.end(),
            [](const Slot& a, const Slot& b) { return a.worker->id < b.worker->id; });
  for (Slot& slot : slots) {
    Pool& pool = pools[static_cast<size_t>(slot.pool)];
    std::vector<const RunningRow*> rows;
    for (const RunningRow& row : slot.worker->rows) rows.push_back(&row);
    std::sort(rows.begin(), rows.end(),
              [](const RunningRow* a, const RunningRow* b) { return a->id < b->id; });
    slot.rows = static_cast<int32_t>(rows.size());
    for (const RunningRow* row : rows) {
      slot.tokens += row->sequence_tokens;
      slot.tokens_longest = std::max<int64_t>(slot.tokens_longest, row->sequence_tokens);
    }
    const double pace = slot.StepSeconds();
    for (const RunningRow* row : rows) {
      const StepsForecast steps =
          forecaster.Forecast(row->kind, row->canvas_tokens, row->steps_budget, row->steps_done);
      slot.steps_longest = std::max(slot.steps_longest, steps.p50);
      const double slack = absl::ToDoubleSeconds(row->deadline - now);
      const double bound = slack / (std::max(steps.p50, 1.0) * (1.0 + options.deadline_margin));
      if (bound > pace) slot.step_seconds_max = std::min(slot.step_seconds_max, bound);
      slot.closed = slot.closed || row->suspect;
      const double tokens = row->sequence_tokens;
      pool.backlog_seconds += steps.mean * pool.FullStepSeconds(tokens) / pool.RowsAtTarget(tokens);
    }
  }
}

// Fills in what the candidate costs at its granted steps. False: it cannot be in time even alone.
bool Planner::Price(Candidate& candidate) {
  const PlanRequest& request = *candidate.request;
  const Pool& pool = pools[static_cast<size_t>(candidate.pool)];
  candidate.steps = forecaster.Forecast(request.kind, request.canvas_tokens, candidate.steps_budget,
                                        request.steps_done);
  const double tokens = request.sequence_tokens;
  const double full_step = pool.FullStepSeconds(tokens);
  candidate.device_seconds = candidate.steps.mean * full_step / pool.RowsAtTarget(tokens);
  candidate.run_seconds = candidate.steps.p75 * full_step * (1.0 + options.deadline_margin);
  return candidate.steps.p25 * pool.AloneStepSeconds(tokens) <= candidate.slack_seconds;
}

void Planner::TakeRequests(absl::Span<const PlanRequest> waiting) {
  candidates.reserve(waiting.size());
  for (const PlanRequest& request : waiting) {
    CINNABAR_CHECK(request.sequence_tokens > 0 && request.steps_done >= 0 &&
                   request.steps_budget > request.steps_done && request.tenant_weight > 0.0)
        << "request " << request.id;
    if (request.deadline <= now) {
      plan.expired.push_back(request.id);
      continue;
    }
    const int32_t pool_index = PoolOf(request.kind.model);
    if (pool_index < 0) continue;
    Pool& pool = pools[static_cast<size_t>(pool_index)];
    if (request.sequence_tokens > pool.tokens_max) {
      plan.refused.push_back({request.id, RefusalReason::kTooLong});
      continue;
    }
    if (pool.num_workers == 0) continue;
    Candidate candidate;
    candidate.request = &request;
    candidate.pool = pool_index;
    candidate.steps_budget = request.steps_budget;
    candidate.slack_seconds = absl::ToDoubleSeconds(request.deadline - now);
    const absl::Duration waited = std::max(now - request.arrival, absl::ZeroDuration());
    candidate.waited_seconds = absl::ToDoubleSeconds(waited);
    candidate.starving =
        request.deadline == absl::InfiniteFuture() && waited > options.starvation_wait;
    const double lifted = std::min<double>(
        kNumClasses, std::floor(absl::FDivDuration(waited, options.ageing_period)));
    candidate.lane =
        std::max(0, static_cast<int32_t>(request.priority) - static_cast<int32_t>(lifted));
    if (!Price(candidate)) {
      // A lower step budget keeps the promise; only a request that has not begun can take one.
      candidate.steps_budget = request.steps_min;
      if (request.steps_min <= 0 || request.steps_done > 0 || !Price(candidate)) {
        plan.refused.push_back({request.id, RefusalReason::kDeadlineInfeasible});
        continue;
      }
    }
    candidates.push_back(candidate);
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.request->id < b.request->id; });
  // Summed in a fixed order: the sum of doubles must not depend on how the waiting set was listed.
  for (const Candidate& candidate : candidates) {
    pools[static_cast<size_t>(candidate.pool)].backlog_seconds += candidate.device_seconds;
  }
  std::sort(plan.expired.begin(), plan.expired.end());
  std::sort(plan.refused.begin(), plan.refused.end(),
            [](const Refusal& a, const Refusal& b) { return a.id < b.id; });
}

// Under pressure, requests that allow it get the share of their steps that the backlog leaves.
void Planner::Degrade(double backlog_seconds) {
  const double share = absl::ToDoubleSeconds(options.pressure_backlog) / backlog_seconds;
  if (share >= 1.0) return;
  for (Candidate& candidate : candidates) {
    const PlanRequest& request = *candidate.request;
    if (request.steps_min <= 0 || request.steps_done > 0) continue;
    const int32_t wanted = static_cast<int32_t>(std::ceil(request.steps_budget * share));
    candidate.steps_budget = std::min(candidate.steps_budget, std::max(request.steps_min, wanted));
    Price(candidate);
  }
}

void Planner::SortJobs() {
  jobs.resize(pools.size());
  for (size_t i = 0; i < candidates.size(); ++i) {
    const Candidate& candidate = candidates[i];
    const size_t pool = static_cast<size_t>(candidate.pool);
    jobs[pool].push_back({candidate.slack_seconds, candidate.request->id, static_cast<int32_t>(i),
                          candidate.device_seconds / pools[pool].num_workers});
  }
  for (const Slot& slot : slots) {
    const Pool& pool = pools[static_cast<size_t>(slot.pool)];
    for (const RunningRow& row : slot.worker->rows) {
      const StepsForecast steps =
          forecaster.Forecast(row.kind, row.canvas_tokens, row.steps_budget, row.steps_done);
      const double tokens = row.sequence_tokens;
      jobs[static_cast<size_t>(slot.pool)].push_back(
          {absl::ToDoubleSeconds(row.deadline - now), row.id, -1,
           steps.mean * pool.FullStepSeconds(tokens) / pool.RowsAtTarget(tokens) /
               pool.num_workers});
    }
  }
  for (std::vector<Job>& of_pool : jobs) std::sort(of_pool.begin(), of_pool.end());
}

// Rule 3. Moore and Hodgson's rule (at most so many late jobs as must be): walk through the
// requests by deadline; when one would be late, put off the dearest so far. Ours is fair besides:
// "dearest" is weighed with what its tenant would receive. The pool is taken as one machine as fast
// as all its workers.
void Planner::PutOff(int32_t pool_index) {
  struct Kept {
    double device_seconds = 0.0;
    double weight = 1.0;
    std::priority_queue<std::pair<double, int32_t>> dearest;  // device seconds, candidate
    double Key() const {
      const double share = device_seconds / weight;
      return dearest.empty() ? -1.0 : dearest.top().first * share * share;
    }
  };
  std::map<TenantIndex, Kept> kept;
  std::set<std::pair<double, TenantIndex>> worst;  // by Key()
  const bool any_starving =
      std::any_of(candidates.begin(), candidates.end(), [pool_index](const Candidate& candidate) {
        return candidate.pool == pool_index && candidate.starving;
      });
  // The part of the machine that is there for deadlines.
  const double part = any_starving ? 1.0 - options.starvation_share : 1.0;
  double busy_seconds = 0.0;
  for (const Job& job : jobs[static_cast<size_t>(pool_index)]) {
    double start = busy_seconds;
    busy_seconds += job.device_seconds / part;
    if (job.candidate < 0) continue;
    const Candidate& candidate = candidates[static_cast<size_t>(job.candidate)];
    if (candidate.starving) continue;
    const TenantIndex own = candidate.request->tenant;
    Kept& of_tenant = kept[own];
    worst.erase({of_tenant.Key(), own});
    of_tenant.weight = candidate.request->tenant_weight;
    of_tenant.device_seconds += job.device_seconds;
    of_tenant.dearest.emplace(
        job.device_seconds / options.class_value[static_cast<size_t>(candidate.lane)],
        job.candidate);
    worst.emplace(of_tenant.Key(), own);
    // What is served before it starts it late; its own run is longer than its share of the machine.
    const double latest =
        candidate.slack_seconds - std::max(candidate.run_seconds, job.device_seconds);
    while (start > latest && !worst.empty()) {
      const TenantIndex tenant = worst.rbegin()->second;
      worst.erase(std::prev(worst.end()));
      Kept& most = kept[tenant];
      const int32_t victim = most.dearest.top().second;
      most.dearest.pop();
      Candidate& dropped = candidates[static_cast<size_t>(victim)];
      const double seconds =
          dropped.device_seconds / pools[static_cast<size_t>(pool_index)].num_workers / part;
      most.device_seconds -= seconds;
      if (!most.dearest.empty()) worst.emplace(most.Key(), tenant);
      dropped.put_off = true;
      ++plan.num_put_off;
      busy_seconds -= seconds;
      start -= seconds;
      if (victim == job.candidate) break;
    }
  }
}

// Who comes back starts level with those that stayed: an absence is no credit. Where nobody stayed,
// all start level.
void Planner::StartShares(const ShareState& before, const Queues& queues) {
  plan.shares = before;
  std::array<double, kNumClasses> stayed;
  stayed.fill(kInfinity);
  std::array<double, kNumClasses> furthest = before.floor;
  for (const TenantShare& share : before.tenants) {
    const size_t lane = static_cast<size_t>(share.lane);
    furthest[lane] = std::max(furthest[lane], share.virtual_time);
    if (share.active && queues.count({share.lane, share.tenant}) > 0) {
      stayed[lane] = std::min(stayed[lane], share.virtual_time);
    }
  }
  plan.shares.lane_active.fill(false);
  for (const auto& [key, queue] : queues) {
    plan.shares.lane_active[static_cast<size_t>(key.first)] = true;
  }
  double lane_stayed = kInfinity;
  double lane_furthest = 0.0;
  for (size_t lane = 0; lane < kNumClasses; ++lane) {
    plan.shares.floor[lane] =
        stayed[lane] < kInfinity ? std::max(before.floor[lane], stayed[lane]) : furthest[lane];
    lane_furthest = std::max(lane_furthest, before.lane_time[lane]);
    if (before.lane_active[lane] && plan.shares.lane_active[lane]) {
      lane_stayed = std::min(lane_stayed, before.lane_time[lane]);
    }
  }
  const double level = lane_stayed < kInfinity ? lane_stayed : lane_furthest;
  for (size_t lane = 0; lane < kNumClasses; ++lane) {
    if (plan.shares.lane_active[lane] && !before.lane_active[lane]) {
      plan.shares.lane_time[lane] = std::max(plan.shares.lane_time[lane], level);
    }
  }
}

// The order of service, and the shares of every tenant that waits, ascending by (lane, tenant).
std::vector<int32_t> Planner::Order(const ShareState& before, std::vector<TenantShare>& tenants) {
  std::vector<int32_t> starving;  // the oldest first: candidates are in the order of their ids
  std::vector<int32_t> tail;
  Queues queues;
  for (size_t i = 0; i < candidates.size(); ++i) {
    Candidate& candidate = candidates[i];
    Queue& queue = queues[{candidate.lane, candidate.request->tenant}];
    candidate.queue = &queue;
    queue.weight = candidate.request->tenant_weight;
    if (candidate.starving) {
      starving.push_back(static_cast<int32_t>(i));
    } else if (candidate.put_off) {
      tail.push_back(static_cast<int32_t>(i));
    } else {
      queue.requests.push_back(static_cast<int32_t>(i));
    }
  }
  const auto at = [this](int32_t index) -> const Candidate& {
    return candidates[static_cast<size_t>(index)];
  };
  const auto by_deadline = [&at](int32_t a, int32_t b) { return EarlierDeadline(at(a), at(b)); };
  std::sort(tail.begin(), tail.end(), [&](int32_t a, int32_t b) {
    return std::tie(at(a).device_seconds, at(a).request->id) <
           std::tie(at(b).device_seconds, at(b).request->id);
  });

  StartShares(before, queues);
  std::array<std::vector<Queue*>, kNumClasses> lanes;
  for (auto& [key, queue] : queues) {
    const auto known = std::lower_bound(
        before.tenants.begin(), before.tenants.end(), key,
        [](const TenantShare& share, const std::pair<int32_t, TenantIndex>& wanted) {
          return std::pair(share.lane, share.tenant) < wanted;
        });
    double start = plan.shares.floor[static_cast<size_t>(key.first)];
    if (known != before.tenants.end() && std::pair(known->lane, known->tenant) == key) {
      start = known->active ? known->virtual_time : std::max(known->virtual_time, start);
    }
    queue.share = tenants.size();
    queue.virtual_time = start;
    tenants.push_back({key.first, key.second, start, true});
    std::sort(queue.requests.begin(), queue.requests.end(), by_deadline);
    lanes[static_cast<size_t>(key.first)].push_back(&queue);
  }

  // The least virtual time first; then the lower tenant.
  using Turn = std::tuple<double, size_t, Queue*>;
  std::array<std::priority_queue<Turn, std::vector<Turn>, std::greater<>>, kNumClasses> heaps;
  std::array<double, kNumClasses> lane_time = plan.shares.lane_time;
  for (size_t lane = 0; lane < kNumClasses; ++lane) {
    for (Queue* queue : lanes[lane]) {
      if (!queue->requests.empty()) {
        heaps[lane].emplace(queue->virtual_time, queue->share, queue);
      }
    }
  }
  // How late each request may start for it and all with a later deadline to be in time, on a
  // machine that serves them by deadline from then on. While the turn leaves those times alone,
  // turns are taken; then deadlines are.
  struct Latest {
    int32_t candidate;
    double start_seconds;
  };
  std::vector<std::vector<Latest>> latest(pools.size());
  std::vector<size_t> next_latest(pools.size(), 0);
  std::vector<double> clock(pools.size(), 0.0);
  for (size_t i = 0; i < pools.size(); ++i) {
    double behind = kInfinity;
    for (auto job = jobs[i].rbegin(); job != jobs[i].rend(); ++job) {
      if (job->candidate >= 0 && at(job->candidate).put_off) continue;
      double own = kInfinity;
      if (job->candidate >= 0) {
        own = job->slack_seconds - std::max(at(job->candidate).run_seconds, job->device_seconds);
      }
      behind = std::min(own, behind - job->device_seconds);
      if (job->candidate >= 0 && !at(job->candidate).starving) {
        latest[i].push_back({job->candidate, behind});
      }
    }
    std::reverse(latest[i].begin(), latest[i].end());
  }

  const double turn_spare = absl::ToDoubleSeconds(options.turn_spare);
  std::vector<bool> served(candidates.size(), false);
  std::vector<int32_t> order;
  order.reserve(candidates.size());
  const auto serve = [&](int32_t index) {
    const Candidate& candidate = at(index);
    served[static_cast<size_t>(index)] = true;
    order.push_back(index);
    clock[static_cast<size_t>(candidate.pool)] +=
        candidate.device_seconds / pools[static_cast<size_t>(candidate.pool)].num_workers;
    lane_time[static_cast<size_t>(candidate.lane)] +=
        candidate.device_seconds / options.class_weight[static_cast<size_t>(candidate.lane)];
    Queue& queue = *candidate.queue;
    queue.virtual_time += candidate.device_seconds / queue.weight;
  };
  double credit = before.starving_credit;
  size_t next_starving = 0;
  while (true) {
    if (next_starving < starving.size() && credit >= 0.0) {
      credit -= at(starving[next_starving]).device_seconds;
      serve(starving[next_starving++]);
      continue;
    }
    int lane = -1;
    for (int i = 0; i < kNumClasses; ++i) {
      const size_t index = static_cast<size_t>(i);
      // Forget those that were served before their turn, and move a tenant whose time has moved to
      // its place.
      while (!heaps[index].empty()) {
        const auto [time, share, queue] = heaps[index].top();
        while (queue->next < queue->requests.size() &&
               served[static_cast<size_t>(queue->requests[queue->next])]) {
          ++queue->next;
        }
        if (queue->next < queue->requests.size() && time == queue->virtual_time) break;
        heaps[index].pop();
        if (queue->next < queue->requests.size()) {
          heaps[index].emplace(queue->virtual_time, share, queue);
        }
      }
      if (heaps[index].empty()) continue;
      if (lane < 0 || lane_time[index] < lane_time[static_cast<size_t>(lane)]) lane = i;
    }
    if (lane < 0) break;
    const auto [time, share, queue] = heaps[static_cast<size_t>(lane)].top();
    int32_t turn = queue->requests[queue->next];
    const size_t pool = static_cast<size_t>(at(turn).pool);
    size_t& next = next_latest[pool];
    while (next < latest[pool].size() &&
           served[static_cast<size_t>(latest[pool][next].candidate)]) {
      ++next;
    }
    if (next < latest[pool].size()) {
      const Latest& first = latest[pool][next];
      const double after = clock[pool] + at(turn).device_seconds / pools[pool].num_workers;
      if (after > first.start_seconds - turn_spare) {
        turn = first.candidate;
        candidates[static_cast<size_t>(turn)].pressed = true;
      }
    }
    serve(turn);
    credit += at(turn).device_seconds * StarvingGain();
  }
  while (next_starving < starving.size()) serve(starving[next_starving++]);
  order.insert(order.end(), tail.begin(), tail.end());
  return order;
}

void Planner::Place(const std::vector<int32_t>& order) {
  const double window_seconds =
      absl::ToDoubleSeconds(options.window_max) * std::clamp(plan.pressure, 0.0, 1.0);
  const double drain_after = absl::ToDoubleSeconds(options.drain_after);
  std::vector<int32_t> drains_left(pools.size());
  for (size_t i = 0; i < pools.size(); ++i) {
    drains_left[i] = std::max(1, static_cast<int32_t>(options.drain_share * pools[i].num_workers));
  }
  std::vector<std::pair<int32_t, int64_t>> drained_for;  // pool, tokens

  for (const int32_t index : order) {
    Candidate& candidate = candidates[static_cast<size_t>(index)];
    const PlanRequest& request = *candidate.request;
    const int64_t tokens = request.sequence_tokens;
    Slot* best = nullptr;
    double best_finish = kInfinity;
    bool fits_a_batch = false;  // one of the running batches will take it when it has room
    bool held_back = false;
    for (Slot& slot : slots) {
      if (slot.pool != candidate.pool || slot.closed) continue;
      if (slot.worker->tokens_max < tokens) continue;
      const double share = options.tokens_share[static_cast<size_t>(candidate.lane)];
      const int64_t limit = std::min<int64_t>(
          slot.worker->tokens_max,
          static_cast<int64_t>(share * static_cast<double>(slot.worker->tokens_target)));
      if (slot.rows > 0) {
        if (request.suspect) continue;
        if (slot.worker->pads && slot.PadsTooMuch(tokens, options.padding_max)) continue;
        fits_a_batch = fits_a_batch || tokens + slot.tokens / slot.rows <= limit;
        if (slot.rows >= slot.worker->rows_max || slot.PositionsWith(tokens) > limit) continue;
      } else if (slot.worker->rows_max <= 0) {
        continue;
      }
      const double step_seconds = PredictStepSeconds(
          *slot.step_time, slot.rows + 1, static_cast<double>(slot.PositionsWith(tokens)));
      if (step_seconds > slot.step_seconds_max) continue;
      // Who was put off is doubted more: what it computes in vain, others lack.
      const double steps = candidate.put_off ? candidate.steps.p75 : candidate.steps.p50;
      const double margin = slot.rows > 0 || candidate.put_off ? options.deadline_margin : 0.0;
      const double finish = steps * step_seconds * (1.0 + margin);
      if (finish > candidate.slack_seconds) continue;
      if (slot.rows > 0 && candidate.waited_seconds < window_seconds && !candidate.pressed) {
        held_back = true;
        continue;
      }
      if (finish < best_finish) {
        best = &slot;
        best_finish = finish;
      }
    }
    if (best != nullptr) {
      best->placed.push_back(index);
      best->Add(tokens, candidate.steps.p50, candidate.slack_seconds, options.deadline_margin,
                request.suspect);
      continue;
    }
    if (held_back) {
      plan.next = std::min(plan.next,
                           request.arrival + absl::Seconds(window_seconds) + absl::Milliseconds(1));
      continue;
    }
    if (fits_a_batch || candidate.put_off) continue;
    if (candidate.waited_seconds < drain_after && !candidate.pressed) continue;
    // No running batch has its length: the worker that is done first takes nobody else until it is
    // free for it.
    const auto shares_batch = [&](const std::pair<int32_t, int64_t>& other) {
      const int64_t longer = std::max(tokens, other.second);
      const int64_t shorter = std::min(tokens, other.second);
      return other.first == candidate.pool &&
             static_cast<double>(longer - shorter) <=
                 options.padding_max * 2.0 * static_cast<double>(longer);
    };
    if (!request.suspect && std::any_of(drained_for.begin(), drained_for.end(), shares_batch)) {
      continue;
    }
    if (drains_left[static_cast<size_t>(candidate.pool)] <= 0) continue;
    Slot* soonest = nullptr;
    for (Slot& slot : slots) {
      if (slot.pool != candidate.pool || slot.closed || slot.worker->tokens_max < tokens) continue;
      if (soonest == nullptr || slot.DrainSeconds() < soonest->DrainSeconds()) soonest = &slot;
    }
    if (soonest == nullptr) continue;
    soonest->closed = true;
    --drains_left[static_cast<size_t>(candidate.pool)];
    drained_for.emplace_back(candidate.pool, tokens);
  }
}

void Planner::Write(const ShareState& before, std::vector<TenantShare> tenants) {
  const bool any_starving =
      std::any_of(candidates.begin(), candidates.end(),
                  [](const Candidate& candidate) { return candidate.starving; });
  double& credit = plan.shares.starving_credit;
  for (Slot& slot : slots) {
    for (const int32_t index : slot.placed) {
      const Candidate& candidate = candidates[static_cast<size_t>(index)];
      const PlanRequest& request = *candidate.request;
      const Bucket bucket = {request.kind.model, LengthBucket(request.sequence_tokens),
                             StepsBucket(candidate.steps.mean)};
      // Packs of a worker follow the best-placed member of each; a suspect has its own anyway (it
      // is alone).
      PlannedPack* pack = nullptr;
      for (auto it = plan.packs.rbegin(); it != plan.packs.rend() && it->worker == slot.worker->id;
           ++it) {
        if (it->bucket == bucket) pack = &*it;
      }
      if (pack == nullptr) {
        plan.packs.push_back({.worker = slot.worker->id, .bucket = bucket, .members = {}});
        pack = &plan.packs.back();
      }
      pack->members.push_back({request.id, candidate.steps_budget});
      pack->cost_token_steps += candidate.steps.mean * request.sequence_tokens;
      const auto share = std::lower_bound(
          tenants.begin(), tenants.end(), std::pair(candidate.lane, request.tenant),
          [](const TenantShare& a, const std::pair<int32_t, TenantIndex>& wanted) {
            return std::pair(a.lane, a.tenant) < wanted;
          });
      share->virtual_time += candidate.device_seconds / request.tenant_weight;
      credit += candidate.starving ? -candidate.device_seconds
                                   : candidate.device_seconds * StarvingGain();
      const size_t lane = static_cast<size_t>(candidate.lane);
      plan.shares.lane_time[lane] += candidate.device_seconds / options.class_weight[lane];
    }
  }

  // Credit that nobody needs is not saved up.
  if (!any_starving) credit = 0.0;
  credit = std::min(credit, kStarvingCreditMax);

  // Those that do not wait now are remembered while they are ahead of the others.
  std::vector<TenantShare> merged;
  for (const TenantShare& share : before.tenants) {
    const auto now_waiting = std::lower_bound(
        tenants.begin(), tenants.end(), share, [](const TenantShare& a, const TenantShare& b) {
          return std::tie(a.lane, a.tenant) < std::tie(b.lane, b.tenant);
        });
    if (now_waiting != tenants.end() && now_waiting->lane == share.lane &&
        now_waiting->tenant == share.tenant) {
      continue;
    }
    if (share.virtual_time <= plan.shares.floor[static_cast<size_t>(share.lane)]) continue;
    merged.push_back(share);
    merged.back().active = false;
  }
  merged.insert(merged.end(), tenants.begin(), tenants.end());
  std::sort(merged.begin(), merged.end(), [](const TenantShare& a, const TenantShare& b) {
    return std::tie(a.lane, a.tenant) < std::tie(b.lane, b.tenant);
  });
  plan.shares.tenants = std::move(merged);
}

}  // namespace

int32_t LengthBucket(int32_t sequence_tokens) {
  CINNABAR_CHECK(sequence_tokens > 0);
  return std::max(0, static_cast<int32_t>(std::ceil(4.0 * std::log2(sequence_tokens / 32.0))));
}

int32_t StepsBucket(double remaining_steps) {
  return std::max(0, static_cast<int32_t>(std::ceil(std::log2(std::max(remaining_steps, 1.0)))));
}

Plan PlanPacks(absl::Span<const PlanRequest> waiting, absl::Span<const WorkerState> workers,
               const CostModel& cost, const ShareState& shares, const PlanOptions& options,
               absl::Time now) {
  Planner planner(cost, options, now);
  planner.TakeWorkers(workers);
  planner.TakeRequests(waiting);

  double backlog_seconds = 0.0;  // of the busiest model
  for (const Pool& pool : planner.pools) {
    if (pool.num_workers == 0) continue;
    backlog_seconds = std::max(backlog_seconds, pool.backlog_seconds / pool.num_workers);
  }
  planner.plan.backlog = absl::Seconds(backlog_seconds);
  const double full = absl::ToDoubleSeconds(options.pressure_backlog);
  planner.plan.pressure = full > 0.0 ? std::min(1.0, backlog_seconds / full) : 1.0;
  planner.Degrade(backlog_seconds);
  planner.SortJobs();
  if (options.shed) {
    for (size_t i = 0; i < planner.pools.size(); ++i) {
      if (planner.pools[i].num_workers > 0) planner.PutOff(static_cast<int32_t>(i));
    }
  }
  std::vector<TenantShare> tenants;
  const std::vector<int32_t> order = planner.Order(shares, tenants);
  planner.Place(order);
  planner.Write(shares, std::move(tenants));
  return std::move(planner.plan);
}

}  // namespace cinnabar
