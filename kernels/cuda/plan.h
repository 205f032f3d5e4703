// The CUDA backend's choices, as pure functions: tile shapes, segments of a weight, the layout of
// the workspace and of KV pages. None of them may make a row's bits depend on the batch: what
// enters a sum (segments) is a function of the weight alone; what depends on the number of rows
// (tiles, whether segments run side by side) leaves the additions as they are (product.cuh).
#ifndef CINNABAR_KERNELS_CUDA_PLAN_H_
#define CINNABAR_KERNELS_CUDA_PLAN_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {

constexpr int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// --- Products

// Rows of a tile for a batch of `num_rows`: 16, 32, 64 or 128 (FP8: 64 at most), the smallest that
// holds them all.
int32_t TileRows(int64_t num_rows, bool fp8);
// Outputs of a tile that has `tile_rows` rows.
int32_t TileOutputs(int32_t tile_rows);
// The same for the vocabulary head: 32 or 128 (FP8 by mma.sync: 32).
int32_t VocabularyTileRows(int64_t num_slots, bool fp8);

// How many bytes of a weight row are summed on their own. A weight of few outputs has too few tiles
// to keep a device reading; its rows are cut into up to 8 segments, each a multiple of 128 bytes
// and at least 1 KiB, until there are kTilesWanted blocks of 64 outputs.
inline constexpr int64_t kTilesWanted = 192;
int64_t SegmentBytes(int64_t rows, int64_t row_bytes);

// By wgmma (hopper_product.cuh): rows of a tile, 16, 32, 64, 128 or 256, the smallest that holds
// them all, and of the last two the one that pads less where they do not fit; 256 neither with FP8
// nor with segments. All have kHopperOutputs outputs.
inline constexpr int32_t kHopperOutputs = 128;
int32_t HopperTileRows(int64_t num_rows, bool fp8, int32_t num_segments);

// Whether the segments of a product run as blocks of their own. Worth it where the tiles alone
// leave multiprocessors idle; the partial sums (tile_sums a tile) must fit in `partial_floats`.
bool RunsSplit(int64_t num_tiles, int32_t tile_sums, int32_t num_segments,
               int32_t num_multiprocessors, int64_t partial_floats);
// Room for partial sums and tickets that RunsSplit() ever wants.
int64_t PartialFloatsWanted(int32_t num_multiprocessors);
int64_t TicketsWanted(int32_t num_multiprocessors);

// Elements of weights that tensor cores multiply bf16 rows by (kE4m3 goes with rows in FP8).
bool ForTensorCores(Element element);
// Whether they multiply rows like `x`: bf16 that cp.async can read, 16-byte aligned.
bool UsesTensorCores(const MatrixView& x, const WeightView& weight);

// How a product on tensor cores runs in a workspace of such a layout. A tiled weight's is by wgmma.
struct ProductPlan {
  int32_t tile_rows = 16;
  bool split = false;  // segments side by side
};
struct WorkspaceLayout;
ProductPlan PlanProduct(int64_t num_rows, const WeightView& weight, int32_t num_multiprocessors,
                        const WorkspaceLayout& layout);

// FP8 is for the matrices that make up a model: neither routers and other small ones, nor the
// vocabulary head and stacked modulations (many more outputs than inputs), where its error counts
// most and saves least.
bool WantsFp8(RowOrder row_order, int64_t rows, int64_t cols);

// Which gate or up lies in memory row `row` of a gated pair: 8 gates, their 8 ups, ..
struct GatedSource {
  bool up = false;
  int64_t output = 0;
};
GatedSource GatedSourceOf(int64_t row);

// --- Attention

// The blocks of Attend() for the sequences of a batch, by span, row and chunk. `group`: query heads
// of a kv head. Tiles of kAttendItems items, with the chunks that any of their rows sees something
// of; `window` as in AttendArgs.
std::vector<AttendTile> AttendTiles(absl::Span<const SequenceSpan> sequences, int32_t group,
                                    int32_t window);
// Row `row_in_span` sees no position before the first and none from the second on.
int32_t FirstKey(const SequenceSpan& span, int32_t row_in_span, int32_t window);
int32_t VisibleKeys(const SequenceSpan& span, int32_t row_in_span);
int32_t NumAttendChunks(int32_t num_keys);

// Consecutive rows that Attend() takes in one launch, so that the partial results of more than one
// chunk fit.
struct AttendGroup {
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t tile_begin = 0;
  int32_t num_tiles = 0;
  int32_t num_chunks = 1;
};
// room_parts: (row, chunk) pairs that fit, counted as rows x the chunks of the longest. A tile is
// never torn; one alone always goes.
std::vector<AttendGroup> AttendGroups(absl::Span<const SequenceSpan> sequences,
                                      absl::Span<const AttendTile> tiles, int32_t group,
                                      int64_t room_parts);

// --- Soft embeddings

// Parts of the vocabulary whose sums are kept apart: a function of its size, as on the CPU.
int32_t SoftParts(int64_t vocabulary);

// --- Memory

struct KvLayout {
  int64_t page_bytes = 0;        // one layer, kPagePositions positions
  int64_t other_page_bytes = 0;  // of KvShape's other layers
  int32_t pages_per_layer = 0;
  int64_t num_pages = 0;        // all layers but the others
  int64_t num_other_pages = 0;  // behind them in the table
  int64_t table_bytes = 0;      // pointers to them, on the device
  int64_t total_bytes = 0;
};
KvLayout LayOutKv(const KvShape& shape, DType dtype);
// Elements of a row of a page.
constexpr int32_t HeadStride(int32_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Byte offsets into the workspace; 256-byte aligned.
struct WorkspaceLayout {
  int64_t staged_bytes = 0;  // what one step may upload; there on host and device
  int64_t staged = 0;
  int64_t partials = 0;
  int64_t partial_floats = 0;
  int64_t tickets = 0;
  int64_t num_tickets = 0;
  int64_t quantized = 0;  // bytes and a scale a row; FP8 only
  int64_t quantized_scales = 0;
  int64_t chunk_sums = 0;  // room_parts x cols_max floats
  int64_t chunk_totals = 0;
  int64_t chunk_parts = 0;
  int64_t expert_begins = 0;
  int64_t expert_tile_begins = 0;
  int64_t expert_places = 0;
  int64_t expert_where = 0;
  int64_t expert_inner = 0;    // [places][mlp_dim]
  int64_t expert_outputs = 0;  // [places][dim] float32
  int64_t summaries = 0;
  int64_t answers = 0;
  int64_t whole_logits = 0;  // [whole_rows][vocabulary] float32
  int32_t whole_rows = 0;
  int32_t group_queries = 0;  // queries of one fused pass
  int32_t soft_parts = 0;     // as SoftEmbedTask has them
  int64_t soft_logits = 0;
  int64_t soft_probabilities = 0;
  int64_t soft_tops = 0;
  int64_t soft_masses = 0;
  int64_t soft_factors = 0;
  int64_t soft_sums = 0;
  int64_t total_bytes = 0;  // of the device
};
struct WorkspaceFacts {
  int32_t num_multiprocessors = 1;
  bool fp8 = false;
};
WorkspaceLayout LayOutWorkspace(const WorkspaceShape& shape, const WorkspaceFacts& facts);

// What a batch's geometry takes of the staged bytes at most; with the rows' ids, indices and
// queries this is what staged_bytes sums up.
int64_t GeometryBytes(int64_t num_rows, int64_t num_spans, int64_t num_tiles);

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_PLAN_H_
