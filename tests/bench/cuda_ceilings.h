// The ceilings of a CUDA device: cuda_ceilings.cu where nvcc is, else cuda_ceilings_absent.cc.
// Plain types only: nvcc reads this.
#ifndef CINNABAR_TESTS_BENCH_CUDA_CEILINGS_H_
#define CINNABAR_TESTS_BENCH_CUDA_CEILINGS_H_

#include <string>

namespace cinnabar::bench {

// Rates a second; 0: this device or library does not compute that.
struct CudaCeilingsResult {
  std::string device;
  double copy_bytes_per_second = 0;  // each byte counted twice, read and written
  double read_bytes_per_second = 0;
  double bf16_flops = 0;  // sums in float32
  double fp8_flops = 0;   // e4m3 by e4m3, sums in float32, out in bf16
  double f32_flops = 0;   // no tensor cores
  double tf32_flops = 0;
};

// 4 GiB copied and read, and products of 8192 x 8192 x 8192 by the fastest of the algorithms that
// cuBLASLt puts first, each for a second after a warm-up: medians of ten rounds by CUDA events.
// What went wrong, or nothing. One thread at a time.
std::string MeasureCudaCeilings(int device_index, CudaCeilingsResult& result);

}  // namespace cinnabar::bench

#endif  // CINNABAR_TESTS_BENCH_CUDA_CEILINGS_H_
