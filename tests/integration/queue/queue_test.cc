// The typed queue against a real Redis: bounds, quotas, leadership, resume, poison, lost replies.
#include "common/queue/queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "common/queue/library.h"
#include "tests/support/fault_proxy.h"
#include "tests/support/queue_state.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr absl::Duration kLong = absl::Minutes(1);

class QueueTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto server = RedisServer::Start();
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = server->release();
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void SetUp() override {
    redis_ = std::make_unique<RedisClient>(server_->client_options());
    ASSERT_TRUE(redis_->Command({"FLUSHALL"}).ok());
    redis_->Close();
    queue_ = std::make_unique<Queue>(*redis_, QueueOptions{.partition = "q"});
    const auto leadership = queue_->Lead("s1", kLong);
    ASSERT_TRUE(leadership.ok()) << leadership.status();
    epoch_ = leadership->epoch;
  }
  void TearDown() override {
    const auto wrong = CheckQueueState(*redis_, "cb:{q}:");
    ASSERT_TRUE(wrong.ok()) << wrong.status();
    EXPECT_THAT(*wrong, IsEmpty());
  }

  static EnqueueRequest Request(const std::string& id, const std::string& tenant = "t") {
    EnqueueRequest request;
    request.id = id;
    request.tenant = tenant;
    request.body_digest = "d";
    request.prompt_tokens = 10;
    request.canvas_tokens = 32;
    request.steps_max = 8;
    request.cost = 100;
    request.gateway = "g1";
    request.tag = "key-1 model-1";
    request.hint = "hint";
    request.payload = absl::StrCat("payload of ", id);
    return request;
  }
  EnqueueOutcome Enqueue(const EnqueueRequest& request, const AdmissionLimits& limits = {}) {
    const auto result = queue_->Enqueue(request, limits);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? result->outcome : EnqueueOutcome::kMismatch;
  }
  // Dispatches and starts; the rows must all come.
  std::vector<StartedRow> Run(const std::string& boot, const std::string& batch,
                              const std::vector<std::string>& ids) {
    const auto dispatched =
        queue_->Dispatch(epoch_, {.batch = batch, .info = "info", .requests = ids});
    EXPECT_TRUE(dispatched.ok()) << dispatched.status();
    const auto pack = queue_->TakePack("any", absl::Seconds(1));
    EXPECT_TRUE(pack.ok() && pack->has_value()) << pack.status();
    if (!pack.ok() || !pack->has_value()) return {};
    EXPECT_EQ((*pack)->batch, batch);
    const auto started = queue_->Start(boot, batch, kLong);
    EXPECT_TRUE(started.ok()) << started.status();
    EXPECT_EQ(started->rows.size(), ids.size());
    return started->rows;
  }
  std::vector<RowVerdict> Publish(const std::string& boot, const std::vector<ProgressRow>& rows) {
    const auto reply = queue_->Publish(boot, {.lease_for = kLong, .progress = rows});
    EXPECT_TRUE(reply.ok()) << reply.status();
    std::vector<RowVerdict> verdicts;
    for (const RowReply& row : reply->progress) verdicts.push_back(row.verdict);
    return verdicts;
  }
  static ProgressRow Step(const RowLease& lease, int32_t step, const std::string& snapshot = "") {
    return {.lease = lease,
            .step = step,
            .usage = {.output_tokens = 4 * step, .forwards = step, .device_us = 100 * step},
            .delta = absl::StrCat("d", step),
            .snapshot = snapshot};
  }
  void EndLease(const std::string& batch) {
    ASSERT_TRUE(redis_->Command({"ZADD", "cb:{q}:lease", "XX", "1", batch}).ok());
  }

  static RedisServer* server_;
  std::unique_ptr<RedisClient> redis_;
  std::unique_ptr<Queue> queue_;
  int64_t epoch_ = 0;
};
RedisServer* QueueTest::server_ = nullptr;

