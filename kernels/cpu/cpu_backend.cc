#include "kernels/cpu/cpu_backend.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/check.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/packed_weight.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/vocabulary.h"
#include "kernels/quantized.h"

namespace cinnabar::cpu {
namespace {

// Rows whose sums a thread keeps while it walks through the input blocks of a panel: 512 x 32
// floats, 64 KiB.
constexpr int64_t kRowGroup = 512;

struct IsaChoice {
  const IsaKernels* kernels;
  const VocabularyKernels* vocabulary;
};

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports does not know these two.
bool HasF16c() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool HasAvxVnni() {
  constexpr unsigned int kAvxVnni = 1U << 4;
  unsigned int a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & kAvxVnni) != 0;
}
#endif

absl::StatusOr<IsaChoice> ChooseIsa(const std::string& isa) {
  struct Isa {
    IsaChoice choice;
    bool have;
    const char* needs;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#endif
  const Isa isas[] = {
#if defined(__x86_64__)
    {{&kIsaAvx512Vnni, &kVocabularyAvx512}, avx512vnni, "AVX-512 with VNNI"},
    {{&kIsaAvx512, &kVocabularyAvx512}, avx512, "AVX-512 with DQ, BW and VL"},
    {{&kIsaAvx2Vnni, &kVocabularyAvx2}, avx2 && HasAvxVnni(), "AVX2 with AVX-VNNI"},
    {{&kIsaAvx2, &kVocabularyAvx2}, avx2, "AVX2 with FMA and F16C"},
#endif
    {{&kIsaGeneric, &kVocabularyGeneric}, true, ""},
  };
  for (const Isa& each : isas) {
    if (isa == "auto" ? each.have : isa == each.choice.kernels->name) {
      if (!each.have)
        return absl::UnavailableError(absl::StrCat("this processor has no ", each.needs));
      return each.choice;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown isa \"", isa, "\": take auto",
                   absl::StrJoin(isas, "", [](std::string* out, const Isa& each) {
                     absl::StrAppend(out, ", ", each.choice.kernels->name);
                   })));
}

class HostBuffer : public Buffer {
 public:
  HostBuffer(AlignedMemory memory, int64_t size_bytes)
      : Buffer(memory.get(), size_bytes), memory_(std::move(memory)) {}

 private:
  AlignedMemory memory_;
};

class EmbeddingTable : public Weight {
 public:
  explicit EmbeddingTable(const HostMatrix& table)
      : Weight(table.rows, table.cols, RowOrder::kStacked, table.dtype), table_(table) {}
  int64_t memory_bytes() const override { return 0; }  // the file's own pages
  // Elements [col, col + count) of a row, widened; at most 32, inside of one block where those are
  // wider.
  void Read(int64_t row, int64_t col, int64_t count, float* out) const {
    const int64_t block = BlockOf(dtype()).elements;
    const int64_t begin = col / block * block;
    float piece[256];
    const int64_t elements = block > 1 ? block : count;
    const HostMatrix part{
        .data = static_cast<const std::byte*>(table_.data) + BytesOf(dtype(), row * cols() + begin),
        .dtype = dtype(),
        .rows = 1,
        .cols = elements};
    ReadRow(part, 0, absl::MakeSpan(piece, elements));
    std::copy_n(piece + (col - begin), count, out);
  }
  const HostMatrix& table() const { return table_; }

 private:
  HostMatrix table_;
};

// Keys in panels of 32 positions, [positions / 32][head_dim][32]: the scores of a strip are a
// product with them. Values in panels of 32 columns, [head_dim / 32][positions][32], zero beyond
// head_dim.
class PanelKv : public KvMemory {
 public:
  PanelKv(const KvShape& shape, AlignedMemory memory) : shape_(shape), memory_(std::move(memory)) {}

  static int64_t Positions(const KvShape& shape) {
    return (shape.positions_max + kPanelWidth - 1) / kPanelWidth * kPanelWidth;
  }
  static int64_t HeadFloats(const KvShape& shape, int32_t head_dim) {
    const int64_t value_columns = (head_dim + kPanelWidth - 1) / kPanelWidth * kPanelWidth;
    return Positions(shape) * (head_dim + value_columns);
  }
  // Of the layers before `layer`.
  static int64_t FloatsBefore(const KvShape& shape, int32_t layer) {
    const int64_t others = std::max(layer - shape.num_layers, 0);
    return (layer - others) * shape.num_kv_heads * HeadFloats(shape, shape.head_dim) +
           others * shape.other_kv_heads * HeadFloats(shape, shape.other_head_dim);
  }
  static int64_t Bytes(const KvShape& shape) {
    return FloatsBefore(shape, shape.num_layers + shape.num_other_layers) * 4;
  }

  int64_t memory_bytes() const override { return Bytes(shape_); }
  const KvShape& shape() const { return shape_; }
  void CopyFrom(const PanelKv& from, int32_t num_positions) {
    CINNABAR_CHECK(num_positions <= shape_.positions_max &&
                   num_positions <= from.shape_.positions_max);
    const int64_t panels = (num_positions + kPanelWidth - 1) / kPanelWidth;
    for (int32_t layer = 0; layer < shape_.num_layers + shape_.num_other_layers; ++layer) {
      const int32_t head_dim = shape_.head_dim_of(layer);
      CINNABAR_CHECK(head_dim == from.shape_.head_dim_of(layer));
      for (int32_t head = 0; head < shape_.kv_heads_of(layer); ++head) {
        std::copy_n(from.Keys(layer, head), panels * kPanelWidth * head_dim, Keys(layer, head));
        for (int64_t column = 0; column < head_dim; column += kPanelWidth) {
          std::copy_n(from.Values(layer, head) + column * Positions(from.shape_),
                      panels * kPanelWidth * kPanelWidth,
                      Values(layer, head) + column * Positions(shape_));
        }
      }
    }
  }
  float* Keys(int32_t layer, int32_t head) const {
    const int32_t kept = shape_.kept_layer(layer);
    return reinterpret_cast<float*>(memory_.get()) + FloatsBefore(shape_, kept) +
           head * HeadFloats(shape_, shape_.head_dim_of(kept));
  }
  float* Values(int32_t layer, int32_t head) const {
    return Keys(layer, head) + Positions(shape_) * shape_.head_dim_of(layer);
  }

 private:
  KvShape shape_;
  AlignedMemory memory_;
};

// Rows of nearly equal number in each strip.
struct Strips {
  int64_t num_rows;
  int64_t count;
  Strips(int64_t rows, int64_t strip_rows)
      : num_rows(rows), count((rows + strip_rows - 1) / strip_rows) {}
  int64_t begin(int64_t strip) const { return strip * num_rows / count; }
  int32_t height(int64_t strip) const {
    return static_cast<int32_t>(begin(strip + 1) - begin(strip));
  }
};

Finish FinishOf(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kStore:
      return Finish::kStore;
    case Epilogue::kAdd:
      return Finish::kAdd;
    case Epilogue::kGatedAdd:
      return Finish::kGatedAdd;
    case Epilogue::kSilu:
      return Finish::kSilu;
    case Epilogue::kGeluTanh:
      return Finish::kGeluTanh;
    case Epilogue::kSwiGlu:
      return Finish::kSwiGlu;
    case Epilogue::kGeGlu:
      return Finish::kGeGlu;
  }
  CINNABAR_CHECK(false) << "not an epilogue: " << static_cast<int>(epilogue);
  return Finish::kStore;
}

bool IsPaired(Finish finish) { return finish == Finish::kSwiGlu || finish == Finish::kGeGlu; }

void CheckFloat(const Rows& rows) {
  CINNABAR_CHECK(rows.dtype == DType::kF32) << "the CPU computes in float32";
}

const SequenceSpan& SpanOf(absl::Span<const SequenceSpan> sequences, int64_t row) {
  const auto after =
      std::upper_bound(sequences.begin(), sequences.end(), row,
                       [](int64_t r, const SequenceSpan& span) { return r < span.row_begin; });
  CINNABAR_CHECK(after != sequences.begin());
  const SequenceSpan& span = *(after - 1);
  CINNABAR_CHECK(row < span.row_begin + span.num_rows)
      << "row " << row << " belongs to no sequence";
  return span;
}

class CpuBackend : public Backend {
 public:
  CpuBackend(const IsaChoice& isa, int32_t num_threads)
      : isa_(*isa.kernels), vocabulary_kernels_(*isa.vocabulary), pool_(num_threads) {}

