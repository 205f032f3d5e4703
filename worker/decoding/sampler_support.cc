#include "worker/decoding/sampler_support.h"

#include <algorithm>
#include <cmath>

#include "common/base/check.h"

namespace cinnabar {
namespace {

bool Contains(absl::Span<const TokenId> ids, TokenId id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

SelectionScratch& ThreadScratch() {
  thread_local SelectionScratch scratch;
  return scratch;
}

void StartPlan(const StepContext& context, StepPlan& plan) {
  plan.Clear();
  plan.visible_end = context.canvas.length();
}

bool ReuseKv(const StepContext& context, StepPlan& plan) {
  const BlockRange& block = context.block;
  if (context.params.kv_reuse == KvReuse::kExact) return false;
  if (!context.state.reused_block.empty()) {
    plan.rows_begin = block.begin;
    plan.rows_end = context.params.kv_reuse == KvReuse::kDual ? block.end : context.canvas.length();
    return false;
  }
  if (!context.model.shift_logits || !context.canvas.undecided(block.begin)) return false;
  AddQuery(block.begin, plan);
  return true;
}

PositionQuery& AddQuery(int32_t position, StepPlan& plan) {
  PositionQuery& query = plan.queries.emplace_back();
  query.position = position;
  return query;
}

void QueryUndecided(const StepContext& context, StepPlan& plan) {
  for (int32_t i = context.block.begin; i < context.block.end; ++i) {
    if (context.canvas.undecided(i)) AddQuery(i, plan);
  }
}

int32_t StepsOf(const StepContext& context) {
  return StepsPerBlock(context.canvas, context.params, context.model);
}

bool IsLastStep(const StepContext& context) {
  return context.state.block_step >= StepsOf(context) - 1;
}

double StepUniform(const StepContext& context, NoiseStream stream, int32_t position) {
  const NoiseKey key{.seed = context.params.seed,
                     .position = static_cast<uint32_t>(position),
                     .step = static_cast<uint32_t>(context.state.step)};
  return UniformFromWord(NoiseWord(key, stream, 0));
}

double StepGumbel(const StepContext& context, NoiseStream stream, int32_t position) {
  return -std::log(-std::log(StepUniform(context, stream, position)));
}

void SetFiltered(const DecodingParams& params, FilterOrder order, PositionQuery& query) {
  query.pick_temperature = params.temperature;
  query.statistics_temperature = TemperedStatistics(params);
  query.top_p = params.top_p;
  query.top_k = params.top_k;
  query.filter_order = order;
}

void AddEosRules(const StepContext& context, StepPlan& plan) {
  const DecodingParams& params = context.params;
  const ModelTraits& model = context.model;
  if (!params.logits_eos_inf && !params.confidence_eos_eot_inf) return;
  // A rule replaces the common one of its id, so it repeats the penalty and leaves forbidden ids
  // alone.
  const auto add = [&](PositionQuery& query, TokenId id, bool pickable) {
    if (Contains(params.forbidden_ids, id)) return;
    const bool is_eos = Contains(model.eos_tokens, id);
    query.rules.push_back({.id = id,
                           .bias = is_eos ? -params.eos_penalty : 0.0F,
                           .counted = false,
                           .pickable = pickable});
  };
  // With a temperature the published code takes only EoT out of the confidence: EOS is removed from
  // a copy that is not read again.
  const bool eos_uncounted = params.confidence_eos_eot_inf && params.temperature == 0;
  const bool eot_uncounted = params.confidence_eos_eot_inf && model.eot_token >= 0;
  for (PositionQuery& query : plan.queries) {
    for (size_t i = 0; i < model.eos_tokens.size(); ++i) {
      const TokenId eos = model.eos_tokens[i];
      if (Contains(absl::MakeConstSpan(model.eos_tokens).first(i), eos)) continue;
      const bool uncounted = eos_uncounted || (eot_uncounted && eos == model.eot_token);
      if (params.logits_eos_inf) {
        add(query, eos, /*pickable=*/false);
      } else if (uncounted) {
        add(query, eos, /*pickable=*/true);
      }
    }
    if (eot_uncounted && !Contains(model.eos_tokens, model.eot_token)) {
      add(query, model.eot_token, /*pickable=*/true);
    }
  }
}

double EosAwareConfidence(const StepContext& context, const VocabularyAnswer& answer) {
  if (context.params.confidence_eos_eot_inf) {
    const ModelTraits& model = context.model;
    if (model.eot_token >= 0 && answer.token == model.eot_token) return 0;
    if (context.params.temperature == 0 && Contains(model.eos_tokens, answer.token)) return 0;
  }
  return answer.probability;
}

void TransferChosen(const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
                    absl::Span<const int32_t> chosen, StepOutcome& outcome) {
  for (const int32_t index : chosen) {
    outcome.transfers.push_back({.position = plan.queries[index].position,
                                 .token = answers[index].token,
                                 .confidence = static_cast<float>(answers[index].probability)});
  }
}

void TransferAll(const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
                 StepOutcome& outcome) {
  CINNABAR_CHECK(answers.size() == plan.queries.size());
  for (size_t i = 0; i < answers.size(); ++i) {
    outcome.transfers.push_back({.position = plan.queries[i].position,
                                 .token = answers[i].token,
                                 .confidence = static_cast<float>(answers[i].probability)});
  }
}

}  // namespace cinnabar
