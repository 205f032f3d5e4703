// Identities between samplers, and between a sampler and a formula: where two rules must come to
// the same, their runs are compared byte by byte. [12.n] is the n-th item of section 12 of the
// sampler sheet (1 schedules, 2 ideal score, 3 remasking, 4 path planning, 5 entropy bound).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/philox.h"
#include "tests/unit/decoding/decoding_harness.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;

constexpr int kNumLayouts = 25;

// Positions transferred in each step that transferred any.
std::vector<std::vector<int32_t>> Trace(const std::vector<StepRecord>& records) {
  std::vector<std::vector<int32_t>> trace;
  for (const StepRecord& record : records) {
    if (record.outcome.transfers.empty()) continue;
    trace.emplace_back();
    for (const Transfer& transfer : record.outcome.transfers) {
      trace.back().push_back(transfer.position);
    }
  }
  return trace;
}

// Random prompts, suffixes and holes; at least one position to fill.
Request Layout(int seed) {
  std::mt19937 random(1000 + seed);
  Request request;
  const int32_t length = 2 + static_cast<int32_t>(random() % 22);
  for (int32_t i = 0; i < length; ++i) {
    request.ids.push_back(static_cast<TokenId>(random() % 15));
    request.given.push_back(seed % 3 == 0 ? i < length / 3 : random() % 3 == 0);
  }
  request.given[length / 2] = false;
  return request;
}

struct Outcome {
  std::vector<TokenId> tokens;
  std::vector<std::vector<int32_t>> trace;
  int32_t nfe = 0;
  bool operator==(const Outcome& other) const {
    return tokens == other.tokens && trace == other.trace;
  }
};
void PrintTo(const Outcome& outcome, std::ostream* out) {
  *out << testing::PrintToString(outcome.tokens) << " by " << testing::PrintToString(outcome.trace);
}

class IdentityTest : public testing::Test {
 protected:
  Outcome Run(Request request, const DecodingParams& params, const ModelTraits& model,
              const Network& network) {
    request.params = params;
    Sequence sequence = Begin(request, model, network);
    Outcome outcome;
    outcome.trace = Trace(RunToEnd(sequence, *head_));
    outcome.tokens = sequence.canvas.tokens;
    outcome.nfe = sequence.state.nfe;
    return outcome;
  }
  Outcome Run(const Request& request, const DecodingParams& params,
              const ModelTraits& model = MaskModel()) {
    return Run(request, params, model, HashNetwork(model, 3.0, 7));
  }
  static int32_t NumMasked(const Request& request) {
    return static_cast<int32_t>(std::count(request.given.begin(), request.given.end(), false));
  }

  std::unique_ptr<Head> head_ = CpuHead();
};

// --- Schedules
// ---------------------------------------------------------------------------------------------

// [12.1] Q3 (Dream) with S = m = 8 and eps 1e-3 transfers 0,1,1,1,1,1,1,2.
TEST_F(IdentityTest, DreamWithAStepForEachMaskTransfersNothingFirst) {
  const Request request = {.ids = std::vector<TokenId>(9, 1),
                           .given = {true, false, false, false, false, false, false, false, false}};
  for (const char* sampler : {"maskgit_plus", "topk_margin", "entropy"}) {
    Sequence sequence = Begin({.ids = request.ids,
                               .given = request.given,
                               .params = {.sampler = sampler, .num_steps = 8}},
                              MaskModel(), HashNetwork(MaskModel(), 3.0, 7));
    std::vector<size_t> transfers;
    for (const StepRecord& record : RunToEnd(sequence, *head_)) {
      transfers.push_back(record.outcome.transfers.size());
    }
    EXPECT_THAT(transfers, ElementsAre(0, 1, 1, 1, 1, 1, 1, 2)) << sampler;
    EXPECT_EQ(sequence.state.nfe, 7) << "a step that transfers nothing needs no pass";
  }
}

// [12.1] Q1 (LLaDA) with m = 10 and S = 4 transfers 3,3,2,2.
TEST_F(IdentityTest, LladaSharesAreEven) {
  Request request = {.ids = std::vector<TokenId>(12, 1), .given = std::vector<bool>(12, false)};
  request.given[0] = request.given[5] = true;
  for (const char* sampler : {"low_confidence", "random"}) {
    const Outcome outcome = Run(request, {.sampler = sampler, .num_steps = 4});
    std::vector<size_t> transfers;
    for (const auto& step : outcome.trace) transfers.push_back(step.size());
    EXPECT_THAT(transfers, ElementsAre(3, 3, 2, 2)) << sampler;
    EXPECT_EQ(outcome.nfe, 4);
  }
}

// [12.1] Q2 (SDAR) is Q1 with m = B: on blocks that are masked throughout, block_static is
// low_confidence, at temperature 0 and at 1 (where the clean and the tempered confidence agree).
TEST_F(IdentityTest, BlockStaticIsLowConfidenceOnWholeBlocks) {
  for (const ModelTraits& model : {MaskModel(), BlockModel()}) {
    for (int32_t num_blocks = 1; num_blocks <= 4; ++num_blocks) {
      for (const int32_t steps_per_block : {1, 2, 3, 4, 6}) {
        for (const float temperature : {0.0F, 1.0F}) {
          Request request = {.ids = std::vector<TokenId>(4 + 4 * num_blocks, 1),
                             .given = std::vector<bool>(4 + 4 * num_blocks, false)};
          std::fill_n(request.given.begin(), 4, true);
          DecodingParams params = {.sampler = "low_confidence",
                                   .num_steps = num_blocks * steps_per_block,
                                   .block_length = 4,
                                   .temperature = temperature,
                                   .seed = 5};
          const Outcome llada = Run(request, params, model);
          params.sampler = "block_static";
          EXPECT_EQ(Run(request, params, model), llada)
              << model.family << ", " << steps_per_block << " steps for each block";
        }
      }
    }
  }
}

