// What DiffusionGemma asks of a backend beyond other networks, against double references: gated
// gelu, norms that add, windows, norms of values, scales of experts, capped logits and soft
// embeddings. The bodies use the Backend interface alone, so that every backend runs them.
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
#include "kernels/quantized.h"
#include "tests/unit/kernels/named_backend.h"

namespace cinnabar {
namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

Floats Normal(int64_t count, int seed, float scale = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  Floats values(count);
  for (float& value : values) value = normal(random);
  return values;
}

struct Device {
  std::unique_ptr<Buffer> buffer;
  Device(Backend& backend, const Floats& values)
      : buffer(*backend.Allocate(values.size() * 4 + 4)) {
    EXPECT_TRUE(backend.Upload(values, buffer->data()).ok());
  }
  Rows rows(int64_t stride) const { return {buffer->data(), stride}; }
  float* data() const { return static_cast<float*>(buffer->data()); }
  Floats Get(Backend& backend, int64_t count) const {
    Floats values(count);
    EXPECT_TRUE(backend.Download(buffer->data(), absl::MakeSpan(values)).ok());
    return values;
  }
};

double Gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

double Dot(const float* a, const float* b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

double RmsOf(const float* x, int64_t dim, double eps) {
  return std::sqrt(Dot(x, x, dim) / static_cast<double>(dim) + eps);
}

class GemmaOpsTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto backend = MakeNamedBackend(GetParam(), 2);
    if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
    backend_ = *std::move(backend);
    const absl::Status reserved = backend_->Reserve({.rows_max = 128,
                                                     .cols_max = 96,
                                                     .vocabulary = 97,
                                                     .queries_max = 8,
                                                     .positions_max = 1600,
                                                     .head_dim_max = 48,
                                                     .num_experts = 3,
                                                     .experts_per_row = 2,
                                                     .expert_dim = 33,
                                                     .expert_mlp_dim = 21});
    ASSERT_TRUE(reserved.ok()) << reserved;
  }
  std::unique_ptr<Backend> backend_;
};

TEST_P(GemmaOpsTest, GeGluPairsGateAndUp) {
  const int64_t rows = 17, dim = 35;
  for (const int64_t outputs : {1, 15, 16, 17, 45}) {
    const Floats x = Normal(rows * dim, 1), gate = Normal(outputs * dim, 2),
                 up = Normal(outputs * dim, 3);
    const auto weight = *backend_->LoadWeight(
        {{gate.data(), DType::kF32, outputs, dim}, {up.data(), DType::kF32, outputs, dim}},
        RowOrder::kGatedPairs, DType::kF32);
    const Device xs(*backend_, x), out(*backend_, Floats(rows * outputs));
    ASSERT_TRUE(backend_
                    ->Linear({.x = xs.rows(dim),
                              .num_rows = rows,
                              .weight = weight.get(),
                              .epilogue = Epilogue::kGeGlu,
                              .out = out.rows(outputs)})
                    .ok());
    const Floats got = out.Get(*backend_, rows * outputs);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < outputs; ++o) {
        const double g = Dot(&x[r * dim], &gate[o * dim], dim);
        const double u = Dot(&x[r * dim], &up[o * dim], dim);
        ASSERT_NEAR(got[r * outputs + o], Gelu(g) * u,
                    1e-5 * (1 + std::abs(g)) * (1 + std::abs(u)));
      }
    }
  }
}

