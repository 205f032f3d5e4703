#include "worker/service/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>

#include "absl/strings/str_cat.h"
#include "tests/support/simt/emulated.h"
#include "worker/model/load_estimate.h"

namespace cinnabar {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kGib = int64_t{1} << 30;
// 15 GiB of weights, 1 GiB of workspace, 1 GiB of keys and values for 2048 positions.
constexpr Denoiser::Memory kNeeds{
    .weights_bytes = 15 * kGib, .workspace_bytes = kGib, .kv_bytes_per_position = kGib / 2048};

TEST(PlanRoomTest, OnALargeDeviceAllSequencesFit) {
  const auto plan = PlanRoom("m", "cuda:0", kNeeds, {.sequences_max = 8, .positions_max = 2048},
                             {.total_bytes = 80 * kGib, .free_bytes = 79 * kGib});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->sequences_max, 8);
  EXPECT_EQ(plan->kv_bytes_max, 8 * kGib);
}

TEST(PlanRoomTest, OnASmallerOneThereAreFewerAtOnce) {
  // 24 - 0.48 left alone - 16: seven and a half sequences.
  const auto plan = PlanRoom("m", "cuda:0", kNeeds, {.sequences_max = 64, .positions_max = 2048},
                             {.total_bytes = 24 * kGib, .free_bytes = 24 * kGib});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->sequences_max, 7);
  EXPECT_GE(plan->kv_bytes_max, 7 * kGib);
  EXPECT_LE(16 * kGib + plan->kv_bytes_max, 24 * kGib);
}

TEST(PlanRoomTest, WhatCanNeverFitIsRefusedWithTheNumbers) {
  const auto plan = PlanRoom("llada", "cuda:1", kNeeds, {.positions_max = 2048},
                             {.total_bytes = 12 * kGib, .free_bytes = 11 * kGib});
  EXPECT_TRUE(absl::IsInvalidArgument(plan.status()));
  EXPECT_THAT(plan.status().message(),
              AllOf(HasSubstr("llada does not fit on cuda:1"), HasSubstr("weights 15.00 GiB"),
                    HasSubstr("workspace 1.00 GiB"),
                    HasSubstr("keys and values 1.00 GiB for one sequence of 2048 = 17.00 GiB"),
                    HasSubstr("the device has 12.00 GiB"), HasSubstr("--dtype")));
  // Exactly at the edge: 17 GiB of needs in 17 / 0.98.
  const int64_t enough = 17 * kGib * 50 / 49 + 50;
  EXPECT_TRUE(PlanRoom("m", "d", kNeeds, {.positions_max = 2048},
                       {.total_bytes = enough, .free_bytes = enough})
                  .ok());
  EXPECT_FALSE(PlanRoom("m", "d", kNeeds, {.positions_max = 2048},
                        {.total_bytes = 17 * kGib, .free_bytes = 17 * kGib})
                   .ok());
}

TEST(PlanRoomTest, WhatDoesNotFitNowMayFitLater) {
  const auto plan = PlanRoom("m", "cuda:0", kNeeds, {.positions_max = 2048},
                             {.total_bytes = 80 * kGib, .free_bytes = 10 * kGib});
  EXPECT_TRUE(absl::IsResourceExhausted(plan.status()));
  EXPECT_THAT(plan.status().message(),
              AllOf(HasSubstr("17.00 GiB"), HasSubstr("80.00 GiB are 10.00 GiB free")));
}

TEST(PlanRoomTest, AskedMemoryForKeysAndValuesHolds) {
  const DeviceRoom room{.total_bytes = 80 * kGib, .free_bytes = 79 * kGib};
  const auto plan =
      PlanRoom("m", "d", kNeeds,
               {.sequences_max = 8, .positions_max = 2048, .kv_bytes_max = 3 * kGib}, room);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->sequences_max, 3);
  EXPECT_EQ(plan->kv_bytes_max, 3 * kGib);
  const auto little =
      PlanRoom("m", "d", kNeeds,
               {.sequences_max = 8, .positions_max = 2048, .kv_bytes_max = kGib / 2}, room);
  EXPECT_TRUE(absl::IsInvalidArgument(little.status()));
  EXPECT_THAT(little.status().message(),
              AllOf(HasSubstr("--kv-mib allows 0.50 GiB"), HasSubstr("--positions-max 1024")));
}

