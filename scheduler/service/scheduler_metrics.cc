#include "scheduler/service/scheduler_metrics.h"

#include <algorithm>
#include <vector>

#include "common/base/check.h"

namespace cinnabar {
namespace {

absl::string_view VerdictName(DispatchVerdict verdict) {
  switch (verdict) {
    case DispatchVerdict::kOk:
      return "ok";
    case DispatchVerdict::kGone:
      return "gone";
    case DispatchVerdict::kNotQueued:
      return "not_queued";
    case DispatchVerdict::kExpired:
      return "expired";
    case DispatchVerdict::kBackoff:
      return "backoff";
    case DispatchVerdict::kSuspect:
      return "suspect";
  }
  CINNABAR_CHECK(false) << "not a verdict: " << static_cast<int>(verdict);
}

}  // namespace

SchedulerMetrics::SchedulerMetrics(Metrics& metrics)
    : leader_(metrics.AddGauge("cinnabar_scheduler_leader", "1 while this scheduler leads")),
      planning_(metrics.AddHistogram("cinnabar_planning_duration_seconds", "Time of a plan",
                                     {0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1})),
      pack_rows_(metrics.AddHistogram("cinnabar_pack_rows", "Requests of a dispatched pack",
                                      PowerBuckets(9))),
      packs_(metrics.AddCounter("cinnabar_packs_total", "Packs dispatched")),
      verdicts_(metrics.AddCounter("cinnabar_dispatched_requests_total",
                                   "What the queue said to the requests of packs", {"verdict"})),
      refused_(metrics.AddCounter("cinnabar_planning_refusals_total",
                                  "Requests refused before they ran", {"reason"})),
      lease_expired_(metrics.AddCounter("cinnabar_lease_expired_total",
                                        "Requests taken back from a worker that fell silent")),
      not_started_(metrics.AddCounter("cinnabar_packs_not_started_total",
                                      "Requests taken back from packs that nobody started")),
      dead_letters_(metrics.AddCounter("cinnabar_dead_letters_total",
                                       "Requests given up after attempts without progress")),
      expired_(
          metrics.AddCounter("cinnabar_expired_requests_total", "Requests whose deadline passed")),
      redis_errors_(metrics.AddCounter("cinnabar_redis_errors_total", "Calls that failed")),
      unreadable_(metrics.AddCounter(
          "cinnabar_unreadable_records_total",
          "Hints of requests and states of workers that could not be read: mixed versions?")),
      queue_requests_(metrics.AddGauge("cinnabar_queue_requests", "Requests that wait", {"class"})),
      queue_cost_(metrics.AddGauge("cinnabar_queue_cost_token_steps",
                                   "Token-steps of the requests that wait", {"class"})),
      queue_oldest_(metrics.AddGauge("cinnabar_queue_oldest_age_seconds",
                                     "How long the oldest has waited", {"class"})),
      model_waiting_(metrics.AddGauge("cinnabar_model_queue_requests",
                                      "Requests that wait, by model", {"model"})),
      model_wait_(metrics.AddGauge("cinnabar_queue_estimated_wait_seconds",
                                   "Predicted device time of what waits, over the workers",
                                   {"model"})),
      model_workers_(
          metrics.AddGauge("cinnabar_model_workers", "Workers that take work", {"model"})),
      backlog_(metrics.AddGauge("cinnabar_backlog_seconds",
                                "Predicted device time of all that waits and runs, over the "
                                "workers")),
      pressure_(metrics.AddGauge("cinnabar_pressure_ratio", "Backlog against its target, 0 to 1")),
      put_off_(metrics.AddGauge("cinnabar_put_off_requests",
                                "Requests behind the others so that more keep their deadlines")) {}

void SchedulerMetrics::Leading(bool leading) { leader_.With({}).Set(leading ? 1 : 0); }

void SchedulerMetrics::Planned(absl::Duration took, const Plan& plan) {
  planning_.With({}).Observe(absl::ToDoubleSeconds(took));
  backlog_.With({}).Set(absl::ToDoubleSeconds(plan.backlog));
  pressure_.With({}).Set(plan.pressure);
  put_off_.With({}).Set(plan.num_put_off);
}

void SchedulerMetrics::Dispatched(int32_t rows) {
  pack_rows_.With({}).Observe(rows);
  packs_.With({}).Increment();
}

void SchedulerMetrics::Verdict(DispatchVerdict verdict) {
  verdicts_.With({VerdictName(verdict)}).Increment();
}

void SchedulerMetrics::Refused(RefusalReason reason) {
  refused_.With({reason == RefusalReason::kTooLong ? "too_long" : "deadline_infeasible"})
      .Increment();
}

void SchedulerMetrics::Reaped(const ReapResult& result) {
  lease_expired_.With({}).Increment(static_cast<double>(result.requeued));
  not_started_.With({}).Increment(static_cast<double>(result.not_started));
  dead_letters_.With({}).Increment(static_cast<double>(result.dead));
  expired_.With({}).Increment(static_cast<double>(result.expired));
}

void SchedulerMetrics::RedisError() { redis_errors_.With({}).Increment(); }

void SchedulerMetrics::Show(const ClusterView& view, absl::Time now) {
  const auto classes = view.LoadByClass(now);
  for (const RequestClass request_class : kRequestClasses) {
    const ClusterView::ClassLoad& load = classes[static_cast<size_t>(request_class)];
    const absl::string_view name = RequestClassName(request_class);
    queue_requests_.With({name}).Set(static_cast<double>(load.waiting));
    queue_cost_.With({name}).Set(static_cast<double>(load.token_steps));
    queue_oldest_.With({name}).Set(absl::ToDoubleSeconds(load.oldest));
  }
  std::vector<GaugeSample> waiting, workers, wait;  // a model that went away leaves nothing behind
  for (const auto& [model, load] : view.LoadByModel()) {
    waiting.push_back({.values = {model}, .value = static_cast<double>(load.waiting)});
    workers.push_back({.values = {model}, .value = static_cast<double>(load.workers)});
    wait.push_back(
        {.values = {model},
         .value = load.device_seconds / static_cast<double>(std::max<int64_t>(load.workers, 1))});
  }
  model_waiting_.Replace(waiting);
  model_workers_.Replace(workers);
  model_wait_.Replace(wait);
  prometheus::Counter& unreadable = unreadable_.With({});
  unreadable.Increment(static_cast<double>(view.num_unreadable()) - unreadable.Value());
}

}  // namespace cinnabar
