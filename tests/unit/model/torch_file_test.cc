#include "worker/model/torch_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

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
std::string Byte(int value) { return std::string(1, static_cast<char>(value)); }

// An archive of entries as they are; `method` 8 would mean deflated.
std::string Zip(const std::vector<std::pair<std::string, std::string>>& entries,
                uint16_t method = 0) {
  std::string file, directory;
  for (const auto& [name, data] : entries) {
    const std::string sizes =
        Bytes(static_cast<uint32_t>(data.size())) + Bytes(static_cast<uint32_t>(data.size()));
    const std::string lengths = Bytes(static_cast<uint16_t>(name.size())) + Bytes(uint16_t{0});
    const std::string common =
        Bytes(uint16_t{0}) + Bytes(method) + Bytes(uint32_t{0}) + Bytes(uint32_t{0}) + sizes;
    directory += Bytes(0x02014B50U) + Bytes(uint16_t{0}) + Bytes(uint16_t{0}) + common + lengths +
                 Bytes(uint16_t{0}) + Bytes(uint16_t{0}) + Bytes(uint16_t{0}) + Bytes(uint32_t{0}) +
                 Bytes(static_cast<uint32_t>(file.size())) + name;
    file += Bytes(0x04034B50U) + Bytes(uint16_t{0}) + common + lengths + name + data;
  }
  const auto at = static_cast<uint32_t>(file.size());
  const auto count = static_cast<uint16_t>(entries.size());
  return file + directory + Bytes(0x06054B50U) + Bytes(uint32_t{0}) + Bytes(count) + Bytes(count) +
         Bytes(static_cast<uint32_t>(directory.size())) + Bytes(at) + Bytes(uint16_t{0});
}

absl::StatusOr<std::vector<TensorEntry>> Read(const std::string& file) {
  return ReadTorchFile(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(file.data()), file.size()), "some file");
}

// --- Pickles by hand

std::string Text(const std::string& text) {
  return "X" + Bytes(static_cast<uint32_t>(text.size())) + text;
}
std::string Int(int32_t value) { return "J" + Bytes(value); }
std::string Tuple(const std::string& items) { return "(" + items + "t"; }
std::string Storage(const std::string& type, int32_t count) {
  return Tuple(Text("storage") + "ctorch\n" + type + "\n" + Text("0") + Text("cpu") + Int(count)) +
         "Q";
}
std::string Tensor(const std::string& storage, int32_t offset, const std::string& shape,
                   const std::string& strides) {
  return "ctorch._utils\n_rebuild_tensor_v2\n" +
         Tuple(storage + Int(offset) + Tuple(shape) + Tuple(strides) + Byte(0x89) + "}") + "R";
}
std::string Vector(int32_t count, int32_t offset = 0, int32_t stored = 8) {
  return Tensor(Storage("FloatStorage", stored), offset, Int(count), Int(1));
}
std::string Dict(const std::string& items) { return "}(" + items + "u"; }
std::string Pickle(const std::string& operations) {
  return Byte(0x80) + Byte(2) + operations + ".";
}
std::string Saved(const std::string& operations) {
  return Zip({{"x/data.pkl", Pickle(operations)}, {"x/data/0", std::string(32, '\1')}});
}

std::string MessageOf(const std::string& file) {
  return std::string(Read(file).status().message());
}

TEST(TorchFileTest, ReadsTensorsWhereTheyLie) {
  const std::string file =
      Saved(Dict(Text("v") + Vector(3, 2) + Text("m") +
                 Tensor(Storage("HalfStorage", 16), 4, Int(2) + Int(3), Int(3) + Int(1)) +
                 Text("step") + Int(5)));
  const auto tensors = Read(file);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 2U);
  const auto data = static_cast<int64_t>(file.find("x/data/0") + 8);
  EXPECT_EQ((*tensors)[0].name, "m");  // at the same byte as v: 4 halves are 2 floats
  EXPECT_EQ((*tensors)[0].dtype, "F16");
  EXPECT_THAT((*tensors)[0].shape, ElementsAre(2, 3));
  for (const TensorEntry& tensor : *tensors) {
    EXPECT_EQ(tensor.begin_byte, data + 8);
    EXPECT_EQ(tensor.end_byte, data + 20);
  }
}

