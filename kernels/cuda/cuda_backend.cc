#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/expert_tables.h"
#include "kernels/cuda/geometry.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/paged_kv.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/query_batch.h"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/steps.h"
#include "kernels/cuda/weights.h"

namespace cinnabar::cuda {
namespace {

// Before Reserve(): enough for loading.
constexpr int64_t kStagedBytesAtFirst = 64 << 10;

MatrixView ViewOf(const Rows& rows) {
  CINNABAR_CHECK(rows.dtype == DType::kF32 || rows.dtype == DType::kBf16)
      << "rows are float32 or bf16";
  return {rows.data, rows.stride, ElementOf(rows.dtype)};
}

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
  CINNABAR_CHECK(false) << "not an epilogue of this backend: " << static_cast<int>(epilogue);
  return Finish::kStore;
}

Score ScoreOf(TransferScore score) {
  switch (score) {
    case TransferScore::kProbability:
      return Score::kProbability;
    case TransferScore::kMargin:
      return Score::kMargin;
    case TransferScore::kNegativeEntropy:
      return Score::kNegativeEntropy;
  }
  CINNABAR_CHECK(false) << "not a score: " << static_cast<int>(score);
  return Score::kProbability;
}

// The columns of `rows` from `columns` on.
MatrixView After(MatrixView rows, int64_t columns) {
  if (rows.data != nullptr) {
    rows.data = static_cast<char*>(rows.data) + columns * BytesOf(rows.element);
  }
  return rows;
}

class CudaBuffer : public Buffer {
 public:
  CudaBuffer(DeviceMemory memory, int64_t size_bytes)
      : Buffer(memory.get(), size_bytes), memory_(std::move(memory)) {}

 private:
  DeviceMemory memory_;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const BackendOptions& options, const DeviceFacts& facts, Stream stream)
      : options_(options),
        facts_(facts),
        stream_(stream.get()),
        wgmma_(options.products == Products::kWgmma && options.activation == DType::kBf16),
        pools_(std::make_shared<Pools>()),
        steps_(options.device, std::move(stream)) {}

  absl::Status Start() {
    CINNABAR_RETURN_IF_ERROR(steps_.Start());
    return TakeWorkspace(WorkspaceShape{}, kStagedBytesAtFirst);
  }

  std::string Describe() const override {
    return absl::StrCat("cuda ", facts_.name, ", device ", options_.device, ", sm_",
                        facts_.compute_capability, ", ", NameOf(options_.activation),
                        options_.fp8 ? " with FP8 products" : "", wgmma_ ? " by wgmma" : "");
  }
  // Tensor cores of another generation may round inside an instruction in another way.
  std::string Numerics() const override {
    return absl::StrCat("cuda/sm_", facts_.compute_capability, "/", NameOf(options_.activation),
                        options_.fp8 ? "/fp8" : "", wgmma_ ? "/wgmma" : "");
  }
  DType activation_dtype() const override { return options_.activation; }

