// What holds for every sampler of the catalog, on random requests and a network that changes its
// mind about everything whenever a token changes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/unit/decoding/decoding_harness.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

constexpr int kNumRequests = 60;  // for each sampler and model that fit

struct Case {
  ModelTraits model;
  Request request;
  std::string name;

  // The mask token may be the best one only where nothing is filtered: a set that holds no other id
  // has none to pick, and the engine ends such a sequence.
  Sequence Start() const {
    const bool filtered = request.params.top_k > 0 || request.params.top_p < 1;
    return Begin(request, model, HashNetwork(model, 3.0, 99, /*text_is_best=*/filtered));
  }
};

std::vector<Case> CasesOf(const SamplerEntry& entry, int num_requests = kNumRequests) {
  std::vector<Case> cases;
  for (const ModelTraits& model : AllModels()) {
    if (!Fits(entry, model)) continue;
    for (int seed = 0; seed < num_requests; ++seed) {
      cases.push_back({model, RandomRequest(entry, model, seed),
                       absl::StrCat(entry.name, " on ", model.family, ", request ", seed)});
    }
  }
  return cases;
}

bool IsMdlm(const DecodingParams& params) {
  return absl::StartsWith(params.sampler, "mdlm_") || absl::StartsWith(params.sampler, "remdm_");
}
bool IsSedd(const DecodingParams& params) { return absl::StartsWith(params.sampler, "sedd_"); }

class SamplerPropertyTest : public testing::TestWithParam<std::string> {
 protected:
  const SamplerEntry& entry() const { return EntryOf(GetParam()); }
  std::unique_ptr<Head> cpu_ = CpuHead();
};

std::vector<std::string> Names() {
  std::vector<std::string> names;
  for (const SamplerEntry& entry : SamplerCatalog()) names.emplace_back(entry.name);
  return names;
}

std::vector<std::string> NamesFor(const ModelTraits& model) {
  std::vector<std::string> names;
  for (const SamplerEntry& entry : SamplerCatalog()) {
    if (Fits(entry, model)) names.emplace_back(entry.name);
  }
  return names;
}

INSTANTIATE_TEST_SUITE_P(Samplers, SamplerPropertyTest, testing::ValuesIn(Names()),
                         [](const auto& info) { return info.param; });

// As the comment of TransferRule has it: whether the candidate is taken.
bool IsTaken(absl::Span<const VocabularyAnswer> answers, size_t mine, const TransferRule& rule) {
  const auto score = [&](size_t i) {
    return rule.score == TransferScore::kProbability ? answers[i].probability
           : rule.score == TransferScore::kMargin    ? answers[i].margin
                                                     : -answers[i].entropy;
  };
  int32_t num_before = 0;
  for (size_t i = 0; i < answers.size(); ++i) {
    if (score(i) > score(mine) || (score(i) == score(mine) && i < mine)) ++num_before;
  }
  return num_before < rule.count ||
         (rule.inclusive ? score(mine) >= rule.threshold : score(mine) > rule.threshold);
}

