// Known values of the schedules, and what every schedule must add up to.
#include "worker/decoding/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;

std::vector<int32_t> EvenShares(int32_t count, int32_t num_steps) {
  std::vector<int32_t> shares;
  for (int32_t step = 0; step < num_steps; ++step) {
    shares.push_back(EvenShare(count, num_steps, step));
  }
  return shares;
}

std::vector<int32_t> DreamTransfers(int32_t masked, int32_t num_steps, double eps) {
  std::vector<int32_t> transfers;
  for (int32_t step = 0; step < num_steps; ++step) {
    transfers.push_back(DreamTransferCount(masked, num_steps, step, eps));
    masked -= transfers.back();
  }
  return transfers;
}

TEST(EvenShareTest, LargerSharesFirst) {
  EXPECT_THAT(EvenShares(10, 4), ElementsAre(3, 3, 2, 2));  // Q1 of the sampler sheet
  EXPECT_THAT(EvenShares(8, 4), ElementsAre(2, 2, 2, 2));
  EXPECT_THAT(EvenShares(3, 5), ElementsAre(1, 1, 1, 0, 0));
  EXPECT_THAT(EvenShares(0, 3), ElementsAre(0, 0, 0));
  EXPECT_THAT(EvenShares(7, 1), ElementsAre(7));
}

TEST(EvenShareTest, AddsUpToTheCountAndNeverRises) {
  for (int32_t count = 0; count <= 40; ++count) {
    for (int32_t num_steps = 1; num_steps <= 45; ++num_steps) {
      const std::vector<int32_t> shares = EvenShares(count, num_steps);
      int32_t sum = 0;
      for (size_t step = 0; step < shares.size(); ++step) {
        sum += shares[step];
        if (step > 0) {
          EXPECT_LE(shares[step], shares[step - 1]);
        }
        EXPECT_LE(shares[0] - shares[step], 1);
      }
      EXPECT_EQ(sum, count) << count << " over " << num_steps;
    }
  }
}

// As torch has it: (torch.tensor(count) * rate).long().
TEST(Float32ShareTest, CanFallShortOfAWholeNumber) {
  EXPECT_EQ(Float32Share(8, 3.0 / 8), 3);
  EXPECT_EQ(Float32Share(10, 0.0), 0);
  EXPECT_EQ(Float32Share(22, 12.0 / 22), 12);
  EXPECT_EQ(Float32Share(22, 13.0 / 22), 12);
  EXPECT_EQ(Float32Share(81, 5.0 / 27), 14);
}

TEST(DreamScheduleTest, KnownTransfers) {
  // With as many steps as masks the first transfers nothing: 8 * 0.124875 truncates.
  EXPECT_THAT(DreamTransfers(8, 8, 1e-3), ElementsAre(0, 1, 1, 1, 1, 1, 1, 2));
  EXPECT_THAT(DreamTransfers(7, 1, 1e-3), ElementsAre(7));
  EXPECT_THAT(DreamTransfers(0, 3, 1e-3), ElementsAre(0, 0, 0));
  EXPECT_THAT(DreamTransfers(6, 2, 1e-3), ElementsAre(2, 4));  // 6 * 0.4995 truncates
  EXPECT_THAT(DreamTransfers(2, 5, 1e-3), ElementsAre(0, 0, 0, 0, 2));
}

TEST(DreamScheduleTest, ChanceIsOneMinusTheRatioOfTimes) {
  for (const double eps : {1e-5, 1e-3, 0.2, 0.9}) {
    for (const int32_t num_steps : {1, 2, 5, 8, 128}) {
      double left = 1;
      for (int32_t step = 0; step < num_steps; ++step) {
        const double t = 1 + (eps - 1) * step / num_steps;
        const double s = 1 + (eps - 1) * (step + 1) / num_steps;
        const double want = step == num_steps - 1 ? 1.0 : 1 - s / t;
        EXPECT_NEAR(DreamTransferChance(num_steps, step, eps), want, 1e-14);
        if (step == num_steps - 1) {
          // The chances telescope: what is left before the last step is its time.
          EXPECT_NEAR(left, t, 1e-12) << num_steps << " steps, eps " << eps;
        }
        left *= 1 - DreamTransferChance(num_steps, step, eps);
      }
      EXPECT_EQ(left, 0);
    }
  }
}

