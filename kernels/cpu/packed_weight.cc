#include "kernels/cpu/packed_weight.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "kernels/quantized.h"

namespace cinnabar::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
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

// Round to nearest, ties to even; NaN stays NaN, too large becomes infinite.
uint16_t NarrowToBf16(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>(bits >> 16 | 0x40U);
  return static_cast<uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

template <typename Word>
Word ReadWord(const void* data, int64_t index) {
  Word word;  // the file's tensors need not be aligned
  std::memcpy(&word,
              static_cast<const std::byte*>(data) + index * static_cast<int64_t>(sizeof(Word)),
              sizeof(Word));
  return word;
}

int64_t RoundUp(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// --- Block formats
// -----------------------------------------------------------------------------------------

// How an input block of a panel of a block format is kept: the sections of an ExpandTask one after
// another, each aligned. The blocks of a panel follow one another.
struct RunFormat {
  bool nibbles;
  int32_t zero;              // what nibbles are stored above
  int32_t sub_scale_length;  // 0: none
  bool sub_offsets;
  int32_t scale_length;
  bool offsets;

  // Values that are multiplied as they are kept.
  bool is_plain_bytes() const {
    return !nibbles && sub_scale_length == 0 && scale_length == kRunLength && !offsets;
  }
};

RunFormat FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kQ8_0:
      return {false, 0, 0, false, 32, false};
    case DType::kQ4_0:
      return {true, 8, 0, false, 32, false};
    case DType::kQ4_1:
      return {true, 0, 0, false, 32, true};
    case DType::kQ4_K:
      return {true, 0, 32, true, 256, true};
    case DType::kQ6_K:
      return {false, 0, 16, false, 256, false};
    case DType::kF32:
    case DType::kF16:
    case DType::kBf16:
      break;
  }
  CINNABAR_CHECK(false) << NameOf(dtype) << " is no block format";
  return {};
}

// Offsets of the sections in a block; `end` is its size.
struct RunSections {
  int64_t values, sub_scales, sub_offsets, scales, offsets, end;
};

// Of a block of `cols` inputs.
RunSections SectionsOf(const RunFormat& format, int64_t cols) {
  RunSections at{};
  int64_t next = 0;
  const auto take = [&](bool there, int64_t bytes) {
    return std::exchange(next, next + (there ? RoundUp(bytes) : 0));
  };
  at.values = take(true, cols * kPanelWidth / (format.nibbles ? 2 : 1));
  at.sub_scales =
      take(format.sub_scale_length > 0,
           format.sub_scale_length > 0 ? cols / format.sub_scale_length * kPanelWidth : 0);
  at.sub_offsets = take(format.sub_offsets, cols / kRunLength * kPanelWidth);
  const int64_t scale_bytes = cols / format.scale_length * kPanelWidth * 4;
  at.scales = take(true, scale_bytes);
  at.offsets = take(format.offsets, scale_bytes);
  at.end = next;
  return at;
}

// Writes run `index` of a block of one output.
void PackRun(const QuantizedRun& run, const RunFormat& format, const RunSections& at, int64_t index,
             int64_t lane, std::byte* block) {
  auto* values = reinterpret_cast<uint8_t*>(block + at.values);
  for (int64_t i = 0; i < kRunLength; ++i) {
    const int64_t pair = (index * kRunLength + i) / 2, place = 2 * lane + i % 2;
    if (!format.nibbles) {
      values[pair * 2 * kPanelWidth + place] = static_cast<uint8_t>(run.q[i]);
      continue;
    }
    const int nibble = run.q[i] + format.zero;
    values[pair / 2 * 2 * kPanelWidth + place] |=
        static_cast<uint8_t>(pair % 2 == 0 ? nibble : nibble << 4);
  }
  if (format.sub_scale_length > 0) {
    auto* sub_scales = reinterpret_cast<int8_t*>(block + at.sub_scales);
    for (int64_t k = 0; k < kRunLength; k += format.sub_scale_length) {
      sub_scales[(index * kRunLength + k) / format.sub_scale_length * kPanelWidth + lane] =
          run.sub_scale[k / 16];
    }
  }
  if (format.sub_offsets) {
    reinterpret_cast<int8_t*>(block + at.sub_offsets)[index * kPanelWidth + lane] = run.sub_offset;
  }
  const int64_t place = index * kRunLength / format.scale_length * kPanelWidth + lane;
  reinterpret_cast<float*>(block + at.scales)[place] = run.scale;
  if (format.offsets) reinterpret_cast<float*>(block + at.offsets)[place] = run.offset;
}

