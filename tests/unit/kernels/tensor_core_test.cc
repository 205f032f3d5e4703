// The tensor-core paths of the CUDA backend (bf16 and FP8 rows) against double references, and the
// bits that must not change with the batch. On the host the kernels run in the emulator of
// tests/support/simt, under several orders of threads and blocks; where there is a device, on it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/cuda/math.h"
#include "kernels/cuda/plan.h"
#include "kernels/quantized.h"
#include "tests/unit/kernels/named_backend.h"

namespace cinnabar {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

float Bf16(float value) { return cuda::FromBf16(cuda::ToBf16(value)); }

// Values that bf16 holds exactly.
Floats RandomBf16(int64_t count, int seed, float scale = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  Floats values(count);
  for (float& value : values) value = Bf16(normal(random));
  return values;
}

// Rows on the device, in float32 or bf16, with 16 bytes beyond the columns of each row that hold
// NaNs: nothing may read them.
class DeviceRows {
 public:
  DeviceRows(Backend& backend, const Floats& values, int64_t cols, DType dtype)
      : backend_(backend),
        cols_(cols),
        stride_((cols + 7) / 8 * 8 + 8),
        dtype_(dtype),
        num_rows_(static_cast<int64_t>(values.size()) / cols) {
    Floats bytes((num_rows_ * stride_ * BytesOf(dtype) + 3) / 4 + 1);
    for (int64_t row = 0; row < num_rows_; ++row) {
      for (int64_t i = 0; i < stride_; ++i) {
        const float value = i < cols ? values[row * cols + i] : NAN;
        const int64_t at = row * stride_ + i;
        if (dtype == DType::kF32) {
          bytes[at] = value;
        } else {
          const uint16_t half = cuda::ToBf16(value);
          std::memcpy(reinterpret_cast<char*>(bytes.data()) + 2 * at, &half, 2);
        }
      }
    }
    buffer_ = *backend.Allocate(static_cast<int64_t>(bytes.size()) * 4);
    EXPECT_TRUE(backend.Upload(bytes, buffer_->data()).ok());
  }
  Rows rows(int64_t first = 0) const {
    return {static_cast<char*>(buffer_->data()) + first * stride_ * BytesOf(dtype_), stride_,
            dtype_};
  }
  const float* floats() const { return static_cast<const float*>(buffer_->data()); }
  void* data() const { return buffer_->data(); }
  Floats Get() const {
    Floats bytes((num_rows_ * stride_ * BytesOf(dtype_) + 3) / 4);
    EXPECT_TRUE(backend_.Download(buffer_->data(), absl::MakeSpan(bytes)).ok());
    Floats values;
    for (int64_t row = 0; row < num_rows_; ++row) {
      for (int64_t i = 0; i < cols_; ++i) {
        const int64_t at = row * stride_ + i;
        uint16_t half;
        std::memcpy(&half, reinterpret_cast<const char*>(bytes.data()) + 2 * at, 2);
        values.push_back(dtype_ == DType::kF32 ? bytes[at] : cuda::FromBf16(half));
      }
    }
    return values;
  }

 private:
  Backend& backend_;
  int64_t cols_;
  int64_t stride_;
  DType dtype_;
  int64_t num_rows_;
  std::unique_ptr<Buffer> buffer_;
};

std::unique_ptr<Buffer> Vector(Backend& backend, const Floats& values) {
  auto buffer = *backend.Allocate(static_cast<int64_t>(values.size()) * 4);
  EXPECT_TRUE(backend.Upload(values, buffer->data()).ok());
  return buffer;
}

const float* Data(const std::unique_ptr<Buffer>& buffer) {
  return static_cast<const float*>(buffer->data());
}

Floats Slice(const Floats& values, int64_t begin, int64_t count, int64_t cols) {
  return {values.begin() + begin * cols, values.begin() + (begin + count) * cols};
}

void ExpectNear(const Floats& got, const Doubles& want, const Doubles& scale, double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], tolerance * scale[i] + 1e-30) << "element " << i;
  }
}

bool SameBits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A float32 sum is off by at most n 2^-24 of its terms' sizes; random signs leave far less. The
// hardware's own sums inside an mma keep at least as many bits.
constexpr double kSumTolerance = 4e-6;
constexpr double kBf16Half = 1.0 / 256;  // rounding to bf16, relative

class TensorCoreTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = MakeNamedBackend(GetParam());
    if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
    backend_ = *std::move(backend);
    Reserve({.rows_max = 400, .cols_max = 2400, .positions_max = 300, .head_dim_max = 24});
  }
  void TearDown() override { simt::SetOrder(simt::Order::kForward); }
  void Reserve(const WorkspaceShape& shape) {
    const absl::Status reserved = backend_->Reserve(shape);
    ASSERT_TRUE(reserved.ok()) << reserved;
  }
  std::unique_ptr<Weight> Load(const Floats& values, int64_t outputs, int64_t dim,
                               DType dtype = DType::kBf16) {
    return *backend_->LoadWeight({{values.data(), DType::kF32, outputs, dim}}, RowOrder::kStacked,
                                 dtype);
  }
  std::unique_ptr<Backend> backend_;
};

INSTANTIATE_TEST_SUITE_P(Emulated, TensorCoreTest,
                         testing::Values("emulated-bf16", "emulated-bf16-wgmma"));
INSTANTIATE_TEST_SUITE_P(Cuda, TensorCoreTest, testing::Values("cuda-bf16"));
INSTANTIATE_TEST_SUITE_P(Hopper, TensorCoreTest, testing::Values("cuda-bf16-wgmma"));

