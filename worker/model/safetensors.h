// Reading and writing safetensors files; validated before any number is believed. Format:
// huggingface/safetensors, "Format" in its README.
#ifndef CINNABAR_WORKER_MODEL_SAFETENSORS_H_
#define CINNABAR_WORKER_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/backend.h"

namespace cinnabar {

// One tensor of a file, of this format or of another.
struct TensorEntry {
  std::string name;
  std::string dtype;           // as written: "BF16", "I64", ...; always one the format knows
  std::vector<int64_t> shape;  // empty: a scalar
  int64_t num_elements = 1;
  int64_t begin_byte = 0;  // in the file, header included
  int64_t end_byte = 0;
  int32_t file_index = 0;  // in Checkpoint::files()
  // > 0: the rows of each of so many heads lie in the order 0, n/2, 1, n/2 + 1, ... of the n that
  // half-split rotation wants (GGUF's llada).
  int32_t interleaved_heads = 0;
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

// Writes one float32 tensor as a safetensors file. `values` has the product of `shape` elements
// (CINNABAR_CHECK).
absl::Status WriteSafetensors(const std::string& path, absl::string_view name,
                              absl::Span<const int64_t> shape, absl::Span<const float> values);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_SAFETENSORS_H_
