// The vocabulary head in double precision, written straight from kernels/backend.h: the yardstick
// of vocabulary_test.cc. Slow and plain; one row at a time, every logit in memory.
#ifndef CINNABAR_TESTS_UNIT_KERNELS_VOCABULARY_REFERENCE_H_
#define CINNABAR_TESTS_UNIT_KERNELS_VOCABULARY_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/base/philox.h"
#include "kernels/backend.h"

namespace cinnabar {

struct VocabularyReference {
  VocabularyAnswer answer;
  std::vector<float> logits;   // l of every id: guidance and rule biases included
  std::vector<double> scores;  // what the pick maximises; -inf where it may not pick
  std::vector<double>
      pick_weights;      // the distribution that a random pick draws from, not normalised
  int32_t num_kept = 0;  // ids of the kept set (counted ids when there is no filter)
};

inline double GumbelInDouble(const NoiseKey& key, int32_t id) {
  const uint32_t word = NoiseWord(key, NoiseStream::kToken, static_cast<uint32_t>(id));
  // 1 - u is exact in double, and log1p keeps what ln u would lose next to u = 1.
  const double one_minus_u = 1.0 - UniformFromWord(word);
  const double exponential =
      one_minus_u < 0.5 ? -std::log1p(-one_minus_u) : -std::log(UniformFromWord(word));
  return -std::log(exponential);
}

// `conditional` and `unconditional` (empty without guidance) are rows of Backend::Logits.
inline VocabularyReference AnswerInDouble(const VocabularyQuery& query,
                                          const std::vector<float>& conditional,
                                          const std::vector<float>& unconditional) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  VocabularyReference reference;
  const int32_t vocabulary = static_cast<int32_t>(conditional.size());
  std::vector<float>& l = reference.logits;
  l = conditional;
  if (query.unconditional_row >= 0) {
    for (int32_t id = 0; id < vocabulary; ++id) {
      l[id] = std::fma(query.guidance_scale + 1.0F, conditional[id] - unconditional[id],
                       unconditional[id]);
    }
  }
  std::vector<bool> counted(vocabulary, true);
  std::vector<bool> pickable(vocabulary, true);
  for (const VocabularyRule& rule : query.rules) {
    l[rule.id] += rule.bias;
    counted[rule.id] = rule.counted;
    pickable[rule.id] = rule.pickable;
  }
  if (query.pickable_ids > 0) {
    for (int32_t id = query.pickable_ids; id < vocabulary; ++id) pickable[id] = false;
  }
  VocabularyAnswer& answer = reference.answer;
  for (const float logit : l) {
    if (!(logit < std::numeric_limits<float>::infinity())) answer.finite = false;
  }
  if (!answer.finite) return reference;

