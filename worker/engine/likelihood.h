// Likelihood of a text under a diffusion model, as its authors define it: Monte Carlo estimates of
// the bound that the model was trained on.
#ifndef CINNABAR_WORKER_ENGINE_LIKELIHOOD_H_
#define CINNABAR_WORKER_ENGINE_LIKELIHOOD_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

enum class LikelihoodRule : uint8_t {
  // The evidence lower bound. Each sample draws a time t, evenly spread over (0.001, 1) from a
  // random
  // offset, and noises every scored position with the chance of that time:
  //   mask prediction: -sum over masked positions of CE / t, the mask token out of the softmax.
  //     Source: MDLM, arXiv:2406.07524. Block-causal models: the sum over blocks, each given the
  //     clean
  //     blocks before it. Source: BD3-LM, arXiv:2503.09573.
  //   scores: the denoising score entropy. Source: SEDD, arXiv:2310.16834.
  kNelbo,
  // Each sample masks a number n of the N scored positions, evenly spread over 1 .. N from a random
  // offset: -sum over masked positions of CE * N / n, the mask token in the softmax. Full attention
  // only. Source: LLaDA, arXiv:2502.09992, get_log_likelihood.py.
  kLlada,
};

struct LikelihoodOptions {
  LikelihoodRule rule = LikelihoodRule::kNelbo;
  int32_t num_samples = 128;  // block-causal models: of each block
  uint64_t seed = 0;
};

struct Likelihood {
  double log_likelihood =
      0.0;  // nats, summed over the scored positions: an estimate of a lower bound
  // Of that estimate, from the spread over the samples as if they were independent (evenly spread
  // ones are closer together); 0 with one sample.
  double standard_error = 0.0;
  int32_t num_scored = 0;
  int64_t forwards = 0;
};

// Scores the positions where scored[i] given the others. `limits` are those that the denoiser was
// loaded with; a pass takes as many samples as fit. `progress` hears the share that is done, in
// (0, 1]. The same arguments give the same bits. InvalidArgument: lengths differ, nothing to score,
// too long, an id outside the vocabulary, a scored mask token, num_samples < 1. Unimplemented:
// kLlada for a block-causal model or one that predicts scores; kUniformPrediction. DataLoss: the
// network gave NaN.
absl::StatusOr<Likelihood> EstimateLikelihood(Denoiser& denoiser, const ForwardLimits& limits,
                                              absl::Span<const TokenId> ids,
                                              const std::vector<bool>& scored,
                                              const LikelihoodOptions& options,
                                              absl::FunctionRef<void(double)> progress);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_ENGINE_LIKELIHOOD_H_
