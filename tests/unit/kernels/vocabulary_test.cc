// Backend::AnswerVocabulary against the double reference, on every backend of this build. The
// float32 logits are the backend's own (Backend::Logits), so that only the head is judged here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "kernels/backend.h"
#include "kernels/cuda/math.h"
#include "tests/unit/kernels/named_backend.h"
#include "tests/unit/kernels/vocabulary_reference.h"

namespace cinnabar {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct HeadOptions {
  std::string isa = "auto";
  int32_t num_threads = 2;
  DType dtype = DType::kF32;
};

// A vocabulary head and its hidden rows on one backend.
class Head {
 public:
  // Null when this machine lacks the instruction set.
  static std::unique_ptr<Head> Make(const HeadOptions& options, const std::vector<float>& hidden,
                                    int64_t num_rows, const std::vector<float>& weight,
                                    int64_t vocabulary, const std::vector<float>& bias = {}) {
    absl::StatusOr<std::unique_ptr<Backend>> backend =
        MakeNamedBackend(options.isa, options.num_threads);
    if (backend.status().code() == absl::StatusCode::kUnavailable) return nullptr;
    CINNABAR_CHECK(backend.ok()) << backend.status().ToString();
    auto head = std::unique_ptr<Head>(new Head);
    head->backend_ = *std::move(backend);
    head->num_rows_ = num_rows;
    head->vocabulary_ = vocabulary;
    head->dim_ = static_cast<int64_t>(hidden.size()) / num_rows;
    const HostMatrix matrix = {.data = weight.data(), .rows = vocabulary, .cols = head->dim_};
    head->weight_ = *head->backend_->LoadWeight({&matrix, 1}, RowOrder::kStacked, options.dtype);
    head->CopyHidden(hidden);
    if (!bias.empty()) head->bias_ = head->Copy(bias);
    return head;
  }

  // A head whose logits are exactly `rows`: one-hot hidden rows pick the columns of the weight.
  // Finite values only, for 0 * inf is not 0.
  static std::unique_ptr<Head> WithLogits(const HeadOptions& options,
                                          const std::vector<std::vector<float>>& rows) {
    const size_t vocabulary = rows[0].size();
    std::vector<float> hidden(rows.size() * rows.size());
    std::vector<float> weight(vocabulary * rows.size());
    for (size_t row = 0; row < rows.size(); ++row) {
      hidden[row * rows.size() + row] = 1.0F;
      for (size_t id = 0; id < vocabulary; ++id) weight[id * rows.size() + row] = rows[row][id];
    }
    return Make(options, hidden, static_cast<int64_t>(rows.size()), weight,
                static_cast<int64_t>(vocabulary));
  }

  std::vector<VocabularyAnswer> Answer(const std::vector<VocabularyQuery>& queries) {
    const WorkspaceShape shape = {.rows_max = num_rows_,
                                  .cols_max = dim_,
                                  .vocabulary = vocabulary_,
                                  .queries_max = static_cast<int64_t>(queries.size())};
    EXPECT_TRUE(backend_->Reserve(shape).ok());
    std::vector<VocabularyAnswer> answers(queries.size());
    const absl::Status status = backend_->AnswerVocabulary(
        {.hidden = hidden_rows(),
         .weight = weight_.get(),
         .bias = bias_ == nullptr ? nullptr : static_cast<const float*>(bias_->data()),
         .queries = queries,
         .answers = absl::MakeSpan(answers)});
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(backend_->Synchronize().ok());
    return answers;
  }

  VocabularyAnswer Answer(const VocabularyQuery& query) {
    return Answer(std::vector<VocabularyQuery>{query})[0];
  }

  // The backend's logits of every hidden row.
  const std::vector<std::vector<float>>& logits() {
    if (!logits_.empty()) return logits_;
    EXPECT_TRUE(backend_
                    ->Reserve({.rows_max = num_rows_,
                               .cols_max = dim_,
                               .vocabulary = vocabulary_,
                               .queries_max = 1})
                    .ok());
    auto out = *backend_->Allocate(num_rows_ * vocabulary_ * 4);
    const absl::Status status = backend_->Logits(
        {.hidden = hidden_rows(),
         .num_rows = num_rows_,
         .weight = weight_.get(),
         .bias = bias_ == nullptr ? nullptr : static_cast<const float*>(bias_->data()),
         .out = {.data = out->data(), .stride = vocabulary_}});
    EXPECT_TRUE(status.ok()) << status;
    std::vector<float> flat(num_rows_ * vocabulary_);
    EXPECT_TRUE(backend_->Download(out->data(), absl::MakeSpan(flat)).ok());
    for (int64_t row = 0; row < num_rows_; ++row) {
      logits_.emplace_back(flat.begin() + row * vocabulary_,
                           flat.begin() + (row + 1) * vocabulary_);
    }
    return logits_;
  }

  VocabularyReference Reference(const VocabularyQuery& query) {
    static const std::vector<float> kNone;
    const auto& rows = logits();
    return AnswerInDouble(query, rows[query.hidden_row],
                          query.unconditional_row < 0 ? kNone : rows[query.unconditional_row]);
  }

 private:
  Rows hidden_rows() const {
    return {
        .data = hidden_->data(), .stride = hidden_stride_, .dtype = backend_->activation_dtype()};
  }