  // Statistics of l / temperature, in descending order, ties by id.
  const double temperature = query.statistics_temperature;
  std::vector<int32_t> order;
  for (int32_t id = 0; id < vocabulary; ++id) {
    if (counted[id] && l[id] > -std::numeric_limits<float>::infinity()) order.push_back(id);
  }
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return l[a] != l[b] ? l[a] > l[b] : a < b; });
  const double largest = order.empty() ? 0.0 : l[order[0]];
  auto weight = [&](int32_t id) { return std::exp((l[id] - largest) / temperature); };
  double mass = 0.0;
  for (auto id = order.rbegin(); id != order.rend(); ++id) mass += weight(*id);
  answer.log_sum_exp = order.empty() ? -kInfinity : largest / temperature + std::log(mass);

  auto top_k = [&] {
    if (query.top_k <= 0 || query.top_k >= static_cast<int32_t>(order.size())) return;
    const float kth = l[order[query.top_k - 1]];
    while (l[order.back()] < kth) order.pop_back();
  };
  auto top_p = [&] {
    if (query.top_p >= 1.0F) return;
    double total = 0.0;
    for (auto id = order.rbegin(); id != order.rend(); ++id) total += weight(*id);
    double before = 0.0;
    for (size_t rank = 0; rank < order.size(); ++rank) {
      const bool stays = rank == 1 && query.top_p_rule == TopPRule::kCrossingTwoAtLeast;
      if (before > static_cast<double>(query.top_p) * total && !stays) {
        order.resize(rank);
        return;
      }
      before += weight(order[rank]);
      if (query.top_p_rule == TopPRule::kInside && rank > 0 &&
          before > static_cast<double>(query.top_p) * total) {
        order.resize(rank);
        return;
      }
    }
  };
  if (query.filter_order == FilterOrder::kTopPThenTopK) {
    top_p();
    top_k();
  } else {
    top_k();
    top_p();
  }
  const bool filtered = query.top_k > 0 || query.top_p < 1.0F;
  reference.num_kept = static_cast<int32_t>(order.size());
  double kept_mass = 0.0;
  double kept_slope = 0.0;  // sum of (l - largest) / temperature * weight
  for (auto id = order.rbegin(); id != order.rend(); ++id) {
    kept_mass += weight(*id);
    kept_slope += weight(*id) * (l[*id] - largest) / temperature;
  }
  if (!order.empty()) {
    // ln(1 + tail) - slope / mass; the tail is summed on its own, so that next to a one-hot
    // distribution the entropy keeps its digits.
    double tail = 0.0;
    for (size_t rank = order.size(); rank-- > 1;) tail += weight(order[rank]);
    answer.entropy = std::log1p(tail) - kept_slope / kept_mass;
    const double second = order.size() > 1 ? weight(order[1]) : 0.0;
    answer.margin = (1.0 - second) / kept_mass;
    if (order.size() > 1) {
      answer.margin = -std::expm1((l[order[1]] - largest) / temperature) / kept_mass;
    }
  }

  // The pick.
  reference.scores.assign(vocabulary, -kInfinity);
  reference.pick_weights.assign(vocabulary, 0.0);
  std::vector<bool> in_set = pickable;
  if (filtered) {
    in_set.assign(vocabulary, false);
    for (const int32_t id : order) in_set[id] = pickable[id];
  }
  if (query.pick == PickRule::kUniformTweedie) {
    const double n = vocabulary;
    const double q = std::exp(-static_cast<double>(query.sigma_step));
    double sum = 0.0;
    for (int32_t id = 0; id < vocabulary; ++id) {
      sum += id == query.own_token ? 1.0 : std::exp(static_cast<double>(l[id]));
    }
    for (int32_t id = 0; id < vocabulary; ++id) {
      const bool own = id == query.own_token;
      const double s = own ? 1.0 : std::exp(static_cast<double>(l[id]));
      const double transition = own ? 1.0 - (n - 1) * (1.0 - q) / n : (1.0 - q) / n;
      const double w = std::max(0.0, (q - 1.0) / (n * q) * sum + s / q) * transition;
      if (!pickable[id] || w <= 0.0) continue;
      reference.pick_weights[id] = w;
      reference.scores[id] = std::log(w) + GumbelInDouble(query.noise, id);
    }
  } else {
    double pick_largest = -kInfinity;
    for (int32_t id = 0; id < vocabulary; ++id) {
      if (in_set[id]) pick_largest = std::max<double>(pick_largest, l[id]);
    }
    for (int32_t id = 0; id < vocabulary; ++id) {
      if (!in_set[id] || l[id] == -std::numeric_limits<float>::infinity()) continue;
      if (query.pick_temperature > 0.0F) {
        reference.scores[id] =
            static_cast<double>(l[id]) / query.pick_temperature + GumbelInDouble(query.noise, id);
        reference.pick_weights[id] =
            std::exp((l[id] - pick_largest) / static_cast<double>(query.pick_temperature));
      } else {
        reference.scores[id] = l[id];
        reference.pick_weights[id] = l[id] == pick_largest ? 1.0 : 0.0;
      }
    }
  }
  for (int32_t id = 0; id < vocabulary; ++id) {
    if (reference.scores[id] == -kInfinity) continue;
    if (answer.token < 0 || reference.scores[id] > reference.scores[answer.token])
      answer.token = id;
  }
  for (int32_t id = 0; query.want_top && id < vocabulary; ++id) {
    if (!pickable[id] || l[id] == -std::numeric_limits<float>::infinity()) continue;
    if (answer.top_token < 0 || l[id] > l[answer.top_token]) answer.top_token = id;
  }
  if (answer.top_token >= 0 && !order.empty()) {
    answer.top_probability =
        std::min(1.0, std::exp((l[answer.top_token] - largest) / temperature) / kept_mass);
  }
  if (answer.token >= 0) {
    answer.token_logit = l[answer.token];
    answer.probability =
        order.empty()
            ? 0.0
            : std::min(1.0, std::exp((l[answer.token] - largest) / temperature) / kept_mass);
  }
  return reference;
}

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_UNIT_KERNELS_VOCABULARY_REFERENCE_H_
