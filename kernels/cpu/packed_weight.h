// A weight as the CPU backend keeps it: panels of 32 outputs, inputs in order inside a panel, so
// that a tile reads memory front to back. Or left where it lies, row after row, and brought into
// panels block by block as it is read.
#ifndef CINNABAR_KERNELS_CPU_PACKED_WEIGHT_H_
#define CINNABAR_KERNELS_CPU_PACKED_WEIGHT_H_

#include <algorithm>
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

// Inputs of a panel that are multiplied at once: 512 x 32 floats, 64 KiB, stay in the second-level
// cache (and half of them in the first) while every strip of rows passes.
inline constexpr int64_t kInputBlock = 512;

class PackedWeight : public Weight {
 public:
  // Panel p, element (k, j): output 32 p + j, input k. kStacked: outputs in order. kGatedPairs:
  // panel p holds gate outputs 16 p .. 16 p + 15 and then the up outputs of the same numbers. What
  // lies beyond the last output is 0. Where dtype is a block format, a panel whose outputs are of
  // one block format is kept in it, bit for bit, each input block in one piece; one in which two
  // meet is kept in float32.
  static absl::StatusOr<std::unique_ptr<PackedWeight>> Pack(absl::Span<const HostMatrix> parts,
                                                            RowOrder row_order, DType dtype,
                                                            ThreadPool& pool);

  // The same outputs of `parts`, of one dtype, that stay where they are and outlive this.
  static std::unique_ptr<PackedWeight> Map(absl::Span<const HostMatrix> parts, RowOrder row_order);

  // Of `rows` rows in whole panels of one dtype.
  static int64_t BytesOfRows(DType dtype, int64_t rows, int64_t cols);

  int64_t memory_bytes() const override { return memory_bytes_; }
  bool mapped() const { return !parts_.empty(); }
  int64_t num_panels() const { return static_cast<int64_t>(panels_.size()); }
  // Whether a panel is in a block format, and whether any is or is not.
  bool quantized(int64_t panel) const { return IsQuantized(panels_[panel].dtype); }
  bool any_quantized() const { return any_quantized_; }
  bool any_float() const { return any_float_; }

  // The block of a panel that begins at input k, a multiple of kInputBlock, has block_inputs(k)
  // inputs. Of a panel that is not quantised it comes in float32: the kept values themselves, or
  // widened into `scratch` (32 floats an input, aligned).
  int64_t block_inputs(int64_t k) const { return std::min(kInputBlock, cols() - k); }
  const float* PanelBlock(int64_t panel, int64_t k, const IsaKernels& isa, float* scratch) const;
  // The same of a quantised one, as it is kept if its tiles can be had of that, or multiplied out
  // into `scratch`.
  RunPanel PanelRuns(int64_t panel, int64_t k, const IsaKernels& isa, float* scratch) const;
  // What either of them reads, where it is kept here; nothing of a mapped weight.
  Ahead Kept(int64_t panel, int64_t k) const;

 private:
  struct Panel {
    DType dtype = DType::kF32;
    int64_t begin_byte = 0;   // in memory_
    int64_t block_bytes = 0;  // of kInputBlock inputs
  };

  PackedWeight(int64_t rows, int64_t cols, RowOrder row_order, DType dtype,
               std::vector<Panel> panels, AlignedMemory memory, int64_t memory_bytes,
               std::vector<HostMatrix> parts);
  void WidenMapped(int64_t panel, int64_t k, int64_t count, float* out) const;
  void ExpandMapped(int64_t panel, int64_t k, int64_t count, const RunScratch& out) const;

  std::vector<Panel> panels_;
  bool any_quantized_ = false;
  bool any_float_ = false;
  AlignedMemory memory_;
  int64_t memory_bytes_;
  std::vector<HostMatrix> parts_;  // mapped only
};

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_PACKED_WEIGHT_H_
