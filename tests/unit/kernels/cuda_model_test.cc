// Whole forward passes on the CUDA backend, for every family of the golden checkpoints: in float32
// the CPU's logits within rounding and its tokens exactly; in bf16 close to float32; and the same
// bits alone, packed and cached.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/golden_models.h"
#include "tests/unit/kernels/named_backend.h"
#include "worker/engine/engine.h"
#include "worker/model/denoiser.h"

namespace cinnabar {
namespace {

struct Part {
  std::vector<TokenId> ids;
  int32_t first_position = 0;
  float sigma = 0.5F;
  KvMemory* kv = nullptr;
};

struct Results {
  std::vector<float> logits;
  std::vector<VocabularyAnswer> answers;
};

class Model {
 public:
  Model(const std::string& backend_name, const std::string& model,
        const LoadOptions& options = {}) {
    backend_ = *MakeNamedBackend(backend_name);
    auto denoiser = LoadDenoiser(GoldenModelPath(model), *backend_, options,
                                 {.rows_max = 128, .sequences_max = 5, .positions_max = 64});
    EXPECT_TRUE(denoiser.ok()) << denoiser.status();
    denoiser_ = *std::move(denoiser);
  }
  const ModelTraits& traits() const { return denoiser_->traits(); }
  KvMemory* NewKv(int32_t positions) {
    memories_.push_back(
        *backend_->AllocateKv(denoiser_->SequenceKvShape(positions, KvReuse::kExact)));
    return memories_.back().get();
  }

  // How many of a part's rows are encoded: all but a block, where there is an encoder.
  int32_t EncodedRows(const Part& part) const {
    if (!traits().causal_encoder) return 0;
    return std::max(static_cast<int32_t>(part.ids.size()) - traits().causal_block_length, 0);
  }

  // Logits and answers (half of them drawn) of every row that is not encoded only. A network that
  // reads its own prediction runs twice, and reads that of the first run; or once.
  Results Run(const std::vector<Part>& parts, bool once = false) {
    std::vector<TokenId> ids;
    std::vector<SequenceSpan> sequences;
    std::vector<float> sigmas;
    std::vector<int32_t> wanted;
    std::vector<VocabularyQuery> queries;
    std::vector<std::unique_ptr<Buffer>> predictions;
    std::vector<SelfConditioning> first, second;
    for (const Part& part : parts) {
      const int32_t encoded = EncodedRows(part);
      if (encoded > 0) {
        sequences.push_back({.row_begin = static_cast<int32_t>(ids.size()),
                             .num_rows = encoded,
                             .first_position = part.first_position,
                             .block_length = 1,
                             .kv = part.kv});
        sigmas.push_back(part.sigma);
        first.emplace_back();
        second.emplace_back();
      }
      sequences.push_back(
          {.row_begin = static_cast<int32_t>(ids.size()) + encoded,
           .num_rows = static_cast<int32_t>(part.ids.size()) - encoded,
           .first_position = part.first_position + encoded,
           .block_length = traits().causal_encoder ? 0 : traits().causal_block_length,
           .kv = part.kv});
      if (denoiser_->SelfConditioningBytes() > 0) {
        predictions.push_back(*backend_->Allocate(denoiser_->SelfConditioningBytes()));
        first.push_back({.next = predictions.back().get()});
        second.push_back({.previous = predictions.back().get(), .temperature = 0.6F});
      }
      int32_t row = 0;
      for (const TokenId id : part.ids) {
        if (row++ < encoded) {
          ids.push_back(id);
          continue;
        }
        VocabularyQuery query;
        query.hidden_row = static_cast<int32_t>(wanted.size());
        query.pick_temperature = wanted.size() % 2 == 0 ? 0.0F : 0.7F;
        query.noise = {.seed = 3, .position = static_cast<uint32_t>(ids.size())};
        query.want_top = traits().causal_encoder;
        queries.push_back(query);
        wanted.push_back(static_cast<int32_t>(ids.size()));
        ids.push_back(id);
      }
      sigmas.push_back(part.sigma);
    }
    absl::Status status = absl::OkStatus();
    for (const auto* conditioning : {&first, &second}) {
      if (conditioning == &second && (once || predictions.empty())) break;
      status = denoiser_->Forward({.ids = ids,
                                   .sequences = sequences,
                                   .sigmas = sigmas,
                                   .wanted_rows = wanted,
                                   .self_conditioning = *conditioning});
      EXPECT_TRUE(status.ok()) << status;
    }
    Results results;
    results.answers.resize(queries.size());
    status = denoiser_->Answer(queries, absl::MakeSpan(results.answers));
    EXPECT_TRUE(status.ok()) << status;
    results.logits.resize(wanted.size() * traits().vocab_size);
    status =
        denoiser_->Logits(0, static_cast<int32_t>(wanted.size()), absl::MakeSpan(results.logits));
    EXPECT_TRUE(status.ok()) << status;
    return results;
  }