// On blocks with given positions the two differ: Q1 counts the masks, Q2 does not.
TEST_F(IdentityTest, BlockStaticIsNotLowConfidenceOnPartlyGivenBlocks) {
  const Request request = {.ids = std::vector<TokenId>(8, 1),
                           .given = {true, true, false, false, false, false, false, false}};
  const Outcome llada = Run(request, {.sampler = "low_confidence", .num_steps = 4}, BlockModel());
  const Outcome sdar = Run(request, {.sampler = "block_static", .num_steps = 4}, BlockModel());
  EXPECT_EQ(llada.trace[0].size(), 1U);
  EXPECT_EQ(sdar.trace[0].size(), 2U);
}

// --- One position at a time
// --------------------------------------------------------------------------------

// A threshold of 1 that no prediction reaches transfers the most confident position in each step:
// low_confidence with a step for each mask. In blocks, too.
TEST_F(IdentityTest, ThresholdOneIsSequentialConfidenceOrder) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const float temperature : {0.0F, 0.8F}) {
      DecodingParams params = {
          .sampler = "threshold", .temperature = temperature, .threshold = 1.0F, .seed = 3};
      const Outcome threshold = Run(request, params);
      const Outcome llada =
          Run(request, {.sampler = "low_confidence", .temperature = temperature, .seed = 3});
      EXPECT_EQ(threshold, llada);
      EXPECT_EQ(threshold.nfe, NumMasked(request));
      params.block_length = 5;
      EXPECT_EQ(Run(request, params), Run(request, {.sampler = "low_confidence",
                                                    .block_length = 5,
                                                    .temperature = temperature,
                                                    .seed = 3}));
    }
  }
}

// A factor close to 0 asks for certainty in every rank: the same, but for the published quirk that
// the last two positions of a block go together.
TEST_F(IdentityTest, FactorNearZeroIsSequentialButForTheLastTwo) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    const Outcome factor = Run(request, {.sampler = "factor", .factor = 1e-6F});
    const int32_t num_masked = NumMasked(request);
    ASSERT_EQ(static_cast<int32_t>(factor.trace.size()), std::max(num_masked - 1, 1));
    for (size_t step = 0; step < factor.trace.size(); ++step) {
      const bool last = step + 1 == factor.trace.size();
      EXPECT_EQ(factor.trace[step].size(), last && num_masked > 1 ? 2U : 1U);
    }
    const Outcome llada = Run(request, {.sampler = "low_confidence"});
    for (size_t step = 0; step + 1 < factor.trace.size(); ++step) {
      EXPECT_EQ(factor.trace[step], llada.trace[step]);
    }
  }
}

// [12.5] Without certain predictions an entropy bound of 0 transfers one position in each step,
// that of the lowest entropy.
TEST_F(IdentityTest, EntropyBoundZeroIsOneInEachStep) {
  const std::unique_ptr<Head> reference = ReferenceHead();
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    Request request = Layout(seed);
    request.params = {.sampler = "entropy_bounded", .entropy_bound = 0.0F};
    Sequence sequence = Begin(request, MaskModel(), HashNetwork(MaskModel(), 3.0, 7));
    int32_t num_steps = 0;
    StepPlan plan;
    while (!sequence.state.finished) {
      PlanStep(sequence, plan);
      const std::vector<VocabularyAnswer> answers = AnswerStep(sequence, plan, *reference);
      size_t lowest = 0;
      for (size_t i = 1; i < answers.size(); ++i) {
        if (answers[i].entropy < answers[lowest].entropy) lowest = i;
      }
      const int32_t position = plan.queries[lowest].position;
      const StepOutcome outcome = FinishStep(plan, answers, sequence);
      ASSERT_EQ(outcome.transfers.size(), 1U);
      EXPECT_EQ(outcome.transfers[0].position, position);
      ++num_steps;
    }
    EXPECT_EQ(num_steps, NumMasked(request));
  }
}

// [12.5] With gamma = 0 all positions of exactly zero entropy and the next one.
TEST_F(IdentityTest, EntropyBoundZeroTakesWhatIsCertainAndTheNext) {
  std::vector<std::vector<float>> rows(6, std::vector<float>(MaskModel().vocab_size, 0.0F));
  for (const int32_t certain : {1, 4}) rows[certain][3] = 1000.0F;
  rows[2][5] = 8.0F;  // the least uncertain of the others
  rows[3][6] = 4.0F;
  const Request request = {.ids = std::vector<TokenId>(6, 1),
                           .given = {true, false, false, false, false, false}};
  const Outcome outcome = Run(request, {.sampler = "entropy_bounded", .entropy_bound = 0.0F},
                              MaskModel(), FixedNetwork(rows));
  EXPECT_THAT(outcome.trace, ElementsAre(ElementsAre(1, 2, 4), ElementsAre(3), ElementsAre(5)));
}