TEST_P(SamplerPropertyTest, ARuleIsWhatItDecidesWhateverTheAnswers) {
  static const auto* const kDescribed =
      new std::set<std::string>{"low_confidence",      "random",           "origin",
                                "maskgit_plus",        "topk_margin",      "entropy",
                                "threshold",           "fast_dllm_v2",     "block_static",
                                "block_dynamic",       "block_sequential", "mdlm_ancestral",
                                "mdlm_cached",         "mdlm_semi_ar",     "rnd1",
                                "bd3lm_first_hitting", "bd3lm_scheduled"};
  const Sampler& sampler = **GetSampler(entry().name);
  std::mt19937 random(11);
  int num_rules = 0;
  for (const Case& c : CasesOf(entry())) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    StepPlan plan;
    while (!sequence.state.finished) {
      PlanStep(sequence, plan);
      const std::optional<TransferRule> rule = sampler.Describe(sequence.context(), plan);
      if (!rule.has_value()) break;
      ++num_rules;
      std::vector<VocabularyAnswer> answers = AnswerStep(sequence, plan, *cpu_);
      // Few different numbers, what they are compared with among them: many ties.
      const double some[] = {0.1, 0.3, sequence.params.threshold, 0.95};
      for (VocabularyAnswer& answer : answers) {
        answer.probability = some[random() % 4];
        answer.margin = some[random() % 4];
        answer.entropy = some[random() % 4];
      }
      const StepOutcome outcome = FinishStep(plan, answers, sequence);
      size_t next = 0;
      for (size_t i = 0; i < answers.size(); ++i) {
        if (!IsTaken(answers, i, *rule)) continue;
        ASSERT_LT(next, outcome.transfers.size());
        EXPECT_EQ(outcome.transfers[next].position, plan.queries[i].position);
        EXPECT_EQ(outcome.transfers[next].token, answers[i].token);
        ++next;
      }
      EXPECT_EQ(next, outcome.transfers.size());
      EXPECT_FALSE(outcome.settled || outcome.stays_open);
      EXPECT_TRUE(outcome.predictions.empty() && outcome.credits.empty());
      ASSERT_LT(sequence.state.step, 5000) << "no end";
    }
  }
  EXPECT_EQ(num_rules > 0, kDescribed->count(GetParam()) == 1) << num_rules;
}

// The canvas after each step follows from the one before and the transfers alone.
TEST_P(SamplerPropertyTest, FillsTheCanvasBlockByBlockAndNothingElse) {
  int num_transfers = 0;
  int num_revised = 0;
  for (const Case& c : CasesOf(entry())) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    const bool has_mask_token = c.model.mask_token >= 0;
    const Canvas start = sequence.canvas;
    const int32_t num_masked = CountUndecided(start, 0, start.length());
    std::vector<TokenId> tokens = start.tokens;
    std::vector<int> times_transferred(start.length());
    StepPlan plan;
    int32_t block_index = 0;
    while (!sequence.state.finished) {
      const BlockRange block = sequence.context().block;
      // Left to right: everything before the open block is decided, and blocks never go back.
      EXPECT_EQ(CountUndecided(sequence.canvas, 0, block.begin), 0);
      EXPECT_TRUE(entry().revises || CountUndecided(sequence.canvas, block.begin, block.end) > 0);
      EXPECT_GE(sequence.state.block_index, block_index);
      block_index = sequence.state.block_index;
      PlanStep(sequence, plan);
      int32_t previous = block.begin - 1;
      for (const PositionQuery& query : plan.queries) {
        EXPECT_GE(query.position, previous + (entry().row_rules > 0 ? 0 : 1)) << "ascending";
        EXPECT_LT(query.position, block.end);
        const PositionState state = sequence.canvas.states[query.position];
        EXPECT_NE(state, PositionState::kGiven);
        EXPECT_TRUE(entry().revises || state != PositionState::kCommitted);
        previous = query.position;
      }
      EXPECT_EQ(plan.forward, !plan.queries.empty());
      EXPECT_EQ(plan.visible_begin, 0);
      EXPECT_GE(plan.visible_end, block.end);
      EXPECT_LE(plan.visible_end, start.length());
      const StepOutcome outcome = FinishStep(plan, AnswerStep(sequence, plan, *cpu_), sequence);
      for (const Transfer& transfer : outcome.transfers) {
        int32_t& position_times = times_transferred[transfer.position];
        const bool committed = has_mask_token && position_times > 0;
        if (transfer.token == kMaskedAgain) {
          tokens[transfer.position] = c.model.mask_token;
          --position_times;
          ++num_revised;
          continue;
        }
        if (committed) {
          EXPECT_NE(tokens[transfer.position], transfer.token) << "nothing is edited";
          ++num_revised;
        } else {
          ++position_times;
        }
        tokens[transfer.position] = transfer.token;
      }
      ASSERT_EQ(sequence.canvas.tokens, tokens);
      if (sequence.state.step > 5000) FAIL() << "no end";
    }
    EXPECT_EQ(CountUndecided(sequence.canvas, 0, start.length()), 0);
    for (int32_t i = 0; i < start.length(); ++i) {
      if (start.states[i] == PositionState::kGiven) {
        EXPECT_EQ(sequence.canvas.tokens[i], c.request.ids[i]) << "given position " << i;
        EXPECT_EQ(sequence.canvas.states[i], PositionState::kGiven);
        EXPECT_EQ(times_transferred[i], 0);
        continue;
      }
      EXPECT_EQ(sequence.canvas.states[i], PositionState::kCommitted);
      EXPECT_NE(sequence.canvas.tokens[i], c.model.mask_token);
      if (has_mask_token) {
        EXPECT_EQ(times_transferred[i], 1) << "position " << i;
      }
      num_transfers += times_transferred[i];
    }
    if (has_mask_token) {
      EXPECT_EQ(num_masked, std::count(times_transferred.begin(), times_transferred.end(), 1));
    }
  }
  EXPECT_GT(num_transfers, 300);
  EXPECT_EQ(num_revised > 20, entry().revises) << num_revised;
}

