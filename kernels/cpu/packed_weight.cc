#include "kernels/cpu/packed_weight.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHalfPanel = kPanelWidth / 2;

float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float WidenHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t exponent = (half >> 10) & 0x1FU;
  const uint32_t fraction = half & 0x3FFU;
  if (exponent == 0)
    return FloatFromBits(sign | BitsOfFloat(static_cast<float>(fraction) * 0x1p-24F));
  if (exponent == 31) return FloatFromBits(sign | 0x7F800000U | fraction << 13);
  return FloatFromBits(sign | (exponent + 112) << 23 | fraction << 13);
}

// Round to nearest, ties to even; NaN stays NaN, too large becomes infinite.
uint16_t NarrowToBf16(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>(bits >> 16 | 0x40U);
  return static_cast<uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

uint16_t NarrowToF16(float value) {
  const uint32_t bits = BitsOfFloat(value);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U);
  if (magnitude >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // 65520 and up
  if (magnitude < 0x38800000U) {
    // Subnormal result: adding 0.5 leaves round(value * 2^24) in the low bits.
    const uint32_t rounded = BitsOfFloat(FloatFromBits(magnitude) + 0.5F) - BitsOfFloat(0.5F);
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t rounded = magnitude + 0xFFFU + (magnitude >> 13 & 1U);
  return static_cast<uint16_t>(sign | (rounded - (112U << 23)) >> 13);
}

template <typename Word>
Word ReadWord(const void* data, int64_t index) {
  Word word;  // the file's tensors need not be aligned
  std::memcpy(&word,
              static_cast<const std::byte*>(data) + index * static_cast<int64_t>(sizeof(Word)),
              sizeof(Word));
  return word;
}

// Writes `source` row into lane `lane` of its panel. Same dtypes copy the bits.
void PackRow(const HostMatrix& source, int64_t row, DType dtype, std::byte* panel, int64_t lane) {
  const int64_t begin = row * source.cols;
  for (int64_t k = 0; k < source.cols; ++k) {
    std::byte* out = panel + (k * kPanelWidth + lane) * BytesOf(dtype);
    if (source.dtype == dtype && dtype != DType::kF32) {
      const uint16_t word = ReadWord<uint16_t>(source.data, begin + k);
      std::memcpy(out, &word, sizeof(word));
      continue;
    }
    const float value = ReadElement(source.data, source.dtype, begin + k);
    if (dtype == DType::kF32) {
      std::memcpy(out, &value, sizeof(value));
    } else {
      const uint16_t word = dtype == DType::kBf16 ? NarrowToBf16(value) : NarrowToF16(value);
      std::memcpy(out, &word, sizeof(word));
    }
  }
}

struct PanelShape {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t num_panels = 0;
};

PanelShape ShapeOf(absl::Span<const HostMatrix> parts, RowOrder row_order) {
  CINNABAR_CHECK(!parts.empty());
  PanelShape shape{.cols = parts[0].cols};
  for (const HostMatrix& part : parts) {
    CINNABAR_CHECK(part.cols == shape.cols) << part.cols << " columns beside " << shape.cols;
    shape.rows += part.rows;
  }
  const bool paired = row_order == RowOrder::kGatedPairs;
  if (paired)
    CINNABAR_CHECK(parts.size() == 2 && parts[0].rows == parts[1].rows)
        << "not a gate and an up matrix";
  const int64_t outputs_per_panel = paired ? kHalfPanel : kPanelWidth;
  shape.num_panels =
      ((paired ? shape.rows / 2 : shape.rows) + outputs_per_panel - 1) / outputs_per_panel;
  return shape;
}

// The matrix and row behind a panel's lane.
struct Lane {
  const HostMatrix* part = nullptr;  // null: beyond the last output
  int64_t row = 0;
};

Lane LaneOf(absl::Span<const HostMatrix> parts, RowOrder row_order, int64_t panel, int64_t lane) {
  if (row_order == RowOrder::kGatedPairs) {
    const int64_t row = panel * kHalfPanel + lane % kHalfPanel;
    const HostMatrix& part = parts[lane / kHalfPanel];
    return row < part.rows ? Lane{&part, row} : Lane{};
  }
  int64_t row = panel * kPanelWidth + lane;
  for (const HostMatrix& part : parts) {
    if (row < part.rows) return {&part, row};
    row -= part.rows;
  }
  return {};
}

// `count` elements of a row, widened, to every 32nd place of `out`.
template <typename Word, typename Widen>
void SpreadRow(const void* data, int64_t begin, int64_t count, const Widen& widen, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    out[k * kPanelWidth] = widen(ReadWord<Word>(data, begin + k));
  }
}

}  // namespace

void FreeAligned::operator()(std::byte* memory) const { std::free(memory); }

