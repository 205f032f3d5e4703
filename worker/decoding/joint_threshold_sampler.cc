// LLaDA2.1 (arXiv:2602.08676; sglang, dllm/algorithm/joint_threshold.py): in an open block every
// masked position whose prediction is above the threshold is filled, at least one; and every
// committed one is replaced where the prediction is another token above the edit threshold. A block
// without masks is looked at again until nothing changes, at most `edit_steps` times. The
// repeat penalty is taken off the logit of the token that stands one position before, inside the
// block.
#include <algorithm>

#include "absl/algorithm/container.h"
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

class JointThreshold final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    const DecodingParams& params = context.params;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.states[i] == PositionState::kGiven) continue;
      PositionQuery& query = AddQuery(i, plan);
      SetFiltered(params, FilterOrder::kTopKThenTopP, query);
      if (params.repeat_penalty > 0 && i > context.block.begin) {
        AddPenalty(context, context.canvas.tokens[i - 1], query);
      }
    }
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    const DecodingParams& params = context.params;
    const Canvas& canvas = context.canvas;
    int32_t best = -1;  // of the masked ones
    bool above = false;
    for (size_t i = 0; i < answers.size(); ++i) {
      if (!canvas.undecided(plan.queries[i].position)) continue;
      above = above || answers[i].probability > params.threshold;
      if (best < 0 || answers[i].probability > answers[best].probability) {
        best = static_cast<int32_t>(i);
      }
    }
    const bool had_masks = best >= 0;
    int32_t num_left = 0;
    for (size_t i = 0; i < answers.size(); ++i) {
      const int32_t index = static_cast<int32_t>(i);
      const int32_t position = plan.queries[i].position;
      const bool fills = canvas.undecided(position) &&
                         (above ? answers[i].probability > params.threshold : index == best);
      const bool edits = !canvas.undecided(position) &&
                         answers[i].probability > params.edit_threshold &&
                         answers[i].token != canvas.tokens[position];
      if (fills || edits) {
        TransferChosen(plan, answers, absl::MakeConstSpan(&index, 1), outcome);
      } else if (canvas.undecided(position)) {
        ++num_left;
      }
    }
    const int32_t num_edit_steps = context.state.block_edits + (had_masks ? 0 : 1);
    outcome.stays_open = num_left == 0 && num_edit_steps < params.edit_steps &&
                         (had_masks || !outcome.transfers.empty());
  }

 private:
  // A rule replaces the common one of its id, so it repeats what that says.
  static void AddPenalty(const StepContext& context, TokenId id, PositionQuery& query) {
    const DecodingParams& params = context.params;
    if (absl::c_linear_search(params.forbidden_ids, id)) return;
    const bool is_eos = absl::c_linear_search(context.model.eos_tokens, id);
    query.rules.push_back({.id = id,
                           .bias = -params.repeat_penalty - (is_eos ? params.eos_penalty : 0.0F),
                           .pickable = id != context.model.mask_token});
  }
};

}  // namespace

const Sampler* JointThresholdSampler() {
  static const JointThreshold sampler;
  return &sampler;
}

}  // namespace cinnabar
