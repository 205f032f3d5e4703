// Attention over paged keys and values, with an online softmax.
//
// Batch invariance, for both kernels. A row's keys are walked in tiles of kPagePositions absolute
// positions, ascending, and in chunks of kAttendChunk positions: which of each depends on the
// row's own num_keys and, with a window, on its own first key. A chunk's sums begin at 0 and end
// unnormalised beside the chunk's largest score and sum of exponentials; a row of one chunk is
// finished at once, chunks are merged in order by another kernel. Keys that a row does not see get
// the score -inf, hence the weight exp(-inf) = 0 exactly: a tile in which a row sees nothing leaves
// its largest score as it is, multiplies its sums by exp(0) = 1 and adds zeros (what is read in the
// place of such keys is finite: zeros beyond the last, keys of earlier positions before a window).
// So it does not matter what the rows beside it see, nor in which block or lane a row is.
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {
namespace {

// The first position that a row sees.
CINNABAR_DEVICE int FirstKey(const AttendTask& task, const RowFacts& row) {
  const SpanFacts& span = task.spans[row.span];
  const int last = span.block_length == 0 ? span.first_position : row.position;
  return task.window == 0 || last < task.window ? 0 : last - task.window + 1;
}
CINNABAR_DEVICE int FirstChunk(const AttendTask& task, const RowFacts& row) {
  return FirstKey(task, row) / kAttendChunk;
}
CINNABAR_DEVICE int NumChunks(const AttendTask& task, const RowFacts& row) {
  return (row.num_keys + kAttendChunk - 1) / kAttendChunk - FirstChunk(task, row);
}

// Where page `index` of the span lies.
CINNABAR_DEVICE const unsigned char* PageOf(const AttendTask& task, const SpanFacts& span,
                                            int index) {
  return static_cast<const unsigned char*>(span.pages[task.layer * span.pages_per_layer + index]);
}

// Which of the partial results belongs to a row's chunk, counted from its first, and a head.
CINNABAR_DEVICE int64_t PartOf(const AttendTask& task, int chunk, int row, int head) {
  return (static_cast<int64_t>(chunk) * task.num_rows + row - task.row_base) * task.num_heads +
         head;
}

CINNABAR_DEVICE uint32_t PackBf16(float low, float high) {
  return static_cast<uint32_t>(ToBf16(high)) << 16 | ToBf16(low);
}

// --- Tensor cores, bf16
//
// A block of 4 warps takes 64 items (query row, head of the group) under one kv head and one chunk;
// a warp has 16 items. Shared memory: the queries [64][dim], then two stages of a page's keys and
// values, [64][dim] each, dim = kDim x 2 bytes a row in 16-byte pieces, swizzled (piece ^ row % 8):
// 16 + 2 x 32 KiB at 128. The sums of 16 x dim outputs are registers, 64 a thread at 128; 2 blocks
// on a multiprocessor. Bound by the tensor cores at long spans, by latency at one short span.
constexpr int kTensorThreads = 128;

template <int kDim>
struct AttendShape {
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kTileBytes = kPagePositions * kRowBytes;
  static constexpr int kQueryBytes = kAttendItems * kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + 4 * kTileBytes;

  CINNABAR_DEVICE static int Swizzled(int row, int piece) {
    return row * kRowBytes + ((piece ^ (row & (kPieces < 8 ? kPieces - 1 : 7))) << 4);
  }
};

template <int kDim>
CINNABAR_KERNEL(kTensorThreads, 2)
AttendTensorKernel(AttendTask task) {
  using Shape = AttendShape<kDim>;
  unsigned char* shared = SharedBytes();
  const AttendTile tile = task.tiles[BlockX()];
  const SpanFacts span = task.spans[tile.span];
  const int kv_head = BlockY();
  const int group = task.num_heads / task.num_kv_heads;
  const int num_items = span.num_rows * group;
  const int thread = ThreadIndex();
  const int warp = thread / 32;
  const int lane = thread % 32;

  const int last_item =
      tile.first + kAttendItems < num_items ? tile.first + kAttendItems - 1 : num_items - 1;
  const int tile_keys = task.rows[span.row_begin + last_item / group].num_keys;
  // The first row of a tile sees furthest back, the last one furthest ahead.
  const int tile_first = FirstKey(task, task.rows[span.row_begin + tile.first / group]);
  const int chunk_begin = tile.chunk * kAttendChunk;
  const int chunk_end = chunk_begin + kAttendChunk;
  const int key_begin = tile_first > chunk_begin ? tile_first : chunk_begin;
  const int key_end = tile_keys < chunk_end ? tile_keys : chunk_end;
  const int first_page = key_begin / kPagePositions;
  const int end_page = (key_end + kPagePositions - 1) / kPagePositions;
  const int head_bytes = kPagePositions * task.head_stride * 2;

  // Bytes of a row that exist, from piece `piece` on.
  const auto there = [&](int piece, int columns) {
    const int left = 2 * columns - 16 * piece;
    return left >= 16 ? 16 : left > 0 ? left : 0;
  };
  const auto load_page = [&](int page, unsigned char* at) {
    const unsigned char* keys = PageOf(task, span, page) + kv_head * head_bytes;
    const unsigned char* values = keys + task.num_kv_heads * head_bytes;
    for (int i = thread; i < kPagePositions * Shape::kPieces; i += kTensorThreads) {
      const int row = i / Shape::kPieces;
      const int piece = i % Shape::kPieces;
      const int bytes = page * kPagePositions + row < key_end ? there(piece, task.head_stride) : 0;
      const int64_t from = static_cast<int64_t>(row) * task.head_stride * 2 + piece * 16;
      CopyAsync16(at + Shape::Swizzled(row, piece), keys + from, bytes);
      CopyAsync16(at + Shape::kTileBytes + Shape::Swizzled(row, piece), values + from, bytes);
    }
  };

  // The queries: plain loads, for a head may begin anywhere.
  for (int i = thread; i < kAttendItems * kDim; i += kTensorThreads) {
    const int item = tile.first + i / kDim;
    const int column = i % kDim;
    uint16_t value = 0;
    if (item < num_items && column < task.head_dim) {
      const int head = kv_head * group + item % group;
      value = static_cast<const uint16_t*>(
          task.q.data)[(span.row_begin + item / group) * task.q.stride +
                       static_cast<int64_t>(head) * task.head_dim + column];
    }
    *reinterpret_cast<uint16_t*>(shared + Shape::Swizzled(i / kDim, column / 8) + column % 8 * 2) =
        value;
  }
  unsigned char* stages = shared + Shape::kQueryBytes;
  load_page(first_page, stages);
  CopyCommit();

  // Items of this thread: rows lane / 4 and lane / 4 + 8 of the warp's 16.
  int num_keys[2];
  int first_key[2];
  int64_t rows[2];
  int heads[2];
  for (int half = 0; half < 2; ++half) {
    const int item = tile.first + warp * 16 + lane / 4 + 8 * half;
    rows[half] = item < num_items ? span.row_begin + item / group : -1;
    heads[half] = kv_head * group + item % group;
    num_keys[half] = item < num_items ? task.rows[rows[half]].num_keys : 0;
    first_key[half] = item < num_items ? FirstKey(task, task.rows[rows[half]]) : 0;
  }

  float sums[kDim / 8][4];
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[i][c] = 0.0F;
  }
  float largest[2] = {-kInfinityF, -kInfinityF};
  float totals[2] = {0.0F, 0.0F};  // of this lane's columns; lanes are joined at the end

  for (int page = first_page; page < end_page; ++page) {
    unsigned char* stage = stages + (page - first_page) % 2 * 2 * Shape::kTileBytes;
    if (page + 1 < end_page) {
      load_page(page + 1, stages + (page + 1 - first_page) % 2 * 2 * Shape::kTileBytes);
    }
    CopyCommit();
    CopyWait<1>();
    BlockBarrier();

    float scores[kPagePositions / 8][4];
#pragma unroll
    for (int j = 0; j < kPagePositions / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[j][c] = 0.0F;
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t a[4];
      LoadMatrix4(a, shared + Shape::Swizzled(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < kPagePositions / 8; j += 2) {
        uint32_t b[4];
        const int key = 8 * j + lane % 8 + lane / 16 * 8;
        LoadMatrix4(b, stage + Shape::Swizzled(key, 2 * k + lane / 8 % 2));
        MmaBf16(scores[j], a, b[0], b[1]);
        MmaBf16(scores[j + 1], a, b[2], b[3]);
      }
    }

    // Scores to weights. A row's scores lie in the four lanes of its group.
    float tile_largest[2] = {-kInfinityF, -kInfinityF};
#pragma unroll
    for (int j = 0; j < kPagePositions / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int key = page * kPagePositions + 8 * j + 2 * (lane % 4) + c % 2;
        const bool seen = key >= first_key[c / 2] && key < num_keys[c / 2];
        const float score = seen ? scores[j][c] * task.scale : -kInfinityF;
        scores[j][c] = score;
        tile_largest[c / 2] = fmaxf(tile_largest[c / 2], score);
      }
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float t = tile_largest[half];
      t = fmaxf(t, ShuffleXor(t, 1));
      t = fmaxf(t, ShuffleXor(t, 2));
      const float now = fmaxf(largest[half], t);
      // A row that has seen nothing yet keeps zeros: no -inf minus -inf.
      factor[half] = largest[half] == -kInfinityF ? 1.0F : expf(largest[half] - now);
      largest[half] = now;
      totals[half] *= factor[half];
    }
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][c] *= factor[c / 2];
    }
#pragma unroll
    for (int j = 0; j < kPagePositions / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float weight =
            scores[j][c] == -kInfinityF ? 0.0F : expf(scores[j][c] - largest[c / 2]);
        scores[j][c] = weight;
        totals[c / 2] += weight;
      }
    }

    // Two tiles of scores are the left operand for 16 keys; values come transposed.