// --- Panels
// ------------------------------------------------------------------------------------------------

int64_t BlockBytes(DType dtype, int64_t inputs) {
  return IsQuantized(dtype) ? SectionsOf(FormatOf(dtype), inputs).end
                            : BytesOf(dtype, inputs * kPanelWidth);
}

int64_t PanelBytes(DType dtype, int64_t cols) {
  return cols / kInputBlock * BlockBytes(dtype, kInputBlock) +
         RoundUp(BlockBytes(dtype, cols % kInputBlock));
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
    CINNABAR_CHECK(part.cols % BlockOf(part.dtype).elements == 0)
        << part.cols << " columns are not whole blocks of " << NameOf(part.dtype);
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

  const std::byte* data() const {
    return static_cast<const std::byte*>(part->data) + row * BytesOf(part->dtype, part->cols);
  }
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

// What a part is kept as when `dtype` is asked for.
DType KeptAs(const HostMatrix& part, DType dtype) {
  return IsQuantized(dtype) && IsQuantized(part.dtype) ? part.dtype : dtype;
}

DType PanelDType(absl::Span<const HostMatrix> parts, RowOrder row_order, DType dtype,
                 int64_t panel) {
  std::optional<DType> kept;
  for (int64_t i = 0; i < kPanelWidth; ++i) {
    const Lane lane = LaneOf(parts, row_order, panel, i);
    if (lane.part == nullptr) continue;
    const DType wanted = KeptAs(*lane.part, dtype);
    if (kept.has_value() && *kept != wanted) return DType::kF32;
    kept = wanted;
  }
  return kept.value_or(dtype);
}

// Writes an output into lane `lane` of a panel of floats. Same dtypes copy the bits. `row` is
// scratch for cols floats.
void PackFloats(const Lane& source, DType dtype, int64_t lane, absl::Span<float> row,
                std::byte* panel) {
  const bool copy = source.part->dtype == dtype && dtype != DType::kF32;
  if (!copy) ReadRow(*source.part, source.row, row);
  for (int64_t k = 0; k < source.part->cols; ++k) {
    std::byte* out = panel + (k * kPanelWidth + lane) * BytesOf(dtype);
    if (dtype == DType::kF32) {
      std::memcpy(out, &row[k], sizeof(float));
      continue;
    }
    const uint16_t word = copy                    ? ReadWord<uint16_t>(source.data(), k)
                          : dtype == DType::kBf16 ? NarrowToBf16(row[k])
                                                  : NarrowToHalf(row[k]);
    std::memcpy(out, &word, sizeof(word));
  }
}

void PackPanel(absl::Span<const HostMatrix> parts, RowOrder row_order, int64_t panel, DType dtype,
               std::byte* out) {
  const int64_t cols = parts[0].cols;
  std::vector<float> row(cols);
  std::vector<std::byte> blocks(IsQuantized(dtype) ? BytesOf(dtype, cols) : 0);
  for (int64_t i = 0; i < kPanelWidth; ++i) {
    const Lane lane = LaneOf(parts, row_order, panel, i);
    if (lane.part == nullptr) continue;
    if (!IsQuantized(dtype)) {
      PackFloats(lane, dtype, i, absl::MakeSpan(row), out);
      continue;
    }
    const std::byte* source = lane.data();
    if (lane.part->dtype != dtype) {
      ReadRow(*lane.part, lane.row, absl::MakeSpan(row));
      QuantizeRow(row, dtype, blocks.data());
      source = blocks.data();
    }
    const RunFormat format = FormatOf(dtype);
    for (int64_t k = 0; k < cols; k += kInputBlock) {
      const int64_t count = std::min(kInputBlock, cols - k);
      const RunSections at = SectionsOf(format, count);
      for (int64_t index = 0; index < count / kRunLength; ++index) {
        PackRun(ReadRun(source, dtype, k / kRunLength + index), format, at, index, i,
                out + k / kInputBlock * BlockBytes(dtype, kInputBlock));
      }
    }
  }
}

// `count` elements of a row, widened, to every 32nd place of `out`.
template <typename Word, typename Widen>
void SpreadRow(const void* data, int64_t begin, int64_t count, const Widen& widen, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    out[k * kPanelWidth] = widen(ReadWord<Word>(data, begin + k));
  }
}

