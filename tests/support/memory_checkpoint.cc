#include "tests/support/memory_checkpoint.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/family.h"

namespace cinnabar {
namespace {

using nlohmann::json;

json Decoder(const char* architecture, int32_t layers, int32_t dim, int32_t mlp_dim, int32_t heads,
             int32_t kv_heads, int32_t vocabulary, double rope_theta) {
  return {{"architectures", {architecture}},
          {"hidden_size", dim},
          {"intermediate_size", mlp_dim},
          {"num_hidden_layers", layers},
          {"num_attention_heads", heads},
          {"num_key_value_heads", kv_heads},
          {"hidden_act", "silu"},
          {"rms_norm_eps", 1e-6},
          {"rope_theta", rope_theta},
          {"vocab_size", vocabulary},
          {"max_position_embeddings", 32768},
          {"tie_word_embeddings", false},
          {"mask_token_id", vocabulary - 1},
          {"eos_token_id", vocabulary - 2}};
}

json Experts(json config, int32_t head_dim, int32_t experts, int32_t per_token, int32_t mlp_dim,
             int32_t groups, int32_t groups_kept) {
  config.update({{"head_dim", head_dim},
                 {"num_experts", experts},
                 {"num_experts_per_tok", per_token},
                 {"moe_intermediate_size", mlp_dim},
                 {"num_shared_experts", 1},
                 {"first_k_dense_replace", 1},
                 {"n_group", groups},
                 {"topk_group", groups_kept},
                 {"routed_scaling_factor", 2.5},
                 {"partial_rotary_factor", 0.5}});
  return config;
}

// LLaDA and Dream as A2D bodies of the same shapes: their own architectures are full attention
// only.
const std::map<std::string, json, std::less<>>& Shapes() {
  static const auto* const shapes = new std::map<std::string, json, std::less<>>{
      {"llada-8b", Decoder("A2DLlamaLMHeadModel", 32, 4096, 12288, 32, 32, 126464, 5e5)},
      {"dream-7b", Decoder("A2DQwen2LMHeadModel", 28, 3584, 18944, 28, 4, 152064, 1e6)},
      {"llada2-mini", Experts(Decoder("LLaDA2MoeModelLM", 20, 2048, 5120, 16, 4, 157184, 6e5), 128,
                              256, 8, 512, 8, 4)},
      {"small", Decoder("A2DLlamaLMHeadModel", 12, 768, 2048, 12, 12, 32000, 1e6)},
      {"tiny", Decoder("A2DLlamaLMHeadModel", 3, 96, 160, 4, 2, 1000, 1e4)},
      {"tiny-moe",
       Experts(Decoder("LLaDA2MoeModelLM", 3, 64, 96, 4, 2, 500, 1e4), 16, 16, 4, 32, 4, 2)}};
  return *shapes;
}

uint64_t Next(uint64_t& state) {  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

uint64_t Mixed(uint64_t value) {  // SplitMix64's finaliser
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
  return value ^ (value >> 31);
}

uint16_t ToBf16(float value) {  // to nearest even; finite values
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// 256 levels: eight weights a random word, so that memory is what filling takes.
template <typename T>
void Fill(T* out, int64_t count, const std::array<T, 256>& levels, uint64_t state) {
  int64_t i = 0;
  while (i < count) {
    uint64_t word = Next(state);
    for (const int64_t end = std::min<int64_t>(i + 8, count); i < end; ++i, word >>= 8) {
      out[i] = levels[word & 0xFF];
    }
  }
}

template <typename T, typename Convert>
void FillUniform(void* out, int64_t count, float scale, uint64_t seed, const Convert& convert) {
  std::array<T, 256> levels;
  for (int i = 0; i < 256; ++i) {
    levels[i] = convert(scale * (static_cast<float>(i) - 127.5F) / 127.5F);
  }
  Fill(static_cast<T*>(out), count, levels, Mixed(seed) | 1);
}

struct Piece {  // of one tensor
  char* data = nullptr;
  int64_t count = 0;
  float scale = 0;  // uniform in -scale .. scale; 0: ones
  uint64_t seed = 0;
};

void FillPiece(const Piece& piece, DType dtype) {
  const auto same = [](float value) { return value; };
  if (piece.scale == 0 && dtype == DType::kF32) {
    std::fill_n(reinterpret_cast<float*>(piece.data), piece.count, 1.0F);
  } else if (piece.scale == 0) {
    std::fill_n(reinterpret_cast<uint16_t*>(piece.data), piece.count, ToBf16(1.0F));
  } else if (dtype == DType::kF32) {
    FillUniform<float>(piece.data, piece.count, piece.scale, piece.seed, same);
  } else {
    FillUniform<uint16_t>(piece.data, piece.count, piece.scale, piece.seed, ToBf16);
  }
}

absl::StatusOr<ModelSpec> SpecOf(const json& config) {
  CINNABAR_ASSIGN_OR_RETURN(
      const CheckpointFacts facts,
      ReadCheckpointFacts(CheckpointTexts{.config = config.dump()}, "made-up checkpoint"));
  return ReadModelSpec(facts);
}

}  // namespace

absl::StatusOr<json> ShapeConfig(absl::string_view name, int32_t block_length) {
  const auto found = Shapes().find(name);
  if (found == Shapes().end()) {
    return absl::NotFoundError(
        absl::StrCat("no shape \"", name, "\"; there are ", absl::StrJoin(ShapeNames(), ", ")));
  }
  json config = found->second;
  if (block_length > 0) config["block_size"] = block_length;
  return config;
}

std::vector<std::string> ShapeNames() {
  std::vector<std::string> names;
  for (const auto& [name, config] : Shapes()) names.push_back(name);
  return names;
}

absl::StatusOr<std::unique_ptr<MemoryCheckpoint>> MemoryCheckpoint::Make(const json& config,
                                                                         DType dtype, uint64_t seed,
                                                                         int32_t num_threads) {
  CINNABAR_CHECK(dtype == DType::kF32 || dtype == DType::kBf16) << NameOf(dtype);
  auto checkpoint = std::unique_ptr<MemoryCheckpoint>(new MemoryCheckpoint());
  CINNABAR_ASSIGN_OR_RETURN(checkpoint->spec_, SpecOf(config));
  const std::vector<ExpectedTensor> tensors = ExpectedTensors(checkpoint->spec_);
  nlohmann::ordered_json header;
  std::vector<int64_t> counts;
  int64_t data_bytes = 0;
  for (const ExpectedTensor& tensor : tensors) {
    int64_t count = 1;
    for (const int64_t size : tensor.shape) count *= size;
    counts.push_back(count);
    const int64_t end = data_bytes + count * BytesOf(dtype);
    header[tensor.name] = {
        {"dtype", NameOf(dtype)}, {"shape", tensor.shape}, {"data_offsets", {data_bytes, end}}};
    data_bytes = end;
  }
  std::string text = header.dump();
  text.append(64 - (text.size() + 8) % 64, ' ');
  const uint64_t header_bytes = text.size();
  checkpoint->bytes_ = static_cast<int64_t>(sizeof(header_bytes) + header_bytes) + data_bytes;

  checkpoint->fd_ = memfd_create("cinnabar_checkpoint", MFD_CLOEXEC);
  if (checkpoint->fd_ < 0 || ftruncate(checkpoint->fd_, checkpoint->bytes_) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat(checkpoint->bytes_, " bytes of memory: ", std::strerror(errno)));
  }
  void* mapping =
      mmap(nullptr, checkpoint->bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, checkpoint->fd_, 0);
  if (mapping == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat(checkpoint->bytes_, " bytes of memory: ", std::strerror(errno)));
  }
  char* const begin = static_cast<char*>(mapping);
  std::memcpy(begin, &header_bytes, sizeof(header_bytes));
  std::memcpy(begin + sizeof(header_bytes), text.data(), text.size());

