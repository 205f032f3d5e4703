// Arithmetic that the kernels share, for the device and for the host alike (the tests call it
// there). Every fused multiply-add is written as one; the folder is compiled with --fmad=false, so
// the bits are those of the source.
#ifndef CINNABAR_KERNELS_CUDA_MATH_H_
#define CINNABAR_KERNELS_CUDA_MATH_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/base/philox.h"

namespace cinnabar::cuda {

#ifdef __CUDACC__
#define CINNABAR_BOTH __host__ __device__ __forceinline__
#else
#define CINNABAR_BOTH inline
#endif

inline constexpr float kInfinityF = __builtin_inff();

CINNABAR_BOTH uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
CINNABAR_BOTH float FloatOfBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// --- Small floats

CINNABAR_BOTH float FromBf16(uint16_t value) {
  return FloatOfBits(static_cast<uint32_t>(value) << 16);
}
// To nearest even; a NaN stays one.
CINNABAR_BOTH uint16_t ToBf16(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>(bits >> 16 | 0x40U);
  return static_cast<uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

CINNABAR_BOTH float FromF16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000U) << 16;
  const uint32_t exponent = value >> 10 & 0x1FU;
  const uint32_t fraction = value & 0x3FFU;
  if (exponent == 31) return FloatOfBits(sign | 0x7F800000U | fraction << 13);
  if (exponent != 0) return FloatOfBits(sign | (exponent + 112) << 23 | fraction << 13);
  const float subnormal = static_cast<float>(fraction) * 0x1p-24F;
  return FloatOfBits(sign | BitsOfFloat(subnormal));
}
CINNABAR_BOTH uint16_t ToF16(float value) {
  const uint32_t bits = BitsOfFloat(value);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const uint32_t size = bits & 0x7FFFFFFFU;
  if (size > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);
  if (size >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // rounds to 2^16: inf
  if (size < 0x38800000U) {  // below 2^-14: the sum rounds to a multiple of 2^-24
    const float shifted = FloatOfBits(size) + 0.5F;
    return static_cast<uint16_t>(sign | (BitsOfFloat(shifted) - 0x3F000000U));
  }
  return static_cast<uint16_t>(sign | (size - 0x38000000U + 0xFFFU + (size >> 13 & 1U)) >> 13);
}

// FP8 with 4 exponent and 3 fraction bits, no infinities, largest 448 (arXiv:2209.05433).
inline constexpr float kE4m3Max = 448.0F;
CINNABAR_BOTH float FromE4m3(uint8_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x80U) << 24;
  const uint32_t exponent = value >> 3 & 15U;
  const uint32_t fraction = value & 7U;
  if ((value & 0x7FU) == 0x7FU) return FloatOfBits(0x7FC00000U);
  if (exponent != 0) return FloatOfBits(sign | (exponent + 120) << 23 | fraction << 20);
  return FloatOfBits(sign | BitsOfFloat(static_cast<float>(fraction) * 0x1p-9F));
}
// To nearest even; what is beyond 448 becomes 448, a NaN stays one.
CINNABAR_BOTH uint8_t ToE4m3(float value) {
  const uint32_t bits = BitsOfFloat(value);
  const uint32_t sign = bits >> 24 & 0x80U;
  const uint32_t size = bits & 0x7FFFFFFFU;
  if (size > 0x7F800000U) return static_cast<uint8_t>(sign | 0x7FU);
  if (size >= 0x43E00000U) return static_cast<uint8_t>(sign | 0x7EU);
  if (size < 0x3C800000U) {  // below 2^-6: the sum rounds to a multiple of 2^-9
    const float shifted = FloatOfBits(size) + 16384.0F;
    return static_cast<uint8_t>(sign | (BitsOfFloat(shifted) - 0x46800000U));
  }
  const uint32_t rounded = (size - 0x3C000000U + 0x7FFFFU + (size >> 20 & 1U)) >> 20;
  return static_cast<uint8_t>(sign | (rounded > 0x7EU ? 0x7EU : rounded));
}

// --- Activations

