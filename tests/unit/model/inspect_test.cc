#include "worker/model/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/json.h"

namespace cinnabar {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

std::string GoldenModel(const std::string& name) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  return absl::StrCat(source == nullptr ? "." : source, "/tests/golden/models/", name);
}

// A copy of a golden model that a test may spoil.
std::string CopyOf(const std::string& name, const std::string& copy) {
  const std::string folder = absl::StrCat(testing::TempDir(), "/inspect_", copy);
  std::filesystem::remove_all(folder);
  std::filesystem::copy(GoldenModel(name), folder, std::filesystem::copy_options::recursive);
  return folder;
}

void EditConfig(const std::string& folder, const std::string& key, const nlohmann::json& value) {
  nlohmann::json config = *ReadJsonFile(folder + "/config.json", 1U << 20);
  config[key] = value;
  std::ofstream(folder + "/config.json") << config.dump();
}

ModelReport Inspect(const std::string& folder) {
  absl::StatusOr<ModelReport> report = InspectModel(folder);
  EXPECT_TRUE(report.ok()) << report.status();
  return report.ok() ? *std::move(report) : ModelReport{};
}

TEST(InspectTest, EveryGoldenModelLoads) {
  for (const auto& entry : std::filesystem::directory_iterator(GoldenModel(""))) {
    SCOPED_TRACE(entry.path().string());
    const ModelReport report = Inspect(entry.path().string());
    EXPECT_THAT(report.problems, IsEmpty());
    ASSERT_TRUE(report.spec.has_value());
    EXPECT_GT(report.num_parameters, 10000);
    EXPECT_GT(report.weights_f32_bytes, report.weights_half_bytes);
    EXPECT_GT(report.workspace_bytes, 0);
    EXPECT_GT(report.kv_bytes_per_position, 0);
    EXPECT_THAT(FormatReport(report), HasSubstr("ready to serve"));
    EXPECT_TRUE(ReportToJson(report)["loads"].get<bool>());
  }
}

TEST(InspectTest, TellsWhatTheModelIs) {
  const ModelReport report = Inspect(GoldenModel("sdar_b4"));
  const std::string text = FormatReport(report);
  EXPECT_THAT(text,
              AllOf(HasSubstr("SDARForCausalLM"), HasSubstr("block-causal, blocks of 4"),
                    HasSubstr("block_dynamic"), HasSubstr("277 rows"), HasSubstr("in 2 files")));
  const nlohmann::ordered_json json = ReportToJson(report);
  EXPECT_EQ(json["family"], "sdar");
  EXPECT_EQ(json["tokens"]["mask"], 272);
  EXPECT_EQ(json["tokens"]["eot"], nullptr);
  EXPECT_EQ(json["network"]["causal_block_length"], 4);
  EXPECT_EQ(json["dtypes"]["F32"]["tensors"], 25);
  // Two layers of two heads of 10, keys and values, four bytes each.
  EXPECT_EQ(json["memory"]["kv_bytes_per_position"], 2 * 2 * 10 * 2 * 4);
}

TEST(InspectTest, AnUnsupportedArchitectureStillReports) {
  const std::string folder = CopyOf("sdar_b8", "unsupported");
  EditConfig(folder, "architectures", {"BD3LM"});
  const ModelReport report = Inspect(folder);
  EXPECT_FALSE(report.spec.has_value());
  EXPECT_THAT(report.problems, Contains(AllOf(HasSubstr("unsupported: "), HasSubstr("window"))));
  EXPECT_GT(report.num_parameters, 10000);
  EXPECT_THAT(FormatReport(report), AllOf(HasSubstr("cannot be served"), HasSubstr("BD3LM")));
  EXPECT_EQ(ReportToJson(report)["family"], nullptr);
}

