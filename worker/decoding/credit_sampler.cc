// dInfer's credit rule (arXiv:2510.08666; github.com/inclusionAI/dInfer, parallel_strategy.py): a
// masked position gives its best token a credit in each step, more when it is more probable, and
// old credits fade; what is predicted is softmax(logits + kWeight ln(1 + credit)), so that what
// stays the best over several steps reaches the threshold sooner. The credits of a step count in
// it.
//
// The vocabulary head is asked twice for a position that has credits: for the best token as the
// network has it, and for the prediction under the credits of the steps before. What this step adds
// for that one token is worked out from the two answers. Unlike the published code, a position
// keeps its kCreditsPerPositionMax largest credits.
#include <algorithm>
#include <cmath>

#include "absl/algorithm/container.h"
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

constexpr double kWeight = 0.7;
constexpr double kExponent = 0.2;
constexpr double kDecay = 0.8;

double Bias(double credit) { return kWeight * std::log1p(credit); }

// The credits of one position among all, which are in order; `from` is where the search begins and
// is moved behind them.
absl::Span<const Credit> CreditsAt(absl::Span<const Credit> credits, int32_t position,
                                   size_t& from) {
  while (from < credits.size() && credits[from].position < position) ++from;
  const size_t begin = from;
  while (from < credits.size() && credits[from].position == position) ++from;
  return credits.subspan(begin, from - begin);
}

struct Prediction {
  TokenId token = -1;
  double probability = 0;
};

class CreditThreshold final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    const DecodingParams& params = context.params;
    size_t from = 0;
    for (int32_t i = context.block.begin; i < context.block.end; ++i) {
      if (!context.canvas.undecided(i)) continue;
      const absl::Span<const Credit> credits = CreditsAt(context.state.credits, i, from);
      AddQuery(i, plan);
      if (credits.empty() && params.temperature == 0) continue;
      PositionQuery& query = AddQuery(i, plan);
      query.pick_temperature = params.temperature;
      for (const Credit& credit : credits) {
        // A rule replaces the common one of its id, so it repeats what that says.
        const bool is_eos = absl::c_linear_search(context.model.eos_tokens, credit.token);
        query.rules.push_back({.id = credit.token,
                               .bias = static_cast<float>(Bias(kDecay * credit.value)) -
                                       (is_eos ? params.eos_penalty : 0.0F)});
      }
    }
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    ForEachPrediction(
        context, plan, answers,
        [&](int32_t, const Prediction& prediction, absl::Span<const Credit>,
            const VocabularyAnswer&) { scratch.scores.push_back(prediction.probability); });
    OrderByScore(scratch.scores, scratch.chosen);
    size_t count = 1;  // the best one always
    while (count < scratch.chosen.size() &&
           scratch.scores[scratch.chosen[count]] >= context.params.threshold) {
      ++count;
    }
    KeepFirst(static_cast<int32_t>(count), scratch.chosen);
    size_t next = 0;
    int32_t index = 0;
    ForEachPrediction(
        context, plan, answers,
        [&](int32_t position, const Prediction& prediction, absl::Span<const Credit> credits,
            const VocabularyAnswer& best) {
          if (next < scratch.chosen.size() && scratch.chosen[next] == index) {
            ++next;
            outcome.transfers.push_back({.position = position,
                                         .token = prediction.token,
                                         .confidence = static_cast<float>(prediction.probability)});
          } else {
            AddCredit(position, credits, best, outcome.credits);
          }
          ++index;
        });
  }

 private:
  // Calls visit(position, prediction, its credits before this step, its best token).
  template <typename Visit>
  static void ForEachPrediction(const StepContext& context, const StepPlan& plan,
                                absl::Span<const VocabularyAnswer> answers, const Visit& visit) {
    size_t from = 0;
    for (size_t i = 0; i < answers.size();) {
      const int32_t position = plan.queries[i].position;
      const bool twice = i + 1 < answers.size() && plan.queries[i + 1].position == position;
      const absl::Span<const Credit> credits = CreditsAt(context.state.credits, position, from);
      visit(position, Predict(context, position, answers[i], answers[twice ? i + 1 : i], credits),
            credits, answers[i]);
      i += twice ? 2 : 1;
    }
  }

  // `best` is the network's own best token, `with_credits` the pick under the credits so far.
  static Prediction Predict(const StepContext& context, int32_t position,
                            const VocabularyAnswer& best, const VocabularyAnswer& with_credits,
                            absl::Span<const Credit> credits) {
    double credit = 0;
    for (const Credit& held : credits) {
      if (held.token == best.token) credit = kDecay * held.value;
    }
    const double before = Bias(credit);
    const double after = Bias(credit + std::pow(best.probability, kExponent));
    const double best_logit = best.token_logit + after;
    const double log_sum =
        with_credits.log_sum_exp +
        std::log1p(std::exp(best.token_logit + before - with_credits.log_sum_exp) *
                   std::expm1(after - before));
    bool takes_best = with_credits.token == best.token;
    if (!takes_best) {
      const double temperature = context.params.temperature;
      const auto score = [&](TokenId token, double logit) {
        if (temperature == 0) return logit;
        const NoiseKey key{.seed = context.params.seed,
                           .position = static_cast<uint32_t>(position),
                           .step = static_cast<uint32_t>(context.state.step)};
        const double u =
            UniformFromWord(NoiseWord(key, NoiseStream::kToken, static_cast<uint32_t>(token)));
        return logit / temperature - std::log(-std::log(u));
      };
      const double best_score = score(best.token, best_logit);
      const double other_score = score(with_credits.token, with_credits.token_logit);
      takes_best = best_score > other_score ||
                   (best_score == other_score && best.token < with_credits.token);
    }
    const double logit = takes_best ? best_logit : with_credits.token_logit;
    return {.token = takes_best ? best.token : with_credits.token,
            .probability = std::min(1.0, std::exp(logit - log_sum))};
  }

  // What the position holds after this step, appended to `all`.
  static void AddCredit(int32_t position, absl::Span<const Credit> credits,
                        const VocabularyAnswer& best, std::vector<Credit>& all) {
    const size_t begin = all.size();
    double value = std::pow(best.probability, kExponent);
    bool added = false;
    for (const Credit& credit : credits) {
      if (!added && credit.token >= best.token) {
        if (credit.token == best.token) value += kDecay * credit.value;
        all.push_back({position, best.token, static_cast<float>(value)});
        added = true;
        if (credit.token == best.token) continue;
      }
      all.push_back({position, credit.token, static_cast<float>(kDecay * credit.value)});
    }
    if (!added) all.push_back({position, best.token, static_cast<float>(value)});
    if (all.size() - begin > kCreditsPerPositionMax) {
      all.erase(
          std::min_element(all.begin() + static_cast<std::ptrdiff_t>(begin), all.end(),
                           [](const Credit& a, const Credit& b) { return a.value < b.value; }));
    }
  }
};

}  // namespace

const Sampler* CreditSampler() {
  static const CreditThreshold sampler;
  return &sampler;
}

}  // namespace cinnabar
