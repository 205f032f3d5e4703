// What the CUDA backend promises beside its ops: graphs, memory, errors, what crosses to the host.
// On the emulator, which can count and break; and where that makes sense, on a device.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "kernels/backend.h"
#include "tests/unit/kernels/named_backend.h"

namespace cinnabar {
namespace {

using Floats = std::vector<float>;

Floats RandomFloats(int64_t count, int seed, float scale = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  Floats values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// A small model's step: embed, norm, heads, attention, experts, head.
class Step {
 public:
  static constexpr int64_t kDim = 64, kMlp = 32;
  static constexpr int32_t kVocabulary = 200, kExperts = 4;

  explicit Step(Backend& backend) : backend_(backend) {
    EXPECT_TRUE(backend
                    .Reserve({.rows_max = 64,
                              .cols_max = 128,
                              .vocabulary = kVocabulary,
                              .queries_max = 64,
                              .positions_max = 128,
                              .head_dim_max = 16,
                              .num_experts = kExperts,
                              .experts_per_row = 2,
                              .expert_dim = kDim,
                              .expert_mlp_dim = kMlp})
                    .ok());
    table_values_ = RandomFloats(kVocabulary * kDim, 1);
    table_ = *backend.LoadEmbedding({table_values_.data(), DType::kF32, kVocabulary, kDim});
    gain_ = *backend.LoadVector({Keep(Floats(kDim, 1.0F)), DType::kF32, 1, kDim});
    qkv_ = Load(8 * 16, kDim, 2);
    o_ = Load(kDim, 4 * 16, 3);
    router_ = Load(kExperts, kDim, 4);
    head_ = Load(kVocabulary, kDim, 5);
    for (int32_t e = 0; e < kExperts; ++e) {
      gate_up_.push_back(*backend.LoadWeight(
          {{Keep(RandomFloats(kMlp * kDim, 10 + e, 0.1F)), DType::kF32, kMlp, kDim},
           {Keep(RandomFloats(kMlp * kDim, 20 + e, 0.1F)), DType::kF32, kMlp, kDim}},
          RowOrder::kGatedPairs, DType::kBf16));
      down_.push_back(Load(kDim, kMlp, 30 + e));
    }
    residual_ = Take(kDim, DType::kF32);
    normed_ = Take(kDim, backend.activation_dtype());
    heads_ = Take(8 * 16, backend.activation_dtype());
    attended_ = Take(4 * 16, backend.activation_dtype());
    logits_ = Take(kExperts, DType::kF32);
    chosen_ = *backend.Allocate(64 * 2 * 4);
    shares_ = *backend.Allocate(64 * 2 * 4);
    kv_ = *backend.AllocateKv({1, 2, 16, 128});
    for (Turn& turn : turns_) turn.answers.resize(64);
  }

  // The answers of `num_rows` rows that follow `first_position` (block-causal, blocks of 8).
  absl::Status Run(int32_t num_rows, int32_t first_position, bool graph) {
    CINNABAR_RETURN_IF_ERROR(Enqueue(num_rows, first_position, graph));
    return backend_.Synchronize();
  }

  // The same without waiting; the answers of the one before stay where they are.
  absl::Status Enqueue(int32_t num_rows, int32_t first_position, bool graph) {
    turn_ = 1 - turn_;
    auto& [ids, spans, queries, answers] = turns_[turn_];
    ids.clear();
    for (int32_t i = 0; i < num_rows; ++i) ids.push_back((first_position + 7 * i) % kVocabulary);
    spans = {{.row_begin = 0,
              .num_rows = num_rows,
              .first_position = first_position,
              .block_length = 8,
              .kv = kv_.get()}};
    queries.assign(num_rows, {});
    for (int32_t i = 0; i < num_rows; ++i) {
      queries[i].hidden_row = i;
      queries[i].pick_temperature = i % 2 == 0 ? 0.0F : 1.0F;
      queries[i].noise = {.seed = 5, .position = static_cast<uint32_t>(first_position + i)};
      if (i % 5 == 4) queries[i].top_p = 0.8F;
    }
    const HeadShape heads = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 16};
    if (graph) CINNABAR_RETURN_IF_ERROR(backend_.BeginStep());
    CINNABAR_RETURN_IF_ERROR(backend_.Embed(*table_, ids, 1.0F, residual_));
    CINNABAR_RETURN_IF_ERROR(Norm(num_rows));
    CINNABAR_RETURN_IF_ERROR(
        backend_.Linear({.x = normed_, .num_rows = num_rows, .weight = qkv_.get(), .out = heads_}));
    CINNABAR_RETURN_IF_ERROR(backend_.PrepareHeads(
        {.qkv = heads_, .num_rows = num_rows, .heads = heads, .sequences = spans}));
    CINNABAR_RETURN_IF_ERROR(backend_.Attend({.q = heads_,
                                              .num_rows = num_rows,
                                              .heads = heads,
                                              .scale = 0.25F,
                                              .sequences = spans,
                                              .out = attended_}));
    CINNABAR_RETURN_IF_ERROR(backend_.Linear({.x = attended_,
                                              .num_rows = num_rows,
                                              .weight = o_.get(),
                                              .epilogue = Epilogue::kAdd,
                                              .out = residual_}));
    CINNABAR_RETURN_IF_ERROR(Norm(num_rows));
    CINNABAR_RETURN_IF_ERROR(backend_.Linear(
        {.x = normed_, .num_rows = num_rows, .weight = router_.get(), .out = logits_}));
    CINNABAR_RETURN_IF_ERROR(backend_.Route({.logits = logits_,
                                             .num_rows = num_rows,
                                             .num_experts = kExperts,
                                             .experts_per_row = 2,
                                             .experts = static_cast<int32_t*>(chosen_->data()),
                                             .weights = static_cast<float*>(shares_->data())}));
    CINNABAR_RETURN_IF_ERROR(
        backend_.Experts({.x = normed_,
                          .num_rows = num_rows,
                          .gate_up = gate_up_,
                          .down = down_,
                          .experts_per_row = 2,
                          .experts = static_cast<const int32_t*>(chosen_->data()),
                          .weights = static_cast<const float*>(shares_->data()),
                          .out = residual_}));
    CINNABAR_RETURN_IF_ERROR(Norm(num_rows));
    CINNABAR_RETURN_IF_ERROR(
        backend_.AnswerVocabulary({.hidden = normed_,
                                   .weight = head_.get(),
                                   .queries = queries,
                                   .answers = absl::MakeSpan(answers).subspan(0, num_rows)}));
    return graph ? backend_.EndStep() : absl::OkStatus();
  }
  // Of the last call, or the one `back` before it.
  Floats Answers(int32_t num_rows, int back = 0) const {
    const std::vector<VocabularyAnswer>& answers = turns_[(turn_ + back) % 2].answers;
    Floats flat;
    for (int32_t i = 0; i < num_rows; ++i) {
      flat.push_back(static_cast<float>(answers[i].token));
      flat.push_back(answers[i].token_logit);
      flat.push_back(static_cast<float>(answers[i].probability));
      flat.push_back(static_cast<float>(answers[i].entropy));
      flat.push_back(answers[i].finite ? 1.0F : 0.0F);
    }
    return flat;
  }

 private:
  const float* Keep(Floats values) {
    kept_.push_back(std::make_unique<Floats>(std::move(values)));
    return kept_.back()->data();
  }
  std::unique_ptr<Weight> Load(int64_t outputs, int64_t dim, int seed) {
    return *backend_.LoadWeight(
        {{Keep(RandomFloats(outputs * dim, seed, 0.2F)), DType::kF32, outputs, dim}},
        RowOrder::kStacked, DType::kBf16);
  }
  Rows Take(int64_t cols, DType dtype) {
    buffers_.push_back(*backend_.Allocate(64 * cols * BytesOf(dtype)));
    return {buffers_.back()->data(), cols, dtype};
  }
  absl::Status Norm(int32_t num_rows) {
    return backend_.RmsNorm({.x = residual_,
                             .num_rows = num_rows,
                             .dim = kDim,
                             .weight = static_cast<const float*>(gain_->data()),
                             .out = normed_});
  }

  Backend& backend_;
  std::vector<std::unique_ptr<Floats>> kept_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  Floats table_values_;
  std::unique_ptr<Weight> table_, qkv_, o_, router_, head_;
  std::vector<std::unique_ptr<Weight>> gate_up_, down_;
  std::unique_ptr<Buffer> gain_, chosen_, shares_;
  Rows residual_, normed_, heads_, attended_, logits_;
  std::unique_ptr<KvMemory> kv_;
  struct Turn {
    std::vector<int32_t> ids;
    std::vector<SequenceSpan> spans;
    std::vector<VocabularyQuery> queries;
    std::vector<VocabularyAnswer> answers;
  };
  Turn turns_[2];
  int turn_ = 0;
};

class CudaBackendTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = MakeNamedBackend(GetParam());
    if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
    backend_ = *std::move(backend);
  }
  void TearDown() override {
    simt::FailFromNowOn(0);
    simt::LimitDeviceMemory(-1);
  }
  std::unique_ptr<Backend> backend_;
};
INSTANTIATE_TEST_SUITE_P(Emulated, CudaBackendTest,
                         testing::Values("emulated", "emulated-bf16", "emulated-bf16-wgmma"));
