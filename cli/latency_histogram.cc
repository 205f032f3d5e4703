#include "cli/latency_histogram.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "common/base/check.h"

namespace cinnabar {
namespace {

// Values below 128 have a bucket each; above, each power of two is cut into 128.
constexpr int kBits = 7;
constexpr int64_t kExact = int64_t{1} << kBits;
constexpr int64_t kMaxUs = (int64_t{1} << 40) - 1;

size_t BucketOf(int64_t us) {
  if (us < kExact) return static_cast<size_t>(us);
  const int shift = static_cast<int>(std::bit_width(static_cast<uint64_t>(us))) - kBits - 1;
  return static_cast<size_t>((shift + 1) * kExact + ((us >> shift) - kExact));
}

int64_t UpperEnd(size_t bucket) {
  const auto index = static_cast<int64_t>(bucket);
  if (index < kExact) return index;
  const int64_t shift = index / kExact - 1;
  return ((index % kExact + kExact + 1) << shift) - 1;
}

}  // namespace

LatencyHistogram::LatencyHistogram() : buckets_(BucketOf(kMaxUs) + 1) {}

void LatencyHistogram::Record(absl::Duration latency) {
  const int64_t us = std::clamp<int64_t>(absl::ToInt64Microseconds(latency), 0, kMaxUs);
  ++buckets_[BucketOf(us)];
  ++count_;
  sum_us_ += us;
  max_us_ = std::max(max_us_, us);
}

void LatencyHistogram::Merge(const LatencyHistogram& other) {
  for (size_t i = 0; i < buckets_.size(); ++i) buckets_[i] += other.buckets_[i];
  count_ += other.count_;
  sum_us_ += other.sum_us_;
  max_us_ = std::max(max_us_, other.max_us_);
}

absl::Duration LatencyHistogram::mean() const {
  return count_ == 0 ? absl::ZeroDuration() : absl::Microseconds(sum_us_) / count_;
}

absl::Duration LatencyHistogram::Percentile(double percent) const {
  CINNABAR_CHECK(percent >= 0.0 && percent <= 100.0);
  if (count_ == 0) return absl::ZeroDuration();
  const int64_t rank = std::clamp<int64_t>(
      static_cast<int64_t>(std::ceil(percent / 100.0 * static_cast<double>(count_))), 1, count_);
  int64_t seen = 0;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    seen += buckets_[i];
    if (seen >= rank) return absl::Microseconds(std::min(UpperEnd(i), max_us_));
  }
  return max();
}

}  // namespace cinnabar
