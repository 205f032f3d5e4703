#include "worker/service/nvml_sampler.h"

#include <dlfcn.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

// The library's C interface, as far as it is used here. Source: NVML API reference, 12.x; these
// have not changed since CUDA 8.
constexpr int kNvmlSuccess = 0;
struct NvmlMemory {
  unsigned long long total, free, used;
};
struct NvmlUtilization {
  unsigned int gpu, memory;  // per cent
};

}  // namespace

struct NvmlSampler::Library {
  ~Library() {
    if (started) (void)shutdown();
    if (handle != nullptr) dlclose(handle);
  }

  template <typename F>
  absl::Status Find(const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(handle, name));
    if (function != nullptr) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("the NVML library has no ", name));
  }

  absl::Status Load(const std::string& name) {
    handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return absl::NotFoundError(absl::StrCat("no NVML: ", dlerror()));
    CINNABAR_RETURN_IF_ERROR(Find("nvmlInit_v2", init));
    CINNABAR_RETURN_IF_ERROR(Find("nvmlShutdown", shutdown));
    CINNABAR_RETURN_IF_ERROR(Find("nvmlDeviceGetHandleByPciBusId_v2", by_pci_address));
    CINNABAR_RETURN_IF_ERROR(Find("nvmlDeviceGetPowerUsage", power));
    CINNABAR_RETURN_IF_ERROR(Find("nvmlDeviceGetTotalEnergyConsumption", energy));
    CINNABAR_RETURN_IF_ERROR(Find("nvmlDeviceGetUtilizationRates", utilization));
    CINNABAR_RETURN_IF_ERROR(Find("nvmlDeviceGetMemoryInfo", memory));
    const int error = init();
    started = error == kNvmlSuccess;
    if (started) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("NVML does not start: error ", error));
  }

  void* handle = nullptr;
  bool started = false;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*by_pci_address)(const char*, void**) = nullptr;
  int (*power)(void*, unsigned int*) = nullptr;         // milliwatts
  int (*energy)(void*, unsigned long long*) = nullptr;  // millijoules since the driver was loaded
  int (*utilization)(void*, NvmlUtilization*) = nullptr;
  int (*memory)(void*, NvmlMemory*) = nullptr;
};

NvmlSampler::NvmlSampler(std::unique_ptr<Library> library, void* device)
    : library_(std::move(library)), device_(device) {
  unsigned long long energy_mj = 0;
  counts_energy_ = library_->energy(device_, &energy_mj) == kNvmlSuccess;
  energy_begin_mj_ = energy_mj;
}

NvmlSampler::~NvmlSampler() = default;

absl::StatusOr<std::unique_ptr<NvmlSampler>> NvmlSampler::Open(const std::string& library,
                                                               const std::string& pci_address) {
  auto loaded = std::make_unique<Library>();
  CINNABAR_RETURN_IF_ERROR(loaded->Load(library));
  void* device = nullptr;
  const int error = loaded->by_pci_address(pci_address.c_str(), &device);
  if (error != kNvmlSuccess) {
    return absl::NotFoundError(
        absl::StrCat("NVML knows no device ", pci_address, ": error ", error));
  }
  return std::unique_ptr<NvmlSampler>(new NvmlSampler(std::move(loaded), device));
}

DeviceReading NvmlSampler::Read(absl::Time now) {
  DeviceReading reading;
  unsigned int power_mw = 0;
  if (library_->power(device_, &power_mw) == kNvmlSuccess) reading.power_watts = power_mw * 1e-3;
  unsigned long long energy_mj = 0;
  if (counts_energy_) {
    // A driver that was reloaded counts from zero: what was known stays.
    if (library_->energy(device_, &energy_mj) == kNvmlSuccess && energy_mj >= energy_begin_mj_) {
      const double joules = static_cast<double>(energy_mj - energy_begin_mj_) * 1e-3;
      energy_joules_ = std::max(energy_joules_, joules);
    }
    reading.energy_joules = energy_joules_;
  } else if (reading.power_watts >= 0) {
    if (last_power_watts_ >= 0 && now > last_read_) {
      energy_joules_ +=
          (last_power_watts_ + reading.power_watts) / 2 * absl::ToDoubleSeconds(now - last_read_);
    }
    reading.energy_joules = energy_joules_;
  }
  last_power_watts_ = reading.power_watts;
  last_read_ = now;
  NvmlUtilization utilization = {};
  if (library_->utilization(device_, &utilization) == kNvmlSuccess) {
    reading.utilization = utilization.gpu * 1e-2;
  }
  NvmlMemory memory = {};
  if (library_->memory(device_, &memory) == kNvmlSuccess) {
    reading.memory_total_bytes = static_cast<int64_t>(memory.total);
    reading.memory_used_bytes = static_cast<int64_t>(memory.used);
  }
  return reading;
}

}  // namespace cinnabar
