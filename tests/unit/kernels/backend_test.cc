// Every op of a backend against double references, on odd shapes; and the bits that must not change
// with batch, threads or instruction set. The bodies use the Backend interface alone, so that every
// backend runs them.
#include "kernels/backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/unit/kernels/named_backend.h"

namespace cinnabar {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

Floats RandomFloats(int64_t count, int seed, float scale = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  Floats values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Null where this machine has no such instructions or device.
std::unique_ptr<Backend> Make(const std::string& name, int32_t num_threads = 1,
                              absl::Status* why = nullptr) {
  auto backend = MakeNamedBackend(name, num_threads);
  if (why != nullptr) *why = backend.status();
  if (!backend.ok()) return nullptr;
  const absl::Status reserved = (*backend)->Reserve({.rows_max = 600,
                                                     .cols_max = 700,
                                                     .vocabulary = 97,
                                                     .queries_max = 64,
                                                     .positions_max = 300,
                                                     .head_dim_max = 128});
  EXPECT_TRUE(reserved.ok()) << reserved;
  return *std::move(backend);
}

// Device memory with a copy of `values`.
struct Device {
  std::unique_ptr<Buffer> buffer;
  Device(Backend& backend, const Floats& values)
      : buffer(*backend.Allocate(values.size() * 4 + 4)) {
    EXPECT_TRUE(backend.Upload(values, buffer->data()).ok());
  }
  Rows rows(int64_t stride) const { return {buffer->data(), stride}; }
  const float* data() const { return static_cast<const float*>(buffer->data()); }
  Floats Get(Backend& backend, int64_t count) const {
    Floats values(count);
    EXPECT_TRUE(backend.Download(buffer->data(), absl::MakeSpan(values)).ok());
    return values;
  }
};

// |got - want| <= tolerance * scale, scale the size of the terms that were summed.
void ExpectNear(const Floats& got, const Doubles& want, const Doubles& scale, double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], tolerance * scale[i] + 1e-30) << "element " << i;
  }
}

float RoundTo(DType dtype, float value) {
  if (dtype == DType::kF32) return value;
  if (dtype == DType::kBf16) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7FFFU + (bits >> 16 & 1U)) & 0xFFFF0000U;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  return static_cast<float>(static_cast<_Float16>(value));
}

class BackendTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    absl::Status why;
    backend_ = Make(GetParam(), 1, &why);
    if (backend_ == nullptr) SkipWithout(GetParam(), why);
  }
  std::unique_ptr<Backend> backend_;
};

TEST_P(BackendTest, LinearAgreesWithDouble) {
  for (const int64_t rows : {1, 2, 5, 6, 7, 13, 14, 15, 29, 57}) {
    for (const auto& [outputs, dim] :
         std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {31, 7}, {33, 64}, {97, 513}}) {
      for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
        SCOPED_TRACE(absl::StrCat(rows, " x ", dim, " -> ", outputs, " ", NameOf(dtype)));
        const Floats x = RandomFloats(rows * dim, 1);
        const Floats w = RandomFloats(outputs * dim, 2);
        const Floats bias = RandomFloats(outputs, 3);
        const Floats start = RandomFloats(rows * outputs, 4);
        const auto weight = *backend_->LoadWeight({{w.data(), DType::kF32, outputs, dim}},
                                                  RowOrder::kStacked, dtype);
        const Device xs(*backend_, x);
        const Device biases(*backend_, bias);
        for (const Epilogue epilogue :
             {Epilogue::kStore, Epilogue::kAdd, Epilogue::kSilu, Epilogue::kGeluTanh}) {
          const Device out(*backend_, start);
          ASSERT_TRUE(backend_
                          ->Linear({.x = xs.rows(dim),
                                    .num_rows = rows,
                                    .weight = weight.get(),
                                    .bias = biases.data(),
                                    .epilogue = epilogue,
                                    .out = out.rows(outputs)})
                          .ok());
          Doubles want(rows * outputs);
          Doubles scale(rows * outputs);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t o = 0; o < outputs; ++o) {
              double y = bias[o];
              double size = std::abs(y) + std::abs(start[r * outputs + o]);
              for (int64_t k = 0; k < dim; ++k) {
                const double term =
                    static_cast<double>(x[r * dim + k]) * RoundTo(dtype, w[o * dim + k]);
                y += term;
                size += std::abs(term);
              }
              if (epilogue == Epilogue::kAdd) y += start[r * outputs + o];
              if (epilogue == Epilogue::kSilu) y /= 1 + std::exp(-y);
              if (epilogue == Epilogue::kGeluTanh) {
                y *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
              }
              want[r * outputs + o] = y;
              scale[r * outputs + o] = size;
            }
          }
          // A float32 sum of n terms in order is off by at most n 2^-24 of their sizes; random
          // signs leave far less.
          ExpectNear(out.Get(*backend_, rows * outputs), want, scale, 3e-6);
        }
      }
    }
  }
}

