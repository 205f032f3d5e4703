#include "scheduler/cost_model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr double kRowsScale = 16.0;
constexpr double kPositionsScale = 4096.0;
constexpr double kForgetting = 0.995;           // about the last 200 steps count
constexpr double kPriorInformation = 1.0;       // a step of a second tells as much
constexpr double kScaleFollows = 0.02;          // weight of a new residual in the running scale
constexpr double kScaleMin = 0.02;              // 2% of noise is always believed
constexpr double kClip = 3.0;                   // residuals beyond this many scales are outliers
constexpr double kHistogramForgetting = 0.995;  // about the last 200 requests count
constexpr double kParentWeight = 6.0;           // requests that a coarser histogram is worth
constexpr double kPriorWeight = 2.0;            // requests that "uses its whole budget" is worth

std::array<double, 3> Features(double rows, double positions) {
  return {1.0, rows / kRowsScale, positions / kPositionsScale};
}

// The solution of a 3 x 3 system that is symmetric and positive definite, by Cholesky.
std::array<double, 3> Solve(const std::array<double, 9>& a, const std::array<double, 3>& b) {
  const double l00 = std::sqrt(a[0]);
  const double l10 = a[3] / l00;
  const double l20 = a[6] / l00;
  const double l11 = std::sqrt(std::max(a[4] - l10 * l10, 1e-12));
  const double l21 = (a[7] - l20 * l10) / l11;
  const double l22 = std::sqrt(std::max(a[8] - l20 * l20 - l21 * l21, 1e-12));
  const double y0 = b[0] / l00;
  const double y1 = (b[1] - l10 * y0) / l11;
  const double y2 = (b[2] - l20 * y0 - l21 * y1) / l22;
  const double x2 = y2 / l22;
  const double x1 = (y1 - l21 * x2) / l11;
  return {(y0 - l10 * x1 - l20 * x2) / l00, x1, x2};
}

void Add(FractionHistogram& histogram, int bin) {
  for (double& count : histogram.counts) count *= kHistogramForgetting;
  histogram.counts[static_cast<size_t>(bin)] += 1.0;
}

double Total(const FractionHistogram& histogram) {
  double total = 0.0;
  for (const double count : histogram.counts) total += count;
  return total;
}

// `own` as it is, with `parent` (a distribution) worth `weight` observations; the result sums to
// one.
FractionHistogram Mix(const FractionHistogram* own, const FractionHistogram& parent,
                      double weight) {
  FractionHistogram mixed;
  const double total = (own == nullptr ? 0.0 : Total(*own)) + weight;
  for (size_t bin = 0; bin < mixed.counts.size(); ++bin) {
    mixed.counts[bin] =
        ((own == nullptr ? 0.0 : own->counts[bin]) + weight * parent.counts[bin]) / total;
  }
  return mixed;
}

std::string Hex(double value) { return absl::StrFormat("%a", value); }

// strtod reads what "%a" writes; absl::SimpleAtod does not.
bool ReadHex(absl::string_view text, double& value) {
  const std::string copy(text);
  char* end = nullptr;
  value = std::strtod(copy.c_str(), &end);
  return !copy.empty() && end == copy.c_str() + copy.size() && std::isfinite(value);
}

}  // namespace

void Observe(const StepSample& sample, StepTimeFit& fit) {
  if (sample.rows <= 0 || sample.positions <= 0 || !(sample.seconds > 0.0) ||
      !std::isfinite(sample.seconds))
    return;
  const std::array<double, 3> x = Features(sample.rows, static_cast<double>(sample.positions));
  double predicted = 0.0;
  for (size_t i = 0; i < 3; ++i) predicted += fit.weights[i] * x[i];
  // Step times span three orders of magnitude, and their noise is a share of them: the fit
  // minimises relative error, i.e. every feature and the target are divided by the time seen.
  const double scale = std::max(sample.seconds, 1e-6);
  const double residual = (sample.seconds - predicted) / scale;
  const double clip = kClip * std::max(fit.residual_scale, kScaleMin);
  const double believed = std::clamp(residual, -clip, clip);
  std::array<double, 3> y;
  for (size_t i = 0; i < 3; ++i) y[i] = x[i] / scale;
  const StepTimeFit prior;
  const double target = predicted / scale + believed;
  for (size_t i = 0; i < 3; ++i) {
    for (size_t j = 0; j < 3; ++j) {
      fit.information[3 * i + j] = kForgetting * fit.information[3 * i + j] + y[i] * y[j];
    }
    // What is forgotten is replaced by the prior.
    fit.information[4 * i] += (1.0 - kForgetting) * kPriorInformation;
    fit.moment[i] = kForgetting * fit.moment[i] + y[i] * target +
                    (1.0 - kForgetting) * kPriorInformation * prior.weights[i];
  }
  fit.weights = Solve(fit.information, fit.moment);
  // The scale follows the clipped residual, so that one outlier cannot open the gate for the next;
  // a lasting change still widens it, by at most a factor of 1.04 a step.
  fit.residual_scale += kScaleFollows * (std::fabs(believed) * 1.25 - fit.residual_scale);
  ++fit.num_samples;
}