TEST_P(SamplerPropertyTest, KeepsToItsStepsAndCountsItsForwardPasses) {
  const std::string name = GetParam();
  for (const Case& c : CasesOf(entry())) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    const int32_t num_masked = CountUndecided(sequence.canvas, 0, sequence.canvas.length());
    const DecodingParams params = sequence.params;
    const int32_t steps_per_block = StepsPerBlock(sequence.canvas, params, c.model);
    const std::vector<StepRecord> records = RunToEnd(sequence, *cpu_);
    EXPECT_EQ(sequence.state.step, static_cast<int32_t>(records.size()));

    struct Block {
      int32_t masks = 0;
      int32_t num_steps = 0;
      int32_t num_forwards = 0;
      int32_t num_productive = 0;  // steps that transferred
    };
    std::map<int32_t, Block> blocks;
    int32_t nfe = 0;
    for (size_t i = 0; i < records.size(); ++i) {
      const StepRecord& record = records[i];
      EXPECT_EQ(record.before.step, static_cast<int32_t>(i));
      EXPECT_EQ(record.before.nfe, nfe);
      nfe += record.plan.forward ? 1 : 0;
      Block& block = blocks[record.before.block_index];
      EXPECT_EQ(record.before.block_step, block.num_steps);
      block.masks = record.before.block_masks;
      ++block.num_steps;
      block.num_forwards += record.plan.forward ? 1 : 0;
      const std::vector<Transfer>& transfers = record.outcome.transfers;
      const bool writes = std::any_of(transfers.begin(), transfers.end(),
                                      [](const Transfer& t) { return t.token != kMaskedAgain; });
      block.num_productive += writes ? 1 : 0;
      if (!record.plan.forward) {
        EXPECT_FALSE(writes);
      }
    }
    EXPECT_EQ(sequence.state.nfe, nfe);
    EXPECT_LE(nfe, sequence.state.step);

    int32_t masks = 0;
    for (const auto& [index, block] : blocks) {
      SCOPED_TRACE(
          absl::StrCat("block ", index, ": ", block.masks, " masks, ", steps_per_block, " steps"));
      masks += block.masks;
      const int32_t closing = name == "dfm_corrector"            ? 32
                              : IsMdlm(params) || IsSedd(params) ? 1
                                                                 : 0;
      if (Reads(entry(), Knob::kNumSteps)) {
        EXPECT_LE(block.num_steps, steps_per_block + closing) << "the budget";
      } else {
        const int32_t edits = Reads(entry(), Knob::kEditing) ? params.edit_steps : 0;
        const BlockRange range = BlockAt(sequence.canvas, c.model, params.block_length, index);
        EXPECT_LE(block.num_steps,
                  (entry().moves_tokens ? range.end - range.begin + 1 : block.masks) + edits)
            << "at least one transfer in each step";
      }
      // Exact counts, from the schedules alone.
      if (name == "low_confidence" || name == "random") {
        EXPECT_EQ(block.num_steps, std::min(steps_per_block, block.masks));
        EXPECT_EQ(block.num_forwards, block.num_steps);
      } else if (name == "block_static") {
        int32_t left = block.masks;
        int32_t num_steps = 0;
        for (; left > 0; ++num_steps) {
          left -= num_steps == steps_per_block - 1
                      ? left
                      : EvenShare(params.block_length, steps_per_block, num_steps);
        }
        EXPECT_EQ(block.num_steps, num_steps);
        EXPECT_EQ(block.num_forwards, num_steps);
      } else if (name == "block_dynamic") {
        EXPECT_EQ(block.num_forwards, block.num_steps);
        EXPECT_LE(block.num_steps, std::min(steps_per_block, block.masks));
      } else if (name == "maskgit_plus" || name == "topk_margin" || name == "entropy") {
        int32_t left = block.masks;
        int32_t num_steps = 0;
        int32_t num_forwards = 0;
        for (; left > 0; ++num_steps) {
          const int32_t count = DreamTransferCount(left, steps_per_block, num_steps, params.eps);
          num_forwards += count > 0 ? 1 : 0;
          left -= count;
        }
        EXPECT_EQ(block.num_steps, num_steps);
        EXPECT_EQ(block.num_forwards, num_forwards);
      } else if (name == "rnd1") {
        int32_t left = block.masks;
        int32_t num_steps = 0;
        int32_t num_forwards = 0;
        for (; left > 0; ++num_steps) {
          const int32_t stay =
              block.masks * std::max(steps_per_block - 1 - num_steps, 0) / steps_per_block;
          num_forwards += left > stay ? 1 : 0;
          left = stay;
        }
        EXPECT_EQ(block.num_steps, num_steps);
        EXPECT_EQ(block.num_forwards, num_forwards);
      } else if (name == "bd3lm_first_hitting") {
        EXPECT_EQ(block.num_forwards, block.masks) << "one position in each step";
      } else if (name == "p2" || name == "p2_open" || Reads(entry(), Knob::kEditing)) {
        EXPECT_LE(block.num_productive, block.num_forwards);
      } else if (name == "mdlm_ancestral" || IsSedd(params)) {
        EXPECT_EQ(block.num_forwards, block.num_steps) << "a pass in every step";
      } else {
        EXPECT_EQ(block.num_forwards, block.num_productive)
            << "a pass in every step that transfers";
      }
      if (c.model.mask_token < 0 && IsSedd(params)) {
        EXPECT_EQ(block.num_steps, steps_per_block + 1) << "noise is settled by the closing step";
      }
    }
    EXPECT_EQ(masks, num_masked);
  }
}