TEST_F(QueueTest, WhatIsRefusedCostsNothing) {
  EnqueueRequest request = Request("r1");
  request.input_price_microdollars = 10;
  request.output_price_microdollars = 100;
  EXPECT_EQ(Enqueue(request), EnqueueOutcome::kAccepted);
  request.id = "r2";
  EXPECT_EQ(Enqueue(request), EnqueueOutcome::kAccepted);
  // Both ran for a step, so that there is something to pay for.
  const std::vector<StartedRow> rows = Run("w1", "b1", {"r1", "r2"});
  ASSERT_EQ(rows.size(), 2U);
  for (const StartedRow& row : rows) {
    EXPECT_THAT(Publish("w1", {Step(row.lease, 1)}), ElementsAre(RowVerdict::kOk));
    ASSERT_TRUE(queue_->HandBack("w1", {{{.lease = row.lease, .snapshot_step = 0}}}).ok());
  }
  const auto refused = queue_->Refuse(epoch_, "too late", std::vector<std::string>{"r1", "gone"});
  ASSERT_TRUE(refused.ok()) << refused.status();
  EXPECT_FALSE(refused->stale_epoch);
  EXPECT_THAT(refused->rows, ElementsAre(DispatchVerdict::kOk, DispatchVerdict::kGone));
  EXPECT_EQ(*queue_->Cancel("r2", "t", "by its client"), RequestState::kCancelled);
  const auto ledger = queue_->ReadLedger("0", 10);
  ASSERT_TRUE(ledger.ok() && ledger->size() == 2) << ledger.status();
  EXPECT_EQ((*ledger)[0].charge_microdollars, 0);
  EXPECT_GE((*ledger)[1].charge_microdollars, 10);  // who cancels pays for what it had
  const auto view = queue_->Events("r1", "t", 0, 10);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->state, RequestState::kCancelled);
  EXPECT_EQ(view->why, "too late");
  EXPECT_TRUE(queue_->Refuse(epoch_ - 1, "too late", std::vector<std::string>{"r1"})->stale_epoch);
}

TEST_F(QueueTest, ALifeFromTheGatewayToTheLedger) {
  RedisClient listener(server_->client_options());
  ASSERT_TRUE(listener.Subscribe({queue_->EventChannel("g1")}).ok());
  EnqueueRequest request = Request("r1");
  request.request_class = RequestClass::kInteractive;
  request.input_price_microdollars = 10;
  request.output_price_microdollars = 100;
  request.payload = std::string("\0\r\n\xff", 4);
  EXPECT_EQ(Enqueue(request), EnqueueOutcome::kAccepted);
  std::string position;
  const auto waiting = queue_->ScanWaiting(100, position);
  ASSERT_TRUE(waiting.ok() && waiting->size() == 1) << waiting.status();
  EXPECT_EQ((*waiting)[0].id, "r1");
  EXPECT_EQ((*waiting)[0].request_class, RequestClass::kInteractive);
  EXPECT_EQ((*waiting)[0].hint, "hint");
  EXPECT_GT((*waiting)[0].deadline, (*waiting)[0].enqueued_at + absl::Seconds(59));

  const std::vector<StartedRow> rows = Run("w1", "b1", {"r1"});
  ASSERT_EQ(rows.size(), 1U);
  EXPECT_EQ(rows[0].payload, request.payload);
  EXPECT_EQ(rows[0].lease.attempt, 1);
  EXPECT_THAT(Publish("w1", {Step(rows[0].lease, 1), Step(rows[0].lease, 2, "canvas2")}),
              ElementsAre(RowVerdict::kOk, RowVerdict::kOk));
  const auto reply = queue_->Publish(
      "w1", {.lease_for = kLong,
             .progress = {Step(rows[0].lease, 3)},
             .finished = {{.lease = rows[0].lease,
                           .last_step = 3,
                           .usage = {.output_tokens = 16, .forwards = 3, .device_us = 300},
                           .why = "stop",
                           .result = "the answer"}}});
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->finished[0].verdict, RowVerdict::kOk);

  const auto view = queue_->Events("r1", "t", 1, 100);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->state, RequestState::kDone);
  EXPECT_EQ(view->result, "the answer");
  EXPECT_EQ(view->charge_microdollars, 10 + 50);  // half of the canvas
  ASSERT_EQ(view->events.size(), 3U);
  EXPECT_EQ(view->events[0].step, 2);
  EXPECT_EQ(view->events[2].final_state, RequestState::kDone);
  EXPECT_EQ(view->events[2].data, "the answer");
  std::vector<QueueEvent> pushed;
  while (pushed.size() < 4) {
    const auto message = listener.ReadMessage(absl::Seconds(1));
    ASSERT_TRUE(message.ok() && message->has_value());
    const auto events = Queue::ParseEventMessage((*message)->payload);
    ASSERT_TRUE(events.ok());
    pushed.insert(pushed.end(), events->begin(), events->end());
  }
  for (int32_t step = 1; step <= 4; ++step) {
    EXPECT_EQ(pushed[step - 1].step, step);
    EXPECT_EQ(pushed[step - 1].data, step <= 3 ? absl::StrCat("d", step) : "the answer");
  }
  const auto ledger = queue_->ReadLedger("0", 10);
  ASSERT_TRUE(ledger.ok() && ledger->size() == 1) << ledger.status();
  EXPECT_EQ((*ledger)[0].tag, "key-1 model-1");
  EXPECT_EQ((*ledger)[0].usage, (Usage{.output_tokens = 16, .forwards = 3, .device_us = 300}));
  EXPECT_EQ((*ledger)[0].charge_microdollars, 60);
  const auto feed = queue_->ReadFeed(position, 100, absl::Milliseconds(10));
  ASSERT_TRUE(feed.ok()) << feed.status();
  ASSERT_EQ(feed->entries.size(), 2U);
  EXPECT_EQ(feed->entries[0].kind, FeedEntry::Kind::kPackStarted);
  EXPECT_EQ(feed->entries[1].kind, FeedEntry::Kind::kTerminal);
  EXPECT_EQ(feed->entries[1].usage.forwards, 3);
  EXPECT_THAT(queue_->ReadFeed(feed->position, 100, absl::Milliseconds(10))->entries, IsEmpty());
  ASSERT_TRUE(queue_->AckLedger((*ledger)[0].position).ok());
  EXPECT_THAT(*queue_->ReadLedger("0", 10), IsEmpty());
  ASSERT_TRUE(redis_->Command({"XADD", "cb:{q}:ledger", "*", "rid", "r1", "st", "done"})
                  .ok());  // for TearDown
}

