// A tile of a matrix product with a block-quantised weight (blocks.h): what TensorProduct makes of
// the same values in bf16.
//
// A weight value is scale * (v - zero) + base in float32, rounded once to bf16; products are of
// those and bf16 rows, sums float32. Per stage of 64 elements of k: packed quarters of units and
// rows arrive by cp.async, the threads expand the quarters into a tile of bf16 in shared memory,
// and the mma instructions of TensorProduct run on it, in its order and with its segments. So the
// argument for batch invariance in product.cuh holds as it stands: a value depends on the weight
// alone.
//
// Shared memory: kStages stages of (outputs x kPackedStride + rows x 128) bytes, then one tile of
// outputs x 128 bytes; 36 / 44 / 60 KiB for 64 outputs and 16 / 32 / 64 rows, 94 KiB for
// 128 x 128. Two barriers a stage: the other blocks of a multiprocessor fill the gaps.
#ifndef CINNABAR_KERNELS_CUDA_BLOCK_PRODUCT_CUH_
#define CINNABAR_KERNELS_CUDA_BLOCK_PRODUCT_CUH_

#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/product.cuh"

namespace cinnabar::cuda {

// Header, quarter and high bits of a row in a stage: 80 bytes at most.
inline constexpr int kPackedStride = 80;

template <int kTileOutputs, int kTileRows, int kWarpsOutputs, int kWarpsRows, int kStages,
          bool kFold>
struct BlockProduct {
  using Tensor =
      TensorProduct<kTileOutputs, kTileRows, kWarpsOutputs, kWarpsRows, kStages, kFold, false>;
  static constexpr int kOutputs = kTileOutputs;
  static constexpr int kRows = kTileRows;
  static constexpr int kThreads = Tensor::kThreads;
  static constexpr int kSumStride = Tensor::kSumStride;
  static constexpr int kPackedBytes = kOutputs * kPackedStride;
  static constexpr int kStageBytes = kPackedBytes + kRows * kStageDepth;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kOutputs * kStageDepth > Tensor::kSumBytes
          ? kStages* kStageBytes + kOutputs* kStageDepth
          : Tensor::kSumBytes;
  static constexpr int kFoldBytes = kSharedBytes;
  static constexpr bool kIsFp8 = false;
  static constexpr int kBlocks = Tensor::kBlocks;
  static constexpr int kPiecesW = Tensor::kPiecesW;
  static constexpr int kPiecesX = Tensor::kPiecesX;

  CINNABAR_DEVICE static float* Run(const ProductOperands& o, unsigned char* shared) {
    const int thread = ThreadIndex();
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int warp_output = warp % kWarpsOutputs * Tensor::kWarpOutputs;
    const int warp_row = warp / kWarpsOutputs * Tensor::kWarpRows;
    const int64_t x_bytes = static_cast<int64_t>(o.cols) * 2;
    const int first_stage = static_cast<int>(o.k_begin / kStageDepth);
    const int num_stages = static_cast<int>((o.k_end - o.k_begin) / kStageDepth);
    const int segment_stages = static_cast<int>(o.segment_bytes / kStageDepth);
    unsigned char* tile = shared + kStages * kStageBytes;

    // This thread's 16-byte piece of each row it serves: of the header, the quarter's values, or
    // its high bits.
    const UnitLayout layout = UnitOf(o.weight_element);
    const int my_piece = thread % 8;
    int piece_begin = 16 * my_piece;
    int piece_step = 0;  // from a quarter to the next
    const int values_end = layout.header_bytes + layout.value_bytes;
    if (piece_begin >= values_end) {
      piece_begin += 3 * layout.value_bytes;
      piece_step = layout.high_bytes;
    } else if (piece_begin >= layout.header_bytes) {
      piece_step = layout.value_bytes;
    }
    const bool has_piece = 16 * my_piece < values_end + layout.high_bytes;
    const unsigned char* weight = o.weight + thread / 8 * o.weight_row_bytes + piece_begin;
    const unsigned char* x_rows[kPiecesX];
    bool x_exists[kPiecesX];
#pragma unroll
    for (int i = 0; i < kPiecesX; ++i) {
      const int row = thread / 8 + i * (kThreads / 8);
      x_exists[i] = row < o.num_rows;
      x_rows[i] = x_exists[i] ? o.RowOfX(row) : o.x;
    }

    const auto load = [&](int stage, unsigned char* at) {
      const int absolute = first_stage + stage;
      const int64_t from =
          static_cast<int64_t>(absolute / 4) * layout.unit_bytes() + absolute % 4 * piece_step;
#pragma unroll
      for (int i = 0; i < kPiecesW; ++i) {
        const int row = thread / 8 + i * (kThreads / 8);
        if (has_piece) {
          CopyAsync16(at + row * kPackedStride + 16 * my_piece,
                      weight + i * (kThreads / 8) * o.weight_row_bytes + from, 16);
        }
      }
      unsigned char* x_at = at + kPackedBytes;
      const int64_t k = static_cast<int64_t>(absolute) * kStageDepth + my_piece * 16;
      const int64_t left = x_bytes - k;
      const int there = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
      for (int i = 0; i < kPiecesX; ++i) {
        const int row = thread / 8 + i * (kThreads / 8);
        if (kRows * 8 % kThreads != 0 && row >= kRows) continue;
        CopyAsync16(x_at + SwizzledPlace(row, my_piece), x_rows[i] + k, x_exists[i] ? there : 0);
      }
    };
    const auto expand = [&](int stage, const unsigned char* at) {
      const int quarter = (first_stage + stage) % 4;
#pragma unroll
      for (int i = 0; i < kPiecesW; ++i) {
        const int row = thread / 8 + i * (kThreads / 8);
        const unsigned char* packed = at + row * kPackedStride;
        *reinterpret_cast<EightBf16*>(tile + SwizzledPlace(row, my_piece)) =
            ExpandEight(o.weight_element, packed, packed + layout.header_bytes, packed + values_end,
                        quarter, my_piece);
      }
    };

    typename Tensor::Sums sums = {};
    typename Tensor::Totals totals = {};
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < num_stages) load(stage, shared + stage * kStageBytes);
      CopyCommit();
    }
    int at = 0;
    int next = kStages - 1;
    int until_fold = segment_stages;
    for (int stage = 0; stage < num_stages; ++stage) {
      CopyWait<kStages - 2>();
      // The stage is there for all, and nobody reads the slot and the tile that are filled next.
      BlockBarrier();
      if (stage + kStages - 1 < num_stages) load(stage + kStages - 1, shared + next * kStageBytes);
      CopyCommit();
      expand(stage, shared + at * kStageBytes);
      BlockBarrier();
      Tensor::Multiply(tile, shared + at * kStageBytes + kPackedBytes, warp_output, warp_row, lane,
                       sums);
      at = at + 1 == kStages ? 0 : at + 1;
      next = next + 1 == kStages ? 0 : next + 1;
      if constexpr (kFold) {
        if (--until_fold == 0 || stage + 1 == num_stages) {
          until_fold = segment_stages;
          Tensor::Fold(sums, totals);
        }
      }
    }
    CopyWait<0>();
    BlockBarrier();
    return Tensor::PutDown(sums, totals, warp_output, warp_row, lane, shared);
  }
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_BLOCK_PRODUCT_CUH_