TEST_P(SamplerPropertyTest, NeverWritesWhatIsForbidden) {
  std::set<TokenId> written;
  std::set<TokenId> written_when_allowed;
  int num_restricted = 0;
  for (const Case& c : CasesOf(entry(), 2 * kNumRequests)) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    const Canvas start = sequence.canvas;
    const DecodingParams& params = sequence.params;
    RunToEnd(sequence, *cpu_);
    const bool restricted =
        !params.forbidden_ids.empty() || params.pickable_ids > 0 || params.logits_eos_inf;
    num_restricted += restricted ? 1 : 0;
    for (int32_t i = 0; i < start.length(); ++i) {
      if (start.states[i] == PositionState::kGiven) continue;
      const TokenId token = sequence.canvas.tokens[i];
      (restricted ? written : written_when_allowed).insert(token);
      EXPECT_THAT(params.forbidden_ids, testing::Not(testing::Contains(token)));
      if (params.pickable_ids > 0) {
        EXPECT_LT(token, params.pickable_ids);
      }
      if (params.logits_eos_inf) {
        EXPECT_THAT(c.model.eos_tokens, testing::Not(testing::Contains(token)));
      }
    }
  }
  EXPECT_GT(num_restricted, kNumRequests / 2);
  // The restrictions decide: without them the same ids do come up.
  EXPECT_THAT(written_when_allowed, testing::IsSupersetOf({2, 4, 7}));
}

