// Products with block-quantised weights in float32: against double, and bit for bit between
// instruction sets, batches, packed and mapped weights, and the vocabulary head. The bodies use the
// Backend interface alone, so that every backend runs them; bf16 is in tensor_core_test.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/quantized.h"
#include "tests/unit/kernels/named_backend.h"

namespace cinnabar {
namespace {

using Floats = std::vector<float>;

constexpr DType kFormats[] = {DType::kQ8_0, DType::kQ4_0, DType::kQ4_1, DType::kQ4_K, DType::kQ6_K};
constexpr int64_t kRowsMax = 540;

Floats Draw(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// A matrix in a block format, at an odd address.
struct Stored {
  std::vector<uint8_t> bytes;
  HostMatrix matrix;
  Stored(DType dtype, int64_t rows, int64_t cols, uint32_t seed)
      : bytes(1 + BytesOf(dtype, rows * cols)) {
    QuantizeRow(Draw(rows * cols, seed), dtype, bytes.data() + 1);
    matrix = {bytes.data() + 1, dtype, rows, cols};
  }
};

absl::StatusOr<std::unique_ptr<Backend>> Make(const std::string& name, int32_t num_threads = 1) {
  auto backend = MakeNamedBackend(name, num_threads);
  if (!backend.ok()) return backend;
  EXPECT_TRUE((*backend)
                  ->Reserve({.rows_max = kRowsMax,
                             .cols_max = 768,
                             .vocabulary = 600,
                             .queries_max = 64,
                             .positions_max = 8,
                             .head_dim_max = 8})
                  .ok());
  return backend;
}

Floats Product(Backend& backend, const Weight& weight, const Floats& x) {
  const int64_t dim = weight.cols(), rows = static_cast<int64_t>(x.size()) / dim;
  const bool paired = weight.row_order() == RowOrder::kGatedPairs;
  const int64_t outputs = paired ? weight.rows() / 2 : weight.rows();
  const auto xs = *backend.Allocate(rows * dim * 4), out = *backend.Allocate(rows * outputs * 4);
  EXPECT_TRUE(backend.Upload(x, xs->data()).ok());
  EXPECT_TRUE(backend
                  .Linear({.x = {xs->data(), dim},
                           .num_rows = rows,
                           .weight = &weight,
                           .epilogue = paired ? Epilogue::kSwiGlu : Epilogue::kStore,
                           .out = {out->data(), outputs}})
                  .ok());
  Floats got(rows * outputs);
  EXPECT_TRUE(backend.Download(out->data(), absl::MakeSpan(got)).ok());
  return got;
}

bool SameBits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<double> Dequantised(const std::vector<HostMatrix>& parts) {
  std::vector<double> values;
  for (const HostMatrix& part : parts) {
    Floats row(part.cols);
    for (int64_t r = 0; r < part.rows; ++r) {
      ReadRow(part, r, absl::MakeSpan(row));
      values.insert(values.end(), row.begin(), row.end());
    }
  }
  return values;
}

class QuantizedProductsTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = Make(GetParam(), 2);
    if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
    backend_ = *std::move(backend);
  }
  bool on_cpu() const { return absl::StartsWith(backend_->Describe(), "cpu"); }
  std::unique_ptr<Backend> backend_;
};

// On the CPU x is rounded to 2^-14 of its run's largest element, half a step at most: |error| <=
// sum |w| * largest / 2^15 and the float32 sums of the runs.
void ExpectNear(const Floats& got, const Floats& x, const std::vector<double>& w, int64_t rows,
                int64_t outputs, int64_t dim) {
  ASSERT_EQ(static_cast<int64_t>(got.size()), rows * outputs);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs; ++o) {
      double want = 0.0, bound = 0.0, terms = 0.0;
      for (int64_t run = 0; run < dim; run += 32) {
        double largest = 0.0, weights = 0.0;
        for (int64_t k = run; k < run + 32; ++k) {
          largest = std::max(largest, std::abs(double{x[r * dim + k]}));
          weights += std::abs(w[o * dim + k]);
          want += double{x[r * dim + k]} * w[o * dim + k];
          terms += std::abs(double{x[r * dim + k]} * w[o * dim + k]);
        }
        bound += weights * largest / 32766.0;
      }
      ASSERT_NEAR(got[r * outputs + o], want, bound + 1e-5 * terms)
          << "row " << r << " output " << o;
    }
  }
}

