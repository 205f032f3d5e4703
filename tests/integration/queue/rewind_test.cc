// Redis comes back with an older state, empty, or as another data set.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/queue/queue.h"
#include "tests/support/queue_state.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
namespace fs = std::filesystem;

constexpr absl::Duration kLong = absl::Minutes(1);

class RewindTest : public testing::Test {
 protected:
  void SetUp() override {
    auto server = RedisServer::Start({.appendfsync = "always"});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    redis_ = std::make_unique<RedisClient>(server_->client_options());
    queue_ = std::make_unique<Queue>(*redis_, QueueOptions{.partition = "q", .site = "site-1"});
    epoch_ = queue_->Lead("s1", kLong)->epoch;
  }
  fs::path Aof() const { return fs::path(server_->directory()) / "appendonlydir"; }
  fs::path Copy() const { return fs::path(server_->directory()) / "copy"; }
  void Keep() {
    fs::remove_all(Copy());
    fs::copy(Aof(), Copy(), fs::copy_options::recursive);
  }
  void Restore() {
    server_->Kill();
    fs::remove_all(Aof());
    fs::copy(Copy(), Aof(), fs::copy_options::recursive);
    ASSERT_TRUE(server_->Restart().ok());
  }
  static EnqueueRequest Request(const std::string& id) {
    EnqueueRequest request;
    request.id = id;
    request.tenant = "t";
    request.steps_max = 8;
    request.payload = "payload";
    return request;
  }
  static ProgressRow Step(const RowLease& lease, int32_t step) {
    return {.lease = lease, .step = step, .delta = absl::StrCat("d", step)};
  }
  RowLease Start(const std::string& id, const std::string& batch) {
    EXPECT_TRUE(queue_->Dispatch(epoch_, {.batch = batch, .requests = {id}}).ok());
    const auto started = queue_->Start("w1", batch, kLong);
    EXPECT_EQ(started->rows.size(), 1U);
    return started->rows[0].lease;
  }

  std::unique_ptr<RedisServer> server_;
  std::unique_ptr<RedisClient> redis_;
  std::unique_ptr<Queue> queue_;
  int64_t epoch_ = 0;
};

TEST_F(RewindTest, ARestartThatLostNothingIsNoRewind) {
  ASSERT_TRUE(queue_->Enqueue(Request("r1"), {}).ok());
  ASSERT_TRUE(server_->Restart().ok());
  EXPECT_EQ(queue_->Events("r1", "t", 0, 10)->state, RequestState::kQueued);
  EXPECT_EQ(queue_->mark().rewinds, 0);
  EXPECT_EQ(queue_->mark().restarts, 1);
}

TEST_F(RewindTest, LostStepsAreSentAgainAndTheStreamHasNoGap) {
  ASSERT_TRUE(queue_->Enqueue(Request("r1"), {}).ok());
  const RowLease lease = Start("r1", "b1");
  ASSERT_TRUE(
      queue_->Publish("w1", {.lease_for = kLong, .progress = {Step(lease, 1), Step(lease, 2)}})
          .ok());
  Keep();
  ASSERT_TRUE(
      queue_->Publish("w1", {.lease_for = kLong, .progress = {Step(lease, 3), Step(lease, 4)}})
          .ok());
  Restore();
  const auto next = queue_->Publish("w1", {.lease_for = kLong,
                                           .progress = {Step(lease, 5)},
                                           .finished = {{.lease = lease, .last_step = 5}}});
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(next->progress[0].verdict, RowVerdict::kRewind);
  EXPECT_EQ(next->progress[0].step, 2);
  EXPECT_EQ(next->finished[0].verdict, RowVerdict::kRewind);
  EXPECT_EQ(queue_->mark().rewinds, 1);
  const auto replay =
      queue_->Publish("w1", {.lease_for = kLong,
                             .progress = {Step(lease, 3), Step(lease, 4), Step(lease, 5)},
                             .finished = {{.lease = lease, .last_step = 5}}});
  ASSERT_TRUE(replay.ok());
  EXPECT_EQ(replay->finished[0].verdict, RowVerdict::kOk);
  const auto view = queue_->Events("r1", "t", 0, 100);
  ASSERT_EQ(view->events.size(), 6U);
  for (int32_t i = 0; i < 5; ++i) EXPECT_EQ(view->events[i].data, absl::StrCat("d", i + 1));
  EXPECT_THAT(*CheckQueueState(*redis_, "cb:{q}:"), IsEmpty());
}

TEST_F(RewindTest, ALostAdmissionIsReplayedByItsGateway) {
  Keep();
  AdmissionLimits limits = {.tenant_requests_max = 1};
  ASSERT_EQ(queue_->Enqueue(Request("r1"), limits)->outcome, EnqueueOutcome::kAccepted);
  const RowLease lease = Start("r1", "b1");
  Restore();
  EXPECT_TRUE(absl::IsNotFound(queue_->Events("r1", "t", 0, 10).status()));
  EXPECT_EQ(queue_->mark().rewinds, 1);
  EXPECT_EQ(queue_->Publish("w1", {.progress = {Step(lease, 1)}})->progress[0].verdict,
            RowVerdict::kGone);
  ASSERT_EQ(queue_->Enqueue(Request("other"), {})->outcome,
            EnqueueOutcome::kAccepted);  // the tenant is at its limit
  EnqueueRequest replay = Request("r1");
  replay.replay = true;
  EXPECT_EQ(queue_->Enqueue(replay, limits)->outcome, EnqueueOutcome::kAccepted);
  EXPECT_EQ(queue_->Enqueue(replay, limits)->outcome, EnqueueOutcome::kDuplicate);
  // The worker's old lease is of a batch that was dispatched to nobody.
  const int64_t epoch = queue_->Lead("s1", kLong)->epoch;
  ASSERT_EQ(queue_->Dispatch(epoch, {.batch = "b2", .requests = {"r1"}})->rows[0].attempt, 1);
  ASSERT_EQ(queue_->Start("w1", "b2", kLong)->rows.size(), 1U);
  EXPECT_EQ(queue_->Publish("w1", {.progress = {Step(lease, 1)}})->progress[0].verdict,
            RowVerdict::kStale);
}

