// The screen of `cinnabar top`.
#ifndef CINNABAR_CLI_TOP_VIEW_H_
#define CINNABAR_CLI_TOP_VIEW_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "cli/cluster_meter.h"

namespace cinnabar {

struct TopViewOptions {
  std::string title;    // where one looks: "127.0.0.1:6379 default"
  std::string problem;  // what kept the last look from being made; empty: nothing
  int32_t columns = 80;
  int32_t lines_max = 24;
  bool colour = false;
  absl::TimeZone zone = absl::UTCTimeZone();
};

// At most `lines_max` lines, each ended with "\n" and none wider than `columns`. Workers that do
// not fit are counted on the last line. Pure.
std::string RenderTop(const ClusterFigures& figures, const TopViewOptions& options);

// The last `columns` values as bars, the highest of them full. Pure.
std::string Sparkline(const std::vector<double>& values, int32_t columns);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_TOP_VIEW_H_
