// A tile of a matrix product by wgmma, for sm_90: the contract of TensorProduct (product.cuh), 128
// outputs by 16 to 256 rows, from weights that lie tiled (launch.h).
//
// Batch invariance. A sum belongs to one output and one row and is made the same way in every tile
// shape: one wgmma of 32 bytes of k after another, the weight the left operand and the row a column
// of the right one; the first of a segment starts the sum, the others add to it. e4m3 keeps about
// 14 bits while it adds, so its sum is started anew every 128 of k and added to a float32 total
// that began at 0 with the segment. Segments (WeightView::segment_bytes) are added in their order,
// here or by Linear, as in product.cuh. What is assumed of the hardware: an element of a wgmma's
// result is a function of its row of a, its column of b and what it is added to, wherever in the
// tile it lies and however many columns the instruction has. mma.sync may round otherwise: a
// weight is always multiplied by the same of the two.
//
// Roles. Warps 0 to 7 are two warp groups that multiply, 64 outputs each, 4 wgmma a stage of 128
// bytes of k; the warps behind them fetch. A stage's weight is one bulk copy of 16 KiB, in memory
// as it shall lie in shared memory; its rows come by cp.async, for they may lie anywhere (experts,
// queries) and end anywhere. Full and empty stages are passed on by mbarriers.
//
// Shapes and occupancy (227 KiB of shared memory, 64 K registers).
//   rows | threads | stages       | blocks | weight in flight
//     16 |     288 | 6 of 18 KiB  |      2 | 192 KiB a multiprocessor
//     32 |     288 | 5 of 20 KiB  |      2 | 160 KiB
//     64 |     288 | 4 of 24 KiB  |      2 | 128 KiB
//    128 |     384 | 5 of 32 KiB  |      1 |  80 KiB
//    256 |     384 | 4 of 48 KiB  |      1 |  64 KiB
// Few rows: reading the weight is all. 4.8 TB/s times 1 us is 36 KiB a multiprocessor; the rows add
// 1/8 (16 rows) to 1/2 (64) to what the second-level cache gives. Many rows: a wgmma of 64 x 256
// takes 128 cycles and reads 10 KiB of shared memory, 80 cycles of it; a stage is written in 384 of
// the 1,024 that it is multiplied in. 64 x 128: 48 of 64, and 256 of 512. So 256 is for bf16
// weights of one segment; totals of segments (66 KiB of shared memory) and of e4m3 (64 registers)
// leave room for 128.
#ifndef CINNABAR_KERNELS_CUDA_HOPPER_PRODUCT_CUH_
#define CINNABAR_KERNELS_CUDA_HOPPER_PRODUCT_CUH_

#include "kernels/cuda/product.cuh"

namespace cinnabar::cuda {

template <int kTileRows, bool kFp8>
struct HopperProduct {
  static constexpr int kOutputs = 128;
  static constexpr int kRows = kTileRows;
  static constexpr int kConsumers = 256;
  static constexpr int kProducers = kRows > 64 ? 128 : 32;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kBlocks = kRows > 64 ? 1 : 2;
  static constexpr int kStages = kRows == 16 ? 6 : kRows == 32 || kRows == 128 ? 5 : 4;
  // Stages whose rows are on their way. Two less than all: a stage is given back when the next one
  // is being multiplied, and that must have been announced before this thread waits for it.
  static constexpr int kAhead = kStages - 2;
  static constexpr int kWeightBytes = kOutputs * kStageDepth;
  static constexpr int kStageBytes = kWeightBytes + kRows * kStageDepth;
  static constexpr int kSumStride = kOutputs + 4;
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr int kBarrierBytes = 128;
  static constexpr bool kIsFp8 = kFp8;
  static_assert(kWeightBytes == kWeightTileBytes && kOutputs == kWeightRowUnit, "");
  static_assert(kStages * 16 <= kBarrierBytes && kSumBytes <= kStages * kStageBytes, "");

  // Sums lie over the stages; when segments are added up, behind them.
  static constexpr int kSharedBytes = kStages * kStageBytes + kBarrierBytes;
  static constexpr int kFoldBytes = kSharedBytes + kSumBytes;

  CINNABAR_DEVICE static float* Run(const ProductOperands& o, unsigned char* shared) {
    const bool fold = o.segment_bytes < o.k_end - o.k_begin;
    auto* sums = reinterpret_cast<float*>(fold ? shared + kSharedBytes : shared);
#if CINNABAR_HOPPER
    auto* full = reinterpret_cast<uint64_t*>(shared + kStages * kStageBytes);
    uint64_t* empty = full + kStages;
    if (ThreadIndex() == 0) {
      for (int i = 0; i < kStages; ++i) {
        MbarrierInit(full + i, kProducers / 32 + 1);
        MbarrierInit(empty + i, kConsumers / 32);
      }
      MbarrierInitFence();
    }
    BlockBarrier();
    const int warp = Shuffle(ThreadIndex() / 32, 0);  // the same in all lanes, to the compiler too
    if (warp >= kConsumers / 32) {
      Fetch(o, shared, full, empty);
      BlockBarrier();
    } else {
      float mine[kCount];
      Multiply(o, warp, shared, full, empty, fold ? sums : nullptr, mine);
      BlockBarrier();  // all stages have been read
      if (!fold) {
        ForEach(warp, [&](int i, int at) { sums[at] = mine[i]; });
      }
    }
    BlockBarrier();
#endif
    return sums;
  }

