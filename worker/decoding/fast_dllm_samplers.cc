// Fast-dLLM (arXiv:2505.22618; github.com/NVlabs/Fast-dLLM, llada/generate.py): as many positions
// in a step as are confident enough, until the block is full. Confidence is the clean softmax.
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

class FastDllm : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const final {
    StartPlan(context, plan);
    if (!ReuseKv(context, plan)) QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries) query.pick_temperature = context.params.temperature;
    AddEosRules(context, plan);
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const final {
    outcome.Clear();
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    for (const VocabularyAnswer& answer : answers) {
      scratch.scores.push_back(EosAwareConfidence(context, answer));
    }
    OrderByScore(scratch.scores, scratch.chosen);
    KeepFirst(Count(context.params, scratch), scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }

 private:
  // How many of `scratch.chosen` (best first) are transferred; at least one.
  virtual int32_t Count(const DecodingParams& params, const SelectionScratch& scratch) const = 0;
};

class Threshold final : public FastDllm {
 public:
  std::optional<TransferRule> Describe(const StepContext& context, const StepPlan&) const override {
    if (context.params.confidence_eos_eot_inf) return std::nullopt;
    return TransferRule{.count = 1, .threshold = context.params.threshold, .inclusive = true};
  }

 private:
  int32_t Count(const DecodingParams& params, const SelectionScratch& scratch) const override {
    size_t count = 1;  // the best one always
    while (count < scratch.chosen.size() &&
           scratch.scores[scratch.chosen[count]] >= params.threshold) {
      ++count;
    }
    return static_cast<int32_t>(count);
  }
};

class Factor final : public FastDllm {
  int32_t Count(const DecodingParams& params, const SelectionScratch& scratch) const override {
    return FactorCount(scratch.scores, scratch.chosen, params.factor);
  }
};

}  // namespace

const Sampler* ThresholdSampler() {
  static const Threshold sampler;
  return &sampler;
}

const Sampler* FactorSampler() {
  static const Factor sampler;
  return &sampler;
}

}  // namespace cinnabar
