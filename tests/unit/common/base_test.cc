#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "common/base/check.h"
#include "common/base/mapped_file.h"
#include "common/base/philox.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<int> Half(int number) {
  if (number % 2 != 0) return absl::InvalidArgumentError(absl::StrCat(number, " is odd"));
  return number / 2;
}

absl::StatusOr<int> Quarter(int number) {
  CINNABAR_ASSIGN_OR_RETURN(const int half, Half(number), "first half");
  CINNABAR_ASSIGN_OR_RETURN(const int quarter, Half(half), "second half of ", number);
  return quarter;
}

TEST(StatusTest, AnErrorSaysWhatWasBeingDone) {
  EXPECT_EQ(*Quarter(8), 2);
  EXPECT_EQ(Quarter(3).status().message(), "first half: 3 is odd");
  EXPECT_EQ(Quarter(6).status().message(), "second half of 6: 3 is odd");
  EXPECT_EQ(Quarter(6).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CheckDeathTest, AFailureNamesConditionAndMessage) {
  CINNABAR_CHECK(1 + 1 == 2) << "never shown";
  EXPECT_DEATH(CINNABAR_CHECK(1 + 1 == 3) << "sum of " << 2, "check failed: 1 \\+ 1 == 3 sum of 2");
}

// Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds).
TEST(PhiloxTest, AgreesWithThePublishedVectors) {
  const PhiloxWords zero = Philox4x32({{0, 0, 0, 0}}, 0, 0);
  EXPECT_THAT(zero.word, testing::ElementsAre(0x6627e8d5U, 0xe169c58dU, 0xbc57ac4cU, 0x9b00dbd8U));
  const PhiloxWords ones = Philox4x32({{~0U, ~0U, ~0U, ~0U}}, ~0U, ~0U);
  EXPECT_THAT(ones.word, testing::ElementsAre(0x408f276dU, 0x41c83b0eU, 0xa20bc7c6U, 0x6d5451fdU));
  const PhiloxWords pi =
      Philox4x32({{0x243f6a88U, 0x85a308d3U, 0x13198a2eU, 0x03707344U}}, 0xa4093822U, 0x299f31d0U);
  EXPECT_THAT(pi.word, testing::ElementsAre(0xd16cfe09U, 0x94fdccebU, 0x5001e420U, 0x24126ea1U));
}

TEST(PhiloxTest, AUniformIsNeverZeroNorOne) {
  EXPECT_GT(UniformFromWord(0), 0.0);
  EXPECT_LT(UniformFromWord(~0U), 1.0);
  EXPECT_GT(1.0 - UniformFromWord(~0U), 0.0);
}

TEST(MappedFileTest, MapsAndReleases) {
  const std::string path = testing::TempDir() + "/mapped_file_test";
  const std::string text(100000, 'x');
  std::ofstream(path) << text;
  absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->bytes().size(), text.size());
  file->Release(file->bytes().data() + 10, 90000);
  EXPECT_EQ(std::string(file->bytes().begin(), file->bytes().end()), text);
}

TEST(MappedFileTest, AMissingFileOrAFolderIsAnErrorNamingThePath) {
  EXPECT_EQ(MappedFile::Open("/nowhere/at/all").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(MappedFile::Open("/tmp").status().message()), HasSubstr("/tmp"));
  EXPECT_EQ(ReadFile(testing::TempDir() + "/mapped_file_test", 10).status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace cinnabar