double PredictStepSeconds(const StepTimeFit& fit, double rows, double positions) {
  CINNABAR_CHECK(rows >= 0.0 && positions >= 0.0);
  if (rows == 0.0 || positions == 0.0) return 0.0;
  const std::array<double, 3> x = Features(rows, positions);
  double seconds = 0.0;
  for (size_t i = 0; i < 3; ++i) seconds += std::max(0.0, fit.weights[i]) * x[i];
  return std::max(seconds, 1e-6);
}

int32_t CanvasBucket(int32_t canvas_tokens) {
  const uint32_t blocks = static_cast<uint32_t>(std::max(canvas_tokens, 1) - 1) / 32;
  return static_cast<int32_t>(std::bit_width(blocks));
}

void ObserveStep(int32_t model, const StepSample& sample, CostModel& cost) {
  Observe(sample, cost.step_time[model]);
}

void ObserveSteps(const StepsSample& sample, CostModel& cost) {
  if (sample.steps_budget <= 0 || sample.steps_used <= 0 || sample.steps_used > sample.steps_budget)
    return;
  const double fraction = static_cast<double>(sample.steps_used) / sample.steps_budget;
  const int bin =
      std::clamp(static_cast<int>(std::ceil(fraction * kFractionBins)) - 1, 0, kFractionBins - 1);
  const WorkKind model_alone = {.model = sample.kind.model, .sampler = -1, .threshold_percent = -1};
  const std::tuple<WorkKind, int32_t> keys[] = {
      {model_alone, -1}, {sample.kind, -1}, {sample.kind, CanvasBucket(sample.canvas_tokens)}};
  for (const auto& key : keys) {
    auto found = cost.steps.find(key);
    if (found == cost.steps.end()) {
      if (cost.steps.size() >= kStepsKeysMax) continue;
      found = cost.steps.try_emplace(key).first;
    }
    Add(found->second, bin);
  }
}

const StepTimeFit& StepTimeOf(const CostModel& cost, int32_t model) {
  static const StepTimeFit prior;
  const auto found = cost.step_time.find(model);
  return found == cost.step_time.end() ? prior : found->second;
}

FractionHistogram BlendFractions(const CostModel& cost, const WorkKind& kind,
                                 int32_t canvas_tokens) {
  const auto find = [&cost](const WorkKind& k, int32_t bucket) -> const FractionHistogram* {
    const auto found = cost.steps.find({k, bucket});
    return found == cost.steps.end() ? nullptr : &found->second;
  };
  FractionHistogram prior;
  prior.counts.back() = 1.0;
  const WorkKind model_alone = {.model = kind.model, .sampler = -1, .threshold_percent = -1};
  const FractionHistogram of_model = Mix(find(model_alone, -1), prior, kPriorWeight);
  const FractionHistogram of_kind = Mix(find(kind, -1), of_model, kParentWeight);
  return Mix(find(kind, CanvasBucket(canvas_tokens)), of_kind, kParentWeight);
}