TEST_P(BackendTest, SwiGluPairsGateAndUp) {
  const int64_t rows = 17;
  const int64_t dim = 35;
  for (const int64_t outputs : {1, 15, 16, 17, 45}) {
    const Floats x = RandomFloats(rows * dim, 1);
    const Floats gate = RandomFloats(outputs * dim, 2);
    const Floats up = RandomFloats(outputs * dim, 3);
    const Floats bias = RandomFloats(2 * outputs, 4);
    const auto weight = *backend_->LoadWeight(
        {{gate.data(), DType::kF32, outputs, dim}, {up.data(), DType::kF32, outputs, dim}},
        RowOrder::kGatedPairs, DType::kF32);
    const Device xs(*backend_, x);
    const Device biases(*backend_, bias);
    const Device out(*backend_, Floats(rows * outputs));
    ASSERT_TRUE(backend_
                    ->Linear({.x = xs.rows(dim),
                              .num_rows = rows,
                              .weight = weight.get(),
                              .bias = biases.data(),
                              .epilogue = Epilogue::kSwiGlu,
                              .out = out.rows(outputs)})
                    .ok());
    Doubles want(rows * outputs);
    Doubles scale(rows * outputs);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < outputs; ++o) {
        double g = bias[o];
        double u = bias[outputs + o];
        for (int64_t k = 0; k < dim; ++k) {
          g += static_cast<double>(x[r * dim + k]) * gate[o * dim + k];
          u += static_cast<double>(x[r * dim + k]) * up[o * dim + k];
        }
        want[r * outputs + o] = g / (1 + std::exp(-g)) * u;
        scale[r * outputs + o] = (1 + std::abs(g)) * (1 + std::abs(u));
      }
    }
    ExpectNear(out.Get(*backend_, rows * outputs), want, scale, 1e-5);
  }
}

// Router logits [rows, 12] and what a rule makes of them, by hand in double.
struct Routed {
  std::vector<int32_t> experts;
  Doubles weights;
};
Routed RouteByHand(const Floats& logits, const Floats& bias, const RouteArgs& rule) {
  Routed result;
  const int32_t n = rule.num_experts, size = n / rule.num_groups;
  for (int64_t row = 0; row < rule.num_rows; ++row) {
    Doubles score(n), choice(n);
    double total = 0;
    for (int32_t e = 0; e < n; ++e) total += std::exp(logits[row * n + e]);
    for (int32_t e = 0; e < n; ++e) {
      const double l = logits[row * n + e];
      score[e] = rule.score == RouterScore::kSoftmax ? std::exp(l) / total : 1 / (1 + std::exp(-l));
      choice[e] = score[e] + (rule.bias == nullptr ? 0 : bias[e]);
    }
    const auto group_score = [&](int32_t group) {
      Doubles members(choice.begin() + group * size, choice.begin() + (group + 1) * size);
      std::sort(members.rbegin(), members.rend());
      return members[0] + (size > 1 ? members[1] : 0);
    };
    std::vector<int32_t> groups(rule.num_groups), candidates;
    for (int32_t g = 0; g < rule.num_groups; ++g) groups[g] = g;
    std::stable_sort(groups.begin(), groups.end(),
                     [&](int32_t a, int32_t b) { return group_score(a) > group_score(b); });
    groups.resize(rule.groups_kept);
    std::sort(groups.begin(), groups.end());
    for (const int32_t g : groups) {
      for (int32_t e = g * size; e < (g + 1) * size; ++e) candidates.push_back(e);
    }
    std::stable_sort(candidates.begin(), candidates.end(),
                     [&](int32_t a, int32_t b) { return choice[a] > choice[b]; });
    candidates.resize(rule.experts_per_row);
    std::sort(candidates.begin(), candidates.end());
    double sum = 0;
    for (const int32_t e : candidates) sum += rule.bias_counts ? choice[e] : score[e];
    for (const int32_t e : candidates) {
      result.experts.push_back(e);
      result.weights.push_back((rule.bias_counts ? choice[e] : score[e]) * rule.scale /
                               (rule.renormalize ? sum : 1));
    }
  }
  return result;
}