// The backend's float32 statistics lead to the decisions that exact ones do.
TEST_P(SamplerPropertyTest, DecidesAsWithExactStatistics) {
  const std::unique_ptr<Head> reference = ReferenceHead();
  for (const Case& c : CasesOf(entry())) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    Sequence exact = c.Start();
    RunToEnd(sequence, *cpu_);
    RunToEnd(exact, *reference);
    EXPECT_EQ(sequence.canvas.tokens, exact.canvas.tokens);
    EXPECT_EQ(sequence.state.step, exact.state.step);
    EXPECT_EQ(sequence.state.nfe, exact.state.nfe);
  }
}

TEST_P(SamplerPropertyTest, SameSeedSameBytesAndAnotherSeedOthers) {
  const bool random_order = entry().draws_positions;
  int num_random = 0;
  int num_differ = 0;
  for (Case c : CasesOf(entry())) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    const std::vector<StepRecord> records = RunToEnd(sequence, *cpu_);
    Sequence again = c.Start();
    const std::vector<StepRecord> records_again = RunToEnd(again, *cpu_);
    EXPECT_EQ(again.canvas.tokens, sequence.canvas.tokens);
    ASSERT_EQ(records_again.size(), records.size());
    for (size_t i = 0; i < records.size(); ++i) {
      ASSERT_EQ(records_again[i].outcome.transfers.size(), records[i].outcome.transfers.size());
      for (size_t j = 0; j < records[i].outcome.transfers.size(); ++j) {
        EXPECT_EQ(records_again[i].outcome.transfers[j].confidence,
                  records[i].outcome.transfers[j].confidence);
      }
    }
    const int32_t num_masked = CountUndecided(c.Start().canvas, 0, c.Start().canvas.length());
    // The low and the high half of the seed both count.
    for (const uint64_t other :
         {c.request.params.seed ^ 1, c.request.params.seed ^ (uint64_t{1} << 63)}) {
      c.request.params.seed = other;
      Sequence reseeded = c.Start();
      RunToEnd(reseeded, *cpu_);
      const DecodingParams& params = reseeded.params;
      const bool always_draws = IsSedd(params) || Reads(entry(), Knob::kCooling);
      const bool uses_noise =
          params.temperature > 0 || params.alg_temp > 0 || random_order || always_draws;
      if (!uses_noise) {
        EXPECT_EQ(reseeded.canvas.tokens, sequence.canvas.tokens) << "nothing is random here";
      } else if (num_masked >= 8 && (params.temperature >= 1 || always_draws)) {
        ++num_random;
        num_differ += reseeded.canvas.tokens != sequence.canvas.tokens ? 1 : 0;
      }
    }
  }
  EXPECT_GT(num_random, 10);
  EXPECT_GT(num_differ, num_random * 9 / 10);
}

TEST_P(SamplerPropertyTest, ResumesFromEveryStep) {
  for (const Case& c : CasesOf(entry(), 12)) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    std::vector<Sequence> snapshots;
    while (!sequence.state.finished) {
      snapshots.push_back(sequence);
      RunToEnd(sequence, *cpu_, 1);
    }
    for (Sequence& snapshot : snapshots) {
      RunToEnd(snapshot, *cpu_);
      ASSERT_EQ(snapshot.canvas.tokens, sequence.canvas.tokens);
      ASSERT_EQ(snapshot.state.step, sequence.state.step);
      ASSERT_EQ(snapshot.state.nfe, sequence.state.nfe);
    }
  }
}

