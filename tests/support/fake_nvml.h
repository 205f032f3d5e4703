// The figures of the made-up GPU of fake_nvml.cc, which is a shared library of its own: find
// SetFakeNvml with dlsym.
#ifndef CINNABAR_TESTS_SUPPORT_FAKE_NVML_H_
#define CINNABAR_TESTS_SUPPORT_FAKE_NVML_H_

#include <cstdint>

extern "C" {

// -1: the device does not tell (NVML_ERROR_NOT_SUPPORTED).
struct FakeNvml {
  int init_error = 0;
  int64_t power_mw = -1;
  int64_t energy_mj = -1;
  int64_t utilization_percent = -1;
  int64_t memory_total = -1;
  int64_t memory_used = 0;
};

void SetFakeNvml(const FakeNvml* figures);
int FakeNvmlStarted();  // nvmlInit_v2 without their nvmlShutdown
}

#endif  // CINNABAR_TESTS_SUPPORT_FAKE_NVML_H_
