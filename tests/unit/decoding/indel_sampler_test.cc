// joint_threshold_indel: where tokens go, each rule with answers made by hand, and whole runs
// against a second implementation that works on plain lists, as the published code does.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/unit/decoding/decoding_harness.h"
#include "worker/decoding/token_moves.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::IsEmpty;

constexpr TokenId kMask = 17;
constexpr TokenId kDelete = 13;
constexpr TokenId kSplit = 19;

// --- Where tokens go
// ---------------------------------------------------------------------------------------

// 'g' is a given 20, '.' a masked position, a letter a committed token: 'a' is 0.
Canvas CanvasOf(const std::string& layout) {
  std::vector<TokenId> ids(layout.size(), 20);
  std::vector<bool> given;
  for (const char c : layout) given.push_back(c == 'g');
  Canvas canvas = *MakeCanvas(ids, given, MaskModel(), {});
  for (size_t i = 0; i < layout.size(); ++i) {
    if (layout[i] == 'g' || layout[i] == '.') continue;
    canvas.tokens[i] = layout[i] - 'a';
    canvas.states[i] = PositionState::kCommitted;
  }
  return canvas;
}

std::string TextOf(absl::Span<const MovedToken> moved) {
  std::string text;
  for (const MovedToken& m : moved) {
    text += m.token == 20 ? 'g' : m.token == kMask ? '.' : static_cast<char>('a' + m.token);
  }
  return text;
}

TEST(MoveTokensTest, EachRunKeepsItsLength) {
  struct Case {
    std::string before;
    std::vector<TokenEdit> edits;
    std::string after;
  };
  for (const Case& c : std::vector<Case>{
           {"abcd", {}, "abcd"},
           {"ab.d", {{1, 4}, {2, 5}}, "aefd"},
           {"abcd", {{0, kDelete}}, "bcd."},
           {"abcd", {{3, kDelete}}, "abc."},
           {"abcd", {{1, kSplit}}, "a.bc"},
           {"abcd", {{3, kSplit}}, "abc."},
           {"abcd", {{0, kDelete}, {2, kSplit}}, "b.cd"},
           {"abcd", {{0, kSplit}, {3, kDelete}}, ".abc"},
           {"abcd", {{0, kSplit}, {1, kSplit}, {2, kSplit}}, ".a.b"},
           {"abcd", {{0, kDelete}, {1, kDelete}, {2, kDelete}, {3, kDelete}}, "...."},
           {"abcd", {{1, kDelete}, {2, 7}}, "ahd."},
           {"a.cd", {{1, kSplit}}, "a..c"},
           {"abcd", {{2, kMask}}, "ab.d"},
           // Given positions stay, and nothing passes them.
           {"gabgcd", {{1, kDelete}, {4, kSplit}}, "gb.g.c"},
           {"agbgc", {{0, kSplit}, {2, kDelete}, {4, kSplit}}, ".g.g."},
           {"gg.g", {{2, 3}}, "ggdg"},
       }) {
    const Canvas canvas = CanvasOf(c.before);
    std::vector<MovedToken> moved(3);
    MoveTokens(canvas, {0, canvas.length()}, c.edits, MaskModel(), moved);
    EXPECT_EQ(TextOf(moved), c.after) << c.before;
    std::vector<Transfer> transfers;
    AppendMoves(canvas, {0, canvas.length()}, moved, MaskModel(), transfers);
    std::vector<TokenId> tokens = canvas.tokens;
    for (const Transfer& transfer : transfers) {
      TokenId& token = tokens[transfer.position];
      EXPECT_NE(token, transfer.token);
      EXPECT_NE(token == kMask && transfer.token == kMaskedAgain, true);
      token = transfer.token == kMaskedAgain ? kMask : transfer.token;
    }
    for (size_t i = 0; i < moved.size(); ++i) EXPECT_EQ(tokens[i], moved[i].token);
  }
}