TEST_P(QuantizedProductsTest, AgreesWithDouble) {
  for (const DType dtype : kFormats) {
    for (const auto& [outputs, dim] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 256}, {33, 768}, {97, 512}, {31, 32}}) {
      if (dim % BlockOf(dtype).elements != 0) continue;
      const Stored w(dtype, outputs, dim, 2);
      const auto weight = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
      EXPECT_EQ(weight->dtype(), dtype);
      for (const int64_t rows : {1, 5, 13, 29}) {
        SCOPED_TRACE(absl::StrCat(rows, " x ", dim, " -> ", outputs, " ", NameOf(dtype)));
        const Floats x = Draw(rows * dim, 1);
        ExpectNear(Product(*backend_, *weight, x), x, Dequantised({w.matrix}), rows, outputs, dim);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The lesser memory is what it is for: less than 9.5 and 6.5 bits a weight.
TEST_P(QuantizedProductsTest, IsKeptSmall) {
  for (const DType dtype : kFormats) {
    const Stored w(dtype, 512, 768, 2);
    const auto weight = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
    const bool eight = dtype == DType::kQ8_0 || dtype == DType::kQ6_K;
    EXPECT_LT(8.0 * static_cast<double>(weight->memory_bytes()) / (512 * 768), eight ? 9.5 : 6.5)
        << NameOf(dtype);
  }
}

TEST_P(QuantizedProductsTest, FloatsAreRoundedAsQuantizeRowSays) {
  const Floats w = Draw(40 * 256, 4), x = Draw(7 * 256, 5);
  for (const DType dtype : kFormats) {
    const Stored stored(dtype, 40, 256, 4);
    const auto rounded =
        *backend_->LoadWeight({{w.data(), DType::kF32, 40, 256}}, RowOrder::kStacked, dtype);
    const auto kept = *backend_->LoadWeight({stored.matrix}, RowOrder::kStacked, dtype);
    EXPECT_TRUE(SameBits(Product(*backend_, *rounded, x), Product(*backend_, *kept, x)))
        << NameOf(dtype);
    // And back: exactly the values.
    const auto widened = *backend_->LoadWeight({stored.matrix}, RowOrder::kStacked, DType::kF32);
    ExpectNear(Product(*backend_, *widened, x), x, Dequantised({stored.matrix}), 7, 40, 256);
  }
}

// q | k | v of three formats, at boundaries of panels and across them; gate and up likewise.
TEST_P(QuantizedProductsTest, PartsKeepTheirFormats) {
  for (const int64_t split : {64, 32, 40, 7}) {
    SCOPED_TRACE(split);
    const Stored a(DType::kQ4_K, split, 512, 1), b(DType::kQ6_K, 32, 512, 2),
        c(DType::kQ8_0, 17, 512, 3);
    const auto weight =
        *backend_->LoadWeight({a.matrix, b.matrix, c.matrix}, RowOrder::kStacked, DType::kQ4_K);
    const Floats x = Draw(9 * 512, 4);
    ExpectNear(Product(*backend_, *weight, x), x, Dequantised({a.matrix, b.matrix, c.matrix}), 9,
               split + 49, 512);
  }
  const Stored gate(DType::kQ4_1, 50, 64, 1), up(DType::kQ8_0, 50, 64, 2);
  const auto pair =
      *backend_->LoadWeight({gate.matrix, up.matrix}, RowOrder::kGatedPairs, DType::kQ8_0);
  const Floats x = Draw(64, 3), got = Product(*backend_, *pair, x);
  const std::vector<double> g = Dequantised({gate.matrix}), u = Dequantised({up.matrix});
  for (int64_t o = 0; o < 50; ++o) {
    double gates = 0.0, ups = 0.0;
    for (int64_t k = 0; k < 64; ++k) {
      gates += g[o * 64 + k] * x[k];
      ups += u[o * 64 + k] * x[k];
    }
    EXPECT_NEAR(got[o], gates / (1.0 + std::exp(-gates)) * ups, 2e-2) << o;
  }
}

TEST_P(QuantizedProductsTest, MappedAndPackedGiveTheSameBits) {
  for (const DType dtype : kFormats) {
    const Stored gate(dtype, 40, 256, 1), up(dtype, 40, 256, 2);
    const HostMatrix parts[] = {gate.matrix, up.matrix};
    const Floats x = Draw(23 * 256, 3);
    for (const RowOrder order : {RowOrder::kStacked, RowOrder::kGatedPairs}) {
      const auto mapped = *backend_->MapWeight(parts, order);
      EXPECT_EQ(mapped->memory_bytes() == 0, on_cpu());
      EXPECT_TRUE(SameBits(Product(*backend_, *mapped, x),
                           Product(*backend_, **backend_->LoadWeight(parts, order, dtype), x)))
          << NameOf(dtype);
    }
  }
}

TEST_P(QuantizedProductsTest, BitsDependOnNeitherIsaNorBatch) {
  // Between the CPU and others bits differ: it rounds x.
  const auto reference = *Make(on_cpu() ? "generic" : GetParam());
  const int64_t rows = on_cpu() ? kRowsMax : 150;
  for (const DType dtype : kFormats) {
    SCOPED_TRACE(NameOf(dtype));
    const Stored w(dtype, 97, 768, 2);
    const auto theirs = *reference->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
    const auto ours = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
    const Floats x = Draw(rows * 768, 1), want = Product(*reference, *theirs, x);
    EXPECT_TRUE(SameBits(Product(*backend_, *ours, x), want));
    const Floats few(x.begin() + 100 * 768, x.begin() + 117 * 768);
    EXPECT_TRUE(SameBits(Product(*backend_, *ours, few),
                         Floats(want.begin() + 100 * 97, want.begin() + 117 * 97)));
  }
}

TEST_P(QuantizedProductsTest, RowsThatAreNotFiniteStayAlone) {
  const Stored w(DType::kQ8_0, 40, 64, 2);
  const auto weight = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, DType::kQ8_0);
  Floats x = Draw(9 * 64, 1);
  const Floats want = Product(*backend_, *weight, x);
  x[3 * 64 + 5] = NAN;
  x[5 * 64 + 40] = INFINITY;
  const Floats got = Product(*backend_, *weight, x);
  for (int64_t row = 0; row < 9; ++row) {
    for (int64_t o = 0; o < 40; ++o) {
      if (row == 3 || row == 5) {
        EXPECT_FALSE(std::isfinite(got[row * 40 + o]));
      } else {
        EXPECT_EQ(got[row * 40 + o], want[row * 40 + o]);
      }
    }
  }
  for (const float tiny : {0.0F, 1e-40F, 1e-31F}) {
    for (const float value : Product(*backend_, *weight, Floats(64, tiny))) {
      EXPECT_LT(std::abs(value), 1e-28F);
    }
  }
}

// The head multiplies rows of its own; what it answers is what Logits gives, and the same in any
// group.
TEST_P(QuantizedProductsTest, TheHeadAnswersFromTheSameLogits) {
  for (const DType dtype : {DType::kQ8_0, DType::kQ4_K, DType::kQ6_K}) {
    SCOPED_TRACE(NameOf(dtype));
    constexpr int64_t kRows = 19, kIds = 577, kDim = 256;
    const Stored w(dtype, kIds, kDim, 2);
    const auto weight = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
    const Floats x = Draw(kRows * kDim, 1), logits = Product(*backend_, *weight, x);
    const auto hidden = *backend_->Allocate(kRows * kDim * 4);
    ASSERT_TRUE(backend_->Upload(x, hidden->data()).ok());
    const auto answer = [&](std::vector<VocabularyQuery> queries) {
      std::vector<VocabularyAnswer> answers(queries.size());
      EXPECT_TRUE(backend_
                      ->AnswerVocabulary({.hidden = {hidden->data(), kDim},
                                          .weight = weight.get(),
                                          .queries = queries,
                                          .answers = absl::MakeSpan(answers)})
                      .ok());
      EXPECT_TRUE(backend_->Synchronize().ok());
      return answers;
    };
    std::vector<VocabularyQuery> queries(2 * kRows);
    for (int32_t i = 0; i < 2 * kRows; ++i) {
      queries[i].hidden_row = i % kRows;
      if (i >= kRows) queries[i].top_p = 0.999F, queries[i].pick_temperature = 1.0F;
    }
    const std::vector<VocabularyAnswer> answers = answer(queries);
    for (int32_t i = 0; i < 2 * kRows; ++i) {
      const VocabularyAnswer alone = answer({queries[i]})[0];
      EXPECT_EQ(alone.token, answers[i].token);
      EXPECT_EQ(alone.log_sum_exp, answers[i].log_sum_exp);
      const float* row = logits.data() + i % kRows * kIds;
      EXPECT_EQ(answers[i].token_logit, row[answers[i].token]);
      EXPECT_TRUE(i >= kRows || answers[i].token == std::max_element(row, row + kIds) - row);
    }
  }
}

TEST_P(QuantizedProductsTest, EmbeddingsAreReadExactly) {
  for (const DType dtype : kFormats) {
    const Stored table(dtype, 5, 256, 3);
    const auto weight = *backend_->LoadEmbedding(table.matrix);
    const auto out = *backend_->Allocate(2 * 256 * 4);
    const int32_t ids[] = {4, 1};
    ASSERT_TRUE(backend_->Embed(*weight, ids, 1.0F, {out->data(), 256}).ok());
    const std::vector<double> want = Dequantised({table.matrix});
    Floats got(2 * 256);
    ASSERT_TRUE(backend_->Download(out->data(), absl::MakeSpan(got)).ok());
    for (int64_t i = 0; i < 256; ++i) {
      EXPECT_EQ(got[i], want[4 * 256 + i]);
      EXPECT_EQ(got[256 + i], want[256 + i]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, QuantizedProductsTest,
                         testing::Values("avx512vnni", "avx512", "avx2vnni", "avx2", "generic"),
                         [](const auto& info) { return std::string(info.param); });
INSTANTIATE_TEST_SUITE_P(Emulated, QuantizedProductsTest, testing::Values("emulated"));
INSTANTIATE_TEST_SUITE_P(Cuda, QuantizedProductsTest, testing::Values("cuda"));

}  // namespace
}  // namespace cinnabar
