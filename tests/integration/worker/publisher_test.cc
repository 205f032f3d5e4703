// The publisher against a real queue: order, one call for many steps, what Redis forgot, what is no
// longer wanted, and a Redis that is away.
#include "worker/service/publisher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/queue_state.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr absl::Duration kLong = absl::Seconds(10);

class PublisherTest : public testing::Test {
 protected:
  void SetUp() override {
    auto server = RedisServer::Start();
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    redis_ = std::make_unique<RedisClient>(server_->client_options());
    queue_ = std::make_unique<Queue>(*redis_, QueueOptions{.partition = "p"});
    epoch_ = queue_->Lead("s1", kLong)->epoch;
    publisher_ = std::make_unique<Publisher>(
        "w1", kLong, [this](const RowLease& row) { dropped_.push_back(row.request); });
  }

  RowLease Start(const std::string& id, const std::string& batch = "") {
    EnqueueRequest request;
    request.id = id;
    request.tenant = "t";
    request.canvas_tokens = 32;
    request.steps_max = 8;
    request.cost = 1;
    request.payload = "p";
    EXPECT_TRUE(queue_->Enqueue(request, {}).ok());
    const std::string name = batch.empty() ? absl::StrCat("b-", id) : batch;
    EXPECT_TRUE(queue_->Dispatch(epoch_, {.batch = name, .requests = {id}}).ok());
    EXPECT_TRUE(queue_->TakePack("any", absl::Seconds(1)).ok());
    const auto started = queue_->Start("w1", name, kLong);
    EXPECT_TRUE(started.ok() && started->rows.size() == 1);
    const RowLease lease = started->rows[0].lease;
    publisher_->Open(lease, 0, {});
    return lease;
  }
  void Step(const RowLease& lease, int32_t step, const std::string& snapshot = "") {
    publisher_->Step(
        {.lease = lease, .step = step, .delta = absl::StrCat("d", step), .snapshot = snapshot});
  }
  std::vector<std::string> Deltas(const std::string& id) {
    const auto view = queue_->Events(id, "t", 0, 100);
    EXPECT_TRUE(view.ok()) << view.status();
    std::vector<std::string> deltas;
    for (const QueueEvent& event : view->events) deltas.push_back(event.data);
    return deltas;
  }

  std::unique_ptr<RedisServer> server_;
  std::unique_ptr<RedisClient> redis_;
  std::unique_ptr<Queue> queue_;
  std::unique_ptr<Publisher> publisher_;
  std::vector<std::string> dropped_;
  int64_t epoch_ = 0;
};

TEST_F(PublisherTest, StepsOfAllRowsGoInOneCallAndInOrder) {
  const RowLease a = Start("a");
  const RowLease b = Start("b");
  for (int32_t step = 1; step <= 5; ++step) {
    Step(a, step);
    if (step <= 2) Step(b, step);
  }
  publisher_->Finish({.lease = a, .last_step = 5, .result = "answer"});
  EXPECT_EQ(publisher_->counters().pending, 7);
  EXPECT_FALSE(publisher_->AwaitRoom(6, absl::Milliseconds(1)));
  EXPECT_TRUE(publisher_->Send(*queue_));
  EXPECT_EQ(publisher_->counters().calls, 1);
  EXPECT_EQ(publisher_->counters().pending, 0);
  EXPECT_TRUE(publisher_->AwaitRoom(0, absl::ZeroDuration()));
  EXPECT_TRUE(publisher_->Flush(absl::ZeroDuration()));
  EXPECT_THAT(Deltas("a"), ElementsAre("d1", "d2", "d3", "d4", "d5", "answer"));
  EXPECT_THAT(Deltas("b"), ElementsAre("d1", "d2"));
  EXPECT_THAT(dropped_, IsEmpty());
  EXPECT_TRUE(publisher_->Send(*queue_));  // nothing left: no call
  EXPECT_EQ(publisher_->counters().calls, 1);
}

