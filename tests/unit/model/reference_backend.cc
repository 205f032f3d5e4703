#include "tests/unit/model/reference_backend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "common/base/check.h"
#include "kernels/quantized.h"

namespace cinnabar {
namespace {

float FromHalf(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float sign = (bits >> 15) != 0 ? -1.0F : 1.0F;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}

// Round to nearest even.
float Bf16Value(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  bits += 0x7FFF + ((bits >> 16) & 1);
  return std::bit_cast<float>(bits & 0xFFFF0000U);
}

float Element(const HostMatrix& matrix, int64_t index) {
  const char* at = static_cast<const char*>(matrix.data) + index * BytesOf(matrix.dtype);
  if (matrix.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return matrix.dtype == DType::kF16 ? FromHalf(bits)
                                     : std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Block formats by the library's reader, which tests/golden holds against another one.
std::vector<float> Values(const HostMatrix& matrix) {
  std::vector<float> values(matrix.rows * matrix.cols);
  if (!IsQuantized(matrix.dtype)) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = Element(matrix, static_cast<int64_t>(i));
    return values;
  }
  for (int64_t row = 0; row < matrix.rows; ++row) {
    ReadRow(matrix, row, absl::MakeSpan(values).subspan(row * matrix.cols, matrix.cols));
  }
  return values;
}

class PlainWeight : public Weight {
 public:
  PlainWeight(std::vector<float> values, int64_t rows, int64_t cols, RowOrder order, DType dtype)
      : Weight(rows, cols, order, dtype), values_(std::move(values)) {}
  int64_t memory_bytes() const override { return BytesOf(dtype(), rows() * cols()); }
  const float* row(int64_t r) const { return values_.data() + r * cols(); }

 private:
  std::vector<float> values_;
};

class PlainBuffer : public Buffer {
 public:
  explicit PlainBuffer(std::unique_ptr<char[]> bytes, int64_t size_bytes)
      : Buffer(bytes.get(), size_bytes), bytes_(std::move(bytes)) {}

 private:
  std::unique_ptr<char[]> bytes_;
};

struct PlainKv : public KvMemory {
  explicit PlainKv(const KvShape& s) : shape(s) {
    const size_t size = FloatsBefore(s, s.num_layers + s.num_other_layers);
    k.resize(size, NAN);  // a read of what was never written shows
    v.resize(size, NAN);
  }
  int64_t memory_bytes() const override { return static_cast<int64_t>(8 * k.size()); }
  static int64_t FloatsBefore(const KvShape& s, int32_t layer) {
    int64_t floats = 0;
    for (int32_t i = 0; i < layer; ++i) {
      floats += int64_t{s.positions_max} * s.kv_heads_of(i) * s.head_dim_of(i);
    }
    return floats;
  }
  size_t At(int32_t layer, int32_t position, int32_t head) const {
    const int32_t kept = shape.kept_layer(layer);
    CINNABAR_CHECK(kept < shape.num_layers + shape.num_other_layers &&
                   position < shape.positions_max);
    return FloatsBefore(shape, kept) +
           (int64_t{position} * shape.kv_heads_of(kept) + head) * shape.head_dim_of(kept);
  }
  KvShape shape;
  std::vector<float> k, v;
};

float* RowOf(const Rows& rows, int64_t row) { return rows.f32() + row * rows.stride; }

const SequenceSpan& SequenceOf(absl::Span<const SequenceSpan> sequences, int64_t row) {
  for (const SequenceSpan& s : sequences) {
    if (row >= s.row_begin && row < s.row_begin + s.num_rows) return s;
  }
  CINNABAR_CHECK(false) << "row " << row << " has no sequence";
  return sequences[0];
}

double Silu(double x) { return x / (1 + std::exp(-x)); }
double GeluTanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double Capped(double x, double cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

void NormInPlace(float* x, int64_t dim, const float* weight, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < dim; ++i) sum += double{x[i]} * x[i];
  const double scale = 1 / std::sqrt(sum / static_cast<double>(dim) + eps);
  for (int64_t i = 0; i < dim; ++i) x[i] = static_cast<float>(x[i] * scale * weight[i]);
}

class ReferenceBackend : public Backend {
 public:
  std::string Describe() const override { return "reference"; }
  std::string Numerics() const override { return "reference"; }
  DType activation_dtype() const override { return DType::kF32; }

  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) override {
    return std::unique_ptr<Buffer>(
        new PlainBuffer(std::make_unique<char[]>(size_bytes), size_bytes));
  }
  absl::StatusOr<std::unique_ptr<KvMemory>> AllocateKv(const KvShape& shape) override {
    return std::unique_ptr<KvMemory>(new PlainKv(shape));
  }
  absl::Status CopyKv(const KvMemory& from, int32_t num_positions, KvMemory& to) override {
    const auto& source = dynamic_cast<const PlainKv&>(from);
    auto& target = dynamic_cast<PlainKv&>(to);
    const KvShape& s = target.shape;
    for (int32_t layer = 0; layer < s.num_layers + s.num_other_layers; ++layer) {
      const int64_t floats = int64_t{num_positions} * s.kv_heads_of(layer) * s.head_dim_of(layer);
      const size_t begin = source.At(layer, 0, 0), to_begin = target.At(layer, 0, 0);
      std::copy_n(source.k.begin() + begin, floats, target.k.begin() + to_begin);
      std::copy_n(source.v.begin() + begin, floats, target.v.begin() + to_begin);
    }
    return absl::OkStatus();
  }
  int64_t KvBytes(const KvShape& s) const override {
    return 8 * PlainKv::FloatsBefore(s, s.num_layers + s.num_other_layers);
  }
  absl::Status Reserve(const WorkspaceShape&) override { return absl::OkStatus(); }
  int64_t WorkspaceBytes(const WorkspaceShape&) const override { return 0; }

  absl::StatusOr<std::unique_ptr<Weight>> LoadWeight(absl::Span<const HostMatrix> parts,
                                                     RowOrder order, DType dtype) override {
    std::vector<float> values;
    int64_t rows = 0;
    for (const HostMatrix& part : parts) {
      CINNABAR_CHECK(part.cols == parts[0].cols);
      rows += part.rows;
      for (const float value : Values(part)) {
        values.push_back(dtype == DType::kBf16 ? Bf16Value(value) : value);
      }
    }
    return std::unique_ptr<Weight>(
        new PlainWeight(std::move(values), rows, parts[0].cols, order, dtype));
  }
  absl::StatusOr<std::unique_ptr<Weight>> MapWeight(absl::Span<const HostMatrix> parts,
                                                    RowOrder order) override {
    return LoadWeight(parts, order, parts[0].dtype);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadEmbedding(const HostMatrix& table) override {
    return LoadWeight({table}, RowOrder::kStacked, table.dtype);
  }
  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(const HostMatrix& vector) override {
    const int64_t size = vector.rows * vector.cols;
    absl::StatusOr<std::unique_ptr<Buffer>> buffer = Allocate(4 * size);
    const std::vector<float> values = Values(vector);
    std::memcpy((*buffer)->data(), values.data(), values.size() * sizeof(float));
    return buffer;
  }
  absl::Status Upload(absl::Span<const float> host, void* device) override {
    std::memcpy(device, host.data(), host.size() * sizeof(float));
    return absl::OkStatus();
  }
  absl::Status Download(const void* device, absl::Span<float> host) override {
    std::memcpy(host.data(), device, host.size() * sizeof(float));
    return absl::OkStatus();
  }

  absl::Status Embed(const Weight& table, absl::Span<const int32_t> ids, float scale,
                     const Rows& out) override {
    for (size_t i = 0; i < ids.size(); ++i) {
      const float* row = static_cast<const PlainWeight&>(table).row(ids[i]);
      std::transform(row, row + table.cols(), RowOf(out, i), [&](float x) { return x * scale; });
    }
    return absl::OkStatus();
  }

  absl::Status EmbedChosen(const Weight& table, const int32_t* ids, int64_t num_rows, float scale,
                           const Rows& out) override {
    return Embed(table, {ids, static_cast<size_t>(num_rows)}, scale, out);
  }

  absl::Status Linear(const LinearArgs& args) override {
    const auto& weight = static_cast<const PlainWeight&>(*args.weight);
    CINNABAR_CHECK((args.epilogue == Epilogue::kSwiGlu || args.epilogue == Epilogue::kGeGlu) ==
                   (weight.row_order() == RowOrder::kGatedPairs));
    std::vector<double> y(weight.rows());
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const float* x = RowOf(args.x, r);
      for (int64_t c = 0; c < weight.rows(); ++c) {
        const float* w = weight.row(c);
        double sum = 0;
        for (int64_t i = 0; i < weight.cols(); ++i) sum += double{x[i]} * w[i];
        y[c] = sum + (args.bias == nullptr ? 0.0 : args.bias[c]);
      }
      Finish(args, r, y);
    }
    return absl::OkStatus();
  }

  absl::Status RmsNorm(const RmsNormArgs& args) override {
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const float* x = RowOf(args.x, args.row_indices.empty() ? r : args.row_indices[r]);
      std::vector<float> normed(x, x + args.dim);
      NormInPlace(normed.data(), args.dim, args.weight, args.eps);
      float* out = RowOf(args.out, r);
      const float scale =
          args.scales == nullptr ? 1.0F : args.scales[SequenceOf(args.sequences, r).modulation_row];
      for (int64_t i = 0; i < args.dim; ++i)
        out[i] = args.add ? (out[i] + normed[i]) * scale : normed[i];
    }
    return absl::OkStatus();
  }

