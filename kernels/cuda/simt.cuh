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
CINNABAR_DEVICE int GridY() { return static_cast<int>(gridDim.y); }

// The block's dynamic shared memory, 1,024-byte aligned; kernels use no other.
CINNABAR_DEVICE unsigned char* SharedBytes() {
  extern __shared__ __align__(1024) unsigned char cinnabar_shared[];
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

// --- sm_90a: what products by wgmma are made of. Only there: code that calls it stands inside
// #if CINNABAR_HOPPER. Source: PTX ISA 9.0, "wgmma", "mbarrier", "cp.async.bulk", "Async proxy".
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CINNABAR_HOPPER 1

// A barrier in shared memory whose phases complete when `arrivals` have arrived and all bytes that
// were announced are there. Phases alternate in parity, the first has 0.
CINNABAR_DEVICE void MbarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}
// After MbarrierInit() and before the barrier of all threads: bulk copies see them, too.
CINNABAR_DEVICE void MbarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
CINNABAR_DEVICE void MbarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(SharedAddress(barrier))
               : "memory");
}
// Arrives, and announces bytes of bulk copies that belong to this phase.
CINNABAR_DEVICE void MbarrierArriveExpecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has completed.
CINNABAR_DEVICE void MbarrierWait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  }
}
// `bytes` (a multiple of 16) into shared memory; both are 16-byte aligned. `barrier` is told when
// they are there. By one thread.
CINNABAR_DEVICE void BulkCopy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
// What this thread has written to shared memory (cp.async that was waited for included) is seen by
// every wgmma that comes after, in whatever thread.
CINNABAR_DEVICE void AsyncProxyFence() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// The four below are for the 128 threads of a warp group together. Between Wgmma() and the
// WgmmaWait() that covers it nothing may touch d, and the operands stay as they are; WgmmaFence()
// stands between other uses of d and the next Wgmma().
CINNABAR_DEVICE void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
CINNABAR_DEVICE void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kGroupsLeft>
CINNABAR_DEVICE void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroupsLeft) : "memory");
}
// After WgmmaWait<0>(): keeps the compiler from reading d earlier.
template <int kCount>
CINNABAR_DEVICE void WgmmaDone(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define CINNABAR_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CINNABAR_R16 \
  CINNABAR_R8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CINNABAR_R32                                                            \
  CINNABAR_R16                                                                  \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30" \
  ", %31"
#define CINNABAR_R64                                                            \
  CINNABAR_R32                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46" \
  ", %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61" \
  ", %62, %63"
#define CINNABAR_R128                                                              \
  CINNABAR_R64                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78"    \
  ", %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93"    \
  ", %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107" \
  ", %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120" \
  ", %121, %122, %123, %124, %125, %126, %127"
#define CINNABAR_D8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define CINNABAR_D16(i) CINNABAR_D8(i), CINNABAR_D8(i + 8)
#define CINNABAR_D32(i) CINNABAR_D16(i), CINNABAR_D16(i + 16)
#define CINNABAR_D64(i) CINNABAR_D32(i), CINNABAR_D32(i + 32)
#define CINNABAR_D128(i) CINNABAR_D64(i), CINNABAR_D64(i + 64)
// at_a, at_b, at_c: the numbers of the operands behind the `count` sums.
#define CINNABAR_WGMMA(n, count, at_a, at_b, at_c)                                      \
  if constexpr (kFp8) {                                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #at_c                             \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n                           \
                 "k32.f32.e4m3.e4m3 "                                                   \
                 "{" CINNABAR_R##count "}, %" #at_a ", %" #at_b ", p, 1, 1;\n}\n"       \
                 : CINNABAR_D##count(0)                                                 \
                 : "l"(a), "l"(b), "r"(accumulate ? 1 : 0));                            \
  } else {                                                                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #at_c                             \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n                           \
                 "k16.f32.bf16.bf16 "                                                   \
                 "{" CINNABAR_R##count "}, %" #at_a ", %" #at_b ", p, 1, 1, 0, 0;\n}\n" \
                 : CINNABAR_D##count(0)                                                 \
                 : "l"(a), "l"(b), "r"(accumulate ? 1 : 0));                            \
  }

// d = a b, or d += a b: a [64 x k] and b [k x 2 kCount] by descriptors, 32 bytes of k, bf16 or
// e4m3. Thread t of the group holds of 8 columns j rows 16 (t / 32) + t % 32 / 4 (d[4 j], d[4 j +
// 1]) and that + 8, columns 8 j + 2 (t % 4) and the next.
template <bool kFp8, int kCount>
CINNABAR_DEVICE void Wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kCount == 8 || kCount == 16 || kCount == 32 || kCount == 64 || kCount == 128, "");
  if constexpr (kCount == 8) {
    CINNABAR_WGMMA(16, 8, 8, 9, 10)
  } else if constexpr (kCount == 16) {
    CINNABAR_WGMMA(32, 16, 16, 17, 18)
  } else if constexpr (kCount == 32) {
    CINNABAR_WGMMA(64, 32, 32, 33, 34)
  } else if constexpr (kCount == 64) {
    CINNABAR_WGMMA(128, 64, 64, 65, 66)
  } else {
    CINNABAR_WGMMA(256, 128, 128, 129, 130)
  }
}

#undef CINNABAR_WGMMA
#endif  // __CUDA_ARCH_FEAT_SM90_ALL

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
