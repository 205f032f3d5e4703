// Pages of equal size out of device memory that is taken in slabs: a sequence that comes or goes
// moves pointers, and waits for no allocation of the driver. Pages have no owner here and are not
// cleared. Not thread-safe, like the backend it belongs to.
#ifndef CINNABAR_KERNELS_CUDA_PAGE_POOL_H_
#define CINNABAR_KERNELS_CUDA_PAGE_POOL_H_

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace cinnabar::cuda {

class PagePool {
 public:
  struct Memory {
    std::function<absl::StatusOr<void*>(int64_t bytes)> allocate;
    std::function<void(void*)> free;
  };

  // Slabs hold `slab_pages` pages, or more where one call wants more.
  PagePool(int64_t page_bytes, int64_t slab_pages, Memory memory);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // `count` pages, or none and the error of the allocation.
  absl::StatusOr<std::vector<void*>> Take(int64_t count);
  // Takes pages back. A slab of which nothing is used any more is freed when as many free pages
  // remain elsewhere, so that what is held stays within twice what is used and one slab.
  void Give(absl::Span<void* const> pages);

  int64_t page_bytes() const { return page_bytes_; }
  int64_t pages_used() const { return pages_used_; }
  int64_t pages_held() const { return pages_held_; }

 private:
  struct Slab {
    int64_t num_pages = 0;
    std::vector<void*> free;  // its own pages that nobody has
  };
  void AddSlab(char* base, int64_t num_pages);
  std::map<char*, Slab>::iterator SlabOf(void* page);

  int64_t page_bytes_;
  int64_t slab_pages_;
  Memory memory_;
  std::map<char*, Slab> slabs_;  // by first byte
  int64_t pages_used_ = 0;
  int64_t pages_held_ = 0;
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_PAGE_POOL_H_