INSTANTIATE_TEST_SUITE_P(Cuda, CudaBackendTest, testing::Values("cuda", "cuda-bf16"));
INSTANTIATE_TEST_SUITE_P(Hopper, CudaBackendTest, testing::Values("cuda-bf16-wgmma"));

// What only the emulator can count, or break.
class EmulatedDeviceTest : public CudaBackendTest {};
INSTANTIATE_TEST_SUITE_P(Emulated, EmulatedDeviceTest,
                         testing::Values("emulated", "emulated-bf16"));

// Work may move between devices that say the same: those of another architecture must not.
TEST_P(EmulatedDeviceTest, ArchitectureAndTypesAreTold) {
  const std::string dtype = NameOf(backend_->activation_dtype());
  EXPECT_EQ(backend_->Numerics(), absl::StrCat("cuda/sm_90/", dtype));
  simt::SetComputeCapability(89);
  const auto other = simt::MakeEmulatedBackend({.fp8 = true});
  simt::SetComputeCapability(90);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ((*other)->Numerics(), "cuda/sm_89/BF16/fp8");
  EXPECT_EQ((*MakeBackend(BackendKind::kCpu, {}))->Numerics(), "cpu");
}

TEST_P(CudaBackendTest, AStepInAGraphGivesTheBitsOfOneWithout) {
  Step plain(*backend_);
  std::vector<Floats> want;
  for (const int32_t begin : {0, 16, 32, 48, 64, 80}) {
    ASSERT_TRUE(plain.Run(16, begin, /*graph=*/false).ok());
    want.push_back(plain.Answers(16));
  }
  auto other = *MakeNamedBackend(GetParam());
  Step graph(*other);
  const simt::EmulatedCounts before = simt::Counts();
  for (size_t i = 0; i < want.size(); ++i) {
    const absl::Status status = graph.Run(16, 16 * static_cast<int32_t>(i), /*graph=*/true);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(graph.Answers(16), want[i]) << "step " << i;
  }
  const DeviceStats stats = other->Stats();
  EXPECT_GT(stats.memory_total_bytes, stats.memory_free_bytes);
  EXPECT_GT(stats.memory_free_bytes, 0);
  EXPECT_GE(stats.graph_hits, 3);
  EXPECT_GE(stats.graph_misses, 1);
  other->UseGraphs(false);
  ASSERT_TRUE(graph.Run(16, 0, /*graph=*/true).ok());
  EXPECT_EQ(graph.Answers(16), want[0]);
  EXPECT_EQ(other->Stats().graph_hits, stats.graph_hits);
  if (GetParam().find("cuda") == 0) return;
  // The first step runs in parts, for it makes the experts' tables; then one graph serves all.
  EXPECT_GE(simt::Counts().graphs_launched - before.graphs_launched, 6);
  EXPECT_LE(simt::Counts().graphs_made - before.graphs_made, 4);
}