// Left to right, one position at a time: what an autoregressive model does.
TEST_F(IdentityTest, BlockSequentialWithOneEachIsLeftToRight) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    const Outcome outcome = Run(request, {.sampler = "block_sequential"});
    std::vector<std::vector<int32_t>> left_to_right;
    for (size_t i = 0; i < request.given.size(); ++i) {
      if (!request.given[i]) left_to_right.push_back({static_cast<int32_t>(i)});
    }
    EXPECT_EQ(outcome.trace, left_to_right);
    // Blocks of one position leave no sampler another order.
    for (const char* sampler : {"low_confidence",
                                "random",
                                "maskgit_plus",
                                "topk_margin",
                                "entropy",
                                "origin",
                                "threshold",
                                "factor",
                                "entropy_bounded",
                                "block_static",
                                "block_dynamic",
                                "block_sequential",
                                "mdlm_semi_ar",
                                "p2",
                                "p2_random",
                                "p2_open",
                                "rnd1",
                                "rnd1_entropy_bounded",
                                "hierarchical",
                                "bd3lm_first_hitting",
                                "bd3lm_scheduled"}) {
      const Outcome other = Run(request, {.sampler = sampler, .block_length = 1});
      EXPECT_EQ(other.trace, left_to_right) << sampler;
      if (!absl::StrContains(sampler, "semi_ar") && !absl::StartsWith(sampler, "bd3lm")) {
        // Those do not see what follows.
        EXPECT_EQ(other.tokens, outcome.tokens) << sampler;
      }
    }
  }
}

// --- All at once
// -------------------------------------------------------------------------------------------

// One step, a threshold of 0, a factor beyond every rank, an infinite entropy bound [12.5]: the
// argmax everywhere, from one pass.
TEST_F(IdentityTest, EverySamplerCanTransferAllAtOnce) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const float temperature : {0.0F, 1.0F}) {
      const Outcome all =
          Run(request, {.sampler = "low_confidence", .num_steps = 1, .temperature = temperature});
      EXPECT_EQ(all.nfe, 1);
      EXPECT_EQ(all.trace.size(), 1U);
      for (DecodingParams params : std::vector<DecodingParams>{
               {.sampler = "random", .num_steps = 1},
               {.sampler = "origin", .num_steps = 1},
               {.sampler = "maskgit_plus", .num_steps = 1},
               {.sampler = "topk_margin", .num_steps = 1},
               {.sampler = "entropy", .num_steps = 1, .alg_temp = 0.5F},
               {.sampler = "threshold", .threshold = 0.0F},
               {.sampler = "factor", .factor = 1000.0F},
               {.sampler = "entropy_bounded", .entropy_bound = infinity},
               {.sampler = "block_static", .num_steps = 1},
               {.sampler = "block_dynamic", .num_steps = 1},
               {.sampler = "block_dynamic", .threshold = 0.0F},
               {.sampler = "p2", .num_steps = 1},
               {.sampler = "p2_random", .num_steps = 1},
               {.sampler = "p2_open", .num_steps = 1},
               {.sampler = "rnd1", .num_steps = 1},
               {.sampler = "rnd1_entropy_bounded", .entropy_bound = infinity},
               {.sampler = "joint_threshold", .threshold = 0.0F, .edit_steps = 0},
               {.sampler = "hierarchical", .threshold = 0.0F},
               {.sampler = "block_sequential", .num_steps = 1}}) {
        params.temperature = temperature;
        const Outcome outcome = Run(request, params);
        EXPECT_EQ(outcome, all) << params.sampler << " at " << temperature;
        EXPECT_EQ(outcome.nfe, 1) << params.sampler;
      }
    }
  }
}

// --- Knobs at their ends
// -----------------------------------------------------------------------------------

// A probability is never above 1 (the comparison is strict): block_dynamic with a threshold of 1 is
// block_static. Above 1 is refused.
TEST_F(IdentityTest, BlockDynamicBeyondReachIsBlockStatic) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const ModelTraits& model : {MaskModel(), BlockModel()}) {
      for (const float temperature : {0.0F, 0.6F}) {
        DecodingParams params = {.sampler = "block_static",
                                 .block_length = 4,
                                 .temperature = temperature,
                                 .top_p = 0.9F,
                                 .seed = 8};
        const Network network = HashNetwork(model, 9.0, 7, /*text_is_best=*/true);
        const Outcome fixed = Run(request, params, model, network);
        params.sampler = "block_dynamic";
        params.threshold = 1.0F;
        EXPECT_EQ(Run(request, params, model, network), fixed);
      }
    }
  }
  // Certain predictions are not above 1 either.
  std::vector<std::vector<float>> rows(4, std::vector<float>(MaskModel().vocab_size, 0.0F));
  for (auto& row : rows) row[3] = 1000.0F;
  const Request request = {.ids = {1, 1, 1, 1}, .given = {false, false, false, false}};
  const Outcome outcome = Run(request, {.sampler = "block_dynamic", .threshold = 1.0F}, MaskModel(),
                              FixedNetwork(rows));
  EXPECT_THAT(outcome.trace,
              ElementsAre(ElementsAre(0), ElementsAre(1), ElementsAre(2), ElementsAre(3)));
}

