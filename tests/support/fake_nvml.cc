// A management library of one made-up GPU, for tests of what reads the real one. Figures are set by
// SetFakeNvml; each read of power or energy gives what was set.
#include "tests/support/fake_nvml.h"

#include <cstring>

namespace {

FakeNvml state;
int started = 0;
constexpr int kSuccess = 0, kUninitialized = 1, kNotSupported = 3, kNotFound = 6;

int Answer(bool known) {
  if (started == 0) return kUninitialized;
  return known ? kSuccess : kNotSupported;
}

}  // namespace

extern "C" {

void SetFakeNvml(const FakeNvml* figures) { state = *figures; }
int FakeNvmlStarted() { return started; }

int nvmlInit_v2() {
  if (state.init_error != 0) return state.init_error;
  ++started;
  return kSuccess;
}
int nvmlShutdown() {
  --started;
  return kSuccess;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* address, void** device) {
  if (started == 0) return kUninitialized;
  if (std::strcmp(address, "0000:4b:00.0") != 0) return kNotFound;
  *device = &state;
  return kSuccess;
}
int nvmlDeviceGetPowerUsage(void*, unsigned int* milliwatts) {
  *milliwatts = static_cast<unsigned int>(state.power_mw);
  return Answer(state.power_mw >= 0);
}
int nvmlDeviceGetTotalEnergyConsumption(void*, unsigned long long* millijoules) {
  *millijoules = static_cast<unsigned long long>(state.energy_mj);
  return Answer(state.energy_mj >= 0);
}
int nvmlDeviceGetUtilizationRates(void*, unsigned int* rates) {
  rates[0] = static_cast<unsigned int>(state.utilization_percent);
  rates[1] = 1;
  return Answer(state.utilization_percent >= 0);
}
int nvmlDeviceGetMemoryInfo(void*, unsigned long long* bytes) {
  bytes[0] = static_cast<unsigned long long>(state.memory_total);
  bytes[1] = static_cast<unsigned long long>(state.memory_total - state.memory_used);
  bytes[2] = static_cast<unsigned long long>(state.memory_used);
  return Answer(state.memory_total >= 0);
}
}
