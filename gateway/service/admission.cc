#include "gateway/service/admission.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

// "1s", "6m0s", "120ms": what the SDKs' rate-limit headers carry.
std::string ShortDuration(absl::Duration duration) {
  if (duration < absl::Seconds(1)) return absl::StrCat(absl::ToInt64Milliseconds(duration), "ms");
  const int64_t seconds = absl::ToInt64Seconds(absl::Ceil(duration, absl::Seconds(1)));
  if (seconds < 60) return absl::StrCat(seconds, "s");
  return absl::StrCat(seconds / 60, "m", seconds % 60, "s");
}

absl::Duration Bounded(absl::Duration wait) {
  return std::clamp(wait, absl::Seconds(1), absl::Seconds(60));
}

}  // namespace

RequestClass ClassFor(RequestClass asked, const Caller& caller) {
  return std::max(asked, caller.class_max);  // in the order of urgency, the most urgent is 0
}

ApiError RefusalError(const EnqueueResult& result, absl::Duration wait) {
  switch (result.outcome) {
    case EnqueueOutcome::kMismatch:
      return IdempotencyMismatch();
    case EnqueueOutcome::kOverloaded:
      return ServerOverloaded("the cluster has as much work as it takes; try again", Bounded(wait));
    case EnqueueOutcome::kLedgerFull:
      return ServerOverloaded("the usage ledger waits to be exported; try again",
                              absl::Seconds(60));
    case EnqueueOutcome::kQueueFull:
      return RateLimitExceeded(
          absl::StrCat(result.level, " requests of yours wait already; try again"), Bounded(wait));
    case EnqueueOutcome::kTenantRequests:
      return RateLimitExceeded(
          absl::StrCat(result.level, " requests of yours run already, which is your limit"),
          Bounded(wait));
    case EnqueueOutcome::kTenantCost:
      return RateLimitExceeded(
          absl::StrCat("requests of yours with ", result.level,
                       " token-steps run already; this one is over your limit"),
          Bounded(wait));
    case EnqueueOutcome::kBudget:
      return InsufficientQuota(
          absl::StrCat("the budget of this month is spent: ", result.level / 1e6,
                       " dollars are left, and this request may cost more"));
    case EnqueueOutcome::kRate:
      return RateLimitExceeded(
          absl::StrCat("your limit of ", result.detail == "cost" ? "token-steps" : result.detail,
                       " a minute is reached"),
          std::max(result.retry_after, absl::Milliseconds(1)));
    case EnqueueOutcome::kAccepted:
    case EnqueueOutcome::kDuplicate:
      break;
  }
  CINNABAR_CHECK(false) << "not a refusal: " << static_cast<int>(result.outcome);
}

ApiError QueueError(const absl::Status& status, absl::Duration wait) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return ServerOverloaded("the queue is full; try again", Bounded(wait));
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kFailedPrecondition:
      return Unavailable("the queue is not there; try again", absl::Seconds(2));
    case absl::StatusCode::kNotFound:
      return NotFound("no such request");
    default:
      return ServerError("the queue gave an answer that makes no sense");
  }
}

std::vector<std::pair<std::string, std::string>> RateLimitHeaders(const Caller& caller,
                                                                  const EnqueueResult& result) {
  std::vector<std::pair<std::string, std::string>> headers;
  const auto add = [&](const RateLimit& limit, const RateRemaining& rate, const char* what) {
    if (limit.per_minute <= 0 || rate.remaining < 0) return;
    headers.emplace_back(absl::StrCat("x-ratelimit-limit-", what), absl::StrCat(limit.per_minute));
    headers.emplace_back(absl::StrCat("x-ratelimit-remaining-", what),
                         absl::StrCat(rate.remaining));
    headers.emplace_back(absl::StrCat("x-ratelimit-reset-", what), ShortDuration(rate.reset));
  };
  add(caller.limits.requests, result.requests, "requests");
  add(caller.limits.tokens, result.tokens, "tokens");
  add(caller.limits.cost, result.cost, "token-steps");
  return headers;
}

ApiError EndError(RequestState state, const std::string& why, const std::string& request_id) {
  if (why == "deadline_infeasible") {
    return DeadlineInfeasible("diffusion.deadline_seconds",
                              "no worker can finish this in time: ask for fewer steps, a shorter "
                              "answer or a later deadline");
  }
  if (why == "too_long") {
    return InvalidValue("max_tokens",
                        "no worker has the memory for a sequence of this length; shorten it");
  }
  switch (state) {
    case RequestState::kExpired:
      return DeadlineExceeded("the deadline has passed; what was done is not charged");
    case RequestState::kCancelled:
      return Cancelled();
    case RequestState::kFailed:
    case RequestState::kQueued:
    case RequestState::kLeased:
    case RequestState::kRunning:
    case RequestState::kDone:
      return RequestFailed(request_id);
  }
  CINNABAR_CHECK(false) << "not a state: " << static_cast<int>(state);
}

}  // namespace cinnabar