TEST_P(BackendTest, RoutesAsTheRulesSay) {
  const int64_t rows = 40;
  const int32_t n = 12;
  const Floats bias = RandomFloats(n, 5);
  const Device biases(*backend_, bias);
  for (int variant = 0; variant < 32; ++variant) {
    Floats logits = RandomFloats(rows * n, 100 + variant);
    for (float& logit : logits) logit *= 2;
    // Ties: exactly equal logits, the lower id and the lower group win.
    for (int64_t row = 0; row < rows; row += 3) {
      for (int32_t e = 0; e < n; ++e) logits[row * n + e] = static_cast<float>(e % 2);
    }
    RouteArgs rule{.num_rows = rows, .num_experts = n, .experts_per_row = 1 + variant % 3};
    rule.score = variant % 2 == 0 ? RouterScore::kSoftmax : RouterScore::kSigmoid;
    rule.renormalize = variant % 4 < 2;
    rule.num_groups = variant < 16 ? 1 : 4;
    rule.groups_kept = variant < 16 ? 1 : 2;
    rule.scale = variant % 5 == 0 ? 2.5F : 1.0F;
    const bool biased = variant % 8 < 4;
    rule.bias_counts = biased && variant % 3 == 0;
    const Device device_logits(*backend_, logits);
    const Device experts(*backend_, Floats(rows * rule.experts_per_row));
    const Device weights(*backend_, Floats(rows * rule.experts_per_row));
    rule.logits = device_logits.rows(n);
    rule.bias = biased ? biases.data() : nullptr;
    rule.experts = reinterpret_cast<int32_t*>(const_cast<float*>(experts.data()));
    rule.weights = const_cast<float*>(weights.data());
    ASSERT_TRUE(backend_->Route(rule).ok());
    const Routed want = RouteByHand(logits, bias, rule);
    const Floats chosen = experts.Get(*backend_, rows * rule.experts_per_row);
    for (size_t i = 0; i < chosen.size(); ++i) {
      int32_t expert;
      std::memcpy(&expert, &chosen[i], sizeof(expert));
      ASSERT_EQ(expert, want.experts[i]) << "variant " << variant << ", place " << i;
    }
    ExpectNear(weights.Get(*backend_, rows * rule.experts_per_row), want.weights,
               Doubles(want.weights.size(), 4.0), 1e-6);
  }
}