StepsForecast ForecastSteps(const FractionHistogram& fractions, int32_t steps_budget,
                            int32_t steps_done) {
  if (steps_budget <= steps_done) return {};
  const double budget = steps_budget;
  const double remaining_max = steps_budget - steps_done;
  // The mass of a bin that lies beyond what is done, taken as spread evenly over the bin, except in
  // the last one: there it means "all of the budget", which fixed-step samplers use exactly.
  const double done = static_cast<double>(steps_done) / budget;
  std::array<double, kFractionBins> mass;
  double total = 0.0;
  double mean = 0.0;
  for (int bin = 0; bin < kFractionBins; ++bin) {
    const double low = static_cast<double>(bin) / kFractionBins;
    const double high = static_cast<double>(bin + 1) / kFractionBins;
    const size_t index = static_cast<size_t>(bin);
    const bool last = bin == kFractionBins - 1;
    const double share = last ? 1.0 : std::clamp((high - done) * kFractionBins, 0.0, 1.0);
    mass[index] = fractions.counts[index] * share;
    total += mass[index];
    mean += mass[index] * (last ? 1.0 : (std::max(low, done) + high) / 2);
  }
  StepsForecast forecast;
  if (total <= 0.0)
    return {remaining_max, remaining_max, remaining_max, remaining_max, remaining_max};
  const auto steps_at = [&](double fraction) {
    return std::clamp(fraction * budget - steps_done, 1.0, remaining_max);
  };
  forecast.mean = steps_at(mean / total);
  const std::array<double, 4> quantiles = {0.25, 0.5, 0.75, 0.9};
  double* const targets[] = {&forecast.p25, &forecast.p50, &forecast.p75, &forecast.p90};
  size_t next = 0;
  double seen = 0.0;
  for (int bin = 0; bin < kFractionBins && next < quantiles.size(); ++bin) {
    const size_t index = static_cast<size_t>(bin);
    const double low = std::max(done, static_cast<double>(bin) / kFractionBins);
    const double high = static_cast<double>(bin + 1) / kFractionBins;
    while (next < quantiles.size() && mass[index] > 0.0 &&
           seen + mass[index] >= quantiles[next] * total * (1.0 - 1e-12)) {
      const double inside = std::clamp((quantiles[next] * total - seen) / mass[index], 0.0, 1.0);
      const double fraction = bin == kFractionBins - 1 ? 1.0 : low + (high - low) * inside;
      *targets[next] = steps_at(fraction);
      ++next;
    }
    seen += mass[index];
  }
  for (; next < quantiles.size(); ++next) *targets[next] = remaining_max;
  return forecast;
}

std::string SerializeCostModel(const CostModel& cost) {
  std::string text = "cost_model 1\n";
  for (const auto& [model, fit] : cost.step_time) {
    absl::StrAppend(&text, "step_time ", model, " ", fit.num_samples, " ", Hex(fit.residual_scale));
    for (const double weight : fit.weights) absl::StrAppend(&text, " ", Hex(weight));
    for (const double entry : fit.information) absl::StrAppend(&text, " ", Hex(entry));
    for (const double entry : fit.moment) absl::StrAppend(&text, " ", Hex(entry));
    text += '\n';
  }
  for (const auto& [key, histogram] : cost.steps) {
    const auto& [kind, bucket] = key;
    absl::StrAppend(&text, "steps ", kind.model, " ", kind.sampler, " ", kind.threshold_percent,
                    " ", bucket);
    for (const double count : histogram.counts) absl::StrAppend(&text, " ", Hex(count));
    text += '\n';
  }
  return text;
}

absl::StatusOr<CostModel> ParseCostModel(absl::string_view text) {
  CostModel cost;
  int64_t line_number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++line_number;
    const auto bad = [line_number](absl::string_view why) {
      return absl::DataLossError(absl::StrCat("cost model, line ", line_number, ": ", why));
    };
    if (line_number == 1) {
      if (line != "cost_model 1") return bad("not a snapshot of version 1");
      continue;
    }
    if (line.empty()) continue;
    const std::vector<absl::string_view> fields = absl::StrSplit(line, ' ');
    if (fields[0] == "step_time" && fields.size() == 19) {
      int32_t model = 0;
      StepTimeFit fit;
      bool good = absl::SimpleAtoi(fields[1], &model) &&
                  absl::SimpleAtoi(fields[2], &fit.num_samples) &&
                  ReadHex(fields[3], fit.residual_scale);
      for (size_t i = 0; i < 3; ++i) good = good && ReadHex(fields[4 + i], fit.weights[i]);
      for (size_t i = 0; i < 9; ++i) good = good && ReadHex(fields[7 + i], fit.information[i]);
      for (size_t i = 0; i < 3; ++i) good = good && ReadHex(fields[16 + i], fit.moment[i]);
      if (!good || fit.residual_scale < 0.0) return bad("not a number");
      cost.step_time[model] = fit;
    } else if (fields[0] == "steps" && fields.size() == 5 + kFractionBins) {
      WorkKind kind;
      int32_t bucket = 0;
      FractionHistogram histogram;
      bool good = absl::SimpleAtoi(fields[1], &kind.model) &&
                  absl::SimpleAtoi(fields[2], &kind.sampler) &&
                  absl::SimpleAtoi(fields[3], &kind.threshold_percent) &&
                  absl::SimpleAtoi(fields[4], &bucket);
      for (size_t i = 0; i < histogram.counts.size(); ++i) {
        good = good && ReadHex(fields[5 + i], histogram.counts[i]) && histogram.counts[i] >= 0.0;
      }
      if (!good) return bad("not a number");
      if (cost.steps.size() >= kStepsKeysMax) return bad("too many kinds");
      cost.steps[{kind, bucket}] = histogram;
    } else {
      return bad("unknown record");
    }
  }
  return cost;
}

}  // namespace cinnabar
