// EB-Sampler (arXiv:2505.24857): positions by rising entropy, as many as keep the entropy of all
// but the last within the bound, until the block is full.
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

class EntropyBounded final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries) {
      query.pick_temperature = context.params.temperature;
      query.statistics_temperature = TemperedStatistics(context.params);
    }
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    for (const VocabularyAnswer& answer : answers) scratch.scores.push_back(-answer.entropy);
    OrderByScore(scratch.scores, scratch.chosen);
    for (double& score : scratch.scores) score = -score;
    KeepFirst(EntropyBoundedCount(scratch.scores, scratch.chosen, context.params.entropy_bound),
              scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }
};

}  // namespace

const Sampler* EntropyBoundedSampler() {
  static const EntropyBounded sampler;
  return &sampler;
}

}  // namespace cinnabar
