#include "tests/sim/scheduler/workload.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <fstream>
#include <limits>
#include <random>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "common/base/philox.h"
#include "common/base/status.h"
#include "nlohmann/json.hpp"

namespace cinnabar::sim {
namespace {

// Shares of the sixteen busiest of ServeGen's deepseek-r1 clients (requests over the day;
// Apache-2.0, arXiv 2505.09999); they make 80% of all requests and are normalised here.
constexpr double kServeGenShares[] = {0.2859, 0.0786, 0.0668, 0.0492, 0.0442, 0.0406,
                                      0.0347, 0.0298, 0.0239, 0.0236, 0.0236, 0.0220,
                                      0.0202, 0.0194, 0.0188, 0.0183};
constexpr int32_t kNumTenants = 16;

// What a hash is for.
enum Purpose : uint64_t { kClass = 1, kTenant, kSampler, kSteps, kDegrade };

struct Sampler {
  int32_t index;
  int32_t threshold_percent;
  double share;
  double fraction;  // of the budget used by a full canvas; 1: a fixed schedule, always all of it
};
constexpr Sampler kSamplers[] = {{0, 0, 0.4, 1.0}, {1, 90, 0.4, 0.6}, {1, 95, 0.2, 0.8}};
constexpr int32_t kTokensPerStep = 2;

absl::StatusOr<std::vector<std::string>> ReadLines(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (!line.empty() && line[0] != '#') lines.push_back(line);
  }
  return lines;
}

absl::Status BadLine(const std::string& path, const std::string& line) {
  return absl::DataLossError(absl::StrCat(path, ": cannot read \"", line, "\""));
}

}  // namespace

double HashUniform(uint64_t seed, uint64_t what, uint64_t index) {
  const PhiloxWords words =
      Philox4x32({{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                   static_cast<uint32_t>(what), 0}},
                 static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return UniformFromWord(words.word[0]);
}

double HashNormal(uint64_t seed, uint64_t what, uint64_t index) {
  const double radius = std::sqrt(-2.0 * std::log(HashUniform(seed, what, index)));
  return radius * std::cos(2.0 * M_PI * HashUniform(seed, what + 1000, index));
}

absl::StatusOr<std::vector<TraceRow>> ReadFixture(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> lines, ReadLines(path),
                            "read the fixture");
  std::vector<TraceRow> rows;
  int64_t milliseconds = 0;
  for (const std::string& line : lines) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, ',');
    int64_t delta = 0;
    TraceRow row;
    if (fields.size() != 3 || !absl::SimpleAtoi(fields[0], &delta) ||
        !absl::SimpleAtoi(fields[1], &row.context_tokens) ||
        !absl::SimpleAtoi(fields[2], &row.generated_tokens)) {
      return BadLine(path, line);
    }
    milliseconds += delta;
    row.arrival_seconds = static_cast<double>(milliseconds) * 1e-3;
    rows.push_back(row);
  }
  return rows;
}

absl::StatusOr<std::vector<TraceRow>> ReadAzure(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> lines, ReadLines(path),
                            "read the trace");
  std::vector<TraceRow> rows;
  absl::Time first;
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::vector<absl::string_view> fields = absl::StrSplit(lines[i], ',');
    absl::Time time;
    std::string error;
    TraceRow row;
    if (fields.size() != 3 || !absl::ParseTime("%Y-%m-%d %H:%M:%E*S", fields[0], &time, &error) ||
        !absl::SimpleAtoi(fields[1], &row.context_tokens) ||
        !absl::SimpleAtoi(fields[2], &row.generated_tokens)) {
      return BadLine(path, lines[i]);
    }
    if (i == 1) first = time;
    row.arrival_seconds = absl::ToDoubleSeconds(time - first);
    rows.push_back(row);
  }
  return rows;
}

