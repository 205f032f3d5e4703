#include "worker/decoding/schedule.h"

#include <algorithm>
#include <cmath>

#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr double kLogLinearEps = 1e-3;

bool IsGeometric(const ModelTraits& model) { return model.sigma_max > 0; }

}  // namespace

int32_t EvenShare(int32_t count, int32_t num_steps, int32_t step) {
  CINNABAR_CHECK(num_steps > 0) << num_steps << " steps";
  return count / num_steps + (step < count % num_steps ? 1 : 0);
}

int32_t Float32Share(int32_t count, double rate) {
  return static_cast<int32_t>(static_cast<float>(count) * static_cast<float>(rate));
}

double DreamTransferChance(int32_t num_steps, int32_t step, double eps) {
  CINNABAR_CHECK(num_steps > 0) << num_steps << " steps";
  if (step >= num_steps - 1) return 1.0;
  const double now = 1 - (1 - eps) * step / num_steps;
  const double next = 1 - (1 - eps) * (step + 1) / num_steps;
  return 1 - next / now;
}

int32_t DreamTransferCount(int32_t num_masked, int32_t num_steps, int32_t step, double eps) {
  if (step >= num_steps - 1) return num_masked;
  return static_cast<int32_t>(num_masked * DreamTransferChance(num_steps, step, eps));
}

TimeStep TimeStepAt(int32_t num_steps, int32_t step) {
  CINNABAR_CHECK(num_steps > 0) << num_steps << " steps";
  const double length = (1 - kTimeEnd) / num_steps;
  if (step >= num_steps) return {kTimeEnd, length};
  return {1 - step * length, length};
}

double SigmaAt(const ModelTraits& model, double time) {
  if (IsGeometric(model)) {
    return std::pow(static_cast<double>(model.sigma_min), 1 - time) *
           std::pow(static_cast<double>(model.sigma_max), time);
  }
  return -std::log1p(-(1 - kLogLinearEps) * time);
}

double SigmaRateAt(const ModelTraits& model, double time) {
  if (IsGeometric(model)) {
    return SigmaAt(model, time) *
           std::log(static_cast<double>(model.sigma_max) / static_cast<double>(model.sigma_min));
  }
  return (1 - kLogLinearEps) / (1 - (1 - kLogLinearEps) * time);
}

}  // namespace cinnabar
