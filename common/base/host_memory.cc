#include "common/base/host_memory.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace cinnabar {
namespace {

// The number behind `name` in lines of names and numbers; -1: there is none.
int64_t Field(absl::string_view text, absl::string_view name) {
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
    int64_t value = 0;
    if (words.size() >= 2 && words[0] == name && absl::SimpleAtoi(words[1], &value)) return value;
  }
  return -1;
}

int64_t SmallerKnown(int64_t a, int64_t b) {
  if (a < 0 || b < 0) return std::max(a, b);
  return std::min(a, b);
}

// Files of /proc and /sys tell no size, so they are read to the end.
std::string ReadText(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace

HostMemory ParseHostMemory(const HostMemoryTexts& texts) {
  HostMemory memory;
  const int64_t total_kib = Field(texts.meminfo, "MemTotal:");
  const int64_t available_kib = Field(texts.meminfo, "MemAvailable:");
  if (total_kib >= 0) memory.total_bytes = total_kib << 10;
  if (available_kib >= 0) memory.free_bytes = available_kib << 10;
  int64_t limit = -1;
  if (!absl::SimpleAtoi(absl::StripAsciiWhitespace(texts.cgroup_max), &limit)) return memory;
  memory.total_bytes = SmallerKnown(memory.total_bytes, limit);
  int64_t current = 0;
  if (absl::SimpleAtoi(absl::StripAsciiWhitespace(texts.cgroup_current), &current)) {
    const int64_t file_pages = std::max<int64_t>(Field(texts.cgroup_stat, "file"), 0);
    const int64_t left = limit - std::max<int64_t>(current - file_pages, 0);
    memory.free_bytes = SmallerKnown(memory.free_bytes, std::max<int64_t>(left, 0));
  }
  return memory;
}

HostMemory ReadHostMemory() {
  std::string folder = "/sys/fs/cgroup";
  for (const absl::string_view line : absl::StrSplit(ReadText("/proc/self/cgroup"), '\n')) {
    // Version 2 has the one line "0::/path".
    if (line.size() > 4 && line.substr(0, 3) == "0::") folder += std::string(line.substr(3));
  }
  const std::string meminfo = ReadText("/proc/meminfo");
  const std::string max = ReadText(folder + "/memory.max");
  const std::string current = ReadText(folder + "/memory.current");
  const std::string stat = ReadText(folder + "/memory.stat");
  return ParseHostMemory(
      {.meminfo = meminfo, .cgroup_max = max, .cgroup_current = current, .cgroup_stat = stat});
}

}  // namespace cinnabar
