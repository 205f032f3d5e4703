// gateway/relay against a real Redis: events in order and without a gap, whatever is lost on the
// way.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gateway/relay/event_hub.h"
#include "gateway/relay/queue_executor.h"
#include "gateway/relay/request_relay.h"
#include "tests/integration/gateway/fake_worker.h"

namespace cinnabar {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class RelayTest : public testing::Test {
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
    RedisClient redis(server_->client_options());
    ASSERT_TRUE(redis.Command({"FLUSHALL"}).ok());
    worker_ = std::make_unique<FakeWorker>(*server_);
    executor_ = std::make_unique<QueueExecutor>(QueueExecutorOptions{
        .redis = server_->client_options(), .queue = kGatewayTestQueue, .num_threads = 2});
    hub_ = std::make_unique<EventHub>(server_->client_options(), kGatewayTestQueue, "g1");
    ASSERT_TRUE(Eventually([&] { return hub_->counters().subscribed; }));
    relay_ = MakeRelay();
  }
  std::unique_ptr<RequestRelay> MakeRelay() {
    return std::make_unique<RequestRelay>(io_.get_executor(), *executor_, *hub_);
  }
  static bool Eventually(const std::function<bool()>& condition) {
    const absl::Time until = absl::Now() + absl::Seconds(10);
    while (!condition() && absl::Now() < until) absl::SleepFor(absl::Milliseconds(2));
    return condition();
  }
  static EnqueueRequest Request(const std::string& id) {
    EnqueueRequest request;
    request.id = id;
    request.tenant = "t";
    request.body_digest = "d";
    request.prompt_tokens = 4;
    request.canvas_tokens = 8;
    request.steps_max = 20;
    request.cost = 100;
    request.payload = "payload of " + id;
    return request;
  }
  EnqueueOutcome Enqueue(RequestRelay& relay, EnqueueRequest request) {
    std::optional<absl::StatusOr<EnqueueResult>> result;
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      AdmissionLimits limits;
      result = co_await relay.Enqueue(request, limits);
    });
    EXPECT_TRUE(result->ok()) << result->status();
    return (*result)->outcome;
  }
  void Attach(RequestRelay& relay, const std::string& request) {
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      std::string id = request;
      const absl::Status status = co_await relay.Attach(std::move(id), "t");
      EXPECT_TRUE(status.ok()) << status;
    });
  }
  void PassGraces() {
    io_.restart();
    io_.run();
  }
  // Events as "choice:step=data" until there are `count`, all have ended, or it takes too long.
  std::vector<std::string> Read(RequestRelay& relay, size_t count,
                                absl::Duration timeout = absl::Seconds(10)) {
    std::vector<std::string> events;
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      const absl::Time until = absl::Now() + timeout;
      while (events.size() < count && !relay.finished()) {
        const absl::StatusOr<std::optional<RelayEvent>> event = co_await relay.Next(until);
        if (!event.ok()) events.push_back(event.status().ToString());
        if (!event.ok() || !event->has_value()) co_return;
        const RelayEvent& got = **event;
        events.push_back(
            absl::StrCat(got.choice, ":", got.event.step, "=", got.event.data,
                         got.event.final_state.has_value()
                             ? absl::StrCat(" ", RequestStateName(*got.event.final_state))
                             : ""));
      }
    });
    return events;
  }

  static RedisServer* server_;
  asio::io_context io_;
  std::unique_ptr<FakeWorker> worker_;
  std::unique_ptr<QueueExecutor> executor_;
  std::unique_ptr<EventHub> hub_;
  std::unique_ptr<RequestRelay> relay_;
};
RedisServer* RelayTest::server_ = nullptr;

TEST_F(RelayTest, EventsComeInOrderToTheirEnd) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  EXPECT_EQ(Enqueue(*relay_, Request("b")), EnqueueOutcome::kAccepted);
  EXPECT_EQ(relay_->num_choices(), 2);
  EXPECT_EQ(hub_->counters().inboxes, 2);
  EXPECT_EQ(worker_->Start("a"), "payload of a");
  worker_->Start("b");
  worker_->Step("a", 1, "x");
  EXPECT_THAT(Read(*relay_, 1), ElementsAre("0:1=x"));
  worker_->Step("b", 1, "y");
  EXPECT_THAT(Read(*relay_, 1), ElementsAre("1:1=y"));
  worker_->Step("a", 2, "z");
  worker_->End("a", 2, "result");
  EXPECT_THAT(Read(*relay_, 2), ElementsAre("0:2=z", "0:3=result done"));
  EXPECT_FALSE(relay_->finished());
  worker_->End("b", 1, "why", /*failed=*/true);
  EXPECT_EQ(Read(*relay_, 1).size(), 1U);
  EXPECT_TRUE(relay_->finished());
  EXPECT_EQ(hub_->counters().inboxes, 0);
  EXPECT_EQ(hub_->counters().strangers, 0);
}