// A network that predicts alike everywhere leaves the order to the rule for ties: left to right.
TEST_F(IdentityTest, EqualPositionsGoFromTheLeft) {
  std::vector<float> row(MaskModel().vocab_size, 0.0F);
  row[3] = 1.0F;
  row[6] = 0.5F;
  const std::vector<std::vector<float>> rows(8, row);
  const Request request = {.ids = std::vector<TokenId>(8, 1),
                           .given = {false, false, true, false, false, true, false, false}};
  for (const DecodingParams& params :
       std::vector<DecodingParams>{{.sampler = "low_confidence", .num_steps = 3},
                                   {.sampler = "block_static", .num_steps = 4},
                                   {.sampler = "block_dynamic", .num_steps = 4},
                                   {.sampler = "maskgit_plus", .num_steps = 3},
                                   {.sampler = "topk_margin", .num_steps = 3},
                                   {.sampler = "entropy", .num_steps = 3},
                                   {.sampler = "threshold"},
                                   {.sampler = "entropy_bounded", .entropy_bound = 3.0F},
                                   {.sampler = "factor", .factor = 1.5F}}) {
    const Outcome outcome = Run(request, params, MaskModel(), FixedNetwork(rows));
    std::vector<int32_t> flat;
    for (const auto& step : outcome.trace) flat.insert(flat.end(), step.begin(), step.end());
    EXPECT_THAT(flat, ElementsAre(0, 1, 3, 4, 6, 7)) << params.sampler;
    EXPECT_THAT(outcome.tokens, ElementsAre(3, 3, 1, 3, 3, 1, 3, 3)) << params.sampler;
  }
}

// alg_temp near 0 is the order of confidence itself.
TEST_F(IdentityTest, AlgTempNearZeroIsTheGreedyOrder) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const char* sampler : {"maskgit_plus", "topk_margin", "entropy"}) {
      const DecodingParams greedy = {.sampler = sampler, .num_steps = 6, .seed = 2};
      DecodingParams tempered = greedy;
      tempered.alg_temp = 1e-6F;
      EXPECT_EQ(Run(request, tempered), Run(request, greedy)) << sampler;
    }
  }
}

// A temperature near 0 takes the argmax, and so does any temperature that leaves one id.
TEST_F(IdentityTest, TemperatureNearZeroAndTopKOneTakeTheArgmax) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    const Network network = HashNetwork(MaskModel(), 3.0, 7, /*text_is_best=*/true);
    for (const char* sampler : {"low_confidence", "random", "threshold", "factor"}) {
      EXPECT_EQ(Run(request, {.sampler = sampler, .temperature = 1e-6F}, MaskModel(), network),
                Run(request, {.sampler = sampler}, MaskModel(), network))
          << sampler;
    }
    for (const char* sampler : {"origin", "block_sequential"}) {
      const Outcome greedy = Run(request, {.sampler = sampler}, MaskModel(), network);
      EXPECT_EQ(
          Run(request, {.sampler = sampler, .temperature = 1.3F, .top_k = 1}, MaskModel(), network),
          greedy)
          << sampler;
      EXPECT_EQ(Run(request, {.sampler = sampler, .temperature = 1.3F, .top_p = 1e-6F}, MaskModel(),
                    network),
                greedy)
          << sampler;
    }
  }
}

// Guidance from a network that does not look at the prompt changes nothing.
TEST_F(IdentityTest, GuidanceByTheSamePredictionsIsNone) {
  std::vector<std::vector<float>> rows;
  for (int32_t i = 0; i < 30; ++i) {
    rows.push_back(HashNetwork(MaskModel(), 3.0, 7)({i}, 0, 0.0F));
  }
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const char* sampler : {"low_confidence", "entropy", "threshold", "entropy_bounded"}) {
      const Outcome plain = Run(request, {.sampler = sampler}, MaskModel(), FixedNetwork(rows));
      EXPECT_EQ(
          Run(request, {.sampler = sampler, .cfg_scale = 1.5F}, MaskModel(), FixedNetwork(rows)),
          plain)
          << sampler;
    }
  }
}

// --- Noise processes
// ---------------------------------------------------------------------------------------

// mdlm_cached is mdlm_ancestral without the passes of steps that unmask nothing.
TEST_F(IdentityTest, MdlmCachedIsAncestralWithFewerPasses) {
  int32_t passes_saved = 0;
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const float temperature : {0.0F, 1.0F}) {
      DecodingParams params = {.sampler = "mdlm_ancestral",
                               .num_steps = 30,
                               .temperature = temperature,
                               .seed = static_cast<uint64_t>(seed)};
      const Outcome ancestral = Run(request, params);
      params.sampler = "mdlm_cached";
      const Outcome cached = Run(request, params);
      EXPECT_EQ(cached, ancestral);
      EXPECT_EQ(cached.nfe, static_cast<int32_t>(cached.trace.size()));
      EXPECT_LE(cached.nfe, NumMasked(request)) << "each pass unmasks something";
      passes_saved += ancestral.nfe - cached.nfe;
    }
  }
  EXPECT_GT(passes_saved, 0);
}

