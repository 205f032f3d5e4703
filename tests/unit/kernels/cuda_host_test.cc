// What the CUDA backend decides and computes on the host: small floats, plans, queries, pages. Runs
// everywhere, with or without nvcc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/vocabulary_kernels.h"
#include "kernels/cuda/math.h"
#include "kernels/cuda/page_pool.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/query_batch.h"

namespace cinnabar::cuda {
namespace {

// --- math.h

// Rounding to nearest even against a search: no value of the format is nearer, and of two that are
// as near the even one is taken. `values` are the format's non-negative finite ones, ascending.
template <typename Round>
void ExpectRoundsToNearestEven(const std::vector<float>& values, const Round& round, int seed) {
  std::mt19937 random(seed);
  for (size_t i = 0; i + 1 < values.size(); ++i) {
    const double low = values[i], high = values[i + 1], middle = (low + high) / 2;
    const auto expect = [&](double x, size_t want) {
      const auto narrowed = static_cast<float>(x);
      if (narrowed != x) return;
      ASSERT_EQ(round(narrowed), values[want]) << x;
      ASSERT_EQ(round(-narrowed), -values[want]) << x;
    };
    expect(low, i);
    expect(middle, i % 2 == 0 ? i : i + 1);
    expect(std::nextafter(static_cast<float>(middle), 0.0F), i);
    expect(std::nextafter(static_cast<float>(middle), INFINITY), i + 1);
    const double between = low + (high - low) * (random() % 1000) / 1000.0;
    const auto x = static_cast<float>(between);
    if (x == middle) continue;
    ASSERT_EQ(round(x), values[x < middle ? i : i + 1]) << x;
  }
}

TEST(MathTest, E4m3IsRoundedToNearestEven) {
  std::vector<float> values;
  for (int bits = 0; bits < 0x7F; ++bits) values.push_back(FromE4m3(static_cast<uint8_t>(bits)));
  EXPECT_EQ(values[1], 0x1p-9F);
  EXPECT_EQ(values[8], 0x1p-6F);
  EXPECT_EQ(values.back(), 448.0F);
  EXPECT_TRUE(std::is_sorted(values.begin(), values.end()));
  ExpectRoundsToNearestEven(
      values, [](float x) { return FromE4m3(ToE4m3(x)); }, 1);
  for (const float beyond : {449.0F, 464.0F, 1e9F, INFINITY}) {
    EXPECT_EQ(FromE4m3(ToE4m3(beyond)), 448.0F);
    EXPECT_EQ(FromE4m3(ToE4m3(-beyond)), -448.0F);
  }
  EXPECT_TRUE(std::isnan(FromE4m3(ToE4m3(NAN))));
  for (int bits = 0; bits < 256; ++bits) {
    if ((bits & 0x7F) == 0x7F) continue;
    EXPECT_EQ(ToE4m3(FromE4m3(static_cast<uint8_t>(bits))), bits);
  }
}

TEST(MathTest, HalvesAreRoundedToNearestEven) {
  std::vector<float> values;
  for (int bits = 0; bits < 0x7C00; ++bits) values.push_back(FromF16(static_cast<uint16_t>(bits)));
  ExpectRoundsToNearestEven(
      values, [](float x) { return FromF16(ToF16(x)); }, 2);
  for (int bits = 0; bits < 0x7C00; ++bits) {
    EXPECT_EQ(FromF16(static_cast<uint16_t>(bits)),
              static_cast<float>(
                  std::ldexp(1.0, -24) *
                  (bits < 0x400 ? bits : std::ldexp(0x400 + bits % 0x400, bits / 0x400 - 1))));
  }
  EXPECT_EQ(ToF16(65519.0F), 0x7BFF);
  EXPECT_EQ(ToF16(65520.0F), 0x7C00);
  EXPECT_EQ(ToF16(-INFINITY), 0xFC00);
  EXPECT_TRUE(std::isnan(FromF16(ToF16(NAN))));
}

TEST(MathTest, Bf16IsRoundedToNearestEven) {
  std::vector<float> values;
  for (int bits = 0; bits < 0x7F80; bits += 1) {
    values.push_back(FromBf16(static_cast<uint16_t>(bits)));
  }
  ExpectRoundsToNearestEven(
      values, [](float x) { return FromBf16(ToBf16(x)); }, 3);
  EXPECT_EQ(ToBf16(INFINITY), 0x7F80);
  EXPECT_TRUE(std::isnan(FromBf16(ToBf16(NAN))));
  EXPECT_TRUE(std::isnan(FromBf16(ToBf16(FloatOfBits(0x7F800001U)))));
}

TEST(MathTest, GumbelNumbersAreTheCpusBitForBit) {
  std::mt19937 random(4);
  for (int round = 0; round < 20000; ++round) {
    uint32_t words[16];
    alignas(64) float want[16];
    for (uint32_t lane = 0; lane < 16; ++lane) {
      const uint32_t near = round * 16 + lane;
      const uint32_t choices[] = {near / 4, ~(near / 4), 0x80000000U + near - 160000U,
                                  0xB504F334U + near - 160000U, static_cast<uint32_t>(random())};
      words[lane] = choices[lane % 5];
    }
    alignas(64) uint32_t aligned[16];
    std::memcpy(aligned, words, sizeof(words));
    cpu::kVocabularyGeneric.gumbel(aligned, want);
    for (int lane = 0; lane < 16; ++lane) {
      ASSERT_EQ(BitsOfFloat(Gumbel(words[lane])), BitsOfFloat(want[lane])) << words[lane];
    }
  }
}

TEST(MathTest, Exp2AndActivationsAreWithinTheirBounds) {
  EXPECT_EQ(Exp2(0.0F), 1.0F);
  for (float d = -126.0F; d <= 0.0F; d += 0.00937F) {
    EXPECT_NEAR(Exp2(d), std::exp2(static_cast<double>(d)), 1e-7 * std::exp2(d));
  }
  for (float x = -30.0F; x <= 30.0F; x += 0.0123F) {
    const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * static_cast<double>(x) * x);
    EXPECT_NEAR(Silu(x), x / (1 + std::exp(-static_cast<double>(x))), 1e-6 * (1 + std::abs(x)));
    EXPECT_NEAR(GeluTanh(x), 0.5 * x * (1 + std::tanh(u)), 2e-6 * (1 + std::abs(x)));
  }
  EXPECT_EQ(Silu(-200.0F), 0.0F);
}

TEST(MathTest, KeysAreOrderedLikeLogits) {
  const std::vector<float> values = {-3e38F, -1.0F, -1e-40F, 0.0F, 1e-40F, 2.0F, 3e38F};
  for (size_t i = 0; i + 1 < values.size(); ++i) {
    EXPECT_LT(OrderedKey(values[i]), OrderedKey(values[i + 1]));
  }
  EXPECT_EQ(OrderedKey(-0.0F), OrderedKey(0.0F));
  EXPECT_GT(OrderedKey(-3e38F), 0U);
}

// --- plan.h: products

TEST(PlanTest, TilesHoldTheirRows) {
  for (const bool fp8 : {false, true}) {
    for (int64_t rows = 1; rows < 600; ++rows) {
      const int32_t tile = TileRows(rows, fp8);
      EXPECT_TRUE(tile == 16 || tile == 32 || tile == 64 || (tile == 128 && !fp8));
      if (rows <= 64) {
        EXPECT_GE(tile, rows);
      }
      if (tile > 16 && tile < 128 && rows <= 64) {
        EXPECT_LT(tile / 2, rows);
      }
      EXPECT_EQ(VocabularyTileRows(rows, fp8), rows <= 32 || fp8 ? 32 : 128);
    }
  }
}

TEST(PlanTest, HopperTilesHoldTheirRowsAndPadLittle) {
  for (const bool fp8 : {false, true}) {
    for (const int32_t segments : {1, 4}) {
      for (int64_t rows = 1; rows < 3000; ++rows) {
        const int32_t tile = HopperTileRows(rows, fp8, segments);
        EXPECT_TRUE(tile == 16 || tile == 32 || tile == 64 || tile == 128 || tile == 256);
        if (fp8 || segments > 1) {
          EXPECT_LE(tile, 128);
        }
        if (rows <= 128) {
          EXPECT_GE(tile, rows);
          EXPECT_TRUE(tile == 16 || tile / 2 < rows);
        }
        if (tile == 256) {
          EXPECT_LE(RoundUp(rows, 256), RoundUp(rows, 128) * 1.1);
        }
      }
    }
  }
  EXPECT_EQ(HopperTileRows(256, false, 1), 256);  // 8 blocks of 32
  EXPECT_EQ(HopperTileRows(300, false, 1), 128);
  EXPECT_EQ(HopperTileRows(2048, false, 1), 256);
}

TEST(PlanTest, SegmentsAreWholeStagesAndCoverARow) {
  for (const int64_t rows : {1, 64, 96, 1024, 4096, 12288, 152064}) {
    for (const int64_t row_bytes : {128, 1024, 2048, 7168, 8192, 24576, 37888}) {
      const int64_t segment = SegmentBytes(rows, row_bytes);
      SCOPED_TRACE(absl::StrCat(rows, " rows of ", row_bytes, ": ", segment));
      EXPECT_EQ(segment % kWeightRowBytes, 0);
      const int64_t segments = (row_bytes + segment - 1) / segment;
      EXPECT_GE(segments, 1);
      EXPECT_LE(segments, 8);
      if (segments > 1) {
        EXPECT_GE(segment, 1024);
      }
      // Enough tiles already: one piece.
      if ((rows + 63) / 64 >= kTilesWanted) {
        EXPECT_EQ(segments, 1);
      }
    }
  }
  EXPECT_EQ(SegmentBytes(4096, 8192), 2048);   // an output projection of 4,096: 4 segments
  EXPECT_EQ(SegmentBytes(12288, 8192), 8192);  // a fused q, k, v: one
  EXPECT_EQ(SegmentBytes(4096, 24576), 6144);  // a down projection
}

TEST(PlanTest, SegmentsRunSideBySideOnlyWhereTheDeviceWouldIdle) {
  EXPECT_FALSE(RunsSplit(1, 16 * 64, 1, 132, 1 << 30));
  EXPECT_TRUE(RunsSplit(64, 32 * 64, 4, 132, PartialFloatsWanted(132)));
  EXPECT_TRUE(RunsSplit(131, 128 * 128, 4, 132, PartialFloatsWanted(132)));
  EXPECT_FALSE(RunsSplit(132, 128 * 128, 4, 132, PartialFloatsWanted(132)));
  EXPECT_FALSE(RunsSplit(64, 32 * 64, 4, 132, 64 * 4 * 32 * 64 - 1));
  // Whatever runs split has a ticket.
  EXPECT_GE(TicketsWanted(132), 131);
}

TEST(PlanTest, AProductRunsSplitWhereItsTilesHaveTicketsAndRoom) {
  WeightView weight;
  weight.rows = 256;
  weight.num_segments = 4;
  WorkspaceLayout layout;
  layout.num_tickets = 4;
  layout.partial_floats = 4 * 4 * 64 * 16;
  ProductPlan plan = PlanProduct(/*num_rows=*/16, weight, /*num_multiprocessors=*/132, layout);
  EXPECT_EQ(plan.tile_rows, 16);
  EXPECT_TRUE(plan.split) << "4 tiles of 64 outputs";
  EXPECT_FALSE(PlanProduct(17, weight, 132, layout).split) << "sums of 32 rows do not fit";
  layout.num_tickets = 3;
  EXPECT_FALSE(PlanProduct(16, weight, 132, layout).split);
  weight.tiled = true;
  plan = PlanProduct(16, weight, 132, layout);
  EXPECT_EQ(plan.tile_rows, 16);
  EXPECT_TRUE(plan.split) << "2 tiles of 128 outputs";
}

TEST(PlanTest, Fp8LeavesHeadsRoutersAndSmallMatricesAlone) {
  EXPECT_TRUE(WantsFp8(RowOrder::kStacked, 12288, 4096));     // q, k, v
  EXPECT_TRUE(WantsFp8(RowOrder::kGatedPairs, 24576, 4096));  // gate, up
  EXPECT_TRUE(WantsFp8(RowOrder::kStacked, 4096, 12288));     // down
  EXPECT_FALSE(WantsFp8(RowOrder::kStacked, 126464, 4096));   // a vocabulary head
  EXPECT_FALSE(WantsFp8(RowOrder::kStacked, 128, 2048));      // a router
  EXPECT_FALSE(WantsFp8(RowOrder::kStacked, 9216, 128));      // modulations
}

TEST(PlanTest, GatedPairsAreInterleavedByEights) {
  std::set<std::pair<bool, int64_t>> seen;
  for (int64_t row = 0; row < 80; ++row) {
    const GatedSource source = GatedSourceOf(row);
    EXPECT_EQ(source.up, row % 16 >= 8);
    EXPECT_LT(source.output, 40);
    EXPECT_TRUE(seen.emplace(source.up, source.output).second);
    // What the kernels assume: a gate's up lies 8 rows behind it.
    if (source.up) continue;
    EXPECT_TRUE(GatedSourceOf(row + 8).up);
    EXPECT_EQ(GatedSourceOf(row + 8).output, source.output);
    EXPECT_EQ(source.output, row / 16 * 8 + row % 16);
  }
}

// --- plan.h: attention

std::vector<SequenceSpan> RandomSpans(int seed, int32_t block_length) {
  std::mt19937 random(seed);
  std::vector<SequenceSpan> spans;
  int32_t row = 0;
  for (int s = 0; s < 5; ++s) {
    SequenceSpan span{.row_begin = row, .num_rows = 1 + static_cast<int32_t>(random() % 150)};
    span.block_length = block_length;
    if (block_length > 0) span.first_position = static_cast<int32_t>(random() % 40) * block_length;
    row += span.num_rows;
    spans.push_back(span);
  }
  return spans;
}

TEST(PlanTest, VisibleKeysFollowTheContract) {
  const SequenceSpan full{.num_rows = 10, .first_position = 3};
  EXPECT_EQ(VisibleKeys(full, 0), 13);
  const SequenceSpan causal{.num_rows = 10, .first_position = 8, .block_length = 4};
  EXPECT_EQ(VisibleKeys(causal, 0), 12);
  EXPECT_EQ(VisibleKeys(causal, 3), 12);
  EXPECT_EQ(VisibleKeys(causal, 4), 16);
  EXPECT_EQ(VisibleKeys(causal, 9), 18);  // the last block is not whole
  // Keys that an earlier pass left behind the span.
  EXPECT_EQ(VisibleKeys({.num_rows = 10, .first_position = 3, .keys_end = 40}, 0), 40);
  EXPECT_EQ(VisibleKeys({.num_rows = 4, .first_position = 8, .block_length = 8, .keys_end = 15}, 0),
            15);
}

TEST(PlanTest, AttentionTilesCoverEveryItemAndChunkOnce) {
  for (const auto& [block_length, window] :
       std::vector<std::pair<int32_t, int32_t>>{{0, 0}, {8, 0}, {32, 0}, {0, 700}, {1, 700}}) {
    for (const int32_t group : {1, 3, 7, 8}) {
      const auto spans = RandomSpans(group, block_length);
      std::map<std::pair<int32_t, int32_t>, std::set<int32_t>> chunks;  // by span and first item
      for (const AttendTile& tile : AttendTiles(spans, group, window)) {
        EXPECT_EQ(tile.first % kAttendItems, 0);
        EXPECT_TRUE(chunks[std::make_pair(tile.span, tile.first)].insert(tile.chunk).second);
        EXPECT_TRUE(window > 0 || tile.chunk < tile.num_chunks);
        // 700 positions touch three chunks at most; a span of full attention adds its own.
        EXPECT_TRUE(window == 0 || block_length == 0 || tile.num_chunks <= 3);
        EXPECT_GE(tile.num_chunks, 1);
      }
      for (size_t s = 0; s < spans.size(); ++s) {
        for (int32_t row = 0; row < spans[s].num_rows; ++row) {
          for (int32_t head = 0; head < group; ++head) {
            const int32_t first = (row * group + head) / kAttendItems * kAttendItems;
            const auto& of = chunks[std::make_pair(static_cast<int32_t>(s), first)];
            const int32_t end = NumAttendChunks(VisibleKeys(spans[s], row));
            for (int32_t chunk = FirstKey(spans[s], row, window) / kAttendChunk; chunk < end;
                 ++chunk) {
              EXPECT_EQ(of.count(chunk), 1U);
            }
          }
        }
      }
    }
  }
}

TEST(PlanTest, AttentionGroupsFitAndTearNoRow) {
  for (const int32_t group : {1, 3, 7}) {
    const auto spans = RandomSpans(20 + group, 32);
    const auto tiles = AttendTiles(spans, group, /*window=*/0);
    for (const int64_t room : {int64_t{200}, int64_t{500}, int64_t{100000}}) {
      const auto groups = AttendGroups(spans, tiles, group, room);
      int32_t next_tile = 0;
      std::vector<int> covered(spans.back().row_begin + spans.back().num_rows, 0);
      for (const AttendGroup& part : groups) {
        EXPECT_EQ(part.tile_begin, next_tile);
        next_tile += part.num_tiles;
        for (int32_t row = 0; row < part.num_rows; ++row) ++covered[part.row_begin + row];
        int32_t spans_tiles = 0;
        for (int32_t t = part.tile_begin; t < next_tile; ++t) {
          EXPECT_LE(tiles[t].num_chunks, part.num_chunks);
          spans_tiles += tiles[t].chunk == 0 ? 1 : 0;
          const SequenceSpan& span = spans[tiles[t].span];
          EXPECT_GE(span.row_begin + tiles[t].first / group, part.row_begin);
          const int32_t last_item =
              std::min(tiles[t].first + kAttendItems, span.num_rows * group) - 1;
          EXPECT_LT(span.row_begin + last_item / group, part.row_begin + part.num_rows);
        }
        // Either it fits, or it is as small as rows that share tiles let it be.
        if (int64_t{part.num_rows} * part.num_chunks > room && group == 1) {
          EXPECT_EQ(spans_tiles, 1);
        }
      }
      EXPECT_EQ(next_tile, static_cast<int32_t>(tiles.size()));
      EXPECT_THAT(covered, testing::Each(1));
    }
  }
}

// --- plan.h: memory

TEST(PlanTest, KvPagesHoldEveryPosition) {
  for (const int32_t positions : {1, 63, 64, 65, 1000}) {
    for (const int32_t head_dim : {2, 24, 64, 100, 128}) {
      KvShape shape = {3, 2, head_dim, positions};
      const KvLayout bf16 = LayOutKv(shape, DType::kBf16);
      const KvLayout f32 = LayOutKv(shape, DType::kF32);
      EXPECT_GE(HeadStride(head_dim), head_dim);
      EXPECT_EQ(HeadStride(head_dim) % 16, 0);
      EXPECT_GE(bf16.pages_per_layer * kPagePositions, positions);
      EXPECT_LT((bf16.pages_per_layer - 1) * kPagePositions, positions);
      EXPECT_GE(bf16.page_bytes, int64_t{2} * 2 * kPagePositions * HeadStride(head_dim) * 2);
      EXPECT_EQ(bf16.num_pages, 3 * bf16.pages_per_layer);
      EXPECT_GE(bf16.table_bytes, bf16.num_pages * 8);
      EXPECT_EQ(bf16.total_bytes, bf16.num_pages * bf16.page_bytes + bf16.table_bytes);
      EXPECT_GE(f32.page_bytes, bf16.page_bytes);
      // Layers with heads of their own.
      shape.num_other_layers = 2;
      shape.other_kv_heads = 1;
      shape.other_head_dim = 40;
      const KvLayout two = LayOutKv(shape, DType::kBf16);
      EXPECT_EQ(two.num_pages, bf16.num_pages);
      EXPECT_EQ(two.num_other_pages, 2 * two.pages_per_layer);
      EXPECT_GE(two.other_page_bytes, int64_t{2} * kPagePositions * HeadStride(40) * 2);
      EXPECT_GE(two.table_bytes, (two.num_pages + two.num_other_pages) * 8);
      EXPECT_EQ(two.total_bytes, two.num_pages * two.page_bytes +
                                     two.num_other_pages * two.other_page_bytes + two.table_bytes);
    }
  }
}

TEST(PlanTest, WorkspacePartsDoNotOverlap) {
  WorkspaceShape shape{.rows_max = 2048,
                       .cols_max = 12288,
                       .vocabulary = 126464,
                       .queries_max = 2048,
                       .positions_max = 4096,
                       .head_dim_max = 128,
                       .num_experts = 64,
                       .experts_per_row = 8,
                       .expert_dim = 2048,
                       .expert_mlp_dim = 1024};
  for (const bool fp8 : {false, true}) {
    const WorkspaceLayout l = LayOutWorkspace(shape, {.num_multiprocessors = 132, .fp8 = fp8});
    const int64_t places = 2048 * 8, chunks = (126464 + kVocabularyChunk - 1) / kVocabularyChunk;
    std::vector<std::pair<int64_t, int64_t>> parts = {
        {l.staged, l.staged_bytes},
        {l.partials, l.partial_floats * 4},
        {l.tickets, l.num_tickets * 4},
        {l.chunk_sums, l.chunk_parts * shape.cols_max * 4},
        {l.chunk_totals, l.chunk_parts * (shape.cols_max / 128) * 8},
        {l.expert_begins, 65 * 4},
        {l.expert_tile_begins, 65 * 4},
        {l.expert_places, places * 4},
        {l.expert_where, places * 4},
        {l.expert_inner, places * 1024 * 4},
        {l.expert_outputs, places * 2048 * 4},
        {l.summaries, l.group_queries * chunks * int64_t{sizeof(ChunkSummary)}},
        {l.answers, 2048 * int64_t{sizeof(DeviceAnswer)}},
        {l.whole_logits, int64_t{l.whole_rows} * 126464 * 4}};
    if (fp8) parts.push_back({l.quantized, 2048 * 12288});
    if (fp8) parts.push_back({l.quantized_scales, 2048 * 4});
    std::sort(parts.begin(), parts.end());
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      EXPECT_LE(parts[i].first + parts[i].second, parts[i + 1].first) << i;
      EXPECT_EQ(parts[i].first % 256, 0);
    }
    EXPECT_LE(parts.back().first + parts.back().second, l.total_bytes);
    EXPECT_GE(l.whole_rows, 2);
    // Never vocabulary x rows: that would be a gigabyte.
    EXPECT_LT(int64_t{l.whole_rows} * 126464 * 4, int64_t{65} << 20);
  }
  // A small shape takes little, and a guided query always has its two rows.
  shape = {.rows_max = 1, .cols_max = 8, .vocabulary = 10, .queries_max = 1};
  EXPECT_LT(LayOutWorkspace(shape, {.num_multiprocessors = 1}).total_bytes, 1 << 20);
  EXPECT_EQ(LayOutWorkspace(shape, {.num_multiprocessors = 1}).whole_rows, 2);
}

