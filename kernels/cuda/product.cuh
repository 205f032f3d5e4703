// A tile of a matrix product, [rows] x [outputs] sums in shared memory, for whoever finishes them:
// Linear, the experts, the vocabulary head. Run() returns where they lie.
//
// Batch invariance. A sum belongs to one output and one row and is made the same way in every tile
// shape below:
//   TensorProduct: from 0, one mma.sync.m16n8k16 (bf16) or m16n8k32 (e4m3) after another along k,
//     the weight always the left operand and the row always a column of the right one; at the end
//     of each segment of the weight (WeightView::segment_bytes, a property of the weight) the sum
//     is added to a float32 total that began at 0. Segments are walked here one after another
//     (kFold), or by blocks of their own and added in the same order (Linear's `split`): the same
//     additions. k is padded with zeros on both sides. What is assumed of the hardware: an element
//     of an mma's result is a function of its row of a, its column of b and its c, wherever in the
//     tile it lies.
//   PlainProduct: one fused multiply-add after another along k, in float32; as on the CPU.
// Neither the tile's shape, nor the place in it, nor what the other columns hold enters a sum; a
// row beyond the batch is zeros. So a row's bits do not depend on the batch.
//
// Shapes and occupancy. TensorProduct keeps kStages stages of 128 bytes of k, (outputs + rows) x
// 128 bytes each, 16-byte pieces swizzled by row (piece ^ row % 8): ldmatrix and cp.async meet no
// bank conflict. Small tiles (64 outputs, 4 warps, 16 outputs a warp) are for few rows, where
// reading the weight is all: 4 stages of 10 to 16 KiB, 3 to 4 blocks of 128 threads on a
// multiprocessor, some 100 KiB of weight in flight on each. The large tile (128 x 128, 8 warps of
// 32 x 64) is for many rows: 3 stages of 32 KiB (96 KiB: within sm_89's 99), 1 block, 64
// accumulators a thread and as many totals when it folds. FP8 has the small tiles alone: for sm_90
// ptxas seems to make an e4m3 mma.sync of fp16 ones and conversions, so it gains where bytes bound,
// not where arithmetic does.
#ifndef CINNABAR_KERNELS_CUDA_PRODUCT_CUH_
#define CINNABAR_KERNELS_CUDA_PRODUCT_CUH_

#include "kernels/cuda/blocks.cuh"

namespace cinnabar::cuda {

inline constexpr int kStageDepth = 128;  // bytes of k

// Where 16-byte piece `piece` of row `row` lies in its part of a stage.
CINNABAR_DEVICE int SwizzledPlace(int row, int piece) {
  return row * kStageDepth + ((piece ^ (row & 7)) << 4);
}

// One tile's left and right side.
struct ProductOperands {
  const unsigned char* weight = nullptr;  // first row of the tile; all rows of the tile exist
  int64_t weight_row_bytes = 0;
  Element weight_element = Element::kF32;
  bool weight_tiled = false;
  const unsigned char* x = nullptr;
  int64_t x_row_bytes = 0;
  Element x_element = Element::kF32;
  const int32_t* x_index = nullptr;  // of the tile's first row on; null: x_first, x_first + 1 ..
  int32_t x_divisor = 1;             // x row is x_index[r] / x_divisor
  int32_t x_first = 0;
  int32_t num_rows = 0;  // of the tile that exist
  int32_t cols = 0;      // k
  int64_t k_begin = 0;   // bytes of a weight row, multiples of 128
  int64_t k_end = 0;     //
  int64_t segment_bytes = 0;

