// The canvas: what is accepted, where blocks lie, and how a step's outcome is written.
#include "worker/decoding/canvas.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/unit/decoding/decoding_harness.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr TokenId kMask = 17;  // of MaskModel()

Canvas CanvasOf(const std::string& pattern, const ModelTraits& model) {
  // 'g' is given, '.' undecided.
  std::vector<bool> given;
  for (const char c : pattern) given.push_back(c == 'g');
  return *MakeCanvas(std::vector<TokenId>(pattern.size(), 1), given, model, {.seed = 5});
}

std::vector<std::pair<int32_t, int32_t>> Blocks(const std::string& pattern,
                                                const ModelTraits& model, int32_t block_length) {
  const Canvas canvas = CanvasOf(pattern, model);
  std::vector<std::pair<int32_t, int32_t>> blocks;
  for (int32_t i = 0; i < NumBlocks(canvas, model, block_length); ++i) {
    const BlockRange block = BlockAt(canvas, model, block_length, i);
    blocks.emplace_back(block.begin, block.end);
  }
  return blocks;
}

TEST(MakeCanvasTest, UndecidedPositionsBecomeTheMaskToken) {
  const Canvas canvas = *MakeCanvas({3, 99, -7, 5, kMask}, {true, false, false, true, false},
                                    MaskModel(), {.seed = 1});
  EXPECT_THAT(canvas.tokens, ElementsAre(3, kMask, kMask, 5, kMask));
  using enum PositionState;
  EXPECT_THAT(canvas.states, ElementsAre(kGiven, kMasked, kMasked, kGiven, kMasked));
  EXPECT_EQ(canvas.begin, 1);
  EXPECT_EQ(canvas.end, 5);
  EXPECT_EQ(CountUndecided(canvas, 0, 5), 3);
  EXPECT_EQ(CountUndecided(canvas, 2, 4), 1);
  EXPECT_EQ(CountUndecided(canvas, 2, 2), 0);
}

TEST(MakeCanvasTest, AllGivenIsAnEmptyCanvas) {
  const Canvas canvas = CanvasOf("ggg", MaskModel());
  EXPECT_EQ(canvas.begin, canvas.end);
  EXPECT_EQ(NumBlocks(canvas, MaskModel(), 2), 0);
  EXPECT_TRUE(BeginDecoding(canvas, {.block_length = 2}, MaskModel()).finished);
}

TEST(MakeCanvasTest, WithoutAMaskTokenUndecidedPositionsHoldNoise) {
  const ModelTraits model = UniformModel();
  std::vector<int64_t> counts(model.vocab_size);
  for (uint64_t seed = 0; seed < 400; ++seed) {
    const std::vector<bool> given = {true, false, false, true, false};
    const Canvas canvas = *MakeCanvas({3, 99, -7, 5, 0}, given, model, {.seed = seed});
    EXPECT_EQ(canvas.tokens[0], 3);
    EXPECT_EQ(canvas.tokens[3], 5);
    for (const int32_t i : {1, 2, 4}) {
      EXPECT_EQ(canvas.states[i], PositionState::kNoise);
      ASSERT_TRUE(canvas.tokens[i] >= 0 && canvas.tokens[i] < model.vocab_size);
      ++counts[canvas.tokens[i]];
    }
    EXPECT_EQ(canvas.tokens, MakeCanvas({3, 1, 1, 5, 1}, given, model, {.seed = seed})->tokens);
  }
  // 1200 uniform draws over 13 ids: 92 each, and 5 deviations of 9.2 to either side.
  for (const int64_t count : counts) EXPECT_TRUE(count > 46 && count < 138) << count;
}

TEST(MakeCanvasTest, NoiseIsWhatMayBePicked) {
  const ModelTraits model = UniformModel();
  const std::vector<bool> given(40, false);
  const std::vector<TokenId> ids(40, 1);
  const auto noise = [&](const DecodingParams& params) {
    return MakeCanvas(ids, given, model, params)->tokens;
  };
  std::set<TokenId> seen;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    for (const TokenId id : noise({.forbidden_ids = {0, 3, 12}, .pickable_ids = 7, .seed = seed})) {
      seen.insert(id);
    }
  }
  EXPECT_THAT(seen, ElementsAre(1, 2, 4, 5, 6));
  // Positions that would hold an allowed id anyway keep it.
  const std::vector<TokenId> plain = noise({.seed = 9});
  const std::vector<TokenId> without = noise({.forbidden_ids = {3}, .seed = 9});
  for (size_t i = 0; i < plain.size(); ++i) {
    if (plain[i] != 3) {
      EXPECT_EQ(without[i], plain[i]);
    } else {
      EXPECT_NE(without[i], 3);
    }
  }
  EXPECT_THAT(plain, testing::Contains(3));
  EXPECT_EQ(noise({.pickable_ids = 100, .seed = 9}), plain);
  // Nothing is left to draw: it ends all the same.
  EXPECT_EQ(noise({.forbidden_ids = {0, 1}, .pickable_ids = 2}).size(), 40U);
}

