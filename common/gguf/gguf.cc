#include "common/gguf/gguf.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read as little-endian");

constexpr uint64_t kNameBytesMax = 1024;
constexpr uint32_t kDimensionsMax = 4;
constexpr uint64_t kAlignmentDefault = 32;
constexpr uint64_t kAlignmentMax = 1 << 20;

struct DTypeSize {
  uint32_t id;
  absl::string_view name;
  int64_t block_elements;
  int64_t block_bytes;
};
// Every type that ggml still writes.
constexpr DTypeSize kDTypes[] = {
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},
    {3, "Q4_1", 32, 20},      {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},
    {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 36},      {10, "Q2_K", 256, 84},
    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66},
    {17, "IQ2_XS", 256, 74},  {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},  {22, "IQ2_S", 256, 82},
    {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
    {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},
    {29, "IQ1_M", 256, 56},   {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},
    {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17}};

// Bytes of a scalar; 0 for strings and arrays.
uint64_t SizeOf(GgufType type) {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kI8:
    case GgufType::kBool:
      return 1;
    case GgufType::kU16:
    case GgufType::kI16:
      return 2;
    case GgufType::kU32:
    case GgufType::kI32:
    case GgufType::kF32:
      return 4;
    case GgufType::kU64:
    case GgufType::kI64:
    case GgufType::kF64:
      return 8;
    case GgufType::kString:
    case GgufType::kArray:
      return 0;
  }
  return 0;
}

std::string Shorten(absl::string_view text) {
  return text.size() <= 100 ? std::string(text) : absl::StrCat(text.substr(0, 100), "...");
}

template <typename Word>
Word LoadWord(absl::string_view bytes) {
  Word word;
  std::memcpy(&word, bytes.data(), sizeof(word));
  return word;
}

// Takes pieces off the front of a file. After the first that is not there everything fails.
class Cursor {
 public:
  explicit Cursor(absl::string_view bytes) : rest_(bytes), size_(bytes.size()) {}

  uint64_t position() const { return size_ - rest_.size(); }
  uint64_t left() const { return rest_.size(); }
  std::optional<absl::string_view> Bytes(uint64_t count) {
    if (count > rest_.size()) return std::nullopt;
    const absl::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }
  template <typename Word>
  std::optional<Word> Number() {
    const std::optional<absl::string_view> bytes = Bytes(sizeof(Word));
    if (!bytes.has_value()) return std::nullopt;
    return LoadWord<Word>(*bytes);
  }
  std::optional<absl::string_view> String(uint64_t bytes_max) {
    const std::optional<uint64_t> length = Number<uint64_t>();
    if (!length.has_value() || *length > bytes_max) return std::nullopt;
    return Bytes(*length);
  }

 private:
  absl::string_view rest_;
  uint64_t size_;
};

class Reader {
 public:
  Reader(absl::Span<const uint8_t> bytes, absl::string_view what)
      : cursor_({reinterpret_cast<const char*>(bytes.data()), bytes.size()}),
        file_bytes_(bytes.size()),
        what_(what) {}

  absl::Status Start() {
    const auto magic = cursor_.Bytes(4);
    if (!magic.has_value() || *magic != "GGUF") return Broken("does not begin with GGUF");
    const auto version = cursor_.Number<uint32_t>();
    if (!version.has_value() || (*version != 2 && *version != 3)) {
      return Broken(absl::StrCat("version ", version.value_or(0), "; known are 2 and 3"));
    }
    const auto tensors = cursor_.Number<uint64_t>(), fields = cursor_.Number<uint64_t>();
    if (!tensors.has_value() || !fields.has_value()) return Broken("ends in its header");
    // What an entry takes at least: a length, a count of dimensions, a type and an offset; a
    // length, a type and a byte.
    if (*tensors > cursor_.left() / 24 || *fields > cursor_.left() / 13) {
      return Broken(
          absl::StrCat(*tensors, " tensors and ", *fields, " fields in ", file_bytes_, " bytes"));
    }
    num_tensors_ = *tensors;
    num_fields_ = *fields;
    return absl::OkStatus();
  }