TEST_P(GemmaOpsTest, ANormMayAddAndScaleBySequence) {
  for (const int64_t dim : {1, 15, 16, 17, 96}) {
    SCOPED_TRACE(dim);
    const Floats x = Normal(5 * dim, 1), before = Normal(5 * dim, 2), w = Normal(dim, 3),
                 scales = {0.25F, -1.5F};
    const Device xs(*backend_, x), weights(*backend_, w), scale(*backend_, scales);
    const std::vector<SequenceSpan> spans = {{.row_begin = 0, .num_rows = 2, .modulation_row = 1},
                                             {.row_begin = 2, .num_rows = 3, .modulation_row = 0}};
    for (const bool scaled : {false, true}) {
      const Device out(*backend_, before);
      ASSERT_TRUE(backend_
                      ->RmsNorm({.x = xs.rows(dim),
                                 .num_rows = 5,
                                 .dim = dim,
                                 .weight = weights.data(),
                                 .eps = 1e-5F,
                                 .out = out.rows(dim),
                                 .add = true,
                                 .scales = scaled ? scale.data() : nullptr,
                                 .sequences = spans})
                      .ok());
      const Floats got = out.Get(*backend_, 5 * dim);
      for (int64_t r = 0; r < 5; ++r) {
        const double rms = RmsOf(&x[r * dim], dim, 1e-5);
        for (int64_t i = 0; i < dim; ++i) {
          const double want = (before[r * dim + i] + w[i] * x[r * dim + i] / rms) *
                              (scaled ? scales[r < 2 ? 1 : 0] : 1.0);
          ASSERT_NEAR(got[r * dim + i], want, 1e-5);
        }
      }
    }
    // In place.
    const Device same(*backend_, x);
    ASSERT_TRUE(backend_
                    ->RmsNorm({.x = same.rows(dim),
                               .num_rows = 5,
                               .dim = dim,
                               .weight = weights.data(),
                               .out = same.rows(dim)})
                    .ok());
    const Floats got = same.Get(*backend_, 5 * dim);
    for (int64_t i = 0; i < dim; ++i)
      ASSERT_NEAR(got[i], w[i] * x[i] / RmsOf(x.data(), dim, 1e-6), 1e-5);
  }
}

// Two kinds of layers in one KvMemory; a causal span and, behind it, one with full attention.
struct WindowCase {
  HeadShape heads;
  int32_t layer;
  int32_t window;
};

// The positions [0, split) as causal spans cut at `cuts` (ascending, the last is split), in one
// pass with the span [split, positions).
Floats RunWindow(Backend& backend, const WindowCase& c, const Floats& qkv, const Floats& v_norm,
                 int32_t positions, const std::vector<int32_t>& cuts, bool together) {
  const int64_t width = int64_t{c.heads.num_heads + 2 * c.heads.num_kv_heads} * c.heads.head_dim;
  const int64_t out_width = int64_t{c.heads.num_heads} * c.heads.head_dim;
  const KvShape shape{.num_layers = 2,
                      .num_kv_heads = 2,
                      .head_dim = 24,
                      .positions_max = positions,
                      .num_other_layers = 2,
                      .other_kv_heads = 1,
                      .other_head_dim = 40};
  auto kv = *backend.AllocateKv(shape);
  EXPECT_EQ(kv->memory_bytes(), backend.KvBytes(shape));
  const Device norm(backend, v_norm);
  Floats result;
  int32_t begin = 0;
  std::vector<int32_t> ends = cuts;
  ends.push_back(positions);
  for (size_t piece = 0; piece < ends.size(); ++piece) {
    std::vector<SequenceSpan> spans;
    const int32_t first = begin;
    const auto add = [&](int32_t end, int32_t block_length) {
      spans.push_back({.row_begin = begin - first,
                       .num_rows = end - begin,
                       .first_position = begin,
                       .block_length = block_length,
                       .kv = kv.get()});
      begin = end;
    };
    const bool causal = piece + 1 < ends.size();
    add(ends[piece], causal ? 1 : 0);
    if (together && piece + 2 == ends.size()) add(ends[++piece], 0);
    const int32_t rows = begin - first;
    const Device fused(backend, Floats(qkv.begin() + first * width, qkv.begin() + begin * width));
    const Device out(backend, Floats(rows * out_width));
    EXPECT_TRUE(backend
                    .PrepareHeads({.qkv = fused.rows(width),
                                   .num_rows = rows,
                                   .heads = c.heads,
                                   .v_norm = norm.data(),
                                   .sequences = spans,
                                   .layer = c.layer})
                    .ok());
    EXPECT_TRUE(backend
                    .Attend({.q = fused.rows(width),
                             .num_rows = rows,
                             .heads = c.heads,
                             .scale = 0.4F,
                             .sequences = spans,
                             .layer = c.layer,
                             .window = c.window,
                             .out = out.rows(out_width)})
                    .ok());
    const Floats got = out.Get(backend, rows * out_width);
    result.insert(result.end(), got.begin(), got.end());
  }
  return result;
}

