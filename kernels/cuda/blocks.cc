#include "kernels/cuda/blocks.h"

#include <cstring>

#include "common/base/check.h"
#include "kernels/cuda/device.h"
#include "kernels/quantized.h"

namespace cinnabar::cuda {
namespace {

constexpr int32_t kRun = 32;

// The scales of the run `run` of a unit, from the block that holds it, to the unit's header.
void PackHeader(const char* block, DType format, int32_t run, char* header) {
  switch (format) {
    case DType::kQ4_1:
      std::memcpy(header + 16 + 2 * run, block + 2, 2);
      [[fallthrough]];
    case DType::kQ8_0:
    case DType::kQ4_0:
      std::memcpy(header + 2 * run, block, 2);
      return;
    case DType::kQ4_K:
      std::memcpy(header, block, 16);
      return;
    case DType::kQ6_K:
      std::memcpy(header, block + 192, 18);
      return;
    case DType::kF32:
    case DType::kF16:
    case DType::kBf16:
      return;
  }
}

}  // namespace

void PackUnits(const void* row, DType format, int64_t cols, char* to) {
  const Element element = ElementOf(format);
  const BlockShape shape = BlockOf(format);
  const UnitLayout layout = UnitOf(element);
  std::memset(to, 0, UnitRowBytes(element, cols));
  for (int64_t index = 0; index < cols / kRun; ++index) {
    char* unit = to + index * kRun / kUnit * layout.unit_bytes();
    const auto run = static_cast<int32_t>(index % (kUnit / kRun));
    PackHeader(static_cast<const char*>(row) + index * kRun / shape.elements * shape.bytes, format,
               run, unit);
    const QuantizedRun source = ReadRun(row, format, index);
    char* values = unit + layout.header_bytes + run / 2 * layout.value_bytes;
    char* high = unit + layout.header_bytes + 4 * layout.value_bytes + run / 2 * layout.high_bytes;
    for (int32_t i = 0; i < kRun; ++i) {
      const int32_t e = run % 2 * kRun + i;  // in its quarter
      if (element == Element::kQ8_0) {
        values[e] = static_cast<char>(source.q[i] + 128);
        continue;
      }
      const int32_t zero = element == Element::kQ4_0 ? 8 : element == Element::kQ6_K ? 32 : 0;
      const int32_t stored = source.q[i] + zero;
      values[e / 2] = static_cast<char>(values[e / 2] | (stored & 15) << 4 * (e % 2));
      if (layout.high_bytes > 0) {
        high[e / 4] = static_cast<char>(high[e / 4] | (stored >> 4) << 2 * (e % 4));
      }
    }
  }
}

}  // namespace cinnabar::cuda
