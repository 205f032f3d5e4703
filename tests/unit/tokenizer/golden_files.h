// Reads the files under tests/golden for the tokenizer's tests.
#ifndef CINNABAR_TESTS_UNIT_TOKENIZER_GOLDEN_FILES_H_
#define CINNABAR_TESTS_UNIT_TOKENIZER_GOLDEN_FILES_H_

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "common/base/check.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

inline std::string ReadGolden(const std::string& name) {
  const char* source_dir = std::getenv("CINNABAR_SOURCE_DIR");
  const std::string path =
      std::string(source_dir == nullptr ? "." : source_dir) + "/tests/golden/" + name;
  std::ifstream in(path, std::ios::binary);
  CINNABAR_CHECK(in.good()) << path;
  return std::string((std::istreambuf_iterator<char>(in)), {});
}

inline nlohmann::ordered_json ReadGoldenJson(const std::string& name) {
  return nlohmann::ordered_json::parse(ReadGolden(name));
}

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_UNIT_TOKENIZER_GOLDEN_FILES_H_