TEST_P(SamplerPropertyTest, PlanForgetsWhatThePlanHeldBefore) {
  for (const Case& c : CasesOf(entry(), 12)) {
    SCOPED_TRACE(c.name);
    Sequence sequence = c.Start();
    while (!sequence.state.finished) {
      StepPlan fresh;
      PlanStep(sequence, fresh);
      StepPlan used = fresh;
      used.forward = !fresh.forward;
      used.sigma = 7.0F;
      used.prediction_temperature = 3.0F;
      used.visible_begin = 3;
      used.visible_end = 1;
      used.queries.push_back(
          {.position = 1000, .pick_temperature = 5.0F, .top_k = 3, .rules = {{.id = 1}}});
      PlanStep(sequence, used);
      EXPECT_EQ(used.forward, fresh.forward);
      EXPECT_EQ(used.sigma, fresh.sigma);
      EXPECT_EQ(used.prediction_temperature, fresh.prediction_temperature);
      EXPECT_EQ(used.visible_begin, fresh.visible_begin);
      EXPECT_EQ(used.visible_end, fresh.visible_end);
      ASSERT_EQ(used.queries.size(), fresh.queries.size());
      for (size_t i = 0; i < fresh.queries.size(); ++i) {
        const PositionQuery& a = used.queries[i];
        const PositionQuery& b = fresh.queries[i];
        EXPECT_EQ(a.position, b.position);
        EXPECT_EQ(a.pick, b.pick);
        EXPECT_EQ(a.pick_temperature, b.pick_temperature);
        EXPECT_EQ(a.statistics_temperature, b.statistics_temperature);
        EXPECT_EQ(a.top_k, b.top_k);
        EXPECT_EQ(a.top_p, b.top_p);
        EXPECT_EQ(a.top_p_rule, b.top_p_rule);
        EXPECT_EQ(a.filter_order, b.filter_order);
        EXPECT_EQ(a.sigma_step, b.sigma_step);
        EXPECT_EQ(a.rules.size(), b.rules.size());
      }
      // An outcome that was used before is overwritten, too.
      const std::vector<VocabularyAnswer> answers = AnswerStep(sequence, fresh, *cpu_);
      StepOutcome used_outcome{
          .transfers = {{.position = 77, .token = 1}}, .settled = true, .stays_open = true};
      (*GetSampler(GetParam()))->Decide(sequence.context(), fresh, answers, used_outcome);
      const StepOutcome outcome = FinishStep(fresh, answers, sequence);
      EXPECT_EQ(used_outcome.settled, outcome.settled);
      EXPECT_EQ(used_outcome.stays_open, outcome.stays_open);
      ASSERT_EQ(used_outcome.transfers.size(), outcome.transfers.size());
      for (size_t i = 0; i < outcome.transfers.size(); ++i) {
        EXPECT_EQ(used_outcome.transfers[i].position, outcome.transfers[i].position);
        EXPECT_EQ(used_outcome.transfers[i].token, outcome.transfers[i].token);
      }
    }
  }
}

