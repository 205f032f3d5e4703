// Any bytes as a GGUF file: read without a fault, and whatever is accepted keeps the format's
// promises; then what a model would be made of it.
#include <cstdint>
#include <vector>

#include "common/base/check.h"
#include "common/gguf/gguf.h"
#include "worker/model/family.h"
#include "worker/model/gguf_model.h"
#include "worker/model/model_spec.h"

namespace cinnabar {
namespace {

template <typename Entry>
void CheckEntry(const Entry& tensor, size_t size) {
  CINNABAR_CHECK(tensor.begin_byte >= 24 && tensor.begin_byte < tensor.end_byte &&
                 tensor.end_byte <= static_cast<int64_t>(size));
  int64_t elements = 1;
  for (const int64_t dimension : tensor.shape) elements *= dimension;
  CINNABAR_CHECK(elements == tensor.num_elements && !tensor.shape.empty());
  const std::optional<DType> dtype = UsableDType(tensor.dtype);
  if (!dtype.has_value()) return;
  CINNABAR_CHECK(tensor.shape.back() % BlockOf(*dtype).elements == 0);
  CINNABAR_CHECK(tensor.end_byte - tensor.begin_byte == BytesOf(*dtype, elements));
}

void Check(absl::Span<const uint8_t> bytes) {
  const absl::StatusOr<GgufHeader> header = GgufHeader::Read(bytes, "input");
  if (!header.ok()) {
    CINNABAR_CHECK(header.status().message().size() < 2000);
    return;
  }
  int64_t end = 0;
  for (const GgufTensor& tensor : header->tensors()) {
    CheckEntry(tensor, bytes.size());
    CINNABAR_CHECK(tensor.begin_byte >= end && header->FindTensor(tensor.name) == &tensor);
    end = tensor.end_byte;
  }
  const absl::StatusOr<std::vector<TensorEntry>> tensors = GgufTensors(*header);
  if (tensors.ok()) {
    for (const TensorEntry& tensor : *tensors) CheckEntry(tensor, bytes.size());
  }
  const absl::StatusOr<CheckpointTexts> texts = GgufTexts(*header);
  if (!texts.ok()) return;
  const absl::StatusOr<CheckpointFacts> facts = ReadCheckpointFacts(*texts, "input");
  if (facts.ok()) (void)ReadModelSpec(*facts);
}

}  // namespace
}  // namespace cinnabar

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  cinnabar::Check({data, size});
  return 0;
}
