// What `cinnabar top` works out of looks at a cluster, and how it shows it.
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "cli/cluster_meter.h"
#include "cli/metrics_text.h"
#include "cli/terminal.h"
#include "cli/top_view.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(MetricsTextTest, SumsByLabels) {
  const auto metrics = MetricsText::Parse(
      "# HELP a_total words {\"\n# TYPE a_total counter\n"
      "a_total{model=\"m\",outcome=\"ok\"} 3\n"
      "a_total{model=\"n \\\"x\\\" {}\",outcome=\"ok\"} 4 1700000000000\n"
      "a_total{model=\"m\",outcome=\"error\"} 1e2\n\n"
      "b 0.5\r\na_total_more 9\n");
  ASSERT_TRUE(metrics.ok()) << metrics.status();
  EXPECT_EQ(metrics->Sum("a_total"), 107.0);
  EXPECT_EQ(metrics->Sum("a_total", {{"outcome", "ok"}}), 7.0);
  EXPECT_EQ(metrics->Sum("a_total", {{"model", "n \"x\" {}"}}), 4.0);
  EXPECT_EQ(metrics->Sum("a_total", {{"model", "m"}, {"outcome", "ok"}}), 3.0);
  EXPECT_EQ(metrics->Sum("b"), 0.5);
  EXPECT_EQ(metrics->Sum("nothing"), 0.0);
}

TEST(MetricsTextTest, ErrorsNameTheLine) {
  for (const char* line :
       {"a", "a x", "a{b=\"c} 1", "a{b} 1", "{a=\"b\"} 1", "<html>", "a{b=\"\\"}) {
    const auto metrics = MetricsText::Parse(absl::StrCat("ok 1\n", line, "\n"));
    ASSERT_EQ(metrics.status().code(), absl::StatusCode::kInvalidArgument) << line;
    EXPECT_THAT(std::string(metrics.status().message()), HasSubstr("line 2"));
  }
}

TEST(MetricsTextTest, QuantilesOfWhatCameBetween) {
  const auto before = MetricsText::Parse(
      "h_bucket{le=\"1\"} 100\nh_bucket{le=\"2\"} 100\nh_bucket{le=\"+Inf\"} 100\n");
  const auto now = MetricsText::Parse(
      "h_bucket{le=\"1\",model=\"m\"} 110\nh_bucket{le=\"2\",model=\"m\"} 120\n"
      "h_bucket{le=\"+Inf\",model=\"m\"} 120\nh_bucket{le=\"+Inf\",model=\"n\"} 1\n");
  ASSERT_TRUE(before.ok() && now.ok());
  const auto old = before->Buckets("h");
  const auto buckets = now->Buckets("h");
  EXPECT_EQ(buckets.at(std::numeric_limits<double>::infinity()), 121.0);
  // 10 came up to 1, 10 more up to 2, one above.
  EXPECT_NEAR(BucketQuantile(old, buckets, 0.25), 0.525, 1e-9);
  EXPECT_EQ(BucketQuantile(old, buckets, 0.999), 2.0);  // over the last bound
  EXPECT_TRUE(std::isnan(BucketQuantile(buckets, buckets, 0.5)));
  EXPECT_TRUE(std::isnan(BucketQuantile({}, {}, 0.5)));
}

// A beat `seconds` after the start of a worker that commits 2 tokens in each of 50 steps a second,
// each of 10 ms, on 2 rows.
v1::WorkerStatus Beat(const std::string& name, double seconds) {
  v1::WorkerStatus status;
  status.set_worker(name);
  status.set_model("m");
  status.set_device("cpu");
  status.set_rows_max(8);
  status.set_uptime_seconds(seconds);
  status.set_forwards(static_cast<int64_t>(50 * seconds));
  status.set_samples_end(static_cast<int64_t>(50 * seconds));
  status.set_steps(static_cast<int64_t>(100 * seconds));
  status.set_tokens_committed(static_cast<int64_t>(200 * seconds));
  status.set_device_busy_seconds(0.5 * seconds);
  status.set_dollars_per_hour(3.6);
  for (int i = 0; i < 2; ++i) status.add_rows()->set_sequence_tokens(100);
  return status;
}

ClusterLook Look(double at, std::vector<std::pair<std::string, v1::WorkerStatus>> workers) {
  ClusterLook look;
  look.at = absl::UnixEpoch() + absl::Seconds(at);
  look.workers = std::move(workers);
  return look;
}

