// What this machine's cores and memory can do, measured in the run that quotes a share of it.
#ifndef CINNABAR_TESTS_BENCH_PEAK_H_
#define CINNABAR_TESTS_BENCH_PEAK_H_

#include <cstdint>

namespace cinnabar::bench {

// Floating-point operations (two a fused multiply-add) a second over `num_threads` threads at once:
// the best of a few short runs with the widest vectors that the machine has.
double MeasurePeakFlops(int32_t num_threads);

// Bytes a second that `num_threads` threads together read of 1 GiB, far beyond any cache; and that
// they copy, each byte counted twice (read and written). The best of a few runs.
double MeasureReadBytesPerSecond(int32_t num_threads);
double MeasureCopyBytesPerSecond(int32_t num_threads);

}  // namespace cinnabar::bench

#endif  // CINNABAR_TESTS_BENCH_PEAK_H_
