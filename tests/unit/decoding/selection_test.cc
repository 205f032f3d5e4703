// Known cases of the selection rules: on plain numbers, and as the samplers apply them to answers.
#include "worker/decoding/selection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "tests/unit/decoding/decoding_harness.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::IsEmpty;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<int32_t> Order(const std::vector<double>& scores) {
  std::vector<int32_t> order = {7, 7, 7};  // what was there before does not matter
  OrderByScore(scores, order);
  return order;
}

std::vector<int32_t> Best(const std::vector<double>& scores, int32_t count) {
  std::vector<int32_t> chosen = {7, 7, 7};
  TakeBest(scores, count, chosen);
  return chosen;
}

TEST(OrderByScoreTest, BestFirstAndTiesToTheLowerIndex) {
  struct Case {
    std::vector<double> scores;
    std::vector<int32_t> order;
  };
  for (const Case& c : std::vector<Case>{{{}, {}},
                                         {{0.5}, {0}},
                                         {{0.1, 0.3, 0.2}, {1, 2, 0}},
                                         {{0.5, 0.5, 0.5, 0.5}, {0, 1, 2, 3}},
                                         {{0.2, 0.9, 0.2, 0.9}, {1, 3, 0, 2}},
                                         {{-kInfinity, 0.0, -kInfinity, 1.0}, {3, 1, 0, 2}},
                                         {{-kInfinity, -kInfinity}, {0, 1}},
                                         {{kInfinity, 1.0, kInfinity}, {0, 2, 1}},
                                         {{0.0, -0.0, 0.0}, {0, 1, 2}},  // minus zero is no smaller
                                         {{-1e-300, 0.0, 1e-300}, {2, 1, 0}},
                                         {{0.3, std::nextafter(0.3, 1.0)}, {1, 0}}}) {
    EXPECT_EQ(Order(c.scores), c.order) << testing::PrintToString(c.scores);
  }
  // More than the run that std::sort sorts by insertion, all equal.
  const std::vector<int32_t> order = Order(std::vector<double>(500, 0.25));
  for (int32_t i = 0; i < 500; ++i) ASSERT_EQ(order[i], i);
}

TEST(KeepFirstTest, KeepsAtMostWhatThereIsAscending) {
  struct Case {
    int32_t count;
    std::vector<int32_t> kept;
  };
  for (const Case& c : std::vector<Case>{{-3, {}},
                                         {0, {}},
                                         {1, {4}},
                                         {3, {0, 2, 4}},
                                         {5, {0, 1, 2, 3, 4}},
                                         {6, {0, 1, 2, 3, 4}},
                                         {std::numeric_limits<int32_t>::max(), {0, 1, 2, 3, 4}}}) {
    std::vector<int32_t> order = {4, 2, 0, 3, 1};
    KeepFirst(c.count, order);
    EXPECT_EQ(order, c.kept) << c.count;
  }
  std::vector<int32_t> none;
  KeepFirst(2, none);
  EXPECT_THAT(none, IsEmpty());
}

TEST(TakeBestTest, TakesTheBestAscending) {
  const std::vector<double> scores = {0.2, 0.9, 0.4, 0.9, 0.1, 0.4};
  EXPECT_THAT(Best(scores, 0), IsEmpty());
  EXPECT_THAT(Best(scores, -1), IsEmpty());
  EXPECT_THAT(Best(scores, 1), ElementsAre(1));
  EXPECT_THAT(Best(scores, 2), ElementsAre(1, 3));
  EXPECT_THAT(Best(scores, 3), ElementsAre(1, 2, 3));  // of the two 0.4 the lower one
  EXPECT_THAT(Best(scores, 4), ElementsAre(1, 2, 3, 5));
  EXPECT_THAT(Best(scores, 6), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Best(scores, 7), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Best({}, 3), IsEmpty());
  // What is -inf comes last, and is taken only when nothing else is left.
  EXPECT_THAT(Best({-kInfinity, 0.1, -kInfinity, 0.2}, 2), ElementsAre(1, 3));
  EXPECT_THAT(Best({-kInfinity, 0.1, -kInfinity, 0.2}, 3), ElementsAre(0, 1, 3));
}