  DeviceStats Stats() const override {
    DeviceStats stats;
    stats.pci_address = facts_.pci_address;
    stats.memory_total_bytes = facts_.memory_bytes;
    int64_t free_bytes = 0;
    if (FreeMemory(&free_bytes) == kSuccess) stats.memory_free_bytes = free_bytes;
    stats.busy_seconds = steps_.busy_seconds();
    stats.graph_hits = steps_.graphs().hits();
    stats.graph_misses = steps_.graphs().misses();
    return stats;
  }

  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_RETURN_IF_ERROR(steps_.RunCaptured());
    CINNABAR_ASSIGN_OR_RETURN(DeviceMemory memory, TakeDeviceMemory(size_bytes));
    CINNABAR_RETURN_IF_ERROR(steps_.Note(
        ClearAsync(memory.get(), std::max<int64_t>(size_bytes, 1), stream_), "clear memory"));
    return std::make_unique<CudaBuffer>(std::move(memory), size_bytes);
  }

  absl::StatusOr<std::unique_ptr<KvMemory>> AllocateKv(const KvShape& shape) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_RETURN_IF_ERROR(steps_.RunCaptured());
    CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<PagedKv> kv,
                              PagedKv::Take(shape, options_.activation, pools_));
    // In pieces: a table may be longer than what is staged at a time.
    constexpr size_t kPiece = 4096;
    for (size_t begin = 0; begin < kv->pages().size(); begin += kPiece) {
      const absl::Span<void* const> piece = kv->pages().subspan(begin, kPiece);
      CINNABAR_RETURN_IF_ERROR(steps_.CopyThroughStaging(
          piece.data(), static_cast<int64_t>(piece.size() * sizeof(void*)),
          kv->device_table() + begin));
    }
    return kv;
  }
  // Whole pages: what lies behind the positions in the last one is written before it is read.
  absl::Status CopyKv(const KvMemory& from, int32_t num_positions, KvMemory& to) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_RETURN_IF_ERROR(steps_.RunCaptured());
    const auto& source = dynamic_cast<const PagedKv&>(from);
    const auto& target = dynamic_cast<const PagedKv&>(to);
    const KvShape& shape = target.shape();
    const KvLayout& layout = target.layout();
    CINNABAR_CHECK(num_positions <= source.shape().positions_max &&
                   num_positions <= shape.positions_max &&
                   source.layout().page_bytes == layout.page_bytes &&
                   source.layout().other_page_bytes == layout.other_page_bytes);
    const int32_t pages = (num_positions + kPagePositions - 1) / kPagePositions;
    for (int32_t layer = 0; layer < shape.num_layers + shape.num_other_layers; ++layer) {
      const int64_t bytes = shape.is_other(layer) ? layout.other_page_bytes : layout.page_bytes;
      for (int32_t page = 0; page < pages; ++page) {
        CINNABAR_RETURN_IF_ERROR(steps_.Note(
            CopyOnDevice(target.page(layer, page), source.page(layer, page), bytes, stream_),
            "copy a prefix"));
      }
    }
    return absl::OkStatus();
  }
  int64_t KvBytes(const KvShape& shape) const override {
    return LayOutKv(shape, options_.activation).total_bytes;
  }

  int64_t WorkspaceBytes(const WorkspaceShape& shape) const override {
    return LayOutWorkspace(shape, workspace_facts()).total_bytes;
  }

  absl::Status Reserve(const WorkspaceShape& wanted) override {
    CINNABAR_RETURN_IF_ERROR(Synchronize());
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
    return TakeWorkspace(shape, 0);
  }

  absl::StatusOr<std::unique_ptr<Weight>> LoadWeight(absl::Span<const HostMatrix> parts,
                                                     RowOrder row_order, DType dtype) override {
    int64_t rows = 0;
    for (const HostMatrix& part : parts) rows += part.rows;
    const bool fp8 =
        options_.fp8 && !IsQuantized(dtype) && WantsFp8(row_order, rows, parts[0].cols);
    return Load(parts, row_order, dtype, fp8, /*tiled=*/wgmma_);
  }
  int64_t WeightBytes(DType dtype, int64_t rows, int64_t cols) const override {
    return rows * RowBytes(ElementOf(dtype), cols);
  }
  absl::StatusOr<std::unique_ptr<Weight>> MapWeight(absl::Span<const HostMatrix> parts,
                                                    RowOrder row_order) override {
    return Load(parts, row_order, parts[0].dtype, /*fp8=*/false, /*tiled=*/wgmma_);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadEmbedding(const HostMatrix& table) override {
    return Load({&table, 1}, RowOrder::kStacked, table.dtype, /*fp8=*/false, /*tiled=*/false);
  }

  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(const HostMatrix& vector) override {
    CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Buffer> buffer,
                              Allocate(vector.rows * vector.cols * 4));
    CINNABAR_RETURN_IF_ERROR(weights_.LoadVector(vector, buffer->data(), stream_, steps_.errors()));
    return buffer;
  }

  absl::Status Upload(absl::Span<const float> host, void* device) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    const int64_t bytes = static_cast<int64_t>(host.size()) * 4;
    const int64_t piece = layout_.staged_bytes / 2 / 256 * 256;
    for (int64_t begin = 0; begin < bytes; begin += piece) {
      CINNABAR_RETURN_IF_ERROR(steps_.CopyThroughStaging(
          reinterpret_cast<const char*>(host.data()) + begin, std::min(piece, bytes - begin),
          static_cast<char*>(device) + begin));
    }
    return absl::OkStatus();
  }

  absl::Status Download(const void* device, absl::Span<float> host) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_RETURN_IF_ERROR(steps_.RunCaptured());
    CINNABAR_RETURN_IF_ERROR(
        steps_.Note(CopyToHost(host.data(), device, static_cast<int64_t>(host.size()) * 4, stream_),
                    "copy to the host"));
    return Synchronize();
  }

  absl::Status Embed(const Weight& table, absl::Span<const int32_t> ids, float scale,
                     const Rows& out) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    for (const int32_t id : ids) CINNABAR_CHECK(id >= 0 && id < table.rows()) << "id " << id;
    CINNABAR_RETURN_IF_ERROR(steps_.MakeRoom(StagedBytesOf(ids)));
    CINNABAR_ASSIGN_OR_RETURN(const int32_t* const staged, steps_.Stage(ids));
    return EmbedChosen(table, staged, static_cast<int64_t>(ids.size()), scale, out);
  }

  absl::Status EmbedChosen(const Weight& table, const int32_t* ids, int64_t num_rows, float scale,
                           const Rows& out) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    if (num_rows == 0) return absl::OkStatus();
    const WeightView& view = dynamic_cast<const CudaWeight&>(table).view();
    EmbedTask task;
    task.table = view.data;
    task.element = view.element;
    task.cols = table.cols();
    task.row_bytes = view.row_bytes;
    task.ids = ids;
    task.num_rows = static_cast<int32_t>(num_rows);
    task.scale = scale;
    task.out = ViewOf(out);
    return steps_.Note(LaunchEmbed(task, stream_), "embedding");
  }

  absl::Status Linear(const LinearArgs& args) override { return Product(args, /*cap=*/0.0F); }

  absl::Status Logits(const LogitsArgs& args) override {
    CINNABAR_CHECK(args.logit_cap == 0.0F || args.bias == nullptr) << "a cap goes with no bias";
    LinearArgs linear;
    linear.x = args.hidden;
    linear.num_rows = args.num_rows;
    linear.weight = args.weight;
    linear.bias = args.bias;
    linear.out = args.out;
    return Product(linear, args.logit_cap);
  }

  absl::Status RmsNorm(const RmsNormArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    if (args.num_rows == 0) return absl::OkStatus();
    NormTask task;
    if (args.scales != nullptr) {
      CINNABAR_ASSIGN_OR_RETURN(
          const Geometry* geometry,
          geometries_.Of(args.sequences, StagedBytesOf(args.row_indices), steps_));
      CINNABAR_CHECK(geometry->num_rows >= args.num_rows) << "rows belong to no sequence";
      task.rows = geometry->rows;
    } else {
      CINNABAR_RETURN_IF_ERROR(steps_.MakeRoom(StagedBytesOf(args.row_indices)));
    }
    CINNABAR_CHECK(args.add || args.scales == nullptr);
    task.x = ViewOf(args.x);
    task.num_rows = static_cast<int32_t>(args.num_rows);
    task.dim = static_cast<int32_t>(args.dim);
    task.weight = args.weight;
    task.eps = args.eps;
    task.out = ViewOf(args.out);
    task.add = args.add;
    task.scales = args.scales;
    CINNABAR_ASSIGN_OR_RETURN(task.index, steps_.Stage(args.row_indices));
    return steps_.Note(LaunchNorm(task, stream_), "RMS norm");
  }

  absl::Status LayerNormModulate(const LayerNormModulateArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    if (args.num_rows == 0) return absl::OkStatus();
    CINNABAR_ASSIGN_OR_RETURN(
        const Geometry* geometry,
        geometries_.Of(args.sequences, StagedBytesOf(args.row_indices), steps_));
    NormTask task;
    task.x = ViewOf(args.x);
    task.num_rows = static_cast<int32_t>(args.num_rows);
    task.dim = static_cast<int32_t>(args.dim);
    task.weight = args.weight;
    task.eps = args.eps;
    task.out = ViewOf(args.out);
    task.modulated = true;
    task.shift = ViewOf(args.shift);
    task.scale = ViewOf(args.scale);
    task.rows = geometry->rows;
    CINNABAR_ASSIGN_OR_RETURN(task.index, steps_.Stage(args.row_indices));
    return steps_.Note(LaunchNorm(task, stream_), "layer norm");
  }

  absl::Status GatherRows(const GatherRowsArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_CHECK(args.x.dtype == args.out.dtype);
    if (args.row_indices.empty()) return absl::OkStatus();
    CINNABAR_RETURN_IF_ERROR(steps_.MakeRoom(StagedBytesOf(args.row_indices)));
    GatherTask task;
    task.x = ViewOf(args.x);
    task.dim = static_cast<int32_t>(args.dim);
    CINNABAR_ASSIGN_OR_RETURN(task.index, steps_.Stage(args.row_indices));
    task.num_rows = static_cast<int32_t>(args.row_indices.size());
    task.out = ViewOf(args.out);
    return steps_.Note(LaunchGather(task, stream_), "gather rows");
  }

  absl::Status PrepareHeads(const PrepareHeadsArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_CHECK(args.rotary.rotary_dim <= args.heads.head_dim);
    CINNABAR_CHECK(args.qkv.dtype == options_.activation) << "keys are kept as the activations are";
    if (args.num_rows == 0) return absl::OkStatus();
    CINNABAR_ASSIGN_OR_RETURN(const Geometry* geometry, geometries_.Of(args.sequences, 0, steps_));
    CINNABAR_CHECK(geometry->num_rows >= args.num_rows) << "rows belong to no sequence";
    for (const SequenceSpan& span : args.sequences) {
      const KvShape& kv = dynamic_cast<const PagedKv&>(*span.kv).shape();
      const int64_t end = int64_t{span.first_position} + span.num_rows;
      CINNABAR_CHECK(KeysEnd(span) >= end && KeysEnd(span) <= kv.positions_max &&
                     kv.kept_layer(args.layer) < kv.num_layers + kv.num_other_layers &&
                     args.heads.num_kv_heads == kv.kv_heads_of(args.layer) &&
                     args.heads.head_dim == kv.head_dim_of(args.layer))
          << "position " << end - 1 << " of " << kv.positions_max;
      CINNABAR_CHECK(args.rotary.rotary_dim == 0 || end <= args.rotary.positions_max)
          << "position " << end - 1;
    }
    PrepareTask task;
    task.qkv = ViewOf(args.qkv);
    task.num_rows = static_cast<int32_t>(args.num_rows);
    task.num_heads = args.heads.num_heads;
    task.num_kv_heads = args.heads.num_kv_heads;
    task.head_dim = args.heads.head_dim;
    task.q_norm = args.q_norm;
    task.k_norm = args.k_norm;
    task.v_norm = args.v_norm;
    task.eps = args.norm_eps;
    task.cosine = args.rotary.cosine;
    task.sine = args.rotary.sine;
    task.rotary_dim = args.rotary.rotary_dim;
    task.rows = geometry->rows;
    task.spans = geometry->spans;
    task.layer = args.layer;
    task.head_stride = HeadStride(args.heads.head_dim);
    return steps_.Note(LaunchPrepare(task, stream_), "prepare heads");
  }

  absl::Status Attend(const AttendArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_CHECK(args.q.dtype == options_.activation) << "keys are kept as the activations are";
    CINNABAR_CHECK(args.heads.head_dim <= 1024) << "head_dim " << args.heads.head_dim;
    if (args.num_rows == 0) return absl::OkStatus();
    const int32_t group = args.heads.num_heads / args.heads.num_kv_heads;
    CINNABAR_ASSIGN_OR_RETURN(Geometry * geometry, geometries_.Of(args.sequences, 0, steps_));
    CINNABAR_CHECK(args.window >= 0) << "a window of " << args.window;
    CINNABAR_ASSIGN_OR_RETURN(
        const Geometry::Tiles* tiles,
        geometries_.TilesOf(geometry, args.sequences, group, args.window, steps_));
    CINNABAR_CHECK(geometry->keys_max <= std::max(shape_.positions_max, 1))
        << geometry->keys_max << " keys are more than was reserved";
    AttendTask task;
    task.q = ViewOf(args.q);
    task.num_heads = args.heads.num_heads;
    task.num_kv_heads = args.heads.num_kv_heads;
    task.head_dim = args.heads.head_dim;
    task.scale = args.scale;
    task.rows = geometry->rows;
    task.spans = geometry->spans;
    task.layer = args.layer;
    task.head_stride = HeadStride(args.heads.head_dim);
    task.window = args.window;
    task.out = ViewOf(args.out);
    task.chunk_sums = At<float>(layout_.chunk_sums);
    task.chunk_totals = At<float>(layout_.chunk_totals);
    const bool tensor =
        options_.activation == DType::kBf16 && args.heads.head_dim <= kAttendTensorDim;
    for (const AttendGroup& part :
         AttendGroups(args.sequences, tiles->host, group, layout_.chunk_parts)) {
      task.row_base = part.row_begin;
      task.num_rows = part.num_rows;
      task.tiles = tiles->device + part.tile_begin;
      task.num_tiles = part.num_tiles;
      task.num_chunks = part.num_chunks;
      CINNABAR_RETURN_IF_ERROR(
          steps_.Note(tensor ? LaunchAttendTensor(task, stream_) : LaunchAttendPlain(task, stream_),
                      "attention"));
    }
    return absl::OkStatus();
  }

  absl::Status Route(const RouteArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_CHECK(args.experts_per_row > 0 && args.experts_per_row <= kExpertsPerRowMax &&
                   args.num_experts % args.num_groups == 0 && args.groups_kept > 0 &&
                   args.groups_kept <= args.num_groups &&
                   args.experts_per_row <= args.num_experts / args.num_groups * args.groups_kept);
    CINNABAR_CHECK(args.num_experts <= 1024) << args.num_experts << " experts";
    if (args.num_rows == 0) return absl::OkStatus();
    RouteTask task;
    task.logits = ViewOf(args.logits);
    task.num_rows = static_cast<int32_t>(args.num_rows);
    task.num_experts = args.num_experts;
    task.experts_per_row = args.experts_per_row;
    task.softmax = args.score == RouterScore::kSoftmax;
    task.bias = args.bias;
    task.bias_counts = args.bias_counts;
    task.num_groups = args.num_groups;
    task.groups_kept = args.groups_kept;
    task.renormalize = args.renormalize;
    task.scale = args.scale;
    task.expert_scales = args.expert_scales;
    task.experts = args.experts;
    task.weights = args.weights;
    return steps_.Note(LaunchRoute(task, stream_), "routing");
  }

  absl::Status Experts(const ExpertsArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    const auto num_experts = static_cast<int32_t>(args.gate_up.size());
    const int64_t dim = args.down[0]->rows();
    const int64_t mlp_dim = args.down[0]->cols();
    CINNABAR_CHECK(num_experts <= shape_.num_experts && args.num_rows <= shape_.rows_max &&
                   args.experts_per_row <= shape_.experts_per_row && dim <= shape_.expert_dim &&
                   mlp_dim <= shape_.expert_mlp_dim)
        << "more experts than were reserved";
    if (args.num_rows == 0) return absl::OkStatus();
    const int64_t num_places = args.num_rows * args.experts_per_row;
    CINNABAR_ASSIGN_OR_RETURN(const void* const* gate_up, expert_tables_.Of(args.gate_up, steps_));
    CINNABAR_ASSIGN_OR_RETURN(const void* const* down, expert_tables_.Of(args.down, steps_));

    ExpertLinearTask linear;
    linear.x = ViewOf(args.x);
    linear.weight = CommonView(args.gate_up);
    const bool tensor =
        UsesTensorCores(linear.x, linear.weight) && ForTensorCores(CommonView(args.down).element);
    if (!tensor) linear.weight.segment_bytes = 0;

    GroupTask group;
    group.experts = args.experts;
    group.num_places = static_cast<int32_t>(num_places);
    group.num_experts = num_experts;
    group.tile_rows = tensor
                          ? TileRows(std::max<int64_t>(1, num_places / num_experts), /*fp8=*/false)
                          : kPlainRows;
    group.begins = At<int32_t>(layout_.expert_begins);
    group.tile_begins = At<int32_t>(layout_.expert_tile_begins);
    group.places = At<int32_t>(layout_.expert_places);
    group.where = At<int32_t>(layout_.expert_where);
    CINNABAR_RETURN_IF_ERROR(steps_.Note(LaunchGroup(group, stream_), "group rows by expert"));

    linear.x_by_place = true;
    linear.experts_per_row = args.experts_per_row;
    linear.weights = gate_up;
    linear.num_experts = num_experts;
    linear.begins = group.begins;
    linear.tile_begins = group.tile_begins;
    linear.places = group.places;
    linear.num_tiles_max =
        static_cast<int32_t>(std::min(num_places, num_places / group.tile_rows + num_experts));
    linear.tile_rows = group.tile_rows;
    linear.finish = FinishOf(args.activation);
    linear.out = {At<void>(layout_.expert_inner), RoundUp(mlp_dim, 64), linear.x.element};
    linear.num_outputs = static_cast<int32_t>(mlp_dim);
    CINNABAR_RETURN_IF_ERROR(
        steps_.Note(LaunchExpertLinear(linear, stream_), "experts' gate and up"));

    linear.x = linear.out;
    linear.x_by_place = false;
    linear.weights = down;
    linear.weight = CommonView(args.down);
    if (!tensor) linear.weight.segment_bytes = 0;
    linear.finish = Finish::kStore;
    linear.out = {At<void>(layout_.expert_outputs), RoundUp(dim, 64), Element::kF32};
    linear.num_outputs = static_cast<int32_t>(dim);
    CINNABAR_RETURN_IF_ERROR(steps_.Note(LaunchExpertLinear(linear, stream_), "experts' down"));

    CombineTask combine;
    combine.add = args.add;
    combine.outputs = At<float>(layout_.expert_outputs);
    combine.stride = linear.out.stride;
    combine.where = group.where;
    combine.weights = args.weights;
    combine.num_rows = static_cast<int32_t>(args.num_rows);
    combine.experts_per_row = args.experts_per_row;
    combine.dim = static_cast<int32_t>(dim);
    combine.out = ViewOf(args.out);
    return steps_.Note(LaunchCombine(combine, stream_), "sum of the experts");
  }

  absl::Status SoftEmbed(const SoftEmbedArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    const auto& weight = dynamic_cast<const CudaWeight&>(*args.weight);
    const auto& table = dynamic_cast<const CudaWeight&>(*args.table);
    CINNABAR_CHECK(args.num_rows <= shape_.soft_rows_max && weight.cols() <= shape_.cols_max &&
                   weight.rows() <= shape_.vocabulary)
        << "more rows than were reserved";
    CINNABAR_CHECK(table.rows() == weight.rows() && table.cols() == weight.cols());
    CINNABAR_CHECK(args.temperature > 1e-30F) << args.temperature;
    if (args.num_rows == 0) return absl::OkStatus();
    SoftEmbedTask task;
    task.hidden = ViewOf(args.hidden);
    task.num_rows = static_cast<int32_t>(args.num_rows);
    task.weight = weight.view();
    if (!UsesTensorCores(task.hidden, task.weight)) task.weight.segment_bytes = 0;
    task.cap = args.logit_cap;
    task.exponent_scale = ExponentScale(args.temperature);
    task.temperature = args.temperature;
    task.table = table.view().data;
    task.table_element = table.view().element;
    task.table_row_bytes = table.view().row_bytes;
    task.dim = static_cast<int32_t>(table.cols());
    task.scale = args.scale;
    task.out = ViewOf(args.out);
    task.num_parts = SoftParts(weight.rows());
    task.logits = At<float>(layout_.soft_logits);
    if (options_.activation == DType::kBf16 && task.table_element == Element::kBf16) {
      task.probabilities = At<uint16_t>(layout_.soft_probabilities);
    }
    task.tops = At<float>(layout_.soft_tops);
    task.masses = At<float>(layout_.soft_masses);
    task.factors = At<float>(layout_.soft_factors);
    task.sums = At<float>(layout_.soft_sums);
    steps_.CountChoice(task.num_rows <= 32 ? 1 : 2);
    return steps_.Note(LaunchSoftEmbed(task, stream_), "soft embedding");
  }

  absl::Status AnswerVocabulary(const VocabularyArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_CHECK(args.answers.size() == args.queries.size());
    if (args.queries.empty()) return absl::OkStatus();
    const auto& weight = dynamic_cast<const CudaWeight&>(*args.weight);
    CINNABAR_CHECK(weight.rows() <= shape_.vocabulary && weight.cols() <= shape_.cols_max &&
                   static_cast<int64_t>(args.queries.size()) <= shape_.queries_max)
        << "more of a vocabulary than was reserved";
    CINNABAR_RETURN_IF_ERROR(steps_.MakeRoomForAnswers());
    std::vector<int32_t> fused, whole;
    for (size_t i = 0; i < args.queries.size(); ++i) {
      const VocabularyQuery& query = args.queries[i];
      CheckQuery(query, weight.rows());
      CINNABAR_CHECK(args.logit_cap == 0.0F ||
                     (args.bias == nullptr && query.unconditional_row < 0))
          << "a cap goes with neither bias nor guidance";
      CINNABAR_CHECK(!query.want_top || !IsFiltered(query)) << "want_top does not go with filters";
      (NeedsWholeRow(query) ? whole : fused).push_back(static_cast<int32_t>(i));
    }
    CINNABAR_RETURN_IF_ERROR(AnswerFused(args, weight, fused));
    CINNABAR_RETURN_IF_ERROR(AnswerWhole(args, weight, whole, fused.size()));
    std::vector<int32_t> order = std::move(fused);
    order.insert(order.end(), whole.begin(), whole.end());
    device_answers_.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) device_answers_[order[i]] = static_cast<int32_t>(i);
    return steps_.BringAnswers(At<DeviceAnswer>(layout_.answers), std::move(order), args.answers);
  }

  absl::Status SelectTransfers(const SelectTransfersArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_CHECK(args.chosen.size() == args.known.size() &&
                   static_cast<int64_t>(args.known.size()) <= shape_.rows_max)
        << args.known.size() << " ids are more than were reserved";
    if (args.known.empty()) return absl::OkStatus();
    CINNABAR_RETURN_IF_ERROR(steps_.MakeRoomForIds());
    std::vector<DeviceCandidate> candidates;
    candidates.reserve(args.candidates.size());
    for (const TransferCandidate& candidate : args.candidates) {
      CINNABAR_CHECK(candidate.target >= 0 &&
                     candidate.target < static_cast<int64_t>(args.known.size()))
          << "target " << candidate.target;
      candidates.push_back({device_answers_.at(candidate.answer), candidate.target});
    }
    std::vector<DeviceSelection> selections;
    selections.reserve(args.selections.size());
    for (const TransferSelection& selection : args.selections) {
      selections.push_back({selection.candidates_begin, selection.candidates_end,
                            ScoreOf(selection.rule.score), selection.rule.count,
                            selection.rule.threshold, selection.rule.inclusive ? 1 : 0});
    }
    CINNABAR_RETURN_IF_ERROR(steps_.MakeRoom(StagedBytesOf(args.known) +
                                             StagedBytesOf(absl::MakeConstSpan(candidates)) +
                                             StagedBytesOf(absl::MakeConstSpan(selections))));
    const auto bytes = static_cast<int64_t>(args.known.size() * sizeof(int32_t));
    CINNABAR_ASSIGN_OR_RETURN(const int32_t* const known, steps_.Stage(args.known));
    CINNABAR_RETURN_IF_ERROR(
        steps_.Note(CopyOnDevice(args.ids, known, bytes, stream_), "copy ids"));
    TransferTask task;
    task.answers = At<DeviceAnswer>(layout_.answers);
    CINNABAR_ASSIGN_OR_RETURN(task.candidates, steps_.Stage(absl::MakeConstSpan(candidates)));
    CINNABAR_ASSIGN_OR_RETURN(task.selections, steps_.Stage(absl::MakeConstSpan(selections)));
    task.num_selections = static_cast<int32_t>(selections.size());
    task.ids = args.ids;
    if (task.num_selections > 0) {
      CINNABAR_RETURN_IF_ERROR(steps_.Note(LaunchTransfers(task, stream_), "select transfers"));
    }
    return steps_.BringIds(args.ids, args.chosen);
  }

  void UseGraphs(bool use) override { steps_.UseGraphs(use); }
  absl::Status BeginStep() override { return steps_.BeginStep(); }
  absl::Status EndStep() override { return steps_.EndStep(); }
  absl::Status WaitStep() override { return steps_.WaitStep(); }
  absl::Status Synchronize() override { return steps_.Synchronize(); }

 private:
  // --- Memory

  WorkspaceFacts workspace_facts() const {
    return {.num_multiprocessors = facts_.num_multiprocessors, .fp8 = options_.fp8};
  }

  absl::Status TakeWorkspace(const WorkspaceShape& shape, int64_t staged_bytes) {
    WorkspaceLayout layout;
    if (staged_bytes > 0) {
      layout.staged_bytes = layout.total_bytes = staged_bytes;
    } else {
      layout = LayOutWorkspace(shape, workspace_facts());
    }
    if (workspace_ != nullptr && layout.total_bytes <= layout_.total_bytes &&
        layout.staged_bytes <= layout_.staged_bytes &&
        std::memcmp(&layout, &layout_, sizeof(layout)) == 0) {
      return absl::OkStatus();
    }
    // The old one goes first: both may not fit.
    workspace_.reset();
    layout_ = WorkspaceLayout();
    CINNABAR_ASSIGN_OR_RETURN(workspace_, TakeDeviceMemory(layout.total_bytes), "workspace");
    CINNABAR_RETURN_IF_ERROR(steps_.TakeMemory({.staged = At<char>(layout.staged),
                                                .staged_bytes = layout.staged_bytes,
                                                .answers_max = shape.queries_max,
                                                .ids_max = shape.rows_max}));
    layout_ = layout;
    shape_ = shape;
    // Tickets begin at 0, and every product leaves them so.
    if (layout.num_tickets == 0) return absl::OkStatus();
    return steps_.Note(ClearAsync(At<void>(layout.tickets), layout.num_tickets * 4, stream_),
                       "clear the workspace");
  }

  template <typename T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(workspace_.get()) + offset);
  }

  // --- Weights

  absl::StatusOr<std::unique_ptr<Weight>> Load(absl::Span<const HostMatrix> parts,
                                               RowOrder row_order, DType dtype, bool fp8,
                                               bool tiled) {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    CINNABAR_RETURN_IF_ERROR(steps_.RunCaptured());
    WeightForm form;
    form.dtype = dtype;
    form.mixed_gate_up = options_.activation;  // as their products read them
    form.fp8 = fp8;
    form.tiled = tiled;
    return weights_.Load(parts, row_order, form, stream_, steps_.errors());
  }

  // --- Products

  absl::Status Product(const LinearArgs& args, float cap) {
    CINNABAR_RETURN_IF_ERROR(steps_.Ready());
    const auto& weight = dynamic_cast<const CudaWeight&>(*args.weight);
    const bool paired = weight.row_order() == RowOrder::kGatedPairs;
    CINNABAR_CHECK(paired ==
                   (args.epilogue == Epilogue::kSwiGlu || args.epilogue == Epilogue::kGeGlu))
        << "gated pairs go with kSwiGlu and kGeGlu alone";
    CINNABAR_CHECK(args.num_rows * weight.cols() <= shape_.rows_max * shape_.cols_max)
        << args.num_rows << " x " << weight.cols() << " is more than was reserved";
    if (args.num_rows == 0) return absl::OkStatus();
    LinearTask task;
    task.x = ViewOf(args.x);
    task.num_rows = static_cast<int32_t>(args.num_rows);
    task.bias = args.bias;
    task.finish = FinishOf(args.epilogue);
    task.cap = cap;
    task.out = ViewOf(args.out);
    if (args.epilogue == Epilogue::kGatedAdd) {
      task.gate = ViewOf(args.gate);
      CINNABAR_ASSIGN_OR_RETURN(const Geometry* geometry,
                                geometries_.Of(args.sequences, 0, steps_));
      CINNABAR_CHECK(geometry->num_rows >= args.num_rows) << "rows belong to no sequence";
      task.rows = geometry->rows;
    }
    for (const CudaWeight::Piece& piece : weight.pieces()) {
      task.weight = piece.view;
      task.num_outputs = paired ? static_cast<int32_t>(weight.rows() / 2) : piece.view.rows;
      CINNABAR_RETURN_IF_ERROR(Multiply(task));
      if (task.bias != nullptr) task.bias += task.num_outputs;
      task.out = After(task.out, task.num_outputs);
      task.gate = After(task.gate, task.num_outputs);
    }
    return absl::OkStatus();
  }

  // Rounds the rows of *x that a product reads to FP8.
  absl::Status Quantize(MatrixView* x, const int32_t** x_index, int32_t num_rows, int32_t cols,
                        const float** scales) {
    QuantizeTask task;
    task.x = *x;
    task.x_index = *x_index;
    task.num_rows = num_rows;
    task.cols = cols;
    task.out = At<uint8_t>(layout_.quantized);
    task.out_stride = RoundUp(cols, 16);
    task.scales = At<float>(layout_.quantized_scales);
    *x = {task.out, task.out_stride, Element::kE4m3};
    *x_index = nullptr;
    *scales = task.scales;
    return steps_.Note(LaunchQuantize(task, stream_), "round rows to FP8");
  }

  // Fills in how a product runs, and runs it.
  absl::Status Multiply(LinearTask task) {
    if (task.weight.element == Element::kE4m3) {
      CINNABAR_RETURN_IF_ERROR(
          Quantize(&task.x, &task.x_index, task.num_rows, task.weight.cols, &task.x_scales));
    } else if (!UsesTensorCores(task.x, task.weight)) {
      task.weight.segment_bytes = 0;
      task.weight.num_segments = 1;
      task.tile_rows = kPlainRows;
      return steps_.Note(LaunchLinear(task, stream_), "matrix product");
    }
    const ProductPlan plan =
        PlanProduct(task.num_rows, task.weight, facts_.num_multiprocessors, layout_);
    task.tile_rows = plan.tile_rows;
    task.split = plan.split;
    task.partials = At<float>(layout_.partials);
    task.tickets = At<int32_t>(layout_.tickets);
    steps_.CountChoice(task.tile_rows);
    return steps_.Note(LaunchLinear(task, stream_), "matrix product");
  }

  // --- Vocabulary

  absl::Status AnswerFused(const VocabularyArgs& args, const CudaWeight& weight,
                           absl::Span<const int32_t> indices) {
    for (size_t begin = 0; begin < indices.size(); begin += layout_.group_queries) {
      QueryBatch batch;
      for (const int32_t index : indices.subspan(begin, layout_.group_queries)) {
        batch.Add(args.queries[index], weight.rows());
      }
      CINNABAR_RETURN_IF_ERROR(steps_.MakeRoom(batch.staged_bytes()));
      VocabularyTask task;
      task.hidden = ViewOf(args.hidden);
      task.num_slots = static_cast<int32_t>(batch.slot_rows.size());
      task.weight = weight.view();
      task.bias = args.bias;
      task.cap = args.logit_cap;
      task.num_queries = static_cast<int32_t>(batch.queries.size());
      task.summaries = At<ChunkSummary>(layout_.summaries);
      task.answers = At<DeviceAnswer>(layout_.answers) + begin;
      CINNABAR_ASSIGN_OR_RETURN(task.slot_rows, steps_.Stage(absl::MakeConstSpan(batch.slot_rows)));
      CINNABAR_ASSIGN_OR_RETURN(task.slot_queries,
                                steps_.Stage(absl::MakeConstSpan(batch.slot_queries)));
      CINNABAR_ASSIGN_OR_RETURN(task.queries, steps_.Stage(absl::MakeConstSpan(batch.queries)));
      CINNABAR_ASSIGN_OR_RETURN(task.rules, steps_.Stage(absl::MakeConstSpan(batch.rules)));
      if (task.weight.element == Element::kE4m3) {
        CINNABAR_RETURN_IF_ERROR(Quantize(&task.hidden, &task.slot_rows, task.num_slots,
                                          task.weight.cols, &task.x_scales));
      } else if (!UsesTensorCores(task.hidden, task.weight)) {
        task.weight.segment_bytes = 0;
        task.weight.num_segments = 1;
      }
      task.tile_rows = VocabularyTileRows(
          task.num_slots, task.weight.element == Element::kE4m3 && !task.weight.tiled);
      steps_.CountChoice(task.tile_rows);
      CINNABAR_RETURN_IF_ERROR(steps_.Note(LaunchVocabulary(task, stream_), "vocabulary head"));
    }
    return absl::OkStatus();
  }

  absl::Status AnswerWhole(const VocabularyArgs& args, const CudaWeight& weight,
                           absl::Span<const int32_t> indices, size_t answers_begin) {
    size_t next = 0;
    while (next < indices.size()) {
      QueryBatch batch;
      const size_t begin = next;
      for (; next < indices.size(); ++next) {
        const VocabularyQuery& query = args.queries[indices[next]];
        if (batch.SlotsWith(query) > static_cast<size_t>(layout_.whole_rows)) break;
        batch.Add(query, weight.rows());
      }
      CINNABAR_RETURN_IF_ERROR(steps_.MakeRoom(batch.staged_bytes()));
      LinearTask linear;
      linear.x = ViewOf(args.hidden);
      linear.num_rows = static_cast<int32_t>(batch.slot_rows.size());
      linear.weight = weight.view();
      linear.bias = args.bias;
      linear.cap = args.logit_cap;
      linear.out = {At<void>(layout_.whole_logits), RoundUp(weight.rows(), 4), Element::kF32};
      linear.num_outputs = static_cast<int32_t>(weight.rows());
      CINNABAR_ASSIGN_OR_RETURN(linear.x_index, steps_.Stage(absl::MakeConstSpan(batch.slot_rows)));
      SelectTask task;
      task.logits = At<float>(layout_.whole_logits);
      task.stride = linear.out.stride;
      task.vocabulary = linear.num_outputs;
      task.num_queries = static_cast<int32_t>(batch.queries.size());
      task.answers = At<DeviceAnswer>(layout_.answers) + answers_begin + begin;
      CINNABAR_ASSIGN_OR_RETURN(task.queries, steps_.Stage(absl::MakeConstSpan(batch.queries)));
      CINNABAR_ASSIGN_OR_RETURN(task.rules, steps_.Stage(absl::MakeConstSpan(batch.rules)));
      CINNABAR_RETURN_IF_ERROR(Multiply(linear));
      CINNABAR_RETURN_IF_ERROR(steps_.Note(LaunchSelect(task, stream_), "filters"));
    }
    return absl::OkStatus();
  }

  const BackendOptions options_;
  const DeviceFacts facts_;
  void* const stream_;  // that of steps_
  const bool wgmma_;    // weights of bf16 and FP8 lie tiled, and their products are made of it

  std::shared_ptr<Pools> pools_;
  WeightLoader weights_;
  WorkspaceShape shape_;
  WorkspaceLayout layout_;
  DeviceMemory workspace_;
  Geometries geometries_;
  ExpertTables expert_tables_;
  // Of the last AnswerVocabulary(): where each query's answer lies on the device.
  std::vector<int32_t> device_answers_;
  // Goes first, and waits: what is above it may be in use until then.
  Steps steps_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const BackendOptions& options) {
  if (options.activation != DType::kBf16 && options.activation != DType::kF32) {
    return absl::InvalidArgumentError(absl::StrCat("activations in ", NameOf(options.activation),
                                                   ": take BF16, or F32 to compare"));
  }
  int num_devices = 0;
  const int error = CountDevices(&num_devices);
  if (error != kSuccess || num_devices == 0) return StatusOfNoDevice(error);
  if (options.device < 0 || options.device >= num_devices) {
    return absl::UnavailableError(absl::StrCat("device ", options.device, ": the driver shows ",
                                               num_devices, ", numbered from 0"));
  }
  DeviceFacts facts;
  CINNABAR_RETURN_IF_ERROR(StatusOfError(OpenDevice(options.device, &facts),
                                         absl::StrCat("open CUDA device ", options.device)));
  if (facts.compute_capability < 80) {
    return absl::UnimplementedError(absl::StrCat(facts.name, " is sm_", facts.compute_capability,
                                                 "; this build needs sm_80 or newer"));
  }
  if (options.fp8 && facts.compute_capability < 89) {
    return absl::UnimplementedError(absl::StrCat(facts.name, " is sm_", facts.compute_capability,
                                                 "; FP8 products need sm_89 or newer"));
  }
  if (options.products == Products::kWgmma && facts.compute_capability != 90) {
    return absl::UnimplementedError(
        absl::StrCat(facts.name, " is sm_", facts.compute_capability,
                     "; products by wgmma need sm_90 (H100, H200): take mma, or auto"));
  }
  void* stream = nullptr;
  CINNABAR_RETURN_IF_ERROR(StatusOfError(CreateStream(&stream), "make a stream"));
  auto backend = std::make_unique<CudaBackend>(options, facts, Stream(stream));
  CINNABAR_RETURN_IF_ERROR(backend->Start());
  return backend;
}

}  // namespace cinnabar::cuda
