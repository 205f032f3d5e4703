#include "worker/engine/sequence_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

namespace cinnabar {
namespace {

ModelTraits Model() {
  ModelTraits model;
  model.family = "test";
  model.vocab_size = 100;
  model.mask_token = 99;
  model.eos_tokens = {98};
  model.positions_max = 4096;
  model.default_sampler = "low_confidence";
  return model;
}

SequenceState Example() {
  std::vector<TokenId> ids(40, 7);
  std::vector<bool> given(40, false);
  for (int i = 0; i < 11; ++i) given[i] = true;
  given[39] = true;
  return *MakeSequence(
      ids, given, {.block_length = 8, .temperature = 0.5F, .seed = 123456789012345ULL}, Model());
}

TEST(SequenceStateTest, TheWireFormLosesNothing) {
  SequenceState state = Example();
  state.params.kv_reuse = KvReuse::kPrefix;
  state.decoding.reused_block.assign(8, 99);
  const absl::StatusOr<SequenceState> back = FromWire(ToWire(state, "m"), Model(), "m");
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->params.kv_reuse, KvReuse::kPrefix);
  EXPECT_EQ(back->decoding.reused_block, state.decoding.reused_block);
  EXPECT_EQ(back->canvas.tokens, state.canvas.tokens);
  EXPECT_EQ(back->canvas.states, state.canvas.states);
  EXPECT_EQ(back->canvas.begin, 11);
  EXPECT_EQ(back->canvas.end, 39);
  EXPECT_EQ(ToWire(*back, "m").SerializeAsString(), ToWire(state, "m").SerializeAsString());
}

TEST(SequenceStateTest, AFewKilobytesForFourThousandPositions) {
  std::vector<TokenId> ids(4096, 90);
  std::vector<bool> given(4096, false);
  given[0] = true;
  const SequenceState state = *MakeSequence(ids, given, {}, Model());
  EXPECT_LT(ToWire(state, "model").ByteSizeLong(), 10000U);
}

TEST(SequenceStateTest, ABrokenStateIsAnErrorThatSaysWhatIsWrong) {
  struct Case {
    const char* words;
    std::function<void(v1::SequenceState&)> breaks;
  };
  const std::vector<Case> cases = {
      {"format", [](auto& s) { s.set_format(9); }},
      {"this worker serves", [](auto& s) { s.set_model_fingerprint("other"); }},
      {"tokens", [](auto& s) { s.clear_tokens(); }},
      {"outside the vocabulary", [](auto& s) { s.set_tokens(3, 100); }},
      {"outside the vocabulary", [](auto& s) { s.set_tokens(3, -1); }},
      {"disagree about being masked", [](auto& s) { s.set_tokens(3, 99); }},
      {"disagree about being masked", [](auto& s) { s.set_tokens(20, 5); }},
      {"position_states", [](auto& s) { s.mutable_position_states()->pop_back(); }},
      {"holds noise", [](auto& s) { (*s.mutable_position_states())[0] = '\x03'; }},
      {"sampler", [](auto& s) { s.mutable_params()->set_sampler("magic"); }},
      {"contradict", [](auto& s) { s.set_nfe(5); }},
      {"contradict", [](auto& s) { s.set_block_step(-1); }},
      {"block_index", [](auto& s) { s.set_block_index(4000); }},
      {"before the open block", [](auto& s) { s.set_block_index(1); }},
      {"block_masks", [](auto& s) { s.set_block_masks(0); }},
      {"reused_block", [](auto& s) { s.add_reused_block(7); }},
      {"reused_block",
       [](auto& s) {
         s.mutable_params()->set_kv_reuse(v1::KV_REUSE_DUAL);
         for (int i = 0; i < 7; ++i) s.add_reused_block(7);
       }},
      {"vocabulary",
       [](auto& s) {
         s.mutable_params()->set_kv_reuse(v1::KV_REUSE_DUAL);
         for (int i = 0; i < 8; ++i) s.add_reused_block(100);
       }},
      {"kv_reuse", [](auto& s) { s.mutable_params()->set_kv_reuse(static_cast<v1::KvReuse>(7)); }},
      {"block_masks", [](auto& s) { s.set_block_masks(1000); }},
      {"finished", [](auto& s) { s.set_finished(true); }},
      {"0 confidences",
       [](auto& s) {
         s.mutable_params()->set_sampler("remdm_conf");
         s.mutable_params()->set_block_length(0);
         s.mutable_params()->set_num_steps(0);
       }},
      {"1 confidences", [](auto& s) { s.add_confidences(0.5F); }},
      {"contradict", [](auto& s) { s.set_block_edits(1); }},
      {"forbidden_ids",
       [](auto& s) { s.mutable_params()->mutable_forbidden_ids()->Resize(99, 1); }},
  };
  for (const Case& c : cases) {
    v1::SequenceState wire = ToWire(Example(), "m");
    c.breaks(wire);
    const absl::StatusOr<SequenceState> state = FromWire(wire, Model(), "m");
    ASSERT_FALSE(state.ok()) << c.words;
    EXPECT_THAT(std::string(state.status().message()), testing::HasSubstr(c.words));
  }
}

// Remasking: committed positions in the open block, its own memory, a block without masks.
TEST(SequenceStateTest, ASequenceThatIsRevisedTravelsToo) {
  std::vector<TokenId> ids(12, 7);
  std::vector<bool> given(12, false);
  given[0] = true;
  SequenceState state =
      *MakeSequence(ids, given, {.sampler = "remdm_conf", .num_steps = 20}, Model());
  ASSERT_EQ(state.decoding.confidences.size(), 12U);
  StepOutcome outcome;
  for (int32_t i = 1; i < 12; ++i) {
    outcome.transfers.push_back(
        {.position = i, .token = i, .confidence = 0.1F * static_cast<float>(i % 10)});
  }
  outcome.stays_open = true;
  ApplyOutcome(outcome, true, state.params, Model(), state.canvas, state.decoding);
  EXPECT_FALSE(state.decoding.finished);
  const v1::SequenceState wire = ToWire(state, "m");
  absl::StatusOr<SequenceState> back = FromWire(wire, Model(), "m");
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->decoding.confidences, state.decoding.confidences);
  EXPECT_EQ(back->canvas.states, state.canvas.states);
  ApplyOutcome({.transfers = {{.position = 3, .token = kMaskedAgain}}, .stays_open = true}, false,
               back->params, Model(), back->canvas, back->decoding);
  EXPECT_EQ(back->canvas.tokens[3], 99);
  EXPECT_EQ(back->decoding.confidences[3], 0);
  EXPECT_EQ(back->decoding.block_edits, 1);
  EXPECT_TRUE(FromWire(ToWire(*back, "m"), Model(), "m").ok());