 private:
  static constexpr int kCount = kRows / 2;  // sums a thread

#if CINNABAR_HOPPER
  // Calls f(i, at) for the thread's sum i, which lies at `at` of the tile's.
  template <typename F>
  CINNABAR_DEVICE static void ForEach(int warp, const F& f) {
    const int lane = ThreadIndex() % 32;
    const int first = 2 * (lane % 4) * kSumStride + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      f(i, first + (8 * (i / 4) + i % 2) * kSumStride + 8 * (i / 2 % 2));
    }
  }

  CINNABAR_DEVICE static void Fetch(const ProductOperands& o, unsigned char* shared, uint64_t* full,
                                    uint64_t* empty) {
    constexpr int kPieces = kRows * 8 / kProducers;  // of 16 bytes, by each thread
    const int thread = ThreadIndex() - kConsumers;
    const int my_piece = thread % 8;
    const int64_t x_bytes = static_cast<int64_t>(o.cols) * (kFp8 ? 1 : 2);
    const int num_stages = static_cast<int>((o.k_end - o.k_begin) / kStageDepth);
    const unsigned char* weight = o.weight + o.k_begin * kOutputs;
    const unsigned char* x_rows[kPieces];
    bool x_exists[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = thread / 8 + i * (kProducers / 8);
      x_exists[i] = row < o.num_rows;
      x_rows[i] = x_exists[i] ? o.RowOfX(row) : o.x;
    }
    int slot = 0;
    uint32_t parity = 1;  // empty stages: the phase before the first counts as completed
    int told_slot = 0;
    for (int stage = 0; stage < num_stages + kAhead; ++stage) {
      if (stage < num_stages) {
        MbarrierWait(empty + slot, parity);
        unsigned char* at = shared + slot * kStageBytes;
        if (thread == 0) {
          MbarrierArriveExpecting(full + slot, kWeightBytes);
          BulkCopy(at, weight + static_cast<int64_t>(stage) * kWeightBytes, kWeightBytes,
                   full + slot);
        }
        const int64_t k = o.k_begin + static_cast<int64_t>(stage) * kStageDepth + my_piece * 16;
        const int64_t left = x_bytes - k;
        const int there = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int row = thread / 8 + i * (kProducers / 8);
          CopyAsync16(at + kWeightBytes + SwizzledPlace(row, my_piece), x_rows[i] + k,
                      x_exists[i] ? there : 0);
        }
        slot = slot + 1 == kStages ? 0 : slot + 1;
        if (slot == 0) parity ^= 1;
      }
      CopyCommit();
      if (stage < kAhead) continue;
      CopyWait<kAhead>();
      AsyncProxyFence();
      WarpBarrier();
      if (thread % 32 == 0) MbarrierArrive(full + told_slot);
      told_slot = told_slot + 1 == kStages ? 0 : told_slot + 1;
    }
    CopyWait<0>();
  }

  // A stage's weight or rows as wgmma reads them: along k, swizzled over 128 bytes, 1,024 bytes
  // from 8 rows to the next 8. What lies 32 bytes further along k is 2 more.
  CINNABAR_DEVICE static uint64_t Descriptor(const unsigned char* at) {
    return static_cast<uint64_t>((SharedAddress(at) & 0x3FFFFU) >> 4) | uint64_t{1} << 16 |
           uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  }

  // Leaves the sums in `mine`, or adds those of each segment to `totals`.
  CINNABAR_DEVICE static void Multiply(const ProductOperands& o, int warp, unsigned char* shared,
                                       uint64_t* full, uint64_t* empty, float* totals,
                                       float (&mine)[kCount]) {
    const int num_stages = static_cast<int>((o.k_end - o.k_begin) / kStageDepth);
    const int segment_stages = static_cast<int>(o.segment_bytes / kStageDepth);
    const uint64_t weight = Descriptor(shared + warp / 4 * (kWeightBytes / 2));
    const uint64_t rows = Descriptor(shared + kWeightBytes);
    const bool tells = ThreadIndex() % 32 == 0;
    int slot = 0;
    uint32_t parity = 0;
    const auto issue = [&](float(&d)[kCount], bool accumulate) {
      MbarrierWait(full + slot, parity);
      const uint64_t offset = static_cast<uint64_t>(slot * (kStageBytes >> 4));
      WgmmaFence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Wgmma<kFp8>(d, weight + offset + 2 * step, rows + offset + 2 * step,
                    accumulate || step > 0);
      }
      WgmmaCommit();
    };
    const auto give_back = [&](int which) {
      if (tells) MbarrierArrive(empty + which);
    };
    const auto next = [&] {
      slot = slot + 1 == kStages ? 0 : slot + 1;
      if (slot == 0) parity ^= 1;
    };
    for (int begin = 0; begin < num_stages; begin += segment_stages) {
      const int end = num_stages - begin < segment_stages ? num_stages : begin + segment_stages;
      if constexpr (kFp8) {
        float part[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) mine[i] = 0.0F;
        for (int stage = begin; stage < end; ++stage) {
          issue(part, false);
          WgmmaWait<0>();
          WgmmaDone(part);
          give_back(slot);
          next();
#pragma unroll
          for (int i = 0; i < kCount; ++i) mine[i] += part[i];
        }
      } else {
        int before = 0;
        for (int stage = begin; stage < end; ++stage) {
          issue(mine, stage > begin);
          WgmmaWait<1>();
          if (stage > begin) give_back(before);
          before = slot;
          next();
        }
        WgmmaWait<0>();
        WgmmaDone(mine);
        give_back(before);
      }
      if (totals != nullptr) {
        ForEach(warp,
                [&](int i, int at) { totals[at] = (begin == 0 ? 0.0F : totals[at]) + mine[i]; });
      }
    }
  }
#endif  // CINNABAR_HOPPER
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_HOPPER_PRODUCT_CUH_
