// MDLM (arXiv:2406.07524; github.com/kuleshov-group/mdlm, diffusion.py). From time t to t - dt a
// masked position is unmasked with chance dt / t, whatever the network says, and then takes a token
// of its prediction; the closing step fills what is left with the argmax. S steps and the closing
// one.
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

enum class Variant { kAncestral, kCached, kSemiAr };

class Mdlm final : public Sampler {
 public:
  explicit Mdlm(Variant variant) : variant_(variant) {}

  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    if (variant_ == Variant::kSemiAr) plan.visible_end = context.block.end;
    const int32_t num_steps = StepsOf(context);
    const bool closing = context.state.block_step >= num_steps;
    plan.sigma = static_cast<float>(
        SigmaAt(context.model, TimeStepAt(num_steps, context.state.block_step).time));
    int32_t first_masked = -1;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (!context.canvas.undecided(i)) continue;
      if (first_masked < 0) first_masked = i;
      if (Unmasks(context, i)) Ask(context, i, closing, plan);
    }
    if (!plan.queries.empty()) return;
    if (variant_ == Variant::kAncestral) {
      // The plain sampler pays for every step; a pass without any query would be no pass.
      Ask(context, first_masked, closing, plan);
    } else {
      plan.forward = false;
    }
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    for (size_t i = 0; i < answers.size(); ++i) {
      if (!Unmasks(context, plan.queries[i].position)) continue;
      const int32_t index = static_cast<int32_t>(i);
      TransferChosen(plan, answers, absl::MakeConstSpan(&index, 1), outcome);
    }
  }

  // A position that stays masked is asked for alone.
  std::optional<TransferRule> Describe(const StepContext& context,
                                       const StepPlan& plan) const override {
    if (plan.queries.empty() || Unmasks(context, plan.queries[0].position)) return TakeAll(plan);
    return TransferRule{.count = 0};
  }

 private:
  static bool Unmasks(const StepContext& context, int32_t position) {
    const int32_t num_steps = StepsOf(context);
    if (context.state.block_step >= num_steps) return true;
    const TimeStep at = TimeStepAt(num_steps, context.state.block_step);
    return StepUniform(context, NoiseStream::kTransfer, position) < at.length / at.time;
  }

  static void Ask(const StepContext& context, int32_t position, bool closing, StepPlan& plan) {
    PositionQuery& query = AddQuery(position, plan);
    query.pick_temperature = closing ? 0.0F : context.params.temperature;
    query.statistics_temperature = TemperedStatistics(context.params);
    // The parameterisation gives the mask token probability 0.
    query.rules.push_back({.id = context.model.mask_token, .counted = false, .pickable = false});
  }

  const Variant variant_;
};

}  // namespace

const Sampler* MdlmAncestralSampler() {
  static const Mdlm sampler(Variant::kAncestral);
  return &sampler;
}

const Sampler* MdlmCachedSampler() {
  static const Mdlm sampler(Variant::kCached);
  return &sampler;
}

const Sampler* MdlmSemiArSampler() {
  static const Mdlm sampler(Variant::kSemiAr);
  return &sampler;
}

}  // namespace cinnabar