CINNABAR_BOTH float Sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }
CINNABAR_BOTH float Silu(float x) { return x * Sigmoid(x); }
// 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
CINNABAR_BOTH float GeluTanh(float x) {
  return x * Sigmoid(1.5957691216057308F * fmaf(x * x * x, 0.044715F, x));
}

// --- exp and ln of the vocabulary head, in the operations of kernels/cpu/vocabulary_kernels.inc:
// the same bits as there.

// 2^d for d in [-126, 0]; exactly 1 at 0.
CINNABAR_BOTH float Exp2(float d) {
  const float magic = 12582912.0F;  // 1.5 * 2^23
  const float shifted = d + magic;
  const float f = d - (shifted - magic);
  float y = 1.535336188319500E-4F;
  y = fmaf(y, f, 1.339887440266574E-3F);
  y = fmaf(y, f, 9.618437357674640E-3F);
  y = fmaf(y, f, 5.550332471162809E-2F);
  y = fmaf(y, f, 2.402264791363012E-1F);
  y = fmaf(y, f, 6.931472028550421E-1F);
  y = fmaf(y, f, 1.0F);
  return FloatOfBits(BitsOfFloat(y) + (BitsOfFloat(shifted) << 23));
}

CINNABAR_BOTH float LogOnePlus(float f) {
  float y = 7.0376836292E-2F;
  y = fmaf(y, f, -1.1514610310E-1F);
  y = fmaf(y, f, 1.1676998740E-1F);
  y = fmaf(y, f, -1.2420140846E-1F);
  y = fmaf(y, f, 1.4249322787E-1F);
  y = fmaf(y, f, -1.6668057665E-1F);
  y = fmaf(y, f, 2.0000714765E-1F);
  y = fmaf(y, f, -2.4999993993E-1F);
  y = fmaf(y, f, 3.3333331174E-1F);
  const float square = f * f;
  return f + fmaf(square, y * f, square * -0.5F);
}
CINNABAR_BOTH float AddExponent(float n, float log) {
  return fmaf(n, 0.693359375F, fmaf(n, -2.12194440E-4F, log));
}
CINNABAR_BOTH void SplitExponent(float x, float* n, float* f) {
  const uint32_t root = 0x3F3504F3U;  // bits of sqrt(1/2)
  const uint32_t bits = BitsOfFloat(x) - root;
  *n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  *f = FloatOfBits((bits & 0x007FFFFFU) + root) - 1.0F;
}
// cap * tanh(x / cap); cap > 0. A NaN stays one.
CINNABAR_BOTH float SoftCap(float x, float cap) {
  const float size = x < 0.0F ? 0.0F - x : x;
  const float t = Exp2(fmaxf(size * (-2.88539008F / cap), -126.0F));  // 2 log2(e)
  const float capped = cap * ((1.0F - t) / (1.0F + t));
  return x != x ? x : x < 0.0F ? 0.0F - capped : capped;
}

// -ln(-ln u), u = (word + 0.5) / 2^32.
CINNABAR_BOTH float Gumbel(uint32_t word) {
  const bool high = (word >> 31) != 0;
  const uint32_t distance = high ? ~word : word;  // words to the nearer end
  const float upper = static_cast<float>(distance >> 16);
  const float lower = static_cast<float>(distance & 0xFFFFU) + 0.5F;
  const float x = fmaf(upper, 65536.0F, lower) * 0x1p-32F;
  float n, f;
  SplitExponent(x, &n, &f);
  if (high) {
    const bool halved = 0.29289323F < x;
    f = halved ? fmaf(x, -2.0F, 1.0F) : -x;
    n = halved ? -1.0F : 0.0F;
  }
  const float exponential = -AddExponent(n, LogOnePlus(f));
  SplitExponent(exponential, &n, &f);
  return -AddExponent(n, LogOnePlus(f));
}

// Logits as integers in the same order: a larger key is a larger logit, and -0 is 0.
CINNABAR_BOTH uint32_t OrderedKey(float logit) {
  const uint32_t bits = BitsOfFloat(logit + 0.0F);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
}

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_MATH_H_
