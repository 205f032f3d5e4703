// The few device functions that the kernels are written in, each one instruction or a builtin. All
// inline PTX of the folder is here. tests/support/simt/simt.h gives the same names on the host, so
// that every kernel's logic is tested where there is no device.
#ifndef CINNABAR_KERNELS_CUDA_SIMT_CUH_
#define CINNABAR_KERNELS_CUDA_SIMT_CUH_

#ifndef CINNABAR_SIMT_EMULATOR

#include <cuda_runtime.h>

#include <cstdint>

// threads of a block, blocks that a multiprocessor must have registers for.
#define CINNABAR_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define CINNABAR_DEVICE __device__ __forceinline__

namespace cinnabar::cuda {

CINNABAR_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
CINNABAR_DEVICE int NumThreads() { return static_cast<int>(blockDim.x); }
CINNABAR_DEVICE int BlockX() { return static_cast<int>(blockIdx.x); }
CINNABAR_DEVICE int BlockY() { return static_cast<int>(blockIdx.y); }
CINNABAR_DEVICE int BlockZ() { return static_cast<int>(blockIdx.z); }
CINNABAR_DEVICE int GridX() { return static_cast<int>(gridDim.x); }

// The block's dynamic shared memory, 128-byte aligned; kernels use no other.
CINNABAR_DEVICE unsigned char* SharedBytes() {
  extern __shared__ __align__(128) unsigned char cinnabar_shared[];
  return cinnabar_shared;
}

CINNABAR_DEVICE void BlockBarrier() { __syncthreads(); }
CINNABAR_DEVICE void WarpBarrier() { __syncwarp(); }
// All 32 lanes take part in each of these.
template <typename T>
CINNABAR_DEVICE T Shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFU, value, lane);
}
template <typename T>
CINNABAR_DEVICE T ShuffleXor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFU, value, mask);
}
CINNABAR_DEVICE uint32_t Ballot(bool vote) { return __ballot_sync(0xFFFFFFFFU, vote); }
CINNABAR_DEVICE int CountBits(uint32_t bits) { return __popc(bits); }

CINNABAR_DEVICE uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes into shared memory, of which the first `bytes` come from `global` and the rest are 0.
// Both are 16-byte aligned; nothing is read when bytes is 0. Passes by the first-level cache.
CINNABAR_DEVICE void CopyAsync16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
CINNABAR_DEVICE void CopyCommit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kGroupsLeft>
CINNABAR_DEVICE void CopyWait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsLeft) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements; lanes 8 m .. 8 m + 7 name the rows of matrix m. Lane l
// gets elements 2 (l % 4) and the next of row l / 4; transposed: of column l / 4.
CINNABAR_DEVICE void LoadMatrix4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}
CINNABAR_DEVICE void LoadMatrix4Transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// c += a b, a [16 x 16] and b [16 x 8] bf16, c float32.
CINNABAR_DEVICE void MmaBf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with a [16 x 32] and b [32 x 8] e4m3; there from sm_89 on, else the host does not call.
CINNABAR_DEVICE void MmaE4m3(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  (void)c, (void)a, (void)b0, (void)b1;
#endif
}

// IEEE half, exactly.
CINNABAR_DEVICE float WidenHalf(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"(half));
  return value;
}
// Two floats as bf16, to nearest even; `low` in the low half.
CINNABAR_DEVICE uint32_t RoundToBf16Pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Integers only: their sum does not depend on the order.
CINNABAR_DEVICE int32_t AtomicAdd(int32_t* at, int32_t value) { return atomicAdd(at, value); }
CINNABAR_DEVICE uint32_t AtomicAdd(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
CINNABAR_DEVICE uint64_t AtomicAdd(uint64_t* at, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(at),
                   static_cast<unsigned long long>(value));
}
// What this thread wrote before is seen by every thread of the device that sees what it writes
// after.
CINNABAR_DEVICE void DeviceFence() { __threadfence(); }

struct LaunchShape {
  int x = 1;  // blocks
  int y = 1;
  int z = 1;
  int threads = 32;
  int64_t shared_bytes = 0;
  void* stream = nullptr;
};

// Enqueues a kernel; returns the CUDA error, 0 for none.
template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), const LaunchShape& shape, Arguments... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shape.shared_bytes));
    if (raised != cudaSuccess) return static_cast<int>(raised);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y),
                        static_cast<unsigned>(shape.z));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(shape.stream);
  return static_cast<int>(
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace cinnabar::cuda

#endif  // CINNABAR_SIMT_EMULATOR

#endif  // CINNABAR_KERNELS_CUDA_SIMT_CUH_