#pragma unroll
    for (int k = 0; k < kPagePositions / 16; ++k) {
      uint32_t a[4];
      a[0] = PackBf16(scores[2 * k][0], scores[2 * k][1]);
      a[1] = PackBf16(scores[2 * k][2], scores[2 * k][3]);
      a[2] = PackBf16(scores[2 * k + 1][0], scores[2 * k + 1][1]);
      a[3] = PackBf16(scores[2 * k + 1][2], scores[2 * k + 1][3]);
#pragma unroll
      for (int i = 0; i < kDim / 8; i += 2) {
        uint32_t b[4];
        const int key = 16 * k + lane % 16;
        LoadMatrix4Transposed(b, stage + Shape::kTileBytes + Shape::Swizzled(key, i + lane / 16));
        MmaBf16(sums[i], a, b[0], b[1]);
        MmaBf16(sums[i + 1], a, b[2], b[3]);
      }
    }
    // Nobody may still read the stage that the next turn fills.
    BlockBarrier();
  }
  CopyWait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = totals[half];
    total += ShuffleXor(total, 1);
    total += ShuffleXor(total, 2);
    const int64_t row = rows[half];
    if (row < 0 || chunk_begin >= num_keys[half] || chunk_end <= first_key[half]) continue;
    const RowFacts& facts = task.rows[row];
    const bool whole = NumChunks(task, facts) == 1;
    const float reciprocal = 1.0F / total;
    const int64_t part =
        PartOf(task, tile.chunk - FirstChunk(task, facts), static_cast<int32_t>(row), heads[half]);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * i + 2 * (lane % 4) + c;
        if (column >= task.head_dim) continue;
        const float sum = sums[i][2 * half + c];
        if (whole) {
          StoreAt(task.out, row, static_cast<int64_t>(heads[half]) * task.head_dim + column,
                  sum * reciprocal);
        } else {
          task.chunk_sums[part * task.head_dim + column] = sum;
        }
      }
    }
    if (!whole && lane % 4 == 0) {
      task.chunk_totals[2 * part] = largest[half];
      task.chunk_totals[2 * part + 1] = total;
    }
  }
}

