// Peak memory is what is stated: weights, working set, keys and values. Measured in a child
// process, so that other tests' memory does not count.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>

#include "common/base/check.h"
#include "tests/support/random_checkpoint.h"
#include "worker/engine/engine.h"

namespace cinnabar {
namespace {

// A field of /proc/self/status, in bytes: "VmHWM:    1234 kB".
int64_t StatusBytes(const char* field) {
  std::FILE* file = std::fopen("/proc/self/status", "r");
  CINNABAR_CHECK(file != nullptr);
  char line[256];
  long kib = -1;
  while (std::fgets(line, sizeof(line), file) != nullptr) {
    if (std::strncmp(line, field, std::strlen(field)) == 0) {
      CINNABAR_CHECK(std::sscanf(line + std::strlen(field), ": %ld", &kib) == 1);
    }
  }
  std::fclose(file);
  CINNABAR_CHECK(kib >= 0) << field;
  return int64_t{kib} << 10;
}

struct Usage {
  int64_t weights = 0;
  int64_t stated = 0;  // weights, workspace, and keys and values of the sequences
  int64_t grown = 0;   // peak resident memory above what the process had before loading
};

constexpr int32_t kLength = 256;
constexpr int32_t kSequences = 4;

Usage Run(const std::string& directory, DType dtype) {
  const int64_t before = StatusBytes("VmRSS");
  auto backend = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
  const ForwardLimits limits{
      .rows_max = kSequences * kLength, .sequences_max = kSequences, .positions_max = kLength};
  auto denoiser = LoadDenoiser(directory, *backend, {.weight_dtype = dtype}, limits);
  CINNABAR_CHECK(denoiser.ok()) << denoiser.status();
  Engine engine(**denoiser, {.limits = limits});
  for (int32_t i = 0; i < kSequences; ++i) {
    std::vector<bool> given(kLength, false);
    given[0] = true;
    auto state = MakeSequence(std::vector<TokenId>(kLength, 7), given,
                              {.sampler = "low_confidence", .num_steps = 2}, (*denoiser)->traits());
    CINNABAR_CHECK(state.ok()) << state.status();
    CINNABAR_CHECK(engine.Add(*std::move(state)).ok());
  }
  StepReport report;
  while (engine.num_sequences() > 0) {
    CINNABAR_CHECK(engine.Step(absl::InfinitePast(), report).ok());
  }
  const Denoiser::Memory memory = (*denoiser)->memory();
  return {.weights = memory.weights_bytes,
          .stated = memory.weights_bytes + memory.workspace_bytes +
                    memory.kv_bytes_per_position * kLength * kSequences,
          .grown = StatusBytes("VmHWM") - before};
}

Usage RunInChild(const std::string& directory, DType dtype) {
  int pipe_ends[2];
  CINNABAR_CHECK(pipe(pipe_ends) == 0);
  const pid_t child = fork();
  CINNABAR_CHECK(child >= 0);
  if (child == 0) {
    const Usage usage = Run(directory, dtype);
    CINNABAR_CHECK(write(pipe_ends[1], &usage, sizeof(usage)) == sizeof(usage));
    _exit(0);
  }
  close(pipe_ends[1]);
  Usage usage;
  EXPECT_EQ(read(pipe_ends[0], &usage, sizeof(usage)), static_cast<ssize_t>(sizeof(usage)));
  close(pipe_ends[0]);
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  return usage;
}

class MemoryTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    directory_ = testing::TempDir() + "memory_test_checkpoint";
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
    // 38 million parameters: 150 MB in float32.
    const absl::Status written = WriteRandomCheckpoint({.num_layers = 4,
                                                        .dim = 768,
                                                        .ffn = 2048,
                                                        .num_heads = 12,
                                                        .num_kv_heads = 12,
                                                        .vocabulary = 12000},
                                                       directory_);
    ASSERT_TRUE(written.ok()) << written;
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(directory_); }
  // The program's own, and what the allocator keeps: independent of the model.
  static constexpr int64_t kSlack = 16 << 20;
  static std::string directory_;
};
std::string MemoryTest::directory_;

// Sanitizers keep memory of their own.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SKIP_UNDER_SANITIZERS GTEST_SKIP() << "a sanitizer's memory would be counted"
#else
#define SKIP_UNDER_SANITIZERS
#endif

TEST_F(MemoryTest, Float32PeaksAtWhatIsStated) {
  SKIP_UNDER_SANITIZERS;
  const Usage usage = RunInChild(directory_, DType::kF32);
  EXPECT_GT(usage.weights, 140 << 20);
  EXPECT_LE(usage.grown, usage.stated + usage.stated / 20 + kSlack)
      << "stated " << (usage.stated >> 20) << " MiB, grown " << (usage.grown >> 20);
  EXPECT_GE(usage.grown, usage.stated * 8 / 10) << "more is stated than is used";
}

// No second copy in float32.
TEST_F(MemoryTest, Bfloat16TakesHalf) {
  SKIP_UNDER_SANITIZERS;
  const Usage wide = RunInChild(directory_, DType::kF32);
  const Usage narrow = RunInChild(directory_, DType::kBf16);
  EXPECT_LE(narrow.weights, wide.weights * 6 / 10);
  EXPECT_LE(narrow.grown, narrow.stated + narrow.stated / 20 + kSlack)
      << "stated " << (narrow.stated >> 20) << " MiB, grown " << (narrow.grown >> 20);
}

}  // namespace
}  // namespace cinnabar
