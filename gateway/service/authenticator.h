// From an API key to the caller it stands for.
#ifndef CINNABAR_GATEWAY_SERVICE_AUTHENTICATOR_H_
#define CINNABAR_GATEWAY_SERVICE_AUTHENTICATOR_H_

#include <string>

#include "absl/strings/string_view.h"
#include "common/keys/key_cache.h"
#include "gateway/api/api_error.h"
#include "gateway/service/admission.h"

namespace cinnabar {

// Thread-safe.
class Authenticator {
 public:
  // `keys` null: there are no keys, and everybody is `open` (loopback only: the program sees to
  // that). Borrowed, outlives this.
  Authenticator(const KeyCache* keys, Caller open);

  // `authorization` is the header's value: "Bearer KEY". 401 for anything but a live key, always
  // with the same words.
  ApiResult<Caller> Check(absl::string_view authorization) const;

  bool open() const { return keys_ == nullptr; }

 private:
  const KeyCache* keys_;
  const Caller open_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_AUTHENTICATOR_H_
