#include "common/keys/api_key.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/keys/pepper.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;

Pepper PepperOf(uint8_t byte) {
  std::array<uint8_t, 32> bytes;
  bytes.fill(byte);
  return Pepper(bytes);
}

TEST(ApiKeyTest, ItsTextSaysItsId) {
  std::set<std::string> texts;
  for (int i = 0; i < 100; ++i) {
    const KeyText key = *GenerateKeyText("live");
    EXPECT_TRUE(texts.insert(key.text).second);
    const absl::StatusOr<ParsedKey> parsed = ParseKeyText(key.text);
    ASSERT_TRUE(parsed.ok()) << key.text;
    EXPECT_EQ(parsed->environment, "live");
    EXPECT_EQ(parsed->id, key.id);
    EXPECT_EQ(key.text.size(), std::string("cinnabar_live_").size() + 22 + 1 + 43 + 6);
  }
}

TEST(ApiKeyTest, ATypoIsSeenWithoutAskingAnybody) {
  const std::string text = GenerateKeyText("test")->text;
  for (size_t i = 0; i < text.size(); ++i) {
    for (const char other : {'a', 'Z', '_', ' ', '\0', '\xff'}) {
      if (text[i] == other) continue;
      std::string wrong = text;
      wrong[i] = other;
      EXPECT_FALSE(ParseKeyText(wrong).ok()) << wrong;
    }
    std::string shorter = text;
    shorter.erase(i, 1);
    EXPECT_FALSE(ParseKeyText(shorter).ok());
    EXPECT_FALSE(ParseKeyText(text.substr(0, i)).ok());
  }
  EXPECT_FALSE(ParseKeyText(text + "x").ok());
  EXPECT_FALSE(ParseKeyText("").ok());
  EXPECT_FALSE(ParseKeyText(std::string(100000, 'c')).ok());
  // And the refusal does not repeat it.
  EXPECT_EQ(ParseKeyText(text.substr(1)).status().message(), "this is no API key, or mistyped");
}

TEST(ApiKeyTest, ADigestDependsOnTextAndPepper) {
  const KeyDigest digest = DigestOf(PepperOf(1), "some key");
  EXPECT_TRUE(EqualDigests(digest, DigestOf(PepperOf(1), "some key")));
  EXPECT_FALSE(EqualDigests(digest, DigestOf(PepperOf(2), "some key")));
  EXPECT_FALSE(EqualDigests(digest, DigestOf(PepperOf(1), "some kez")));
  // From another implementation:
  // printf 'some key' | openssl dgst -sha256 -mac HMAC -macopt hexkey:0101..01
  std::string hex;
  for (const uint8_t byte : digest) absl::StrAppend(&hex, absl::Hex(byte, absl::kZeroPad2));
  EXPECT_EQ(hex, "026e5b79f64504876fe59c390c968121d9960301ac018310dc5090a1ee714a6c");
}

StoredKey Full() {
  StoredKey stored;
  stored.key.id = GenerateKeyText("live")->id;
  stored.key.spec = {
      .environment = "test",
      .tenant = "acme",
      .name = "CI – nightly",
      .class_max = RequestClass::kBatch,
      .weight = 2.5,
      .limits = {.requests_per_minute = 10, .concurrency_max = 0, .budget_dollars_per_month = 1.5},
      .models = {"coder", "chat"}};
  stored.key.created = absl::FromUnixMillis(1'795'000'000'123);
  stored.digest = DigestOf(PepperOf(7), "x");
  stored.pepper_id = PepperOf(7).id();
  return stored;
}

TEST(ApiKeyTest, ARecordComesBackAsItWas) {
  StoredKey stored = Full();
  for (const absl::Time revoked :
       {absl::InfiniteFuture(), absl::FromUnixMillis(1'795'000'001'456)}) {
    stored.key.revoked = revoked;
    const absl::StatusOr<StoredKey> back = ParseKeyRecord(SerializeKeyRecord(stored));
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->key.id, stored.key.id);
    EXPECT_EQ(back->key.spec.environment, "test");
    EXPECT_EQ(back->key.spec.tenant, "acme");
    EXPECT_EQ(back->key.spec.name, stored.key.spec.name);
    EXPECT_EQ(back->key.spec.class_max, RequestClass::kBatch);
    EXPECT_EQ(back->key.spec.weight, 2.5);
    EXPECT_EQ(back->key.spec.limits, stored.key.spec.limits);
    EXPECT_EQ(back->key.spec.models, stored.key.spec.models);
    EXPECT_EQ(back->key.created, stored.key.created);
    EXPECT_EQ(back->key.revoked, revoked);
    EXPECT_EQ(back->key.live(), revoked == absl::InfiniteFuture());
    EXPECT_EQ(back->digest, stored.digest);
    EXPECT_EQ(back->pepper_id, stored.pepper_id);
  }
}

