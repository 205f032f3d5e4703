#include "worker/model/safetensors.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "absl/container/btree_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/check.h"
#include "common/base/json.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

constexpr int64_t kHeaderBytesMax = 100'000'000;  // the format's own limit
constexpr size_t kIndexBytesMax = 64U << 20;
constexpr size_t kNameBytesMax = 1024;
constexpr size_t kDimensionsMax = 16;
constexpr size_t kShardsMax = 4096;

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

std::string FileName(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// Names in a folder, sorted; empty when it cannot be read.
std::vector<std::string> ListFolder(const std::string& directory) {
  std::vector<std::string> names;
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(opendir(directory.c_str()), &closedir);
  if (folder == nullptr) return names;
  while (const dirent* entry = readdir(folder.get())) names.emplace_back(entry->d_name);
  std::sort(names.begin(), names.end());
  return names;
}

// weight_map of an index: tensor -> file.
absl::StatusOr<nlohmann::json> ReadIndex(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(nlohmann::json index, ReadJsonFile(path, kIndexBytesMax));
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (!index.is_object() || map == index.end() || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": no weight_map"));
  }
  for (const auto& [tensor, file] : map->items()) {
    // A shard lies beside its index: anything else would let a checkpoint read other files.
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name.find('/') != std::string::npos ||
        !absl::EndsWith(name, ".safetensors")) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": tensor ", Shorten(tensor), ": its file is not the name of a .safetensors file"));
    }
  }
  return *map;
}

}  // namespace

std::string DescribeTensor(const TensorEntry& tensor) {
  return absl::StrCat(tensor.dtype, " [", absl::StrJoin(tensor.shape, ", "), "]");
}

std::optional<DType> UsableDType(absl::string_view name) {
  if (name == "F32") return DType::kF32;
  if (name == "F16") return DType::kF16;
  if (name == "BF16") return DType::kBf16;
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

absl::Status Checkpoint::AddFile(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  CINNABAR_ASSIGN_OR_RETURN(std::vector<TensorEntry> tensors,
                            ReadSafetensorsHeader(file.bytes(), path));
  for (TensorEntry& tensor : tensors) {
    tensor.file_index = static_cast<int32_t>(files_.size());
    const auto [slot, fresh] = index_.emplace(tensor.name, tensors_.size());
    if (!fresh) {
      return Broken(
          path, tensor.name,
          absl::StrCat("is in ", files_[tensors_[slot->second].file_index].path(), " too"));
    }
    tensors_.push_back(std::move(tensor));
  }
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::StatusOr<Checkpoint> Checkpoint::OpenFile(const std::string& path) {
  Checkpoint checkpoint;
  CINNABAR_RETURN_IF_ERROR(checkpoint.AddFile(path));
  return checkpoint;
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  const std::vector<std::string> names = ListFolder(directory);
  if (names.empty())
    return absl::NotFoundError(absl::StrCat(directory, " is not a readable folder"));
  const auto has = [&](absl::string_view name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (has("model.safetensors")) return OpenFile(directory + "/model.safetensors");

  const std::string index_path = directory + "/model.safetensors.index.json";
  if (has("model.safetensors.index.json")) {
    CINNABAR_ASSIGN_OR_RETURN(const nlohmann::json weight_map, ReadIndex(index_path));
    absl::btree_set<std::string> shards;
    for (const auto& [tensor, file] : weight_map.items()) shards.insert(file.get<std::string>());
    if (shards.size() > kShardsMax) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": ", shards.size(), " shards"));
    }
    Checkpoint checkpoint;
    for (const std::string& shard : shards) {
      CINNABAR_RETURN_IF_ERROR(checkpoint.AddFile(absl::StrCat(directory, "/", shard)), "shard of ",
                               index_path);
    }
    for (const auto& [tensor, file] : weight_map.items()) {
      const TensorEntry* entry = checkpoint.Find(tensor);
      if (entry == nullptr ||
          FileName(checkpoint.files_[entry->file_index].path()) != file.get<std::string>()) {
        return Broken(index_path, tensor, absl::StrCat("is not in ", file.get<std::string>()));
      }
    }
    return checkpoint;
  }

  std::vector<std::string> loose;
  bool pickled = false;
  for (const std::string& name : names) {
    if (absl::EndsWith(name, ".safetensors")) loose.push_back(name);
    pickled = pickled || absl::EndsWith(name, ".bin") || absl::EndsWith(name, ".pth") ||
              absl::EndsWith(name, ".pt");
  }
  if (loose.size() == 1) return OpenFile(absl::StrCat(directory, "/", loose[0]));
  if (loose.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        directory, " has ", loose.size(),
        " .safetensors files and no model.safetensors.index.json to say which to read"));
  }
  return absl::NotFoundError(absl::StrCat(
      directory, " has no .safetensors file",
      pickled ? "; pickled PyTorch weights are not read, save them as safetensors first" : ""));
}

const TensorEntry* Checkpoint::Find(absl::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

std::string Checkpoint::FileOf(const TensorEntry& tensor) const {
  return FileName(files_[tensor.file_index].path());
}

absl::StatusOr<HostMatrix> Checkpoint::Matrix(absl::string_view name) const {
  return AsMatrix(name, /*stacked=*/false);
}

absl::StatusOr<HostMatrix> Checkpoint::StackedMatrix(absl::string_view name) const {
  return AsMatrix(name, /*stacked=*/true);
}

absl::StatusOr<HostMatrix> Checkpoint::AsMatrix(absl::string_view name, bool stacked) const {
  const TensorEntry* entry = Find(name);
  if (entry == nullptr) return absl::NotFoundError(absl::StrCat("tensor ", name, " is missing"));
  const std::string& path = files_[entry->file_index].path();
  const std::optional<DType> dtype = UsableDType(entry->dtype);
  if (!dtype.has_value()) {
    return absl::UnimplementedError(absl::StrCat(path, ": tensor ", name, " is ", entry->dtype,
                                                 "; weights are read as F32, F16 or BF16"));
  }
  const size_t dimensions = entry->shape.size();
  if (stacked ? dimensions != 3 : dimensions == 0 || dimensions > 2) {
    return Broken(path, name,
                  absl::StrCat(DescribeTensor(*entry),
                               stacked ? " is no stack of matrices" : " is no vector or matrix"));
  }
  return HostMatrix{.data = files_[entry->file_index].bytes().data() + entry->begin_byte,
                    .dtype = *dtype,
                    .rows = dimensions == 1 ? 1 : entry->shape[0] * (stacked ? entry->shape[1] : 1),
                    .cols = entry->shape.back()};
}

void Checkpoint::Release(absl::string_view name) const {
  const TensorEntry* entry = Find(name);
  if (entry == nullptr) return;
  const MappedFile& file = files_[entry->file_index];
  file.Release(file.bytes().data() + entry->begin_byte,
               static_cast<size_t>(entry->end_byte - entry->begin_byte));
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
