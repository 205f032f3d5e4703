// A denoiser without a network: made-up tokens, the same for the same sequence, at a step time of
// one's choice. For tests and load tests of everything around the network.
#ifndef CINNABAR_WORKER_SERVICE_NULL_DENOISER_H_
#define CINNABAR_WORKER_SERVICE_NULL_DENOISER_H_

#include <memory>

#include "absl/time/time.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

// What broken devices do. Prompts that begin with these ids bring it about; -1: none does.
struct NullFaults {
  TokenId abort = -1;       // the process ends at once
  TokenId hang = -1;        // a step takes `hang_for`
  TokenId fail = -1;        // a step fails as a whole, with Internal
  TokenId not_finite = -1;  // that sequence's numbers are bad
  // Whatever the prompts: this many passes work, and all behind them fail with Unavailable, as
  // those of a device that fell off the bus. -1: none fails.
  int32_t passes = -1;
  absl::Duration hang_for = absl::Minutes(1);
};

// `traits` are those of the model that it stands in for. A Forward() sleeps for `step_time`.
// `backend` is borrowed and outlives it; it is asked for KV memory only.
std::unique_ptr<Denoiser> MakeNullDenoiser(ModelTraits traits, absl::Duration step_time,
                                           Backend& backend, const NullFaults& faults = {});

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_NULL_DENOISER_H_