// [12.3] Without remasking ReMDM is MDLM: with sigma 0 the same positions at the same steps.
TEST_F(IdentityTest, RemdmThatNeverMasksAgainIsMdlm) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const float temperature : {0.0F, 1.0F}) {
      DecodingParams params = {
          .sampler = "mdlm_cached", .num_steps = 9, .temperature = temperature, .seed = 21};
      const Outcome mdlm = Run(request, params);
      params.eta = 0.0F;
      for (const char* sampler : {"remdm_cap", "remdm_rescale"}) {
        params.sampler = sampler;
        const Outcome remdm = Run(request, params);
        EXPECT_EQ(remdm, mdlm) << sampler;
        EXPECT_EQ(remdm.nfe, mdlm.nfe) << sampler;
      }
    }
  }
}

// A larger eta masks more again; 0 nothing.
TEST_F(IdentityTest, MoreEtaMasksMoreAgain) {
  for (const char* sampler : {"remdm_cap", "remdm_rescale", "remdm_loop"}) {
    std::vector<int> num_masked_again;
    for (const float eta : {0.0F, 0.1F, 0.4F}) {
      num_masked_again.push_back(0);
      for (int seed = 0; seed < kNumLayouts; ++seed) {
        Request request = Layout(seed);
        request.params = {.sampler = sampler, .num_steps = 20, .temperature = 1.0F, .eta = eta};
        Sequence sequence = Begin(request, MaskModel(), HashNetwork(MaskModel(), 3.0, 7));
        for (const StepRecord& record : RunToEnd(sequence, *head_)) {
          for (const Transfer& transfer : record.outcome.transfers) {
            num_masked_again.back() += transfer.token == kMaskedAgain ? 1 : 0;
          }
        }
      }
    }
    EXPECT_EQ(num_masked_again[0], 0) << sampler;
    EXPECT_GT(num_masked_again[1], 20) << sampler;
    EXPECT_GT(num_masked_again[2], num_masked_again[1]) << sampler;
  }
}

// --- Path planning, RND1, LLaDA2.1, dInfer
// ------------------------------------------------------------------------------------

int NumMaskedAgain(const std::vector<StepRecord>& records) {
  int num = 0;
  for (const StepRecord& record : records) {
    for (const Transfer& transfer : record.outcome.transfers) {
      num += transfer.token == kMaskedAgain ? 1 : 0;
    }
  }
  return num;
}

// [12.4] With eta 0 nothing that was committed is masked again, so that with a step for each
// position path planning is the order of confidence, or a random one.
TEST_F(IdentityTest, PathPlanningWithoutRemasking) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const float temperature : {0.0F, 1.0F}) {
      for (const auto& [p2, plain] :
           {std::pair{"p2", "low_confidence"}, std::pair{"p2_random", "random"}}) {
        const Outcome want =
            Run(request, {.sampler = plain, .temperature = temperature, .seed = 9});
        EXPECT_EQ(Run(request, {.sampler = p2, .temperature = temperature, .eta = 0.0F, .seed = 9}),
                  want)
            << p2;
      }
    }
    for (const int32_t num_steps : {2, 3, 7}) {
      Request planned = request;
      planned.params = {.sampler = "p2", .num_steps = num_steps, .eta = 0.0F};
      Sequence sequence = Begin(planned, MaskModel(), HashNetwork(MaskModel(), 3.0, 7));
      EXPECT_EQ(NumMaskedAgain(RunToEnd(sequence, *head_)), 0);
    }
  }
}

// After step i of S floor(N (1 - i / S)) positions are masked, however often they change.
TEST_F(IdentityTest, PathPlanningKeepsToItsSchedule) {
  int num_masked_again = 0;
  for (const char* sampler : {"p2", "p2_random", "p2_open"}) {
    for (int seed = 0; seed < kNumLayouts; ++seed) {
      for (const int32_t num_steps : {1, 3, 8, 40}) {
        Request request = Layout(seed);
        request.params = {.sampler = sampler, .num_steps = num_steps};
        if (request.params.sampler != "p2_open") request.params.eta = 1.5F;
        Sequence sequence = Begin(request, MaskModel(), HashNetwork(MaskModel(), 3.0, 7));
        const int32_t num_masked = NumMasked(request);
        for (int32_t step = 1; !sequence.state.finished; ++step) {
          num_masked_again += NumMaskedAgain(RunToEnd(sequence, *head_, 1));
          ASSERT_EQ(CountUndecided(sequence.canvas, 0, sequence.canvas.length()),
                    num_masked * (num_steps - std::min(step, num_steps)) / num_steps);
        }
        EXPECT_LE(sequence.state.step, num_steps);
      }
    }
  }
  EXPECT_GT(num_masked_again, 500);
}

// One position at a time: by entropy, and (a bound of 0) by confidence.
TEST_F(IdentityTest, Rnd1OneAtATime) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    EXPECT_EQ(Run(request, {.sampler = "rnd1"}),
              Run(request, {.sampler = "entropy_bounded", .entropy_bound = 0.0F}));
    EXPECT_EQ(Run(request, {.sampler = "rnd1_entropy_bounded", .entropy_bound = 0.0F}),
              Run(request, {.sampler = "low_confidence"}));
  }
}