// Weights that stay where they are, of every dtype and unaligned, with experts that nobody chooses.
TEST_P(BackendTest, ExpertsAgreeWithDouble) {
  const int64_t rows = 37, dim = 35, mlp_dim = 21;
  const int32_t num_experts = 5, per_row = 2;
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    std::vector<Floats> values;
    std::vector<std::vector<char>> stored;
    const auto matrix = [&](int64_t matrix_rows, int64_t cols, int seed) {
      Floats drawn = RandomFloats(matrix_rows * cols, seed);
      for (float& value : drawn) value = RoundTo(dtype, value);
      std::vector<char>& bytes = stored.emplace_back(1 + drawn.size() * BytesOf(dtype));
      for (size_t i = 0; i < drawn.size(); ++i) {
        char* at = bytes.data() + 1 + i * BytesOf(dtype);
        if (dtype == DType::kF32) std::memcpy(at, &drawn[i], 4);
        if (dtype == DType::kBf16) std::memcpy(at, reinterpret_cast<char*>(&drawn[i]) + 2, 2);
        const auto half = static_cast<_Float16>(drawn[i]);
        if (dtype == DType::kF16) std::memcpy(at, &half, 2);
      }
      values.push_back(drawn);
      return HostMatrix{bytes.data() + 1, dtype, matrix_rows, cols};
    };
    std::vector<std::unique_ptr<Weight>> gate_up, down;
    stored.reserve(3 * num_experts);
    for (int32_t e = 0; e < num_experts; ++e) {
      const HostMatrix parts[] = {matrix(mlp_dim, dim, 10 + e), matrix(mlp_dim, dim, 20 + e)};
      gate_up.push_back(*backend_->MapWeight(parts, RowOrder::kGatedPairs));
      const HostMatrix way_down[] = {matrix(dim, mlp_dim, 30 + e)};
      down.push_back(*backend_->MapWeight(way_down, RowOrder::kStacked));
    }
    ASSERT_TRUE(backend_
                    ->Reserve({.rows_max = rows,
                               .cols_max = dim,
                               .vocabulary = 1,
                               .queries_max = 1,
                               .positions_max = 1,
                               .head_dim_max = 2,
                               .num_experts = num_experts,
                               .experts_per_row = per_row,
                               .expert_dim = dim,
                               .expert_mlp_dim = mlp_dim})
                    .ok());
    const Floats x = RandomFloats(rows * dim, 1), before = RandomFloats(rows * dim, 2);
    const Floats weights = RandomFloats(rows * per_row, 3);
    Floats chosen(rows * per_row);
    std::vector<int32_t> experts(rows * per_row);
    for (int64_t row = 0; row < rows; ++row) {  // expert 3 is never chosen
      experts[2 * row] = static_cast<int32_t>(row % 3);
      experts[2 * row + 1] = row % 2 == 0 ? 4 : static_cast<int32_t>(row % 3);
      if (experts[2 * row] == experts[2 * row + 1]) experts[2 * row + 1] = 4;
    }
    std::memcpy(chosen.data(), experts.data(), chosen.size() * sizeof(float));
    const auto run = [&](int64_t first, int64_t count) {
      const Device xs(*backend_,
                      Floats(x.begin() + first * dim, x.begin() + (first + count) * dim));
      const Device out(
          *backend_, Floats(before.begin() + first * dim, before.begin() + (first + count) * dim));
      const Device ids(*backend_, Floats(chosen.begin() + first * per_row,
                                         chosen.begin() + (first + count) * per_row));
      const Device shares(*backend_, Floats(weights.begin() + first * per_row,
                                            weights.begin() + (first + count) * per_row));
      EXPECT_TRUE(backend_
                      ->Experts({.x = xs.rows(dim),
                                 .num_rows = count,
                                 .gate_up = gate_up,
                                 .down = down,
                                 .experts_per_row = per_row,
                                 .experts = reinterpret_cast<const int32_t*>(ids.data()),
                                 .weights = shares.data(),
                                 .out = out.rows(dim)})
                      .ok());
      return out.Get(*backend_, count * dim);
    };
    const Floats got = run(0, rows);
    Doubles want(rows * dim), scale(rows * dim, 0.0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t o = 0; o < dim; ++o) want[row * dim + o] = before[row * dim + o];
      for (int32_t i = 0; i < per_row; ++i) {
        const int32_t e = experts[row * per_row + i];
        Doubles inner(mlp_dim);
        for (int64_t c = 0; c < mlp_dim; ++c) {
          double g = 0, u = 0;
          for (int64_t k = 0; k < dim; ++k) {
            g += static_cast<double>(x[row * dim + k]) * values[3 * e][c * dim + k];
            u += static_cast<double>(x[row * dim + k]) * values[3 * e + 1][c * dim + k];
          }
          inner[c] = g / (1 + std::exp(-g)) * u;
        }
        for (int64_t o = 0; o < dim; ++o) {
          for (int64_t c = 0; c < mlp_dim; ++c) {
            const double term =
                weights[row * per_row + i] * inner[c] * values[3 * e + 2][o * mlp_dim + c];
            want[row * dim + o] += term;
            scale[row * dim + o] += std::abs(term);
          }
        }
      }
    }
    for (double& s : scale) s += 1;
    ExpectNear(got, want, scale, 2e-5);
    // A row alone gives the same bits.
    for (const int64_t row : {int64_t{0}, int64_t{5}, rows - 1}) {
      const Floats alone = run(row, 1);
      EXPECT_EQ(std::memcmp(alone.data(), got.data() + row * dim, dim * sizeof(float)), 0) << row;
    }
  }
}

