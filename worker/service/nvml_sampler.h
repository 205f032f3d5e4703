// Power, energy, memory and use of a GPU, from the driver's management library. It is loaded at run
// time: a machine without it, or a build without CUDA, has no such figures.
#ifndef CINNABAR_WORKER_SERVICE_NVML_SAMPLER_H_
#define CINNABAR_WORKER_SERVICE_NVML_SAMPLER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace cinnabar {

// What a device draws; a field that it does not tell is -1.
struct DeviceReading {
  double power_watts = -1;
  double energy_joules = -1;  // since the sampler was made; never falls
  double utilization = -1;    // [0, 1]: the share of time in which something ran
  int64_t memory_total_bytes = -1;
  int64_t memory_used_bytes = -1;  // by everybody on the device
};

inline constexpr char kNvmlLibrary[] = "libnvidia-ml.so.1";

// One thread at a time.
class NvmlSampler {
 public:
  // The GPU at this PCI address ("0000:4b:00.0"), whatever index the process sees it under.
  // NotFound without the library (`library` is what dlopen takes) or the device, Unavailable when
  // the driver says no, FailedPrecondition when a function is missing.
  static absl::StatusOr<std::unique_ptr<NvmlSampler>> Open(const std::string& library,
                                                           const std::string& pci_address);
  ~NvmlSampler();
  NvmlSampler(const NvmlSampler&) = delete;

  // Energy is the device's own counter; where it has none, power over the time between two calls.
  // Reads take about a millisecond, and can take as long as the driver pleases.
  DeviceReading Read(absl::Time now);

 private:
  struct Library;
  NvmlSampler(std::unique_ptr<Library> library, void* device);

  std::unique_ptr<Library> library_;
  void* device_;
  uint64_t energy_begin_mj_ = 0;  // the device's counter when the sampler was made
  bool counts_energy_ = false;
  double energy_joules_ = 0;
  double last_power_watts_ = -1;
  absl::Time last_read_ = absl::InfinitePast();
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_NVML_SAMPLER_H_
