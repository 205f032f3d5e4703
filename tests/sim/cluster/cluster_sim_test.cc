#include "tests/sim/cluster/cluster_sim.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/log.h"

namespace cinnabar {
namespace {

class ClusterSimTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    InitLog({.program = "sim", .level = LogLevel::kError});
    auto redis = VirtualRedis::Start();
    ASSERT_TRUE(redis.ok()) << redis.status();
    redis_ = redis->release();
    models_ = new SimModels;
    models_->backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
    const char* source = std::getenv("CINNABAR_SOURCE_DIR");
    const std::string path =
        absl::StrCat(source == nullptr ? "." : source, "/tests/golden/models/llada");
    for (int32_t i = 0; i <= kSimWorkers; ++i) {
      auto denoiser = LoadDenoiser(path, *models_->backend, {}, kSimLimits);
      ASSERT_TRUE(denoiser.ok()) << denoiser.status();
      (i < kSimWorkers ? models_->workers.emplace_back() : models_->reference) =
          *std::move(denoiser);
    }
  }
  static void TearDownTestSuite() {
    delete models_;
    delete redis_;
  }

  static VirtualRedis* redis_;
  static SimModels* models_;
};
VirtualRedis* ClusterSimTest::redis_ = nullptr;
SimModels* ClusterSimTest::models_ = nullptr;

TEST_F(ClusterSimTest, NothingIsLostCountedTwiceOrChangedWhateverHappens) {
  // CINNABAR_SIM_SEED runs that one alone, and shows what happened in it.
  const char* only = std::getenv("CINNABAR_SIM_SEED");
  SimReport total;
  const uint64_t first = only == nullptr ? 0 : std::strtoull(only, nullptr, 10);
  const uint64_t last = only == nullptr ? 199 : first;
  for (uint64_t seed = first; seed <= last; ++seed) {
    const SimReport report = SimulateCluster(*redis_, *models_, seed);
    EXPECT_THAT(report.violations, testing::IsEmpty()) << "CINNABAR_SIM_SEED=" << seed;
    if (only != nullptr) std::cout << report.trace;
    total.done += report.done;
    total.cancelled += report.cancelled;
    total.expired += report.expired;
    total.kills += report.kills;
    total.freezes += report.freezes;
    total.drains += report.drains;
    total.outages += report.outages;
    total.rewinds += report.rewinds;
    total.replays += report.replays;
  }
  const std::string summary = absl::StrCat(
      total.done, " done, ", total.cancelled, " cancelled, ", total.expired, " expired; ",
      total.kills, " kills, ", total.freezes, " freezes, ", total.drains, " drains, ",
      total.outages, " outages, ", total.rewinds, " rewinds, ", total.replays, " replays");
  std::cout << summary << "\n";
  if (only != nullptr) return;
  // The simulation does what it is for.
  EXPECT_GT(total.done, 1000) << summary;
  EXPECT_GT(total.cancelled, 20) << summary;
  EXPECT_GT(total.expired, 20) << summary;
  EXPECT_GT(total.kills, 100) << summary;
  EXPECT_GT(total.rewinds, 20) << summary;
  EXPECT_GT(total.replays, 5) << summary;
}

TEST_F(ClusterSimTest, ASeedIsOneRun) {
  for (const uint64_t seed : {1, 2, 3, 7, 11}) {
    const SimReport first = SimulateCluster(*redis_, *models_, seed);
    const SimReport second = SimulateCluster(*redis_, *models_, seed);
    EXPECT_EQ(first.trace, second.trace) << seed;
  }
}

TEST_F(ClusterSimTest, ABrokenQueueIsNoticed) {
  const LibraryEdit edits[] = {
      {"call('XADD', P .. 'ledger', '*', 'v', 1,", "call('EXISTS', P .. 'ledger', '*', 'v', 1,"},
      {"if upto > from then", "if false then"},  // steps are not kept for the next attempt
      {"call('HSET', P .. 'tot', 'n', (tonumber(tot[1]) or 0) - 1,",
       "call('HSET', P .. 'tot', 'n', (tonumber(tot[1]) or 0),"},
  };
  for (const LibraryEdit& edit : edits) {
    bool noticed = false;
    for (uint64_t seed = 1; !noticed && seed < 40; seed += 2) {
      noticed = !SimulateCluster(*redis_, *models_, seed, &edit).violations.empty();
    }
    EXPECT_TRUE(noticed) << edit.replace;
  }
}

}  // namespace
}  // namespace cinnabar