TEST(InspectTest, NamesTensorsThatDoNotFit) {
  std::string folder = CopyOf("dream", "wrong_shape");
  EditConfig(folder, "intermediate_size", 47);
  EXPECT_THAT(Inspect(folder).problems,
              Contains(AllOf(HasSubstr("wrong shape: model.layers.1.mlp.down_proj.weight is F32 "
                                       "[36, 46] in model.safetensors, "),
                             HasSubstr("[36, 47]"))));
  folder = CopyOf("dream", "missing");
  EditConfig(folder, "num_hidden_layers", 3);
  EXPECT_THAT(
      Inspect(folder).problems,
      Contains(HasSubstr("missing tensor: model.layers.2.self_attn.q_proj.weight [36, 36]")));
  // Biases that the architecture would leave out change every number.
  folder = CopyOf("dream", "unexpected");
  EditConfig(folder, "architectures", {"A2DLlamaLMHeadModel"});
  EXPECT_THAT(Inspect(folder).problems,
              Contains(HasSubstr(
                  "unexpected tensor: model.layers.0.self_attn.q_proj.bias in model.safetensors")));
}

// A shard of a wrong type, in a folder whose index splits the tensors over files.
TEST(InspectTest, NamesTheShardOfATensorThatDoesNotFit) {
  const std::string folder = CopyOf("dream", "wrong_dtype");
  const std::string name = "model.norm.weight";
  std::ifstream whole(folder + "/model.safetensors", std::ios::binary);
  uint64_t size = 0;
  whole.read(reinterpret_cast<char*>(&size), sizeof(size));
  std::string header(size, '\0');
  whole.read(header.data(), static_cast<std::streamsize>(size));
  const std::string data((std::istreambuf_iterator<char>(whole)), std::istreambuf_iterator<char>());
  nlohmann::json tensors = nlohmann::json::parse(header);
  ASSERT_TRUE(tensors.contains(name));
  tensors[name]["dtype"] = "I32";
  header = tensors.dump();
  size = header.size();
  std::ofstream shard(folder + "/model-00001-of-00001.safetensors", std::ios::binary);
  shard.write(reinterpret_cast<const char*>(&size), sizeof(size));
  shard << header << data;
  shard.close();
  std::filesystem::remove(folder + "/model.safetensors");
  nlohmann::json index = {{"weight_map", nlohmann::json::object()}};
  for (const auto& [tensor, entry] : tensors.items()) {
    if (tensor != "__metadata__") index["weight_map"][tensor] = "model-00001-of-00001.safetensors";
  }
  std::ofstream(folder + "/model.safetensors.index.json") << index;
  EXPECT_THAT(Inspect(folder).problems,
              Contains(HasSubstr(
                  "unsupported: model.norm.weight is I32 in model-00001-of-00001.safetensors")));
}

TEST(InspectTest, TensorsThatAreNotReadAreANote) {
  const std::string folder = CopyOf("dream", "unused");
  EditConfig(folder, "tie_word_embeddings", true);
  const ModelReport report = Inspect(folder);
  EXPECT_THAT(report.problems, IsEmpty());
  EXPECT_THAT(report.notes, Contains(HasSubstr("1 tensor is not read: lm_head.weight")));
}

TEST(InspectTest, BrokenWeightsAreAProblemAndABrokenConfigAnError) {
  const std::string folder = CopyOf("dream", "broken");
  std::filesystem::resize_file(folder + "/model.safetensors", 20000);
  const ModelReport report = Inspect(folder);
  EXPECT_TRUE(report.spec.has_value());
  EXPECT_THAT(report.problems, Contains(HasSubstr("model.safetensors: ")));
  std::ofstream(folder + "/config.json") << "{";
  EXPECT_EQ(InspectModel(folder).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(InspectModel("/nowhere").status().code(), absl::StatusCode::kNotFound);
}

TEST(InspectTest, ControlCharactersOfAFileAreNotPrinted) {
  const std::string folder = CopyOf("dream", "escape");
  EditConfig(folder, "architectures", {"Some\x1b[2JModel"});
  EXPECT_THAT(FormatReport(Inspect(folder)),
              AllOf(Not(HasSubstr("\x1b")), HasSubstr("Some?[2JModel")));
}

}  // namespace
}  // namespace cinnabar
