// Weights on the device, and how they get there: rows in the order that products want, as one kind
// of elements, padded, tiled for wgmma (launch.h, blocks.h).
#ifndef CINNABAR_KERNELS_CUDA_WEIGHTS_H_
#define CINNABAR_KERNELS_CUDA_WEIGHTS_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/check.h"
#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {

class CudaWeight : public Weight {
 public:
  // Consecutive rows of one kind.
  struct Piece {
    WeightView view;
    DeviceMemory memory;
    DeviceMemory scales;  // kE4m3 only
    int64_t bytes = 0;    // of both
  };
  CudaWeight(int64_t rows, int64_t cols, RowOrder row_order, DType dtype, std::vector<Piece> pieces)
      : Weight(rows, cols, row_order, dtype), pieces_(std::move(pieces)) {}
  int64_t memory_bytes() const override;
  // Several only where parts of different block formats are stacked.
  const std::vector<Piece>& pieces() const { return pieces_; }
  const WeightView& view() const {
    CINNABAR_CHECK(pieces_.size() == 1) << "a weight of several block formats";
    return pieces_[0].view;
  }

 private:
  std::vector<Piece> pieces_;
};

// Bytes of a row of a weight, its padding included.
int64_t RowBytes(Element element, int64_t cols);

// How a weight is to be kept.
struct WeightForm {
  // Where this is a block format, parts in another stay as they are.
  DType dtype = DType::kBf16;
  // Of gate and up that would be of two formats so.
  DType mixed_gate_up = DType::kBf16;
  // As e4m3 instead, with a scale an output.
  bool fp8 = false;
  // For wgmma: bf16 and FP8, if a row of tiles is no more than a Loader takes at a time.
  bool tiled = false;
};

// Parts are as Backend::LoadWeight() has them; those that do not fit each other are a caller's bug
// (CINNABAR_CHECK). Copies are enqueued on `stream`; the parts may go at once. ResourceExhausted
// when there is no such memory; an error of copying is Unavailable, and `errors` keeps it. One
// thread at a time.
class WeightLoader {
 public:
  absl::StatusOr<std::unique_ptr<CudaWeight>> Load(absl::Span<const HostMatrix> parts,
                                                   RowOrder row_order, const WeightForm& form,
                                                   void* stream, FirstError& errors);
  // All elements of `vector` as float32 to `device`.
  absl::Status LoadVector(const HostMatrix& vector, void* device, void* stream, FirstError& errors);

 private:
  // Parts that are kept as `kept`, or FP8.
  absl::StatusOr<CudaWeight::Piece> LoadPiece(absl::Span<const HostMatrix> parts,
                                              RowOrder row_order, DType kept,
                                              const WeightForm& form, void* stream,
                                              FirstError& errors);

  Loader loader_;
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_WEIGHTS_H_
