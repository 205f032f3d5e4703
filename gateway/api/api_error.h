// What goes wrong as a client of the HTTP API sees it: status, type, code, message, parameter. One
// constructor for each case, so that no other file invents a status or a code. Messages may be
// shown to people: they say what to do and hold no secret and no prompt text.
//
// Sources: the error objects of the OpenAI API (types, codes, SDK behaviour towards them).
#ifndef CINNABAR_GATEWAY_API_API_ERROR_H_
#define CINNABAR_GATEWAY_API_API_ERROR_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/check.h"

namespace cinnabar {

struct ApiError {
  int http_status = 500;
  std::string type;     // closed set: "invalid_request_error", "server_error", ...
  std::string code;     // closed set, for machines: "model_not_found"; empty: null
  std::string message;  // for people; any bytes, sent as valid UTF-8
  std::string param;    // the field of the body: "diffusion.steps"; empty: null
  std::optional<absl::Duration> retry_after;
};

// {"error":{"message":...,"type":...,"param":...,"code":...}}: the body of a refusal, and the data
// of the last event of a stream that broke.
std::string ErrorBody(const ApiError& error);

// Headers that go with it, names in lower case: retry-after (whole seconds, rounded up) and
// retry-after-ms where there is a time; x-should-retry: false where the OpenAI SDKs would retry in
// vain.
std::vector<std::pair<std::string, std::string>> ErrorHeaders(const ApiError& error);

// grpc::StatusCode of the same case, as a number.
int GrpcStatusCode(const ApiError& error);

// The `outcome` label of cinnabar_gateway_requests_total: ok is not among them.
// "client_error", "rate_limited", "overloaded", "server_error", "timeout" or "cancelled".
absl::string_view ErrorOutcome(const ApiError& error);

// 400: the body. `param` names the field ("stop[2]", "diffusion.steps").
ApiError InvalidJson(absl::string_view message);
ApiError MissingParameter(absl::string_view param, absl::string_view message);
ApiError InvalidType(absl::string_view param, absl::string_view message);
ApiError InvalidValue(absl::string_view param, absl::string_view message);
ApiError UnknownParameter(absl::string_view param, absl::string_view message);
ApiError UnsupportedParameter(absl::string_view param, absl::string_view message);
// 400: `prompt_tokens` (suffix included) and `canvas_tokens` do not fit into `limit` together.
ApiError ContextLengthExceeded(absl::string_view param, int64_t limit, int64_t prompt_tokens,
                               int64_t canvas_tokens);

ApiError InvalidApiKey(absl::string_view message);     // 401
ApiError BillingInactive(absl::string_view message);   // 402
ApiError PermissionDenied(absl::string_view message);  // 403
ApiError ModelNotFound(absl::string_view model);       // 404
ApiError NotFound(absl::string_view message);          // 404: a request id, a stream, a URL
ApiError MethodNotAllowed(absl::string_view method, absl::string_view allowed);     // 405
ApiError RequestTimeout(absl::string_view message);                                 // 408
ApiError IdempotencyInProgress();                                                   // 409
ApiError RequestTooLarge(int64_t bytes_max);                                        // 413
ApiError UnsupportedMediaType(absl::string_view message);                           // 415
ApiError DeadlineInfeasible(absl::string_view param, absl::string_view message);    // 422
ApiError IdempotencyMismatch();                                                     // 422
ApiError RateLimitExceeded(absl::string_view message, absl::Duration retry_after);  // 429
ApiError InsufficientQuota(absl::string_view message);                              // 429
ApiError Cancelled();                                                               // 499
ApiError ServerError(absl::string_view message);                                    // 500
ApiError RequestFailed(absl::string_view request_id);                               // 500
ApiError NotImplemented(absl::string_view message);                                 // 501
ApiError ServerOverloaded(absl::string_view message, absl::Duration retry_after);   // 503
ApiError Unavailable(absl::string_view message, absl::Duration retry_after);        // 503
ApiError DeadlineExceeded(absl::string_view message);                               // 504

// A T or the error that took its place; absl::StatusOr with ApiError for Status.
template <typename T>
class [[nodiscard]] ApiResult {
 public:
  ApiResult(T value) : held_(std::in_place_index<0>, std::move(value)) {}         // NOLINT
  ApiResult(ApiError error) : held_(std::in_place_index<1>, std::move(error)) {}  // NOLINT

  bool ok() const { return held_.index() == 0; }
  // CHECKs !ok().
  const ApiError& error() const {
    CINNABAR_CHECK(!ok());
    return *std::get_if<1>(&held_);
  }
  // CHECK ok().
  const T& value() const& {
    CheckOk();
    return *std::get_if<0>(&held_);
  }
  T& value() & {
    CheckOk();
    return *std::get_if<0>(&held_);
  }
  T&& value() && {
    CheckOk();
    return std::move(*std::get_if<0>(&held_));
  }
  const T& operator*() const& { return value(); }
  T& operator*() & { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  const T* operator->() const { return &value(); }
  T* operator->() { return &value(); }

 private:
  void CheckOk() const { CINNABAR_CHECK(ok()) << std::get_if<1>(&held_)->message; }
  std::variant<T, ApiError> held_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_API_API_ERROR_H_
