// RND1 (github.com/RadicalNumerics/RND1, sampling.py): the lowest entropies first, so that after
// step i of S floor(N (1 - i / S)) of a block's N positions are left; or, entropy-bounded, as many
// of the most probable predictions as keep their joint entropy within a bound. top_p keeps two ids
// at least.
#include <algorithm>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

void SetRnd1Filters(const DecodingParams& params, PositionQuery& query) {
  SetFiltered(params, FilterOrder::kTopKThenTopP, query);
  query.top_p_rule = TopPRule::kCrossingTwoAtLeast;
}

class Rnd1 final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    QueryUndecided(context, plan);
    if (Count(context, static_cast<int32_t>(plan.queries.size())) == 0) plan.queries.clear();
    for (PositionQuery& query : plan.queries) SetRnd1Filters(context.params, query);
    plan.forward = !plan.queries.empty();
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    for (const VocabularyAnswer& answer : answers) scratch.scores.push_back(-answer.entropy);
    TakeBest(scratch.scores, Count(context, static_cast<int32_t>(answers.size())), scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }

  std::optional<TransferRule> Describe(const StepContext& context,
                                       const StepPlan& plan) const override {
    return TransferRule{.score = TransferScore::kNegativeEntropy,
                        .count = Count(context, static_cast<int32_t>(plan.queries.size()))};
  }

 private:
  static int32_t Count(const StepContext& context, int32_t num_masked) {
    const int32_t num_steps = StepsOf(context);
    const int32_t steps_left = std::max(num_steps - 1 - context.state.block_step, 0);
    const double rate = static_cast<double>(steps_left) / num_steps;
    return num_masked - Float32Share(context.state.block_masks, rate);
  }
};

class Rnd1EntropyBounded final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries) SetRnd1Filters(context.params, query);
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    for (const VocabularyAnswer& answer : answers) scratch.scores.push_back(answer.probability);
    OrderByScore(scratch.scores, scratch.chosen);
    int32_t count = 0;
    double sum = 0;
    double largest = 0;
    for (const int32_t index : scratch.chosen) {
      sum += answers[index].entropy;
      largest = std::max(largest, answers[index].entropy);
      if (count > 0 && sum - largest > context.params.entropy_bound) break;
      ++count;
    }
    KeepFirst(count, scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }
};

}  // namespace

const Sampler* Rnd1Sampler() {
  static const Rnd1 sampler;
  return &sampler;
}

const Sampler* Rnd1EntropyBoundedSampler() {
  static const Rnd1EntropyBounded sampler;
  return &sampler;
}

}  // namespace cinnabar
