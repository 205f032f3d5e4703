#include "common/gguf/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/tokenizer/tokenizer.h"
#include "worker/model/checkpoint.h"
#include "worker/model/family.h"
#include "worker/model/gguf_model.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename Word>
std::string Bytes(Word value) {
  std::string bytes(sizeof(value), '\0');
  std::memcpy(bytes.data(), &value, sizeof(value));
  return bytes;
}
std::string Text(const std::string& text) { return Bytes<uint64_t>(text.size()) + text; }

// Writes a file piece by piece.
struct File {
  uint32_t version = 3;
  std::vector<std::string> fields;
  std::vector<std::string> tensors;
  size_t data_bytes = 0;

  File& Add(const std::string& key, GgufType type, const std::string& value) {
    fields.push_back(Text(key) + Bytes(static_cast<uint32_t>(type)) + value);
    return *this;
  }
  File& U32(const std::string& key, uint32_t value) {
    return Add(key, GgufType::kU32, Bytes(value));
  }
  File& String(const std::string& key, const std::string& value) {
    return Add(key, GgufType::kString, Text(value));
  }
  File& Array(const std::string& key, GgufType element, uint64_t count, const std::string& bytes) {
    return Add(key, GgufType::kArray, Bytes(static_cast<uint32_t>(element)) + Bytes(count) + bytes);
  }
  // Dimensions as the file has them: innermost first.
  File& Tensor(const std::string& name, const std::vector<uint64_t>& dimensions, uint32_t type,
               uint64_t offset) {
    std::string entry = Text(name) + Bytes(static_cast<uint32_t>(dimensions.size()));
    for (const uint64_t size : dimensions) entry += Bytes(size);
    tensors.push_back(entry + Bytes(type) + Bytes(offset));
    return *this;
  }
  File& Data(size_t bytes) {
    data_bytes = bytes;
    return *this;
  }
  std::string Write() const {
    std::string file =
        "GGUF" + Bytes(version) + Bytes<uint64_t>(tensors.size()) + Bytes<uint64_t>(fields.size());
    for (const std::string& field : fields) file += field;
    for (const std::string& tensor : tensors) file += tensor;
    file.append((32 - file.size() % 32) % 32, '\0');
    return file + std::string(data_bytes, '\x01');
  }
};

absl::StatusOr<GgufHeader> Read(const std::string& file) {
  return GgufHeader::Read(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(file.data()), file.size()), "some file");
}

File Dream() {
  File file;
  file.String("general.architecture", "dream")
      .U32("dream.context_length", 64)
      .U32("dream.embedding_length", 32)
      .U32("dream.block_count", 1)
      .U32("dream.feed_forward_length", 48)
      .U32("dream.attention.head_count", 2)
      .Add("dream.attention.layer_norm_rms_epsilon", GgufType::kF32, Bytes(1e-5F))
      .U32("tokenizer.ggml.mask_token_id", 3)
      .Tensor("token_embd.weight", {32, 5}, 8, 0)
      .Data(5 * 34);
  return file;
}

TEST(GgufTest, ReadsFieldsAndTensors) {
  File file;
  file.U32("general.alignment", 64)
      .Add("a.bool", GgufType::kBool, Bytes(uint8_t{1}))
      .String("a.text", "true")
      .Add("a.negative", GgufType::kI32, Bytes(int32_t{-1}))
      .Add("a.double", GgufType::kF64, Bytes(2.5))
      .Array("a.strings", GgufType::kString, 2, Text("x") + Text(""))
      .Array("a.numbers", GgufType::kI32, 2, Bytes(int32_t{7}) + Bytes(int32_t{8}))
      .Tensor("w", {32, 3, 2}, 2, 64)
      .Tensor("v", {5}, 0, 0)
      .Data(64 + 6 * 18 + 64);
  const std::string bytes = file.Write();
  const absl::StatusOr<GgufHeader> header = Read(bytes);
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->Natural("general.alignment")->value(), 64);
  EXPECT_EQ(header->Natural("no such")->has_value(), false);
  EXPECT_TRUE(header->Bool("a.bool")->value());
  EXPECT_TRUE(header->Bool("a.text")->value());
  EXPECT_EQ(header->Number("a.double")->value(), 2.5);
  EXPECT_EQ(header->Number("general.alignment")->value(), 64.0);
  EXPECT_EQ(*header->String("a.text"), "true");
  EXPECT_THAT(*header->Strings("a.strings"), ElementsAre("x", ""));
  EXPECT_THAT(*header->Naturals("a.numbers"), ElementsAre(7, 8));
  for (const absl::Status& wrong :
       {header->Natural("a.negative").status(), header->Natural("a.text").status(),
        header->Number("a.bool").status(), header->Bool("a.double").status(),
        header->String("a.double").status(), header->Strings("a.numbers").status(),
        header->Naturals("a.strings").status()}) {
    EXPECT_EQ(wrong.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(wrong.message(), HasSubstr("some file: field a."));
  }
  ASSERT_EQ(header->tensors().size(), 2U);
  EXPECT_EQ(header->tensors()[0].name, "v");
  const GgufTensor* w = header->FindTensor("w");
  ASSERT_NE(w, nullptr);
  EXPECT_THAT(w->shape, ElementsAre(2, 3, 32));
  EXPECT_EQ(w->dtype, "Q4_0");
  EXPECT_EQ(w->begin_byte % 64, 0);
  EXPECT_EQ(w->end_byte - w->begin_byte, 6 * 18);
  EXPECT_EQ(header->tensors()[0].end_byte - header->tensors()[0].begin_byte, 20);
}

