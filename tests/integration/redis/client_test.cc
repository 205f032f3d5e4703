// The client against a real server, with a proxy between them that fails as networks do.
#include "common/redis/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/redis/pool.h"
#include "tests/support/fault_proxy.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;

class ClientTest : public testing::Test {
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
  RedisOptions Through(const FaultProxy& proxy) {
    RedisOptions options = server_->client_options();
    options.address.port = proxy.port();
    options.command_timeout = absl::Milliseconds(300);
    options.retry.attempts_max = 1;
    return options;
  }
  static RedisServer* server_;
};
RedisServer* ClientTest::server_ = nullptr;

std::string Text(const absl::StatusOr<RedisReply>& reply) {
  return reply.ok() ? reply->text : absl::StrCat("error: ", reply.status().message());
}

TEST_F(ClientTest, ArgumentsAndRepliesAreAnyBytes) {
  RedisClient client(server_->client_options());
  std::string bytes;
  for (int i = 0; i < 256; ++i) bytes += static_cast<char>(i);
  bytes += "%s%b\r\n";
  ASSERT_TRUE(client.Command({"SET", bytes, bytes}).ok());
  EXPECT_EQ(Text(client.Command({"GET", bytes})), bytes);
  EXPECT_TRUE(client.Command({"GET", "absent"})->is_nil());
  EXPECT_TRUE(absl::IsDataLoss(client.Command({"LPUSH", bytes, "x"}).status()));
  EXPECT_EQ(client.server().run_id.size(), 40U);
  const std::string large(5 << 20, 'L');
  ASSERT_TRUE(client.Command({"SET", "large", large}).ok());
  EXPECT_EQ(Text(client.Command({"GET", "large"})), large);
}

TEST_F(ClientTest, AfterATimeoutTheLateReplyIsNobodys) {
  FaultProxy proxy(server_->port());
  RedisClient client(Through(proxy));
  ASSERT_TRUE(client.Command({"MSET", "k1", "one", "k2", "two"}).ok());
  proxy.Set({.kind = Fault::Kind::kDelayReplies, .delay = absl::Milliseconds(500)});
  const absl::Status late = client.Command({"GET", "k1"}).status();
  EXPECT_TRUE(absl::IsUnavailable(late)) << late;
  EXPECT_THAT(std::string(late.message()), HasSubstr("may have run"));
  proxy.Set({});
  EXPECT_EQ(Text(client.Command({"GET", "k2"})), "two");
  EXPECT_EQ(client.counters().connections_lost, 1);
}

TEST_F(ClientTest, ADribbleDoesNotOutliveTheDeadline) {
  FaultProxy proxy(server_->port());
  RedisClient client(Through(proxy));
  ASSERT_TRUE(client.Command({"SET", "k", std::string(1000, 'x')}).ok());
  proxy.Set({.kind = Fault::Kind::kDribble, .delay = absl::Milliseconds(50)});
  const absl::Time before = absl::Now();
  EXPECT_TRUE(absl::IsUnavailable(client.Command({"GET", "k"}).status()));
  EXPECT_LT(absl::Now() - before, absl::Milliseconds(600));
}

TEST_F(ClientTest, AClosedPeerRaisesNoSigpipe) {
  ASSERT_NE(signal(SIGPIPE, SIG_DFL), SIG_ERR);
  auto doomed = RedisServer::Start();
  ASSERT_TRUE(doomed.ok());
  RedisOptions options = (*doomed)->client_options();
  options.retry.attempts_max = 1;
  RedisClient client(options);
  ASSERT_TRUE(client.Command({"PING"}).ok());
  (*doomed)->Kill();
  for (int i = 0; i < 3; ++i)
    EXPECT_TRUE(
        absl::IsUnavailable(client.Command({"SET", "k", std::string(1 << 20, 'x')}).status()));
}

