// dInfer's hierarchical decoding (arXiv:2510.08666; github.com/inclusionAI/dInfer,
// parallel_strategy.py): of every run of masked positions the most confident one, if it is above
// the low threshold, so that the gaps are halved; all above the threshold; and the best of all.
// `hierarchical_remask` counts committed positions whose prediction is below the low threshold as
// masked, too: those that are not taken again are masked again, and in each step at least one more
// position is filled than was taken back.
#include <algorithm>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

class Hierarchical final : public Sampler {
 public:
  explicit Hierarchical(bool remasks) : remasks_(remasks) {}

  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      const bool committed = context.canvas.states[i] == PositionState::kCommitted;
      if (!context.canvas.undecided(i) && !(remasks_ && committed)) continue;
      AddQuery(i, plan).pick_temperature = context.params.temperature;
    }
    AddEosRules(context, plan);
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    const DecodingParams& params = context.params;
    SelectionScratch& scratch = ThreadScratch();
    // Of each query: its confidence where it is a candidate, -1 where it is not; 2 when taken.
    std::vector<double>& scores = scratch.scores;
    scores.clear();
    int32_t num_revoked = 0;
    for (size_t i = 0; i < answers.size(); ++i) {
      const double confidence = EosAwareConfidence(context, answers[i]);
      const bool masked = context.canvas.undecided(plan.queries[i].position);
      const bool revoked = !masked && confidence < params.low_threshold;
      num_revoked += revoked ? 1 : 0;
      scores.push_back(masked || revoked ? confidence : kNoCandidate);
    }
    OrderByScore(scores, scratch.chosen);  // before any is marked as taken
    TakeRuns(params, plan, scores);
    int32_t num_taken = static_cast<int32_t>(std::count(scores.begin(), scores.end(), kTaken));
    for (const int32_t index : scratch.chosen) {
      if (num_taken > num_revoked) break;
      if (scores[index] == kTaken || scores[index] == kNoCandidate) continue;
      scores[index] = kTaken;
      ++num_taken;
    }
    for (size_t i = 0; i < answers.size(); ++i) {
      const int32_t index = static_cast<int32_t>(i);
      const int32_t position = plan.queries[i].position;
      if (scores[i] == kTaken) {
        if (answers[i].token == context.canvas.tokens[position]) continue;  // it stays
        TransferChosen(plan, answers, absl::MakeConstSpan(&index, 1), outcome);
      } else if (scores[i] != kNoCandidate && !context.canvas.undecided(position)) {
        outcome.transfers.push_back({.position = position, .token = kMaskedAgain});
      }
    }
  }

 private:
  static constexpr double kNoCandidate = -1;
  static constexpr double kTaken = 2;

  // Runs are of neighbouring candidates.
  static void TakeRuns(const DecodingParams& params, const StepPlan& plan,
                       std::vector<double>& scores) {
    for (size_t begin = 0; begin < scores.size();) {
      if (scores[begin] == kNoCandidate) {
        ++begin;
        continue;
      }
      size_t end = begin + 1;
      size_t best = begin;
      while (end < scores.size() && scores[end] != kNoCandidate &&
             plan.queries[end].position == plan.queries[end - 1].position + 1) {
        if (scores[end] > scores[best]) best = end;
        ++end;
      }
      const bool takes_best = scores[best] > params.low_threshold;
      for (size_t i = begin; i < end; ++i) {
        if ((takes_best && i == best) || scores[i] > params.threshold) scores[i] = kTaken;
      }
      begin = end;
    }
  }

  const bool remasks_;
};

}  // namespace

const Sampler* HierarchicalSampler() {
  static const Hierarchical sampler(/*remasks=*/false);
  return &sampler;
}

const Sampler* HierarchicalRemaskSampler() {
  static const Hierarchical sampler(/*remasks=*/true);
  return &sampler;
}

}  // namespace cinnabar