// A knob changes what comes out exactly when the catalog says that it is read. The knob is turned
// in the resolved params, where nothing checks it any more. block_length is also what splits the
// canvas for everybody, and cfg_scale is read by the engine: neither is looked at here when it is
// not read.
TEST_P(SamplerPropertyTest, ReadsTheKnobsItNamesAndNoOther) {
  struct Turn {
    Knob knob;
    const char* name;
    void (*turn)(DecodingParams&);
  };
  const Turn turns[] = {
      {Knob::kNumSteps, "num_steps",
       [](DecodingParams& p) { p.num_steps = p.num_steps == 0 ? 3 : p.num_steps * 3; }},
      {Knob::kBlockLength, "block_length", [](DecodingParams& p) { p.block_length += 2; }},
      {Knob::kTopP, "top_p", [](DecodingParams& p) { p.top_p = 0.7F; }},
      {Knob::kTopK, "top_k", [](DecodingParams& p) { p.top_k = 5; }},
      {Knob::kThreshold, "threshold", [](DecodingParams& p) { p.threshold = 0.35F; }},
      {Knob::kFactor, "factor", [](DecodingParams& p) { p.factor = 2.5F; }},
      {Knob::kEntropyBound, "entropy_bound", [](DecodingParams& p) { p.entropy_bound = 4.0F; }},
      {Knob::kAlgTemp, "alg_temp", [](DecodingParams& p) { p.alg_temp = 3.0F; }},
      {Knob::kEps, "eps", [](DecodingParams& p) { p.eps = 0.7F; }},
      {Knob::kCooling, "temperature_start", [](DecodingParams& p) { p.temperature_start += 2.0F; }},
      {Knob::kCooling, "temperature_end", [](DecodingParams& p) { p.temperature_end *= 0.1F; }},
      {Knob::kAdaptiveStop, "stable_steps",
       [](DecodingParams& p) { p.stable_steps = p.stable_steps == 0 ? 2 : 0; }},
      {Knob::kAdaptiveStop, "confident_entropy",
       [](DecodingParams& p) { p.confident_entropy = p.confident_entropy > 1 ? 0.0F : 50.0F; }},
      {Knob::kCfgScale, "cfg_scale", [](DecodingParams& p) { p.cfg_scale = 2.5F; }},
      {Knob::kEosSwitches, "logits_eos_inf",
       [](DecodingParams& p) { p.logits_eos_inf = !p.logits_eos_inf; }},
      {Knob::kEosSwitches, "confidence_eos_eot_inf",
       [](DecodingParams& p) { p.confidence_eos_eot_inf = !p.confidence_eos_eot_inf; }},
      {Knob::kEta, "eta", [](DecodingParams& p) { p.eta = p.eta == 0.5F ? 0.0F : 0.5F; }},
      {Knob::kRemaskingWindow, "t_on", [](DecodingParams& p) { p.t_on = 0.7F; }},
      {Knob::kRemaskingWindow, "t_off", [](DecodingParams& p) { p.t_off = 0.4F; }},
      {Knob::kRemaskingWindow, "alpha_on", [](DecodingParams& p) { p.alpha_on = 0.4F; }},
      {Knob::kEditing, "edit_threshold", [](DecodingParams& p) { p.edit_threshold = 0.15F; }},
      {Knob::kEditing, "edit_steps", [](DecodingParams& p) { p.edit_steps += 3; }},
      {Knob::kRepeatPenalty, "repeat_penalty", [](DecodingParams& p) { p.repeat_penalty += 2.0F; }},
      {Knob::kLowThreshold, "low_threshold", [](DecodingParams& p) { p.low_threshold = 0.3F; }},
  };
  for (const Turn& turn : turns) {
    const bool reads = Reads(entry(), turn.knob);
    if (!reads && (turn.knob == Knob::kBlockLength || turn.knob == Knob::kCfgScale)) continue;
    // What `random` transfers does not depend on confidence.
    const bool no_confidence =
        GetParam() == "random" && std::string(turn.name) == "confidence_eos_eot_inf";
    int num_differ = 0;
    for (const Case& c : CasesOf(entry(), 30)) {
      if (c.model.causal_block_length > 0 && turn.knob == Knob::kBlockLength) continue;
      Sequence sequence = c.Start();
      sequence.network = HashNetwork(c.model, 3.0, 99, /*text_is_best=*/true);
      Sequence turned = sequence;
      turn.turn(turned.params);
      turned.state = BeginDecoding(turned.canvas, turned.params, turned.model);
      RunToEnd(sequence, *cpu_);
      RunToEnd(turned, *cpu_);
      num_differ +=
          turned.canvas.tokens != sequence.canvas.tokens || turned.state.step != sequence.state.step
              ? 1
              : 0;
    }
    if (reads && !no_confidence) {
      EXPECT_GT(num_differ, 0) << turn.name << " is named but changes nothing";
    } else if (!reads) {
      EXPECT_EQ(num_differ, 0) << turn.name << " is read but not named";
    }
  }
}

// Not the score samplers: their own token keeps the score 1, EOS or not.
class EosPenaltyTest : public SamplerPropertyTest {};

INSTANTIATE_TEST_SUITE_P(MaskSamplers, EosPenaltyTest, testing::ValuesIn(NamesFor(MaskModel())),
                         [](const auto& info) { return info.param; });

TEST_P(EosPenaltyTest, KeepsEosAway) {
  int num_eos = 0;
  int num_eos_favoured = 0;
  int num_tokens = 0;
  for (Case c : CasesOf(entry(), 20)) {
    c.request.params.logits_eos_inf = false;
    c.request.params.forbidden_ids.clear();
    const auto count = [&](float penalty) {
      c.request.params.eos_penalty = penalty;
      Sequence sequence = c.Start();
      const Canvas start = sequence.canvas;
      RunToEnd(sequence, *cpu_);
      int num = 0;
      for (int32_t i = 0; i < start.length(); ++i) {
        if (start.states[i] == PositionState::kGiven) continue;
        num += sequence.canvas.tokens[i] == 4 || sequence.canvas.tokens[i] == 11 ? 1 : 0;
      }
      return num;
    };
    num_eos += count(60.0F);
    num_eos_favoured += count(-60.0F);
    num_tokens += CountUndecided(c.Start().canvas, 0, c.Start().canvas.length());
  }
  EXPECT_EQ(num_eos, 0);
  EXPECT_EQ(num_eos_favoured, num_tokens);
}