TEST_P(GemmaOpsTest, WindowsAndNormedValuesAgreeWithDouble) {
  const std::vector<WindowCase> cases = {{{4, 2, 24}, 0, 0},  {{4, 2, 24}, 1, 1},
                                         {{4, 2, 24}, 1, 7},  {{4, 2, 24}, 0, 40},
                                         {{3, 1, 40}, 2, 33}, {{3, 1, 40}, 3, 500}};
  const int32_t positions = 107, split = 90;
  for (const WindowCase& c : cases) {
    SCOPED_TRACE(absl::StrCat("layer ", c.layer, ", window ", c.window));
    const int32_t hd = c.heads.head_dim, group = c.heads.num_heads / c.heads.num_kv_heads;
    const int64_t width = int64_t{c.heads.num_heads + 2 * c.heads.num_kv_heads} * hd;
    const Floats qkv = Normal(positions * width, 5), v_norm = Normal(hd, 6);
    const Floats got = RunWindow(*backend_, c, qkv, v_norm, positions, {split}, true);
    for (int32_t p = 0; p < positions; ++p) {
      const int32_t visible = p < split ? p + 1 : positions;
      const int32_t base = p < split ? p : split;
      const int32_t first = c.window == 0 ? 0 : std::max(base - c.window + 1, 0);
      for (int32_t head = 0; head < c.heads.num_heads; ++head) {
        const auto at = [&](int32_t position, int32_t slot) {
          return &qkv[position * width + slot * hd];
        };
        Doubles weight(positions), want(hd);
        double total = 0;
        for (int32_t k = first; k < visible; ++k) {
          weight[k] = std::exp(0.4 * Dot(at(p, head), at(k, c.heads.num_heads + head / group), hd));
          total += weight[k];
        }
        for (int32_t k = first; k < visible; ++k) {
          const float* v = at(k, c.heads.num_heads + c.heads.num_kv_heads + head / group);
          const double rms = RmsOf(v, hd, 1e-6);
          for (int32_t i = 0; i < hd; ++i) want[i] += weight[k] / total * v_norm[i] * v[i] / rms;
        }
        for (int32_t i = 0; i < hd; ++i) {
          ASSERT_NEAR(got[(p * c.heads.num_heads + head) * hd + i], want[i], 2e-5)
              << "position " << p;
        }
      }
    }
    // In pieces, and apart from the full span: the same bits.
    EXPECT_EQ(RunWindow(*backend_, c, qkv, v_norm, positions, {13, 45, 46, split}, false), got);
  }
}

