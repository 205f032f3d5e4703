// What a worker counts.
#ifndef CINNABAR_WORKER_SERVICE_WORKER_METRICS_H_
#define CINNABAR_WORKER_SERVICE_WORKER_METRICS_H_

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "common/metrics/metrics.h"
#include "kernels/backend.h"
#include "worker/engine/engine.h"
#include "worker/service/nvml_sampler.h"
#include "worker/service/publisher.h"

namespace cinnabar {

// Thread-safe.
class WorkerMetrics {
 public:
  // `metrics` is borrowed and outlives it.
  WorkerMetrics(Metrics& metrics, std::string model, double dollars_per_hour);

  void StepDone(int32_t rows, int64_t committed, int32_t rows_max, absl::Duration took);
  void Set(const EngineCounters& engine);
  void RowStarted(bool resumed);
  void RowEnded(absl::string_view outcome, int64_t steps, double tokens_per_forward);
  void DeviceError();
  void Set(const PublisherCounters& publisher);
  void SetState(bool ready, bool draining, absl::Duration step_age, int64_t rows,
                const Denoiser::Memory& memory, int64_t kv_bytes);
  // From one thread at a time. Once the device told its busy time, that is counted, and steps are
  // not.
  void SetDevice(const DeviceStats& stats, const DeviceReading& reading);

 private:
  const std::string model_;
  const double dollars_per_second_;
  std::atomic<bool> device_has_clock_ = false;
  HistogramFamily& batch_rows_;
  HistogramFamily& batch_fill_;
  HistogramFamily& step_seconds_;
  HistogramFamily& steps_per_request_;
  HistogramFamily& tokens_per_forward_;
  CounterFamily& positions_;
  CounterFamily& reused_;
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
  // Made when the device tells of them: what is not known is no series, and not 0.
  CounterFamily& energy_joules_;
  CounterFamily& graphs_;
  CounterFamily& ahead_;
  GaugeFamily& power_watts_;
  GaugeFamily& utilization_;
  GaugeFamily& device_memory_;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_WORKER_METRICS_H_