TEST_P(BackendTest, NormsAgreeWithDouble) {
  for (const int64_t dim : {1, 15, 16, 33, 700}) {
    const int64_t rows = 9;
    const Floats x = RandomFloats(rows * dim, 1, 3.0F);
    const Floats w = RandomFloats(dim, 2);
    const Floats shift = RandomFloats(2 * dim, 3);
    const Floats scales = RandomFloats(2 * dim, 4);
    const Device xs(*backend_, x);
    const Device weights(*backend_, w);
    const Device shifts(*backend_, shift);
    const Device scale_rows(*backend_, scales);
    const std::vector<int32_t> indices = {8, 0, 3, 3};
    const Device rms(*backend_, Floats(4 * dim));
    ASSERT_TRUE(backend_
                    ->RmsNorm({.x = xs.rows(dim),
                               .num_rows = 4,
                               .dim = dim,
                               .weight = weights.data(),
                               .eps = 1e-5F,
                               .out = rms.rows(dim),
                               .row_indices = indices})
                    .ok());
    const Device modulated(*backend_, Floats(4 * dim));
    const std::vector<SequenceSpan> spans = {{.row_begin = 0, .num_rows = 3, .modulation_row = 1},
                                             {.row_begin = 3, .num_rows = 6, .modulation_row = 0}};
    ASSERT_TRUE(backend_
                    ->LayerNormModulate({.x = xs.rows(dim),
                                         .num_rows = 4,
                                         .dim = dim,
                                         .weight = weights.data(),
                                         .eps = 1e-5F,
                                         .shift = shifts.rows(dim),
                                         .scale = scale_rows.rows(dim),
                                         .sequences = spans,
                                         .out = modulated.rows(dim),
                                         .row_indices = indices})
                    .ok());
    Doubles want_rms(4 * dim);
    Doubles want_modulated(4 * dim);
    Doubles scale(4 * dim);
    for (int64_t r = 0; r < 4; ++r) {
      const float* row = x.data() + indices[r] * dim;
      const int64_t m = indices[r] < 3 ? 1 : 0;
      double mean = 0;
      double squares = 0;
      for (int64_t i = 0; i < dim; ++i) mean += row[i] / static_cast<double>(dim);
      for (int64_t i = 0; i < dim; ++i) squares += static_cast<double>(row[i]) * row[i] / dim;
      double variance = 0;
      for (int64_t i = 0; i < dim; ++i) variance += (row[i] - mean) * (row[i] - mean) / dim;
      for (int64_t i = 0; i < dim; ++i) {
        want_rms[r * dim + i] = w[i] * row[i] / std::sqrt(squares + 1e-5);
        const double normed = (row[i] - mean) / std::sqrt(variance + 1e-5);
        want_modulated[r * dim + i] =
            normed * w[i] * (1 + scales[m * dim + i]) + shift[m * dim + i];
        scale[r * dim + i] = 10 * (1 + std::abs(w[i])) * (1 + std::abs(scales[m * dim + i]));
      }
    }
    // dim 1: x - mean is rounding noise over sqrt(eps).
    ExpectNear(rms.Get(*backend_, 4 * dim), want_rms, scale, 1e-6);
    ExpectNear(modulated.Get(*backend_, 4 * dim), want_modulated, scale, dim == 1 ? 1e-3 : 1e-6);
  }
}

// Splits, norms, rotates, stores and attends for spans of one or more sequences, and the same in
// double.
struct AttentionCase {
  HeadShape heads = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 24};
  int32_t rotary_dim = 24;
  int32_t block_length = 0;
  bool norms = true;
};

struct AttentionRun {
  Backend& backend;
  const AttentionCase& c;
  int32_t positions;
  Floats qkv;
  int64_t width() const {
    return int64_t{c.heads.num_heads + 2 * c.heads.num_kv_heads} * c.heads.head_dim;
  }
  int64_t out_width() const { return int64_t{c.heads.num_heads} * c.heads.head_dim; }

  AttentionRun(Backend& backend, const AttentionCase& c, int32_t positions, int seed)
      : backend(backend), c(c), positions(positions) {
    qkv = RandomFloats(positions * width(), seed);
  }
  Floats Cosines(const std::function<double(double)>& f) const {
    const int32_t half = c.rotary_dim / 2;
    Floats table(300 * std::max(half, 1));
    for (int32_t p = 0; p < 300; ++p) {
      for (int32_t i = 0; i < half; ++i) {
        table[p * half + i] = static_cast<float>(f(p * std::pow(10000.0, -2.0 * i / c.rotary_dim)));
      }
    }
    return table;
  }
  Floats Norm(int seed) const { return RandomFloats(c.heads.head_dim, seed); }

