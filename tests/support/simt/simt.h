// Runs the kernels of kernels/cuda on the host, one thread at a time: every CUDA thread of a block
// is a fiber that runs until it waits for a barrier or for its warp. Forced into the .cu files when
// they are compiled as C++ (-include), it stands in for kernels/cuda/simt.cuh: the same names, with
// the meaning that the PTX documentation gives them. What it proves is the logic: indices, fragment
// layouts, masks, barriers. What it cannot prove is the hardware: speed, and the rounding inside a
// tensor core, which here adds the products of an mma in order, in float32 (a wgmma of e4m3 keeps
// 14 bits of each sum, as published measurements of Hopper have it, arXiv:2412.19437).
//
// It is stricter than a device where it can be:
//   * shared memory starts as NaNs, and threads and blocks run in an order that the tests choose,
//   so
//     that a missing barrier or a dependence between blocks shows;
//   * an asynchronous copy arrives when its group, or the mbarrier that it tells, is waited for,
//   not
//     before; where it goes there are NaNs until then;
//   * a wgmma reads its operands, by the very descriptors, when it is waited for, and its sums are
//     NaNs until then; touching them in between, a missing fence, an operand that cp.async wrote
//     and no proxy fence has passed, or descriptors that differ in a warp group abort;
//   * a warp function that not all 32 lanes reach together, or a barrier that never fills, aborts.
// Source of the layouts: PTX ISA 8.5, "Matrix Fragments for mma.m16n8k16", ".m16n8k32", "ldmatrix";
// PTX ISA 9.0, "Matrix Fragments for wgmma.mma_async", "Shared Memory Matrix Layout", "Matrix
// Descriptor Format", "mbarrier".
#ifndef CINNABAR_TESTS_SUPPORT_SIMT_SIMT_H_
#define CINNABAR_TESTS_SUPPORT_SIMT_SIMT_H_

#define CINNABAR_SIMT_EMULATOR 1
// The kernels and their host code under a name of their own, beside the real ones in one program.
#define cuda cuda_emulated
#define CINNABAR_HOPPER 1

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

namespace cinnabar::simt {

struct Index {
  int32_t x = 0;
  int32_t y = 0;
  int32_t z = 0;
};

// Where the running thread is. Kernels read these through the functions below.
struct Place {
  int32_t thread = 0;
  Index block;
  Index grid;
  int32_t threads = 0;
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
};
extern Place place;

// Runs `body` as every thread of every block, then returns.
void RunGrid(Index grid, int32_t threads, int64_t shared_bytes, const std::function<void()>& body);

void BlockBarrier();
// Each lane of the warp comes with its operands; the last to come runs `execute` for all.
using Execute = void (*)(void* const operands[32]);
void WarpMeeting(void* operands, Execute execute);

void CopyAsync(void* to, const void* from, int32_t bytes, int32_t zero_bytes);
void CopyCommit();
void CopyWait(int32_t groups_left);

void MmaBf16(float* c, const uint32_t* a, const uint32_t* b);
void MmaE4m3(float* c, const uint32_t* a, const uint32_t* b);
void LoadMatrix4(uint32_t* out, const void* row);
void LoadMatrix4Transposed(uint32_t* out, const void* row);

uint32_t SharedAddress(const void* pointer);
void MbarrierInit(uint64_t* barrier, uint32_t arrivals);
void MbarrierArrive(uint64_t* barrier, uint32_t expected_bytes);
void MbarrierWait(uint64_t* barrier, uint32_t parity);
void BulkCopy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void AsyncProxyFence();
void WgmmaFence();
void Wgmma(float* d, int32_t count, uint64_t a, uint64_t b, bool accumulate, bool fp8);
void WgmmaCommit();
void WgmmaWait(int32_t groups_left);

template <typename T>
struct ShuffleOperands {
  T value;
  int32_t lane;
  T result;
};
template <typename T>
T ShuffleFrom(T value, int32_t lane) {
  ShuffleOperands<T> mine = {value, lane, value};
  WarpMeeting(&mine, [](void* const operands[32]) {
    for (int i = 0; i < 32; ++i) {
      auto* of = static_cast<ShuffleOperands<T>*>(operands[i]);
      of->result = static_cast<ShuffleOperands<T>*>(operands[of->lane & 31])->value;
    }
  });
  return mine.result;
}
uint32_t Ballot(bool vote);

}  // namespace cinnabar::simt

