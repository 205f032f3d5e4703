// Any bytes as what torch.save wrote: read without a fault, and whatever is accepted lies in the
// file.
#include <cstdint>
#include <vector>

#include "common/base/check.h"
#include "worker/model/torch_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::StatusOr<std::vector<cinnabar::TensorEntry>> tensors =
      cinnabar::ReadTorchFile({data, size}, "input");
  if (!tensors.ok()) {
    CINNABAR_CHECK(tensors.status().message().size() < 2000);
    return 0;
  }
  for (const cinnabar::TensorEntry& tensor : *tensors) {
    CINNABAR_CHECK(!tensor.name.empty() && tensor.begin_byte >= 0 &&
                   tensor.begin_byte < tensor.end_byte &&
                   tensor.end_byte <= static_cast<int64_t>(size));
    int64_t elements = 1;
    for (const int64_t dimension : tensor.shape) elements *= dimension;
    CINNABAR_CHECK(elements == tensor.num_elements);
    const std::optional<cinnabar::DType> dtype = cinnabar::UsableDType(tensor.dtype);
    if (dtype.has_value()) {
      CINNABAR_CHECK(tensor.end_byte - tensor.begin_byte == cinnabar::BytesOf(*dtype, elements));
    }
  }
  return 0;
}