TEST_F(ClientTest, ACutPipelineTellsHowFarItCame) {
  FaultProxy proxy(server_->port());
  RedisClient client(Through(proxy));
  ASSERT_TRUE(client.Connect().ok());
  proxy.Set({.kind = Fault::Kind::kCutReplies, .bytes = 12});  // "+OK\r\n" twice, and two bytes
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(client.Append({"SET", absl::StrCat("p", i), "v"}).ok());
  const auto results = client.Flush();
  ASSERT_EQ(results.size(), 5U);
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(results[i].ok(), i < 2) << i;
  EXPECT_TRUE(absl::IsUnavailable(results[4].status()));
  proxy.Set({});
  EXPECT_EQ(Text(client.Command({"GET", "p4"})), "v");  // it did run
}

TEST_F(ClientTest, ACutRequestDoesNotRun) {
  FaultProxy proxy(server_->port());
  RedisClient client(Through(proxy));
  ASSERT_TRUE(client.Command({"DEL", "half"}).ok());
  proxy.Set({.kind = Fault::Kind::kCutRequests, .bytes = 20});
  EXPECT_TRUE(absl::IsUnavailable(client.Command({"SET", "half", std::string(100, 'x')}).status()));
  proxy.Set({});
  EXPECT_TRUE(client.Command({"GET", "half"})->is_nil());
}

TEST_F(ClientTest, PipelinesLargerThanEveryBufferDoNotDeadlock) {
  RedisClient client(server_->client_options());
  const std::string value(1 << 20, 'v');
  ASSERT_TRUE(client.Command({"SET", "big", value}).ok());
  for (int i = 0; i < 24; ++i)
    ASSERT_TRUE(client.Append({i % 2 == 0 ? "ECHO" : "GET", i % 2 == 0 ? value : "big"}).ok());
  for (const auto& result : client.Flush()) EXPECT_EQ(Text(result), value);
}

TEST_F(ClientTest, BytesAreBoundedBothWays) {
  RedisOptions options = server_->client_options();
  options.pipeline_bytes_max = 10000;
  RedisClient client(options);
  EXPECT_TRUE(absl::IsResourceExhausted(client.Append({"ECHO", std::string(20000, 'x')})));
  ASSERT_TRUE(client.Command({"SET", "b", std::string(6000, 'x')}).ok());
  ASSERT_TRUE(client.Append({"GET", "b"}).ok());
  ASSERT_TRUE(client.Append({"GET", "b"}).ok());
  const auto results = client.Flush();
  EXPECT_TRUE(absl::IsDataLoss(results[1].status())) << results[1].status();
  EXPECT_TRUE(client.Command({"PING"}).ok());
}

TEST_F(ClientTest, ABlockLongerThanTheCommandTimeout) {
  RedisOptions options = server_->client_options();
  options.command_timeout = absl::Milliseconds(100);
  RedisClient client(options);
  ASSERT_TRUE(client.Connect().ok());
  const auto reply = client.Block({"BLPOP", "never", "0.4"}, absl::Milliseconds(400));
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_TRUE(reply->is_nil());
}

class CountingEnvironment : public Environment {
 public:
  void Sleep(absl::Duration duration) override { slept.push_back(duration); }
  double Uniform() override { return 0.0; }
  std::vector<absl::Duration> slept;
};

TEST_F(ClientTest, RetriesBackOffAndStop) {
  CountingEnvironment environment;
  RedisOptions options;
  options.address.port = FreePort();
  options.retry.attempts_max = 4;
  RedisClient client(options, environment);
  const absl::Status status = client.Retry({"PING"}).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(environment.slept,
              testing::ElementsAre(absl::Milliseconds(50), absl::Milliseconds(100),
                                   absl::Milliseconds(200)));
  EXPECT_EQ(client.counters().retries, 3);
}

TEST_F(ClientTest, ARestartCostsARetryAndNewGreetings) {
  auto server = RedisServer::Start({.appendfsync = "always"});
  ASSERT_TRUE(server.ok());
  RedisClient client((*server)->client_options());
  std::vector<std::string> run_ids;
  client.set_on_connect([&](RedisClient& fresh) {
    run_ids.push_back(fresh.server().run_id);
    return fresh.Command({"PING"}).status();
  });
  ASSERT_TRUE(client.Retry({"SET", "k", "v"}).ok());
  ASSERT_TRUE((*server)->Restart().ok());
  EXPECT_EQ(Text(client.Retry({"GET", "k"})), "v");
  ASSERT_EQ(run_ids.size(), 2U);
  EXPECT_NE(run_ids[0], run_ids[1]);
}