  // Runs positions [0, cuts[0]), [cuts[0], cuts[1]) ... one after the other over one KvMemory,
  // behind `before` rows of another sequence; `moving`: over a copy of what the earlier ones left.
  Floats Run(const std::vector<int32_t>& cuts, int32_t before, bool moving = false) const {
    auto kv = *backend.AllocateKv({1, c.heads.num_kv_heads, c.heads.head_dim, positions});
    auto other_kv = *backend.AllocateKv({1, c.heads.num_kv_heads, c.heads.head_dim, 300});
    const Device cosine(backend, Cosines([](double a) { return std::cos(a); }));
    const Device sine(backend, Cosines([](double a) { return std::sin(a); }));
    const Device q_norm(backend, Norm(51));
    const Device k_norm(backend, Norm(52));
    Floats result;
    int32_t begin = 0;
    for (const int32_t cut : cuts) {
      if (moving && begin > 0) {
        auto copy =
            *backend.AllocateKv({1, c.heads.num_kv_heads, c.heads.head_dim, positions + 7 * begin});
        EXPECT_TRUE(backend.CopyKv(*kv, begin, *copy).ok());
        kv = std::move(copy);
      }
      const int32_t rows = before + cut - begin;
      Floats packed = RandomFloats(before * width(), 99);
      packed.insert(packed.end(), qkv.begin() + begin * width(), qkv.begin() + cut * width());
      const Device fused(backend, packed);
      const Device out(backend, Floats(rows * out_width()));
      std::vector<SequenceSpan> spans;
      if (before > 0) spans.push_back({.row_begin = 0, .num_rows = before, .kv = other_kv.get()});
      spans.push_back({.row_begin = before,
                       .num_rows = cut - begin,
                       .first_position = begin,
                       .block_length = c.block_length,
                       .kv = kv.get()});
      EXPECT_TRUE(backend
                      .PrepareHeads({.qkv = fused.rows(width()),
                                     .num_rows = rows,
                                     .heads = c.heads,
                                     .q_norm = c.norms ? q_norm.data() : nullptr,
                                     .k_norm = c.norms ? k_norm.data() : nullptr,
                                     .norm_eps = 1e-6F,
                                     .rotary = {cosine.data(), sine.data(), c.rotary_dim, 300},
                                     .sequences = spans})
                      .ok());
      EXPECT_TRUE(backend
                      .Attend({.q = fused.rows(width()),
                               .num_rows = rows,
                               .heads = c.heads,
                               .scale = 0.3F,
                               .sequences = spans,
                               .out = out.rows(out_width())})
                      .ok());
      const Floats got = out.Get(backend, rows * out_width());
      result.insert(result.end(), got.begin() + before * out_width(), got.end());
      begin = cut;
    }
    return result;
  }

  Doubles Want() const {
    const int32_t hd = c.heads.head_dim;
    const auto prepared = [&](int32_t position, int32_t head, const Floats& norm) {
      Doubles x(hd);
      double squares = 0;
      for (int32_t i = 0; i < hd; ++i) {
        x[i] = qkv[position * width() + head * hd + i];
        squares += x[i] * x[i] / hd;
      }
      for (int32_t i = 0; c.norms && i < hd; ++i) x[i] *= norm[i] / std::sqrt(squares + 1e-6);
      const int32_t half = c.rotary_dim / 2;
      for (int32_t i = 0; i < half; ++i) {
        const double angle = position * std::pow(10000.0, -2.0 * i / c.rotary_dim);
        const double a = x[i];
        const double b = x[half + i];
        x[i] = a * std::cos(angle) - b * std::sin(angle);
        x[half + i] = b * std::cos(angle) + a * std::sin(angle);
      }
      return x;
    };
    Doubles want(positions * out_width());
    for (int32_t head = 0; head < c.heads.num_heads; ++head) {
      const int32_t kv_head = head / (c.heads.num_heads / c.heads.num_kv_heads);
      std::vector<Doubles> keys;
      for (int32_t p = 0; p < positions; ++p)
        keys.push_back(prepared(p, c.heads.num_heads + kv_head, Norm(52)));
      for (int32_t p = 0; p < positions; ++p) {
        const Doubles q = prepared(p, head, Norm(51));
        int32_t visible = positions;
        if (c.block_length > 0)
          visible = std::min(positions, (p / c.block_length + 1) * c.block_length);
        Doubles scores(visible);
        for (int32_t k = 0; k < visible; ++k) {
          scores[k] = 0.3 * std::inner_product(q.begin(), q.end(), keys[k].begin(), 0.0);
        }
        const double max = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (double& s : scores) sum += s = std::exp(s - max);
        for (int32_t i = 0; i < hd; ++i) {
          double value = 0;
          for (int32_t k = 0; k < visible; ++k) {
            const int64_t at =
                k * width() + (c.heads.num_heads + c.heads.num_kv_heads + kv_head) * hd + i;
            value += scores[k] / sum * qkv[at];
          }
          want[p * out_width() + head * hd + i] = value;
        }
      }
    }
    return want;
  }
};