TEST_P(CudaBackendTest, AStepIsWaitedForWhileTheNextIsUnderWay) {
  Step plain(*backend_);
  std::vector<Floats> want;
  for (int32_t i = 0; i < 6; ++i) {
    ASSERT_TRUE(plain.Run(16, 16 * i, /*graph=*/true).ok());
    want.push_back(plain.Answers(16));
  }
  auto other = *MakeNamedBackend(GetParam());
  Step ahead(*other);
  ASSERT_TRUE(ahead.Run(16, 0, true).ok());  // makes the experts' tables
  ASSERT_TRUE(ahead.Enqueue(16, 0, true).ok());
  const simt::EmulatedCounts before = simt::Counts();
  const double busy = other->Stats().busy_seconds;
  EXPECT_GT(busy, 0);
  for (int32_t i = 1; i < 6; ++i) {
    ASSERT_TRUE(ahead.Enqueue(16, 16 * i, true).ok());
    // Uploads between two steps have a place of their own.
    const auto kv = other->AllocateKv({1, 2, 16, 128});
    ASSERT_TRUE(kv.ok());
    ASSERT_TRUE(other->WaitStep().ok());
    EXPECT_EQ(ahead.Answers(16, 1), want[i - 1]) << "step " << i - 1;
  }
  ASSERT_TRUE(other->WaitStep().ok());
  EXPECT_EQ(ahead.Answers(16), want[5]);
  EXPECT_GT(other->Stats().busy_seconds, busy);
  EXPECT_TRUE(other->WaitStep().ok()) << "nothing is left";
  if (GetParam().find("cuda") == 0) return;
  EXPECT_LE(simt::Counts().synchronizations - before.synchronizations, 1)
      << "that of the last wait";
  EXPECT_GE(simt::Counts().event_waits - before.event_waits, 6);
}

