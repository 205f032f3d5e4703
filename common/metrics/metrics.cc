#include "common/metrics/metrics.h"

#include <dirent.h>
#include <prometheus/check_names.h>
#include <prometheus/text_serializer.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <type_traits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
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

// Of the process, not of this call: from the kernel's record in clock ticks since boot.
double StartTime() {
  double start = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());
  std::FILE* stat = std::fopen("/proc/self/stat", "r");
  if (stat == nullptr) return start;
  char text[2048];
  const size_t length = std::fread(text, 1, sizeof(text) - 1, stat);
  std::fclose(stat);
  // The program's name, field 2, is in parentheses and may hold anything; the start is field 22.
  const absl::string_view all(text, length);
  const size_t name_end = all.rfind(')');
  if (name_end == absl::string_view::npos) return start;
  const std::vector<absl::string_view> fields =
      absl::StrSplit(all.substr(name_end + 1), ' ', absl::SkipEmpty());
  int64_t ticks = 0;
  timespec since_boot = {};
  if (fields.size() < 20 || !absl::SimpleAtoi(fields[19], &ticks) ||
      clock_gettime(CLOCK_BOOTTIME, &since_boot) != 0) {
    return start;
  }
  const double age = static_cast<double>(since_boot.tv_sec) +
                     static_cast<double>(since_boot.tv_nsec) / 1e9 -
                     static_cast<double>(ticks) / static_cast<double>(sysconf(_SC_CLK_TCK));
  return age >= 0 ? start - age : start;
}

double CpuSeconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Most are clean; a client's may hold anything.
std::string CleanLabelValue(absl::string_view value) {
  std::string clean(value.substr(0, kLabelValueBytesMax));
  for (char& c : clean) {
    if (!absl::ascii_isprint(static_cast<unsigned char>(c))) c = '?';
  }
  return clean;
}

}  // namespace

bool SeriesBudget::Take(int64_t series) {
  MutexLock lock(mu_);
  if (series > left_) return false;
  left_ -= series;
  return true;
}

void SeriesBudget::GiveBack(int64_t series) {
  MutexLock lock(mu_);
  left_ += series;
}

// A family of one label needs one child for "other"; with more, sets such as (other, input) and
// (other, output) keep what is known of the rest.
template <typename T>
MetricFamily<T>::MetricFamily(prometheus::Family<T>& family, std::vector<std::string> labels,
                              size_t children_max, std::vector<double> buckets,
                              SeriesBudget& budget,
                              std::function<void(const std::string&)> overflow)
    : family_(family),
      labels_(std::move(labels)),
      children_max_(children_max),
      others_max_(labels_.size() < 2 ? 1 : std::min<size_t>(32, children_max / 4 + 1)),
      buckets_(std::move(buckets)),
      series_per_child_(std::is_same_v<T, prometheus::Histogram>
                            ? static_cast<int64_t>(buckets_.size()) + 3  // +Inf, sum, count
                            : 1),
      budget_(budget),
      overflow_(std::move(overflow)),
      values_(labels_.size()) {
  CINNABAR_CHECK(children_max_ > others_max_ || labels_.empty()) << family_.GetName();
  // The last resort is always there.
  CINNABAR_CHECK(budget_.Take(series_per_child_)) << family_.GetName() << ": too many families";
}

template <typename T>
T* MetricFamily<T>::Find(const std::vector<std::string>& values) {
  const auto found = children_.find(absl::StrJoin(values, absl::string_view("\0", 1)));
  return found == children_.end() ? nullptr : found->second;
}

template <typename T>
T& MetricFamily<T>::Make(const std::vector<std::string>& values) {
  std::map<std::string, std::string> labels;
  for (size_t i = 0; i < labels_.size(); ++i) {
    labels[labels_[i]] = values[i];
    values_[i].insert(values[i]);
  }
  T* child = nullptr;
  if constexpr (std::is_same_v<T, prometheus::Histogram>) {
    child = &family_.Add(labels, buckets_);
  } else {
    child = &family_.Add(labels);
  }
  children_[absl::StrJoin(values, absl::string_view("\0", 1))] = child;
  return *child;
}

template <typename T>
T* MetricFamily<T>::MakeIfRoom(const std::vector<std::string>& values, size_t children_max) {
  if (children_.size() >= children_max || !budget_.Take(series_per_child_)) return nullptr;
  return &Make(values);
}

template <typename T>
size_t MetricFamily<T>::WidestLabel() const {
  size_t widest = 0;
  for (size_t i = 1; i < values_.size(); ++i) {
    if (values_[i].size() > values_[widest].size()) widest = i;
  }
  return widest;
}

template <typename T>
T& MetricFamily<T>::With(LabelValues values) {
  CINNABAR_CHECK(values.size() == labels_.size()) << family_.GetName() << " has other labels";
  std::vector<std::string> texts;
  for (const absl::string_view value : values) texts.push_back(CleanLabelValue(value));
  T* child = nullptr;
  {
    MutexLock lock(mu_);
    if (T* found = Find(texts); found != nullptr) return *found;
    if (labels_.empty()) return Make(texts);  // paid for by the constructor
    child = MakeIfRoom(texts, children_max_ - others_max_);
    if (child != nullptr) return *child;
    if (labels_.size() > 1) {
      texts[WidestLabel()] = "other";
      child = Find(texts);
      if (child == nullptr) child = MakeIfRoom(texts, children_max_ - 1);
    }
    if (child == nullptr) {
      texts.assign(labels_.size(), "other");
      child = Find(texts);
      if (child == nullptr) child = &Make(texts);  // paid for by the constructor
    }
  }
  overflow_(family_.GetName());
  return *child;
}

