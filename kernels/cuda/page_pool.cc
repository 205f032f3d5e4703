#include "kernels/cuda/page_pool.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar::cuda {

PagePool::PagePool(int64_t page_bytes, int64_t slab_pages, Memory memory)
    : page_bytes_(page_bytes), slab_pages_(slab_pages), memory_(std::move(memory)) {
  CINNABAR_CHECK(page_bytes > 0 && slab_pages > 0);
}

PagePool::~PagePool() {
  for (const auto& [base, slab] : slabs_) memory_.free(base);
}

absl::StatusOr<std::vector<void*>> PagePool::Take(int64_t count) {
  CINNABAR_CHECK(count >= 0);
  const int64_t missing = count - (pages_held_ - pages_used_);
  if (missing > 0) {
    const int64_t num_pages = std::max(missing, slab_pages_);
    absl::StatusOr<void*> memory = memory_.allocate(num_pages * page_bytes_);
    if (!memory.ok() && num_pages > missing) {
      // Near the end: no more than is needed.
      memory = memory_.allocate(missing * page_bytes_);
      if (!memory.ok()) return memory.status();
      AddSlab(static_cast<char*>(*memory), missing);
    } else if (!memory.ok()) {
      return memory.status();
    } else {
      AddSlab(static_cast<char*>(*memory), num_pages);
    }
  }
  std::vector<void*> pages;
  pages.reserve(count);
  // From the fullest slabs first would need an order; the lowest addresses do as well to leave the
  // last slabs empty.
  for (auto& [base, slab] : slabs_) {
    while (static_cast<int64_t>(pages.size()) < count && !slab.free.empty()) {
      pages.push_back(slab.free.back());
      slab.free.pop_back();
    }
  }
  pages_used_ += count;
  return pages;
}

void PagePool::AddSlab(char* base, int64_t num_pages) {
  Slab slab;
  slab.num_pages = num_pages;
  for (int64_t page = num_pages; page-- > 0;) slab.free.push_back(base + page * page_bytes_);
  slabs_.emplace(base, std::move(slab));
  pages_held_ += num_pages;
}

std::map<char*, PagePool::Slab>::iterator PagePool::SlabOf(void* page) {
  auto after = slabs_.upper_bound(static_cast<char*>(page));
  CINNABAR_CHECK(after != slabs_.begin());
  --after;
  const int64_t offset = static_cast<char*>(page) - after->first;
  CINNABAR_CHECK(offset % page_bytes_ == 0 && offset < after->second.num_pages * page_bytes_)
      << "a page of another pool";
  return after;
}

void PagePool::Give(absl::Span<void* const> pages) {
  for (void* page : pages) {
    const auto slab = SlabOf(page);
    CINNABAR_CHECK(static_cast<int64_t>(slab->second.free.size()) < slab->second.num_pages)
        << "a page came back twice";
    slab->second.free.push_back(page);
    --pages_used_;
    const bool empty = static_cast<int64_t>(slab->second.free.size()) == slab->second.num_pages;
    const int64_t free_elsewhere = pages_held_ - pages_used_ - slab->second.num_pages;
    if (!empty || free_elsewhere < slab->second.num_pages) continue;
    memory_.free(slab->first);
    pages_held_ -= slab->second.num_pages;
    slabs_.erase(slab);
  }
}

}  // namespace cinnabar::cuda
