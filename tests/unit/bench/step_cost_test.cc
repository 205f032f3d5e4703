// The counters of step_cost against what a forward pass asks of its backend, and made-up
// checkpoints against what they claim to be.
#include "tests/bench/step_cost.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/bench/shape_bench.h"
#include "tests/support/memory_checkpoint.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/denoiser.h"
#include "worker/model/family.h"
#include "worker/model/safetensors.h"

namespace cinnabar {
namespace {

using bench::AttendedPairs;
using bench::CountStep;
using bench::StepCost;

// Passes every op on to the CPU, and counts.
class CountingBackend : public Backend {
 public:
  explicit CountingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  void Reset() {
    flops_ = 0;
    weights_.clear();
    experts_.clear();
  }
  double flops() const { return flops_; }
  double weight_elements() const {
    double sum = 0;
    for (const Weight* weight : weights_) {
      sum += static_cast<double>(weight->rows()) * static_cast<double>(weight->cols());
    }
    return sum;
  }
  double expert_elements() const {
    double sum = 0;
    for (const Weight* weight : experts_) {
      sum += static_cast<double>(weight->rows()) * static_cast<double>(weight->cols());
    }
    return sum;
  }

  std::string Describe() const override { return inner_->Describe(); }
  std::string Numerics() const override { return inner_->Numerics(); }
  DType activation_dtype() const override { return inner_->activation_dtype(); }
  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) override {
    return inner_->Allocate(size_bytes);
  }
  absl::StatusOr<std::unique_ptr<KvMemory>> AllocateKv(const KvShape& shape) override {
    return inner_->AllocateKv(shape);
  }
  absl::Status CopyKv(const KvMemory& from, int32_t num_positions, KvMemory& to) override {
    return inner_->CopyKv(from, num_positions, to);
  }
  int64_t KvBytes(const KvShape& shape) const override { return inner_->KvBytes(shape); }
  absl::Status Reserve(const WorkspaceShape& shape) override { return inner_->Reserve(shape); }
  int64_t WorkspaceBytes(const WorkspaceShape& shape) const override {
    return inner_->WorkspaceBytes(shape);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadWeight(absl::Span<const HostMatrix> parts,
                                                     RowOrder row_order, DType dtype) override {
    return inner_->LoadWeight(parts, row_order, dtype);
  }
  absl::StatusOr<std::unique_ptr<Weight>> MapWeight(absl::Span<const HostMatrix> parts,
                                                    RowOrder row_order) override {
    return inner_->MapWeight(parts, row_order);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadEmbedding(const HostMatrix& table) override {
    return inner_->LoadEmbedding(table);
  }
  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(const HostMatrix& vector) override {
    return inner_->LoadVector(vector);
  }
  absl::Status Upload(absl::Span<const float> host, void* device) override {
    return inner_->Upload(host, device);
  }
  absl::Status Download(const void* device, absl::Span<float> host) override {
    return inner_->Download(device, host);
  }
  absl::Status Embed(const Weight& table, absl::Span<const int32_t> ids, float scale,
                     const Rows& out) override {
    return inner_->Embed(table, ids, scale, out);
  }
  absl::Status EmbedChosen(const Weight& table, const int32_t* ids, int64_t num_rows, float scale,
                           const Rows& out) override {
    return inner_->EmbedChosen(table, ids, num_rows, scale, out);
  }
  absl::Status Linear(const LinearArgs& args) override {
    Product(args.num_rows, *args.weight);
    return inner_->Linear(args);
  }
  absl::Status RmsNorm(const RmsNormArgs& args) override { return inner_->RmsNorm(args); }
  absl::Status LayerNormModulate(const LayerNormModulateArgs& args) override {
    return inner_->LayerNormModulate(args);
  }
  absl::Status GatherRows(const GatherRowsArgs& args) override { return inner_->GatherRows(args); }
  absl::Status PrepareHeads(const PrepareHeadsArgs& args) override {
    return inner_->PrepareHeads(args);
  }
  absl::Status Attend(const AttendArgs& args) override {
    // Row by row, by the rule of SequenceSpan.
    for (const SequenceSpan& span : args.sequences) {
      const int32_t end = span.first_position + span.num_rows;
      for (int32_t position = span.first_position; position < end; ++position) {
        const int32_t seen =
            span.block_length == 0
                ? end
                : std::min((position / span.block_length + 1) * span.block_length, end);
        flops_ += 4.0 * seen * args.heads.num_heads * args.heads.head_dim;
      }
    }
    return inner_->Attend(args);
  }
  absl::Status SoftEmbed(const SoftEmbedArgs& args) override { return inner_->SoftEmbed(args); }
  absl::Status Route(const RouteArgs& args) override { return inner_->Route(args); }
  absl::Status Experts(const ExpertsArgs& args) override {
    for (int64_t i = 0; i < args.num_rows * args.experts_per_row; ++i) {
      for (const Weight* weight :
           {args.gate_up[args.experts[i]].get(), args.down[args.experts[i]].get()}) {
        flops_ += 2.0 * static_cast<double>(weight->rows()) * static_cast<double>(weight->cols());
        experts_.insert(weight);
      }
    }
    return inner_->Experts(args);
  }
  absl::Status AnswerVocabulary(const VocabularyArgs& args) override {
    Product(static_cast<int64_t>(args.queries.size()), *args.weight);
    return inner_->AnswerVocabulary(args);
  }
  absl::Status SelectTransfers(const SelectTransfersArgs& args) override {
    return inner_->SelectTransfers(args);
  }
  absl::Status Logits(const LogitsArgs& args) override { return inner_->Logits(args); }
  absl::Status Synchronize() override { return inner_->Synchronize(); }

 private:
  void Product(int64_t rows, const Weight& weight) {
    flops_ += 2.0 * static_cast<double>(rows) * static_cast<double>(weight.rows()) *
              static_cast<double>(weight.cols());
    weights_.insert(&weight);
  }

  const std::unique_ptr<Backend> inner_;
  double flops_ = 0;
  std::set<const Weight*> weights_;
  std::set<const Weight*> experts_;
};

TEST(StepCostTest, PairsAreThoseOfEachRow) {
  EXPECT_EQ(AttendedPairs(0, 1, 0), 1);
  EXPECT_EQ(AttendedPairs(0, 8, 0), 64);
  EXPECT_EQ(AttendedPairs(512, 32, 32), 32 * 544);
  EXPECT_EQ(AttendedPairs(0, 8, 4), 4 * 4 + 4 * 8);
  EXPECT_EQ(AttendedPairs(4, 6, 4), 4 * 8 + 2 * 10);  // the last block is short
}

struct Case {
  const char* shape;
  int32_t block_length;
  bench::StepShape step;
};

class StepCostCaseTest : public testing::TestWithParam<Case> {};

TEST_P(StepCostCaseTest, CountsWhatAForwardPassAsksOfItsBackend) {
  const Case& c = GetParam();
  const auto config = ShapeConfig(c.shape, c.block_length);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto checkpoint = MemoryCheckpoint::Make(*config, DType::kF32, /*seed=*/1, 2);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto folder = (*checkpoint)->AddConfig(*config);
  ASSERT_TRUE(folder.ok()) << folder.status();
  CountingBackend backend(*MakeBackend(BackendKind::kCpu, {.num_threads = 1}));
  const auto denoiser = LoadDenoiser(*folder, backend, {},
                                     {.rows_max = 256, .sequences_max = 8, .positions_max = 256});
  ASSERT_TRUE(denoiser.ok()) << denoiser.status();
  const int32_t block_length = (*denoiser)->traits().causal_block_length;

  const auto rows = static_cast<int32_t>(c.step.rows), cached = static_cast<int32_t>(c.step.cached);
  std::vector<std::unique_ptr<KvMemory>> kv;
  std::vector<TokenId> ids;
  std::vector<SequenceSpan> spans;
  std::vector<int32_t> wanted;
  for (int32_t s = 0; s < c.step.sequences; ++s) {
    kv.push_back(*backend.AllocateKv((*denoiser)->SequenceKvShape(cached + rows, KvReuse::kExact)));
    if (cached > 0) {
      const std::vector<TokenId> before(cached, 5);
      const SequenceSpan span{
          .num_rows = cached, .block_length = block_length, .kv = kv.back().get()};
      ASSERT_TRUE(
          (*denoiser)->Forward({.ids = before, .sequences = absl::MakeConstSpan(&span, 1)}).ok());
    }
    spans.push_back({.row_begin = static_cast<int32_t>(ids.size()),
                     .num_rows = rows,
                     .first_position = cached,
                     .block_length = block_length,
                     .kv = kv.back().get()});
    for (int32_t i = 0; i < rows; ++i) {
      if (i < c.step.answered) wanted.push_back(static_cast<int32_t>(ids.size()));
      ids.push_back((s * 31 + i * 7) % (*denoiser)->traits().vocab_size);
    }
  }
  backend.Reset();
  ASSERT_TRUE((*denoiser)->Forward({.ids = ids, .sequences = spans, .wanted_rows = wanted}).ok());
  std::vector<VocabularyQuery> queries(wanted.size());
  for (size_t i = 0; i < queries.size(); ++i) queries[i].hidden_row = static_cast<int32_t>(i);
  std::vector<VocabularyAnswer> answers(wanted.size());
  ASSERT_TRUE((*denoiser)->Answer(queries, absl::MakeSpan(answers)).ok());

  const ModelSpec& spec = (*checkpoint)->spec();
  const StepCost cost =
      CountStep(spec, c.step, {.dense_bytes = 1, .weight_bytes = 4, .kv_bytes = 4});
  EXPECT_DOUBLE_EQ(cost.flops, backend.flops());
  if (spec.experts.num_experts == 0) {
    EXPECT_DOUBLE_EQ(cost.weight_elements, backend.weight_elements());
  } else {
    // Which experts are read hangs on the rows: the count is an expectation.
    const double experts = cost.weight_elements - backend.weight_elements();
    EXPECT_GT(experts, 0.5 * backend.expert_elements());
    EXPECT_LT(experts, 2.0 * backend.expert_elements());
  }
  // A cache of whole layers, as the backend lays it out, has no more than is read and written.
  if (block_length > 0) {
    const double positions = static_cast<double>(c.step.sequences * (c.step.cached + c.step.rows));
    const KvShape shape = (*denoiser)->SequenceKvShape(cached + rows, KvReuse::kExact);
    const double a_position = 2.0 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4;
    EXPECT_DOUBLE_EQ(cost.kv_read_bytes + cost.kv_written_bytes, positions * a_position);
    EXPECT_LE(positions * a_position,
              static_cast<double>(c.step.sequences) * static_cast<double>(backend.KvBytes(shape)));
  }
  const double embedded = static_cast<double>(c.step.sequences * c.step.rows) * spec.dim;
  const double others = cost.weight_elements - cost.dense_elements;
  EXPECT_DOUBLE_EQ(cost.weight_bytes, cost.dense_elements + 4 * (others + embedded));
  if (spec.experts.num_experts == 0) {
    EXPECT_DOUBLE_EQ(others, static_cast<double>(spec.dim) * spec.traits.vocab_size);
  }
  EXPECT_DOUBLE_EQ(cost.bytes(), cost.weight_bytes + cost.kv_read_bytes + cost.kv_written_bytes);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, StepCostCaseTest,
    testing::Values(Case{"tiny", 0, {.sequences = 1, .rows = 17, .answered = 17}},
                    Case{"tiny", 0, {.sequences = 3, .rows = 33, .answered = 5}},
                    Case{"tiny", 32, {.sequences = 1, .rows = 32, .cached = 64, .answered = 32}},
                    Case{"tiny", 32, {.sequences = 4, .rows = 32, .cached = 32, .answered = 1}},
                    Case{"tiny", 32, {.sequences = 2, .rows = 70, .answered = 70}},
                    Case{"tiny-moe", 0, {.sequences = 2, .rows = 32, .answered = 32}},
                    Case{"tiny-moe", 0, {.sequences = 1, .rows = 4, .cached = 32, .answered = 3}}));

TEST(StepCostTest, PublishedShapesHaveTheirPublishedSizes) {
  const auto elements = [](const char* shape) {
    const auto config = ShapeConfig(shape, 32);
    const auto spec =
        ReadModelSpec(*ReadCheckpointFacts(CheckpointTexts{.config = config->dump()}, "shape"));
    double sum = 0;
    for (const ExpectedTensor& tensor : ExpectedTensors(*spec)) {
      double size = 1;
      for (const int64_t n : tensor.shape) size *= static_cast<double>(n);
      sum += size;
    }
    return sum;
  };
  EXPECT_NEAR(elements("llada-8b"), 8.02e9, 0.01e9);
  EXPECT_NEAR(elements("dream-7b"), 7.62e9, 0.01e9);
  EXPECT_NEAR(elements("llada2-mini"), 16.26e9, 0.02e9);
}

TEST(MemoryCheckpointTest, TheSameSeedIsTheSameWhateverTheThreads) {
  const auto config = ShapeConfig("tiny", 0);
  const auto bytes_of = [&](uint64_t seed, int32_t threads, DType dtype) {
    const auto checkpoint = MemoryCheckpoint::Make(*config, dtype, seed, threads);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto folder = (*checkpoint)->AddConfig(*config);
    const auto opened = Checkpoint::Open(*folder);
    EXPECT_TRUE(opened.ok()) << opened.status();
    const auto bytes = opened->files()[0].bytes();
    return std::string(bytes.begin(), bytes.end());
  };
  const std::string one = bytes_of(1, 1, DType::kBf16);
  EXPECT_EQ(one, bytes_of(1, 3, DType::kBf16));
  EXPECT_NE(one, bytes_of(2, 1, DType::kBf16));
  EXPECT_GT(bytes_of(1, 1, DType::kF32).size(), one.size() * 3 / 2);
}

TEST(MemoryCheckpointTest, WeightsHaveTheVarianceThatTheyShould) {
  const auto config = ShapeConfig("tiny", 0);
  const auto checkpoint = MemoryCheckpoint::Make(*config, DType::kF32, 1, 1);
  const auto folder = (*checkpoint)->AddConfig(*config);
  const auto opened = Checkpoint::Open(*folder);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const HostMatrix matrix = *opened->Matrix("model.layers.1.mlp.up_proj.weight");
  const auto* values = static_cast<const float*>(matrix.data);
  double sum = 0, squares = 0;
  const int64_t count = matrix.rows * matrix.cols;
  for (int64_t i = 0; i < count; ++i) {
    sum += values[i];
    squares += static_cast<double>(values[i]) * values[i];
  }
  // 15,360 values of variance 1/96: the mean is within 5 of its deviations, the variance within 5
  // %.
  EXPECT_NEAR(sum / static_cast<double>(count), 0, 5 * std::sqrt(1.0 / 96 / 15360));
  EXPECT_NEAR(squares / static_cast<double>(count) * 96, 1, 0.05);
  const HostMatrix norm = *opened->Matrix("model.norm.weight");
  EXPECT_EQ(static_cast<const float*>(norm.data)[3], 1.0F);
}

TEST(ShapeBenchTest, RunsEveryKindOfCellAndComparesBits) {
  bench::ShapeBenchOptions options{.shapes = {"tiny", "tiny-moe"},
                                   .cells = {"block:3x32@64", "canvas:2x40"},
                                   .num_threads = 1,
                                   .steps_max = 2,
                                   .invariance = true};
  const absl::Status status = bench::RunShapeBench(options);
  EXPECT_TRUE(status.ok()) << status;
  for (const char* cell :
       {"block:1x33@0", "block:1x32@5", "canvas:0x4", "canvas:8", "rows:1x1", ""}) {
    options.cells = {cell};
    EXPECT_TRUE(absl::IsInvalidArgument(bench::RunShapeBench(options))) << cell;
  }
  options.cells = {"canvas:1x4"};
  options.shapes = {"huge"};
  EXPECT_TRUE(absl::IsNotFound(bench::RunShapeBench(options)));
}

}  // namespace
}  // namespace cinnabar
