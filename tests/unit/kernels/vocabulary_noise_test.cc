// The vectorised noise of the vocabulary head: the words of common/base/philox.h bit for bit, and
// Gumbel numbers that keep their precision at both ends.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>

#include "kernels/cpu/vocabulary_kernels.h"

namespace cinnabar::cpu {
namespace {

struct Isa {
  const char* name;
  const VocabularyKernels* kernels;
};

class NoiseTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    const std::string name = GetParam().name;
    const bool have =
        name == "generic" ||
        (name == "avx2" ? __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                        : __builtin_cpu_supports("avx512dq") != 0);
    if (!have) GTEST_SKIP() << "no " << name;
  }
};
INSTANTIATE_TEST_SUITE_P(Cpu, NoiseTest,
                         testing::Values(Isa{"avx512", &kVocabularyAvx512},
                                         Isa{"avx2", &kVocabularyAvx2},
                                         Isa{"generic", &kVocabularyGeneric}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(NoiseTest, WordsAreThoseOfPhilox) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 1000; ++round) {
    const NoiseKey key = {.seed = round == 0 ? ~uint64_t{0} : random(),
                          .position = round == 1 ? ~0U : static_cast<uint32_t>(random()),
                          .step = round == 2 ? ~0U : static_cast<uint32_t>(random())};
    const uint32_t block = round == 3 ? (1U << 26) - 1 : static_cast<uint32_t>(random() % 4096);
    uint32_t words[64];
    GetParam().kernels->noise_words(key, block, words);
    for (uint32_t index = 0; index < 64; ++index) {
      ASSERT_EQ(words[index], NoiseWord(key, NoiseStream::kToken, 64 * block + index)) << index;
    }
  }
}

TEST_P(NoiseTest, GumbelNumbersKeepTheirPrecisionAtBothEnds) {
  std::mt19937 random(2);
  double worst = 0.0;
  for (uint32_t round = 0; round < 40000; ++round) {
    alignas(64) uint32_t words[16];
    alignas(64) float numbers[16];
    alignas(64) float generic[16];
    for (uint32_t lane = 0; lane < 16; ++lane) {
      const uint32_t near = round * 16 + lane;
      // Both ends, the middle, the switch of branches at 1 - u = 0.2929, and anywhere.
      const uint32_t choices[] = {near / 4, ~(near / 4), 0x80000000U + near - 320000U,
                                  0xB504F334U + near - 320000U, static_cast<uint32_t>(random())};
      words[lane] = choices[lane % 5];
    }
    GetParam().kernels->gumbel(words, numbers);
    kVocabularyGeneric.gumbel(words, generic);
    ASSERT_EQ(std::memcmp(numbers, generic, sizeof(numbers)), 0);
    alignas(64) float bounds[16];
    GetParam().kernels->gumbel_bound(words, bounds);
    for (int lane = 0; lane < 16; ++lane) {
      ASSERT_GE(bounds[lane], numbers[lane]) << words[lane];
      const double v = 1.0 - UniformFromWord(words[lane]);
      ASSERT_LE(bounds[lane], -std::log(v) + (v > 1e-7 ? 0.07 : 1.2)) << words[lane];
    }
    for (int lane = 0; lane < 16; ++lane) {
      const double u = UniformFromWord(words[lane]);
      const double exponential = u < 0.5 ? -std::log(u) : -std::log1p(-(1.0 - u));
      const double want = -std::log(exponential);
      worst = std::max(worst, std::abs(numbers[lane] - want) / std::max(1.0, std::abs(want)));
    }
  }
  // Two float32 logarithms of about one unit in the last place each.
  EXPECT_LT(worst, 2.5e-7);
}

TEST_P(NoiseTest, TheRangeIsWhatThePruningAssumes) {
  const uint32_t words[16] = {~0U, 0, 0x7FFFFFFFU, 0x80000000U};
  alignas(64) float numbers[16];
  GetParam().kernels->gumbel(words, numbers);
  EXPECT_NEAR(numbers[0], 33.0 * std::log(2.0), 1e-5);
  EXPECT_LT(numbers[0], 22.875F);
  EXPECT_NEAR(numbers[1], -std::log(std::log(2.0) * 33.0), 1e-5);
  EXPECT_NEAR(numbers[2], -std::log(std::log(2.0)), 1e-6);
  EXPECT_NEAR(numbers[3], -std::log(std::log(2.0)), 1e-6);
}

}  // namespace
}  // namespace cinnabar::cpu
