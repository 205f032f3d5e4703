// Soft embeddings: for each row the mean of all embeddings under the softmax of its logits, without
// ever having a row's logits as a whole.
//
// The vocabulary is cut into parts (SoftParts(), a function of its size), a part into chunks of
// kSoftChunk ids. Chunk after chunk, for all parts side by side: logits of the chunk (a product as
// in the vocabulary head), exponentials relative to the largest logit that the part has had so far,
// and their product with the chunk's embeddings, which is added to the part's sums after those were
// scaled to the new largest. At the end the parts are joined in double. Order and formulas are
// those of the CPU backend.
//
// Batch invariance. A row's logits have the bits that product.cuh gives them whatever stands beside
// it; what follows reads that row alone, in an order that the vocabulary's size fixes: ids ascend
// inside a chunk (one fused multiply-add, or one mma.sync of 16 ids, after another, from 0), chunks
// inside a part, parts in the join. Neither the number of rows nor the place in a tile enters.
//
// In bf16 with a bf16 table, the exponentials are rounded to bf16 (in the sum of the masses, too:
// the weights of a row still add up to 1) and multiplied by tensor cores; else all is float32.
#include "kernels/cuda/block_product.cuh"
#include "kernels/cuda/hopper_product.cuh"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {
namespace {

// The chunk that part `part` is at in turn `turn`; none once the part is through.
struct Chunk {
  int32_t first_id = 0;
  int32_t num_ids = 0;
};
CINNABAR_DEVICE Chunk ChunkOf(const SoftEmbedTask& task, int part, int turn) {
  const int vocabulary = task.weight.rows;
  const int64_t num_chunks = (vocabulary + kSoftChunk - 1) / kSoftChunk;
  const auto begin = static_cast<int32_t>(part * num_chunks / task.num_parts);
  const auto end = static_cast<int32_t>((part + 1) * num_chunks / task.num_parts);
  Chunk chunk;
  if (begin + turn >= end) return chunk;
  chunk.first_id = (begin + turn) * kSoftChunk;
  chunk.num_ids =
      vocabulary - chunk.first_id < kSoftChunk ? vocabulary - chunk.first_id : kSoftChunk;
  return chunk;
}

// Blocks: [row tiles] x [tiles of a chunk] x [parts].
template <class Product>
CINNABAR_KERNEL(Product::kThreads, Product::kBlocks)
SoftLogitsKernel(SoftEmbedTask task, int turn) {
  static_assert(kSoftChunk % Product::kOutputs == 0, "");
  const Chunk chunk = ChunkOf(task, BlockZ(), turn);
  const int output_begin = BlockY() * Product::kOutputs;
  if (output_begin >= chunk.num_ids) return;
  const int row_begin = BlockX() * Product::kRows;
  const int num_rows =
      task.num_rows - row_begin < Product::kRows ? task.num_rows - row_begin : Product::kRows;
  ProductOperands operands;
  operands.weight = static_cast<const unsigned char*>(task.weight.data) +
                    (chunk.first_id + output_begin) * task.weight.row_bytes;
  operands.weight_row_bytes = task.weight.row_bytes;
  operands.weight_element = task.weight.element;
  operands.weight_tiled = task.weight.tiled;
  operands.x = static_cast<const unsigned char*>(task.hidden.data);
  operands.x_element = task.hidden.element;
  operands.x_row_bytes = task.hidden.stride * (task.hidden.element == Element::kF32 ? 4 : 2);
  operands.x_first = row_begin;
  operands.num_rows = num_rows;
  operands.cols = task.weight.cols;
  operands.k_end = task.weight.k_bytes;
  operands.segment_bytes = task.weight.segment_bytes;
  const float* sums = Product::Run(operands, SharedBytes());

  FinishTask finish = {};
  finish.finish = Finish::kStore;
  finish.cap = task.cap;
  finish.out = {task.logits + static_cast<int64_t>(BlockZ()) * task.num_rows * kSoftChunk,
                kSoftChunk, Element::kF32};
  finish.num_outputs = chunk.num_ids;
  FinishTile<Product>(finish, sums, row_begin, num_rows, output_begin);
}

constexpr int kExponentialThreads = 128;

// A warp a row and part. Logits become exponentials in place, or in task.probabilities.
CINNABAR_KERNEL(kExponentialThreads, 8)
SoftExponentialsKernel(SoftEmbedTask task, int turn) {
  const int row = BlockX() * (kExponentialThreads / 32) + ThreadIndex() / 32;
  const Chunk chunk = ChunkOf(task, BlockY(), turn);
  if (row >= task.num_rows || chunk.num_ids == 0) return;  // the whole warp
  const int lane = ThreadIndex() % 32;
  const int64_t place = static_cast<int64_t>(BlockY()) * task.num_rows + row;
  float* logits = task.logits + place * kSoftChunk;
  float largest = -kInfinityF;
  for (int i = lane; i < chunk.num_ids; i += 32) largest = fmaxf(largest, logits[i]);
  largest = WarpMax(largest);
  const float before = turn == 0 ? -kInfinityF : task.tops[place];
  const float top = largest > before ? largest : before;
  float mass = 0.0F;
  for (int i = lane; i < kSoftChunk; i += 32) {
    float e = 0.0F;
    if (i < chunk.num_ids) {
      const float d = (logits[i] - top) * task.exponent_scale;
      e = d < -126.0F ? 0.0F : Exp2(fmaxf(d, -126.0F));
    }
    if (task.probabilities != nullptr) {
      const uint16_t rounded = ToBf16(e);
      task.probabilities[place * kSoftChunk + i] = rounded;
      e = FromBf16(rounded);
    } else {
      logits[i] = e;
    }
    mass += e;
  }
  mass = WarpSum(mass);
  // Every lane has read what was there.
  WarpBarrier();
  if (lane != 0) return;
  const float factor =
      top == before ? 1.0F : exp2f(fmaxf((before - top) * task.exponent_scale, -126.0F));
  task.tops[place] = top;
  task.factors[place] = factor;
  task.masses[place] = (turn == 0 ? 0.0F : task.masses[place] * factor) + mass;
}

// Sums of a chunk to those of its part.
CINNABAR_DEVICE void AddChunk(const SoftEmbedTask& task, int turn, int64_t place, int column,
                              float sum) {
  float* total = task.sums + place * task.dim + column;
  *total = turn == 0 ? sum : *total * task.factors[place] + sum;
}

// --- Plain: 32 rows x 64 columns by 256 threads of 4 x 2, 32 ids at a time.
constexpr int kPlainSoftThreads = 256;
constexpr int kPlainSoftRows = 32;
constexpr int kPlainSoftColumns = 64;
constexpr int kPlainSoftDepth = 32;

CINNABAR_KERNEL(kPlainSoftThreads, 2)
SoftSumsPlainKernel(SoftEmbedTask task, int turn) {
  const Chunk chunk = ChunkOf(task, BlockZ(), turn);
  if (chunk.num_ids == 0) return;
  float* weights = reinterpret_cast<float*>(SharedBytes());         // [rows][depth + 1]
  float* table = weights + kPlainSoftRows * (kPlainSoftDepth + 1);  // [depth][columns]
  const int row_begin = BlockX() * kPlainSoftRows;
  const int column_begin = BlockY() * kPlainSoftColumns;
  const int64_t first_place = static_cast<int64_t>(BlockZ()) * task.num_rows + row_begin;
  const int my_column = ThreadIndex() % 32;  // and + 32
  const int my_row = ThreadIndex() / 32;     // and + 8, 16, 24
  float sums[4][2] = {};
  for (int begin = 0; begin < chunk.num_ids; begin += kPlainSoftDepth) {
    const int depth =
        chunk.num_ids - begin < kPlainSoftDepth ? chunk.num_ids - begin : kPlainSoftDepth;
    BlockBarrier();
    for (int i = ThreadIndex(); i < kPlainSoftRows * kPlainSoftDepth; i += kPlainSoftThreads) {
      const int row = i / kPlainSoftDepth;
      const int id = i % kPlainSoftDepth;
      weights[row * (kPlainSoftDepth + 1) + id] =
          row_begin + row < task.num_rows
              ? task.logits[(first_place + row) * kSoftChunk + begin + id]
              : 0.0F;
    }
    for (int i = ThreadIndex(); i < depth * kPlainSoftColumns; i += kPlainSoftThreads) {
      const int column = column_begin + i % kPlainSoftColumns;
      const int64_t id = chunk.first_id + begin + i / kPlainSoftColumns;
      table[i] = column < task.dim
                     ? LoadWeightElement(static_cast<const unsigned char*>(task.table) +
                                             id * task.table_row_bytes,
                                         task.table_element, column)
                     : 0.0F;
    }
    BlockBarrier();
    for (int d = 0; d < depth; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          sums[i][j] = fmaf(weights[(my_row + 8 * i) * (kPlainSoftDepth + 1) + d],
                            table[d * kPlainSoftColumns + my_column + 32 * j], sums[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = my_row + 8 * i;
      const int column = column_begin + my_column + 32 * j;
      if (row_begin + row >= task.num_rows || column >= task.dim) continue;
      AddChunk(task, turn, first_place + row, column, sums[i][j]);
    }
  }
}

// --- Tensor cores: 64 rows x 64 columns by 4 warps of 16 rows; 64 ids a stage, two stages. The
// exponentials are the left operand, the table comes transposed, as values in attention.
constexpr int kTensorSoftThreads = 128;
constexpr int kSoftTile = 64;
constexpr int kSoftTileBytes = kSoftTile * kSoftTile * 2;

CINNABAR_DEVICE int SoftSwizzled(int row, int piece) {
  return row * 2 * kSoftTile + ((piece ^ (row & 7)) << 4);
}

CINNABAR_KERNEL(kTensorSoftThreads, 3)
SoftSumsTensorKernel(SoftEmbedTask task, int turn) {
  const Chunk chunk = ChunkOf(task, BlockZ(), turn);
  if (chunk.num_ids == 0) return;
  unsigned char* shared = SharedBytes();
  const int warp = ThreadIndex() / 32;
  const int lane = ThreadIndex() % 32;
  const int row_begin = BlockX() * kSoftTile;
  const int column_begin = BlockY() * kSoftTile;
  const int64_t first_place = static_cast<int64_t>(BlockZ()) * task.num_rows + row_begin;
  const auto* table = static_cast<const unsigned char*>(task.table);
  const auto load = [&](int begin, unsigned char* at) {
    for (int i = ThreadIndex(); i < kSoftTile * 8; i += kTensorSoftThreads) {
      const int row = i / 8;
      const int piece = i % 8;
      CopyAsync16(at + SoftSwizzled(row, piece),
                  task.probabilities + (first_place + row) * kSoftChunk + begin + piece * 8,
                  row_begin + row < task.num_rows ? 16 : 0);
      // A row of the table is padded to whole tiles.
      CopyAsync16(at + kSoftTileBytes + SoftSwizzled(row, piece),
                  table + (chunk.first_id + begin + row) * task.table_row_bytes + 2 * column_begin +
                      16 * piece,
                  begin + row < chunk.num_ids ? 16 : 0);
    }
  };
  float sums[kSoftTile / 8][4];
#pragma unroll
  for (int i = 0; i < kSoftTile / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[i][c] = 0.0F;
  }
  load(0, shared);
  CopyCommit();
  for (int begin = 0; begin < chunk.num_ids; begin += kSoftTile) {
    const unsigned char* stage = shared + begin / kSoftTile % 2 * 2 * kSoftTileBytes;
    const int next = begin + kSoftTile;
    if (next < chunk.num_ids) load(next, shared + next / kSoftTile % 2 * 2 * kSoftTileBytes);
    CopyCommit();
    CopyWait<1>();
    BlockBarrier();
#pragma unroll
    for (int k = 0; k < kSoftTile / 16; ++k) {
      uint32_t a[4];
      LoadMatrix4(a, stage + SoftSwizzled(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int i = 0; i < kSoftTile / 8; i += 2) {
        uint32_t b[4];
        LoadMatrix4Transposed(
            b, stage + kSoftTileBytes + SoftSwizzled(16 * k + lane % 16, i + lane / 16));
        MmaBf16(sums[i], a, b[0], b[1]);
        MmaBf16(sums[i + 1], a, b[2], b[3]);
      }
    }
    BlockBarrier();
  }
  CopyWait<0>();
#pragma unroll
  for (int i = 0; i < kSoftTile / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = warp * 16 + lane / 4 + 8 * (c / 2);
      const int column = column_begin + 8 * i + 2 * (lane % 4) + c % 2;
      if (row_begin + row >= task.num_rows || column >= task.dim) continue;
      AddChunk(task, turn, first_place + row, column, sums[i][c]);
    }
  }
}

constexpr int kJoinThreads = 256;

CINNABAR_KERNEL(kJoinThreads, 4)
SoftJoinKernel(SoftEmbedTask task) {
  auto* factors = reinterpret_cast<double*>(SharedBytes());  // [parts], then the mass
  const int64_t row = BlockX();
  const auto place = [&](int part) { return static_cast<int64_t>(part) * task.num_rows + row; };
  if (ThreadIndex() == 0) {
    float top = task.tops[row];
    for (int part = 1; part < task.num_parts; ++part) top = fmaxf(top, task.tops[place(part)]);
    double mass = 0.0;
    for (int part = 0; part < task.num_parts; ++part) {
      factors[part] = exp((static_cast<double>(task.tops[place(part)]) - static_cast<double>(top)) /
                          static_cast<double>(task.temperature));
      mass += factors[part] * static_cast<double>(task.masses[place(part)]);
    }
    factors[task.num_parts] = mass;
  }
  BlockBarrier();
  for (int i = ThreadIndex(); i < task.dim; i += kJoinThreads) {
    double sum = 0.0;
    for (int part = 0; part < task.num_parts; ++part) {
      sum += factors[part] * static_cast<double>(task.sums[place(part) * task.dim + i]);
    }
    StoreAt(task.out, row, i,
            static_cast<float>(sum * static_cast<double>(task.scale) / factors[task.num_parts]));
  }
}

template <class Product>
int LaunchSoftTile(const SoftEmbedTask& task, int turn, void* stream) {
  return Launch(
      SoftLogitsKernel<Product>,
      {(task.num_rows + Product::kRows - 1) / Product::kRows, kSoftChunk / Product::kOutputs,
       task.num_parts, Product::kThreads, Product::kFoldBytes, stream},
      task, turn);
}

// Sums are folded in every case: with one segment that adds them to 0 (by wgmma, changes nothing).
int LaunchSoftLogits(const SoftEmbedTask& task, int turn, void* stream) {
  if (task.weight.segment_bytes == 0) return LaunchSoftTile<PlainProduct>(task, turn, stream);
  const bool few = task.num_rows <= 32;
  if (task.weight.tiled) {
    return few ? LaunchSoftTile<HopperProduct<32, false>>(task, turn, stream)
               : LaunchSoftTile<HopperProduct<128, false>>(task, turn, stream);
  }
  if (IsBlocks(task.weight.element)) {
    return few ? LaunchSoftTile<BlockProduct<128, 32, 4, 1, 3, true>>(task, turn, stream)
               : LaunchSoftTile<BlockProduct<128, 128, 4, 2, 3, true>>(task, turn, stream);
  }
  return few ? LaunchSoftTile<TensorProduct<128, 32, 4, 1, 3, true, false>>(task, turn, stream)
             : LaunchSoftTile<TensorProduct<128, 128, 4, 2, 3, true, false>>(task, turn, stream);
}

}  // namespace

int LaunchSoftEmbed(const SoftEmbedTask& task, void* stream) {
  const int num_chunks = (task.weight.rows + kSoftChunk - 1) / kSoftChunk;
  const int num_turns = (num_chunks + task.num_parts - 1) / task.num_parts;
  constexpr int kRows = kExponentialThreads / 32;
  for (int turn = 0; turn < num_turns; ++turn) {
    int error = LaunchSoftLogits(task, turn, stream);
    if (error == 0) {
      error = Launch(
          SoftExponentialsKernel,
          {(task.num_rows + kRows - 1) / kRows, task.num_parts, 1, kExponentialThreads, 0, stream},
          task, turn);
    }
    if (error == 0) {
      error = task.probabilities != nullptr
                  ? Launch(SoftSumsTensorKernel,
                           {(task.num_rows + kSoftTile - 1) / kSoftTile,
                            (task.dim + kSoftTile - 1) / kSoftTile, task.num_parts,
                            kTensorSoftThreads, 4 * kSoftTileBytes, stream},
                           task, turn)
                  : Launch(SoftSumsPlainKernel,
                           {(task.num_rows + kPlainSoftRows - 1) / kPlainSoftRows,
                            (task.dim + kPlainSoftColumns - 1) / kPlainSoftColumns, task.num_parts,
                            kPlainSoftThreads,
                            (kPlainSoftRows * (kPlainSoftDepth + 1) +
                             kPlainSoftDepth * kPlainSoftColumns) *
                                4,
                            stream},
                           task, turn);
    }
    if (error != 0) return error;
  }
  return Launch(SoftJoinKernel,
                {task.num_rows, 1, 1, kJoinThreads, (task.num_parts + 1) * 8, stream}, task);
}

}  // namespace cinnabar::cuda
