// Estimated bounds against exact ones: every mask of a few positions, integrated over time.
#include "worker/engine/likelihood.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/decoding/schedule.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;

const ForwardLimits kLimits{.rows_max = 128, .sequences_max = 9, .positions_max = 32};

struct Loaded {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Denoiser> model;
};

Loaded Load(const std::string& name) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  Loaded loaded;
  loaded.backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 2});
  auto model =
      LoadDenoiser(absl::StrCat(source == nullptr ? "." : source, "/tests/golden/models/", name),
                   *loaded.backend, {}, kLimits);
  EXPECT_TRUE(model.ok()) << model.status();
  if (model.ok()) loaded.model = *std::move(model);
  return loaded;
}

void NoProgress(double) {}

// -ln p of the clean token at each masked position, by one plain pass.
double MaskedLoss(Denoiser& denoiser, const std::vector<TokenId>& clean,
                  const std::vector<int32_t>& masked, bool mask_counted) {
  const ModelTraits& model = denoiser.traits();
  std::vector<TokenId> ids = clean;
  for (const int32_t position : masked) ids[position] = model.mask_token;
  if (model.causal_block_length > 0) {  // later blocks do not exist
    const int32_t block = model.causal_block_length;
    ids.resize(std::min<size_t>(ids.size(), (masked.back() / block + 1) * block));
  }
  const auto length = static_cast<int32_t>(ids.size());
  const auto kv = *denoiser.backend().AllocateKv(denoiser.SequenceKvShape(length, KvReuse::kExact));
  const SequenceSpan span{
      .num_rows = length, .block_length = model.causal_block_length, .kv = kv.get()};
  std::vector<int32_t> wanted(length);
  for (int32_t i = 0; i < length; ++i) wanted[i] = i;
  EXPECT_TRUE(
      denoiser
          .Forward({.ids = ids, .sequences = absl::MakeConstSpan(&span, 1), .wanted_rows = wanted})
          .ok());
  std::vector<float> logits(static_cast<size_t>(length) * model.vocab_size);
  EXPECT_TRUE(denoiser.Logits(0, length, absl::MakeSpan(logits)).ok());
  double loss = 0.0;
  for (const int32_t position : masked) {
    const int32_t row = model.shift_logits && position > 0 ? position - 1 : position;
    const float* l = logits.data() + static_cast<size_t>(row) * model.vocab_size;
    double sum = 0.0;
    for (int32_t id = 0; id < model.vocab_size; ++id) {
      if (id != model.mask_token || mask_counted) sum += std::exp(static_cast<double>(l[id]));
    }
    loss += std::log(sum) - l[clean[position]];
  }
  return loss;
}

// Calls `take` with every non-empty subset of `positions`.
template <typename Take>
void ForEachMask(const std::vector<int32_t>& positions, const Take& take) {
  for (uint32_t bits = 1; bits < 1U << positions.size(); ++bits) {
    std::vector<int32_t> masked;
    for (size_t i = 0; i < positions.size(); ++i) {
      if ((bits >> i & 1U) != 0) masked.push_back(positions[i]);
    }
    take(masked);
  }
}

// E over t in (0.001, 1) of [1 / t, exactly these m of n masked], chance of a mask 0.999 t.
double TimeWeight(size_t m, size_t n) {
  constexpr int kPoints = 100000;
  double sum = 0.0;
  for (int i = 0; i < kPoints; ++i) {
    const double t = 1e-3 + (1 - 1e-3) * (i + 0.5) / kPoints;
    const double p = (1 - 1e-3) * t;
    sum += std::pow(p, m) * std::pow(1 - p, n - m) / t;
  }
  return sum / kPoints;
}

double ExactBound(Denoiser& denoiser, const std::vector<TokenId>& ids,
                  const std::vector<std::vector<int32_t>>& groups) {
  double bound = 0.0;
  for (const std::vector<int32_t>& group : groups) {
    std::vector<double> weights(group.size() + 1);
    for (size_t m = 1; m <= group.size(); ++m) weights[m] = TimeWeight(m, group.size());
    ForEachMask(group, [&](const std::vector<int32_t>& masked) {
      bound -= weights[masked.size()] * MaskedLoss(denoiser, ids, masked, false);
    });
  }
  return bound;
}

struct Text {
  const char* model;
  std::vector<std::vector<int32_t>> groups;  // scored positions, by block
};