struct BrokenFile {
  std::string name;
  std::string bytes;
  std::string message;
};

std::vector<BrokenFile> BrokenFiles() {
  const auto tensor = [](const std::vector<uint64_t>& dimensions, uint32_t type, uint64_t offset,
                         size_t data = 256) {
    return File().Tensor("w", dimensions, type, offset).Data(data).Write();
  };
  const auto counts = [](uint64_t tensors, uint64_t fields) {
    return "GGUF" + Bytes(uint32_t{3}) + Bytes(tensors) + Bytes(fields);
  };
  File version;
  version.version = 4;
  return {
      {"empty", "", "does not begin with GGUF"},
      {"magic", "GGML" + std::string(60, '\0'), "does not begin with GGUF"},
      {"version", version.Write(), "version 4"},
      {"cut_header", "GGUF" + Bytes(uint32_t{3}) + "123", "ends in its header"},
      {"many_tensors", counts(~uint64_t{0}, 0), "18446744073709551615 tensors"},
      {"many_fields", counts(0, uint64_t{1} << 60), "fields in"},
      {"long_key", counts(0, 1) + Bytes(~uint64_t{0}) + std::string(32, 'k'), "a key does not fit"},
      {"unknown_type", File().Add("k", static_cast<GgufType>(13), "").Data(64).Write(),
       "field k: unknown type 13"},
      {"twice", File().U32("k", 1).U32("k", 2).Write(), "field k: appears twice"},
      {"array_of_arrays",
       File().Array("k", GgufType::kArray, 1, std::string(32, '\0')).Data(64).Write(),
       "array of arrays"},
      {"huge_array", File().Array("k", GgufType::kU64, uint64_t{1} << 61, "").Data(64).Write(),
       "field k: ends beyond"},
      {"huge_strings", File().Array("k", GgufType::kString, ~uint64_t{0}, "").Data(64).Write(),
       "field k: ends beyond"},
      {"long_string", File().Add("k", GgufType::kString, Bytes(~uint64_t{0})).Data(64).Write(),
       "field k: ends beyond"},
      {"no_dimensions", tensor({}, 0, 0), "tensor w: 1 to 4 dimensions"},
      {"five_dimensions", tensor({1, 1, 1, 1, 1}, 0, 0), "1 to 4 dimensions"},
      {"zero_dimension", tensor({4, 0}, 0, 0), "a dimension is 0"},
      {"overflow", tensor({uint64_t{1} << 40, uint64_t{1} << 40}, 0, 0), "overflows"},
      {"huge_dimension", tensor({~uint64_t{0}}, 0, 0), "overflows"},
      {"unknown_dtype", tensor({4}, 99, 0), "unknown type 99"},
      {"part_of_a_block", tensor({33}, 8, 0), "not whole blocks of Q8_0"},
      {"beyond_the_file", tensor({64, 4}, 0, 0), "ends beyond the file"},
      {"offset_beyond", tensor({4}, 0, uint64_t{1} << 62), "ends beyond the file"},
      {"misaligned", tensor({4}, 0, 8), "not aligned"},
      {"no_alignment", File().U32("general.alignment", 0).Write(), "general.alignment"},
      {"odd_alignment", File().U32("general.alignment", 48).Write(), "general.alignment"},
      {"two_tensors", File().Tensor("w", {4}, 0, 0).Tensor("w", {4}, 0, 32).Data(64).Write(),
       "tensor w: appears twice"},
      {"overlap", File().Tensor("v", {16}, 0, 0).Tensor("w", {4}, 0, 32).Data(96).Write(),
       "tensor w: overlaps"}};
}