  v1::SequenceState broken = wire;
  broken.set_confidences(4, 1.5F);
  EXPECT_FALSE(FromWire(broken, Model(), "m").ok());
  broken = wire;
  broken.mutable_params()->set_sampler("mdlm_cached");  // nothing undecided, and it never revises
  broken.clear_confidences();
  EXPECT_FALSE(FromWire(broken, Model(), "m").ok());
}

TEST(SequenceStateTest, CreditsTravelAndAreChecked) {
  const std::vector<TokenId> ids(12, 7);
  std::vector<bool> given(12, false);
  given[0] = true;
  SequenceState state =
      *MakeSequence(ids, given, {.sampler = "credit", .block_length = 6}, Model());
  StepOutcome outcome{.transfers = {{.position = 2, .token = 3}},
                      .credits = {{1, 4, 0.5F}, {1, 6, 0.25F}, {5, 0, 1.75F}}};
  ApplyOutcome(outcome, true, state.params, Model(), state.canvas, state.decoding);
  const v1::SequenceState wire = ToWire(state, "m");
  const absl::StatusOr<SequenceState> back = FromWire(wire, Model(), "m");
  ASSERT_TRUE(back.ok()) << back.status();
  ASSERT_EQ(back->decoding.credits.size(), 3U);
  EXPECT_EQ(back->decoding.credits[1].token, 6);
  EXPECT_EQ(back->decoding.credits[2].value, 1.75F);
  EXPECT_EQ(ToWire(*back, "m").SerializeAsString(), wire.SerializeAsString());
  const std::function<void(v1::Credit&)> breaks[] = {
      [](auto& c) { c.set_position(7); },  // of another block
      [](auto& c) { c.set_position(2); },  // committed
      [](auto& c) { c.set_position(0); },  // given, and out of order
      [](auto& c) { c.set_token(100); },  [](auto& c) { c.set_token(99); },
      [](auto& c) { c.set_token(-1); },   [](auto& c) { c.set_value(-0.5F); },
      [](auto& c) { c.set_value(6.0F); }, [](auto& c) { c.set_value(std::nanf("")); },
  };
  for (const auto& change : breaks) {
    v1::SequenceState broken = wire;
    change(*broken.mutable_credits(2));
    EXPECT_FALSE(FromWire(broken, Model(), "m").ok()) << broken.credits(2).ShortDebugString();
  }
  v1::SequenceState broken = wire;
  broken.mutable_credits()->SwapElements(0, 1);
  EXPECT_FALSE(FromWire(broken, Model(), "m").ok());
  broken = wire;
  broken.mutable_params()->set_sampler("threshold");
  EXPECT_FALSE(FromWire(broken, Model(), "m").ok());
  // The next block starts without.
  for (const int32_t position : {1, 3, 4, 5, 6}) {
    ApplyOutcome({.transfers = {{.position = position, .token = 1}}}, true, state.params, Model(),
                 state.canvas, state.decoding);
  }
  EXPECT_EQ(state.decoding.block_index, 1);
  EXPECT_TRUE(state.decoding.credits.empty());
}

