// How much memory this process may take: the machine's, or what its control group leaves it.
#ifndef CINNABAR_COMMON_BASE_HOST_MEMORY_H_
#define CINNABAR_COMMON_BASE_HOST_MEMORY_H_

#include <cstdint>

#include "absl/strings/string_view.h"

namespace cinnabar {

struct HostMemory {
  int64_t total_bytes = -1;  // -1: not known
  int64_t free_bytes = -1;   // without swapping; file pages that can be dropped count as free
};

// The files as text; an empty one is absent.
struct HostMemoryTexts {
  absl::string_view meminfo = {};         // /proc/meminfo
  absl::string_view cgroup_max = {};      // memory.max of control groups, version 2: "max" is none
  absl::string_view cgroup_current = {};  // memory.current
  absl::string_view cgroup_stat = {};     // memory.stat
};

// The smaller of both, field by field. Pure.
HostMemory ParseHostMemory(const HostMemoryTexts& texts);

// Of this process, now.
HostMemory ReadHostMemory();

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_BASE_HOST_MEMORY_H_