AlignedMemory AllocateAligned(int64_t size_bytes) {
  const int64_t rounded =
      (std::max<int64_t>(size_bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  auto* memory =
      static_cast<std::byte*>(std::aligned_alloc(kAlignment, static_cast<size_t>(rounded)));
  if (memory != nullptr) std::memset(memory, 0, static_cast<size_t>(rounded));
  return AlignedMemory(memory);
}

float ReadElement(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return ReadWord<float>(data, index);
    case DType::kF16:
      return WidenHalf(ReadWord<uint16_t>(data, index));
    case DType::kBf16:
      return FloatFromBits(static_cast<uint32_t>(ReadWord<uint16_t>(data, index)) << 16);
  }
  CINNABAR_CHECK(false) << "not a dtype: " << static_cast<int>(dtype);
  return 0.0F;
}

PackedWeight::PackedWeight(int64_t rows, int64_t cols, RowOrder row_order, DType dtype,
                           int64_t num_panels, AlignedMemory memory, std::vector<HostMatrix> parts)
    : Weight(rows, cols, row_order, dtype),
      num_panels_(num_panels),
      memory_(std::move(memory)),
      parts_(std::move(parts)) {}

absl::StatusOr<std::unique_ptr<PackedWeight>> PackedWeight::Pack(absl::Span<const HostMatrix> parts,
                                                                 RowOrder row_order, DType dtype,
                                                                 ThreadPool& pool) {
  const PanelShape shape = ShapeOf(parts, row_order);
  const int64_t panel_bytes = shape.cols * kPanelWidth * BytesOf(dtype);
  AlignedMemory memory = AllocateAligned(shape.num_panels * panel_bytes);
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", shape.num_panels * panel_bytes, " bytes for a weight"));
  }
  pool.ParallelFor(shape.num_panels, [&](int64_t panel, int32_t /*thread*/) {
    std::byte* out = memory.get() + panel * panel_bytes;
    for (int64_t i = 0; i < kPanelWidth; ++i) {
      const Lane lane = LaneOf(parts, row_order, panel, i);
      if (lane.part != nullptr) PackRow(*lane.part, lane.row, dtype, out, i);
    }
  });
  return std::unique_ptr<PackedWeight>(new PackedWeight(
      shape.rows, shape.cols, row_order, dtype, shape.num_panels, std::move(memory), {}));
}

std::unique_ptr<PackedWeight> PackedWeight::Map(absl::Span<const HostMatrix> parts,
                                                RowOrder row_order) {
  const PanelShape shape = ShapeOf(parts, row_order);
  for (const HostMatrix& part : parts) CINNABAR_CHECK(part.dtype == parts[0].dtype);
  return std::unique_ptr<PackedWeight>(
      new PackedWeight(shape.rows, shape.cols, row_order, parts[0].dtype, shape.num_panels, nullptr,
                       std::vector<HostMatrix>(parts.begin(), parts.end())));
}

void PackedWeight::WidenMapped(int64_t panel, int64_t k, int64_t count, float* out) const {
  // Pieces of sixteen inputs: what all 32 lanes write stays in the first-level cache.
  constexpr int64_t kPiece = 16;
  Lane lanes[kPanelWidth];
  for (int64_t i = 0; i < kPanelWidth; ++i) lanes[i] = LaneOf(parts_, row_order(), panel, i);
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
    for (int64_t i = 0; i < kPanelWidth; ++i) {
      float* to = out + done * kPanelWidth + i;
      if (lanes[i].part == nullptr) {
        for (int64_t j = 0; j < piece; ++j) to[j * kPanelWidth] = 0.0F;
        continue;
      }
      const void* data = lanes[i].part->data;
      const int64_t begin = lanes[i].row * cols() + k + done;
      switch (dtype()) {
        case DType::kF32:
          SpreadRow<float>(data, begin, piece, [](float x) { return x; }, to);
          break;
        case DType::kF16:
          SpreadRow<uint16_t>(data, begin, piece, WidenHalf, to);
          break;
        case DType::kBf16:
          SpreadRow<uint16_t>(
              data, begin, piece,
              [](uint16_t x) { return FloatFromBits(static_cast<uint32_t>(x) << 16); }, to);
          break;
      }
    }
  }
}

const float* PackedWeight::PanelBlock(int64_t panel, int64_t k, int64_t count,
                                      const IsaKernels& isa, float* scratch) const {
  if (mapped()) {
    WidenMapped(panel, k, count, scratch);
    return scratch;
  }
  const int64_t first = (panel * cols() + k) * kPanelWidth;
  if (dtype() == DType::kF32) return reinterpret_cast<const float*>(memory_.get()) + first;
  const auto* kept = reinterpret_cast<const uint16_t*>(memory_.get()) + first;
  (dtype() == DType::kBf16 ? isa.widen_bf16 : isa.widen_f16)(kept, count * kPanelWidth, scratch);
  return scratch;
}

}  // namespace cinnabar::cpu