TEST_F(QueueTest, AdmissionBoundsEverythingAndReplaysPass) {
  const auto with = [](auto change) {
    AdmissionLimits limits;
    change(limits);
    return limits;
  };
  EXPECT_EQ(Enqueue(Request("r1")), EnqueueOutcome::kAccepted);
  EXPECT_EQ(Enqueue(Request("r2"), with([](auto& l) { l.cost_max = 199; })),
            EnqueueOutcome::kOverloaded);
  EXPECT_EQ(Enqueue(Request("r2"), with([](auto& l) { l.queue_requests_max = 1; })),
            EnqueueOutcome::kQueueFull);
  EXPECT_EQ(Enqueue(Request("r2"), with([](auto& l) { l.tenant_requests_max = 1; })),
            EnqueueOutcome::kTenantRequests);
  EXPECT_EQ(Enqueue(Request("r2"), with([](auto& l) { l.tenant_cost_max = 199; })),
            EnqueueOutcome::kTenantCost);
  const AdmissionLimits all = {
      .cost_max = 1, .queue_requests_max = 1, .tenant_requests_max = 1, .tenant_cost_max = 1};
  EXPECT_EQ(Enqueue(Request("r1"), all), EnqueueOutcome::kDuplicate);
  EnqueueRequest replay = Request("r2");
  replay.replay = true;
  EXPECT_EQ(Enqueue(replay, all), EnqueueOutcome::kAccepted);
  EXPECT_EQ(Enqueue(Request("r3", "other"), with([](auto& l) { l.queue_requests_max = 1; })),
            EnqueueOutcome::kAccepted);
}

TEST_F(QueueTest, RatesGiveAnHonestRetryAfter) {
  AdmissionLimits limits;
  limits.requests = {.per_minute = 600, .burst = 2};
  limits.tokens = {.per_minute = 60000, .burst = 1000};
  auto first = queue_->Enqueue(Request("r1"), limits);
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(first->requests.remaining, 1);
  EXPECT_EQ(first->tokens.remaining, 958);
  EXPECT_EQ(first->cost.remaining, -1);
  EXPECT_EQ(Enqueue(Request("r2"), limits), EnqueueOutcome::kAccepted);
  const auto refused = queue_->Enqueue(Request("r3"), limits);
  ASSERT_TRUE(refused.ok());
  ASSERT_EQ(refused->outcome, EnqueueOutcome::kRate);
  EXPECT_EQ(refused->detail, "requests");
  EXPECT_GT(refused->retry_after, absl::ZeroDuration());
  EXPECT_LE(refused->retry_after, absl::Milliseconds(100));
  absl::SleepFor(refused->retry_after + absl::Milliseconds(2));
  EXPECT_EQ(Enqueue(Request("r3"), limits), EnqueueOutcome::kAccepted);
  EXPECT_EQ(Enqueue(Request("r4", "other"), limits), EnqueueOutcome::kAccepted);
}

