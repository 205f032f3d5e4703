// DiffusionGemma (huggingface/transformers, models/diffusion_gemma/generation_diffusion_gemma.py).
// In every step each position of the block draws a token at the step's temperature; those of lowest
// entropy keep theirs, as many as the bound allows (arXiv:2505.24857), and the others become noise
// again: nothing stays for having been kept once. The answer is the most likely tokens of the
// block's last step, which comes early when they have stayed the same and their entropy is low.
#include <algorithm>

#include "worker/decoding/sampler_support.h"
#include "worker/decoding/selection.h"

namespace cinnabar {
namespace {

class GemmaRenoise final : public Sampler {
 public:
  void Plan(const StepContext& context, StepPlan& plan) const override {
    StartPlan(context, plan);
    const DecodingParams& params = context.params;
    const double num_steps = StepsOf(context);
    const double left = std::max(num_steps - context.state.block_step, 0.0);
    const double end = params.temperature_end;
    plan.prediction_temperature =
        static_cast<float>(end + (params.temperature_start - end) * left / num_steps);
    QueryUndecided(context, plan);
    for (PositionQuery& query : plan.queries) {
      query.pick_temperature = query.statistics_temperature = plan.prediction_temperature;
      query.want_top = true;
    }
  }

  void Decide(const StepContext& context, const StepPlan& plan,
              absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const override {
    outcome.Clear();
    for (const VocabularyAnswer& answer : answers) outcome.predictions.push_back(answer.top_token);
    if (IsLastStep(context) || MayStop(context, answers, outcome)) {
      for (size_t i = 0; i < answers.size(); ++i) {
        outcome.transfers.push_back({.position = plan.queries[i].position,
                                     .token = answers[i].top_token,
                                     .confidence = static_cast<float>(answers[i].top_probability)});
      }
      outcome.settled = true;
      return;
    }
    SelectionScratch& scratch = ThreadScratch();
    scratch.scores.clear();
    for (const VocabularyAnswer& answer : answers) scratch.scores.push_back(-answer.entropy);
    OrderByScore(scratch.scores, scratch.chosen);
    for (double& score : scratch.scores) score = -score;
    KeepFirst(EntropyBoundedCount(scratch.scores, scratch.chosen, context.params.entropy_bound),
              scratch.chosen);
    size_t next = 0;
    for (size_t i = 0; i < answers.size(); ++i) {
      const int32_t position = plan.queries[i].position;
      const bool kept =
          next < scratch.chosen.size() && scratch.chosen[next] == static_cast<int32_t>(i);
      next += kept ? 1 : 0;
      outcome.transfers.push_back(
          {.position = position,
           .token = kept ? answers[i].token
                         : UniformToken(context.params, NoiseStream::kRenoise, position,
                                        context.state.step, context.model.vocab_size),
           .confidence = kept ? static_cast<float>(answers[i].probability) : 0.0F});
    }
  }

 private:
  // Whether the predictions of this step are as stable and as certain as asked for.
  static bool MayStop(const StepContext& context, absl::Span<const VocabularyAnswer> answers,
                      const StepOutcome& outcome) {
    const DecodingParams& params = context.params;
    const bool stable =
        params.stable_steps == 0 || (outcome.predictions == context.state.predictions &&
                                     context.state.stable_steps >= params.stable_steps);
    double entropy = 0;
    for (const VocabularyAnswer& answer : answers) entropy += answer.entropy;
    return stable && entropy < params.confident_entropy * static_cast<double>(answers.size());
  }
};

}  // namespace

const Sampler* GemmaRenoiseSampler() {
  static const GemmaRenoise sampler;
  return &sampler;
}

}  // namespace cinnabar
