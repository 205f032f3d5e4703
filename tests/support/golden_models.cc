#include "tests/support/golden_models.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {

std::string GoldenModelPath(absl::string_view name) {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  return absl::StrCat(source == nullptr ? "." : source, "/tests/golden/models/", name);
}

std::vector<std::string> GoldenModels() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(GoldenModelPath(""))) {
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  }
  CINNABAR_CHECK(!names.empty()) << "nothing in " << GoldenModelPath("");
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace cinnabar
