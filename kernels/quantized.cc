#include "kernels/quantized.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr int64_t kRun = 32;

float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename Word>
Word ReadWord(const void* data, int64_t index) {
  Word word;  // a file's tensors need not be aligned
  std::memcpy(&word,
              static_cast<const std::byte*>(data) + index * static_cast<int64_t>(sizeof(Word)),
              sizeof(Word));
  return word;
}

float HalfAt(const uint8_t* block, int64_t byte) {
  return WidenHalf(ReadWord<uint16_t>(block + byte, 0));
}

void WriteHalf(uint16_t half, uint8_t* out) { std::memcpy(out, &half, sizeof(half)); }

// The 6-bit scale and offset of run `j` of a Q4_K block: those of the first four runs lie in the
// low bits of bytes 0-3 and 4-7; of the others, low halves in bytes 8-11, high bits above those.
void ReadScales(const uint8_t* packed, int64_t j, int8_t* scale, int8_t* offset) {
  if (j < 4) {
    *scale = static_cast<int8_t>(packed[j] & 63);
    *offset = static_cast<int8_t>(packed[j + 4] & 63);
    return;
  }
  *scale = static_cast<int8_t>((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4);
  *offset = static_cast<int8_t>(packed[j + 4] >> 4 | (packed[j] >> 6) << 4);
}

void WriteScales(const uint8_t* scales, const uint8_t* offsets, uint8_t* packed) {
  for (int j = 0; j < 4; ++j) {
    packed[j] = static_cast<uint8_t>(scales[j] | (scales[j + 4] >> 4) << 6);
    packed[j + 4] = static_cast<uint8_t>(offsets[j] | (offsets[j + 4] >> 4) << 6);
    packed[j + 8] = static_cast<uint8_t>((scales[j + 4] & 15) | (offsets[j + 4] & 15) << 4);
  }
}

// Elements 0-15 in the low nibbles, 16-31 in the high ones.
void ReadNibbles(const uint8_t* nibbles, int zero, int8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<int8_t>((nibbles[i] & 15) - zero);
    q[i + 16] = static_cast<int8_t>((nibbles[i] >> 4) - zero);
  }
}

void ReadQ6Run(const uint8_t* block, int64_t j, QuantizedRun& run) {
  // A half block of 128: runs 0 and 1 in the low nibbles of its 64 bytes, 2 and 3 in the high ones;
  // run j's upper bits are bits 2j and 2j + 1 of its 32 bytes of pairs.
  const uint8_t* low = block + j / 4 * 64 + j % 2 * 32;
  const uint8_t* high = block + 128 + j / 4 * 32;
  const int64_t part = j % 4;
  for (int i = 0; i < kRun; ++i) {
    const int nibble = part < 2 ? low[i] & 15 : low[i] >> 4;
    run.q[i] = static_cast<int8_t>((nibble | (high[i] >> (2 * part) & 3) << 4) - 32);
  }
  const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
  run.sub_scale[0] = scales[2 * j];
  run.sub_scale[1] = scales[2 * j + 1];
  run.scale = HalfAt(block, 208);
}

// --- Making them
// -------------------------------------------------------------------------------------------

// What an element's error counts: large weights matter more.
void Importance(const float* x, int64_t count, float* weights) {
  float squares = 0.0F;
  for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
  const float scale = squares > 0.0F ? static_cast<float>(count) / squares : 0.0F;
  for (int64_t i = 0; i < count; ++i) weights[i] = 1.0F + scale * x[i] * x[i];
}

bool AllFinite(const float* x, int64_t count) {
  return std::all_of(x, x + count, [](float v) { return std::isfinite(v); });
}

float Round(float x, float low, float high) { return std::clamp(std::nearbyint(x), low, high); }

// The scale s with the least weighted sum of (x - s q)^2, q integers in [low, -low - 1]; 0 when all
// are 0.
float FitScale(const float* x, const float* weights, int64_t count, float low) {
  float extreme = 0.0F;
  for (int64_t i = 0; i < count; ++i) {
    if (std::abs(x[i]) > std::abs(extreme)) extreme = x[i];
  }
  if (std::abs(extreme) < 1e-30F) return 0.0F;
  float best = 0.0F, best_gain = 0.0F;
  for (int step = -9; step <= 9; ++step) {
    const float inverse = (low - 0.1F * static_cast<float>(step)) / extreme;
    float xq = 0.0F, qq = 0.0F;
    for (int64_t i = 0; i < count; ++i) {
      const float q = Round(x[i] * inverse, low, -low - 1.0F);
      xq += weights[i] * x[i] * q;
      qq += weights[i] * q * q;
    }
    // With the best s for these q the error falls by xq^2 / qq.
    if (qq > 0.0F && xq * xq > best_gain * qq) {
      best_gain = xq * xq / qq;
      best = xq / qq;
    }
  }
  return best;
}

