#include "tests/sim/scheduler/report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace cinnabar::sim {
namespace {

constexpr double kPanelWidth = 430;
constexpr double kPanelHeight = 250;
constexpr double kMargin = 28;
constexpr double kLeft = 52;  // room for the numbers of the y axis
constexpr double kTop = 52;   // of a panel: title and note
constexpr double kBottom = 30;
constexpr double kHeader = 112;

std::string Text(double x, double y, const std::string& text, const std::string& style) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" %s>%s</text>\n", x, y, style, text);
}

std::string Number(double value) {
  if (value == 0.0) return "0";
  if (value >= 100.0 || value == std::floor(value)) return absl::StrFormat("%.0f", value);
  return absl::StrFormat("%.3g", value);
}

// Round steps that make at most six lines.
std::vector<double> LinearTicks(double top) {
  const double rough = top / 5.0;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10.0 * power;
  for (const double factor : {1.0, 2.0, 2.5, 5.0}) {
    if (factor * power >= rough) {
      step = factor * power;
      break;
    }
  }
  std::vector<double> ticks;
  for (int i = 0; i * step <= top * 1.0001; ++i) ticks.push_back(i * step);
  return ticks;
}

}  // namespace

std::string TableOf(absl::Span<const Outcome> outcomes, const std::string& trace) {
  std::string text =
      "| load | policy | goodput /s | in time | of the oracle | interactive wait p50 / p95 / p99 s "
      "| standard | "
      "batch | padding | discarded | Jain | longest wait s |\n"
      "| ---: | --- | ---: | ---: | ---: | --- | --- | --- | ---: | ---: | ---: | ---: |\n";
  for (const Outcome& outcome : outcomes) {
    if (outcome.trace != trace) continue;
    double oracle = 0.0;
    for (const Outcome& other : outcomes) {
      if (other.trace == trace && other.load == outcome.load && other.policy == "oracle") {
        oracle = other.goodput_per_second;
      }
    }
    const auto wait = [&outcome](size_t lane) {
      const Percentiles& p = outcome.wait[lane];
      return absl::StrFormat("%.2f / %.1f / %.1f", p.p50, p.p95, p.p99);
    };
    const double longest =
        std::max({outcome.wait[0].max, outcome.wait[1].max, outcome.wait[2].max});
    const bool ours = outcome.policy == "cinnabar";
    absl::StrAppend(
        &text,
        absl::StrFormat(
            "| %g | %s%s%s | %.2f | %.1f%% | %s | %s | %s | %s | %.1f%% | %.1f%% | %.3f | %.0f |\n",
            outcome.load, ours ? "**" : "", outcome.policy, ours ? "**" : "",
            outcome.goodput_per_second, 100.0 * outcome.goodput_share,
            oracle > 0.0 ? absl::StrFormat("%.1f%%", 100.0 * outcome.goodput_per_second / oracle)
                         : "",
            wait(0), wait(1), wait(2), 100.0 * outcome.padding_waste,
            100.0 * outcome.discarded_waste, outcome.jain_requests, longest));
  }
  return text;
}