TEST(GgufTest, RefusesWhatDeviates) {
  for (const BrokenFile& broken : BrokenFiles()) {
    SCOPED_TRACE(broken.name);
    const absl::StatusOr<GgufHeader> header = Read(broken.bytes);
    ASSERT_FALSE(header.ok());
    EXPECT_EQ(header.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(header.status().message(), HasSubstr(broken.message));
    EXPECT_THAT(header.status().message(), HasSubstr("some file"));
  }
}

TEST(GgufTest, EveryCutFileIsRefusedOrWhole) {
  const std::string whole = Dream().Write();
  ASSERT_TRUE(Read(whole).ok());
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(Read(whole.substr(0, size)).ok()) << size;
  }
}

absl::StatusOr<ModelSpec> SpecOf(const File& file) {
  const std::string bytes = file.Write();
  const absl::StatusOr<GgufHeader> header = Read(bytes);
  if (!header.ok()) return header.status();
  const absl::StatusOr<CheckpointTexts> texts = GgufTexts(*header);
  if (!texts.ok()) return texts.status();
  const absl::StatusOr<CheckpointFacts> facts = ReadCheckpointFacts(*texts, "here");
  if (!facts.ok()) return facts.status();
  return ReadModelSpec(*facts);
}

TEST(GgufTest, MetadataMakesASpec) {
  const absl::StatusOr<ModelSpec> spec = SpecOf(Dream());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->traits.family, "dream");
  EXPECT_TRUE(spec->traits.shift_logits);
  EXPECT_EQ(spec->traits.vocab_size, 5);
  EXPECT_EQ(spec->traits.mask_token, 3);
  EXPECT_EQ(spec->mlp_dim, 48);
  EXPECT_EQ(spec->rope_theta, 10000.0);
  EXPECT_TRUE(spec->tied_head);  // there is no output.weight

  const std::pair<File, std::string> refused[] = {
      {File().String("general.architecture", "llama"), "general.architecture is \"llama\""},
      {File().String("general.architecture", "dream"), "dream.embedding_length: missing"},
      {Dream().Add("diffusion.shift_logits", GgufType::kBool, Bytes(uint8_t{0})), "shift_logits"},
      {Dream().U32("dream.rope.dimension_count", 8), "rope.dimension_count: 8 of 16"},
      {Dream().String("dream.rope.scaling.type", "yarn"), "rope scaling"},
      {Dream().U32("dream.attention.sliding_window", 8), "sliding windows"},
      {Dream().U32("split.count", 2), "split files"},
      {Dream().U32("dream.attention.head_count_kv", 3), "do not divide"},
      {Dream()
           .String("tokenizer.ggml.model", "llama")
           .Array("tokenizer.ggml.tokens", GgufType::kString, 1, Text("a")),
       "tokenizer.ggml.model: \"llama\""}};
  for (const auto& [file, message] : refused) {
    const absl::StatusOr<ModelSpec> status = SpecOf(file);
    ASSERT_FALSE(status.ok()) << message;
    EXPECT_THAT(status.status().message(), HasSubstr(message));
  }
}

TEST(GgufTest, TensorsGetTheFamilysNames) {
  File file;
  file.String("general.architecture", "llada-moe")
      .Tensor("blk.7.ffn_down_exps.weight", {32, 3, 2}, 8, 0)
      .Tensor("blk.7.attn_q_norm.weight", {4}, 0, 224)
      .Tensor("blk.7.something.bias", {4}, 0, 256)
      .Tensor("blk.07.attn_q.weight", {4}, 0, 288)
      .Tensor("output.weight", {4}, 0, 320)
      .Data(400);
  const std::string bytes = file.Write();
  const absl::StatusOr<GgufHeader> header = Read(bytes);
  ASSERT_TRUE(header.ok()) << header.status();
  const absl::StatusOr<std::vector<TensorEntry>> tensors = GgufTensors(*header);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  std::vector<std::string> names;
  for (const TensorEntry& tensor : *tensors) names.push_back(tensor.name);
  EXPECT_THAT(names,
              ElementsAre("model.layers.7.mlp.experts.0.down_proj.weight",
                          "model.layers.7.mlp.experts.1.down_proj.weight",
                          "model.layers.7.self_attn.q_norm.weight", "model.layers.7.something.bias",
                          "blk.07.attn_q.weight", "lm_head.weight"));
  EXPECT_THAT((*tensors)[1].shape, ElementsAre(3, 32));
  EXPECT_EQ((*tensors)[1].begin_byte, (*tensors)[0].end_byte);
  EXPECT_EQ((*tensors)[1].end_byte - (*tensors)[1].begin_byte, 3 * 34);

  File frequencies;
  frequencies.String("general.architecture", "llada")
      .Tensor("rope_freqs.weight", {4}, 0, 0)
      .Data(32);
  const std::string other = frequencies.Write();
  EXPECT_EQ(GgufTensors(*Read(other)).status().code(), absl::StatusCode::kUnimplemented);
}

