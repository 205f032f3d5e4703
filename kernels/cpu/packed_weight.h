// A weight as the CPU backend keeps it: panels of 32 outputs, inputs in order inside a panel, so
// that a tile reads memory front to back. Or left where it lies, row after row, and brought into
// panels block by block as it is read.
#ifndef CINNABAR_KERNELS_CPU_PACKED_WEIGHT_H_
#define CINNABAR_KERNELS_CPU_PACKED_WEIGHT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace cinnabar::cpu {

// Zeroed memory aligned to 64 bytes; null when it cannot be had.
struct FreeAligned {
  void operator()(std::byte* memory) const;
};
using AlignedMemory = std::unique_ptr<std::byte, FreeAligned>;
AlignedMemory AllocateAligned(int64_t size_bytes);

// One element of a host matrix, widened.
float ReadElement(const void* data, DType dtype, int64_t index);

class PackedWeight : public Weight {
 public:
  // Panel p, element (k, j): output 32 p + j, input k. kStacked: outputs in order. kGatedPairs:
  // panel p holds gate outputs 16 p .. 16 p + 15 and then the up outputs of the same numbers. What
  // lies beyond the last output is 0.
  static absl::StatusOr<std::unique_ptr<PackedWeight>> Pack(absl::Span<const HostMatrix> parts,
                                                            RowOrder row_order, DType dtype,
                                                            ThreadPool& pool);

  // The same outputs of `parts`, of one dtype, that stay where they are and outlive this.
  static std::unique_ptr<PackedWeight> Map(absl::Span<const HostMatrix> parts, RowOrder row_order);

  int64_t memory_bytes() const override {
    return mapped() ? 0 : num_panels_ * cols() * kPanelWidth * BytesOf(dtype());
  }
  bool mapped() const { return !parts_.empty(); }
  int64_t num_panels() const { return num_panels_; }
  // Inputs [k, k + count) of a panel in float32: the kept values themselves, or widened into
  // `scratch` (count * 32 floats, aligned).
  const float* PanelBlock(int64_t panel, int64_t k, int64_t count, const IsaKernels& isa,
                          float* scratch) const;

 private:
  PackedWeight(int64_t rows, int64_t cols, RowOrder row_order, DType dtype, int64_t num_panels,
               AlignedMemory memory, std::vector<HostMatrix> parts);
  void WidenMapped(int64_t panel, int64_t k, int64_t count, float* out) const;

  int64_t num_panels_;
  AlignedMemory memory_;
  std::vector<HostMatrix> parts_;  // mapped only
};

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_PACKED_WEIGHT_H_
