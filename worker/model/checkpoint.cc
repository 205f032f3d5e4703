#include "worker/model/checkpoint.h"

#include <dirent.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "absl/container/btree_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/json.h"
#include "common/base/status.h"
#include "common/gguf/gguf.h"
#include "worker/model/gguf_model.h"
#include "worker/model/torch_file.h"

namespace cinnabar {
namespace {

constexpr size_t kIndexBytesMax = 64U << 20;
constexpr size_t kShardsMax = 4096;

std::string Shorten(absl::string_view text) {
  return text.size() <= 100 ? std::string(text) : absl::StrCat(text.substr(0, 100), "...");
}

absl::Status Broken(absl::string_view what, absl::string_view tensor, absl::string_view problem) {
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": tensor ", Shorten(tensor), ": ", problem));
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
absl::StatusOr<nlohmann::json> ReadIndex(const std::string& path, absl::string_view ending) {
  CINNABAR_ASSIGN_OR_RETURN(nlohmann::json index, ReadJsonFile(path, kIndexBytesMax));
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  if (!index.is_object() || map == index.end() || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": no weight_map"));
  }
  for (const auto& [tensor, file] : map->items()) {
    // A shard lies beside its index: anything else would let a checkpoint read other files.
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name.find('/') != std::string::npos || !absl::EndsWith(name, ending)) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": tensor ", Shorten(tensor), ": its file is not the name of a ", ending, " file"));
    }
  }
  return *map;
}

// What torch.save writes.
bool HasTorchEnding(absl::string_view path) {
  return absl::EndsWith(path, ".bin") || absl::EndsWith(path, ".pth") ||
         absl::EndsWith(path, ".pt") || absl::EndsWith(path, ".ckpt");
}

absl::StatusOr<std::vector<TensorEntry>> ReadTensors(const MappedFile& file) {
  if (HasTorchEnding(file.path())) return ReadTorchFile(file.bytes(), file.path());
  if (!HasGgufEnding(file.path())) return ReadSafetensorsHeader(file.bytes(), file.path());
  CINNABAR_ASSIGN_OR_RETURN(const GgufHeader header, GgufHeader::Read(file.bytes(), file.path()));
  return GgufTensors(header);
}

}  // namespace

absl::Status Checkpoint::AddFile(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  CINNABAR_ASSIGN_OR_RETURN(std::vector<TensorEntry> tensors, ReadTensors(file));
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
  if (HasGgufEnding(directory)) return OpenFile(directory);
  const std::vector<std::string> names = ListFolder(directory);
  if (names.empty())
    return absl::NotFoundError(absl::StrCat(directory, " is not a readable folder"));
  const auto has = [&](absl::string_view name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (has("model.safetensors")) return OpenFile(directory + "/model.safetensors");

  for (const auto& [index, ending] : {std::pair{"model.safetensors.index.json", ".safetensors"},
                                      {"pytorch_model.bin.index.json", ".bin"}}) {
    if (has(index)) return OpenShards(directory, index, ending);
  }
  for (const absl::string_view ending : {".safetensors", ".gguf"}) {
    std::vector<std::string> loose;
    for (const std::string& name : names) {
      if (absl::EndsWith(name, ending)) loose.push_back(name);
    }
    if (loose.size() == 1) return OpenFile(absl::StrCat(directory, "/", loose[0]));
    if (loose.size() > 1) {
      return absl::NotFoundError(absl::StrCat(directory, " has ", loose.size(), " ", ending,
                                              " files and no index: ", loose[0], ", ", loose[1],
                                              loose.size() > 2 ? ", ..." : ""));
    }
  }
  if (has("pytorch_model.bin")) return OpenFile(directory + "/pytorch_model.bin");
  std::vector<std::string> pickled;
  std::copy_if(names.begin(), names.end(), std::back_inserter(pickled), HasTorchEnding);
  if (pickled.size() == 1) return OpenFile(absl::StrCat(directory, "/", pickled[0]));
  const std::string trained = directory + "/checkpoints-meta/checkpoint.pth";  // as SEDD's trainer
  if (MappedFile::Open(trained).ok()) return OpenFile(trained);
  return absl::NotFoundError(
      absl::StrCat(directory, " has no .safetensors, .gguf or PyTorch file",
                   pickled.empty() ? ""
                                   : absl::StrCat(" that could be told apart: ", pickled[0], ", ",
                                                  pickled[1], pickled.size() > 2 ? ", ..." : "")));
}

absl::StatusOr<Checkpoint> Checkpoint::OpenShards(const std::string& directory,
                                                  absl::string_view index,
                                                  absl::string_view ending) {
  const std::string index_path = absl::StrCat(directory, "/", index);
  CINNABAR_ASSIGN_OR_RETURN(const nlohmann::json weight_map, ReadIndex(index_path, ending));
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
    return absl::UnimplementedError(
        absl::StrCat(path, ": tensor ", name, " is ", entry->dtype,
                     "; weights are read as F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K"));
  }
  const size_t dimensions = entry->shape.size();
  if (stacked ? dimensions != 3 : dimensions == 0 || dimensions > 2) {
    return Broken(path, name,
                  absl::StrCat(DescribeTensor(*entry),
                               stacked ? " is no stack of matrices" : " is no vector or matrix"));
  }
  const int64_t rows = dimensions == 1 ? 1 : entry->shape[0] * (stacked ? entry->shape[1] : 1);
  const uint8_t* data = files_[entry->file_index].bytes().data() + entry->begin_byte;
  if (entry->interleaved_heads > 0) {
    CINNABAR_ASSIGN_OR_RETURN(data, Unpermuted(*entry, *dtype));
  }
  return HostMatrix{.data = data, .dtype = *dtype, .rows = rows, .cols = entry->shape.back()};
}

absl::StatusOr<const uint8_t*> Checkpoint::Unpermuted(const TensorEntry& entry, DType dtype) const {
  const MappedFile& file = files_[entry.file_index];
  // A bias is a column of heads.
  const int64_t rows = entry.shape[0];
  const int64_t row_bytes = (entry.end_byte - entry.begin_byte) / rows;
  const int64_t head_rows = rows / entry.interleaved_heads;
  if (rows % (2 * int64_t{entry.interleaved_heads}) != 0 ||
      (entry.shape.size() == 1 && IsQuantized(dtype))) {
    return Broken(file.path(), entry.name,
                  absl::StrCat(DescribeTensor(entry), " does not split into ",
                               entry.interleaved_heads, " heads"));
  }
  MutexLock lock(copies_->mu);
  std::vector<uint8_t>& copy = copies_->by_name[entry.name];
  if (!copy.empty()) return copy.data();
  copy.resize(static_cast<size_t>(rows * row_bytes));
  const uint8_t* source = file.bytes().data() + entry.begin_byte;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t in_head = row % head_rows, half = head_rows / 2;
    const int64_t stored = row - in_head + 2 * (in_head % half) + in_head / half;
    std::memcpy(copy.data() + row * row_bytes, source + stored * row_bytes,
                static_cast<size_t>(row_bytes));
  }
  return copy.data();
}

void Checkpoint::Release(absl::string_view name) const {
  const TensorEntry* entry = Find(name);
  if (entry == nullptr) return;
  if (entry->interleaved_heads > 0) {
    MutexLock lock(copies_->mu);
    copies_->by_name.erase(entry->name);
  }
  const MappedFile& file = files_[entry->file_index];
  file.Release(file.bytes().data() + entry->begin_byte,
               static_cast<size_t>(entry->end_byte - entry->begin_byte));
}

}  // namespace cinnabar
