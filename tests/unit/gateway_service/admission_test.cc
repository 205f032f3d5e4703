// What refusals and ends look like to a client.
#include "gateway/service/admission.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace cinnabar {
namespace {

using testing::Contains;
using testing::IsEmpty;
using testing::Key;
using testing::Not;
using testing::Pair;

TEST(AdmissionTest, NobodyIsMoreUrgentThanTheyMayBe) {
  Caller caller;
  EXPECT_EQ(ClassFor(RequestClass::kInteractive, caller), RequestClass::kInteractive);
  caller.class_max = RequestClass::kStandard;
  EXPECT_EQ(ClassFor(RequestClass::kInteractive, caller), RequestClass::kStandard);
  EXPECT_EQ(ClassFor(RequestClass::kBatch, caller), RequestClass::kBatch);
}

// 429 for the tenant's own limit, 503 for ours, each with a time to wait.
TEST(AdmissionTest, EveryRefusalHasItsStatusAndAnHonestWait) {
  struct Case {
    EnqueueOutcome outcome;
    int status;
    const char* code;
    bool waits;
  };
  for (const Case& c : {Case{EnqueueOutcome::kMismatch, 422, "idempotency_mismatch", false},
                        Case{EnqueueOutcome::kOverloaded, 503, "server_overloaded", true},
                        Case{EnqueueOutcome::kLedgerFull, 503, "server_overloaded", true},
                        Case{EnqueueOutcome::kQueueFull, 429, "rate_limit_exceeded", true},
                        Case{EnqueueOutcome::kTenantRequests, 429, "rate_limit_exceeded", true},
                        Case{EnqueueOutcome::kTenantCost, 429, "rate_limit_exceeded", true},
                        Case{EnqueueOutcome::kBudget, 429, "insufficient_quota", false},
                        Case{EnqueueOutcome::kRate, 429, "rate_limit_exceeded", true}}) {
    SCOPED_TRACE(static_cast<int>(c.outcome));
    EnqueueResult result;
    result.outcome = c.outcome;
    const ApiError error = RefusalError(result, absl::Seconds(5));
    EXPECT_EQ(error.http_status, c.status);
    EXPECT_EQ(error.code, c.code);
    EXPECT_EQ(error.retry_after.has_value(), c.waits);
    EXPECT_FALSE(error.message.empty());
    EXPECT_GE(error.retry_after.value_or(absl::Seconds(1)), absl::Milliseconds(1));
  }
}

TEST(AdmissionTest, TheWaitIsTheQueuesWithinReason) {
  EnqueueResult full;
  full.outcome = EnqueueOutcome::kOverloaded;
  EXPECT_EQ(RefusalError(full, absl::ZeroDuration()).retry_after, absl::Seconds(1));
  EXPECT_EQ(RefusalError(full, absl::Seconds(9)).retry_after, absl::Seconds(9));
  EXPECT_EQ(RefusalError(full, absl::Hours(3)).retry_after, absl::Seconds(60));
  EnqueueResult rate;
  rate.outcome = EnqueueOutcome::kRate;
  rate.retry_after = absl::Milliseconds(1234);
  EXPECT_EQ(RefusalError(rate, absl::Hours(3)).retry_after, absl::Milliseconds(1234));
}

TEST(AdmissionTest, AQueueThatCannotBeAsked) {
  EXPECT_EQ(QueueError(absl::UnavailableError("x"), absl::Seconds(2)).http_status, 503);
  EXPECT_EQ(QueueError(absl::ResourceExhaustedError("x"), absl::Seconds(2)).http_status, 503);
  EXPECT_EQ(QueueError(absl::NotFoundError("x"), absl::Seconds(2)).http_status, 404);
  EXPECT_EQ(QueueError(absl::InternalError("x"), absl::Seconds(2)).http_status, 500);
}

TEST(AdmissionTest, RateLimitHeadersForTheLimitsThereAre) {
  Caller caller;
  EnqueueResult result;
  EXPECT_THAT(RateLimitHeaders(caller, result), IsEmpty());
  caller.limits.requests = {.per_minute = 60, .burst = 60};
  result.requests = {.remaining = 59, .reset = absl::Milliseconds(120)};
  const auto headers = RateLimitHeaders(caller, result);
  EXPECT_THAT(headers, Contains(Pair("x-ratelimit-limit-requests", "60")));
  EXPECT_THAT(headers, Contains(Pair("x-ratelimit-remaining-requests", "59")));
  EXPECT_THAT(headers, Contains(Pair("x-ratelimit-reset-requests", "120ms")));
  EXPECT_THAT(headers, Not(Contains(Key("x-ratelimit-limit-tokens"))));
}

TEST(AdmissionTest, EndsWithoutAnAnswer) {
  EXPECT_EQ(EndError(RequestState::kExpired, "", "req_1").http_status, 504);
  EXPECT_EQ(EndError(RequestState::kExpired, "deadline_infeasible", "req_1").http_status, 422);
  EXPECT_EQ(EndError(RequestState::kFailed, "too_long", "req_1").http_status, 400);
  EXPECT_EQ(EndError(RequestState::kCancelled, "", "req_1").http_status, 499);
  EXPECT_EQ(EndError(RequestState::kFailed, "attempts", "req_1").http_status, 500);
}

}  // namespace
}  // namespace cinnabar