// --- query_batch.h

TEST(QueryBatchTest, APairLiesInOneTileAndSlotsAreForeseen) {
  std::mt19937 random(3);
  QueryBatch batch;
  for (int32_t i = 0; i < 200; ++i) {
    VocabularyQuery query;
    query.hidden_row = 2 * i;
    if (random() % 2 == 0) query.unconditional_row = 2 * i + 1;
    const size_t want = batch.SlotsWith(query);
    batch.Add(query, /*vocabulary=*/100);
    ASSERT_EQ(batch.slot_rows.size(), want);
    ASSERT_EQ(batch.slot_queries.size(), want);
    const int32_t slot = batch.queries.back().slot;
    EXPECT_EQ(batch.slot_rows[slot], query.hidden_row);
    EXPECT_EQ(batch.slot_queries[slot], i);
    if (query.unconditional_row < 0) continue;
    EXPECT_EQ(slot % 2, 0);
    EXPECT_EQ(batch.slot_rows[slot + 1], query.unconditional_row);
  }
  std::vector<int32_t> named;
  for (const int32_t query : batch.slot_queries) {
    if (query != kNoRow) named.push_back(query);
  }
  ASSERT_EQ(named.size(), batch.queries.size());
  EXPECT_TRUE(std::is_sorted(named.begin(), named.end()));
}