TEST(ClusterMeterTest, RatesFollowTheWorkersOwnClock) {
  ClusterMeter meter;
  meter.Take(Look(0, {{"b0", Beat("w-0", 10)}, {"b1", Beat("w-1", 20)}}));
  EXPECT_FALSE(meter.Complete());
  EXPECT_FALSE(meter.Figures().tokens_per_second.has_value());
  // Looked at late, and w-1 has said nothing new yet: its rates are unknown, not zero.
  meter.Take(Look(1.7, {{"b0", Beat("w-0", 11)}, {"b1", Beat("w-1", 20)}}));
  EXPECT_FALSE(meter.Complete());
  EXPECT_DOUBLE_EQ(*meter.Figures().tokens_per_second, 200.0);
  meter.Take(Look(2.5, {{"b0", Beat("w-0", 12)}, {"b1", Beat("w-1", 21)}}));
  EXPECT_TRUE(meter.Complete());
  const ClusterFigures figures = meter.Figures();
  ASSERT_EQ(figures.workers.size(), 2U);
  const WorkerFigures& worker = figures.workers[0];
  EXPECT_EQ(worker.name, "w-0");
  EXPECT_EQ(worker.state, WorkerFigures::State::kBusy);
  EXPECT_EQ(worker.rows, 2);
  EXPECT_EQ(worker.positions, 200);
  EXPECT_DOUBLE_EQ(*worker.step_seconds, 0.01);
  EXPECT_DOUBLE_EQ(*worker.busy_ratio, 0.5);
  EXPECT_DOUBLE_EQ(*worker.tokens_per_forward, 2.0);
  EXPECT_DOUBLE_EQ(*figures.tokens_per_second, 400.0);
  EXPECT_DOUBLE_EQ(*figures.forwards_per_second, 100.0);
  EXPECT_DOUBLE_EQ(*figures.tokens_per_forward, 2.0);
  EXPECT_DOUBLE_EQ(*figures.busy_ratio, 0.5);
  EXPECT_DOUBLE_EQ(figures.dollars_per_second, 0.002);
  EXPECT_DOUBLE_EQ(*figures.dollars_per_million_tokens, 5.0);
  EXPECT_EQ(figures.rows, 4);
  EXPECT_EQ(figures.tokens_history.size(), 2U);
}

TEST(ClusterMeterTest, TheWindowForgets) {
  ClusterMeter meter(absl::Seconds(5));
  v1::WorkerStatus status = Beat("w", 0);
  for (int second = 0; second <= 20; ++second) {
    // Fast for ten seconds, then nothing.
    status.set_uptime_seconds(second);
    status.set_tokens_committed(1000 * std::min(second, 10));
    meter.Take(Look(second, {{"b", status}}));
    if (second == 10) {
      EXPECT_DOUBLE_EQ(*meter.Figures().tokens_per_second, 1000.0);
    }
  }
  EXPECT_DOUBLE_EQ(*meter.Figures().tokens_per_second, 0.0);
}

TEST(ClusterMeterTest, ARestartedWorkerStartsAnewAndALostOneIsGone) {
  ClusterMeter meter;
  meter.Take(Look(0, {{"b0", Beat("w-0", 100)}, {"b1", Beat("w-1", 100)}}));
  meter.Take(Look(1, {{"b9", Beat("w-0", 1)}}));
  ClusterFigures figures = meter.Figures();
  ASSERT_EQ(figures.workers.size(), 2U);
  EXPECT_EQ(figures.workers[0].state, WorkerFigures::State::kBusy);
  EXPECT_FALSE(figures.workers[0].tokens_per_second.has_value());
  EXPECT_EQ(figures.workers[1].state, WorkerFigures::State::kGone);
  EXPECT_EQ(figures.rows, 2);  // those of the lost one are nowhere
  EXPECT_DOUBLE_EQ(figures.dollars_per_second, 0.001);
  meter.Take(Look(40, {{"b9", Beat("w-0", 40)}}));
  EXPECT_EQ(meter.Figures().workers.size(), 1U);
}

FeedEntry Ended(RequestState state, int64_t forwards, int64_t device_us) {
  FeedEntry entry;
  entry.kind = FeedEntry::Kind::kTerminal;
  entry.state = state;
  entry.usage = {.output_tokens = 8, .forwards = forwards, .device_us = device_us};
  return entry;
}

TEST(ClusterMeterTest, WasteIsDeviceTimeWithoutAnAnswer) {
  ClusterMeter meter;
  ClusterLook first = Look(0, {});
  first.ended.Add(Ended(RequestState::kDone, 99, 99));  // before the window began
  meter.Take(first);
  ClusterLook look = Look(2, {});
  look.ended.Add(Ended(RequestState::kDone, 10, 3000));
  look.ended.Add(Ended(RequestState::kDone, 20, 3000));
  look.ended.Add(Ended(RequestState::kCancelled, 5, 1500));
  look.ended.Add(Ended(RequestState::kExpired, 0, 0));
  look.ended.Add(Ended(RequestState::kFailed, 1, 500));
  look.ended.Add(FeedEntry{});  // one that starts waiting
  meter.Take(look);
  const ClusterFigures figures = meter.Figures();
  EXPECT_DOUBLE_EQ(*figures.done_per_second, 1.0);
  EXPECT_DOUBLE_EQ(*figures.cancelled_per_second, 0.5);
  EXPECT_DOUBLE_EQ(*figures.expired_per_second, 0.5);
  EXPECT_DOUBLE_EQ(*figures.failed_per_second, 0.5);
  EXPECT_DOUBLE_EQ(*figures.forwards_per_answer, 15.0);
  EXPECT_DOUBLE_EQ(*figures.waste_ratio, 0.25);
}