TEST(SequenceStateTest, WhatMovedTokensLeaveBehindTravelsAndIsChecked) {
  ModelTraits model = Model();
  model.delete_token = 96;
  model.split_token = 97;
  std::vector<bool> given(12, false);
  given[0] = true;
  SequenceState state =
      *MakeSequence(std::vector<TokenId>(12, 7), given,
                    {.sampler = "joint_threshold_indel", .block_length = 6}, model);
  const auto apply = [&](std::vector<TokenEdit> edits, std::vector<Transfer> transfers) {
    ApplyOutcome({.transfers = std::move(transfers), .edits = std::move(edits)}, true, state.params,
                 model, state.canvas, state.decoding);
  };
  apply({{2, 5}, {4, 97}}, {{.position = 2, .token = 5, .confidence = 0.5F}});
  apply({{1, 96}},
        {{.position = 1, .token = 5, .confidence = 0.5F}, {.position = 2, .token = kMaskedAgain}});
  const BlockMemory& memory = state.decoding.memory;
  EXPECT_THAT(memory.original, testing::ElementsAre(1, 1, 0, 1, 1, 0));
  EXPECT_EQ(memory.tried.size(), 3U);
  EXPECT_EQ(memory.seen.size(), 2U);
  const v1::SequenceState wire = ToWire(state, "m");
  const absl::StatusOr<SequenceState> back = FromWire(wire, model, "m");
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->decoding.memory.original, memory.original);
  EXPECT_EQ(back->decoding.memory.seen, memory.seen);
  EXPECT_EQ(back->decoding.memory.tried[1].token, 5);
  EXPECT_EQ(ToWire(*back, "m").SerializeAsString(), wire.SerializeAsString());
  const std::function<void(v1::SequenceState&)> breaks[] = {
      [](auto& s) { s.mutable_original_masks()->pop_back(); },
      [](auto& s) { (*s.mutable_original_masks())[1] = 2; },
      [](auto& s) { s.mutable_tried(0)->set_position(11); },
      [](auto& s) { s.mutable_tried(0)->set_token(100); },
      [](auto& s) { s.mutable_tried()->SwapElements(0, 2); },
      [](auto& s) { s.add_seen_blocks(3); },
      [](auto& s) { s.mutable_params()->set_sampler("joint_threshold"); },
      [](auto& s) { s.clear_original_masks(); },
  };
  for (const auto& change : breaks) {
    v1::SequenceState broken = wire;
    change(broken);
    EXPECT_FALSE(FromWire(broken, model, "m").ok()) << broken.ShortDebugString();
  }
  EXPECT_FALSE(FromWire(wire, Model(), "m").ok()) << "a model without edit tokens";
  // The next block starts anew, and the end leaves nothing.
  std::vector<TokenEdit> edits;
  std::vector<Transfer> transfers;
  for (int32_t i = 1; i < 7; ++i) {
    edits.push_back({i, 8});
    transfers.push_back({.position = i, .token = 8, .confidence = 0.5F});
  }
  apply(edits, transfers);
  EXPECT_EQ(state.decoding.block_index, 1);
  EXPECT_THAT(memory.original, testing::ElementsAre(1, 1, 1, 1, 1));
  EXPECT_TRUE(memory.tried.empty() && memory.seen.empty());
  for (size_t i = 0; i < 6; ++i) {
    edits[i].position += 6;
    transfers[i].position += 6;
  }
  edits.pop_back();
  transfers.pop_back();
  apply(edits, transfers);
  EXPECT_TRUE(state.decoding.finished);
  EXPECT_TRUE(memory.original.empty());
  EXPECT_TRUE(FromWire(ToWire(state, "m"), model, "m").ok());
}

TEST(SequenceStateTest, OnlyAFinalEndOfTextFinishesEarly) {
  std::vector<TokenId> ids(12, 7);
  const std::vector<bool> given(12, false);
  for (const bool stops : {false, true}) {
    SequenceState state =
        *MakeSequence(ids, given, {.sampler = "block_static", .eos_early_stop = stops}, Model());
    ApplyOutcome({.transfers = {{.position = 0, .token = 5}, {.position = 1, .token = 98}}}, true,
                 state.params, Model(), state.canvas, state.decoding);
    EXPECT_EQ(state.decoding.finished, stops);
    v1::SequenceState wire = ToWire(state, "m");
    EXPECT_TRUE(FromWire(wire, Model(), "m").ok());
    wire.set_finished(true);
    EXPECT_EQ(FromWire(wire, Model(), "m").ok(), stops);
    wire.set_tokens(1, 6);
    EXPECT_FALSE(FromWire(wire, Model(), "m").ok());
  }
}

TEST(SequenceStateTest, ACanvasThatReachesTheEndIsFilledUpToWholeBlocks) {
  ModelTraits model = Model();
  model.causal_block_length = 8;
  model.default_sampler = "block_dynamic";
  const std::vector<TokenId> ids(13, 1);
  std::vector<bool> given(13, true);
  given[12] = false;
  EXPECT_EQ(MakeSequence(ids, given, {}, model)->canvas.length(), 16);
  given[12] = true;
  given[3] = false;
  EXPECT_EQ(MakeSequence(ids, given, {}, model)->canvas.length(), 13);
}

}  // namespace
}  // namespace cinnabar
