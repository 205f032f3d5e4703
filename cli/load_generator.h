// Load on a gateway, and what it answers: arrivals come when they are due, whatever has become of
// those before them, and latency counts from when a request was due. A server that stalls therefore
// shows its stall in the latencies, instead of slowing down those who measure it (coordinated
// omission).
#ifndef CINNABAR_CLI_LOAD_GENERATOR_H_
#define CINNABAR_CLI_LOAD_GENERATOR_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "cli/api_client.h"
#include "cli/arrivals.h"
#include "cli/http_client.h"
#include "cli/latency_histogram.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

inline constexpr std::array<absl::string_view, 3> kLoadClasses = {"interactive", "standard",
                                                                  "batch"};

struct LoadOptions {
  HttpUrl url;
  std::string ca_file;
  std::vector<std::string> api_keys;  // one tenant each; a trace's tenant, else in turn
  ApiEndpoint endpoint = ApiEndpoint::kCompletion;
  // Fields of every body; they win over what follows. Must hold "model".
  nlohmann::json body = nlohmann::json::object();
  std::string prompt;  // empty: words, about one token each, others for each request
  // With a trace these are the most that a request may have; else each has them.
  int32_t prompt_tokens = 128;
  int32_t canvas_tokens = 64;
  int32_t steps = 0;  // 0: one for two tokens of the canvas
  bool stream = false;
  // "interactive", "standard", "batch"; "mix": half, 35%, 15%, by the seed; empty: not sent.
  std::string priority;
  std::optional<absl::Duration> deadline;  // sent, and what goodput is judged by
  absl::Duration timeout = absl::Seconds(120);

  int32_t concurrency = 0;  // > 0: so many at a time, the next when one ends (closed loop)
  absl::Duration warmup;    // arrivals in it are sent, and not counted
  absl::Duration duration = absl::Seconds(30);  // of counted arrivals, after the warm-up
  absl::Duration drain = absl::Seconds(30);     // for answers, after the last arrival
  int32_t in_flight_max = 8192;                 // more arrivals wait here; their latency runs on
  uint64_t seed = 1;
};

// Of the counted requests only.
struct LoadReport {
  double seconds = 0.0;  // from the end of the warm-up to the last answer, at least `duration`
  int64_t num_due = 0;
  int64_t num_ok = 0;
  int64_t num_in_deadline = 0;  // ok, within the deadline from when they were due
  // "429 rate_limit_exceeded", "connect", "timeout", "broken", "stream request_failed",
  // "unfinished"
  std::map<std::string, int64_t> errors;
  LatencyHistogram latency;        // of those that were ok, from when they were due
  LatencyHistogram first_partial;  // streams: until the first text or frame
  LatencyHistogram queue;          // what the gateway says they waited
  LatencyHistogram lateness;       // of the client itself: from due to sent
  std::array<LatencyHistogram, 3> latency_of_class;  // as kLoadClasses; with "mix"
  int64_t prompt_tokens = 0;                         // as the gateway counts them
  int64_t completion_tokens = 0;
  int64_t steps = 0;
  int64_t forwards = 0;
  double device_seconds = 0.0;
  double price_dollars = 0.0;
  int32_t in_flight_peak = 0;
  int64_t num_held_back = 0;  // due while in_flight_max were in flight
  int64_t connections_made = 0;
  bool interrupted = false;

  int64_t num_failed() const;
  nlohmann::json ToJson() const;
};

struct LoadProgress {
  absl::Duration elapsed;
  int64_t num_due = 0;  // all, with the warm-up
  int64_t num_ok = 0;
  int64_t num_failed = 0;
  int32_t in_flight = 0;
  // Since the last one, which was about a second ago.
  double ok_per_second = 0.0;
  double tokens_per_second = 0.0;
  absl::Duration p50, p99;
};

// Runs on the calling thread until all is answered or given up. `schedule` is read only without
// `concurrency`, and only up to warmup + duration. `stop` (may be null) ends it early, within 0.2
// s. Errors are those of setting up; what the gateway does is in the report.
absl::StatusOr<LoadReport> RunLoad(const LoadOptions& options, ArrivalSchedule* schedule,
                                   const std::atomic<bool>* stop,
                                   const std::function<void(const LoadProgress&)>& on_progress);

// The body of request `index`. Pure.
nlohmann::json MakeLoadBody(const LoadOptions& options, const Arrival& arrival, uint64_t index);
// Which of kLoadClasses request `index` has under "mix". Pure.
int32_t LoadClassOf(uint64_t seed, uint64_t index);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_LOAD_GENERATOR_H_