struct Affine {
  float scale = 0.0F;  // >= 0
  float offset = 0.0F;
};

// Scale and offset with the least weighted sum of (x - scale q - offset)^2, q integers in
// [0, high]. `signed_offset` false: offset <= 0.
Affine FitAffine(const float* x, const float* weights, int64_t count, float high,
                 bool signed_offset) {
  float low = *std::min_element(x, x + count);
  const float top = *std::max_element(x, x + count);
  if (!signed_offset) low = std::min(low, 0.0F);
  if (top - low < 1e-30F) return {.offset = low};
  Affine best;
  float best_error = std::numeric_limits<float>::infinity();
  for (int step = -5; step <= 15; ++step) {
    const float inverse = (high + 0.1F * static_cast<float>(step)) / (top - low);
    float sw = 0.0F, sx = 0.0F, sq = 0.0F, sqq = 0.0F, sxq = 0.0F;
    for (int64_t i = 0; i < count; ++i) {
      const float q = Round((x[i] - low) * inverse, 0.0F, high);
      sw += weights[i];
      sx += weights[i] * x[i];
      sq += weights[i] * q;
      sqq += weights[i] * q * q;
      sxq += weights[i] * x[i] * q;
    }
    const float determinant = sw * sqq - sq * sq;
    if (determinant <= 0.0F) continue;
    Affine fit{.scale = (sw * sxq - sx * sq) / determinant,
               .offset = (sqq * sx - sq * sxq) / determinant};
    if (!signed_offset && fit.offset > 0.0F) fit = {.scale = sxq / sqq, .offset = 0.0F};
    if (fit.scale <= 0.0F) continue;
    float error = 0.0F;
    for (int64_t i = 0; i < count; ++i) {
      const float q = Round((x[i] - fit.offset) / fit.scale, 0.0F, high);
      const float difference = x[i] - fit.scale * q - fit.offset;
      error += weights[i] * difference * difference;
    }
    if (error < best_error) {
      best_error = error;
      best = fit;
    }
  }
  return best;
}

void WriteNibbles(const float* x, float scale, float offset, int zero, uint8_t* nibbles) {
  uint8_t q[kRun];
  for (int i = 0; i < kRun; ++i) {
    q[i] = scale == 0.0F ? static_cast<uint8_t>(zero)
                         : static_cast<uint8_t>(Round(
                               (x[i] - offset) / scale + static_cast<float>(zero), 0.0F, 15.0F));
  }
  for (int i = 0; i < 16; ++i) nibbles[i] = static_cast<uint8_t>(q[i] | q[i + 16] << 4);
}

constexpr uint16_t kNanHalf = 0x7E00;

void WriteQ8(const float* x, uint8_t* out) {
  float largest = 0.0F;
  for (int i = 0; i < kRun; ++i) largest = std::max(largest, std::abs(x[i]));
  const uint16_t half = NarrowToHalf(largest / 127.0F);
  const float scale = WidenHalf(half);
  WriteHalf(half, out);
  for (int i = 0; i < kRun; ++i) {
    const float q = scale == 0.0F ? 0.0F : Round(x[i] / scale, -127.0F, 127.0F);
    out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(q));
  }
}

void WriteQ4K(const float* x, uint8_t* out) {
  Affine fits[8];
  float largest_scale = 0.0F, largest_offset = 0.0F;
  for (int j = 0; j < 8; ++j) {
    float weights[kRun];
    Importance(x + j * kRun, kRun, weights);
    fits[j] = FitAffine(x + j * kRun, weights, kRun, 15.0F, /*signed_offset=*/false);
    largest_scale = std::max(largest_scale, fits[j].scale);
    largest_offset = std::max(largest_offset, -fits[j].offset);
  }
  const uint16_t d = NarrowToHalf(largest_scale / 63.0F), m = NarrowToHalf(largest_offset / 63.0F);
  const float scale = WidenHalf(d), offset = WidenHalf(m);
  uint8_t scales[8], offsets[8];
  for (int j = 0; j < 8; ++j) {
    scales[j] = scale == 0.0F ? 0 : static_cast<uint8_t>(Round(fits[j].scale / scale, 0.0F, 63.0F));
    offsets[j] =
        offset == 0.0F ? 0 : static_cast<uint8_t>(Round(-fits[j].offset / offset, 0.0F, 63.0F));
  }
  WriteHalf(d, out);
  WriteHalf(m, out + 2);
  WriteScales(scales, offsets, out + 4);
  uint8_t q[256];
  for (int i = 0; i < 256; ++i) {
    const float step = scale * static_cast<float>(scales[i / kRun]);
    const float base = -offset * static_cast<float>(offsets[i / kRun]);
    q[i] = step == 0.0F ? 0 : static_cast<uint8_t>(Round((x[i] - base) / step, 0.0F, 15.0F));
  }
  // Two runs share 32 bytes.
  for (int pair = 0; pair < 4; ++pair) {
    for (int i = 0; i < kRun; ++i) {
      out[16 + pair * kRun + i] =
          static_cast<uint8_t>(q[pair * 64 + i] | q[pair * 64 + kRun + i] << 4);
    }
  }
}