// --- Plain, any element
//
// A block a row and head: 128 threads. Shared memory: the query, a tile of scores, a warp each of
// scratch. A warp scores a key at a time; a thread sums columns thread, thread + 128 .. For exact
// comparison, and for heads that the tensor kernel does not take.
constexpr int kPlainThreads = 128;
constexpr int kPlainColumns = 8;  // of a thread: head_dim up to 1024

CINNABAR_KERNEL(kPlainThreads, 4)
AttendPlainKernel(AttendTask task) {
  float* query = reinterpret_cast<float*>(SharedBytes());
  float* weights = query + task.head_dim;
  float* scratch = weights + kPagePositions;
  const int row = task.row_base + BlockX();
  const int head = BlockY();
  const RowFacts facts = task.rows[row];
  const int num_chunks = NumChunks(task, facts);
  if (BlockZ() >= num_chunks) return;
  const int chunk = FirstChunk(task, facts) + BlockZ();
  const SpanFacts span = task.spans[facts.span];
  const Element element = task.q.element;
  const int kv_head = head / (task.num_heads / task.num_kv_heads);
  const int64_t head_begin = static_cast<int64_t>(kv_head) * kPagePositions * task.head_stride;
  const int64_t values_begin =
      head_begin + static_cast<int64_t>(task.num_kv_heads) * kPagePositions * task.head_stride;
  for (int i = ThreadIndex(); i < task.head_dim; i += kPlainThreads) {
    query[i] = LoadAt(task.q, row, static_cast<int64_t>(head) * task.head_dim + i);
  }
  float sums[kPlainColumns];
#pragma unroll
  for (int i = 0; i < kPlainColumns; ++i) sums[i] = 0.0F;
  float largest = -kInfinityF;
  float total = 0.0F;
  const int first_key = FirstKey(task, facts);
  const int key_end =
      facts.num_keys < (chunk + 1) * kAttendChunk ? facts.num_keys : (chunk + 1) * kAttendChunk;
  int begin = chunk * kAttendChunk;
  if (first_key > begin) begin = first_key / kPagePositions * kPagePositions;
  for (; begin < key_end; begin += kPagePositions) {
    const int first = first_key > begin ? first_key - begin : 0;
    const int count = key_end - begin < kPagePositions ? key_end - begin : kPagePositions;
    const unsigned char* page = PageOf(task, span, begin / kPagePositions);
    BlockBarrier();
    for (int key = first + ThreadIndex() / 32; key < count; key += kPlainThreads / 32) {
      float score = 0.0F;
      for (int i = ThreadIndex() % 32; i < task.head_dim; i += 32) {
        score = fmaf(query[i],
                     LoadElement(page, element,
                                 head_begin + static_cast<int64_t>(key) * task.head_stride + i),
                     score);
      }
      score = WarpSum(score);
      if (ThreadIndex() % 32 == 0) weights[key] = score * task.scale;
    }
    BlockBarrier();
    float tile_largest = -kInfinityF;
    for (int key = first + ThreadIndex(); key < count; key += kPlainThreads) {
      tile_largest = fmaxf(tile_largest, weights[key]);
    }
    const float now = fmaxf(largest, BlockMax(tile_largest, scratch));
    const float factor = largest == -kInfinityF ? 1.0F : expf(largest - now);
    largest = now;
    float tile_total = 0.0F;
    for (int key = first + ThreadIndex(); key < count; key += kPlainThreads) {
      weights[key] = expf(weights[key] - largest);
      tile_total += weights[key];
    }
    total = fmaf(total, factor, BlockSum(tile_total, scratch));  // weights are there for all, too
#pragma unroll
    for (int i = 0; i < kPlainColumns; ++i) {
      const int column = ThreadIndex() + i * kPlainThreads;
      if (column >= task.head_dim) continue;
      float sum = sums[i] * factor;
      for (int key = first; key < count; ++key) {
        sum =
            fmaf(weights[key],
                 LoadElement(page, element,
                             values_begin + static_cast<int64_t>(key) * task.head_stride + column),
                 sum);
      }
      sums[i] = sum;
    }
  }
  const bool whole = num_chunks == 1;
  const int64_t part = PartOf(task, BlockZ(), row, head);
#pragma unroll
  for (int i = 0; i < kPlainColumns; ++i) {
    const int column = ThreadIndex() + i * kPlainThreads;
    if (column >= task.head_dim) continue;
    if (whole) {
      StoreAt(task.out, row, static_cast<int64_t>(head) * task.head_dim + column, sums[i] / total);
    } else {
      task.chunk_sums[part * task.head_dim + column] = sums[i];
    }
  }
  if (!whole && ThreadIndex() == 0) {
    task.chunk_totals[2 * part] = largest;
    task.chunk_totals[2 * part + 1] = total;
  }
}

