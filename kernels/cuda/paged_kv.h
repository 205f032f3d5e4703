// Keys and values of sequences, in pages of equal size (page_pool.h).
#ifndef CINNABAR_KERNELS_CUDA_PAGED_KV_H_
#define CINNABAR_KERNELS_CUDA_PAGED_KV_H_

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/page_pool.h"
#include "kernels/cuda/plan.h"

namespace cinnabar::cuda {

// Pools of device memory by the size of their pages; shared with the sequences, which may go last.
class Pools {
 public:
  PagePool& Of(int64_t page_bytes, int64_t slab_bytes);

 private:
  std::map<int64_t, std::unique_ptr<PagePool>> pools_;
};

// The pages of one sequence, of all layers, and memory for the table of pointers to them that the
// kernels read. Neither is cleared. One thread at a time, as for the pools.
class PagedKv : public KvMemory {
 public:
  // `dtype` is that of keys and values. ResourceExhausted when there is not so much memory. The
  // caller fills the table.
  static absl::StatusOr<std::unique_ptr<PagedKv>> Take(const KvShape& shape, DType dtype,
                                                       std::shared_ptr<Pools> pools);
  // What is enqueued may still read the pages: whoever gets them next writes later on the same
  // stream.
  ~PagedKv() override;

  int64_t memory_bytes() const override { return layout_.total_bytes; }
  const KvShape& shape() const { return shape_; }
  const KvLayout& layout() const { return layout_; }
  bool one_layer() const { return shape_.num_layers == 1 && shape_.num_other_layers == 0; }
  // By layer; what the table must hold.
  absl::Span<void* const> pages() const { return pages_; }
  void* page(int32_t layer, int32_t index) const {
    return pages_[layer * layout_.pages_per_layer + index];
  }
  void** device_table() const { return static_cast<void**>(table_[0]); }

 private:
  PagedKv(const KvShape& shape, const KvLayout& layout, std::shared_ptr<Pools> pools,
          std::vector<void*> pages, std::vector<void*> table);

  KvShape shape_;
  KvLayout layout_;
  std::shared_ptr<Pools> pools_;
  std::vector<void*> pages_;
  std::vector<void*> table_;  // one page
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_PAGED_KV_H_