class LikelihoodTest : public ::testing::TestWithParam<Text> {};

TEST_P(LikelihoodTest, TheEstimateIsTheExactBound) {
  const Loaded loaded = Load(GetParam().model);
  const std::vector<TokenId> ids = {5, 17, 44, 3, 61, 29, 8, 12, 70, 33};
  std::vector<bool> scored(ids.size());
  for (const auto& group : GetParam().groups) {
    for (const int32_t position : group) scored[position] = true;
  }
  const double exact = ExactBound(*loaded.model, ids, GetParam().groups);
  double heard = 0.0;
  const auto estimate = EstimateLikelihood(*loaded.model, kLimits, ids, scored,
                                           {.num_samples = 4000, .seed = 3}, [&](double share) {
                                             EXPECT_GT(share, heard);
                                             heard = share;
                                           });
  ASSERT_TRUE(estimate.ok()) << estimate.status();
  EXPECT_GT(heard, 0.9);
  // The spread over stratified samples is smaller than this error says.
  EXPECT_LT(estimate->standard_error, 0.05 * std::abs(exact));
  EXPECT_NEAR(estimate->log_likelihood, exact, 3 * estimate->standard_error);
  EXPECT_EQ(estimate->num_scored, std::count(scored.begin(), scored.end(), true));
}

INSTANTIATE_TEST_SUITE_P(Models, LikelihoodTest,
                         ::testing::Values(Text{"llada", {{2, 3, 7, 9}}},
                                           Text{"dream", {{0, 1, 4, 5}}}, Text{"mdlm", {{1, 2, 3}}},
                                           Text{"sdar_b4", {{2, 3}, {4, 5, 7}, {9}}},
                                           Text{"bd3lm", {{1, 4, 5}, {8, 9}}},
                                           Text{"fast_dllm_v2", {{0, 3, 5}}}),
                         [](const auto& info) { return std::string(info.param.model); });

TEST(LladaLikelihoodTest, TheEstimateIsTheExactMean) {
  const Loaded loaded = Load("llada");
  const std::vector<TokenId> ids = {5, 17, 44, 3, 61, 29, 8};
  const std::vector<int32_t> positions = {2, 3, 5, 6};
  std::vector<bool> scored(ids.size());
  for (const int32_t position : positions) scored[position] = true;
  // Every count n of N masked is as likely; all masks of a count are; each loss weighs N / n.
  const double choose[] = {0, 4, 6, 4, 1};
  double exact = 0.0;
  ForEachMask(positions, [&](const std::vector<int32_t>& masked) {
    const size_t n = masked.size();
    exact -= 0.25 / choose[n] * 4.0 / static_cast<double>(n) *
             MaskedLoss(*loaded.model, ids, masked, true);
  });
  const auto estimate =
      EstimateLikelihood(*loaded.model, kLimits, ids, scored,
                         {.rule = LikelihoodRule::kLlada, .num_samples = 4000}, NoProgress);
  ASSERT_TRUE(estimate.ok()) << estimate.status();
  EXPECT_NEAR(estimate->log_likelihood, exact, 3 * estimate->standard_error);
}

// One position has one mask: no chance is left, one sample is enough.
TEST(LladaLikelihoodTest, OfOneTokenItIsExact) {
  const Loaded loaded = Load("llada_gqa");
  const std::vector<TokenId> ids = {5, 17, 44, 3};
  const auto estimate =
      EstimateLikelihood(*loaded.model, kLimits, ids, {false, false, true, false},
                         {.rule = LikelihoodRule::kLlada, .num_samples = 1}, NoProgress);
  ASSERT_TRUE(estimate.ok());
  EXPECT_NEAR(estimate->log_likelihood, -MaskedLoss(*loaded.model, ids, {2}, true), 1e-6);
  EXPECT_EQ(estimate->standard_error, 0.0);
}

