// Checkpoints with random weights of a given shape, in the layout of their authors: for benchmarks
// and load tests.
#ifndef CINNABAR_TESTS_SUPPORT_RANDOM_CHECKPOINT_H_
#define CINNABAR_TESTS_SUPPORT_RANDOM_CHECKPOINT_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace cinnabar {

struct RandomCheckpoint {
  int32_t num_layers = 2;
  int32_t dim = 64;
  int32_t ffn = 128;
  int32_t num_heads = 4;
  int32_t num_kv_heads = 4;
  int32_t vocabulary = 256;
  int32_t block_length = 0;  // 0: full attention (A2D on a Llama body); else SDAR
  int32_t positions_max = 2048;

  int32_t head_dim() const { return dim / num_heads; }
  // Weights of one layer's products, and of the head.
  int64_t LayerProducts() const {
    return int64_t{2} * dim * (num_heads + num_kv_heads) * head_dim() + int64_t{3} * dim * ffn;
  }
  int64_t HeadProducts() const { return int64_t{dim} * vocabulary; }
};

// Writes config.json and float32 safetensors (one shard a tensor, with their index) into
// `directory`, which exists.
absl::Status WriteRandomCheckpoint(const RandomCheckpoint& shape, const std::string& directory);

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SUPPORT_RANDOM_CHECKPOINT_H_
