// Any bytes as a safetensors file: read without a fault, and whatever is accepted keeps the
// format's promises.
#include <cstdint>
#include <limits>
#include <vector>

#include "common/base/check.h"
#include "worker/model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::StatusOr<std::vector<cinnabar::TensorEntry>> tensors =
      cinnabar::ReadSafetensorsHeader({data, size}, "input");
  if (!tensors.ok()) {
    CINNABAR_CHECK(tensors.status().message().size() < 2000);
    return 0;
  }
  int64_t end = -1;
  for (const cinnabar::TensorEntry& tensor : *tensors) {
    CINNABAR_CHECK(end < 0 || tensor.begin_byte == end);
    CINNABAR_CHECK(tensor.begin_byte >= 8 && tensor.begin_byte <= tensor.end_byte);
    end = tensor.end_byte;
    CINNABAR_CHECK(!cinnabar::DescribeTensor(tensor).empty());
    const std::optional<cinnabar::DType> dtype = cinnabar::UsableDType(tensor.dtype);
    if (dtype.has_value()) {
      CINNABAR_CHECK(tensor.end_byte - tensor.begin_byte ==
                     cinnabar::BytesOf(*dtype, tensor.num_elements));
    }
  }
  CINNABAR_CHECK(end < 0 || end == static_cast<int64_t>(size));
  return 0;
}
