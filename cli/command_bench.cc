#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/arrivals.h"
#include "cli/commands.h"
#include "cli/load_generator.h"
#include "cli/terminal.h"
#include "common/base/json.h"
#include "common/base/status.h"
#include "common/config/flags.h"

namespace cinnabar {
namespace {

using Json = nlohmann::json;

std::atomic<bool> interrupted{false};

struct BenchFlags {
  std::string url;
  std::string key_file;
  std::string ca_file;
  std::string trace;
  float rate = 0.0F;
  int32_t concurrency = 0;
  bool uniform = false;
  float time_scale = 1.0F;
  bool repeat = false;
  float seconds = 30.0F;
  float warmup = 0.0F;
  float drain = 30.0F;
  std::string model;
  std::string endpoint = "completions";
  std::string prompt;
  int32_t prompt_tokens = 64;
  int32_t canvas_tokens = 64;
  int32_t steps = 0;
  std::string sampler;
  std::string priority;
  std::string body;
  bool stream = false;
  float deadline = 0.0F;
  float timeout = 120.0F;
  int32_t in_flight_max = 8192;
  uint64_t seed = 1;
  bool json = false;

  void Register(FlagSet& flags);
};

void BenchFlags::Register(FlagSet& flags) {
  flags.Add("url", &url, "URL", "the gateway: http://127.0.0.1:8080");
  flags.Add("key-file", &key_file, "FILE",
            "API keys, one a line: one tenant each, in turn [CINNABAR_API_KEY]");
  flags.Add("ca-file", &ca_file, "FILE", "certificates to trust, for https");
  flags.Section("How much (one of --rate, --trace, --concurrency)");
  flags.Add("rate", &rate, "R", "requests a second, at random moments (Poisson)");
  flags.Add("uniform", &uniform, "with --rate: at even distances instead");
  flags.Add("trace", &trace, "FILE",
            "arrivals and lengths of a recorded trace: Azure CSV, Mooncake JSONL, ServeGen CSV or "
            "folder");
  flags.Add("time-scale", &time_scale, "F", "with --trace: F times as fast as it was recorded");
  flags.Add("repeat", &repeat, "with --trace: from the start again at its end");
  flags.Add(
      "concurrency", &concurrency, "C",
      "always C in flight, the next when one ends (closed loop: a slow server is asked less)");
  flags.Add("seconds", &seconds, "S", "length of the measurement; a trace may end before");
  flags.Add("warmup", &warmup, "S", "before it: sent, not counted");
  flags.Add("drain", &drain, "S", "after it: how long to wait for answers");
  flags.Section("What");
  flags.Add("model", &model, "NAME", "default: the first that the gateway lists");
  flags.Add("endpoint", &endpoint, "NAME", "completions, fim or chat");
  flags.Add("prompt", &prompt, "TEXT", "the same for all; default: words, others each time");
  flags.Add("prompt-tokens", &prompt_tokens, "N", "about so many; with --trace at most so many");
  flags.Add("canvas-tokens", &canvas_tokens, "N", "max_tokens; with --trace at most so many");
  flags.Add("steps", &steps, "N", "denoising steps; default one for two tokens of the canvas");
  flags.Add("sampler", &sampler, "NAME", "default: the model's own");
  flags.Add("priority", &priority, "CLASS", "interactive, standard, batch, or mix of the three");
  flags.Add("body", &body, "JSON",
            "more fields of the body, {\"temperature\": 0}; null takes one out");
  flags.Add("stream", &stream, "ask for a stream, and measure the time to its first text");
  flags.Add("deadline", &deadline, "S", "sent with each request; goodput is what meets it");
  flags.Add("timeout", &timeout, "S", "then a request is given up");
  flags.Add("in-flight-max", &in_flight_max, "N", "more wait in the client; their latency runs on");
  flags.Add("seed", &seed, "N", "of arrivals, prompts and classes");
  flags.Section("Output");
  flags.Add("json", &json, "one JSON object; times in seconds");
  flags.Examples(
      "Latency counts from the moment when a request was due, so a server that stalls cannot hide "
      "it.\n\n"
      "examples:\n"
      "  cinnabar bench load --url http://127.0.0.1:8080 --rate 50 --seconds 60 --stream "
      "--deadline 2\n"
      "  cinnabar bench load --url http://127.0.0.1:8080 --concurrency 32 --canvas-tokens 128\n"
      "  cinnabar bench load --url http://127.0.0.1:8080 --trace AzureLLMInferenceTrace_code.csv "
      "--time-scale 2 --prompt-tokens 1024\n");
}

absl::Status CheckFlags(const BenchFlags& flags, const FlagSet& set) {
  if (flags.url.empty()) {
    return absl::InvalidArgumentError(
        "--url is missing: name a gateway, http://127.0.0.1:8080 (`cinnabar up` starts one)");
  }
  const int32_t loads = set.Has("rate") + set.Has("trace") + set.Has("concurrency");
  if (loads != 1) {
    return absl::InvalidArgumentError(
        loads == 0 ? "say how much: one of --rate, --trace, --concurrency"
                   : "--rate, --trace and --concurrency exclude each other; keep one");
  }
  const auto above_zero = [&](const char* name, double value) {
    return !set.Has(name) || value > 0.0
               ? absl::OkStatus()
               : absl::InvalidArgumentError(absl::StrCat("--", name, ": take more than 0"));
  };
  for (const auto& [name, value] : std::initializer_list<std::pair<const char*, double>>{
           {"rate", flags.rate},
           {"concurrency", flags.concurrency},
           {"time-scale", flags.time_scale},
           {"seconds", flags.seconds},
           {"prompt-tokens", flags.prompt_tokens},
           {"canvas-tokens", flags.canvas_tokens},
           {"steps", flags.steps},
           {"deadline", flags.deadline},
           {"timeout", flags.timeout},
           {"in-flight-max", flags.in_flight_max}}) {
    CINNABAR_RETURN_IF_ERROR(above_zero(name, value));
  }
  for (const auto& [name, with] : std::initializer_list<std::pair<const char*, const char*>>{
           {"uniform", "rate"}, {"time-scale", "trace"}, {"repeat", "trace"}}) {
    if (set.Has(name) && !set.Has(with)) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " goes with --", with));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<LoadOptions> MakeOptions(const BenchFlags& flags, const FlagSet& set) {
  CINNABAR_RETURN_IF_ERROR(CheckFlags(flags, set));
  LoadOptions options;
  CINNABAR_ASSIGN_OR_RETURN(options.url, ParseHttpUrl(flags.url), "--url");
  options.ca_file = flags.ca_file;
  CINNABAR_ASSIGN_OR_RETURN(options.api_keys, FindApiKeys(flags.key_file));
  if (flags.endpoint == "fim") {
    options.endpoint = ApiEndpoint::kFim;
  } else if (flags.endpoint == "chat") {
    options.endpoint = ApiEndpoint::kChat;
  } else if (flags.endpoint != "completions") {
    return absl::InvalidArgumentError(
        absl::StrCat("--endpoint ", flags.endpoint, ": take completions, fim or chat"));
  }
  const bool known_class = flags.priority.empty() || flags.priority == "mix" ||
                           std::count(kLoadClasses.begin(), kLoadClasses.end(), flags.priority) > 0;
  if (!known_class) {
    return absl::InvalidArgumentError(
        absl::StrCat("--priority ", flags.priority, ": take interactive, standard, batch or mix"));
  }
  if (!flags.body.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(options.body, ParseJson(flags.body, "--body"));
    if (!options.body.is_object()) {
      return absl::InvalidArgumentError("--body: expected a JSON object, {\"temperature\": 0}");
    }
  }
  if (set.Has("sampler")) options.body["diffusion"]["sampler"] = flags.sampler;
  if (set.Has("model")) options.body["model"] = flags.model;
  options.prompt = flags.prompt;
  const bool bounded = !set.Has("trace");
  options.prompt_tokens = bounded || set.Has("prompt-tokens") ? flags.prompt_tokens : 1 << 24;
  options.canvas_tokens = bounded || set.Has("canvas-tokens") ? flags.canvas_tokens : 1 << 24;
  options.steps = flags.steps;
  options.stream = flags.stream;
  options.priority = flags.priority;
  if (set.Has("deadline")) options.deadline = absl::Seconds(flags.deadline);
  options.timeout = absl::Seconds(flags.timeout);
  options.concurrency = flags.concurrency;
  options.warmup = absl::Seconds(flags.warmup);
  options.duration = absl::Seconds(flags.seconds);
  options.drain = absl::Seconds(flags.drain);
  options.in_flight_max = flags.in_flight_max;
  options.seed = flags.seed;
  return options;
}

// The model that is asked, and that the gateway answers at all.
absl::Status FindModel(LoadOptions& options) {
  if (options.body.contains("model")) return absl::OkStatus();
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<HttpClient> client,
                            HttpClient::Make(options.url, {.ca_file = options.ca_file}));
  CINNABAR_ASSIGN_OR_RETURN(
      options.body["model"],
      FindFirstModel(*client, options.api_keys.empty() ? "" : options.api_keys[0]));
  return absl::OkStatus();
}

// As many sockets as the system allows, and no more requests in flight than that.
void RaiseFileLimit(LoadOptions& options) {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  getrlimit(RLIMIT_NOFILE, &limit);
  const auto room = static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, 1 << 20)) - 64;
  options.in_flight_max = static_cast<int32_t>(
      std::clamp<int64_t>(options.in_flight_max, 1, std::max<int64_t>(1, room)));
}

