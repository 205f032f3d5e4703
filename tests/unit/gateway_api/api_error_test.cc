#include "gateway/api/api_error.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace cinnabar {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

TEST(ApiErrorTest, EveryCaseHasItsStatusTypeCodeAndGrpcCode) {
  using enum absl::StatusCode;
  struct Case {
    ApiError error;
    int http_status;
    const char* type;
    const char* code;
    absl::StatusCode grpc;
    const char* outcome;
  };
  const absl::Duration wait = absl::Seconds(2);
  const Case cases[] = {
      {InvalidJson("m"), 400, "invalid_request_error", "invalid_json", kInvalidArgument,
       "client_error"},
      {MissingParameter("p", "m"), 400, "invalid_request_error", "missing_required_parameter",
       kInvalidArgument, "client_error"},
      {InvalidType("p", "m"), 400, "invalid_request_error", "invalid_type", kInvalidArgument,
       "client_error"},
      {InvalidValue("p", "m"), 400, "invalid_request_error", "invalid_value", kInvalidArgument,
       "client_error"},
      {UnknownParameter("p", "m"), 400, "invalid_request_error", "unknown_parameter",
       kInvalidArgument, "client_error"},
      {UnsupportedParameter("p", "m"), 400, "invalid_request_error", "unsupported_parameter",
       kInvalidArgument, "client_error"},
      {ContextLengthExceeded("p", 1, 1, 1), 400, "invalid_request_error", "context_length_exceeded",
       kInvalidArgument, "client_error"},
      {InvalidApiKey("m"), 401, "authentication_error", "invalid_api_key", kUnauthenticated,
       "client_error"},
      {BillingInactive("m"), 402, "account_error", "account_error", kFailedPrecondition,
       "client_error"},
      {PermissionDenied("m"), 403, "permission_error", "permission_denied", kPermissionDenied,
       "client_error"},
      {ModelNotFound("m"), 404, "invalid_request_error", "model_not_found", kNotFound,
       "client_error"},
      {NotFound("m"), 404, "invalid_request_error", "not_found", kNotFound, "client_error"},
      {MethodNotAllowed("PUT", "POST"), 405, "invalid_request_error", "method_not_allowed",
       kUnimplemented, "client_error"},
      {RequestTimeout("m"), 408, "invalid_request_error", "request_timeout", kDeadlineExceeded,
       "timeout"},
      {IdempotencyInProgress(), 409, "invalid_request_error", "idempotency_in_progress", kAborted,
       "client_error"},
      {RequestTooLarge(7), 413, "invalid_request_error", "request_too_large", kInvalidArgument,
       "client_error"},
      {UnsupportedMediaType("m"), 415, "invalid_request_error", "unsupported_media_type",
       kInvalidArgument, "client_error"},
      {DeadlineInfeasible("p", "m"), 422, "invalid_request_error", "deadline_infeasible",
       kDeadlineExceeded, "client_error"},
      {IdempotencyMismatch(), 422, "invalid_request_error", "idempotency_mismatch",
       kFailedPrecondition, "client_error"},
      {RateLimitExceeded("m", wait), 429, "rate_limit_error", "rate_limit_exceeded",
       kResourceExhausted, "rate_limited"},
      {InsufficientQuota("m"), 429, "insufficient_quota", "insufficient_quota", kResourceExhausted,
       "rate_limited"},
      {Cancelled(), 499, "invalid_request_error", "cancelled", kCancelled, "cancelled"},
      {ServerError("m"), 500, "server_error", "server_error", kInternal, "server_error"},
      {RequestFailed("r-1"), 500, "server_error", "request_failed", kInternal, "server_error"},
      {NotImplemented("m"), 501, "server_error", "not_implemented", kUnimplemented, "server_error"},
      {ServerOverloaded("m", wait), 503, "server_error", "server_overloaded", kUnavailable,
       "overloaded"},
      {Unavailable("m", wait), 503, "server_error", "unavailable", kUnavailable, "overloaded"},
      {DeadlineExceeded("m"), 504, "timeout_error", "deadline_exceeded", kDeadlineExceeded,
       "timeout"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.code);
    EXPECT_EQ(c.error.http_status, c.http_status);
    EXPECT_EQ(c.error.type, c.type);
    EXPECT_EQ(c.error.code, c.code);
    EXPECT_FALSE(c.error.message.empty());
    EXPECT_EQ(GrpcStatusCode(c.error), static_cast<int>(c.grpc));
    EXPECT_EQ(ErrorOutcome(c.error), c.outcome);
  }
}