TEST_P(TensorCoreTest, LinearAgreesWithDouble) {
  // Every tile of rows, one beyond it, more of them than go together, and sums in one, two and four
  // segments.
  for (const auto& [rows, outputs, dim] :
       std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 1},
                                                          {3, 65, 7},
                                                          {16, 64, 64},
                                                          {17, 33, 72},
                                                          {40, 130, 200},
                                                          {65, 72, 136},
                                                          {5, 72, 1100},
                                                          {33, 40, 2200},
                                                          {130, 136, 1096},
                                                          {250, 100, 72},
                                                          {1100, 136, 72}}) {
    const Floats x = RandomBf16(rows * dim, 1);
    const Floats w = RandomBf16(outputs * dim, 2);
    const Floats bias = RandomBf16(outputs, 3);
    const Floats start = RandomBf16(rows * outputs, 4);
    const Floats gate = RandomBf16(2 * outputs, 5);
    const auto weight = Load(w, outputs, dim);
    const DeviceRows xs(*backend_, x, dim, DType::kBf16);
    const DeviceRows gates(*backend_, gate, outputs, DType::kF32);
    const auto biases = Vector(*backend_, bias);
    std::vector<SequenceSpan> spans = {{.row_begin = 0, .num_rows = 1, .modulation_row = 1}};
    if (rows > 1) {
      spans.push_back({.row_begin = 1, .num_rows = static_cast<int32_t>(rows) - 1});
    }
    for (const Epilogue epilogue : {Epilogue::kStore, Epilogue::kAdd, Epilogue::kGatedAdd,
                                    Epilogue::kSilu, Epilogue::kGeluTanh}) {
      for (const DType out_dtype : {DType::kF32, DType::kBf16}) {
        SCOPED_TRACE(absl::StrCat(rows, " x ", dim, " -> ", outputs, " ", NameOf(out_dtype),
                                  ", epilogue ", static_cast<int>(epilogue)));
        const DeviceRows out(*backend_, start, outputs, out_dtype);
        const absl::Status status = backend_->Linear({.x = xs.rows(),
                                                      .num_rows = rows,
                                                      .weight = weight.get(),
                                                      .bias = Data(biases),
                                                      .epilogue = epilogue,
                                                      .out = out.rows(),
                                                      .gate = gates.rows(),
                                                      .sequences = spans});
        ASSERT_TRUE(status.ok()) << status;
        Doubles want(rows * outputs), scale(rows * outputs);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t o = 0; o < outputs; ++o) {
            double y = bias[o];
            double size = std::abs(y) + std::abs(start[r * outputs + o]);
            for (int64_t k = 0; k < dim; ++k) {
              const double term = static_cast<double>(x[r * dim + k]) * w[o * dim + k];
              y += term;
              size += std::abs(term);
            }
            const float g = gate[(r == 0 ? 1 : 0) * outputs + o];
            if (epilogue == Epilogue::kAdd) y += start[r * outputs + o];
            if (epilogue == Epilogue::kGatedAdd) y = y * g + start[r * outputs + o];
            if (epilogue == Epilogue::kGatedAdd) size *= 1 + std::abs(g);
            if (epilogue == Epilogue::kSilu) y /= 1 + std::exp(-y);
            if (epilogue == Epilogue::kGeluTanh) {
              y *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
            }
            want[r * outputs + o] = y;
            scale[r * outputs + o] =
                size + (out_dtype == DType::kBf16 ? std::abs(y) * kBf16Half / kSumTolerance : 0.0);
          }
        }
        ExpectNear(out.Get(), want, scale, kSumTolerance);
      }
    }
  }
}

TEST_P(TensorCoreTest, SwiGluPairsGateAndUp) {
  const int64_t rows = 35, dim = 88;
  for (const int64_t outputs : {1, 7, 8, 9, 45, 70}) {
    const Floats x = RandomBf16(rows * dim, 1);
    const Floats gate = RandomBf16(outputs * dim, 2);
    const Floats up = RandomBf16(outputs * dim, 3);
    const Floats bias = RandomBf16(2 * outputs, 4);
    const auto weight = *backend_->LoadWeight(
        {{gate.data(), DType::kF32, outputs, dim}, {up.data(), DType::kF32, outputs, dim}},
        RowOrder::kGatedPairs, DType::kBf16);
    const DeviceRows xs(*backend_, x, dim, DType::kBf16);
    const auto biases = Vector(*backend_, bias);
    const DeviceRows out(*backend_, Floats(rows * outputs), outputs, DType::kF32);
    ASSERT_TRUE(backend_
                    ->Linear({.x = xs.rows(),
                              .num_rows = rows,
                              .weight = weight.get(),
                              .bias = Data(biases),
                              .epilogue = Epilogue::kSwiGlu,
                              .out = out.rows()})
                    .ok());
    Doubles want(rows * outputs), scale(rows * outputs);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < outputs; ++o) {
        double g = bias[o], u = bias[outputs + o];
        for (int64_t k = 0; k < dim; ++k) {
          g += static_cast<double>(x[r * dim + k]) * gate[o * dim + k];
          u += static_cast<double>(x[r * dim + k]) * up[o * dim + k];
        }
        want[r * outputs + o] = g / (1 + std::exp(-g)) * u;
        scale[r * outputs + o] = (1 + std::abs(g)) * (1 + std::abs(u));
      }
    }
    ExpectNear(out.Get(), want, scale, 1e-5);
  }
}

