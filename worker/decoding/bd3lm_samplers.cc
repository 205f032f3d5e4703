// BD3-LM (arXiv:2503.09573; github.com/kuleshov-group/bd3lms, diffusion.py): MDLM's process inside
// each block, which sees no later block. `bd3lm_first_hitting` draws when the next position of the
// block is unmasked instead of stepping through time (arXiv:2409.02908): one position in each step.
// `bd3lm_scheduled` steps through S times from 1 to 0; the last of them fills what is left. Where
// the published code divides by that time 0, every position is unmasked.
#include <cmath>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

void Ask(const StepContext& context, int32_t position, StepPlan& plan) {
  PositionQuery& query = AddQuery(position, plan);
  query.pick_temperature = context.params.temperature;
  query.statistics_temperature = TemperedStatistics(context.params);
  query.top_p = context.params.top_p;
  query.top_p_rule = TopPRule::kInside;
  // The parameterisation gives the mask token probability 0.
  query.rules.push_back({.id = context.model.mask_token, .counted = false, .pickable = false});
}

void Start(const StepContext& context, double time, StepPlan& plan) {
  StartPlan(context, plan);
  plan.visible_end = context.block.end;
  plan.sigma = static_cast<float>(SigmaAt(context.model, time));
}

class FirstHitting final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    Start(context, HittingTime(context), plan);
    // The smallest of independent uniform numbers is at a uniform position.
    int32_t chosen = -1;
    double smallest = 2;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (!context.canvas.undecided(i)) continue;
      const double u = StepUniform(context, NoiseStream::kTransfer, i);
      if (u < smallest) {
        smallest = u;
        chosen = i;
      }
    }
    Ask(context, chosen, plan);
  }

  void Decide(const StepContext&, const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
              StepOutcome& outcome) const override {
    outcome.Clear();
    TransferAll(plan, answers, outcome);
  }

  std::optional<TransferRule> Describe(const StepContext&, const StepPlan& plan) const override {
    return TakeAll(plan);
  }

 private:
  // Of m masked positions the first is unmasked at a time u^(1/m) times the last one.
  static double HittingTime(const StepContext& context) {
    double log_time = 0;
    for (int32_t back = 0; back <= context.state.block_step; ++back) {
      const int32_t num_masked = context.state.block_masks - context.state.block_step + back;
      if (num_masked <= 0) continue;
      const NoiseKey key{.seed = context.params.seed,
                         .position = static_cast<uint32_t>(context.block.begin),
                         .step = static_cast<uint32_t>(context.state.step - back)};
      const uint32_t word = NoiseWord(key, NoiseStream::kConfidence, 0);
      log_time += std::log(UniformFromWord(word)) / num_masked;
    }
    return std::exp(log_time);
  }
};

class Scheduled final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    const int32_t num_steps = StepsOf(context);
    const bool last = IsLastStep(context);
    const double time =
        num_steps > 1 ? 1 - static_cast<double>(context.state.block_step) / (num_steps - 1) : 1.0;
    Start(context, last && num_steps > 1 ? 0.0 : time, plan);
    const double chance = last ? 1.0 : 1.0 / (num_steps * time);
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.undecided(i) &&
          (last || StepUniform(context, NoiseStream::kTransfer, i) < chance)) {
        Ask(context, i, plan);
      }
    }
    plan.forward = !plan.queries.empty();
  }

  void Decide(const StepContext&, const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
              StepOutcome& outcome) const override {
    outcome.Clear();
    TransferAll(plan, answers, outcome);
  }

  std::optional<TransferRule> Describe(const StepContext&, const StepPlan& plan) const override {
    return TakeAll(plan);
  }
};

}  // namespace

const Sampler* Bd3lmFirstHittingSampler() {
  static const FirstHitting sampler;
  return &sampler;
}

const Sampler* Bd3lmScheduledSampler() {
  static const Scheduled sampler;
  return &sampler;
}

}  // namespace cinnabar