absl::StatusOr<std::vector<TraceRow>> ReadMooncake(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> lines, ReadLines(path),
                            "read the trace");
  std::vector<TraceRow> rows;
  for (const std::string& line : lines) {
    const nlohmann::json json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || !json.contains("timestamp")) return BadLine(path, line.substr(0, 80));
    rows.push_back({json["timestamp"].get<double>() * 1e-3, json["input_length"].get<int32_t>(),
                    json["output_length"].get<int32_t>(), -1});
  }
  std::stable_sort(rows.begin(), rows.end(), [](const TraceRow& a, const TraceRow& b) {
    return a.arrival_seconds < b.arrival_seconds;
  });
  return rows;
}

absl::StatusOr<std::vector<TraceRow>> ReadServeGen(const std::string& folder,
                                                   const std::vector<TraceRow>& lengths,
                                                   uint64_t seed) {
  constexpr int kClients = 73;
  constexpr double kFrom = 12 * 3600.0;
  constexpr double kSpan = 1200.0;
  constexpr double kWindow = 600.0;
  struct Client {
    double requests = 0.0;  // over the day
    std::vector<double> arrivals;
  };
  std::vector<Client> clients(kClients);
  for (int index = 0; index < kClients; ++index) {
    const std::string path = absl::StrCat(folder, "/chunk-", index, "-trace.csv");
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<std::string> lines, ReadLines(path),
                              "read the trace");
    Client& client = clients[static_cast<size_t>(index)];
    std::mt19937_64 random(seed * 1000 + static_cast<uint64_t>(index));
    for (const std::string& line : lines) {
      const std::vector<std::string> fields = absl::StrSplit(line, ',');
      double start = 0;
      double rate = 0;
      double shape = 0;
      double scale = 0;
      if (fields.size() != 6 || !absl::SimpleAtod(fields[0], &start) ||
          !absl::SimpleAtod(fields[1], &rate) || !absl::SimpleAtod(fields[4], &shape) ||
          !absl::SimpleAtod(fields[5], &scale)) {
        return BadLine(path, line);
      }
      client.requests += rate * kWindow;
      if (start < kFrom || start >= kFrom + kSpan || rate <= 0.0) continue;
      std::gamma_distribution<double> gamma(shape, scale);
      std::weibull_distribution<double> weibull(shape, scale);
      std::exponential_distribution<double> exponential(rate);
      double now = start;
      while (true) {
        now += fields[3] == "Gamma"     ? gamma(random)
               : fields[3] == "Weibull" ? weibull(random)
                                        : exponential(random);
        if (now >= start + kWindow) break;
        client.arrivals.push_back(now - kFrom);
      }
    }
  }
  std::stable_sort(clients.begin(), clients.end(),
                   [](const Client& a, const Client& b) { return a.requests > b.requests; });
  std::vector<TraceRow> rows;
  for (size_t rank = 0; rank < clients.size(); ++rank) {
    for (const double arrival : clients[rank].arrivals) {
      rows.push_back(
          {arrival, 0, 0, static_cast<int32_t>(std::min<size_t>(rank, kNumTenants - 1))});
    }
  }
  std::stable_sort(rows.begin(), rows.end(), [](const TraceRow& a, const TraceRow& b) {
    return a.arrival_seconds < b.arrival_seconds;
  });
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t pick = std::min(
        lengths.size() - 1,
        static_cast<size_t>(HashUniform(seed, 77, i) * static_cast<double>(lengths.size())));
    rows[i].context_tokens = lengths[pick].context_tokens;
    rows[i].generated_tokens = lengths[pick].generated_tokens;
  }
  return rows;
}

