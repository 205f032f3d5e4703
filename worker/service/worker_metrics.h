// What a worker counts.
#ifndef CINNABAR_WORKER_SERVICE_WORKER_METRICS_H_
#define CINNABAR_WORKER_SERVICE_WORKER_METRICS_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "common/metrics/metrics.h"
#include "worker/engine/engine.h"
#include "worker/service/publisher.h"

namespace cinnabar {

// Thread-safe.
class WorkerMetrics {
 public:
  // `metrics` is borrowed and outlives it.
  WorkerMetrics(Metrics& metrics, std::string model, double dollars_per_hour);

  void StepDone(int32_t rows, int64_t positions, int64_t committed, int32_t rows_max,
                absl::Duration took);
  void RowStarted(bool resumed);
  void RowEnded(absl::string_view outcome, int64_t steps, double tokens_per_forward);
  void DeviceError();
  void Set(const PublisherCounters& publisher);
  void SetState(bool ready, bool draining, absl::Duration step_age, int64_t rows,
                int64_t weights_bytes);

 private:
  const std::string model_;
  const double dollars_per_second_;
  HistogramFamily& batch_rows_;
  HistogramFamily& batch_fill_;
  HistogramFamily& step_seconds_;
  HistogramFamily& steps_per_request_;
  HistogramFamily& tokens_per_forward_;
  CounterFamily& positions_;
  CounterFamily& tokens_;
  CounterFamily& forwards_;
  CounterFamily& busy_seconds_;
  CounterFamily& dollars_;
  CounterFamily& started_;
  CounterFamily& ended_;
  CounterFamily& device_errors_;
  CounterFamily& published_steps_;
  CounterFamily& publish_calls_;
  CounterFamily& publish_failures_;
  CounterFamily& fenced_;
  CounterFamily& rewinds_;
  CounterFamily& lost_;
  CounterFamily& snapshots_;
  GaugeFamily& unpublished_;
  GaugeFamily& ready_;
  GaugeFamily& draining_;
  GaugeFamily& step_age_;
  GaugeFamily& rows_;
  GaugeFamily& memory_;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_WORKER_METRICS_H_
