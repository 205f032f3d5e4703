// How fast a canvas is denoised: transfers per step, and the time grids of the noise processes.
#ifndef CINNABAR_WORKER_DECODING_SCHEDULE_H_
#define CINNABAR_WORKER_DECODING_SCHEDULE_H_

#include <cstdint>

#include "common/request/sampler_catalog.h"

namespace cinnabar {

// Share of `step` when `count` transfers are spread over `num_steps`, the larger shares first
// (LLaDA, SDAR).
int32_t EvenShare(int32_t count, int32_t num_steps, int32_t step);

// RND1 and P2: the share `rate` of `count`, rounded down in float32 as the authors' tensors are.
// Where it would be whole it can be one less: of 22 positions in 22 steps, one step transfers two.
int32_t Float32Share(int32_t count, double rate);

// Dream: the time falls linearly from 1 to `eps`; chance of one masked position to be transferred
// in `step`, 1 in the last.
double DreamTransferChance(int32_t num_steps, int32_t step, double eps);
// How many of `num_masked` that makes, rounded down; all in the last step.
int32_t DreamTransferCount(int32_t num_masked, int32_t num_steps, int32_t step, double eps);

// The grid of MDLM and SEDD: num_steps steps from time 1 down to kTimeEnd, and the closing step
// `num_steps` at kTimeEnd itself.
inline constexpr double kTimeEnd = 1e-5;
struct TimeStep {
  double time = 1.0;
  double length = 0.0;  // of one step
};
TimeStep TimeStepAt(int32_t num_steps, int32_t step);

// Total noise at `time` and its derivative: geometric when the model says so, else log-linear.
double SigmaAt(const ModelTraits& model, double time);
double SigmaRateAt(const ModelTraits& model, double time);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_DECODING_SCHEDULE_H_
