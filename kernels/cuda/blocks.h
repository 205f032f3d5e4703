// Block-quantised weights as the device keeps them: a row is units of kUnit elements, whatever the
// format, each
//   header       scales: 16 or 32 bytes, below
//   values       four quarters of 64 elements, 4 or 8 bits each, above `zero`
//   high         Q6_K: four quarters of 64 elements, 2 bits each, above the 4 bits of `values`
// all aligned to 16 bytes, so that cp.async can bring a quarter of a unit. Elements lie in order:
// the first of a byte in its low bits. A row's last unit is filled up with zeros.
//   Q8_0   272 bytes  header f16 d[8]                      8.5 bits an element
//   Q4_0   144        header f16 d[8]                      4.5
//   Q4_1   160        header f16 d[8], m[8]                5
//   Q4_K   144        header f16 d, m, sc and mn as in GGUF 4.5
//   Q6_K   224        header int8 sc[16], f16 d, 14 zeros  7
// value = scale * (v - zero) + base for the stored v, scale and base as kernels/quantized.h has
// them. scale and scale * (v - zero) have no more bits than float32, so that one fused multiply-add
// gives the same bits as ReadRow().
#ifndef CINNABAR_KERNELS_CUDA_BLOCKS_H_
#define CINNABAR_KERNELS_CUDA_BLOCKS_H_

#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/math.h"

namespace cinnabar {

enum class DType : uint8_t;  // kernels/backend.h

namespace cuda {

inline constexpr int32_t kUnit = 256;
inline constexpr int32_t kQuarter = 64;

CINNABAR_BOTH constexpr bool IsBlocks(Element element) { return element >= Element::kQ8_0; }

struct UnitLayout {
  int32_t header_bytes = 0;
  int32_t value_bytes = 0;  // of a quarter
  int32_t high_bytes = 0;   // of a quarter
  CINNABAR_BOTH constexpr int32_t unit_bytes() const {
    return header_bytes + 4 * (value_bytes + high_bytes);
  }
};
CINNABAR_BOTH constexpr UnitLayout UnitOf(Element element) {
  switch (element) {
    case Element::kQ8_0:
      return {16, 64, 0};
    case Element::kQ4_0:
    case Element::kQ4_K:
      return {16, 32, 0};
    case Element::kQ4_1:
      return {32, 32, 0};
    case Element::kQ6_K:
      return {32, 32, 16};
    case Element::kF32:
    case Element::kF16:
    case Element::kBf16:
    case Element::kE4m3:
      break;
  }
  return {};
}
// Of a row of `cols` elements.
CINNABAR_BOTH constexpr int64_t UnitRowBytes(Element element, int64_t cols) {
  return (cols + kUnit - 1) / kUnit * UnitOf(element).unit_bytes();
}

// Units from a row of `cols` elements in GGUF's blocks of `format`. Host only.
void PackUnits(const void* row, DType format, int64_t cols, char* to);

}  // namespace cuda
}  // namespace cinnabar

#endif  // CINNABAR_KERNELS_CUDA_BLOCKS_H_