// The parts of `count` inputs, in this order.
RunScratch LayOutRuns(int64_t count, bool offsets, float* scratch) {
  float* scales = scratch + count * kPanelWidth / 2;
  return {.values = reinterpret_cast<int16_t*>(scratch),
          .scales = scales,
          .offsets = offsets ? scales + count / kRunLength * kPanelWidth : nullptr};
}

}  // namespace

void FreeAligned::operator()(std::byte* memory) const { std::free(memory); }

AlignedMemory AllocateAligned(int64_t size_bytes) {
  const auto rounded = static_cast<size_t>(RoundUp(std::max<int64_t>(size_bytes, 1)));
  const bool large = rounded >= 2 * kHugePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, large ? kHugePage : kAlignment, rounded) != 0) return nullptr;
  // A panel block crosses sixteen small pages, and under a hypervisor each miss walks two tables.
  // The rest beyond the last whole huge page stays small; a kernel that has none is no worse off.
  if (large) madvise(memory, rounded / kHugePage * kHugePage, MADV_HUGEPAGE);
  std::memset(memory, 0, rounded);
  return AlignedMemory(static_cast<std::byte*>(memory));
}

PackedWeight::PackedWeight(int64_t rows, int64_t cols, RowOrder row_order, DType dtype,
                           std::vector<Panel> panels, AlignedMemory memory, int64_t memory_bytes,
                           std::vector<HostMatrix> parts)
    : Weight(rows, cols, row_order, dtype),
      panels_(std::move(panels)),
      memory_(std::move(memory)),
      memory_bytes_(memory_bytes),
      parts_(std::move(parts)) {
  for (const Panel& panel : panels_) {
    (IsQuantized(panel.dtype) ? any_quantized_ : any_float_) = true;
  }
}

int64_t PackedWeight::BytesOfRows(DType dtype, int64_t rows, int64_t cols) {
  return rows * PanelBytes(dtype, cols) / kPanelWidth;
}

absl::StatusOr<std::unique_ptr<PackedWeight>> PackedWeight::Pack(absl::Span<const HostMatrix> parts,
                                                                 RowOrder row_order, DType dtype,
                                                                 ThreadPool& pool) {
  const PanelShape shape = ShapeOf(parts, row_order);
  std::vector<Panel> panels(shape.num_panels);
  int64_t memory_bytes = 0;
  for (int64_t panel = 0; panel < shape.num_panels; ++panel) {
    const DType kept = PanelDType(parts, row_order, dtype, panel);
    panels[panel] = {
        .dtype = kept, .begin_byte = memory_bytes, .block_bytes = BlockBytes(kept, kInputBlock)};
    memory_bytes += PanelBytes(kept, shape.cols);
  }
  AlignedMemory memory = AllocateAligned(memory_bytes);
  if (memory == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no ", memory_bytes, " bytes for a weight"));
  }
  pool.ParallelFor(shape.num_panels, [&](int64_t panel, int32_t /*thread*/) {
    PackPanel(parts, row_order, panel, panels[panel].dtype,
              memory.get() + panels[panel].begin_byte);
  });
  return std::unique_ptr<PackedWeight>(new PackedWeight(shape.rows, shape.cols, row_order, dtype,
                                                        std::move(panels), std::move(memory),
                                                        memory_bytes, {}));
}

std::unique_ptr<PackedWeight> PackedWeight::Map(absl::Span<const HostMatrix> parts,
                                                RowOrder row_order) {
  const PanelShape shape = ShapeOf(parts, row_order);
  for (const HostMatrix& part : parts) CINNABAR_CHECK(part.dtype == parts[0].dtype);
  return std::unique_ptr<PackedWeight>(
      new PackedWeight(shape.rows, shape.cols, row_order, parts[0].dtype,
                       std::vector<Panel>(shape.num_panels, Panel{.dtype = parts[0].dtype}),
                       nullptr, 0, std::vector<HostMatrix>(parts.begin(), parts.end())));
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
      const void* data = lanes[i].data();
      const int64_t begin = k + done;
      if (dtype() == DType::kF32) {
        SpreadRow<float>(
            data, begin, piece, [](float x) { return x; }, to);
      } else if (dtype() == DType::kF16) {
        SpreadRow<uint16_t>(data, begin, piece, WidenHalf, to);
      } else {
        SpreadRow<uint16_t>(
            data, begin, piece,
            [](uint16_t x) { return FloatFromBits(static_cast<uint32_t>(x) << 16); }, to);
      }
    }
  }
}