TEST(FactorCountTest, FollowsThePublishedRule) {
  // Rank r = 2, 3, .. must reach 1 - f / (r + 1): with f = 1 that is 2/3, 3/4, 4/5, 5/6.
  struct Case {
    std::vector<double> sorted;
    double factor;
    int32_t count;
  };
  for (const Case& c : std::vector<Case>{
           {{}, 1.0, 0},
           {{0.01}, 1.0, 1},                // one position is always transferred
           {{0.9, 0.9, 0.9, 0.9}, 1.0, 4},  // nothing fails
           {{0.9, 0.6, 0.6, 0.6}, 1.0, 1},  // rank 2 fails
           {{0.9, 0.7, 0.7, 0.7}, 1.0, 2},  // rank 3 fails
           {{0.9, 0.8, 0.8, 0.7},
            1.0,
            4},  // rank 4, the last, fails alone: transferred all the same
           {{0.9, 0.8, 0.8, 0.7, 0.7}, 1.0, 3},  // but not when another follows
           {{0.2, 0.1}, 1.0, 2},                 // the same quirk with two
           {{0.01, 0.0, 0.0}, 1.0, 1},           // rank 1 has no bound
           {{0.9, 0.625, 0.1, 0.1},
            1.125,
            2},  // 1 - 1.125 / 3 = 0.625: reaching the bound is enough
           {{0.9, 0.6249, 0.1, 0.1}, 1.125, 1},
           {{0.2, 0.1, 0.1, 0.1}, 5.0, 4},  // no bound is above 0
           {{1.0, 1.0, 1.0, 0.99, 0.99}, 1e-9, 3},
       }) {
    EXPECT_EQ(FactorCount(c.sorted, Order(c.sorted), c.factor), c.count)
        << testing::PrintToString(c.sorted) << " factor " << c.factor;
  }
  // The numbers are read through the order.
  const std::vector<double> shuffled = {0.7, 0.9, 0.7, 0.7};
  EXPECT_EQ(FactorCount(shuffled, Order(shuffled), 1.0), 2);
}

