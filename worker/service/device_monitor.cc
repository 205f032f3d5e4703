#include "worker/service/device_monitor.h"

#include <utility>

#include "absl/time/clock.h"

namespace cinnabar {

DeviceMonitor::DeviceMonitor(const Backend& backend, std::unique_ptr<NvmlSampler> sampler,
                             WorkerMetrics& metrics, absl::Duration every)
    : backend_(backend), sampler_(std::move(sampler)), metrics_(metrics), every_(every) {
  Show();
  thread_ = std::thread([this] {
    for (;;) {
      {
        const absl::Time next = absl::Now() + every_;
        MutexLock lock(mu_);
        while (!stopping_ && absl::Now() < next) changed_.WaitFor(mu_, next - absl::Now());
        if (stopping_) return;
      }
      Show();
    }
  });
}

DeviceMonitor::~DeviceMonitor() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void DeviceMonitor::Show() {
  metrics_.SetDevice(backend_.Stats(),
                     sampler_ == nullptr ? DeviceReading{} : sampler_->Read(absl::Now()));
}

}  // namespace cinnabar
