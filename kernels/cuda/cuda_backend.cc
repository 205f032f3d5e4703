#include "kernels/cuda/cuda_backend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/blocks.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/math.h"
#include "kernels/cuda/page_pool.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/runtime.h"
#include "kernels/quantized.h"

namespace cinnabar::cuda {
namespace {

constexpr double kLog2E = 1.44269504088896340735992468100;
// Before Reserve(): enough for loading.
constexpr int64_t kStagedBytesAtFirst = 64 << 10;
constexpr int64_t kSlabBytes = int64_t{32} << 20;
constexpr int64_t kTableSlabBytes = int64_t{256} << 10;
// Graphs that are kept: the ladder of row counts, by what else changes a step's shape.
constexpr size_t kGraphsMax = 64;
constexpr size_t kExpertTablesMax = 4096;

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

class CudaBuffer : public Buffer {
 public:
  CudaBuffer(DeviceMemory memory, int64_t size_bytes)
      : Buffer(memory.get(), size_bytes), memory_(std::move(memory)) {}

 private:
  DeviceMemory memory_;
};

class CudaWeight : public Weight {
 public:
  // Consecutive rows of one kind.
  struct Piece {
    WeightView view;
    DeviceMemory memory;
    DeviceMemory scales;
    int64_t bytes = 0;
  };
  CudaWeight(int64_t rows, int64_t cols, RowOrder row_order, DType dtype, std::vector<Piece> pieces)
      : Weight(rows, cols, row_order, dtype), pieces_(std::move(pieces)) {}
  int64_t memory_bytes() const override {
    int64_t bytes = 0;
    for (const Piece& piece : pieces_) bytes += piece.bytes;
    return bytes;
  }
  // Several only where parts of different block formats are stacked.
  const std::vector<Piece>& pieces() const { return pieces_; }
  const WeightView& view() const {
    CINNABAR_CHECK(pieces_.size() == 1) << "a weight of several block formats";
    return pieces_[0].view;
  }

 private:
  std::vector<Piece> pieces_;
};

// Pools of pages by their size; shared with the sequences, which may go last.
class Pools {
 public:
  PagePool& Of(int64_t page_bytes, int64_t slab_bytes) {
    std::unique_ptr<PagePool>& pool = pools_[page_bytes];
    if (pool == nullptr) {
      pool = std::make_unique<PagePool>(
          page_bytes, std::max<int64_t>(1, slab_bytes / page_bytes),
          PagePool::Memory{[](int64_t bytes) -> absl::StatusOr<void*> {
                             CINNABAR_ASSIGN_OR_RETURN(DeviceMemory memory,
                                                       TakeDeviceMemory(bytes));
                             return memory.release();
                           },
                           [](void* memory) { FreeDevice(memory); }});
    }
    return *pool;
  }

 private:
  std::map<int64_t, std::unique_ptr<PagePool>> pools_;
};

class PagedKv : public KvMemory {
 public:
  PagedKv(const KvShape& shape, const KvLayout& layout, std::shared_ptr<Pools> pools,
          std::vector<void*> pages, std::vector<void*> table)
      : shape_(shape),
        layout_(layout),
        pools_(std::move(pools)),
        pages_(std::move(pages)),
        table_(std::move(table)) {}
  // What is enqueued may still read the pages: whoever gets them next writes later on the same
  // stream.
  ~PagedKv() override {
    const absl::Span<void* const> pages = pages_;
    pools_->Of(layout_.page_bytes, kSlabBytes).Give(pages.first(layout_.num_pages));
    if (layout_.num_other_pages > 0) {
      pools_->Of(layout_.other_page_bytes, kSlabBytes).Give(pages.subspan(layout_.num_pages));
    }
    pools_->Of(layout_.table_bytes, kTableSlabBytes).Give(table_);
  }
  int64_t memory_bytes() const override { return layout_.total_bytes; }
  const KvShape& shape() const { return shape_; }
  const KvLayout& layout() const { return layout_; }
  bool one_layer() const { return shape_.num_layers == 1 && shape_.num_other_layers == 0; }
  void* const* device_table() const { return static_cast<void* const*>(table_[0]); }
  void* page(int32_t layer, int32_t index) const {
    return pages_[layer * layout_.pages_per_layer + index];
  }

 private:
  KvShape shape_;
  KvLayout layout_;
  std::shared_ptr<Pools> pools_;
  std::vector<void*> pages_;
  std::vector<void*> table_;
};

// What the device knows of the sequences that an op names. Made when a span of sequences is first
// seen in a step; the contract keeps it alive and unchanged until Synchronize().
struct Geometry {
  absl::Span<const SequenceSpan> sequences;
  int64_t num_rows = 0;
  const RowFacts* rows = nullptr;
  const SpanFacts* spans = nullptr;
  int32_t keys_max = 0;
  // Attention tiles by the number of query heads a kv head, and the window.
  struct Tiles {
    std::vector<AttendTile> host;
    const AttendTile* device = nullptr;
  };
  std::map<std::pair<int32_t, int32_t>, Tiles> tiles;
};

// What the host keeps of a step until it was waited for. There are two, in turns: one may be under
// way while the next is enqueued.
struct Step {
  PinnedMemory staged;
  Staging staging;  // on the device both have one area, which copies reach in stream order
  // Answers and chosen ids, as they come from the device, and where they go.
  PinnedMemory results;
  std::vector<int32_t> pending;  // queries in the order of their device answers
  absl::Span<VocabularyAnswer> answers;
  absl::Span<int32_t> chosen;
  void* begins = nullptr;  // events; these two are timed
  void* ends = nullptr;
  void* leaves = nullptr;  // nothing staged here is read behind it
  bool timed = false;      // `begins` has been recorded
  bool under_way = false;  // it has ended (`ends` has been recorded), and was not waited for
};

// Device pointers of one layer's experts.
struct ExpertTable {
  std::vector<const void*> host;
  DeviceMemory device;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const BackendOptions& options, const DeviceFacts& facts, void* stream)
      : options_(options),
        facts_(facts),
        stream_(stream),
        wgmma_(options.products == Products::kWgmma && options.activation == DType::kBf16),
        pools_(std::make_shared<Pools>()) {}

  ~CudaBackend() override {
    (void)UseDevice(options_.device);
    if (capturing_) (void)RunCaptured();
    (void)SynchronizeStream(stream_);
    for (const auto& [key, executable] : graphs_) DestroyExecutable(executable);
    for (const Step& step : steps_) {
      for (void* event : {step.begins, step.ends, step.leaves}) {
        if (event != nullptr) DestroyEvent(event);
      }
    }
    DestroyStream(stream_);
  }

