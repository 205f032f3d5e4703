// Checkpoints of any shape with made-up weights that lie in memory alone: what a model of 16 GB
// takes a benchmark is time to fill it, and no disk.
#ifndef CINNABAR_TESTS_SUPPORT_MEMORY_CHECKPOINT_H_
#define CINNABAR_TESTS_SUPPORT_MEMORY_CHECKPOINT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "nlohmann/json.hpp"
#include "worker/model/model_spec.h"

namespace cinnabar {

// config.json of a published model's shapes ("llada-8b", "dream-7b", "llada2-mini") or of small
// ones
// ("small", "tiny", "tiny-moe"). `block_length` > 0: block-causal, so that the shapes of a
// full-attention model can be run against a cache (llada2-mini and tiny-moe always are). NotFound
// lists the names. Source: config.json of GSAI-ML/LLaDA-8B-Base, Dream-org/Dream-v0-Base-7B,
// inclusionAI/LLaDA2.0-mini.
absl::StatusOr<nlohmann::json> ShapeConfig(absl::string_view name, int32_t block_length);
std::vector<std::string> ShapeNames();

class MemoryCheckpoint {
 public:
  // Fills the tensors that this config asks for, stored as `dtype` (kF32 or kBf16): matrices
  // uniform with the variance 1 / columns, norms 1, biases small; from `seed`, whatever
  // `num_threads`. ResourceExhausted without the memory. The tensors of a config that differs in
  // block_size alone are the same: AddConfig() makes another folder over them.
  static absl::StatusOr<std::unique_ptr<MemoryCheckpoint>> Make(const nlohmann::json& config,
                                                                DType dtype, uint64_t seed,
                                                                int32_t num_threads);
  // Removes the folders; the memory goes when nobody maps it any more.
  ~MemoryCheckpoint();
  MemoryCheckpoint(const MemoryCheckpoint&) = delete;

  // A folder for LoadDenoiser of this process: config.json, and a link to the memory. Internal:
  // there is no room for one.
  absl::StatusOr<std::string> AddConfig(const nlohmann::json& config);

  const ModelSpec& spec() const { return spec_; }  // of Make's config
  int64_t bytes() const { return bytes_; }

 private:
  MemoryCheckpoint() = default;

  ModelSpec spec_;
  int fd_ = -1;
  int64_t bytes_ = 0;
  std::vector<std::string> folders_;
};

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SUPPORT_MEMORY_CHECKPOINT_H_