  absl::StatusOr<std::pair<std::string, GgufValue>> Field() {
    const auto key = cursor_.String(kNameBytesMax);
    if (!key.has_value()) return Broken("a key does not fit");
    const auto type = cursor_.Number<uint32_t>();
    if (!type.has_value()) return BrokenField(*key, "has no type");
    GgufValue value;
    CINNABAR_ASSIGN_OR_RETURN(value.type, TypeOf(*key, *type));
    if (value.type == GgufType::kArray) {
      const auto element = cursor_.Number<uint32_t>();
      const auto count = cursor_.Number<uint64_t>();
      if (!element.has_value() || !count.has_value()) return BrokenField(*key, "is cut");
      CINNABAR_ASSIGN_OR_RETURN(value.element, TypeOf(*key, *element));
      if (value.element == GgufType::kArray) return BrokenField(*key, "is an array of arrays");
      value.count = *count;
      CINNABAR_ASSIGN_OR_RETURN(value.bytes, Elements(*key, value.element, *count));
    } else {
      CINNABAR_ASSIGN_OR_RETURN(value.bytes, Elements(*key, value.type, 1));
    }
    return std::pair<std::string, GgufValue>(std::string(*key), value);
  }

  // Offsets are still relative to the data.
  absl::StatusOr<GgufTensor> Tensor(uint64_t alignment) {
    const auto name = cursor_.String(kNameBytesMax);
    if (!name.has_value() || name->empty()) return Broken("the name of a tensor does not fit");
    GgufTensor tensor;
    tensor.name = std::string(*name);
    const auto dimensions = cursor_.Number<uint32_t>();
    if (!dimensions.has_value() || *dimensions == 0 || *dimensions > kDimensionsMax) {
      return BrokenTensor(*name, absl::StrCat("1 to ", kDimensionsMax, " dimensions are read"));
    }
    for (uint32_t i = 0; i < *dimensions; ++i) {
      const auto size = cursor_.Number<uint64_t>();
      if (!size.has_value()) return BrokenTensor(*name, "is cut");
      if (*size == 0 || *size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
          __builtin_mul_overflow(tensor.num_elements, static_cast<int64_t>(*size),
                                 &tensor.num_elements)) {
        return BrokenTensor(*name, "a dimension is 0 or their product overflows");
      }
      tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(*size));
    }
    const auto type = cursor_.Number<uint32_t>();
    const auto offset = cursor_.Number<uint64_t>();
    if (!type.has_value() || !offset.has_value()) return BrokenTensor(*name, "is cut");
    const auto* known = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                     [&](const DTypeSize& d) { return d.id == *type; });
    if (known == std::end(kDTypes)) {
      return BrokenTensor(*name, absl::StrCat("unknown type ", *type));
    }
    tensor.dtype = std::string(known->name);
    if (tensor.shape.back() % known->block_elements != 0) {
      return BrokenTensor(*name, absl::StrCat("rows of ", tensor.shape.back(),
                                              " are not whole blocks of ", known->name));
    }
    int64_t bytes = 0;
    if (__builtin_mul_overflow(tensor.num_elements / known->block_elements, known->block_bytes,
                               &bytes) ||
        *offset > file_bytes_ || static_cast<uint64_t>(bytes) > file_bytes_ - *offset) {
      return BrokenTensor(*name, "ends beyond the file");
    }
    if (*offset % alignment != 0) return BrokenTensor(*name, "is not aligned");
    tensor.begin_byte = static_cast<int64_t>(*offset);
    tensor.end_byte = tensor.begin_byte + bytes;
    return tensor;
  }

  uint64_t num_tensors() const { return num_tensors_; }
  uint64_t num_fields() const { return num_fields_; }
  uint64_t position() const { return cursor_.position(); }
  uint64_t file_bytes() const { return file_bytes_; }

  absl::Status Broken(absl::string_view problem) const {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": ", problem));
  }
  absl::Status BrokenField(absl::string_view key, absl::string_view problem) const {
    return Broken(absl::StrCat("field ", Shorten(key), ": ", problem));
  }
  absl::Status BrokenTensor(absl::string_view name, absl::string_view problem) const {
    return Broken(absl::StrCat("tensor ", Shorten(name), ": ", problem));
  }

 private:
  absl::StatusOr<GgufType> TypeOf(absl::string_view key, uint32_t number) const {
    if (number > static_cast<uint32_t>(GgufType::kF64)) {
      return BrokenField(key, absl::StrCat("unknown type ", number));
    }
    return static_cast<GgufType>(number);
  }

  absl::StatusOr<absl::string_view> Elements(absl::string_view key, GgufType type, uint64_t count) {
    if (type != GgufType::kString) {
      if (count > cursor_.left() / SizeOf(type)) return BrokenField(key, "ends beyond the file");
      return *cursor_.Bytes(count * SizeOf(type));
    }
    if (count > cursor_.left() / 8) return BrokenField(key, "ends beyond the file");
    const Cursor before = cursor_;
    for (uint64_t i = 0; i < count; ++i) {
      if (!cursor_.String(file_bytes_).has_value()) {
        return BrokenField(key, "ends beyond the file");
      }
    }
    Cursor taken = before;
    return *taken.Bytes(cursor_.position() - before.position());
  }

  Cursor cursor_;
  uint64_t file_bytes_;
  std::string what_;
  uint64_t num_tensors_ = 0;
  uint64_t num_fields_ = 0;
};

