#include "kernels/device_name.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace cinnabar {
namespace {

TEST(DeviceNameTest, NamesADeviceAndBack) {
  const auto expect = [](absl::string_view text, BackendKind kind, int32_t index,
                         const std::string& name) {
    const absl::StatusOr<DeviceName> device = ParseDeviceName(text);
    ASSERT_TRUE(device.ok()) << device.status();
    EXPECT_EQ(device->kind, kind) << text;
    EXPECT_EQ(device->index, index) << text;
    EXPECT_EQ(NameOf(*device), name);
  };
  expect("cpu", BackendKind::kCpu, 0, "cpu");
  expect("cuda", BackendKind::kCuda, 0, "cuda:0");
  expect("cuda:0", BackendKind::kCuda, 0, "cuda:0");
  expect("cuda:7", BackendKind::kCuda, 7, "cuda:7");
}

TEST(DeviceNameTest, WhatIsNoDeviceIsRefusedByName) {
  for (const char* text : {"", "cpu:0", "CPU", "cuda:", "cuda:-1", "cuda:+1", "cuda: 1", "cuda:1x",
                           "cuda:64", "cuda:99999999999999999999", "cuda1", "gpu", "cuda:0,1"}) {
    const absl::Status status = ParseDeviceName(text).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_THAT(status.message(), testing::HasSubstr("take cpu, cuda or cuda:N")) << text;
  }
}

TEST(DeviceNameTest, TheCpuKeepsActivationsInFloat32) {
  EXPECT_EQ(*ParseActivation("auto", BackendKind::kCpu), DType::kF32);
  EXPECT_EQ(*ParseActivation("float32", BackendKind::kCpu), DType::kF32);
  const absl::Status status = ParseActivation("bfloat16", BackendKind::kCpu).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(status.message(), testing::HasSubstr("cpu takes auto or float32"));
  EXPECT_EQ(*ParseActivation("auto", BackendKind::kCuda), DType::kBf16);
  EXPECT_EQ(*ParseActivation("bf16", BackendKind::kCuda), DType::kBf16);
  EXPECT_EQ(*ParseActivation("f32", BackendKind::kCuda), DType::kF32);
  EXPECT_TRUE(absl::IsInvalidArgument(ParseActivation("float16", BackendKind::kCuda).status()));
}

TEST(DeviceNameTest, ProductsAreNamedByTheirInstruction) {
  EXPECT_EQ(*ParseProducts("auto", BackendKind::kCpu), Products::kAuto);
  EXPECT_EQ(*ParseProducts("auto", BackendKind::kCuda), Products::kAuto);
  EXPECT_EQ(*ParseProducts("mma", BackendKind::kCuda), Products::kMma);
  EXPECT_EQ(*ParseProducts("wgmma", BackendKind::kCuda), Products::kWgmma);
  EXPECT_THAT(ParseProducts("wgmma", BackendKind::kCpu).status().message(),
              testing::HasSubstr("cpu takes auto"));
  EXPECT_THAT(ParseProducts("hmma", BackendKind::kCuda).status().message(),
              testing::HasSubstr("cuda takes auto, mma or wgmma"));
}

}  // namespace
}  // namespace cinnabar
