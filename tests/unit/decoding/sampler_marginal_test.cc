// Random steps against exact distributions: thousands of draws with fixed seeds, counted, and
// compared by chi-square. The tables are those of tests/golden/probabilities, or computed here from
// the formula.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/json.h"
#include "tests/unit/decoding/chi_square.h"
#include "tests/unit/decoding/decoding_harness.h"
#include "worker/decoding/schedule.h"
#include "worker/engine/engine.h"

namespace cinnabar {
namespace {

using Rows = std::vector<std::vector<float>>;
using Table = std::vector<std::vector<double>>;

std::string GoldenPath(const std::string& name) {
  const char* source_dir = std::getenv("CINNABAR_SOURCE_DIR");
  return absl::StrCat(source_dir == nullptr ? "." : source_dir, "/tests/golden/", name);
}

nlohmann::json ReadTable(const std::string& name) {
  absl::StatusOr<nlohmann::json> table =
      ReadJsonFile(GoldenPath(absl::StrCat("probabilities/", name, ".json")), size_t{1} << 22);
  CINNABAR_CHECK(table.ok()) << table.status().ToString();
  return *std::move(table);
}

// --- Drawing
// -----------------------------------------------------------------------------------------------

// `num_draws` times the step that follows `start`, with the seeds first_seed, first_seed + 1, ..
// and the network giving rows[position].
std::vector<StepOutcome> DrawSteps(const Sequence& start, const Rows& rows, int num_draws,
                                   uint64_t first_seed, Head& head) {
  constexpr int kBatch = 500;
  std::vector<StepOutcome> outcomes;
  for (int begin = 0; begin < num_draws; begin += kBatch) {
    const int end = std::min(begin + kBatch, num_draws);
    std::vector<Sequence> sequences;
    std::vector<StepPlan> plans(end - begin);
    std::vector<StepQueries> steps;
    std::vector<VocabularyQuery> queries;
    for (int draw = begin; draw < end; ++draw) {
      sequences.push_back(start);
      sequences.back().params.seed = first_seed + static_cast<uint64_t>(draw);
      PlanStep(sequences.back(), plans[draw - begin]);
      steps.push_back(QueriesOf(sequences.back(), plans[draw - begin], /*rows_of_network=*/false));
      queries.insert(queries.end(), steps.back().queries.begin(), steps.back().queries.end());
    }
    const std::vector<VocabularyAnswer> answers = head.Answer(rows, queries);
    size_t next = 0;
    for (int draw = begin; draw < end; ++draw) {
      const StepPlan& plan = plans[draw - begin];
      outcomes.push_back(FinishStep(plan,
                                    absl::MakeConstSpan(answers).subspan(next, plan.queries.size()),
                                    sequences[draw - begin]));
      next += plan.queries.size();
    }
  }
  return outcomes;
}

// How often each token stands at each position after the step.
std::vector<std::vector<int64_t>> CountTokens(const Sequence& start,
                                              const std::vector<StepOutcome>& outcomes) {
  std::vector<std::vector<int64_t>> counts(start.canvas.length(),
                                           std::vector<int64_t>(start.model.vocab_size));
  for (const StepOutcome& outcome : outcomes) {
    std::vector<TokenId> tokens = start.canvas.tokens;
    for (const Transfer& transfer : outcome.transfers) {
      const bool masked_again = transfer.token == kMaskedAgain;
      tokens[transfer.position] = masked_again ? start.model.mask_token : transfer.token;
    }
    for (size_t i = 0; i < tokens.size(); ++i) ++counts[i][tokens[i]];
  }
  return counts;
}

void SetStep(int32_t step, Sequence& sequence) {
  sequence.state.step = sequence.state.block_step = step;
}

class MarginalTest : public testing::Test {
 protected:
  std::unique_ptr<Head> head_ = CpuHead();
};

// --- The test itself
// ---------------------------------------------------------------------------------------

TEST(ChiSquareTest, TailsAreThoseOfTheTables) {
  EXPECT_NEAR(ChiSquareTail(3.841458820694124, 1), 0.05, 1e-9);
  EXPECT_NEAR(ChiSquareTail(18.307038053275146, 10), 0.05, 1e-9);
  EXPECT_NEAR(ChiSquareTail(124.34211340400408, 100), 0.05, 1e-9);
  EXPECT_NEAR(ChiSquareTail(0.01, 5), 1 - 5.3e-7, 1e-7);
  EXPECT_NEAR(ChiSquareTail(2 * std::log(1e6), 2), 1e-6, 1e-15);  // with two degrees exp(-x / 2)
  EXPECT_EQ(ChiSquareTail(0, 3), 1);
}

TEST(ChiSquareTest, FindsWhatIsWrong) {
  const std::vector<double> p = {0.5, 0.3, 0.2, 0.0};
  EXPECT_GT(GoodnessOfFit({5030, 2980, 1990, 0}, p), 0.5);
  EXPECT_LT(GoodnessOfFit({5300, 2800, 1900, 0}, p), kAlpha);  // three hundredths off
  EXPECT_EQ(GoodnessOfFit({5030, 2980, 1990, 1}, p), 0);       // the impossible
  EXPECT_EQ(GoodnessOfFit({9939, 61}, {0.9999, 0.0001}), 0);   // 61 where 1 is expected
}

// --- One token
// ---------------------------------------------------------------------------------------------

// The draw of a token, filtered or not, by every sampler that can ask for it; and the confidence
// that it reports: of the tempered, filtered distribution (Dream, SDAR, entropy bound) or of the
// clean one.
TEST_F(MarginalTest, TokensFollowTheFilteredSoftmax) {
  const nlohmann::json table = ReadTable("categorical");
  const Rows rows = table["logits"].get<Rows>();
  ModelTraits model = MaskModel();
  model.vocab_size = model.tokenizer_size = static_cast<int32_t>(rows[0].size());
  model.mask_token = table["mask_token"];
  const Table clean = table["draws"][0]["confidence"];
  ASSERT_EQ(table["draws"][0]["temperature"], 1.0);
  ASSERT_FALSE(table["draws"][0].contains("top_p") || table["draws"][0].contains("top_k"));
  const std::vector<std::string> dream = {"origin", "maskgit_plus", "topk_margin", "entropy",
                                          "p2_open"};
  const std::vector<std::string> sdar = {
      "block_static",    "block_dynamic", "block_sequential",
      "joint_threshold", "rnd1",          "rnd1_entropy_bounded"};
  const std::vector<std::string> tempered_alone = {"entropy_bounded", "p2", "p2_random"};
  int num_compared = 0;
  for (const nlohmann::json& draw : table["draws"]) {
    const bool top_p = draw.contains("top_p");
    const bool top_k = draw.contains("top_k");
    std::vector<std::string> samplers;
    // With one filter alone their order is none.
    if (!(top_p && top_k) || draw["filter_order"] == "top_p_then_top_k") samplers = dream;
    if (!(top_p && top_k) || draw["filter_order"] == "top_k_then_top_p") {
      samplers.insert(samplers.end(), sdar.begin(), sdar.end());
    }
    const size_t num_filtering = samplers.size();
    if (!top_p && !top_k) {
      samplers.insert(samplers.end(), tempered_alone.begin(), tempered_alone.end());
      samplers.insert(samplers.end(), {"low_confidence", "random", "threshold", "factor",
                                       "hierarchical", "hierarchical_remask"});
    }
    for (size_t index = 0; index < samplers.size(); ++index) {
      const std::string& sampler = samplers[index];
      SCOPED_TRACE(absl::StrCat(sampler, " ", draw["temperature"].dump(), top_p ? " top_p" : "",
                                top_k ? " top_k" : ""));
      DecodingParams params = {.sampler = sampler,
                               .temperature = draw["temperature"],
                               .top_p = draw.value("top_p", 1.0F),
                               .top_k = draw.value("top_k", 0)};
      // Everything in one step.
      if (Reads(EntryOf(sampler), Knob::kNumSteps)) params.num_steps = 1;
      if (Reads(EntryOf(sampler), Knob::kThreshold)) params.threshold = 0;
      if (sampler == "factor") params.factor = 100;
      if (Reads(EntryOf(sampler), Knob::kEntropyBound)) params.entropy_bound = 100;
      const Sequence start = Begin(
          {.ids = {0, 0, 0}, .given = {false, false, false}, .params = params}, model, nullptr);
      const std::vector<StepOutcome> outcomes = DrawSteps(start, rows, 6000, 1000 * index, *head_);
      const auto counts = CountTokens(start, outcomes);
      const Table probabilities = draw["probabilities"];
      const Table tempered = draw["confidence"];
      const Table& confidence =
          index < num_filtering + (top_p || top_k ? 0 : tempered_alone.size()) ? tempered : clean;
      for (size_t row = 0; row < rows.size(); ++row) {
        SCOPED_TRACE(row);
        ExpectFollows(counts[row], probabilities[row]);
        ++num_compared;
      }
      for (const StepOutcome& outcome : outcomes) {
        for (const Transfer& transfer : outcome.transfers) {
          const double want = confidence[transfer.position][transfer.token];
          ASSERT_NEAR(transfer.confidence, want, 2e-5 * want);
        }
      }
    }
  }
  EXPECT_GT(num_compared, 100);
}

// Different positions, and different steps of one position, draw independently.
TEST_F(MarginalTest, PositionsAndStepsDrawIndependently) {
  std::vector<float> row(MaskModel().vocab_size, -1e4F);
  for (const TokenId id : {1, 2, 3, 5}) row[id] = 0.0F;
  const std::map<TokenId, int> cell = {{1, 0}, {2, 1}, {3, 2}, {5, 3}};
  const Rows rows(4, row);
  Sequence start = Begin({.ids = {0, 0, 0, 0},
                          .given = {false, false, false, false},
                          .params = {.sampler = "random", .num_steps = 1, .temperature = 1.0F}},
                         MaskModel(), nullptr);
  const auto draw = [&](int32_t step) {
    SetStep(step, start);
    return DrawSteps(start, rows, 8000, 77, *head_);
  };
  const std::vector<StepOutcome> first = draw(0);
  const std::vector<StepOutcome> second = draw(1);
  // Every pair of (step, position), the mirrored ones too.
  std::vector<std::pair<const std::vector<StepOutcome>*, size_t>> sources;
  for (size_t position = 0; position < 4; ++position) {
    sources.emplace_back(&first, position);
    sources.emplace_back(&second, position);
  }
  for (size_t a = 0; a < sources.size(); ++a) {
    for (size_t b = a + 1; b < sources.size(); ++b) {
      std::vector<int64_t> counts(16);
      for (size_t i = 0; i < first.size(); ++i) {
        const TokenId x = (*sources[a].first)[i].transfers[sources[a].second].token;
        const TokenId y = (*sources[b].first)[i].transfers[sources[b].second].token;
        ++counts[4 * cell.at(x) + cell.at(y)];
      }
      ExpectFollows(counts, std::vector<double>(16, 1.0 / 16));
    }
  }
}

// --- Which positions
// ---------------------------------------------------------------------------------------

double Binomial(int n, int k, double p) {
  return std::exp(std::lgamma(n + 1) - std::lgamma(k + 1) - std::lgamma(n - k + 1)) *
         std::pow(p, k) * std::pow(1 - p, n - k);
}

// Dream's origin: each masked position by a coin of its own.
TEST_F(MarginalTest, OriginFollowsItsSchedule) {
  constexpr int kLength = 7;
  const Rows rows(kLength, std::vector<float>(MaskModel().vocab_size, 0.0F));
  const nlohmann::json table = ReadTable("origin_schedule");
  ASSERT_FALSE(table["schedules"].empty());
  for (const nlohmann::json& schedule : table["schedules"]) {
    const int32_t num_steps = schedule["steps"];
    const std::vector<double> chances = schedule["probabilities"];
    Request request = {.ids = std::vector<TokenId>(kLength, 1),
                       .given = std::vector<bool>(kLength, false),
                       .params = {.sampler = "origin",
                                  .num_steps = num_steps,
                                  .temperature = 1.0F,
                                  .eps = schedule["eps"]}};
    request.given[2] = true;
    Sequence start = Begin(request, MaskModel(), nullptr);
    for (int32_t step = 0; step < num_steps; ++step) {
      SCOPED_TRACE(absl::StrCat("step ", step, " of ", num_steps));
      SetStep(step, start);
      std::vector<int64_t> transferred(kLength);
      std::vector<int64_t> sizes(kLength);
      const std::vector<StepOutcome> outcomes = DrawSteps(start, rows, 10000, 5000, *head_);
      for (const StepOutcome& outcome : outcomes) {
        ++sizes[outcome.transfers.size()];
        for (const Transfer& transfer : outcome.transfers) ++transferred[transfer.position];
      }
      for (int position = 0; position < kLength; ++position) {
        if (position == 2) continue;
        ExpectFollows({transferred[position], 10000 - transferred[position]},
                      {chances[step], 1 - chances[step]});
      }
      // Independent coins: as many at a time as a binomial variate.
      std::vector<double> binomial;
      for (int k = 0; k < kLength; ++k) binomial.push_back(Binomial(kLength - 1, k, chances[step]));
      ExpectFollows(sizes, binomial);
    }
  }
}

// Chance of every set of `count` indices, drawn without replacement in proportion to exp(scores);
// keyed by the bits of its members.
std::map<uint32_t, double> SetsWithoutReplacement(const std::vector<double>& scores, int count) {
  std::map<uint32_t, double> sets = {{0, 1.0}};
  for (int i = 0; i < count; ++i) {
    std::map<uint32_t, double> larger;
    for (const auto& [set, chance] : sets) {
      double mass = 0;
      for (size_t j = 0; j < scores.size(); ++j) {
        if ((set >> j & 1) == 0) mass += std::exp(scores[j]);
      }
      for (size_t j = 0; j < scores.size(); ++j) {
        if ((set >> j & 1) == 0) larger[set | 1U << j] += chance * std::exp(scores[j]) / mass;
      }
    }
    sets = std::move(larger);
  }
  return sets;
}

std::vector<double> Inclusion(const std::map<uint32_t, double>& sets, size_t size) {
  std::vector<double> inclusion(size);
  for (const auto& [set, chance] : sets) {
    for (size_t j = 0; j < size; ++j) inclusion[j] += (set >> j & 1) != 0 ? chance : 0;
  }
  return inclusion;
}

// The sets that a sampler transfers when its confidence is `confidence`, counted over seeds.
std::map<uint32_t, int64_t> CountSets(Sequence start, const std::vector<double>& confidence,
                                      int num_draws, uint64_t first_seed) {
  std::map<uint32_t, int64_t> counts;
  const Canvas canvas = start.canvas;
  const DecodingState state = start.state;
  StepPlan plan;
  for (int draw = 0; draw < num_draws; ++draw) {
    start.canvas = canvas;
    start.state = state;
    start.params.seed = first_seed + static_cast<uint64_t>(draw);
    PlanStep(start, plan);
    std::vector<VocabularyAnswer> answers;
    for (const PositionQuery& query : plan.queries) {
      VocabularyAnswer& answer = answers.emplace_back();
      answer.token = 1;
      answer.probability = answer.margin = confidence[query.position];
      answer.entropy = 1 - confidence[query.position];  // a constant more or less is no matter
    }
    uint32_t set = 0;
    for (const Transfer& transfer : FinishStep(plan, answers, start).transfers) {
      set |= 1U << transfer.position;
    }
    ++counts[set];
  }
  return counts;
}

void ExpectSetsFollow(const std::map<uint32_t, int64_t>& counts,
                      const std::map<uint32_t, double>& sets) {
  std::vector<int64_t> in_order;
  std::vector<double> probabilities;
  int64_t counted = 0;
  for (const auto& [set, chance] : sets) {
    const auto found = counts.find(set);
    in_order.push_back(found == counts.end() ? 0 : found->second);
    probabilities.push_back(chance);
    counted += in_order.back();
  }
  int64_t all = 0;
  for (const auto& [set, count] : counts) all += count;
  EXPECT_EQ(counted, all) << "sets of another size";
  ExpectFollows(in_order, probabilities);
}

// Dream with alg_temp: positions without replacement from softmax(confidence / alg_temp).
TEST_F(MarginalTest, AlgTempDrawsPositionsWithoutReplacement) {
  const nlohmann::json table = ReadTable("alg_temp");
  const std::vector<double> confidence = table["confidence"];
  const auto scores = [&](double alg_temp) {
    std::vector<double> scores;
    for (const double c : confidence) scores.push_back(c / alg_temp);
    return scores;
  };
  for (const nlohmann::json& draw : table["draws"]) {
    const std::vector<double> inclusion = Inclusion(
        SetsWithoutReplacement(scores(draw["alg_temp"]), draw["count"]), confidence.size());
    const std::vector<double> want = draw["inclusion"];
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(inclusion[i], want[i], 1e-12);
  }
  // Of six positions the schedule transfers one in the first of five steps, two in the first of
  // two.
  for (const char* sampler : {"maskgit_plus", "topk_margin", "entropy"}) {
    for (const auto& [num_steps, count] : {std::pair{5, 1}, std::pair{2, 2}}) {
      for (const float alg_temp : {0.1F, 0.4F, 1.0F}) {
        SCOPED_TRACE(absl::StrCat(sampler, " alg_temp ", alg_temp, " count ", count));
        const Sequence start =
            Begin({.ids = std::vector<TokenId>(6, 1),
                   .given = std::vector<bool>(6, false),
                   .params = {.sampler = sampler, .num_steps = num_steps, .alg_temp = alg_temp}},
                  MaskModel(), nullptr);
        ASSERT_EQ(DreamTransferCount(6, num_steps, 0, start.params.eps), count);
        ExpectSetsFollow(CountSets(start, confidence, 10000, 300),
                         SetsWithoutReplacement(scores(alg_temp), count));
      }
    }
  }
  // More of them: five of twelve.
  std::vector<double> twelve;
  for (int i = 0; i < 12; ++i) twelve.push_back(0.9 - 0.07 * i);
  const Sequence start =
      Begin({.ids = std::vector<TokenId>(12, 1),
             .given = std::vector<bool>(12, false),
             .params = {.sampler = "maskgit_plus", .num_steps = 2, .alg_temp = 0.3F}},
            MaskModel(), nullptr);
  std::vector<double> tempered;
  for (const double c : twelve) tempered.push_back(c / 0.3F);
  ExpectSetsFollow(CountSets(start, twelve, 20000, 1), SetsWithoutReplacement(tempered, 5));
}

// LLaDA's random remasking: every set of the share is as likely as any other, whatever the
// confidence.
TEST_F(MarginalTest, RandomRemaskingIsUniformOverSets) {
  const Sequence start = Begin({.ids = std::vector<TokenId>(6, 1),
                                .given = {false, false, true, false, false, false},
                                .params = {.sampler = "random", .num_steps = 2}},
                               MaskModel(), nullptr);
  const std::vector<double> confidence = {0.9, 0.1, 0, 0.5, 0.2, 0.7};
  std::map<uint32_t, double> sets;
  for (uint32_t set = 0; set < 64; ++set) {
    if (__builtin_popcount(set) == 3 && (set >> 2 & 1) == 0) sets[set] = 0.1;
  }
  ASSERT_EQ(sets.size(), 10U);
  ExpectSetsFollow(CountSets(start, confidence, 10000, 1), sets);
}

// Path planning in random order: the score of a masked position is the logarithm of a uniform
// number, that of a committed one eta times that, and the largest stay unmasked. So they are drawn
// without replacement, in proportion to 1 and 1 / eta.
TEST_F(MarginalTest, RandomPathPlanningKeepsByEta) {
  constexpr uint32_t kCommittedSet = 0b010110;
  for (const float eta : {0.0F, 0.25F, 1.0F, 3.0F}) {
    SCOPED_TRACE(eta);
    Sequence start = Begin({.ids = std::vector<TokenId>(6, 1),
                            .given = std::vector<bool>(6, false),
                            .params = {.sampler = "p2_random", .num_steps = 6, .eta = eta}},
                           MaskModel(), nullptr);
    std::vector<double> scores(6);
    for (int i = 0; i < 6; ++i) {
      if ((kCommittedSet >> i & 1) == 0) continue;
      start.canvas.tokens[i] = 3;
      start.canvas.states[i] = PositionState::kCommitted;
      scores[i] = eta > 0 ? -std::log(eta) : 60;
    }
    SetStep(3, start);  // of six, after which two of six are masked
    std::map<uint32_t, double> changed;
    for (const auto& [kept, chance] : SetsWithoutReplacement(scores, 4)) {
      if (chance > 1e-12) changed[kept ^ kCommittedSet] = chance;
    }
    ASSERT_EQ(changed.size(), eta == 0 ? 3U : 15U);
    ExpectSetsFollow(CountSets(start, std::vector<double>(6, 0.5), 12000, 1), changed);
  }
}

// DiffusionGemma: what is kept was drawn at the step's temperature, everything else is noise, every
// id as likely as any other that may be picked.
TEST_F(MarginalTest, RenoisingDrawsTokensOrEvenNoise) {
  ModelTraits model = NoiseModel();
  model.vocab_size = 19;
  model.tokenizer_size = 17;
  const Rows rows = ReadTable("categorical")["logits"].get<Rows>();
  for (const float bound : {0.0F, 100.0F}) {
    Sequence start = Begin({.ids = {1, 0, 0, 0},
                            .given = {true, false, false, false},
                            .params = {.sampler = "gemma_renoise",
                                       .num_steps = 8,
                                       .entropy_bound = bound,
                                       .confident_entropy = 0.0F,
                                       .forbidden_ids = {3},
                                       .pickable_ids = 17}},
                           model, nullptr);
    SetStep(2, start);
    const double temperature = 0.4 + 0.4 * 6 / 8;
    Table softmax(4);
    std::vector<double> entropies;
    for (size_t i = 1; i < 4; ++i) {
      double mass = 0;
      double counted = 0;
      for (TokenId id = 0; id < 19; ++id) {
        const double weight = id == 3 ? 0 : std::exp(rows[i - 1][id] / temperature);
        softmax[i].push_back(id < 17 ? weight : 0);
        mass += softmax[i].back();
        counted += weight;
      }
      double entropy = 0;
      for (TokenId id = 0; id < 19; ++id) {
        const double p = id == 3 ? 0 : std::exp(rows[i - 1][id] / temperature) / counted;
        entropy -= p > 0 ? p * std::log(p) : 0;
      }
      entropies.push_back(entropy);
      for (double& p : softmax[i]) p /= mass;
    }
    const size_t lowest =
        1 + (std::min_element(entropies.begin(), entropies.end()) - entropies.begin());
    std::vector<double> noise(19, 1.0 / 16);
    noise[3] = noise[17] = noise[18] = 0;
    const Rows shifted = {rows[0], rows[0], rows[1], rows[2]};  // by position
    const auto counts = CountTokens(start, DrawSteps(start, shifted, 12000, 3000, *head_));
    for (size_t i = 1; i < 4; ++i) {
      SCOPED_TRACE(absl::StrCat("bound ", bound, " position ", i));
      ExpectFollows(counts[i], bound > 0 || i == lowest ? softmax[i] : noise);
    }
  }
}

// Insertion and deletion are drawn as tokens are; what a step may not take is left out of the draw.
TEST_F(MarginalTest, EditsFollowTheTemperedSoftmax) {
  const ModelTraits model = MaskModel();
  const TokenId mask = model.mask_token;
  Rows rows;
  for (int i = 0; i < 3; ++i) {
    std::vector<float>& row = rows.emplace_back(23);
    for (int id = 0; id < 23; ++id) row[id] = static_cast<float>((7 * id + 5 * i) % 11) / 4;
    row[mask] = row[model.delete_token] = row[model.split_token] = 2.5F;
  }
  const auto table = [&](size_t position, float temperature, std::vector<TokenId> without) {
    std::vector<double> p;
    double mass = 0;
    for (TokenId id = 0; id < 23; ++id) {
      const bool out = std::count(without.begin(), without.end(), id) > 0;
      mass += p.emplace_back(out ? 0 : std::exp(rows[position][id] / temperature));
    }
    for (double& x : p) x /= mass;
    return p;
  };
  const auto expect = [&](const Sequence& start, float temperature,
                          const std::vector<std::vector<TokenId>>& without) {
    std::vector<std::vector<int64_t>> counts(3, std::vector<int64_t>(23));
    for (const StepOutcome& outcome : DrawSteps(start, rows, 12000, 100, *head_)) {
      ASSERT_EQ(outcome.edits.size(), 3U);
      for (const TokenEdit& edit : outcome.edits) ++counts[edit.position][edit.token];
    }
    for (size_t i = 0; i < 3; ++i) {
      SCOPED_TRACE(absl::StrCat("temperature ", temperature, " position ", i));
      ExpectFollows(counts[i], table(i, temperature, without[i]));
    }
  };
  for (const float temperature : {0.6F, 1.5F}) {
    Sequence start = Begin({.ids = {0, 0, 0},
                            .given = {false, false, false},
                            .params = {.sampler = "joint_threshold_indel",
                                       .temperature = temperature,
                                       .threshold = 0.0F,
                                       .edit_steps = 2}},
                           model, nullptr);
    expect(start, temperature, {{mask}, {mask}, {mask}});
    start.state.memory.original = {1, 0, 0};  // the others were put in: the mask may be drawn
    expect(start, temperature, {{mask}, {}, {}});
    start.state.memory.original = {0, 0, 0};
    start.state.block_edits = 1;  // the last step
    const std::vector<TokenId> no_moves = {mask, model.delete_token, model.split_token};
    expect(start, temperature, {no_moves, no_moves, no_moves});
  }
}

// --- MDLM and SEDD
// -----------------------------------------------------------------------------------------

// Puts `ids` where the sequence holds noise.
void SetNoise(const std::vector<TokenId>& ids, Canvas& canvas) {
  for (int32_t i = 0; i < canvas.length(); ++i) {
    if (canvas.states[i] == PositionState::kNoise) canvas.tokens[i] = ids[i];
  }
}

TEST_F(MarginalTest, MdlmFollowsThePosterior) {
  const nlohmann::json table = ReadTable("mdlm_rows");
  const Rows rows = table["logits"].get<Rows>();
  ModelTraits model = MaskModel();
  model.vocab_size = model.tokenizer_size = static_cast<int32_t>(rows[0].size());
  model.mask_token = table["mask_token"];
  for (const char* sampler : {"mdlm_ancestral", "mdlm_cached", "mdlm_semi_ar"}) {
    for (const nlohmann::json& draw : table["draws"]) {
      SCOPED_TRACE(absl::StrCat(sampler, " ", draw["steps"].dump(), " ", draw["step"].dump(), " ",
                                draw["temperature"].dump()));
      Request request = {
          .ids = table["ids"].get<std::vector<TokenId>>(),
          .given = {},
          .params = {
              .sampler = sampler, .num_steps = draw["steps"], .temperature = draw["temperature"]}};
      for (const TokenId id : request.ids) request.given.push_back(id != model.mask_token);
      Sequence start = Begin(request, model, nullptr);
      SetStep(draw["step"], start);
      const std::vector<StepOutcome> outcomes = DrawSteps(start, rows, 12000, 40000, *head_);
      const auto counts = CountTokens(start, outcomes);
      const Table probabilities = draw["probabilities"];
      for (size_t i = 0; i < counts.size(); ++i) ExpectFollows(counts[i], probabilities[i]);
      // The confidence is the prediction's own, without the mask token and the chance to stay.
      if (draw["temperature"] == 0) continue;
      const double chance = draw["dt"].get<double>() / draw["t"].get<double>();
      for (const StepOutcome& outcome : outcomes) {
        for (const Transfer& transfer : outcome.transfers) {
          const double want = probabilities[transfer.position][transfer.token] / chance;
          ASSERT_NEAR(transfer.confidence, want, 2e-5 * want);
        }
      }
    }
  }
}

// The closing step of MDLM takes the argmax at any temperature.
TEST_F(MarginalTest, MdlmClosesWithTheArgmax) {
  const Rows rows = ReadTable("mdlm_rows")["logits"].get<Rows>();
  ModelTraits model = MaskModel();
  model.vocab_size = model.tokenizer_size = 15;
  model.mask_token = 14;
  for (const char* sampler : {"mdlm_ancestral", "mdlm_cached", "mdlm_semi_ar"}) {
    Sequence start = Begin({.ids = {1, 1, 1},
                            .given = {false, true, false},
                            .params = {.sampler = sampler, .num_steps = 4, .temperature = 1.0F}},
                           model, nullptr);
    SetStep(4, start);
    for (const StepOutcome& outcome : DrawSteps(start, rows, 50, 1, *head_)) {
      ASSERT_EQ(outcome.transfers.size(), 2U) << sampler;
      EXPECT_EQ(outcome.transfers[0].token, 12) << "the mask token's logit is larger";
      EXPECT_EQ(outcome.transfers[1].token, 5);
    }
  }
}

// ReMDM and the DFM corrector: masked positions are unmasked, committed ones masked again.
TEST_F(MarginalTest, RemaskingFollowsThePosterior) {
  const nlohmann::json table = ReadTable("remdm_rows");
  const Rows rows = table["logits"].get<Rows>();
  const std::vector<float> confidences = table["confidences"];
  ModelTraits model = MaskModel();
  model.vocab_size = model.tokenizer_size = static_cast<int32_t>(rows[0].size());
  model.mask_token = table["mask_token"];
  for (const nlohmann::json& draw : table["draws"]) {
    SCOPED_TRACE(draw.dump().substr(0, 120));
    const nlohmann::json& options = draw["options"];
    Request request = {.ids = table["ids"].get<std::vector<TokenId>>(),
                       .given = std::vector<bool>(6, false),
                       .params = {.sampler = draw["sampler"],
                                  .num_steps = draw["steps"],
                                  .temperature = options.value("temperature", 1.0F),
                                  .top_p = options.value("top_p", 1.0F),
                                  .eta = options.value("eta", -1.0F),
                                  .t_on = options.value("t_on", 0.55F),
                                  .t_off = options.value("t_off", 0.05F),
                                  .alpha_on = options.value("alpha_on", 0.9F)}};
    Sequence start = Begin(request, model, nullptr);
    for (int32_t i = 0; i < start.canvas.length(); ++i) {
      if (request.ids[i] == model.mask_token) continue;
      start.canvas.tokens[i] = request.ids[i];
      start.canvas.states[i] = PositionState::kCommitted;
    }
    if (!start.state.confidences.empty()) start.state.confidences = confidences;
    SetStep(draw["step"], start);
    const std::vector<StepOutcome> outcomes = DrawSteps(start, rows, 12000, 70000, *head_);
    const auto counts = CountTokens(start, outcomes);
    const Table probabilities = draw["probabilities"];
    for (size_t i = 0; i < counts.size(); ++i) {
      SCOPED_TRACE(i);
      ExpectFollows(counts[i], probabilities[i]);
    }
    for (const StepOutcome& outcome : outcomes) ASSERT_TRUE(outcome.stays_open);
  }
}

TEST_F(MarginalTest, Bd3lmFollowsThePosterior) {
  const nlohmann::json table = ReadTable("bd3lm_rows");
  const Rows rows = table["logits"].get<Rows>();
  ModelTraits model = MaskModel();
  model.vocab_size = model.tokenizer_size = static_cast<int32_t>(rows[0].size());
  model.mask_token = table["mask_token"];
  for (const nlohmann::json& draw : table["draws"]) {
    SCOPED_TRACE(draw.dump().substr(0, 100));
    const nlohmann::json& options = draw["options"];
    Request request = {.ids = table["ids"].get<std::vector<TokenId>>(),
                       .given = {},
                       .params = {.sampler = draw["sampler"],
                                  .num_steps = options.value("steps", 0),
                                  .temperature = options.value("temperature", 1.0F),
                                  .top_p = options.value("top_p", 1.0F)}};
    for (const TokenId id : request.ids) request.given.push_back(id != model.mask_token);
    Sequence start = Begin(request, model, nullptr);
    SetStep(options.value("step", 0), start);
    const std::vector<StepOutcome> outcomes = DrawSteps(start, rows, 12000, 50000, *head_);
    const auto counts = CountTokens(start, outcomes);
    const Table probabilities = draw["probabilities"];
    for (size_t i = 0; i < counts.size(); ++i) ExpectFollows(counts[i], probabilities[i]);
    if (draw["sampler"] != "bd3lm_first_hitting") continue;
    for (const StepOutcome& outcome : outcomes) ASSERT_EQ(outcome.transfers.size(), 1U);
  }
}

// Tokens follow softmax((logits + credit) / temperature), with what this step gives to the best
// token, and the confidence is that of temperature 1.
TEST_F(MarginalTest, CreditsRaiseWhatWasBest) {
  const Rows rows = ReadTable("categorical")["logits"].get<Rows>();
  ModelTraits model = MaskModel();
  model.vocab_size = model.tokenizer_size = 19;
  for (const float temperature : {0.0F, 0.6F, 1.0F, 1.7F}) {
    for (const bool has_credits : {false, true}) {
      SCOPED_TRACE(absl::StrCat(temperature, has_credits ? " with" : " without", " credits"));
      Sequence start = Begin({.ids = {0, 0, 0},
                              .given = {false, false, false},
                              .params = {.sampler = "credit",
                                         .temperature = temperature,
                                         .threshold = 0.0F,
                                         .eos_penalty = 0.75F}},
                             model, nullptr);
      if (has_credits) {
        start.state.credits = {{0, 2, 3.5F}, {0, 4, 1.0F}, {0, 11, 0.25F},
                               {1, 0, 2.0F}, {2, 5, 4.0F}, {2, 18, 0.5F}};
      }
      Table fused;  // logits
      for (size_t row = 0; row < rows.size(); ++row) {
        std::vector<double> logits(rows[row].begin(), rows[row].end());
        for (const TokenId eos : model.eos_tokens) logits[eos] -= 0.75;
        double mass = 0;
        for (const double logit : logits) mass += std::exp(logit);
        TokenId top = 0;
        for (TokenId id = 1; id < model.vocab_size; ++id) {
          if (id != model.mask_token && logits[id] > logits[top]) top = id;
        }
        std::vector<double> credit(logits.size());
        for (const Credit& held : start.state.credits) {
          if (held.position == static_cast<int32_t>(row)) credit[held.token] = 0.8 * held.value;
        }
        credit[top] += std::pow(std::exp(logits[top]) / mass, 0.2);
        for (size_t id = 0; id < logits.size(); ++id) logits[id] += 0.7 * std::log1p(credit[id]);
        fused.push_back(logits);
      }
      const std::vector<StepOutcome> outcomes = DrawSteps(start, rows, 6000, 1, *head_);
      const auto counts = CountTokens(start, outcomes);
      for (size_t row = 0; row < rows.size(); ++row) {
        std::vector<double> weights(model.vocab_size);
        double mass = 0;
        double clean = 0;
        for (TokenId id = 0; id < model.vocab_size; ++id) {
          clean += std::exp(fused[row][id]);
          if (id == model.mask_token) continue;
          weights[id] = std::exp(fused[row][id] / std::max(temperature, 0.1F));
          mass += weights[id];
        }
        if (temperature > 0) {
          for (double& weight : weights) weight /= mass;
          ExpectFollows(counts[row], weights);
        } else {
          const auto top = std::max_element(weights.begin(), weights.end()) - weights.begin();
          EXPECT_EQ(counts[row][top], 6000);
        }
        for (const StepOutcome& outcome : outcomes) {
          const Transfer& transfer = outcome.transfers[row];
          const double want = std::exp(fused[row][transfer.token]) / clean;
          ASSERT_NEAR(transfer.confidence, want, 2e-5 * want);
        }
      }
    }
  }
}

// The times at which positions are unmasked are those of as many independent uniform numbers, the
// latest first: the chance that the k-th of m is below x is that of at least m - k + 1 of them.
TEST_F(MarginalTest, FirstHittingTimesAreOrderStatistics) {
  constexpr int kMasks = 4;
  constexpr int kBins = 8;
  ModelTraits model = MaskModel();
  model.conditioned_on_sigma = true;
  std::vector<std::vector<int64_t>> counts(kMasks, std::vector<int64_t>(kBins));
  for (int seed = 0; seed < 8000; ++seed) {
    Sequence sequence =
        Begin({.ids = std::vector<TokenId>(9, 1),
               .given = {true, false, false, false, false, false, false, false, false},
               .params = {.sampler = "bd3lm_first_hitting",
                          .block_length = kMasks,
                          .seed = static_cast<uint64_t>(seed)}},
              model, FixedNetwork(Rows(9, std::vector<float>(model.vocab_size, 0.0F))));
    const std::vector<StepRecord> records = RunToEnd(sequence, *head_);
    ASSERT_EQ(records.size(), 2U * kMasks);
    double last = 1;
    for (int step = kMasks; step < 2 * kMasks; ++step) {  // of the second block
      const double time = -std::expm1(-double{records[step].plan.sigma}) / (1 - 1e-3);
      ASSERT_LE(time, last);
      last = time;
      ++counts[step - kMasks][std::min(static_cast<int>(time * kBins), kBins - 1)];
    }
  }
  for (int k = 0; k < kMasks; ++k) {
    const auto below = [&](double x) {
      double chance = 0;
      for (int j = kMasks - k; j <= kMasks; ++j) {
        const double ways = std::exp(std::lgamma(kMasks + 1.0) - std::lgamma(j + 1.0) -
                                     std::lgamma(kMasks - j + 1.0));
        chance += ways * std::pow(x, j) * std::pow(1 - x, kMasks - j);
      }
      return chance;
    };
    std::vector<double> probabilities;
    for (int bin = 0; bin < kBins; ++bin) {
      probabilities.push_back(below((bin + 1.0) / kBins) - below(double{1} * bin / kBins));
    }
    SCOPED_TRACE(k);
    ExpectFollows(counts[k], probabilities);
  }
}

ModelTraits SeddModel(const nlohmann::json& table) {
  ModelTraits model = table["graph"] == "absorb" ? AbsorbModel() : UniformModel();
  CINNABAR_CHECK(table["log_score"][0].size() == static_cast<size_t>(model.vocab_size));
  model.sigma_min = table["sigma_min"];
  model.sigma_max = table["sigma_max"];
  return model;
}

Sequence SeddStart(const nlohmann::json& table, const std::string& sampler, int32_t num_steps,
                   const std::vector<TokenId>& forbidden = {}) {
  const ModelTraits model = SeddModel(table);
  Request request = {
      .ids = table["ids"].get<std::vector<TokenId>>(),
      .given = {},
      .params = {.sampler = sampler, .num_steps = num_steps, .forbidden_ids = forbidden}};
  for (const TokenId id : request.ids) {
    request.given.push_back(model.mask_token >= 0 && id != model.mask_token);
  }
  Sequence start = Begin(request, model, nullptr);
  SetNoise(request.ids, start.canvas);
  return start;
}

// The step of a masked or noisy token in double, as section 2 of the sampler sheet has it.
std::vector<double> ReverseStep(const ModelTraits& model, bool analytic, TokenId own,
                                const std::vector<float>& log_score, int32_t step,
                                int32_t num_steps) {
  const bool absorb = model.parameterization == Parameterization::kAbsorbScore;
  const bool closing = step == num_steps;
  const int32_t n = model.vocab_size;
  const double dt = (1 - 1e-5) / num_steps;
  const double t = closing ? 1e-5 : 1 - step * dt;
  const auto sigma = [&](double time) {
    if (model.sigma_max == 0) return -std::log1p(-(1 - 1e-3) * time);
    return std::pow(double{model.sigma_min}, 1 - time) * std::pow(double{model.sigma_max}, time);
  };
  const double rate = model.sigma_max == 0
                          ? (1 - 1e-3) / (1 - (1 - 1e-3) * t)
                          : sigma(t) * std::log(double{model.sigma_max} / model.sigma_min);
  std::vector<double> score;
  double sum = 0;
  for (const float value : log_score) sum += score.emplace_back(std::exp(double{value}));
  std::vector<double> p(n);
  if (!closing && !analytic) {
    double leaving = 0;
    for (int32_t y = 0; y < n; ++y) {
      if (y == own) continue;
      p[y] = dt * rate * score[y] / (absorb ? 1 : n);
      leaving += p[y];
    }
    p[own] = 1 - leaving;
  } else {
    const double d = closing ? sigma(t) : sigma(t) - sigma(t - dt);
    const double q = std::exp(-d);
    for (int32_t y = 0; y < n; ++y) {
      if (absorb) {
        const double staggered = std::exp(d) * score[y] + (y == own ? (1 - std::exp(d)) * sum : 0);
        p[y] = staggered * ((y == own ? q : 0) + 1 - q);
      } else {
        const double staggered = (q - 1) / (n * q) * sum + score[y] / q;
        const double move = (1 - q) / n;
        p[y] = staggered * (y == own ? 1 - (n - 1) * move : move);
      }
    }
    if (closing && absorb) p[own] = 0;
  }
  double mass = 0;
  for (double& weight : p) mass += weight = std::max(weight, 0.0);
  for (double& weight : p) weight /= mass;
  return p;
}

// Whether positions stayed or moved, all undecided ones together: where moves are rare this finds a
// wrong rate that single tokens are too few to show.
double GoodnessOfMoves(const Sequence& start, const std::vector<std::vector<int64_t>>& counts,
                       const Table& probabilities) {
  int64_t stayed = 0;
  int64_t all = 0;
  double stays = 0;
  int32_t num_positions = 0;
  for (int32_t i = 0; i < start.canvas.length(); ++i) {
    if (!start.canvas.undecided(i)) continue;
    const TokenId own = start.canvas.tokens[i];
    stayed += counts[i][own];
    stays += probabilities[i][own];
    for (const int64_t count : counts[i]) all += count;
    ++num_positions;
  }
  stays /= num_positions;
  return GoodnessOfFit({stayed, all - stayed}, {stays, 1 - stays});
}

TEST_F(MarginalTest, SeddFollowsTheReverseProcess) {
  for (const char* name : {"sedd_absorb_rows", "sedd_uniform_rows"}) {
    const nlohmann::json table = ReadTable(name);
    const Rows rows = table["log_score"].get<Rows>();
    for (const nlohmann::json& draw : table["draws"]) {
      std::vector<std::string> samplers = {draw["sampler"]};
      if (samplers[0] == "denoise") samplers = {"sedd_euler", "sedd_analytic"};
      for (const std::string& sampler : samplers) {
        SCOPED_TRACE(absl::StrCat(name, " ", sampler, " step ", draw["step"].dump(), " of ",
                                  draw["steps"].dump()));
        Sequence start = SeddStart(table, sampler, draw["steps"]);
        SetStep(draw["step"], start);
        StepPlan plan;
        PlanStep(start, plan);
        EXPECT_NEAR(plan.sigma, draw["sigma"].get<double>(), 1e-6 * plan.sigma);
        const std::vector<StepOutcome> outcomes = DrawSteps(start, rows, 20000, 90000, *head_);
        const auto counts = CountTokens(start, outcomes);
        const Table probabilities = draw["probabilities"];
        for (size_t i = 0; i < counts.size(); ++i) {
          SCOPED_TRACE(i);
          ExpectFollows(counts[i], probabilities[i]);
        }
        EXPECT_GT(GoodnessOfMoves(start, counts, probabilities), kAlpha);
        EXPECT_EQ(outcomes[0].settled, draw["step"] == draw["steps"]);
      }
    }
  }
}

// The same over a grid of noises and times at which moves are neither rare nor sure, against the
// formula; which agrees with the tables.
TEST_F(MarginalTest, SeddFollowsTheFormulaAtAnyNoise) {
  for (const char* name : {"sedd_absorb_rows", "sedd_uniform_rows"}) {
    const nlohmann::json table = ReadTable(name);
    const Rows rows = table["log_score"].get<Rows>();
    for (const nlohmann::json& draw : table["draws"]) {
      const Sequence start = SeddStart(table, "sedd_euler", draw["steps"]);
      for (int32_t i = 0; i < start.canvas.length(); ++i) {
        if (!start.canvas.undecided(i)) continue;
        const std::vector<double> want = draw["probabilities"][i];
        const std::vector<double> got =
            ReverseStep(start.model, draw["sampler"] == "sedd_analytic", start.canvas.tokens[i],
                        rows[i], draw["step"], draw["steps"]);
        // sigma_min of ModelTraits is float32.
        for (size_t y = 0; y < want.size(); ++y) ASSERT_NEAR(got[y], want[y], 1e-7);
      }
    }
    int num_undecided_moves = 0;  // cells of the grid where staying and moving are both likely
    for (const auto& [sigma_min, sigma_max] :
         {std::pair{0.0F, 0.0F}, std::pair{0.01F, 5.0F}, std::pair{0.3F, 4.0F}}) {
      for (const char* sampler : {"sedd_euler", "sedd_analytic"}) {
        for (const int32_t step : {0, 1, 3, 4, 5}) {
          SCOPED_TRACE(absl::StrCat(name, " ", sampler, " sigma_min ", sigma_min, " step ", step));
          Sequence start = SeddStart(table, sampler, 5);
          start.model.sigma_min = sigma_min;
          start.model.sigma_max = sigma_max;
          SetStep(step, start);
          const auto counts = CountTokens(start, DrawSteps(start, rows, 15000, 600000, *head_));
          Table probabilities(counts.size());
          for (int32_t i = 0; i < start.canvas.length(); ++i) {
            if (!start.canvas.undecided(i)) continue;
            probabilities[i] = ReverseStep(start.model, start.params.sampler == "sedd_analytic",
                                           start.canvas.tokens[i], rows[i], step, 5);
            ExpectFollows(counts[i], probabilities[i]);
            const double stays = probabilities[i][start.canvas.tokens[i]];
            num_undecided_moves += stays > 0.1 && stays < 0.9 ? 1 : 0;
          }
          EXPECT_GT(GoodnessOfMoves(start, counts, probabilities), kAlpha);
        }
      }
    }
    EXPECT_GT(num_undecided_moves, 15);
  }
}

// A formula that were off would be found: the counts reject the other rule's table (on the
// absorbing graph with log-linear noise the two rules are one) and that of another time step.
TEST_F(MarginalTest, TheCountsRejectOtherTables) {
  struct Case {
    const char* table;
    const char* drawn;
    int32_t drawn_steps;
    int32_t drawn_step;
    const char* other;
    int32_t other_steps;
    int32_t other_step;
  };
  for (const Case& c :
       std::vector<Case>{{"sedd_uniform_rows", "sedd_analytic", 10, 0, "sedd_euler", 10, 0},
                         {"sedd_uniform_rows", "sedd_analytic", 3, 2, "sedd_euler", 3, 2},
                         {"sedd_uniform_rows", "sedd_euler", 3, 2, "sedd_analytic", 3, 2},
                         {"sedd_uniform_rows", "sedd_euler", 10, 6, "sedd_euler", 3, 2},
                         {"sedd_absorb_rows", "sedd_euler", 10, 6, "sedd_euler", 3, 2},
                         {"sedd_absorb_rows", "sedd_analytic", 200, 150, "sedd_analytic", 10, 6}}) {
    const nlohmann::json table = ReadTable(c.table);
    Sequence start = SeddStart(table, c.drawn, c.drawn_steps);
    SetStep(c.drawn_step, start);
    const Rows rows = table["log_score"].get<Rows>();
    const auto counts = CountTokens(start, DrawSteps(start, rows, 20000, 90000, *head_));
    bool found = false;
    for (const nlohmann::json& draw : table["draws"]) {
      if (draw["sampler"] != c.other || draw["steps"] != c.other_steps ||
          draw["step"] != c.other_step) {
        continue;
      }
      found = true;
      const Table probabilities = draw["probabilities"];
      EXPECT_LT(std::min(GoodnessOfMoves(start, counts, probabilities),
                         GoodnessOfFit(counts[0], probabilities[0])),
                kAlpha)
          << c.table << " " << c.drawn << " against " << c.other;
    }
    EXPECT_TRUE(found);
  }
}

// A forbidden id leaves the scores: the rest follows as if its score were 0, and there always is an
// id to go to.
TEST_F(MarginalTest, ForbiddenIdsLeaveTheTweedieStep) {
  nlohmann::json table = ReadTable("sedd_uniform_rows");
  Rows rows = table["log_score"].get<Rows>();
  const std::vector<TokenId> forbidden = {4, 2, 11, 2};  // of which 4 and 2 are the best of a row
  rows[1][4] = 6.0F;                                     // more than all the others together
  for (const int32_t step : {0, 6, 9, 10}) {
    SCOPED_TRACE(step);
    Sequence start = SeddStart(table, "sedd_analytic", 10, forbidden);
    SetStep(step, start);
    const auto counts = CountTokens(start, DrawSteps(start, rows, 20000, 1, *head_));
    const TimeStep at = TimeStepAt(10, step);
    const double sigma = SigmaAt(start.model, at.time);
    const double d = step == 10 ? sigma : sigma - SigmaAt(start.model, at.time - at.length);
    const double q = std::exp(-d);
    const double n = start.model.vocab_size;
    for (int32_t i = 0; i < start.canvas.length(); ++i) {
      std::vector<double> score;
      for (const float log_score : rows[i])
        score.push_back(std::exp(static_cast<double>(log_score)));
      for (const TokenId id : forbidden) score[id] = 0;
      double sum = 0;
      for (const double s : score) sum += s;
      std::vector<double> weights;
      double mass = 0;
      for (TokenId y = 0; y < start.model.vocab_size; ++y) {
        const double staggered = (q - 1) / (n * q) * sum + score[y] / q;
        const double move = (1 - q) / n;
        const double transition = y == start.canvas.tokens[i] ? 1 - (n - 1) * move : move;
        weights.push_back(std::max(0.0, staggered * transition));
        mass += weights.back();
      }
      for (double& weight : weights) weight /= mass;
      for (const TokenId id : forbidden) EXPECT_EQ(weights[id], 0);
      ExpectFollows(counts[i], weights);
    }
  }
}

// --- Whole runs
// --------------------------------------------------------------------------------------------

// When a position is transferred: each step draws anew, so that the chances of the steps multiply
// out. Dream's origin spreads the transfers evenly over all steps, but for the last which takes the
// rest; MDLM over all before the closing one; SEDD on the absorbing graph as MDLM, when its scores
// are ideal. Two positions at a time, because they are independent.
TEST_F(MarginalTest, TransfersSpreadOverTheStepsOfARun) {
  constexpr int32_t kSteps = 5;
  struct Case {
    const char* sampler;
    ModelTraits model;
    std::vector<double> chances;
  };
  const double even = (1 - 1e-5) / kSteps;
  const std::vector<double> closing = {even, even, even, even, even, 1e-5};
  for (const Case& c : std::vector<Case>{
           {"origin", MaskModel(), {0.16, 0.16, 0.16, 0.16, 0.36}},  // (1 - eps) / 5, eps = 0.2
           {"mdlm_ancestral", MaskModel(), closing},
           {"mdlm_cached", MaskModel(), closing},
           {"mdlm_semi_ar", MaskModel(), closing},
           {"sedd_euler", AbsorbModel(), closing},
           {"sedd_analytic", AbsorbModel(), closing}}) {
    SCOPED_TRACE(c.sampler);
    const TokenId mask_token = c.model.mask_token;
    const int32_t vocab_size = c.model.vocab_size;
    const bool scores = c.model.parameterization != Parameterization::kMaskPrediction;
    const Network network = [=](absl::Span<const TokenId>, int32_t, float sigma) {
      // The ideal score of a uniform prediction.
      const double level =
          scores ? -std::log(std::expm1(double{sigma})) - std::log(vocab_size - 1.0) : 0;
      std::vector<float> row(vocab_size, static_cast<float>(level));
      row[mask_token] = 0;
      return row;
    };
    std::vector<int64_t> counts(c.chances.size() * c.chances.size());
    for (int seed = 0; seed < 12000; ++seed) {
      DecodingParams params = {.sampler = c.sampler,
                               .num_steps = kSteps,
                               .temperature = 1.0F,
                               .seed = static_cast<uint64_t>(seed)};
      if (params.sampler == "origin") params.eps = 0.2F;
      Sequence sequence = Begin({.ids = {1, 1, 1}, .given = {true, false, false}, .params = params},
                                c.model, network);
      int64_t when[3] = {};
      for (const StepRecord& record : RunToEnd(sequence, *head_)) {
        for (const Transfer& t : record.outcome.transfers) when[t.position] = record.before.step;
      }
      ++counts[when[1] * c.chances.size() + when[2]];
    }
    std::vector<double> joint;
    for (const double a : c.chances) {
      for (const double b : c.chances) joint.push_back(a * b);
    }
    ExpectFollows(counts, joint);
  }
}

// --- From the checkpoint to the token
// ----------------------------------------------------------------------

// The next token of every position, from tables computed with the reference network: forward pass,
// vocabulary head, engine and sampler together.
TEST(CheckpointMarginalTest, OneStepOfTheEngineFollowsTheTable) {
  constexpr int kNumDraws = 3000;
  constexpr int kSequencesMax = 60;
  const ForwardLimits limits{.rows_max = 1000, .sequences_max = kSequencesMax, .positions_max = 32};
  const std::unique_ptr<Backend> backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
  for (const char* name : {"sedd_absorb_model", "sedd_uniform_model", "mdlm_model"}) {
    const nlohmann::json table = ReadTable(name);
    auto denoiser = LoadDenoiser(GoldenPath(table["model"]), *backend, {}, limits);
    ASSERT_TRUE(denoiser.ok()) << denoiser.status();
    const ModelTraits& model = (*denoiser)->traits();
    const std::vector<TokenId> ids = table["input"]["ids"];
    const std::vector<bool> given = table["input"]["given"];
    for (const nlohmann::json& draw : table["draws"]) {
      std::vector<std::string> samplers = {"mdlm_ancestral", "mdlm_cached"};
      if (draw.contains("sampler")) samplers = {draw["sampler"]};
      for (const std::string& sampler : samplers) {
        SCOPED_TRACE(absl::StrCat(name, " ", sampler, " step ", draw["step"].dump()));
        const std::vector<int32_t> positions = draw["positions"];
        std::vector<std::vector<int64_t>> counts(positions.size(),
                                                 std::vector<int64_t>(model.vocab_size));
        for (int begin = 0; begin < kNumDraws; begin += kSequencesMax) {
          Engine engine(**denoiser, {.limits = limits});
          std::map<SequenceId, std::vector<TokenId>> tokens;
          for (int i = begin; i < begin + kSequencesMax; ++i) {
            absl::StatusOr<SequenceState> state = MakeSequence(ids, given,
                                                               {.sampler = sampler,
                                                                .num_steps = draw["steps"],
                                                                .temperature = 1.0F,
                                                                .seed = static_cast<uint64_t>(i)},
                                                               model);
            ASSERT_TRUE(state.ok()) << state.status();
            SetNoise(ids, state->canvas);
            state->decoding.step = state->decoding.block_step = draw["step"];
            const std::vector<TokenId> before = state->canvas.tokens;
            const absl::StatusOr<SequenceId> id = engine.Add(*std::move(state));
            ASSERT_TRUE(id.ok()) << id.status();
            tokens[*id] = before;
          }
          // mdlm_cached may make several steps at once; only the first is looked at.
          StepReport report;
          ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
          for (const StepEvent& event : report.events) {
            ASSERT_TRUE(event.status.ok()) << event.status;
            if (event.step != draw["step"].get<int32_t>()) continue;
            for (const Transfer& transfer : report.TransfersOf(event)) {
              tokens[event.sequence][transfer.position] = transfer.token;
            }
          }
          for (const auto& [id, after] : tokens) {
            for (size_t i = 0; i < positions.size(); ++i) ++counts[i][after[positions[i]]];
          }
        }
        const Table probabilities = draw["probabilities"];
        for (size_t i = 0; i < positions.size(); ++i) {
          SCOPED_TRACE(positions[i]);
          ExpectFollows(counts[i], probabilities[i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cinnabar
