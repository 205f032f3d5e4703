// The promises of the scheduler, held against the Azure code trace (8,819 requests) and the seeds
// below.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "tests/sim/scheduler/policies.h"
#include "tests/sim/scheduler/simulation.h"
#include "tests/sim/scheduler/workload.h"

namespace cinnabar::sim {
namespace {

const std::vector<TraceRow>& Code() {
  static const std::vector<TraceRow>* rows = [] {
    const char* source = std::getenv("CINNABAR_SOURCE_DIR");
    auto read = ReadFixture(absl::StrCat(source == nullptr ? "." : source,
                                         "/tests/sim/scheduler/fixtures/azure_code.csv"));
    CINNABAR_CHECK(read.ok()) << read.status();
    return new std::vector<TraceRow>(*std::move(read));
  }();
  return *rows;
}

Workload CodeAt(double load, uint64_t seed, int32_t equal_tenants = 0, double degrade_share = 0.0) {
  return MakeWorkload(
      "azure-code", Code(), ClusterModel{},
      {.seed = seed, .load = load, .equal_tenants = equal_tenants, .degrade_share = degrade_share});
}

Outcome Ours(const Workload& workload, uint64_t seed) {
  return Simulate(workload, ClusterModel{}, *MakePlannerPolicy(), {.seed = seed});
}

// The plain run, made once for all tests.
const Outcome& OursAt(double load, uint64_t seed) {
  static auto* outcomes = new std::map<std::pair<double, uint64_t>, Outcome>;
  const auto [entry, is_new] = outcomes->try_emplace({load, seed});
  if (is_new) entry->second = Ours(CodeAt(load, seed), seed);
  return entry->second;
}

TEST(Fixture, IsTheTrace) {
  ASSERT_EQ(Code().size(), 8819U);
  EXPECT_NEAR(Code().back().arrival_seconds, 3436.0, 0.1);
  EXPECT_EQ(Code().front().context_tokens, 4808);
}

TEST(Simulation, SameInputsSameOutcome) {
  const std::vector<TraceRow> rows(Code().begin(), Code().begin() + 2000);
  const Workload workload = MakeWorkload("head", rows, ClusterModel{}, {.seed = 5, .load = 3.0});
  const Outcome once = Ours(workload, 5);
  const Outcome again = Ours(workload, 5);
  EXPECT_EQ(once.in_time, again.in_time);
  EXPECT_EQ(once.decisions, again.decisions);
  EXPECT_EQ(once.padding_waste, again.padding_waste);
}

class Promises : public testing::TestWithParam<uint64_t> {};

TEST_P(Promises, AtHalfAsMuchAgainAsCanBeDone) {
  SCOPED_TRACE(absl::StrCat("seed ", GetParam()));
  const Workload workload = CodeAt(1.5, GetParam());
  const Outcome& ours = OursAt(1.5, GetParam());
  const SimulationOptions options = {.seed = GetParam()};
  const Outcome oracle = BestOracle(workload, ClusterModel{}, options);
  const Outcome bucketed = Simulate(workload, ClusterModel{}, *MakeBucketedFcfsPolicy(), options);
  const Outcome fcfs = Simulate(workload, ClusterModel{}, *MakeFcfsPolicy(), options);
  EXPECT_GE(ours.goodput_per_second, 0.95 * oracle.goodput_per_second);
  EXPECT_GT(ours.goodput_per_second, 2.0 * bucketed.goodput_per_second);
  EXPECT_GT(ours.goodput_per_second, 2.0 * fcfs.goodput_per_second);
  EXPECT_LE(ours.wait[0].p99, 0.5 * bucketed.wait[0].p99);
  EXPECT_LE(ours.wait_any_fate[0].p99, bucketed.wait_any_fate[0].p99);
  EXPECT_LT(ours.ComputedWaste(), 0.10);
  // Nobody starves: every (tenant, class) gets its due, and dear requests are not merely those that
  // go.
  EXPECT_GE(ours.worst_cell, 0.75);
  EXPECT_GE(ours.worst_size, 0.4);
  EXPECT_GE(ours.jain_requests, 0.95);
}

INSTANTIATE_TEST_SUITE_P(Seeds, Promises, testing::Values(1, 2));

TEST(Simulation, EqualTenantsAreEqual) {
  const Outcome ours = Ours(CodeAt(1.5, 1, /*equal_tenants=*/8), 1);
  EXPECT_GE(ours.jain, 0.95);
  EXPECT_GE(ours.jain_requests, 0.99);
}

TEST(Simulation, ThreeTimesTheLoadTakesNothingAway) {
  const Outcome& at_half_more = OursAt(1.5, 1);
  const Outcome& at_three = OursAt(3.0, 1);
  EXPECT_GE(at_three.goodput_per_second, 0.97 * at_half_more.goodput_per_second);
  EXPECT_GE(at_three.useful_share, 0.97 * at_half_more.useful_share);
  EXPECT_LT(at_three.ComputedWaste(), 0.10);
}

// A class without deadlines is always served last by deadlines; its share keeps it moving under
// overload.
TEST(Simulation, WhatHasNoDeadlineIsServedUnderOverload) {
  const Workload workload = MakeWorkload("azure-code", Code(), ClusterModel{},
                                         {.seed = 1, .load = 1.5, .batch_without_deadline = true});
  const Outcome ours = Ours(workload, 1);
  EXPECT_EQ(ours.in_time_share[2], 1.0);
  EXPECT_LE(ours.wait[2].max, 0.5 * workload.span_seconds);
  EXPECT_GE(ours.goodput_share, 0.75);
}

TEST(Simulation, FewerStepsServeMoreRequests) {
  const Outcome& plain = OursAt(1.5, 1);
  const Outcome lowered = Ours(CodeAt(1.5, 1, 0, /*degrade_share=*/0.5), 1);
  EXPECT_GT(lowered.degraded, 100);
  EXPECT_GT(lowered.goodput_per_second, plain.goodput_per_second);
  // Not a single one is lowered while there is time.
  EXPECT_EQ(plain.degraded, 0);
}

TEST(Simulation, NoScheduleBeatsTheRelaxedBound) {
  std::vector<TraceRow> rows(Code().begin(), Code().begin() + 1200);
  const Workload workload = MakeWorkload("head", rows, ClusterModel{}, {.seed = 1, .load = 1.5});
  // Step noise is in nobody's favour on average; the bound knows nothing of it.
  const ClusterModel quiet = {.noise = 0.0, .outlier_share = 0.0};
  const double bound = RelaxedBound(workload, quiet);
  const Outcome oracle = BestOracle(workload, quiet, {.seed = 1});
  EXPECT_LE(static_cast<double>(oracle.in_time), bound);
  EXPECT_GE(static_cast<double>(oracle.in_time), 0.8 * bound);
}

// A ragged worker (nothing is padded) takes the same planner.
TEST(Simulation, RaggedWorkersWasteNothingOnPadding) {
  const ClusterModel ragged = {.pads = false};
  const std::vector<TraceRow> rows(Code().begin(), Code().begin() + 3000);
  const Workload workload = MakeWorkload("head", rows, ragged, {.seed = 1, .load = 1.5});
  const Outcome ours = Simulate(workload, ragged, *MakePlannerPolicy(), {.seed = 1});
  EXPECT_EQ(ours.padding_waste, 0.0);
  EXPECT_GE(ours.goodput_per_second,
            0.95 * BestOracle(workload, ragged, {.seed = 1}).goodput_per_second);
}

}  // namespace
}  // namespace cinnabar::sim