TEST_P(GemmaOpsTest, ExpertsHaveScalesAndMayReplaceWhatWasThere) {
  const int64_t rows = 19, dim = 33, mlp_dim = 21;
  const int32_t num_experts = 3, per_row = 2;
  std::vector<Floats> gates, ups, downs;
  std::vector<std::unique_ptr<Weight>> gate_up, down;
  for (int32_t e = 0; e < num_experts; ++e) {
    gates.push_back(Normal(mlp_dim * dim, 10 + e, 0.3F));
    ups.push_back(Normal(mlp_dim * dim, 20 + e, 0.3F));
    downs.push_back(Normal(dim * mlp_dim, 30 + e, 0.3F));
  }
  for (int32_t e = 0; e < num_experts; ++e) {
    const HostMatrix pair[] = {{gates[e].data(), DType::kF32, mlp_dim, dim},
                               {ups[e].data(), DType::kF32, mlp_dim, dim}};
    gate_up.push_back(*backend_->MapWeight(pair, RowOrder::kGatedPairs));
    const HostMatrix way_down[] = {{downs[e].data(), DType::kF32, dim, mlp_dim}};
    down.push_back(*backend_->MapWeight(way_down, RowOrder::kStacked));
  }
  const Floats x = Normal(rows * dim, 1), before = Normal(rows * dim, 2),
               logits = Normal(rows * num_experts, 3), scales = {0.5F, 2.0F, -1.0F};
  const Device xs(*backend_, x), router(*backend_, logits), own(*backend_, scales);
  const Device ids(*backend_, Floats(rows * per_row)), weights(*backend_, Floats(rows * per_row));
  auto* chosen = reinterpret_cast<int32_t*>(ids.data());
  ASSERT_TRUE(backend_
                  ->Route({.logits = router.rows(num_experts),
                           .num_rows = rows,
                           .num_experts = num_experts,
                           .experts_per_row = per_row,
                           .renormalize = true,
                           .expert_scales = own.data(),
                           .experts = chosen,
                           .weights = weights.data()})
                  .ok());
  for (const bool add : {false, true}) {
    const Device out(*backend_, before);
    ASSERT_TRUE(backend_
                    ->Experts({.x = xs.rows(dim),
                               .num_rows = rows,
                               .gate_up = gate_up,
                               .down = down,
                               .experts_per_row = per_row,
                               .experts = chosen,
                               .weights = weights.data(),
                               .activation = Epilogue::kGeGlu,
                               .add = add,
                               .out = out.rows(dim)})
                    .ok());
    const Floats got = out.Get(*backend_, rows * dim);
    for (int64_t r = 0; r < rows; ++r) {
      const float* l = &logits[r * num_experts];
      const int32_t left_out = static_cast<int32_t>(std::min_element(l, l + num_experts) - l);
      Doubles want(dim);
      double total = 0;
      for (int32_t e = 0; e < num_experts; ++e) total += e == left_out ? 0 : std::exp(l[e]);
      for (int32_t e = 0; e < num_experts; ++e) {
        if (e == left_out) continue;
        const double share = std::exp(l[e]) / total * scales[e];
        for (int64_t m = 0; m < mlp_dim; ++m) {
          const double inner = Gelu(Dot(&x[r * dim], &gates[e][m * dim], dim)) *
                               Dot(&x[r * dim], &ups[e][m * dim], dim);
          for (int64_t i = 0; i < dim; ++i) want[i] += share * inner * downs[e][i * mlp_dim + m];
        }
      }
      for (int64_t i = 0; i < dim; ++i) {
        ASSERT_NEAR(got[r * dim + i], want[i] + (add ? before[r * dim + i] : 0.0F), 2e-4);
      }
    }
  }
}

TEST_P(GemmaOpsTest, CappedLogitsAgreeWithDoubleAndKeepNan) {
  const int64_t vocabulary = 97;
  // Hidden [1]: the logits are the weight.
  Floats w = Normal(vocabulary, 4, 20.0F);
  w[3] = 0.0F;
  w[5] = 1e-3F;
  w[7] = 1e30F;
  w[11] = -400.0F;
  const auto weight = *backend_->LoadWeight({{w.data(), DType::kF32, vocabulary, 1}},
                                            RowOrder::kStacked, DType::kF32);
  for (const float cap : {0.5F, 30.0F}) {
    const Device hidden(*backend_, {1.0F}), out(*backend_, Floats(vocabulary));
    ASSERT_TRUE(backend_
                    ->Logits({.hidden = hidden.rows(1),
                              .num_rows = 1,
                              .weight = weight.get(),
                              .logit_cap = cap,
                              .out = out.rows(vocabulary)})
                    .ok());
    const Floats got = out.Get(*backend_, vocabulary);
    for (int64_t id = 0; id < vocabulary; ++id) {
      ASSERT_NEAR(got[id], cap * std::tanh(static_cast<double>(w[id]) / cap), 2e-7 * cap) << w[id];
    }
    // The head reads the same numbers.
    std::vector<VocabularyQuery> queries(1);
    queries[0].noise = {.seed = 5};
    queries[0].pick_temperature = 3.0F;
    queries[0].statistics_temperature = 0.7F;
    queries[0].want_top = true;
    std::vector<VocabularyAnswer> answers(1);
    const VocabularyArgs args{.hidden = hidden.rows(1),
                              .weight = weight.get(),
                              .logit_cap = cap,
                              .queries = queries,
                              .answers = absl::MakeSpan(answers)};
    ASSERT_TRUE(backend_->AnswerVocabulary(args).ok());
    ASSERT_TRUE(backend_->Synchronize().ok());
    double sum = 0;
    for (const float l : got) sum += std::exp(static_cast<double>(l) / 0.7);
    EXPECT_NEAR(answers[0].log_sum_exp, std::log(sum), 1e-5);
    EXPECT_EQ(answers[0].token_logit, got[answers[0].token]);
    EXPECT_EQ(answers[0].top_token, std::max_element(got.begin(), got.end()) - got.begin());
    EXPECT_NEAR(answers[0].top_probability,
                std::exp(static_cast<double>(got[answers[0].top_token]) / 0.7) / sum, 1e-5);
    const Device bad(*backend_, {std::numeric_limits<float>::quiet_NaN()});
    queries[0].hidden_row = 0;
    VocabularyArgs nan = args;
    nan.hidden = bad.rows(1);
    ASSERT_TRUE(backend_->AnswerVocabulary(nan).ok());
    ASSERT_TRUE(backend_->Synchronize().ok());
    EXPECT_FALSE(answers[0].finite);
  }
}