  absl::Status Start() {
    for (Step& step : steps_) {
      CINNABAR_RETURN_IF_ERROR(Note(CreateEvent(/*timed=*/true, &step.begins), "make an event"));
      CINNABAR_RETURN_IF_ERROR(Note(CreateEvent(/*timed=*/true, &step.ends), "make an event"));
      CINNABAR_RETURN_IF_ERROR(Note(CreateEvent(/*timed=*/false, &step.leaves), "make an event"));
    }
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
    stats.busy_seconds = busy_seconds_;
    stats.graph_hits = graph_hits_;
    stats.graph_misses = graph_misses_;
    return stats;
  }

  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    CINNABAR_ASSIGN_OR_RETURN(DeviceMemory memory, TakeDeviceMemory(size_bytes));
    CINNABAR_RETURN_IF_ERROR(
        Note(ClearAsync(memory.get(), std::max<int64_t>(size_bytes, 1), stream_), "clear memory"));
    return std::make_unique<CudaBuffer>(std::move(memory), size_bytes);
  }

  absl::StatusOr<std::unique_ptr<KvMemory>> AllocateKv(const KvShape& shape) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    const KvLayout layout = LayOutKv(shape, options_.activation);
    PagePool& pages_pool = pools_->Of(layout.page_bytes, kSlabBytes);
    CINNABAR_ASSIGN_OR_RETURN(std::vector<void*> pages, pages_pool.Take(layout.num_pages),
                              "take the pages of a sequence");
    absl::StatusOr<std::vector<void*>> others = std::vector<void*>();
    if (layout.num_other_pages > 0) {
      others = pools_->Of(layout.other_page_bytes, kSlabBytes).Take(layout.num_other_pages);
    }
    if (!others.ok()) {
      pages_pool.Give(pages);
      return others.status();
    }
    absl::StatusOr<std::vector<void*>> table =
        pools_->Of(layout.table_bytes, kTableSlabBytes).Take(1);
    if (!table.ok()) {
      pages_pool.Give(pages);
      if (!others->empty()) pools_->Of(layout.other_page_bytes, kSlabBytes).Give(*others);
      return table.status();
    }
    pages.insert(pages.end(), others->begin(), others->end());
    const auto num_pages = static_cast<int64_t>(pages.size());
    // In pieces: a table may be longer than what is staged at a time.
    constexpr int64_t kPiece = 4096;
    absl::Status copied = absl::OkStatus();
    for (int64_t begin = 0; copied.ok() && begin < num_pages; begin += kPiece) {
      const int64_t count = std::min(kPiece, num_pages - begin);
      copied = CopyThroughStaging(pages.data() + begin, count * 8,
                                  static_cast<void**>((*table)[0]) + begin);
    }
    auto kv = std::make_unique<PagedKv>(shape, layout, pools_, std::move(pages), *std::move(table));
    if (!copied.ok()) return copied;
    return kv;
  }
  // Whole pages: what lies behind the positions in the last one is written before it is read.
  absl::Status CopyKv(const KvMemory& from, int32_t num_positions, KvMemory& to) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
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
        CINNABAR_RETURN_IF_ERROR(
            Note(CopyOnDevice(target.page(layer, page), source.page(layer, page), bytes, stream_),
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
    return Load(parts, row_order, dtype, fp8, wgmma_);
  }
  int64_t WeightBytes(DType dtype, int64_t rows, int64_t cols) const override {
    return rows * RowBytes(ElementOf(dtype), cols);
  }
  absl::StatusOr<std::unique_ptr<Weight>> MapWeight(absl::Span<const HostMatrix> parts,
                                                    RowOrder row_order) override {
    return Load(parts, row_order, parts[0].dtype, /*fp8=*/false, wgmma_);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadEmbedding(const HostMatrix& table) override {
    return Load({&table, 1}, RowOrder::kStacked, table.dtype, /*fp8=*/false, /*tile=*/false);
  }

  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(const HostMatrix& vector) override {
    const int64_t size = vector.rows * vector.cols;
    CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Buffer> buffer, Allocate(size * 4));
    std::vector<float> values;  // of blocks
    const void* data = vector.data;
    Element element = ElementOf(vector.dtype);
    if (IsBlocks(element)) {
      values.resize(size);
      ReadRow({vector.data, vector.dtype, 1, size}, 0, absl::MakeSpan(values));
      data = values.data();
      element = Element::kF32;
    }
    CINNABAR_RETURN_IF_ERROR(Remember(loader_.Load(
        buffer->data(), size, 4,
        [&](int64_t begin, int64_t count, char* to) {
          ConvertHost(static_cast<const char*>(data) + begin * BytesOf(element), element, count,
                      Element::kF32, 1.0F, to);
        },
        stream_)));
    return buffer;
  }

  absl::Status Upload(absl::Span<const float> host, void* device) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    const int64_t bytes = static_cast<int64_t>(host.size()) * 4;
    const int64_t piece = layout_.staged_bytes / 2 / 256 * 256;
    for (int64_t begin = 0; begin < bytes; begin += piece) {
      CINNABAR_RETURN_IF_ERROR(
          CopyThroughStaging(reinterpret_cast<const char*>(host.data()) + begin,
                             std::min(piece, bytes - begin), static_cast<char*>(device) + begin));
    }
    return absl::OkStatus();
  }

  absl::Status Download(const void* device, absl::Span<float> host) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    CINNABAR_RETURN_IF_ERROR(
        Note(CopyToHost(host.data(), device, static_cast<int64_t>(host.size()) * 4, stream_),
             "copy to the host"));
    return Synchronize();
  }

  absl::Status Embed(const Weight& table, absl::Span<const int32_t> ids, float scale,
                     const Rows& out) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    for (const int32_t id : ids) CINNABAR_CHECK(id >= 0 && id < table.rows()) << "id " << id;
    CINNABAR_RETURN_IF_ERROR(MakeRoom(StagedBytesOf(ids)));
    CINNABAR_ASSIGN_OR_RETURN(const int32_t* const staged, Stage(ids));
    return EmbedChosen(table, staged, static_cast<int64_t>(ids.size()), scale, out);
  }

  absl::Status EmbedChosen(const Weight& table, const int32_t* ids, int64_t num_rows, float scale,
                           const Rows& out) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
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
    return Note(LaunchEmbed(task, stream_), "embedding");
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
    CINNABAR_RETURN_IF_ERROR(Ready());
    if (args.num_rows == 0) return absl::OkStatus();
    NormTask task;
    if (args.scales != nullptr) {
      CINNABAR_ASSIGN_OR_RETURN(const Geometry* geometry,
                                GeometryOf(args.sequences, StagedBytesOf(args.row_indices)));
      CINNABAR_CHECK(geometry->num_rows >= args.num_rows) << "rows belong to no sequence";
      task.rows = geometry->rows;
    } else {
      CINNABAR_RETURN_IF_ERROR(MakeRoom(StagedBytesOf(args.row_indices)));
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
    CINNABAR_ASSIGN_OR_RETURN(task.index, Stage(args.row_indices));
    return Note(LaunchNorm(task, stream_), "RMS norm");
  }

  absl::Status LayerNormModulate(const LayerNormModulateArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    if (args.num_rows == 0) return absl::OkStatus();
    CINNABAR_ASSIGN_OR_RETURN(const Geometry* geometry,
                              GeometryOf(args.sequences, StagedBytesOf(args.row_indices)));
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
    CINNABAR_ASSIGN_OR_RETURN(task.index, Stage(args.row_indices));
    return Note(LaunchNorm(task, stream_), "layer norm");
  }

  absl::Status GatherRows(const GatherRowsArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_CHECK(args.x.dtype == args.out.dtype);
    if (args.row_indices.empty()) return absl::OkStatus();
    CINNABAR_RETURN_IF_ERROR(MakeRoom(StagedBytesOf(args.row_indices)));
    GatherTask task;
    task.x = ViewOf(args.x);
    task.dim = static_cast<int32_t>(args.dim);
    CINNABAR_ASSIGN_OR_RETURN(task.index, Stage(args.row_indices));
    task.num_rows = static_cast<int32_t>(args.row_indices.size());
    task.out = ViewOf(args.out);
    return Note(LaunchGather(task, stream_), "gather rows");
  }

  absl::Status PrepareHeads(const PrepareHeadsArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_CHECK(args.rotary.rotary_dim <= args.heads.head_dim);
    CINNABAR_CHECK(args.qkv.dtype == options_.activation) << "keys are kept as the activations are";
    if (args.num_rows == 0) return absl::OkStatus();
    CINNABAR_ASSIGN_OR_RETURN(const Geometry* geometry, GeometryOf(args.sequences, 0));
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
    return Note(LaunchPrepare(task, stream_), "prepare heads");
  }

  absl::Status Attend(const AttendArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_CHECK(args.q.dtype == options_.activation) << "keys are kept as the activations are";
    CINNABAR_CHECK(args.heads.head_dim <= 1024) << "head_dim " << args.heads.head_dim;
    if (args.num_rows == 0) return absl::OkStatus();
    const int32_t group = args.heads.num_heads / args.heads.num_kv_heads;
    CINNABAR_ASSIGN_OR_RETURN(Geometry * geometry, GeometryOf(args.sequences, 0));
    CINNABAR_CHECK(args.window >= 0) << "a window of " << args.window;
    CINNABAR_ASSIGN_OR_RETURN(const Geometry::Tiles* tiles,
                              TilesOf(geometry, args.sequences, group, args.window));
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
          Note(tensor ? LaunchAttendTensor(task, stream_) : LaunchAttendPlain(task, stream_),
               "attention"));
    }
    return absl::OkStatus();
  }

  absl::Status Route(const RouteArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
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
    return Note(LaunchRoute(task, stream_), "routing");
  }

  absl::Status Experts(const ExpertsArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    const auto num_experts = static_cast<int32_t>(args.gate_up.size());
    const int64_t dim = args.down[0]->rows();
    const int64_t mlp_dim = args.down[0]->cols();
    CINNABAR_CHECK(num_experts <= shape_.num_experts && args.num_rows <= shape_.rows_max &&
                   args.experts_per_row <= shape_.experts_per_row && dim <= shape_.expert_dim &&
                   mlp_dim <= shape_.expert_mlp_dim)
        << "more experts than were reserved";
    if (args.num_rows == 0) return absl::OkStatus();
    const int64_t num_places = args.num_rows * args.experts_per_row;
    CINNABAR_ASSIGN_OR_RETURN(const void* const* gate_up, ExpertTableOf(args.gate_up));
    CINNABAR_ASSIGN_OR_RETURN(const void* const* down, ExpertTableOf(args.down));

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
    CINNABAR_RETURN_IF_ERROR(Note(LaunchGroup(group, stream_), "group rows by expert"));

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
    CINNABAR_RETURN_IF_ERROR(Note(LaunchExpertLinear(linear, stream_), "experts' gate and up"));

    linear.x = linear.out;
    linear.x_by_place = false;
    linear.weights = down;
    linear.weight = CommonView(args.down);
    if (!tensor) linear.weight.segment_bytes = 0;
    linear.finish = Finish::kStore;
    linear.out = {At<void>(layout_.expert_outputs), RoundUp(dim, 64), Element::kF32};
    linear.num_outputs = static_cast<int32_t>(dim);
    CINNABAR_RETURN_IF_ERROR(Note(LaunchExpertLinear(linear, stream_), "experts' down"));

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
    return Note(LaunchCombine(combine, stream_), "sum of the experts");
  }

  absl::Status SoftEmbed(const SoftEmbedArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
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
    task.exponent_scale = static_cast<float>(kLog2E / static_cast<double>(args.temperature));
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
    captured_shape_ = captured_shape_ * 31 + (task.num_rows <= 32 ? 1 : 2);
    return Note(LaunchSoftEmbed(task, stream_), "soft embedding");
  }

  absl::Status AnswerVocabulary(const VocabularyArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_CHECK(args.answers.size() == args.queries.size());
    if (args.queries.empty()) return absl::OkStatus();
    const auto& weight = dynamic_cast<const CudaWeight&>(*args.weight);
    CINNABAR_CHECK(weight.rows() <= shape_.vocabulary && weight.cols() <= shape_.cols_max &&
                   static_cast<int64_t>(args.queries.size()) <= shape_.queries_max)
        << "more of a vocabulary than was reserved";
    // The host's copy of the answers holds one call's.
    if (!step().pending.empty()) CINNABAR_RETURN_IF_ERROR(Synchronize());
    std::vector<int32_t> fused, whole;
    for (size_t i = 0; i < args.queries.size(); ++i) {
      const VocabularyQuery& query = args.queries[i];
      CheckQuery(query, weight.rows());
      CINNABAR_CHECK(args.logit_cap == 0.0F ||
                     (args.bias == nullptr && query.unconditional_row < 0))
          << "a cap goes with neither bias nor guidance";
      const bool filtered = query.top_k > 0 || query.top_p < 1.0F;
      CINNABAR_CHECK(!query.want_top || !filtered) << "want_top does not go with filters";
      const bool needs_row = filtered || query.pick == PickRule::kUniformTweedie;
      (needs_row ? whole : fused).push_back(static_cast<int32_t>(i));
    }
    CINNABAR_RETURN_IF_ERROR(AnswerFused(args, weight, fused));
    CINNABAR_RETURN_IF_ERROR(AnswerWhole(args, weight, whole, fused.size()));
    const int64_t bytes = static_cast<int64_t>(args.queries.size() * sizeof(DeviceAnswer));
    CINNABAR_RETURN_IF_ERROR(
        Note(CopyToHost(step().results.get(), At<void>(layout_.answers), bytes, stream_),
             "copy the answers"));
    step().answers = args.answers;
    step().pending = std::move(fused);
    step().pending.insert(step().pending.end(), whole.begin(), whole.end());
    device_answers_.resize(args.queries.size());
    for (size_t i = 0; i < step().pending.size(); ++i) {
      device_answers_[step().pending[i]] = static_cast<int32_t>(i);
    }
    return absl::OkStatus();
  }

  absl::Status SelectTransfers(const SelectTransfersArgs& args) override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_CHECK(args.chosen.size() == args.known.size() &&
                   static_cast<int64_t>(args.known.size()) <= shape_.rows_max)
        << args.known.size() << " ids are more than were reserved";
    if (args.known.empty()) return absl::OkStatus();
    if (!step().chosen.empty()) CINNABAR_RETURN_IF_ERROR(Synchronize());
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
    CINNABAR_RETURN_IF_ERROR(MakeRoom(StagedBytesOf(args.known) +
                                      StagedBytesOf(absl::MakeConstSpan(candidates)) +
                                      StagedBytesOf(absl::MakeConstSpan(selections))));
    const auto bytes = static_cast<int64_t>(args.known.size() * sizeof(int32_t));
    CINNABAR_ASSIGN_OR_RETURN(const int32_t* const known, Stage(args.known));
    CINNABAR_RETURN_IF_ERROR(Note(CopyOnDevice(args.ids, known, bytes, stream_), "copy ids"));
    TransferTask task;
    task.answers = At<DeviceAnswer>(layout_.answers);
    CINNABAR_ASSIGN_OR_RETURN(task.candidates, Stage(absl::MakeConstSpan(candidates)));
    CINNABAR_ASSIGN_OR_RETURN(task.selections, Stage(absl::MakeConstSpan(selections)));
    task.num_selections = static_cast<int32_t>(selections.size());
    task.ids = args.ids;
    if (task.num_selections > 0) {
      CINNABAR_RETURN_IF_ERROR(Note(LaunchTransfers(task, stream_), "select transfers"));
    }
    CINNABAR_RETURN_IF_ERROR(
        Note(CopyToHost(ChosenIds(step()), args.ids, bytes, stream_), "copy the chosen ids"));
    step().chosen = args.chosen;
    return absl::OkStatus();
  }

  void UseGraphs(bool use) override { use_graphs_ = use; }

  absl::Status BeginStep() override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    if (!step().under_way) {
      // What was asked for outside of a step has no end that could be waited for.
      const bool asked = !step().pending.empty() || !step().chosen.empty();
      if (asked) CINNABAR_RETURN_IF_ERROR(Synchronize());
      step().timed = false;
    }
    CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().leaves, stream_), "mark a step"));
    current_ = 1 - current_;
    CINNABAR_CHECK(!step().under_way) << "a third step, before the first was waited for";
    // Long done: it is before the other step, of which the last was waited for.
    CINNABAR_RETURN_IF_ERROR(Note(SynchronizeEvent(step().leaves), "wait for the device"));
    step().staging.Rewind();
    geometries_.clear();
    if (!use_graphs_) return absl::OkStatus();
    CINNABAR_RETURN_IF_ERROR(Note(BeginCapture(stream_), "begin a graph"));
    capturing_ = true;
    captured_calls_ = 0;
    captured_shape_ = 0;
    return absl::OkStatus();
  }

  absl::Status EndStep() override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().ends, stream_), "mark a step"));
    step().under_way = true;
    return absl::OkStatus();
  }

  absl::Status WaitStep() override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    for (Step* step : {&steps_[1 - current_], &steps_[current_]}) {
      if (!step->under_way) continue;
      CINNABAR_RETURN_IF_ERROR(Note(SynchronizeEvent(step->ends), "wait for the device"));
      return Deliver(*step);
    }
    return Synchronize();
  }

  absl::Status Synchronize() override {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    if (step().timed && !step().under_way) {
      CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().ends, stream_), "mark a step"));
    }
    CINNABAR_RETURN_IF_ERROR(Note(SynchronizeStream(stream_), "wait for the device"));
    step().staging.Rewind();
    geometries_.clear();
    for (Step* step : {&steps_[1 - current_], &steps_[current_]}) {
      CINNABAR_RETURN_IF_ERROR(Deliver(*step));
    }
    return absl::OkStatus();
  }

 private:
  // --- Steps

  Step& step() { return steps_[current_]; }
  int32_t* ChosenIds(const Step& step) const {
    return reinterpret_cast<int32_t*>(static_cast<DeviceAnswer*>(step.results.get()) +
                                      shape_.queries_max);
  }

  // Hands out what a step that the device is done with has brought.
  absl::Status Deliver(Step& step) {
    const auto* answers = static_cast<const DeviceAnswer*>(step.results.get());
    for (size_t i = 0; i < step.pending.size(); ++i) {
      VocabularyAnswer& answer = step.answers[step.pending[i]];
      answer.token = answers[i].token;
      answer.token_logit = answers[i].token_logit;
      answer.probability = answers[i].probability;
      answer.margin = answers[i].margin;
      answer.entropy = answers[i].entropy;
      answer.log_sum_exp = answers[i].log_sum_exp;
      answer.finite = answers[i].finite != 0;
      answer.top_token = answers[i].top_token;
      answer.top_probability = answers[i].top_probability;
    }
    std::copy_n(ChosenIds(step), step.chosen.size(), step.chosen.begin());
    if (step.timed) {
      double seconds = 0.0;
      CINNABAR_RETURN_IF_ERROR(
          Note(ElapsedSeconds(step.begins, step.ends, &seconds), "time a step"));
      busy_seconds_ = busy_seconds_ + seconds;
    }
    step.pending.clear();
    step.chosen = {};
    step.timed = step.under_way = false;
    return absl::OkStatus();
  }

  // --- Errors. The first that is not for want of memory stays: the device is not to be trusted
  // after.

  // Every call begins here, for calls may come from different threads.
  absl::Status Ready() {
    if (!broken_.ok()) return broken_;
    return Note(UseDevice(options_.device), "use the device");
  }
  absl::Status Remember(absl::Status status) {
    if (status.code() == absl::StatusCode::kUnavailable && broken_.ok()) broken_ = status;
    return status;
  }
  absl::Status Note(int error, absl::string_view doing) {
    if (error == kSuccess) {
      if (capturing_) ++captured_calls_;
      return absl::OkStatus();
    }
    absl::Status status = StatusOfError(error, doing);
    // A kernel that could not be had for want of memory has not run: nothing after it is right.
    if (broken_.ok()) {
      broken_ = status.code() == absl::StatusCode::kUnavailable
                    ? status
                    : absl::UnavailableError(status.message());
    }
    return broken_;
  }

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
    for (Step& step : steps_) {
      CINNABAR_ASSIGN_OR_RETURN(step.staged, TakePinnedMemory(layout.staged_bytes));
      CINNABAR_ASSIGN_OR_RETURN(
          step.results,
          TakePinnedMemory(shape.queries_max * static_cast<int64_t>(sizeof(DeviceAnswer)) +
                           shape.rows_max * static_cast<int64_t>(sizeof(int32_t))));
      step.staging.Reset(static_cast<char*>(step.staged.get()), At<char>(layout.staged),
                         layout.staged_bytes);
    }
    layout_ = layout;
    shape_ = shape;
    geometries_.clear();
    // Tickets begin at 0, and every product leaves them so.
    if (layout.num_tickets == 0) return absl::OkStatus();
    return Note(ClearAsync(At<void>(layout.tickets), layout.num_tickets * 4, stream_),
                "clear the workspace");
  }

  template <typename T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(workspace_.get()) + offset);
  }

  template <typename T>
  static int64_t StagedBytesOf(absl::Span<const T> values) {
    return RoundUp(static_cast<int64_t>(values.size() * sizeof(T)), 256);
  }

  // Makes sure that `bytes` can be staged without waiting. May wait for the stream, and then what
  // was staged before is gone: so an op calls this once, before it stages.
  absl::Status MakeRoom(int64_t bytes) {
    if (bytes <= step().staging.bytes_left()) return absl::OkStatus();
    CINNABAR_CHECK(bytes <= step().staging.bytes())
        << bytes << " staged bytes are more than was reserved";
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    CINNABAR_RETURN_IF_ERROR(Note(SynchronizeStream(stream_), "wait for the device"));
    step().staging.Rewind();
    geometries_.clear();
    return absl::OkStatus();
  }

  // Null for an empty span.
  template <typename T>
  absl::StatusOr<const T*> Stage(absl::Span<const T> values) {
    if (values.empty()) return nullptr;
    int error = kSuccess;
    void* device = step().staging.Copy(
        values.data(), static_cast<int64_t>(values.size() * sizeof(T)), stream_, &error);
    CINNABAR_RETURN_IF_ERROR(Note(error, "copy to the device"));
    return static_cast<const T*>(device);
  }

  // Into other device memory, by way of the staged bytes: `data` may go at once.
  absl::Status CopyThroughStaging(const void* data, int64_t bytes, void* device) {
    CINNABAR_RETURN_IF_ERROR(MakeRoom(RoundUp(bytes, 256)));
    int error = kSuccess;
    const void* staged = step().staging.Copy(data, bytes, stream_, &error);
    CINNABAR_RETURN_IF_ERROR(Note(error, "copy to the device"));
    return Note(CopyOnDevice(device, staged, bytes, stream_), "copy to the device");
  }

  // --- Weights

  // What a part is kept as where `dtype` is asked for: a block format stays as it is in another.
  static DType KeptAs(const HostMatrix& part, DType dtype) {
    return IsQuantized(dtype) && IsQuantized(part.dtype) ? part.dtype : dtype;
  }

  absl::StatusOr<std::unique_ptr<Weight>> Load(absl::Span<const HostMatrix> parts,
                                               RowOrder row_order, DType dtype, bool fp8,
                                               bool tile) {
    CINNABAR_RETURN_IF_ERROR(Ready());
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    CINNABAR_CHECK(!parts.empty());
    const int64_t cols = parts[0].cols;
    int64_t rows = 0;
    for (const HostMatrix& part : parts) {
      CINNABAR_CHECK(part.cols == cols) << "parts of different width";
      CINNABAR_CHECK(cols % BlockOf(KeptAs(part, dtype)).elements == 0)
          << cols << " columns are not whole blocks of " << NameOf(KeptAs(part, dtype));
      rows += part.rows;
    }
    std::vector<CudaWeight::Piece> pieces;
    if (row_order == RowOrder::kGatedPairs) {
      CINNABAR_CHECK(parts.size() == 2 && parts[0].rows == parts[1].rows)
          << "gate and up are of one shape";
      // Of two formats: as their products read them.
      const DType kept = KeptAs(parts[0], dtype) == KeptAs(parts[1], dtype)
                             ? KeptAs(parts[0], dtype)
                             : options_.activation;
      CINNABAR_RETURN_IF_ERROR(LoadPiece(parts, /*gated=*/true, kept, fp8, tile, pieces));
    } else {
      for (size_t begin = 0, end = 1; begin < parts.size(); begin = end++) {
        const DType kept = KeptAs(parts[begin], dtype);
        while (end < parts.size() && KeptAs(parts[end], dtype) == kept) ++end;
        CINNABAR_RETURN_IF_ERROR(
            LoadPiece(parts.subspan(begin, end - begin), /*gated=*/false, kept, fp8, tile, pieces));
      }
    }
    return std::make_unique<CudaWeight>(rows, cols, row_order, dtype, std::move(pieces));
  }

  static int64_t RowBytes(Element element, int64_t cols) {
    return IsBlocks(element) ? UnitRowBytes(element, cols)
                             : RoundUp(cols * BytesOf(element), kWeightRowBytes);
  }

  // Products of such elements by such rows run on tensor cores.
  static bool ForTensorCores(Element element) {
    return element == Element::kBf16 || IsBlocks(element);
  }

  // Loads parts that are kept as one dtype, or FP8; tiled where that can be, if asked.
  absl::Status LoadPiece(absl::Span<const HostMatrix> parts, bool gated, DType kept, bool fp8,
                         bool tile, std::vector<CudaWeight::Piece>& pieces) {
    const Element element = fp8 ? Element::kE4m3 : ElementOf(kept);
    const int64_t cols = parts[0].cols;
    int64_t rows = 0;
    for (const HostMatrix& part : parts) rows += part.rows;
    const int64_t memory_rows = gated ? RoundUp(parts[0].rows, 8) * 2 : rows;
    const int64_t padded_rows = RoundUp(memory_rows, kWeightRowUnit);
    CudaWeight::Piece& piece = pieces.emplace_back();
    WeightView& view = piece.view;
    view.rows = static_cast<int32_t>(memory_rows);
    view.cols = static_cast<int32_t>(cols);
    view.element = element;
    view.row_bytes = RowBytes(element, cols);
    view.k_bytes = IsBlocks(element) ? RoundUp(cols * 2, kWeightRowBytes) : view.row_bytes;
    if (ForTensorCores(element) || element == Element::kE4m3) {
      view.segment_bytes = SegmentBytes(memory_rows, view.k_bytes);
      view.num_segments =
          static_cast<int32_t>((view.k_bytes + view.segment_bytes - 1) / view.segment_bytes);
      // A row of tiles is loaded at a time.
      view.tiled =
          tile && !IsBlocks(element) && kWeightRowUnit * view.row_bytes <= Loader::kPieceBytes;
    }
    // The part of memory row `row`, and its row there; null: padding.
    const auto source = [&](int64_t& row) -> const HostMatrix* {
      if (gated) {
        const GatedSource pair = GatedSourceOf(row);
        row = pair.output;
        return row < parts[0].rows ? &parts[pair.up ? 1 : 0] : nullptr;
      }
      for (const HostMatrix& part : parts) {
        if (row < part.rows) return &part;
        row -= part.rows;
      }
      return nullptr;
    };
    piece.bytes = padded_rows * view.row_bytes;
    CINNABAR_ASSIGN_OR_RETURN(piece.memory, TakeDeviceMemory(piece.bytes));
    std::vector<float> floats(cols);
    std::vector<float> scales;
    if (element == Element::kE4m3) {
      scales.assign(padded_rows, 1.0F);
      for (int64_t row = 0; row < padded_rows; ++row) {
        int64_t at = row;
        const HostMatrix* part = source(at);
        if (part == nullptr) continue;
        ReadRow(*part, at, absl::MakeSpan(floats));
        float largest = 0.0F;
        for (const float value : floats) largest = std::max(largest, std::abs(value));
        if (largest > 0.0F && std::isfinite(largest)) scales[row] = largest / kE4m3Max;
      }
      CINNABAR_ASSIGN_OR_RETURN(piece.scales, TakeDeviceMemory(padded_rows * 4));
      piece.bytes += padded_rows * 4;
      view.scales = static_cast<const float*>(piece.scales.get());
      CINNABAR_RETURN_IF_ERROR(Remember(loader_.Load(
          piece.scales.get(), padded_rows, 4,
          [&](int64_t begin, int64_t count, char* to) {
            std::memcpy(to, scales.data() + begin, count * 4);
          },
          stream_)));
    }
    view.data = piece.memory.get();
    // A row of `part` as the device keeps it; returns the bytes written.
    std::vector<char> blocks;
    const auto write = [&](const HostMatrix& part, int64_t row, float scale, char* to) {
      const char* stored =
          static_cast<const char*>(part.data) + row * cinnabar::BytesOf(part.dtype, cols);
      if (IsBlocks(element)) {
        if (part.dtype != kept) {
          blocks.resize(cinnabar::BytesOf(kept, cols));
          ReadRow(part, row, absl::MakeSpan(floats));
          QuantizeRow(floats, kept, blocks.data());
          stored = blocks.data();
        }
        PackUnits(stored, kept, cols, to);
        return view.row_bytes;
      }
      if (IsQuantized(part.dtype)) {
        ReadRow(part, row, absl::MakeSpan(floats));
        ConvertHost(floats.data(), Element::kF32, cols, element, scale, to);
      } else {
        ConvertHost(stored, ElementOf(part.dtype), cols, element, scale, to);
      }
      return cols * BytesOf(element);
    };
    const auto write_row = [&](int64_t row, char* to) {
      int64_t at = row;
      const HostMatrix* part = source(at);
      const int64_t written =
          part == nullptr ? 0 : write(*part, at, scales.empty() ? 1.0F : scales[row], to);
      std::memset(to + written, 0, view.row_bytes - written);
    };
    if (!view.tiled) {
      return Remember(loader_.Load(
          piece.memory.get(), padded_rows, view.row_bytes,
          [&](int64_t begin, int64_t count, char* to) {
            for (int64_t row = begin; row < begin + count; ++row, to += view.row_bytes) {
              write_row(row, to);
            }
          },
          stream_));
    }
    // A row of tiles at a time.
    std::vector<char> bytes(view.row_bytes);
    return Remember(loader_.Load(
        piece.memory.get(), padded_rows / kWeightRowUnit, kWeightRowUnit * view.row_bytes,
        [&](int64_t begin, int64_t count, char* to) {
          for (int64_t row = begin * kWeightRowUnit; row < (begin + count) * kWeightRowUnit;
               ++row) {
            write_row(row, bytes.data());
            const int64_t r = row % kWeightRowUnit;
            char* tiles = to + (row / kWeightRowUnit - begin) * kWeightRowUnit * view.row_bytes;
            for (int64_t p = 0; p < view.row_bytes / 16; ++p) {
              std::memcpy(
                  tiles + p / 8 * kWeightTileBytes + r * kWeightRowBytes + ((p ^ r) % 8) * 16,
                  &bytes[16 * p], 16);
            }
          }
        },
        stream_));
  }

  // --- Products

  absl::Status Product(const LinearArgs& args, float cap) {
    CINNABAR_RETURN_IF_ERROR(Ready());
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
      CINNABAR_ASSIGN_OR_RETURN(const Geometry* geometry, GeometryOf(args.sequences, 0));
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
  // The columns of `rows` from `columns` on.
  static MatrixView After(MatrixView rows, int64_t columns) {
    if (rows.data != nullptr) {
      rows.data = static_cast<char*>(rows.data) + columns * BytesOf(rows.element);
    }
    return rows;
  }

  // Rows that cp.async can read: bf16, 16-byte aligned.
  static bool UsesTensorCores(const MatrixView& x, const WeightView& weight) {
    return x.element == Element::kBf16 && ForTensorCores(weight.element) && x.stride % 8 == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
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
    return Note(LaunchQuantize(task, stream_), "round rows to FP8");
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
      return Note(LaunchLinear(task, stream_), "matrix product");
    }
    const bool fp8 = task.weight.element == Element::kE4m3;
    const bool tiled = task.weight.tiled;
    task.tile_rows = tiled ? HopperTileRows(task.num_rows, fp8, task.weight.num_segments)
                           : TileRows(task.num_rows, fp8);
    const int32_t tile_outputs = tiled ? kHopperOutputs : TileOutputs(task.tile_rows);
    const int64_t num_tiles = (task.num_rows + task.tile_rows - 1) / task.tile_rows *
                              ((task.weight.rows + tile_outputs - 1) / tile_outputs);
    task.split = num_tiles <= layout_.num_tickets &&
                 RunsSplit(num_tiles, task.tile_rows * tile_outputs, task.weight.num_segments,
                           facts_.num_multiprocessors, layout_.partial_floats);
    task.partials = At<float>(layout_.partials);
    task.tickets = At<int32_t>(layout_.tickets);
    captured_shape_ = captured_shape_ * 31 + task.tile_rows;
    return Note(LaunchLinear(task, stream_), "matrix product");
  }

  // --- Geometry

  // Of `sequences`; makes room for it and for `more_bytes` that the caller stages.
  absl::StatusOr<Geometry*> GeometryOf(absl::Span<const SequenceSpan> sequences,
                                       int64_t more_bytes) {
    CINNABAR_RETURN_IF_ERROR(MakeRoom(more_bytes));
    for (const auto& geometry : geometries_) {
      if (geometry->sequences.data() == sequences.data() &&
          geometry->sequences.size() == sequences.size()) {
        return geometry.get();
      }
    }
    auto geometry = std::make_unique<Geometry>();
    geometry->sequences = sequences;
    std::vector<RowFacts> rows;
    std::vector<SpanFacts> spans;
    for (size_t s = 0; s < sequences.size(); ++s) {
      const SequenceSpan& span = sequences[s];
      CINNABAR_CHECK(span.row_begin == static_cast<int32_t>(rows.size()) && span.num_rows > 0)
          << "sequences leave a gap";
      SpanFacts facts;
      facts.row_begin = span.row_begin;
      facts.num_rows = span.num_rows;
      facts.first_position = span.first_position;
      facts.block_length = span.block_length;
      if (span.kv != nullptr) {
        const auto& kv = dynamic_cast<const PagedKv&>(*span.kv);
        facts.pages = kv.device_table();
        facts.pages_per_layer = kv.one_layer() ? 0 : kv.layout().pages_per_layer;
      }
      spans.push_back(facts);
      for (int32_t row = 0; row < span.num_rows; ++row) {
        const int32_t num_keys = VisibleKeys(span, row);
        geometry->keys_max = std::max(geometry->keys_max, num_keys);
        rows.push_back(
            {span.first_position + row, span.modulation_row, static_cast<int32_t>(s), num_keys});
      }
    }
    geometry->num_rows = static_cast<int64_t>(rows.size());
    CINNABAR_RETURN_IF_ERROR(MakeRoom(GeometryBytes(rows.size(), spans.size(), 0) + more_bytes));
    CINNABAR_ASSIGN_OR_RETURN(geometry->rows, Stage(absl::MakeConstSpan(rows)));
    CINNABAR_ASSIGN_OR_RETURN(geometry->spans, Stage(absl::MakeConstSpan(spans)));
    geometries_.push_back(std::move(geometry));
    return geometries_.back().get();
  }

  // The tiles of attention, kept with *geometry.
  absl::StatusOr<const Geometry::Tiles*> TilesOf(Geometry*& geometry,
                                                 absl::Span<const SequenceSpan> sequences,
                                                 int32_t group, int32_t window) {
    const std::pair key(group, window);
    const auto found = geometry->tiles.find(key);
    if (found != geometry->tiles.end()) return &found->second;
    std::vector<AttendTile> host = AttendTiles(sequences, group, window);
    const int64_t bytes = StagedBytesOf(absl::MakeConstSpan(host));
    // Room may cost the geometry itself: then it is made again, with room for the tiles.
    CINNABAR_ASSIGN_OR_RETURN(geometry, GeometryOf(sequences, bytes));
    Geometry::Tiles& tiles = geometry->tiles[key];
    tiles.host = std::move(host);
    CINNABAR_ASSIGN_OR_RETURN(tiles.device, Stage(absl::MakeConstSpan(tiles.host)));
    return &tiles;
  }

  // --- Experts

  // What all experts have in common.
  static WeightView CommonView(absl::Span<const std::unique_ptr<Weight>> weights) {
    WeightView view = dynamic_cast<const CudaWeight&>(*weights[0]).view();
    view.data = nullptr;
    // Summed in one piece: a row of an expert has but few others beside it anyway.
    if (view.segment_bytes > 0) view.segment_bytes = view.k_bytes;
    view.num_segments = 1;
    return view;
  }

  absl::StatusOr<const void* const*> ExpertTableOf(
      absl::Span<const std::unique_ptr<Weight>> weights) {
    std::vector<const void*> pointers;
    pointers.reserve(weights.size());
    const WeightView common = CommonView(weights);
    for (const auto& weight : weights) {
      const WeightView& view = dynamic_cast<const CudaWeight&>(*weight).view();
      CINNABAR_CHECK(view.element == common.element && view.rows == common.rows &&
                     view.cols == common.cols)
          << "experts differ in shape or dtype";
      pointers.push_back(view.data);
    }
    const auto found = expert_tables_.find(weights.data());
    if (found != expert_tables_.end() && found->second.host == pointers) {
      return static_cast<const void* const*>(found->second.device.get());
    }
    // A layer's first pass.
    CINNABAR_RETURN_IF_ERROR(RunCaptured());
    if (expert_tables_.size() >= kExpertTablesMax) expert_tables_.clear();
    const int64_t bytes = static_cast<int64_t>(pointers.size() * sizeof(void*));
    CINNABAR_ASSIGN_OR_RETURN(DeviceMemory memory, TakeDeviceMemory(bytes));
    CINNABAR_RETURN_IF_ERROR(CopyThroughStaging(pointers.data(), bytes, memory.get()));
    ExpertTable& table = expert_tables_[weights.data()];
    table = {std::move(pointers), std::move(memory)};
    return static_cast<const void* const*>(table.device.get());
  }

  // --- Vocabulary

  static void CheckQuery(const VocabularyQuery& query, int64_t vocabulary) {
    CINNABAR_CHECK(query.hidden_row >= 0);
    CINNABAR_CHECK(query.statistics_temperature > 1e-30F) << query.statistics_temperature;
    CINNABAR_CHECK(query.pick_temperature == 0.0F || query.pick_temperature > 1e-30F);
    CINNABAR_CHECK(query.top_k >= 0 && query.top_p >= 0.0F);
    CINNABAR_CHECK(query.rules.size() <= kVocabularyRulesMax) << query.rules.size() << " rules";
    for (const VocabularyRule& rule : query.rules) {
      CINNABAR_CHECK(rule.id >= 0 && rule.id < vocabulary) << "rule for id " << rule.id;
    }
    if (query.pick != PickRule::kUniformTweedie) return;
    CINNABAR_CHECK(query.top_k == 0 && query.top_p >= 1.0F) << "a Tweedie step has no filters";
    CINNABAR_CHECK(query.own_token >= 0 && query.own_token < vocabulary);
    CINNABAR_CHECK(query.sigma_step >= 0.0F);
  }

  // Queries in the device's terms, their rules and the rows they read.
  struct QueryBatch {
    std::vector<DeviceQuery> queries;
    std::vector<DeviceRule> rules;
    std::vector<int32_t> slot_rows;
    std::vector<int32_t> slot_queries;

    void Add(const VocabularyQuery& query, int64_t vocabulary) {
      const bool guided = query.unconditional_row >= 0;
      // A pair lies in one tile: tiles have an even number of slots.
      if (guided && slot_rows.size() % 2 == 1) {
        slot_rows.push_back(query.hidden_row);
        slot_queries.push_back(kNoRow);
      }
      DeviceQuery q;
      q.slot = static_cast<int32_t>(slot_rows.size());
      q.guided = guided ? 1 : 0;
      q.guidance = query.guidance_scale + 1.0F;
      q.pick = query.pick == PickRule::kUniformTweedie ? Pick::kTweedie
               : query.pick_temperature > 0.0F         ? Pick::kGumbel
                                                       : Pick::kArgmax;
      if (query.pick_temperature > 0.0F) {
        q.pick_scale = static_cast<float>(1.0 / static_cast<double>(query.pick_temperature));
      }
      q.temperature = query.statistics_temperature;
      q.statistics_scale =
          static_cast<float>(kLog2E / static_cast<double>(query.statistics_temperature));
      q.top_k = query.top_k;
      q.top_p = query.top_p;
      q.top_p_inside = query.top_p_inside ? 1 : 0;
      q.top_k_first = query.filter_order == FilterOrder::kTopKThenTopP ? 1 : 0;
      q.seed_low = static_cast<uint32_t>(query.noise.seed);
      q.seed_high = static_cast<uint32_t>(query.noise.seed >> 32);
      q.position = query.noise.position;
      q.step = query.noise.step;
      q.own_token = query.own_token;
      q.sigma_step = query.sigma_step;
      q.rules_begin = static_cast<int32_t>(rules.size());
      q.num_rules = static_cast<int32_t>(query.rules.size());
      q.want_top = query.want_top ? 1 : 0;
      q.num_pickable = static_cast<int32_t>(
          query.pickable_ids > 0 ? std::min<int64_t>(query.pickable_ids, vocabulary) : vocabulary);
      for (const VocabularyRule& rule : query.rules) {
        rules.push_back({rule.id, rule.bias, rule.counted ? 1 : 0, rule.pickable ? 1 : 0});
      }
      slot_rows.push_back(query.hidden_row);
      slot_queries.push_back(static_cast<int32_t>(queries.size()));
      if (guided) {
        slot_rows.push_back(query.unconditional_row);
        slot_queries.push_back(kNoRow);
      }
      queries.push_back(q);
    }
    int64_t staged_bytes() const {
      return StagedBytesOf(absl::MakeConstSpan(queries)) +
             StagedBytesOf(absl::MakeConstSpan(rules)) +
             2 * StagedBytesOf(absl::MakeConstSpan(slot_rows));
    }
  };

  absl::Status AnswerFused(const VocabularyArgs& args, const CudaWeight& weight,
                           absl::Span<const int32_t> indices) {
    for (size_t begin = 0; begin < indices.size(); begin += layout_.group_queries) {
      QueryBatch batch;
      for (const int32_t index : indices.subspan(begin, layout_.group_queries)) {
        batch.Add(args.queries[index], weight.rows());
      }
      CINNABAR_RETURN_IF_ERROR(MakeRoom(batch.staged_bytes()));
      VocabularyTask task;
      task.hidden = ViewOf(args.hidden);
      task.num_slots = static_cast<int32_t>(batch.slot_rows.size());
      task.weight = weight.view();
      task.bias = args.bias;
      task.cap = args.logit_cap;
      task.num_queries = static_cast<int32_t>(batch.queries.size());
      task.summaries = At<ChunkSummary>(layout_.summaries);
      task.answers = At<DeviceAnswer>(layout_.answers) + begin;
      CINNABAR_ASSIGN_OR_RETURN(task.slot_rows, Stage(absl::MakeConstSpan(batch.slot_rows)));
      CINNABAR_ASSIGN_OR_RETURN(task.slot_queries, Stage(absl::MakeConstSpan(batch.slot_queries)));
      CINNABAR_ASSIGN_OR_RETURN(task.queries, Stage(absl::MakeConstSpan(batch.queries)));
      CINNABAR_ASSIGN_OR_RETURN(task.rules, Stage(absl::MakeConstSpan(batch.rules)));
      if (task.weight.element == Element::kE4m3) {
        CINNABAR_RETURN_IF_ERROR(Quantize(&task.hidden, &task.slot_rows, task.num_slots,
                                          task.weight.cols, &task.x_scales));
      } else if (!UsesTensorCores(task.hidden, task.weight)) {
        task.weight.segment_bytes = 0;
        task.weight.num_segments = 1;
      }
      task.tile_rows = VocabularyTileRows(
          task.num_slots, task.weight.element == Element::kE4m3 && !task.weight.tiled);
      captured_shape_ = captured_shape_ * 31 + task.tile_rows;
      CINNABAR_RETURN_IF_ERROR(Note(LaunchVocabulary(task, stream_), "vocabulary head"));
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
        // Its own rows, and the one that may be skipped.
        const bool guided = args.queries[indices[next]].unconditional_row >= 0;
        const size_t slots = batch.slot_rows.size() + (guided ? batch.slot_rows.size() % 2 + 2 : 1);
        if (slots > static_cast<size_t>(layout_.whole_rows)) break;
        batch.Add(args.queries[indices[next]], weight.rows());
      }
      CINNABAR_RETURN_IF_ERROR(MakeRoom(batch.staged_bytes()));
      LinearTask linear;
      linear.x = ViewOf(args.hidden);
      linear.num_rows = static_cast<int32_t>(batch.slot_rows.size());
      linear.weight = weight.view();
      linear.bias = args.bias;
      linear.cap = args.logit_cap;
      linear.out = {At<void>(layout_.whole_logits), RoundUp(weight.rows(), 4), Element::kF32};
      linear.num_outputs = static_cast<int32_t>(weight.rows());
      CINNABAR_ASSIGN_OR_RETURN(linear.x_index, Stage(absl::MakeConstSpan(batch.slot_rows)));
      SelectTask task;
      task.logits = At<float>(layout_.whole_logits);
      task.stride = linear.out.stride;
      task.vocabulary = linear.num_outputs;
      task.num_queries = static_cast<int32_t>(batch.queries.size());
      task.answers = At<DeviceAnswer>(layout_.answers) + answers_begin + begin;
      CINNABAR_ASSIGN_OR_RETURN(task.queries, Stage(absl::MakeConstSpan(batch.queries)));
      CINNABAR_ASSIGN_OR_RETURN(task.rules, Stage(absl::MakeConstSpan(batch.rules)));
      CINNABAR_RETURN_IF_ERROR(Multiply(linear));
      CINNABAR_RETURN_IF_ERROR(Note(LaunchSelect(task, stream_), "filters"));
    }
    return absl::OkStatus();
  }

  // --- Graphs

  // Ends the capture, if there is one, and runs what it holds. A step of a shape that was seen
  // before only has its arguments put into the graph that is kept.
  absl::Status RunCaptured() {
    if (!capturing_) return absl::OkStatus();
    capturing_ = false;
    void* graph = nullptr;
    CINNABAR_RETURN_IF_ERROR(Note(EndCapture(stream_, &graph), "end a graph"));
    if (!step().timed) {
      CINNABAR_RETURN_IF_ERROR(Note(RecordEvent(step().begins, stream_), "mark a step"));
      step().timed = true;
    }
    const int64_t key = captured_shape_ * 4096 + captured_calls_;
    const absl::Status run = captured_calls_ == 0 ? absl::OkStatus() : RunGraph(graph, key);
    DestroyGraph(graph);
    return run;
  }

  absl::Status RunGraph(void* graph, int64_t key) {
    void*& executable = graphs_[key];
    bool updated = false;
    if (executable != nullptr) {
      CINNABAR_RETURN_IF_ERROR(
          Note(UpdateGraph(executable, graph, &updated), "put a step into its graph"));
    }
    ++(updated ? graph_hits_ : graph_misses_);
    if (!updated) {
      if (executable != nullptr) {
        DestroyExecutable(executable);
      } else if (graphs_.size() > kGraphsMax) {
        // Which one does not matter much: a step's shapes come back.
        const auto other =
            graphs_.begin()->first == key ? std::next(graphs_.begin()) : graphs_.begin();
        DestroyExecutable(other->second);
        graphs_.erase(other);
      }
      executable = nullptr;
      CINNABAR_RETURN_IF_ERROR(Note(InstantiateGraph(graph, &executable), "make a graph"));
    }
    return Note(LaunchGraph(executable, stream_), "launch a graph");
  }

  const BackendOptions options_;
  const DeviceFacts facts_;
  void* const stream_;
  const bool wgmma_;  // weights of bf16 and FP8 lie tiled, and their products are made of it
  absl::Status broken_;

  std::shared_ptr<Pools> pools_;
  Loader loader_;
  WorkspaceShape shape_;
  WorkspaceLayout layout_;
  DeviceMemory workspace_;
  Step steps_[2];
  int current_ = 0;                                    // the step that ops belong to
  std::vector<std::unique_ptr<Geometry>> geometries_;  // of this step
  std::map<const void*, ExpertTable> expert_tables_;

  // Of the last AnswerVocabulary(): where each query's answer lies on the device.
  std::vector<int32_t> device_answers_;

  bool use_graphs_ = true;
  bool capturing_ = false;
  int64_t captured_calls_ = 0;
  uint64_t captured_shape_ = 0;
  std::map<int64_t, void*> graphs_;
  // Read by Stats(), from any thread.
  std::atomic<int64_t> graph_hits_ = 0;
  std::atomic<int64_t> graph_misses_ = 0;
  std::atomic<double> busy_seconds_ = 0.0;
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
  auto backend = std::make_unique<CudaBackend>(options, facts, stream);
  CINNABAR_RETURN_IF_ERROR(backend->Start());
  return backend;
}

}  // namespace cinnabar::cuda
