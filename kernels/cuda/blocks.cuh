// Elements of block-quantised weights (blocks.h) on the device: one at a time for the plain paths,
// eight at a time for a stage of tensor cores.
#ifndef CINNABAR_KERNELS_CUDA_BLOCKS_CUH_
#define CINNABAR_KERNELS_CUDA_BLOCKS_CUH_

#include "kernels/cuda/blocks.h"
#include "kernels/cuda/elements.cuh"

namespace cinnabar::cuda {

// value = scale * (v - zero) + base. `magic` is 2^23 + zero: with v's bits below 2^23's, a
// subtraction gives v - zero exactly, without a conversion.
struct Scales {
  float scale;
  float base;
  float magic;
};

// Of the sixteen elements of a unit that `element` is among.
CINNABAR_DEVICE Scales ScalesOf(Element format, const unsigned char* header, int element) {
  const auto half = [&](int index) {
    return WidenHalf(reinterpret_cast<const uint16_t*>(header)[index]);
  };
  const int run = element / 32;
  switch (format) {
    case Element::kQ8_0:
      return {half(run), 0.0F, 8388608.0F + 128.0F};
    case Element::kQ4_0:
      return {half(run), 0.0F, 8388608.0F + 8.0F};
    case Element::kQ4_1:
      return {half(run), half(8 + run), 8388608.0F};
    case Element::kQ4_K: {
      // 6 bits each: of the first four runs in bytes 4 + run and 8 + run; of the others the low
      // four in byte 8 + run, the high two above those.
      const unsigned char* packed = header + 4;
      const int sc =
          run < 4 ? packed[run] & 63 : (packed[run + 4] & 15) | packed[run - 4] >> 6 << 4;
      const int mn = run < 4 ? packed[run + 4] & 63 : packed[run + 4] >> 4 | packed[run] >> 6 << 4;
      return {half(0) * static_cast<float>(sc), -half(1) * static_cast<float>(mn), 8388608.0F};
    }
    case Element::kQ6_K: {
      const auto sc = static_cast<float>(reinterpret_cast<const int8_t*>(header)[element / 16]);
      return {half(8) * sc, 0.0F, 8388608.0F + 32.0F};
    }
    case Element::kF32:
    case Element::kF16:
    case Element::kBf16:
    case Element::kE4m3:
      break;
  }
  return {0.0F, 0.0F, 8388608.0F};
}

CINNABAR_DEVICE float Expanded(const Scales& scales, uint32_t stored) {
  return fmaf(scales.scale, FloatOfBits(0x4B000000U | stored) - scales.magic, scales.base);
}

// Element `column` of a row that starts at `row`: of any kind.
CINNABAR_DEVICE float LoadWeightElement(const void* row, Element element, int64_t column) {
  if (!IsBlocks(element)) return LoadElement(row, element, column);
  const UnitLayout layout = UnitOf(element);
  const unsigned char* unit =
      static_cast<const unsigned char*>(row) + column / kUnit * layout.unit_bytes();
  const int in_unit = static_cast<int>(column % kUnit);
  const unsigned char* values = unit + layout.header_bytes;
  uint32_t stored;
  if (element == Element::kQ8_0) {
    stored = values[in_unit];
  } else {
    stored = values[in_unit / 2] >> 4 * (in_unit % 2) & 15U;
    if (layout.high_bytes > 0) {
      const uint32_t high = values[4 * layout.value_bytes + in_unit / 4];
      stored |= (high >> 2 * (in_unit % 4) & 3U) << 4;
    }
  }
  return Expanded(ScalesOf(element, unit, in_unit), stored);
}

struct alignas(16) EightBf16 {
  uint32_t pairs[4];
};

// Elements 8 `piece` .. 8 `piece` + 7 of the quarter `quarter` of a unit, each rounded once to
// bf16. `values`, `high`: of the quarter.
CINNABAR_DEVICE EightBf16 ExpandEight(Element format, const unsigned char* header,
                                      const unsigned char* values, const unsigned char* high,
                                      int quarter, int piece) {
  const Scales scales = ScalesOf(format, header, quarter * kQuarter + 8 * piece);
  uint32_t stored[8];
  if (format == Element::kQ8_0) {
    const auto* words = reinterpret_cast<const uint32_t*>(values) + 2 * piece;
#pragma unroll
    for (int i = 0; i < 8; ++i) stored[i] = words[i / 4] >> 8 * (i % 4) & 255U;
  } else {
    const uint32_t word = reinterpret_cast<const uint32_t*>(values)[piece];
#pragma unroll
    for (int i = 0; i < 8; ++i) stored[i] = word >> 4 * i & 15U;
    if (format == Element::kQ6_K) {
      const uint32_t pairs = reinterpret_cast<const uint16_t*>(high)[piece];
#pragma unroll
      for (int i = 0; i < 8; ++i) stored[i] |= (pairs >> 2 * i & 3U) << 4;
    }
  }
  EightBf16 eight;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    eight.pairs[i] =
        RoundToBf16Pair(Expanded(scales, stored[2 * i]), Expanded(scales, stored[2 * i + 1]));
  }
  return eight;
}

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_BLOCKS_CUH_