std::string Seconds(absl::Duration duration) {
  return ShowSeconds(absl::ToDoubleSeconds(duration));
}

// Empty without samples.
std::string LatencyLine(const char* name, const LatencyHistogram& histogram) {
  if (histogram.count() == 0) return "";
  return absl::StrFormat("%-15sp50 %s   p90 %s   p95 %s   p99 %s   max %s\n", name,
                         Seconds(histogram.Percentile(50)), Seconds(histogram.Percentile(90)),
                         Seconds(histogram.Percentile(95)), Seconds(histogram.Percentile(99)),
                         Seconds(histogram.max()));
}

std::string Describe(const BenchFlags& flags, const LoadOptions& options) {
  std::string load;
  if (!flags.trace.empty()) {
    load = absl::StrFormat("%s at %gx", flags.trace, flags.time_scale);
  } else if (flags.concurrency > 0) {
    load = absl::StrCat(flags.concurrency, " at a time (closed loop)");
  } else {
    load = absl::StrFormat("%g requests/s (%s)", flags.rate, flags.uniform ? "even" : "Poisson");
  }
  return absl::StrFormat(
      "%s%s   %s   %s for %s%s\n", options.url.ToString(),
      ApiPath({}, EndpointPath(options.endpoint)),
      Printable(options.body["model"].is_string() ? options.body["model"].get<std::string>() : "?"),
      load, Seconds(options.duration),
      flags.warmup > 0 ? absl::StrCat(" after ", Seconds(options.warmup)) : "");
}