TEST_F(ClientTest, AFrozenServerIsATimeout) {
  auto server = RedisServer::Start();
  ASSERT_TRUE(server.ok());
  RedisOptions options = (*server)->client_options();
  options.command_timeout = absl::Milliseconds(200);
  RedisClient client(options);
  ASSERT_TRUE(client.Command({"SET", "k", "v"}).ok());
  (*server)->Signal(SIGSTOP);
  EXPECT_TRUE(absl::IsUnavailable(client.Command({"GET", "k"}).status()));
  (*server)->Signal(SIGCONT);
  EXPECT_EQ(Text(client.Retry({"GET", "k"})), "v");
}

TEST_F(ClientTest, ADemotedServerIsLeft) {
  auto server = RedisServer::Start();
  ASSERT_TRUE(server.ok());
  RedisOptions options = (*server)->client_options();
  options.retry.attempts_max = 2;
  RedisClient client(options);
  RedisClient admin((*server)->client_options());
  ASSERT_TRUE(client.Command({"SET", "k", "v"}).ok());
  ASSERT_TRUE(admin.Command({"REPLICAOF", "127.0.0.1", absl::StrCat(server_->port())}).ok());
  const absl::Status first = client.Command({"SET", "k", "v"}).status();
  EXPECT_TRUE(absl::IsUnavailable(first)) << first;  // READONLY
  const absl::Status second = client.Retry({"GET", "k"}).status();
  EXPECT_TRUE(absl::IsUnavailable(second)) << second;
  EXPECT_THAT(std::string(second.message()), HasSubstr("not a primary"));
}

TEST_F(ClientTest, AFullServerRefusesAndAWrongPasswordSaysSo) {
  auto server = RedisServer::Start(
      {.config = {"maxmemory 2mb", "user limited on >pw ~* +ping +client +role +info +set"}});
  ASSERT_TRUE(server.ok()) << server.status();
  RedisOptions options = (*server)->client_options();
  RedisClient client(options);
  absl::Status status;
  for (int i = 0; i < 100 && status.ok(); ++i)
    status = client.Command({"SET", absl::StrCat(i), std::string(100000, 'x')}).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  options.username = "limited";
  options.password = "pw";
  RedisClient limited(options);
  EXPECT_TRUE(limited.Command({"PING"}).ok());
  EXPECT_TRUE(absl::IsPermissionDenied(limited.Command({"GET", "0"}).status()));
  options.password = "wrong";
  RedisClient wrong(options);
  EXPECT_TRUE(absl::IsUnauthenticated(wrong.Command({"PING"}).status()));
}

TEST_F(ClientTest, SubscriptionsDeliverIdleAndNoticeALoss) {
  FaultProxy proxy(server_->port());
  RedisClient reader(Through(proxy));
  RedisClient writer(server_->client_options());
  ASSERT_TRUE(reader.Subscribe({"a", "b"}).ok());
  EXPECT_FALSE(reader.ReadMessage(absl::Milliseconds(20))->has_value());
  for (int i = 0; i < 100; ++i)
    ASSERT_TRUE(writer.Command({"PUBLISH", i % 2 == 0 ? "a" : "b", absl::StrCat(i)}).ok());
  for (int i = 0; i < 100; ++i) {
    const auto message = reader.ReadMessage(absl::Seconds(2));
    ASSERT_TRUE(message.ok() && message->has_value());
    EXPECT_EQ((*message)->payload, absl::StrCat(i));
    EXPECT_EQ((*message)->channel, i % 2 == 0 ? "a" : "b");
  }
  proxy.Set({.kind = Fault::Kind::kCutReplies, .bytes = 5});
  ASSERT_TRUE(writer.Command({"PUBLISH", "a", "cut"}).ok());
  EXPECT_TRUE(absl::IsUnavailable(reader.ReadMessage(absl::Seconds(2)).status()));
  EXPECT_TRUE(absl::IsUnavailable(reader.ReadMessage(absl::Seconds(2)).status()));
  proxy.Set({});
  EXPECT_TRUE(reader.Subscribe({"a"}).ok());
}

