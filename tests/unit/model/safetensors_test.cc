#include "worker/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/model/checkpoint.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A file: header length, header, data.
std::string File(const std::string& header, size_t data_bytes) {
  const uint64_t size = header.size();
  std::string file(sizeof(size), '\0');
  std::memcpy(file.data(), &size, sizeof(size));
  return file + header + std::string(data_bytes, '\x01');
}

std::string WithLength(uint64_t length, const std::string& rest) {
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file + rest;
}

absl::StatusOr<std::vector<TensorEntry>> Read(const std::string& file) {
  return ReadSafetensorsHeader(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(file.data()), file.size()), "some file");
}

std::string Nested(int depth) { return std::string(depth, '[') + std::string(depth, ']'); }

struct BrokenFile {
  std::string name;
  std::string bytes;
  std::string message;  // part of the error
};

std::vector<BrokenFile> BrokenFiles() {
  const auto one = [](const std::string& entry, size_t data = 8) {
    return File(absl::StrCat(R"({"w":)", entry, "}"), data);
  };
  return {
      {"empty", "", "shorter than a header length"},
      {"seven_bytes", "1234567", "shorter than a header length"},
      {"length_beyond_the_file", WithLength(100, "{}"), "header of 100 bytes"},
      {"length_of_all_ones", WithLength(~uint64_t{0}, "{}"), "header of 18446744073709551615"},
      {"length_beyond_the_limit", WithLength(100'000'001, "{}"), "header of 100000001"},
      {"length_that_wraps", WithLength(~uint64_t{0} - 7, "{}"), "header of"},
      {"no_header", WithLength(0, ""), "not an object"},
      {"header_not_json", File("{nope", 0), "not JSON"},
      {"header_cut", File(R"({"w":{"dtype":"F32")", 0), "not JSON"},
      {"header_an_array", File("[1]", 0), "not an object"},
      {"header_with_a_tail", File("{} x", 0), "not JSON"},
      {"header_bad_utf8", File("{\"\xFF\":{}}", 0), "not JSON"},
      {"header_too_deep", File(absl::StrCat("{\"w\":", Nested(100000), "}"), 0), "nested deeper"},
      {"duplicate_tensor",
       File(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
            R"("w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
            8),
       "\"w\" appears twice"},
      {"duplicate_field", one(R"({"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]})"),
       "\"dtype\" appears twice"},
      {"metadata_a_list", File(R"({"__metadata__":[1]})", 0), "__metadata__ is not an object"},
      {"metadata_with_a_number", File(R"({"__metadata__":{"a":1}})", 0),
       "__metadata__ a is not a string"},
      {"tensor_a_number", one("3"), "tensor w: not an object"},
      {"nameless_tensor", File(R"({"":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8),
       "a name has"},
      {"endless_name",
       File(absl::StrCat("{\"", std::string(5000, 'n'),
                         R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})"),
            8),
       "a name has"},
      {"no_dtype", one(R"({"shape":[2],"data_offsets":[0,8]})"), "no dtype"},
      {"dtype_a_number", one(R"({"dtype":32,"shape":[2],"data_offsets":[0,8]})"), "no dtype"},
      {"dtype_unknown", one(R"({"dtype":"F23","shape":[2],"data_offsets":[0,8]})"),
       "unknown dtype \"F23\""},
      {"dtype_lower_case", one(R"({"dtype":"f32","shape":[2],"data_offsets":[0,8]})"),
       "unknown dtype"},
      {"no_shape", one(R"({"dtype":"F32","data_offsets":[0,8]})"), "no shape"},
      {"shape_a_number", one(R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})"), "no shape"},
      {"shape_negative", one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"),
       "not a natural number"},
      {"shape_fraction", one(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"),
       "not a natural number"},
      {"shape_text", one(R"({"dtype":"F32","shape":["2"],"data_offsets":[0,8]})"),
       "not a natural number"},
      {"shape_beyond_int64",
       one(R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]})"),
       "not a natural number"},
      {"shape_overflows",
       one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})"), "overflows"},
      {"shape_wraps_to_the_size",
       one(R"({"dtype":"F32","shape":[4611686018427387904,2,2],"data_offsets":[0,0]})", 0),
       "overflows"},
      {"bits_overflow",
       one(R"({"dtype":"F64","shape":[1152921504606846976],"data_offsets":[0,8]})"), "overflows"},
      {"shape_of_many_dimensions",
       one(R"({"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]})"),
       "18 dimensions"},
      {"half_a_byte", one(R"({"dtype":"F4","shape":[3],"data_offsets":[0,8]})"), "whole bytes"},
      {"no_offsets", one(R"({"dtype":"F32","shape":[2]})"), "no data_offsets"},
      {"one_offset", one(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), "no data_offsets"},
      {"three_offsets", one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})"),
       "no data_offsets"},
      {"offset_negative", one(R"({"dtype":"F32","shape":[2],"data_offsets":[-8,0]})"),
       "not natural numbers"},
      {"offset_null", one(R"({"dtype":"F32","shape":[2],"data_offsets":[null,8]})"),
       "not natural numbers"},
      {"offsets_turned", one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"),
       "are not inside"},
      {"offset_beyond_the_data", one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,12]})"),
       "are not inside"},
      {"offset_beyond_int64",
       one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]})"),
       "not natural numbers"},
      {"too_few_bytes", one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
       "takes 12 bytes"},
      {"too_many_bytes", one(R"({"dtype":"BF16","shape":[2],"data_offsets":[0,8]})"),
       "takes 4 bytes"},
      {"bytes_for_an_empty_tensor", one(R"({"dtype":"F32","shape":[0],"data_offsets":[0,8]})"),
       "takes 0 bytes"},
      {"overlap",
       File(R"({"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
            R"("w":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
            12),
       "overlaps another"},
      {"the_same_place_twice",
       File(R"({"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
            R"("w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
            8),
       "overlaps another"},
      {"gap",
       File(R"({"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
            R"("w":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
            12),
       "a gap of 4 bytes"},
      {"gap_at_the_start", one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
       "a gap of 4 bytes"},
      {"bytes_left_over", one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})"),
       "4 bytes after the last tensor"},
      {"data_without_tensors", File("{}", 8), "8 bytes after the last tensor"},
  };
}