TEST_P(GemmaOpsTest, TheTopTokenMayBePickedAndTiesGoToTheLowerId) {
  const int64_t vocabulary = 97;
  Floats w(vocabulary, 0.0F);
  w[90] = 4.0F;  // beyond pickable_ids
  w[13] = 3.0F;  // ruled out
  w[60] = w[31] = 2.0F;
  const auto weight = *backend_->LoadWeight({{w.data(), DType::kF32, vocabulary, 1}},
                                            RowOrder::kStacked, DType::kF32);
  const Device hidden(*backend_, {1.0F});
  const std::vector<VocabularyRule> rules = {{.id = 13, .counted = true, .pickable = false}};
  std::vector<VocabularyQuery> queries(3);
  for (VocabularyQuery& query : queries) {
    query.pick_temperature = 1.0F;
    query.want_top = true;
    query.noise.seed = &query - queries.data();
  }
  queries[1].rules = rules;
  queries[1].pickable_ids = 90;
  queries[2].want_top = false;
  std::vector<VocabularyAnswer> answers(3);
  ASSERT_TRUE(backend_
                  ->AnswerVocabulary({.hidden = hidden.rows(1),
                                      .weight = weight.get(),
                                      .queries = queries,
                                      .answers = absl::MakeSpan(answers)})
                  .ok());
  ASSERT_TRUE(backend_->Synchronize().ok());
  EXPECT_EQ(answers[0].top_token, 90);
  EXPECT_EQ(answers[1].top_token, 31);
  EXPECT_EQ(answers[2].top_token, -1);
}

INSTANTIATE_TEST_SUITE_P(Cpu, GemmaOpsTest, testing::Values("avx512", "avx2", "generic"));
INSTANTIATE_TEST_SUITE_P(Emulated, GemmaOpsTest, testing::Values("emulated"));
INSTANTIATE_TEST_SUITE_P(Cuda, GemmaOpsTest, testing::Values("cuda"));

struct SoftCase {
  int64_t vocabulary;
  int64_t dim;
  DType dtype;
  float cap;
  float temperature;
  float spread;
};

// `table` as the file would hold it.
std::vector<char> Stored(const Floats& table, DType dtype) {
  std::vector<char> bytes(BytesOf(dtype, static_cast<int64_t>(table.size())));
  if (IsQuantized(dtype)) {
    QuantizeRow(table, dtype, bytes.data());
    return bytes;
  }
  for (size_t i = 0; i < table.size(); ++i) {
    char* at = bytes.data() + i * BytesOf(dtype);
    const auto half = static_cast<_Float16>(table[i]);
    if (dtype == DType::kF32) std::memcpy(at, &table[i], 4);
    if (dtype == DType::kF16) std::memcpy(at, &half, 2);
    if (dtype == DType::kBf16) std::memcpy(at, reinterpret_cast<const char*>(&table[i]) + 2, 2);
  }
  return bytes;
}

