#include "kernels/cuda/plan.h"

#include <algorithm>

#include "kernels/cuda/blocks.h"

namespace cinnabar::cuda {
namespace {

constexpr int64_t kAlignment = 256;
// Partial results of attention, and whole rows of logits: enough to keep a device busy, little
// beside a model.
constexpr int64_t kChunkBytesMax = int64_t{64} << 20;
constexpr int64_t kWholeLogitsBytesMax = int64_t{64} << 20;
constexpr int64_t kWholeRowsMax = 128;
// Queries whose summaries are kept at a time; a fused pass over the head is bound by arithmetic
// long before.
constexpr int64_t kGroupQueries = 512;
// Uploads need not fit in one piece: a full staging area is waited for and used again. So this only
// bounds what one call needs.
constexpr int64_t kStagedSlack = 64 << 10;

}  // namespace

int32_t TileRows(int64_t num_rows, bool fp8) {
  for (const int32_t rows : {16, 32, 64}) {
    if (num_rows <= rows) return rows;
  }
  return fp8 ? 64 : 128;
}

int32_t TileOutputs(int32_t tile_rows) { return tile_rows == 128 ? 128 : 64; }

int32_t VocabularyTileRows(int64_t num_slots, bool fp8) {
  return num_slots <= 32 || fp8 ? 32 : 128;
}

int64_t SegmentBytes(int64_t rows, int64_t row_bytes) {
  const int64_t tiles = (rows + 63) / 64;
  int64_t segments = 1;
  while (segments < 8 && tiles * segments < kTilesWanted && row_bytes / (2 * segments) >= 1024) {
    segments *= 2;
  }
  return RoundUp((row_bytes + segments - 1) / segments, kWeightRowBytes);
}

int32_t HopperTileRows(int64_t num_rows, bool fp8, int32_t num_segments) {
  for (const int32_t rows : {16, 32, 64, 128}) {
    if (num_rows <= rows) return rows;
  }
  if (fp8 || num_segments > 1) return 128;
  // 256 rows a tile are a tenth faster a row.
  return RoundUp(num_rows, 256) * 10 <= RoundUp(num_rows, 128) * 11 ? 256 : 128;
}

bool RunsSplit(int64_t num_tiles, int32_t tile_sums, int32_t num_segments,
               int32_t num_multiprocessors, int64_t partial_floats) {
  if (num_segments == 1 || num_tiles >= num_multiprocessors) return false;
  return num_tiles * num_segments * tile_sums <= partial_floats;
}

int64_t PartialFloatsWanted(int32_t num_multiprocessors) {
  // A tile a multiprocessor, 4 segments, of the largest tile.
  return int64_t{4} * num_multiprocessors * 128 * 128;
}

int64_t TicketsWanted(int32_t num_multiprocessors) { return num_multiprocessors; }

bool ForTensorCores(Element element) { return element == Element::kBf16 || IsBlocks(element); }

bool UsesTensorCores(const MatrixView& x, const WeightView& weight) {
  return x.element == Element::kBf16 && ForTensorCores(weight.element) && x.stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

ProductPlan PlanProduct(int64_t num_rows, const WeightView& weight, int32_t num_multiprocessors,
                        const WorkspaceLayout& layout) {
  const bool fp8 = weight.element == Element::kE4m3;
  ProductPlan plan;
  plan.tile_rows =
      weight.tiled ? HopperTileRows(num_rows, fp8, weight.num_segments) : TileRows(num_rows, fp8);
  const int32_t tile_outputs = weight.tiled ? kHopperOutputs : TileOutputs(plan.tile_rows);
  const int64_t num_tiles = (num_rows + plan.tile_rows - 1) / plan.tile_rows *
                            ((weight.rows + tile_outputs - 1) / tile_outputs);
  plan.split = num_tiles <= layout.num_tickets &&
               RunsSplit(num_tiles, plan.tile_rows * tile_outputs, weight.num_segments,
                         num_multiprocessors, layout.partial_floats);
  return plan;
}

bool WantsFp8(RowOrder row_order, int64_t rows, int64_t cols) {
  if (cols < 256 || rows < 256) return false;
  return row_order == RowOrder::kGatedPairs || rows <= 8 * cols;
}

GatedSource GatedSourceOf(int64_t row) { return {row % 16 >= 8, row / 16 * 8 + row % 8}; }

int32_t VisibleKeys(const SequenceSpan& span, int32_t row_in_span) {
  const int64_t all = KeysEnd(span);
  if (span.block_length == 0) return static_cast<int32_t>(all);
  const int64_t block = (int64_t{span.first_position} + row_in_span) / span.block_length;
  return static_cast<int32_t>(std::min(all, (block + 1) * span.block_length));
}

int32_t FirstKey(const SequenceSpan& span, int32_t row_in_span, int32_t window) {
  if (window == 0) return 0;
  const int32_t last = span.first_position + (span.block_length == 0 ? 0 : row_in_span);
  return std::max(last - window + 1, 0);
}

int32_t NumAttendChunks(int32_t num_keys) { return (num_keys + kAttendChunk - 1) / kAttendChunk; }

std::vector<AttendTile> AttendTiles(absl::Span<const SequenceSpan> sequences, int32_t group,
                                    int32_t window) {
  std::vector<AttendTile> tiles;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const int32_t num_items = sequences[s].num_rows * group;
    for (int32_t first = 0; first < num_items; first += kAttendItems) {
      const int32_t first_row = first / group;
      const int32_t last_row = (std::min(first + kAttendItems, num_items) - 1) / group;
      // The first row sees furthest back, the last one furthest ahead.
      const int32_t begin = FirstKey(sequences[s], first_row, window) / kAttendChunk;
      const int32_t end = NumAttendChunks(VisibleKeys(sequences[s], last_row));
      int32_t num_chunks = end;
      if (window > 0) {
        num_chunks = 1;
        for (int32_t row = first_row; row <= last_row; ++row) {
          num_chunks = std::max(num_chunks, NumAttendChunks(VisibleKeys(sequences[s], row)) -
                                                FirstKey(sequences[s], row, window) / kAttendChunk);
        }
      }
      for (int32_t chunk = begin; chunk < end; ++chunk) {
        tiles.push_back({static_cast<int32_t>(s), first, chunk, num_chunks});
      }
    }
  }
  return tiles;
}

std::vector<AttendGroup> AttendGroups(absl::Span<const SequenceSpan> sequences,
                                      absl::Span<const AttendTile> tiles, int32_t group,
                                      int64_t room_parts) {
  std::vector<AttendGroup> groups;
  AttendGroup open;
  const auto rows_of = [&](const AttendTile& tile, int32_t* begin, int32_t* end) {
    const SequenceSpan& span = sequences[tile.span];
    *begin = span.row_begin + tile.first / group;
    *end = span.row_begin + std::min(span.num_rows, (tile.first + kAttendItems - 1) / group + 1);
  };
  for (size_t i = 0; i < tiles.size(); ++i) {
    int32_t begin, end;
    rows_of(tiles[i], &begin, &end);
    const int32_t num_chunks = std::max(open.num_chunks, tiles[i].num_chunks);
    // A row may lie in two tiles (group does not divide kAttendItems): both go together.
    const bool may_cut = open.num_tiles > 0 && begin >= open.row_begin + open.num_rows;
    if (may_cut && num_chunks > 1 && int64_t{end - open.row_begin} * num_chunks > room_parts) {
      groups.push_back(open);
      open = AttendGroup();
    }
    if (open.num_tiles == 0) {
      open.row_begin = begin;
      open.tile_begin = static_cast<int32_t>(i);
    }
    open.num_rows = std::max(open.num_rows, end - open.row_begin);
    open.num_chunks = std::max(open.num_chunks, tiles[i].num_chunks);
    ++open.num_tiles;
  }
  if (open.num_tiles > 0) groups.push_back(open);
  return groups;
}

int32_t SoftParts(int64_t vocabulary) {
  const int64_t chunks = (vocabulary + kSoftChunk - 1) / kSoftChunk;
  return static_cast<int32_t>(std::clamp<int64_t>(chunks / 4, 1, kSoftPartsMax));
}

KvLayout LayOutKv(const KvShape& shape, DType dtype) {
  KvLayout layout;
  const auto page_bytes = [&](int32_t num_kv_heads, int32_t head_dim) {
    return RoundUp(
        int64_t{2} * num_kv_heads * kPagePositions * HeadStride(head_dim) * BytesOf(dtype),
        kAlignment);
  };
  layout.page_bytes = page_bytes(shape.num_kv_heads, shape.head_dim);
  layout.other_page_bytes = page_bytes(shape.other_kv_heads, shape.other_head_dim);
  layout.pages_per_layer = (shape.positions_max + kPagePositions - 1) / kPagePositions;
  layout.num_pages = int64_t{shape.num_layers} * layout.pages_per_layer;
  layout.num_other_pages = int64_t{shape.num_other_layers} * layout.pages_per_layer;
  layout.table_bytes = RoundUp((layout.num_pages + layout.num_other_pages) * 8, kAlignment);
  layout.total_bytes = layout.num_pages * layout.page_bytes +
                       layout.num_other_pages * layout.other_page_bytes + layout.table_bytes;
  return layout;
}

int64_t GeometryBytes(int64_t num_rows, int64_t num_spans, int64_t num_tiles) {
  return RoundUp(num_rows * static_cast<int64_t>(sizeof(RowFacts)), kAlignment) +
         RoundUp(num_spans * static_cast<int64_t>(sizeof(SpanFacts)), kAlignment) +
         RoundUp(num_tiles * static_cast<int64_t>(sizeof(AttendTile)), kAlignment);
}

WorkspaceLayout LayOutWorkspace(const WorkspaceShape& shape, const WorkspaceFacts& facts) {
  WorkspaceLayout layout;
  int64_t next = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t at = next;
    next += RoundUp(bytes, kAlignment);
    return at;
  };
  const int64_t rows = std::max<int64_t>(shape.rows_max, 1);
  const int64_t queries = shape.queries_max;
  // The largest single calls: geometry with attention tiles (at worst a span a row, and a tile for
  // each of its heads and chunks), and queries with their rules. Tiles are bounded by items: 64 a
  // tile, or one tile a span and chunk.
  const int64_t chunks = NumAttendChunks(std::max(shape.positions_max, 1));
  const int64_t heads = std::max<int64_t>(shape.cols_max / std::max(shape.head_dim_max, 1), 1);
  const int64_t tiles = (rows * heads / kAttendItems + rows) * chunks;
  const int64_t query_bytes = static_cast<int64_t>(sizeof(DeviceQuery)) +
                              kVocabularyRulesMax * static_cast<int64_t>(sizeof(DeviceRule)) + 16;
  layout.staged_bytes =
      GeometryBytes(rows, rows, tiles) + rows * 8 + queries * query_bytes + 8 * 1024 + kStagedSlack;
  layout.staged = take(layout.staged_bytes);