// When nothing is edited, joint_threshold is block_dynamic with a quota of one.
TEST_F(IdentityTest, JointThresholdWithoutEditsIsBlockDynamic) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const ModelTraits& model : {MaskModel(), BlockModel()}) {
      for (const float threshold : {0.2F, 0.5F}) {
        const Network network = HashNetwork(model, 5.0, 7);
        const Outcome dynamic =
            Run(request, {.sampler = "block_dynamic", .block_length = 4, .threshold = threshold},
                model, network);
        const Outcome joint = Run(request,
                                  {.sampler = "joint_threshold",
                                   .block_length = 4,
                                   .threshold = threshold,
                                   .edit_threshold = 1.0F,
                                   .edit_steps = 0},
                                  model, network);
        EXPECT_EQ(joint, dynamic);
        EXPECT_EQ(joint.nfe, dynamic.nfe);
      }
    }
  }
}

// A network that does not change its mind edits nothing: one more look at each block, and its end.
TEST_F(IdentityTest, JointThresholdLooksAgainUntilNothingChanges) {
  std::vector<std::vector<float>> rows(9, std::vector<float>(MaskModel().vocab_size, 0.0F));
  for (size_t i = 0; i < rows.size(); ++i) rows[i][5 + i % 3] = 9.0F;
  const Request request = {.ids = std::vector<TokenId>(9, 1),
                           .given = {true, false, false, false, false, false, false, false, false}};
  const DecodingParams params = {
      .sampler = "joint_threshold", .block_length = 4, .threshold = 0.5F, .edit_threshold = 0.0F};
  EXPECT_EQ(Run(request, params, MaskModel(), FixedNetwork(rows)).nfe, 4);
  // One that is never content is looked at until the budget is spent.
  const Network restless = [](absl::Span<const TokenId> tokens, int32_t position, float) {
    std::vector<float> row(MaskModel().vocab_size, 0.0F);
    row[tokens[position] == 5 ? 6 : 5] = 9.0F;
    return row;
  };
  for (const int32_t edit_steps : {0, 1, 5}) {
    DecodingParams budget = params;
    budget.edit_steps = edit_steps;
    EXPECT_EQ(Run(request, budget, MaskModel(), restless).nfe, 2 * (1 + edit_steps));
  }
}

// The penalty is on the token to the left, as it stands before the step, inside the block.
TEST_F(IdentityTest, ARepeatedTokenIsPenalised) {
  std::vector<std::vector<float>> rows(4, std::vector<float>(MaskModel().vocab_size, 0.0F));
  for (auto& row : rows) row[5] = 4.0F;
  for (auto& row : rows) row[6] = 3.0F;
  const Request request = {.ids = {5, 1, 1, 1}, .given = {true, false, false, false}};
  DecodingParams params = {
      .sampler = "joint_threshold", .threshold = 0.0F, .edit_threshold = 1.0F, .edit_steps = 0};
  EXPECT_THAT(Run(request, params, MaskModel(), FixedNetwork(rows)).tokens,
              ElementsAre(5, 5, 5, 5));
  params.repeat_penalty = 2.0F;
  // The block begins behind the given token, and masks stand to the left of the others.
  EXPECT_THAT(Run(request, params, MaskModel(), FixedNetwork(rows)).tokens,
              ElementsAre(5, 5, 5, 5));
  EXPECT_THAT(Run(request, params, BlockModel(), FixedNetwork(rows)).tokens,
              ElementsAre(5, 6, 5, 5));
}

// Where no run may speak for itself, hierarchical is threshold; where all may and none is sure, one
// of each run is taken.
TEST_F(IdentityTest, HierarchicalBetweenThresholdAndHalving) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const float threshold : {0.3F, 0.9F}) {
      EXPECT_EQ(
          Run(request, {.sampler = "hierarchical", .threshold = threshold, .low_threshold = 1.0F}),
          Run(request, {.sampler = "threshold", .threshold = threshold}));
    }
  }
  const int32_t length = 32;
  Request request = {.ids = std::vector<TokenId>(length, 1),
                     .given = std::vector<bool>(length, false)};
  request.given[0] = true;
  std::vector<std::vector<float>> rows(length, std::vector<float>(MaskModel().vocab_size, 0.0F));
  for (int32_t i = 0; i < length; ++i) {  // the middle of every run is its best
    for (int32_t power = 1; power < length; power *= 2) {
      rows[i][5] += i % power == 0 ? 0.1F : 0.0F;
    }
  }
  for (const char* sampler : {"hierarchical", "hierarchical_remask"}) {
    const Outcome halving =
        Run(request, {.sampler = sampler, .threshold = 1.0F, .low_threshold = 0.0F}, MaskModel(),
            FixedNetwork(rows));
    std::vector<size_t> sizes;
    for (const auto& step : halving.trace) sizes.push_back(step.size());
    EXPECT_THAT(sizes, ElementsAre(1, 2, 4, 8, 16)) << sampler;
  }
}