TEST_P(EmulatedDeviceTest, AnErrorWithAStepUnderWayIsTold) {
  Step step(*backend_);
  ASSERT_TRUE(step.Run(16, 0, true).ok());
  ASSERT_TRUE(step.Enqueue(16, 16, true).ok());
  ASSERT_TRUE(step.Enqueue(16, 32, true).ok());
  simt::FailFromNowOn(719);
  const absl::Status failed = backend_->WaitStep();
  EXPECT_EQ(failed.code(), absl::StatusCode::kUnavailable) << failed;
  simt::FailFromNowOn(0);
  EXPECT_EQ(backend_->WaitStep(), failed);
  EXPECT_EQ(step.Enqueue(16, 48, true), failed);
}

TEST_P(EmulatedDeviceTest, AfterTheFirstStepNothingIsAllocatedAndLittleCrosses) {
  Step step(*backend_);
  ASSERT_TRUE(step.Run(32, 0, false).ok());
  const simt::EmulatedCounts before = simt::Counts();
  for (int32_t begin = 32; begin < 96; begin += 32) ASSERT_TRUE(step.Run(32, begin, false).ok());
  const simt::EmulatedCounts after = simt::Counts();
  EXPECT_EQ(after.allocations, before.allocations);
  EXPECT_LE(after.bytes_to_host - before.bytes_to_host, 2 * 32 * 56);
  EXPECT_LE(after.bytes_to_device - before.bytes_to_device, 2 * 32 * 256);
  EXPECT_LE(after.synchronizations - before.synchronizations, 2);
}

TEST_P(EmulatedDeviceTest, MemoryComesBack) {
  backend_.reset();
  const int64_t before = simt::DeviceMemoryUsed();
  {
    auto backend = *MakeNamedBackend(GetParam());
    Step step(*backend);
    ASSERT_TRUE(step.Run(16, 0, true).ok());
    std::vector<std::unique_ptr<KvMemory>> sequences;
    for (int i = 0; i < 100; ++i) {
      sequences.push_back(*backend->AllocateKv({2, 2, 16, 1 + i * 7}));
      if (i % 3 == 2) sequences.erase(sequences.begin() + i / 3);
    }
  }
  EXPECT_EQ(simt::DeviceMemoryUsed(), before);
}

