// Runs a fuzz target without libFuzzer: every file of the corpus folder as it is, then seeded
// mutations of each (bytes flipped, cut, doubled, spliced). Deterministic; the same inputs on every
// run.
//   usage: TARGET CORPUS_DIR [mutations per file, default 300]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void Run(const std::vector<uint8_t>& input) { LLVMFuzzerTestOneInput(input.data(), input.size()); }

std::vector<uint8_t> Mutate(std::vector<uint8_t> input, std::mt19937& random) {
  const int edits = 1 + static_cast<int>(random() % 8);
  for (int edit = 0; edit < edits; ++edit) {
    if (input.empty()) input.push_back(static_cast<uint8_t>(random()));
    const size_t at = random() % input.size();
    const size_t length = std::min<size_t>(random() % 16, input.size() - at);
    switch (random() % 5) {
      case 0:
        input[at] = static_cast<uint8_t>(random());
        break;
      case 1:
        input[at] ^= static_cast<uint8_t>(1U << (random() % 8));
        break;
      case 2:
        input.erase(input.begin() + at, input.begin() + at + length);
        break;
      case 3: {
        const std::vector<uint8_t> piece(input.begin() + at, input.begin() + at + length);
        input.insert(input.begin() + at, piece.begin(), piece.end());
        break;
      }
      case 4:
        input.resize(at);
        break;
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CORPUS_DIR [mutations per file]\n", argv[0]);
    return 2;
  }
  const int mutations = argc > 2 ? std::atoi(argv[2]) : 300;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1]))
    files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::mt19937 random(1);
  int64_t runs = 0;
  Run({});
  for (const auto& path : files) {
    std::ifstream in(path, std::ios::binary);
    const std::vector<uint8_t> input((std::istreambuf_iterator<char>(in)), {});
    Run(input);
    for (int i = 0; i < mutations; ++i) Run(Mutate(input, random));
    runs += 1 + mutations;
  }
  std::printf("%zu files, %lld inputs\n", files.size(), static_cast<long long>(runs));
  return files.empty() ? 1 : 0;
}