std::vector<AttentionCase> AttentionCases() {
  return {{},
          {.heads = {1, 1, 2}, .rotary_dim = 2, .norms = false},
          {.heads = {2, 2, 64}, .rotary_dim = 64, .block_length = 4},
          {.heads = {6, 2, 40}, .rotary_dim = 16, .block_length = 8},
          {.heads = {2, 1, 128}, .rotary_dim = 0, .block_length = 32, .norms = false}};
}

TEST_P(BackendTest, AttentionAgreesWithDouble) {
  for (const AttentionCase& c : AttentionCases()) {
    for (const int32_t positions : {1, 13, 33, 96}) {
      SCOPED_TRACE(absl::StrCat("head_dim ", c.heads.head_dim, ", block ", c.block_length,
                                ", positions ", positions));
      const AttentionRun run(*backend_, c, positions, 7);
      const Doubles want = run.Want();
      ExpectNear(run.Run({positions}, 0), want, Doubles(want.size(), 10.0), 1e-6);
    }
  }
}

TEST_P(BackendTest, CachedBlocksAndNeighboursDoNotChangeABit) {
  for (const AttentionCase& c : AttentionCases()) {
    if (c.block_length == 0) continue;
    const AttentionRun run(*backend_, c, 96, 7);
    const Floats whole = run.Run({96}, 0);
    EXPECT_EQ(run.Run({32, 64, 96}, 0), whole);
    EXPECT_EQ(run.Run({64, 96}, 5), whole);
    EXPECT_EQ(run.Run({32, 64, 96}, 0, /*moving=*/true), whole);
    EXPECT_EQ(run.Run({c.block_length, 2 * c.block_length, 96}, 3, /*moving=*/true), whole);
  }
  const AttentionCase full;
  const AttentionRun run(*backend_, full, 50, 8);
  EXPECT_EQ(run.Run({50}, 0), run.Run({50}, 23));
}

TEST_P(BackendTest, EmbeddingReadsUnalignedRowsOfEveryDtype) {
  const std::vector<uint16_t> half = {0x3C00, 0xC000, 0x0001, 0x7BFF};  // 1, -2, 2^-24, 65504
  std::vector<char> bytes(1 + half.size() * 2);
  std::memcpy(bytes.data() + 1, half.data(), half.size() * 2);
  const auto table = *backend_->LoadEmbedding({bytes.data() + 1, DType::kF16, 2, 2});
  const Device out(*backend_, Floats(6));
  ASSERT_TRUE(backend_->Embed(*table, {1, 0, 1}, 2.0F, out.rows(2)).ok());
  EXPECT_THAT(out.Get(*backend_, 6),
              testing::ElementsAre(0x1p-23F, 131008.0F, 2.0F, -4.0F, 0x1p-23F, 131008.0F));
}

INSTANTIATE_TEST_SUITE_P(Cpu, BackendTest, testing::Values("avx512", "avx2", "generic"));
INSTANTIATE_TEST_SUITE_P(Emulated, BackendTest, testing::Values("emulated"));
INSTANTIATE_TEST_SUITE_P(Cuda, BackendTest, testing::Values("cuda"));

