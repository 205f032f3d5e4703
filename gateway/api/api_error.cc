#include "gateway/api/api_error.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace cinnabar {
namespace {

using nlohmann::ordered_json;

ApiError BadRequest(absl::string_view code, absl::string_view param, absl::string_view message) {
  return {.http_status = 400,
          .type = "invalid_request_error",
          .code = std::string(code),
          .message = std::string(message),
          .param = std::string(param)};
}

ApiError Refusal(int http_status, absl::string_view type, absl::string_view code,
                 absl::string_view message) {
  return {.http_status = http_status,
          .type = std::string(type),
          .code = std::string(code),
          .message = std::string(message)};
}

ordered_json NullIfEmpty(const std::string& text) {
  return text.empty() ? ordered_json() : ordered_json(text);
}

// Statuses that the OpenAI SDKs try again by themselves.
bool SdkRetries(int http_status) {
  return http_status == 408 || http_status == 409 || http_status == 429 || http_status >= 500;
}

bool IsWorthRetrying(const ApiError& error) {
  return error.code != "insufficient_quota" && error.code != "request_failed" &&
         error.code != "deadline_exceeded" && error.code != "not_implemented";
}

}  // namespace

std::string ErrorBody(const ApiError& error) {
  ordered_json body;
  body["error"] = {{"message", error.message},
                   {"type", error.type},
                   {"param", NullIfEmpty(error.param)},
                   {"code", NullIfEmpty(error.code)}};
  return body.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

std::vector<std::pair<std::string, std::string>> ErrorHeaders(const ApiError& error) {
  std::vector<std::pair<std::string, std::string>> headers;
  if (error.retry_after.has_value()) {
    const absl::Duration wait =
        std::clamp(*error.retry_after, absl::ZeroDuration(), absl::Hours(24));
    const int64_t ms = absl::ToInt64Milliseconds(absl::Ceil(wait, absl::Milliseconds(1)));
    const int64_t seconds = absl::ToInt64Seconds(absl::Ceil(wait, absl::Seconds(1)));
    headers.emplace_back("retry-after", absl::StrCat(seconds));
    headers.emplace_back("retry-after-ms", absl::StrCat(ms));
  }
  if (SdkRetries(error.http_status) && !IsWorthRetrying(error)) {
    headers.emplace_back("x-should-retry", "false");
  }
  return headers;
}

int GrpcStatusCode(const ApiError& error) {
  using enum absl::StatusCode;
  const auto code = [&] {
    if (error.code == "idempotency_mismatch") return kFailedPrecondition;
    if (error.code == "deadline_infeasible") return kDeadlineExceeded;
    switch (error.http_status) {
      case 401:
        return kUnauthenticated;
      case 402:
        return kFailedPrecondition;
      case 403:
        return kPermissionDenied;
      case 404:
        return kNotFound;
      case 405:
      case 501:
        return kUnimplemented;
      case 408:
      case 504:
        return kDeadlineExceeded;
      case 409:
        return kAborted;
      case 429:
        return kResourceExhausted;
      case 499:
        return kCancelled;
      case 503:
        return kUnavailable;
      default:
        return error.http_status >= 500 ? kInternal : kInvalidArgument;
    }
  }();
  return static_cast<int>(code);  // absl's numbers are gRPC's
}

absl::string_view ErrorOutcome(const ApiError& error) {
  switch (error.http_status) {
    case 408:
    case 504:
      return "timeout";
    case 429:
      return "rate_limited";
    case 499:
      return "cancelled";
    case 503:
      return "overloaded";
    default:
      return error.http_status >= 500 ? "server_error" : "client_error";
  }
}

ApiError InvalidJson(absl::string_view message) { return BadRequest("invalid_json", "", message); }

ApiError MissingParameter(absl::string_view param, absl::string_view message) {
  return BadRequest("missing_required_parameter", param, message);
}

ApiError InvalidType(absl::string_view param, absl::string_view message) {
  return BadRequest("invalid_type", param, message);
}

ApiError InvalidValue(absl::string_view param, absl::string_view message) {
  return BadRequest("invalid_value", param, message);
}

ApiError UnknownParameter(absl::string_view param, absl::string_view message) {
  return BadRequest("unknown_parameter", param, message);
}

ApiError UnsupportedParameter(absl::string_view param, absl::string_view message) {
  return BadRequest("unsupported_parameter", param, message);
}

ApiError ContextLengthExceeded(absl::string_view param, int64_t limit, int64_t prompt_tokens,
                               int64_t canvas_tokens) {
  const int64_t excess = prompt_tokens + canvas_tokens - limit;
  std::string fix = absl::StrCat("Shorten the prompt by ", excess, " tokens");
  if (canvas_tokens > excess) {
    absl::StrAppend(&fix, ", or ask for at most ", canvas_tokens - excess, " tokens (max_tokens)");
  }
  return BadRequest(
      "context_length_exceeded", param,
      absl::StrCat("This model's maximum context length is ", limit, " tokens. The request has ",
                   prompt_tokens + canvas_tokens, ": ", prompt_tokens, " in the prompt and ",
                   canvas_tokens, " for the answer. ", fix, "."));
}

ApiError InvalidApiKey(absl::string_view message) {
  return Refusal(401, "authentication_error", "invalid_api_key", message);
}

ApiError BillingInactive(absl::string_view message) {
  return Refusal(402, "account_error", "account_error", message);
}

ApiError PermissionDenied(absl::string_view message) {
  return Refusal(403, "permission_error", "permission_denied", message);
}

ApiError ModelNotFound(absl::string_view model) {
  // The name is the client's; a long one is cut so that the reply stays short.
  const absl::string_view shown = model.substr(0, 100);
  ApiError error =
      Refusal(404, "invalid_request_error", "model_not_found",
              absl::StrCat("The model `", shown,
                           "` does not exist or you have no access to it; GET /v1/models lists "
                           "those that there are."));
  error.param = "model";
  return error;
}

ApiError NotFound(absl::string_view message) {
  return Refusal(404, "invalid_request_error", "not_found", message);
}

ApiError MethodNotAllowed(absl::string_view method, absl::string_view allowed) {
  return Refusal(405, "invalid_request_error", "method_not_allowed",
                 absl::StrCat(method.substr(0, 20), " is not possible here; use ", allowed, "."));
}

ApiError RequestTimeout(absl::string_view message) {
  return Refusal(408, "invalid_request_error", "request_timeout", message);
}

ApiError IdempotencyInProgress() {
  return Refusal(409, "invalid_request_error", "idempotency_in_progress",
                 "A request with this Idempotency-Key is still running.");
}

ApiError RequestTooLarge(int64_t bytes_max) {
  return Refusal(413, "invalid_request_error", "request_too_large",
                 absl::StrCat("The body is larger than ", bytes_max, " bytes."));
}

ApiError UnsupportedMediaType(absl::string_view message) {
  return Refusal(415, "invalid_request_error", "unsupported_media_type", message);
}

ApiError DeadlineInfeasible(absl::string_view param, absl::string_view message) {
  ApiError error = Refusal(422, "invalid_request_error", "deadline_infeasible", message);
  error.param = std::string(param);
  return error;
}

ApiError IdempotencyMismatch() {
  return Refusal(422, "invalid_request_error", "idempotency_mismatch",
                 "This Idempotency-Key was used before with another body; take a new key.");
}

ApiError RateLimitExceeded(absl::string_view message, absl::Duration retry_after) {
  ApiError error = Refusal(429, "rate_limit_error", "rate_limit_exceeded", message);
  error.retry_after = retry_after;
  return error;
}

ApiError InsufficientQuota(absl::string_view message) {
  return Refusal(429, "insufficient_quota", "insufficient_quota", message);
}

ApiError Cancelled() {
  return Refusal(499, "invalid_request_error", "cancelled", "The request was cancelled.");
}

ApiError ServerError(absl::string_view message) {
  return Refusal(500, "server_error", "server_error", message);
}

ApiError RequestFailed(absl::string_view request_id) {
  return Refusal(500, "server_error", "request_failed",
                 absl::StrCat("The request failed repeatedly and was given up; when you report "
                              "it, name the request id ",
                              request_id, "."));
}

ApiError NotImplemented(absl::string_view message) {
  return Refusal(501, "server_error", "not_implemented", message);
}

ApiError ServerOverloaded(absl::string_view message, absl::Duration retry_after) {
  ApiError error = Refusal(503, "server_error", "server_overloaded", message);
  error.retry_after = retry_after;
  return error;
}

ApiError Unavailable(absl::string_view message, absl::Duration retry_after) {
  ApiError error = Refusal(503, "server_error", "unavailable", message);
  error.retry_after = retry_after;
  return error;
}

ApiError DeadlineExceeded(absl::string_view message) {
  return Refusal(504, "timeout_error", "deadline_exceeded", message);
}

}  // namespace cinnabar