// Any piece of a batch, alone, gives the bits that it gave inside: through every tile shape, with
// segments walked in a block and side by side, bf16 and FP8.
TEST_P(TensorCoreTest, LinearBitsDoNotDependOnTheBatch) {
  const int64_t rows = 150;
  for (const bool fp8 : {false, true}) {
    if (fp8) {
      auto backend = MakeNamedBackend(GetParam() + "-fp8");
      if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
      backend_ = *std::move(backend);
      Reserve({.rows_max = 400, .cols_max = 2400});
    }
    for (const auto& [outputs, dim] :
         std::vector<std::pair<int64_t, int64_t>>{{264, 264}, {300, 2200}, {1100, 1100}}) {
      const Floats x = RandomBf16(rows * dim, 1);
      const auto weight = Load(RandomBf16(outputs * dim, 2), outputs, dim);
      const auto run = [&](int64_t begin, int64_t count) {
        const DeviceRows xs(*backend_, Slice(x, begin, count, dim), dim, DType::kBf16);
        const DeviceRows out(*backend_, Floats(count * outputs), outputs, DType::kF32);
        EXPECT_TRUE(
            backend_
                ->Linear(
                    {.x = xs.rows(), .num_rows = count, .weight = weight.get(), .out = out.rows()})
                .ok());
        return out.Get();
      };
      const Floats whole = run(0, rows);
      for (const auto& [begin, count] : std::vector<std::pair<int64_t, int64_t>>{
               {0, 1}, {149, 1}, {7, 13}, {30, 32}, {63, 33}, {10, 64}, {5, 140}}) {
        SCOPED_TRACE(
            absl::StrCat(fp8 ? "fp8 " : "", dim, " -> ", outputs, ", rows ", begin, " + ", count));
        EXPECT_TRUE(SameBits(run(begin, count), Slice(whole, begin, count, outputs)));
      }
      if (outputs > 300) continue;
      for (const simt::Order order : {simt::Order::kReverse, simt::Order::kShuffled}) {
        simt::SetOrder(order);
        EXPECT_TRUE(SameBits(run(63, 40), Slice(whole, 63, 40, outputs)));
        simt::SetOrder(simt::Order::kForward);
      }
    }
  }
}

TEST_P(TensorCoreTest, Fp8ProductsAreThoseOfTheRoundedOperands) {
  auto backend = MakeNamedBackend(GetParam() + "-fp8");
  if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
  backend_ = *std::move(backend);
  Reserve({.rows_max = 100, .cols_max = 600});
  const int64_t rows = 21, outputs = 260, dim = 328;
  Floats x = RandomBf16(rows * dim, 1);
  for (int64_t i = 0; i < dim; ++i) x[3 * dim + i] = 0.0F;     // a row of zeros
  for (int64_t i = 0; i < dim; ++i) x[5 * dim + i] *= 1e-20F;  // tiny, and
  for (int64_t i = 0; i < dim; ++i) x[6 * dim + i] *= 1e15F;   // huge: scales carry them
  for (float& value : x) value = Bf16(value);
  Floats w = RandomBf16(outputs * dim, 2, 0.05F);
  for (int64_t i = 0; i < dim; ++i) w[7 * dim + i] = 0.0F;
  const auto weight = Load(w, outputs, dim);
  EXPECT_LT(weight->memory_bytes(), outputs * dim * 2);
  const DeviceRows xs(*backend_, x, dim, DType::kBf16);
  const DeviceRows out(*backend_, Floats(rows * outputs), outputs, DType::kF32);
  ASSERT_TRUE(
      backend_
          ->Linear({.x = xs.rows(), .num_rows = rows, .weight = weight.get(), .out = out.rows()})
          .ok());
  // The same rounding on the host: scale = largest / 448.
  const auto round = [&](const Floats& values, int64_t row, Floats& scales) {
    float largest = 0.0F;
    for (int64_t i = 0; i < dim; ++i) largest = std::max(largest, std::abs(values[row * dim + i]));
    const float scale = largest > 0.0F ? largest / 448.0F : 1.0F;
    scales.push_back(scale);
    Doubles rounded;
    for (int64_t i = 0; i < dim; ++i) {
      rounded.push_back(cuda::FromE4m3(cuda::ToE4m3(values[row * dim + i] / scale)));
    }
    return rounded;
  };
  Floats x_scales, w_scales;
  std::vector<Doubles> xq, wq;
  for (int64_t r = 0; r < rows; ++r) xq.push_back(round(x, r, x_scales));
  for (int64_t o = 0; o < outputs; ++o) wq.push_back(round(w, o, w_scales));
  Doubles want, scale;
  double error = 0, size = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0, terms = 0, exact = 0;
      for (int64_t k = 0; k < dim; ++k) {
        sum += xq[r][k] * wq[o][k];
        terms += std::abs(xq[r][k] * wq[o][k]);
        exact += static_cast<double>(x[r * dim + k]) * w[o * dim + k];
      }
      const double factor = static_cast<double>(x_scales[r]) * w_scales[o];
      want.push_back(sum * factor);
      scale.push_back(terms * factor);
      if (r == 6) continue;
      error += std::pow(sum * factor - exact, 2);
      size += exact * exact;
    }
  }
  // Hopper's tensor cores add e4m3 products with fewer than float32's bits: 2^-13 of the terms is
  // what published measurements bound it by (arXiv:2412.19437, section 3.3.2).
  ExpectNear(out.Get(), want, scale, GetParam() == "emulated-bf16" ? kSumTolerance : 1.3e-4);
  EXPECT_LT(std::sqrt(error / size), 0.05);  // e4m3 has 4 bits: about 4 %
}

// What e4m3 loses while it adds stays what 128 of k lose: terms of one sign, a long row of them.
TEST_P(TensorCoreTest, Fp8SumsByWgmmaAreMovedToFloat32OnTheWay) {
  if (!absl::StrContains(GetParam(), "wgmma")) return;  // mma.sync leaves no say in it
  auto backend = MakeNamedBackend(GetParam() + "-fp8");
  if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
  backend_ = *std::move(backend);
  Reserve({.rows_max = 100, .cols_max = 2400});
  const int64_t rows = 3, outputs = 300, dim = 2400;
  Floats x = RandomBf16(rows * dim, 1), w = RandomBf16(outputs * dim, 2);
  for (Floats* values : {&x, &w}) {  // what e4m3 holds exactly, with a scale of 1
    for (size_t i = 0; i < values->size(); ++i) {
      (*values)[i] = cuda::FromE4m3(cuda::ToE4m3(std::abs((*values)[i])));
    }
    for (size_t begin = 0; begin < values->size(); begin += dim) (*values)[begin] = 448.0F;
  }
  const auto weight = Load(w, outputs, dim);
  const DeviceRows xs(*backend_, x, dim, DType::kBf16);
  const DeviceRows out(*backend_, Floats(rows * outputs), outputs, DType::kF32);
  ASSERT_TRUE(
      backend_
          ->Linear({.x = xs.rows(), .num_rows = rows, .weight = weight.get(), .out = out.rows()})
          .ok());
  const Floats got = out.Get();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outputs; ++o) {
      double sum = 0;
      for (int64_t k = 0; k < dim; ++k) {
        sum += static_cast<double>(x[r * dim + k]) * w[o * dim + k];
      }
      // 448 * 448 is most of the sum: 2^-13 of it may go at each of the 4 steps of the first 128.
      // Were it there at every step, so might all that follows.
      ASSERT_NEAR(got[r * outputs + o], sum, 4 * std::pow(2.0, -13) * sum);
    }
  }
}

