#include "tests/bench/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace cinnabar::bench {
namespace {

constexpr int64_t kRounds = 4'000'000;
using Clock = std::chrono::steady_clock;

#if defined(__x86_64__)
// Twelve independent chains cover the latency of four or five cycles on two ports. Written in
// assembly, so that no compiler keeps them anywhere but in registers.
#define CINNABAR_FMA(n) "vfmadd231ps %%" REG "14, %%" REG "15, %%" REG #n "\n\t"
#define CINNABAR_TWELVE                                                                           \
  CINNABAR_FMA(0)                                                                                 \
  CINNABAR_FMA(1)                                                                                 \
  CINNABAR_FMA(2)                                                                                 \
  CINNABAR_FMA(3) CINNABAR_FMA(4) CINNABAR_FMA(5) CINNABAR_FMA(6) CINNABAR_FMA(7) CINNABAR_FMA(8) \
      CINNABAR_FMA(9) CINNABAR_FMA(10) CINNABAR_FMA(11)
#define CINNABAR_CLOBBERS                                                                  \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm14", "xmm15"

#define REG "zmm"
double Avx512Flops() {
  asm volatile("vpxord %%zmm14, %%zmm14, %%zmm14\n\tvpxord %%zmm15, %%zmm15, %%zmm15" ::
                   : CINNABAR_CLOBBERS);
  for (int64_t i = 0; i < kRounds; ++i) asm volatile(CINNABAR_TWELVE ::: CINNABAR_CLOBBERS);
  return 12.0 * 16 * 2 * kRounds;
}
#undef REG
#define REG "ymm"
double Avx2Flops() {
  asm volatile("vxorps %%ymm14, %%ymm14, %%ymm14\n\tvxorps %%ymm15, %%ymm15, %%ymm15" ::
                   : CINNABAR_CLOBBERS);
  for (int64_t i = 0; i < kRounds; ++i) asm volatile(CINNABAR_TWELVE ::: CINNABAR_CLOBBERS);
  return 12.0 * 8 * 2 * kRounds;
}
#undef REG
double Flops() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") ? Avx512Flops() : Avx2Flops();
}
#else
double Flops() {
  float sum[16] = {};
  for (int64_t i = 0; i < kRounds; ++i) {
    for (float& s : sum) s = __builtin_fmaf(s, 0.999F, 0.001F);
  }
  volatile float sink = sum[0];
  (void)sink;
  return 16.0 * 2 * kRounds;
}
#endif

constexpr int64_t kBufferBytes = int64_t{1} << 30;

uint64_t Sum(const uint64_t* data, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += data[i + k];
  }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum += s;
  return sum;
}

// The best rate of `work(thread)` on all threads at once, which together move `bytes`.
double BestRate(int32_t num_threads, double bytes, const std::function<void(int32_t)>& work) {
  double best = 0;
  for (int run = 0; run < 4; ++run) {  // the first one brings the pages
    const auto begin = Clock::now();
    std::vector<std::thread> threads;
    for (int32_t thread = 1; thread < num_threads; ++thread) threads.emplace_back(work, thread);
    work(0);
    for (std::thread& thread : threads) thread.join();
    best = std::max(best, bytes / std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

}  // namespace

double MeasureReadBytesPerSecond(int32_t num_threads) {
  const int64_t words = kBufferBytes / 8 / num_threads;
  const std::vector<uint64_t> buffer(words * num_threads, 1);
  std::atomic<uint64_t> sink{0};
  return BestRate(num_threads, 8.0 * static_cast<double>(buffer.size()),
                  [&](int32_t thread) { sink += Sum(buffer.data() + thread * words, words); });
}

double MeasureCopyBytesPerSecond(int32_t num_threads) {
  const int64_t half = kBufferBytes / 2 / num_threads;
  std::vector<char> from(half * num_threads, 1), to(half * num_threads, 2);
  return BestRate(num_threads, 2.0 * static_cast<double>(from.size()), [&](int32_t thread) {
    std::memcpy(to.data() + thread * half, from.data() + thread * half, half);
  });
}

double MeasurePeakFlops(int32_t num_threads) {
  double best = 0;
  for (int run = 0; run < 3; ++run) {
    std::vector<double> flops(num_threads);
    std::atomic<int32_t> ready{0};
    const auto work = [&](int32_t thread) {
      ready.fetch_add(1);
      while (ready.load() < num_threads) {
      }
      flops[thread] = Flops();
    };
    const auto begin = Clock::now();
    std::vector<std::thread> threads;
    for (int32_t thread = 1; thread < num_threads; ++thread) threads.emplace_back(work, thread);
    work(0);
    for (std::thread& thread : threads) thread.join();
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    double sum = 0;
    for (const double f : flops) sum += f;
    best = std::max(best, sum / seconds);
  }
  return best;
}

}  // namespace cinnabar::bench
