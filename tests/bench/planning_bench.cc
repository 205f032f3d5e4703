// One plan over 1,000 to 100,000 waiting requests of 64 tenants and 16 workers, seed 1, all workers
// with room.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "common/base/philox.h"
#include "scheduler/planning.h"

namespace cinnabar {
namespace {

double Uniform(uint32_t what, int64_t index) {
  return UniformFromWord(Philox4x32({{static_cast<uint32_t>(index), what, 0, 0}}, 1, 0).word[0]);
}

// `deadlines` false: nothing is put off, all of it is ordered by class, tenant and age.
void PlanOf(benchmark::State& state, bool deadlines) {
  const absl::Time now = absl::FromUnixSeconds(1000);
  std::vector<PlanRequest> waiting;
  for (int64_t i = 0; i < state.range(0); ++i) {
    PlanRequest request;
    request.id = i;
    request.tenant = static_cast<TenantIndex>(Uniform(0, i) * 64);
    request.priority = static_cast<PriorityClass>(static_cast<int>(Uniform(1, i) * 3));
    request.kind = {
        .model = 0, .sampler = static_cast<int32_t>(Uniform(2, i) * 3), .threshold_percent = 90};
    request.canvas_tokens = 32 << static_cast<int>(Uniform(3, i) * 5);
    request.sequence_tokens =
        request.canvas_tokens + 1 + static_cast<int32_t>(Uniform(4, i) * 4000);
    request.steps_budget = request.canvas_tokens / 2;
    request.arrival = now - absl::Seconds(30 * Uniform(5, i));
    if (deadlines) request.deadline = now + absl::Seconds(5 + 300 * Uniform(6, i));
    waiting.push_back(request);
  }
  std::vector<WorkerState> workers;
  for (int32_t w = 0; w < 16; ++w) {
    workers.push_back({.id = w,
                       .rows_max = 32,
                       .tokens_max = 32768,
                       .tokens_target = 4096,
                       .pads = true,
                       .rows = {}});
  }
  const CostModel cost;
  for (auto _ : state) {
    benchmark::DoNotOptimize(PlanPacks(waiting, workers, cost, ShareState{}, PlanOptions{}, now));
  }
  state.SetComplexityN(state.range(0));
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK_CAPTURE(PlanOf, no_deadlines, false)
    ->RangeMultiplier(10)
    ->Range(1000, 100000)
    ->Complexity()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(PlanOf, overloaded_deadlines, true)
    ->RangeMultiplier(10)
    ->Range(1000, 100000)
    ->Complexity()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace cinnabar
