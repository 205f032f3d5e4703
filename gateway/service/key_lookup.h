// From an API key to the caller that it stands for.
#ifndef CINNABAR_GATEWAY_SERVICE_KEY_LOOKUP_H_
#define CINNABAR_GATEWAY_SERVICE_KEY_LOOKUP_H_

#include <functional>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/keys/api_key.h"
#include "common/keys/key_cache.h"
#include "gateway/service/authenticator.h"

namespace cinnabar {

// `key_defaults` serve where the key says nothing; `shared` are the limits of the cluster that no
// key can lift (cost_max, queue_requests_max). Pure; `now` picks the budget's month.
Caller CallerOf(const ApiKey& key, const KeyLimits& key_defaults, const AdmissionLimits& shared,
                absl::Time now);

// For Authenticator. `keys` outlives it; `on_refusal` counts. Thread-safe when `on_refusal` is.
Authenticator::Lookup MakeKeyLookup(const KeyCache& keys, const KeyLimits& key_defaults,
                                    const AdmissionLimits& shared,
                                    std::function<void(KeyRefusal)> on_refusal);

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_KEY_LOOKUP_H_
