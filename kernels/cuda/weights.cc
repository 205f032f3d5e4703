#include "kernels/cuda/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/base/status.h"
#include "kernels/cuda/blocks.h"
#include "kernels/cuda/math.h"
#include "kernels/cuda/plan.h"
#include "kernels/quantized.h"

namespace cinnabar::cuda {
namespace {

// What a part is kept as where `dtype` is asked for: a block format stays as it is in another.
DType KeptAs(const HostMatrix& part, DType dtype) {
  return IsQuantized(dtype) && IsQuantized(part.dtype) ? part.dtype : dtype;
}

// The rows of a piece, in the order in which they lie in memory.
class PieceRows {
 public:
  PieceRows(absl::Span<const HostMatrix> parts, RowOrder row_order)
      : parts_(parts), gated_(row_order == RowOrder::kGatedPairs) {}

  int64_t cols() const { return parts_[0].cols; }
  // Without the padding behind the last.
  int64_t memory_rows() const {
    if (gated_) return RoundUp(parts_[0].rows, 8) * 2;
    int64_t rows = 0;
    for (const HostMatrix& part : parts_) rows += part.rows;
    return rows;
  }
  int64_t padded_rows() const { return RoundUp(memory_rows(), kWeightRowUnit); }

  struct Row {
    const HostMatrix* part = nullptr;  // null: padding
    int64_t index = 0;                 // there
  };
  Row At(int64_t memory_row) const {
    if (gated_) {
      const GatedSource source = GatedSourceOf(memory_row);
      if (source.output >= parts_[0].rows) return {};
      return {&parts_[source.up ? 1 : 0], source.output};
    }
    for (const HostMatrix& part : parts_) {
      if (memory_row < part.rows) return {&part, memory_row};
      memory_row -= part.rows;
    }
    return {};
  }

 private:
  absl::Span<const HostMatrix> parts_;
  bool gated_;
};

WeightView ViewOfPiece(const PieceRows& rows, Element element, bool tiled) {
  WeightView view;
  view.rows = static_cast<int32_t>(rows.memory_rows());
  view.cols = static_cast<int32_t>(rows.cols());
  view.element = element;
  view.row_bytes = RowBytes(element, rows.cols());
  view.k_bytes = IsBlocks(element) ? RoundUp(rows.cols() * 2, kWeightRowBytes) : view.row_bytes;
  if (ForTensorCores(element) || element == Element::kE4m3) {
    view.segment_bytes = SegmentBytes(view.rows, view.k_bytes);
    view.num_segments =
        static_cast<int32_t>((view.k_bytes + view.segment_bytes - 1) / view.segment_bytes);
    // A row of tiles is loaded at a time.
    view.tiled =
        tiled && !IsBlocks(element) && kWeightRowUnit * view.row_bytes <= Loader::kPieceBytes;
  }
  return view;
}

// What each output is multiplied by where it is kept as e4m3: so that its largest element is the
// format's.
std::vector<float> OutputScales(const PieceRows& rows) {
  std::vector<float> scales(rows.padded_rows(), 1.0F);
  std::vector<float> values(rows.cols());
  for (int64_t i = 0; i < rows.padded_rows(); ++i) {
    const PieceRows::Row row = rows.At(i);
    if (row.part == nullptr) continue;
    ReadRow(*row.part, row.index, absl::MakeSpan(values));
    float largest = 0.0F;
    for (const float value : values) largest = std::max(largest, std::abs(value));
    if (largest > 0.0F && std::isfinite(largest)) scales[i] = largest / kE4m3Max;
  }
  return scales;
}

// Writes rows as the device keeps them.
class RowEncoder {
 public:
  // Of a weight like `view`; where its elements are blocks, `kept` is their format.
  RowEncoder(const WeightView& view, DType kept)
      : element_(view.element), kept_(kept), row_bytes_(view.row_bytes), floats_(view.cols) {}

