// Prometheus's text format (0.0.4), as far as our own programs write it.
#ifndef CINNABAR_CLI_METRICS_TEXT_H_
#define CINNABAR_CLI_METRICS_TEXT_H_

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace cinnabar {

class MetricsText {
 public:
  // InvalidArgument names the line.
  static absl::StatusOr<MetricsText> Parse(absl::string_view text);

  using Label = std::pair<absl::string_view, absl::string_view>;
  // The sum over all samples of this name that have all of `labels`; 0 without any.
  double Sum(absl::string_view name, const std::vector<Label>& labels = {}) const;
  // A histogram summed over its labels: upper bound to cumulative count.
  std::map<double, double> Buckets(absl::string_view name) const;

 private:
  struct Sample {
    std::vector<std::pair<std::string, std::string>> labels;
    double value = 0.0;
  };
  std::multimap<std::string, Sample, std::less<>> samples_;
};

// The value that `share` (0 to 1) of what came between two looks at a histogram does not exceed,
// straight between the bounds of its bucket; the last finite bound for what is over it. NaN when
// nothing came.
double BucketQuantile(const std::map<double, double>& before, const std::map<double, double>& now,
                      double share);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_METRICS_TEXT_H_
