// Tables and plots of simulation outcomes.
#ifndef CINNABAR_TESTS_SIM_SCHEDULER_REPORT_H_
#define CINNABAR_TESTS_SIM_SCHEDULER_REPORT_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "tests/sim/scheduler/simulation.h"

namespace cinnabar::sim {

// Markdown: one row for each (load, policy) of `trace`.
std::string TableOf(absl::Span<const Outcome> outcomes, const std::string& trace);

struct Series {
  std::string name;
  std::string color;
  bool dashed = false;
  bool strong = false;
  std::vector<std::pair<double, double>> points;
};
struct Panel {
  std::string title;
  std::string note;  // one line under the title
  std::vector<Series> series;
};
struct Figure {
  std::string title;
  std::string subtitle;
  std::string y_label;
  bool log_y = false;
  std::vector<Panel> panels;  // side by side, two a row
};
// A self-contained SVG: lines over load (0.5 to 3, logarithmic), the same legend for all panels.
std::string SvgOf(const Figure& figure);

}  // namespace cinnabar::sim

#endif  // CINNABAR_TESTS_SIM_SCHEDULER_REPORT_H_
