// The sampler and the metrics behind it, against a made-up management library.
#include "worker/service/nvml_sampler.h"

#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "absl/time/clock.h"
#include "common/metrics/metrics.h"
#include "tests/support/fake_nvml.h"
#include "worker/service/device_monitor.h"
#include "worker/service/worker_metrics.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr char kAddress[] = "0000:4b:00.0";

std::string FakeLibrary() { return CINNABAR_FAKE_NVML; }

class NvmlSamplerTest : public testing::Test {
 protected:
  void SetUp() override {
    library_ = dlopen(FakeLibrary().c_str(), RTLD_NOW);
    ASSERT_NE(library_, nullptr) << dlerror();
    set_ = reinterpret_cast<decltype(&SetFakeNvml)>(dlsym(library_, "SetFakeNvml"));
    started_ = reinterpret_cast<decltype(&FakeNvmlStarted)>(dlsym(library_, "FakeNvmlStarted"));
    ASSERT_NE(set_, nullptr);
    ASSERT_NE(started_, nullptr);
    Set({});
  }
  void TearDown() override { dlclose(library_); }
  void Set(const FakeNvml& figures) { set_(&figures); }

  void* library_ = nullptr;
  decltype(&SetFakeNvml) set_ = nullptr;
  decltype(&FakeNvmlStarted) started_ = nullptr;
};

TEST_F(NvmlSamplerTest, WithoutLibraryOrDeviceItSaysWhich) {
  EXPECT_TRUE(absl::IsNotFound(NvmlSampler::Open("libno-such-nvml.so.1", kAddress).status()));
  const absl::Status other = NvmlSampler::Open(FakeLibrary(), "0000:01:00.0").status();
  EXPECT_TRUE(absl::IsNotFound(other));
  EXPECT_THAT(other.message(), HasSubstr("0000:01:00.0"));
  // A library that is there and is not NVML.
  EXPECT_TRUE(absl::IsFailedPrecondition(NvmlSampler::Open("libm.so.6", kAddress).status()));
  Set({.init_error = 9});  // the driver is not loaded
  EXPECT_TRUE(absl::IsUnavailable(NvmlSampler::Open(FakeLibrary(), kAddress).status()));
  EXPECT_EQ(started_(), 0);  // nothing was left open
}

TEST_F(NvmlSamplerTest, ReadsFiguresInSiUnitsAndEndsWhatItBegan) {
  Set({.power_mw = 412'500,
       .energy_mj = 7'000'000,
       .utilization_percent = 83,
       .memory_total = int64_t{141} << 30,
       .memory_used = int64_t{17} << 30});
  {
    auto sampler = NvmlSampler::Open(FakeLibrary(), kAddress);
    ASSERT_TRUE(sampler.ok()) << sampler.status();
    const DeviceReading reading = (*sampler)->Read(absl::UnixEpoch());
    EXPECT_DOUBLE_EQ(reading.power_watts, 412.5);
    EXPECT_DOUBLE_EQ(reading.energy_joules, 0);  // counted from here on
    EXPECT_DOUBLE_EQ(reading.utilization, 0.83);
    EXPECT_EQ(reading.memory_total_bytes, int64_t{141} << 30);
    EXPECT_EQ(reading.memory_used_bytes, int64_t{17} << 30);
    EXPECT_EQ(started_(), 1);
  }
  EXPECT_EQ(started_(), 0);
}