TEST(ApiKeyTest, ARecordOfSomethingElseIsNone) {
  const std::string good = SerializeKeyRecord(Full());
  for (size_t i = 0; i < good.size(); ++i)
    (void)ParseKeyRecord(good.substr(0, i)).ok();  // no crash
  EXPECT_FALSE(ParseKeyRecord("").ok());
  EXPECT_FALSE(ParseKeyRecord("hello").ok());
  v1::ApiKeyRecord record;
  ASSERT_TRUE(record.ParseFromString(good));
  record.set_format(2);
  EXPECT_THAT(ParseKeyRecord(record.SerializeAsString()).status().message(), HasSubstr("format 2"));
  record.set_format(1);
  record.set_tenant("no blanks");
  EXPECT_FALSE(ParseKeyRecord(record.SerializeAsString()).ok());
}

TEST(ApiKeyTest, AWrongSpecNamesItsField) {
  const auto error = [](const KeySpec& spec) {
    return std::string(ValidateKeySpec(spec).message());
  };
  KeySpec good = {.tenant = "acme"};
  EXPECT_EQ(error(good), "");
  KeySpec spec = good;
  spec.environment = "Live";
  EXPECT_THAT(error(spec), HasSubstr("environment"));
  spec = good;
  spec.tenant = "";
  EXPECT_THAT(error(spec), HasSubstr("tenant"));
  spec.tenant = std::string(65, 'a');
  EXPECT_THAT(error(spec), HasSubstr("tenant"));
  spec = good;
  spec.name = "a\nb";
  EXPECT_THAT(error(spec), HasSubstr("name"));
  spec = good;
  for (const double weight : {0.0, -1.0, 1001.0, std::numeric_limits<double>::quiet_NaN()}) {
    spec.weight = weight;
    EXPECT_THAT(error(spec), HasSubstr("weight"));
  }
  spec = good;
  spec.limits.tokens_per_minute = -1;
  EXPECT_THAT(error(spec), HasSubstr("tokens-per-minute"));
  spec = good;
  spec.models = std::vector<std::string>(65, "m");
  EXPECT_THAT(error(spec), HasSubstr("model"));
}

TEST(ApiKeyTest, AKeysOwnLimitsComeFirst) {
  const KeyLimits cluster = {
      .requests_per_minute = 60, .tokens_per_minute = 1000, .concurrency_max = 4};
  const KeyLimits key = {
      .requests_per_minute = 0, .token_steps_per_minute = 500, .budget_dollars_per_month = 2.5};
  const absl::Time now =
      absl::FromCivil(absl::CivilSecond(2026, 12, 31, 23, 59, 59), absl::UTCTimeZone());
  const AdmissionLimits limits = AdmissionLimitsFor(key, cluster, now);
  EXPECT_EQ(limits.requests.per_minute, 0);  // lifted for this key
  EXPECT_EQ(limits.tokens.per_minute, 1000);
  EXPECT_EQ(limits.tokens.burst, 1000);
  EXPECT_EQ(limits.cost.per_minute, 500);
  EXPECT_EQ(limits.tenant_requests_max, 4);
  EXPECT_EQ(limits.budget_max_microdollars, 2'500'000);
  EXPECT_EQ(limits.budget_period, "2026-12");
  EXPECT_EQ(AdmissionLimitsFor(key, cluster, now + absl::Seconds(1)).budget_period, "2027-01");
}

class PepperTest : public testing::Test {
 protected:
  PepperTest() {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  const std::string folder_ = testing::TempDir() + "/pepper_test";
  const std::string path_ = folder_ + "/pepper";
};

TEST_F(PepperTest, IsMadeOnceAndKept) {
  EXPECT_EQ(LoadPepper(path_).status().code(), absl::StatusCode::kNotFound);
  const absl::StatusOr<Pepper> made = LoadOrCreatePepper(path_);
  ASSERT_TRUE(made.ok()) << made.status();
  struct stat info = {};
  ASSERT_EQ(stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777U, 0400U);
  EXPECT_EQ(LoadPepper(path_)->id(), made->id());
  EXPECT_EQ(LoadOrCreatePepper(path_)->id(), made->id());
  EXPECT_NE(LoadOrCreatePepper(path_ + "2")->id(), made->id());
  // Nothing else is left behind.
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 2);
}

TEST_F(PepperTest, AFileThatOthersReadOrThatHoldsSomethingElseIsRefused) {
  ASSERT_TRUE(LoadOrCreatePepper(path_).ok());
  chmod(path_.c_str(), 0644);
  EXPECT_THAT(LoadPepper(path_).status().message(), HasSubstr("chmod 600"));
  chmod(path_.c_str(), 0660);
  EXPECT_FALSE(LoadPepper(path_).ok());
  chmod(path_.c_str(), 0640);
  EXPECT_TRUE(LoadPepper(path_).ok());
  for (const std::string& text :
       {std::string(), std::string("abc"), std::string(63, 'a'), std::string(65, 'a'),
        std::string(64, 'g'), std::string(100000, 'a')}) {
    const std::string other = folder_ + "/other";
    std::ofstream(other) << text;
    chmod(other.c_str(), 0600);
    const absl::Status status = LoadPepper(other).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr(other));
    // A wrong file is never overwritten.
    EXPECT_FALSE(LoadOrCreatePepper(other).ok());
  }
  EXPECT_FALSE(LoadOrCreatePepper(folder_ + "/no/such/folder").ok());
}

}  // namespace
}  // namespace cinnabar