TEST(EntropyBoundedCountTest, TheLongestPrefixWithinTheBoundAndOneMore) {
  struct Case {
    std::vector<double> rising;
    double bound;
    int32_t count;
  };
  for (const Case& c : std::vector<Case>{
           {{}, 1.0, 0},
           {{9.0}, 0.0, 1},  // at least one
           {{0.5, 0.5, 0.5}, 0.0, 1},
           {{0.5, 0.5, 0.5}, 0.499, 1},
           {{0.5, 0.5, 0.5}, 0.5, 2},  // a sum that reaches the bound is within
           {{0.5, 0.5, 0.5}, 0.999, 2},
           {{0.5, 0.5, 0.5}, 1.0, 3},
           {{0.0, 0.0, 0.3, 0.4}, 0.0, 3},  // what has no entropy, and the next
           {{0.0, 0.0, 0.0}, 0.0, 3},
           {{0.125, 0.25, 0.5, 1.0}, 0.375, 3},
           {{0.125, 0.25, 0.5, 1.0}, 0.374, 2},
           {{3.0, 3.0, 3.0}, kInfinity, 3},
       }) {
    std::vector<int32_t> order(c.rising.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    EXPECT_EQ(EntropyBoundedCount(c.rising, order, c.bound), c.count)
        << testing::PrintToString(c.rising) << " bound " << c.bound;
    // The definition: with S_k the sum of the first k and rising order, S_k minus the largest of
    // them, which is the k-th, is at most the bound.
    double sum = 0;
    int32_t longest = c.rising.empty() ? 0 : 1;
    for (size_t k = 0; k < c.rising.size(); ++k) {
      sum += c.rising[k];
      if (sum - c.rising[k] <= c.bound) longest = static_cast<int32_t>(k) + 1;
    }
    EXPECT_EQ(longest, c.count);
  }
  EXPECT_EQ(EntropyBoundedCount({0.9, 0.1, 0.5}, {1, 2, 0}, 0.1), 2);
}

// --- The same rules as the samplers apply them
// -------------------------------------------------------------

// What a sampler transfers in `step` of `num_steps`, when the prediction of each position of a
// fully masked canvas has these statistics. Tokens are 0, 1, 0, 1, ...
struct Statistics {
  std::vector<double> probability;
  std::vector<double> margin;
  std::vector<double> entropy;
};
std::vector<int32_t> Chosen(DecodingParams params, const Statistics& statistics, int32_t step = 0) {
  const int32_t length = static_cast<int32_t>(statistics.probability.size());
  Request request{.ids = std::vector<TokenId>(length + 1),
                  .given = std::vector<bool>(length + 1),
                  .params = params};
  request.given[0] = true;
  Sequence sequence = Begin(request, MaskModel(), nullptr);
  sequence.state.step = sequence.state.block_step = step;
  StepPlan plan;
  PlanStep(sequence, plan);
  std::vector<VocabularyAnswer> answers;
  for (const PositionQuery& query : plan.queries) {
    const int32_t i = query.position - 1;
    VocabularyAnswer& answer = answers.emplace_back();
    answer.token = i % 2;
    answer.probability = statistics.probability[i];
    answer.margin = statistics.margin.empty() ? 0 : statistics.margin[i];
    answer.entropy = statistics.entropy.empty() ? 0 : statistics.entropy[i];
  }
  std::vector<int32_t> chosen;
  const StepOutcome outcome = FinishStep(plan, answers, sequence);
  for (const Transfer& transfer : outcome.transfers) {
    chosen.push_back(transfer.position - 1);
    EXPECT_EQ(transfer.token, (transfer.position - 1) % 2);
    EXPECT_EQ(transfer.confidence,
              static_cast<float>(statistics.probability[transfer.position - 1]));
  }
  return chosen;
}

TEST(ThresholdRuleTest, TakesWhatReachesItAndAlwaysTheBest) {
  struct Case {
    std::vector<double> confidence;
    float threshold;
    std::vector<int32_t> chosen;
  };
  for (const Case& c : std::vector<Case>{
           {{0.3, 0.4, 0.2}, 0.75F, {1}},         // none reaches it: the best one
           {{0.4, 0.4, 0.4}, 0.75F, {0}},         // the best of equals is the lower position
           {{0.8, 0.75, 0.7499}, 0.75F, {0, 1}},  // reaching it is enough
           {{0.1, 0.9, 0.8, 0.2}, 0.75F, {1, 2}},
           {{0.1, 0.9, 0.8, 0.2}, 0.0F, {0, 1, 2, 3}},
           {{0.0, 0.0}, 0.0F, {0, 1}},
           {{0.5, 1.0, 0.99, 1.0}, 1.0F, {1, 3}},  // certain predictions reach a threshold of 1
           {{0.5}, 1.0F, {0}},
       }) {
    EXPECT_THAT(Chosen({.sampler = "threshold", .threshold = c.threshold}, {c.confidence}),
                ElementsAreArray(c.chosen))
        << testing::PrintToString(c.confidence) << " threshold " << c.threshold;
  }
}

TEST(FactorRuleTest, TakesTheBestOfTheCount) {
  EXPECT_THAT(Chosen({.sampler = "factor"}, {{0.7, 0.9, 0.7, 0.7}}), ElementsAre(0, 1));
  EXPECT_THAT(Chosen({.sampler = "factor"}, {{0.1, 0.2, 0.3}}), ElementsAre(2));
  EXPECT_THAT(Chosen({.sampler = "factor"}, {{0.1, 0.2}}), ElementsAre(0, 1));
  EXPECT_THAT(Chosen({.sampler = "factor", .factor = 9.0F}, {{0.1, 0.2, 0.3}}),
              ElementsAre(0, 1, 2));
}

TEST(EntropyBoundedRuleTest, LowestEntropyFirst) {
  const Statistics statistics = {.probability = {0.9, 0.1, 0.5, 0.6},
                                 .entropy = {0.5, 0.125, 0.25, 0.125}};
  const auto chosen = [&](float bound) {
    return Chosen({.sampler = "entropy_bounded", .entropy_bound = bound}, statistics);
  };
  EXPECT_THAT(chosen(0.0F), ElementsAre(1));  // of equals the lower position
  EXPECT_THAT(chosen(0.125F), ElementsAre(1, 3));
  EXPECT_THAT(chosen(0.25F), ElementsAre(1, 2, 3));
  EXPECT_THAT(chosen(0.49F), ElementsAre(1, 2, 3));
  EXPECT_THAT(chosen(0.5F), ElementsAre(0, 1, 2, 3));
}

TEST(LowConfidenceRuleTest, TakesTheEvenShare) {
  // Five positions in three steps: 2, 2, 1; whatever is left in the last.
  const Statistics statistics = {.probability = {0.2, 0.8, 0.8, 0.1, 0.8}};
  const DecodingParams params = {.sampler = "low_confidence", .num_steps = 3};
  EXPECT_THAT(Chosen(params, statistics, 0), ElementsAre(1, 2));
  EXPECT_THAT(Chosen(params, statistics, 1), ElementsAre(1, 2));
  EXPECT_THAT(Chosen(params, statistics, 2), ElementsAre(0, 1, 2, 3, 4));
  // More steps than positions.
  EXPECT_THAT(Chosen({.sampler = "low_confidence", .num_steps = 50}, statistics, 0),
              ElementsAre(1));
}

TEST(DreamRulesTest, EachRanksByItsOwnNumber) {
  // Six positions in two steps: the first transfers trunc(6 * 0.4995) = 2.
  const Statistics statistics = {.probability = {0.9, 0.5, 0.6, 0.9, 0.7, 0.8},
                                 .margin = {0.1, 0.4, 0.5, 0.2, 0.5, 0.3},
                                 .entropy = {1.0, 0.9, 0.2, 0.8, 0.7, 0.2}};
  const auto chosen = [&](const char* sampler, int32_t step) {
    return Chosen({.sampler = sampler, .num_steps = 2}, statistics, step);
  };
  EXPECT_THAT(chosen("maskgit_plus", 0), ElementsAre(0, 3));
  EXPECT_THAT(chosen("topk_margin", 0), ElementsAre(2, 4));
  EXPECT_THAT(chosen("entropy", 0), ElementsAre(2, 5));
  for (const char* sampler : {"maskgit_plus", "topk_margin", "entropy", "origin"}) {
    EXPECT_THAT(chosen(sampler, 1), ElementsAre(0, 1, 2, 3, 4, 5)) << sampler;
  }
}

TEST(BlockRulesTest, StaticTakesTheQuotaAndDynamicAllAboveTheThreshold) {
  const Statistics statistics = {.probability = {0.5, 0.75, 0.9, 0.8}};
  const auto chosen = [&](const char* sampler, float threshold, int32_t num_steps, int32_t step) {
    DecodingParams params = {.sampler = sampler, .num_steps = num_steps};
    if (params.sampler == "block_dynamic") params.threshold = threshold;
    return Chosen(params, statistics, step);
  };
  EXPECT_THAT(chosen("block_static", 0, 4, 0), ElementsAre(2));
  EXPECT_THAT(chosen("block_static", 0, 2, 0), ElementsAre(2, 3));
  EXPECT_THAT(chosen("block_static", 0, 3, 1), ElementsAre(2));  // 2, 1, 1
  EXPECT_THAT(chosen("block_static", 0, 3, 2), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(chosen("block_dynamic", 0.95F, 4, 0), ElementsAre(2));     // none above: the quota
  EXPECT_THAT(chosen("block_dynamic", 0.85F, 2, 0), ElementsAre(2, 3));  // fewer than the quota
  EXPECT_THAT(chosen("block_dynamic", 0.75F, 4, 0), ElementsAre(2, 3));  // 0.75 is not above 0.75
  EXPECT_THAT(chosen("block_dynamic", 0.6F, 4, 0), ElementsAre(1, 2, 3));
}

TEST(BlockRulesTest, SequentialTakesAWindowFromTheFirstMask) {
  // Positions 0 and 3 are given; a share of two spans positions 1 and 2, then 4 and 5, then 6.
  Request request{.ids = std::vector<TokenId>(7, 1),
                  .given = {true, false, false, true, false, false, false},
                  .params = {.sampler = "block_sequential", .num_steps = 3}};
  Sequence sequence = Begin(request, MaskModel(), HashNetwork(MaskModel(), 2.0, 1));
  const std::unique_ptr<Head> head = ReferenceHead();
  std::vector<std::vector<int32_t>> trace;
  for (const StepRecord& record : RunToEnd(sequence, *head)) {
    trace.emplace_back();
    for (const Transfer& t : record.outcome.transfers) trace.back().push_back(t.position);
  }
  EXPECT_THAT(trace, ElementsAre(ElementsAre(1, 2), ElementsAre(4, 5), ElementsAre(6)));
  // A given position inside the window counts against the share.
  request.given = {true, false, true, false, true, false, false};
  sequence = Begin(request, MaskModel(), HashNetwork(MaskModel(), 2.0, 1));
  trace.clear();
  for (const StepRecord& record : RunToEnd(sequence, *head)) {
    trace.emplace_back();
    for (const Transfer& t : record.outcome.transfers) trace.back().push_back(t.position);
  }
  EXPECT_THAT(trace, ElementsAre(ElementsAre(1), ElementsAre(3), ElementsAre(5, 6)));
}

TEST(EosSwitchesTest, UncountedEndsOfTextAreTransferredLast) {
  // The answers name the tokens; EOS is 4 and 11, EoT is 9.
  const auto order = [](const char* sampler, float temperature,
                        const std::vector<TokenId>& tokens) {
    Request request{
        .ids = std::vector<TokenId>(tokens.size() + 1),
        .given = std::vector<bool>(tokens.size() + 1),
        .params = {.sampler = sampler, .temperature = temperature, .confidence_eos_eot_inf = true}};
    request.given[0] = true;
    if (request.params.sampler == "threshold") request.params.threshold = 1.0F;
    Sequence sequence = Begin(request, MaskModel(), nullptr);
    std::vector<TokenId> transferred;
    StepPlan plan;
    while (!sequence.state.finished) {
      PlanStep(sequence, plan);
      std::vector<VocabularyAnswer> answers;
      for (const PositionQuery& query : plan.queries) {
        VocabularyAnswer& answer = answers.emplace_back();
        answer.token = tokens[query.position - 1];
        // Later positions are more probable.
        answer.probability = 0.5 + 0.01 * query.position;
      }
      for (const Transfer& t : FinishStep(plan, answers, sequence).transfers) {
        transferred.push_back(t.token);
      }
    }
    return transferred;
  };
  for (const char* sampler : {"low_confidence", "threshold"}) {
    SCOPED_TRACE(sampler);
    // At temperature 0 both count as 0, and then the lower position goes first.
    EXPECT_THAT(order(sampler, 0.0F, {1, 2, 9, 3, 4}), ElementsAre(3, 2, 1, 9, 4));
    EXPECT_THAT(order(sampler, 0.0F, {11, 2, 9, 3, 4}), ElementsAre(3, 2, 11, 9, 4));
    // With a temperature only EoT does: the published code takes EOS out of a copy.
    EXPECT_THAT(order(sampler, 0.5F, {1, 2, 9, 3, 4}), ElementsAre(4, 3, 2, 1, 9));
  }
}

TEST(EosSwitchesTest, TheRulesSayWhatIsCountedAndPickable) {
  struct Case {
    bool logits_eos_inf;
    bool confidence_eos_eot_inf;
    float temperature;
    std::vector<TokenId> forbidden;
    // id, counted, pickable
    std::vector<std::tuple<TokenId, bool, bool>> rules;
  };
  for (const Case& c : std::vector<Case>{
           {false, false, 0.0F, {}, {}},
           {true, false, 0.0F, {}, {{4, false, false}, {11, false, false}}},
           {false, true, 0.0F, {}, {{4, false, true}, {9, false, true}, {11, false, true}}},
           {false, true, 0.7F, {}, {{9, false, true}}},
           {true, true, 0.7F, {}, {{4, false, false}, {9, false, true}, {11, false, false}}},
           // A rule of the sampler would replace the common one of a forbidden id.
           {true, true, 0.0F, {4, 9}, {{11, false, false}}},
       }) {
    for (const char* sampler : {"low_confidence", "random", "threshold", "factor"}) {
      Request request{.ids = {1, 0, 0}, .given = {true, false, false}};
      request.params = {.sampler = sampler,
                        .temperature = c.temperature,
                        .logits_eos_inf = c.logits_eos_inf,
                        .confidence_eos_eot_inf = c.confidence_eos_eot_inf,
                        .eos_penalty = 2.0F,
                        .forbidden_ids = c.forbidden};
      const Sequence sequence = Begin(request, MaskModel(), nullptr);
      StepPlan plan;
      PlanStep(sequence, plan);
      ASSERT_FALSE(plan.queries.empty());
      for (const PositionQuery& query : plan.queries) {
        std::vector<std::tuple<TokenId, bool, bool>> rules;
        for (const VocabularyRule& rule : query.rules) {
          rules.emplace_back(rule.id, rule.counted, rule.pickable);
          EXPECT_EQ(rule.bias, rule.id == 9 ? 0.0F : -2.0F) << "it repeats the penalty";
        }
        EXPECT_THAT(rules, testing::UnorderedElementsAreArray(c.rules)) << sampler;
      }
    }
  }
}

// A model may name its EoT among the ids that end a text, too: it gets one rule, EoT's.
TEST(EosSwitchesTest, EotMayBeAnEosAsWell) {
  ModelTraits model = MaskModel();
  model.eos_tokens = {4, 9, 4};
  const auto uncounted = [&](float temperature) {
    const Sequence sequence = Begin({.ids = {1, 0},
                                     .given = {true, false},
                                     .params = {.sampler = "low_confidence",
                                                .temperature = temperature,
                                                .confidence_eos_eot_inf = true}},
                                    model, nullptr);
    StepPlan plan;
    PlanStep(sequence, plan);
    std::vector<TokenId> ids;
    for (const VocabularyRule& rule : plan.queries[0].rules) {
      EXPECT_TRUE(!rule.counted && rule.pickable);
      ids.push_back(rule.id);
    }
    return ids;
  };
  EXPECT_THAT(uncounted(0.0F), ElementsAre(4, 9));
  EXPECT_THAT(uncounted(0.5F), ElementsAre(9));
}

}  // namespace
}  // namespace cinnabar