void PackedWeight::ExpandMapped(int64_t panel, int64_t k, int64_t count,
                                const RunScratch& out) const {
  for (int64_t i = 0; i < kPanelWidth; ++i) {
    const Lane lane = LaneOf(parts_, row_order(), panel, i);
    for (int64_t index = 0; index < count / kRunLength; ++index) {
      QuantizedRun run{};
      if (lane.part != nullptr) run = ReadRun(lane.data(), dtype(), k / kRunLength + index);
      int16_t* values = out.values + index * kRunLength * kPanelWidth + 2 * i;
      for (int64_t j = 0; j < kRunLength; ++j) {
        values[j / 2 * 2 * kPanelWidth + j % 2] =
            static_cast<int16_t>(run.q[j] * run.sub_scale[j / 16]);
      }
      out.scales[index * kPanelWidth + i] = run.scale;
      if (out.offsets != nullptr) {
        out.offsets[index * kPanelWidth + i] = run.offset * static_cast<float>(run.sub_offset);
      }
    }
  }
}

Ahead PackedWeight::Kept(int64_t panel, int64_t k) const {
  if (mapped()) return {};
  const Panel& of = panels_[panel];
  const int64_t begin = of.begin_byte + k / kInputBlock * of.block_bytes;
  const int64_t end = panel + 1 < num_panels() ? panels_[panel + 1].begin_byte : memory_bytes_;
  return {memory_.get() + begin, std::min(of.block_bytes, end - begin)};
}

const float* PackedWeight::PanelBlock(int64_t panel, int64_t k, const IsaKernels& isa,
                                      float* scratch) const {
  const int64_t count = block_inputs(k);
  if (mapped()) {
    WidenMapped(panel, k, count, scratch);
    return scratch;
  }
  const std::byte* kept = Kept(panel, k).bytes;
  const DType dtype = panels_[panel].dtype;
  if (dtype == DType::kF32) return reinterpret_cast<const float*>(kept);
  (dtype == DType::kBf16 ? isa.widen_bf16 : isa.widen_f16)(reinterpret_cast<const uint16_t*>(kept),
                                                           count * kPanelWidth, scratch);
  return scratch;
}

RunPanel PackedWeight::PanelRuns(int64_t panel, int64_t k, const IsaKernels& isa,
                                 float* scratch) const {
  const int64_t count = block_inputs(k);
  const RunFormat format = FormatOf(panels_[panel].dtype);
  const RunScratch out = LayOutRuns(count, format.offsets, scratch);
  const RunPanel expanded = {out.values, nullptr, out.scales, out.offsets};
  if (mapped()) {
    ExpandMapped(panel, k, count, out);
    return expanded;
  }
  const RunSections at = SectionsOf(format, count);
  const std::byte* kept = Kept(panel, k).bytes;
  ExpandTask task{};
  task.values = reinterpret_cast<const uint8_t*>(kept + at.values);
  task.nibbles = format.nibbles;
  task.zero = format.zero;
  if (format.sub_scale_length > 0) {
    task.sub_scales = reinterpret_cast<const int8_t*>(kept + at.sub_scales);
    task.sub_scale_length = format.sub_scale_length;
  }
  if (format.sub_offsets) {
    task.sub_offsets = reinterpret_cast<const int8_t*>(kept + at.sub_offsets);
  }
  task.scales = reinterpret_cast<const float*>(kept + at.scales);
  if (format.offsets) task.offsets = reinterpret_cast<const float*>(kept + at.offsets);
  task.scale_length = format.scale_length;
  if (isa.tiles_of_bytes && format.is_plain_bytes()) {
    return {nullptr, reinterpret_cast<const int8_t*>(task.values), task.scales, nullptr};
  }
  task.num_runs = count / kRunLength;
  isa.expand(task, out);
  return expanded;
}

}  // namespace cinnabar::cpu
