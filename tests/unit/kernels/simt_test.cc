// The emulator of wgmma, mbarriers and bulk copies itself: a product by hand, and faults that it
// must not let pass.
#include "tests/support/simt/simt.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

namespace cinnabar::cuda {
namespace {

constexpr int kBytes = 16 << 10;  // a: 8 KiB, b: 4 KiB, then an mbarrier
constexpr int kColumns = 32;

// 64 rows of a and 32 of b, 128 bytes of k, in bf16; swizzled as wgmma wants them.
std::vector<uint16_t> Operands(std::vector<float>* values) {
  std::vector<uint16_t> memory((64 + kColumns) * 64);
  for (int row = 0; row < 64 + kColumns; ++row) {
    for (int k = 0; k < 64; ++k) {
      const float value = static_cast<float>((row * 7 + k * 3) % 17 - 8);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      values->push_back(value);
      memory[row * 64 + ((k / 8) ^ (row % 8)) * 8 + k % 8] = static_cast<uint16_t>(bits >> 16);
    }
  }
  return memory;
}

struct Faults {
  uint64_t a_flips = 0;  // of the descriptor
  bool no_fence = false;
  bool touch = false;
  bool no_wait = false;
  bool fetch_again = false;
  bool no_proxy_fence = false;
};

// What a warp group makes of the operands: row by row.
std::vector<float> Product(const Faults& faults) {
  std::vector<float> values, out(64 * kColumns);
  const std::vector<uint16_t> memory = Operands(&values);
  simt::RunGrid({1, 1, 1}, 128, kBytes, [&] {
    unsigned char* a = SharedBytes();
    unsigned char* b = a + (8 << 10);
    auto* barrier = reinterpret_cast<uint64_t*>(b + (4 << 10));
    const int thread = ThreadIndex();
    if (thread == 0) MbarrierInit(barrier, 1);
    BlockBarrier();
    if (thread == 0) {
      MbarrierArriveExpecting(barrier, 8 << 10);
      BulkCopy(a, memory.data(), 8 << 10, barrier);
    }
    for (int i = thread; i < kColumns * 8; i += 128) {
      CopyAsync16(b + 16 * i, memory.data() + 64 * 64 + 8 * i, 16);
    }
    CopyCommit();
    CopyWait<0>();
    if (!faults.no_proxy_fence) AsyncProxyFence();
    BlockBarrier();
    if (!faults.no_wait) MbarrierWait(barrier, 0);
    const auto descriptor = [](const unsigned char* at) {
      return uint64_t{SharedAddress(at) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 |
             uint64_t{1} << 62;
    };
    float d[kColumns / 2];
    if (!faults.no_fence) WgmmaFence();
    for (int step = 0; step < 4; ++step) {
      Wgmma<false>(d, (descriptor(a) ^ faults.a_flips) + 2 * step, descriptor(b) + 2 * step,
                   step > 0);
    }
    WgmmaCommit();
    if (faults.touch) d[3] += 1.0F;
    if (faults.fetch_again && thread == 0) {
      MbarrierArriveExpecting(barrier, 8 << 10);
      BulkCopy(a, memory.data(), 8 << 10, barrier);
    }
    BlockBarrier();
    WgmmaWait<0>();
    WgmmaDone(d);
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
      out[row * kColumns + 8 * (i / 4) + 2 * (thread % 4) + i % 2] = d[i];
    }
    BlockBarrier();
    if (faults.no_wait) MbarrierWait(barrier, 0);
    if (faults.fetch_again) MbarrierWait(barrier, 1);
  });
  return out;
}

std::vector<float> Want() {
  std::vector<float> values, want;
  Operands(&values);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += values[row * 64 + k] * values[(64 + column) * 64 + k];
      want.push_back(sum);
    }
  }
  return want;
}

TEST(WgmmaTest, MultipliesWhatTheDescriptorsName) {
  EXPECT_EQ(Product({}), Want());
  EXPECT_NE(Product({.a_flips = uint64_t{64 ^ 32} << 32}), Want());  // half the stride
  EXPECT_NE(Product({.a_flips = 2}), Want());                        // 32 bytes off
}

TEST(WgmmaTest, WhatIsFetchedTooEarlyOrTooLateIsNoNumber) {
  EXPECT_TRUE(std::isnan(Product({.no_wait = true})[0]));
  EXPECT_TRUE(std::isnan(Product({.fetch_again = true})[0]));
}

TEST(WgmmaDeathTest, FaultsEndTheProgram) {
  EXPECT_DEATH(Product({.no_fence = true}), "without wgmma.fence");
  EXPECT_DEATH(Product({.touch = true}), "sums touched during a wgmma");
  EXPECT_DEATH(Product({.no_proxy_fence = true}), "no proxy fence");
  EXPECT_DEATH(Product({.a_flips = uint64_t{1} << 62}), "128-byte swizzle");
}

}  // namespace
}  // namespace cinnabar::cuda
