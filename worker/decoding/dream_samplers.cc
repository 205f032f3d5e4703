// Dream (arXiv:2508.15487; generation_utils.py of the released models): the time schedule says how
// many positions a step transfers, the rule which ones. Tokens and statistics come from the
// distribution after temperature, top-p and top-k.
#include <algorithm>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

// Each position on its own, by a coin that does not look at the prediction.
class Origin final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    const double chance =
        DreamTransferChance(StepsOf(context), context.state.block_step, context.params.eps);
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.undecided(i) && StepUniform(context, NoiseStream::kTransfer, i) < chance) {
        SetFiltered(context.params, FilterOrder::kTopPThenTopK, AddQuery(i, plan));
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

class Ranked : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const final {
    StartPlan(context, plan);
    plan.forward = Count(context) > 0;
    if (!plan.forward) return;
    QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries)
      SetFiltered(context.params, FilterOrder::kTopPThenTopK, query);
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const final {
    outcome.Clear();
    if (answers.empty()) return;
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    const double alg_temp = context.params.alg_temp;
    for (size_t i = 0; i < answers.size(); ++i) {
      double score = Confidence(answers[i]);
      if (alg_temp > 0) {
        // Gumbel-top-n is drawing n without replacement from softmax(confidence / alg_temp).
        score = score / alg_temp +
                StepGumbel(context, NoiseStream::kTransfer, plan.queries[i].position);
      }
      scratch.scores.push_back(score);
    }
    TakeBest(scratch.scores, Count(context), scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }

  std::optional<TransferRule> Describe(const StepContext& context,
                                       const StepPlan& plan) const final {
    // Gumbel variates of this library's logarithm are the host's own.
    if (context.params.alg_temp > 0) return std::nullopt;
    return TransferRule{.score = Score(), .count = plan.queries.empty() ? 0 : Count(context)};
  }

 private:
  virtual TransferScore Score() const = 0;
  virtual double Confidence(const VocabularyAnswer& answer) const = 0;

  static int32_t Count(const StepContext& context) {
    const int32_t masked = CountUndecided(context.canvas, context.block.begin, context.block.end);
    return DreamTransferCount(masked, StepsOf(context), context.state.block_step,
                              context.params.eps);
  }
};

class MaskgitPlus final : public Ranked {
  TransferScore Score() const override { return TransferScore::kProbability; }
  double Confidence(const VocabularyAnswer& answer) const override { return answer.probability; }
};

class TopkMargin final : public Ranked {
  TransferScore Score() const override { return TransferScore::kMargin; }
  double Confidence(const VocabularyAnswer& answer) const override { return answer.margin; }
};

class Entropy final : public Ranked {
  TransferScore Score() const override { return TransferScore::kNegativeEntropy; }
  double Confidence(const VocabularyAnswer& answer) const override { return -answer.entropy; }
};

}  // namespace

const Sampler* OriginSampler() {
  static const Origin sampler;
  return &sampler;
}

const Sampler* MaskgitPlusSampler() {
  static const MaskgitPlus sampler;
  return &sampler;
}

const Sampler* TopkMarginSampler() {
  static const TopkMargin sampler;
  return &sampler;
}

const Sampler* EntropySampler() {
  static const Entropy sampler;
  return &sampler;
}

}  // namespace cinnabar
