#include "gateway/service/key_lookup.h"

#include <utility>

#include "absl/time/clock.h"

namespace cinnabar {

Caller CallerOf(const ApiKey& key, const KeyLimits& key_defaults, const AdmissionLimits& shared,
                absl::Time now) {
  Caller caller;
  caller.tenant = key.spec.tenant;
  caller.key_id = key.id;
  caller.class_max = key.spec.class_max;
  caller.weight = key.spec.weight;
  caller.models = key.spec.models;
  caller.limits = AdmissionLimitsFor(key.spec.limits, key_defaults, now);
  caller.limits.cost_max = shared.cost_max;
  caller.limits.queue_requests_max = shared.queue_requests_max;
  return caller;
}

Authenticator::Lookup MakeKeyLookup(const KeyCache& keys, const KeyLimits& key_defaults,
                                    const AdmissionLimits& shared,
                                    std::function<void(KeyRefusal)> on_refusal) {
  return [&keys, key_defaults, shared,
          on_refusal = std::move(on_refusal)](absl::string_view text) -> ApiResult<Caller> {
    const KeyCheck check = keys.Check(text);
    if (check.refusal == KeyRefusal::kNone) {
      return CallerOf(*check.key, key_defaults, shared, absl::Now());
    }
    on_refusal(check.refusal);
    if (check.refusal == KeyRefusal::kNotLoaded) {
      return Unavailable("the API keys cannot be read at the moment", absl::Seconds(2));
    }
    return WrongKey();
  };
}

}  // namespace cinnabar