// A network that knows the distribution of one token exactly, on either graph.
class IdealScores : public Denoiser {
 public:
  IdealScores(Parameterization parameterization, std::vector<double> p) : p_(std::move(p)) {
    traits_.parameterization = parameterization;
    traits_.conditioned_on_sigma = true;
    traits_.vocab_size = static_cast<int32_t>(p_.size());
    traits_.positions_max = 8;
    if (parameterization == Parameterization::kAbsorbScore)
      traits_.mask_token = ++traits_.vocab_size - 1;
  }
  const ModelTraits& traits() const override { return traits_; }
  Backend& backend() const override { return *backend_; }
  KvShape SequenceKvShape(int32_t positions, KvReuse) const override {
    return {.positions_max = positions};
  }
  absl::Status Forward(const ForwardBatch& batch) override {
    rows_.clear();
    for (const int32_t row : batch.wanted_rows)
      rows_.push_back({batch.ids[row], batch.sigmas[row]});
    return absl::OkStatus();
  }
  absl::Status Answer(absl::Span<const VocabularyQuery>, absl::Span<VocabularyAnswer>) override {
    return absl::UnimplementedError("not asked");
  }
  absl::Status Logits(int32_t begin, int32_t count, absl::Span<float> out) override {
    const int32_t n = traits_.vocab_size;
    for (int32_t r = 0; r < count; ++r) {
      const auto [id, sigma] = rows_[begin + r];
      for (int32_t y = 0; y < n; ++y) {
        double score = 1.0;
        if (traits_.mask_token >= 0) {
          if (y != traits_.mask_token) score = p_[y] / std::expm1(sigma);
        } else {  // p_t(y) / p_t(id)
          const double kept = std::exp(-sigma);
          score = (kept * p_[y] + (1 - kept) / n) / (kept * p_[id] + (1 - kept) / n);
        }
        out[r * n + y] = static_cast<float>(y == id ? 0.0 : std::log(score));
      }
    }
    return absl::OkStatus();
  }
  double OutputOffset(float) const override { return 0; }
  Memory memory() const override { return {}; }

 private:
  std::vector<double> p_;
  ModelTraits traits_;
  std::unique_ptr<Backend> backend_ = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
  std::vector<std::pair<TokenId, float>> rows_;
};

TEST(ScoreEntropyTest, IdealScoresGiveTheLikelihoodItself) {
  const std::vector<double> p = {0.5, 0.3, 0.15, 0.05};
  for (const Parameterization kind :
       {Parameterization::kAbsorbScore, Parameterization::kUniformScore}) {
    IdealScores model(kind, p);
    for (TokenId token = 0; token < 4; ++token) {
      const auto estimate = EstimateLikelihood(model, kLimits, {token}, {true},
                                               {.num_samples = 100000, .seed = 7}, NoProgress);
      ASSERT_TRUE(estimate.ok()) << estimate.status();
      // What lies before t = 0.001 is left out, and 1 / t makes a spread of one percent.
      EXPECT_NEAR(estimate->log_likelihood, std::log(p[token]), 0.035 * -std::log(p[token]))
          << "token " << token << " of " << static_cast<int>(kind);
    }
  }
}

TEST(LikelihoodErrorTest, SaysWhatIsWrong) {
  const Loaded llada = Load("llada");
  const Loaded sdar = Load("sdar_b4");
  const auto error = [](const Loaded& loaded, std::vector<TokenId> ids, std::vector<bool> scored,
                        LikelihoodOptions options) {
    const auto estimate =
        EstimateLikelihood(*loaded.model, kLimits, ids, scored, options, NoProgress);
    EXPECT_FALSE(estimate.ok());
    return std::string(estimate.status().message());
  };
  const TokenId mask = llada.model->traits().mask_token;
  EXPECT_THAT(error(llada, {1, 2}, {true}, {}), HasSubstr("2 ids and 1"));
  EXPECT_THAT(error(llada, {1, 2}, {false, false}, {}), HasSubstr("no position"));
  EXPECT_THAT(error(llada, {1, 1000000}, {true, true}, {}), HasSubstr("ids[1]"));
  EXPECT_THAT(error(llada, {1, mask}, {true, true}, {}), HasSubstr("mask token"));
  EXPECT_THAT(error(llada, {1, 2}, {true, true}, {.num_samples = 0}), HasSubstr("num_samples"));
  EXPECT_THAT(error(llada, std::vector<TokenId>(33, 1), std::vector<bool>(33, true), {}),
              HasSubstr("at most 32"));
  EXPECT_THAT(error(sdar, {1, 2}, {true, true}, {.rule = LikelihoodRule::kLlada}),
              HasSubstr("use nelbo"));
}

}  // namespace
}  // namespace cinnabar