TEST(MoveTokensTest, SaysWhereEachComesFrom) {
  const Canvas canvas = CanvasOf("ggabcd");
  std::vector<MovedToken> moved;
  MoveTokens(canvas, {2, 6}, std::vector<TokenEdit>{{2, kSplit}, {3, 9}, {4, kDelete}}, MaskModel(),
             moved);
  ASSERT_EQ(moved.size(), 4U);
  const std::vector<int32_t> from = {moved[0].from, moved[1].from, moved[2].from, moved[3].from};
  EXPECT_THAT(from, ElementsAre(-1, 2, 3, 5));
  EXPECT_FALSE(moved[1].written);
  EXPECT_TRUE(moved[2].written);
}

TEST(MoveTokensDeathTest, EditsOfGivenPositionsAreOurBug) {
  const Canvas canvas = CanvasOf("agb");
  std::vector<MovedToken> moved;
  EXPECT_DEATH(MoveTokens(canvas, {0, 3}, std::vector<TokenEdit>{{1, 3}}, MaskModel(), moved),
               "given");
}

TEST(BlockMemoryTest, OriginalsMoveWithTheirTokens) {
  const Canvas canvas = CanvasOf("ab.d");
  BlockMemory memory{.original = {0, 1, 1, 0}};
  RememberEdits(canvas, {0, 4}, std::vector<TokenEdit>{{0, kSplit}, {1, 6}}, MaskModel(), memory);
  EXPECT_THAT(memory.original, ElementsAre(0, 0, 1, 1));
  RememberEdits(canvas, {0, 4}, std::vector<TokenEdit>{{2, kDelete}, {3, kMask}}, MaskModel(),
                memory);
  EXPECT_THAT(memory.original, ElementsAre(0, 0, 1, 0));
  EXPECT_EQ(memory.seen.size(), 1U) << "the same block twice";
  EXPECT_EQ(TriedAt(memory, 0).size(), 1U);
  EXPECT_EQ(TriedAt(memory, 3)[0].token, kMask);
  EXPECT_TRUE(MemoryFits(memory, canvas, {0, 4}, 2, MaskModel()));
}

TEST(BlockMemoryTest, ForgetsTheOldestOfMoreThanSeven) {
  const Canvas canvas = CanvasOf("ab.d");
  BlockMemory memory{.original = {1, 1, 1, 1}};
  for (const TokenId token : {1, 2, 3, 2, 4, 5, 6, 7, 8}) {
    RememberEdits(canvas, {0, 4}, std::vector<TokenEdit>{{1, token}, {2, 3}}, MaskModel(), memory);
  }
  std::vector<TokenId> tried;
  for (const TokenEdit& edit : TriedAt(memory, 1)) tried.push_back(edit.token);
  EXPECT_THAT(tried, ElementsAre(2, 3, 4, 5, 6, 7, 8));
  EXPECT_EQ(TriedAt(memory, 2).size(), 1U);
  EXPECT_THAT(TriedAt(memory, 0), IsEmpty());
  EXPECT_TRUE(MemoryFits(memory, canvas, {0, 4}, 1, MaskModel()));
}

