#include "worker/model/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/check.h"
#include "common/base/json.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

constexpr int64_t kHeaderBytesMax = 100'000'000;  // the format's own limit
constexpr size_t kNameBytesMax = 1024;
constexpr size_t kDimensionsMax = 16;

struct DTypeBits {
  absl::string_view name;
  int bits;
};
// Every dtype of the format; F4 and F6 elements are not whole bytes.
constexpr DTypeBits kDTypes[] = {{"BOOL", 8},    {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6},
                                 {"U8", 8},      {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},
                                 {"F8_E8M0", 8}, {"I16", 16}, {"U16", 16},    {"F16", 16},
                                 {"BF16", 16},   {"I32", 32}, {"U32", 32},    {"F32", 32},
                                 {"C64", 64},    {"F64", 64}, {"I64", 64},    {"U64", 64}};

std::string Shorten(absl::string_view text) {
  return text.size() <= 100 ? std::string(text) : absl::StrCat(text.substr(0, 100), "...");
}

absl::Status Broken(absl::string_view what, absl::string_view tensor, absl::string_view problem) {
  return absl::InvalidArgumentError(
      tensor.empty() ? absl::StrCat(what, ": ", problem)
                     : absl::StrCat(what, ": tensor ", Shorten(tensor), ": ", problem));
}

// A JSON number that is an integer in [0, 2^63).
std::optional<int64_t> Natural(const nlohmann::json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const uint64_t number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return static_cast<int64_t>(number);
}

absl::StatusOr<TensorEntry> ReadEntry(const std::string& name, const nlohmann::json& value,
                                      int64_t data_begin, int64_t data_bytes,
                                      absl::string_view what) {
  if (name.empty() || name.size() > kNameBytesMax) {
    return Broken(what, name, absl::StrCat("a name has 1 to ", kNameBytesMax, " bytes"));
  }
  if (!value.is_object()) return Broken(what, name, "not an object");
  TensorEntry entry;
  entry.name = name;

  const auto dtype = value.find("dtype");
  if (dtype == value.end() || !dtype->is_string()) return Broken(what, name, "no dtype");
  entry.dtype = dtype->get<std::string>();
  const auto known = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                  [&](const DTypeBits& d) { return d.name == entry.dtype; });
  if (known == std::end(kDTypes)) {
    return Broken(what, name, absl::StrCat("unknown dtype \"", Shorten(entry.dtype), "\""));
  }

  const auto shape = value.find("shape");
  if (shape == value.end() || !shape->is_array()) return Broken(what, name, "no shape");
  if (shape->size() > kDimensionsMax) {
    return Broken(what, name, absl::StrCat(shape->size(), " dimensions"));
  }
  int64_t bits = known->bits;
  for (const nlohmann::json& dimension : *shape) {
    const std::optional<int64_t> size = Natural(dimension);
    if (!size.has_value()) return Broken(what, name, "a dimension is not a natural number");
    entry.shape.push_back(*size);
    if (__builtin_mul_overflow(entry.num_elements, *size, &entry.num_elements) ||
        __builtin_mul_overflow(bits, *size, &bits)) {
      return Broken(what, name, "the product of its dimensions overflows");
    }
  }
  if (bits % 8 != 0) return Broken(what, name, "does not fill whole bytes");

  const auto offsets = value.find("data_offsets");
  if (offsets == value.end() || !offsets->is_array() || offsets->size() != 2) {
    return Broken(what, name, "no data_offsets");
  }
  const std::optional<int64_t> begin = Natural((*offsets)[0]);
  const std::optional<int64_t> end = Natural((*offsets)[1]);
  if (!begin.has_value() || !end.has_value()) {
    return Broken(what, name, "data_offsets are not natural numbers");
  }
  if (*begin > *end || *end > data_bytes) {
    return Broken(what, name,
                  absl::StrCat("data_offsets [", *begin, ", ", *end, "] are not inside the ",
                               data_bytes, " bytes of data"));
  }
  if (*end - *begin != bits / 8) {
    return Broken(what, name,
                  absl::StrCat(DescribeTensor(entry), " takes ", bits / 8,
                               " bytes, data_offsets give ", *end - *begin));
  }
  entry.begin_byte = data_begin + *begin;
  entry.end_byte = data_begin + *end;
  return entry;
}

