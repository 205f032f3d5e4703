#include "cli/arrivals.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/check.h"
#include "common/base/json.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr size_t kRowsMax = 20'000'000;
constexpr int32_t kTokensMax = 1 << 24;
constexpr double kServeGenWindowSeconds = 600.0;
constexpr char kAzureHeader[] = "TIMESTAMP,ContextTokens,GeneratedTokens";

class RateSchedule : public ArrivalSchedule {
 public:
  RateSchedule(double rate, ArrivalKind kind, uint64_t seed)
      : rate_(rate), kind_(kind), random_(seed), gap_(rate) {}
  std::optional<Arrival> Next() override {
    Arrival arrival;
    arrival.at = absl::Seconds(seconds_);
    if (kind_ == ArrivalKind::kPoisson) {
      seconds_ += gap_(random_);
    } else {
      seconds_ = static_cast<double>(++num_) / rate_;  // a sum would drift
    }
    return arrival;
  }

 private:
  double rate_;
  ArrivalKind kind_;
  std::mt19937_64 random_;
  std::exponential_distribution<double> gap_;
  double seconds_ = 0.0;
  int64_t num_ = 0;
};

class TraceSchedule : public ArrivalSchedule {
 public:
  TraceSchedule(std::vector<Arrival> rows, double time_scale, bool repeat)
      : rows_(std::move(rows)), time_scale_(time_scale), repeat_(repeat) {}
  std::optional<Arrival> Next() override {
    if (index_ == rows_.size()) {
      if (!repeat_ || rows_.empty()) return std::nullopt;
      // The rounds follow each other at the trace's own mean distance.
      const absl::Duration span = rows_.back().at - rows_.front().at;
      offset_ += span + span / static_cast<int64_t>(std::max<size_t>(1, rows_.size() - 1)) +
                 absl::Microseconds(1);
      index_ = 0;
    }
    Arrival arrival = rows_[index_++];
    arrival.at = (arrival.at + offset_) / time_scale_;
    return arrival;
  }

 private:
  std::vector<Arrival> rows_;
  double time_scale_;
  bool repeat_;
  size_t index_ = 0;
  absl::Duration offset_;
};

struct Line {
  int64_t number = 0;
  std::string text;
};

absl::StatusOr<std::vector<Line>> ReadLines(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read the trace ", path));
  std::vector<Line> lines;
  Line line;
  while (std::getline(file, line.text)) {
    ++line.number;
    absl::StripAsciiWhitespace(&line.text);
    if (line.text.empty() || line.text[0] == '#') continue;
    if (lines.size() == kRowsMax) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": over ", kRowsMax, " lines"));
    }
    lines.push_back(line);
  }
  if (lines.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": an empty trace"));
  return lines;
}

absl::Status BadLine(const std::string& path, const Line& line, absl::string_view wanted) {
  return absl::InvalidArgumentError(absl::StrCat(path, ":", line.number, ": expected ", wanted,
                                                 ", found \"", line.text.substr(0, 60), "\""));
}

bool ReadTokens(absl::string_view text, int32_t& tokens) {
  return absl::SimpleAtoi(text, &tokens) && tokens >= 0 && tokens <= kTokensMax;
}

absl::StatusOr<std::vector<Arrival>> ReadAzure(const std::string& path,
                                               const std::vector<Line>& lines) {
  std::vector<Arrival> rows;
  absl::Time first;
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::vector<absl::string_view> fields = absl::StrSplit(lines[i].text, ',');
    absl::Time time;
    std::string error;
    Arrival row;
    if (fields.size() != 3 || !absl::ParseTime("%Y-%m-%d %H:%M:%E*S", fields[0], &time, &error) ||
        !ReadTokens(fields[1], row.prompt_tokens) || !ReadTokens(fields[2], row.output_tokens)) {
      return BadLine(path, lines[i], kAzureHeader);
    }
    if (rows.empty()) first = time;
    row.at = time - first;
    rows.push_back(row);
  }
  return rows;
}

absl::StatusOr<std::vector<Arrival>> ReadMooncake(const std::string& path,
                                                  const std::vector<Line>& lines) {
  std::vector<Arrival> rows;
  for (const Line& line : lines) {
    CINNABAR_ASSIGN_OR_RETURN(const nlohmann::json json,
                              ParseJson(line.text, absl::StrCat(path, ":", line.number)));
    if (!json.is_object()) return BadLine(path, line, "a JSON object");
    JsonFields fields(json, absl::StrCat(path, ":", line.number));
    Arrival row;
    row.at = absl::Milliseconds(fields.Number("timestamp", 0.0, 1e13));
    row.prompt_tokens = static_cast<int32_t>(fields.Int("input_length", 0, kTokensMax));
    row.output_tokens = static_cast<int32_t>(fields.Int("output_length", 0, kTokensMax));
    CINNABAR_RETURN_IF_ERROR(fields.status());
    rows.push_back(row);
  }
  return rows;
}

absl::StatusOr<std::vector<Arrival>> ReadDeltas(const std::string& path,
                                                const std::vector<Line>& lines) {
  std::vector<Arrival> rows;
  absl::Duration at;
  for (const Line& line : lines) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line.text, ',');
    int32_t delta_ms = 0;
    Arrival row;
    if (fields.size() != 3 || !ReadTokens(fields[0], delta_ms) ||
        !ReadTokens(fields[1], row.prompt_tokens) || !ReadTokens(fields[2], row.output_tokens)) {
      return BadLine(path, line, "delta_ms,context,generated");
    }
    at += absl::Milliseconds(delta_ms);
    row.at = at;
    rows.push_back(row);
  }
  return rows;
}

