#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/log.h"
#include "common/metrics/metrics.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr absl::Time kStart = absl::UnixEpoch();

std::string Line(std::initializer_list<LogField> fields, bool json = false) {
  return FormatLogLine({.program = "gateway", .json = json}, kStart, LogLevel::kWarn, "tried",
                       fields);
}

int64_t NumSeries(const std::string& scrape) {
  const std::vector<std::string> lines = absl::StrSplit(scrape, '\n', absl::SkipEmpty());
  return std::count_if(lines.begin(), lines.end(),
                       [](const std::string& line) { return line.front() != '#'; });
}

TEST(LogTest, ALineNamesItsProgram) {
  const std::string name(64, 'p');  // longer than a string keeps inside itself
  EXPECT_THAT(FormatLogLine({.program = name}, kStart, LogLevel::kInfo, "started", {}),
              HasSubstr(absl::StrCat(" INFO ", name, " event=started")));
  EXPECT_THAT(FormatLogLine({}, kStart, LogLevel::kInfo, "started", {}),
              HasSubstr(" INFO cinnabar event=started"));
  EXPECT_THAT(FormatLogLine({.json = true}, kStart, LogLevel::kInfo, "started", {}),
              HasSubstr("\"program\":\"cinnabar\""));
}

TEST(LogTest, ALongValueIsCutAndTheLineStaysWhole) {
  const std::string line = Line({{"text", std::string(kLogValueBytesMax + 1, 'x')}});
  EXPECT_THAT(line, HasSubstr(absl::StrCat("\"", std::string(kLogValueBytesMax, 'x'), "...\"")));
  EXPECT_THAT(Line({{"text", std::string(kLogValueBytesMax, 'x')}}), Not(HasSubstr("...")));
}

TEST(LogTest, FieldsBeyondTheLineAreLeftOutAndCounted) {
  const std::string bytes(kLogValueBytesMax, '\n');  // six bytes each as an escape
  for (const bool json : {false, true}) {
    const std::string line = Line({{"a", bytes}, {"b", bytes}, {"c", "short"}}, json);
    EXPECT_LE(line.size(), kLogLineBytesMax);
    EXPECT_THAT(line, HasSubstr(json ? "\"fields_left_out\":1" : " fields_left_out=1"));
    EXPECT_THAT(line, HasSubstr(json ? "\"c\":\"short\"" : " c=short"));
    EXPECT_THAT(line, Not(HasSubstr("\n")));
  }
}

TEST(LogTest, AValueCannotForgeAFieldNorAName) {
  EXPECT_THAT(Line({{"id", "a level=ERROR"}}), HasSubstr("id=\"a level=ERROR\""));
  EXPECT_THAT(Line({{"level", "x"}}, true), HasSubstr("\"level_\":\"x\""));
  EXPECT_THAT(Line({{"a b", 1}}), HasSubstr(" a_b=1"));
}

TEST(LogTest, WhatIsNoNumberInJsonIsQuoted) {
  EXPECT_THAT(Line({{"share", 0.0 / 0.0}}, true), HasSubstr("\"share\":\""));
  EXPECT_THAT(Line({{"share", 0.5}}, true), HasSubstr("\"share\":0.5"));
}

TEST(LogLimiterTest, HoldsBackAndCounts) {
  LogLimiter limiter(absl::Seconds(10));
  EXPECT_EQ(limiter.Admit(kStart), 0);
  EXPECT_EQ(limiter.Admit(kStart + absl::Seconds(1)), -1);
  EXPECT_EQ(limiter.Admit(kStart + absl::Seconds(9)), -1);
  EXPECT_EQ(limiter.Admit(kStart + absl::Seconds(10)), 2);
}

TEST(LogLimiterTest, AClockSetBackDoesNotSilenceAnEvent) {
  LogLimiter limiter(absl::Seconds(10));
  EXPECT_EQ(limiter.Admit(kStart), 0);
  EXPECT_EQ(limiter.Admit(kStart - absl::Hours(1)), 0);
}

TEST(LogEveryTest, EventsAreHeldBackEachForItself) {
  EXPECT_TRUE(LogEvery(absl::Hours(1), LogLevel::kError, "first_event"));
  EXPECT_FALSE(LogEvery(absl::Hours(1), LogLevel::kError, "first_event"));
  EXPECT_TRUE(LogEvery(absl::Hours(1), LogLevel::kError, "second_event"));
}

