#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/keys/key_cache.h"
#include "common/keys/key_store.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr absl::Duration kPatience = absl::Seconds(10);

Pepper PepperOf(uint8_t byte) {
  std::array<uint8_t, 32> bytes;
  bytes.fill(byte);
  return Pepper(bytes);
}

class KeysTest : public testing::Test {
 protected:
  KeysTest()
      : server_(*RedisServer::Start()), redis_(server_->client_options()), store_(redis_, "p") {}

  CreatedKey Make(const std::string& tenant, const Pepper& pepper,
                  absl::Time created_at = absl::Now()) {
    absl::StatusOr<CreatedKey> created = store_.Create({.tenant = tenant}, pepper, created_at);
    EXPECT_TRUE(created.ok()) << created.status();
    return *std::move(created);
  }
  // With a refresh that never comes by itself unless `refresh` says so.
  std::unique_ptr<KeyCache> Cache(const Pepper& pepper, absl::Duration refresh = absl::Hours(1)) {
    return std::make_unique<KeyCache>(KeyCacheOptions{.partition = "p", .refresh = refresh},
                                      server_->client_options(), pepper);
  }

  std::unique_ptr<RedisServer> server_;
  RedisClient redis_;
  KeyStore store_;
};

TEST_F(KeysTest, CreatedListedRevokedForgotten) {
  EXPECT_TRUE(store_.List()->keys.empty());
  // Listed by time; two keys of one millisecond would come in the order of their random ids.
  const absl::Time now = absl::Now();
  const CreatedKey second = Make("beta", PepperOf(1), now + absl::Seconds(1));
  const CreatedKey first = Make("acme", PepperOf(1), now);
  KeyListing listing = *store_.List();
  ASSERT_EQ(listing.keys.size(), 2U);
  EXPECT_EQ(listing.keys[0].key.id, first.key.id);
  EXPECT_EQ(listing.keys[1].key.spec.tenant, "beta");
  EXPECT_EQ(store_.Forget(first.key.id).code(), absl::StatusCode::kFailedPrecondition);
  const absl::Time when = absl::FromUnixSeconds(1'795'000'000);
  EXPECT_EQ(store_.Revoke(first.key.id, when)->revoked, when);
  EXPECT_EQ(store_.Revoke(first.key.id, when + absl::Seconds(9))->revoked, when);  // the first time
  EXPECT_TRUE(store_.Forget(first.key.id).ok());
  EXPECT_EQ(store_.Revoke(first.key.id, when).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(store_.List()->keys.size(), 1U);
}

TEST_F(KeysTest, TheSecretIsNowhereInRedis) {
  const CreatedKey created = Make("acme", PepperOf(1));
  const std::string secret = created.text.substr(created.text.rfind('_') + 1);
  const RedisReply keys = *redis_.Command({"KEYS", "*"});
  ASSERT_EQ(keys.elements.size(), 2U);
  for (const RedisReply& key : keys.elements) {
    const RedisReply dump = *redis_.Command({"DUMP", key.text});
    EXPECT_THAT(dump.text, Not(HasSubstr(secret.substr(0, 16))));
    EXPECT_THAT(key.text, Not(HasSubstr(secret.substr(0, 16))));
  }
}

TEST_F(KeysTest, EveryChangeChangesTheVersion) {
  std::string last = *store_.Version();
  const auto changed = [&] {
    const std::string now = *store_.Version();
    const bool other = now != last;
    last = now;
    return other;
  };
  const CreatedKey key = Make("acme", PepperOf(1));
  EXPECT_TRUE(changed());
  EXPECT_FALSE(changed());
  ASSERT_TRUE(store_.Revoke(key.key.id, absl::Now()).ok());
  EXPECT_TRUE(changed());
  ASSERT_TRUE(store_.Forget(key.key.id).ok());
  EXPECT_TRUE(changed());
}

TEST_F(KeysTest, ACacheSaysWhoAKeyIs) {
  const CreatedKey good = Make("acme", PepperOf(1));
  const CreatedKey revoked = Make("beta", PepperOf(1));
  const CreatedKey other = Make("gamma", PepperOf(2));
  ASSERT_TRUE(store_.Revoke(revoked.key.id, absl::Now()).ok());
  const auto cache = Cache(PepperOf(1));
  ASSERT_TRUE(cache->Refresh(kPatience).ok());
  const KeyCheck check = cache->Check(good.text);
  EXPECT_EQ(check.refusal, KeyRefusal::kNone);
  ASSERT_NE(check.key, nullptr);
  EXPECT_EQ(check.key->spec.tenant, "acme");
  EXPECT_EQ(cache->Check(revoked.text).refusal, KeyRefusal::kRevoked);
  EXPECT_EQ(cache->Check(other.text).refusal, KeyRefusal::kWrongSecret);
  EXPECT_EQ(cache->Check(GenerateKeyText("live")->text).refusal, KeyRefusal::kUnknown);
  EXPECT_EQ(cache->Check("").refusal, KeyRefusal::kMalformed);
  EXPECT_EQ(cache->Check("sk-123").refusal, KeyRefusal::kMalformed);
  EXPECT_EQ(cache->Check(revoked.text).key, nullptr);
  const KeyCacheStats stats = cache->stats();
  EXPECT_EQ(stats.num_keys, 3);
  EXPECT_EQ(stats.num_live, 1);
  EXPECT_EQ(stats.num_other_pepper, 1);
  EXPECT_EQ(cache->Find(good.key.id)->id, good.key.id);
  EXPECT_EQ(cache->Find("nobody"), nullptr);
}

TEST_F(KeysTest, ARevocationTakesEffectByItself) {
  const CreatedKey key = Make("acme", PepperOf(1));
  const auto cache = Cache(PepperOf(1), absl::Milliseconds(20));
  ASSERT_TRUE(cache->Refresh(kPatience).ok());
  EXPECT_EQ(cache->Check(key.text).refusal, KeyRefusal::kNone);
  ASSERT_TRUE(store_.Revoke(key.key.id, absl::Now()).ok());
  const absl::Time deadline = absl::Now() + kPatience;
  while (cache->Check(key.text).refusal == KeyRefusal::kNone && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  EXPECT_EQ(cache->Check(key.text).refusal, KeyRefusal::kRevoked);
}

TEST_F(KeysTest, TheLastCopyServesWhileRedisIsAway) {
  const CreatedKey key = Make("acme", PepperOf(1));
  const auto cache = Cache(PepperOf(1));
  ASSERT_TRUE(cache->Refresh(kPatience).ok());
  server_->Shutdown();
  EXPECT_FALSE(cache->Refresh(absl::Seconds(60)).ok());
  EXPECT_EQ(cache->Check(key.text).refusal, KeyRefusal::kNone);
  EXPECT_EQ(cache->stats().failures, 1);
  ASSERT_TRUE(server_->Restart().ok());
  EXPECT_TRUE(cache->Refresh(kPatience).ok());
  EXPECT_EQ(cache->Check(key.text).refusal, KeyRefusal::kNone);
}

TEST_F(KeysTest, BeforeTheFirstCopyNobodyIsRefusedForGood) {
  server_->Kill();
  const auto cache = Cache(PepperOf(1));
  EXPECT_EQ(cache->Check(GenerateKeyText("live")->text).refusal, KeyRefusal::kNotLoaded);
}

TEST_F(KeysTest, RecordsOfAnotherFormatAreCounted) {
  Make("acme", PepperOf(1));
  ASSERT_TRUE(redis_.Command({"HSET", "cb:{p}:keys", "strange", "\x01\x02"}).ok());
  EXPECT_EQ(store_.List()->num_unreadable, 1);
  const auto cache = Cache(PepperOf(1));
  ASSERT_TRUE(cache->Refresh(kPatience).ok());
  EXPECT_EQ(cache->stats().num_unreadable, 1);
  EXPECT_EQ(cache->stats().num_live, 1);
}

}  // namespace
}  // namespace cinnabar
