// Single elements of device rows, whatever they are stored as. For the plain paths; the tensor
// paths read 16 bytes at a time.
#ifndef CINNABAR_KERNELS_CUDA_ELEMENTS_CUH_
#define CINNABAR_KERNELS_CUDA_ELEMENTS_CUH_

#include "kernels/cuda/launch.h"
#include "kernels/cuda/math.h"
#include "kernels/cuda/simt.cuh"

namespace cinnabar::cuda {

CINNABAR_DEVICE float LoadElement(const void* data, Element element, int64_t index) {
  switch (element) {
    case Element::kF32:
      return static_cast<const float*>(data)[index];
    case Element::kF16:
      return FromF16(static_cast<const uint16_t*>(data)[index]);
    case Element::kBf16:
      return FromBf16(static_cast<const uint16_t*>(data)[index]);
    case Element::kE4m3:
      return FromE4m3(static_cast<const uint8_t*>(data)[index]);
    case Element::kQ8_0:
    case Element::kQ4_0:
    case Element::kQ4_1:
    case Element::kQ4_K:
    case Element::kQ6_K:
      break;  // LoadWeightElement()
  }
  return 0.0F;
}

// kF32 or kBf16.
CINNABAR_DEVICE void StoreElement(void* data, Element element, int64_t index, float value) {
  if (element == Element::kF32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = ToBf16(value);
  }
}

CINNABAR_DEVICE float LoadAt(const MatrixView& m, int64_t row, int64_t column) {
  return LoadElement(m.data, m.element, row * m.stride + column);
}
CINNABAR_DEVICE void StoreAt(const MatrixView& m, int64_t row, int64_t column, float value) {
  StoreElement(m.data, m.element, row * m.stride + column, value);
}

// Four elements of a row at a time, of which the first `count` exist: one access where the view's
// rows allow it (MovesFours) and all four are there, else one by one. `column` is a multiple of 4.
struct alignas(16) Four {
  float v[4];
};
struct alignas(8) FourHalves {
  uint16_t v[4];
};
CINNABAR_DEVICE bool MovesFours(const MatrixView& m) {
  const auto at = reinterpret_cast<uintptr_t>(m.data);
  return m.stride % 4 == 0 && at % (m.element == Element::kF32 ? 16 : 8) == 0;
}
CINNABAR_DEVICE Four LoadFour(const MatrixView& m, bool moves_fours, int64_t row, int64_t column,
                              int count) {
  Four four = {};
  if (!moves_fours || count < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) four.v[i] = LoadAt(m, row, column + i);
    }
    return four;
  }
  const int64_t index = row * m.stride + column;
  if (m.element == Element::kF32) {
    return *reinterpret_cast<const Four*>(static_cast<const float*>(m.data) + index);
  }
  const FourHalves halves =
      *reinterpret_cast<const FourHalves*>(static_cast<const uint16_t*>(m.data) + index);
#pragma unroll
  for (int i = 0; i < 4; ++i) four.v[i] = FromBf16(halves.v[i]);
  return four;
}
CINNABAR_DEVICE void StoreFour(const MatrixView& m, bool moves_fours, int64_t row, int64_t column,
                               int count, const Four& four) {
  if (!moves_fours || count < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) StoreAt(m, row, column + i, four.v[i]);
    }
    return;
  }
  const int64_t index = row * m.stride + column;
  if (m.element == Element::kF32) {
    *reinterpret_cast<Four*>(static_cast<float*>(m.data) + index) = four;
    return;
  }
  FourHalves halves;
#pragma unroll
  for (int i = 0; i < 4; ++i) halves.v[i] = ToBf16(four.v[i]);
  *reinterpret_cast<FourHalves*>(static_cast<uint16_t*>(m.data) + index) = halves;
}

// The same sum on every lane: lanes are joined at distance 16, 8, 4, 2, 1.
template <typename T>
CINNABAR_DEVICE T WarpSum(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value += ShuffleXor(value, mask);
  return value;
}
template <typename T>
CINNABAR_DEVICE T WarpMax(T value) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = ShuffleXor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Sum over the block, on every thread; warps are joined in their order. `scratch` is shared memory
// for one T a warp and may be used again after the next barrier.
template <typename T>
CINNABAR_DEVICE T BlockSum(T value, T* scratch) {
  value = WarpSum(value);
  if (ThreadIndex() % 32 == 0) scratch[ThreadIndex() / 32] = value;
  BlockBarrier();
  T sum = scratch[0];
  for (int warp = 1; warp < NumThreads() / 32; ++warp) sum += scratch[warp];
  BlockBarrier();
  return sum;
}
template <typename T>
CINNABAR_DEVICE T BlockMax(T value, T* scratch) {
  value = WarpMax(value);
  if (ThreadIndex() % 32 == 0) scratch[ThreadIndex() / 32] = value;
  BlockBarrier();
  T largest = scratch[0];
  for (int warp = 1; warp < NumThreads() / 32; ++warp) {
    largest = scratch[warp] > largest ? scratch[warp] : largest;
  }
  BlockBarrier();
  return largest;
}

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_ELEMENTS_CUH_
