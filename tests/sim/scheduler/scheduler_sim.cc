// Runs the scheduler against its baselines on recorded traces, and writes what came out.
//   scheduler_sim [--fixture FILE] [--traces FOLDER] [--out FOLDER] [--seed N] [--loads
//   0.5,1,1.5,3] [--no-bound]
// Without --traces it runs the committed fixture (the Azure code trace). With --out it rewrites the
// results in FOLDER/README.md, between the lines "<!-- simulation -->" and "<!-- /simulation -->",
// and the plots beside it.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "common/base/status.h"
#include "tests/sim/scheduler/policies.h"
#include "tests/sim/scheduler/report.h"
#include "tests/sim/scheduler/simulation.h"
#include "tests/sim/scheduler/workload.h"

namespace cinnabar::sim {
namespace {

struct Trace {
  std::string name;
  std::string title;
  std::vector<TraceRow> rows;
  double deadline_step_scale = 1.0;
};

struct Flags {
  std::string fixture = "tests/sim/scheduler/fixtures/azure_code.csv";
  std::string traces;
  std::string out;
  uint64_t seed = 1;
  std::vector<double> loads = {0.5, 1.0, 1.5, 3.0};
  bool bound = true;
};

void PrintOutcome(const Outcome& o) {
  std::printf(
      "  %-14s goodput %6.3f/s  in time %5.1f%%  useful %5.1f%%  interactive wait "
      "%5.2f/%5.1f/%5.1f  waste "
      "%4.1f%%+%4.1f%%  jain %.3f/%.3f  refused %lld expired %lld+%lld degraded %lld  cell %.2f "
      "size %.2f  "
      "waiting %lld  %5.0f us a decision\n",
      o.policy.c_str(), o.goodput_per_second, 100 * o.goodput_share, 100 * o.useful_share,
      o.wait[0].p50, o.wait[0].p95, o.wait[0].p99, 100 * o.padding_waste, 100 * o.discarded_waste,
      o.jain, o.jain_requests, static_cast<long long>(o.refused),
      static_cast<long long>(o.expired_waiting), static_cast<long long>(o.expired_running),
      static_cast<long long>(o.degraded), o.worst_cell, o.worst_size,
      static_cast<long long>(o.waiting_max), 1e6 * o.decide_seconds);
  std::fflush(stdout);
}

absl::StatusOr<std::vector<Trace>> ReadTraces(const Flags& flags) {
  std::vector<Trace> traces;
  if (flags.traces.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<TraceRow> rows, ReadFixture(flags.fixture),
                              "fixture");
    traces.push_back({"azure-code", "Azure 2023, code", rows, 1.0});
    return traces;
  }
  const std::string& folder = flags.traces;
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<TraceRow> code,
                            ReadAzure(folder + "/AzureLLMInferenceTrace_code.csv"), "code");
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<TraceRow> conversation,
                            ReadAzure(folder + "/AzureLLMInferenceTrace_conv.csv"), "conversation");
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<TraceRow> mooncake,
                            ReadMooncake(folder + "/mooncake_conversation_trace.jsonl"),
                            "mooncake");
  CINNABAR_ASSIGN_OR_RETURN(
      const std::vector<TraceRow> servegen,
      ReadServeGen(folder + "/servegen_deepseek-r1", conversation, flags.seed), "servegen");
  traces.push_back({"azure-code", "Azure 2023, code", code, 1.0});
  traces.push_back({"azure-conv", "Azure 2023, conversation", conversation, 1.0});
  traces.push_back({"mooncake", "Mooncake, conversation", mooncake, 4.0});
  traces.push_back({"servegen", "ServeGen, deepseek-r1", servegen, 1.0});
  return traces;
}