// --- Sequences side by side
// --------------------------------------------------------------------------------

std::vector<Case> MixedCases(int num_requests) {
  std::vector<Case> mixed;
  for (const SamplerEntry& entry : SamplerCatalog()) {
    for (Case& c : CasesOf(entry, num_requests)) mixed.push_back(std::move(c));
  }
  return mixed;
}

TEST(SideBySideTest, AnyInterleavingGivesTheBytesOfEachAlone) {
  const std::vector<Case> cases = MixedCases(4);
  const std::unique_ptr<Head> head = CpuHead();
  std::vector<Sequence> alone;
  std::vector<Sequence> together;
  std::vector<StepPlan> plans(cases.size());
  for (const Case& c : cases) {
    alone.push_back(c.Start());
    RunToEnd(alone.back(), *head);
    together.push_back(c.Start());
  }
  std::mt19937 random(17);
  std::vector<size_t> running;
  for (size_t i = 0; i < cases.size(); ++i) {
    if (!together[i].state.finished) running.push_back(i);
  }
  while (!running.empty()) {
    // A few of them plan in one order, are answered, and decide in another: all of this thread's
    // scratch is overwritten in between.
    std::shuffle(running.begin(), running.end(), random);
    const size_t num_now = std::min<size_t>(running.size(), 1 + random() % 6);
    std::vector<size_t> now(running.begin(), running.begin() + num_now);
    std::map<size_t, std::vector<VocabularyAnswer>> answers;
    for (const size_t i : now) PlanStep(together[i], plans[i]);
    std::shuffle(now.begin(), now.end(), random);
    for (const size_t i : now) answers[i] = AnswerStep(together[i], plans[i], *head);
    std::shuffle(now.begin(), now.end(), random);
    for (const size_t i : now) FinishStep(plans[i], answers[i], together[i]);
    running.erase(std::remove_if(running.begin(), running.end(),
                                 [&](size_t i) { return together[i].state.finished; }),
                  running.end());
  }
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(cases[i].name);
    EXPECT_EQ(together[i].canvas.tokens, alone[i].canvas.tokens);
    EXPECT_EQ(together[i].state.step, alone[i].state.step);
    EXPECT_EQ(together[i].state.nfe, alone[i].state.nfe);
  }
}

TEST(SideBySideTest, ThreadsDoNotDisturbEachOther) {
  const std::vector<Case> cases = MixedCases(3);
  std::vector<std::vector<TokenId>> tokens[2];
  const auto run = [&](int thread) {
    const std::unique_ptr<Head> head = ReferenceHead();
    for (size_t i = 0; i < cases.size(); ++i) {
      // From opposite ends, so that different samplers are at work at a time.
      const Case& c = cases[thread == 0 ? i : cases.size() - 1 - i];
      Sequence sequence = c.Start();
      RunToEnd(sequence, *head);
      tokens[thread].push_back(sequence.canvas.tokens);
    }
  };
  std::thread other(run, 1);
  run(0);
  other.join();
  std::reverse(tokens[1].begin(), tokens[1].end());
  EXPECT_EQ(tokens[0], tokens[1]);
}

TEST(SideBySideTest, NothingToFillIsFinishedAtOnce) {
  for (const SamplerEntry& entry : SamplerCatalog()) {
    for (const ModelTraits& model : AllModels()) {
      if (!Fits(entry, model)) continue;
      const Request request = {.ids = {1, 2, 3},
                               .given = {true, true, true},
                               .params = {.sampler = std::string(entry.name)}};
      const Sequence sequence = Begin(request, model, nullptr);
      EXPECT_TRUE(sequence.state.finished) << entry.name;
      EXPECT_EQ(sequence.state.step, 0);
    }
  }
}

}  // namespace
}  // namespace cinnabar