// A renewal process in each window: gaps of the kind and with the parameters that the line gives.
absl::StatusOr<std::vector<Arrival>> DrawServeGen(const std::string& path,
                                                  const std::vector<Line>& lines, uint64_t seed,
                                                  int32_t tenant) {
  std::vector<Arrival> rows;
  std::mt19937_64 random(seed);
  for (const Line& line : lines) {
    const std::vector<std::string> fields = absl::StrSplit(line.text, ',');
    double start = 0.0;
    double rate = 0.0;
    if (fields.size() != 6 || !absl::SimpleAtod(fields[0], &start) ||
        !absl::SimpleAtod(fields[1], &rate) || start < 0.0 || rate > 1e6) {
      return BadLine(path, line, "window_start_s,rate_rps,cv,pattern,a,b");
    }
    if (!(rate > 0.0)) continue;
    double shape = 0.0;
    double scale = 0.0;
    const bool gamma = fields[3] == "Gamma";
    const bool weibull = fields[3] == "Weibull";
    if ((gamma || weibull) &&
        (!absl::SimpleAtod(fields[4], &shape) || !absl::SimpleAtod(fields[5], &scale) ||
         !(shape > 0.0) || !(scale > 0.0))) {
      return BadLine(path, line, "two parameters above 0");
    }
    std::gamma_distribution<double> gamma_gap(gamma ? shape : 1.0, gamma ? scale : 1.0);
    std::weibull_distribution<double> weibull_gap(weibull ? shape : 1.0, weibull ? scale : 1.0);
    std::exponential_distribution<double> exponential_gap(rate);
    for (double now = start;;) {
      now += gamma ? gamma_gap(random) : weibull ? weibull_gap(random) : exponential_gap(random);
      if (!(now < start + kServeGenWindowSeconds)) break;
      if (rows.size() == kRowsMax) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": over ", kRowsMax, " arrivals"));
      }
      rows.push_back({.at = absl::Seconds(now), .tenant = tenant});
    }
  }
  return rows;
}

absl::StatusOr<std::vector<Arrival>> ReadServeGenFolder(const std::string& folder, uint64_t seed) {
  std::vector<std::string> paths;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().extension() == ".csv") paths.push_back(entry.path().string());
  }
  if (error || paths.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(folder, ": a folder without .csv files"));
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Arrival> rows;
  for (size_t i = 0; i < paths.size(); ++i) {
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<Line> lines, ReadLines(paths[i]));
    CINNABAR_ASSIGN_OR_RETURN(
        const std::vector<Arrival> more,
        DrawServeGen(paths[i], lines, seed + 1000 * i, static_cast<int32_t>(i)));
    rows.insert(rows.end(), more.begin(), more.end());
  }
  return rows;
}

absl::StatusOr<std::vector<Arrival>> ReadFile(const std::string& path, uint64_t seed) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<Line> lines, ReadLines(path));
  const std::string& first = lines[0].text;
  if (first == kAzureHeader) return ReadAzure(path, lines);
  if (first[0] == '{') return ReadMooncake(path, lines);
  switch (std::count(first.begin(), first.end(), ',')) {
    case 2:
      return ReadDeltas(path, lines);
    case 5:
      return DrawServeGen(path, lines, seed, 0);
    default:
      return BadLine(path, lines[0],
                     "a trace of Azure, Mooncake or ServeGen, or lines of three numbers");
  }
}

}  // namespace

std::unique_ptr<ArrivalSchedule> MakeRateSchedule(double rate, ArrivalKind kind, uint64_t seed) {
  CINNABAR_CHECK(rate > 0.0);
  return std::make_unique<RateSchedule>(rate, kind, seed);
}

std::unique_ptr<ArrivalSchedule> MakeTraceSchedule(std::vector<Arrival> rows, double time_scale,
                                                   bool repeat) {
  CINNABAR_CHECK(time_scale > 0.0);
  return std::make_unique<TraceSchedule>(std::move(rows), time_scale, repeat);
}

absl::StatusOr<std::vector<Arrival>> ReadTrace(const std::string& path, uint64_t seed) {
  std::error_code ignored;
  absl::StatusOr<std::vector<Arrival>> rows = std::filesystem::is_directory(path, ignored)
                                                  ? ReadServeGenFolder(path, seed)
                                                  : ReadFile(path, seed);
  if (!rows.ok()) return rows.status();
  if (rows->empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": a trace without requests"));
  }
  std::stable_sort(rows->begin(), rows->end(),
                   [](const Arrival& a, const Arrival& b) { return a.at < b.at; });
  const absl::Duration first = rows->front().at;
  for (Arrival& row : *rows) row.at -= first;
  return rows;
}

int32_t CanvasForOutput(int32_t output_tokens) {
  const auto wanted = static_cast<uint32_t>(std::clamp(output_tokens, 1, kTokensMax));
  return static_cast<int32_t>((std::bit_ceil(wanted) + 31) / 32 * 32);
}

}  // namespace cinnabar