// --- Block-quantised weights: products of bf16 rows with each value rounded once to bf16

constexpr DType kFormats[] = {DType::kQ8_0, DType::kQ4_0, DType::kQ4_1, DType::kQ4_K, DType::kQ6_K};

struct Blocks {
  std::vector<uint8_t> bytes;
  HostMatrix matrix;
  Floats values;  // as bf16
  Blocks(DType dtype, int64_t rows, int64_t cols, int seed)
      : bytes(1 + BytesOf(dtype, rows * cols)), values(rows * cols) {
    QuantizeRow(RandomBf16(rows * cols, seed), dtype, bytes.data() + 1);
    matrix = {bytes.data() + 1, dtype, rows, cols};
    for (int64_t row = 0; row < rows; ++row) {
      ReadRow(matrix, row, absl::MakeSpan(values).subspan(row * cols, cols));
    }
    for (float& value : values) value = Bf16(value);
  }
};

Floats Multiply(Backend& backend, const Weight& weight, const Floats& x, const float* bias) {
  const int64_t dim = weight.cols(), rows = static_cast<int64_t>(x.size()) / dim;
  const DeviceRows xs(backend, x, dim, DType::kBf16);
  const DeviceRows out(backend, Floats(rows * weight.rows()), weight.rows(), DType::kF32);
  EXPECT_TRUE(backend
                  .Linear({.x = xs.rows(),
                           .num_rows = rows,
                           .weight = &weight,
                           .bias = bias,
                           .out = out.rows()})
                  .ok());
  return out.Get();
}

void ExpectProduct(const Floats& got, const Floats& x, const Floats& w, const Floats& bias,
                   int64_t dim) {
  const int64_t outputs = static_cast<int64_t>(w.size()) / dim;
  Doubles want, scale;
  for (size_t r = 0; r < x.size() / dim; ++r) {
    for (int64_t o = 0; o < outputs; ++o) {
      double y = bias[o], size = std::abs(y);
      for (int64_t k = 0; k < dim; ++k) {
        const double term = static_cast<double>(x[r * dim + k]) * w[o * dim + k];
        y += term;
        size += std::abs(term);
      }
      want.push_back(y);
      scale.push_back(size);
    }
  }
  ExpectNear(got, want, scale, kSumTolerance);
}

TEST_P(TensorCoreTest, ProductsWithBlocksAreThoseOfTheirBf16) {
  for (const DType dtype : kFormats) {
    // Every tile of rows; units that are not full; sums in one and four segments.
    for (const auto& [rows, outputs, dim] :
         std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 32},
                                                            {5, 65, 96},
                                                            {16, 130, 256},
                                                            {33, 70, 512},
                                                            {130, 140, 288},
                                                            {3, 20, 2304}}) {
      if (dim % BlockOf(dtype).elements != 0) continue;
      SCOPED_TRACE(absl::StrCat(rows, " x ", dim, " -> ", outputs, " ", NameOf(dtype)));
      const Blocks w(dtype, outputs, dim, 2);
      const auto weight = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
      const Floats x = RandomBf16(rows * dim, 1), bias = RandomBf16(outputs, 3);
      const auto biases = Vector(*backend_, bias);
      ExpectProduct(Multiply(*backend_, *weight, x, Data(biases)), x, w.values, bias, dim);
    }
  }
}

TEST_P(TensorCoreTest, PartsOfSeveralFormatsAreStackedAndPaired) {
  const int64_t dim = 256;
  const Blocks q(DType::kQ4_K, 40, dim, 1), k(DType::kQ4_K, 24, dim, 2),
      v(DType::kQ6_K, 17, dim, 3);
  const auto qkv =
      *backend_->LoadWeight({q.matrix, k.matrix, v.matrix}, RowOrder::kStacked, DType::kQ4_K);
  Floats w = q.values, bias = RandomBf16(81, 4);
  w.insert(w.end(), k.values.begin(), k.values.end());
  w.insert(w.end(), v.values.begin(), v.values.end());
  const Floats x = RandomBf16(9 * dim, 5);
  const auto biases = Vector(*backend_, bias);
  ExpectProduct(Multiply(*backend_, *qkv, x, Data(biases)), x, w, bias, dim);
  for (const DType other : {DType::kQ8_0, DType::kQ4_1}) {
    const Blocks gate(DType::kQ8_0, 50, dim, 6), up(other, 50, dim, 7);
    const auto pair =
        *backend_->LoadWeight({gate.matrix, up.matrix}, RowOrder::kGatedPairs, DType::kQ8_0);
    const DeviceRows xs(*backend_, x, dim, DType::kBf16);
    const DeviceRows out(*backend_, Floats(9 * 50), 50, DType::kF32);
    ASSERT_TRUE(backend_
                    ->Linear({.x = xs.rows(),
                              .num_rows = 9,
                              .weight = pair.get(),
                              .epilogue = Epilogue::kGeGlu,
                              .out = out.rows()})
                    .ok());
    const Floats got = out.Get();
    for (int64_t i = 0; i < 9 * 50; ++i) {
      double g = 0, u = 0;
      for (int64_t j = 0; j < dim; ++j) {
        g += static_cast<double>(x[i / 50 * dim + j]) * gate.values[i % 50 * dim + j];
        u += static_cast<double>(x[i / 50 * dim + j]) * up.values[i % 50 * dim + j];
      }
      const double gelu =
          0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
      ASSERT_NEAR(got[i], gelu * u, 2e-4 * (1 + std::abs(g)) * (1 + std::abs(u))) << i;
    }
  }
}