// An integer that is not negative.
std::optional<int64_t> NaturalOf(GgufType type, absl::string_view bytes) {
  int64_t value = -1;
  switch (type) {
    case GgufType::kU8:
      return LoadWord<uint8_t>(bytes);
    case GgufType::kU16:
      return LoadWord<uint16_t>(bytes);
    case GgufType::kU32:
      return LoadWord<uint32_t>(bytes);
    case GgufType::kU64:
    case GgufType::kI64:
      value = LoadWord<int64_t>(bytes);
      break;
    case GgufType::kI8:
      value = LoadWord<int8_t>(bytes);
      break;
    case GgufType::kI16:
      value = LoadWord<int16_t>(bytes);
      break;
    case GgufType::kI32:
      value = LoadWord<int32_t>(bytes);
      break;
    case GgufType::kF32:
    case GgufType::kF64:
    case GgufType::kBool:
    case GgufType::kString:
    case GgufType::kArray:
      break;
  }
  if (value < 0) return std::nullopt;
  return value;
}

}  // namespace

absl::StatusOr<GgufHeader> GgufHeader::Read(absl::Span<const uint8_t> bytes,
                                            absl::string_view what) {
  Reader reader(bytes, what);
  CINNABAR_RETURN_IF_ERROR(reader.Start());
  GgufHeader header;
  header.what_ = std::string(what);
  for (uint64_t i = 0; i < reader.num_fields(); ++i) {
    CINNABAR_ASSIGN_OR_RETURN(auto field, reader.Field());
    const auto [slot, fresh] = header.fields_.emplace(std::move(field));
    if (!fresh) return reader.BrokenField(slot->first, "appears twice");
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::optional<int64_t> wanted,
                            header.Natural("general.alignment"));
  const auto alignment = static_cast<uint64_t>(wanted.value_or(kAlignmentDefault));
  if (alignment == 0 || alignment > kAlignmentMax || (alignment & (alignment - 1)) != 0) {
    return reader.BrokenField("general.alignment", "is no power of two that is read");
  }
  for (uint64_t i = 0; i < reader.num_tensors(); ++i) {
    CINNABAR_ASSIGN_OR_RETURN(GgufTensor tensor, reader.Tensor(alignment));
    header.tensors_.push_back(std::move(tensor));
  }
  const uint64_t data_begin = (reader.position() + alignment - 1) / alignment * alignment;
  std::stable_sort(
      header.tensors_.begin(), header.tensors_.end(),
      [](const GgufTensor& a, const GgufTensor& b) { return a.begin_byte < b.begin_byte; });
  int64_t end = 0;
  for (GgufTensor& tensor : header.tensors_) {
    if (tensor.begin_byte < end) return reader.BrokenTensor(tensor.name, "overlaps another tensor");
    end = tensor.end_byte;
    if (data_begin > reader.file_bytes() ||
        static_cast<uint64_t>(end) > reader.file_bytes() - data_begin) {
      return reader.BrokenTensor(tensor.name, "ends beyond the file");
    }
    tensor.begin_byte += static_cast<int64_t>(data_begin);
    tensor.end_byte += static_cast<int64_t>(data_begin);
  }
  for (size_t i = 0; i < header.tensors_.size(); ++i) {
    if (!header.tensor_index_.emplace(header.tensors_[i].name, i).second) {
      return reader.BrokenTensor(header.tensors_[i].name, "appears twice");
    }
  }
  return header;
}

