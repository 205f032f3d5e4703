#include "common/metrics/metrics.h"

#include <dirent.h>
#include <prometheus/text_serializer.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/check.h"
#include "common/base/version.h"

namespace cinnabar {
namespace {

double ResidentBytes() {
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  if (file == nullptr) return 0;
  long total = 0;
  long resident = 0;
  const int read = std::fscanf(file, "%ld %ld", &total, &resident);
  std::fclose(file);
  return read == 2 ? static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) : 0;
}

double OpenDescriptors() {
  DIR* directory = opendir("/proc/self/fd");
  if (directory == nullptr) return 0;
  int count = 0;
  while (readdir(directory) != nullptr) ++count;
  closedir(directory);
  return count - 3;  // ".", "..", and the one that was open for this
}

double CpuSeconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

template <typename T>
T& MetricFamily<T>::Make(const std::vector<std::string>& values) {
  std::map<std::string, std::string> labels;
  for (size_t i = 0; i < labels_.size(); ++i) labels[labels_[i]] = values[i];
  if constexpr (std::is_same_v<T, prometheus::Histogram>) {
    return family_.Add(labels, buckets_);
  } else {
    return family_.Add(labels);
  }
}

template <typename T>
T& MetricFamily<T>::With(LabelValues values) {
  CINNABAR_CHECK(values.size() == labels_.size()) << family_.GetName() << " has other labels";
  const std::string key = absl::StrJoin(values, absl::string_view("\0", 1));
  MutexLock lock(mu_);
  if (const auto found = children_.find(key); found != children_.end()) return *found->second;
  std::vector<std::string> texts;
  for (const absl::string_view value : values) texts.emplace_back(value);
  if (children_.size() + 1 >= children_max_ && !labels_.empty()) {
    texts.assign(labels_.size(), "other");
    const std::string other = absl::StrJoin(texts, absl::string_view("\0", 1));
    T*& child = children_[other];
    if (child == nullptr) child = &Make(texts);
    return *child;
  }
  T& child = Make(texts);
  children_[key] = &child;
  return child;
}

template class MetricFamily<prometheus::Counter>;
template class MetricFamily<prometheus::Gauge>;
template class MetricFamily<prometheus::Histogram>;

const std::vector<double>& LatencyBuckets() {
  static const auto* const buckets = new std::vector<double>{
      0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10, 30, 60, 120};
  return *buckets;
}

std::vector<double> PowerBuckets(int n) {
  std::vector<double> buckets;
  for (int i = 0; i < n; ++i) buckets.push_back(static_cast<double>(int64_t{1} << i));
  return buckets;
}

struct Metrics::Families {
  std::vector<std::unique_ptr<CounterFamily>> counters;
  std::vector<std::unique_ptr<GaugeFamily>> gauges;
  std::vector<std::unique_ptr<HistogramFamily>> histograms;
};

Metrics::Metrics() : families_(std::make_unique<Families>()) {
  AddGauge("cinnabar_build_info", "1; what is running", {"version", "revision"})
      .With({kVersion, kRevision})
      .Set(1);
  AddGauge("cinnabar_process_start_time_seconds", "When the process started, since 1970")
      .With({})
      .Set(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));
  GaugeFamily& resident =
      AddGauge("cinnabar_process_resident_memory_bytes", "Resident memory of the process");
  GaugeFamily& descriptors = AddGauge("cinnabar_process_open_fds", "Open file descriptors");
  CounterFamily& cpu =
      AddCounter("cinnabar_process_cpu_seconds_total", "Processor time, user and system");
  OnScrape([&resident, &descriptors, &cpu] {
    resident.With({}).Set(ResidentBytes());
    descriptors.With({}).Set(OpenDescriptors());
    prometheus::Counter& counter = cpu.With({});
    counter.Increment(CpuSeconds() - counter.Value());
  });
}

Metrics::~Metrics() = default;

CounterFamily& Metrics::AddCounter(const std::string& name, const std::string& help,
                                   std::vector<std::string> labels, size_t children_max) {
  auto& family = prometheus::BuildCounter().Name(name).Help(help).Register(registry_);
  families_->counters.emplace_back(new CounterFamily(family, std::move(labels), children_max, {}));
  return *families_->counters.back();
}

GaugeFamily& Metrics::AddGauge(const std::string& name, const std::string& help,
                               std::vector<std::string> labels, size_t children_max) {
  auto& family = prometheus::BuildGauge().Name(name).Help(help).Register(registry_);
  families_->gauges.emplace_back(new GaugeFamily(family, std::move(labels), children_max, {}));
  return *families_->gauges.back();
}

HistogramFamily& Metrics::AddHistogram(const std::string& name, const std::string& help,
                                       std::vector<double> buckets, std::vector<std::string> labels,
                                       size_t children_max) {
  auto& family = prometheus::BuildHistogram().Name(name).Help(help).Register(registry_);
  families_->histograms.emplace_back(
      new HistogramFamily(family, std::move(labels), children_max, std::move(buckets)));
  return *families_->histograms.back();
}

void Metrics::OnScrape(std::function<void()> update) {
  MutexLock lock(mu_);
  updates_.push_back(std::move(update));
}

std::string Metrics::Render() {
  MutexLock lock(mu_);
  for (const std::function<void()>& update : updates_) update();
  return prometheus::TextSerializer().Serialize(registry_.Collect());
}

}  // namespace cinnabar