// 10,000 tenants on a counter and a histogram: what the security list asks of a scrape.
TEST(MetricsTest, TenThousandTenantsStayWithinTheBudgetAndNothingIsLost) {
  Metrics metrics;
  CounterFamily& tokens =
      metrics.AddCounter("cinnabar_test_tokens_total", "Tokens", {"tenant", "kind"});
  HistogramFamily& waits = metrics.AddHistogram("cinnabar_test_wait_seconds", "Wait",
                                                LatencyBuckets(), {"tenant"}, 5000);
  HistogramFamily& more = metrics.AddHistogram("cinnabar_test_more_seconds", "More",
                                               LatencyBuckets(), {"tenant"}, 5000);
  for (int i = 0; i < 10'000; ++i) {
    const std::string tenant = absl::StrCat("tenant-", i);
    tokens.With({tenant, i % 2 == 0 ? "input" : "output"}).Increment();
    waits.With({tenant}).Observe(0.1);
    more.With({tenant}).Observe(0.1);
  }
  const std::string scrape = metrics.Render();
  EXPECT_LE(NumSeries(scrape), kSeriesMax);
  EXPECT_GT(NumSeries(scrape), kSeriesMax * 9 / 10);  // the budget is there to be used
  double total = 0;
  int64_t others = 0;
  for (const absl::string_view line : absl::StrSplit(scrape, '\n')) {
    if (!absl::StartsWith(line, "cinnabar_test_tokens_total{")) continue;
    total += std::stod(std::string(line.substr(line.rfind(' ') + 1)));
    others += absl::StrContains(line, "tenant=\"other\"") ? 1 : 0;
  }
  EXPECT_EQ(total, 10'000);
  EXPECT_EQ(others, 2);  // what is known besides the tenant is kept: input and output
  EXPECT_THAT(scrape,
              HasSubstr("cinnabar_metric_overflows_total{family=\"cinnabar_test_tokens_total\"}"));
}

TEST(MetricsTest, AFullFamilyDoesNotTakeTheRoomOfKnownChildren) {
  Metrics metrics;
  CounterFamily& family = metrics.AddCounter("cinnabar_test_total", "Test", {"tenant"}, 3);
  family.With({"a"}).Increment();
  family.With({"b"}).Increment();
  prometheus::Counter& other = family.With({"c"});
  EXPECT_EQ(&other, &family.With({"d"}));
  EXPECT_EQ(&other, &family.With({"other"}));
  EXPECT_NE(&other, &family.With({"a"}));
  EXPECT_EQ(family.With({"a"}).Value(), 1);
}

TEST(MetricsTest, LabelValuesAreCutAndCleaned) {
  Metrics metrics;
  CounterFamily& family = metrics.AddCounter("cinnabar_test_total", "Test", {"tenant"});
  family.With({"a\nb\xff"}).Increment();
  family.With({std::string(kLabelValueBytesMax + 1, 'x')}).Increment();
  const std::string scrape = metrics.Render();
  EXPECT_THAT(scrape, HasSubstr("tenant=\"a?b?\""));
  EXPECT_THAT(scrape, HasSubstr(absl::StrCat("\"", std::string(kLabelValueBytesMax, 'x'), "\"")));
}

TEST(MetricsTest, ReplaceTakesAwayWhatIsGoneAndGivesItsRoomBack) {
  Metrics metrics(100);
  GaugeFamily& family = metrics.AddGauge("cinnabar_test_ready", "Ready", {"worker"}, 4);
  for (int round = 0; round < 1000; ++round) {  // far more workers than the process has series
    family.Replace({{.values = {absl::StrCat("w", round)}, .value = 1},
                    {.values = {"steady"}, .value = static_cast<double>(round)}});
  }
  const std::string scrape = metrics.Render();
  EXPECT_THAT(scrape, HasSubstr("cinnabar_test_ready{worker=\"w999\"} 1"));
  EXPECT_THAT(scrape, HasSubstr("cinnabar_test_ready{worker=\"steady\"} 999"));
  EXPECT_THAT(scrape, Not(HasSubstr("\"w998\"")));
  family.Replace({});
  EXPECT_THAT(metrics.Render(), Not(HasSubstr("cinnabar_test_ready{")));
}

TEST(MetricsDeathTest, ANameIsGivenOnceAndIsAName) {
  Metrics metrics;
  metrics.AddCounter("cinnabar_test_total", "Test");
  EXPECT_DEATH(metrics.AddCounter("cinnabar_test_total", "Test"), "added twice");
  EXPECT_DEATH(metrics.AddCounter("cinnabar test", "Test"), "no metric name");
  EXPECT_DEATH(metrics.AddHistogram("cinnabar_test", "Test", {1}, {"le"}), "no label name");
}

}  // namespace
}  // namespace cinnabar
