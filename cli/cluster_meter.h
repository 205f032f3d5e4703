// What `cinnabar top` shows, worked out of looks at a cluster: what workers say in their beats,
// what the queue holds, what its feed reports as ended, what a gateway counts. Pure: time comes in.
#ifndef CINNABAR_CLI_CLUSTER_METER_H_
#define CINNABAR_CLI_CLUSTER_METER_H_

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "cinnabar/v1/work.pb.h"
#include "cli/metrics_text.h"
#include "common/queue/types.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

// Requests that ended, added up.
struct EndedRequests {
  int64_t done = 0, failed = 0, cancelled = 0, expired = 0;
  Usage useful;                      // of those that are done
  Usage wasted;                      // of the rest: computed for nobody
  void Add(const FeedEntry& entry);  // entries of other kinds do not count
  void Add(const EndedRequests& other);
};

struct ClusterLook {
  absl::Time at;
  QueueStats queue;
  std::vector<std::pair<std::string, v1::WorkerStatus>> workers;  // by boot
  EndedRequests ended;                                            // since the look before
  std::optional<MetricsText> gateway;
};

// Rates are over the meter's window; nullopt where nothing was measured yet.
struct WorkerFigures {
  std::string name, host, model, device;
  enum class State { kIdle, kBusy, kDraining, kGone } state = State::kIdle;
  int32_t rows = 0;
  int32_t rows_max = 0;
  int64_t positions = 0;  // of its rows, which a step computes
  std::optional<double> step_seconds;
  std::optional<double> busy_ratio;
  std::optional<double> tokens_per_second;
  std::optional<double> forwards_per_second;  // of the whole batch
  std::optional<double> tokens_per_forward;   // of one request
  double dollars_per_hour = 0.0;
};

struct GatewayFigures {
  double streams = 0.0;
  std::optional<double> requests_per_second;
  std::optional<double> refused_per_second;
  std::optional<double> p50_seconds, p99_seconds;  // of whole requests
  std::optional<double> first_p50_seconds;         // to the first step
  std::optional<double> price_dollars_per_second;  // what is charged
};

struct ClusterFigures {
  absl::Time at;
  QueueStats queue;
  std::vector<WorkerFigures> workers;  // by name; those gone for a while are left out
  int64_t rows = 0;                    // of all workers
  int64_t rows_max = 0;
  std::optional<double> tokens_per_second;
  std::optional<double> forwards_per_second;
  std::optional<double> tokens_per_forward;
  std::optional<double> busy_ratio;  // of all devices
  std::optional<double> done_per_second, failed_per_second, cancelled_per_second,
      expired_per_second;
  std::optional<double> forwards_per_answer;  // NFE of those done
  // Of the device time of what ended, the share of what ended without an answer.
  std::optional<double> waste_ratio;
  double dollars_per_second = 0.0;  // of the workers that are there, busy or not
  std::optional<double> dollars_per_million_tokens;
  std::optional<GatewayFigures> gateway;
  std::vector<double> tokens_history;  // tokens per second of each look, oldest first

  nlohmann::json ToJson() const;
};

absl::string_view WorkerStateName(WorkerFigures::State state);

class ClusterMeter {
 public:
  // A beat comes about once a second: a shorter window shows nothing.
  explicit ClusterMeter(absl::Duration window = absl::Seconds(5)) : window_(window) {}

  void Take(ClusterLook look);
  // Of the last look, which there must be.
  ClusterFigures Figures() const;
  // Each worker has said something twice, so that nothing is missing.
  bool Complete() const;

 private:
  // Of the oldest look of the window that knows this boot; null when that is the last beat itself.
  const v1::WorkerStatus* Before(const std::string& boot, const v1::WorkerStatus& now) const;
  WorkerFigures Worker(const std::string& boot, const v1::WorkerStatus& now) const;

  const absl::Duration window_;
  std::deque<ClusterLook> looks_;  // of the window, and one before it
  std::deque<double> history_;
  struct Seen {
    absl::Time at;
    v1::WorkerStatus status;
  };
  std::map<std::string, Seen> seen_;  // by worker's name
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_CLUSTER_METER_H_