TEST_F(QueueTest, BudgetsAreReservedAndSettled) {
  AdmissionLimits limits;
  limits.budget_period = "2026-11";
  limits.budget_max_microdollars = 250;
  EnqueueRequest request = Request("r1");
  request.output_price_microdollars = 100;
  EXPECT_EQ(Enqueue(request, limits), EnqueueOutcome::kAccepted);
  request.id = "r2";
  EXPECT_EQ(Enqueue(request, limits), EnqueueOutcome::kAccepted);
  request.id = "r3";
  EXPECT_EQ(Enqueue(request, limits), EnqueueOutcome::kBudget);
  EXPECT_EQ(*queue_->Cancel("r1", "t", "client"), RequestState::kCancelled);  // it never ran: free
  EXPECT_EQ(Enqueue(request, limits), EnqueueOutcome::kAccepted);
  request.id = "r4";
  EXPECT_EQ(Enqueue(request, limits), EnqueueOutcome::kBudget);
  limits.budget_period = "2026-12";  // what is reserved still counts
  EXPECT_EQ(Enqueue(request, limits), EnqueueOutcome::kBudget);
}

TEST_F(QueueTest, AnIdempotencyKeyFindsTheRequestOfItsTenantOnly) {
  EnqueueRequest request = Request("r1");
  request.idempotency_key = "k1";
  EXPECT_EQ(Enqueue(request), EnqueueOutcome::kAccepted);
  request.id = "r2";
  const auto again = queue_->Enqueue(request, {});
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->outcome, EnqueueOutcome::kDuplicate);
  EXPECT_EQ(again->id, "r1");
  request.body_digest = "other";
  EXPECT_EQ(Enqueue(request), EnqueueOutcome::kMismatch);
  request.tenant = "stranger";
  EXPECT_EQ(Enqueue(request), EnqueueOutcome::kAccepted);
}

TEST_F(QueueTest, AKilledWorkersRowsResumeWhereTheyWere) {
  Enqueue(Request("r1"));
  Enqueue(Request("r2"));
  auto rows = Run("w1", "b1", {"r1", "r2"});
  ASSERT_EQ(rows.size(), 2U);
  Publish("w1", {Step(rows[0].lease, 1), Step(rows[0].lease, 2, "canvas2"), Step(rows[0].lease, 3),
                 Step(rows[0].lease, 4)});
  EndLease("b1");
  const auto reaped = queue_->Reap(epoch_, {.backoff = absl::ZeroDuration()});
  ASSERT_TRUE(reaped.ok()) << reaped.status();
  EXPECT_EQ(reaped->requeued, 2);
  // r2 made no progress: a suspect goes alone.
  const auto mixed = queue_->Dispatch(epoch_, {.batch = "b2", .requests = {"r1", "r2"}});
  ASSERT_TRUE(mixed.ok());
  EXPECT_EQ(mixed->rows[0].verdict, DispatchVerdict::kOk);
  EXPECT_EQ(mixed->rows[1].verdict, DispatchVerdict::kSuspect);
  const auto started = queue_->Start("w2", "b2", kLong);
  ASSERT_TRUE(started.ok());
  ASSERT_EQ(started->rows.size(), 1U);
  const StartedRow& row = started->rows[0];
  EXPECT_EQ(row.lease.attempt, 2);
  EXPECT_EQ(row.step, 4);
  EXPECT_EQ(row.snapshot_step, 2);
  EXPECT_EQ(row.snapshot, "canvas2");
  EXPECT_THAT(row.deltas, ElementsAre("d3", "d4"));
  EXPECT_EQ(row.usage.device_us, 400);
  // The zombie comes back.
  EXPECT_THAT(Publish("w1", {Step(rows[0].lease, 5)}), ElementsAre(RowVerdict::kStale));
  EXPECT_THAT(Publish("w2", {Step(row.lease, 5)}), ElementsAre(RowVerdict::kOk));
  const auto solo = queue_->Dispatch(epoch_, {.batch = "b3", .requests = {"r2"}});
  EXPECT_EQ(solo->rows[0].verdict, DispatchVerdict::kOk);
  ASSERT_TRUE(queue_->TakePack("any", absl::Seconds(1)).ok());
}

