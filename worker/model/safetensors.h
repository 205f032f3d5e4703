// Reading safetensors files: memory-mapped, validated before any number is believed. One file, or
// the shards of a Hugging Face folder. Format: huggingface/safetensors, "Format" in its README.
#ifndef CINNABAR_WORKER_MODEL_SAFETENSORS_H_
#define CINNABAR_WORKER_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/mapped_file.h"
#include "kernels/backend.h"

namespace cinnabar {

// One tensor of a file.
struct TensorEntry {
  std::string name;
  std::string dtype;           // as written: "BF16", "I64", ...; always one the format knows
  std::vector<int64_t> shape;  // empty: a scalar
  int64_t num_elements = 1;
  int64_t begin_byte = 0;  // in the file, header included
  int64_t end_byte = 0;
  int32_t file_index = 0;  // in Checkpoint::files()
};

// "F32 [3, 4]", for messages.
std::string DescribeTensor(const TensorEntry& tensor);

// The dtype if weights of it can be computed with.
std::optional<DType> UsableDType(absl::string_view name);

// Reads and checks a header. `bytes` is the whole file, `what` its name in errors. InvalidArgument
// for every deviation from the format: a header length that does not fit, text that is not JSON or
// repeats a key, a field of the wrong type, an unknown dtype, a product of dimensions that
// overflows, a size that is not that product, tensors that overlap, leave a gap or end elsewhere
// than the file. Takes memory in proportion to the header, never to what it claims. Tensors come in
// file order.
absl::StatusOr<std::vector<TensorEntry>> ReadSafetensorsHeader(absl::Span<const uint8_t> bytes,
                                                               absl::string_view what);

// The tensors of a folder, or of a single file. Movable; reads are safe from any thread.
class Checkpoint {
 public:
  // Takes model.safetensors, else the shards of model.safetensors.index.json, else the only
  // *.safetensors of the folder. NotFound when there are none (saying what is there instead),
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
  // than two dimensions, Unimplemented when its dtype is not F32, F16 or BF16. The bytes live as
  // long as this.
  absl::StatusOr<HostMatrix> Matrix(absl::string_view name) const;

  // A tensor [count, rows, cols] as a matrix of count * rows rows; errors as above.
  absl::StatusOr<HostMatrix> StackedMatrix(absl::string_view name) const;

  // The tensor's bytes will not be read again soon.
  void Release(absl::string_view name) const;

 private:
  absl::Status AddFile(const std::string& path);
  absl::StatusOr<HostMatrix> AsMatrix(absl::string_view name, bool stacked) const;

  std::vector<MappedFile> files_;
  std::vector<TensorEntry> tensors_;
  absl::flat_hash_map<std::string, size_t> index_;
};

// Writes one float32 tensor as a safetensors file. `values` has the product of `shape` elements
// (CINNABAR_CHECK).
absl::Status WriteSafetensors(const std::string& path, absl::string_view name,
                              absl::Span<const int64_t> shape, absl::Span<const float> values);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_SAFETENSORS_H_
