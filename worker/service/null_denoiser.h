// A denoiser without a network: made-up tokens, the same for the same sequence, at a step time of
// one's choice. For tests and load tests of everything around the network.
#ifndef CINNABAR_WORKER_SERVICE_NULL_DENOISER_H_
#define CINNABAR_WORKER_SERVICE_NULL_DENOISER_H_

#include <memory>

#include "absl/time/time.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

// `traits` are those of the model that it stands in for. A Forward() sleeps for `step_time`.
// `backend` is borrowed and outlives it; it is asked for KV memory only.
std::unique_ptr<Denoiser> MakeNullDenoiser(ModelTraits traits, absl::Duration step_time,
                                           Backend& backend);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_NULL_DENOISER_H_