TEST(DreamScheduleTest, AddsUpToTheMaskedCount) {
  for (const double eps : {1e-5, 1e-3, 0.2, 0.999}) {
    for (int32_t masked = 0; masked <= 40; ++masked) {
      for (int32_t num_steps = 1; num_steps <= 45; ++num_steps) {
        int32_t sum = 0;
        for (const int32_t transfers : DreamTransfers(masked, num_steps, eps)) {
          EXPECT_GE(transfers, 0);
          sum += transfers;
        }
        EXPECT_EQ(sum, masked) << num_steps << " steps, eps " << eps;
      }
    }
  }
}

TEST(TimeStepTest, FromOneDownToTheEnd) {
  for (const int32_t num_steps : {1, 2, 7, 1024}) {
    EXPECT_EQ(TimeStepAt(num_steps, 0).time, 1.0);
    const double length = (1 - 1e-5) / num_steps;
    for (int32_t step = 0; step < num_steps; ++step) {
      const TimeStep at = TimeStepAt(num_steps, step);
      EXPECT_EQ(at.length, length);
      EXPECT_NEAR(at.time, 1 - step * length, 1e-15);
      // Each step ends where the next begins, and the chance of a step is no chance above 1.
      EXPECT_NEAR(at.time - at.length, TimeStepAt(num_steps, step + 1).time, 1e-12);
      EXPECT_LT(at.length / at.time, 1.0);
    }
    EXPECT_EQ(TimeStepAt(num_steps, num_steps).time, 1e-5);
    EXPECT_EQ(TimeStepAt(num_steps, num_steps + 3).time, 1e-5);
  }
}

TEST(SigmaTest, LogLinear) {
  const ModelTraits model;
  for (const double t : {0.0, 1e-5, 0.1, 0.5, 0.9, 1.0}) {
    const double sigma = SigmaAt(model, t);
    EXPECT_NEAR(sigma, -std::log(1 - 0.999 * t), 1e-12);
    EXPECT_NEAR(-std::expm1(-sigma), 0.999 * t, 1e-14);  // the chance to have moved by t
    EXPECT_NEAR(SigmaRateAt(model, t), 0.999 / (1 - 0.999 * t), 1e-9);
  }
  EXPECT_NEAR(SigmaAt(model, 1.0), 6.907755278982136, 1e-12);
  EXPECT_NEAR(SigmaRateAt(model, 1.0), 999, 1e-8);
}

TEST(SigmaTest, Geometric) {
  ModelTraits model;
  model.sigma_min = 1e-4F;
  model.sigma_max = 20.0F;
  // The ends are float32 in ModelTraits.
  EXPECT_NEAR(SigmaAt(model, 0.0), 1e-4, 1e-11);
  EXPECT_NEAR(SigmaAt(model, 1.0), 20.0, 1e-12);
  EXPECT_NEAR(SigmaAt(model, 0.5), std::sqrt(1e-4 * 20), 1e-8);
  EXPECT_NEAR(SigmaRateAt(model, 1.0), 20 * std::log(2e5), 1e-5);
}

TEST(SigmaTest, TheRateIsTheDerivative) {
  ModelTraits geometric;
  geometric.sigma_min = 1e-3F;
  geometric.sigma_max = 8.0F;
  for (const ModelTraits& model : {ModelTraits{}, geometric}) {
    for (const double t : {0.05, 0.3, 0.6, 0.95}) {
      const double slope = (SigmaAt(model, t + 1e-6) - SigmaAt(model, t - 1e-6)) / 2e-6;
      EXPECT_NEAR(SigmaRateAt(model, t), slope, 1e-6 * slope) << t;
    }
  }
}

}  // namespace
}  // namespace cinnabar
