// Who is served first: the scheduler's planner, and what it is measured against.
#ifndef CINNABAR_TESTS_SIM_SCHEDULER_POLICIES_H_
#define CINNABAR_TESTS_SIM_SCHEDULER_POLICIES_H_

#include <memory>
#include <string>
#include <vector>

#include "tests/sim/scheduler/simulation.h"
#include "tests/sim/scheduler/workload.h"

namespace cinnabar::sim {

// The planner with a cost model that starts from its prior and learns from the workers' reports
// alone.
std::unique_ptr<Policy> MakePlannerPolicy(const PlanOptions& options = {});

// First come, first served, whatever the lengths: the oldest request joins the worker with the
// fewest positions among those with room; while it fits nowhere, nobody else starts.
std::unique_ptr<Policy> MakeFcfsPolicy();

// First come, first served inside a length bucket (the planner's buckets). An empty worker takes
// the bucket with the oldest head, and goes on with that bucket until a head that no worker serves
// has waited longer than its own.
std::unique_ptr<Policy> MakeBucketedFcfsPolicy();

// Knows the true steps and the true step times, has neither classes nor tenants to be fair to, and
// serves only to have the most requests in time.
struct OracleOptions {
  enum class Order { kMooreHodgson, kShortestFirst };
  Order order = Order::kMooreHodgson;
  double padding_max = 0.1;
  double tokens_share = 1.0;
  bool protect_running = true;  // nobody joins who would make a running row late
  bool drain = true;            // a worker is kept for a length that no batch has
};
std::unique_ptr<Policy> MakeOraclePolicy(const Workload& workload, const ClusterModel& cluster,
                                         const OracleOptions& options);
// The ways of running the oracle; the best of them is "the oracle".
std::vector<OracleOptions> OracleVariants();
// The run of the variant with the most requests in time.
Outcome BestOracle(const Workload& workload, const ClusterModel& cluster,
                   const SimulationOptions& options);

// No schedule of any kind, even one that knows the arrivals to come, has more requests in time: the
// workers as one machine that is never idle while there is work, splits every request at will, pads
// nothing, pays no overhead beyond full batches', and is paid for parts of requests. Solved exactly
// (the feasible works form a polymatroid, so the cheapest first is optimal), with times rounded to
// whole seconds in its favour. Returns requests.
double RelaxedBound(const Workload& workload, const ClusterModel& cluster);

}  // namespace cinnabar::sim

#endif  // CINNABAR_TESTS_SIM_SCHEDULER_POLICIES_H_
