#include "tests/sim/scheduler/simulation.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "absl/time/time.h"
#include "common/base/check.h"

namespace cinnabar::sim {
namespace {

constexpr uint64_t kStepNoise = 50;
constexpr uint64_t kStepOutlier = 51;

struct Row {
  RequestId request = 0;
  int32_t steps_left = 0;  // true ones
  bool joined = false;     // takes part in steps; false: sent while a step was running
};

struct Worker {
  std::vector<Row> rows;
  bool stepping = false;
  double step_end_seconds = 0.0;
  double step_seconds = 0.0;
  int64_t step_positions = 0;
  int32_t step_rows = 0;
  uint64_t num_steps = 0;
};

Percentiles PercentilesOf(std::vector<double> values) {
  Percentiles out;
  out.count = static_cast<int64_t>(values.size());
  if (values.empty()) return out;
  std::sort(values.begin(), values.end());
  // Nearest rank.
  const auto at = [&values](double q) {
    const double rank = std::ceil(q * static_cast<double>(values.size()));
    return values[static_cast<size_t>(std::max(1.0, rank)) - 1];
  };
  out.p50 = at(0.50);
  out.p95 = at(0.95);
  out.p99 = at(0.99);
  out.max = values.back();
  return out;
}

// Max-min fair division of `total` over `demands`.
std::vector<double> FairShares(const std::vector<double>& demands, double total) {
  std::vector<size_t> order(demands.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return demands[a] < demands[b]; });
  std::vector<double> shares(demands.size(), 0.0);
  double left = total;
  for (size_t i = 0; i < order.size(); ++i) {
    const double level = left / static_cast<double>(order.size() - i);
    shares[order[i]] = std::min(demands[order[i]], level);
    left -= shares[order[i]];
  }
  return shares;
}

double Jain(const std::vector<double>& values) {
  double sum = 0.0;
  double squares = 0.0;
  for (const double value : values) {
    sum += value;
    squares += value * value;
  }
  return squares > 0.0 ? sum * sum / (static_cast<double>(values.size()) * squares) : 1.0;
}

}  // namespace

