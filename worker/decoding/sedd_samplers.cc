// SEDD (arXiv:2310.16834; github.com/louaaron/Score-Entropy-Discrete-Diffusion, sampling.py and
// graph_lib.py). S steps of the reverse process and the closing, noise-removing one.
//
// In every step a position moves to y with a weight k * score[y] and stays with 1 - k * Z, Z the sum
// of the scores of all y that are not its own (log_sum_exp of the answer). Absorbing graph: k = dt * rate(t)
// (Euler) or expm1(sigma(t) - sigma(t - dt)) (analytic, the staggered score times the transition, with
// their common terms cancelled); uniform graph: k = dt * rate(t) / N (Euler), and the analytic step is a
// pick rule of the vocabulary head, because its weights are not of this form. Negative weights count as 0.
#include <cmath>
#include <limits>

#include "absl/algorithm/container.h"
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

class Sedd final : public Sampler {
 public:
  explicit Sedd(bool analytic) : analytic_(analytic) {}

  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    const ModelTraits& model = context.model;
    const bool uniform = model.parameterization == Parameterization::kUniformScore;
    const int32_t num_steps = StepsOf(context);
    const bool closing = context.state.block_step >= num_steps;
    const TimeStep at = TimeStepAt(num_steps, context.state.block_step);
    plan.sigma = static_cast<float>(SigmaAt(model, at.time));
    const bool tweedie = uniform && (analytic_ || closing);
    const float sigma_step = static_cast<float>(
        closing ? SigmaAt(model, at.time) : SigmaAt(model, at.time) - SigmaAt(model, at.time - at.length));
    const absl::Span<const TokenId> forbidden = context.params.forbidden_ids;
    QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries) {
      query.pick_temperature = 1.0F;
      if (tweedie) {
        query.pick = PickRule::kUniformTweedie;
        query.sigma_step = sigma_step;
        // Forbidden ids leave the sum of the scores as well: an id whose score is above the mean of
        // what is left then has a weight above 0, so that there always is one to pick.
        for (size_t i = 0; i < forbidden.size(); ++i) {
          if (absl::c_linear_search(forbidden.first(i), forbidden[i])) continue;
          query.rules.push_back({.id = forbidden[i],
                                 .bias = -std::numeric_limits<float>::infinity(),
                                 .counted = false,
                                 .pickable = false});
        }
        continue;
      }
      // Staying is decided apart, so the own entry is neither in the sum nor in the draw.
      const TokenId own = uniform ? context.canvas.tokens[query.position] : model.mask_token;
      query.rules.push_back({.id = own, .counted = false, .pickable = false});
    }
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    const bool uniform = context.model.parameterization == Parameterization::kUniformScore;
    if (context.state.block_step >= StepsOf(context)) {
      TransferAll(plan, answers, outcome);
      outcome.settled = true;
      return;
    }
    const double scale = uniform && analytic_ ? 0.0 : MoveScale(context);
    for (size_t i = 0; i < answers.size(); ++i) {
      const int32_t position = plan.queries[i].position;
      const bool moves =
          uniform && analytic_
              ? answers[i].token != context.canvas.tokens[position]
              : StepUniform(context, NoiseStream::kTransfer, position) <
                    scale * std::exp(answers[i].log_sum_exp);  // above 1: staying has weight 0
      if (!moves) continue;
      const int32_t index = static_cast<int32_t>(i);
      TransferChosen(plan, answers, absl::MakeConstSpan(&index, 1), outcome);
    }
  }

 private:
  // k of the comment above.
  double MoveScale(const StepContext& context) const {
    const ModelTraits& model = context.model;
    const TimeStep at = TimeStepAt(StepsOf(context), context.state.block_step);
    if (analytic_) {
      return std::expm1(SigmaAt(model, at.time) - SigmaAt(model, at.time - at.length));
    }
    const double scale = at.length * SigmaRateAt(model, at.time);
    return model.parameterization == Parameterization::kUniformScore ? scale / model.vocab_size
                                                                     : scale;
  }

  const bool analytic_;
};

}  // namespace

const Sampler* SeddEulerSampler() {
  static const Sedd sampler(/*analytic=*/false);
  return &sampler;
}

const Sampler* SeddAnalyticSampler() {
  static const Sedd sampler(/*analytic=*/true);
  return &sampler;
}

}  // namespace cinnabar
