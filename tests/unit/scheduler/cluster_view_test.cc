// The scheduler's picture of the cluster: what waits, what workers hold, and what it learns from
// ends and beats.
#include "scheduler/service/cluster_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace cinnabar {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;

const absl::Time kNow = absl::FromUnixSeconds(1'000'000);

WaitingRequest Request(int64_t sequence, const std::string& model = "m") {
  v1::WorkHint hint;
  hint.set_model(model);
  hint.set_model_fingerprint("f");
  hint.set_sampler("entropy");
  hint.set_steps_budget(16);
  return {.id = absl::StrCat("r", sequence),
          .tenant = "t",
          .prompt_tokens = 10,
          .canvas_tokens = 32,
          .steps_max = 16,
          .cost = 42 * 16,
          .enqueued_at = kNow - absl::Seconds(sequence),
          .deadline = kNow + absl::Minutes(1),
          .sequence = sequence,
          .hint = hint.SerializeAsString()};
}

v1::WorkerStatus Status(const std::string& name, const std::string& model = "m") {
  v1::WorkerStatus status;
  status.set_format(1);
  status.set_worker(name);
  status.set_model(model);
  status.set_model_fingerprint("f");
  status.set_rows_max(8);
  status.set_tokens_max(4096);
  status.set_tokens_target(1024);
  return status;
}
void Hold(v1::WorkerStatus& status, const std::string& request, int32_t step) {
  v1::WorkerStatus::Row& row = *status.add_rows();
  row.set_request(request);
  row.set_step(step);
  row.set_sequence_tokens(42);
  row.set_canvas_tokens(32);
  row.set_steps_budget(16);
}
WorkerEntry Entry(const v1::WorkerStatus& status, const std::string& boot = "b1") {
  return {.boot = absl::StrCat(status.worker(), boot), .state = status.SerializeAsString()};
}
FeedEntry Queued(const WaitingRequest& request) {
  return {.kind = FeedEntry::Kind::kQueued, .request = request};
}
FeedEntry Ended(const WaitingRequest& request, RequestState state, int32_t step) {
  FeedEntry entry = {.kind = FeedEntry::Kind::kTerminal, .request = request, .state = state};
  entry.request.step = step;
  return entry;
}

std::vector<PlanRequest> Ready(const ClusterView& view, absl::Time now = kNow) {
  absl::Time next = absl::InfiniteFuture();
  return view.Waiting(now, next);
}

TEST(ClusterViewTest, RequestsComeWaitAndEnd) {
  ClusterView view;
  view.Scan({Request(1), Request(2)});
  view.Apply(Queued(Request(3)), kNow);
  view.Apply(Queued(Request(3)), kNow);  // a scan and the feed may both tell of it
  EXPECT_EQ(view.num_waiting(), 3);
  const std::vector<PlanRequest> ready = Ready(view);
  ASSERT_THAT(ready, SizeIs(3));
  for (const PlanRequest& plan : ready) {
    EXPECT_EQ(plan.sequence_tokens, 42);
    EXPECT_EQ(plan.canvas_tokens, 32);
    EXPECT_EQ(plan.steps_budget, 16);
    EXPECT_FALSE(plan.suspect);
  }
  EXPECT_EQ(view.Request(2).id, "r2");
  view.Apply(Ended(Request(2), RequestState::kCancelled, 0), kNow);
  EXPECT_EQ(view.num_waiting(), 2);
  view.Forget(1);
  view.Forget(1);
  EXPECT_EQ(view.num_waiting(), 1);
  view.Scan({});
  EXPECT_THAT(Ready(view), IsEmpty());
}

