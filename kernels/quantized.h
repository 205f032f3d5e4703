// Block-quantised weights: runs of a row as small integers with a shared scale. Layouts are those
// of GGUF, little-endian (ggml-org/ggml, docs/gguf.md and ggml-common.h); f16 is IEEE half:
//   Q8_0  32: f16 d, int8 q[32]                        value = d q
//   Q4_0  32: f16 d, nibbles[16]                       value = d (q - 8)
//   Q4_1  32: f16 d, f16 m, nibbles[16]                value = d q + m
//   Q4_K 256: f16 d, f16 m, 6-bit sc[8] and mn[8] in 12 bytes, nibbles[128]
//                                                      value = d sc q - m mn, sc and mn of each 32
//   Q6_K 256: low nibbles[128], high pairs[64], int8 sc[16], f16 d
//                                                      value = d sc (q - 32), sc of each 16
// Host code for every backend: what loads, converts and makes them.
#ifndef CINNABAR_KERNELS_QUANTIZED_H_
#define CINNABAR_KERNELS_QUANTIZED_H_

#include <cstdint>

#include "absl/types/span.h"
#include "kernels/backend.h"

namespace cinnabar {

// 32 consecutive elements of a row, taken apart exactly:
//   value[i] = scale * (sub_scale[i / 16] * q[i]) + offset * sub_offset
struct QuantizedRun {
  int8_t q[32];
  int8_t sub_scale[2];  // 1 where the format has none
  int8_t sub_offset;    // 0 or more; 1 where the format has none
  float scale;
  float offset;  // 0 where the format has none
};

// Run `index` of a row that starts at `row`. `dtype` is a block format.
QuantizedRun ReadRun(const void* row, DType dtype, int64_t index);

// Between IEEE half and float32: exact, and to the nearest (ties to even; NaN stays NaN, too large
// becomes infinite).
float WidenHalf(uint16_t half);
uint16_t NarrowToHalf(float value);

// One row of `matrix`, of any dtype, as floats; `out` has its cols. Floats are exact; a quantised
// value is rounded once for each product and sum of its formula.
void ReadRow(const HostMatrix& matrix, int64_t row, absl::Span<float> out);

// Whole blocks of floats as `dtype` (kQ8_0, kQ4_0, kQ4_1, kQ4_K or kQ6_K), BytesOf(dtype, size)
// bytes to `out`. Q8_0: the scale is that of the largest magnitude, to the nearest integer, ties to
// even. The 4- and 6-bit formats search scale and offset for the least sum of squared errors,
// weighted by 1 + x^2 / mean x^2. A block that is not finite becomes zeros with a NaN scale.
void QuantizeRow(absl::Span<const float> values, DType dtype, void* out);

}  // namespace cinnabar

#endif  // CINNABAR_KERNELS_QUANTIZED_H_
