// LLaDA (arXiv:2502.09992; github.com/ML-GSAI/LLaDA, generate.py): in each step an even share of
// the masked positions of the open block is transferred, the most confident ones or random ones.
// Confidence is the clean softmax, without the sampling temperature.
#include <algorithm>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

int32_t Quota(const StepContext& context, int32_t num_masked) {
  if (IsLastStep(context)) return num_masked;
  return std::min(EvenShare(context.state.block_masks, StepsOf(context), context.state.block_step),
                  num_masked);
}

class LowConfidence final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    if (!ReuseKv(context, plan)) QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries) query.pick_temperature = context.params.temperature;
    AddEosRules(context, plan);
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    for (const VocabularyAnswer& answer : answers) {
      scratch.scores.push_back(EosAwareConfidence(context, answer));
    }
    TakeBest(scratch.scores, Quota(context, static_cast<int32_t>(answers.size())), scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }

  std::optional<TransferRule> Describe(const StepContext& context,
                                       const StepPlan& plan) const override {
    if (context.params.confidence_eos_eot_inf) return std::nullopt;
    return TransferRule{.count = Quota(context, static_cast<int32_t>(plan.queries.size()))};
  }
};

// The order is chosen before the forward pass, so only what is transferred is asked for.
class Random final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.undecided(i)) {
        scratch.scores.push_back(StepUniform(context, NoiseStream::kConfidence, i));
      }
    }
    TakeBest(scratch.scores, Quota(context, static_cast<int32_t>(scratch.scores.size())),
             scratch.chosen);
    size_t next = 0;
    int32_t index = 0;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (!context.canvas.undecided(i)) continue;
      if (next < scratch.chosen.size() && scratch.chosen[next] == index) {
        AddQuery(i, plan).pick_temperature = context.params.temperature;
        ++next;
      }
      ++index;
    }
    AddEosRules(context, plan);
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

const Sampler* LowConfidenceSampler() {
  static const LowConfidence sampler;
  return &sampler;
}

const Sampler* RandomSampler() {
  static const Random sampler;
  return &sampler;
}

}  // namespace cinnabar