TEST(ClusterViewTest, ASuspectWaitsForItsTime) {
  ClusterView view;
  WaitingRequest suspect = Request(1);
  suspect.attempts_without_progress = 1;
  suspect.not_before = kNow + absl::Seconds(4);
  view.Scan({suspect});
  absl::Time next = absl::InfiniteFuture();
  EXPECT_THAT(view.Waiting(kNow, next), IsEmpty());
  EXPECT_EQ(next, suspect.not_before);
  ASSERT_THAT(Ready(view, kNow + absl::Seconds(4)), SizeIs(1));
  EXPECT_TRUE(Ready(view, kNow + absl::Seconds(4))[0].suspect);
  view.Postpone(1, kNow + absl::Seconds(9));
  EXPECT_THAT(Ready(view, kNow + absl::Seconds(8)), IsEmpty());
}

TEST(ClusterViewTest, WhatWasSentCountsUntilTheWorkerReportsIt) {
  ClusterView view;
  view.Scan({Request(1), Request(2)});
  v1::WorkerStatus status = Status("w1");
  view.SetWorkers({Entry(status)}, kNow);
  ASSERT_THAT(view.Workers(), SizeIs(1));
  const int32_t worker = view.Workers()[0].id;
  EXPECT_EQ(view.Lane(worker), "w1");
  view.Dispatched("b1", {.worker = worker, .members = {{.id = 1, .steps_budget = 8}, {.id = 9}}},
                  kNow);
  EXPECT_EQ(view.num_waiting(), 1);
  ASSERT_THAT(view.Workers()[0].rows, SizeIs(1));
  EXPECT_EQ(view.Workers()[0].rows[0].steps_budget, 8);

  Hold(status, "r1", 3);
  view.SetWorkers({Entry(status)}, kNow + absl::Seconds(1));
  ASSERT_THAT(view.Workers()[0].rows, SizeIs(1));  // once, as the worker says
  EXPECT_EQ(view.Workers()[0].rows[0].steps_done, 3);
  EXPECT_LT(view.Workers()[0].rows[0].id, 0);
  view.Apply(Ended(Request(1), RequestState::kDone, 8), kNow);
  EXPECT_THAT(view.Workers()[0].rows, IsEmpty());
}

TEST(ClusterViewTest, WhatNobodyReportsIsForgotten) {
  ClusterView view({.sent_max = absl::Seconds(12)});
  view.Scan({Request(1), Request(2)});
  view.SetWorkers({Entry(Status("w1")), Entry(Status("w2"))}, kNow);
  int32_t ids[2];
  for (const WorkerState& worker : view.Workers()) ids[view.Lane(worker.id) == "w2"] = worker.id;
  view.Dispatched("b1", {.worker = ids[0], .members = {{.id = 1, .steps_budget = 16}}}, kNow);
  view.Dispatched("b2", {.worker = ids[1], .members = {{.id = 2, .steps_budget = 16}}}, kNow);
  // A pack that was started has its time from then on.
  view.Apply({.kind = FeedEntry::Kind::kPackStarted, .batch = "b1"}, kNow + absl::Seconds(10));
  view.SetWorkers({Entry(Status("w1")), Entry(Status("w2"))}, kNow + absl::Seconds(13));
  for (const WorkerState& worker : view.Workers()) {
    EXPECT_THAT(worker.rows, SizeIs(worker.id == ids[0] ? 1 : 0));
  }
  // Queued again: no longer on the worker.
  view.Apply(Queued(Request(1)), kNow);
  for (const WorkerState& worker : view.Workers()) EXPECT_THAT(worker.rows, IsEmpty());
  EXPECT_EQ(view.num_waiting(), 1);
  // A worker that is gone takes what was sent to it along.
  view.SetWorkers({Entry(Status("w2"))}, kNow + absl::Seconds(14));
  EXPECT_EQ(view.num_workers(), 1);
}