Floats Widened(const Floats& values, DType dtype) {
  Floats result = values;
  if (IsQuantized(dtype)) {
    const std::vector<char> bytes = Stored(values, dtype);
    ReadRow({bytes.data(), dtype, 1, static_cast<int64_t>(values.size())}, 0,
            absl::MakeSpan(result));
    return result;
  }
  for (float& value : result) {
    if (dtype == DType::kBf16) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits &= 0xFFFF0000U;
      std::memcpy(&value, &bits, 4);
    }
    if (dtype == DType::kF16) value = static_cast<float>(static_cast<_Float16>(value));
  }
  return result;
}

Floats RunSoft(Backend& backend, const SoftCase& c, const Floats& hidden, int64_t rows,
               const std::vector<char>& stored) {
  const HostMatrix matrix{stored.data(), c.dtype, c.vocabulary, c.dim};
  const auto weight = *backend.LoadWeight({&matrix, 1}, RowOrder::kStacked, c.dtype);
  const auto table = *backend.LoadEmbedding(matrix);
  // Rows of whole 16 bytes, so that tensor cores can read them.
  const bool bf16 = backend.activation_dtype() == DType::kBf16;
  const int64_t stride = bf16 ? (c.dim + 7) / 8 * 8 : c.dim;
  Floats kept(rows * stride);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < c.dim; ++i) {
      if (bf16) {
        std::memcpy(reinterpret_cast<char*>(kept.data()) + 2 * (r * stride + i),
                    reinterpret_cast<const char*>(&hidden[r * c.dim + i]) + 2, 2);
      } else {
        kept[r * stride + i] = hidden[r * c.dim + i];
      }
    }
  }
  const Device hidden_rows(backend, kept), out(backend, Floats(rows * c.dim));
  EXPECT_TRUE(backend
                  .Reserve({.rows_max = rows,
                            .cols_max = c.dim,
                            .vocabulary = c.vocabulary,
                            .queries_max = 1,
                            .positions_max = 1,
                            .head_dim_max = 2,
                            .soft_rows_max = rows})
                  .ok());
  EXPECT_TRUE(backend
                  .SoftEmbed({.hidden = {hidden_rows.data(), stride, backend.activation_dtype()},
                              .num_rows = rows,
                              .weight = weight.get(),
                              .logit_cap = c.cap,
                              .temperature = c.temperature,
                              .table = table.get(),
                              .scale = 1.7F,
                              .out = out.rows(c.dim)})
                  .ok());
  return out.Get(backend, rows * c.dim);
}

const std::vector<SoftCase>& SoftCases() {
  static const auto* const cases = new std::vector<SoftCase>{
      {1, 1, DType::kF32, 0, 1, 1},        {31, 7, DType::kF32, 0, 0.4F, 1},
      {257, 33, DType::kF32, 30, 0.8F, 3}, {3001, 40, DType::kBf16, 30, 0.4F, 8},
      {9000, 20, DType::kF16, 5, 1, 1},    {600, 64, DType::kQ8_0, 0, 0.8F, 2}};
  return *cases;
}

constexpr int64_t kSoftRows = 131;

struct SoftInputs {
  Floats hidden;
  std::vector<char> stored;
  Floats table;  // what `stored` holds
};
SoftInputs SoftInputsOf(const SoftCase& c) {
  const Floats table = Normal(c.vocabulary * c.dim, 2);
  return {Normal(kSoftRows * c.dim, 1, c.spread / std::sqrt(static_cast<float>(c.dim))),
          Stored(table, c.dtype), Widened(table, c.dtype)};
}

