// The tensors of a checkpoint: the one thing that bodies and checks read, made from safetensors
// or PyTorch files or a GGUF file, all memory-mapped.
#ifndef CINNABAR_WORKER_MODEL_CHECKPOINT_H_
#define CINNABAR_WORKER_MODEL_CHECKPOINT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/mapped_file.h"
#include "common/base/mutex.h"
#include "kernels/backend.h"
#include "worker/model/safetensors.h"

namespace cinnabar {

// The tensors of a checkpoint under the names that its family gives them, whatever the container.
// Movable; reads are safe from any thread.
class Checkpoint {
 public:
  // `directory` is a GGUF file (ends in .gguf) or a folder. Of a folder: model.safetensors, else
  // the shards of model.safetensors.index.json or pytorch_model.bin.index.json, else the only
  // *.safetensors, the only *.gguf, pytorch_model.bin, the only *.bin, *.pth, *.pt or *.ckpt, or
  // checkpoints-meta/checkpoint.pth. NotFound when there are none (saying what is there instead),
  // InvalidArgument when a file is broken, the index names a tensor that its shard lacks or two
  // shards hold one name.
  static absl::StatusOr<Checkpoint> Open(const std::string& directory);
  static absl::StatusOr<Checkpoint> OpenFile(const std::string& path);

  const std::vector<MappedFile>& files() const { return files_; }
  // Ascending by file, then by place in it.
  absl::Span<const TensorEntry> tensors() const { return tensors_; }
  const TensorEntry* Find(absl::string_view name) const;  // nullptr: none
  // The file that holds it, without its folder, for messages.
  std::string FileOf(const TensorEntry& tensor) const;

  // The tensor as a matrix: [n] as one row. NotFound without it, InvalidArgument when it has more
  // than two dimensions, Unimplemented when its dtype is not among UsableDType's. The bytes live as
  // long as this; those of a tensor with interleaved heads are a copy, and live until Release().
  absl::StatusOr<HostMatrix> Matrix(absl::string_view name) const;

  // A tensor [count, rows, cols] as a matrix of count * rows rows; errors as above.
  absl::StatusOr<HostMatrix> StackedMatrix(absl::string_view name) const;

  // The tensor's bytes will not be read again soon.
  void Release(absl::string_view name) const;

 private:
  struct Copies {
    Mutex mu;  // leaf
    absl::flat_hash_map<std::string, std::vector<uint8_t>> by_name ABSL_GUARDED_BY(mu);
  };

  static absl::StatusOr<Checkpoint> OpenShards(const std::string& directory,
                                               absl::string_view index, absl::string_view ending);
  absl::Status AddFile(const std::string& path);
  absl::StatusOr<HostMatrix> AsMatrix(absl::string_view name, bool stacked) const;
  // The bytes of a tensor with interleaved heads in the order that half-split rotation wants.
  absl::StatusOr<const uint8_t*> Unpermuted(const TensorEntry& entry, DType dtype) const;

  std::vector<MappedFile> files_;
  std::vector<TensorEntry> tensors_;
  absl::flat_hash_map<std::string, size_t> index_;
  std::unique_ptr<Copies> copies_ = std::make_unique<Copies>();
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_CHECKPOINT_H_