TEST(SafetensorsTest, ABrokenFileIsAnErrorThatNamesIt) {
  for (const BrokenFile& broken : BrokenFiles()) {
    SCOPED_TRACE(broken.name);
    const absl::StatusOr<std::vector<TensorEntry>> tensors = Read(broken.bytes);
    ASSERT_FALSE(tensors.ok());
    EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument);
    const std::string message(tensors.status().message());
    EXPECT_THAT(message, HasSubstr("some file: "));
    EXPECT_THAT(message, HasSubstr(broken.message));
    EXPECT_LT(message.size(), 400);  // whatever the file holds
  }
}

TEST(SafetensorsTest, EveryPrefixOfAFileIsBroken) {
  const std::string file = File(
      R"({"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
      8);
  ASSERT_TRUE(Read(file).ok());
  for (size_t size = 0; size < file.size(); ++size) EXPECT_FALSE(Read(file.substr(0, size)).ok());
}

TEST(SafetensorsTest, ReadsEveryDTypeScalarsAndEmptyTensors) {
  const std::string file = File(R"({"__metadata__":{},)"
                                R"("b":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]},)"
                                R"("scalar":{"dtype":"F64","shape":[],"data_offsets":[3,11]},)"
                                R"("empty":{"dtype":"F32","shape":[0,7],"data_offsets":[11,11]},)"
                                R"("w":{"dtype":"BF16","shape":[2,3],"data_offsets":[11,23]},)"
                                R"("packed":{"dtype":"F4","shape":[2],"data_offsets":[23,24]}}   )",
                                24);
  const absl::StatusOr<std::vector<TensorEntry>> tensors = Read(file);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  std::vector<std::string> names;
  for (const TensorEntry& tensor : *tensors) names.push_back(tensor.name);
  EXPECT_THAT(names, ElementsAre("b", "scalar", "empty", "w", "packed"));
  EXPECT_EQ(DescribeTensor((*tensors)[3]), "BF16 [2, 3]");
  EXPECT_EQ((*tensors)[1].num_elements, 1);
}

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = absl::StrCat(testing::TempDir(), "/checkpoint_",
                           testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(absl::StrCat(folder_, "/", name), std::ios::binary) << bytes;
  }
  void WriteTensor(const std::string& file, const std::string& tensor) {
    Write(file, File(absl::StrCat("{\"", tensor,
                                  R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})"),
                     8));
  }
  std::string Error() {
    const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(folder_);
    return checkpoint.ok() ? "" : std::string(checkpoint.status().message());
  }
  std::string folder_;
};