  // All of the row's bytes, padding included. kE4m3: divided by `scale`.
  void Encode(const PieceRows::Row& row, float scale, char* to) {
    int64_t written = 0;
    if (row.part != nullptr) {
      written = IsBlocks(element_) ? EncodeBlocks(row, to) : EncodeElements(row, scale, to);
    }
    std::memset(to + written, 0, row_bytes_ - written);
  }

 private:
  int64_t cols() const { return static_cast<int64_t>(floats_.size()); }
  const char* StoredAt(const PieceRows::Row& row) const {
    return static_cast<const char*>(row.part->data) +
           row.index * cinnabar::BytesOf(row.part->dtype, cols());
  }
  // Both return the bytes written.
  int64_t EncodeBlocks(const PieceRows::Row& row, char* to) {
    const char* stored = StoredAt(row);
    if (row.part->dtype != kept_) {
      blocks_.resize(cinnabar::BytesOf(kept_, cols()));
      ReadRow(*row.part, row.index, absl::MakeSpan(floats_));
      QuantizeRow(floats_, kept_, blocks_.data());
      stored = blocks_.data();
    }
    PackUnits(stored, kept_, cols(), to);
    return row_bytes_;
  }
  int64_t EncodeElements(const PieceRows::Row& row, float scale, char* to) {
    if (IsQuantized(row.part->dtype)) {
      ReadRow(*row.part, row.index, absl::MakeSpan(floats_));
      ConvertHost(floats_.data(), Element::kF32, cols(), element_, scale, to);
    } else {
      ConvertHost(StoredAt(row), ElementOf(row.part->dtype), cols(), element_, scale, to);
    }
    return cols() * BytesOf(element_);
  }