TEST(TorchFileTest, RefusesWhatCouldRun) {
  const std::pair<std::string, std::string> hostile[] = {
      {"cposix\nsystem\n" + Tuple(Text("echo owned")) + "R", "names posix.system"},
      {"c__builtin__\neval\n" + Tuple(Text("1")) + "R", "names __builtin__.eval"},
      {"cbuiltins\ngetattr\n" + Tuple("") + "R", "names builtins.getattr"},
      {Text("os") + Text("system") + Byte(0x93), "names os.system"},
      {"ctorch._utils\n_rebuild_tensor_v2 \n", "which is none"},
      {"cnumpy.core.multiarray\n_reconstruct\n", "names numpy.core.multiarray._reconstruct"},
      {"ctorch\nFloatStorage\n)R", "calls a storage type"},
      {"ccollections\nOrderedDict\n" + Tuple("]") + "R", "OrderedDict with arguments"},
      {"(iposix\nsystem\n", "operation 105"},    // INST
      {"}" + Byte(0x81), "operation 129"},       // NEWOBJ
      {"P0\n", "operation 80"},                  // PERSID
      {Byte(0x82) + Byte(1), "operation 130"}};  // EXT1
  for (const auto& [operations, message] : hostile) {
    const auto tensors = Read(Saved(operations));
    ASSERT_FALSE(tensors.ok()) << message;
    EXPECT_EQ(tensors.status().code(), absl::StatusCode::kUnimplemented) << tensors.status();
    EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(message));
    EXPECT_THAT(std::string(tensors.status().message()), HasSubstr("some file"));
  }
}

TEST(TorchFileTest, RefusesWhatIsBroken) {
  const std::string fine = Vector(3);
  const auto dict = [](const std::string& value) { return Dict(Text("w") + value); };
  const auto averaged = [&](const std::string& ema) {
    return Dict(Text("model") + dict(fine) + Text("ema") + ema);
  };
  const auto floats = [](const std::string& shape, const std::string& strides) {
    return Tensor(Storage("FloatStorage", 8), 0, shape, strides);
  };
  const std::pair<std::string, std::string> broken[] = {
      {"", "other than one value"},
      {"NN", "other than one value"},
      {"(N", "other than one value"},
      {"0", "empty stack"},
      {"(0", "empty stack"},
      {"t", "has no mark"},
      {"q" + Byte(1), "empty stack"},
      {"h" + Byte(1), "recalls what it never kept"},
      {"X" + Bytes(~uint32_t{0}), "is cut"},
      {"Na", "no list or dictionary"},
      {"NNa", "no list or dictionary"},
      {"}(Nu", "half an item"},
      {"Nb", "no dictionary"},
      {"]Nb", "no dictionary"},
      {"NNR", "calls what is no global"},
      {"N", "no dictionary"},
      {"}", "no tensors"},
      {dict("N"), "no tensors"},
      {dict("ctorch._utils\n_rebuild_parameter\n" + Tuple("N") + "R"), "without a tensor"},
      {dict(Tensor("N", 0, Int(1), Int(1))), "not rebuilt from"},
      {dict(floats(Int(2), "")), "no natural number"},
      {dict(floats(Int(-2), Int(1))), "no natural number"},
      {dict(floats(Text("2"), Int(1))), "no natural number"},
      {dict(floats(Int(2) + Int(0), Int(1) + Int(1))), "a dimension is 0"},
      {dict(Vector(9)), "outside its storage"},
      {dict(Vector(3, 6)), "outside its storage"},
      {dict(Vector(3, -1)), "no natural number"},
      {dict(Vector(3, 0, 9)), "outside its storage"},
      {averaged(Dict(Text("x") + "N")), "no shadow_params"},
      {averaged(Dict(Text("shadow_params") + "]")), "fewer tensors"},
      {averaged(Dict(Text("shadow_params") + "](" + fine + fine + "e")), "more tensors"},
      {averaged(Dict(Text("shadow_params") + "](" + Vector(2) + "e")), "of the shape of w"}};
  for (const auto& [operations, message] : broken) {
    const auto tensors = Read(Saved(operations));
    ASSERT_FALSE(tensors.ok()) << message;
    EXPECT_EQ(tensors.status().code(), absl::StatusCode::kInvalidArgument) << tensors.status();
    EXPECT_THAT(std::string(tensors.status().message()), HasSubstr(message));
  }
  const std::string transposed = Saved(dict(floats(Int(2) + Int(3), Int(1) + Int(2))));
  EXPECT_EQ(Read(transposed).status().code(), absl::StatusCode::kUnimplemented);
  // A list in itself is harmless.
  EXPECT_THAT(MessageOf(Saved("]q" + Byte(1) + "h" + Byte(1) + "a")), HasSubstr("no dictionary"));
}

