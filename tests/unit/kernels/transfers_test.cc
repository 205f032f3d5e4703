// Backend::SelectTransfers on every backend of this build: the choice that a host would make from
// the same answers, exactly, ties included.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/unit/kernels/named_backend.h"

namespace cinnabar {
namespace {

constexpr int64_t kVocabulary = 50, kDim = 8;
constexpr int32_t kQueries = 600, kIds = 2000;

class TransfersTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = MakeNamedBackend(GetParam());
    if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
    backend_ = *std::move(backend);
    ASSERT_TRUE(backend_
                    ->Reserve({.rows_max = kIds,
                               .cols_max = kDim,
                               .vocabulary = kVocabulary,
                               .queries_max = kQueries})
                    .ok());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    weight_values_.resize(kVocabulary * kDim);
    for (float& value : weight_values_) value = normal(random);
    weight_ = *backend_->LoadWeight({{weight_values_.data(), DType::kF32, kVocabulary, kDim}},
                                    RowOrder::kStacked, DType::kF32);
    // Few different rows, so that there are many ties; small integers are exact in any dtype.
    table_values_.resize(20 * kDim);
    for (float& value : table_values_) value = static_cast<float>(random() % 5) / 4;
    table_ = *backend_->LoadEmbedding({table_values_.data(), DType::kF32, 20, kDim});
    ids_ = *backend_->Allocate(kIds * 4);
    answers_.resize(kQueries);
  }

  // Answers of kQueries rows, some of them filtered, which the device keeps apart.
  void Answer(bool with_nan = false) {
    std::mt19937 random(7);
    std::vector<float> hidden(kQueries * kDim);
    queries_.assign(kQueries, {});
    for (int64_t i = 0; i < kQueries; ++i) {
      queries_[i].hidden_row = static_cast<int32_t>(i);
      if (random() % 40 == 0) queries_[i].top_k = 7;
      const uint32_t row = random() % 20;
      for (int64_t c = 0; c < kDim; ++c) hidden[i * kDim + c] = table_values_[row * kDim + c];
      if (with_nan && i % 5 == 0) hidden[i * kDim] = std::nanf("");
    }
    const DType dtype = backend_->activation_dtype();
    hidden_ = *backend_->Allocate(kQueries * kDim * 4);
    if (dtype == DType::kBf16) {  // the upper halves of floats that are exact in it
      std::vector<float> packed(kQueries * kDim / 2);
      auto* halves = reinterpret_cast<uint16_t*>(packed.data());
      for (size_t i = 0; i < hidden.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &hidden[i], 4);
        halves[i] = static_cast<uint16_t>(bits >> 16);
      }
      ASSERT_TRUE(backend_->Upload(packed, hidden_->data()).ok());
    } else {
      ASSERT_TRUE(backend_->Upload(hidden, hidden_->data()).ok());
    }
    ASSERT_TRUE(backend_
                    ->AnswerVocabulary({.hidden = {hidden_->data(), kDim, dtype},
                                        .weight = weight_.get(),
                                        .queries = queries_,
                                        .answers = absl::MakeSpan(answers_)})
                    .ok());
  }

  std::unique_ptr<Backend> backend_;
  std::vector<float> weight_values_, table_values_;
  std::unique_ptr<Weight> weight_, table_;
  std::unique_ptr<Buffer> hidden_, ids_;
  std::vector<VocabularyQuery> queries_;
  std::vector<VocabularyAnswer> answers_;
};
INSTANTIATE_TEST_SUITE_P(Cpu, TransfersTest, testing::Values("avx512", "generic"));
INSTANTIATE_TEST_SUITE_P(Emulated, TransfersTest, testing::Values("emulated", "emulated-bf16"));
INSTANTIATE_TEST_SUITE_P(Cuda, TransfersTest, testing::Values("cuda", "cuda-bf16"));

double ScoreOf(const VocabularyAnswer& answer, TransferScore score) {
  return score == TransferScore::kProbability ? answer.probability
         : score == TransferScore::kMargin    ? answer.margin
                                              : -answer.entropy;
}

// As the rule's comment has it, one candidate at a time.
bool IsTaken(absl::Span<const VocabularyAnswer> answers,
             absl::Span<const TransferCandidate> candidates, size_t mine,
             const TransferRule& rule) {
  const double score = ScoreOf(answers[candidates[mine].answer], rule.score);
  int32_t num_before = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const double other = ScoreOf(answers[candidates[i].answer], rule.score);
    if (other > score || (other == score && i < mine)) ++num_before;
  }
  return num_before < rule.count ||
         (rule.inclusive ? score >= rule.threshold : score > rule.threshold);
}

