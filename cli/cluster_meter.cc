#include "cli/cluster_meter.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "common/base/check.h"

namespace cinnabar {
namespace {

using Json = nlohmann::json;

constexpr absl::Duration kGoneShown = absl::Seconds(30);
constexpr size_t kHistoryMax = 600;

std::optional<double> Ratio(double part, double whole) {
  return whole > 0.0 ? std::optional<double>(part / whole) : std::nullopt;
}

std::optional<double> Finite(double value) {
  return std::isfinite(value) ? std::optional<double>(value) : std::nullopt;
}

void AddUsage(Usage& total, const Usage& more) {
  total.output_tokens += more.output_tokens;
  total.forwards += more.forwards;
  total.device_us += more.device_us;
  total.energy_mj += more.energy_mj;
}

Json OrNull(const std::optional<double>& value) { return value ? Json(*value) : Json(); }

// What a gateway counted between two looks. A restart makes counters fall: then nothing is said.
GatewayFigures CompareGateways(const MetricsText* before, const MetricsText& now, double seconds) {
  GatewayFigures figures;
  figures.streams = now.Sum("cinnabar_gateway_open_streams");
  if (before == nullptr || !(seconds > 0.0)) return figures;
  const auto rate = [&](const char* name) {
    const double change = now.Sum(name) - before->Sum(name);
    return change >= 0.0 ? std::optional<double>(change / seconds) : std::nullopt;
  };
  const auto quantile = [&](const char* name, double share) {
    return Finite(BucketQuantile(before->Buckets(name), now.Buckets(name), share));
  };
  figures.requests_per_second = rate("cinnabar_gateway_requests_total");
  figures.refused_per_second = rate("cinnabar_admission_rejections_total");
  figures.price_dollars_per_second = rate("cinnabar_price_dollars_total");
  figures.p50_seconds = quantile("cinnabar_gateway_request_duration_seconds", 0.5);
  figures.p99_seconds = quantile("cinnabar_gateway_request_duration_seconds", 0.99);
  figures.first_p50_seconds = quantile("cinnabar_time_to_first_partial_seconds", 0.5);
  return figures;
}

}  // namespace

void EndedRequests::Add(const FeedEntry& entry) {
  if (entry.kind != FeedEntry::Kind::kTerminal) return;
  switch (entry.state) {
    case RequestState::kDone:
      ++done;
      break;
    case RequestState::kFailed:
      ++failed;
      break;
    case RequestState::kCancelled:
      ++cancelled;
      break;
    case RequestState::kExpired:
      ++expired;
      break;
    case RequestState::kQueued:
    case RequestState::kLeased:
    case RequestState::kRunning:
      return;
  }
  AddUsage(entry.state == RequestState::kDone ? useful : wasted, entry.usage);
}

void EndedRequests::Add(const EndedRequests& other) {
  done += other.done;
  failed += other.failed;
  cancelled += other.cancelled;
  expired += other.expired;
  AddUsage(useful, other.useful);
  AddUsage(wasted, other.wasted);
}

absl::string_view WorkerStateName(WorkerFigures::State state) {
  switch (state) {
    case WorkerFigures::State::kIdle:
      return "idle";
    case WorkerFigures::State::kBusy:
      return "busy";
    case WorkerFigures::State::kDraining:
      return "draining";
    case WorkerFigures::State::kGone:
      return "gone";
  }
  return "";
}

void ClusterMeter::Take(ClusterLook look) {
  for (const auto& [boot, status] : look.workers) {
    seen_[status.worker()] = {.at = look.at, .status = status};
  }
  for (auto each = seen_.begin(); each != seen_.end();) {
    each = look.at - each->second.at > kGoneShown ? seen_.erase(each) : std::next(each);
  }
  looks_.push_back(std::move(look));
  while (looks_.size() > 2 && looks_.back().at - looks_[1].at >= window_) looks_.pop_front();
  const std::optional<double> rate = Figures().tokens_per_second;
  if (rate) history_.push_back(*rate);
  if (history_.size() > kHistoryMax) history_.pop_front();
}

const v1::WorkerStatus* ClusterMeter::Before(const std::string& boot,
                                             const v1::WorkerStatus& now) const {
  for (const ClusterLook& look : looks_) {
    for (const auto& [name, status] : look.workers) {
      if (name == boot) return status.uptime_seconds() < now.uptime_seconds() ? &status : nullptr;
    }
  }
  return nullptr;
}

bool ClusterMeter::Complete() const {
  if (looks_.size() < 2) return false;
  const auto& workers = looks_.back().workers;
  return std::all_of(workers.begin(), workers.end(), [&](const auto& worker) {
    return Before(worker.first, worker.second) != nullptr;
  });
}

WorkerFigures ClusterMeter::Worker(const std::string& boot, const v1::WorkerStatus& now) const {
  WorkerFigures figures;
  figures.name = now.worker();
  figures.host = now.host();
  figures.model = now.model();
  figures.device = now.device();
  figures.state = now.draining()        ? WorkerFigures::State::kDraining
                  : now.rows_size() > 0 ? WorkerFigures::State::kBusy
                                        : WorkerFigures::State::kIdle;
  figures.rows = now.rows_size();
  figures.rows_max = now.rows_max();
  for (const auto& row : now.rows()) figures.positions += row.sequence_tokens();
  figures.dollars_per_hour = now.dollars_per_hour();
  const v1::WorkerStatus* before = Before(boot, now);
  if (before == nullptr) return figures;
  const double seconds = now.uptime_seconds() - before->uptime_seconds();
  const double busy = now.device_busy_seconds() - before->device_busy_seconds();
  const auto batches = static_cast<double>(now.samples_end() - before->samples_end());
  const auto tokens = static_cast<double>(now.tokens_committed() - before->tokens_committed());
  figures.step_seconds = Ratio(busy, batches);
  figures.busy_ratio = std::min(1.0, busy / seconds);
  figures.tokens_per_second = tokens / seconds;
  figures.forwards_per_second = static_cast<double>(now.forwards() - before->forwards()) / seconds;
  figures.tokens_per_forward = Ratio(tokens, static_cast<double>(now.steps() - before->steps()));
  return figures;
}

ClusterFigures ClusterMeter::Figures() const {
  CINNABAR_CHECK(!looks_.empty());
  const ClusterLook& last = looks_.back();
  ClusterFigures figures;
  figures.at = last.at;
  figures.queue = last.queue;
  std::set<std::string> present;
  double tokens = 0.0, forwards = 0.0, busy = 0.0, steps = 0.0;
  int64_t measured = 0;
  for (const auto& [boot, status] : last.workers) {
    present.insert(status.worker());
    WorkerFigures worker = Worker(boot, status);
    figures.rows += worker.rows;
    figures.rows_max += worker.rows_max;
    figures.dollars_per_second += worker.dollars_per_hour / 3600.0;
    if (worker.tokens_per_second) {
      ++measured;
      tokens += *worker.tokens_per_second;
      forwards += *worker.forwards_per_second;
      busy += *worker.busy_ratio;
      if (worker.tokens_per_forward.value_or(0.0) > 0.0) {
        steps += *worker.tokens_per_second / *worker.tokens_per_forward;
      }
    }
    figures.workers.push_back(std::move(worker));
  }
  for (const auto& [name, seen] : seen_) {
    if (present.count(name) > 0) continue;
    WorkerFigures gone;
    gone.name = name;
    gone.host = seen.status.host();
    gone.model = seen.status.model();
    gone.device = seen.status.device();
    gone.state = WorkerFigures::State::kGone;
    gone.rows_max = seen.status.rows_max();
    figures.workers.push_back(std::move(gone));
  }
  std::sort(figures.workers.begin(), figures.workers.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  if (measured > 0) {
    figures.tokens_per_second = tokens;
    figures.forwards_per_second = forwards;
    figures.busy_ratio = busy / static_cast<double>(measured);
    figures.tokens_per_forward = Ratio(tokens, steps);
    if (figures.dollars_per_second > 0.0 && tokens > 0.0) {
      figures.dollars_per_million_tokens = 1e6 * figures.dollars_per_second / tokens;
    }
  }
  const double seconds = absl::ToDoubleSeconds(last.at - looks_.front().at);
  if (seconds > 0.0) {
    EndedRequests ended;  // after the first look
    for (size_t i = 1; i < looks_.size(); ++i) ended.Add(looks_[i].ended);
    figures.done_per_second = static_cast<double>(ended.done) / seconds;
    figures.failed_per_second = static_cast<double>(ended.failed) / seconds;
    figures.cancelled_per_second = static_cast<double>(ended.cancelled) / seconds;
    figures.expired_per_second = static_cast<double>(ended.expired) / seconds;
    figures.forwards_per_answer =
        Ratio(static_cast<double>(ended.useful.forwards), static_cast<double>(ended.done));
    figures.waste_ratio =
        Ratio(static_cast<double>(ended.wasted.device_us),
              static_cast<double>(ended.wasted.device_us + ended.useful.device_us));
  }
  if (last.gateway) {
    const auto& first = looks_.front().gateway;
    figures.gateway =
        CompareGateways(first && looks_.size() > 1 ? &*first : nullptr, *last.gateway, seconds);
  }
  figures.tokens_history.assign(history_.begin(), history_.end());
  return figures;
}

nlohmann::json ClusterFigures::ToJson() const {
  Json waiting = Json::object();
  Json oldest = Json::object();
  for (size_t i = 0; i < kRequestClasses.size(); ++i) {
    const std::string name(RequestClassName(kRequestClasses[i]));
    waiting[name] = queue.waiting[i];
    oldest[name] = absl::ToDoubleSeconds(queue.oldest_age[i]);
  }
  Json list = Json::array();
  for (const WorkerFigures& worker : workers) {
    list.push_back({{"name", worker.name},
                    {"host", worker.host},
                    {"model", worker.model},
                    {"device", worker.device},
                    {"state", std::string(WorkerStateName(worker.state))},
                    {"rows", worker.rows},
                    {"rows_max", worker.rows_max},
                    {"positions", worker.positions},
                    {"step_seconds", OrNull(worker.step_seconds)},
                    {"busy_ratio", OrNull(worker.busy_ratio)},
                    {"tokens_per_second", OrNull(worker.tokens_per_second)},
                    {"forwards_per_second", OrNull(worker.forwards_per_second)},
                    {"tokens_per_forward", OrNull(worker.tokens_per_forward)},
                    {"dollars_per_hour", worker.dollars_per_hour}});
  }
  Json json = {{"at", absl::ToUnixMillis(at) / 1e3},
               {"queue",
                {{"live", queue.live},
                 {"cost_token_steps", queue.cost},
                 {"waiting", std::move(waiting)},
                 {"oldest_seconds", std::move(oldest)},
                 {"batches", queue.batches},
                 {"ready_packs", queue.ready_packs},
                 {"dead_letters", queue.dead_letters},
                 {"ledger_entries", queue.ledger_entries}}},
               {"workers", std::move(list)},
               {"rows", rows},
               {"rows_max", rows_max},
               {"tokens_per_second", OrNull(tokens_per_second)},
               {"forwards_per_second", OrNull(forwards_per_second)},
               {"tokens_per_forward", OrNull(tokens_per_forward)},
               {"forwards_per_answer", OrNull(forwards_per_answer)},
               {"busy_ratio", OrNull(busy_ratio)},
               {"waste_ratio", OrNull(waste_ratio)},
               {"ended_per_second",
                {{"done", OrNull(done_per_second)},
                 {"failed", OrNull(failed_per_second)},
                 {"cancelled", OrNull(cancelled_per_second)},
                 {"expired", OrNull(expired_per_second)}}},
               {"dollars_per_second", dollars_per_second},
               {"dollars_per_million_tokens", OrNull(dollars_per_million_tokens)},
               {"gateway", nullptr}};
  if (gateway) {
    json["gateway"] = {{"streams", gateway->streams},
                       {"requests_per_second", OrNull(gateway->requests_per_second)},
                       {"refused_per_second", OrNull(gateway->refused_per_second)},
                       {"p50_seconds", OrNull(gateway->p50_seconds)},
                       {"p99_seconds", OrNull(gateway->p99_seconds)},
                       {"first_step_p50_seconds", OrNull(gateway->first_p50_seconds)},
                       {"price_dollars_per_second", OrNull(gateway->price_dollars_per_second)}};
  }
  return json;
}

}  // namespace cinnabar