const GgufTensor* GgufHeader::FindTensor(absl::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

const GgufValue* GgufHeader::Find(absl::string_view key) const {
  const auto found = fields_.find(key);
  return found == fields_.end() ? nullptr : &found->second;
}

absl::StatusOr<std::optional<int64_t>> GgufHeader::Natural(absl::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<int64_t>();
  const std::optional<int64_t> number = NaturalOf(value->type, value->bytes);
  if (!number.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what_, ": field ", key, ": not a natural number"));
  }
  return number;
}

absl::StatusOr<std::optional<double>> GgufHeader::Number(absl::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<double>();
  if (value->type == GgufType::kF32) return std::optional<double>(LoadWord<float>(value->bytes));
  if (value->type == GgufType::kF64) return std::optional<double>(LoadWord<double>(value->bytes));
  const std::optional<int64_t> number = NaturalOf(value->type, value->bytes);
  if (!number.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": field ", key, ": not a number"));
  }
  return std::optional<double>(static_cast<double>(*number));
}

absl::StatusOr<std::optional<bool>> GgufHeader::Bool(absl::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<bool>();
  if (value->type == GgufType::kBool) return std::optional<bool>(value->bytes[0] != 0);
  if (value->type == GgufType::kString) {
    const absl::string_view text = value->bytes.substr(8);
    if (text == "true" || text == "false") return std::optional<bool>(text == "true");
  }
  return absl::InvalidArgumentError(absl::StrCat(what_, ": field ", key, ": not true or false"));
}

absl::StatusOr<std::string> GgufHeader::String(absl::string_view key,
                                               absl::string_view fallback) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::string(fallback);
  if (value->type != GgufType::kString) {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": field ", key, ": not a string"));
  }
  return std::string(value->bytes.substr(8));
}

absl::StatusOr<std::vector<absl::string_view>> GgufHeader::Strings(absl::string_view key) const {
  const GgufValue* value = Find(key);
  std::vector<absl::string_view> strings;
  if (value == nullptr) return strings;
  if (value->type != GgufType::kArray || value->element != GgufType::kString) {
    return absl::InvalidArgumentError(
        absl::StrCat(what_, ": field ", key, ": not an array of strings"));
  }
  strings.reserve(value->count);
  Cursor cursor(value->bytes);
  for (uint64_t i = 0; i < value->count; ++i) strings.push_back(*cursor.String(cursor.left()));
  return strings;
}