// The exponents carry the rounding of float32 logits, over the temperature.
void ExpectSoft(const SoftCase& c, const SoftInputs& in, const Floats& got, double tolerance) {
  for (int64_t r = 0; r < kSoftRows; r += 13) {
    Doubles l(c.vocabulary), want(c.dim), size(c.dim);
    for (int64_t v = 0; v < c.vocabulary; ++v) {
      l[v] = Dot(&in.hidden[r * c.dim], &in.table[v * c.dim], c.dim);
      if (c.cap > 0) l[v] = c.cap * std::tanh(l[v] / c.cap);
    }
    const double top = *std::max_element(l.begin(), l.end());
    double mass = 0;
    for (int64_t v = 0; v < c.vocabulary; ++v) {
      const double p = std::exp((l[v] - top) / c.temperature);
      mass += p;
      for (int64_t i = 0; i < c.dim; ++i) {
        want[i] += 1.7 * p * in.table[v * c.dim + i];
        size[i] += 1.7 * p * std::abs(in.table[v * c.dim + i]);
      }
    }
    for (int64_t i = 0; i < c.dim; ++i) {
      ASSERT_NEAR(got[r * c.dim + i], want[i] / mass, tolerance * size[i] / mass + 1e-6)
          << "row " << r << ", column " << i;
    }
  }
}

TEST(SoftEmbedTest, AgreesWithDoubleAndDependsOnNeitherIsaNorThreadsNorBatch) {
  for (const SoftCase& c : SoftCases()) {
    SCOPED_TRACE(absl::StrCat(c.vocabulary, " x ", c.dim, " ", NameOf(c.dtype)));
    const SoftInputs in = SoftInputsOf(c);
    const auto reference = MakeBackend(BackendKind::kCpu, {.num_threads = 1, .isa = "generic"});
    const Floats got = RunSoft(**reference, c, in.hidden, kSoftRows, in.stored);
    ExpectSoft(c, in, got, IsQuantized(c.dtype) ? 4e-4 : 4e-5);  // rows of 15 bits
    for (const char* isa : {"avx512vnni", "avx512", "avx2vnni", "avx2", "generic"}) {
      for (const int32_t num_threads : {1, 3}) {
        const auto backend =
            MakeBackend(BackendKind::kCpu, {.num_threads = num_threads, .isa = isa});
        if (!backend.ok()) continue;
        SCOPED_TRACE((*backend)->Describe());
        EXPECT_EQ(RunSoft(**backend, c, in.hidden, kSoftRows, in.stored), got);
        const Floats few(in.hidden.begin() + 60 * c.dim, in.hidden.begin() + 67 * c.dim);
        const Floats alone = RunSoft(**backend, c, few, 7, in.stored);
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), got.begin() + 60 * c.dim));
      }
    }
  }
}

// bf16: hidden rows are rounded to bf16, which the inputs then are; the tensor cores' exponentials
// are rounded to bf16 too, and the masses with them, so that an error is the mean of many. Logits
// of a quantised head carry the rounding of its values to bf16, over the temperature.
class CudaSoftEmbedTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Emulated, CudaSoftEmbedTest, testing::Values("emulated", "emulated-bf16"));
INSTANTIATE_TEST_SUITE_P(Cuda, CudaSoftEmbedTest, testing::Values("cuda", "cuda-bf16"));

TEST_P(CudaSoftEmbedTest, AgreesWithDoubleWhateverTheBatch) {
  const auto backend = MakeNamedBackend(GetParam());
  if (!backend.ok()) return SkipWithout(GetParam(), backend.status());
  const bool bf16 = (*backend)->activation_dtype() == DType::kBf16;
  for (const SoftCase& c : SoftCases()) {
    SCOPED_TRACE(absl::StrCat(c.vocabulary, " x ", c.dim, " ", NameOf(c.dtype)));
    SoftInputs in = SoftInputsOf(c);
    if (bf16) in.hidden = Widened(in.hidden, DType::kBf16);
    const Floats got = RunSoft(**backend, c, in.hidden, kSoftRows, in.stored);
    const double rounded = IsQuantized(c.dtype) ? 2e-2 : c.dtype == DType::kBf16 ? 4e-3 : 4e-5;
    ExpectSoft(c, in, got, bf16 ? rounded : 4e-5);
    for (const int64_t rows : {7, 40}) {
      const Floats few(in.hidden.begin() + 60 * c.dim, in.hidden.begin() + (60 + rows) * c.dim);
      const Floats alone = RunSoft(**backend, c, few, rows, in.stored);
      EXPECT_TRUE(std::equal(alone.begin(), alone.end(), got.begin() + 60 * c.dim)) << rows;
    }
  }
}

}  // namespace
}  // namespace cinnabar