// The results of one trace at one load: baselines, the best oracle, and ours.
std::vector<Outcome> RunLoad(const Workload& workload, const ClusterModel& cluster, uint64_t seed) {
  const SimulationOptions options = {.seed = seed};
  std::vector<Outcome> outcomes;
  outcomes.push_back(Simulate(workload, cluster, *MakeFcfsPolicy(), options));
  outcomes.push_back(Simulate(workload, cluster, *MakeBucketedFcfsPolicy(), options));
  outcomes.push_back(Simulate(workload, cluster, *MakePlannerPolicy(), options));
  outcomes.push_back(BestOracle(workload, cluster, options));
  for (const Outcome& outcome : outcomes) PrintOutcome(outcome);
  return outcomes;
}

std::string ReplaceSection(const std::string& text, const std::string& section) {
  const std::string begin = "<!-- simulation -->\n";
  const std::string end = "<!-- /simulation -->";
  const size_t from = text.find(begin);
  const size_t to = text.find(end);
  if (from == std::string::npos || to == std::string::npos) return "";
  return text.substr(0, from + begin.size()) + section + text.substr(to);
}

int Main(const Flags& flags) {
  const absl::StatusOr<std::vector<Trace>> traces = ReadTraces(flags);
  if (!traces.ok()) {
    std::fprintf(stderr, "%s\n", traces.status().ToString().c_str());
    return 1;
  }
  const ClusterModel cluster;
  std::vector<Outcome> all;
  std::map<std::pair<std::string, double>, double> bounds;
  std::string section = absl::StrFormat(
      "Seed %d; 4 workers; every figure from one run of the program.\n", flags.seed);
  for (const Trace& trace : *traces) {
    for (const double load : flags.loads) {
      const Workload workload = MakeWorkload(
          trace.name, trace.rows, cluster,
          {.seed = flags.seed, .load = load, .deadline_step_scale = trace.deadline_step_scale});
      std::printf("%s at %gx: %zu requests in %.0f s (time scale %.3f)\n", trace.name.c_str(), load,
                  workload.requests.size(), workload.span_seconds, workload.time_scale);
      for (const Outcome& outcome : RunLoad(workload, cluster, flags.seed)) all.push_back(outcome);
      if (flags.bound && trace.name == "azure-code") {
        bounds[{trace.name, load}] = RelaxedBound(workload, cluster) / workload.span_seconds;
        std::printf("  relaxed bound  goodput %6.3f/s\n", bounds[{trace.name, load}]);
      }
    }
    absl::StrAppend(&section, "\n**", trace.title, "**\n\n", TableOf(all, trace.name));
    if (!bounds.empty() && trace.name == "azure-code") {
      absl::StrAppend(&section,
                      "\nRelaxed bound (no schedule can exceed it), requests in time a second:");
      for (const auto& [key, value] : bounds) {
        absl::StrAppend(&section, absl::StrFormat(" %.2f at %gx%s", value, key.second,
                                                  key == bounds.rbegin()->first ? ".\n" : ","));
      }
    }
  }

  // Equal tenants, and requests that allow fewer steps: the code trace at 1.5x and 3x.
  const auto variant = [&](const std::string& title, const WorkloadOptions& base) {
    absl::StrAppend(&section, "\n**", title, "**\n\n");
    std::vector<Outcome> outcomes;
    for (const double load : {1.5, 3.0}) {
      WorkloadOptions options = base;
      options.seed = flags.seed;
      options.load = load;
      const Workload workload = MakeWorkload("variant", traces->front().rows, cluster, options);
      std::printf("%s at %gx\n", title.c_str(), load);
      for (const Outcome& outcome : RunLoad(workload, cluster, flags.seed))
        outcomes.push_back(outcome);
    }
    absl::StrAppend(&section, TableOf(outcomes, "variant"));
  };
  variant("Azure 2023, code, eight equal tenants", {.equal_tenants = 8});
  variant(
      "Azure 2023, code, half of the requests may be lowered to half of their steps (the oracle "
      "does not use it)",
      {.degrade_share = 0.5});

  if (flags.out.empty()) return 0;
  const auto figure = [&](const std::string& title, const std::string& subtitle,
                          const std::string& y_label, bool log_y, auto value) {
    Figure out = {title, subtitle, y_label, log_y, {}};
    for (const Trace& trace : *traces) {
      Panel panel;
      panel.title = trace.title;
      panel.note = absl::StrCat(trace.rows.size(), " requests");
      const std::vector<Series> kinds = {{"cinnabar", "#c8372d", false, true, {}},
                                         {"oracle", "#24292f", true, false, {}},
                                         {"fcfs-bucketed", "#2f6fb3", false, false, {}},
                                         {"fcfs", "#9aa4af", false, false, {}}};
      for (Series series : kinds) {
        for (const Outcome& outcome : all) {
          if (outcome.trace == trace.name && outcome.policy == series.name) {
            series.points.emplace_back(outcome.load, value(outcome));
          }
        }
        panel.series.push_back(series);
      }
      // The strongest line is drawn last, over the others.
      std::rotate(panel.series.begin(), panel.series.begin() + 1, panel.series.end());
      out.panels.push_back(panel);
    }
    return SvgOf(out);
  };
  const std::map<std::string, std::string> files = {
      {"goodput.svg", figure("Goodput under load",
                             "Requests finished within their deadline; 1\u00d7 offers exactly "
                             "what four workers can compute",
                             "requests in time / s", false,
                             [](const Outcome& o) { return o.goodput_per_second; })},
      {"interactive_wait.svg",
       figure("Waiting of interactive requests",
              "99th percentile from arrival to the first "
              "denoising step, of those that ran",
              "seconds, log scale", true,
              [](const Outcome& o) { return std::max(0.01, o.wait[0].p99); })},
      {"waste.svg", figure("Computed waste",
                           "Positions computed as padding, or for requests that then missed their "
                           "deadline",
                           "% of positions computed", false,
                           [](const Outcome& o) { return 100.0 * o.ComputedWaste(); })},
      {"fairness.svg",
       figure("Fairness between tenants",
              "Jain\u2019s index of requests in time over the max-min fair "
              "share; sixteen tenants, the largest sends 36%",
              "1 is fair", false, [](const Outcome& o) { return o.jain_requests; })}};
  for (const auto& [name, svg] : files) std::ofstream(flags.out + "/" + name) << svg;
  std::ifstream readme(flags.out + "/README.md");
  const std::string before((std::istreambuf_iterator<char>(readme)),
                           std::istreambuf_iterator<char>());
  const std::string after = ReplaceSection(before, section);
  if (after.empty()) {
    std::fprintf(stderr, "%s/README.md has no place for the results\n", flags.out.c_str());
    return 1;
  }
  std::ofstream(flags.out + "/README.md") << after;
  return 0;
}

}  // namespace
}  // namespace cinnabar::sim

int main(int argc, char** argv) {
  cinnabar::sim::Flags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--no-bound") {
      flags.bound = false;
      continue;
    }
    const std::string value = i + 1 < argc ? argv[++i] : "";
    bool good = true;
    if (name == "--fixture") {
      flags.fixture = value;
    } else if (name == "--traces") {
      flags.traces = value;
    } else if (name == "--out") {
      flags.out = value;
    } else if (name == "--seed") {
      good = absl::SimpleAtoi(value, &flags.seed);
    } else if (name == "--loads") {
      flags.loads.clear();
      for (const std::string& text : std::vector<std::string>(absl::StrSplit(value, ','))) {
        double load = 0.0;
        good = good && absl::SimpleAtod(text, &load) && load > 0.0;
        flags.loads.push_back(load);
      }
    } else {
      good = false;
    }
    if (!good) {
      std::fprintf(stderr, "cannot read %s %s\n", name.c_str(), value.c_str());
      return 2;
    }
  }
  return cinnabar::sim::Main(flags);
}
