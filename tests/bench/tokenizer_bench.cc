// Speed of the tokenizer on source code, one thread, in bytes of text a second.
//
// Text: the .h and .cc files of this repository, repeated to 4 MB (CINNABAR_SOURCE_DIR or the
// current folder), or the file CINNABAR_BENCH_TEXT names. Tokenizer: the folder
// CINNABAR_BENCH_TOKENIZER names, else the small golden one, whose 900 entries make more tokens of
// the same text. No randomness.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "common/base/check.h"
#include "common/tokenizer/stream_decoder.h"
#include "common/tokenizer/tokenizer.h"

namespace cinnabar {
namespace {

constexpr size_t kTextBytes = 4 << 20;

std::string Variable(const char* name, const std::string& if_unset) {
  const char* value = std::getenv(name);
  return value == nullptr ? if_unset : value;
}

std::string SourceDir() { return Variable("CINNABAR_SOURCE_DIR", "."); }

std::string ReadAll(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  CINNABAR_CHECK(in.good()) << path.string();
  return std::string((std::istreambuf_iterator<char>(in)), {});
}

const std::string& Text() {
  static const std::string* const text = [] {
    auto* all = new std::string;
    const std::string file = Variable("CINNABAR_BENCH_TEXT", "");
    if (!file.empty()) {
      *all = ReadAll(file);
      return all;
    }
    std::vector<std::filesystem::path> paths;
    for (const char* folder : {"common", "kernels", "worker"}) {
      for (const auto& entry :
           std::filesystem::recursive_directory_iterator(SourceDir() + "/" + folder)) {
        const std::string extension = entry.path().extension().string();
        if (extension == ".h" || extension == ".cc") paths.push_back(entry.path());
      }
    }
    std::sort(paths.begin(), paths.end());
    std::string once;
    for (const auto& path : paths) once += ReadAll(path);
    CINNABAR_CHECK(!once.empty());
    while (all->size() < kTextBytes) *all += once;
    return all;
  }();
  return *text;
}

const Tokenizer& Bench() {
  static const Tokenizer* const tokenizer = [] {
    const std::string folder = Variable("CINNABAR_BENCH_TOKENIZER", "");
    absl::StatusOr<Tokenizer> loaded =
        folder.empty()
            ? Tokenizer::FromJson(ReadAll(SourceDir() + "/tests/golden/tokenizers/qwen2.json"))
            : Tokenizer::Load(folder);
    CINNABAR_CHECK(loaded.ok()) << loaded.status().ToString();
    return new Tokenizer(*std::move(loaded));
  }();
  return *tokenizer;
}

void SetRate(benchmark::State& state, size_t num_tokens) {
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) *
                          static_cast<int64_t>(Text().size()));
  state.counters["bytes_per_token"] =
      static_cast<double>(Text().size()) / static_cast<double>(num_tokens);
}

void BM_Encode(benchmark::State& state) {
  Bench();  // loaded and read before the clock starts
  Text();
  size_t num_tokens = 0;
  for (auto _ : state) {
    const std::vector<int32_t> ids = Bench().Encode(Text(), {.parse_special = state.range(0) != 0});
    num_tokens = ids.size();
    benchmark::DoNotOptimize(ids.data());
  }
  SetRate(state, num_tokens);
}
BENCHMARK(BM_Encode)->Arg(0)->Arg(1)->ArgName("parse_special")->Unit(benchmark::kMillisecond);

void BM_Decode(benchmark::State& state) {
  const std::vector<int32_t> ids = Bench().Encode(Text());
  for (auto _ : state) benchmark::DoNotOptimize(Bench().DecodeText(ids).data());
  SetRate(state, ids.size());
}
BENCHMARK(BM_Decode)->Unit(benchmark::kMillisecond);

void BM_StreamDecode(benchmark::State& state) {
  const std::vector<int32_t> ids = Bench().Encode(Text());
  for (auto _ : state) {
    StreamDecoder decoder(Bench());
    for (const int32_t id : ids) benchmark::DoNotOptimize(decoder.Push(id).data());
  }
  SetRate(state, ids.size());
}
BENCHMARK(BM_StreamDecode)->Unit(benchmark::kMillisecond);

void BM_EncodeOneCharacter(benchmark::State& state) {
  const std::string text(1 << 20, static_cast<char>(state.range(0)));
  for (auto _ : state) benchmark::DoNotOptimize(Bench().Encode(text).data());
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * (1 << 20));
}
BENCHMARK(BM_EncodeOneCharacter)->Arg('a')->Arg(' ')->Arg('=')->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace cinnabar

BENCHMARK_MAIN();