TEST_P(TensorCoreTest, BitsOfProductsWithBlocksDoNotDependOnTheBatch) {
  for (const auto& [dtype, dim] : std::vector<std::pair<DType, int64_t>>{
           {DType::kQ8_0, 96}, {DType::kQ4_K, 2304}, {DType::kQ6_K, 256}}) {
    SCOPED_TRACE(NameOf(dtype));
    const Blocks w(dtype, 70, dim, 2);
    const auto weight = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
    const Floats x = RandomBf16(140 * dim, 1);
    const Floats whole = Multiply(*backend_, *weight, x, nullptr);
    for (const simt::Order order : {simt::Order::kForward, simt::Order::kShuffled}) {
      simt::SetOrder(order);
      for (const auto& [begin, count] :
           std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {7, 16}, {50, 30}, {70, 64}}) {
        EXPECT_TRUE(SameBits(Multiply(*backend_, *weight, Slice(x, begin, count, dim), nullptr),
                             Slice(whole, begin, count, 70)))
            << begin << " + " << count;
      }
    }
    simt::SetOrder(simt::Order::kForward);
  }
}

TEST_P(TensorCoreTest, TheHeadAndExpertsReadBlocks) {
  const int64_t rows = 37, dim = 256, ids = 300;
  Reserve({.rows_max = 64,
           .cols_max = dim,
           .vocabulary = ids,
           .queries_max = rows,
           .num_experts = 3,
           .experts_per_row = 1,
           .expert_dim = dim,
           .expert_mlp_dim = dim});
  const Floats x = RandomBf16(rows * dim, 1, 0.1F);
  const DeviceRows hidden(*backend_, x, dim, DType::kBf16);
  for (const DType dtype : {DType::kQ8_0, DType::kQ4_K}) {
    SCOPED_TRACE(NameOf(dtype));
    const Blocks w(dtype, ids, dim, 2);
    const auto head = *backend_->LoadWeight({w.matrix}, RowOrder::kStacked, dtype);
    const Floats logits = Multiply(*backend_, *head, x, nullptr);
    std::vector<VocabularyQuery> queries(rows);
    for (int32_t i = 0; i < rows; ++i) queries[i].hidden_row = i;
    std::vector<VocabularyAnswer> answers(rows), few(3);
    const auto answer = [&](absl::Span<const VocabularyQuery> of, absl::Span<VocabularyAnswer> to) {
      ASSERT_TRUE(
          backend_
              ->AnswerVocabulary(
                  {.hidden = hidden.rows(), .weight = head.get(), .queries = of, .answers = to})
              .ok());
      ASSERT_TRUE(backend_->Synchronize().ok());
    };
    answer(queries, absl::MakeSpan(answers));
    answer(absl::MakeConstSpan(queries).subspan(20, 3), absl::MakeSpan(few));
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = &logits[i * ids];
      EXPECT_EQ(answers[i].token, std::max_element(row, row + ids) - row);
      EXPECT_EQ(answers[i].token_logit, row[answers[i].token]);
    }
    for (int64_t i = 0; i < 3; ++i) {
      EXPECT_EQ(few[i].token, answers[20 + i].token);
      EXPECT_EQ(few[i].log_sum_exp, answers[20 + i].log_sum_exp);
    }

    // Expert r % 3 for row r: the same as three Linears.
    std::vector<std::unique_ptr<Weight>> gate_up, down;
    std::vector<std::unique_ptr<Blocks>> kept;
    for (int e = 0; e < 3; ++e) {
      for (int part = 0; part < 3; ++part) {
        kept.push_back(std::make_unique<Blocks>(dtype, part < 2 ? 256 : dim, 256, 10 * e + part));
      }
      const HostMatrix pair[] = {kept[3 * e]->matrix, kept[3 * e + 1]->matrix};
      gate_up.push_back(*backend_->MapWeight(pair, RowOrder::kGatedPairs));
      down.push_back(*backend_->MapWeight({&kept[3 * e + 2]->matrix, 1}, RowOrder::kStacked));
    }
    Floats chosen(rows);
    for (int32_t r = 0; r < rows; ++r) {
      const int32_t e = r % 3;
      std::memcpy(&chosen[r], &e, 4);
    }
    const auto experts = Vector(*backend_, chosen), ones = Vector(*backend_, Floats(rows, 1.0F));
    const DeviceRows out(*backend_, Floats(rows * dim), dim, DType::kF32);
    ASSERT_TRUE(backend_
                    ->Experts({.x = hidden.rows(),
                               .num_rows = rows,
                               .gate_up = gate_up,
                               .down = down,
                               .experts_per_row = 1,
                               .experts = static_cast<const int32_t*>(experts->data()),
                               .weights = Data(ones),
                               .add = false,
                               .out = out.rows()})
                    .ok());
    const Floats got = out.Get();
    for (int e = 0; e < 3; ++e) {
      const DeviceRows inner(*backend_, Floats(rows * 256), 256, DType::kBf16);
      const DeviceRows alone(*backend_, Floats(rows * dim), dim, DType::kF32);
      ASSERT_TRUE(backend_
                      ->Linear({.x = hidden.rows(),
                                .num_rows = rows,
                                .weight = gate_up[e].get(),
                                .epilogue = Epilogue::kSwiGlu,
                                .out = inner.rows()})
                      .ok());
      ASSERT_TRUE(backend_
                      ->Linear({.x = inner.rows(),
                                .num_rows = rows,
                                .weight = down[e].get(),
                                .out = alone.rows()})
                      .ok());
      const Floats want = alone.Get();
      for (int64_t r = e; r < rows; r += 3) {
        EXPECT_TRUE(SameBits(Slice(got, r, 1, dim), Slice(want, r, 1, dim))) << r;
      }
    }
  }
}

