// What a caller may have, and what a refusal looks like to it. Pure.
#ifndef CINNABAR_GATEWAY_SERVICE_ADMISSION_H_
#define CINNABAR_GATEWAY_SERVICE_ADMISSION_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/queue/types.h"
#include "gateway/api/api_error.h"

namespace cinnabar {

// Who asks: from an API key, or the one that everybody is where no keys exist.
struct Caller {
  std::string tenant = "local";
  std::string key_id;
  RequestClass class_max = RequestClass::kInteractive;  // more urgent than this becomes this
  double weight = 1.0;                                  // share of the tenant
  AdmissionLimits limits;
  std::vector<std::string> models;  // that it may use; empty: all
};

// The class that a request gets: not more urgent than the caller may ask for.
RequestClass ClassFor(RequestClass asked, const Caller& caller);

// The answer to what Enqueue refused; not for kAccepted and kDuplicate. `wait` is the estimated
// queue wait: what a client is told to wait, at least a second and at most a minute.
ApiError RefusalError(const EnqueueResult& result, absl::Duration wait);

// The answer when the queue could not be asked.
ApiError QueueError(const absl::Status& status, absl::Duration wait);

// x-ratelimit-{limit,remaining,reset}-{requests,tokens} for the limits that the caller has.
std::vector<std::pair<std::string, std::string>> RateLimitHeaders(const Caller& caller,
                                                                  const EnqueueResult& result);

// The answer for a choice that ended without a result. `why` is what settled it.
ApiError EndError(RequestState state, const std::string& why, const std::string& request_id);

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_ADMISSION_H_