TEST_F(QueueTest, PoisonEndsInTheDeadLettersAndBacksOff) {
  Enqueue(Request("r1"));
  const ReapLimits limits = {.attempts_without_progress_max = 3, .backoff = absl::Milliseconds(40)};
  for (int attempt = 1; attempt <= 3; ++attempt) {
    const std::string batch = absl::StrCat("b", attempt);
    Run(absl::StrCat("w", attempt), batch, {"r1"});
    EndLease(batch);
    const auto reaped = queue_->Reap(epoch_, limits);
    ASSERT_TRUE(reaped.ok());
    EXPECT_EQ(reaped->dead, attempt == 3 ? 1 : 0);
    if (attempt == 3) break;
    EXPECT_EQ(queue_->Dispatch(epoch_, {.batch = batch + "x", .requests = {"r1"}})->rows[0].verdict,
              DispatchVerdict::kBackoff);
    absl::SleepFor(absl::Milliseconds(attempt == 1 ? 45 : 165));
  }
  const auto letters = queue_->DeadLetters(10);
  ASSERT_TRUE(letters.ok() && letters->size() == 1) << letters.status();
  EXPECT_EQ((*letters)[0].why, "no_progress");
  EXPECT_EQ((*letters)[0].worker, "w3");
  EXPECT_EQ((*letters)[0].attempts, 3);
  EXPECT_EQ(queue_->Events("r1", "t", 0, 10)->state, RequestState::kFailed);
}

TEST_F(QueueTest, CrashesWithProgressAreBoundedToo) {
  Enqueue(Request("r1"));
  for (int attempt = 1; attempt <= 3; ++attempt) {
    const std::string batch = absl::StrCat("b", attempt);
    const auto rows = Run("w1", batch, {"r1"});
    ASSERT_EQ(rows.size(), 1U);
    Publish("w1", {Step(rows[0].lease, attempt)});
    EndLease(batch);
    ASSERT_TRUE(queue_->Reap(epoch_, {.crashes_max = 3}).ok());
  }
  EXPECT_EQ(queue_->Events("r1", "t", 0, 10)->why, "too_many_crashes");
}

TEST_F(QueueTest, ADrainHandsBackWithItsCanvas) {
  Enqueue(Request("r1"));
  const auto rows = Run("w1", "b1", {"r1"});
  Publish("w1", {Step(rows[0].lease, 1), Step(rows[0].lease, 2)});
  ASSERT_TRUE(queue_->Drain("w1").ok());
  const auto beat = queue_->Beat("w1", "state", kLong, kLong, std::vector<std::string>{"b1", "b9"});
  ASSERT_TRUE(beat.ok());
  EXPECT_TRUE(beat->drain);
  EXPECT_THAT(beat->lost_batches, ElementsAre("b9"));
  const std::vector<HandBackRow> back = {
      {.lease = rows[0].lease, .snapshot_step = 2, .snapshot = "canvas2"}};
  EXPECT_EQ((*queue_->HandBack("w1", back))[0].verdict, RowVerdict::kOk);
  EXPECT_EQ((*queue_->HandBack("w1", back))[0].verdict, RowVerdict::kStale);
  ASSERT_TRUE(queue_->Leave("w1").ok());
  EXPECT_THAT(*queue_->Workers(), IsEmpty());
  const auto again = Run("w2", "b2", {"r1"});
  EXPECT_EQ(again[0].snapshot, "canvas2");
  EXPECT_EQ(again[0].attempts_without_progress, 0);
}

