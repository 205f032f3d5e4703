#include "cli/top_view.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/terminal.h"

namespace cinnabar {
namespace {

constexpr const char* kBars[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
constexpr int32_t kNameColumns = 13;

std::string Count(const std::optional<double>& value) { return value ? ShowCount(*value) : "-"; }
std::string Seconds(const std::optional<double>& value) {
  return value ? ShowSeconds(*value) : "-";
}
std::string Percent(const std::optional<double>& value) {
  return value ? absl::StrFormat("%.0f%%", 100.0 * *value) : "-";
}
// Small prices need digits: "$0.36", "$0.000100".
std::string Dollars(double value) {
  return absl::StrFormat(value == 0.0 || value >= 0.01 ? "$%.2f" : "$%.6f", value);
}

class Screen {
 public:
  explicit Screen(const TopViewOptions& options) : options_(options) {}

  void Line(absl::string_view text) {
    lines_.push_back(
        absl::StrCat(absl::StripTrailingAsciiWhitespace(FitLeft(text, options_.columns)), "\n"));
  }
  void Row(absl::string_view name, absl::string_view text) {
    Line(absl::StrCat(Styled(ansi::kBold, FitLeft(name, kNameColumns)), text));
  }
  std::string Styled(const char* style, absl::string_view text) const {
    return options_.colour ? absl::StrCat(style, text, ansi::kReset) : std::string(text);
  }
  // A field of a row: the figure stands out, its unit does not.
  std::string Field(absl::string_view figure, absl::string_view unit) const {
    return absl::StrCat(figure, " ", Styled(ansi::kDim, unit), "   ");
  }
  int32_t lines_left() const { return options_.lines_max - static_cast<int32_t>(lines_.size()); }
  std::string Take() const {
    std::string text;
    for (int32_t i = 0; i < std::min<int32_t>(options_.lines_max, lines_.size()); ++i) {
      text += lines_[i];
    }
    return text;
  }

 private:
  const TopViewOptions& options_;
  std::vector<std::string> lines_;
};

void AddQueue(const ClusterFigures& figures, Screen& screen) {
  const QueueStats& queue = figures.queue;
  screen.Row("requests",
             absl::StrCat(screen.Field(ShowWhole(queue.live), "under way"),
                          screen.Field(ShowWhole(figures.rows), "in workers"),
                          screen.Field(ShowWhole(queue.ready_packs), "packs on the way"),
                          screen.Field(ShowCount(static_cast<double>(queue.cost)), "token-steps")));
  for (size_t i = 0; i < kRequestClasses.size(); ++i) {
    const double age = absl::ToDoubleSeconds(queue.oldest_age[i]);
    screen.Row(absl::StrCat("  ", RequestClassName(kRequestClasses[i])),
               absl::StrCat(
                   screen.Field(FitRight(ShowWhole(queue.waiting[i]), 9), "waiting"),
                   queue.waiting[i] > 0 ? absl::StrCat("the oldest for ", ShowSeconds(age)) : ""));
  }
  screen.Row("ended", absl::StrCat(screen.Field(Count(figures.done_per_second), "done/s"),
                                   screen.Field(Count(figures.cancelled_per_second), "cancelled/s"),
                                   screen.Field(Count(figures.expired_per_second), "expired/s"),
                                   screen.Field(Count(figures.failed_per_second), "failed/s")));
  if (queue.dead_letters > 0) {
    const std::string letters = absl::StrCat(ShowWhole(queue.dead_letters), " dead letters");
    screen.Row(
        "", absl::StrCat(screen.Styled(ansi::kRed, letters), ": `cinnabar queue dead` says why"));
  }
}

void AddWork(const ClusterFigures& figures, int32_t columns, Screen& screen) {
  screen.Row("output", absl::StrCat(screen.Field(Count(figures.tokens_per_second), "tokens/s"),
                                    Sparkline(figures.tokens_history,
                                              std::clamp(columns - kNameColumns - 22, 0, 60))));
  screen.Row("forwards",
             absl::StrCat(screen.Field(Count(figures.forwards_per_second), "forwards/s"),
                          screen.Field(Count(figures.tokens_per_forward), "tokens/forward"),
                          screen.Field(Count(figures.forwards_per_answer), "NFE/answer")));
  screen.Row("devices",
             absl::StrCat(screen.Field(Percent(figures.busy_ratio), "busy"),
                          screen.Field(Percent(figures.waste_ratio), "wasted on no answer")));
  std::string cost = screen.Field(Dollars(figures.dollars_per_second), "/s");
  if (figures.dollars_per_million_tokens) {
    absl::StrAppend(
        &cost, screen.Field(Dollars(*figures.dollars_per_million_tokens), "per million tokens"));
  }
  if (figures.gateway && figures.gateway->price_dollars_per_second) {
    absl::StrAppend(
        &cost, screen.Field(Dollars(*figures.gateway->price_dollars_per_second), "/s charged"));
  }
  screen.Row("cost", cost);
  if (!figures.gateway) return;
  const GatewayFigures& gateway = *figures.gateway;
  screen.Row("gateway", absl::StrCat(screen.Field(Count(gateway.requests_per_second), "requests/s"),
                                     screen.Field(Count(gateway.refused_per_second), "refused/s"),
                                     screen.Field(ShowCount(gateway.streams), "streams")));
  screen.Row("  latency", absl::StrCat(screen.Field(Seconds(gateway.first_p50_seconds),
                                                    "to the first step (p50)"),
                                       screen.Field(Seconds(gateway.p50_seconds), "whole (p50)"),
                                       screen.Field(Seconds(gateway.p99_seconds), "(p99)")));
}

std::string WorkerLine(const WorkerFigures& worker, int32_t name_columns, const Screen& screen) {
  const char* style = "";
  switch (worker.state) {
    case WorkerFigures::State::kIdle:
      style = ansi::kDim;
      break;
    case WorkerFigures::State::kBusy:
      style = ansi::kGreen;
      break;
    case WorkerFigures::State::kDraining:
      style = ansi::kYellow;
      break;
    case WorkerFigures::State::kGone:
      style = ansi::kRed;
      break;
  }
  return absl::StrCat(
      FitLeft(Printable(worker.name), name_columns), " ",
      screen.Styled(style, FitLeft(WorkerStateName(worker.state), 8)),
      FitRight(absl::StrCat(worker.rows, "/", worker.rows_max), 8),
      FitRight(Seconds(worker.step_seconds), 10), FitRight(Percent(worker.busy_ratio), 6),
      FitRight(Count(worker.tokens_per_second), 10), FitRight(Count(worker.tokens_per_forward), 9),
      "  ", Printable(absl::StrCat(worker.model, " on ", worker.device)));
}

void AddWorkers(const ClusterFigures& figures, Screen& screen) {
  screen.Line("");
  if (figures.workers.empty()) {
    screen.Line(
        screen.Styled(ansi::kYellow, "no workers: start cinnabar-worker, or `cinnabar up`"));
    return;
  }
  int32_t name_columns = 6;
  for (const WorkerFigures& worker : figures.workers) {
    name_columns = std::max(name_columns, std::min(24, DisplayWidth(worker.name)));
  }
  screen.Line(screen.Styled(
      ansi::kBold, absl::StrCat(FitLeft("worker", name_columns), " ", FitLeft("state", 8),
                                FitRight("rows", 8), FitRight("step", 10), FitRight("busy", 6),
                                FitRight("tokens/s", 10), FitRight("/forward", 9), "  model")));
  for (size_t i = 0; i < figures.workers.size(); ++i) {
    const size_t left = figures.workers.size() - i;
    if (left > 1 && screen.lines_left() <= 1) {
      screen.Line(absl::StrCat("and ", left, " more"));
      return;
    }
    screen.Line(WorkerLine(figures.workers[i], name_columns, screen));
  }
}

}  // namespace

std::string Sparkline(const std::vector<double>& values, int32_t columns) {
  const size_t shown = std::min(values.size(), static_cast<size_t>(std::max(0, columns)));
  const auto begin = values.end() - static_cast<std::ptrdiff_t>(shown);
  double highest = 0.0;
  for (auto value = begin; value != values.end(); ++value) highest = std::max(highest, *value);
  std::string line;
  for (auto value = begin; value != values.end(); ++value) {
    const double share = highest > 0.0 ? std::clamp(*value / highest, 0.0, 1.0) : 0.0;
    line += kBars[std::lround(share * (std::size(kBars) - 1))];
  }
  return line;
}

std::string RenderTop(const ClusterFigures& figures, const TopViewOptions& options) {
  Screen screen(options);
  screen.Line(absl::StrCat(screen.Styled(ansi::kBold, "cinnabar top"), "   ",
                           Printable(options.title), "   ",
                           absl::FormatTime("%H:%M:%S", figures.at, options.zone)));
  screen.Line(options.problem.empty() ? "" : screen.Styled(ansi::kRed, Printable(options.problem)));
  AddQueue(figures, screen);
  AddWork(figures, options.columns, screen);
  AddWorkers(figures, screen);
  return screen.Take();
}

}  // namespace cinnabar