  const Element element_;
  const DType kept_;
  const int64_t row_bytes_;
  std::vector<float> floats_;
  std::vector<char> blocks_;
};

// Puts row `r` of a row of tiles into it.
void PutInTiles(absl::Span<const char> row, int64_t r, char* tiles) {
  for (int64_t p = 0; p < static_cast<int64_t>(row.size()) / 16; ++p) {
    std::memcpy(tiles + p / 8 * kWeightTileBytes + r * kWeightRowBytes + ((p ^ r) % 8) * 16,
                &row[16 * p], 16);
  }
}

}  // namespace

int64_t CudaWeight::memory_bytes() const {
  int64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.bytes;
  return bytes;
}

int64_t RowBytes(Element element, int64_t cols) {
  return IsBlocks(element) ? UnitRowBytes(element, cols)
                           : RoundUp(cols * BytesOf(element), kWeightRowBytes);
}

absl::StatusOr<std::unique_ptr<CudaWeight>> WeightLoader::Load(absl::Span<const HostMatrix> parts,
                                                               RowOrder row_order,
                                                               const WeightForm& form, void* stream,
                                                               FirstError& errors) {
  CINNABAR_CHECK(!parts.empty());
  const int64_t cols = parts[0].cols;
  int64_t rows = 0;
  for (const HostMatrix& part : parts) {
    const DType kept = KeptAs(part, form.dtype);
    CINNABAR_CHECK(part.cols == cols) << "parts of different width";
    CINNABAR_CHECK(cols % BlockOf(kept).elements == 0)
        << cols << " columns are not whole blocks of " << NameOf(kept);
    rows += part.rows;
  }
  std::vector<CudaWeight::Piece> pieces;
  const auto load_piece = [&](size_t begin, size_t end, DType kept) -> absl::Status {
    CINNABAR_ASSIGN_OR_RETURN(
        pieces.emplace_back(),
        LoadPiece(parts.subspan(begin, end - begin), row_order, kept, form, stream, errors));
    return absl::OkStatus();
  };
  if (row_order == RowOrder::kGatedPairs) {
    CINNABAR_CHECK(parts.size() == 2 && parts[0].rows == parts[1].rows)
        << "gate and up are of one shape";
    const DType kept = KeptAs(parts[0], form.dtype);
    const bool mixed = kept != KeptAs(parts[1], form.dtype);
    CINNABAR_RETURN_IF_ERROR(load_piece(0, 2, mixed ? form.mixed_gate_up : kept));
  } else {
    for (size_t begin = 0, end = 1; begin < parts.size(); begin = end++) {
      const DType kept = KeptAs(parts[begin], form.dtype);
      while (end < parts.size() && KeptAs(parts[end], form.dtype) == kept) ++end;
      CINNABAR_RETURN_IF_ERROR(load_piece(begin, end, kept));
    }
  }
  return std::make_unique<CudaWeight>(rows, cols, row_order, form.dtype, std::move(pieces));
}

absl::StatusOr<CudaWeight::Piece> WeightLoader::LoadPiece(absl::Span<const HostMatrix> parts,
                                                          RowOrder row_order, DType kept,
                                                          const WeightForm& form, void* stream,
                                                          FirstError& errors) {
  const PieceRows rows(parts, row_order);
  const Element element = form.fp8 ? Element::kE4m3 : ElementOf(kept);
  CudaWeight::Piece piece;
  WeightView& view = piece.view;
  view = ViewOfPiece(rows, element, form.tiled);
  piece.bytes = rows.padded_rows() * view.row_bytes;
  CINNABAR_ASSIGN_OR_RETURN(piece.memory, TakeDeviceMemory(piece.bytes));
  view.data = piece.memory.get();
  std::vector<float> scales;
  if (element == Element::kE4m3) {
    scales = OutputScales(rows);
    const auto scales_bytes = static_cast<int64_t>(scales.size()) * 4;
    CINNABAR_ASSIGN_OR_RETURN(piece.scales, TakeDeviceMemory(scales_bytes));
    piece.bytes += scales_bytes;
    view.scales = static_cast<const float*>(piece.scales.get());
    CINNABAR_RETURN_IF_ERROR(errors.Remember(loader_.Load(
        piece.scales.get(), rows.padded_rows(), 4,
        [&](int64_t begin, int64_t count, char* to) {
          std::memcpy(to, scales.data() + begin, count * 4);
        },
        stream)));
  }
  RowEncoder encoder(view, kept);
  const auto encode = [&](int64_t row, char* to) {
    encoder.Encode(rows.At(row), scales.empty() ? 1.0F : scales[row], to);
  };
  // A row at a time, or a row of tiles.
  const int64_t unit_rows = view.tiled ? kWeightRowUnit : 1;
  std::vector<char> untiled(view.tiled ? view.row_bytes : 0);
  CINNABAR_RETURN_IF_ERROR(errors.Remember(loader_.Load(
      piece.memory.get(), rows.padded_rows() / unit_rows, unit_rows * view.row_bytes,
      [&](int64_t begin, int64_t count, char* to) {
        for (int64_t unit = begin; unit < begin + count; ++unit, to += unit_rows * view.row_bytes) {
          if (!view.tiled) {
            encode(unit, to);
            continue;
          }
          for (int64_t r = 0; r < kWeightRowUnit; ++r) {
            encode(unit * kWeightRowUnit + r, untiled.data());
            PutInTiles(untiled, r, to);
          }
        }
      },
      stream)));
  return piece;
}

absl::Status WeightLoader::LoadVector(const HostMatrix& vector, void* device, void* stream,
                                      FirstError& errors) {
  const int64_t size = vector.rows * vector.cols;
  std::vector<float> values;  // of blocks
  const void* data = vector.data;
  Element element = ElementOf(vector.dtype);
  if (IsBlocks(element)) {
    values.resize(size);
    ReadRow({vector.data, vector.dtype, 1, size}, 0, absl::MakeSpan(values));
    data = values.data();
    element = Element::kF32;
  }
  return errors.Remember(loader_.Load(
      device, size, 4,
      [&](int64_t begin, int64_t count, char* to) {
        ConvertHost(static_cast<const char*>(data) + begin * BytesOf(element), element, count,
                    Element::kF32, 1.0F, to);
      },
      stream));
}

}  // namespace cinnabar::cuda
