#include "kernels/cuda/query_batch.h"

#include <algorithm>

#include "absl/types/span.h"
#include "common/base/check.h"
#include "kernels/cuda/device.h"

namespace cinnabar::cuda {
namespace {

bool IsGuided(const VocabularyQuery& query) { return query.unconditional_row >= 0; }

}  // namespace

void CheckQuery(const VocabularyQuery& query, int64_t vocabulary) {
  CINNABAR_CHECK(query.hidden_row >= 0);
  CINNABAR_CHECK(query.statistics_temperature > 1e-30F) << query.statistics_temperature;
  CINNABAR_CHECK(query.pick_temperature == 0.0F || query.pick_temperature > 1e-30F);
  CINNABAR_CHECK(query.top_k >= 0 && query.top_p >= 0.0F);
  CINNABAR_CHECK(query.rules.size() <= kVocabularyRulesMax) << query.rules.size() << " rules";
  for (const VocabularyRule& rule : query.rules) {
    CINNABAR_CHECK(rule.id >= 0 && rule.id < vocabulary) << "rule for id " << rule.id;
  }
  if (query.pick != PickRule::kUniformTweedie) return;
  CINNABAR_CHECK(query.top_k == 0 && query.top_p >= 1.0F) << "a Tweedie step has no filters";
  CINNABAR_CHECK(query.own_token >= 0 && query.own_token < vocabulary);
  CINNABAR_CHECK(query.sigma_step >= 0.0F);
}

bool IsFiltered(const VocabularyQuery& query) { return query.top_k > 0 || query.top_p < 1.0F; }

bool NeedsWholeRow(const VocabularyQuery& query) {
  return IsFiltered(query) || query.pick == PickRule::kUniformTweedie;
}

float ExponentScale(float temperature) {
  constexpr double kLog2E = 1.44269504088896340735992468100;
  return static_cast<float>(kLog2E / static_cast<double>(temperature));
}

void QueryBatch::Add(const VocabularyQuery& query, int64_t vocabulary) {
  const bool guided = IsGuided(query);
  if (guided && slot_rows.size() % 2 == 1) {
    slot_rows.push_back(query.hidden_row);
    slot_queries.push_back(kNoRow);
  }
  DeviceQuery q;
  q.slot = static_cast<int32_t>(slot_rows.size());
  q.guided = guided ? 1 : 0;
  q.guidance = query.guidance_scale + 1.0F;
  q.pick = query.pick == PickRule::kUniformTweedie ? Pick::kTweedie
           : query.pick_temperature > 0.0F         ? Pick::kGumbel
                                                   : Pick::kArgmax;
  if (query.pick_temperature > 0.0F) {
    q.pick_scale = static_cast<float>(1.0 / static_cast<double>(query.pick_temperature));
  }
  q.temperature = query.statistics_temperature;
  q.statistics_scale = ExponentScale(query.statistics_temperature);
  q.top_k = query.top_k;
  q.top_p = query.top_p;
  q.top_p_inside = query.top_p_rule == TopPRule::kInside ? 1 : 0;
  q.two_at_least = query.top_p_rule == TopPRule::kCrossingTwoAtLeast ? 1 : 0;
  q.top_k_first = query.filter_order == FilterOrder::kTopKThenTopP ? 1 : 0;
  q.seed_low = static_cast<uint32_t>(query.noise.seed);
  q.seed_high = static_cast<uint32_t>(query.noise.seed >> 32);
  q.position = query.noise.position;
  q.step = query.noise.step;
  q.own_token = query.own_token;
  q.sigma_step = query.sigma_step;
  q.rules_begin = static_cast<int32_t>(rules.size());
  q.num_rules = static_cast<int32_t>(query.rules.size());
  q.want_top = query.want_top ? 1 : 0;
  q.num_pickable = static_cast<int32_t>(
      query.pickable_ids > 0 ? std::min<int64_t>(query.pickable_ids, vocabulary) : vocabulary);
  for (const VocabularyRule& rule : query.rules) {
    rules.push_back({rule.id, rule.bias, rule.counted ? 1 : 0, rule.pickable ? 1 : 0});
  }
  slot_rows.push_back(query.hidden_row);
  slot_queries.push_back(static_cast<int32_t>(queries.size()));
  if (guided) {
    slot_rows.push_back(query.unconditional_row);
    slot_queries.push_back(kNoRow);
  }
  queries.push_back(q);
}

size_t QueryBatch::SlotsWith(const VocabularyQuery& query) const {
  const size_t num_slots = slot_rows.size();
  return IsGuided(query) ? num_slots + num_slots % 2 + 2 : num_slots + 1;
}

int64_t QueryBatch::staged_bytes() const {
  return StagedBytesOf(absl::MakeConstSpan(queries)) + StagedBytesOf(absl::MakeConstSpan(rules)) +
         2 * StagedBytesOf(absl::MakeConstSpan(slot_rows));
}

VocabularyAnswer AnswerOf(const DeviceAnswer& answer) {
  return {.token = answer.token,
          .token_logit = answer.token_logit,
          .probability = answer.probability,
          .margin = answer.margin,
          .entropy = answer.entropy,
          .log_sum_exp = answer.log_sum_exp,
          .top_token = answer.top_token,
          .top_probability = answer.top_probability,
          .finite = answer.finite != 0};
}

}  // namespace cinnabar::cuda
