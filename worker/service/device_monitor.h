// Shows what the device says of itself as metrics, once a second, on a thread of its own: a driver
// that takes its time holds nothing up.
#ifndef CINNABAR_WORKER_SERVICE_DEVICE_MONITOR_H_
#define CINNABAR_WORKER_SERVICE_DEVICE_MONITOR_H_

#include <memory>
#include <thread>

#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "kernels/backend.h"
#include "worker/service/nvml_sampler.h"
#include "worker/service/worker_metrics.h"

namespace cinnabar {

class DeviceMonitor {
 public:
  // `backend` and `metrics` are borrowed and outlive it. `sampler` may be null.
  DeviceMonitor(const Backend& backend, std::unique_ptr<NvmlSampler> sampler,
                WorkerMetrics& metrics, absl::Duration every = absl::Seconds(1));
  ~DeviceMonitor();
  DeviceMonitor(const DeviceMonitor&) = delete;

 private:
  void Show();

  const Backend& backend_;
  const std::unique_ptr<NvmlSampler> sampler_;
  WorkerMetrics& metrics_;
  const absl::Duration every_;
  Mutex mu_;  // leaf
  ConditionVariable changed_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_DEVICE_MONITOR_H_