// --- Attention

struct AttentionCase {
  HeadShape heads;
  int32_t block_length = 0;
  int32_t rotary_dim = 0;
  bool norms = false;
  int32_t window = 0;  // with block_length 1
};

struct AttentionRun {
  Backend& backend;
  AttentionCase c;
  int32_t positions;
  Floats qkv, cosine, sine, q_norm, k_norm;

  int64_t width() const {
    return int64_t{c.heads.num_heads + 2 * c.heads.num_kv_heads} * c.heads.head_dim;
  }
  int64_t out_width() const { return int64_t{c.heads.num_heads} * c.heads.head_dim; }

  AttentionRun(Backend& backend, const AttentionCase& c, int32_t positions)
      : backend(backend), c(c), positions(positions), qkv(RandomBf16(positions * width(), 7)) {
    const int32_t half = c.rotary_dim / 2;
    for (int32_t p = 0; p < positions + 300; ++p) {
      for (int32_t i = 0; i < half; ++i) {
        const double angle = p * std::pow(10000.0, -2.0 * i / c.rotary_dim);
        cosine.push_back(static_cast<float>(std::cos(angle)));
        sine.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    if (half == 0) cosine = sine = {0.0F};
    q_norm = RandomBf16(c.heads.head_dim, 51);
    k_norm = RandomBf16(c.heads.head_dim, 52);
  }

  // Positions [0, cuts[0]), [cuts[0], cuts[1]) .. one after the other, behind `before` rows of
  // another sequence.
  Floats Run(const std::vector<int32_t>& cuts, int32_t before) const {
    const auto cosines = Vector(backend, cosine), sines = Vector(backend, sine);
    const auto q_norms = Vector(backend, q_norm), k_norms = Vector(backend, k_norm);
    auto kv = *backend.AllocateKv({2, c.heads.num_kv_heads, c.heads.head_dim, positions});
    auto other = *backend.AllocateKv({2, c.heads.num_kv_heads, c.heads.head_dim, 300});
    Floats result;
    int32_t begin = 0;
    for (const int32_t cut : cuts) {
      const int32_t rows = before + cut - begin;
      Floats packed = RandomBf16(before * width(), 99);
      const Floats mine = Slice(qkv, begin, cut - begin, width());
      packed.insert(packed.end(), mine.begin(), mine.end());
      const DeviceRows fused(backend, packed, width(), DType::kBf16);
      const DeviceRows out(backend, Floats(rows * out_width()), out_width(), DType::kBf16);
      std::vector<SequenceSpan> spans;
      if (before > 0) spans.push_back({.row_begin = 0, .num_rows = before, .kv = other.get()});
      spans.push_back({.row_begin = before,
                       .num_rows = cut - begin,
                       .first_position = begin,
                       .block_length = c.block_length,
                       .kv = kv.get()});
      absl::Status status = backend.PrepareHeads(
          {.qkv = fused.rows(),
           .num_rows = rows,
           .heads = c.heads,
           .q_norm = c.norms ? Data(q_norms) : nullptr,
           .k_norm = c.norms ? Data(k_norms) : nullptr,
           .rotary = {Data(cosines), Data(sines), c.rotary_dim, positions + 300},
           .sequences = spans,
           .layer = 1});
      EXPECT_TRUE(status.ok()) << status;
      status = backend.Attend({.q = fused.rows(),
                               .num_rows = rows,
                               .heads = c.heads,
                               .scale = 0.2F,
                               .sequences = spans,
                               .layer = 1,
                               .window = c.window,
                               .out = out.rows()});
      EXPECT_TRUE(status.ok()) << status;
      const Floats got = out.Get();
      result.insert(result.end(), got.begin() + before * out_width(), got.end());
      begin = cut;
    }
    return result;
  }

  // In double, from queries and keys rounded as the backend keeps them.
  Doubles Want() const {
    const int32_t hd = c.heads.head_dim, half = c.rotary_dim / 2;
    const auto prepared = [&](int32_t position, int32_t head, const Floats& norm) {
      Doubles x(hd);
      double squares = 0;
      for (int32_t i = 0; i < hd; ++i) {
        x[i] = qkv[position * width() + head * hd + i];
        squares += x[i] * x[i] / hd;
      }
      for (int32_t i = 0; c.norms && i < hd; ++i) x[i] *= norm[i] / std::sqrt(squares + 1e-6);
      for (int32_t i = 0; i < half; ++i) {
        const double a = x[i], b = x[half + i];
        const double co = cosine[position * half + i], si = sine[position * half + i];
        x[i] = a * co - b * si;
        x[half + i] = b * co + a * si;
      }
      for (double& value : x) value = Bf16(static_cast<float>(value));
      return x;
    };
    Doubles want(positions * out_width());
    for (int32_t head = 0; head < c.heads.num_heads; ++head) {
      const int32_t kv_head = head / (c.heads.num_heads / c.heads.num_kv_heads);
      std::vector<Doubles> keys;
      for (int32_t p = 0; p < positions; ++p) {
        keys.push_back(prepared(p, c.heads.num_heads + kv_head, k_norm));
      }
      for (int32_t p = 0; p < positions; ++p) {
        const Doubles q = prepared(p, head, q_norm);
        int32_t visible = positions;
        if (c.block_length > 0) {
          visible = std::min(positions, (p / c.block_length + 1) * c.block_length);
        }
        const int32_t first = c.window == 0 ? 0 : std::max(p - c.window + 1, 0);
        Doubles scores(visible, -INFINITY);
        double max = -INFINITY, sum = 0;
        for (int32_t k = first; k < visible; ++k) {
          scores[k] = 0;
          for (int32_t i = 0; i < hd; ++i) scores[k] += 0.2 * q[i] * keys[k][i];
          max = std::max(max, scores[k]);
        }
        for (double& s : scores) sum += s = std::exp(s - max);
        for (int32_t k = 0; k < visible; ++k) {
          const int64_t at =
              k * width() + (c.heads.num_heads + c.heads.num_kv_heads + kv_head) * hd;
          for (int32_t i = 0; i < hd; ++i) {
            want[p * out_width() + head * hd + i] += scores[k] / sum * qkv[at + i];
          }
        }
      }
    }
    return want;
  }
};

TEST_P(TensorCoreTest, AttentionAgreesWithDouble) {
  Reserve({.rows_max = 700, .cols_max = 400, .positions_max = 700, .head_dim_max = 24});
  const std::vector<std::pair<AttentionCase, std::vector<int32_t>>> cases = {
      {{.heads = {4, 2, 24}, .rotary_dim = 24, .norms = true}, {1, 13, 64, 65}},
      {{.heads = {1, 1, 2}}, {5}},
      {{.heads = {3, 1, 64}, .block_length = 4}, {70}},
      {{.heads = {7, 1, 40}, .block_length = 8, .rotary_dim = 16, .norms = true}, {33}},
      {{.heads = {2, 1, 128}, .block_length = 32}, {130}},
      {{.heads = {2, 2, 160}}, {20}},  // wider than the tensor kernel takes
      {{.heads = {2, 1, 16}}, {530}},  // two chunks of keys
      {{.heads = {3, 1, 16}, .block_length = 8}, {520}},
      {{.heads = {2, 1, 16}, .block_length = 1, .window = 40}, {560}},  // late rows: one chunk
      {{.heads = {1, 1, 16}, .block_length = 1, .window = 540}, {600}}};
  for (const auto& [c, lengths] : cases) {
    for (const int32_t positions : lengths) {
      SCOPED_TRACE(absl::StrCat("heads ", c.heads.num_heads, " of ", c.heads.head_dim, ", block ",
                                c.block_length, ", positions ", positions));
      const AttentionRun run(*backend_, c, positions);
      const Doubles want = run.Want();
      // The weights of a row are rounded to bf16, at random signs; then the result is. A query or
      // key that lies between two bf16 values may be rounded either way: 2^-8 of a score of
      // about 3.
      ExpectNear(run.Run({positions}, 0), want, Doubles(want.size(), 1.0), c.norms ? 0.08 : 0.03);
    }
  }
}

TEST_P(TensorCoreTest, AttentionBitsDependOnNeitherCutsNorNeighbours) {
  Reserve({.rows_max = 700, .cols_max = 400, .positions_max = 700, .head_dim_max = 16});
  const AttentionCase grouped = {.heads = {3, 1, 24}, .block_length = 32, .rotary_dim = 24};
  const AttentionRun run(*backend_, grouped, 96);
  const Floats whole = run.Run({96}, 0);
  EXPECT_TRUE(SameBits(run.Run({32, 64, 96}, 0), whole));
  EXPECT_TRUE(SameBits(run.Run({64, 96}, 5), whole));
  for (const simt::Order order : {simt::Order::kReverse, simt::Order::kShuffled}) {
    simt::SetOrder(order);
    EXPECT_TRUE(SameBits(run.Run({64, 96}, 70), whole));
    simt::SetOrder(simt::Order::kForward);
  }
  // Across a border of chunks: 16-position blocks, cached up to 496 and then beyond 512.
  const AttentionRun longer(*backend_, {.heads = {2, 1, 16}, .block_length = 16}, 544);
  EXPECT_TRUE(SameBits(longer.Run({496, 528, 544}, 0), longer.Run({544}, 3)));
  const AttentionRun windowed(*backend_, {.heads = {2, 1, 16}, .block_length = 1, .window = 40},
                              560);
  EXPECT_TRUE(SameBits(windowed.Run({495, 496, 530, 560}, 0), windowed.Run({560}, 3)));
}

// --- Experts

TEST_P(TensorCoreTest, ExpertsAgreeWithDoubleAndWithThemselvesAlone) {
  const int64_t rows = 70, dim = 72, mlp_dim = 40;
  const int32_t num_experts = 6, per_row = 2;
  Reserve({.rows_max = rows,
           .cols_max = dim,
           .num_experts = num_experts,
           .experts_per_row = per_row,
           .expert_dim = dim,
           .expert_mlp_dim = mlp_dim});
  std::vector<Floats> gates, ups, downs;
  std::vector<std::vector<uint16_t>> stored;
  const auto keep = [&](const Floats& values) {
    std::vector<uint16_t>& halves = stored.emplace_back();
    for (const float value : values) halves.push_back(cuda::ToBf16(value));
    return halves.data();
  };
  std::vector<std::unique_ptr<Weight>> gate_up, down;
  for (int32_t e = 0; e < num_experts; ++e) {
    gates.push_back(RandomBf16(mlp_dim * dim, 10 + e, 0.2F));
    ups.push_back(RandomBf16(mlp_dim * dim, 20 + e, 0.2F));
    downs.push_back(RandomBf16(dim * mlp_dim, 30 + e, 0.2F));
    gate_up.push_back(*backend_->MapWeight(
        {{keep(gates[e]), DType::kBf16, mlp_dim, dim}, {keep(ups[e]), DType::kBf16, mlp_dim, dim}},
        RowOrder::kGatedPairs));
    down.push_back(
        *backend_->MapWeight({{keep(downs[e]), DType::kBf16, dim, mlp_dim}}, RowOrder::kStacked));
  }
  const Floats x = RandomBf16(rows * dim, 1), before = RandomBf16(rows * dim, 2);
  const Floats weights = RandomBf16(rows * per_row, 3);
  std::vector<int32_t> experts;
  for (int64_t row = 0; row < rows; ++row) {  // expert 3 has no row, expert 5 most
    experts.push_back(static_cast<int32_t>(row % 3));
    experts.push_back(row % 7 == 0 ? 4 : 5);
  }
  const auto run = [&](int64_t first, int64_t count) {
    const DeviceRows xs(*backend_, Slice(x, first, count, dim), dim, DType::kBf16);
    const DeviceRows out(*backend_, Slice(before, first, count, dim), dim, DType::kF32);
    Floats ids(count * per_row);
    std::memcpy(ids.data(), experts.data() + first * per_row, ids.size() * 4);
    const auto chosen = Vector(*backend_, ids);
    const auto shares = Vector(*backend_, Slice(weights, first, count, per_row));
    const absl::Status status =
        backend_->Experts({.x = xs.rows(),
                           .num_rows = count,
                           .gate_up = gate_up,
                           .down = down,
                           .experts_per_row = per_row,
                           .experts = static_cast<const int32_t*>(chosen->data()),
                           .weights = Data(shares),
                           .out = out.rows()});
    EXPECT_TRUE(status.ok()) << status;
    return out.Get();
  };
  const Floats got = run(0, rows);
  Doubles want(before.begin(), before.end()), scale(rows * dim, 1.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t i = 0; i < per_row; ++i) {
      const int32_t e = experts[row * per_row + i];
      for (int64_t c = 0; c < mlp_dim; ++c) {
        double g = 0, u = 0;
        for (int64_t k = 0; k < dim; ++k) {
          g += static_cast<double>(x[row * dim + k]) * gates[e][c * dim + k];
          u += static_cast<double>(x[row * dim + k]) * ups[e][c * dim + k];
        }
        const double inner = weights[row * per_row + i] * g / (1 + std::exp(-g)) * u;
        for (int64_t o = 0; o < dim; ++o) {
          want[row * dim + o] += inner * downs[e][o * mlp_dim + c];
          scale[row * dim + o] += std::abs(inner * downs[e][o * mlp_dim + c]);
        }
      }
    }
  }
  ExpectNear(got, want, scale, kBf16Half);  // the inner rows are kept in bf16
  for (const auto& [first, count] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {69, 1}, {3, 20}, {1, 66}}) {
    EXPECT_TRUE(SameBits(run(first, count), Slice(got, first, count, dim))) << first;
  }
  for (const simt::Order order : {simt::Order::kReverse, simt::Order::kShuffled}) {
    simt::SetOrder(order);
    EXPECT_TRUE(SameBits(run(0, rows), got));
    simt::SetOrder(simt::Order::kForward);
  }
}