TEST(PlanRoomTest, OfADeviceThatTellsNothingNothingIsRefused) {
  const auto plan = PlanRoom("m", "d", kNeeds, {.sequences_max = 5, .positions_max = 2048}, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->sequences_max, 5);
  EXPECT_EQ(plan->kv_bytes_max, 5 * kGib);
}

// A cache of all layers takes more than the one layer that exact reuse keeps: it may have what room
// there is, and costs the others none of theirs.
TEST(PlanRoomTest, ACacheOfAllLayersMayTakeTheRoomThatIsThere) {
  Denoiser::Memory needs = kNeeds;
  needs.reused_kv_bytes_per_position = 4 * needs.kv_bytes_per_position;
  const RoomWanted wanted{.sequences_max = 8, .positions_max = 2048};
  const auto large =
      PlanRoom("m", "d", needs, wanted, {.total_bytes = 80 * kGib, .free_bytes = 79 * kGib});
  ASSERT_TRUE(large.ok()) << large.status();
  EXPECT_EQ(large->sequences_max, 8);
  EXPECT_EQ(large->kv_bytes_max, 32 * kGib);
  const auto small =
      PlanRoom("m", "d", needs, wanted, {.total_bytes = 20 * kGib, .free_bytes = 20 * kGib});
  ASSERT_TRUE(small.ok()) << small.status();
  EXPECT_EQ(small->sequences_max, 3);
  EXPECT_LE(16 * kGib + small->kv_bytes_max, 20 * kGib);
}

TEST(PlanRoomTest, PredictionsAreCountedWithTheirSequence) {
  Denoiser::Memory needs = kNeeds;
  needs.prediction_bytes = kGib / 2;
  const auto plan = PlanRoom("m", "d", needs, {.sequences_max = 8, .positions_max = 2048}, {});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->kv_bytes_max, 12 * kGib);
  EXPECT_FALSE(PlanRoom("m", "d", needs, {.positions_max = 2048, .kv_bytes_max = kGib}, {}).ok());
}

