// SDAR (arXiv:2510.06303; github.com/JetAstra/SDAR, generate.py). The quota of a step is an even
// share of a *full* block, however many of its positions are masked; unlike the published code it
// never reaches past the masks.
#include <algorithm>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

int32_t Quota(const StepContext& context) {
  if (IsLastStep(context)) return context.params.block_length;
  return EvenShare(context.params.block_length, StepsOf(context), context.state.block_step);
}

class ByConfidence final : public Sampler {
 public:
  explicit ByConfidence(bool dynamic) : dynamic_(dynamic) {}

  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries)
      SetFiltered(context.params, FilterOrder::kTopKThenTopP, query);
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    int32_t above = 0;
    for (const VocabularyAnswer& answer : answers) {
      scratch.scores.push_back(answer.probability);
      if (answer.probability > context.params.threshold) ++above;
    }
    // What is above the threshold comes first in the order, so both rules are a count.
    const int32_t quota = Quota(context);
    TakeBest(scratch.scores, dynamic_ ? std::max(above, quota) : quota, scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }

  std::optional<TransferRule> Describe(const StepContext& context, const StepPlan&) const override {
    TransferRule rule{.count = Quota(context)};
    if (dynamic_) rule.threshold = context.params.threshold;
    return rule;
  }

 private:
  const bool dynamic_;
};

class Sequential final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    int32_t first = context.block.begin;
    while (first < context.block.end && !context.canvas.undecided(first)) ++first;
    // Given positions inside the window count against the quota.
    const int32_t end =
        static_cast<int32_t>(std::min<int64_t>(context.block.end, int64_t{first} + Quota(context)));
    for (int32_t i = first; i < end; ++i) {
      if (context.canvas.undecided(i))
        SetFiltered(context.params, FilterOrder::kTopKThenTopP, AddQuery(i, plan));
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

const Sampler* BlockStaticSampler() {
  static const ByConfidence sampler(/*dynamic=*/false);
  return &sampler;
}

const Sampler* BlockDynamicSampler() {
  static const ByConfidence sampler(/*dynamic=*/true);
  return &sampler;
}

const Sampler* BlockSequentialSampler() {
  static const Sequential sampler;
  return &sampler;
}

}  // namespace cinnabar