  std::string Describe() const override {
    return absl::StrCat("cpu ", isa_.name, ", ", pool_.num_threads(),
                        pool_.num_threads() == 1 ? " thread" : " threads");
  }
  std::string Numerics() const override { return "cpu"; }
  DType activation_dtype() const override { return DType::kF32; }

  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) override {
    AlignedMemory memory = AllocateAligned(size_bytes);
    if (memory == nullptr)
      return absl::ResourceExhaustedError(absl::StrCat("no ", size_bytes, " bytes of memory"));
    return std::make_unique<HostBuffer>(std::move(memory), size_bytes);
  }

  absl::StatusOr<std::unique_ptr<KvMemory>> AllocateKv(const KvShape& shape) override {
    AlignedMemory memory = AllocateAligned(PanelKv::Bytes(shape));
    if (memory == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no ", PanelKv::Bytes(shape), " bytes of KV memory"));
    }
    return std::make_unique<PanelKv>(shape, std::move(memory));
  }
  absl::Status CopyKv(const KvMemory& from, int32_t num_positions, KvMemory& to) override {
    dynamic_cast<PanelKv&>(to).CopyFrom(dynamic_cast<const PanelKv&>(from), num_positions);
    return absl::OkStatus();
  }
  int64_t KvBytes(const KvShape& shape) const override { return PanelKv::Bytes(shape); }

  int64_t WorkspaceBytes(const WorkspaceShape& shape) const override {
    return ScratchOf(shape).total_bytes + VocabularyWorkspace::Bytes(shape, pool_.num_threads());
  }

