// Metrics of one process, over prometheus-cpp. Names are cinnabar_<what>_<unit>, `_total` on
// counters; label values come from small closed sets, never ids. A scrape is bounded whatever
// clients send: a family has at most `children_max` label sets and the process kSeriesMax series.
// What does not fit is counted as "other", and in cinnabar_metric_overflows_total{family}.
#ifndef CINNABAR_COMMON_METRICS_METRICS_H_
#define CINNABAR_COMMON_METRICS_METRICS_H_

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/mutex.h"

namespace cinnabar {

inline constexpr int64_t kSeriesMax = 20'000;  // lines of a scrape that are not comments
inline constexpr size_t kLabelValueBytesMax = 128;

using LabelValues = std::initializer_list<absl::string_view>;

// Series that a process still may make, shared by its families. Thread-safe.
class SeriesBudget {
 public:
  explicit SeriesBudget(int64_t series_max) : left_(series_max) {}
  // False, and nothing taken, when there are not so many left.
  bool Take(int64_t series);
  void GiveBack(int64_t series);

 private:
  Mutex mu_;  // leaf
  int64_t left_ ABSL_GUARDED_BY(mu_);
};

struct GaugeSample {
  std::vector<std::string> values;  // of the labels
  double value = 0;
};

// The children of one name. Thread-safe. `T` is prometheus::Counter, Gauge or Histogram.
template <typename T>
class MetricFamily {
 public:
  // The child with these values, as many as the family has labels; made when first asked for, and
  // there as long as the family (hot paths keep the reference). When the family is full, or the
  // process, the value of the label with the most values becomes "other", and when even that is one
  // too many, all values do. Values are cut at kLabelValueBytesMax; what is not printable ASCII in
  // them becomes '?'.
  T& With(LabelValues values);

  // Gauges only: from now on the children are these and no others, for what comes and goes
  // (workers). A family is used through this or through With, not both: a child's reference dies
  // with it. Samples that do not fit are left out and counted as overflows.
  void Replace(absl::Span<const GaugeSample> samples);

 private:
  friend class Metrics;
  MetricFamily(prometheus::Family<T>& family, std::vector<std::string> labels, size_t children_max,
               std::vector<double> buckets, SeriesBudget& budget,
               std::function<void(const std::string&)> overflow);
  T* Find(const std::vector<std::string>& values) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  T& Make(const std::vector<std::string>& values) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  size_t WidestLabel() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Makes the child if there is room; `children_max` is the room. Null: there is not.
  T* MakeIfRoom(const std::vector<std::string>& values, size_t children_max)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  prometheus::Family<T>& family_;
  const std::vector<std::string> labels_;
  const size_t children_max_;          // the one where all labels are "other" is counted
  const size_t others_max_;            // of them kept for sets with one "other"
  const std::vector<double> buckets_;  // histograms only
  const int64_t series_per_child_;
  SeriesBudget& budget_;
  const std::function<void(const std::string&)> overflow_;  // called without mu_
  Mutex mu_;                                                // held while the budget's is taken
  absl::flat_hash_map<std::string, T*> children_ ABSL_GUARDED_BY(mu_);  // by joined values
  std::vector<std::set<std::string>> values_ ABSL_GUARDED_BY(mu_);      // seen, by label
};

using CounterFamily = MetricFamily<prometheus::Counter>;
using GaugeFamily = MetricFamily<prometheus::Gauge>;
using HistogramFamily = MetricFamily<prometheus::Histogram>;

// 16 from 5 ms to 120 s, the same in every service so that they can be added up.
const std::vector<double>& LatencyBuckets();
// 1, 2, 4 ... up to 2^(n-1): rows, steps, tokens.
std::vector<double> PowerBuckets(int n);
// 0.1, 0.2 ... 1: shares of a whole.
const std::vector<double>& RatioBuckets();

// Thread-safe. Families live as long as it does.
class Metrics {
 public:
  // Adds cinnabar_build_info and the process's own figures.
  explicit Metrics(int64_t series_max = kSeriesMax);
  ~Metrics();

  // A name is given once, and is a Prometheus name, as the labels are (CINNABAR_CHECK).
  // `children_max` bounds the label sets, "other" counted.
  CounterFamily& AddCounter(const std::string& name, const std::string& help,
                            std::vector<std::string> labels = {}, size_t children_max = 500);
  GaugeFamily& AddGauge(const std::string& name, const std::string& help,
                        std::vector<std::string> labels = {}, size_t children_max = 500);
  HistogramFamily& AddHistogram(const std::string& name, const std::string& help,
                                std::vector<double> buckets, std::vector<std::string> labels = {},
                                size_t children_max = 500);

  // Called at the start of each Render(), one after the other, to set what is counted elsewhere. It
  // may use families and must not add any, nor call Render().
  void OnScrape(std::function<void()> update);

  // The text format, version 0.0.4.
  std::string Render();

 private:
  struct Families;
  template <typename T>
  MetricFamily<T>& Keep(prometheus::Family<T>& family, std::vector<std::string> labels,
                        size_t children_max, std::vector<double> buckets,
                        std::vector<std::unique_ptr<MetricFamily<T>>>& families)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(families_mu_);
  void CheckNames(const std::string& name, const std::vector<std::string>& labels)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(families_mu_);

  prometheus::Registry registry_;
  SeriesBudget budget_;
  CounterFamily* overflows_ = nullptr;  // set by the constructor
  Mutex families_mu_;                   // held while the budget's is taken
  std::unique_ptr<Families> families_ ABSL_GUARDED_BY(families_mu_);
  Mutex mu_;  // held while the updates run, which take only the locks of metrics and of their own
  std::vector<std::function<void()>> updates_ ABSL_GUARDED_BY(mu_);
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_METRICS_METRICS_H_
