// What a load test is made of: arrivals, traces, bodies, percentiles.
#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/arrivals.h"
#include "cli/latency_histogram.h"
#include "cli/load_generator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;

TEST(LatencyHistogramTest, AgreesWithSortingWithinOnePercent) {
  LatencyHistogram histogram;
  std::vector<int64_t> values;
  uint64_t state = 7;
  for (int i = 0; i < 20000; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    const double uniform = static_cast<double>(state >> 11) / 9007199254740992.0;
    values.push_back(static_cast<int64_t>(std::exp(uniform * 16.0)));  // 1 us to 9 s
    histogram.Record(absl::Microseconds(values.back()));
  }
  std::sort(values.begin(), values.end());
  for (const double percent : {0.0, 1.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9, 100.0}) {
    SCOPED_TRACE(percent);
    const auto rank = std::max<size_t>(
        1, static_cast<size_t>(std::ceil(percent / 100.0 * static_cast<double>(values.size()))));
    const auto want = static_cast<double>(values[rank - 1]);
    const auto got = static_cast<double>(absl::ToInt64Microseconds(histogram.Percentile(percent)));
    EXPECT_GE(got, want);
    EXPECT_LE(got, want * 1.01 + 1.0);
  }
  EXPECT_EQ(histogram.max(), absl::Microseconds(values.back()));
}

TEST(LatencyHistogramTest, SmallValuesAreExactAndEndsAreKept) {
  LatencyHistogram histogram;
  EXPECT_EQ(histogram.Percentile(99), absl::ZeroDuration());
  EXPECT_EQ(histogram.mean(), absl::ZeroDuration());
  for (int us = 0; us < 200; ++us) histogram.Record(absl::Microseconds(us));
  EXPECT_EQ(histogram.Percentile(50), absl::Microseconds(99));
  EXPECT_EQ(histogram.mean(), absl::Nanoseconds(99500));
  histogram.Record(absl::Seconds(-1));
  histogram.Record(absl::Hours(24 * 365));
  EXPECT_EQ(histogram.count(), 202);
  EXPECT_EQ(histogram.Percentile(0), absl::ZeroDuration());
  EXPECT_GT(histogram.Percentile(100), absl::Hours(24 * 12));
}

TEST(LatencyHistogramTest, MergingIsRecordingBoth) {
  LatencyHistogram a;
  LatencyHistogram b;
  LatencyHistogram both;
  for (int us = 1; us < 5000; us += 7) {
    (us % 2 == 0 ? a : b).Record(absl::Microseconds(us));
    both.Record(absl::Microseconds(us));
  }
  a.Merge(b);
  EXPECT_EQ(a.count(), both.count());
  EXPECT_EQ(a.mean(), both.mean());
  for (const double percent : {1.0, 50.0, 99.0}) {
    EXPECT_EQ(a.Percentile(percent), both.Percentile(percent));
  }
}

TEST(ArrivalsTest, PoissonHasItsRateAndItsSpread) {
  const auto schedule = MakeRateSchedule(50.0, ArrivalKind::kPoisson, 3);
  constexpr int kCount = 20000;
  double previous = 0.0;
  double sum = 0.0;
  double squares = 0.0;
  for (int i = 0; i <= kCount; ++i) {
    const double at = absl::ToDoubleSeconds(schedule->Next()->at);
    ASSERT_GE(at, previous);
    if (i > 0) {
      sum += at - previous;
      squares += (at - previous) * (at - previous);
    }
    previous = at;
  }
  const double mean = sum / kCount;
  // The standard error of the mean of exponential gaps is mean / sqrt(count): 0.7%.
  EXPECT_NEAR(mean, 0.02, 0.02 * 0.03);
  EXPECT_NEAR(std::sqrt(squares / kCount - mean * mean) / mean, 1.0, 0.05);
}

TEST(ArrivalsTest, UniformDoesNotDriftAndSeedsRepeat) {
  const auto uniform = MakeRateSchedule(3.0, ArrivalKind::kUniform, 1);
  for (int i = 0; i <= 3000; ++i) {
    EXPECT_EQ(uniform->Next()->at, absl::Seconds(static_cast<double>(i) / 3.0));
  }
  const auto a = MakeRateSchedule(10.0, ArrivalKind::kPoisson, 5);
  const auto b = MakeRateSchedule(10.0, ArrivalKind::kPoisson, 5);
  const auto c = MakeRateSchedule(10.0, ArrivalKind::kPoisson, 6);
  a->Next();
  b->Next();
  c->Next();
  const absl::Duration first = a->Next()->at;
  EXPECT_EQ(first, b->Next()->at);
  EXPECT_NE(first, c->Next()->at);
}

class TraceTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) / "cinnabar_traces";
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = (folder_ / name).string();
    std::ofstream(path) << text;
    return path;
  }
  std::filesystem::path folder_;
};

TEST_F(TraceTest, Azure) {
  // As published: no newline after the last row, sometimes carriage returns.
  const auto rows = ReadTrace(Write("a.csv",
                                    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
                                    "2023-11-16 18:17:03.9799600,4808,10\r\n"
                                    "2023-11-16 18:17:04.0319600,3180,8"),
                              1);
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 2U);
  EXPECT_EQ((*rows)[0].at, absl::ZeroDuration());
  EXPECT_EQ((*rows)[1].at, absl::Milliseconds(52));
  EXPECT_EQ((*rows)[0].prompt_tokens, 4808);
  EXPECT_EQ((*rows)[1].output_tokens, 8);
}

TEST_F(TraceTest, MooncakeIsSortedAndStartsAtZero) {
  const auto rows = ReadTrace(
      Write("m.jsonl",
            "{\"timestamp\": 3000, \"input_length\": 7, \"output_length\": 5, \"hash_ids\": [1]}\n"
            "{\"timestamp\": 1000, \"input_length\": 9, \"output_length\": 3, \"hash_ids\": []}\n"),
      1);
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 2U);
  EXPECT_EQ((*rows)[0].prompt_tokens, 9);
  EXPECT_EQ((*rows)[0].at, absl::ZeroDuration());
  EXPECT_EQ((*rows)[1].at, absl::Seconds(2));
}

TEST_F(TraceTest, ServeGenTablesGiveTheirRate) {
  // A Gamma of shape 2 and scale 0.1 has a mean gap of 0.2 s: 5 a second in the first window.
  const std::string table = "0,5.0,0.7,Gamma,2.0,0.1\n600,0.0,0,,,\n1200,2.0,1,,,\n";
  const auto rows = ReadTrace(Write("chunk-0-trace.csv", table), 11);
  ASSERT_TRUE(rows.ok()) << rows.status();
  const auto in_first = std::count_if(
      rows->begin(), rows->end(), [](const Arrival& row) { return row.at < absl::Minutes(10); });
  EXPECT_NEAR(static_cast<double>(in_first), 3000.0, 150.0);
  EXPECT_NEAR(static_cast<double>(rows->size()) - static_cast<double>(in_first), 1200.0, 150.0);
  Write("chunk-1-trace.csv", "0,1.0,1,Weibull,1.0,1.0\n");
  const auto both = ReadTrace(folder_.string(), 11);
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_GT(both->size(), rows->size());
  EXPECT_EQ(
      std::count_if(both->begin(), both->end(), [](const Arrival& row) { return row.tenant == 0; }),
      static_cast<int64_t>(rows->size()));
}

TEST_F(TraceTest, ErrorsNameTheLine) {
  const struct {
    std::string text;
    std::string words;
  } cases[] = {
      {"", "an empty trace"},
      {"hello\n", "x:1: expected a trace"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n", "without requests"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,1,2\nyesterday,1,2\n",
       "x:3:"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,-1,2\n", "x:2:"},
      {"{\"timestamp\": 1}\n", "input_length"},
      {"{\"timestamp\": 1, \"input_length\": 1, \"output_length\": 1}\n[\n", "x:2"},
      {"0,1,2\n1,2\n", "x:2:"},
      {"0,5.0,0.7,Gamma,-2.0,0.1\n", "above 0"},
  };
  for (const auto& c : cases) {
    const auto rows = ReadTrace(Write("x", c.text), 1);
    ASSERT_EQ(rows.status().code(), absl::StatusCode::kInvalidArgument) << c.text;
    EXPECT_THAT(std::string(rows.status().message()), HasSubstr(c.words));
  }
  EXPECT_THAT(std::string(ReadTrace("/nowhere/x", 1).status().message()), HasSubstr("/nowhere/x"));
}

TEST_F(TraceTest, TheCommittedFixtureReads) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  ASSERT_NE(source, nullptr);
  const auto rows =
      ReadTrace(absl::StrCat(source, "/tests/sim/scheduler/fixtures/azure_code.csv"), 1);
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_GT(rows->size(), 1000U);
}