TEST_F(RewindTest, ALostEndIsRepeated) {
  ASSERT_TRUE(queue_->Enqueue(Request("r1"), {}).ok());
  const RowLease lease = Start("r1", "b1");
  const PublishReport report = {.lease_for = kLong,
                                .progress = {Step(lease, 1)},
                                .finished = {{.lease = lease, .last_step = 1}}};
  Keep();
  ASSERT_EQ(queue_->Publish("w1", report)->finished[0].verdict, RowVerdict::kOk);
  Restore();
  EXPECT_EQ(queue_->Events("r1", "t", 0, 10)->state, RequestState::kRunning);
  ASSERT_EQ(queue_->Publish("w1", report)->finished[0].verdict, RowVerdict::kOk);
  EXPECT_EQ(queue_->ReadLedger("0", 10)->size(), 1U);
}

// Others may push the change number past what was lost before this client comes back.
TEST_F(RewindTest, ARewindThatOthersHaveOvertakenIsNoticed) {
  Keep();
  ASSERT_TRUE(queue_->Enqueue(Request("r1"), {}).ok());
  Restore();
  RedisClient other_redis(server_->client_options());
  Queue other(other_redis, {.partition = "q"});
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(other.Enqueue(Request(absl::StrCat("o", i)), {}).ok());
  EXPECT_EQ(other.mark().rewinds, 0);
  EXPECT_TRUE(absl::IsNotFound(queue_->Events("r1", "t", 0, 10).status()));
  EXPECT_EQ(queue_->mark().rewinds, 1);
}

TEST_F(RewindTest, ATornTailIsCutAtAWholeCall) {
  ASSERT_TRUE(queue_->Enqueue(Request("r1"), {}).ok());
  const RowLease lease = Start("r1", "b1");
  for (int32_t step = 1; step <= 4; ++step) {
    ASSERT_TRUE(queue_->Publish("w1", {.lease_for = kLong, .progress = {Step(lease, step)}}).ok());
  }
  server_->Kill();
  for (const auto& file : fs::directory_iterator(Aof())) {
    if (absl::StrContains(file.path().string(), ".incr.aof"))
      fs::resize_file(file.path(), fs::file_size(file.path()) - 40);
  }
  ASSERT_TRUE(server_->Restart().ok());
  const auto reply = queue_->Publish("w1", {.lease_for = kLong, .progress = {Step(lease, 5)}});
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->progress[0].verdict, RowVerdict::kRewind);
  EXPECT_EQ(reply->progress[0].step, 3);
  const auto wrong = CheckQueueState(*redis_, "cb:{q}:");
  EXPECT_THAT(*wrong, IsEmpty());
}

TEST_F(RewindTest, AnEmptyOrForeignRedisIsRefused) {
  ASSERT_TRUE(queue_->Open().ok());
  server_->Kill();
  fs::remove_all(Aof());
  ASSERT_TRUE(server_->Restart().ok());
  const absl::Status empty = queue_->Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(empty)) << empty;
  EXPECT_THAT(std::string(empty.message()), HasSubstr("holds no data"));
  RedisClient other_redis(server_->client_options());
  Queue other(other_redis, {.partition = "q", .site = "site-2"});
  ASSERT_TRUE(other.Open().ok());
  const absl::Status foreign = queue_->Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(foreign)) << foreign;
  EXPECT_THAT(std::string(foreign.message()), HasSubstr("'site-2', not 'site-1'"));
}

// What one client of a process has seen, its other clients insist on, though they never greeted;
// and a site that somebody made in the empty server meanwhile is another one.
TEST(SiteTest, AnEmptyRedisIsNoFreshStartForAProcessThatKnewItsSite) {
  const std::unique_ptr<RedisServer> server = *RedisServer::Start();
  RedisClient one(server->client_options()), two(server->client_options()),
      three(server->client_options()), four(server->client_options());
  const auto memory = std::make_shared<SiteMemory>();
  Queue worker(four, {.partition = "q", .may_create_site = false});
  EXPECT_THAT(std::string(worker.Open().message()), HasSubstr("holds no data"));
  Queue first(one, {.partition = "q", .site_memory = memory});
  ASSERT_TRUE(first.Open().ok());
  EXPECT_TRUE(worker.Open().ok());
  ASSERT_TRUE(one.Command({"FLUSHALL"}).ok());
  Queue second(two, {.partition = "q", .site_memory = memory});
  EXPECT_THAT(std::string(second.Open().message()), HasSubstr("holds no data"));
  Queue stranger(three, {.partition = "q"});
  ASSERT_TRUE(stranger.Open().ok());
  EXPECT_THAT(std::string(second.Open().message()), HasSubstr("holds site 'site-"));
  one.Close();
  EXPECT_FALSE(first.Open().ok());
}

}  // namespace
}  // namespace cinnabar
