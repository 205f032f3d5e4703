// Recorded traces, and their mapping to requests of this cluster. Everything that a trace does not
// say (tenant, class, sampler, deadline, true number of steps) is a hash of (seed, row): the same
// seed gives the same requests.
#ifndef CINNABAR_TESTS_SIM_SCHEDULER_WORKLOAD_H_
#define CINNABAR_TESTS_SIM_SCHEDULER_WORKLOAD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "scheduler/planning.h"

namespace cinnabar::sim {

// One row of a trace.
struct TraceRow {
  double arrival_seconds = 0.0;  // from the first row; never falls
  int32_t context_tokens = 0;
  int32_t generated_tokens = 0;
  int32_t tenant = -1;  // -1: drawn by share
};

// The committed fixture: "delta_ms,context,generated", '#' begins a comment.
absl::StatusOr<std::vector<TraceRow>> ReadFixture(const std::string& path);
// The original files, by name: AzureLLMInferenceTrace_{code,conv}.csv,
// mooncake_{conversation,synthetic}_trace.jsonl.
absl::StatusOr<std::vector<TraceRow>> ReadAzure(const std::string& path);
absl::StatusOr<std::vector<TraceRow>> ReadMooncake(const std::string& path);
// ServeGen's rate tables give arrivals and tenants (renewal processes of the table's kind and
// parameters, twenty minutes from noon); the lengths are those of `lengths`, in a shuffled order.
absl::StatusOr<std::vector<TraceRow>> ReadServeGen(const std::string& folder,
                                                   const std::vector<TraceRow>& lengths,
                                                   uint64_t seed);

// The workers: four of one kind, one accelerator each, that compute whole padded batches. The
// figures are those of an 8B model in bf16 at about 40% of an H200's peak.
struct ClusterModel {
  int32_t num_workers = 4;
  double step_fixed_seconds = 0.004;
  double step_row_seconds = 0.00005;
  double step_position_seconds = 0.000025;
  int32_t rows_max = 32;
  int64_t tokens_max = 32768;
  int64_t tokens_target = 2048;
  bool pads = true;
  double noise = 0.05;           // of a step's time, log-normal
  double outlier_share = 0.002;  // steps that take three times as long

  double StepSeconds(double rows, double positions) const {
    return step_fixed_seconds + step_row_seconds * rows + step_position_seconds * positions;
  }
};

struct WorkloadOptions {
  uint64_t seed = 1;
  double load =
      1.0;  // 1: the true work offered over the trace's span is what the workers can compute in it
  int32_t equal_tenants = 0;  // > 0: so many, drawn alike; 0: sixteen with ServeGen's shares
  bool batch_without_deadline = false;
  double degrade_share = 0.0;  // requests that may be lowered to half of their steps
  // deadline = a + b * steps budget, by class
  std::array<double, 3> deadline_fixed_seconds = {3.0, 15.0, 120.0};
  std::array<double, 3> deadline_step_seconds = {0.2, 0.4, 1.0};
  double deadline_step_scale = 1.0;  // for traces whose prompts are longer than a chat's
  std::array<double, 3> class_share = {0.5, 0.35, 0.15};
};

struct SimRequest {
  PlanRequest request;  // as the scheduler sees it; arrival and deadline from the Unix epoch
  double arrival_seconds = 0.0;
  double deadline_seconds = 0.0;
  int32_t true_steps = 0;  // what it will use of an undegraded budget
  int32_t generated_tokens = 0;

  int32_t TrueSteps(int32_t granted_budget) const {
    return std::max(1, static_cast<int32_t>(static_cast<int64_t>(true_steps) * granted_budget /
                                            request.steps_budget));
  }
};

struct Workload {
  std::string trace;
  double load = 1.0;
  double span_seconds = 0.0;  // of the arrivals, scaled
  double time_scale = 1.0;    // trace seconds for each simulated second
  int32_t num_tenants = 0;
  std::vector<SimRequest> requests;  // by arrival; id is the index
};

Workload MakeWorkload(const std::string& name, const std::vector<TraceRow>& rows,
                      const ClusterModel& cluster, const WorkloadOptions& options);

// A uniform number in (0, 1), a function of its arguments alone.
double HashUniform(uint64_t seed, uint64_t what, uint64_t index);
double HashNormal(uint64_t seed, uint64_t what, uint64_t index);

}  // namespace cinnabar::sim

#endif  // CINNABAR_TESTS_SIM_SCHEDULER_WORKLOAD_H_