TEST_F(ClientTest, ThePoolLendsItsClientsOnce) {
  RedisPool pool(server_->client_options(), 2);
  auto one = pool.Borrow(absl::Seconds(1));
  ASSERT_TRUE(one.ok());
  {
    auto two = pool.Borrow(absl::Seconds(1));
    ASSERT_TRUE(two.ok());
    EXPECT_TRUE(absl::IsResourceExhausted(pool.Borrow(absl::Milliseconds(10)).status()));
    EXPECT_TRUE((**two).Command({"PING"}).ok());
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&pool] {
      for (int i = 0; i < 50; ++i) {
        auto loan = pool.Borrow(absl::Seconds(10));
        ASSERT_TRUE(loan.ok());
        EXPECT_EQ(Text((*loan)->Command({"ECHO", "x"})), "x");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(ClientTest, SentinelsNameThePrimaryBeforeAndAfterAFailover) {
  auto primary = RedisServer::Start();
  ASSERT_TRUE(primary.ok());
  auto replica =
      RedisServer::Start({.config = {absl::StrCat("replicaof 127.0.0.1 ", (*primary)->port()),
                                     "repl-diskless-sync-delay 0"}});
  ASSERT_TRUE(replica.ok());
  auto sentinel = RedisServer::Start(
      {.sentinel = true,
       .config = {absl::StrCat("sentinel monitor pool 127.0.0.1 ", (*primary)->port(), " 1"),
                  "sentinel down-after-milliseconds pool 500",
                  "sentinel failover-timeout pool 2000"}});
  ASSERT_TRUE(sentinel.ok()) << sentinel.status();
  RedisOptions options;
  options.sentinels = {{.host = "127.0.0.1", .port = FreePort()},
                       {.host = "127.0.0.1", .port = (*sentinel)->port()}};
  options.master_name = "pool";
  options.retry = {.attempts_max = 150,
                   .backoff_min = absl::Milliseconds(100),
                   .backoff_max = absl::Milliseconds(100)};
  RedisClient client(options);
  ASSERT_TRUE(client.Retry({"SET", "k", "v"}).ok());
  EXPECT_EQ(client.server().address.port, (*primary)->port());
  RedisClient to_replica((*primary)->client_options());
  // The replica must hold the data and be known to the Sentinel before the primary goes.
  auto raw = RedisConnection::Open({.port = (*sentinel)->port()}, absl::Seconds(1), {});
  ASSERT_TRUE(raw.ok());
  std::string question;
  AppendRedisCommand({"SENTINEL", "replicas", "pool"}, question);
  bool known = false;
  for (int i = 0; i < 200 && !known; ++i) {
    std::vector<RedisReply> replies;
    ASSERT_TRUE((*raw)->Exchange(question, 1, absl::Seconds(1), 1 << 20, replies).ok());
    const auto info = to_replica.Command({"INFO", "replication"});
    known = replies[0].elements.size() == 1 && info.ok() &&
            absl::StrContains(info->text, "state=online");
    if (!known) absl::SleepFor(absl::Milliseconds(50));
  }
  ASSERT_TRUE(known);
  absl::SleepFor(absl::Milliseconds(300));
  (*primary)->Kill();
  EXPECT_EQ(Text(client.Retry({"GET", "k"})), "v");
  EXPECT_EQ(client.server().address.port, (*replica)->port());
  options.master_name = "other";
  options.retry.attempts_max = 1;
  RedisClient lost(options);
  EXPECT_THAT(std::string(lost.Command({"PING"}).status().message()),
              HasSubstr("knows no primary 'other'"));
}

}  // namespace
}  // namespace cinnabar