TEST(BlockMemoryTest, WhatDoesNotFitIsFound) {
  const Canvas canvas = CanvasOf("gab.");
  const BlockMemory good{
      .original = {0, 1, 0, 1}, .tried = {{1, 2}, {1, kMask}, {3, 5}}, .seen = {7, 8}};
  const auto fits = [&](const BlockMemory& memory, int32_t block_step = 2) {
    return MemoryFits(memory, canvas, {0, 4}, block_step, MaskModel());
  };
  EXPECT_TRUE(fits(good));
  EXPECT_FALSE(fits(good, 1)) << "more blocks seen than steps made";
  const auto broken = [&](auto change) {
    BlockMemory memory = good;
    change(memory);
    return memory;
  };
  EXPECT_FALSE(fits(broken([](auto& m) { m.original.pop_back(); })));
  EXPECT_FALSE(fits(broken([](auto& m) { m.original[0] = 1; }))) << "given";
  EXPECT_FALSE(fits(broken([](auto& m) { m.original[1] = 2; })));
  EXPECT_FALSE(fits(broken([](auto& m) { m.tried[2].position = 0; })));
  EXPECT_FALSE(fits(broken([](auto& m) { m.tried[0].position = 0; }))) << "given";
  EXPECT_FALSE(fits(broken([](auto& m) { m.tried[2].position = 4; })));
  EXPECT_FALSE(fits(broken([](auto& m) { m.tried[2].token = 23; })));
  EXPECT_FALSE(fits(broken([](auto& m) { m.tried[2].token = -1; })));
  EXPECT_FALSE(fits(broken([](auto& m) { m.tried.assign(8, {3, 5}); })));
}

TEST(BlockKeyTest, DependsOnEveryTokenAndItsPlace) {
  std::set<uint64_t> keys;
  for (const char* layout : {"abcd", "abce", "bacd", "abc.", ".abc", "....", "gabc", "abcg"}) {
    keys.insert(BlockKey(CanvasOf(layout), {0, 4}));
  }
  EXPECT_EQ(keys.size(), 8U);
  EXPECT_EQ(BlockKey(CanvasOf("xxabcd"), {2, 6}), BlockKey(CanvasOf("abcd"), {0, 4}));
}

// --- The rules, by hand
// ------------------------------------------------------------------------------------

// A row whose ids have these probabilities; the rest is spread over the others.
std::vector<float> Row(const std::map<TokenId, double>& probabilities) {
  double rest = 1;
  for (const auto& [id, p] : probabilities) rest -= p;
  std::vector<float> row(
      23, static_cast<float>(std::log(rest / (23 - static_cast<double>(probabilities.size())))));
  for (const auto& [id, p] : probabilities) row[id] = static_cast<float>(std::log(p));
  return row;
}

class IndelRuleTest : public testing::Test {
 protected:
  // One block, nothing given but what `given` says.
  void Start(const std::vector<std::vector<float>>& rows, DecodingParams params,
             std::vector<bool> given = {}) {
    if (given.empty()) given.assign(rows.size(), false);
    params.sampler = "joint_threshold_indel";
    const Request request = {
        .ids = std::vector<TokenId>(rows.size(), 20), .given = given, .params = params};
    sequence_ = Begin(request, MaskModel(), FixedNetwork(rows));
  }
  // What the next step writes, "position:token ...".
  std::string Step() {
    StepPlan plan;
    PlanStep(sequence_, plan);
    num_queries_ = plan.queries.size();
    outcome_ = FinishStep(plan, AnswerStep(sequence_, plan, *head_), sequence_);
    std::string edits;
    for (const TokenEdit& edit : outcome_.edits) {
      absl::StrAppend(&edits, edits.empty() ? "" : " ", edit.position, ":", edit.token);
    }
    return edits;
  }
  void Predict(int32_t position, const std::map<TokenId, double>& probabilities) {
    rows_[position] = Row(probabilities);
    sequence_.network = FixedNetwork(rows_);
  }
  const std::vector<TokenId>& tokens() const { return sequence_.canvas.tokens; }

  std::vector<std::vector<float>> rows_;
  Sequence sequence_;
  StepOutcome outcome_;
  size_t num_queries_ = 0;
  std::unique_ptr<Head> head_ = ReferenceHead();
};