TEST(ApiErrorTest, BodyIsTheOpenAiEnvelope) {
  EXPECT_EQ(ErrorBody(InvalidValue("diffusion.steps", "too \"few\"\n")),
            R"({"error":{"message":"too \"few\"\n","type":"invalid_request_error",)"
            R"("param":"diffusion.steps","code":"invalid_value"}})");
  const json body = json::parse(ErrorBody(ServerError("m")));
  EXPECT_TRUE(body["error"]["param"].is_null());
  EXPECT_EQ(body["error"].size(), 4);
}

TEST(ApiErrorTest, BodyIsValidUtf8WhateverTheMessageHolds) {
  const json body = json::parse(ErrorBody(InvalidValue("p\xFF", "a\xC3")));
  EXPECT_EQ(body["error"]["message"], "a\uFFFD");
  EXPECT_EQ(body["error"]["param"], "p\uFFFD");
}

TEST(ApiErrorTest, HeadersSayWhenAndWhetherToTryAgain) {
  EXPECT_THAT(ErrorHeaders(RateLimitExceeded("m", absl::Milliseconds(1200))),
              UnorderedElementsAre(Pair("retry-after", "2"), Pair("retry-after-ms", "1200")));
  EXPECT_THAT(ErrorHeaders(ServerOverloaded("m", absl::Microseconds(10))),
              UnorderedElementsAre(Pair("retry-after", "1"), Pair("retry-after-ms", "1")));
  EXPECT_THAT(ErrorHeaders(ServerOverloaded("m", -absl::Seconds(5))),
              UnorderedElementsAre(Pair("retry-after", "0"), Pair("retry-after-ms", "0")));
  EXPECT_THAT(
      ErrorHeaders(ServerOverloaded("m", absl::InfiniteDuration())),
      UnorderedElementsAre(Pair("retry-after", "86400"), Pair("retry-after-ms", "86400000")));
  for (const ApiError& error :
       {InsufficientQuota("m"), RequestFailed("r"), DeadlineExceeded("m")}) {
    EXPECT_THAT(ErrorHeaders(error), UnorderedElementsAre(Pair("x-should-retry", "false")));
  }
  EXPECT_TRUE(ErrorHeaders(InvalidJson("m")).empty());
  EXPECT_TRUE(ErrorHeaders(ServerError("m")).empty());
}

TEST(ApiErrorTest, ContextLengthSaysLimitCountsAndFix) {
  const ApiError error = ContextLengthExceeded("messages", 192, 150, 50);
  EXPECT_EQ(error.param, "messages");
  EXPECT_EQ(error.message,
            "This model's maximum context length is 192 tokens. The request has 200: 150 in the "
            "prompt and 50 for the answer. Shorten the prompt by 8 tokens, or ask for at most 42 "
            "tokens (max_tokens).");
  // The prompt alone is too long: a shorter answer does not help.
  EXPECT_THAT(ContextLengthExceeded("prompt", 192, 192, 50).message,
              testing::Not(HasSubstr("ask for")));
}

TEST(ApiErrorTest, ModelNotFoundCutsLongNames) {
  EXPECT_LT(ModelNotFound(std::string(5000, 'x')).message.size(), 300);
}

TEST(ApiResultTest, HoldsAValueOrAnError) {
  ApiResult<std::string> value(std::string("v"));
  ASSERT_TRUE(value.ok());
  EXPECT_EQ(*value, "v");
  EXPECT_EQ(value->size(), 1);
  EXPECT_EQ(*std::move(value), "v");
  const ApiResult<std::string> error(InvalidJson("m"));
  ASSERT_FALSE(error.ok());
  EXPECT_EQ(error.error().code, "invalid_json");
  EXPECT_DEATH(*error, "m");
}

}  // namespace
}  // namespace cinnabar