TEST_F(NvmlSamplerTest, EnergyFollowsTheCounterAndNeverFalls) {
  Set({.power_mw = 100'000, .energy_mj = 5'000});
  auto sampler = NvmlSampler::Open(FakeLibrary(), kAddress);
  ASSERT_TRUE(sampler.ok()) << sampler.status();
  Set({.power_mw = 100'000, .energy_mj = 6'250});
  EXPECT_DOUBLE_EQ((*sampler)->Read(absl::UnixEpoch()).energy_joules, 1.25);
  Set({.power_mw = 100'000, .energy_mj = 10});  // the driver was loaded anew
  EXPECT_DOUBLE_EQ((*sampler)->Read(absl::UnixEpoch() + absl::Hours(1)).energy_joules, 1.25);
}

TEST_F(NvmlSamplerTest, WithoutACounterEnergyIsPowerOverTime) {
  Set({.power_mw = 100'000});
  auto sampler = NvmlSampler::Open(FakeLibrary(), kAddress);
  ASSERT_TRUE(sampler.ok()) << sampler.status();
  EXPECT_DOUBLE_EQ((*sampler)->Read(absl::UnixEpoch()).energy_joules, 0);
  Set({.power_mw = 300'000});
  // Two seconds from 100 W to 300 W.
  EXPECT_DOUBLE_EQ((*sampler)->Read(absl::UnixEpoch() + absl::Seconds(2)).energy_joules, 400);
  EXPECT_DOUBLE_EQ((*sampler)->Read(absl::UnixEpoch() + absl::Seconds(2)).energy_joules, 400);
}

TEST_F(NvmlSamplerTest, WhatIsNotToldIsNotKnown) {
  auto sampler = NvmlSampler::Open(FakeLibrary(), kAddress);
  ASSERT_TRUE(sampler.ok()) << sampler.status();
  const DeviceReading reading = (*sampler)->Read(absl::UnixEpoch());
  EXPECT_EQ(reading.power_watts, -1);
  EXPECT_EQ(reading.energy_joules, -1);
  EXPECT_EQ(reading.utilization, -1);
  EXPECT_EQ(reading.memory_total_bytes, -1);
  EXPECT_EQ(reading.memory_used_bytes, -1);
}

// --- Metrics -------------------------------------------------------------------------------------

TEST(DeviceMetricsTest, NothingIsShownOfADeviceThatTellsNothing) {
  Metrics metrics;
  WorkerMetrics worker(metrics, "m", 0);
  worker.SetDevice({}, {});
  worker.StepDone(1, 2, 8, absl::Seconds(3));
  const std::string text = metrics.Render();
  EXPECT_THAT(text, Not(HasSubstr("\ncinnabar_device_power_watts{")));
  EXPECT_THAT(text, Not(HasSubstr("\ncinnabar_device_energy_joules_total{")));
  EXPECT_THAT(text, Not(HasSubstr("\ncinnabar_device_memory_bytes{")));
  EXPECT_THAT(text, Not(HasSubstr("\ncinnabar_device_graph_steps_total{")));
  EXPECT_THAT(text, HasSubstr("cinnabar_device_busy_seconds_total{model=\"m\"} 3\n"));
}

TEST(DeviceMetricsTest, EnergyStandsBesideTheTokensThatItMade) {
  Metrics metrics;
  WorkerMetrics worker(metrics, "m", 0);
  worker.SetDevice({}, {.power_watts = 300, .energy_joules = 0});
  worker.StepDone(2, 8, 8, absl::Seconds(1));
  worker.StepDone(2, 4, 8, absl::Seconds(1));
  worker.SetDevice({}, {.power_watts = 310.5,
                        .energy_joules = 600,
                        .utilization = 0.5,
                        .memory_total_bytes = 1000,
                        .memory_used_bytes = 400});
  // 600 J for 12 tokens: 50 J a token, by division of two counters with the same labels.
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("cinnabar_device_energy_joules_total{model=\"m\"} 600\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_tokens_total{direction=\"output\",model=\"m\"} 12\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_device_power_watts{model=\"m\"} 310.5\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_device_utilization_ratio{model=\"m\"} 0.5\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_device_memory_bytes{model=\"m\",state=\"used\"} 400\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_device_memory_bytes{model=\"m\",state=\"free\"} 600\n"));
}

TEST(DeviceMetricsTest, TheDevicesOwnClockReplacesTheHosts) {
  Metrics metrics;
  WorkerMetrics worker(metrics, "m", 0);
  worker.SetDevice({.busy_seconds = 0}, {});
  worker.StepDone(1, 2, 8, absl::Seconds(3));
  worker.SetDevice({.memory_total_bytes = 100,
                    .memory_free_bytes = 30,
                    .busy_seconds = 2.5,
                    .graph_hits = 7,
                    .graph_misses = 1},
                   {});
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("cinnabar_device_busy_seconds_total{model=\"m\"} 2.5\n"));
  EXPECT_THAT(text,
              HasSubstr("cinnabar_device_graph_steps_total{model=\"m\",outcome=\"hit\"} 7\n"));
  EXPECT_THAT(text,
              HasSubstr("cinnabar_device_graph_steps_total{model=\"m\",outcome=\"miss\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_device_memory_bytes{model=\"m\",state=\"used\"} 70\n"));
}

TEST(DeviceMetricsTest, WhatWasComputedForNothingIsNotUseful) {
  Metrics metrics;
  WorkerMetrics worker(metrics, "m", 0);
  worker.Set(EngineCounters{.rows_computed = 40});
  EXPECT_THAT(metrics.Render(), Not(HasSubstr("\ncinnabar_ahead_steps_total{")));
  worker.Set(
      EngineCounters{.rows_computed = 100, .ahead_used = 9, .ahead_dropped = 2, .rows_wasted = 30});
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("cinnabar_token_steps_total{kind=\"useful\",model=\"m\"} 70\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_token_steps_total{kind=\"discarded\",model=\"m\"} 30\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_ahead_steps_total{model=\"m\",outcome=\"used\"} 9\n"));
  EXPECT_THAT(text, HasSubstr("cinnabar_ahead_steps_total{model=\"m\",outcome=\"dropped\"} 2\n"));
}

TEST_F(NvmlSamplerTest, TheMonitorShowsWhatChangesWhileItRuns) {
  Set({.power_mw = 100'000, .energy_mj = 1'000});
  auto sampler = NvmlSampler::Open(FakeLibrary(), kAddress);
  ASSERT_TRUE(sampler.ok()) << sampler.status();
  const auto backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
  Metrics metrics;
  WorkerMetrics worker(metrics, "m", 0);
  Set({.power_mw = 100'000, .energy_mj = 3'000});
  const DeviceMonitor monitor(*backend, *std::move(sampler), worker, absl::Milliseconds(1));
  // Shown at once, and again by its thread.
  EXPECT_THAT(metrics.Render(), HasSubstr("cinnabar_device_energy_joules_total{model=\"m\"} 2\n"));
  const absl::Time deadline = absl::Now() + absl::Seconds(30);
  Set({.power_mw = 100'000, .energy_mj = 4'000});
  while (metrics.Render().find("cinnabar_device_energy_joules_total{model=\"m\"} 3\n") ==
         std::string::npos) {
    ASSERT_LT(absl::Now(), deadline);
  }
}

}  // namespace
}  // namespace cinnabar