std::string Golden(const std::string& name) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  return absl::StrCat(source == nullptr ? "." : source, "/tests/golden/models/", name);
}

// The file and the folder that it was made from say the same.
TEST(GgufTest, AFileIsTheFolderItWasMadeFrom) {
  for (const std::string name : {"dream", "llada"}) {
    SCOPED_TRACE(name);
    const std::string gguf = Golden(name == "dream" ? "dream_f32.gguf" : "llada_f16.gguf");
    const absl::StatusOr<CheckpointFacts> file = ReadCheckpointFacts(gguf);
    const absl::StatusOr<CheckpointFacts> folder = ReadCheckpointFacts(Golden(name));
    ASSERT_TRUE(file.ok() && folder.ok()) << file.status() << folder.status();
    const absl::StatusOr<ModelSpec> from_file = ReadModelSpec(*file);
    const absl::StatusOr<ModelSpec> from_folder = ReadModelSpec(*folder);
    ASSERT_TRUE(from_file.ok() && from_folder.ok()) << from_file.status() << from_folder.status();
    EXPECT_EQ(from_file->traits.mask_token, from_folder->traits.mask_token);
    EXPECT_EQ(from_file->traits.tokenizer_size, from_folder->traits.tokenizer_size);
    EXPECT_EQ(from_file->traits.eos_tokens, from_folder->traits.eos_tokens);
    EXPECT_EQ(from_file->traits.eot_token, from_folder->traits.eot_token);
    EXPECT_EQ(from_file->traits.positions_max, from_folder->traits.positions_max);
    ModelSpec spec = *from_file;
    const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(gguf);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_THAT(CheckTensors(*checkpoint, spec), ElementsAre());

    const absl::StatusOr<Tokenizer> ours = Tokenizer::Load(gguf);
    const absl::StatusOr<Tokenizer> theirs = Tokenizer::Load(Golden(name));
    ASSERT_TRUE(ours.ok() && theirs.ok()) << ours.status() << theirs.status();
    for (const std::string text :
         {"the function returns", "I'll DON'T 2025\n\n", "e\xCC\x81", "a<|endoftext|>b", ""}) {
      EXPECT_EQ(ours->Encode(text), theirs->Encode(text)) << text;
    }
  }
}

// F32 rows of q under both orders.
TEST(GgufTest, InterleavedHeadsComeBackInHalves) {
  const absl::StatusOr<Checkpoint> file = Checkpoint::Open(Golden("llada_f16.gguf"));
  const absl::StatusOr<Checkpoint> folder = Checkpoint::Open(Golden("llada"));
  ASSERT_TRUE(file.ok() && folder.ok());
  for (const std::string part : {"q_proj", "k_proj", "v_proj"}) {
    const std::string name = absl::StrCat("model.transformer.blocks.1.", part, ".weight");
    const absl::StatusOr<HostMatrix> halves = file->Matrix(name);
    const absl::StatusOr<HostMatrix> want = folder->Matrix(name);
    ASSERT_TRUE(halves.ok() && want.ok()) << halves.status() << want.status();
    ASSERT_EQ(halves->dtype, DType::kF16);
    for (int64_t i = 0; i < want->rows * want->cols; ++i) {
      _Float16 got;
      float expected;
      std::memcpy(&got, static_cast<const char*>(halves->data) + 2 * i, 2);
      std::memcpy(&expected, static_cast<const char*>(want->data) + 4 * i, 4);
      ASSERT_EQ(static_cast<float>(got), static_cast<float>(static_cast<_Float16>(expected)))
          << name << " element " << i;
    }
    file->Release(name);
  }
}

}  // namespace
}  // namespace cinnabar
