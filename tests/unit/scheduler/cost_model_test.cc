#include "scheduler/cost_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace cinnabar {
namespace {

constexpr WorkKind kThreshold = {.model = 0, .sampler = 3, .threshold_percent = 90};

TEST(StepTimeTest, LearnsTheWorkersTimesThroughNoiseAndOutliers) {
  std::mt19937_64 random(7);
  std::uniform_int_distribution<int32_t> rows(1, 32);
  std::uniform_int_distribution<int64_t> tokens(64, 2048);
  std::normal_distribution<double> noise(0.0, 0.05);
  StepTimeFit fit;
  const auto truth = [](double r, double p) { return 0.004 + 0.00005 * r + 0.000025 * p; };
  for (int i = 0; i < 2000; ++i) {
    StepSample sample;
    sample.rows = rows(random);
    sample.positions = sample.rows * tokens(random);
    sample.seconds =
        truth(sample.rows, static_cast<double>(sample.positions)) * std::exp(noise(random));
    if (i % 100 == 99) sample.seconds = 20.0;  // the machine was paused
    Observe(sample, fit);
  }
  for (const auto& [r, p] : {std::pair(1, 300), std::pair(4, 4096), std::pair(32, 32768)}) {
    EXPECT_NEAR(PredictStepSeconds(fit, r, p), truth(r, p), 0.1 * truth(r, p))
        << r << " rows, " << p;
  }
}

TEST(StepTimeTest, FollowsAMachineThatBecameSlower) {
  StepTimeFit fit;
  for (int i = 0; i < 1000; ++i) Observe({4, 2048 + 16 * (i % 64), 0.05}, fit);
  for (int i = 0; i < 1000; ++i) Observe({4, 2048 + 16 * (i % 64), 0.10}, fit);
  EXPECT_NEAR(PredictStepSeconds(fit, 4, 2500), 0.10, 0.01);
}

TEST(StepTimeTest, OneShapeForHoursDoesNotWindUp) {
  StepTimeFit fit;
  for (int i = 0; i < 200000; ++i) Observe({1, 512, 0.02}, fit);
  EXPECT_NEAR(PredictStepSeconds(fit, 1, 512), 0.02, 1e-4);
  Observe({8, 8192, 0.25}, fit);
  EXPECT_LT(PredictStepSeconds(fit, 8, 8192), 1.0);
}

TEST(StepTimeTest, PredictionsNeverFallWithWork) {
  StepTimeFit fit;
  fit.weights = {0.01, -0.5, 0.02};  // as a fit may look in between
  EXPECT_EQ(PredictStepSeconds(fit, 0, 0), 0.0);
  double before = 0.0;
  for (int rows = 1; rows < 40; ++rows) {
    const double now = PredictStepSeconds(fit, rows, 100.0 * rows);
    EXPECT_GE(now, before);
    before = now;
  }
}

TEST(StepTimeTest, ReportsThatMakeNoSenseAreIgnored) {
  StepTimeFit fit;
  const StepTimeFit fresh = fit;
  Observe({0, 100, 0.1}, fit);
  Observe({1, 0, 0.1}, fit);
  Observe({1, 100, 0.0}, fit);
  Observe({1, 100, std::nan("")}, fit);
  Observe({1, 100, INFINITY}, fit);
  EXPECT_EQ(fit, fresh);
}

TEST(StepsTest, NothingLearnedMeansTheWholeBudget) {
  const StepsForecast forecast = ForecastSteps(BlendFractions({}, kThreshold, 128), 64, 0);
  EXPECT_EQ(forecast.mean, 64.0);
  EXPECT_EQ(forecast.p25, 64.0);
  EXPECT_EQ(forecast.p90, 64.0);
}

TEST(StepsTest, AdaptiveSamplersAreExpectedToEndEarly) {
  CostModel cost;
  for (int i = 0; i < 100; ++i) ObserveSteps({kThreshold, 128, 64, 16 + i % 17}, cost);
  const StepsForecast forecast = ForecastSteps(BlendFractions(cost, kThreshold, 128), 64, 0);
  EXPECT_NEAR(forecast.p50, 24.0, 3.0);
  EXPECT_LE(forecast.p25, forecast.p50);
  EXPECT_LE(forecast.p50, forecast.p75);
  EXPECT_LE(forecast.p75, forecast.p90);
  // Another canvas length of the same sampler, never seen, is expected alike; another model is not.
  EXPECT_NEAR(ForecastSteps(BlendFractions(cost, kThreshold, 1024), 64, 0).p50, 24.0, 4.0);
  const WorkKind other = {.model = 1, .sampler = 3, .threshold_percent = 90};
  EXPECT_EQ(ForecastSteps(BlendFractions(cost, other, 128), 64, 0).p50, 64.0);
}

TEST(StepsTest, WhatIsDoneChangesWhatIsLeft) {
  CostModel cost;
  for (int i = 0; i < 200; ++i) ObserveSteps({kThreshold, 128, 64, i % 2 == 0 ? 16 : 64}, cost);
  const FractionHistogram fractions = BlendFractions(cost, kThreshold, 128);
  EXPECT_NEAR(ForecastSteps(fractions, 64, 0).mean, 40.0, 4.0);
  // After 20 steps the early end did not come: the rest of the budget is left.
  EXPECT_NEAR(ForecastSteps(fractions, 64, 20).p50, 44.0, 0.5);
  for (int done = 0; done < 64; ++done) {
    const StepsForecast forecast = ForecastSteps(fractions, 64, done);
    for (const double steps :
         {forecast.mean, forecast.p25, forecast.p50, forecast.p75, forecast.p90}) {
      EXPECT_GE(steps, 1.0);
      EXPECT_LE(steps, 64.0 - done);
    }
  }
  EXPECT_EQ(ForecastSteps(fractions, 64, 64).mean, 0.0);
}

TEST(StepsTest, NewBehaviourReplacesTheOld) {
  CostModel cost;
  for (int i = 0; i < 1000; ++i) ObserveSteps({kThreshold, 64, 32, 32}, cost);
  for (int i = 0; i < 1000; ++i) ObserveSteps({kThreshold, 64, 32, 8}, cost);
  EXPECT_LE(ForecastSteps(BlendFractions(cost, kThreshold, 64), 32, 0).p90, 9.0);
}

TEST(StepsTest, KindsAreBounded) {
  CostModel cost;
  for (int32_t i = 0; i < 20000; ++i) ObserveSteps({{.model = i, .sampler = 1}, 64, 32, 16}, cost);
  EXPECT_LE(cost.steps.size(), kStepsKeysMax);
  ObserveSteps({kThreshold, 64, 32, 33}, cost);  // more than its budget: ignored
  ObserveSteps({kThreshold, 64, 0, 0}, cost);
}

TEST(CanvasBucketTest, PowersOfTwo) {
  EXPECT_EQ(CanvasBucket(1), 0);
  EXPECT_EQ(CanvasBucket(32), 0);
  EXPECT_EQ(CanvasBucket(33), 1);
  EXPECT_EQ(CanvasBucket(64), 1);
  EXPECT_EQ(CanvasBucket(65), 2);
  EXPECT_EQ(CanvasBucket(128), 2);
  EXPECT_EQ(CanvasBucket(129), 3);
}

TEST(SnapshotTest, SurvivesTextBitForBit) {
  CostModel cost;
  for (int i = 1; i < 300; ++i) {
    ObserveStep(i % 3, {1 + i % 7, 100 + i, 0.001 * i}, cost);
    ObserveSteps({{.model = i % 3, .sampler = i % 5, .threshold_percent = 90},
                  32 * (1 + i % 9),
                  64,
                  1 + i % 64},
                 cost);
  }
  const absl::StatusOr<CostModel> back = ParseCostModel(SerializeCostModel(cost));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, cost);
  EXPECT_EQ(*ParseCostModel(SerializeCostModel({})), CostModel{});
}

TEST(SnapshotTest, DamageIsAnErrorThatNamesTheLine) {
  CostModel cost;
  ObserveStep(0, {1, 100, 0.01}, cost);
  const std::string good = SerializeCostModel(cost);
  for (const std::string& text :
       {std::string(), std::string("cost_model 2\n"), good + "steps 1\n", good + "junk\n",
        good + "step_time 0 0 nan 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"}) {
    const absl::StatusOr<CostModel> parsed = ParseCostModel(text);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(parsed.status().message()), testing::HasSubstr("line "));
  }
}

}  // namespace
}  // namespace cinnabar