TEST(TorchFileTest, RefusesBrokenArchives) {
  const std::string pickle = Pickle(Dict(Text("w") + Vector(3)));
  const std::string data(32, '\1');
  const std::string whole = Zip({{"x/data.pkl", pickle}, {"x/data/0", data}});
  ASSERT_TRUE(Read(whole).ok());
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(Read(whole.substr(0, size)).ok()) << size;
  }
  EXPECT_EQ(Read(pickle).status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(MessageOf(Zip({{"x/data.pkl", pickle}}, 8)), HasSubstr("compressed"));
  EXPECT_THAT(MessageOf(Zip({{"x/y", pickle}})), HasSubstr("no data.pkl"));
  EXPECT_THAT(MessageOf(Zip({{"a/data.pkl", pickle}, {"b/data.pkl", pickle}})),
              HasSubstr("two data.pkl"));
  EXPECT_THAT(MessageOf(Zip({{"x/data.pkl", pickle}, {"x/data.pkl", pickle}})),
              HasSubstr("appears twice"));
  EXPECT_THAT(MessageOf(Zip({{"x/data.pkl", pickle}})), HasSubstr("its storage is missing"));
  EXPECT_THAT(MessageOf(Zip({{"x/data.pkl", pickle}, {"x/data/0", data}, {"x/byteorder", "big"}})),
              HasSubstr("little-endian"));
}

// What PyTorch 1.13 wrote.
std::string Fixture(const std::string& name) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  std::ifstream file(
      absl::StrCat(source == nullptr ? "." : source, "/tests/fuzz/corpus/torch_file_fuzz/", name),
      std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(TorchFileTest, ReadsWhatPyTorchWrote) {
  const std::string file = Fixture("state_dict");
  const auto tensors = Read(file);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 4U);
  for (const TensorEntry& tensor : *tensors) {
    if (tensor.name == "a") {
      EXPECT_THAT(tensor.shape, ElementsAre(2, 3));
      for (int i = 0; i < 6; ++i) {
        float value;
        std::memcpy(&value, file.data() + tensor.begin_byte + 4 * i, 4);
        EXPECT_EQ(value, static_cast<float>(i));
      }
    }
    if (tensor.name == "b") EXPECT_EQ(tensor.dtype, "F16");
    if (tensor.name == "c") EXPECT_EQ(tensor.dtype, "BF16");
    if (tensor.name == "n") EXPECT_EQ(tensor.dtype, "I64");
  }
  EXPECT_TRUE(Read(Fixture("module_state")).ok());
}

TEST(TorchFileTest, AveragesTakeThePlaceOfTheModel) {
  const std::string file = Fixture("sedd");
  const auto tensors = Read(file);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 2U);
  for (const TensorEntry& tensor : *tensors) {
    float value;
    std::memcpy(&value, file.data() + tensor.begin_byte + 4, 4);
    EXPECT_EQ(value, tensor.name == "w" ? 2.0F : 1.0F);  // [0, 2, 4], not [0, 1, 2]; a buffer
    if (tensor.name != "w") EXPECT_EQ(tensor.name, "rotary_emb.inv_freq");
  }
}

}  // namespace
}  // namespace cinnabar
