// From an Authorization header to the caller it stands for.
#ifndef CINNABAR_GATEWAY_SERVICE_AUTHENTICATOR_H_
#define CINNABAR_GATEWAY_SERVICE_AUTHENTICATOR_H_

#include <functional>
#include <string>

#include "absl/strings/string_view.h"
#include "gateway/api/api_error.h"
#include "gateway/service/admission.h"

namespace cinnabar {

// Thread-safe.
class Authenticator {
 public:
  // The caller of an API key, or 401 (always with the same words, also for the empty key of a
  // request without one), or 503 while no keys could be read.
  using Lookup = std::function<ApiResult<Caller>(absl::string_view key)>;

  // `lookup` empty: there are no keys, and everybody is `open` (on loopback only: the program sees
  // to that).
  Authenticator(Lookup lookup, Caller open);

  // `authorization` is the header's value: "Bearer KEY".
  ApiResult<Caller> Check(absl::string_view authorization) const;

 private:
  const Lookup lookup_;
  const Caller open_;
};

// What every wrong key hears.
ApiError WrongKey();

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_AUTHENTICATOR_H_