// Chunks of a row and head, in order. A block a row, a warp a head at a time.
constexpr int kMergeThreads = 128;

CINNABAR_KERNEL(kMergeThreads, 8)
MergeChunksKernel(AttendTask task) {
  const int row = task.row_base + BlockX();
  const int num_chunks = NumChunks(task, task.rows[row]);
  if (num_chunks == 1) return;
  const int lane = ThreadIndex() % 32;
  for (int head = ThreadIndex() / 32; head < task.num_heads; head += kMergeThreads / 32) {
    const auto part = [&](int chunk) { return PartOf(task, chunk, row, head); };
    float largest = -kInfinityF;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      largest = fmaxf(largest, task.chunk_totals[2 * part(chunk)]);
    }
    float total = 0.0F;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      total = fmaf(task.chunk_totals[2 * part(chunk) + 1],
                   expf(task.chunk_totals[2 * part(chunk)] - largest), total);
    }
    for (int column = lane; column < task.head_dim; column += 32) {
      float sum = 0.0F;
      for (int chunk = 0; chunk < num_chunks; ++chunk) {
        sum = fmaf(task.chunk_sums[part(chunk) * task.head_dim + column],
                   expf(task.chunk_totals[2 * part(chunk)] - largest), sum);
      }
      StoreAt(task.out, row, static_cast<int64_t>(head) * task.head_dim + column, sum / total);
    }
  }
}