// A model that never changes its mind: credits raise its best tokens, so that a threshold is
// reached in fewer steps and never in more, by the same tokens.
TEST_F(IdentityTest, CreditReachesTheThresholdSooner) {
  std::vector<std::vector<float>> rows(24, std::vector<float>(MaskModel().vocab_size, 0.0F));
  for (size_t i = 0; i < rows.size(); ++i)
    rows[i][1 + i % 3] = 2.0F + 0.05F * static_cast<float>(i);
  int num_faster = 0;
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    const Request request = Layout(seed);
    for (const float threshold : {0.4F, 0.6F, 0.8F}) {
      DecodingParams params = {.sampler = "threshold", .threshold = threshold};
      const Outcome plain = Run(request, params, MaskModel(), FixedNetwork(rows));
      params.sampler = "credit";
      const Outcome credit = Run(request, params, MaskModel(), FixedNetwork(rows));
      EXPECT_EQ(credit.tokens, plain.tokens);
      EXPECT_LE(credit.nfe, plain.nfe);
      num_faster += credit.nfe < plain.nfe ? 1 : 0;
    }
  }
  EXPECT_GT(num_faster, 20);
}

// What is predicted with too little confidence is masked again, but every step gains a position.
TEST_F(IdentityTest, HierarchicalRemaskAlwaysGains) {
  int num_masked_again = 0;
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    Request request = Layout(seed);
    request.params = {.sampler = "hierarchical_remask", .threshold = 0.8F, .low_threshold = 0.35F};
    Sequence sequence = Begin(request, MaskModel(), HashNetwork(MaskModel(), 4.0, 7));
    int32_t left = NumMasked(request);
    while (!sequence.state.finished) {
      num_masked_again += NumMaskedAgain(RunToEnd(sequence, *head_, 1));
      const int32_t now = CountUndecided(sequence.canvas, 0, sequence.canvas.length());
      ASSERT_LT(now, left);
      left = now;
    }
  }
  EXPECT_GT(num_masked_again, 20);
}

// One block that ends the sequence: mdlm_semi_ar is mdlm_cached.
TEST_F(IdentityTest, MdlmSemiArOfOneBlockIsCached) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    Request request = Layout(seed);
    request.given.back() = false;
    for (const float temperature : {0.0F, 1.0F}) {
      DecodingParams params = {
          .sampler = "mdlm_cached", .num_steps = 9, .temperature = temperature};
      const Outcome cached = Run(request, params);
      params.sampler = "mdlm_semi_ar";
      EXPECT_EQ(Run(request, params), cached);
    }
  }
}

// A block of mdlm_semi_ar is that of the shorter sequence that ends with it.
TEST_F(IdentityTest, MdlmSemiArDoesNotSeeLaterBlocks) {
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    Request longer = {.ids = std::vector<TokenId>(17, 6), .given = std::vector<bool>(17, false)};
    longer.given[0] = longer.given[3] = longer.given[10] = longer.given[16] = true;
    Request shorter = {.ids = {6, 6, 6, 6, 6, 6, 6}, .given = longer.given};
    shorter.given.resize(7);
    DecodingParams params = {
        .sampler = "mdlm_semi_ar",
        .num_steps = 15,  // the canvas is 1 .. 16: three blocks of 6, 5 steps each
        .block_length = 6,
        .temperature = 1.0F,
        .seed = static_cast<uint64_t>(seed)};
    const std::vector<TokenId> all = Run(longer, params).tokens;
    params.num_steps = 5;
    const std::vector<TokenId> first = Run(shorter, params).tokens;
    EXPECT_EQ(std::vector<TokenId>(all.begin(), all.begin() + 7), first);
    // And a given position behind the open block does not matter.
    longer.ids[16] = 2;
    params.num_steps = 15;
    const std::vector<TokenId> other = Run(longer, params).tokens;
    EXPECT_EQ(std::vector<TokenId>(other.begin(), other.begin() + 13),
              std::vector<TokenId>(all.begin(), all.begin() + 13));
  }
}

// [12.2] The analytic SEDD step with the ideal score p[y] / expm1(sigma) is the posterior of MDLM.
// The numbers of the sheet: p = (.5, .3, .2), t = .7 -> .6.
TEST_F(IdentityTest, TheIdealScoreGivesTheMdlmPosteriorInNumbers) {
  const ModelTraits model = AbsorbModel();
  const double sigma = SigmaAt(model, 0.7);
  const double scale =
      std::expm1(sigma - SigmaAt(model, 0.6));  // the weight of a move is scale * score
  const double p[] = {0.5, 0.3, 0.2};
  const double want[] = {0.071429, 0.042857, 0.028571};
  double sum_of_scores = 0;
  for (int y = 0; y < 3; ++y) {
    const double score = p[y] / std::expm1(sigma);
    sum_of_scores += score;
    EXPECT_NEAR(scale * score, want[y], 5e-7);
    EXPECT_NEAR(scale * score, p[y] * (0.1 / 0.7), 1e-12);
  }
  EXPECT_NEAR(1 - scale * sum_of_scores, 0.857143, 5e-7);
  EXPECT_NEAR(1 - scale * sum_of_scores, 0.6 / 0.7, 1e-12);
  // As the sheet has it: staggered score times transition, not normalised, sums to 1.
  const double d = sigma - SigmaAt(model, 0.6);
  double sum = 0;
  for (int y = 0; y < 3; ++y) {
    sum += std::exp(d) * p[y] / std::expm1(sigma) * (1 - std::exp(-d));
  }
  const double all_scores = sum_of_scores + 1;  // with the mask's own, 1
  sum += std::exp(d) + (1 - std::exp(d)) * all_scores;
  EXPECT_NEAR(sum, 1, 1e-12);
}

