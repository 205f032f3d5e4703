// The backends that the op tests run on, by name: "avx512", "avx2" and "generic" are the CPU's
// instruction sets; "cuda" is the first device; "emulated" is the CUDA backend with its kernels run
// on the host (tests/support/simt). The last two compute in float32 here, or in bf16 with "-bf16"
// behind, with FP8 weights and products ("-fp8"), and by wgmma ("-wgmma").
#ifndef CINNABAR_TESTS_UNIT_KERNELS_NAMED_BACKEND_H_
#define CINNABAR_TESTS_UNIT_KERNELS_NAMED_BACKEND_H_

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "kernels/backend.h"
#include "tests/support/simt/emulated.h"

namespace cinnabar {

inline absl::StatusOr<std::unique_ptr<Backend>> MakeNamedBackend(const std::string& name,
                                                                 int32_t num_threads = 1) {
  BackendOptions options;
  options.activation = absl::StrContains(name, "bf16") ? DType::kBf16 : DType::kF32;
  options.fp8 = absl::StrContains(name, "fp8");
  if (absl::StrContains(name, "wgmma")) options.products = Products::kWgmma;
  if (absl::StartsWith(name, "cuda")) return MakeBackend(BackendKind::kCuda, options);
  if (absl::StartsWith(name, "emulated")) return simt::MakeEmulatedBackend(options);
  options.num_threads = num_threads;
  options.isa = name;
  return MakeBackend(BackendKind::kCpu, options);
}

// Skips the running test because this machine has no such backend; where CINNABAR_REQUIRE_GPU is 1,
// a missing device is a failure (one that is there and has no wgmma is none).
inline void SkipWithout(const std::string& name, const absl::Status& why) {
  const char* required = std::getenv("CINNABAR_REQUIRE_GPU");
  const bool too_old = absl::StrContains(name, "wgmma") && absl::IsUnimplemented(why);
  if (absl::StartsWith(name, "cuda") && !too_old && required != nullptr &&
      std::string(required) == "1") {
    FAIL() << name << " is required here: " << why;
  }
  GTEST_SKIP() << name << ": " << why;
}

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_UNIT_KERNELS_NAMED_BACKEND_H_