int LaunchMerge(const AttendTask& task, void* stream) {
  if (task.num_chunks == 1) return 0;
  return Launch(MergeChunksKernel, {task.num_rows, 1, 1, kMergeThreads, 0, stream}, task);
}

template <int kDim>
int LaunchAttendDim(const AttendTask& task, void* stream) {
  return Launch(AttendTensorKernel<kDim>,
                {task.num_tiles, task.num_kv_heads, 1, kTensorThreads,
                 AttendShape<kDim>::kSharedBytes, stream},
                task);
}

}  // namespace

int LaunchAttendTensor(const AttendTask& task, void* stream) {
  const int error = task.head_dim <= 32   ? LaunchAttendDim<32>(task, stream)
                    : task.head_dim <= 64 ? LaunchAttendDim<64>(task, stream)
                                          : LaunchAttendDim<128>(task, stream);
  return error != 0 ? error : LaunchMerge(task, stream);
}

int LaunchAttendPlain(const AttendTask& task, void* stream) {
  const int64_t shared_bytes = (task.head_dim + kPagePositions + kPlainThreads / 32) * 4;
  const int error = Launch(
      AttendPlainKernel,
      {task.num_rows, task.num_heads, task.num_chunks, kPlainThreads, shared_bytes, stream}, task);
  return error != 0 ? error : LaunchMerge(task, stream);
}

}  // namespace cinnabar::cuda
