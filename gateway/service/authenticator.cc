#include "gateway/service/authenticator.h"

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"

namespace cinnabar {

ApiError WrongKey() {
  return InvalidApiKey(
      "the API key is missing, wrong or revoked; send it as \"Authorization: Bearer KEY\"");
}

Authenticator::Authenticator(Lookup lookup, Caller open)
    : lookup_(std::move(lookup)), open_(std::move(open)) {}

ApiResult<Caller> Authenticator::Check(absl::string_view authorization) const {
  if (!lookup_) return open_;
  constexpr absl::string_view kScheme = "bearer ";
  if (!absl::StartsWithIgnoreCase(authorization, kScheme)) return lookup_("");
  return lookup_(absl::StripAsciiWhitespace(authorization.substr(kScheme.size())));
}

}  // namespace cinnabar