TEST_P(TransfersTest, TakesWhatTheHostWouldTake) {
  Answer();
  ASSERT_TRUE(backend_->Synchronize().ok());
  const std::vector<VocabularyAnswer> on_host = answers_;
  std::mt19937 random(3);
  int32_t num_taken = 0, num_left = 0, num_ties = 0;
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE(round);
    std::vector<int32_t> known(round % 4 == 0 ? kIds : 700);
    for (int32_t& id : known) id = static_cast<int32_t>(random() % 20) + 1000;
    std::vector<int32_t> targets(known.size());
    for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<int32_t>(i);
    std::shuffle(targets.begin(), targets.end(), random);
    std::vector<TransferCandidate> candidates;
    std::vector<TransferSelection> selections;
    std::vector<int32_t> want = known;
    for (int32_t first = 0; first < kQueries;) {
      const int32_t wanted = round % 3 == 0 ? kQueries : 1 + static_cast<int32_t>(random() % 300);
      const int32_t end = std::min<int32_t>(kQueries, first + wanted);
      TransferSelection selection;
      selection.candidates_begin = static_cast<int32_t>(candidates.size());
      for (; first < end; ++first) {
        if (random() % 8 == 0) continue;  // not every answer is a candidate
        candidates.push_back({first, targets[candidates.size()]});
      }
      selection.candidates_end = static_cast<int32_t>(candidates.size());
      const int32_t num = selection.candidates_end - selection.candidates_begin;
      TransferRule& rule = selection.rule;
      rule.score = static_cast<TransferScore>(random() % 3);
      const int32_t counts[] = {0, 1, 3, num / 2, num - 1, num, num + 5};
      rule.count = std::max(counts[random() % 7], 0);
      // A threshold that some score is exactly at.
      if (random() % 2 == 0) {
        rule.threshold = num == 0 ? 0.5 : ScoreOf(on_host[candidates.back().answer], rule.score);
        rule.inclusive = random() % 2 == 0;
      }
      const auto mine = absl::MakeConstSpan(candidates).subspan(selection.candidates_begin, num);
      for (size_t i = 0; i < mine.size(); ++i) {
        const bool taken = IsTaken(on_host, mine, i, rule);
        if (taken) want[mine[i].target] = on_host[mine[i].answer].token;
        ++(taken ? num_taken : num_left);
        if (i > 0 && ScoreOf(on_host[mine[i].answer], rule.score) ==
                         ScoreOf(on_host[mine[i - 1].answer], rule.score)) {
          ++num_ties;
        }
      }
      selections.push_back(selection);
    }
    // In a step of its own; once behind answers that the host has not seen.
    const bool answers_too = round == 0;
    if (answers_too) {
      ASSERT_TRUE(backend_->BeginStep().ok());
      Answer();
      ASSERT_TRUE(backend_->EndStep().ok());
    }
    std::vector<int32_t> chosen(known.size(), -7);
    ASSERT_TRUE(backend_->BeginStep().ok());
    ASSERT_TRUE(backend_
                    ->SelectTransfers({.selections = selections,
                                       .candidates = candidates,
                                       .known = known,
                                       .ids = static_cast<int32_t*>(ids_->data()),
                                       .chosen = absl::MakeSpan(chosen)})
                    .ok());
    ASSERT_TRUE(backend_->EndStep().ok());
    if (answers_too) {
      ASSERT_TRUE(backend_->WaitStep().ok());
    }
    ASSERT_TRUE(backend_->WaitStep().ok());
    EXPECT_EQ(chosen, want);
  }
  EXPECT_GT(num_taken, 1000);
  EXPECT_GT(num_left, 1000);
  EXPECT_GT(num_ties, 500);
}

TEST_P(TransfersTest, AnAnswerThatIsNotFiniteChangesNothing) {
  Answer(/*with_nan=*/true);
  const std::vector<int32_t> known(kQueries, 1234);
  std::vector<int32_t> chosen(kQueries);
  std::vector<TransferCandidate> candidates;
  for (int32_t i = 0; i < kQueries; ++i) candidates.push_back({i, kQueries - 1 - i});
  ASSERT_TRUE(backend_
                  ->SelectTransfers({.selections = {{0, kQueries, {.count = kQueries}}},
                                     .candidates = candidates,
                                     .known = known,
                                     .ids = static_cast<int32_t*>(ids_->data()),
                                     .chosen = absl::MakeSpan(chosen)})
                  .ok());
  ASSERT_TRUE(backend_->Synchronize().ok());
  for (int32_t i = 0; i < kQueries; ++i) {
    EXPECT_EQ(answers_[i].finite, i % 5 != 0);
    EXPECT_EQ(chosen[kQueries - 1 - i], i % 5 == 0 ? 1234 : answers_[i].token);
  }
}

TEST_P(TransfersTest, WhatWasChosenIsEmbedded) {
  Answer();
  const std::vector<int32_t> known = {3, 0, 5};
  std::vector<int32_t> chosen(3);
  auto out = *backend_->Allocate(3 * kDim * 4);
  auto want = *backend_->Allocate(3 * kDim * 4);
  auto* ids = static_cast<int32_t*>(ids_->data());
  ASSERT_TRUE(backend_
                  ->SelectTransfers({.selections = {{0, 1, {.count = 0}}},
                                     .candidates = {{0, 1}},
                                     .known = known,
                                     .ids = ids,
                                     .chosen = absl::MakeSpan(chosen)})
                  .ok());
  ASSERT_TRUE(backend_->EmbedChosen(*table_, ids, 3, 2.0F, {out->data(), kDim}).ok());
  ASSERT_TRUE(backend_->Embed(*table_, known, 2.0F, {want->data(), kDim}).ok());
  std::vector<float> got_values(3 * kDim), want_values(3 * kDim);
  ASSERT_TRUE(backend_->Download(out->data(), absl::MakeSpan(got_values)).ok());
  ASSERT_TRUE(backend_->Download(want->data(), absl::MakeSpan(want_values)).ok());
  EXPECT_EQ(got_values, want_values);
  EXPECT_EQ(chosen, known);
}

}  // namespace
}  // namespace cinnabar