  absl::Status Reserve(const WorkspaceShape& wanted) override {
    WorkspaceShape shape = shape_;
    shape.rows_max = std::max(shape.rows_max, wanted.rows_max);
    shape.cols_max = std::max(shape.cols_max, wanted.cols_max);
    shape.vocabulary = std::max(shape.vocabulary, wanted.vocabulary);
    shape.queries_max = std::max(shape.queries_max, wanted.queries_max);
    shape.positions_max = std::max(shape.positions_max, wanted.positions_max);
    shape.head_dim_max = std::max(shape.head_dim_max, wanted.head_dim_max);
    shape.num_experts = std::max(shape.num_experts, wanted.num_experts);
    shape.experts_per_row = std::max(shape.experts_per_row, wanted.experts_per_row);
    shape.expert_dim = std::max(shape.expert_dim, wanted.expert_dim);
    shape.expert_mlp_dim = std::max(shape.expert_mlp_dim, wanted.expert_mlp_dim);
    shape.soft_rows_max = std::max(shape.soft_rows_max, wanted.soft_rows_max);
    const Scratch scratch = ScratchOf(shape);
    AlignedMemory memory = AllocateAligned(scratch.total_bytes);
    if (memory == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no ", scratch.total_bytes, " bytes of workspace"));
    }
    const absl::Status vocabulary = vocabulary_workspace_.Reserve(shape, pool_.num_threads());
    if (!vocabulary.ok()) return vocabulary;
    order_.reserve(shape.queries_max);
    shape_ = shape;
    scratch_ = scratch;
    scratch_memory_ = std::move(memory);
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<Weight>> LoadWeight(absl::Span<const HostMatrix> parts,
                                                     RowOrder row_order, DType dtype) override {
    return PackedWeight::Pack(parts, row_order, dtype, pool_);
  }
  int64_t WeightBytes(DType dtype, int64_t rows, int64_t cols) const override {
    return PackedWeight::BytesOfRows(dtype, rows, cols);
  }
  absl::StatusOr<std::unique_ptr<Weight>> MapWeight(absl::Span<const HostMatrix> parts,
                                                    RowOrder row_order) override {
    return PackedWeight::Map(parts, row_order);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadEmbedding(const HostMatrix& table) override {
    return std::make_unique<EmbeddingTable>(table);
  }
  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(const HostMatrix& vector) override {
    const int64_t size = vector.rows * vector.cols;
    auto buffer = Allocate(size * 4);
    if (!buffer.ok()) return buffer.status();
    float* out = static_cast<float*>((*buffer)->data());
    for (int64_t row = 0; row < vector.rows; ++row) {
      ReadRow(vector, row, absl::MakeSpan(out + row * vector.cols, vector.cols));
    }
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
    CheckFloat(out);
    const auto& embedding = dynamic_cast<const EmbeddingTable&>(table);
    ForRows(static_cast<int64_t>(ids.size()), [&](int64_t row) {
      CINNABAR_CHECK(ids[row] >= 0 && ids[row] < embedding.rows()) << "id " << ids[row];
      float* values = out.f32() + row * out.stride;
      ReadRow(embedding.table(), ids[row], absl::MakeSpan(values, embedding.cols()));
      isa_.scale(values, scale, embedding.cols(), values);
    });
    return absl::OkStatus();
  }

  absl::Status EmbedChosen(const Weight& table, const int32_t* ids, int64_t num_rows, float scale,
                           const Rows& out) override {
    return Embed(table, {ids, static_cast<size_t>(num_rows)}, scale, out);
  }

  absl::Status Linear(const LinearArgs& args) override {
    CheckFloat(args.x);
    CheckFloat(args.out);
    const auto& weight = dynamic_cast<const PackedWeight&>(*args.weight);
    const bool paired = weight.row_order() == RowOrder::kGatedPairs;
    const Finish finish = FinishOf(args.epilogue);
    CINNABAR_CHECK(paired == IsPaired(finish)) << "gated pairs go with kSwiGlu and kGeGlu alone";
    Multiply(args, weight, finish);
    return absl::OkStatus();
  }

  absl::Status Logits(const LogitsArgs& args) override {
    LinearArgs linear;
    linear.x = args.hidden;
    linear.num_rows = args.num_rows;
    linear.weight = args.weight;
    linear.bias = args.bias;
    linear.out = args.out;
    CINNABAR_CHECK(args.logit_cap == 0.0F || args.bias == nullptr);
    const absl::Status product = Linear(linear);
    if (!product.ok() || args.logit_cap == 0.0F) return product;
    ForRows(args.num_rows, [&](int64_t row) {
      vocabulary_kernels_.soft_cap(args.out.f32() + row * args.out.stride, args.logit_cap,
                                   args.weight->rows());
    });
    return absl::OkStatus();
  }

  absl::Status RmsNorm(const RmsNormArgs& args) override {
    CheckFloat(args.x);
    CheckFloat(args.out);
    ForRows(args.num_rows, [&](int64_t row) {
      const int64_t source = args.row_indices.empty() ? row : args.row_indices[row];
      const float* x = args.x.f32() + source * args.x.stride;
      float* out = args.out.f32() + row * args.out.stride;
      if (!args.add) return isa_.rms_norm(x, args.weight, args.dim, args.eps, out);
      const float scale =
          args.scales == nullptr ? 1.0F : args.scales[SpanOf(args.sequences, row).modulation_row];
      isa_.add_rms_norm(x, args.weight, args.dim, args.eps, scale, out);
    });
    return absl::OkStatus();
  }

  absl::Status LayerNormModulate(const LayerNormModulateArgs& args) override {
    CheckFloat(args.x);
    CheckFloat(args.out);
    ForRows(args.num_rows, [&](int64_t row) {
      const int64_t source = args.row_indices.empty() ? row : args.row_indices[row];
      const int64_t modulation = SpanOf(args.sequences, source).modulation_row;
      isa_.layer_norm(args.x.f32() + source * args.x.stride, args.weight,
                      args.shift.f32() + modulation * args.shift.stride,
                      args.scale.f32() + modulation * args.scale.stride, args.dim, args.eps,
                      args.out.f32() + row * args.out.stride);
    });
    return absl::OkStatus();
  }

  absl::Status GatherRows(const GatherRowsArgs& args) override {
    CheckFloat(args.x);
    CheckFloat(args.out);
    ForRows(static_cast<int64_t>(args.row_indices.size()), [&](int64_t row) {
      std::memcpy(args.out.f32() + row * args.out.stride,
                  args.x.f32() + args.row_indices[row] * args.x.stride, args.dim * sizeof(float));
    });
    return absl::OkStatus();
  }

  absl::Status PrepareHeads(const PrepareHeadsArgs& args) override {
    CheckFloat(args.qkv);
    const HeadShape& heads = args.heads;
    CINNABAR_CHECK(args.rotary.rotary_dim <= heads.head_dim);
    ForRows(args.num_rows, [&](int64_t row) {
      const SequenceSpan& span = SpanOf(args.sequences, row);
      const int64_t position = span.first_position + row - span.row_begin;
      const auto& kv = dynamic_cast<const PanelKv&>(*span.kv);
      CINNABAR_CHECK(position < kv.shape().positions_max) << "position " << position;
      CINNABAR_CHECK(heads.num_kv_heads == kv.shape().kv_heads_of(args.layer) &&
                     heads.head_dim == kv.shape().head_dim_of(args.layer));
      float* values = args.qkv.f32() + row * args.qkv.stride;
      for (int32_t head = 0; head < heads.num_heads + heads.num_kv_heads; ++head) {
        const float* norm = head < heads.num_heads ? args.q_norm : args.k_norm;
        float* x = values + int64_t{head} * heads.head_dim;
        if (norm != nullptr) isa_.rms_norm(x, norm, heads.head_dim, args.norm_eps, x);
        Rotate(args.rotary, position, x);
      }
      for (int32_t head = 0; head < heads.num_kv_heads; ++head) {
        const float* key = values + int64_t{heads.num_heads + head} * heads.head_dim;
        float* value =
            values + int64_t{heads.num_heads + heads.num_kv_heads + head} * heads.head_dim;
        if (args.v_norm != nullptr) {
          isa_.rms_norm(value, args.v_norm, heads.head_dim, args.norm_eps, value);
        }
        float* keys = kv.Keys(args.layer, head) +
                      position / kPanelWidth * heads.head_dim * kPanelWidth +
                      position % kPanelWidth;
        for (int32_t i = 0; i < heads.head_dim; ++i) keys[i * kPanelWidth] = key[i];
        const int64_t panel_floats = PanelKv::Positions(kv.shape()) * kPanelWidth;
        float* kept = kv.Values(args.layer, head) + position * kPanelWidth;
        for (int32_t i = 0; i < heads.head_dim; i += kPanelWidth) {
          const int32_t count = std::min(heads.head_dim - i, kPanelWidth);
          std::memcpy(kept + i / kPanelWidth * panel_floats, value + i, count * sizeof(float));
        }
      }
    });
    return absl::OkStatus();
  }

  absl::Status Attend(const AttendArgs& args) override {
    CheckFloat(args.q);
    CheckFloat(args.out);
    // Strips of all spans, numbered through; a task is one strip under one head.
    int64_t num_strips = 0;
    for (const SequenceSpan& span : args.sequences)
      num_strips += Strips(span.num_rows, isa_.strip_rows).count;
    pool_.ParallelFor(num_strips * args.heads.num_heads, [&](int64_t item, int32_t thread) {
      int64_t strip = item / args.heads.num_heads;
      const int32_t head = static_cast<int32_t>(item % args.heads.num_heads);
      for (const SequenceSpan& span : args.sequences) {
        const int64_t count = Strips(span.num_rows, isa_.strip_rows).count;
        if (strip < count) return AttendStrip(args, span, strip, head, thread);
        strip -= count;
      }
    });
    return absl::OkStatus();
  }

  absl::Status Route(const RouteArgs& args) override {
    CheckFloat(args.logits);
    CINNABAR_CHECK(args.experts_per_row > 0 && args.experts_per_row <= kExpertsPerRowMax &&
                   args.num_experts % args.num_groups == 0 && args.groups_kept > 0 &&
                   args.groups_kept <= args.num_groups &&
                   args.experts_per_row <= args.num_experts / args.num_groups * args.groups_kept);
    ForRows(args.num_rows, [&](int64_t row) {
      RouteRow(args, args.logits.f32() + row * args.logits.stride,
               args.experts + row * args.experts_per_row,
               args.weights + row * args.experts_per_row);
    });
    return absl::OkStatus();
  }

  absl::Status Experts(const ExpertsArgs& args) override {
    CheckFloat(args.x);
    CheckFloat(args.out);
    const auto num_experts = static_cast<int32_t>(args.gate_up.size());
    const int64_t dim = args.down[0]->rows();
    const int64_t mlp_dim = args.down[0]->cols();
    CINNABAR_CHECK(num_experts <= shape_.num_experts && args.num_rows <= shape_.rows_max &&
                   args.experts_per_row <= shape_.experts_per_row && dim <= shape_.expert_dim &&
                   mlp_dim <= shape_.expert_mlp_dim)
        << "more experts than were reserved";
    // Places (row, slot) sorted by expert.
    auto* begins = reinterpret_cast<int32_t*>(scratch() + scratch_.expert_begins);
    auto* places = reinterpret_cast<int32_t*>(scratch() + scratch_.expert_places);
    const auto num_places = static_cast<int32_t>(args.num_rows * args.experts_per_row);
    std::fill(begins, begins + num_experts + 1, 0);
    for (int32_t i = 0; i < num_places; ++i) ++begins[args.experts[i] + 1];
    for (int32_t e = 0; e < num_experts; ++e) begins[e + 1] += begins[e];
    for (int32_t i = 0; i < num_places; ++i) places[begins[args.experts[i]]++] = i;

    if (!args.add) {
      ForRows(args.num_rows,
              [&](int64_t row) { std::fill_n(args.out.f32() + row * args.out.stride, dim, 0.0F); });
    }
    float* inputs = scratch() + scratch_.expert_inputs;
    float* inner = scratch() + scratch_.expert_inner;
    float* outputs = scratch() + scratch_.expert_outputs;
    int32_t begin = 0;
    for (int32_t e = 0; e < num_experts; ++e) {  // begins[e] is now where expert e ends
      const int32_t count = begins[e] - begin;
      const int32_t* mine = places + std::exchange(begin, begins[e]);
      if (count == 0) continue;
      ForRows(count, [&](int64_t i) {
        std::memcpy(inputs + i * dim, args.x.f32() + mine[i] / args.experts_per_row * args.x.stride,
                    dim * sizeof(float));
      });
      LinearArgs linear;
      linear.num_rows = count;
      linear.x = {.data = inputs, .stride = dim};
      linear.weight = args.gate_up[e].get();
      linear.epilogue = args.activation;
      linear.out = {.data = inner, .stride = mlp_dim};
      const absl::Status gated = Linear(linear);
      if (!gated.ok()) return gated;
      linear.x = linear.out;
      linear.weight = args.down[e].get();
      linear.epilogue = Epilogue::kStore;
      linear.out = {.data = outputs, .stride = dim};
      const absl::Status down = Linear(linear);
      if (!down.ok()) return down;
      ForRows(count, [&](int64_t i) {
        const float weight = args.weights[mine[i]];
        const float* from = outputs + i * dim;
        float* to = args.out.f32() + mine[i] / args.experts_per_row * args.out.stride;
        for (int64_t c = 0; c < dim; ++c) to[c] += weight * from[c];
      });
    }
    return absl::OkStatus();
  }

  absl::Status AnswerVocabulary(const VocabularyArgs& args) override {
    CheckFloat(args.hidden);
    const Head machine(*this, dynamic_cast<const PackedWeight&>(*args.weight));
    AnswerVocabularyCpu(args, machine, vocabulary_workspace_);
    last_answers_ = args.answers;
    return absl::OkStatus();
  }

  absl::Status SelectTransfers(const SelectTransfersArgs& args) override {
    CINNABAR_CHECK(args.chosen.size() == args.known.size());
    std::copy(args.known.begin(), args.known.end(), args.chosen.begin());
    for (const TransferSelection& selection : args.selections) {
      Select(selection.rule,
             args.candidates.subspan(selection.candidates_begin,
                                     selection.candidates_end - selection.candidates_begin),
             args.chosen);
    }
    std::copy(args.chosen.begin(), args.chosen.end(), args.ids);
    return absl::OkStatus();
  }

  absl::Status SoftEmbed(const SoftEmbedArgs& args) override {
    CheckFloat(args.hidden);
    CheckFloat(args.out);
    const auto& weight = dynamic_cast<const PackedWeight&>(*args.weight);
    const auto& table = dynamic_cast<const EmbeddingTable&>(*args.table);
    CINNABAR_CHECK(args.num_rows <= shape_.soft_rows_max && weight.cols() <= shape_.cols_max)
        << "more rows than were reserved";
    CINNABAR_CHECK(table.rows() == weight.rows() && table.cols() == weight.cols());
    CINNABAR_CHECK(args.temperature > 1e-30F);
    const Head head(*this, weight);
    // A task is one part of the vocabulary for one band of rows.
    const Strips bands(args.num_rows, kBandRows);
    const int64_t num_parts = SoftParts(weight.rows());
    pool_.ParallelFor(bands.count, [&](int64_t band, int32_t /*thread*/) {
      int32_t rows[kBandRows];
      std::iota(rows, rows + bands.height(band), static_cast<int32_t>(bands.begin(band)));
      head.Pack(args.hidden, absl::MakeConstSpan(rows, bands.height(band)),
                scratch() + scratch_.strips + bands.begin(band) * weight.cols());
    });
    pool_.ParallelFor(num_parts * bands.count, [&](int64_t item, int32_t thread) {
      const int64_t band = item % bands.count;
      SumSoftPart(args, head, table, bands.begin(band), bands.height(band), item / bands.count,
                  num_parts, thread);
    });
    ForRows(args.num_rows, [&](int64_t row) { JoinSoftParts(args, row, num_parts); });
    return absl::OkStatus();
  }

  absl::Status Synchronize() override { return absl::OkStatus(); }

 private:
  void Select(const TransferRule& rule, absl::Span<const TransferCandidate> candidates,
              absl::Span<int32_t> ids) {
    const auto answer = [&](int32_t index) -> const VocabularyAnswer& {
      return last_answers_[candidates[index].answer];
    };
    const auto score = [&](int32_t index) {
      switch (rule.score) {
        case TransferScore::kProbability:
          return answer(index).probability;
        case TransferScore::kMargin:
          return answer(index).margin;
        case TransferScore::kNegativeEntropy:
          return -answer(index).entropy;
      }
      CINNABAR_CHECK(false) << "not a score: " << static_cast<int>(rule.score);
      return 0.0;
    };
    order_.clear();
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (answer(static_cast<int32_t>(i)).finite) order_.push_back(static_cast<int32_t>(i));
    }
    std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
      const double score_a = score(a), score_b = score(b);
      return score_a != score_b ? score_a > score_b : a < b;
    });
    for (size_t rank = 0; rank < order_.size(); ++rank) {
      const double s = score(order_[rank]);
      const bool above = rule.inclusive ? s >= rule.threshold : s > rule.threshold;
      if (static_cast<int64_t>(rank) >= rule.count && !above) break;
      const int32_t token = answer(order_[rank]).token;
      if (token >= 0) ids[candidates[order_[rank]].target] = token;
    }
  }

  // Offsets in floats into the workspace; per-thread parts follow one another.
  struct Scratch {
    int64_t strips = 0;   // packed rows of the left side of a product
    int64_t threads = 0;  // first thread's part
    int64_t thread_floats = 0;
    int64_t sums = 0;  // inside a thread's part
    int64_t panel = 0;
    int64_t scores = 0;
    int64_t probabilities = 0;
    int64_t query = 0;
    int64_t expert_begins = 0;  // int32 [num_experts + 1]; beside the threads' parts
    int64_t expert_places = 0;  // int32 [rows * experts_per_row]
    int64_t expert_inputs = 0;
    int64_t expert_inner = 0;
    int64_t expert_outputs = 0;
    int64_t soft_tops = 0;  // [parts, rows]: largest logit, then the mass relative to it
    int64_t soft_masses = 0;
    int64_t soft_sums = 0;    // [parts, rows, dim]
    int64_t soft_logits = 0;  // inside a thread's part
    int64_t total_bytes = 0;
  };

  Scratch ScratchOf(const WorkspaceShape& shape) const {
    const auto round = [](int64_t floats) { return (floats + 15) / 16 * 16; };
    Scratch scratch;
    int64_t next = 0;
    const auto take = [&](int64_t floats) { return std::exchange(next, next + round(floats)); };
    scratch.strips = take(shape.rows_max * shape.cols_max);
    if (shape.num_experts > 0) {
      scratch.expert_begins = take(shape.num_experts + 1);
      scratch.expert_places = take(shape.rows_max * shape.experts_per_row);
      scratch.expert_inputs = take(shape.rows_max * shape.expert_dim);
      scratch.expert_inner = take(shape.rows_max * shape.expert_mlp_dim);
      scratch.expert_outputs = take(shape.rows_max * shape.expert_dim);
    }
    if (shape.soft_rows_max > 0) {
      const int64_t parts = SoftParts(shape.vocabulary);
      scratch.soft_tops = take(parts * shape.soft_rows_max);
      scratch.soft_masses = take(parts * shape.soft_rows_max);
      scratch.soft_sums = take(parts * shape.soft_rows_max * shape.cols_max);
    }
    scratch.threads = next;
    next = 0;
    if (shape.soft_rows_max > 0) {
      scratch.soft_logits = take(int64_t{kBandRows} * kVocabularyChunk);
    }
    scratch.sums = take(kRowGroup * kPanelWidth);
    scratch.panel = take(kInputBlock * kPanelWidth);
    static_assert(kVocabularyChunk <= kInputBlock, "SumSoftPart keeps a panel of a chunk there");
    scratch.scores = take(kStripRowsMax * ScoreStride(shape.positions_max));
    scratch.probabilities = take(kStripRowsMax * ScoreStride(shape.positions_max));
    scratch.query = take(kStripRowsMax * std::max<int64_t>(shape.head_dim_max, kPanelWidth));
    scratch.thread_floats = next;
    scratch.total_bytes = (scratch.threads + scratch.thread_floats * pool_.num_threads()) * 4;
    return scratch;
  }

  // Whole panels of keys, and a line more so that the rows of a strip do not share cache sets.
  static int64_t ScoreStride(int64_t positions) {
    return (positions + kPanelWidth - 1) / kPanelWidth * kPanelWidth + 16;
  }

  float* scratch() const { return reinterpret_cast<float*>(scratch_memory_.get()); }
  float* ThreadScratch(int32_t thread) const {
    return scratch() + scratch_.threads + thread * scratch_.thread_floats;
  }

  // Rows in chunks, so that a task is worth handing out.
  template <typename Body>
  void ForRows(int64_t num_rows, const Body& body) {
    constexpr int64_t kRowsPerTask = 8;
    pool_.ParallelFor((num_rows + kRowsPerTask - 1) / kRowsPerTask,
                      [&](int64_t task, int32_t /*thread*/) {
                        const int64_t end = std::min(num_rows, (task + 1) * kRowsPerTask);
                        for (int64_t row = task * kRowsPerTask; row < end; ++row) body(row);
                      });
  }

  void Rotate(const RotaryTable& rotary, int64_t position, float* x) const {
    if (rotary.rotary_dim == 0) return;
    CINNABAR_CHECK(position < rotary.positions_max) << "position " << position;
    const int32_t half = rotary.rotary_dim / 2;
    isa_.rotate(x, rotary.cosine + position * half, rotary.sine + position * half, half);
  }

  static void RouteRow(const RouteArgs& args, float* scores, int32_t* experts, float* weights) {
    const int32_t n = args.num_experts;
    if (args.score == RouterScore::kSoftmax) {
      const float top = *std::max_element(scores, scores + n);
      float sum = 0.0F;
      for (int32_t e = 0; e < n; ++e) sum += scores[e] = std::exp(scores[e] - top);
      for (int32_t e = 0; e < n; ++e) scores[e] /= sum;
    } else {
      for (int32_t e = 0; e < n; ++e) scores[e] = 1.0F / (1.0F + std::exp(-scores[e]));
    }
    const auto choice = [&](int32_t e) {
      return args.bias == nullptr ? scores[e] : scores[e] + args.bias[e];
    };
    // Winners in the order of their choices, found by insertion; ties stay behind.
    const int32_t group_size = n / args.num_groups;
    const auto group_score = [&](int32_t group) {
      float first = -INFINITY, second = -INFINITY;
      for (int32_t e = group * group_size; e < (group + 1) * group_size; ++e) {
        const float c = choice(e);
        if (c > first) {
          second = std::exchange(first, c);
        } else if (c > second) {
          second = c;
        }
      }
      return group_size > 1 ? first + second : first;
    };
    const auto in_kept_group = [&](int32_t group) {
      if (args.groups_kept == args.num_groups) return true;
      const float mine = group_score(group);
      int32_t better = 0;
      for (int32_t other = 0; other < args.num_groups; ++other) {
        const float theirs = group_score(other);
        if (theirs > mine || (theirs == mine && other < group)) ++better;
      }
      return better < args.groups_kept;
    };
    int32_t count = 0;
    float chosen[kExpertsPerRowMax];
    for (int32_t group = 0; group < args.num_groups; ++group) {
      if (!in_kept_group(group)) continue;
      for (int32_t e = group * group_size; e < (group + 1) * group_size; ++e) {
        const float c = choice(e);
        int32_t at = count;
        while (at > 0 && c > chosen[at - 1]) --at;
        if (at == args.experts_per_row) continue;
        count = std::min(count + 1, args.experts_per_row);
        for (int32_t i = count - 1; i > at; --i) {
          chosen[i] = chosen[i - 1];
          experts[i] = experts[i - 1];
        }
        chosen[at] = c;
        experts[at] = e;
      }
    }
    std::sort(experts, experts + count);
    float sum = 0.0F;
    for (int32_t i = 0; i < count; ++i) {
      weights[i] = args.bias_counts ? choice(experts[i]) : scores[experts[i]];
      sum += weights[i];
    }
    const float factor = args.renormalize ? args.scale / (sum + 1e-20F) : args.scale;
    for (int32_t i = 0; i < count; ++i) {
      weights[i] *= factor;
      if (args.expert_scales != nullptr) weights[i] *= args.expert_scales[experts[i]];
    }
  }

  void Multiply(const LinearArgs& args, const PackedWeight& weight, Finish finish) {
    const int64_t dim = weight.cols();
    CINNABAR_CHECK(args.num_rows * dim <= shape_.rows_max * shape_.cols_max)
        << args.num_rows << " x " << dim << " is more than was reserved";
    if (weight.any_float()) MultiplyPanels(args, weight, finish, /*quantized=*/false);
    if (weight.any_quantized()) MultiplyPanels(args, weight, finish, /*quantized=*/true);
  }

  // The panels that are quantised, or those that are not.
  void MultiplyPanels(const LinearArgs& args, const PackedWeight& weight, Finish finish,
                      bool quantized) {
    const int64_t dim = weight.cols();
    const Strips strips(args.num_rows, isa_.strip_rows);
    float* packed = scratch() + scratch_.strips;
    pool_.ParallelFor(strips.count, [&](int64_t strip, int32_t /*thread*/) {
      const int64_t row = strips.begin(strip);
      PackStrip(args.x.f32() + row * args.x.stride, args.x.stride, strips.height(strip), dim,
                quantized, packed + row * dim);
    });
    // Groups of strips of at most kRowGroup rows; a task is one panel for one group.
    const int64_t strips_per_group = kRowGroup / isa_.strip_rows;
    const int64_t num_groups = (strips.count + strips_per_group - 1) / strips_per_group;
    pool_.ParallelFor(num_groups * weight.num_panels(), [&](int64_t item, int32_t thread) {
      const int64_t panel = item % weight.num_panels();
      if (weight.quantized(panel) != quantized) return;
      const int64_t group = item / weight.num_panels();
      const int64_t strip_begin = group * strips_per_group;
      const int64_t strip_end = std::min(strips.count, strip_begin + strips_per_group);
      float* mine = ThreadScratch(thread);
      float* sums = mine + scratch_.sums;
      SumPanel(weight, panel, panel + pool_.num_threads(), strips, strip_begin, strip_end, packed,
               mine + scratch_.panel, sums, kPanelWidth);
      for (int64_t strip = strip_begin; strip < strip_end; ++strip) {
        const int64_t row = strips.begin(strip);
        FinishStrip(args, weight, finish, panel, row, strips.height(strip),
                    sums + (row - strips.begin(strip_begin)) * kPanelWidth);
      }
    });
  }

  // Rows of x as the products with panels that are quantised, or not, read them.
  void PackStrip(const float* x, int64_t stride, int32_t num_rows, int64_t dim, bool quantized,
                 float* strip) const {
    if (!quantized) return isa_.pack_strip(x, stride, num_rows, dim, 1.0F, strip);
    for (int32_t row = 0; row < num_rows; ++row)
      isa_.quantize_row(x + row * stride, dim, strip + row, num_rows);
  }

  // sums[r * sums_stride + j], j < 32: the products of strips [strip_begin, strip_end) with a
  // panel; r counts from the first of their rows, of which the strip is at packed + row * cols.
  // Meanwhile `next_panel`, where there is one, is brought near.
  void SumPanel(const PackedWeight& weight, int64_t panel, int64_t next_panel, const Strips& strips,
                int64_t strip_begin, int64_t strip_end, const float* packed, float* block_scratch,
                float* sums, int64_t sums_stride) const {
    const int64_t dim = weight.cols();
    const bool quantized = weight.quantized(panel);
    const int64_t first_row = strips.begin(strip_begin);
    for (int64_t k = 0; k < dim; k += kInputBlock) {
      const int64_t count = weight.block_inputs(k);
      const float* block = nullptr;
      RunPanel runs{};
      if (quantized) {
        runs = weight.PanelRuns(panel, k, isa_, block_scratch);
      } else {
        block = weight.PanelBlock(panel, k, isa_, block_scratch);
      }
      // A share of the next block with each strip.
      Ahead ahead{};
      if (k + count < dim) {
        ahead = weight.Kept(panel, k + count);
      } else if (next_panel < weight.num_panels()) {
        ahead = weight.Kept(next_panel, 0);
      }
      ahead.size /= strip_end - strip_begin;
      for (int64_t strip = strip_begin; strip < strip_end; ++strip) {
        const int64_t row = strips.begin(strip);
        const int32_t height = strips.height(strip);
        const float* x = packed + row * dim;
        float* c = sums + (row - first_row) * sums_stride;
        if (quantized) {
          isa_.tile_runs(x + k / kRunLength * kRunWords * height, height, runs, count / kRunLength,
                         /*resume=*/k > 0, c, sums_stride, ahead);
        } else {
          isa_.tile(x + k * height, height, block, count, /*resume=*/k > 0, c, sums_stride, ahead);
        }
        ahead.bytes += ahead.size;
      }
    }
  }

  void FinishStrip(const LinearArgs& args, const PackedWeight& weight, Finish finish, int64_t panel,
                   int64_t row, int32_t height, const float* sums) const {
    const bool paired = IsPaired(finish);
    const int64_t num_outputs = paired ? weight.rows() / 2 : weight.rows();
    const int64_t outputs_per_panel = paired ? kPanelWidth / 2 : kPanelWidth;
    const int64_t output = panel * outputs_per_panel;
    FinishTask task;
    task.finish = finish;
    task.sums = sums;
    task.sums_stride = kPanelWidth;
    task.num_rows = height;
    task.num_outputs = static_cast<int32_t>(std::min(outputs_per_panel, num_outputs - output));
    task.bias_low = args.bias == nullptr ? nullptr : args.bias + output;
    task.bias_high = args.bias == nullptr
                         ? nullptr
                         : args.bias + output + (paired ? num_outputs : kPanelWidth / 2);
    task.gate = nullptr;
    task.out = args.out.f32() + row * args.out.stride + output;
    task.out_stride = args.out.stride;
    if (finish != Finish::kGatedAdd) return isa_.finish(task);
    // One sequence at a time: each has its own gate.
    const int64_t end = row + height;
    while (row < end) {
      const SequenceSpan& span = SpanOf(args.sequences, row);
      task.num_rows =
          static_cast<int32_t>(std::min<int64_t>(end, span.row_begin + span.num_rows) - row);
      task.gate = args.gate.f32() + int64_t{span.modulation_row} * args.gate.stride + output;
      isa_.finish(task);
      task.sums += int64_t{task.num_rows} * kPanelWidth;
      task.out += int64_t{task.num_rows} * args.out.stride;
      row += task.num_rows;
    }
  }

  // Number of leading positions that a row sees.
  static int64_t VisibleKeys(const SequenceSpan& span, int64_t row_in_span) {
    const int64_t all = KeysEnd(span);
    if (span.block_length == 0) return all;
    const int64_t block = (span.first_position + row_in_span) / span.block_length;
    return std::min<int64_t>(all, (block + 1) * span.block_length);
  }

  // The first position that a row sees.
  static int64_t FirstKey(const SequenceSpan& span, int64_t row_in_span, int32_t window) {
    if (window == 0) return 0;
    const int64_t last =
        span.block_length == 0 ? span.first_position : span.first_position + row_in_span;
    return std::max<int64_t>(last - window + 1, 0);
  }

  void AttendStrip(const AttendArgs& args, const SequenceSpan& span, int64_t strip, int32_t head,
                   int32_t thread) const {
    const Strips strips(span.num_rows, isa_.strip_rows);
    const int64_t first = strips.begin(strip);
    const int32_t height = strips.height(strip);
    const int32_t head_dim = args.heads.head_dim;
    const int32_t kv_head = head / (args.heads.num_heads / args.heads.num_kv_heads);
    const auto& kv = dynamic_cast<const PanelKv&>(*span.kv);
    const float* keys = kv.Keys(args.layer, kv_head);
    const float* values = kv.Values(args.layer, kv_head);
    const int64_t num_keys = VisibleKeys(span, first + height - 1);  // the last row sees most
    CINNABAR_CHECK(num_keys <= shape_.positions_max)
        << num_keys << " keys are more than was reserved";

    float* mine = ThreadScratch(thread);
    float* query = mine + scratch_.query;
    float* scores = mine + scratch_.scores;
    float* probabilities = mine + scratch_.probabilities;
    const int64_t stride = ScoreStride(num_keys);
    const int64_t row = span.row_begin + first;
    isa_.pack_strip(args.q.f32() + row * args.q.stride + int64_t{head} * head_dim, args.q.stride,
                    height, head_dim, args.scale, query);
    // Whole panels from the one that holds the first key of the first row, which sees furthest
    // back.
    const int64_t begin = FirstKey(span, first, args.window) / kPanelWidth * kPanelWidth;
    for (int64_t key = begin; key < num_keys; key += kPanelWidth) {
      isa_.tile(query, height, keys + key * head_dim, head_dim, /*resume=*/false, scores + key,
                stride, Ahead{});
    }
    // Keys that a row does not see get probability 0, which adds nothing to its sums: a row's
    // result does not depend on what its neighbours see.
    float reciprocal[kStripRowsMax];
    for (int32_t r = 0; r < height; ++r) {
      const int64_t first_key = FirstKey(span, first + r, args.window);
      float* row_scores = scores + r * stride;
      std::fill(row_scores + begin, row_scores + first_key, 0.0F);
      reciprocal[r] = isa_.softmax(row_scores + first_key, VisibleKeys(span, first + r) - first_key,
                                   num_keys - first_key);
    }
    isa_.pack_strip(scores + begin, stride, height, num_keys - begin, 1.0F, probabilities);
    const int64_t panel_floats = PanelKv::Positions(kv.shape()) * kPanelWidth;
    float* sums = query;  // no longer needed; at least 32 wide
    for (int32_t column = 0; column < head_dim; column += kPanelWidth) {
      isa_.tile(probabilities, height,
                values + column / kPanelWidth * panel_floats + begin * kPanelWidth,
                num_keys - begin,
                /*resume=*/false, sums, kPanelWidth, Ahead{});
      const int32_t count = std::min(head_dim - column, kPanelWidth);
      for (int32_t r = 0; r < height; ++r) {
        isa_.scale(
            sums + r * kPanelWidth, reciprocal[r], count,
            args.out.f32() + (row + r) * args.out.stride + int64_t{head} * head_dim + column);
      }
    }
  }

  // Parts of the vocabulary whose sums are kept apart: their number is part of the numerics, so it
  // follows from the vocabulary alone. Enough to share out, few enough to keep.
  static int64_t SoftParts(int64_t vocabulary) {
    const int64_t chunks = (vocabulary + kVocabularyChunk - 1) / kVocabularyChunk;
    return std::clamp<int64_t>(chunks / 4, 1, 16);
  }

  // The sums of exp(l / T) * table over one part of the vocabulary, relative to the largest l that
  // has come so far: when a chunk has a larger one, what is there is scaled down.
  void SumSoftPart(const SoftEmbedArgs& args, const VocabularyMachine& head,
                   const EmbeddingTable& table, int64_t first_row, int32_t num_rows, int64_t part,
                   int64_t num_parts, int32_t thread) const {
    const int64_t dim = table.cols();
    const int64_t vocabulary = table.rows();
    const int64_t num_chunks = (vocabulary + kVocabularyChunk - 1) / kVocabularyChunk;
    const Strips strips(num_rows, isa_.strip_rows);
    float* mine = ThreadScratch(thread);
    float* tops = scratch() + scratch_.soft_tops + part * args.num_rows + first_row;
    float* masses = scratch() + scratch_.soft_masses + part * args.num_rows + first_row;
    float* sums = scratch() + scratch_.soft_sums + (part * args.num_rows + first_row) * dim;
    float* logits = mine + scratch_.soft_logits;
    float* panel = mine + scratch_.panel;
    float* tile = mine + scratch_.sums;
    const auto scale = static_cast<float>(1.44269504088896341 / args.temperature);
    std::fill_n(tops, num_rows, -std::numeric_limits<float>::infinity());
    std::fill_n(masses, num_rows, 0.0F);
    std::fill_n(sums, num_rows * dim, 0.0F);
    for (int64_t chunk = part * num_chunks / num_parts; chunk < (part + 1) * num_chunks / num_parts;
         ++chunk) {
      const auto first_id = static_cast<int32_t>(chunk * kVocabularyChunk);
      const auto num_ids =
          static_cast<int32_t>(std::min<int64_t>(vocabulary - first_id, kVocabularyChunk));
      head.Multiply(scratch() + scratch_.strips + first_row * dim, num_rows, first_id, num_ids,
                    logits, kVocabularyChunk, thread);
      for (int64_t row = 0; row < num_rows; ++row) {
        float* l = logits + row * kVocabularyChunk;
        if (args.logit_cap > 0.0F) vocabulary_kernels_.soft_cap(l, args.logit_cap, num_ids);
        const float top = *std::max_element(l, l + num_ids);
        if (top > tops[row]) {
          const float factor = std::exp2(std::max((tops[row] - top) * scale, -126.0F));
          masses[row] *= factor;
          isa_.scale(sums + row * dim, factor, dim, sums + row * dim);
          tops[row] = top;
        }
        masses[row] += vocabulary_kernels_.exponentials(l, tops[row], scale, num_ids);
      }
      for (int64_t column = 0; column < dim; column += kPanelWidth) {
        const int64_t count = std::min<int64_t>(dim - column, kPanelWidth);
        for (int32_t id = 0; id < num_ids; ++id) {
          std::fill_n(panel + id * kPanelWidth, kPanelWidth, 0.0F);
          table.Read(first_id + id, column, count, panel + id * kPanelWidth);
        }
        for (int64_t strip = 0; strip < strips.count; ++strip) {
          const int64_t row = strips.begin(strip);
          isa_.tile_rows(logits + row * kVocabularyChunk, kVocabularyChunk, strips.height(strip),
                         panel, num_ids, /*resume=*/false, tile, kPanelWidth);
          for (int32_t r = 0; r < strips.height(strip); ++r) {
            float* sum = sums + (row + r) * dim + column;
            for (int64_t i = 0; i < count; ++i) sum[i] += tile[r * kPanelWidth + i];
          }
        }
      }
    }
  }

  void JoinSoftParts(const SoftEmbedArgs& args, int64_t row, int64_t num_parts) const {
    const int64_t dim = args.table->cols();
    const float* tops = scratch() + scratch_.soft_tops;
    const float* masses = scratch() + scratch_.soft_masses;
    float top = tops[row];
    for (int64_t part = 1; part < num_parts; ++part) {
      top = std::max(top, tops[part * args.num_rows + row]);
    }
    double factors[16] = {};
    double mass = 0.0;
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t place = part * args.num_rows + row;
      factors[part] = std::exp((static_cast<double>(tops[place]) - top) / args.temperature);
      mass += factors[part] * masses[place];
    }
    float* out = args.out.f32() + row * args.out.stride;
    for (int64_t i = 0; i < dim; ++i) {
      double sum = 0.0;
      for (int64_t part = 0; part < num_parts; ++part) {
        sum +=
            factors[part] * scratch()[scratch_.soft_sums + (part * args.num_rows + row) * dim + i];
      }
      out[i] = static_cast<float>(sum * args.scale / mass);
    }
  }

  // The vocabulary head's view of this backend.
  class Head : public VocabularyMachine {
   public:
    Head(CpuBackend& backend, const PackedWeight& weight)
        : VocabularyMachine(backend.vocabulary_kernels_, backend.pool_.num_threads()),
          backend_(backend),
          weight_(weight) {
      CINNABAR_CHECK(!weight.mapped()) << "every pass reads the whole head";
      CINNABAR_CHECK(!weight.any_quantized() || !weight.any_float()) << "a head of two formats";
    }

    void Pack(const Rows& hidden, absl::Span<const int32_t> rows, float* packed) const override {
      const int64_t dim = weight_.cols();
      const Strips strips(static_cast<int64_t>(rows.size()), backend_.isa_.strip_rows);
      for (int64_t strip = 0; strip < strips.count; ++strip) {
        const int64_t begin = strips.begin(strip);
        const int32_t height = strips.height(strip);
        float* out = packed + begin * dim;
        for (int32_t r = 0; r < height; ++r) {
          const float* x = hidden.f32() + rows[begin + r] * hidden.stride;
          if (weight_.any_quantized()) {
            backend_.isa_.quantize_row(x, dim, out + r, height);
          } else {
            for (int64_t k = 0; k < dim; ++k) out[k * height + r] = x[k];
          }
        }
      }
    }

    void Multiply(const float* packed, int32_t num_rows, int32_t first_id, int32_t num_ids,
                  float* out, int64_t out_stride, int32_t thread) const override {
      const Strips strips(num_rows, backend_.isa_.strip_rows);
      float* block_scratch = backend_.ThreadScratch(thread) + backend_.scratch_.panel;
      for (int32_t id = 0; id < num_ids; id += kPanelWidth) {
        const int64_t panel = (first_id + id) / kPanelWidth;
        backend_.SumPanel(weight_, panel, panel + 1, strips, 0, strips.count, packed, block_scratch,
                          out + id, out_stride);
      }
    }

    void ParallelFor(int64_t num_items,
                     absl::FunctionRef<void(int64_t, int32_t)> body) const override {
      backend_.pool_.ParallelFor(num_items, body);
    }

   private:
    CpuBackend& backend_;
    const PackedWeight& weight_;
  };

  const IsaKernels& isa_;
  const VocabularyKernels& vocabulary_kernels_;
  mutable ThreadPool pool_;
  WorkspaceShape shape_;
  Scratch scratch_;
  AlignedMemory scratch_memory_;
  VocabularyWorkspace vocabulary_workspace_;
  absl::Span<const VocabularyAnswer> last_answers_;
  std::vector<int32_t> order_;  // of SelectTransfers()
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options) {
  if (options.num_threads < 0 || options.num_threads > 1024) {
    return absl::InvalidArgumentError(absl::StrCat("num_threads is ", options.num_threads,
                                                   "; take 1 to 1024, or 0 for every core"));
  }
  const absl::StatusOr<IsaChoice> isa = ChooseIsa(options.isa);
  if (!isa.ok()) return isa.status();
  const int32_t num_threads =
      options.num_threads > 0
          ? options.num_threads
          : std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
  return std::make_unique<CpuBackend>(*isa, num_threads);
}

}  // namespace cinnabar::cpu