TEST_F(RelayTest, LostPushesAreFilledIn) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  worker_->Start("a");
  worker_->DropSubscribers();
  for (int step = 1; step <= 5; ++step) worker_->Step("a", step, absl::StrCat("d", step));
  EXPECT_THAT(Read(*relay_, 5), ElementsAre("0:1=d1", "0:2=d2", "0:3=d3", "0:4=d4", "0:5=d5"));
  ASSERT_TRUE(Eventually([&] { return hub_->counters().subscribed; }));
  EXPECT_GE(hub_->counters().subscriptions, 2);
  worker_->DropSubscribers();
  worker_->End("a", 5, "result");
  EXPECT_THAT(Read(*relay_, 1), ElementsAre("0:6=result done"));
}

TEST_F(RelayTest, AnotherMayAttach) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  worker_->Start("a");
  worker_->Step("a", 1, "x");
  worker_->Step("a", 2, "y");
  const auto attach = [&](RequestRelay& relay, std::string tenant) {
    absl::Status status;
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      std::string id = "a";
      status = co_await relay.Attach(std::move(id), tenant);
    });
    return status;
  };
  relay_.reset();  // the first reader is gone; nobody cancelled
  const auto other = MakeRelay();
  EXPECT_EQ(attach(*other, "stranger").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(other->num_choices(), 0);
  EXPECT_EQ(hub_->counters().inboxes, 0);
  EXPECT_TRUE(attach(*other, "t").ok());
  EXPECT_THAT(Read(*other, 2), ElementsAre("0:1=x", "0:2=y"));
  worker_->End("a", 2, "result");
  EXPECT_THAT(Read(*other, 1), ElementsAre("0:3=result done"));
  // Long after the end as well.
  const auto late = MakeRelay();
  EXPECT_TRUE(attach(*late, "t").ok());
  EXPECT_THAT(Read(*late, 9), ElementsAre("0:1=x", "0:2=y", "0:3=result done"));
}

TEST_F(RelayTest, AnIdempotencyKeyLeadsToTheFirst) {
  EnqueueRequest request = Request("a");
  request.idempotency_key = "key";
  EXPECT_EQ(Enqueue(*relay_, request), EnqueueOutcome::kAccepted);
  worker_->Start("a");
  worker_->Step("a", 1, "x");
  request.id = "b";
  const auto twin = MakeRelay();
  EXPECT_EQ(Enqueue(*twin, request), EnqueueOutcome::kDuplicate);
  EXPECT_EQ(twin->request_id(0), "a");
  EXPECT_THAT(Read(*twin, 1), ElementsAre("0:1=x"));
  request.id = "c";
  request.body_digest = "another";
  const auto wrong = MakeRelay();
  EXPECT_EQ(Enqueue(*wrong, request), EnqueueOutcome::kMismatch);
  EXPECT_EQ(wrong->num_choices(), 0);
}

TEST_F(RelayTest, WhatRedisForgotIsEnqueuedAgain) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  worker_->Start("a");
  worker_->Step("a", 1, "x");
  worker_->Step("a", 2, "y");
  EXPECT_THAT(Read(*relay_, 2), ElementsAre("0:1=x", "0:2=y"));
  worker_->Forget();
  worker_->DropSubscribers();
  std::thread other_side([&] {
    worker_->Lead();
    ASSERT_TRUE(worker_->Becomes("a", "t", RequestState::kQueued));
    EXPECT_EQ(worker_->Start("a"), "payload of a");
    // The same steps come again, and more.
    worker_->Step("a", 1, "x");
    worker_->Step("a", 2, "y");
    worker_->Step("a", 3, "z");
    worker_->End("a", 3, "result");
  });
  EXPECT_THAT(Read(*relay_, 2, absl::Seconds(30)), ElementsAre("0:3=z", "0:4=result done"));
  other_side.join();
  EXPECT_EQ(relay_->replays(), 1);
}

TEST_F(RelayTest, RedisMayBeAway) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  worker_->Start("a");
  worker_->Step("a", 1, "x");
  EXPECT_THAT(Read(*relay_, 1), ElementsAre("0:1=x"));
  server_->Shutdown();
  EXPECT_THAT(Read(*relay_, 1, absl::Milliseconds(300)), IsEmpty());  // it waits, and is no error
  ASSERT_TRUE(server_->Restart().ok());
  EXPECT_EQ(worker_->Step("a", 2, "y"), RowVerdict::kOk);
  EXPECT_THAT(Read(*relay_, 1, absl::Seconds(30)), ElementsAre("0:2=y"));
}