// --- What kernels/cuda/simt.cuh defines for a device

#define CINNABAR_KERNEL(threads, blocks) void
#define CINNABAR_DEVICE inline

namespace cinnabar::cuda {

inline int ThreadIndex() { return simt::place.thread; }
inline int NumThreads() { return simt::place.threads; }
inline int BlockX() { return simt::place.block.x; }
inline int BlockY() { return simt::place.block.y; }
inline int BlockZ() { return simt::place.block.z; }
inline int GridX() { return simt::place.grid.x; }
inline int GridY() { return simt::place.grid.y; }
inline unsigned char* SharedBytes() { return simt::place.shared; }
inline void BlockBarrier() { simt::BlockBarrier(); }
inline void WarpBarrier() { simt::Ballot(false); }
template <typename T>
T Shuffle(T value, int lane) {
  return simt::ShuffleFrom(value, lane);
}
template <typename T>
T ShuffleXor(T value, int mask) {
  return simt::ShuffleFrom(value, (simt::place.thread & 31) ^ mask);
}
inline uint32_t Ballot(bool vote) { return simt::Ballot(vote); }
inline int CountBits(uint32_t bits) { return __builtin_popcount(bits); }

inline void CopyAsync16(void* shared, const void* global, int bytes) {
  simt::CopyAsync(shared, global, bytes, 16 - bytes);
}
inline void CopyCommit() { simt::CopyCommit(); }
template <int kGroupsLeft>
void CopyWait() {
  simt::CopyWait(kGroupsLeft);
}
inline void LoadMatrix4(uint32_t (&out)[4], const void* row) { simt::LoadMatrix4(out, row); }
inline void LoadMatrix4Transposed(uint32_t (&out)[4], const void* row) {
  simt::LoadMatrix4Transposed(out, row);
}
inline void MmaBf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  simt::MmaBf16(c, a, b);
}
inline void MmaE4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  simt::MmaE4m3(c, a, b);
}

inline float WidenHalf(uint16_t half) {
  _Float16 value;
  std::memcpy(&value, &half, sizeof(value));
  return static_cast<float>(value);
}
inline uint32_t RoundToBf16Pair(float low, float high) {
  const auto rounded = [](float value) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return 0x7FFFU;
    return (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}

inline uint32_t SharedAddress(const void* pointer) { return simt::SharedAddress(pointer); }
inline void MbarrierInit(uint64_t* barrier, uint32_t arrivals) {
  simt::MbarrierInit(barrier, arrivals);
}
inline void MbarrierInitFence() {}
inline void MbarrierArrive(uint64_t* barrier) { simt::MbarrierArrive(barrier, 0); }
inline void MbarrierArriveExpecting(uint64_t* barrier, uint32_t bytes) {
  simt::MbarrierArrive(barrier, bytes);
}
inline void MbarrierWait(uint64_t* barrier, uint32_t parity) {
  simt::MbarrierWait(barrier, parity);
}
inline void BulkCopy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  simt::BulkCopy(shared, global, bytes, barrier);
}
inline void AsyncProxyFence() { simt::AsyncProxyFence(); }
inline void WgmmaFence() { simt::WgmmaFence(); }
inline void WgmmaCommit() { simt::WgmmaCommit(); }
template <int kGroupsLeft>
void WgmmaWait() {
  simt::WgmmaWait(kGroupsLeft);
}
template <int kCount>
void WgmmaDone(float (&)[kCount]) {}
template <bool kFp8, int kCount>
void Wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  simt::Wgmma(d, kCount, a, b, accumulate, kFp8);
}

// Threads run one at a time, so plain arithmetic is atomic.
template <typename T>
T AtomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline void DeviceFence() {}

struct LaunchShape {
  int x = 1;
  int y = 1;
  int z = 1;
  int threads = 32;
  int64_t shared_bytes = 0;
  void* stream = nullptr;
};

// Either runs the grid or, between BeginCapture() and EndCapture(), keeps it for the graph.
void Enqueue(const LaunchShape& shape, std::function<void()> body);

template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments... arguments) {
  const std::tuple<Parameters...> kept(static_cast<Parameters>(arguments)...);
  Enqueue(shape, [kernel, kept] { std::apply(kernel, kept); });
  return 0;
}

}  // namespace cinnabar::cuda

#endif  // CINNABAR_TESTS_SUPPORT_SIMT_SIMT_H_
