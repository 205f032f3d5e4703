#include "kernels/cuda/paged_kv.h"

#include <algorithm>
#include <utility>

#include "common/base/status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/runtime.h"

namespace cinnabar::cuda {
namespace {

constexpr int64_t kSlabBytes = int64_t{32} << 20;
constexpr int64_t kTableSlabBytes = int64_t{256} << 10;

}  // namespace

PagePool& Pools::Of(int64_t page_bytes, int64_t slab_bytes) {
  std::unique_ptr<PagePool>& pool = pools_[page_bytes];
  if (pool == nullptr) {
    pool = std::make_unique<PagePool>(
        page_bytes, std::max<int64_t>(1, slab_bytes / page_bytes),
        PagePool::Memory{[](int64_t bytes) -> absl::StatusOr<void*> {
                           CINNABAR_ASSIGN_OR_RETURN(DeviceMemory memory, TakeDeviceMemory(bytes));
                           return memory.release();
                         },
                         [](void* memory) { FreeDevice(memory); }});
  }
  return *pool;
}

PagedKv::PagedKv(const KvShape& shape, const KvLayout& layout, std::shared_ptr<Pools> pools,
                 std::vector<void*> pages, std::vector<void*> table)
    : shape_(shape),
      layout_(layout),
      pools_(std::move(pools)),
      pages_(std::move(pages)),
      table_(std::move(table)) {}

PagedKv::~PagedKv() {
  const absl::Span<void* const> pages = pages_;
  pools_->Of(layout_.page_bytes, kSlabBytes).Give(pages.first(layout_.num_pages));
  if (layout_.num_other_pages > 0) {
    pools_->Of(layout_.other_page_bytes, kSlabBytes).Give(pages.subspan(layout_.num_pages));
  }
  pools_->Of(layout_.table_bytes, kTableSlabBytes).Give(table_);
}

absl::StatusOr<std::unique_ptr<PagedKv>> PagedKv::Take(const KvShape& shape, DType dtype,
                                                       std::shared_ptr<Pools> pools) {
  const KvLayout layout = LayOutKv(shape, dtype);
  PagePool& pages_pool = pools->Of(layout.page_bytes, kSlabBytes);
  CINNABAR_ASSIGN_OR_RETURN(std::vector<void*> pages, pages_pool.Take(layout.num_pages),
                            "take the pages of a sequence");
  absl::StatusOr<std::vector<void*>> others = std::vector<void*>();
  if (layout.num_other_pages > 0) {
    others = pools->Of(layout.other_page_bytes, kSlabBytes).Take(layout.num_other_pages);
  }
  if (!others.ok()) {
    pages_pool.Give(pages);
    return others.status();
  }
  absl::StatusOr<std::vector<void*>> table = pools->Of(layout.table_bytes, kTableSlabBytes).Take(1);
  if (!table.ok()) {
    pages_pool.Give(pages);
    if (!others->empty()) pools->Of(layout.other_page_bytes, kSlabBytes).Give(*others);
    return table.status();
  }
  pages.insert(pages.end(), others->begin(), others->end());
  return std::unique_ptr<PagedKv>(
      new PagedKv(shape, layout, std::move(pools), std::move(pages), *std::move(table)));
}

}  // namespace cinnabar::cuda
