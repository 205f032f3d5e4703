// P2, path planning (arXiv:2502.03540): in every step all positions are predicted and scored, and
// the worst of them are masked (again); what remains keeps its token if it had one. After step i of
// S, floor(N (1 - i / S)) of the block's N positions are masked.
//
// `p2` scores with the log-probability of the prediction (self-planning) and `p2_random` with the
// logarithm of a uniform number; a committed position's score is multiplied by eta: 0 never masks
// it again, 1 treats it like the others, more masks it rather. As in the published code the score
// is that of the new prediction, not of the token that stands there, and equal scores at the cut
// stay unmasked. `p2_open` is Open-dLLM's rule (github.com/pengzhangzhi/Open-dLLM): the probability
// of the prediction after the filters, and exactly as many as the schedule says.
// Unlike the published code, a temperature does not put its noise into the score.
#include <algorithm>
#include <cmath>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/schedule.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

class PathPlanning final : public Sampler {
 public:
  enum class Variant { kSelf, kRandom, kOpen };
  explicit PathPlanning(Variant variant) : variant_(variant) {}

  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    // A random order is known before the pass, so only what is filled is asked for.
    if (variant_ == Variant::kRandom) ChooseKept(context, plan, {});
    ForEachPosition(context, [&](int32_t i, bool keeps) {
      const bool asks = variant_ == Variant::kRandom
                            ? keeps && context.canvas.undecided(i)
                            : context.canvas.undecided(i) || Predicts(context);
      if (!asks) return;
      PositionQuery& query = AddQuery(i, plan);
      query.pick_temperature = context.params.temperature;
      query.statistics_temperature = TemperedStatistics(context.params);
      if (variant_ != Variant::kOpen) return;
      query.top_p = context.params.top_p;
      query.top_k = context.params.top_k;
      query.filter_order = FilterOrder::kTopPThenTopK;
    });
    plan.forward = !plan.queries.empty();
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    ChooseKept(context, plan, answers);
    int32_t query = 0;
    ForEachPosition(context, [&](int32_t i, bool keeps) {
      const bool asked =
          query < static_cast<int32_t>(plan.queries.size()) && plan.queries[query].position == i;
      if (!context.canvas.undecided(i)) {
        if (!keeps) outcome.transfers.push_back({.position = i, .token = kMaskedAgain});
      } else if (keeps) {
        TransferChosen(plan, answers, absl::MakeConstSpan(&query, 1), outcome);
      }
      query += asked ? 1 : 0;
    });
    outcome.stays_open = NumMaskedAfter(context) > 0;
  }

 private:
  // The quotient is that of either code, for its last bit can decide.
  int64_t NumMaskedAfter(const StepContext& context) const {
    const int32_t num_steps = StepsOf(context);
    const int32_t step = std::min(context.state.block_step + 1, num_steps);
    const double kept = variant_ == Variant::kOpen ? static_cast<double>(step) / num_steps
                                                   : step * (1.0 / num_steps);
    return Float32Share(context.state.block_masks, 1.0 - kept);
  }

  // Whether the predictions of committed positions count.
  bool Predicts(const StepContext& context) const {
    return variant_ == Variant::kOpen || (variant_ == Variant::kSelf && context.params.eta > 0);
  }

  // Calls visit(position, keeps) for the positions of the block that are not given; `keeps` says
  // whether ChooseKept(), if it was called before, chose to have it unmasked.
  template <typename Visit>
  static void ForEachPosition(const StepContext& context, const Visit& visit) {
    const std::vector<int32_t>& kept = ThreadScratch().chosen;
    size_t next = 0;
    int32_t index = 0;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.states[i] == PositionState::kGiven) continue;
      const bool keeps = next < kept.size() && kept[next] == index;
      visit(i, keeps);
      next += keeps ? 1 : 0;
      ++index;
    }
  }

  // ThreadScratch().chosen: which of the block's positions that are not given are unmasked after
  // this step.
  void ChooseKept(const StepContext& context, const StepPlan& plan,
                  absl::Span<const VocabularyAnswer> answers) const {
    SelectionScratch& scratch = ThreadScratch();
    std::vector<double>& scores = scratch.scores;
    scores.clear();
    size_t next = 0;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.states[i] == PositionState::kGiven) continue;
      double score = 0;
      if (variant_ == Variant::kRandom) {
        score = std::log(StepUniform(context, NoiseStream::kConfidence, i));
      } else if (next < answers.size() && plan.queries[next].position == i) {
        score = variant_ == Variant::kOpen ? answers[next].probability
                                           : std::log(answers[next].probability);
        ++next;
      }
      if (!context.canvas.undecided(i) && variant_ != Variant::kOpen) score *= context.params.eta;
      scores.push_back(std::isnan(score) ? 0 : score);  // 0 times the logarithm of 0
    }
    OrderByScore(scores, scratch.chosen);
    const int64_t num_positions = static_cast<int64_t>(scores.size());
    int64_t num_kept = num_positions - std::min(num_positions, NumMaskedAfter(context));
    while (variant_ != Variant::kOpen && num_kept > 0 && num_kept < num_positions &&
           scores[scratch.chosen[num_kept]] == scores[scratch.chosen[num_kept - 1]]) {
      ++num_kept;
    }
    KeepFirst(static_cast<int32_t>(num_kept), scratch.chosen);
  }

  const Variant variant_;
};

}  // namespace

const Sampler* PathPlanningSampler() {
  static const PathPlanning sampler(PathPlanning::Variant::kSelf);
  return &sampler;
}

const Sampler* PathPlanningRandomSampler() {
  static const PathPlanning sampler(PathPlanning::Variant::kRandom);
  return &sampler;
}

const Sampler* PathPlanningOpenSampler() {
  static const PathPlanning sampler(PathPlanning::Variant::kOpen);
  return &sampler;
}

}  // namespace cinnabar