  absl::Status LayerNormModulate(const LayerNormModulateArgs& args) override {
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const int64_t from = args.row_indices.empty() ? r : args.row_indices[r];
      const int32_t modulation = SequenceOf(args.sequences, from).modulation_row;
      const float *x = RowOf(args.x, from), *shift = RowOf(args.shift, modulation),
                  *scale = RowOf(args.scale, modulation);
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < args.dim; ++i) mean += x[i];
      mean /= static_cast<double>(args.dim);
      for (int64_t i = 0; i < args.dim; ++i) variance += (x[i] - mean) * (x[i] - mean);
      const double inverse = 1 / std::sqrt(variance / static_cast<double>(args.dim) + args.eps);
      for (int64_t i = 0; i < args.dim; ++i) {
        RowOf(args.out, r)[i] = static_cast<float>(
            (x[i] - mean) * inverse * args.weight[i] * (1.0 + scale[i]) + shift[i]);
      }
    }
    return absl::OkStatus();
  }

  absl::Status GatherRows(const GatherRowsArgs& args) override {
    for (size_t i = 0; i < args.row_indices.size(); ++i) {
      const float* x = RowOf(args.x, args.row_indices[i]);
      std::copy(x, x + args.dim, RowOf(args.out, i));
    }
    return absl::OkStatus();
  }

  absl::Status PrepareHeads(const PrepareHeadsArgs& args) override {
    const int32_t dim = args.heads.head_dim, half = args.rotary.rotary_dim / 2;
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const SequenceSpan& sequence = SequenceOf(args.sequences, r);
      const auto position = static_cast<int32_t>(sequence.first_position + r - sequence.row_begin);
      CINNABAR_CHECK(position < args.rotary.positions_max);
      float* heads = RowOf(args.qkv, r);
      const int32_t num_qk = args.heads.num_heads + args.heads.num_kv_heads;
      for (int32_t h = 0; h < num_qk; ++h) {
        float* x = heads + h * dim;
        const float* norm = h < args.heads.num_heads ? args.q_norm : args.k_norm;
        if (norm != nullptr) NormInPlace(x, dim, norm, args.norm_eps);
        for (int32_t i = 0; i < half; ++i) {
          const double c = args.rotary.cosine[position * half + i],
                       s = args.rotary.sine[position * half + i], a = x[i], b = x[i + half];
          x[i] = static_cast<float>(a * c - b * s);
          x[i + half] = static_cast<float>(b * c + a * s);
        }
      }
      auto& kv = static_cast<PlainKv&>(*sequence.kv);
      for (int32_t h = 0; h < args.heads.num_kv_heads; ++h) {
        const float* k = heads + (args.heads.num_heads + h) * dim;
        float* v = heads + (num_qk + h) * dim;
        if (args.v_norm != nullptr) NormInPlace(v, dim, args.v_norm, args.norm_eps);
        std::copy(k, k + dim, kv.k.begin() + kv.At(args.layer, position, h));
        std::copy(v, v + dim, kv.v.begin() + kv.At(args.layer, position, h));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Attend(const AttendArgs& args) override {
    const int32_t dim = args.heads.head_dim, group = args.heads.num_heads / args.heads.num_kv_heads;
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const SequenceSpan& sequence = SequenceOf(args.sequences, r);
      const auto position = static_cast<int32_t>(sequence.first_position + r - sequence.row_begin);
      int32_t visible = KeysEnd(sequence);
      if (const int32_t block = sequence.block_length; block > 0) {
        visible = std::min(visible, (position / block + 1) * block);
      }
      int32_t first = 0;
      if (args.window > 0) {
        const int32_t base = sequence.block_length == 0 ? sequence.first_position : position;
        first = std::max(base - args.window + 1, 0);
      }
      const auto& kv = static_cast<const PlainKv&>(*sequence.kv);
      std::vector<double> weights(visible), out(dim);
      for (int32_t h = 0; h < args.heads.num_heads; ++h) {
        const float* q = RowOf(args.q, r) + h * dim;
        double top = -INFINITY, total = 0;
        for (int32_t p = first; p < visible; ++p) {
          const float* k = kv.k.data() + kv.At(args.layer, p, h / group);
          double dot = 0;
          for (int32_t i = 0; i < dim; ++i) dot += double{q[i]} * k[i];
          weights[p] = dot * args.scale;
          top = std::max(top, weights[p]);
        }
        std::fill(out.begin(), out.end(), 0.0);
        for (int32_t p = first; p < visible; ++p) {
          const double weight = std::exp(weights[p] - top);
          const float* v = kv.v.data() + kv.At(args.layer, p, h / group);
          for (int32_t i = 0; i < dim; ++i) out[i] += weight * v[i];
          total += weight;
        }
        for (int32_t i = 0; i < dim; ++i) {
          RowOf(args.out, r)[h * dim + i] = static_cast<float>(out[i] / total);
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status Route(const RouteArgs& args) override {
    const int32_t n = args.num_experts, size = n / args.num_groups;
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const float* logits = RowOf(args.logits, r);
      std::vector<double> score(n), choice(n);
      double total = 0;
      for (int32_t e = 0; e < n; ++e) total += std::exp(double{logits[e]});
      for (int32_t e = 0; e < n; ++e) {
        score[e] = args.score == RouterScore::kSoftmax ? std::exp(double{logits[e]}) / total
                                                       : 1 / (1 + std::exp(-double{logits[e]}));
        choice[e] = score[e] + (args.bias == nullptr ? 0.0 : args.bias[e]);
      }
      std::vector<std::pair<double, int32_t>> groups;  // (-score, group)
      for (int32_t g = 0; g < args.num_groups; ++g) {
        std::vector<double> in_group(choice.begin() + g * size, choice.begin() + (g + 1) * size);
        std::sort(in_group.rbegin(), in_group.rend());
        groups.push_back({-(in_group[0] + (size > 1 ? in_group[1] : 0.0)), g});
      }
      std::sort(groups.begin(), groups.end());
      std::vector<std::pair<double, int32_t>> candidates;
      for (int32_t g = 0; g < args.groups_kept; ++g) {
        for (int32_t e = groups[g].second * size; e < (groups[g].second + 1) * size; ++e) {
          candidates.push_back({-choice[e], e});
        }
      }
      std::sort(candidates.begin(), candidates.end());
      std::vector<int32_t> chosen;
      for (int32_t i = 0; i < args.experts_per_row; ++i) chosen.push_back(candidates[i].second);
      std::sort(chosen.begin(), chosen.end());
      double sum = 1e-20;
      for (const int32_t e : chosen) sum += args.bias_counts ? choice[e] : score[e];
      for (int32_t i = 0; i < args.experts_per_row; ++i) {
        const double weight = args.bias_counts ? choice[chosen[i]] : score[chosen[i]];
        args.experts[r * args.experts_per_row + i] = chosen[i];
        args.weights[r * args.experts_per_row + i] = static_cast<float>(
            weight * args.scale / (args.renormalize ? sum : 1.0) *
            (args.expert_scales == nullptr ? 1.0F : args.expert_scales[chosen[i]]));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Experts(const ExpertsArgs& args) override {
    for (int64_t r = 0; r < args.num_rows; ++r) {
      if (!args.add) std::fill_n(RowOf(args.out, r), args.down[0]->rows(), 0.0F);
      for (int32_t i = 0; i < args.experts_per_row; ++i) {
        const int64_t place = r * args.experts_per_row + i;
        const auto& gate_up = static_cast<const PlainWeight&>(*args.gate_up[args.experts[place]]);
        const auto& down = static_cast<const PlainWeight&>(*args.down[args.experts[place]]);
        const auto dot = [](const float* w, const auto* x, int64_t count) {
          double sum = 0;
          for (int64_t k = 0; k < count; ++k) sum += double{w[k]} * x[k];
          return sum;
        };
        std::vector<double> inner(down.cols());
        for (int64_t c = 0; c < down.cols(); ++c) {
          const double gate = dot(gate_up.row(c), RowOf(args.x, r), gate_up.cols());
          inner[c] = (args.activation == Epilogue::kGeGlu ? GeluTanh(gate) : Silu(gate)) *
                     dot(gate_up.row(down.cols() + c), RowOf(args.x, r), gate_up.cols());
        }
        for (int64_t c = 0; c < down.rows(); ++c) {
          RowOf(args.out, r)[c] +=
              static_cast<float>(args.weights[place] * dot(down.row(c), inner.data(), down.cols()));
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status AnswerVocabulary(const VocabularyArgs&) override {
    return absl::UnimplementedError("the reference backend answers no queries");
  }
  absl::Status SelectTransfers(const SelectTransfersArgs&) override {
    return absl::UnimplementedError("the reference backend answers no queries");
  }
  absl::Status Logits(const LogitsArgs& args) override {
    const absl::Status product = Linear({.x = args.hidden,
                                         .num_rows = args.num_rows,
                                         .weight = args.weight,
                                         .bias = args.bias,
                                         .out = args.out});
    for (int64_t r = 0; r < args.num_rows; ++r) {
      float* row = RowOf(args.out, r);
      for (int64_t id = 0; id < args.weight->rows(); ++id) {
        row[id] = static_cast<float>(Capped(row[id], args.logit_cap));
      }
    }
    return product;
  }
  absl::Status SoftEmbed(const SoftEmbedArgs& args) override {
    const auto& head = static_cast<const PlainWeight&>(*args.weight);
    const auto& table = static_cast<const PlainWeight&>(*args.table);
    for (int64_t r = 0; r < args.num_rows; ++r) {
      std::vector<double> out(table.cols());
      double mass = 0;
      for (int64_t id = 0; id < head.rows(); ++id) {
        double logit = 0;
        for (int64_t i = 0; i < head.cols(); ++i) {
          logit += double{RowOf(args.hidden, r)[i]} * head.row(id)[i];
        }
        const double p = std::exp(Capped(logit, args.logit_cap) / args.temperature);
        mass += p;
        for (int64_t i = 0; i < table.cols(); ++i) out[i] += p * table.row(id)[i];
      }
      for (int64_t i = 0; i < table.cols(); ++i) {
        RowOf(args.out, r)[i] = static_cast<float>(args.scale * out[i] / mass);
      }
    }
    return absl::OkStatus();
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

 private:
  static void Finish(const LinearArgs& args, int64_t row, const std::vector<double>& y) {
    float* out = RowOf(args.out, row);
    const int64_t size = static_cast<int64_t>(y.size());
    const int64_t half = size / 2;
    const float* gate = args.epilogue == Epilogue::kGatedAdd
                            ? RowOf(args.gate, SequenceOf(args.sequences, row).modulation_row)
                            : nullptr;
    for (int64_t c = 0; c < size; ++c) {
      switch (args.epilogue) {
        case Epilogue::kStore:
          out[c] = static_cast<float>(y[c]);
          break;
        case Epilogue::kAdd:
          out[c] = static_cast<float>(out[c] + y[c]);
          break;
        case Epilogue::kGatedAdd:
          out[c] = static_cast<float>(out[c] + gate[c] * y[c]);
          break;
        case Epilogue::kSilu:
          out[c] = static_cast<float>(Silu(y[c]));
          break;
        case Epilogue::kGeluTanh:
          out[c] = static_cast<float>(GeluTanh(y[c]));
          break;
        case Epilogue::kSwiGlu:
          if (c < half) out[c] = static_cast<float>(Silu(y[c]) * y[half + c]);
          break;
        case Epilogue::kGeGlu:
          if (c < half) out[c] = static_cast<float>(GeluTanh(y[c]) * y[half + c]);
          break;
      }
    }
  }
};

}  // namespace

std::unique_ptr<Backend> MakeReferenceBackend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace cinnabar