TEST(ClusterMeterTest, TheGatewaysCountersBecomeRates) {
  const auto look = [](double at, const std::string& text) {
    ClusterLook look = Look(at, {});
    look.gateway = *MetricsText::Parse(text);
    return look;
  };
  ClusterMeter meter;
  meter.Take(look(0,
                  "cinnabar_gateway_requests_total{outcome=\"ok\"} 10\n"
                  "cinnabar_price_dollars_total 1\ncinnabar_gateway_open_streams 3\n"));
  EXPECT_FALSE(meter.Figures().gateway->requests_per_second.has_value());
  EXPECT_EQ(meter.Figures().gateway->streams, 3.0);
  meter.Take(look(2,
                  "cinnabar_gateway_requests_total{outcome=\"ok\"} 30\n"
                  "cinnabar_price_dollars_total 1.5\n"
                  "cinnabar_gateway_request_duration_seconds_bucket{le=\"0.1\"} 20\n"
                  "cinnabar_gateway_request_duration_seconds_bucket{le=\"+Inf\"} 20\n"));
  const GatewayFigures figures = *meter.Figures().gateway;
  EXPECT_DOUBLE_EQ(*figures.requests_per_second, 10.0);
  EXPECT_DOUBLE_EQ(*figures.price_dollars_per_second, 0.25);
  EXPECT_DOUBLE_EQ(*figures.p50_seconds, 0.05);
  EXPECT_FALSE(figures.first_p50_seconds.has_value());
  // Restarted: its counters begin anew, and nothing is negative.
  meter.Take(look(3, "cinnabar_gateway_requests_total{outcome=\"ok\"} 1\n"));
  EXPECT_FALSE(meter.Figures().gateway->requests_per_second.has_value());
}

TEST(ClusterMeterTest, JsonSaysNullWhereNothingIsKnown) {
  ClusterMeter meter;
  meter.Take(Look(1, {{"b", Beat("w", 1)}}));
  const nlohmann::json json = meter.Figures().ToJson();
  EXPECT_TRUE(json["tokens_per_second"].is_null());
  EXPECT_TRUE(json["gateway"].is_null());
  EXPECT_EQ(json["workers"][0]["state"], "busy");
  EXPECT_EQ(json["queue"]["waiting"]["batch"], 0);
}

std::vector<std::string> Lines(const std::string& screen) {
  std::vector<std::string> lines = absl::StrSplit(screen, '\n');
  EXPECT_EQ(lines.back(), "");
  lines.pop_back();
  return lines;
}

TEST(TopViewTest, FitsAnyTerminal) {
  ClusterMeter meter;
  for (int second = 0; second < 5; ++second) {
    ClusterLook look = Look(second, {});
    for (int i = 0; i < 30; ++i) {
      const std::string name = absl::StrCat("worker-", i + 10, "-of-a-machine-with-a-long-name");
      look.workers.emplace_back(name, Beat(name, second + 1));
    }
    look.queue.waiting = {1234567, 2, 3};
    look.queue.dead_letters = 7;
    look.gateway = *MetricsText::Parse("cinnabar_gateway_open_streams 3\n");
    meter.Take(look);
  }
  for (const bool colour : {false, true}) {
    for (const int32_t columns : {20, 60, 79, 200}) {
      for (const int32_t lines : {5, 15, 23, 60}) {
        const std::string screen = RenderTop(meter.Figures(), {.title = "127.0.0.1:6379 default",
                                                               .problem = "Redis is \033[2Jaway",
                                                               .columns = columns,
                                                               .lines_max = lines,
                                                               .colour = colour});
        EXPECT_LE(Lines(screen).size(), static_cast<size_t>(lines));
        for (const std::string& line : Lines(screen)) {
          EXPECT_LE(DisplayWidth(line), columns) << line;
        }
        EXPECT_THAT(screen, Not(HasSubstr("\033[2J")));
        if (!colour) {
          EXPECT_THAT(screen, Not(HasSubstr("\033")));
        }
      }
    }
  }
  const std::string wide =
      RenderTop(meter.Figures(), {.title = "t", .columns = 200, .lines_max = 30});
  EXPECT_THAT(wide, HasSubstr("1,234,567 waiting"));
  EXPECT_THAT(wide, HasSubstr("7 dead letters"));
  EXPECT_THAT(wide, HasSubstr("6,000 tokens/s"));
  EXPECT_THAT(wide, HasSubstr("50% busy"));
  EXPECT_THAT(Lines(wide).back(), HasSubstr("more"));
}

TEST(TopViewTest, WithoutWorkersItSaysWhatToStart) {
  ClusterMeter meter;
  meter.Take(Look(0, {}));
  EXPECT_THAT(RenderTop(meter.Figures(), {}), HasSubstr("cinnabar-worker"));
}

TEST(TopViewTest, SparklinesShowTheLast) {
  EXPECT_EQ(Sparkline({9, 0, 4, 8}, 3), "▁▅█");
  EXPECT_EQ(Sparkline({0, 0}, 10), "▁▁");
  EXPECT_EQ(Sparkline({}, 10), "");
  EXPECT_EQ(Sparkline({1}, 0), "");
}

}  // namespace
}  // namespace cinnabar
