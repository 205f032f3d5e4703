// Whether counts follow given probabilities (Pearson's chi-square test).
#ifndef CINNABAR_TESTS_UNIT_DECODING_CHI_SQUARE_H_
#define CINNABAR_TESTS_UNIT_DECODING_CHI_SQUARE_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace cinnabar {

// Chance that a chi-square variate with `freedom` degrees of freedom (> 0) exceeds `value`: the
// upper incomplete gamma function Q(freedom / 2, value / 2). Relative error about 1e-10.
inline double ChiSquareTail(double value, double freedom) {
  const double a = freedom / 2;
  const double x = value / 2;
  if (x <= 0) return 1;
  const double front = std::exp(-x + a * std::log(x) - std::lgamma(a));
  if (x < a + 1) {  // 1 - P, P by its series
    double term = 1 / a;
    double sum = term;
    for (int n = 1; n < 10000 && term > sum * 1e-16; ++n) {
      term *= x / (a + n);
      sum += term;
    }
    return 1 - front * sum;
  }
  // Lentz's continued fraction.
  double b = x + 1 - a;
  double c = 1e300;
  double d = 1 / b;
  double h = d;
  for (int n = 1; n < 10000; ++n) {
    const double an = -n * (n - a);
    b += 2;
    d = 1 / (an * d + b);
    c = b + an / c;
    h *= d * c;
    if (std::abs(d * c - 1) < 1e-15) break;
  }
  return front * h;
}

// The chance of counts at least this far from `probabilities` (which sum to 1). Cells with less
// than 8 expected share one. 0 when something impossible was counted; 1 when there is but one cell.
inline double GoodnessOfFit(const std::vector<int64_t>& counts,
                            const std::vector<double>& probabilities) {
  double total = 0;
  double mass = 0;
  for (const int64_t count : counts) total += static_cast<double>(count);
  for (const double probability : probabilities) mass += probability;
  EXPECT_EQ(counts.size(), probabilities.size());
  EXPECT_NEAR(mass, 1, 1e-9);
  double value = 0;
  double rare = 0;
  double rare_expected = 0;
  int num_cells = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const double count = static_cast<double>(counts[i]);
    const double expected = total * probabilities[i];
    if (probabilities[i] == 0 && count > 0) return 0;
    if (expected < 8) {
      rare += count;
      rare_expected += expected;
      continue;
    }
    value += (count - expected) * (count - expected) / expected;
    ++num_cells;
  }
  if (rare_expected >= 8) {
    value += (rare - rare_expected) * (rare - rare_expected) / rare_expected;
    ++num_cells;
  } else if (rare > 60) {  // of a Poisson number of mean 8 or less: never
    return 0;
  }
  return num_cells > 1 ? ChiSquareTail(value, num_cells - 1) : 1;
}

// Far below what hundreds of true tests reach, far above what a wrong formula gives.
inline constexpr double kAlpha = 1e-6;

inline void ExpectFollows(const std::vector<int64_t>& counts,
                          const std::vector<double>& probabilities) {
  EXPECT_GT(GoodnessOfFit(counts, probabilities), kAlpha)
      << testing::PrintToString(counts) << " against " << testing::PrintToString(probabilities);
}

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_UNIT_DECODING_CHI_SQUARE_H_
