// What a scheduler counts.
#ifndef CINNABAR_SCHEDULER_SERVICE_SCHEDULER_METRICS_H_
#define CINNABAR_SCHEDULER_SERVICE_SCHEDULER_METRICS_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "common/metrics/metrics.h"
#include "common/queue/types.h"
#include "scheduler/service/cluster_view.h"

namespace cinnabar {

// Thread-safe.
class SchedulerMetrics {
 public:
  explicit SchedulerMetrics(Metrics& metrics);  // borrowed, outlives it

  void Leading(bool leading);
  void Planned(absl::Duration took, const Plan& plan);
  void Dispatched(int32_t rows);
  void Verdict(DispatchVerdict verdict);
  void Refused(RefusalReason reason);
  void Reaped(const ReapResult& result);
  void RedisError();
  void Show(const ClusterView& view, absl::Time now);

 private:
  GaugeFamily& leader_;
  HistogramFamily& planning_;
  HistogramFamily& pack_rows_;
  CounterFamily& packs_;
  CounterFamily& verdicts_;
  CounterFamily& refused_;
  CounterFamily& lease_expired_;
  CounterFamily& not_started_;
  CounterFamily& dead_letters_;
  CounterFamily& expired_;
  CounterFamily& redis_errors_;
  CounterFamily& unreadable_;
  GaugeFamily& queue_requests_;
  GaugeFamily& queue_cost_;
  GaugeFamily& queue_oldest_;
  GaugeFamily& model_waiting_;
  GaugeFamily& model_wait_;
  GaugeFamily& model_workers_;
  GaugeFamily& backlog_;
  GaugeFamily& pressure_;
  GaugeFamily& put_off_;
};

}  // namespace cinnabar

#endif  // CINNABAR_SCHEDULER_SERVICE_SCHEDULER_METRICS_H_
