#include "common/base/environment.h"

#include <random>

#include "absl/time/clock.h"

namespace cinnabar {

absl::Time Environment::Now() { return absl::Now(); }

void Environment::Sleep(absl::Duration duration) { absl::SleepFor(duration); }

double Environment::Uniform() {
  thread_local std::mt19937_64 engine(std::random_device{}());
  return std::uniform_real_distribution<double>(0.0, 1.0)(engine);
}

Environment& Environment::Real() {
  static Environment* const real = new Environment;
  return *real;
}

}  // namespace cinnabar