TEST_P(EmulatedDeviceTest, MemoryThatIsNotThereIsNoBrokenDevice) {
  Step step(*backend_);
  simt::LimitDeviceMemory(simt::DeviceMemoryUsed() + 1000);
  EXPECT_EQ(backend_->Allocate(1 << 20).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(backend_->AllocateKv({8, 2, 64, 4096}).status().code(),
            absl::StatusCode::kResourceExhausted);
  const Floats values(1 << 18);
  EXPECT_EQ(backend_
                ->LoadWeight({{values.data(), DType::kF32, 1 << 9, 1 << 9}}, RowOrder::kStacked,
                             DType::kBf16)
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
  simt::LimitDeviceMemory(-1);
  EXPECT_TRUE(step.Run(16, 0, false).ok());
}

TEST_P(EmulatedDeviceTest, ADeviceErrorStaysUntilTheBackendIsMadeAgain) {
  Step step(*backend_);
  simt::FailFromNowOn(719);  // cudaErrorLaunchFailure
  const absl::Status failed = step.Run(16, 0, false);
  EXPECT_EQ(failed.code(), absl::StatusCode::kUnavailable) << failed;
  simt::FailFromNowOn(0);
  EXPECT_EQ(step.Run(16, 0, false), failed);
  EXPECT_EQ(backend_->Synchronize(), failed);
  EXPECT_EQ(backend_->Allocate(16).status(), failed);
  auto other = *MakeNamedBackend(GetParam());
  Step again(*other);
  EXPECT_TRUE(again.Run(16, 0, false).ok());
}

TEST_P(CudaBackendTest, UploadsOfAnySizeArrive) {
  for (const int64_t count : {1, 63, 64, 100000}) {
    const Floats values = RandomFloats(count, 9);
    auto buffer = *backend_->Allocate(count * 4);
    ASSERT_TRUE(backend_->Upload(values, buffer->data()).ok());
    Floats got(count);
    ASSERT_TRUE(backend_->Download(buffer->data(), absl::MakeSpan(got)).ok());
    EXPECT_EQ(got, values);
  }
}

// More staged bytes than fit at once, without a Synchronize() of the caller's.
TEST_P(CudaBackendTest, AFullStagingAreaIsWaitedFor) {
  ASSERT_TRUE(backend_->Reserve({.rows_max = 100, .cols_max = 8}).ok());
  const Floats table = RandomFloats(50 * 8, 1);
  const auto weight = *backend_->LoadEmbedding({table.data(), DType::kF32, 50, 8});
  auto buffer = *backend_->Allocate(100 * 8 * 4);
  std::vector<int32_t> ids(100);
  for (int turn = 0; turn < 2000; ++turn) {
    for (int32_t i = 0; i < 100; ++i) ids[i] = (i + turn) % 50;
    ASSERT_TRUE(backend_->Embed(*weight, ids, 1.0F, {buffer->data(), 8}).ok());
  }
  Floats got(100 * 8);
  ASSERT_TRUE(backend_->Download(buffer->data(), absl::MakeSpan(got)).ok());
  EXPECT_EQ(Floats(got.begin(), got.begin() + 8),
            Floats(table.begin() + 8 * (1999 % 50), table.begin() + 8 * (1999 % 50) + 8));
}

TEST(MakeCudaBackendTest, SaysWhatIsWrong) {
  EXPECT_EQ(simt::MakeEmulatedBackend({.activation = DType::kF16}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(simt::MakeEmulatedBackend({.device = 3}).status().code(),
            absl::StatusCode::kUnavailable);
  simt::SetComputeCapability(89);
  const absl::Status older = simt::MakeEmulatedBackend({.products = Products::kWgmma}).status();
  EXPECT_TRUE(simt::MakeEmulatedBackend({.products = Products::kMma}).ok());
  simt::SetComputeCapability(90);
  EXPECT_EQ(older.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(older.message(), testing::HasSubstr("is sm_89; products by wgmma need sm_90"));
  const auto hopper = simt::MakeEmulatedBackend({.products = Products::kWgmma});
  ASSERT_TRUE(hopper.ok()) << hopper.status();
  EXPECT_THAT((*hopper)->Describe(), testing::HasSubstr("by wgmma"));
  EXPECT_EQ((*hopper)->Numerics(), "cuda/sm_90/BF16/wgmma");
  const absl::Status real = MakeBackend(BackendKind::kCuda, {.device = 1000}).status();
  EXPECT_TRUE(real.code() == absl::StatusCode::kUnavailable ||
              real.code() == absl::StatusCode::kUnimplemented)
      << real;
  EXPECT_THAT(std::string(real.message()),
              testing::AnyOf(testing::HasSubstr("use the CPU"), testing::HasSubstr("numbered")));
}

}  // namespace
}  // namespace cinnabar