TEST_F(CheckpointTest, ReadsShardsByTheirIndex) {
  WriteTensor("a.safetensors", "v");
  WriteTensor("b.safetensors", "w");
  WriteTensor("other.safetensors", "not in the index");
  Write("model.safetensors.index.json",
        R"({"metadata":{"total_size":16},"weight_map":{"v":"a.safetensors","w":"b.safetensors"}})");
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(folder_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->files().size(), 2);
  EXPECT_EQ(checkpoint->tensors().size(), 2);
  ASSERT_NE(checkpoint->Find("w"), nullptr);
  EXPECT_EQ(checkpoint->Find("x"), nullptr);
  const absl::StatusOr<HostMatrix> matrix = checkpoint->Matrix("w");
  ASSERT_TRUE(matrix.ok());
  EXPECT_EQ(matrix->rows, 1);
  EXPECT_EQ(matrix->cols, 2);
  checkpoint->Release("w");
  EXPECT_EQ(static_cast<const char*>(matrix->data)[7], '\x01');
}

TEST_F(CheckpointTest, ABrokenIndexIsAnError) {
  WriteTensor("a.safetensors", "v");
  const std::string index = "model.safetensors.index.json";
  const std::pair<const char*, const char*> cases[] = {
      {"", "not JSON"},
      {"[]", "no weight_map"},
      {"{}", "no weight_map"},
      {R"({"weight_map":{}})", "no weight_map"},
      {R"({"weight_map":[]})", "no weight_map"},
      {R"({"weight_map":{"v":1}})", "tensor v: its file"},
      {R"({"weight_map":{"v":""}})", "tensor v: its file"},
      {R"({"weight_map":{"v":"../a.safetensors"}})", "tensor v: its file"},
      {R"({"weight_map":{"v":"/etc/passwd"}})", "tensor v: its file"},
      {R"({"weight_map":{"v":"a.bin"}})", "tensor v: its file"},
      {R"({"weight_map":{"v":"missing.safetensors"}})", "missing.safetensors"},
      {R"({"weight_map":{"w":"a.safetensors"}})", "tensor w: is not in a.safetensors"},
      {R"({"weight_map":{"v":"a.safetensors","v":"a.safetensors"}})", "appears twice"}};
  for (const auto& [text, message] : cases) {
    Write(index, text);
    EXPECT_THAT(Error(), HasSubstr(message)) << text;
    EXPECT_THAT(Error(), HasSubstr(folder_)) << text;
  }
}

TEST_F(CheckpointTest, OneNameInTwoShardsIsAnError) {
  WriteTensor("a.safetensors", "v");
  WriteTensor("b.safetensors", "v");
  Write("c.safetensors", File(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8));
  Write("model.safetensors.index.json",
        R"({"weight_map":{"v":"a.safetensors","w":"c.safetensors","x":"b.safetensors"}})");
  EXPECT_THAT(Error(), HasSubstr("tensor v: is in"));
}

TEST_F(CheckpointTest, AFolderWithoutWeightsSaysWhatIsMissing) {
  EXPECT_THAT(Error(), HasSubstr("has no .safetensors, .gguf or PyTorch file"));
  Write("pytorch_model.bin", "x");
  EXPECT_THAT(Error(), HasSubstr("no zip archive"));
  WriteTensor("one.safetensors", "v");
  EXPECT_EQ(Error(), "");
  WriteTensor("two.safetensors", "w");
  EXPECT_THAT(Error(), HasSubstr("2 .safetensors files"));
  EXPECT_EQ(Checkpoint::Open("/nowhere").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(CheckpointTest, OnlyVectorsAndMatricesOfUsableDTypesAreRead) {
  Write("model.safetensors", File(R"({"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                                  R"("s":{"dtype":"F32","shape":[],"data_offsets":[8,12]},)"
                                  R"("c":{"dtype":"F32","shape":[1,1,1],"data_offsets":[12,16]}})",
                                  16));
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(folder_);
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_EQ(checkpoint->Matrix("i").status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(checkpoint->Matrix("i").status().message()),
              HasSubstr("tensor i is I64"));
  EXPECT_EQ(checkpoint->Matrix("s").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(checkpoint->Matrix("c").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(checkpoint->Matrix("none").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(CheckpointTest, WhatIsWrittenIsRead) {
  const std::vector<float> values = {1.5F, -2.0F, 0.0F, 1e-30F, 3.0F, 4.0F};
  const std::string path = folder_ + "/logits.safetensors";
  ASSERT_TRUE(WriteSafetensors(path, "logits", {2, 3}, values).ok());
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::OpenFile(path);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const absl::StatusOr<HostMatrix> matrix = checkpoint->Matrix("logits");
  ASSERT_TRUE(matrix.ok());
  EXPECT_EQ(matrix->rows, 2);
  EXPECT_EQ(matrix->cols, 3);
  EXPECT_EQ(std::memcmp(matrix->data, values.data(), values.size() * sizeof(float)), 0);
  EXPECT_FALSE(WriteSafetensors("/nowhere/at/all", "logits", {2, 3}, values).ok());
}

}  // namespace
}  // namespace cinnabar