TEST_F(QueueTest, ThePacksThatNobodyStartsComeBackAndTheStreamIsShallow) {
  for (int i = 1; i <= 4; ++i) Enqueue(Request(absl::StrCat("r", i)));
  const auto order = [&](const std::string& id) {
    return queue_
        ->Dispatch(epoch_, {.batch = "b" + id,
                            .ready_packs_max = 2,
                            .start_within = absl::Milliseconds(20),
                            .requests = {id}})
        ->outcome;
  };
  EXPECT_EQ(order("r1"), DispatchResult::Outcome::kOk);
  EXPECT_EQ(order("r2"), DispatchResult::Outcome::kOk);
  EXPECT_EQ(order("r3"), DispatchResult::Outcome::kReadyFull);
  absl::SleepFor(absl::Milliseconds(25));
  const auto reaped = queue_->Reap(epoch_, {});
  ASSERT_TRUE(reaped.ok());
  EXPECT_EQ(reaped->not_started, 2);
  EXPECT_EQ(queue_->Stats()->ready_packs, 0);
  EXPECT_EQ(queue_->Stats()->waiting[1], 4);
  EXPECT_EQ(queue_->Start("w1", "br1", kLong)->outcome, StartResult::Outcome::kGone);
  // In their old places.
  std::string position;
  const auto waiting = queue_->ScanWaiting(3, position);
  ASSERT_EQ(waiting->size(), 3U);
  EXPECT_EQ((*waiting)[0].id, "r1");
  EXPECT_EQ((*waiting)[0].attempts_without_progress, 0);
}

TEST_F(QueueTest, OneLeaderAndANewEpochForEach) {
  RedisClient other_redis(server_->client_options());
  Queue other(other_redis, {.partition = "q"});
  const auto follower = other.Lead("s2", kLong);
  ASSERT_TRUE(follower.ok());
  EXPECT_FALSE(follower->leading);
  EXPECT_EQ(follower->leader, "s1");
  EXPECT_EQ(queue_->Lead("s1", kLong)->epoch, epoch_);
  ASSERT_TRUE(queue_->Resign("s1").ok());
  const auto leader = other.Lead("s2", absl::Milliseconds(20));
  EXPECT_TRUE(leader->leading);
  EXPECT_GT(leader->epoch, epoch_);
  EXPECT_EQ(queue_->Dispatch(epoch_, {.batch = "b", .requests = {"r"}})->outcome,
            DispatchResult::Outcome::kStaleEpoch);
  EXPECT_TRUE(queue_->Reap(epoch_, {})->stale_epoch);
  absl::SleepFor(absl::Milliseconds(30));
  EXPECT_GT(queue_->Lead("s1", kLong)->epoch, leader->epoch);
}

TEST_F(QueueTest, AttachedGatewaysAreToldAndTheirNumberIsBounded) {
  Enqueue(Request("r1"));
  for (int i = 2; i <= 9; ++i)
    ASSERT_TRUE(queue_->Attach("r1", "t", 0, 0, absl::StrCat("g", i)).ok());
  EXPECT_EQ(redis_->Command({"HGET", "cb:{q}:r:r1", "gw"})->text, "g6,g7,g8,g9");
  RedisClient listener(server_->client_options());
  ASSERT_TRUE(listener.Subscribe({queue_->EventChannel("g9")}).ok());
  ASSERT_TRUE(queue_->Cancel("r1", "t", "client").ok());
  const auto message = listener.ReadMessage(absl::Seconds(1));
  ASSERT_TRUE(message.ok() && message->has_value());
  EXPECT_EQ(Queue::ParseEventMessage((*message)->payload)->front().final_state,
            RequestState::kCancelled);
}

TEST_F(QueueTest, AFullRedisRefusesNewWorkAndFinishesTheOld) {
  Enqueue(Request("r1"));
  const auto rows = Run("w1", "b1", {"r1"});
  ASSERT_TRUE(redis_->Command({"CONFIG", "SET", "maxmemory", "1"}).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(queue_->Enqueue(Request("r2"), {}).status()));
  EXPECT_THAT(Publish("w1", {Step(rows[0].lease, 1)}), ElementsAre(RowVerdict::kOk));
  const auto reply =
      queue_->Publish("w1", {.finished = {{.lease = rows[0].lease, .last_step = 1}}});
  EXPECT_EQ(reply->finished[0].verdict, RowVerdict::kOk);
  ASSERT_TRUE(redis_->Command({"CONFIG", "SET", "maxmemory", "0"}).ok());
  EXPECT_EQ(Enqueue(Request("r2")), EnqueueOutcome::kAccepted);
}

