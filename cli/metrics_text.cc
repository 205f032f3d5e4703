#include "cli/metrics_text.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace cinnabar {
namespace {

// Takes `name="value",` pairs and the closing brace off `text`. False: it is malformed.
bool TakeLabels(absl::string_view& text, std::vector<std::pair<std::string, std::string>>& labels) {
  while (!absl::ConsumePrefix(&text, "}")) {
    const size_t equal = text.find("=\"");
    if (equal == absl::string_view::npos) return false;
    std::string name(text.substr(0, equal));
    text.remove_prefix(equal + 2);
    std::string value;
    while (!text.empty() && text[0] != '"') {
      if (text[0] == '\\') {
        text.remove_prefix(1);
        if (text.empty()) return false;
        value += text[0] == 'n' ? '\n' : text[0];
      } else {
        value += text[0];
      }
      text.remove_prefix(1);
    }
    if (!absl::ConsumePrefix(&text, "\"")) return false;
    absl::ConsumePrefix(&text, ",");
    labels.emplace_back(std::move(name), std::move(value));
  }
  return true;
}

}  // namespace

absl::StatusOr<MetricsText> MetricsText::Parse(absl::string_view text) {
  MetricsText metrics;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    const size_t end = line.find_first_of("{ ");
    Sample sample;
    absl::string_view rest = end == absl::string_view::npos ? "" : line.substr(end);
    bool ok = end != absl::string_view::npos && end > 0;
    if (ok && absl::ConsumePrefix(&rest, "{")) ok = TakeLabels(rest, sample.labels);
    // A time stamp may follow the value.
    const std::vector<absl::string_view> values = absl::StrSplit(rest, ' ', absl::SkipEmpty());
    if (!ok || values.empty() || !absl::SimpleAtod(values[0], &sample.value)) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", number, " is not of Prometheus's text format"));
    }
    metrics.samples_.emplace(std::string(line.substr(0, end)), std::move(sample));
  }
  return metrics;
}

double MetricsText::Sum(absl::string_view name, const std::vector<Label>& labels) const {
  double sum = 0.0;
  const auto [begin, end] = samples_.equal_range(name);
  for (auto each = begin; each != end; ++each) {
    const auto& has = each->second.labels;
    const bool all = std::all_of(labels.begin(), labels.end(), [&](const Label& label) {
      return std::any_of(has.begin(), has.end(), [&](const auto& pair) {
        return pair.first == label.first && pair.second == label.second;
      });
    });
    if (all) sum += each->second.value;
  }
  return sum;
}

std::map<double, double> MetricsText::Buckets(absl::string_view name) const {
  std::map<double, double> buckets;
  const auto [begin, end] = samples_.equal_range(absl::StrCat(name, "_bucket"));
  for (auto each = begin; each != end; ++each) {
    for (const auto& [label, value] : each->second.labels) {
      double bound = 0.0;
      if (label == "le" && absl::SimpleAtod(value, &bound)) buckets[bound] += each->second.value;
    }
  }
  return buckets;
}

double BucketQuantile(const std::map<double, double>& before, const std::map<double, double>& now,
                      double share) {
  const auto came = [&](const std::pair<const double, double>& bucket) {
    const auto old = before.find(bucket.first);
    return bucket.second - (old == before.end() ? 0.0 : old->second);
  };
  if (now.empty()) return std::numeric_limits<double>::quiet_NaN();
  const double total = came(*now.rbegin());
  if (!(total > 0.0)) return std::numeric_limits<double>::quiet_NaN();
  double lower = 0.0;
  double below = 0.0;
  for (const auto& bucket : now) {
    const double up_to = came(bucket);
    if (up_to >= share * total) {
      if (std::isinf(bucket.first)) return lower;
      const double inside = up_to - below;
      return inside > 0.0 ? lower + (bucket.first - lower) * (share * total - below) / inside
                          : bucket.first;
    }
    lower = bucket.first;
    below = up_to;
  }
  return lower;
}

}  // namespace cinnabar