void WriteQ6K(const float* x, uint8_t* out) {
  float fits[16];
  float extreme = 0.0F;
  for (int j = 0; j < 16; ++j) {
    float weights[16];
    Importance(x + j * 16, 16, weights);
    fits[j] = FitScale(x + j * 16, weights, 16, -32.0F);
    if (std::abs(fits[j]) > std::abs(extreme)) extreme = fits[j];
  }
  std::memset(out, 0, 208);
  const uint16_t d = NarrowToHalf(extreme / -128.0F);
  const float scale = WidenHalf(d);
  WriteHalf(d, out + 208);
  for (int j = 0; j < 16; ++j) {
    const float sub = scale == 0.0F ? 0.0F : Round(fits[j] / scale, -128.0F, 127.0F);
    out[192 + j] = static_cast<uint8_t>(static_cast<int8_t>(sub));
    const float step = scale * sub;
    for (int i = 0; i < 16; ++i) {
      const float value = x[j * 16 + i];
      const int q = static_cast<int>(step == 0.0F ? 0.0F : Round(value / step, -32.0F, 31.0F)) + 32;
      const int run = j / 2, part = run % 4, column = j % 2 * 16 + i;
      out[run / 4 * 64 + run % 2 * 32 + column] |=
          static_cast<uint8_t>(part < 2 ? q & 15 : (q & 15) << 4);
      out[128 + run / 4 * 32 + column] |= static_cast<uint8_t>(q >> 4 << (2 * part));
    }
  }
}

void WriteBlock(const float* x, DType dtype, uint8_t* out) {
  float weights[kRun];
  switch (dtype) {
    case DType::kQ8_0:
      return WriteQ8(x, out);
    case DType::kQ4_0: {
      Importance(x, kRun, weights);
      const uint16_t d = NarrowToHalf(FitScale(x, weights, kRun, -8.0F));
      WriteHalf(d, out);
      return WriteNibbles(x, WidenHalf(d), 0.0F, 8, out + 2);
    }
    case DType::kQ4_1: {
      Importance(x, kRun, weights);
      const Affine fit = FitAffine(x, weights, kRun, 15.0F, /*signed_offset=*/true);
      const uint16_t d = NarrowToHalf(fit.scale), m = NarrowToHalf(fit.offset);
      WriteHalf(d, out);
      WriteHalf(m, out + 2);
      return WriteNibbles(x, WidenHalf(d), WidenHalf(m), 0, out + 4);
    }
    case DType::kQ4_K:
      return WriteQ4K(x, out);
    case DType::kQ6_K:
      return WriteQ6K(x, out);
    case DType::kF32:
    case DType::kF16:
    case DType::kBf16:
      break;
  }
  CINNABAR_CHECK(false) << NameOf(dtype) << " is no block format";
}

}  // namespace

const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kF16:
      return "F16";
    case DType::kBf16:
      return "BF16";
    case DType::kQ8_0:
      return "Q8_0";
    case DType::kQ4_0:
      return "Q4_0";
    case DType::kQ4_1:
      return "Q4_1";
    case DType::kQ4_K:
      return "Q4_K";
    case DType::kQ6_K:
      return "Q6_K";
  }
  CINNABAR_CHECK(false) << "not a dtype: " << static_cast<int>(dtype);
  return "";
}

float WidenHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t exponent = (half >> 10) & 0x1FU;
  const uint32_t fraction = half & 0x3FFU;
  if (exponent == 0)
    return FloatFromBits(sign | BitsOfFloat(static_cast<float>(fraction) * 0x1p-24F));
  if (exponent == 31) return FloatFromBits(sign | 0x7F800000U | fraction << 13);
  return FloatFromBits(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t NarrowToHalf(float value) {
  const uint32_t bits = BitsOfFloat(value);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);
  if (magnitude >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // 65520 and up
  if (magnitude < 0x38800000U) {
    // Subnormal result: adding 0.5 leaves round(value * 2^24) in the low bits.
    const uint32_t rounded = BitsOfFloat(FloatFromBits(magnitude) + 0.5F) - BitsOfFloat(0.5F);
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t rounded = magnitude + 0xFFFU + (magnitude >> 13 & 1U);
  return static_cast<uint16_t>(sign | (rounded - (112U << 23)) >> 13);
}

QuantizedRun ReadRun(const void* row, DType dtype, int64_t index) {
  const BlockShape shape = BlockOf(dtype);
  const int64_t runs_per_block = shape.elements / kRun;
  const uint8_t* block = static_cast<const uint8_t*>(row) + index / runs_per_block * shape.bytes;
  const int64_t j = index % runs_per_block;
  QuantizedRun run{.q = {}, .sub_scale = {1, 1}, .sub_offset = 1, .scale = 0.0F, .offset = 0.0F};
  switch (dtype) {
    case DType::kQ8_0:
      run.scale = HalfAt(block, 0);
      std::memcpy(run.q, block + 2, kRun);
      return run;
    case DType::kQ4_0:
      run.scale = HalfAt(block, 0);
      ReadNibbles(block + 2, 8, run.q);
      return run;
    case DType::kQ4_1:
      run.scale = HalfAt(block, 0);
      run.offset = HalfAt(block, 2);
      ReadNibbles(block + 4, 0, run.q);
      return run;
    case DType::kQ4_K:
      run.scale = HalfAt(block, 0);
      run.offset = -HalfAt(block, 2);
      ReadScales(block + 4, j, &run.sub_scale[0], &run.sub_offset);
      run.sub_scale[1] = run.sub_scale[0];
      for (int i = 0; i < kRun; ++i) {
        const uint8_t byte = block[16 + j / 2 * kRun + i];
        run.q[i] = static_cast<int8_t>(j % 2 == 0 ? byte & 15 : byte >> 4);
      }
      return run;
    case DType::kQ6_K:
      ReadQ6Run(block, j, run);
      return run;
    case DType::kF32:
    case DType::kF16:
    case DType::kBf16:
      break;
  }
  CINNABAR_CHECK(false) << NameOf(dtype) << " is no block format";
  return run;
}

void ReadRow(const HostMatrix& matrix, int64_t row, absl::Span<float> out) {
  CINNABAR_CHECK(static_cast<int64_t>(out.size()) == matrix.cols);
  const std::byte* data =
      static_cast<const std::byte*>(matrix.data) + row * BytesOf(matrix.dtype, matrix.cols);
  switch (matrix.dtype) {
    case DType::kF32:
      std::memcpy(out.data(), data, out.size() * sizeof(float));
      return;
    case DType::kF16:
      for (int64_t i = 0; i < matrix.cols; ++i) out[i] = WidenHalf(ReadWord<uint16_t>(data, i));
      return;
    case DType::kBf16:
      for (int64_t i = 0; i < matrix.cols; ++i) {
        out[i] = FloatFromBits(static_cast<uint32_t>(ReadWord<uint16_t>(data, i)) << 16);
      }
      return;
    case DType::kQ8_0:
    case DType::kQ4_0:
    case DType::kQ4_1:
    case DType::kQ4_K:
    case DType::kQ6_K:
      break;
  }
  for (int64_t index = 0; index < matrix.cols / kRun; ++index) {
    const QuantizedRun run = ReadRun(data, matrix.dtype, index);
    const float base = run.offset * static_cast<float>(run.sub_offset);
    for (int i = 0; i < kRun; ++i) {
      const auto integer = static_cast<float>(run.sub_scale[i / 16] * run.q[i]);
      out[index * kRun + i] = run.scale * integer + base;
    }
  }
}

void QuantizeRow(absl::Span<const float> values, DType dtype, void* out) {
  const BlockShape shape = BlockOf(dtype);
  const auto count = static_cast<int64_t>(values.size());
  CINNABAR_CHECK(IsQuantized(dtype) && count % shape.elements == 0)
      << count << " values are not whole blocks of " << NameOf(dtype);
  for (int64_t begin = 0; begin < count; begin += shape.elements) {
    uint8_t* block = static_cast<uint8_t*>(out) + BytesOf(dtype, begin);
    if (AllFinite(values.data() + begin, shape.elements)) {
      WriteBlock(values.data() + begin, dtype, block);
      continue;
    }
    std::memset(block, 0, static_cast<size_t>(shape.bytes));
    WriteHalf(kNanHalf, block + (dtype == DType::kQ6_K ? 208 : 0));
  }
}

}  // namespace cinnabar