absl::Status CheckMetadata(const nlohmann::json& metadata, absl::string_view what) {
  if (!metadata.is_object()) return Broken(what, "", "__metadata__ is not an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return Broken(what, "", absl::StrCat("__metadata__ ", Shorten(key), " is not a string"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::string DescribeTensor(const TensorEntry& tensor) {
  return absl::StrCat(tensor.dtype, " [", absl::StrJoin(tensor.shape, ", "), "]");
}

std::optional<DType> UsableDType(absl::string_view name) {
  if (name == "F32") return DType::kF32;
  if (name == "F16") return DType::kF16;
  if (name == "BF16") return DType::kBf16;
  for (const DType dtype : {DType::kQ8_0, DType::kQ4_0, DType::kQ4_1, DType::kQ4_K, DType::kQ6_K}) {
    if (name == NameOf(dtype)) return dtype;
  }
  return std::nullopt;
}

absl::StatusOr<std::vector<TensorEntry>> ReadSafetensorsHeader(absl::Span<const uint8_t> bytes,
                                                               absl::string_view what) {
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof(header_bytes)) return Broken(what, "", "shorter than a header length");
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  if (header_bytes > static_cast<uint64_t>(kHeaderBytesMax) ||
      header_bytes > bytes.size() - sizeof(header_bytes)) {
    return Broken(what, "",
                  absl::StrCat("a header of ", header_bytes, " bytes in a file of ", bytes.size()));
  }
  const absl::string_view text(reinterpret_cast<const char*>(bytes.data()) + sizeof(header_bytes),
                               header_bytes);
  if (text.empty() || text.front() != '{') return Broken(what, "", "the header is not an object");
  CINNABAR_ASSIGN_OR_RETURN(const nlohmann::json header, ParseJson(text, what));
  if (!header.is_object()) return Broken(what, "", "the header is not an object");

  const int64_t data_begin = static_cast<int64_t>(sizeof(header_bytes) + header_bytes);
  const int64_t data_bytes = static_cast<int64_t>(bytes.size()) - data_begin;
  std::vector<TensorEntry> tensors;
  tensors.reserve(header.size());
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      CINNABAR_RETURN_IF_ERROR(CheckMetadata(value, what));
      continue;
    }
    CINNABAR_ASSIGN_OR_RETURN(TensorEntry entry,
                              ReadEntry(name, value, data_begin, data_bytes, what));
    tensors.push_back(std::move(entry));
  }
  // Empty tensors sort before what begins where they do.
  std::sort(tensors.begin(), tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin_byte, a.end_byte, a.name) < std::tie(b.begin_byte, b.end_byte, b.name);
  });
  int64_t expected = data_begin;
  for (const TensorEntry& tensor : tensors) {
    if (tensor.begin_byte < expected) return Broken(what, tensor.name, "overlaps another tensor");
    if (tensor.begin_byte > expected) {
      return Broken(
          what, tensor.name,
          absl::StrCat("a gap of ", tensor.begin_byte - expected, " bytes lies before its data"));
    }
    expected = tensor.end_byte;
  }
  if (expected != static_cast<int64_t>(bytes.size())) {
    return Broken(what, "",
                  absl::StrCat(static_cast<int64_t>(bytes.size()) - expected,
                               " bytes after the last tensor belong to none"));
  }
  return tensors;
}

absl::Status WriteSafetensors(const std::string& path, absl::string_view name,
                              absl::Span<const int64_t> shape, absl::Span<const float> values) {
  int64_t num_elements = 1;
  for (const int64_t size : shape) num_elements *= size;
  CINNABAR_CHECK(num_elements == static_cast<int64_t>(values.size())) << "shape of " << name;
  nlohmann::ordered_json header;
  header[std::string(name)] = {{"dtype", "F32"},
                               {"shape", std::vector<int64_t>(shape.begin(), shape.end())},
                               {"data_offsets", {0, num_elements * 4}}};
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');  // the data starts aligned
  const uint64_t header_bytes = text.size();

  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "wb"), &std::fclose);
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("create ", path));
  if (std::fwrite(&header_bytes, sizeof(header_bytes), 1, file.get()) != 1 ||
      std::fwrite(text.data(), 1, text.size(), file.get()) != text.size() ||
      std::fwrite(values.data(), sizeof(float), values.size(), file.get()) != values.size() ||
      std::fflush(file.get()) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat("write ", path));
  }
  return absl::OkStatus();
}

}  // namespace cinnabar
