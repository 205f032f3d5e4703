#include "worker/engine/warm_up.h"

#include <gtest/gtest.h>

#include <memory>

#include "tests/support/golden_models.h"

namespace cinnabar {
namespace {

TEST(WarmUpTest, MakesAStepForEveryDoublingOfRows) {
  for (const char* name : {"llada", "sdar_b4", "fast_dllm_v2", "sedd_uniform", "diffusion_gemma"}) {
    SCOPED_TRACE(name);
    const auto backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
    const ForwardLimits limits{.rows_max = 100, .sequences_max = 5, .positions_max = 40};
    const auto denoiser = LoadDenoiser(GoldenModelPath(name), *backend, {}, limits);
    ASSERT_TRUE(denoiser.ok()) << denoiser.status();
    const absl::StatusOr<int32_t> steps = WarmUp(**denoiser, {.limits = limits});
    ASSERT_TRUE(steps.ok()) << steps.status();
    EXPECT_EQ(*steps, 4);  // of 16, 32, 64 and 100 rows
    // As much as fits, where that is less.
    EXPECT_TRUE(WarmUp(**denoiser, {.limits = limits, .kv_bytes_max = 1 << 20}).ok());
  }
}

}  // namespace
}  // namespace cinnabar