  CINNABAR_DEVICE const unsigned char* RowOfX(int32_t row) const {
    const int64_t source = x_index == nullptr ? x_first + row : x_index[row] / x_divisor;
    return x + source * x_row_bytes;
  }
  CINNABAR_DEVICE float WeightAt(int output, int column) const {
    if (!weight_tiled) {
      return LoadWeightElement(weight + output * weight_row_bytes, weight_element, column);
    }
    const int per_piece = weight_element == Element::kE4m3 ? 16 : 8;  // bf16: others are not tiled
    const int piece = column / per_piece;
    const unsigned char* tile = weight + static_cast<int64_t>(piece / 8) * kWeightTileBytes;
    return LoadElement(tile + SwizzledPlace(output, piece % 8), weight_element, column % per_piece);
  }
};

template <int kTileOutputs, int kTileRows, int kWarpsOutputs, int kWarpsRows, int kStages,
          bool kFold, bool kFp8>
struct TensorProduct {
  static constexpr int kOutputs = kTileOutputs;
  static constexpr int kRows = kTileRows;
  static constexpr int kThreads = 32 * kWarpsOutputs * kWarpsRows;
  static constexpr int kSumStride = kOutputs + 4;  // fragments then spread over all banks
  static constexpr int kStageBytes = (kOutputs + kRows) * kStageDepth;
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSumBytes ? kStages* kStageBytes : kSumBytes;
  static constexpr int kFoldBytes = kSharedBytes;  // when segments are added up here
  static constexpr int kWarpOutputs = kOutputs / kWarpsOutputs;
  static constexpr int kWarpRows = kRows / kWarpsRows;
  static constexpr int kTilesOut = kWarpOutputs / 16;
  static constexpr int kTilesRow = kWarpRows / 8;
  static constexpr bool kIsFp8 = kFp8;
  static constexpr int kBlocks = kThreads > 128 ? 1 : kFp8 ? 2 : 3;  // a multiprocessor, at least
  static_assert(kWarpOutputs % 16 == 0 && kWarpRows % 16 == 0, "fragments come in pairs");

  // Pieces that each thread brings to a stage.
  static constexpr int kPiecesW = kOutputs * 8 / kThreads;
  static constexpr int kPiecesX = (kRows * 8 + kThreads - 1) / kThreads;
  static_assert(kOutputs * 8 % kThreads == 0, "");

  CINNABAR_DEVICE static float* Run(const ProductOperands& o, unsigned char* shared) {
    const int thread = ThreadIndex();
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int warp_output = warp % kWarpsOutputs * kWarpOutputs;
    const int warp_row = warp / kWarpsOutputs * kWarpRows;
    const int64_t x_bytes = static_cast<int64_t>(o.cols) * (kFp8 ? 1 : 2);
    const int num_stages = static_cast<int>((o.k_end - o.k_begin) / kStageDepth);
    const int segment_stages = static_cast<int>(o.segment_bytes / kStageDepth);

    // This thread's pieces: always the same of each row it serves.
    const int my_piece = thread % 8;
    const unsigned char* weight = o.weight + thread / 8 * o.weight_row_bytes + o.k_begin;
    const unsigned char* x_rows[kPiecesX];
    bool x_exists[kPiecesX];
#pragma unroll
    for (int i = 0; i < kPiecesX; ++i) {
      const int row = thread / 8 + i * (kThreads / 8);
      x_exists[i] = row < o.num_rows;
      x_rows[i] = x_exists[i] ? o.RowOfX(row) : o.x;
    }

    const auto load = [&](int stage, unsigned char* at) {
      const int64_t k = static_cast<int64_t>(stage) * kStageDepth + my_piece * 16;
#pragma unroll
      for (int i = 0; i < kPiecesW; ++i) {
        const int row = thread / 8 + i * (kThreads / 8);
        CopyAsync16(at + SwizzledPlace(row, my_piece),
                    weight + i * (kThreads / 8) * o.weight_row_bytes + k, 16);
      }
      unsigned char* x_at = at + kOutputs * kStageDepth;
      const int64_t left = x_bytes - o.k_begin - k;
      const int there = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
      for (int i = 0; i < kPiecesX; ++i) {
        const int row = thread / 8 + i * (kThreads / 8);
        if (kRows * 8 % kThreads != 0 && row >= kRows) continue;
        CopyAsync16(x_at + SwizzledPlace(row, my_piece), x_rows[i] + o.k_begin + k,
                    x_exists[i] ? there : 0);
      }
    };

    Sums sums = {};
    Totals totals = {};
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < num_stages) load(stage, shared + stage * kStageBytes);
      CopyCommit();
    }
    int at = 0;              // slot of the stage that is multiplied
    int next = kStages - 1;  // and of the one that is brought
    int until_fold = segment_stages;
    for (int stage = 0; stage < num_stages; ++stage) {
      CopyWait<kStages - 2>();
      // The stage is there for all, and nobody reads the slot that is filled next.
      BlockBarrier();
      if (stage + kStages - 1 < num_stages) load(stage + kStages - 1, shared + next * kStageBytes);
      CopyCommit();
      const unsigned char* slot = shared + at * kStageBytes;
      Multiply(slot, slot + kOutputs * kStageDepth, warp_output, warp_row, lane, sums);
      at = at + 1 == kStages ? 0 : at + 1;
      next = next + 1 == kStages ? 0 : next + 1;
      if constexpr (kFold) {
        if (--until_fold == 0 || stage + 1 == num_stages) {
          until_fold = segment_stages;
          Fold(sums, totals);
        }
      }
    }
    CopyWait<0>();
    BlockBarrier();
    return PutDown(sums, totals, warp_output, warp_row, lane, shared);
  }

  using Sums = float[kTilesOut][kTilesRow][4];
  using Totals = float[kFold ? kTilesOut : 1][kFold ? kTilesRow : 1][4];

  // The end of a segment: its sums to the totals. Only where kFold.
  CINNABAR_DEVICE static void Fold(Sums& sums, Totals& totals) {
#pragma unroll
    for (int i = 0; i < kTilesOut; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesRow; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          totals[i][j][c] += sums[i][j][c];
          sums[i][j][c] = 0.0F;
        }
      }
    }
  }

  // The tile as its finisher reads it, over the stages, of which nobody reads any more.
  CINNABAR_DEVICE static float* PutDown(const Sums& sums, const Totals& totals, int warp_output,
                                        int warp_row, int lane, unsigned char* shared) {
    float* out = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kTilesOut; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesRow; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int output = warp_output + 16 * i + lane / 4 + 8 * (c / 2);
          const int row = warp_row + 8 * j + 2 * (lane % 4) + c % 2;
          if constexpr (kFold) {
            out[row * kSumStride + output] = totals[i][j][c];
          } else {
            out[row * kSumStride + output] = sums[i][j][c];
          }
        }
      }
    }
    BlockBarrier();
    return out;
  }

  // Adds the products of a stage: tiles of the weight and of rows, both swizzled.
  CINNABAR_DEVICE static void Multiply(const unsigned char* weight, const unsigned char* x,
                                       int warp_output, int warp_row, int lane,
                                       Sums& sums) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // 32 bytes of k: one mma
      uint32_t a[kTilesOut][4];