// The estimate that the plan is made from, against what loading takes.
TEST(EstimateLoadTest, IsWhatLoadingTakes) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  const auto backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
  constexpr ForwardLimits kLimits{.rows_max = 300, .sequences_max = 3, .positions_max = 200};
  for (const char* model :
       {"models/cinnabar-py-4m", "models/cinnabar-tiny", "tests/golden/models/llada",
        "tests/golden/models/dream_bf16", "tests/golden/models/sdar_b4",
        "tests/golden/models/llada2", "tests/golden/models/rnd1_bf16",
        "tests/golden/models/sedd_absorb", "tests/golden/models/diffusion_gemma",
        "tests/golden/models/llada_k.gguf", "tests/golden/models/rnd1_mixed.gguf"}) {
    for (const std::optional<DType> dtype :
         {std::optional<DType>(), std::optional<DType>(DType::kBf16),
          std::optional<DType>(DType::kF32), std::optional<DType>(DType::kQ8_0),
          std::optional<DType>(DType::kQ4_K)}) {
      SCOPED_TRACE(absl::StrCat(model, " as ", dtype.has_value() ? NameOf(*dtype) : "stored"));
      const std::string folder = absl::StrCat(source == nullptr ? "." : source, "/", model);
      const LoadOptions load{.weight_dtype = dtype};
      const auto estimate = EstimateLoad(folder, *backend, {.in_place = true}, load, kLimits);
      ASSERT_TRUE(estimate.ok()) << estimate.status();
      const auto denoiser = LoadDenoiser(folder, *backend, load, kLimits);
      ASSERT_TRUE(denoiser.ok()) << denoiser.status();
      const Denoiser::Memory memory = (*denoiser)->memory();
      EXPECT_EQ(estimate->kv_bytes_per_position, memory.kv_bytes_per_position);
      EXPECT_EQ(estimate->reused_kv_bytes_per_position, memory.reused_kv_bytes_per_position);
      EXPECT_EQ(estimate->prediction_bytes, memory.prediction_bytes);
      EXPECT_EQ(memory.prediction_bytes, 2 * (*denoiser)->SelfConditioningBytes());
      // What a sequence is then given.
      const int32_t positions =
          std::min(kLimits.positions_max, (*denoiser)->traits().positions_max);
      for (const auto& [reuse, bytes_per_position] :
           {std::pair{KvReuse::kExact, memory.kv_bytes_per_position},
            {KvReuse::kDual, memory.reused_kv_bytes_per_position}}) {
        const int64_t bytes = backend->KvBytes((*denoiser)->SequenceKvShape(positions, reuse));
        EXPECT_GE(bytes_per_position * positions, bytes);
        EXPECT_LT((bytes_per_position - 1) * positions, bytes);
      }
      // Rows of workspace begin on cache lines; the goldens are narrower than one.
      EXPECT_LE(estimate->workspace_bytes, memory.workspace_bytes);
      EXPECT_GE(estimate->workspace_bytes, memory.workspace_bytes / 2);
      // Weights are padded to whole panels, of which the goldens' matrices fill only a part.
      EXPECT_LE(estimate->weights_bytes, memory.weights_bytes);
      EXPECT_GE(estimate->weights_bytes, memory.weights_bytes / 4);
      if (absl::string_view(model) == "models/cinnabar-py-4m") {
        EXPECT_GE(estimate->weights_bytes, memory.weights_bytes * 98 / 100);
        EXPECT_GE(estimate->workspace_bytes, memory.workspace_bytes * 98 / 100);
      }
      // On a device of its own, everything is copied.
      const auto copied = EstimateLoad(folder, *backend, {}, load, kLimits);
      ASSERT_TRUE(copied.ok());
      EXPECT_GT(copied->weights_bytes, estimate->weights_bytes);
      // FP8 is for the matrices of layers, which are most of a model.
      const auto fp8 = EstimateLoad(folder, *backend, {.fp8 = true}, load, kLimits);
      ASSERT_TRUE(fp8.ok());
      if (dtype == DType::kF32) {
        EXPECT_LT(fp8->weights_bytes, copied->weights_bytes);
      }
    }
  }
}

// Packed bytes where weights are quantised, on a device as on the CPU.
TEST(EstimateLoadTest, CountsPackedBytesOfADevice) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  const std::string folder =
      absl::StrCat(source == nullptr ? "." : source, "/models/cinnabar-py-4m");
  constexpr ForwardLimits kLimits{.rows_max = 300, .sequences_max = 3, .positions_max = 200};
  int64_t before = std::numeric_limits<int64_t>::max();
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kQ8_0, DType::kQ4_K}) {
    SCOPED_TRACE(NameOf(dtype));
    const auto backend = *simt::MakeEmulatedBackend({});
    const LoadOptions load{.weight_dtype = dtype};
    const auto estimate = EstimateLoad(folder, *backend, {}, load, kLimits);
    ASSERT_TRUE(estimate.ok()) << estimate.status();
    const auto denoiser = LoadDenoiser(folder, *backend, load, kLimits);
    ASSERT_TRUE(denoiser.ok()) << denoiser.status();
    const int64_t bytes = (*denoiser)->memory().weights_bytes;
    EXPECT_LE(estimate->weights_bytes, bytes);
    EXPECT_GE(estimate->weights_bytes, bytes * 95 / 100);
    EXPECT_LT(bytes, before);
    before = bytes;
  }
}

TEST(EstimateLoadTest, ErrorsAreThoseOfLoading) {
  const auto backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
  EXPECT_TRUE(absl::IsNotFound(EstimateLoad("/nowhere", *backend, {}, {}, {}).status()));
}

}  // namespace
}  // namespace cinnabar