std::string Render(const LoadOptions& options, const LoadReport& report) {
  const double span = std::max(report.seconds, 1e-9);
  const auto share = [](int64_t part, int64_t whole) {
    return whole > 0 ? 100.0 * static_cast<double>(part) / static_cast<double>(whole) : 0.0;
  };
  std::string text;
  absl::StrAppendFormat(&text, "%-15s%s due   %s ok   %s failed   %s ok/s\n", "requests",
                        ShowWhole(report.num_due), ShowWhole(report.num_ok),
                        ShowWhole(report.num_failed()),
                        ShowCount(static_cast<double>(report.num_ok) / span));
  if (options.deadline) {
    absl::StrAppendFormat(&text, "%-15s%s within %s (%.1f%% of those due)   %s/s\n", "goodput",
                          ShowWhole(report.num_in_deadline), Seconds(*options.deadline),
                          share(report.num_in_deadline, report.num_due),
                          ShowCount(static_cast<double>(report.num_in_deadline) / span));
  }
  absl::StrAppendFormat(&text, "%-15s%s answered   %s tokens/s", "tokens",
                        ShowWhole(report.completion_tokens),
                        ShowCount(static_cast<double>(report.completion_tokens) / span));
  if (report.forwards > 0) {
    absl::StrAppendFormat(&text, "   %.2f tokens per forward   %s forwards",
                          report.tokens_committed / static_cast<double>(report.forwards),
                          ShowWhole(report.forwards));
  }
  absl::StrAppendFormat(&text, "   %s prompt tokens\n", ShowWhole(report.prompt_tokens));
  if (report.price_dollars > 0) {
    absl::StrAppendFormat(
        &text, "%-15s$%.6f   $%.4f a million answered tokens\n", "price", report.price_dollars,
        1e6 * report.price_dollars / std::max(1.0, static_cast<double>(report.completion_tokens)));
  }
  text += LatencyLine("latency", report.latency);
  for (size_t i = 0; i < kLoadClasses.size(); ++i) {
    text += LatencyLine(absl::StrCat("  ", kLoadClasses[i]).c_str(), report.latency_of_class[i]);
  }
  if (options.stream) text += LatencyLine("first text", report.first_partial);
  if (report.queue.max() > absl::ZeroDuration()) text += LatencyLine("queue wait", report.queue);
  const char* heading = "errors";
  for (const auto& [name, error] : report.errors) {
    absl::StrAppendFormat(&text, "%-15s%s  %s%s%s\n", heading, ShowWhole(error.count),
                          Printable(name), error.message.empty() ? "" : ": ", error.message);
    heading = "";
  }
  absl::StrAppendFormat(
      &text, "%-15sat most %s in flight   %s connections   started late by %s (p99)\n", "client",
      ShowWhole(report.in_flight_peak), ShowWhole(report.connections_made),
      Seconds(report.lateness.Percentile(99)));
  if (report.num_held_back > 0) {
    absl::StrAppendFormat(&text,
                          "note: %s requests waited in the client for one of its %d places; their "
                          "latency counts that wait (--in-flight-max, ulimit -n)\n",
                          ShowWhole(report.num_held_back), options.in_flight_max);
  }
  if (report.interrupted) text += "note: interrupted; the figures are those up to then\n";
  return text;
}

