// The cluster in one thread under a virtual clock: arrivals of a workload, workers that make
// denoising steps, and a policy that decides who joins which worker. Seeded; the same inputs give
// the same result.
#ifndef CINNABAR_TESTS_SIM_SCHEDULER_SIMULATION_H_
#define CINNABAR_TESTS_SIM_SCHEDULER_SIMULATION_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "scheduler/planning.h"
#include "tests/sim/scheduler/workload.h"

namespace cinnabar::sim {

struct Start {
  RequestId request = 0;
  int32_t worker = 0;
  int32_t steps_budget = 0;
};

struct Decision {
  std::vector<Start> starts;
  std::vector<RequestId> refused;
  double next_seconds = 1e300;  // decide again then, though nothing happened
};

class Policy {
 public:
  virtual ~Policy() = default;
  virtual std::string Name() const = 0;
  // `waiting` is in no particular order and holds no expired request.
  virtual Decision Decide(absl::Span<const PlanRequest> waiting,
                          absl::Span<const WorkerState> workers, double now_seconds) = 0;
  virtual void OnStep(const StepSample&) {}
  virtual void OnFinished(const StepsSample&) {}
};

enum class Fate : int8_t {
  kWaiting,
  kRunning,
  kInTime,
  kExpiredWaiting,
  kExpiredRunning,
  kRefused
};

struct Percentiles {
  int64_t count = 0;
  double p50 = 0.0;
  double p95 = 0.0;
  double p99 = 0.0;
  double max = 0.0;
};

struct Outcome {
  std::string policy;
  std::string trace;
  double load = 1.0;
  int64_t num_requests = 0;
  int64_t in_time = 0;
  int64_t refused = 0;
  int64_t expired_waiting = 0;
  int64_t expired_running = 0;
  int64_t degraded = 0;
  double span_seconds = 0.0;
  // Requests finished within their deadline, per second of arrivals; and the same in share of all
  // requests.
  double goodput_per_second = 0.0;
  double goodput_share = 0.0;
  double useful_share = 0.0;  // of the workers' time over the span, spent on work delivered in time
  // From arrival to the first step, of requests that ran; and of all, whatever became of them.
  std::array<Percentiles, kNumClasses> wait;
  std::array<Percentiles, kNumClasses> wait_any_fate;
  std::array<double, kNumClasses> in_time_share = {};
  // Shares of the positions computed.
  double padding_waste = 0.0;
  double discarded_waste = 0.0;  // computed for requests that then missed their deadline
  double ComputedWaste() const { return padding_waste + discarded_waste; }
  // Jain's index. Over what tenants received in time (token-steps), as share of the max-min fair
  // share of the total: equal tenants with equal demand reduce to Jain's index of what they
  // received.
  double jain = 0.0;
  double jain_requests = 0.0;  // the same of requests in time
  double worst_tenant = 0.0;   // the least share of its fair share
  double worst_cell =
      0.0;  // least in-time share of a (tenant, class) over its class's; cells of >= 20 requests
  double worst_size =
      0.0;  // least in-time share of a quarter of the requests by true work, over the mean
  double decide_seconds = 0.0;  // real time, mean of a decision
  int64_t decisions = 0;
  int64_t waiting_max = 0;
};

struct SimulationOptions {
  uint64_t seed = 1;
};

Outcome Simulate(const Workload& workload, const ClusterModel& cluster, Policy& policy,
                 const SimulationOptions& options);

}  // namespace cinnabar::sim

#endif  // CINNABAR_TESTS_SIM_SCHEDULER_SIMULATION_H_