#pragma unroll
      for (int i = 0; i < kTilesOut; ++i) {
        const int row = warp_output + 16 * i + lane % 16;
        LoadMatrix4(a[i], weight + SwizzledPlace(row, 2 * step + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kTilesRow; j += 2) {
        uint32_t b[4];
        const int row = warp_row + 8 * j + lane % 8 + lane / 16 * 8;
        LoadMatrix4(b, x + SwizzledPlace(row, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kTilesOut; ++i) {
          if constexpr (kFp8) {
            MmaE4m3(sums[i][j], a[i], b[0], b[1]);
            MmaE4m3(sums[i][j + 1], a[i], b[2], b[3]);
          } else {
            MmaBf16(sums[i][j], a[i], b[0], b[1]);
            MmaBf16(sums[i][j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }
};

// Any elements, float32 arithmetic. 128 x 32 sums by 256 threads of 4 x 4; k in steps of 16.
struct PlainProduct {
  static constexpr int kOutputs = 128;
  static constexpr int kRows = kPlainRows;
  static constexpr int kThreads = 256;
  static constexpr int kSumStride = kOutputs + 4;
  static constexpr int kDepth = 16;
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr int kStageBytes = (kOutputs + 1 + kRows + 1) * kDepth * 4;
  static constexpr int kSharedBytes = kSumBytes > kStageBytes ? kSumBytes : kStageBytes;
  static constexpr int kFoldBytes = kSharedBytes;
  static constexpr bool kIsFp8 = false;
  static constexpr int kBlocks = 2;

  CINNABAR_DEVICE static float* Run(const ProductOperands& o, unsigned char* shared) {
    // [kDepth][outputs + 1], [kDepth][rows + 1].
    float* weights = reinterpret_cast<float*>(shared);
    float* rows = weights + kDepth * (kOutputs + 1);
    const int thread = ThreadIndex();
    const int my_output = thread % 32;  // and + 32, 64, 96
    const int my_row = thread / 32;     // and + 8, 16, 24
    float sums[4][4] = {};
    for (int k = 0; k < o.cols; k += kDepth) {
      BlockBarrier();
      for (int i = thread; i < kOutputs * kDepth; i += kThreads) {
        const int column = k + i % kDepth;
        const int output = i / kDepth;
        weights[i % kDepth * (kOutputs + 1) + output] =
            column < o.cols ? o.WeightAt(output, column) : 0.0F;
      }
      for (int i = thread; i < kRows * kDepth; i += kThreads) {
        const int column = k + i % kDepth;
        const int row = i / kDepth;
        rows[i % kDepth * (kRows + 1) + row] = column < o.cols && row < o.num_rows
                                                   ? LoadElement(o.RowOfX(row), o.x_element, column)
                                                   : 0.0F;
      }
      BlockBarrier();
      const int depth = o.cols - k < kDepth ? o.cols - k : kDepth;
      for (int d = 0; d < depth; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sums[i][j] = fmaf(rows[d * (kRows + 1) + my_row + 8 * j],
                              weights[d * (kOutputs + 1) + my_output + 32 * i], sums[i][j]);
          }
        }
      }
    }
    BlockBarrier();
    float* out = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        out[(my_row + 8 * j) * kSumStride + my_output + 32 * i] = sums[i][j];
      }
    }
    BlockBarrier();
    return out;
  }
};

// --- Finishing

struct FinishTask {
  Finish finish;
  const float* bias;
  const float* weight_scales;  // e4m3, from the tile's first output on; else null
  const float* x_scales;       // e4m3, from the tile's first row on
  MatrixView out;
  int32_t num_outputs;
  MatrixView gate;
  const RowFacts* rows;
  float cap = 0.0F;  // goes without bias
};

// y of one sum: scales, then bias or cap.
CINNABAR_DEVICE float Scaled(const FinishTask& task, float sum, int row, int tile_output,
                             int output) {
  if (task.weight_scales != nullptr) {
    sum = sum * (task.weight_scales[tile_output] * task.x_scales[row]);
  }
  if (task.cap > 0.0F) return SoftCap(sum, task.cap);
  return task.bias == nullptr ? sum : sum + task.bias[output];
}

// Finishes the tile whose sums lie in shared memory: rows row_begin + 0 .. num_rows - 1 of the
// batch, weight rows from output_begin on. Four outputs of a row a thread and turn.
template <class Product>
CINNABAR_DEVICE void FinishTile(const FinishTask& task, const float* sums, int64_t row_begin,
                                int num_rows, int output_begin) {
  constexpr int kSum = Product::kSumStride;
  const bool paired = task.finish == Finish::kSwiGlu || task.finish == Finish::kGeGlu;
  const bool adds = task.finish == Finish::kAdd || task.finish == Finish::kGatedAdd;
  const bool moves_out = MovesFours(task.out);
  const bool moves_gate = task.finish == Finish::kGatedAdd && MovesFours(task.gate);
  const int first = paired ? output_begin / 2 : output_begin;
  const int fours = Product::kOutputs / (paired ? 8 : 4);
  for (int i = ThreadIndex(); i < num_rows * fours; i += NumThreads()) {
    const int row = i / fours;
    const int column = i % fours * 4;
    const int output = first + column;
    const int count = task.num_outputs - output;
    if (count <= 0) continue;
    const int64_t r = row_begin + row;
    const int at = paired ? column / 8 * 16 + column % 8 : column;
    const Four mine = *reinterpret_cast<const Four*>(sums + row * kSum + at);
    const Four ups = paired ? *reinterpret_cast<const Four*>(sums + row * kSum + at + 8) : Four{};
    const Four before = adds ? LoadFour(task.out, moves_out, r, output, count) : Four{};
    const Four gates =
        task.finish == Finish::kGatedAdd
            ? LoadFour(task.gate, moves_gate, task.rows[r].modulation_row, output, count)
            : Four{};
    Four out = {};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c >= count) break;
      const float y = Scaled(task, mine.v[c], row, at + c, output + c);
      switch (task.finish) {
        case Finish::kStore:
          out.v[c] = y;
          break;
        case Finish::kAdd:
          out.v[c] = before.v[c] + y;
          break;
        case Finish::kGatedAdd:
          out.v[c] = fmaf(gates.v[c], y, before.v[c]);
          break;
        case Finish::kSilu:
          out.v[c] = Silu(y);
          break;
        case Finish::kGeluTanh:
          out.v[c] = GeluTanh(y);
          break;
        case Finish::kSwiGlu:
        case Finish::kGeGlu:
          out.v[c] = (task.finish == Finish::kSwiGlu ? Silu(y) : GeluTanh(y)) *
                     Scaled(task, ups.v[c], row, at + 8 + c, task.num_outputs + output + c);
          break;
      }
    }
    StoreFour(task.out, moves_out, r, output, count, out);
  }
}

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_PRODUCT_CUH_