// --- Rows

TEST_P(TensorCoreTest, NormsEmbeddingsAndGathersWriteBf16) {
  const int64_t dim = 100, rows = 4;
  const Floats x = RandomBf16(rows * dim, 1), w = RandomBf16(dim, 2), gains = Floats(dim, 0.5F);
  const DeviceRows xs(*backend_, x, dim, DType::kF32);
  const DeviceRows zeros(*backend_, Floats(dim), dim, DType::kF32);
  const DeviceRows halves(*backend_, gains, dim, DType::kF32);
  const auto weights = Vector(*backend_, w);
  const DeviceRows rms(*backend_, Floats(rows * dim), dim, DType::kBf16);
  const DeviceRows layer(*backend_, Floats(rows * dim), dim, DType::kBf16);
  const std::vector<SequenceSpan> spans = {{.row_begin = 0, .num_rows = 4}};
  ASSERT_TRUE(backend_
                  ->RmsNorm({.x = xs.rows(),
                             .num_rows = rows,
                             .dim = dim,
                             .weight = Data(weights),
                             .out = rms.rows()})
                  .ok());
  ASSERT_TRUE(backend_
                  ->LayerNormModulate({.x = xs.rows(),
                                       .num_rows = rows,
                                       .dim = dim,
                                       .weight = Data(weights),
                                       .shift = zeros.rows(),
                                       .scale = halves.rows(),
                                       .sequences = spans,
                                       .out = layer.rows()})
                  .ok());
  const std::vector<int32_t> indices = {2, 0, 3};
  const DeviceRows gathered(*backend_, Floats(3 * dim), dim, DType::kBf16);
  ASSERT_TRUE(backend_
                  ->GatherRows(
                      {.x = rms.rows(), .dim = dim, .row_indices = indices, .out = gathered.rows()})
                  .ok());
  const Floats got_rms = rms.Get(), got_layer = layer.Get(), got_gathered = gathered.Get();
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, squares = 0, variance = 0;
    for (int64_t i = 0; i < dim; ++i) mean += x[r * dim + i] / static_cast<double>(dim);
    for (int64_t i = 0; i < dim; ++i) {
      squares += static_cast<double>(x[r * dim + i]) * x[r * dim + i] / dim;
      variance += (x[r * dim + i] - mean) * (x[r * dim + i] - mean) / dim;
    }
    for (int64_t i = 0; i < dim; ++i) {
      const double want = w[i] * x[r * dim + i] / std::sqrt(squares + 1e-6);
      EXPECT_NEAR(got_rms[r * dim + i], want, std::abs(want) * kBf16Half + 1e-6);
      const double modulated = 1.5 * w[i] * (x[r * dim + i] - mean) / std::sqrt(variance + 1e-5);
      EXPECT_NEAR(got_layer[r * dim + i], modulated, std::abs(modulated) * kBf16Half + 1e-5);
    }
  }
  for (size_t i = 0; i < indices.size(); ++i) {
    EXPECT_TRUE(SameBits(Slice(got_gathered, static_cast<int64_t>(i), 1, dim),
                         Slice(got_rms, indices[i], 1, dim)));
  }
}

}  // namespace
}  // namespace cinnabar