  // In the backend's own dtype; bf16 rows begin on 16 bytes, as a denoiser's do.
  void CopyHidden(const std::vector<float>& hidden) {
    if (backend_->activation_dtype() == DType::kF32) {
      hidden_stride_ = dim_;
      hidden_ = Copy(hidden);
      return;
    }
    hidden_stride_ = (dim_ + 7) / 8 * 8;
    std::vector<float> pairs(num_rows_ * hidden_stride_ / 2);
    for (int64_t row = 0; row < num_rows_; ++row) {
      for (int64_t i = 0; i < dim_; ++i) {
        const uint16_t half = cuda::ToBf16(hidden[row * dim_ + i]);
        std::memcpy(reinterpret_cast<char*>(pairs.data()) + 2 * (row * hidden_stride_ + i), &half,
                    2);
      }
    }
    hidden_ = Copy(pairs);
  }

  std::unique_ptr<Buffer> Copy(const std::vector<float>& host) {
    auto buffer = *backend_->Allocate(static_cast<int64_t>(host.size()) * 4);
    CINNABAR_CHECK(backend_->Upload(host, buffer->data()).ok());
    CINNABAR_CHECK(backend_->Synchronize().ok());
    return buffer;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weight> weight_;
  std::unique_ptr<Buffer> hidden_;
  std::unique_ptr<Buffer> bias_;
  std::vector<std::vector<float>> logits_;
  int64_t num_rows_ = 0;
  int64_t vocabulary_ = 0;
  int64_t dim_ = 0;
  int64_t hidden_stride_ = 0;
};

std::vector<float> Normal(size_t count, float deviation, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// What may differ from the reference, and why:
//   * The scores of a draw are float32: l / T + g is rounded at the size of the score, and g
//   carries
//     2e-7 of its own. Two candidates closer than that may come out in either order; every other
//     token must be the reference's.
//   * probability: the token's own exp and the merge are double; a chunk's mass is a float32 sum of
//     at most 16 terms a lane (relative error <= 20 * 2^-24 = 1.2e-6, typically 1e-7), its terms
//     exact to 2e-7 plus 2^-24 |d| of the exponent d, weighted by exp(d).
//   * entropy: sums of the same kind, of d * exp(d). What is below 1e-35 of its chunk's largest is
//   left out.
void ExpectAgrees(const VocabularyAnswer& got, const VocabularyReference& reference,
                  const VocabularyQuery& query) {
  const VocabularyAnswer& want = reference.answer;
  ASSERT_EQ(got.finite, want.finite);
  if (!want.finite) return;
  double probability = want.probability;
  if (got.token != want.token) {
    ASSERT_GE(got.token, 0);
    ASSERT_GE(want.token, 0);
    const double best = reference.scores[want.token];
    ASSERT_NEAR(reference.scores[got.token], best, 1e-6 * (1.0 + std::abs(best)))
        << "token " << got.token << " instead of " << want.token;
    ASSERT_TRUE(query.pick_temperature > 0.0F || query.pick == PickRule::kUniformTweedie);
    probability *= std::exp((reference.logits[got.token] - want.token_logit) /
                            static_cast<double>(query.statistics_temperature));
  }
  if (got.token >= 0) {
    EXPECT_EQ(got.token_logit, reference.logits[got.token]);
  }
  EXPECT_NEAR(got.probability, probability, 1e-5 * probability);
  EXPECT_NEAR(got.margin, want.margin, 1e-5 * std::abs(want.margin));
  EXPECT_NEAR(got.entropy, want.entropy, 1e-4 * want.entropy + 1e-32);
  if (std::isinf(want.log_sum_exp)) {
    EXPECT_EQ(got.log_sum_exp, want.log_sum_exp);
  } else {
    EXPECT_NEAR(got.log_sum_exp, want.log_sum_exp, 1e-6 * (1.0 + std::abs(want.log_sum_exp)));
  }
}

bool SameBits(const VocabularyAnswer& a, const VocabularyAnswer& b) {
  auto same = [](const auto& x, const auto& y) { return std::memcmp(&x, &y, sizeof(x)) == 0; };
  if (a.finite != b.finite) return false;
  return !a.finite || (a.token == b.token && same(a.token_logit, b.token_logit) &&
                       same(a.probability, b.probability) && same(a.margin, b.margin) &&
                       same(a.entropy, b.entropy) && same(a.log_sum_exp, b.log_sum_exp));
}

// Queries that use every feature in random combinations. The rules live in `rules`, one list a
// query.
std::vector<VocabularyQuery> MixedQueries(int32_t num_queries, int32_t num_rows, int32_t vocabulary,
                                          uint32_t seed,
                                          std::vector<std::vector<VocabularyRule>>& rules) {
  std::mt19937 random(seed);
  auto one_of = [&](auto... choices) {
    const double values[] = {static_cast<double>(choices)...};
    return values[random() % sizeof...(choices)];
  };
  std::vector<VocabularyQuery> queries(num_queries);
  rules.assign(num_queries, {});
  for (int32_t index = 0; index < num_queries; ++index) {
    VocabularyQuery& query = queries[index];
    query.hidden_row = static_cast<int32_t>(random() % num_rows);
    if (random() % 3 == 0) {
      query.unconditional_row = static_cast<int32_t>(random() % num_rows);
      query.guidance_scale = static_cast<float>(one_of(0.0, 0.5, 2.0, -1.0));
    }
    query.pick_temperature = static_cast<float>(one_of(0.0, 0.0, 0.2, 1.0, 3.0));
    query.statistics_temperature = static_cast<float>(one_of(1.0, 1.0, 0.3, 2.5));
    query.noise = {.seed = (static_cast<uint64_t>(random()) << 32) + random(),
                   .position = static_cast<uint32_t>(random() % 4096),
                   .step = static_cast<uint32_t>(random() % 256)};
    if (random() % 4 == 0) {
      query.pickable_ids = 1 + static_cast<int32_t>(random() % vocabulary);
    }
    if (random() % 8 == 0) {
      query.pick = PickRule::kUniformTweedie;
      query.own_token = static_cast<int32_t>(random() % vocabulary);
      query.sigma_step = static_cast<float>(one_of(0.01, 0.3, 2.0));
    } else if (random() % 2 == 0) {
      query.top_k = static_cast<int32_t>(one_of(0, 1, 5, 50, 600));
      query.top_p = static_cast<float>(one_of(1.0, 0.95, 0.5, 0.01));
      query.top_p_rule = static_cast<TopPRule>(random() % 3);
      query.filter_order =
          random() % 2 == 0 ? FilterOrder::kTopPThenTopK : FilterOrder::kTopKThenTopP;
    }
    const int32_t num_rules = random() % 2 == 0 ? 0 : static_cast<int32_t>(random() % 17);
    std::vector<int32_t> ids;
    for (int32_t rule = 0; rule < num_rules; ++rule) {
      const int32_t id = static_cast<int32_t>(random() % vocabulary);
      if (std::find(ids.begin(), ids.end(), id) != ids.end()) continue;
      ids.push_back(id);
      rules[index].push_back({.id = id,
                              .bias = static_cast<float>(one_of(0.0, 0.0, 3.0, -2.0, -kInfinity)),
                              .counted = random() % 2 == 0,
                              .pickable = random() % 2 == 0});
    }
    query.rules = rules[index];
  }
  return queries;
}

class VocabularyTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const auto backend = MakeNamedBackend(GetParam());
    if (!backend.ok()) SkipWithout(GetParam(), backend.status());
  }
  HeadOptions options(int32_t num_threads = 2) const {
    return {.isa = GetParam(), .num_threads = num_threads};
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, VocabularyTest, testing::Values("avx512", "avx2", "generic"),
                         [](const auto& info) { return std::string(info.param); });
std::string NameOfBackend(const testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  for (char& c : name) c = c == '-' ? '_' : c;
  return name;
}
INSTANTIATE_TEST_SUITE_P(Emulated, VocabularyTest,
                         testing::Values("emulated", "emulated-bf16", "emulated-bf16-wgmma"),
                         NameOfBackend);
INSTANTIATE_TEST_SUITE_P(Cuda, VocabularyTest, testing::Values("cuda", "cuda-bf16"), NameOfBackend);
INSTANTIATE_TEST_SUITE_P(Hopper, VocabularyTest, testing::Values("cuda-bf16-wgmma"), NameOfBackend);

TEST_P(VocabularyTest, AgreesWithDoubleReference) {
  constexpr int32_t kRows = 9;
  constexpr int32_t kDim = 37;
  for (const int32_t vocabulary : {1, 31, 32, 33, 97, 513, 4097}) {
    for (const DType dtype : {DType::kF32, DType::kBf16}) {
      SCOPED_TRACE(absl::StrCat("vocabulary=", vocabulary, " dtype=", NameOf(dtype)));
      HeadOptions head_options = options();
      head_options.dtype = dtype;
      const auto head =
          Head::Make(head_options, Normal(kRows * kDim, 1.0F, 1), kRows,
                     Normal(static_cast<size_t>(vocabulary) * kDim, 0.5F, 2), vocabulary,
                     dtype == DType::kBf16 ? Normal(vocabulary, 1.0F, 3) : std::vector<float>());
      std::vector<std::vector<VocabularyRule>> rules;
      const auto queries = MixedQueries(200, kRows, vocabulary, 40 + vocabulary, rules);
      const auto answers = head->Answer(queries);
      for (size_t index = 0; index < queries.size(); ++index) {
        SCOPED_TRACE(absl::StrCat("query ", index));
        ExpectAgrees(answers[index], head->Reference(queries[index]), queries[index]);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(VocabularyTest, TiesGoToTheLowerId) {
  // Equal maxima in one vector, in different vectors, and in different chunks.
  for (const auto& [first, second] : std::vector<std::pair<int, int>>{
           {3, 4}, {3, 19}, {700, 701}, {15, 3000}, {255, 256}, {511, 512}, {0, 4096}}) {
    std::vector<float> row(4097, -1.0F);
    row[first] = row[second] = 2.5F;
    const auto head = Head::WithLogits(options(), {row});
    const VocabularyAnswer answer = head->Answer(VocabularyQuery{});
    EXPECT_EQ(answer.token, first);
    EXPECT_EQ(answer.margin, 0.0);
    EXPECT_EQ(answer.token_logit, 2.5F);
  }
  const auto flat = Head::WithLogits(options(), {std::vector<float>(1000, -4.25F)});
  EXPECT_EQ(flat->Answer(VocabularyQuery{}).token, 0);
  EXPECT_NEAR(flat->Answer(VocabularyQuery{}).entropy, std::log(1000.0), 1e-12);
}

TEST_P(VocabularyTest, RulesSeparateCountingFromPicking) {
  const auto head = Head::WithLogits(options(), {{1.0F, 4.0F, 3.0F, 2.0F}});
  auto answer = [&](std::vector<VocabularyRule> rules) {
    VocabularyQuery query;
    query.rules = rules;
    return head->Answer(query);
  };
  const double e1 = std::exp(-3.0), e2 = std::exp(-2.0), e3 = std::exp(-1.0);  // relative to 4
  // Not picked, still counted: LLaDA's confidence of a token that is not the largest.
  VocabularyAnswer got = answer({{.id = 1, .pickable = false}});
  EXPECT_EQ(got.token, 2);
  EXPECT_NEAR(got.probability, e3 / (1 + e1 + e2 + e3), 1e-6);
  EXPECT_NEAR(got.margin, (1 - e3) / (1 + e1 + e2 + e3), 1e-6);
  // Neither counted nor picked: as if the id did not exist.
  got = answer({{.id = 1, .counted = false, .pickable = false}});
  EXPECT_EQ(got.token, 2);
  EXPECT_NEAR(got.probability, 1 / (1 + e3 + e2), 1e-6);
  // Picked, not counted: capped at 1.
  got = answer({{.id = 1, .counted = false}});
  EXPECT_EQ(got.token, 1);
  EXPECT_EQ(got.probability, 1.0);
  got = answer({{.id = 1, .counted = false, .pickable = false},
                {.id = 2, .counted = true, .pickable = false},
                {.id = 3, .counted = false}});
  EXPECT_EQ(got.token, 3);
  EXPECT_NEAR(got.probability, e2 / (e1 + e3), 1e-6);
  // A bias comes before everything else and shows in token_logit.
  got = answer({{.id = 0, .bias = 4.0F}});
  EXPECT_EQ(got.token, 0);
  EXPECT_EQ(got.token_logit, 5.0F);
  // A forbidden id is no NaN.
  got = answer({{.id = 1, .bias = -kInfinity}});
  EXPECT_TRUE(got.finite);
  EXPECT_EQ(got.token, 2);
  EXPECT_NEAR(got.log_sum_exp, 4.0 + std::log(e1 + e2 + e3), 1e-6);
}

TEST_P(VocabularyTest, NothingPickableOrCountedIsNotAnError) {
  const auto head = Head::WithLogits(options(), {{1.0F, 4.0F, 3.0F}});
  std::vector<VocabularyRule> rules;
  VocabularyQuery query;
  for (int32_t id = 0; id < 3; ++id) rules.push_back({.id = id, .pickable = false});
  query.rules = rules;
  VocabularyAnswer got = head->Answer(query);
  EXPECT_TRUE(got.finite);
  EXPECT_EQ(got.token, -1);
  EXPECT_GT(got.margin, 0.0);
  // Every logit -inf: no id is worth picking, and no mass.
  for (VocabularyRule& rule : rules) rule = {.id = rule.id, .bias = -kInfinity};
  for (const float temperature : {0.0F, 1.0F}) {
    for (const float top_p : {1.0F, 0.9F}) {
      query.pick_temperature = temperature;
      query.top_p = top_p;
      got = head->Answer(query);
      EXPECT_TRUE(got.finite);
      EXPECT_EQ(got.token, -1);
      EXPECT_EQ(got.probability, 0.0);
      EXPECT_EQ(got.margin, 0.0);
      EXPECT_EQ(got.entropy, 0.0);
      EXPECT_EQ(got.log_sum_exp, -kInfinity);
    }
  }
}

TEST_P(VocabularyTest, IdsAboveTheLimitAreCountedButNeverPicked) {
  std::vector<float> row(600, 0.0F);
  row[599] = 5.0F;
  row[300] = 4.0F;
  row[7] = 3.0F;
  const auto head = Head::WithLogits(options(), {row});
  for (const auto& [limit, token] : std::vector<std::pair<int, int>>{
           {0, 599}, {600, 599}, {599, 300}, {301, 300}, {300, 7}, {1, 0}}) {
    VocabularyQuery query;
    query.pickable_ids = limit;
    EXPECT_EQ(head->Answer(query).token, token) << limit;
    query.pick_temperature = 0.01F;
    query.statistics_temperature = 1.0F;
    EXPECT_EQ(head->Answer(query).token, token == 0 ? 0 : token) << limit;
    EXPECT_NEAR(head->Answer(query).log_sum_exp,
                std::log(597.0 + std::exp(5.0) + std::exp(4.0) + std::exp(3.0)), 1e-6);
  }
}

TEST_P(VocabularyTest, GuidanceMovesAwayFromTheUnconditionalRow) {
  const auto head = Head::WithLogits(options(), {{1.0F, 2.0F, 0.0F}, {1.0F, 2.5F, 0.0F}});
  VocabularyQuery query;
  query.unconditional_row = 1;
  query.guidance_scale = 3.0F;
  const VocabularyAnswer got = head->Answer(query);
  // 2.5 + 4 * (2 - 2.5) = 0.5: the first id wins.
  EXPECT_EQ(got.token, 0);
  EXPECT_EQ(got.token_logit, 1.0F);
  EXPECT_NEAR(got.log_sum_exp, std::log(std::exp(1.0) + std::exp(0.5) + 1.0), 1e-6);
}

TEST_P(VocabularyTest, GuidedAndPlainRowsStandBesideEachOther) {
  constexpr int32_t kRows = 40;
  const auto head =
      Head::Make(options(), Normal(kRows * 16, 1.0F, 5), kRows, Normal(700 * 16, 1.0F, 6), 700);
  std::vector<VocabularyQuery> queries(kRows);
  for (int32_t row = 0; row < kRows; ++row) {
    queries[row].hidden_row = row;
    if (row % 3 != 0) {
      queries[row].unconditional_row = (row * 7 + 1) % kRows;
      queries[row].guidance_scale = 0.25F * static_cast<float>(row);
    }
  }
  const auto answers = head->Answer(queries);
  for (int32_t row = 0; row < kRows; ++row) {
    SCOPED_TRACE(row);
    ExpectAgrees(answers[row], head->Reference(queries[row]), queries[row]);
  }
}

TEST_P(VocabularyTest, FiltersKeepWhatTheContractSays) {
  // Masses .4 .2 .2 .1 .1 by hand; ids out of order.
  std::vector<float> row(5);
  const float mass[] = {0.1F, 0.2F, 0.4F, 0.2F, 0.1F};
  for (int id = 0; id < 5; ++id) row[id] = std::log(mass[id]);
  const auto head = Head::WithLogits(options(), {row});
  auto probability = [&](int32_t top_k, float top_p, FilterOrder order,
                         TopPRule rule = TopPRule::kCrossing) {
    VocabularyQuery query;
    query.top_p_rule = rule;
    query.top_k = top_k;
    query.top_p = top_p;
    query.filter_order = order;
    const VocabularyAnswer got = head->Answer(query);
    EXPECT_EQ(got.token, 2);
    return got.probability;
  };
  using enum FilterOrder;
  using enum TopPRule;
  EXPECT_NEAR(probability(0, 1.0F, kTopPThenTopK), 0.4, 1e-6);
  EXPECT_NEAR(probability(1, 1.0F, kTopPThenTopK), 1.0, 1e-6);
  // The tie with the second survives top_k = 2.
  EXPECT_NEAR(probability(2, 1.0F, kTopPThenTopK), 0.5, 1e-6);
  EXPECT_NEAR(probability(4, 1.0F, kTopPThenTopK), 0.4, 1e-6);
  // The id that crosses is kept; of two equal ones the lower comes first.
  EXPECT_NEAR(probability(0, 0.3F, kTopPThenTopK), 1.0, 1e-6);
  EXPECT_NEAR(probability(0, 0.5F, kTopPThenTopK), 0.4 / 0.6, 1e-6);
  EXPECT_NEAR(probability(0, 0.7F, kTopPThenTopK), 0.5, 1e-6);
  // top_p of the whole distribution, or of what top_k left (.5 .25 .25).
  EXPECT_NEAR(probability(3, 0.45F, kTopPThenTopK), 0.4 / 0.6, 1e-6);
  EXPECT_NEAR(probability(3, 0.45F, kTopKThenTopP), 1.0, 1e-6);
  // The id that crosses is dropped, but never the largest.
  EXPECT_NEAR(probability(0, 0.3F, kTopPThenTopK, kInside), 1.0, 1e-6);
  EXPECT_NEAR(probability(0, 0.5F, kTopPThenTopK, kInside), 1.0, 1e-6);
  EXPECT_NEAR(probability(0, 0.7F, kTopPThenTopK, kInside), 0.4 / 0.6, 1e-6);
  EXPECT_NEAR(probability(0, 0.85F, kTopPThenTopK, kInside), 0.5, 1e-6);
  EXPECT_NEAR(probability(3, 0.7F, kTopPThenTopK, kInside), 0.4 / 0.6, 1e-6);
  EXPECT_NEAR(probability(3, 0.7F, kTopKThenTopP, kInside), 1.0, 1e-6);
  // Two stay at least, the lower of two equal ones, where top_k has left as many.
  EXPECT_NEAR(probability(0, 0.3F, kTopPThenTopK, kCrossingTwoAtLeast), 0.4 / 0.6, 1e-6);
  EXPECT_NEAR(probability(0, 0.7F, kTopPThenTopK, kCrossingTwoAtLeast), 0.5, 1e-6);
  EXPECT_NEAR(probability(3, 0.3F, kTopKThenTopP, kCrossingTwoAtLeast), 0.4 / 0.6, 1e-6);
  EXPECT_NEAR(probability(1, 0.3F, kTopKThenTopP, kCrossingTwoAtLeast), 1.0, 1e-6);
}

TEST_P(VocabularyTest, FiltersOnLongTailsAndFlatDistributions) {
  constexpr int32_t kVocabulary = 5000;
  std::vector<std::vector<float>> rows;
  rows.push_back(Normal(kVocabulary, 6.0F, 11));   // peaked
  rows.push_back(Normal(kVocabulary, 0.01F, 12));  // nearly flat: thousands are kept
  rows.emplace_back(kVocabulary, 1.5F);            // all equal
  rows.push_back(Normal(kVocabulary, 1.0F, 13));   // many exact ties
  for (float& value : rows.back()) value = std::round(value * 2.0F) / 2.0F;
  rows.emplace_back(kVocabulary);  // ascending: every id beats all before it
  for (int32_t id = 0; id < kVocabulary; ++id) rows.back()[id] = static_cast<float>(id) * 1e-3F;
  const auto head = Head::WithLogits(options(), rows);
  std::vector<VocabularyQuery> queries;
  for (int32_t row = 0; row < static_cast<int32_t>(rows.size()); ++row) {
    for (const int32_t top_k : {0, 1, 50, 513, 4000}) {
      for (const float top_p : {1.0F, 0.95F, 0.3F, 1e-6F}) {
        for (const FilterOrder order : {FilterOrder::kTopPThenTopK, FilterOrder::kTopKThenTopP}) {
          for (const float temperature : {0.0F, 0.7F}) {
            VocabularyQuery query;
            query.hidden_row = row;
            query.pick_temperature = temperature;
            query.statistics_temperature = temperature == 0.0F ? 1.0F : temperature;
            query.top_k = top_k;
            query.top_p = top_p;
            query.top_p_rule = static_cast<TopPRule>(queries.size() / 2 % 3);
            query.filter_order = order;
            query.noise = {.seed = 99, .position = static_cast<uint32_t>(queries.size())};
            queries.push_back(query);
          }
        }
      }
    }
  }
  const auto answers = head->Answer(queries);
  for (size_t index = 0; index < queries.size(); ++index) {
    const VocabularyQuery& query = queries[index];
    SCOPED_TRACE(absl::StrCat("row ", query.hidden_row, " top_k ", query.top_k, " top_p ",
                              query.top_p, " rule ", static_cast<int>(query.top_p_rule), " order ",
                              static_cast<int>(query.filter_order)));
    ExpectAgrees(answers[index], head->Reference(query), query);
  }
}

TEST_P(VocabularyTest, StatisticsAtExtremeTemperaturesAndScales) {
  std::vector<std::vector<float>> rows;
  rows.push_back(Normal(3000, 1.0F, 21));
  rows.push_back(Normal(3000, 30.0F, 22));
  rows.push_back(Normal(3000, 0.1F, 23));
  rows.back()[1234] = 25.0F;  // almost one-hot: entropy 1e-6
  rows.emplace_back(3000, -80.0F);
  rows.back()[2999] = 3e4F;
  for (float& value : rows.emplace_back(Normal(3000, 1.0F, 24))) value += 1000.0F;
  const auto head = Head::WithLogits(options(), rows);
  for (int32_t row = 0; row < static_cast<int32_t>(rows.size()); ++row) {
    for (const float temperature : {0.01F, 0.2F, 1.0F, 10.0F, 1000.0F}) {
      SCOPED_TRACE(absl::StrCat("row ", row, " temperature ", temperature));
      VocabularyQuery query;
      query.hidden_row = row;
      query.statistics_temperature = temperature;
      ExpectAgrees(head->Answer(query), head->Reference(query), query);
      // A draw from another temperature than the statistics': the probability of an unlikely token.
      query.pick_temperature = 50.0F;
      const VocabularyReference reference = head->Reference(query);
      if (reference.answer.probability > 1e-300)
        ExpectAgrees(head->Answer(query), reference, query);
    }
  }
}

TEST_P(VocabularyTest, ANonFiniteRowSpoilsNoOther) {
  constexpr int32_t kRows = 25;
  constexpr int32_t kDim = 8;
  constexpr int32_t kVocabulary = 1000;
  std::vector<float> hidden = Normal(kRows * kDim, 1.0F, 31);
  const std::vector<float> clean = hidden;
  hidden[3 * kDim + 2] = kNan;
  hidden[11 * kDim] = kInfinity;
  hidden[24 * kDim + 7] = -kInfinity;
  const std::vector<float> weight = Normal(kVocabulary * kDim, 1.0F, 32);
  const auto head = Head::Make(options(), hidden, kRows, weight, kVocabulary);
  const auto clean_head = Head::Make(options(), clean, kRows, weight, kVocabulary);
  for (const bool filtered : {false, true}) {
    for (const float temperature : {0.0F, 1.0F}) {
      std::vector<VocabularyQuery> queries(kRows);
      for (int32_t row = 0; row < kRows; ++row) {
        queries[row].hidden_row = row;
        queries[row].pick_temperature = temperature;
        if (filtered) queries[row].top_p = row % 2 == 0 ? 0.9F : 0.9999F;
        if (row % 5 == 1) queries[row].pick = PickRule::kUniformTweedie;
        if (row % 5 == 1) queries[row].top_p = 1.0F;
        queries[row].own_token = 5;
        queries[row].sigma_step = 0.5F;
      }
      queries[20].unconditional_row = 11;
      const auto answers = head->Answer(queries);
      const auto clean_answers = clean_head->Answer(queries);
      for (int32_t row = 0; row < kRows; ++row) {
        const bool spoilt = row == 3 || row == 11 || row == 24 || row == 20;
        EXPECT_EQ(answers[row].finite, !spoilt) << row;
        if (spoilt) continue;
        EXPECT_TRUE(SameBits(answers[row], clean_answers[row])) << row;
      }
    }
  }
}

TEST_P(VocabularyTest, OneBadLogitAnywhereIsSeen) {
  // The bias puts the bad value at one id; also where the rules neither count nor pick it.
  for (const int32_t id : {0, 15, 16, 255, 256, 512, 599}) {
    for (const float bad : {kNan, kInfinity}) {
      std::vector<float> bias(600, 0.0F);
      bias[id] = bad;
      const auto head = Head::Make(options(), {1.0F}, 1, Normal(600, 1.0F, 33), 600, bias);
      VocabularyQuery query;
      EXPECT_FALSE(head->Answer(query).finite) << id;
      const std::vector<VocabularyRule> rules = {{.id = id, .counted = false, .pickable = false}};
      query.rules = rules;
      EXPECT_FALSE(head->Answer(query).finite) << id;
    }
    std::vector<float> bias(600, 0.0F);
    bias[id] = -kInfinity;
    const auto head = Head::Make(options(), {1.0F}, 1, Normal(600, 1.0F, 33), 600, bias);
    const VocabularyAnswer got = head->Answer(VocabularyQuery{});
    EXPECT_TRUE(got.finite);
    ExpectAgrees(got, head->Reference(VocabularyQuery{}), VocabularyQuery{});
  }
}

// --- Bits
// ----------------------------------------------------------------------------------------------

TEST(VocabularyBitsTest, IndependentOfBatchThreadsAndInstructionSet) {
  constexpr int32_t kRows = 30;
  constexpr int32_t kDim = 50;
  for (const int32_t vocabulary : {27, 513, 3001}) {
    SCOPED_TRACE(vocabulary);
    const auto hidden = Normal(kRows * kDim, 1.0F, 41);
    const auto weight = Normal(static_cast<size_t>(vocabulary) * kDim, 0.4F, 42);
    std::vector<std::vector<VocabularyRule>> rules;
    const auto queries = MixedQueries(150, kRows, vocabulary, 43, rules);
    const auto head = Head::Make({.num_threads = 1}, hidden, kRows, weight, vocabulary);
    const auto want = head->Answer(queries);
    auto expect_same = [&](const std::vector<VocabularyAnswer>& got, absl::string_view what) {
      for (size_t index = 0; index < want.size(); ++index) {
        EXPECT_TRUE(SameBits(want[index], got[index])) << what << ", query " << index;
      }
    };
    std::vector<VocabularyAnswer> alone;
    for (const VocabularyQuery& query : queries) alone.push_back(head->Answer(query));
    expect_same(alone, "alone");
    std::vector<VocabularyQuery> reversed(queries.rbegin(), queries.rend());
    std::vector<VocabularyAnswer> answers = head->Answer(reversed);
    expect_same({answers.rbegin(), answers.rend()}, "reversed");
    for (const char* isa : {"avx512", "avx2", "generic"}) {
      for (const int32_t num_threads : {1, 2, 5}) {
        const auto other =
            Head::Make({.isa = isa, .num_threads = num_threads}, hidden, kRows, weight, vocabulary);
        if (other == nullptr) continue;
        expect_same(other->Answer(queries), absl::StrCat(isa, " with ", num_threads, " threads"));
      }
    }
  }
}

// The same for the CUDA backend: heads of bf16 and FP8 through the tensor cores, tiles of 32 and of
// 128 slots, one pass and several.
TEST_P(VocabularyTest, BitsDoNotDependOnTheBatch) {
  constexpr int32_t kRows = 30;
  for (const auto& [vocabulary, dim] :
       std::vector<std::pair<int32_t, int32_t>>{{300, 264}, {513, 50}}) {
    for (const DType dtype : {DType::kF32, DType::kBf16}) {
      for (const bool fp8 : {false, true}) {
        HeadOptions head_options = options();
        head_options.dtype = dtype;
        if (fp8) {
          if (head_options.isa.find("bf16") == std::string::npos || dtype == DType::kF32) continue;
          head_options.isa += "-fp8";
        }
        SCOPED_TRACE(absl::StrCat(vocabulary, " ", NameOf(dtype), fp8 ? " fp8" : ""));
        const auto head = Head::Make(head_options, Normal(kRows * dim, 1.0F, 41), kRows,
                                     Normal(static_cast<size_t>(vocabulary) * dim, 0.2F, 42),
                                     vocabulary, Normal(vocabulary, 0.5F, 43));
        std::vector<std::vector<VocabularyRule>> rules;
        const auto queries = MixedQueries(700, kRows, vocabulary, 44, rules);
        const auto want = head->Answer(queries);
        for (size_t index = 0; index < queries.size(); index += 23) {
          EXPECT_TRUE(SameBits(want[index], head->Answer(queries[index]))) << "alone, " << index;
        }
        const std::vector<VocabularyQuery> few(queries.begin() + 100, queries.begin() + 121);
        const auto got = head->Answer(few);
        for (size_t index = 0; index < few.size(); ++index) {
          EXPECT_TRUE(SameBits(want[100 + index], got[index])) << "of 21, " << index;
          ExpectAgrees(got[index], head->Reference(few[index]), few[index]);
        }
      }
    }
  }
}

TEST(VocabularyBitsTest, ManyQueriesAreAnsweredInGroups) {
  constexpr int32_t kQueries = 1500;  // more than any group
  const auto head = Head::Make({}, Normal(64, 1.0F, 44), 8, Normal(300 * 8, 1.0F, 45), 300);
  std::vector<std::vector<VocabularyRule>> rules;
  const auto queries = MixedQueries(kQueries, 8, 300, 46, rules);
  const auto answers = head->Answer(queries);
  for (int32_t index = 0; index < kQueries; index += 37) {
    EXPECT_TRUE(SameBits(answers[index], head->Answer(queries[index]))) << index;
  }
  EXPECT_THAT(head->Answer(std::vector<VocabularyQuery>{}), testing::IsEmpty());
}

// --- Draws
// ---------------------------------------------------------------------------------------------

// Draws `num_draws` tokens from `query` (step 0, 1, ..) and compares their counts with the weights
// of the reference. The seeds are fixed, so a pass stays a pass; the bound is the mean of
// chi-square plus six deviations, which an exact sampler exceeds once in a billion seeds.
void ExpectDrawsFollow(Head& head, VocabularyQuery query, int32_t num_draws) {
  const VocabularyReference reference = head.Reference(query);
  double mass = 0.0;
  for (const double weight : reference.pick_weights) mass += weight;
  std::vector<int64_t> counts(reference.pick_weights.size());
  std::vector<VocabularyQuery> queries(num_draws, query);
  for (int32_t draw = 0; draw < num_draws; ++draw) queries[draw].noise.step = draw;
  int32_t num_differ = 0;
  const auto answers = head.Answer(queries);
  for (int32_t draw = 0; draw < num_draws; ++draw) {
    ASSERT_GE(answers[draw].token, 0);
    ++counts[answers[draw].token];
    if (draw % 500 == 0) {
      num_differ += answers[draw].token != head.Reference(queries[draw]).answer.token ? 1 : 0;
    }
  }
  EXPECT_LE(num_differ, 1);  // a tie within float32 at most
  // Ids with less than 10 expected draws share a cell.
  double chi_square = 0.0;
  double rare_expected = 0.0;
  int64_t rare_count = 0;
  int32_t num_cells = 0;
  for (size_t id = 0; id < counts.size(); ++id) {
    const double expected = reference.pick_weights[id] / mass * num_draws;
    if (expected == 0.0) {
      EXPECT_EQ(counts[id], 0) << id;
    }
    if (expected < 10.0) {
      rare_expected += expected;
      rare_count += counts[id];
      continue;
    }
    ++num_cells;
    chi_square += (counts[id] - expected) * (counts[id] - expected) / expected;
  }
  if (rare_expected > 0.0) {
    ++num_cells;
    chi_square += (rare_count - rare_expected) * (rare_count - rare_expected) / rare_expected;
  }
  const double freedom = num_cells - 1;
  EXPECT_LT(chi_square, freedom + 6.0 * std::sqrt(2.0 * freedom) + 6.0) << num_cells << " cells";
}

TEST(VocabularyDrawTest, DrawsFollowTheSoftmax) {
  const auto head = Head::WithLogits({}, {Normal(97, 2.0F, 51), Normal(700, 1.0F, 52)});
  for (const int32_t row : {0, 1}) {
    for (const float temperature : {0.4F, 1.0F, 2.0F}) {
      SCOPED_TRACE(absl::StrCat("row ", row, " temperature ", temperature));
      VocabularyQuery query;
      query.hidden_row = row;
      query.pick_temperature = temperature;
      query.noise = {.seed = 7, .position = static_cast<uint32_t>(row)};
      ExpectDrawsFollow(*head, query, 120000);
    }
  }
}

TEST(VocabularyDrawTest, DrawsFollowTheRulesAndTheFilters) {
  const auto head = Head::WithLogits({}, {Normal(97, 2.0F, 53)});
  std::vector<VocabularyRule> rules = {{.id = 3, .bias = 2.0F},
                                       {.id = 10, .counted = false},
                                       {.id = 11, .pickable = false},
                                       {.id = 50, .bias = -kInfinity}};
  for (const int32_t top_k : {0, 12}) {
    for (const float top_p : {1.0F, 0.9F}) {
      SCOPED_TRACE(absl::StrCat("top_k ", top_k, " top_p ", top_p));
      VocabularyQuery query;
      query.pick_temperature = 1.3F;
      query.statistics_temperature = 1.3F;
      query.top_k = top_k;
      query.top_p = top_p;
      query.rules = rules;
      query.pickable_ids = 90;
      query.noise.seed = 8;
      ExpectDrawsFollow(*head, query, 120000);
    }
  }
}

TEST(VocabularyDrawTest, DrawsFollowTheUniformTweedieStep) {
  const auto head = Head::WithLogits({}, {Normal(60, 1.5F, 54)});
  for (const float sigma : {0.02F, 0.5F, 3.0F}) {
    SCOPED_TRACE(sigma);
    VocabularyQuery query;
    query.pick = PickRule::kUniformTweedie;
    query.own_token = 17;
    query.sigma_step = sigma;
    query.noise.seed = 9;
    ExpectDrawsFollow(*head, query, 100000);
  }
}

// On equal logits the token is the argmax of the noise alone: every word must be the one of
// philox.h.
TEST_P(VocabularyTest, TheNoiseIsThatOfPhilox) {
  const auto head = Head::WithLogits(options(), {std::vector<float>(4099, 0.0F)});
  std::vector<VocabularyQuery> queries(300);
  std::mt19937_64 random(61);
  for (VocabularyQuery& query : queries) {
    query.pick_temperature = 1.0F;
    query.noise = {.seed = random(),
                   .position = static_cast<uint32_t>(random()),
                   .step = static_cast<uint32_t>(random())};
  }
  const auto answers = head->Answer(queries);
  int32_t num_differ = 0;
  for (size_t index = 0; index < queries.size(); ++index) {
    int32_t want = 0;
    uint32_t largest = 0;
    for (int32_t id = 0; id < 4099; ++id) {
      const uint32_t word = NoiseWord(queries[index].noise, NoiseStream::kToken, id);
      if (word > largest) {
        largest = word;
        want = id;
      }
    }
    num_differ += answers[index].token != want ? 1 : 0;
  }
  EXPECT_EQ(num_differ, 0);
}

}  // namespace
}  // namespace cinnabar