TEST_F(QueueTest, AFlushedLibraryIsLoadedAgainOlderReplacedNewerKeptATwinRefused) {
  RedisClient admin(server_->client_options());
  const auto load = [&](const std::string& revision) {
    const std::string text = absl::StrReplaceAll(
        kQueueLibraryText, {{kQueueLibraryVersion.digest, "another"},
                            {absl::StrCat("local REVISION = ", kQueueLibraryVersion.revision),
                             "local REVISION = " + revision}});
    ASSERT_TRUE(admin.Command({"FUNCTION", "LOAD", "REPLACE", text}).ok());
    redis_->Close();
  };
  const auto on_server = [&] {
    return admin.Command({"FCALL", "cinnabar_v1_version", "0"})->elements[1].text;
  };
  ASSERT_TRUE(admin.Command({"FUNCTION", "FLUSH"}).ok());
  EXPECT_EQ(Enqueue(Request("r1")), EnqueueOutcome::kAccepted);
  load(absl::StrCat(kQueueLibraryVersion.revision));
  const absl::Status refused = queue_->Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("raise REVISION"));
  load("9999");
  EXPECT_TRUE(queue_->Open().ok());
  EXPECT_EQ(on_server(), "another");
  load("0");
  EXPECT_TRUE(queue_->Open().ok());
  EXPECT_EQ(on_server(), kQueueLibraryVersion.digest);
}

TEST_F(QueueTest, WithoutTheRightToLoadTheErrorSaysWhatToDo) {
  ASSERT_TRUE(redis_->Command({"FUNCTION", "FLUSH"}).ok());
  RedisOptions options = server_->client_options();
  RedisClient other(options);
  Queue queue(other, {.partition = "q", .may_load_library = false});
  EXPECT_THAT(std::string(queue.Open().message()), HasSubstr("load it with an admin user"));
  EXPECT_TRUE(queue_->Open().ok());
}

// The reply of every call is lost once; the repeated call must give what the first one would have.
TEST_F(QueueTest, LostRepliesChangeNothing) {
  FaultProxy proxy(server_->port());
  RedisOptions options = server_->client_options();
  options.address.port = proxy.port();
  options.command_timeout = absl::Milliseconds(60);
  RedisClient redis(options);
  Queue queue(redis, {.partition = "q"});
  ASSERT_TRUE(queue.Open().ok());
  const auto losing = [&](auto call) {
    proxy.Set({.kind = Fault::Kind::kSwallowReplies});
    std::thread heal([&] {
      absl::SleepFor(absl::Milliseconds(50));
      proxy.Set({});
    });
    auto result = call();
    heal.join();
    return result;
  };
  EXPECT_EQ(losing([&] { return queue.Lead("s1", kLong); })->epoch, epoch_);
  const auto enqueued =
      losing([&] { return queue.Enqueue(Request("r1"), {.tenant_requests_max = 1}); });
  ASSERT_TRUE(enqueued.ok()) << enqueued.status();
  EXPECT_EQ(enqueued->outcome, EnqueueOutcome::kDuplicate);
  const auto dispatched =
      losing([&] { return queue.Dispatch(epoch_, {.batch = "b1", .requests = {"r1"}}); });
  ASSERT_TRUE(dispatched.ok()) << dispatched.status();
  EXPECT_EQ(dispatched->rows[0].verdict, DispatchVerdict::kOk);
  EXPECT_EQ(dispatched->rows[0].attempt, 1);
  const auto started = losing([&] { return queue.Start("w1", "b1", kLong); });
  ASSERT_TRUE(started.ok()) << started.status();
  ASSERT_EQ(started->rows.size(), 1U);
  const RowLease lease = started->rows[0].lease;
  const auto published = losing([&] {
    return queue.Publish("w1", {.lease_for = kLong,
                                .progress = {Step(lease, 1)},
                                .finished = {{.lease = lease, .last_step = 1}}});
  });
  ASSERT_TRUE(published.ok()) << published.status();
  EXPECT_EQ(published->finished[0].verdict, RowVerdict::kOk);
  EXPECT_EQ(queue_->ReadLedger("0", 10)->size(), 1U);
  EXPECT_GE(redis.counters().connections_lost, 4);
}

}  // namespace
}  // namespace cinnabar