  layout.partial_floats = PartialFloatsWanted(facts.num_multiprocessors);
  layout.partials = take(layout.partial_floats * 4);
  layout.num_tickets = TicketsWanted(facts.num_multiprocessors);
  layout.tickets = take(layout.num_tickets * 4);
  if (facts.fp8) {
    const int64_t slots = std::max(rows, 2 * std::min(queries, kGroupQueries));
    layout.quantized = take(slots * RoundUp(shape.cols_max, kWeightRowBytes));
    layout.quantized_scales = take(slots * 4);
  }
  if (chunks > 1) {
    const int64_t part_bytes = (shape.cols_max + 2 * heads) * 4;
    // At least one tile of 64 rows.
    layout.chunk_parts =
        std::min(rows * chunks, std::max(kChunkBytesMax / part_bytes, 2 * kAttendItems * chunks));
    layout.chunk_sums = take(layout.chunk_parts * shape.cols_max * 4);
    layout.chunk_totals = take(layout.chunk_parts * heads * 2 * 4);
  }
  if (shape.num_experts > 0) {
    const int64_t places = rows * shape.experts_per_row;
    layout.expert_begins = take((shape.num_experts + 1) * 4);
    layout.expert_tile_begins = take((shape.num_experts + 1) * 4);
    layout.expert_places = take(places * 4);
    layout.expert_where = take(places * 4);
    layout.expert_inner = take(places * RoundUp(shape.expert_mlp_dim, 64) * 4);
    layout.expert_outputs = take(places * RoundUp(shape.expert_dim, 64) * 4);
  }
  if (shape.vocabulary > 0 && queries > 0) {
    const int64_t num_chunks = (shape.vocabulary + kVocabularyChunk - 1) / kVocabularyChunk;
    layout.group_queries = static_cast<int32_t>(std::min(queries, kGroupQueries));
    layout.summaries = take(layout.group_queries * num_chunks * int64_t{sizeof(ChunkSummary)});
    layout.answers = take(queries * int64_t{sizeof(DeviceAnswer)});
    // A guided query needs two.
    layout.whole_rows =
        static_cast<int32_t>(std::clamp<int64_t>(kWholeLogitsBytesMax / (shape.vocabulary * 4), 2,
                                                 std::min<int64_t>(kWholeRowsMax, 2 * queries)));
    layout.whole_logits = take(layout.whole_rows * RoundUp(shape.vocabulary, 4) * 4);
  }
  if (shape.soft_rows_max > 0) {
    layout.soft_parts = SoftParts(shape.vocabulary);
    const int64_t places = layout.soft_parts * shape.soft_rows_max;
    layout.soft_logits = take(places * kSoftChunk * 4);
    layout.soft_probabilities = take(places * kSoftChunk * 2);
    layout.soft_tops = take(places * 4);
    layout.soft_masses = take(places * 4);
    layout.soft_factors = take(places * 4);
    layout.soft_sums = take(places * shape.cols_max * 4);
  }
  layout.total_bytes = next;
  return layout;
}

}  // namespace cinnabar::cuda
