// What serving a request will cost, learned online from what workers report: how long a denoising
// step takes, and how many of its steps a request really uses. Plain values and pure functions:
// observing returns nothing but a changed value, two models fed the same reports are equal bit for
// bit, and a snapshot is text.
#ifndef CINNABAR_SCHEDULER_COST_MODEL_H_
#define CINNABAR_SCHEDULER_COST_MODEL_H_

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace cinnabar {

// One forward pass of one worker.
struct StepSample {
  int32_t rows = 0;       // sequences in the batch
  int64_t positions = 0;  // computed, padding included
  double seconds = 0.0;   // monotonic, of the worker
};

// seconds = w0 + w1 * rows + w2 * positions, by recursive least squares with forgetting
// (information form). An outlier (a step that took seconds because the machine was paused) moves
// the fit by a bounded amount: residuals are clipped at three times the running scale. A direction
// that the load does not excite returns to the prior and never winds up.
struct StepTimeFit {
  // Of the scaled features (1, rows / 16, positions / 4096), so that the three are of one size
  // (seconds).
  std::array<double, 3> weights = {0.002, 0.0004, 0.04};
  std::array<double, 9> information = {1, 0, 0, 0, 1, 0, 0, 0, 1};  // row-major, symmetric
  std::array<double, 3> moment = {0.002, 0.0004, 0.04};             // information * weights
  double residual_scale = 0.5;  // of the relative residual; shrinks as the fit settles
  int64_t num_samples = 0;

  bool operator==(const StepTimeFit&) const = default;
};

void Observe(const StepSample& sample, StepTimeFit& fit);

// Never negative and never falling in either argument. rows >= 0, positions >= 0; (0, 0) takes no
// time.
double PredictStepSeconds(const StepTimeFit& fit, double rows, double positions);

// What the number of steps depends on. The numbers are the caller's; they must mean the same after
// a restart when the snapshot is kept (the sampler's place in SamplerCatalog(), the model's place
// in the configuration).
struct WorkKind {
  int32_t model = 0;
  int32_t sampler = 0;
  int32_t threshold_percent = 0;  // rounded; 0 where the sampler has none

  auto operator<=>(const WorkKind&) const = default;
};

// How one finished request went.
struct StepsSample {
  WorkKind kind;
  int32_t canvas_tokens = 0;  // of the canvas
  int32_t steps_budget = 0;   // > 0
  int32_t steps_used = 0;  // in [1, steps_budget]; cancelled and expired requests are not reported
};

inline constexpr int kFractionBins = 32;

// The distribution of steps_used / steps_budget in (0, 1], with exponential forgetting.
struct FractionHistogram {
  std::array<double, kFractionBins> counts = {};

  bool operator==(const FractionHistogram&) const = default;
};

// Remaining steps of a request; each in [1, steps_budget - steps_done] (0 when none is left).
struct StepsForecast {
  double mean = 0.0;
  double p25 = 0.0;
  double p50 = 0.0;
  double p75 = 0.0;
  double p90 = 0.0;
};

struct CostModel {
  // By model; unknown models take the prior.
  std::map<int32_t, StepTimeFit> step_time;
  // By (kind, canvas bucket), (kind, -1) and (model alone: sampler and threshold -1, -1): the
  // coarser ones stand in while the finer have seen little.
  std::map<std::tuple<WorkKind, int32_t>, FractionHistogram> steps;

  bool operator==(const CostModel&) const = default;
};

// Number of histograms a model keeps at most; beyond it new kinds are learned in the coarse ones
// only.
inline constexpr size_t kStepsKeysMax = 4096;

// Bucket of a canvas for learning: powers of two, 0 for up to 32 tokens.
int32_t CanvasBucket(int32_t canvas_tokens);

void ObserveStep(int32_t model, const StepSample& sample, CostModel& cost);
// A sample out of range is ignored: reports come from other machines.
void ObserveSteps(const StepsSample& sample, CostModel& cost);

const StepTimeFit& StepTimeOf(const CostModel& cost, int32_t model);

// The blended distribution for a kind; with nothing learned, the whole budget is expected.
FractionHistogram BlendFractions(const CostModel& cost, const WorkKind& kind,
                                 int32_t canvas_tokens);

// Given that `steps_done` steps did not finish it. Quantiles interpolate inside a bin; p25 <= p50
// <= p75 <= p90.
StepsForecast ForecastSteps(const FractionHistogram& fractions, int32_t steps_budget,
                            int32_t steps_done);

// Text, one record a line, doubles in hexadecimal: Parse(Serialize(m)) == m, bit for bit.
std::string SerializeCostModel(const CostModel& cost);
// DataLoss names the line; a snapshot is then dropped and learned anew.
absl::StatusOr<CostModel> ParseCostModel(absl::string_view text);

}  // namespace cinnabar

#endif  // CINNABAR_SCHEDULER_COST_MODEL_H_
