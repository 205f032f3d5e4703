// LLaDA2.x with insertion and deletion (sglang, dllm/algorithm/joint_threshold_indel.py): as
// joint_threshold, but a prediction may also take its position out of the open block or put a mask
// in before it (MoveTokens), and the mask token may be predicted.
//
// A block counts its original masks, those that it was opened with, apart from masks that came
// later. While there are originals, a step fills every mask above the threshold, or the best ones,
// in either case one more than there are later masks; an original takes the best token that is not
// the mask. Without originals every mask is filled, with the mask token again where that is best,
// and such steps have a budget. The block's last step, when that is spent or the block has had as
// many steps as positions and budget, takes neither mask nor moves. Where a block stands as it
// stood before, the least probable of the changes takes a token that was not written there before,
// so that the steps do not go round in a circle.
#include <algorithm>

#include "absl/algorithm/container.h"
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"
#include "worker/decoding/token_moves.h"

namespace cinnabar {
namespace {

// What is known of a step before the network is asked.
struct Look {
  int32_t num_originals = 0;  // undecided ones
  bool last = false;
  bool may_be_last = false;  // when it fills all originals
  bool seen = false;         // the block stood like this before
};

bool IsOriginal(const StepContext& context, int32_t position) {
  return context.canvas.undecided(position) &&
         context.state.memory.original[position - context.block.begin] != 0;
}

Look LookAt(const StepContext& context) {
  const DecodingState& state = context.state;
  const BlockRange block = context.block;
  const int32_t edit_steps = context.params.edit_steps;
  Look look;
  for (int32_t i = block.begin; i < block.end; ++i) look.num_originals += IsOriginal(context, i);
  const int32_t num_edits = state.block_edits + (look.num_originals == 0 ? 1 : 0);
  look.last = num_edits >= std::max(edit_steps, 1) ||
              state.block_step >= block.end - block.begin + edit_steps;
  look.may_be_last = !look.last && edit_steps == 0;
  look.seen =
      !look.last && absl::c_linear_search(state.memory.seen, BlockKey(context.canvas, block));
  return look;
}

// What a position may become.
struct Prediction {
  int32_t position = 0;
  TokenId token = -1;
  double probability = 0;
  const VocabularyAnswer* in_last = nullptr;  // neither mask nor move
  const VocabularyAnswer* untried = nullptr;  // not written there before
  bool masked = false;
  bool chosen = false;
};

class JointThresholdInDel final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    const Look look = LookAt(context);
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (context.canvas.states[i] == PositionState::kGiven) continue;
      const bool original = IsOriginal(context, i);
      if (!look.last || !context.canvas.undecided(i)) {
        PositionQuery& query = AddTempered(context, i, plan);
        if (!original) AddRule(context, context.model.mask_token, /*pickable=*/true, query);
      }
      if (look.last || look.may_be_last) {
        PositionQuery& query = AddTempered(context, i, plan);
        AddRule(context, context.model.delete_token, /*pickable=*/false, query);
        AddRule(context, context.model.split_token, /*pickable=*/false, query);
      }
      if (look.seen) {
        PositionQuery& query = AddTempered(context, i, plan);
        bool mask_tried = false;
        for (const TokenEdit& tried : TriedAt(context.state.memory, i)) {
          mask_tried = mask_tried || tried.token == context.model.mask_token;
          AddRule(context, tried.token, /*pickable=*/false, query);
        }
        if (!original && !mask_tried) {
          AddRule(context, context.model.mask_token, /*pickable=*/true, query);
        }
      }
    }
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    Look look = LookAt(context);
    thread_local std::vector<Prediction> predictions;
    ReadAnswers(context, look, plan, answers, predictions);
    ChooseMasks(context, look, predictions);
    for (Prediction& p : predictions) {
      if (!p.masked) {
        p.chosen = p.probability > context.params.edit_threshold &&
                   p.token != context.canvas.tokens[p.position];
      }
      if (p.chosen && look.last && IsMaskOrMove(context.model, p.token)) Take(*p.in_last, p);
    }
    if (look.seen && !look.last) LeaveTheCircle(context, predictions);
    for (const Prediction& p : predictions) {
      if (p.chosen) outcome.edits.push_back({.position = p.position, .token = p.token});
    }
    if (!outcome.edits.empty()) Move(context, look, predictions, outcome);
  }

 private:
  static bool IsMaskOrMove(const ModelTraits& model, TokenId token) {
    return token == model.mask_token || token == model.delete_token || token == model.split_token;
  }

  static void Take(const VocabularyAnswer& answer, Prediction& prediction) {
    prediction.token = answer.token;
    prediction.probability = answer.probability;
  }

  static PositionQuery& AddTempered(const StepContext& context, int32_t position, StepPlan& plan) {
    PositionQuery& query = AddQuery(position, plan);
    query.pick_temperature = context.params.temperature;
    query.statistics_temperature = TemperedStatistics(context.params);
    return query;
  }

  // A rule replaces the common one of its id, so it repeats what that says.
  static void AddRule(const StepContext& context, TokenId id, bool pickable, PositionQuery& query) {
    if (absl::c_linear_search(context.params.forbidden_ids, id)) return;
    const bool is_eos = absl::c_linear_search(context.model.eos_tokens, id);
    query.rules.push_back(
        {.id = id, .bias = is_eos ? -context.params.eos_penalty : 0.0F, .pickable = pickable});
  }

  // In the order of Plan().
  static void ReadAnswers(const StepContext& context, const Look& look, const StepPlan& plan,
                          absl::Span<const VocabularyAnswer> answers,
                          std::vector<Prediction>& predictions) {
    predictions.clear();
    for (size_t i = 0; i < answers.size();) {
      Prediction& p = predictions.emplace_back();
      p.position = plan.queries[i].position;
      p.masked = context.canvas.undecided(p.position);
      Take(answers[i], p);
      if (!look.last || !p.masked) ++i;
      if (look.last || look.may_be_last) p.in_last = &answers[i++];
      if (look.seen) p.untried = &answers[i++];
    }
  }

  // Which masks are filled. May find that the step is the last.
  static void ChooseMasks(const StepContext& context, Look& look,
                          std::vector<Prediction>& predictions) {
    const float threshold = context.params.threshold;
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    int32_t num_above = 0;
    for (const Prediction& p : predictions) {
      if (!p.masked) continue;
      scratch.scores.push_back(p.probability);
      num_above += p.probability > threshold ? 1 : 0;
    }
    const auto num_masks = static_cast<int32_t>(scratch.scores.size());
    const int32_t num_wanted = 1 + num_masks - look.num_originals;
    const bool all = look.last || look.num_originals == 0;
    const bool best = !all && num_above < num_wanted;
    if (best) TakeBest(scratch.scores, num_wanted, scratch.chosen);
    int32_t mask = 0;
    size_t next = 0;
    int32_t num_originals = 0;
    for (Prediction& p : predictions) {
      if (!p.masked) continue;
      const bool is_best = best && next < scratch.chosen.size() && scratch.chosen[next] == mask;
      next += is_best ? 1 : 0;
      p.chosen = all || (best ? is_best : p.probability > threshold);
      num_originals += p.chosen && IsOriginal(context, p.position) ? 1 : 0;
      ++mask;
    }
    if (!look.may_be_last || num_originals < look.num_originals) return;
    look.last = true;
    for (Prediction& p : predictions) p.chosen = p.masked;
  }

  static void LeaveTheCircle(const StepContext& context, std::vector<Prediction>& predictions) {
    Prediction* least = nullptr;
    for (Prediction& p : predictions) {
      if (!p.chosen || p.token == context.canvas.tokens[p.position]) continue;
      if (least == nullptr || p.probability < least->probability) least = &p;
    }
    if (least != nullptr) Take(*least->untried, *least);
  }

  static void Move(const StepContext& context, const Look& look,
                   absl::Span<const Prediction> predictions, StepOutcome& outcome) {
    const BlockRange block = context.block;
    thread_local std::vector<MovedToken> moved;
    MoveTokens(context.canvas, block, outcome.edits, context.model, moved);
    AppendMoves(context.canvas, block, moved, context.model, outcome.transfers);
    for (Transfer& transfer : outcome.transfers) {
      const MovedToken& token = moved[transfer.position - block.begin];
      if (transfer.token == kMaskedAgain) continue;
      transfer.confidence = token.written ? ProbabilityAt(predictions, token.from)
                                          : context.state.confidences[token.from];
    }
    const bool decided = absl::c_none_of(
        moved, [&](const MovedToken& m) { return m.token == context.model.mask_token; });
    outcome.stays_open = decided && !look.last;
  }

  static float ProbabilityAt(absl::Span<const Prediction> predictions, int32_t position) {
    const auto* const found =
        std::lower_bound(predictions.begin(), predictions.end(), position,
                         [](const Prediction& p, int32_t wanted) { return p.position < wanted; });
    return static_cast<float>(found->probability);
  }
};

}  // namespace

const Sampler* JointThresholdInDelSampler() {
  static const JointThresholdInDel sampler;
  return &sampler;
}

}  // namespace cinnabar