TEST(ClusterViewTest, SamplesAreTakenOnceAndARestartBeginsAnew) {
  ClusterView view;
  v1::WorkerStatus status = Status("w1");
  const auto sample = [&](double seconds) {
    v1::WorkerStatus::StepSample& step = *status.add_samples();
    step.set_rows(1);
    step.set_positions(42);
    step.set_seconds(seconds);
    status.set_samples_end(status.samples_end() + 1);
  };
  view.Scan({Request(1)});
  for (int i = 0; i < 50; ++i) sample(0.01);
  view.SetWorkers({Entry(status)}, kNow);
  const double once = view.LoadByModel()["m"].device_seconds;
  EXPECT_GT(once, 0);
  for (int i = 0; i < 20; ++i) view.SetWorkers({Entry(status)}, kNow);
  EXPECT_EQ(view.LoadByModel()["m"].device_seconds, once);
  // Another start of the process counts from zero: its steps are new ones.
  status.clear_samples();
  status.set_samples_end(0);
  for (int i = 0; i < 50; ++i) sample(0.1);
  view.SetWorkers({Entry(status, "b2")}, kNow);
  EXPECT_GT(view.LoadByModel()["m"].device_seconds, once);
}

TEST(ClusterViewTest, EndsTeachHowManyStepsAnAnswerTakes) {
  ClusterView view;
  view.Scan({Request(1)});
  const double before = view.LoadByModel()["m"].token_steps;
  for (int i = 0; i < 100; ++i) view.Apply(Ended(Request(100 + i), RequestState::kDone, 4), kNow);
  const double after = view.LoadByModel()["m"].token_steps;
  EXPECT_LT(after, before / 2);
  for (int i = 0; i < 100; ++i)
    view.Apply(Ended(Request(300 + i), RequestState::kCancelled, 16), kNow);
  EXPECT_EQ(view.LoadByModel()["m"].token_steps, after);  // only whole answers teach
}

TEST(ClusterViewTest, WhatCannotBeReadIsCountedAndPlannedAsItCanBe) {
  ClusterView view({.waiting_max = 2});
  WaitingRequest odd = Request(1);
  odd.hint = "\xff\xff";
  odd.prompt_tokens = -5;
  odd.canvas_tokens = int64_t{1} << 40;
  odd.steps_max = 0;
  odd.step = -3;
  view.Scan({odd});
  EXPECT_EQ(view.num_unreadable(), 1);
  ASSERT_THAT(Ready(view), SizeIs(1));
  EXPECT_GE(Ready(view)[0].sequence_tokens, 1);
  EXPECT_GE(Ready(view)[0].steps_budget, 1);
  EXPECT_GE(Ready(view)[0].steps_done, 0);
  view.SetWorkers({{.boot = "b", .state = "\xff\xff"}, {.boot = "c", .state = ""}}, kNow);
  EXPECT_EQ(view.num_unreadable(), 3);
  EXPECT_EQ(view.num_workers(), 0);
  view.Apply(Queued(Request(2)), kNow);
  view.Apply(Queued(Request(3)), kNow);  // beyond waiting_max: the next scan's
  EXPECT_EQ(view.num_waiting(), 2);
}

TEST(ClusterViewTest, LoadsAddUp) {
  ClusterView view;
  WaitingRequest batch = Request(2, "n");
  batch.request_class = RequestClass::kBatch;
  view.Scan({Request(1), batch, Request(3)});
  v1::WorkerStatus draining = Status("w2");
  draining.set_draining(true);
  view.SetWorkers({Entry(Status("w1")), Entry(draining)}, kNow);
  auto models = view.LoadByModel();
  EXPECT_EQ(models["m"].waiting, 2);
  EXPECT_EQ(models["m"].workers, 1);
  EXPECT_EQ(models["n"].waiting, 1);
  EXPECT_EQ(models["n"].workers, 0);
  const auto classes = view.LoadByClass(kNow);
  const auto& standard = classes[static_cast<size_t>(RequestClass::kStandard)];
  EXPECT_EQ(standard.waiting, 2);
  EXPECT_EQ(standard.token_steps, 2 * 42 * 16);
  EXPECT_EQ(standard.oldest, absl::Seconds(3));
  EXPECT_EQ(classes[static_cast<size_t>(RequestClass::kBatch)].waiting, 1);
}

}  // namespace
}  // namespace cinnabar
