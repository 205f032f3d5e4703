// The golden checkpoints (tests/golden).
#ifndef CINNABAR_TESTS_SUPPORT_GOLDEN_MODELS_H_
#define CINNABAR_TESTS_SUPPORT_GOLDEN_MODELS_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace cinnabar {

// Of a folder or a file in tests/golden/models. From CINNABAR_SOURCE_DIR on, or from here.
std::string GoldenModelPath(absl::string_view name);

// The folders there, sorted: one checkpoint or more of every family.
std::vector<std::string> GoldenModels();

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SUPPORT_GOLDEN_MODELS_H_
