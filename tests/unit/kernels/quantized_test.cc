#include "kernels/quantized.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace cinnabar {
namespace {

constexpr DType kFormats[] = {DType::kQ8_0, DType::kQ4_0, DType::kQ4_1, DType::kQ4_K, DType::kQ6_K};

std::vector<float> Draw(size_t count, uint32_t seed, float shift = 0.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(shift, 1.0F);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<float> RoundTrip(const std::vector<float>& values, DType dtype) {
  std::vector<uint8_t> bytes(BytesOf(dtype, static_cast<int64_t>(values.size())));
  QuantizeRow(values, dtype, bytes.data());
  std::vector<float> back(values.size());
  ReadRow({bytes.data(), dtype, 1, static_cast<int64_t>(values.size())}, 0, absl::MakeSpan(back));
  return back;
}

double RelativeError(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - want[i], 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(error / size);
}

TEST(QuantizedTest, Halves) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    _Float16 direct;
    std::memcpy(&direct, &half, sizeof(direct));
    const float value = WidenHalf(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(WidenHalf(NarrowToHalf(value))));
      continue;
    }
    EXPECT_EQ(value, static_cast<float>(direct));
    EXPECT_EQ(NarrowToHalf(value), half);
  }
}

// Blocks written by hand from the layouts of the header.
TEST(QuantizedTest, ReadsTheLayouts) {
  const auto read = [](DType dtype, const std::vector<uint8_t>& bytes) {
    std::vector<float> values(BlockOf(dtype).elements);
    ReadRow({bytes.data(), dtype, 1, BlockOf(dtype).elements}, 0, absl::MakeSpan(values));
    return values;
  };
  std::vector<uint8_t> q8(34);
  q8[0] = 0x00, q8[1] = 0x38;  // 0.5
  for (int i = 0; i < 32; ++i) q8[2 + i] = static_cast<uint8_t>(i * 9 - 128);
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(read(DType::kQ8_0, q8)[i], 0.5F * static_cast<int8_t>(i * 9 - 128)) << i;
  }
  std::vector<uint8_t> q4(20);
  q4[1] = 0x40, q4[3] = 0xBC;  // 2, -1
  for (int i = 0; i < 16; ++i) q4[4 + i] = static_cast<uint8_t>(i | (15 - i) << 4);
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(read(DType::kQ4_1, q4)[i], 2.0F * i - 1.0F) << i;
    EXPECT_EQ(read(DType::kQ4_1, q4)[16 + i], 2.0F * (15 - i) - 1.0F) << i;
  }
  q4.erase(q4.begin() + 2, q4.begin() + 4);
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(read(DType::kQ4_0, q4)[i], 2.0F * (i - 8)) << i;
    EXPECT_EQ(read(DType::kQ4_0, q4)[16 + i], 2.0F * (7 - i)) << i;
  }

  // Scale 6 j + 3 and offset 60 - 7 j of run j; element i of run j is (i + j) mod 16.
  std::vector<uint8_t> q4k(144);
  q4k[1] = 0x3C, q4k[3] = 0x38;  // 1, 0.5
  for (int j = 0; j < 8; ++j) {
    const int scale = 6 * j + 3, offset = 60 - 7 * j;
    if (j < 4) {
      q4k[4 + j] |= static_cast<uint8_t>(scale);
      q4k[8 + j] |= static_cast<uint8_t>(offset);
    } else {
      q4k[12 + j - 4] |= static_cast<uint8_t>((scale & 15) | (offset & 15) << 4);
      q4k[4 + j - 4] |= static_cast<uint8_t>(scale >> 4 << 6);
      q4k[8 + j - 4] |= static_cast<uint8_t>(offset >> 4 << 6);
    }
    for (int i = 0; i < 32; ++i) {
      q4k[16 + j / 2 * 32 + i] |= static_cast<uint8_t>((i + j) % 16 << (j % 2 * 4));
    }
  }
  const std::vector<float> got = read(DType::kQ4_K, q4k);
  for (int k = 0; k < 256; ++k) {
    const int j = k / 32, i = k % 32;
    EXPECT_EQ(got[k], static_cast<float>((6 * j + 3) * ((i + j) % 16)) - 0.5F * (60 - 7 * j)) << k;
  }

  // Element k is (5 k) mod 64 - 32, its scale k / 16 - 8.
  std::vector<uint8_t> q6(210);
  q6[208] = 0x00, q6[209] = 0x34;  // 0.25
  for (int j = 0; j < 16; ++j) q6[192 + j] = static_cast<uint8_t>(j - 8);
  for (int k = 0; k < 256; ++k) {
    const int q = 5 * k % 64, half = k / 128, part = k % 128 / 32, column = k % 32;
    q6[half * 64 + part % 2 * 32 + column] |= static_cast<uint8_t>((q & 15) << (part / 2 * 4));
    q6[128 + half * 32 + column] |= static_cast<uint8_t>(q >> 4 << (2 * part));
  }
  for (int k = 0; k < 256; ++k) {
    EXPECT_EQ(read(DType::kQ6_K, q6)[k],
              0.25F * static_cast<float>((k / 16 - 8) * (5 * k % 64 - 32)))
        << k;
  }
}

// Rounding to n equal steps over +-3 deviations leaves sqrt(1/12) of a step; the bounds are what
// the formats reach on normal weights, with a tenth to spare.
TEST(QuantizedTest, RoundTripsAreClose) {
  const std::vector<float> values = Draw(64 * 256, 7), shifted = Draw(64 * 256, 8, 1.5F);
  const std::pair<DType, double> bounds[] = {{DType::kQ8_0, 0.0062},
                                             {DType::kQ4_0, 0.092},
                                             {DType::kQ4_1, 0.082},
                                             {DType::kQ4_K, 0.076},
                                             {DType::kQ6_K, 0.0205}};
  for (const auto& [dtype, bound] : bounds) {
    const double error = RelativeError(RoundTrip(values, dtype), values);
    EXPECT_LT(error, bound) << NameOf(dtype);
    EXPECT_GT(error, bound / 3) << NameOf(dtype);  // not a float format in disguise
    EXPECT_LT(RelativeError(RoundTrip(shifted, dtype), shifted), bound) << NameOf(dtype);
  }
}

TEST(QuantizedTest, ZerosTinyHugeAndNotFinite) {
  for (const DType dtype : kFormats) {
    SCOPED_TRACE(NameOf(dtype));
    for (const float value : RoundTrip(std::vector<float>(256), dtype)) EXPECT_EQ(value, 0.0F);
    for (const float value : RoundTrip(std::vector<float>(256, 1e-38F), dtype)) {
      EXPECT_LT(std::abs(value), 1e-7F);
    }
    for (const float value : RoundTrip(std::vector<float>(256, -20000.0F), dtype)) {
      EXPECT_NEAR(value, -20000.0F, 400.0F);
    }
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> values = Draw(512, 3);
      values[300] = bad;
      const std::vector<float> back = RoundTrip(values, dtype);
      EXPECT_TRUE(std::isnan(back[300]));
      EXPECT_FALSE(std::isnan(back[0]));  // another block
    }
  }
}

}  // namespace
}  // namespace cinnabar