  std::vector<TokenId> SomeIds(size_t count, uint32_t seed) const {
    std::vector<TokenId> ids(count);
    uint32_t state = seed;
    for (TokenId& id : ids) {
      state = state * 1664525U + 1013904223U;
      id = static_cast<TokenId>((state >> 8) % traits().vocab_size);
      if ((state >> 4) % 3 == 0 && traits().mask_token >= 0) id = traits().mask_token;
    }
    return ids;
  }
  std::vector<Part> SomeParts() {
    std::vector<Part> parts;
    for (const auto& [length, seed] : {std::pair{17, 1U}, {1, 2U}, {31, 3U}}) {
      parts.push_back({.ids = SomeIds(length, seed),
                       .sigma = 0.3F * static_cast<float>(seed),
                       .kv = NewKv(length)});
    }
    return parts;
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Denoiser> denoiser_;
  std::vector<std::unique_ptr<KvMemory>> memories_;
};

bool SameBits(absl::Span<const float> a, absl::Span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class CudaModelTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto backend = MakeNamedBackend(GetParam());
    if (!backend.ok()) SkipWithout(GetParam(), backend.status());
  }
};
INSTANTIATE_TEST_SUITE_P(Emulated, CudaModelTest, testing::Values("emulated"));
INSTANTIATE_TEST_SUITE_P(Cuda, CudaModelTest, testing::Values("cuda"));

class Bf16ModelTest : public CudaModelTest {};
INSTANTIATE_TEST_SUITE_P(Emulated, Bf16ModelTest,
                         testing::Values("emulated-bf16", "emulated-bf16-wgmma"));
INSTANTIATE_TEST_SUITE_P(Cuda, Bf16ModelTest, testing::Values("cuda-bf16"));
INSTANTIATE_TEST_SUITE_P(Hopper, Bf16ModelTest, testing::Values("cuda-bf16-wgmma"));

TEST_P(CudaModelTest, Float32GivesTheCpusTokens) {
  for (const std::string& name : GoldenModels()) {
    SCOPED_TRACE(name);
    Model cpu("auto", name), device(GetParam(), name);
    const Results want = cpu.Run(cpu.SomeParts());
    const Results got = device.Run(device.SomeParts());
    for (size_t i = 0; i < want.logits.size(); ++i) {
      // As tests/golden/README.md has it: float32 sums of a few dozen terms, through all layers.
      ASSERT_NEAR(got.logits[i], want.logits[i], 2e-4 * std::max(1.0F, std::abs(want.logits[i])));
    }
    for (size_t i = 0; i < want.answers.size(); ++i) {
      EXPECT_EQ(got.answers[i].token, want.answers[i].token) << "row " << i;
      EXPECT_EQ(got.answers[i].top_token, want.answers[i].top_token) << "row " << i;
      EXPECT_NEAR(got.answers[i].probability, want.answers[i].probability, 1e-3);
      EXPECT_NEAR(got.answers[i].entropy, want.answers[i].entropy, 2e-3);
    }
  }
}

double RelativeError(absl::Span<const float> got, absl::Span<const float> want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += std::pow(got[i] - want[i], 2);
    size += std::pow(want[i], 2);
  }
  return std::sqrt(error / size);
}

// Against the yardstick that each model brings along: what rounding its weights to bf16, which is
// done to them anyway, moves its logits. Rounding the activations as well, some five times a layer,
// moves them by a few times as much. Of most rows: a router's near tie that falls the other way
// changes single rows altogether (and in the pass that reads such a prediction, the rows beside
// them).
double MedianError(const std::vector<float>& got, const std::vector<float>& want, int64_t width) {
  std::vector<double> errors;
  for (size_t at = 0; at < want.size(); at += width) {
    errors.push_back(RelativeError(absl::MakeConstSpan(got).subspan(at, width),
                                   absl::MakeConstSpan(want).subspan(at, width)));
  }
  std::nth_element(errors.begin(), errors.begin() + errors.size() / 2, errors.end());
  return errors[errors.size() / 2];
}

TEST_P(Bf16ModelTest, StaysCloseToFloat32) {
  for (const std::string& name : GoldenModels()) {
    SCOPED_TRACE(name);
    const LoadOptions rounded{.weight_dtype = DType::kBf16};
    Model exact("auto", name, {.weight_dtype = DType::kF32}), cpu("auto", name, rounded);
    Model device(GetParam(), name, rounded);
    const auto logits = [](Model& model) { return model.Run(model.SomeParts(), true).logits; };
    const std::vector<float> want = logits(cpu);
    const double yardstick = MedianError(want, logits(exact), cpu.traits().vocab_size);
    const double error = MedianError(logits(device), want, cpu.traits().vocab_size);
    std::printf("%-14s bf16 weights move the logits by %.4f, activations by %.4f\n", name.c_str(),
                yardstick, error);
    EXPECT_LT(error, 4 * std::max(yardstick, 0.01));
  }
}

TEST_P(Bf16ModelTest, AloneAndPackedGiveTheSameBits) {
  for (const std::string& name : GoldenModels()) {
    SCOPED_TRACE(name);
    Model model(GetParam(), name, {.weight_dtype = DType::kBf16});
    const std::vector<Part> parts = model.SomeParts();
    const Results packed = model.Run(parts);
    int64_t row = 0;
    for (const Part& part : parts) {
      const Results alone = model.Run({part});
      EXPECT_TRUE(SameBits(alone.logits,
                           absl::MakeConstSpan(packed.logits)
                               .subspan(row * model.traits().vocab_size, alone.logits.size())));
      row += static_cast<int64_t>(part.ids.size()) - model.EncodedRows(part);
    }
  }
}

// Block-quantised models: exact products of the dequantised values in float32, where the CPU rounds
// its rows to 15 bits a run of 32 (backend.h): 2^-14 of a run's largest, in every product of some
// layers, against the goldens' logits. In bf16 the weights are rounded once, as those of any
// bf16 model.
TEST_P(CudaModelTest, QuantisedModelsAgreeWithTheCpu) {
  for (const std::string name :
       {"llada_k.gguf", "dream_mixed.gguf", "rnd1_mixed.gguf", "llada_moe_mixed.gguf"}) {
    SCOPED_TRACE(name);
    Model cpu("auto", name), device(GetParam(), name), bf16(GetParam() + "-bf16", name);
    // The values themselves, in float32.
    Model exact("auto", name, {.weight_dtype = DType::kF32});
    const int64_t width = cpu.traits().vocab_size;
    const std::vector<float> want = exact.Run(exact.SomeParts()).logits;
    const Results got = device.Run(device.SomeParts());
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_NEAR(got.logits[i], want[i], 2e-4 * std::max(1.0F, std::abs(want[i])));
    }
    EXPECT_LT(MedianError(cpu.Run(cpu.SomeParts()).logits, got.logits, width), 5e-3);
    EXPECT_LT(MedianError(bf16.Run(bf16.SomeParts()).logits, got.logits, width), 0.06);
    // Alone and packed.
    const std::vector<Part> parts = bf16.SomeParts();
    const Results packed = bf16.Run(parts);
    EXPECT_TRUE(SameBits(bf16.Run({parts[0]}).logits,
                         absl::MakeConstSpan(packed.logits).first(parts[0].ids.size() * width)));
  }
}