std::string SvgOf(const Figure& figure) {
  const size_t columns = std::min<size_t>(2, figure.panels.size());
  const size_t rows = (figure.panels.size() + columns - 1) / columns;
  const double width = 2 * kMargin + static_cast<double>(columns) * kPanelWidth;
  const double height = kHeader + static_cast<double>(rows) * kPanelHeight + kMargin;
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" "
      "height=\"%.0f\" "
      "font-family=\"Inter, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
      width, height, width, height);
  svg += Text(kMargin, 38, figure.title, "font-size=\"19\" font-weight=\"600\" fill=\"#1b1f24\"");
  svg += Text(kMargin, 60, figure.subtitle, "font-size=\"12.5\" fill=\"#57606a\"");
  double legend_x = kMargin;
  for (const Series& series : figure.panels.front().series) {
    svg += absl::StrFormat(
        "<line x1=\"%.1f\" y1=\"86\" x2=\"%.1f\" y2=\"86\" stroke=\"%s\" "
        "stroke-width=\"%.1f\"%s/>\n",
        legend_x, legend_x + 24, series.color, series.strong ? 3.2 : 2.0,
        series.dashed ? " stroke-dasharray=\"5 4\"" : "");
    svg += Text(legend_x + 31, 90, series.name, "font-size=\"12.5\" fill=\"#1b1f24\"");
    legend_x += 62 + 7.2 * static_cast<double>(series.name.size());
  }
  for (size_t i = 0; i < figure.panels.size(); ++i) {
    const Panel& panel = figure.panels[i];
    const double x0 = kMargin + static_cast<double>(i % columns) * kPanelWidth + kLeft;
    const double x1 = x0 + kPanelWidth - kLeft - 24;
    const double y0 = kHeader + static_cast<double>(i / columns) * kPanelHeight + kTop;
    const double y1 = y0 + kPanelHeight - kTop - kBottom - 10;
    double top = 0.0;
    double bottom = 1e300;
    for (const Series& series : panel.series) {
      for (const auto& [x, y] : series.points) {
        top = std::max(top, y);
        bottom = std::min(bottom, y);
      }
    }
    std::vector<double> ticks;
    if (figure.log_y) {
      bottom = std::pow(10.0, std::floor(std::log10(std::max(bottom, 0.1))));
      for (double decade = bottom; decade < top * 10.0; decade *= 10.0) {
        for (const double factor : {1.0, 3.0}) {
          if (ticks.empty() || ticks.back() < top) ticks.push_back(decade * factor);
        }
      }
      top = ticks.back();
    } else {
      bottom = 0.0;
      ticks = LinearTicks(top * 1.04);
      top = std::max(top * 1.08, ticks.back());
    }
    const auto at_x = [&](double load) {
      return x0 + (x1 - x0) * std::log(load / 0.5) / std::log(6.0);
    };
    const auto at_y = [&](double value) {
      const double share = figure.log_y
                               ? std::log(std::max(value, bottom) / bottom) / std::log(top / bottom)
                               : value / top;
      return y1 - (y1 - y0) * share;
    };
    svg += Text(x0 - kLeft + 8, y0 - 30, panel.title,
                "font-size=\"14\" font-weight=\"600\" fill=\"#1b1f24\"");
    svg += Text(x0 - kLeft + 8, y0 - 13, panel.note, "font-size=\"11.5\" fill=\"#57606a\"");
    for (const double tick : ticks) {
      svg += absl::StrFormat(
          "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" "
          "stroke-width=\"1\"/>\n",
          x0, at_y(tick), x1, at_y(tick), tick == ticks.front() ? "#afb8c1" : "#e7eaee");
      svg += Text(x0 - 8, at_y(tick) + 4, Number(tick),
                  "font-size=\"11\" fill=\"#57606a\" text-anchor=\"end\"");
    }
    for (const double load : {0.5, 1.0, 1.5, 3.0}) {
      svg += Text(at_x(load), y1 + 17, absl::StrCat(Number(load), "\u00d7"),
                  "font-size=\"11\" fill=\"#57606a\" text-anchor=\"middle\"");
    }
    for (const Series& series : panel.series) {
      std::string path;
      for (const auto& [x, y] : series.points) {
        absl::StrAppend(&path, path.empty() ? "M" : "L",
                        absl::StrFormat("%.1f %.1f ", at_x(x), at_y(y)));
      }
      svg += absl::StrFormat(
          "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"%.1f\" "
          "stroke-linejoin=\"round\" "
          "stroke-linecap=\"round\"%s/>\n",
          path, series.color, series.strong ? 3.2 : 2.0,
          series.dashed ? " stroke-dasharray=\"5 4\"" : "");
      for (const auto& [x, y] : series.points) {
        svg += absl::StrFormat(
            "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" fill=\"#ffffff\" stroke=\"%s\" "
            "stroke-width=\"2\"/>\n",
            at_x(x), at_y(y), series.strong ? 4.0 : 3.0, series.color);
      }
    }
    svg +=
        Text(x1, y0 - 13, figure.y_label, "font-size=\"11\" fill=\"#57606a\" text-anchor=\"end\"");
  }
  return svg + "</svg>\n";
}

}  // namespace cinnabar::sim