Workload MakeWorkload(const std::string& name, const std::vector<TraceRow>& rows,
                      const ClusterModel& cluster, const WorkloadOptions& options) {
  Workload workload;
  workload.trace = name;
  workload.load = options.load;
  workload.num_tenants = options.equal_tenants > 0 ? options.equal_tenants : kNumTenants;
  double shares_total = 0.0;
  for (const double share : kServeGenShares) shares_total += share;
  double work_seconds = 0.0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const TraceRow& row = rows[i];
    const auto uniform = [&](Purpose purpose) { return HashUniform(options.seed, purpose, i); };
    SimRequest out;
    PlanRequest& request = out.request;
    request.id = static_cast<RequestId>(i);
    const double class_draw = uniform(kClass);
    request.priority = class_draw < options.class_share[0] ? PriorityClass::kInteractive
                       : class_draw < options.class_share[0] + options.class_share[1]
                           ? PriorityClass::kStandard
                           : PriorityClass::kBatch;
    const double tenant_draw = uniform(kTenant);
    if (options.equal_tenants > 0) {
      request.tenant = static_cast<TenantIndex>(tenant_draw * options.equal_tenants);
    } else if (row.tenant >= 0) {
      request.tenant = row.tenant;
    } else {
      double below = 0.0;
      for (const double share : kServeGenShares) {
        below += share / shares_total;
        if (tenant_draw < below || request.tenant == kNumTenants - 1) break;
        ++request.tenant;
      }
    }
    // max_tokens is the next power of two, the canvas that rounded up to a block of 32.
    const int32_t generated = std::max(1, row.generated_tokens);
    const int32_t max_tokens =
        static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(generated)));
    request.canvas_tokens = (max_tokens + 31) / 32 * 32;
    request.sequence_tokens = std::max(1, row.context_tokens) + request.canvas_tokens;
    if (request.sequence_tokens > cluster.tokens_max) continue;  // the gateway would not admit it
    request.steps_budget = request.canvas_tokens / kTokensPerStep;
    double sampler_draw = uniform(kSampler);
    const Sampler* sampler = &kSamplers[0];
    for (const Sampler& candidate : kSamplers) {
      sampler = &candidate;
      if (sampler_draw < candidate.share) break;
      sampler_draw -= candidate.share;
    }
    request.kind = {
        .model = 0, .sampler = sampler->index, .threshold_percent = sampler->threshold_percent};
    double fraction = sampler->fraction;
    if (fraction < 1.0) {
      // A canvas that ends early (end of text) commits its rest at once; the spread is the
      // content's.
      const double filled = static_cast<double>(generated) / request.canvas_tokens;
      fraction *= (0.35 + 0.65 * filled) * std::exp(0.25 * HashNormal(options.seed, kSteps, i));
    }
    out.true_steps = std::clamp(static_cast<int32_t>(std::ceil(fraction * request.steps_budget)), 1,
                                request.steps_budget);
    if (uniform(kDegrade) < options.degrade_share)
      request.steps_min = (request.steps_budget + 1) / 2;
    out.generated_tokens = generated;
    out.arrival_seconds = row.arrival_seconds;
    const double rows_full = std::max(
        1.0, std::min<double>(
                 cluster.rows_max,
                 std::floor(static_cast<double>(cluster.tokens_target) / request.sequence_tokens)));
    work_seconds += out.true_steps *
                    cluster.StepSeconds(rows_full, rows_full * request.sequence_tokens) / rows_full;
    workload.requests.push_back(out);
  }
  const double trace_span = rows.back().arrival_seconds - rows.front().arrival_seconds;
  workload.span_seconds = work_seconds / cluster.num_workers / options.load;
  workload.time_scale = trace_span / workload.span_seconds;
  RequestId id = 0;
  for (SimRequest& out : workload.requests) {
    PlanRequest& request = out.request;
    request.id = id++;
    out.arrival_seconds =
        (out.arrival_seconds - rows.front().arrival_seconds) / workload.time_scale;
    const size_t lane = static_cast<size_t>(request.priority);
    out.deadline_seconds =
        out.arrival_seconds + options.deadline_fixed_seconds[lane] +
        options.deadline_step_seconds[lane] * options.deadline_step_scale * request.steps_budget;
    if (options.batch_without_deadline && request.priority == PriorityClass::kBatch) {
      out.deadline_seconds = std::numeric_limits<double>::infinity();
    }
    request.arrival = absl::UnixEpoch() + absl::Seconds(out.arrival_seconds);
    request.deadline = absl::UnixEpoch() + absl::Seconds(out.deadline_seconds);
  }
  return workload;
}

}  // namespace cinnabar::sim