// --- page_pool.h

struct FakeMemory {
  std::map<char*, int64_t> taken;
  int64_t limit = 1 << 30;
  int64_t used = 0;

  PagePool::Memory functions() {
    return {[this](int64_t bytes) -> absl::StatusOr<void*> {
              if (used + bytes > limit) return absl::ResourceExhaustedError("full");
              used += bytes;
              char* memory = new char[bytes];
              taken[memory] = bytes;
              return memory;
            },
            [this](void* memory) {
              auto found = taken.find(static_cast<char*>(memory));
              ASSERT_NE(found, taken.end());
              used -= found->second;
              delete[] found->first;
              taken.erase(found);
            }};
  }
};

TEST(PagePoolTest, PagesAreDistinctAndComeBack) {
  FakeMemory memory;
  {
    PagePool pool(256, 4, memory.functions());
    std::set<void*> mine;
    std::mt19937 random(5);
    std::vector<std::vector<void*>> held;
    int64_t peak = 0;
    for (int turn = 0; turn < 2000; ++turn) {
      if (held.empty() || random() % 2 == 0) {
        auto pages = *pool.Take(random() % 7);
        for (void* page : pages) EXPECT_TRUE(mine.insert(page).second) << "given twice";
        held.push_back(pages);
      } else {
        const size_t which = random() % held.size();
        for (void* page : held[which]) mine.erase(page);
        pool.Give(held[which]);
        held.erase(held.begin() + which);
      }
      EXPECT_EQ(pool.pages_used(), static_cast<int64_t>(mine.size()));
      EXPECT_EQ(memory.used, pool.pages_held() * 256);
      peak = std::max(peak, pool.pages_used());
      EXPECT_LE(pool.pages_held(), 2 * peak + 7);
      for (void* page : mine) {
        const auto slab = std::prev(memory.taken.upper_bound(static_cast<char*>(page)));
        ASSERT_LE(static_cast<char*>(page) + 256, slab->first + slab->second);
      }
    }
    for (const auto& pages : held) pool.Give(pages);
    EXPECT_EQ(pool.pages_used(), 0);
  }
  EXPECT_EQ(memory.used, 0);
}

TEST(PagePoolTest, TakesAllOrNothing) {
  FakeMemory memory;
  memory.limit = 256 * 10;
  PagePool pool(256, 4, memory.functions());
  auto first = *pool.Take(9);
  EXPECT_EQ(pool.Take(2).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(pool.pages_used(), 9);
  auto last = *pool.Take(1);  // less than a slab is left, and enough
  EXPECT_EQ(pool.pages_held(), 10);
  pool.Give(first);
  pool.Give(last);
  EXPECT_TRUE(pool.Take(10).ok());
}

TEST(PagePoolDeathTest, AForeignOrDoublePageIsABug) {
  FakeMemory memory;
  PagePool pool(256, 4, memory.functions());
  auto pages = *pool.Take(1);
  char other[8];
  void* foreign = other;
  EXPECT_DEATH(pool.Give({&foreign, 1}), "");
  pool.Give(pages);
  EXPECT_DEATH(pool.Give(pages), "twice");
}

}  // namespace
}  // namespace cinnabar::cuda