TEST(MakeCanvasTest, RefusesWhatCannotBeDecoded) {
  const auto message = [](const std::vector<TokenId>& ids, const std::vector<bool>& given) {
    const absl::Status status = MakeCanvas(ids, given, MaskModel(), {}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message({1, 2}, {true}), HasSubstr("2 ids, but 1 marks"));
  EXPECT_THAT(message({}, {}), HasSubstr("empty"));
  EXPECT_THAT(message({1, 23}, {true, true}), HasSubstr("ids[1] = 23"));
  EXPECT_THAT(message({-1, 2}, {true, false}), HasSubstr("ids[0] = -1"));
  EXPECT_THAT(message({1, kMask}, {true, true}), HasSubstr("ids[1] is the mask token"));
  EXPECT_THAT(message(std::vector<TokenId>(97), std::vector<bool>(97)), HasSubstr("takes 96"));
  EXPECT_TRUE(MakeCanvas(std::vector<TokenId>(96), std::vector<bool>(96), MaskModel(), {}).ok());
}

TEST(BlocksTest, FullAttentionCountsFromTheFirstUndecidedPosition) {
  using Ranges = std::vector<std::pair<int32_t, int32_t>>;
  const ModelTraits model = MaskModel();
  EXPECT_EQ(Blocks("ggg......", model, 3), (Ranges{{3, 6}, {6, 9}}));
  EXPECT_EQ(Blocks("ggg.......", model, 3), (Ranges{{3, 6}, {6, 9}, {9, 10}}));
  EXPECT_EQ(Blocks("gg.g..g..ggg", model, 4), (Ranges{{2, 6}, {6, 9}}));
  EXPECT_EQ(Blocks("gg.g..g..ggg", model, 0), (Ranges{{2, 9}}));
  EXPECT_EQ(Blocks("g..", model, 50), (Ranges{{1, 3}}));
  EXPECT_EQ(Blocks(".", model, 1), (Ranges{{0, 1}}));
}

TEST(BlocksTest, BlockCausalOnesAreAbsoluteMultiples) {
  using Ranges = std::vector<std::pair<int32_t, int32_t>>;
  const ModelTraits model = BlockModel();  // blocks of 4
  EXPECT_EQ(Blocks("gg......", model, 4), (Ranges{{0, 4}, {4, 8}}));
  EXPECT_EQ(Blocks("gggg....", model, 4), (Ranges{{4, 8}}));
  EXPECT_EQ(Blocks("ggggg.gggggg", model, 4), (Ranges{{4, 8}}));
  EXPECT_EQ(Blocks("ggg.....g", model, 4), (Ranges{{0, 4}, {4, 8}}));
  EXPECT_EQ(Blocks("ggg......g", model, 4), (Ranges{{0, 4}, {4, 8}, {8, 10}}));  // to the end
  EXPECT_EQ(Blocks("gg...", model, 4), (Ranges{{0, 4}, {4, 5}}));
}

TEST(BlocksTest, TheyCoverTheCanvasOnceAndEndWithAnEmptyOne) {
  for (const ModelTraits& model : {MaskModel(), BlockModel()}) {
    for (int32_t begin = 0; begin < 11; ++begin) {
      for (int32_t end = begin + 1; end <= 12; ++end) {
        std::string pattern(13, 'g');
        for (int32_t i = begin; i < end; ++i) pattern[i] = '.';
        const Canvas canvas = CanvasOf(pattern, model);
        for (int32_t block_length = 0; block_length < 7; ++block_length) {
          SCOPED_TRACE(absl::StrCat(model.family, " ", pattern, " by ", block_length));
          const auto blocks = Blocks(pattern, model, block_length);
          ASSERT_FALSE(blocks.empty());
          EXPECT_LE(blocks.front().first, begin);
          EXPECT_GE(blocks.back().second, end);
          EXPECT_LT(blocks.back().first, end);
          for (size_t i = 1; i < blocks.size(); ++i) {
            EXPECT_EQ(blocks[i].first, blocks[i - 1].second);
          }
          const int32_t num_blocks = static_cast<int32_t>(blocks.size());
          for (const int32_t beyond : {num_blocks, num_blocks + 1, 1 << 30}) {
            const BlockRange after = BlockAt(canvas, model, block_length, beyond);
            EXPECT_EQ(after.begin, after.end);
          }
        }
      }
    }
  }
}

TEST(BeginDecodingTest, PassesOverBlocksWithNothingToFill) {
  const ModelTraits model = MaskModel();
  const DecodingParams params = {.block_length = 2};
  Canvas canvas = CanvasOf("g.ggg.g..", model);  // blocks 1-3, 3-5 (all given), 5-7, 7-9
  DecodingState state = BeginDecoding(canvas, params, model);
  EXPECT_EQ(state.block_index, 0);
  EXPECT_EQ(state.block_masks, 1);
  EXPECT_FALSE(state.finished);
  ApplyOutcome({.transfers = {{.position = 1, .token = 2}}}, /*forward=*/true, params, model,
               canvas, state);
  EXPECT_EQ(state.block_index, 2);
  EXPECT_EQ(state.block_masks, 1);
  EXPECT_EQ(state.block_step, 0);
  EXPECT_EQ(state.step, 1);
  EXPECT_EQ(state.nfe, 1);
  ApplyOutcome({}, /*forward=*/false, params, model, canvas, state);  // a step without transfers
  EXPECT_EQ(state.block_step, 1);
  EXPECT_EQ(state.step, 2);
  EXPECT_EQ(state.nfe, 1);
  ApplyOutcome({.transfers = {{.position = 5, .token = 3}}}, true, params, model, canvas, state);
  EXPECT_EQ(state.block_index, 3);
  EXPECT_EQ(state.block_masks, 2);
  ApplyOutcome({.transfers = {{.position = 8, .token = 0}}}, true, params, model, canvas, state);
  EXPECT_FALSE(state.finished);
  EXPECT_EQ(state.block_masks, 2);  // as they were when the block was opened
  ApplyOutcome({.transfers = {{.position = 7, .token = 0}}}, true, params, model, canvas, state);
  EXPECT_TRUE(state.finished);
  EXPECT_EQ(state.step, 5);
  EXPECT_EQ(state.nfe, 4);
  EXPECT_THAT(canvas.tokens, ElementsAre(1, 2, 1, 1, 1, 3, 1, 0, 0));
  EXPECT_EQ(CountUndecided(canvas, 0, 9), 0);
}

TEST(ApplyOutcomeTest, NoiseStaysUndecidedUntilItIsSettled) {
  const ModelTraits model = UniformModel();
  Canvas canvas = CanvasOf("g..g", model);
  DecodingState state = BeginDecoding(canvas, {}, model);
  const TokenId untouched = canvas.tokens[2];
  ApplyOutcome({.transfers = {{.position = 1, .token = 9}}}, true, {}, model, canvas, state);
  EXPECT_EQ(canvas.tokens[1], 9);
  EXPECT_EQ(CountUndecided(canvas, 0, 4), 2);
  ApplyOutcome({.transfers = {{.position = 1, .token = 4}}, .settled = true}, true, {}, model,
               canvas, state);
  EXPECT_TRUE(state.finished);
  EXPECT_THAT(canvas.tokens, ElementsAre(1, 4, untouched, 1));
  EXPECT_EQ(canvas.states[1], PositionState::kCommitted);
  EXPECT_EQ(canvas.states[2], PositionState::kCommitted);
  EXPECT_EQ(canvas.states[3], PositionState::kGiven);
}

TEST(ApplyOutcomeTest, WhatIsRevisedIsFinalWhenItsBlockIsLeft) {
  const ModelTraits model = MaskModel();
  const DecodingParams params = {.sampler = "remdm_conf", .block_length = 2};
  Canvas canvas = CanvasOf("g.g..", model);  // blocks 1-3 and 3-5
  DecodingState state = BeginDecoding(canvas, params, model);
  const auto final_end = [&] { return FinalEnd(canvas, state, params, model); };
  const auto apply = [&](std::vector<Transfer> transfers, bool stays_open) {
    ApplyOutcome({.transfers = std::move(transfers), .stays_open = stays_open}, true, params, model,
                 canvas, state);
  };
  EXPECT_EQ(final_end(), 1);
  apply({{.position = 1, .token = 4, .confidence = 0.5F}}, /*stays_open=*/true);
  EXPECT_EQ(state.block_index, 0);
  EXPECT_EQ(state.block_edits, 0);
  EXPECT_EQ(state.confidences[1], 0.5F);
  EXPECT_EQ(final_end(), 1) << "it may change";
  EXPECT_EQ(FindEndOfText(canvas, state, params, model), canvas.end)
      << "4 is an EOS, but not final";
  apply({{.position = 1, .token = kMaskedAgain}}, true);
  EXPECT_EQ(canvas.tokens[1], kMask);
  EXPECT_EQ(canvas.states[1], PositionState::kMasked);
  EXPECT_EQ(state.confidences[1], 0);
  EXPECT_EQ(state.block_edits, 1);
  apply({{.position = 1, .token = 4}}, true);
  apply({{.position = 1, .token = 5}}, true);
  EXPECT_EQ(canvas.tokens[1], 5);
  EXPECT_EQ(state.block_edits, 2);
  apply({{.position = 1, .token = 11}}, false);
  EXPECT_EQ(state.block_index, 1);
  EXPECT_EQ(state.block_edits, 0);
  EXPECT_EQ(final_end(), 3);
  EXPECT_EQ(FindEndOfText(canvas, state, params, model), 1);
  apply({{.position = 3, .token = 1}, {.position = 4, .token = 2}}, false);
  EXPECT_TRUE(state.finished);
  EXPECT_EQ(final_end(), 5);
  EXPECT_EQ(state.step, 6);
}

TEST(ApplyOutcomeTest, AnEndOfTextEndsEarlyWhereThatIsAskedFor) {
  const ModelTraits model = MaskModel();
  for (const TokenId end : {4, 11, 9}) {
    for (const bool stops : {false, true}) {
      const DecodingParams params = {
          .sampler = "block_static", .block_length = 8, .eos_early_stop = stops};
      Canvas canvas = CanvasOf("g.g...", model);
      canvas.tokens[2] = 4;  // given: no end of the answer
      DecodingState state = BeginDecoding(canvas, params, model);
      ApplyOutcome({.transfers = {{.position = 3, .token = end}}}, true, params, model, canvas,
                   state);
      EXPECT_FALSE(state.finished) << "position 1 is undecided";
      ApplyOutcome({.transfers = {{.position = 1, .token = 2}}}, true, params, model, canvas,
                   state);
      EXPECT_EQ(state.finished, stops);
      EXPECT_EQ(CountUndecided(canvas, 0, 6), 2);
    }
  }
}

TEST(ApplyOutcomeDeathTest, WhatRevisesMustDoItRight) {
  const ModelTraits model = MaskModel();
  const DecodingParams params = {.sampler = "remdm_cap", .block_length = 2};
  Canvas canvas = CanvasOf("g..g.", model);
  DecodingState state = BeginDecoding(canvas, params, model);
  const auto apply = [&](std::vector<Transfer> transfers) {
    ApplyOutcome({.transfers = std::move(transfers)}, true, params, model, canvas, state);
  };
  EXPECT_DEATH(apply({{.position = 1, .token = kMaskedAgain}}), "token -1");
  apply({{.position = 1, .token = 1}});
  EXPECT_DEATH(apply({{.position = 1, .token = kMask}}), "token 17");
  apply({{.position = 2, .token = 1}});
  EXPECT_DEATH(apply({{.position = 2, .token = 1}}), "position 2 of block 3 .. 5");
  EXPECT_DEATH(apply({{.position = 3, .token = 1}}), "position 3 is decided");
}

TEST(ApplyOutcomeDeathTest, OurBugsAreFound) {
  const ModelTraits model = MaskModel();
  const DecodingParams params = {.block_length = 2};
  Canvas canvas = CanvasOf("g..g.", model);  // blocks 1-3 and 3-5
  DecodingState state = BeginDecoding(canvas, params, model);
  const auto apply = [&](std::vector<Transfer> transfers) {
    ApplyOutcome({.transfers = std::move(transfers)}, true, params, model, canvas, state);
  };
  EXPECT_DEATH(apply({{.position = 0, .token = 1}}), "position 0 of block 1 .. 3");
  EXPECT_DEATH(apply({{.position = 4, .token = 1}}), "position 4 of block 1 .. 3");
  EXPECT_DEATH(apply({{.position = 2, .token = 1}, {.position = 1, .token = 1}}), "position 1");
  EXPECT_DEATH(apply({{.position = 1, .token = kMask}}), "token 17");
  EXPECT_DEATH(apply({{.position = 1, .token = 23}}), "token 23");
  EXPECT_DEATH(apply({{.position = 1, .token = -1}}), "token -1");
  apply({{.position = 1, .token = 1}});
  EXPECT_DEATH(apply({{.position = 1, .token = 1}}), "position 1 is decided");
  apply({{.position = 2, .token = 1}});
  EXPECT_DEATH(apply({{.position = 3, .token = 1}}), "position 3 is decided");
  apply({{.position = 4, .token = 1}});
  EXPECT_DEATH(apply({}), "after the last");
}

TEST(StepsPerBlockTest, AnEvenSplitOverAllBlocks) {
  const ModelTraits model = MaskModel();
  const Canvas canvas = CanvasOf("g.ggg.g..", model);
  EXPECT_EQ(StepsPerBlock(canvas, {.num_steps = 12, .block_length = 2}, model), 3);
  EXPECT_EQ(StepsPerBlock(canvas, {.num_steps = 12, .block_length = 8}, model), 12);
  EXPECT_EQ(StepsPerBlock(canvas, {.num_steps = 0, .block_length = 2}, model), 1);
  EXPECT_EQ(StepsPerBlock(CanvasOf("gg", model), {.num_steps = 3}, model), 3);
}

}  // namespace
}  // namespace cinnabar
