// Latencies counted in buckets of less than 1% width: percentiles of any number of samples in fixed
// memory.
#ifndef CINNABAR_CLI_LATENCY_HISTOGRAM_H_
#define CINNABAR_CLI_LATENCY_HISTOGRAM_H_

#include <cstdint>
#include <vector>

#include "absl/time/time.h"

namespace cinnabar {

// From 1 microsecond to 12 days; what is outside counts as the nearest end. Not thread-safe.
class LatencyHistogram {
 public:
  LatencyHistogram();

  void Record(absl::Duration latency);
  void Merge(const LatencyHistogram& other);

  int64_t count() const { return count_; }
  absl::Duration max() const { return absl::Microseconds(max_us_); }
  absl::Duration mean() const;  // exact; zero without samples
  // The smallest latency that at least `percent` (0 to 100) of the samples do not exceed: the upper
  // end of its bucket, at most max(). Zero without samples.
  absl::Duration Percentile(double percent) const;

 private:
  std::vector<int64_t> buckets_;
  int64_t count_ = 0;
  int64_t sum_us_ = 0;
  int64_t max_us_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_LATENCY_HISTOGRAM_H_
