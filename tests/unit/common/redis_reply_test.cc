#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "common/redis/client.h"
#include "common/redis/reply.h"

namespace cinnabar {
namespace {

using Kind = RedisReply::Kind;

std::vector<RedisReply> Decode(absl::string_view bytes, size_t chunk) {
  ReplyDecoder decoder({});
  std::vector<RedisReply> replies;
  for (size_t i = 0; i < bytes.size(); i += chunk) {
    EXPECT_TRUE(decoder.Feed(bytes.substr(i, chunk)).ok());
    while (true) {
      auto reply = decoder.Next();
      EXPECT_TRUE(reply.ok()) << reply.status();
      if (!reply.ok() || !reply->has_value()) break;
      replies.push_back(*std::move(*reply));
    }
  }
  return replies;
}

TEST(ReplyDecoderTest, EveryTypeWhateverTheChunks) {
  using std::string_literals::operator""s;
  const std::string bytes =
      "+OK\r\n-ERR no\r\n:-42\r\n$5\r\na\0\r\nb\r\n$-1\r\n*-1\r\n*0\r\n*2\r\n*1\r\n:1\r\n$0\r\n\r\n"s;
  for (size_t chunk = 1; chunk <= bytes.size(); ++chunk) {
    SCOPED_TRACE(absl::StrCat("chunk=", chunk));
    const std::vector<RedisReply> replies = Decode(bytes, chunk);
    ASSERT_EQ(replies.size(), 8U);
    EXPECT_EQ(replies[0].kind, Kind::kStatus);
    EXPECT_EQ(replies[1].kind, Kind::kError);
    EXPECT_EQ(replies[2].integer, -42);
    EXPECT_EQ(replies[3].text, std::string("a\0\r\nb", 5));
    EXPECT_TRUE(replies[4].is_nil());
    EXPECT_TRUE(replies[5].is_nil());
    EXPECT_TRUE(replies[6].is_array());
    ASSERT_EQ(replies[7].elements.size(), 2U);
    EXPECT_EQ(replies[7].elements[0].elements[0].integer, 1);
    EXPECT_EQ(replies[7].elements[1].kind, Kind::kString);
  }
}

absl::Status DecodeError(absl::string_view bytes, ReplyLimits limits = {}) {
  ReplyDecoder decoder(limits);
  if (absl::Status fed = decoder.Feed(bytes); !fed.ok()) return fed;
  while (true) {
    auto reply = decoder.Next();
    if (!reply.ok()) return reply.status();
    if (!reply->has_value()) return absl::OkStatus();
  }
}

TEST(ReplyDecoderTest, Resp3IsAnError) {
  for (const char* bytes :
       {"%1\r\n+a\r\n+b\r\n", "~1\r\n+a\r\n", ">1\r\n+a\r\n", "_\r\n", "#t\r\n", "garbage\r\n"}) {
    EXPECT_TRUE(absl::IsDataLoss(DecodeError(bytes))) << bytes;
  }
}

TEST(ReplyDecoderTest, SizesAreBoundedBeforeTheyAreBelieved) {
  EXPECT_TRUE(absl::IsDataLoss(DecodeError("*2000000000\r\n")));
  EXPECT_TRUE(absl::IsDataLoss(DecodeError("*4294967297\r\n")));
  EXPECT_TRUE(absl::IsDataLoss(DecodeError("*-5\r\n")));
  EXPECT_TRUE(
      absl::IsDataLoss(DecodeError("*2\r\n*3\r\n:1\r\n:1\r\n:1\r\n*3\r\n", {.elements_max = 6})));
  EXPECT_TRUE(absl::IsDataLoss(
      DecodeError("$2000\r\n" + std::string(1500, 'x'), {.reply_bytes_max = 1000})));
  EXPECT_TRUE(absl::IsDataLoss(
      DecodeError("*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n")));
}

TEST(ReplyDecoderTest, AnyBytesEndInAReplyOrAnError) {
  std::mt19937 random(7);
  const std::string alphabet = "+-:$*%~>_0123456789\r\n\r\nabc";
  for (int round = 0; round < 20000; ++round) {
    std::string bytes;
    for (int i = 0; i < 24; ++i) bytes += alphabet[random() % alphabet.size()];
    (void)DecodeError(bytes, {.reply_bytes_max = 1000, .elements_max = 1000});
  }
}

TEST(RedisErrorTest, TheCodeSaysWhatToDo) {
  const auto code = [](absl::string_view text) { return StatusFromRedisError(text).code(); };
  using absl::StatusCode;
  for (const char* text :
       {"LOADING Redis is loading", "READONLY You can't write", "MISCONF Errors writing to the AOF",
        "MASTERDOWN Link with MASTER is down", "UNBLOCKED force", "NOREPLICAS Not enough",
        "BUSY script"}) {
    EXPECT_EQ(code(text), StatusCode::kUnavailable) << text;
  }
  EXPECT_EQ(code("OOM command not allowed"), StatusCode::kResourceExhausted);
  EXPECT_EQ(code("NOAUTH Authentication required."), StatusCode::kUnauthenticated);
  EXPECT_EQ(code("NOPERM this user"), StatusCode::kPermissionDenied);
  EXPECT_EQ(code("MOVED 1 127.0.0.1:1"), StatusCode::kFailedPrecondition);
  EXPECT_EQ(code("ERR Function not found"), StatusCode::kUnimplemented);
  EXPECT_EQ(code("WRONGTYPE Operation"), StatusCode::kDataLoss);
  EXPECT_EQ(code("BADARG rid"), StatusCode::kInvalidArgument);
  EXPECT_TRUE(RedisErrorMovesPrimary("READONLY You can't"));
  EXPECT_FALSE(RedisErrorMovesPrimary("MISCONF Errors"));
}

TEST(RedisBackoffTest, DoublesToItsCapLessAShare) {
  const RedisRetryPolicy policy = {
      .backoff_min = absl::Milliseconds(50), .backoff_max = absl::Seconds(2), .jitter = 0.5};
  EXPECT_EQ(RedisBackoff(policy, 2, 0.0), absl::Milliseconds(50));
  EXPECT_EQ(RedisBackoff(policy, 4, 0.0), absl::Milliseconds(200));
  EXPECT_EQ(RedisBackoff(policy, 4, 0.5), absl::Milliseconds(150));
  EXPECT_EQ(RedisBackoff(policy, 1000, 0.0), absl::Seconds(2));
}

TEST(RedisOptionsTest, NamesTheWrongField) {
  EXPECT_TRUE(ValidateRedisOptions({}).ok());
  RedisOptions options;
  options.sentinels = {{.host = "s", .port = 1}};
  EXPECT_THAT(std::string(ValidateRedisOptions(options).message()),
              testing::HasSubstr("master_name"));
  options = {};
  options.username = "gateway";
  EXPECT_THAT(std::string(ValidateRedisOptions(options).message()), testing::HasSubstr("password"));
}

}  // namespace
}  // namespace cinnabar