Outcome Simulate(const Workload& workload, const ClusterModel& cluster, Policy& policy,
                 const SimulationOptions& options) {
  const std::vector<SimRequest>& requests = workload.requests;
  const size_t n = requests.size();
  std::vector<Fate> fate(n, Fate::kWaiting);
  std::vector<double> started(n, -1.0);
  std::vector<double> ended(n, 0.0);
  std::vector<int32_t> granted(n, 0);
  std::vector<double> computed(n, 0.0);  // positions of its own
  std::vector<PlanRequest> waiting;
  std::vector<int32_t> place(n, -1);  // in `waiting`
  std::vector<Worker> workers(static_cast<size_t>(cluster.num_workers));
  std::vector<WorkerState> states(workers.size());
  for (size_t w = 0; w < workers.size(); ++w) {
    states[w].id = static_cast<int32_t>(w);
    states[w].rows_max = cluster.rows_max;
    states[w].tokens_max = cluster.tokens_max;
    states[w].tokens_target = cluster.tokens_target;
    states[w].pads = cluster.pads;
  }
  double positions_computed = 0.0;
  double positions_padding = 0.0;
  double busy_seconds_useful = 0.0;
  Outcome outcome;

  const auto stop_waiting = [&](RequestId id) {
    const size_t at = static_cast<size_t>(place[static_cast<size_t>(id)]);
    place[static_cast<size_t>(waiting.back().id)] = static_cast<int32_t>(at);
    place[static_cast<size_t>(id)] = -1;
    waiting[at] = waiting.back();
    waiting.pop_back();
  };

  size_t next_arrival = 0;
  double next_decision = 1e300;
  bool changed = false;  // something to decide about since the last decision
  while (true) {
    double now = next_decision;
    if (next_arrival < n) now = std::min(now, requests[next_arrival].arrival_seconds);
    bool any_step = false;
    for (const Worker& worker : workers) {
      if (!worker.stepping) continue;
      any_step = true;
      now = std::min(now, worker.step_end_seconds);
    }
    if (next_arrival >= n && !any_step && waiting.empty()) break;
    if (now > 1e299) {
      // Only waiting requests are left, and nobody would take them: they end at their deadlines.
      for (const PlanRequest& request : waiting)
        now = std::min(now, absl::ToDoubleSeconds(request.deadline - absl::UnixEpoch()));
    }

    for (; next_arrival < n && requests[next_arrival].arrival_seconds <= now; ++next_arrival) {
      place[next_arrival] = static_cast<int32_t>(waiting.size());
      waiting.push_back(requests[next_arrival].request);
      changed = true;
    }
    bool boundary = now >= next_decision;
    for (size_t w = 0; w < workers.size(); ++w) {
      Worker& worker = workers[w];
      if (!worker.stepping) boundary = true;
      if (!worker.stepping || worker.step_end_seconds > now) continue;
      boundary = true;
      worker.stepping = false;
      policy.OnStep({worker.step_rows, worker.step_positions, worker.step_seconds});
      std::vector<Row> kept;
      for (Row& row : worker.rows) {
        const size_t id = static_cast<size_t>(row.request);
        if (row.joined) {
          --row.steps_left;
          computed[id] += requests[id].request.sequence_tokens;
        }
        const SimRequest& request = requests[id];
        // The queue refuses a publish after the deadline: a late last step is late.
        if (now > request.deadline_seconds) {
          fate[id] = Fate::kExpiredRunning;
          ended[id] = now;
          changed = true;
        } else if (row.steps_left == 0) {
          fate[id] = Fate::kInTime;
          ended[id] = now;
          changed = true;
          policy.OnFinished({request.request.kind, request.request.canvas_tokens, granted[id],
                             request.TrueSteps(granted[id])});
        } else {
          kept.push_back(row);
        }
      }
      worker.rows = std::move(kept);
    }
    outcome.waiting_max = std::max(outcome.waiting_max, static_cast<int64_t>(waiting.size()));

    // The queue expires what waits, for every policy alike.
    const absl::Time time = absl::UnixEpoch() + absl::Seconds(now);
    for (size_t i = 0; i < waiting.size();) {
      if (waiting[i].deadline > time) {
        ++i;
        continue;
      }
      const size_t id = static_cast<size_t>(waiting[i].id);
      fate[id] = Fate::kExpiredWaiting;
      ended[id] = now;
      stop_waiting(waiting[i].id);
    }

    // A decision can only matter between two steps of some worker.
    if (boundary && (changed || now >= next_decision) && !waiting.empty()) {
      for (size_t w = 0; w < workers.size(); ++w) {
        states[w].rows.clear();
        for (const Row& row : workers[w].rows) {
          const SimRequest& request = requests[static_cast<size_t>(row.request)];
          const int32_t budget = granted[static_cast<size_t>(row.request)];
          states[w].rows.push_back({row.request, request.request.kind,
                                    request.request.sequence_tokens, request.request.canvas_tokens,
                                    budget, request.TrueSteps(budget) - row.steps_left, false,
                                    request.request.deadline});
        }
      }
      const auto before = std::chrono::steady_clock::now();
      const Decision decision = policy.Decide(waiting, states, now);
      outcome.decide_seconds +=
          std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
      ++outcome.decisions;
      changed = false;
      next_decision = decision.next_seconds > now ? decision.next_seconds : 1e300;
      for (const RequestId id : decision.refused) {
        fate[static_cast<size_t>(id)] = Fate::kRefused;
        ended[static_cast<size_t>(id)] = now;
        stop_waiting(id);
      }
      for (const Start& start : decision.starts) {
        const size_t id = static_cast<size_t>(start.request);
        CINNABAR_CHECK(fate[id] == Fate::kWaiting) << "request " << id << " started twice";
        fate[id] = Fate::kRunning;
        granted[id] = start.steps_budget;
        if (start.steps_budget < requests[id].request.steps_budget) ++outcome.degraded;
        workers[static_cast<size_t>(start.worker)].rows.push_back(
            {start.request, requests[id].TrueSteps(start.steps_budget), false});
        stop_waiting(start.request);
      }
    } else if (now >= next_decision) {
      next_decision = 1e300;
    }

    for (size_t w = 0; w < workers.size(); ++w) {
      Worker& worker = workers[w];
      if (worker.stepping || worker.rows.empty()) continue;
      int64_t sum = 0;
      int64_t longest = 0;
      for (Row& row : worker.rows) {
        const size_t id = static_cast<size_t>(row.request);
        row.joined = true;
        if (started[id] < 0.0) started[id] = now;
        sum += requests[id].request.sequence_tokens;
        longest = std::max<int64_t>(longest, requests[id].request.sequence_tokens);
      }
      const int64_t rows = static_cast<int64_t>(worker.rows.size());
      CINNABAR_CHECK(rows <= cluster.rows_max) << rows << " rows";
      worker.step_rows = static_cast<int32_t>(rows);
      worker.step_positions = cluster.pads ? rows * longest : sum;
      CINNABAR_CHECK(worker.step_positions <= cluster.tokens_max)
          << worker.step_positions << " positions";
      positions_computed += static_cast<double>(worker.step_positions);
      positions_padding += static_cast<double>(worker.step_positions - sum);
      const uint64_t index = (static_cast<uint64_t>(w) << 40) + worker.num_steps++;
      worker.step_seconds = cluster.StepSeconds(static_cast<double>(rows),
                                                static_cast<double>(worker.step_positions)) *
                            std::exp(cluster.noise * HashNormal(options.seed, kStepNoise, index));
      if (HashUniform(options.seed, kStepOutlier, index) < cluster.outlier_share)
        worker.step_seconds *= 3.0;
      worker.step_end_seconds = now + worker.step_seconds;
      worker.stepping = true;
    }
  }

  outcome.policy = policy.Name();
  outcome.trace = workload.trace;
  outcome.load = workload.load;
  outcome.num_requests = static_cast<int64_t>(n);
  outcome.span_seconds = workload.span_seconds;
  std::array<std::vector<double>, kNumClasses> waits;
  std::array<std::vector<double>, kNumClasses> waits_any;
  std::array<double, kNumClasses> in_class = {};
  std::array<double, kNumClasses> in_time = {};
  const size_t num_tenants = static_cast<size_t>(workload.num_tenants);
  std::vector<double> demand(num_tenants, 0.0);
  std::vector<double> received(num_tenants, 0.0);
  std::vector<double> cell(num_tenants * kNumClasses, 0.0);
  std::vector<double> cell_in_time(num_tenants * kNumClasses, 0.0);
  double discarded = 0.0;
  std::vector<std::pair<double, bool>> by_work;
  for (size_t i = 0; i < n; ++i) {
    const SimRequest& request = requests[i];
    const size_t lane = static_cast<size_t>(request.request.priority);
    const size_t tenant = static_cast<size_t>(request.request.tenant);
    const bool good = fate[i] == Fate::kInTime;
    const double tokens = request.request.sequence_tokens;
    const double work = tokens * request.true_steps;
    if (started[i] >= 0.0) waits[lane].push_back(started[i] - request.arrival_seconds);
    waits_any[lane].push_back((started[i] >= 0.0 ? started[i] : ended[i]) -
                              request.arrival_seconds);
    in_class[lane] += 1.0;
    demand[tenant] += work;
    cell[tenant * kNumClasses + lane] += 1.0;
    by_work.emplace_back(work, good);
    if (good) {
      ++outcome.in_time;
      in_time[lane] += 1.0;
      received[tenant] += work;
      cell_in_time[tenant * kNumClasses + lane] += 1.0;
      const double rows_full = std::max(
          1.0, std::min<double>(cluster.rows_max,
                                std::floor(static_cast<double>(cluster.tokens_target) / tokens)));
      busy_seconds_useful += request.TrueSteps(granted[i]) *
                             cluster.StepSeconds(rows_full, rows_full * tokens) / rows_full;
    } else {
      discarded += computed[i];
    }
    if (fate[i] == Fate::kRefused) ++outcome.refused;
    if (fate[i] == Fate::kExpiredWaiting) ++outcome.expired_waiting;
    if (fate[i] == Fate::kExpiredRunning) ++outcome.expired_running;
    CINNABAR_CHECK(fate[i] != Fate::kWaiting && fate[i] != Fate::kRunning)
        << "request " << i << " never ended";
  }
  outcome.goodput_per_second = static_cast<double>(outcome.in_time) / workload.span_seconds;
  outcome.goodput_share = static_cast<double>(outcome.in_time) / static_cast<double>(n);
  outcome.useful_share = busy_seconds_useful / workload.span_seconds / cluster.num_workers;
  outcome.padding_waste = positions_padding / std::max(1.0, positions_computed);
  outcome.discarded_waste = discarded / std::max(1.0, positions_computed);
  for (size_t lane = 0; lane < kNumClasses; ++lane) {
    outcome.wait[lane] = PercentilesOf(waits[lane]);
    outcome.wait_any_fate[lane] = PercentilesOf(waits_any[lane]);
    outcome.in_time_share[lane] = in_time[lane] / std::max(1.0, in_class[lane]);
  }
  const double total = std::accumulate(received.begin(), received.end(), 0.0);
  const std::vector<double> fair = FairShares(demand, total);
  std::vector<double> relative;
  for (size_t tenant = 0; tenant < num_tenants; ++tenant) {
    if (fair[tenant] > 0.0) relative.push_back(received[tenant] / fair[tenant]);
  }
  outcome.jain = Jain(relative);
  std::vector<double> asked(num_tenants, 0.0);
  std::vector<double> got(num_tenants, 0.0);
  for (size_t i = 0; i < cell.size(); ++i) {
    asked[i / kNumClasses] += cell[i];
    got[i / kNumClasses] += cell_in_time[i];
  }
  const std::vector<double> fair_requests = FairShares(asked, static_cast<double>(outcome.in_time));
  std::vector<double> relative_requests;
  for (size_t tenant = 0; tenant < num_tenants; ++tenant) {
    if (asked[tenant] > 0.0) relative_requests.push_back(got[tenant] / fair_requests[tenant]);
  }
  outcome.jain_requests = Jain(relative_requests);
  outcome.worst_tenant = *std::min_element(relative.begin(), relative.end());
  outcome.worst_cell = 1e9;
  for (size_t i = 0; i < cell.size(); ++i) {
    if (cell[i] < 20.0) continue;
    outcome.worst_cell =
        std::min(outcome.worst_cell, cell_in_time[i] / cell[i] /
                                         std::max(1e-9, outcome.in_time_share[i % kNumClasses]));
  }
  std::sort(by_work.begin(), by_work.end());
  outcome.worst_size = 1e9;
  for (size_t quarter = 0; quarter < 4; ++quarter) {
    double good = 0.0;
    const size_t from = quarter * n / 4;
    const size_t to = (quarter + 1) * n / 4;
    for (size_t i = from; i < to; ++i) good += by_work[i].second ? 1.0 : 0.0;
    outcome.worst_size =
        std::min(outcome.worst_size, good / static_cast<double>(to - from) / outcome.goodput_share);
  }
  outcome.decide_seconds /= std::max<double>(1.0, static_cast<double>(outcome.decisions));
  return outcome;
}

}  // namespace cinnabar::sim
