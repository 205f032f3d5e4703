// The float32 FMA rate of this machine, measured in the run that quotes a share of it.
#ifndef CINNABAR_TESTS_BENCH_PEAK_H_
#define CINNABAR_TESTS_BENCH_PEAK_H_

#include <cstdint>

namespace cinnabar::bench {

// Floating-point operations (two a fused multiply-add) a second over `num_threads` threads at once:
// the best of a few short runs with the widest vectors that the machine has.
double MeasurePeakFlops(int32_t num_threads);

}  // namespace cinnabar::bench

#endif  // CINNABAR_TESTS_BENCH_PEAK_H_
