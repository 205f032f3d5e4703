#include "worker/model/quantize.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/random_checkpoint.h"
#include "worker/model/inspect.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;

namespace fs = std::filesystem;

class QuantizeTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = testing::TempDir() + "/quantize_test";
    fs::remove_all(root_);
    fs::create_directories(root_ + "/source");
    ASSERT_TRUE(WriteRandomCheckpoint({.num_layers = 2,
                                       .dim = 256,
                                       .ffn = 320,
                                       .num_heads = 4,
                                       .num_kv_heads = 2,
                                       .vocabulary = 300},
                                      root_ + "/source")
                    .ok());
    backend_ = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
  }
  void TearDown() override { fs::remove_all(root_); }

  absl::StatusOr<QuantizeReport> Quantize(DType dtype, const std::string& out) {
    return QuantizeModel(root_ + "/source", dtype, out, [](int64_t, int64_t) {});
  }
  std::unique_ptr<Denoiser> Load(const std::string& directory) {
    auto model = LoadDenoiser(directory, *backend_, {},
                              {.rows_max = kQuantizationWindow,
                               .sequences_max = 1,
                               .positions_max = kQuantizationWindow});
    EXPECT_TRUE(model.ok()) << model.status();
    return model.ok() ? *std::move(model) : nullptr;
  }

  std::string root_;
  std::unique_ptr<Backend> backend_;
};

TEST_F(QuantizeTest, WhatIsWrittenLoadsAndCostsLittle) {
  std::vector<TokenId> ids(200);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<TokenId>(i * 37 % 290);
  const std::unique_ptr<Denoiser> before = Load(root_ + "/source");
  ASSERT_NE(before, nullptr);
  double last = 0.0;
  for (const auto& [dtype, bits, divergence] :
       {std::tuple{DType::kQ8_0, 9.0, 1e-3}, {DType::kQ4_K, 7.5, 5e-2}}) {
    SCOPED_TRACE(NameOf(dtype));
    const std::string out = absl::StrCat(root_, "/", NameOf(dtype));
    const absl::StatusOr<QuantizeReport> report = Quantize(dtype, out);
    ASSERT_TRUE(report.ok()) << report.status();
    EXPECT_EQ(report->num_quantized, 2 * 7 + 2);
    EXPECT_EQ(report->num_kept, 2 * 2 + 1);
    EXPECT_LT(static_cast<double>(report->bytes_after),
              static_cast<double>(report->bytes_before) / 32 * bits);
    const absl::StatusOr<ModelReport> inspected = InspectModel(out);
    ASSERT_TRUE(inspected.ok() && inspected->problems.empty()) << inspected.status();
    EXPECT_FALSE(fs::exists(out + "/model.gguf.partial"));
    const std::unique_ptr<Denoiser> after = Load(out);
    ASSERT_NE(after, nullptr);
    EXPECT_LT(after->memory().weights_bytes, before->memory().weights_bytes / 3);
    const absl::StatusOr<QuantizationCost> cost =
        MeasureQuantization(ids, *before, *after, [](int64_t, int64_t) {});
    ASSERT_TRUE(cost.ok()) << cost.status();
    EXPECT_GT(cost->num_positions, 60);
    EXPECT_LT(cost->num_positions, 140);
    EXPECT_GT(cost->divergence, last);  // 4 bits cost more than 8, and 8 more than none
    EXPECT_LT(cost->divergence, divergence);
    EXPECT_GT(cost->agreement, 0.5);
    EXPECT_NEAR(cost->nll_after, cost->nll_before, 0.3);
    last = cost->divergence;
  }
}

TEST_F(QuantizeTest, TheSameNetworkCostsNothing) {
  const std::unique_ptr<Denoiser> model = Load(root_ + "/source");
  const std::vector<TokenId> ids(150, 5);
  const auto cost = MeasureQuantization(ids, *model, *model, [](int64_t, int64_t) {});
  ASSERT_TRUE(cost.ok()) << cost.status();
  EXPECT_EQ(cost->divergence, 0.0);
  EXPECT_EQ(cost->agreement, 1.0);
  EXPECT_EQ(cost->nll_before, cost->nll_after);
  EXPECT_FALSE(MeasureQuantization({}, *model, *model, [](int64_t, int64_t) {}).ok());
}

TEST_F(QuantizeTest, WritesOverNothing) {
  fs::create_directories(root_ + "/full");
  std::ofstream(root_ + "/full/mine") << "x";
  const auto report = Quantize(DType::kQ8_0, root_ + "/full");
  EXPECT_EQ(report.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(report.status().message()), HasSubstr("holds files"));
  EXPECT_FALSE(
      QuantizeModel(root_ + "/nowhere", DType::kQ8_0, root_ + "/out", [](int64_t, int64_t) {
      }).ok());
  EXPECT_FALSE(fs::exists(root_ + "/out"));
}

// Another time over changes nothing: what is in blocks stays as it is.
TEST_F(QuantizeTest, IsIdempotent) {
  ASSERT_TRUE(Quantize(DType::kQ8_0, root_ + "/once").ok());
  ASSERT_TRUE(
      QuantizeModel(root_ + "/once", DType::kQ8_0, root_ + "/twice", [](int64_t, int64_t) {}).ok());
  const auto read = [&](const std::string& name) {
    std::ifstream file(root_ + name + "/model.gguf", std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  EXPECT_EQ(read("/once"), read("/twice"));
}

}  // namespace
}  // namespace cinnabar