template <typename T>
void MetricFamily<T>::Replace(absl::Span<const GaugeSample> samples) {
  if constexpr (std::is_same_v<T, prometheus::Gauge>) {
    bool left_out = false;
    {
      MutexLock lock(mu_);
      absl::flat_hash_map<std::string, T*> old;
      std::swap(old, children_);
      for (std::set<std::string>& seen : values_) seen.clear();  // read by With only
      for (const GaugeSample& sample : samples) {
        CINNABAR_CHECK(sample.values.size() == labels_.size()) << family_.GetName();
        std::vector<std::string> texts;
        for (const std::string& value : sample.values) texts.push_back(CleanLabelValue(value));
        const std::string key = absl::StrJoin(texts, absl::string_view("\0", 1));
        T* child = nullptr;
        if (const auto found = old.find(key); found != old.end()) {
          child = found->second;
          children_[key] = child;
          old.erase(found);
        } else if (child = Find(texts); child == nullptr) {
          // Those that go are still paid for, and still of the family.
          child = children_.size() + old.size() < children_max_ ? MakeIfRoom(texts, children_max_)
                                                                : nullptr;
        }
        if (child == nullptr) {
          left_out = true;
        } else {
          child->Set(sample.value);
        }
      }
      for (const auto& [key, child] : old) {
        family_.Remove(child);
        budget_.GiveBack(series_per_child_);
      }
    }
    if (left_out) overflow_(family_.GetName());
  } else {
    CINNABAR_CHECK(false) << family_.GetName() << " is no gauge";
  }
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

const std::vector<double>& RatioBuckets() {
  static const auto* const buckets =
      new std::vector<double>{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1};
  return *buckets;
}

struct Metrics::Families {
  std::set<std::string> names;
  std::vector<std::unique_ptr<CounterFamily>> counters;
  std::vector<std::unique_ptr<GaugeFamily>> gauges;
  std::vector<std::unique_ptr<HistogramFamily>> histograms;
};

Metrics::Metrics(int64_t series_max)
    : budget_(series_max), families_(std::make_unique<Families>()) {
  overflows_ = &AddCounter("cinnabar_metric_overflows_total",
                           "Label sets that had no room of their own, by metric", {"family"});
  AddGauge("cinnabar_build_info", "1; what is running", {"version", "revision"}, 2)
      .With({kVersion, kRevision})
      .Set(1);
  AddGauge("cinnabar_process_start_time_seconds", "When the process started, since 1970")
      .With({})
      .Set(StartTime());
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

void Metrics::CheckNames(const std::string& name, const std::vector<std::string>& labels) {
  // The library would throw.
  CINNABAR_CHECK(prometheus::CheckMetricName(name)) << name << " is no metric name";
  for (const std::string& label : labels) {
    CINNABAR_CHECK(prometheus::CheckLabelName(label) && label != "le")
        << name << ": " << label << " is no label name";
  }
  CINNABAR_CHECK(families_->names.insert(name).second) << name << " is added twice";
}

template <typename T>
MetricFamily<T>& Metrics::Keep(prometheus::Family<T>& family, std::vector<std::string> labels,
                               size_t children_max, std::vector<double> buckets,
                               std::vector<std::unique_ptr<MetricFamily<T>>>& families) {
  families.emplace_back(new MetricFamily<T>(family, std::move(labels), children_max,
                                            std::move(buckets), budget_,
                                            [this](const std::string& name) {
                                              // The overflow of the overflows is its own "other",
                                              // and counts nothing more.
                                              if (name != "cinnabar_metric_overflows_total")
                                                overflows_->With({name}).Increment();
                                            }));
  return *families.back();
}

CounterFamily& Metrics::AddCounter(const std::string& name, const std::string& help,
                                   std::vector<std::string> labels, size_t children_max) {
  MutexLock lock(families_mu_);
  CheckNames(name, labels);
  return Keep(prometheus::BuildCounter().Name(name).Help(help).Register(registry_),
              std::move(labels), children_max, {}, families_->counters);
}

GaugeFamily& Metrics::AddGauge(const std::string& name, const std::string& help,
                               std::vector<std::string> labels, size_t children_max) {
  MutexLock lock(families_mu_);
  CheckNames(name, labels);
  return Keep(prometheus::BuildGauge().Name(name).Help(help).Register(registry_), std::move(labels),
              children_max, {}, families_->gauges);
}

HistogramFamily& Metrics::AddHistogram(const std::string& name, const std::string& help,
                                       std::vector<double> buckets, std::vector<std::string> labels,
                                       size_t children_max) {
  MutexLock lock(families_mu_);
  CheckNames(name, labels);
  CINNABAR_CHECK(std::is_sorted(buckets.begin(), buckets.end())) << name << ": buckets ascend";
  return Keep(prometheus::BuildHistogram().Name(name).Help(help).Register(registry_),
              std::move(labels), children_max, std::move(buckets), families_->histograms);
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
