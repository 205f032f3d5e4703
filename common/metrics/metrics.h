// Metrics of one process, over prometheus-cpp. Names are cinnabar_<what>_<unit>, `_total` on
// counters; label values come from small closed sets. A family that is asked for more children than
// it may have counts the rest as "other", so that no client can grow a scrape without bound.
#ifndef CINNABAR_COMMON_METRICS_METRICS_H_
#define CINNABAR_COMMON_METRICS_METRICS_H_

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "common/base/mutex.h"

namespace cinnabar {

using LabelValues = std::initializer_list<absl::string_view>;

// The children of one name. Thread-safe. `T` is prometheus::Counter, Gauge or Histogram.
template <typename T>
class MetricFamily {
 public:
  // The child with these values, as many as the family has labels; made when first asked for.
  T& With(LabelValues values);

 private:
  friend class Metrics;
  MetricFamily(prometheus::Family<T>& family, std::vector<std::string> labels, size_t children_max,
               std::vector<double> buckets)
      : family_(family),
        labels_(std::move(labels)),
        children_max_(children_max),
        buckets_(std::move(buckets)) {}
  T& Make(const std::vector<std::string>& values);

  prometheus::Family<T>& family_;
  const std::vector<std::string> labels_;
  const size_t children_max_;
  const std::vector<double> buckets_;  // histograms only
  Mutex mu_;                           // leaf
  absl::flat_hash_map<std::string, T*> children_ ABSL_GUARDED_BY(mu_);
};

using CounterFamily = MetricFamily<prometheus::Counter>;
using GaugeFamily = MetricFamily<prometheus::Gauge>;
using HistogramFamily = MetricFamily<prometheus::Histogram>;

// 5 ms to 120 s, the same in every service so that they can be added up.
const std::vector<double>& LatencyBuckets();
// 1, 2, 4 ... up to 2^(n-1).
std::vector<double> PowerBuckets(int n);

// Thread-safe. Families live as long as it does.
class Metrics {
 public:
  // Adds cinnabar_build_info and the process's own figures.
  Metrics();
  ~Metrics();

  // A name is given once. `children_max` bounds the label sets.
  CounterFamily& AddCounter(const std::string& name, const std::string& help,
                            std::vector<std::string> labels = {}, size_t children_max = 500);
  GaugeFamily& AddGauge(const std::string& name, const std::string& help,
                        std::vector<std::string> labels = {}, size_t children_max = 500);
  HistogramFamily& AddHistogram(const std::string& name, const std::string& help,
                                std::vector<double> buckets, std::vector<std::string> labels = {},
                                size_t children_max = 500);

  // Called at the start of each Render(), to set what is counted elsewhere.
  void OnScrape(std::function<void()> update);

  // The text format, version 0.0.4.
  std::string Render();

 private:
  struct Families;
  prometheus::Registry registry_;
  std::unique_ptr<Families> families_;
  Mutex mu_;  // held while the updates run, which take only the locks of metrics
  std::vector<std::function<void()>> updates_ ABSL_GUARDED_BY(mu_);
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_METRICS_METRICS_H_