TEST_F(IndelRuleTest, FillsAboveTheThresholdOrTheBest) {
  rows_ = {Row({{1, 0.6}}), Row({{2, 0.4}}), Row({{3, 0.45}}), Row({{4, 0.7}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 0.9F});
  EXPECT_EQ(Step(), "0:1 3:4");
  EXPECT_EQ(Step(), "2:3");
  EXPECT_FALSE(outcome_.stays_open);
  EXPECT_EQ(Step(), "1:2");
  EXPECT_TRUE(outcome_.stays_open) << "it is looked at once more";
  EXPECT_EQ(Step(), "");
  EXPECT_TRUE(sequence_.state.finished);
  EXPECT_EQ(sequence_.state.nfe, 4);
}

TEST_F(IndelRuleTest, OfEqualsTheLowerPosition) {
  rows_ = {Row({{1, 0.3}}), Row({{2, 0.4}}), Row({{2, 0.4}})};
  Start(rows_, {.threshold = 0.5F});
  EXPECT_EQ(Step(), "1:2");
  EXPECT_EQ(Step(), "2:2");
}

TEST_F(IndelRuleTest, AnOriginalMaskTakesTheBestOtherToken) {
  rows_ = {Row({{kMask, 0.6}, {1, 0.3}}), Row({{2, 0.35}})};
  Start(rows_, {.threshold = 0.32F});
  EXPECT_EQ(Step(), "1:2") << "the mask token's probability stays in the softmax";
  EXPECT_EQ(Step(), "0:1");
  EXPECT_FLOAT_EQ(outcome_.transfers[0].confidence, 0.3F);
}

// Each mask that was put in asks for one more transfer.
TEST_F(IndelRuleTest, LaterMasksRaiseTheNumberOfTransfers) {
  rows_ = {Row({{kDelete, 0.9}}), Row({{2, 0.2}}), Row({{3, 0.3}}), Row({{4, 0.25}}),
           Row({{5, 0.28}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 0.95F});
  EXPECT_EQ(Step(), "0:13") << "one position goes, one mask comes";
  EXPECT_THAT(outcome_.transfers, IsEmpty()) << "masks took each other's place";
  EXPECT_THAT(sequence_.state.memory.original, ElementsAre(1, 1, 1, 1, 0));
  Predict(0, {{1, 0.1}});
  EXPECT_EQ(Step(), "2:3 4:5");
  EXPECT_THAT(sequence_.state.memory.original, ElementsAre(1, 1, 1, 1, 0));
  EXPECT_EQ(Step(), "3:4") << "the later mask is filled";
}

TEST_F(IndelRuleTest, WithoutOriginalsEveryMaskIsWrittenEvenWithItself) {
  rows_ = {Row({{kDelete, 0.9}}), Row({{2, 0.8}}), Row({{3, 0.9}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 0.95F, .edit_steps = 3});
  EXPECT_EQ(Step(), "0:13 1:2 2:3");
  EXPECT_THAT(tokens(), ElementsAre(2, 3, kMask));
  EXPECT_EQ(sequence_.state.block_edits, 0);
  Predict(0, {{2, 0.9}});
  Predict(1, {{3, 0.9}});
  Predict(2, {{kMask, 0.9}, {6, 0.05}});
  EXPECT_EQ(Step(), "2:17");
  EXPECT_THAT(outcome_.transfers, IsEmpty());
  EXPECT_EQ(sequence_.state.block_edits, 1);
  EXPECT_FALSE(sequence_.state.finished);
  EXPECT_EQ(Step(), "2:17") << "it stood like this before, but nothing would change";
  EXPECT_EQ(sequence_.state.block_edits, 2);
  EXPECT_EQ(Step(), "2:6") << "the last of three such steps takes no mask";
  EXPECT_TRUE(sequence_.state.finished);
}

TEST_F(IndelRuleTest, TheLastStepTakesNeitherMaskNorMoves) {
  rows_ = {Row({{1, 0.9}}), Row({{2, 0.9}}), Row({{3, 0.9}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 0.5F, .edit_steps = 1});
  EXPECT_EQ(Step(), "0:1 1:2 2:3");
  Predict(0, {{kDelete, 0.6}, {8, 0.3}});
  Predict(1, {{kSplit, 0.7}, {2, 0.2}});
  Predict(2, {{kMask, 0.4}, {9, 0.3}});
  EXPECT_EQ(Step(), "0:8 1:2");
  EXPECT_FLOAT_EQ(outcome_.transfers[0].confidence, 0.3F);
  EXPECT_TRUE(sequence_.state.finished);
  EXPECT_THAT(tokens(), ElementsAre(8, 2, 3));
}

TEST_F(IndelRuleTest, WithoutABudgetTheStepThatFillsTheLastOriginalIsTheLast) {
  rows_ = {Row({{kDelete, 0.9}, {1, 0.05}}), Row({{2, 0.6}}), Row({{kSplit, 0.4}, {3, 0.3}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 0.95F, .edit_steps = 0});
  EXPECT_EQ(Step(), "0:13 1:2");
  EXPECT_THAT(tokens(), ElementsAre(2, kMask, kMask));
  EXPECT_THAT(sequence_.state.memory.original, ElementsAre(1, 1, 0));
  Predict(1, {{kSplit, 0.9}, {4, 0.05}});
  // The original is chosen, so the other mask is filled too, and nothing moves.
  EXPECT_EQ(Step(), "1:4 2:3");
  EXPECT_TRUE(sequence_.state.finished);
}

TEST_F(IndelRuleTest, AnInsertedMaskPushesTheRestAndTheTokenKeepsItsConfidence) {
  rows_ = {Row({{1, 0.9}}), Row({{2, 0.75}}), Row({{3, 0.6}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 0.5F});
  EXPECT_EQ(Step(), "0:1 1:2 2:3");
  Predict(1, {{kSplit, 0.8}});
  EXPECT_EQ(Step(), "1:19");
  EXPECT_THAT(tokens(), ElementsAre(1, kMask, 2));
  ASSERT_EQ(outcome_.transfers.size(), 2U);
  EXPECT_EQ(outcome_.transfers[0].token, kMaskedAgain);
  EXPECT_FLOAT_EQ(outcome_.transfers[1].confidence, 0.75F);
  EXPECT_FLOAT_EQ(sequence_.state.confidences[2], 0.75F);
  EXPECT_THAT(sequence_.state.memory.original, ElementsAre(1, 0, 1));
}

TEST_F(IndelRuleTest, AnEditMayMaskAndTheOriginalIsOneAgain) {
  rows_ = {Row({{1, 0.9}}), Row({{2, 0.9}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 0.5F, .edit_steps = 2});
  EXPECT_EQ(Step(), "0:1 1:2");
  Predict(0, {{kMask, 0.8}, {5, 0.1}});
  EXPECT_EQ(Step(), "0:17");
  EXPECT_EQ(sequence_.state.block_edits, 1);
  EXPECT_EQ(Step(), "0:5");
  EXPECT_EQ(sequence_.state.block_edits, 1) << "an original was undecided";
  EXPECT_EQ(Step(), "0:5") << "the second step without: the last, which takes no mask";
  EXPECT_TRUE(sequence_.state.finished);
}

// Two tokens that each want to be the other: the block comes back to where it was.
TEST_F(IndelRuleTest, ACircleIsLeftByTheLeastProbableChange) {
  Start({Row({{1, 0.9}}), Row({{1, 0.9}})}, {.threshold = 0.5F, .edit_threshold = 0.5F});
  sequence_.network = [](absl::Span<const TokenId> seen, int32_t position, float) {
    const double p = position == 0 ? 0.8 : 0.7;
    if (seen[position] == 1) return Row({{2, p}, {6, 0.1}});
    if (seen[position] == 2) return Row({{1, p}, {7, 0.1}});
    return Row({{seen[position] == kMask ? 1 : seen[position], p}});
  };
  EXPECT_EQ(Step(), "0:1 1:1");
  EXPECT_EQ(Step(), "0:2 1:2");
  EXPECT_EQ(num_queries_, 2U);
  EXPECT_EQ(Step(), "0:1 1:1");
  EXPECT_EQ(Step(), "0:2 1:6") << "1 and 2 were tried at position 1";
  EXPECT_EQ(num_queries_, 4U);
  EXPECT_EQ(Step(), "0:1");
  EXPECT_EQ(Step(), "0:2");
  EXPECT_EQ(Step(), "0:7") << "(2, 6) was there before";
  EXPECT_EQ(Step(), "");
  EXPECT_TRUE(sequence_.state.finished);
  EXPECT_THAT(tokens(), ElementsAre(7, 6));
}

TEST_F(IndelRuleTest, ABlockHasAsManyStepsAsPositionsAndBudgetAndOneMore) {
  // The original is split off again and again: it is never filled.
  rows_ = {Row({{kSplit, 0.9}}), Row({{1, 0.8}}), Row({{2, 0.7}})};
  Start(rows_, {.threshold = 0.5F, .edit_threshold = 1.0F, .edit_steps = 2});
  sequence_.network = [](absl::Span<const TokenId> seen, int32_t position, float) {
    if (seen[position] == kMask) return Row({{kSplit, 0.5 + 0.1 * position}, {3, 0.1}});
    return Row({{seen[position], 0.9}});
  };
  int num_steps = 0;
  while (!sequence_.state.finished) {
    Step();
    ++num_steps;
    ASSERT_LE(num_steps, 6);
  }
  EXPECT_EQ(sequence_.state.nfe, num_steps);
  EXPECT_THAT(tokens(), ElementsAre(3, 3, 3));
}

TEST_F(IndelRuleTest, GivenPositionsStayWhateverIsPredictedThere) {
  rows_ = {Row({{kDelete, 0.9}}), Row({{1, 0.9}}), Row({{kDelete, 0.9}}), Row({{kSplit, 0.9}}),
           Row({{2, 0.9}})};
  Start(rows_, {.threshold = 0.5F}, {true, false, true, false, false});
  EXPECT_EQ(Step(), "1:1 3:19 4:2");
  EXPECT_EQ(num_queries_, 3U);
  EXPECT_THAT(tokens(), ElementsAre(20, 1, 20, kMask, kMask));
  EXPECT_THAT(sequence_.state.memory.original, ElementsAre(1, 0, 0, 1)) << "of positions 1 to 4";
}

// --- Whole runs, against lists
// -----------------------------------------------------------------------------

// The rule as the published code has it, on one block.
class Lists {
 public:
  Lists(const Sequence& sequence, BlockRange block, std::map<std::string, int>& events)
      : params_(sequence.params), model_(sequence.model), events_(events) {
    for (int32_t i = block.begin; i < block.end; ++i) {
      given_.push_back(sequence.canvas.states[i] == PositionState::kGiven);
      original_.push_back(!given_.back());
    }
  }

  // The block after a step; `done` when it was the last.
  std::vector<TokenId> Step(const std::vector<TokenId>& block,
                            const std::vector<std::vector<float>>& rows, bool& done) {
    const size_t size = block.size();
    std::vector<TokenId> x(size);
    std::vector<double> p(size);
    std::vector<bool> masked(size);
    int originals = 0;
    int masks = 0;
    for (size_t i = 0; i < size; ++i) {
      masked[i] = !given_[i] && block[i] == kMask;
      masks += masked[i] ? 1 : 0;
      originals += masked[i] && original_[i] ? 1 : 0;
    }
    ++updates_;
    if (originals == 0) ++looks_;
    bool cleanup = (params_.edit_steps > 0 && looks_ >= params_.edit_steps) ||
                   (params_.edit_steps == 0 && originals == 0) ||
                   updates_ > static_cast<int>(size) + params_.edit_steps;
    for (size_t i = 0; i < size; ++i) {
      x[i] = Best(rows[i], {}, p[i]);
      if (masked[i] && original_[i] && x[i] == kMask && !cleanup) {
        x[i] = Best(rows[i], {kMask}, p[i]);
        ++events_["original is mask"];
      }
    }
    std::vector<bool> writes(size, false);
    if (cleanup || originals == 0) {
      writes = masked;
    } else {
      const int wanted = 1 + masks - originals;
      int above = 0;
      for (size_t i = 0; i < size; ++i) {
        writes[i] = masked[i] && p[i] > static_cast<double>(params_.threshold);
        above += writes[i] ? 1 : 0;
      }
      if (above < wanted) {
        std::vector<size_t> order;
        for (size_t i = 0; i < size; ++i) {
          if (masked[i]) order.push_back(i);
        }
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return p[a] > p[b]; });
        writes.assign(size, false);
        for (int k = 0; k < wanted; ++k) writes[order[k]] = true;
        ++events_["best"];
      }
    }
    if (params_.edit_steps == 0 && originals > 0) {
      bool all = true;
      for (size_t i = 0; i < size; ++i) all = all && (!masked[i] || !original_[i] || writes[i]);
      if (all) {
        cleanup = true;
        writes = masked;
        ++events_["last originals"];
      }
    }
    for (size_t i = 0; i < size; ++i) {
      if (given_[i] || masked[i]) continue;
      writes[i] = p[i] > static_cast<double>(params_.edit_threshold) && x[i] != block[i];
      if (writes[i]) ++events_["edit"];
    }
    done = true;
    if (std::count(writes.begin(), writes.end(), true) == 0) return block;
    double unused = 0;
    if (cleanup) {
      for (size_t i = 0; i < size; ++i) {
        if (!writes[i] || (x[i] != kMask && x[i] != kDelete && x[i] != kSplit)) continue;
        x[i] = Best(rows[i], {kMask, kDelete, kSplit}, unused);
        ++events_["cleaned up"];
      }
    } else if (seen_.count(block) > 0) {
      int least = -1;
      for (size_t i = 0; i < size; ++i) {
        if (writes[i] && x[i] != block[i] && (least < 0 || p[i] < p[least])) {
          least = static_cast<int>(i);
        }
      }
      if (least >= 0) {
        std::vector<TokenId> without = tried_[least];
        if (masked[least] && original_[least]) without.push_back(kMask);
        x[least] = Best(rows[least], without, unused);
        ++events_["circle"];
      }
    }
    seen_.insert(block);
    for (size_t i = 0; i < size; ++i) {
      if (!writes[i]) continue;
      std::vector<TokenId>& tried = tried_[static_cast<int>(i)];
      if (std::count(tried.begin(), tried.end(), x[i]) > 0) continue;
      tried.push_back(x[i]);
      if (tried.size() > 7) tried.erase(tried.begin());
    }
    done = cleanup;
    return Moved(block, x, writes);
  }

 private:
  TokenId Best(const std::vector<float>& row, const std::vector<TokenId>& without,
               double& p) const {
    const auto is_in = [](const auto& list, TokenId id) {
      return std::count(list.begin(), list.end(), id) > 0;
    };
    double sum = 0;
    TokenId best = -1;
    float best_logit = 0;
    for (TokenId id = 0; id < model_.vocab_size; ++id) {
      if (is_in(params_.forbidden_ids, id)) continue;
      const float logit = row[id] - (is_in(model_.eos_tokens, id) ? params_.eos_penalty : 0.0F);
      sum += std::exp(static_cast<double>(logit));
      if ((params_.pickable_ids > 0 && id >= params_.pickable_ids) || is_in(without, id)) continue;
      if (best >= 0 && logit <= best_logit) continue;
      best = id;
      best_logit = logit;
    }
    p = std::exp(static_cast<double>(best_logit)) / sum;
    return best;
  }

  std::vector<TokenId> Moved(const std::vector<TokenId>& block, const std::vector<TokenId>& x,
                             const std::vector<bool>& writes) {
    std::vector<TokenId> tokens;
    std::vector<bool> original;
    const auto emit = [&](TokenId token, bool is_original) {
      tokens.push_back(token);
      original.push_back(is_original);
    };
    for (size_t i = 0; i < block.size(); ++i) {
      if (i == 0 || given_[i] || given_[i - 1]) {  // a run begins: the one before is cut or filled
        if (tokens.size() < i) ++events_["filled"];
        if (tokens.size() > i) ++events_["cut"];
        tokens.resize(i, kMask);
        original.resize(i, false);
      }
      if (writes[i] && x[i] == kDelete) {
        ++events_["delete"];
      } else if (writes[i] && x[i] == kSplit) {
        ++events_["split"];
        emit(kMask, false);
        emit(block[i], original_[i]);
      } else {
        emit(writes[i] ? x[i] : block[i], original_[i]);
        if (writes[i] && x[i] == kMask) ++events_[block[i] == kMask ? "mask stays" : "masked"];
      }
    }
    tokens.resize(block.size(), kMask);
    original.resize(block.size(), false);
    original_ = original;
    return tokens;
  }

  const DecodingParams& params_;
  const ModelTraits& model_;
  std::map<std::string, int>& events_;
  std::vector<bool> given_;
  std::vector<bool> original_;
  int updates_ = 0;
  int looks_ = 0;
  std::set<std::vector<TokenId>> seen_;
  std::map<int, std::vector<TokenId>> tried_;
};

TEST(IndelRunTest, EveryStepIsThatOfTheLists) {
  const std::unique_ptr<Head> head = ReferenceHead();
  std::map<std::string, int> events;
  for (const ModelTraits& model : {MaskModel(), BlockModel()}) {
    for (uint32_t seed = 0; seed < 400; ++seed) {
      SCOPED_TRACE(absl::StrCat(model.family, " ", seed));
      Request request = RandomRequest(EntryOf("joint_threshold_indel"), model, seed);
      request.params.temperature = 0;
      if (seed % 3 == 0) request.params.edit_steps += 8;
      const Network hash = HashNetwork(model, 3.0, seed);
      // Some networks look at a few bits of the block alone, so that they come back to what they
      // said.
      const Network network =
          seed % 2 == 0 ? hash : [&hash](absl::Span<const TokenId> seen, int32_t at, float s) {
            const TokenId own[] = {seen[at] % 3, at % 4};
            return hash(own, 1, s);
          };
      Sequence sequence = Begin(request, model, network);
      while (!sequence.state.finished) {
        const int32_t block_index = sequence.state.block_index;
        const BlockRange block = sequence.context().block;
        Lists lists(sequence, block, events);
        bool done = false;
        while (!done) {
          ASSERT_FALSE(sequence.state.finished);
          ASSERT_EQ(sequence.state.block_index, block_index);
          const int32_t visible =
              model.causal_block_length > 0 ? block.end : sequence.canvas.length();
          const absl::Span<const TokenId> seen =
              absl::MakeConstSpan(sequence.canvas.tokens).first(visible);
          std::vector<std::vector<float>> rows;
          for (int32_t i = block.begin; i < block.end; ++i) rows.push_back(network(seen, i, 0));
          const std::vector<TokenId> before(seen.begin() + block.begin, seen.begin() + block.end);
          const std::vector<TokenId> want = lists.Step(before, rows, done);
          RunToEnd(sequence, *head, 1);
          const std::vector<TokenId> got(sequence.canvas.tokens.begin() + block.begin,
                                         sequence.canvas.tokens.begin() + block.end);
          ASSERT_THAT(got, ElementsAreArray(want)) << "step " << sequence.state.step;
        }
        ASSERT_TRUE(sequence.state.finished || sequence.state.block_index > block_index);
      }
    }
  }
  for (const char* event : {"original is mask", "best", "last originals", "edit", "cleaned up",
                            "circle", "delete", "split", "filled", "cut", "mask stays", "masked"}) {
    EXPECT_GT(events[event], 20) << event;
  }
}

}  // namespace
}  // namespace cinnabar