  constexpr int64_t kPiece = int64_t{1} << 20;
  std::vector<Piece> pieces;
  char* data = begin + sizeof(header_bytes) + header_bytes;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ExpectedTensor& tensor = tensors[i];
    float scale = 0;
    if (tensor.shape.size() == 2) {
      scale = std::sqrt(3.0F / static_cast<float>(tensor.shape[1]));
    } else if (absl::EndsWith(tensor.name, "bias")) {
      scale = 0.02F;
    }
    for (int64_t done = 0; done < counts[i]; done += kPiece) {
      pieces.push_back({.data = data + done * BytesOf(dtype),
                        .count = std::min(kPiece, counts[i] - done),
                        .scale = scale,
                        .seed = seed * 0x9E3779B97F4A7C15ULL + pieces.size()});
    }
    data += counts[i] * BytesOf(dtype);
  }
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t i = next++; i < pieces.size(); i = next++) FillPiece(pieces[i], dtype);
  };
  std::vector<std::thread> threads;
  for (int32_t i = 1; i < num_threads; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  munmap(mapping, checkpoint->bytes_);
  return checkpoint;
}

absl::StatusOr<std::string> MemoryCheckpoint::AddConfig(const json& config) {
  std::string folder = (std::filesystem::temp_directory_path() / "cinnabar_memory_XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) {
    return absl::InternalError(absl::StrCat(folder, ": ", std::strerror(errno)));
  }
  folders_.push_back(folder);
  std::ofstream out(folder + "/config.json");
  out << config;
  out.close();
  std::error_code error;
  std::filesystem::create_symlink(absl::StrCat("/proc/self/fd/", fd_),
                                  folder + "/model.safetensors", error);
  if (!out || error) return absl::InternalError(absl::StrCat("cannot write ", folder));
  return folder;
}

MemoryCheckpoint::~MemoryCheckpoint() {
  std::error_code error;
  for (const std::string& folder : folders_) std::filesystem::remove_all(folder, error);
  if (fd_ >= 0) close(fd_);
}

}  // namespace cinnabar