TEST_F(PublisherTest, WhatRedisForgotIsSentAgain) {
  const RowLease a = Start("a");
  Step(a, 1);
  Step(a, 2, "canvas");
  EXPECT_TRUE(publisher_->Send(*queue_));
  // As after a rewind: the second step is gone.
  const std::string batch = "cb:{p}:b:b-a";
  std::string row = redis_->Command({"HGET", batch, "a"})->text;
  const size_t second = row.find(' ') + 1;
  row.replace(second, row.find(' ', second) - second, "1");
  ASSERT_TRUE(redis_->Command({"HSET", batch, "a", row}).ok());
  ASSERT_TRUE(redis_->Command({"XDEL", "cb:{p}:ev:a", "2-1"}).ok());
  ASSERT_TRUE(redis_->Command({"XSETID", "cb:{p}:ev:a", "1-1"}).ok());
  Step(a, 3);
  EXPECT_TRUE(publisher_->Send(*queue_));
  EXPECT_EQ(publisher_->counters().rewinds, 1);
  EXPECT_FALSE(publisher_->Flush(absl::ZeroDuration()));
  publisher_->Finish({.lease = a, .last_step = 3, .result = "answer"});
  EXPECT_TRUE(publisher_->Send(*queue_));
  EXPECT_THAT(Deltas("a"), ElementsAre("d1", "d2", "d3", "answer"));
  EXPECT_THAT(dropped_, IsEmpty());
}

TEST_F(PublisherTest, ARowThatIsNotWantedIsDroppedOnce) {
  const RowLease a = Start("a");
  const RowLease b = Start("b");
  Step(a, 1);
  EXPECT_TRUE(queue_->Cancel("a", "t", "client").ok());
  Step(b, 1);
  EXPECT_TRUE(publisher_->Send(*queue_));
  EXPECT_THAT(dropped_, ElementsAre("a"));
  Step(a, 2);  // the engine had not heard yet
  publisher_->Finish({.lease = a, .last_step = 2});
  EXPECT_EQ(publisher_->counters().pending, 0);
  // Taken over: what the old hold says is fenced off and ignored.
  ASSERT_TRUE(queue_->Abandon("w1", std::vector<std::string>{"b-b"}).ok());
  ASSERT_EQ(queue_->Reap(epoch_, {})->requeued, 1);
  Step(b, 2);
  EXPECT_TRUE(publisher_->Send(*queue_));
  EXPECT_THAT(dropped_, ElementsAre("a", "b"));
  EXPECT_EQ(publisher_->counters().fenced, 1);
}

TEST_F(PublisherTest, HandBackFollowsTheSteps) {
  const RowLease a = Start("a");
  Step(a, 1);
  Step(a, 2);
  publisher_->HandBack({.lease = a, .snapshot_step = 2, .snapshot = "canvas"});
  EXPECT_TRUE(publisher_->Send(*queue_));
  EXPECT_TRUE(publisher_->Flush(absl::ZeroDuration()));
  EXPECT_EQ(queue_->Events("a", "t", 0, 0)->state, RequestState::kQueued);
  ASSERT_TRUE(queue_->Dispatch(epoch_, {.batch = "again", .requests = {"a"}}).ok());
  ASSERT_TRUE(queue_->TakePack("any", absl::Seconds(1)).ok());
  const auto started = queue_->Start("w2", "again", kLong);
  ASSERT_TRUE(started.ok() && started->rows.size() == 1) << started.status();
  EXPECT_EQ(started->rows[0].step, 2);
  EXPECT_EQ(started->rows[0].snapshot, "canvas");
}

TEST_F(PublisherTest, WhileRedisIsAwayNothingIsLost) {
  const RowLease a = Start("a");
  Step(a, 1);
  server_->Shutdown();
  EXPECT_FALSE(publisher_->Send(*queue_));
  EXPECT_EQ(publisher_->counters().failures, 1);
  EXPECT_EQ(publisher_->counters().pending, 1);
  Step(a, 2);
  ASSERT_TRUE(server_->Restart().ok());
  publisher_->Finish({.lease = a, .last_step = 2, .result = "answer"});
  for (int i = 0; i < 20 && !publisher_->Flush(absl::ZeroDuration()); ++i) {
    (void)publisher_->Send(*queue_);
  }
  EXPECT_THAT(Deltas("a"), ElementsAre("d1", "d2", "answer"));
}

}  // namespace
}  // namespace cinnabar