TEST_F(RelayTest, AnInterruptEndsTheWait) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  std::thread interrupter([&] {
    absl::SleepFor(absl::Milliseconds(30));
    relay_->Interrupt();
  });
  const absl::Time begin = absl::Now();
  EXPECT_THAT(Read(*relay_, 1, absl::Minutes(1)), IsEmpty());
  EXPECT_LT(absl::Now() - begin, absl::Seconds(20));
  interrupter.join();
  EXPECT_TRUE(relay_->interrupted());
}

TEST_F(RelayTest, WhatAnotherWaitsForGoesOn) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  worker_->Start("a");
  const auto second = MakeRelay();
  Attach(*second, "a");
  // Both are told at once, and the work goes on when the first leaves.
  EXPECT_EQ(worker_->Step("a", 1, "x"), RowVerdict::kOk);
  EXPECT_THAT(Read(*relay_, 1), testing::SizeIs(1));
  EXPECT_THAT(Read(*second, 1), testing::SizeIs(1));
  relay_->Leave("gone", absl::ZeroDuration());
  EXPECT_EQ(worker_->Step("a", 2, "y"), RowVerdict::kOk);
  const absl::Time begin = absl::Now();
  EXPECT_THAT(Read(*second, 1), testing::SizeIs(1));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(4));  // pushed, not looked up
  // A client may come back within the grace.
  second->Leave("gone", absl::Seconds(1));
  const auto third = MakeRelay();
  Attach(*third, "a");
  PassGraces();
  EXPECT_EQ(worker_->Step("a", 3, "z"), RowVerdict::kOk);
  third->Leave("gone", absl::Milliseconds(200));
  EXPECT_EQ(worker_->Step("a", 4, "z"), RowVerdict::kOk);
  PassGraces();
  EXPECT_TRUE(worker_->Becomes("a", "t", RequestState::kCancelled));
}

TEST_F(RelayTest, ACancelEndsTheWork) {
  EXPECT_EQ(Enqueue(*relay_, Request("a")), EnqueueOutcome::kAccepted);
  EXPECT_EQ(Enqueue(*relay_, Request("b")), EnqueueOutcome::kAccepted);
  worker_->Start("a");
  relay_->Leave("gone", absl::ZeroDuration());
  EXPECT_TRUE(relay_->finished());
  EXPECT_TRUE(worker_->Becomes("a", "t", RequestState::kCancelled));
  EXPECT_TRUE(worker_->Becomes("b", "t", RequestState::kCancelled));
  EXPECT_EQ(worker_->Step("a", 1, "x"), RowVerdict::kCancelled);
  EXPECT_EQ(hub_->counters().inboxes, 0);
  // What still comes for them is nobody's.
  EXPECT_TRUE(Eventually([&] { return hub_->counters().strangers >= 1; }));
}

TEST_F(RelayTest, CallsHaveABoundAndAllThatWaitAreMade) {
  int made = 0;
  {
    QueueExecutor executor({.redis = server_->client_options(),
                            .queue = kGatewayTestQueue,
                            .num_threads = 1,
                            .calls_max = 2});
    absl::Notification busy, go;
    EXPECT_TRUE(executor.Post([&](Queue&) {
      busy.Notify();
      go.WaitForNotification();
      ++made;
    }));
    busy.WaitForNotification();
    EXPECT_TRUE(executor.Post([&](Queue&) { ++made; }));
    EXPECT_TRUE(executor.Post([&](Queue&) { ++made; }));
    EXPECT_FALSE(executor.Post([&](Queue&) { ++made; }));
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      const QueueCall<int> call = [](Queue&) { return 1; };
      const absl::StatusOr<int> refused = co_await executor.Run<int>(call);
      EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
    });
    EXPECT_TRUE(executor.Post([&](Queue&) { ++made; }, /*must=*/true));
    EXPECT_EQ(executor.counters().refused, 2);
    EXPECT_EQ(executor.counters().waiting, 3);
    EXPECT_EQ(executor.counters().calls, 4);
    go.Notify();
  }
  EXPECT_EQ(made, 4);
}

TEST_F(RelayTest, ManyCallsAtOnceComeBackToTheirCoroutines) {
  int sum = 0;
  for (int i = 1; i <= 200; ++i) {
    asio::co_spawn(
        io_,
        [&, i]() -> asio::awaitable<void> {
          const QueueCall<int> call = [i](Queue&) { return i; };
          const absl::StatusOr<int> result = co_await executor_->Run<int>(call);
          sum += result.value_or(-1'000'000);
        },
        asio::detached);
  }
  io_.restart();
  io_.run();
  EXPECT_EQ(sum, 20100);
}

}  // namespace
}  // namespace cinnabar
