// Fast-dLLM v2 (arXiv:2509.26328; modeling.py of Efficient-Large-Model/Fast_dLLM_v2): inside a
// block, sub-blocks left to right; in each step every prediction of the open sub-block above the
// threshold, and the best one. With shifted logits a block's first token is the block before's last
// prediction, taken in a step of its own that computes nothing of the block.
#include <algorithm>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

class FastDllmV2 final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    const DecodingParams& params = context.params;
    const BlockRange& block = context.block;
    if (FromTheBlockBefore(context)) {
      AddQuery(block.begin, plan);  // greedy whatever the temperature, as published
      plan.visible_end = block.begin;
      return;
    }
    int32_t first = block.begin;
    while (!context.canvas.undecided(first)) ++first;
    const int32_t begin = first - (first - block.begin) % params.sub_block_length;
    const int32_t end = std::min(begin + params.sub_block_length, block.end);
    for (int32_t i = first; i < end; ++i) {
      if (!context.canvas.undecided(i)) continue;
      PositionQuery& query = AddQuery(i, plan);
      query.pick_temperature = params.temperature;
      query.statistics_temperature = TemperedStatistics(params);
      if (params.temperature > 0) query.top_p = params.top_p;
    }
    // The row before a sub-block's first position is outside of it.
    if (first > begin && LastWholePassWasHere(context, begin)) {
      plan.rows_begin = begin;
      plan.rows_end = end;
    }
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
    TakeBest(scratch.scores, std::max(above, 1), scratch.chosen);
    TransferChosen(plan, answers, scratch.chosen, outcome);
  }

  std::optional<TransferRule> Describe(const StepContext& context, const StepPlan&) const override {
    return TransferRule{.count = 1, .threshold = context.params.threshold};
  }

 private:
  // Whether the block was last computed whole while the sub-block at `begin` was open: then what
  // came before it was decided already.
  static bool LastWholePassWasHere(const StepContext& context, int32_t begin) {
    const std::vector<TokenId>& block = context.state.reused_block;
    return !block.empty() &&
           std::find(block.begin(), block.begin() + (begin - context.block.begin),
                     context.model.mask_token) == block.begin() + (begin - context.block.begin);
  }

  static bool FromTheBlockBefore(const StepContext& context) {
    const int32_t begin = context.block.begin;
    return context.model.shift_logits && context.model.causal_block_length > 0 && begin > 0 &&
           context.canvas.undecided(begin);
  }
};

}  // namespace

const Sampler* FastDllmV2Sampler() {
  static const FastDllmV2 sampler;
  return &sampler;
}

}  // namespace cinnabar