// A long chain of ops; its bits are compared between machines' instruction sets, thread counts and
// batches.
Floats Chain(Backend& backend, int64_t rows, const Floats& x, DType dtype) {
  const int64_t dim = 70;
  const int64_t hidden = 1100;
  const Floats w1 = RandomFloats(hidden * dim, 2, 0.1F);
  const Floats w2 = RandomFloats(hidden * dim, 3, 0.1F);
  const Floats w3 = RandomFloats(dim * hidden, 4, 0.1F);
  const Floats gain = RandomFloats(dim, 5);
  const auto gate_up = *backend.LoadWeight(
      {{w1.data(), DType::kF32, hidden, dim}, {w2.data(), DType::kF32, hidden, dim}},
      RowOrder::kGatedPairs, dtype);
  const auto down =
      *backend.LoadWeight({{w3.data(), DType::kF32, dim, hidden}}, RowOrder::kStacked, dtype);
  const Device xs(backend, x);
  const Device gains(backend, gain);
  const Device normed(backend, Floats(rows * dim));
  const Device middle(backend, Floats(rows * hidden));
  EXPECT_TRUE(backend.Reserve({.rows_max = 600, .cols_max = hidden}).ok());
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_TRUE(backend
                    .RmsNorm({.x = xs.rows(dim),
                              .num_rows = rows,
                              .dim = dim,
                              .weight = gains.data(),
                              .out = normed.rows(dim)})
                    .ok());
    EXPECT_TRUE(backend
                    .Linear({.x = normed.rows(dim),
                             .num_rows = rows,
                             .weight = gate_up.get(),
                             .epilogue = Epilogue::kSwiGlu,
                             .out = middle.rows(hidden)})
                    .ok());
    EXPECT_TRUE(backend
                    .Linear({.x = middle.rows(hidden),
                             .num_rows = rows,
                             .weight = down.get(),
                             .epilogue = Epilogue::kAdd,
                             .out = xs.rows(dim)})
                    .ok());
  }
  return xs.Get(backend, rows * dim);
}

TEST(BitsTest, DependOnNeitherIsaNorThreadsNorBatch) {
  const Floats x = RandomFloats(540 * 70, 1);
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    const auto reference = Make("generic");
    const Floats want = Chain(*reference, 540, x, dtype);
    for (const char* isa : {"avx512", "avx2"}) {
      for (const int32_t num_threads : {1, 2, 3}) {
        const auto backend = Make(isa, num_threads);
        if (backend == nullptr) continue;
        SCOPED_TRACE(backend->Describe());
        EXPECT_EQ(Chain(*backend, 540, x, dtype), want);
        const Floats few(x.begin() + 70 * 100, x.begin() + 70 * 117);
        const Floats got = Chain(*backend, 17, few, dtype);
        EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin() + 70 * 100));
      }
    }
  }
}

TEST(BitsTest, AttentionDependsOnNeitherIsaNorThreads) {
  for (const AttentionCase& c : AttentionCases()) {
    const auto reference = Make("generic");
    const Floats want = AttentionRun(*reference, c, 77, 3).Run({77}, 0);
    for (const char* isa : {"avx512", "avx2"}) {
      for (const int32_t num_threads : {1, 2}) {
        const auto backend = Make(isa, num_threads);
        if (backend == nullptr) continue;
        EXPECT_EQ(AttentionRun(*backend, c, 77, 3).Run({77}, 4), want) << backend->Describe();
      }
    }
  }
}

TEST(MakeBackendTest, SaysWhatIsWrong) {
  EXPECT_EQ(MakeBackend(BackendKind::kCpu, {.isa = "mmx"}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(MakeBackend(BackendKind::kCpu, {.num_threads = -1}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(BackendDeathTest, MoreRowsThanReservedIsABug) {
  const auto backend = Make("auto");
  const Floats w(700);
  const auto weight =
      *backend->LoadWeight({{w.data(), DType::kF32, 1, 700}}, RowOrder::kStacked, DType::kF32);
  const Device x(*backend, Floats(601 * 700));
  const Device out(*backend, Floats(601));
  EXPECT_DEATH((void)backend->Linear(
                   {.x = x.rows(700), .num_rows = 601, .weight = weight.get(), .out = out.rows(1)}),
               "more than was reserved");
}

}  // namespace
}  // namespace cinnabar