absl::Status Load(const BenchFlags& flags, const FlagSet& set) {
  CINNABAR_ASSIGN_OR_RETURN(LoadOptions options, MakeOptions(flags, set));
  std::unique_ptr<ArrivalSchedule> schedule;
  if (set.Has("trace")) {
    CINNABAR_ASSIGN_OR_RETURN(std::vector<Arrival> rows, ReadTrace(flags.trace, flags.seed),
                              "--trace");
    schedule = MakeTraceSchedule(std::move(rows), flags.time_scale, flags.repeat);
  } else if (set.Has("rate")) {
    schedule = MakeRateSchedule(
        flags.rate, flags.uniform ? ArrivalKind::kUniform : ArrivalKind::kPoisson, flags.seed);
  }
  CINNABAR_RETURN_IF_ERROR(FindModel(options));
  RaiseFileLimit(options);

  struct sigaction action {};
  action.sa_handler = [](int) { interrupted.store(true); };
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // the second one ends the program
  sigaction(SIGINT, &action, nullptr);

  std::fputs(Describe(flags, options).c_str(), stderr);
  const bool live = isatty(STDERR_FILENO) != 0;
  const auto show = [&](const LoadProgress& progress) {
    const std::string line = absl::StrFormat(
        "%6s  %s due  %s ok  %s failed  %s in flight  %s/s  %s tokens/s  p50 %s  p99 %s",
        Seconds(absl::Seconds(absl::ToInt64Seconds(progress.elapsed))), ShowWhole(progress.num_due),
        ShowWhole(progress.num_ok), ShowWhole(progress.num_failed), ShowWhole(progress.in_flight),
        ShowCount(progress.ok_per_second), ShowCount(progress.tokens_per_second),
        Seconds(progress.p50), Seconds(progress.p99));
    if (live) {
      const int32_t columns = GetTerminalSize(STDERR_FILENO).columns;
      std::fprintf(stderr, "\r%s", FitLeft(line, columns - 1).c_str());
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
    std::fflush(stderr);
  };
  CINNABAR_ASSIGN_OR_RETURN(const LoadReport report,
                            RunLoad(options, schedule.get(), &interrupted, show));
  if (live) std::fputs("\r\033[K", stderr);
  if (flags.json) {
    Json json = report.ToJson();
    json["url"] = options.url.ToString();
    json["model"] = options.body["model"];
    std::printf("%s\n", json.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
  } else {
    std::fputs(Render(options, report).c_str(), stdout);
  }
  if (report.num_ok == 0 && report.num_due > 0) {
    return absl::UnavailableError(absl::StrCat(
        "none of ", report.num_due, " requests was answered",
        report.errors.empty() ? "" : absl::StrCat(" (", report.errors.begin()->first, ")")));
  }
  return absl::OkStatus();
}

}  // namespace

int RunBench(const std::vector<std::string>& args) {
  BenchFlags flags;
  FlagSet set(
      "cinnabar bench load --url URL (--rate R | --trace FILE | --concurrency C) [flags]",
      "Puts load on a running gateway and reports latency percentiles, goodput and tokens/s.");
  flags.Register(set);
  return RunCommand("bench", set, args, [&]() -> absl::Status {
    if (set.positional() != std::vector<std::string>{"load"}) {
      return absl::InvalidArgumentError(
          set.positional().empty()
              ? "say what to measure: cinnabar bench load"
              : absl::StrCat("no such benchmark \"", set.positional().back(), "\"; there is load"));
    }
    return Load(flags, set);
  });
}

}  // namespace cinnabar