TEST_P(Bf16ModelTest, ABlockReadsFinishedBlocksFromTheCache) {
  for (const std::string name : {"sdar_b4", "sdar_b8", "sdar_moe"}) {
    SCOPED_TRACE(name);
    Model model(GetParam(), name, {.weight_dtype = DType::kBf16});
    const int32_t block = model.traits().causal_block_length;
    const int32_t length = 5 * block - 1;
    const std::vector<TokenId> ids = model.SomeIds(length, 7);
    const Results whole = model.Run({{.ids = ids, .kv = model.NewKv(length)}});
    KvMemory* cache = model.NewKv(length);
    for (int32_t begin = 0; begin < length; begin += block) {
      const int32_t end = std::min(begin + block, length);
      const Results part = model.Run({{.ids = {ids.begin() + begin, ids.begin() + end},
                                       .first_position = begin,
                                       .kv = cache}});
      EXPECT_TRUE(SameBits(part.logits, absl::MakeConstSpan(whole.logits)
                                            .subspan(int64_t{begin} * model.traits().vocab_size,
                                                     part.logits.size())))
          << "from " << begin;
    }
  }
}

// Whole sequences: the device chooses as its host does, so that passes ahead are used, and with or
// without them every token is the same.
TEST_P(CudaModelTest, LookingAheadChangesNoToken) {
  struct Case {
    const char* model;
    const char* sampler;
  };
  for (const Case& c : {Case{"llada", "low_confidence"},
                        {"llada", "threshold"},
                        {"dream", "entropy"},
                        {"sdar_b4", "block_dynamic"},
                        {"llada2", "block_static"},
                        {"fast_dllm_v2", "fast_dllm_v2"}}) {
    SCOPED_TRACE(absl::StrCat(c.model, " ", c.sampler));
    const ForwardLimits limits{.rows_max = 128, .sequences_max = 5, .positions_max = 64};
    std::vector<std::vector<TokenId>> want;
    for (const bool look_ahead : {false, true}) {
      const auto backend = *MakeNamedBackend(GetParam());
      const auto denoiser = *LoadDenoiser(GoldenModelPath(c.model), *backend, {}, limits);
      Engine engine(*denoiser, {.limits = limits, .look_ahead = look_ahead});
      const auto add = [&](uint64_t seed) {
        std::vector<bool> given(14 + seed, false);
        for (size_t i = 0; i < 4; ++i) given[i] = true;
        const auto state = MakeSequence(std::vector<TokenId>(given.size(), 5), given,
                                        {.sampler = c.sampler, .temperature = 0.5F, .seed = seed},
                                        denoiser->traits());
        EXPECT_TRUE(state.ok()) << state.status();
        const absl::StatusOr<SequenceId> id = engine.Add(*state);
        EXPECT_TRUE(id.ok()) << id.status();
        return *id;
      };
      for (uint64_t seed = 0; seed < 2; ++seed) (void)add(seed);
      const SequenceId leaving = add(3);
      StepReport report;
      std::vector<std::vector<TokenId>> got(3);
      const simt::EmulatedCounts before = simt::Counts();
      for (int turn = 0; engine.num_sequences() > 0; ++turn) {
        const absl::Status status = engine.Step(absl::InfinitePast(), report);
        ASSERT_TRUE(status.ok()) << status;
        for (auto& [id, state] : engine.TakeFinished()) {
          got[state.params.seed] = std::move(state.canvas.tokens);
        }
        if (turn > 0) continue;
        // Another gets its memory, which the pass under way still writes to.
        ASSERT_TRUE(engine.Remove(leaving).ok());
        (void)add(2);
      }
      EXPECT_GT(backend->Stats().busy_seconds, 0);
      if (!look_ahead) {
        want = got;
        continue;
      }
      EXPECT_EQ(got, want);
      EXPECT_GE(engine.counters().ahead_used, 6);
      EXPECT_LE(engine.counters().ahead_dropped, 4) << "who left, and one behind each one's last";
      if (GetParam() == "emulated") {
        EXPECT_LE(simt::Counts().synchronizations - before.synchronizations, 2)
            << "a step waits for its event alone";
      }
    }
  }
}

}  // namespace
}  // namespace cinnabar