// [12.2] The same in whole runs: both draw the move and the token from the same noise, so that with
// ideal scores every step before the closing one is MDLM's, byte by byte.
TEST_F(IdentityTest, SeddAnalyticWithTheIdealScoreIsMdlm) {
  ModelTraits absorb = AbsorbModel();
  ModelTraits mask = absorb;
  mask.parameterization = Parameterization::kMaskPrediction;
  const Network logits = HashNetwork(mask, 3.0, 21);
  const auto predictions = [&](absl::Span<const TokenId> tokens, int32_t position) {
    std::vector<float> row = logits(tokens, position, 0.0F);  // whatever sigma
    double mass = 0;
    for (TokenId id = 0; id < mask.vocab_size; ++id) {
      if (id != mask.mask_token) mass += std::exp(static_cast<double>(row[id]));
    }
    for (float& logit : row) logit = static_cast<float>(logit - std::log(mass));
    return row;
  };
  const Network network = [&](absl::Span<const TokenId> tokens, int32_t position, float) {
    return predictions(tokens, position);
  };
  const Network ideal_score = [&](absl::Span<const TokenId> tokens, int32_t position, float sigma) {
    std::vector<float> row = predictions(tokens, position);
    const double shift = std::log(std::expm1(static_cast<double>(sigma)));
    for (float& logit : row) logit = static_cast<float>(logit - shift);
    row[mask.mask_token] = 0;
    return row;
  };
  int num_transfers = 0;
  for (int seed = 0; seed < 40; ++seed) {
    Request request = Layout(seed);
    for (TokenId& id : request.ids) id %= 12;
    request.params = {.sampler = "mdlm_ancestral",
                      .num_steps = 8,
                      .temperature = 1.0F,
                      .seed = static_cast<uint64_t>(seed)};
    Sequence mdlm = Begin(request, mask, network);
    request.params.sampler = "sedd_analytic";
    Sequence sedd = Begin(request, absorb, ideal_score);
    for (int step = 0; step < 8 && !mdlm.state.finished; ++step) {
      const std::vector<StepRecord> a = RunToEnd(mdlm, *head_, 1);
      RunToEnd(sedd, *head_, 1);
      ASSERT_EQ(sedd.canvas.tokens, mdlm.canvas.tokens) << "seed " << seed << " step " << step;
      num_transfers += static_cast<int>(a[0].outcome.transfers.size());
    }
    EXPECT_EQ(sedd.state.finished, mdlm.state.finished);
  }
  EXPECT_GT(num_transfers, 200);
}

// With log-linear noise 1 - e^-sigma is linear in time, so that on the absorbing graph Euler's
// weight of a move, dt * rate(t), is the analytic expm1(sigma(t) - sigma(t - dt)): the same runs.
TEST_F(IdentityTest, EulerIsAnalyticForLogLinearAbsorption) {
  const ModelTraits model = AbsorbModel();
  for (const double t : {1.0, 0.7, 0.2}) {
    for (const double dt : {0.2, 1e-3}) {
      EXPECT_NEAR(
          dt * SigmaRateAt(model, t) / std::expm1(SigmaAt(model, t) - SigmaAt(model, t - dt)), 1,
          1e-9);
    }
  }
  for (int seed = 0; seed < kNumLayouts; ++seed) {
    Request request = Layout(seed);
    for (TokenId& id : request.ids) id %= 12;
    DecodingParams params = {.sampler = "sedd_euler", .num_steps = 7, .seed = 11};
    const Outcome euler = Run(request, params, model);
    params.sampler = "sedd_analytic";
    EXPECT_EQ(Run(request, params, model), euler);
  }
}

// With other noise it is the first order of it.
TEST_F(IdentityTest, EulerIsTheFirstOrderOfTheAnalyticStep) {
  ModelTraits model = AbsorbModel();
  model.sigma_min = 1e-4F;
  model.sigma_max = 20.0F;
  const double growth = std::log(2e5);  // sigma' / sigma
  for (const double t : {0.9, 0.5, 0.1}) {
    for (const double dt : {1e-3, 1e-4, 1e-5}) {
      const double analytic = std::expm1(SigmaAt(model, t) - SigmaAt(model, t - dt));
      const double euler = dt * SigmaRateAt(model, t);
      // The next terms: dt / 2 of (sigma'' - sigma'^2) / sigma'.
      EXPECT_NEAR(analytic / euler, 1, dt * growth * (1 + SigmaAt(model, t)));
    }
  }
}

// Score models draw from the scores: temperature 0 and 1 are the same to them.
TEST_F(IdentityTest, ScoreSamplersHaveNoTemperature) {
  for (const ModelTraits& model : {AbsorbModel(), UniformModel()}) {
    for (const char* sampler : {"sedd_euler", "sedd_analytic"}) {
      for (int seed = 0; seed < 5; ++seed) {
        Request request = Layout(seed);
        for (TokenId& id : request.ids) id %= 12;
        const DecodingParams params = {.sampler = sampler, .num_steps = 6, .seed = 4};
        DecodingParams warm = params;
        warm.temperature = 1.0F;
        EXPECT_EQ(Run(request, warm, model), Run(request, params, model)) << sampler;
      }
    }
  }
}

}  // namespace
}  // namespace cinnabar