absl::StatusOr<std::vector<int64_t>> GgufHeader::Naturals(absl::string_view key) const {
  const GgufValue* value = Find(key);
  std::vector<int64_t> numbers;
  if (value == nullptr) return numbers;
  const absl::Status wrong = absl::InvalidArgumentError(
      absl::StrCat(what_, ": field ", key, ": not an array of natural numbers"));
  if (value->type != GgufType::kArray || value->element == GgufType::kString) return wrong;
  const uint64_t size = SizeOf(value->element);
  numbers.reserve(value->count);
  for (uint64_t i = 0; i < value->count; ++i) {
    const std::optional<int64_t> number =
        NaturalOf(value->element, value->bytes.substr(i * size, size));
    if (!number.has_value()) return wrong;
    numbers.push_back(*number);
  }
  return numbers;
}

namespace {

template <typename Word>
void Put(Word word, std::string& out) {
  out.append(reinterpret_cast<const char*>(&word), sizeof(word));
}

void PutString(absl::string_view text, std::string& out) {
  Put<uint64_t>(text.size(), out);
  out.append(text.data(), text.size());
}

std::string Padding(uint64_t bytes) {
  return std::string((kAlignmentDefault - bytes % kAlignmentDefault) % kAlignmentDefault, '\0');
}

}  // namespace

void GgufWriter::CloseFile::operator()(FILE* file) const { std::fclose(file); }

absl::StatusOr<GgufWriter> GgufWriter::Create(const std::string& path,
                                              absl::string_view architecture,
                                              std::vector<GgufOutput> tensors) {
  std::string head = "GGUF";
  Put<uint32_t>(3, head);
  Put<uint64_t>(tensors.size(), head);
  Put<uint64_t>(1, head);
  PutString("general.architecture", head);
  Put(static_cast<uint32_t>(GgufType::kString), head);
  PutString(architecture, head);
  uint64_t offset = 0;
  for (const GgufOutput& tensor : tensors) {
    const auto* dtype =
        std::find_if(std::begin(kDTypes), std::end(kDTypes),
                     [&](const DTypeSize& known) { return known.name == tensor.dtype; });
    CINNABAR_CHECK(dtype != std::end(kDTypes) && tensor.bytes > 0 && !tensor.shape.empty() &&
                   tensor.shape.size() <= kDimensionsMax && tensor.name.size() <= kNameBytesMax)
        << tensor.name;
    PutString(tensor.name, head);
    Put(static_cast<uint32_t>(tensor.shape.size()), head);
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) {
      Put(static_cast<uint64_t>(*size), head);
    }
    Put(dtype->id, head);
    Put(offset, head);
    offset += static_cast<uint64_t>(tensor.bytes) + Padding(tensor.bytes).size();
  }
  head += Padding(head.size());
  GgufWriter writer;
  writer.path_ = path;
  writer.tensors_ = std::move(tensors);
  writer.file_.reset(std::fopen(path.c_str(), "wb"));
  if (writer.file_ == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("create ", path));
  CINNABAR_RETURN_IF_ERROR(writer.Write(head));
  return writer;
}

absl::Status GgufWriter::Write(absl::string_view bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), file_.get()) == bytes.size()) {
    return absl::OkStatus();
  }
  return absl::ErrnoToStatus(errno, absl::StrCat("write ", path_));
}

absl::Status GgufWriter::Append(absl::Span<const uint8_t> bytes) {
  CINNABAR_CHECK(tensor_ < tensors_.size() &&
                 static_cast<int64_t>(bytes.size()) <= tensors_[tensor_].bytes - written_)
      << "more bytes than tensors";
  CINNABAR_RETURN_IF_ERROR(Write({reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
  written_ += static_cast<int64_t>(bytes.size());
  if (written_ < tensors_[tensor_].bytes) return absl::OkStatus();
  written_ = 0;
  return Write(Padding(static_cast<uint64_t>(tensors_[tensor_++].bytes)));
}

absl::Status GgufWriter::Finish() {
  CINNABAR_CHECK(tensor_ == tensors_.size()) << "a tensor is missing";
  if (std::fflush(file_.get()) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("write ", path_));
  }
  file_.reset();
  return absl::OkStatus();
}

bool HasGgufEnding(absl::string_view path) { return absl::EndsWithIgnoreCase(path, ".gguf"); }

}  // namespace cinnabar