TEST(TraceScheduleTest, ScalesTimeAndRepeats) {
  const std::vector<Arrival> rows = {{.at = absl::ZeroDuration(), .prompt_tokens = 1},
                                     {.at = absl::Seconds(4), .prompt_tokens = 2}};
  const auto once = MakeTraceSchedule(rows, 2.0, false);
  EXPECT_EQ(once->Next()->at, absl::ZeroDuration());
  EXPECT_EQ(once->Next()->at, absl::Seconds(2));
  EXPECT_FALSE(once->Next().has_value());
  const auto round = MakeTraceSchedule(rows, 1.0, true);
  absl::Duration previous = -absl::Seconds(1);
  for (int i = 0; i < 7; ++i) {
    const auto arrival = round->Next();
    ASSERT_TRUE(arrival.has_value());
    EXPECT_EQ(arrival->prompt_tokens, 1 + i % 2);
    EXPECT_GT(arrival->at, previous);
    previous = arrival->at;
  }
}

TEST(TraceScheduleTest, CanvasIsAPowerOfTwoInBlocks) {
  EXPECT_EQ(CanvasForOutput(0), 32);
  EXPECT_EQ(CanvasForOutput(10), 32);
  EXPECT_EQ(CanvasForOutput(33), 64);
  EXPECT_EQ(CanvasForOutput(64), 64);
  EXPECT_EQ(CanvasForOutput(500), 512);
}

TEST(LoadBodyTest, FollowsOptionsAndTrace) {
  LoadOptions options;
  options.body = {{"model", "m"}, {"temperature", 0}};
  options.stream = true;
  options.deadline = absl::Milliseconds(1500);
  options.prompt_tokens = 100;
  options.canvas_tokens = 96;
  const auto plain = MakeLoadBody(options, {}, 4);
  EXPECT_EQ(plain["model"], "m");
  EXPECT_EQ(plain["temperature"], 0);
  EXPECT_EQ(plain["max_tokens"], 96);
  EXPECT_EQ(plain["diffusion"]["steps"], 48);
  EXPECT_EQ(plain["diffusion"]["deadline_seconds"], 1.5);
  EXPECT_EQ(plain["stream_options"]["include_usage"], true);
  EXPECT_EQ(plain["seed"], 4);
  const std::string words = plain["prompt"];
  EXPECT_EQ(std::count(words.begin(), words.end(), ' '), 99);
  EXPECT_EQ(plain, MakeLoadBody(options, {}, 4));
  EXPECT_NE(plain["prompt"], MakeLoadBody(options, {}, 5)["prompt"]);

  const auto traced = MakeLoadBody(options, {.prompt_tokens = 3, .output_tokens = 40}, 0);
  EXPECT_EQ(traced["max_tokens"], 64);
  const std::string few = traced["prompt"];
  EXPECT_EQ(std::count(few.begin(), few.end(), ' '), 2);
  // The options bound what a trace asks for.
  EXPECT_EQ(MakeLoadBody(options, {.prompt_tokens = 9999, .output_tokens = 4000}, 0)["max_tokens"],
            96);

  options.endpoint = ApiEndpoint::kFim;
  EXPECT_TRUE(MakeLoadBody(options, {}, 0).contains("suffix"));
  options.endpoint = ApiEndpoint::kChat;
  EXPECT_EQ(MakeLoadBody(options, {}, 0)["messages"][0]["role"], "user");
  options.body["diffusion"] = nullptr;
  EXPECT_FALSE(MakeLoadBody(options, {}, 0).contains("diffusion"));
}

TEST(LoadBodyTest, TheMixHasItsShares) {
  std::array<int, 3> counts = {};
  for (uint64_t index = 0; index < 10000; ++index) ++counts[LoadClassOf(9, index)];
  EXPECT_NEAR(counts[0], 5000, 200);
  EXPECT_NEAR(counts[1], 3500, 200);
  EXPECT_NEAR(counts[2], 1500, 200);
}

}  // namespace
}  // namespace cinnabar
