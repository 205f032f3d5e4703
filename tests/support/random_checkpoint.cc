#include "tests/support/random_checkpoint.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/model/safetensors.h"

namespace cinnabar {
namespace {

class ShardWriter {
 public:
  explicit ShardWriter(std::string directory) : directory_(std::move(directory)) {}

  absl::Status Add(const std::string& name, int64_t rows, int64_t cols) {
    std::vector<float> values(rows * cols, 1.0F);  // norms
    if (cols > 1) {
      // xorshift: gigabytes of numbers in seconds. Uniform with the variance 1 / cols.
      const float scale = std::sqrt(3.0F / static_cast<float>(cols));
      for (float& value : values) {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        value = scale * (static_cast<float>(state_ >> 40) * 0x1p-23F - 1.0F);
      }
    }
    const std::string file = absl::StrCat("shard-", map_.size(), ".safetensors");
    std::vector<int64_t> shape = {rows};
    if (cols > 1) shape.push_back(cols);
    map_[name] = file;
    return WriteSafetensors(absl::StrCat(directory_, "/", file), name, shape, values);
  }

  void WriteIndex() const {
    std::ofstream(directory_ + "/model.safetensors.index.json")
        << nlohmann::json{{"weight_map", map_}};
  }

 private:
  std::string directory_;
  nlohmann::json map_ = nlohmann::json::object();
  uint64_t state_ = 88172645463325252ULL;
};

}  // namespace

absl::Status WriteRandomCheckpoint(const RandomCheckpoint& shape, const std::string& directory) {
  const bool causal = shape.block_length > 0;
  nlohmann::json config = {{"architectures", {causal ? "SDARForCausalLM" : "A2DLlamaLMHeadModel"}},
                           {"model_type", causal ? "sdar" : "a2d-llama"},
                           {"hidden_size", shape.dim},
                           {"intermediate_size", shape.ffn},
                           {"num_hidden_layers", shape.num_layers},
                           {"num_attention_heads", shape.num_heads},
                           {"num_key_value_heads", shape.num_kv_heads},
                           {"head_dim", shape.head_dim()},
                           {"hidden_act", "silu"},
                           {"rms_norm_eps", 1e-6},
                           {"rope_theta", 1e6},
                           {"vocab_size", shape.vocabulary},
                           {"max_position_embeddings", shape.positions_max},
                           {"tie_word_embeddings", false},
                           {"attention_bias", false},
                           {"mask_token_id", shape.vocabulary - 1},
                           {"eos_token_id", shape.vocabulary - 2}};
  if (causal) config["block_size"] = shape.block_length;
  std::ofstream(directory + "/config.json") << config;

  ShardWriter writer(directory);
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t cols) {
    return writer.Add(name + ".weight", rows, cols);
  };
  CINNABAR_RETURN_IF_ERROR(matrix("model.embed_tokens", shape.vocabulary, shape.dim));
  CINNABAR_RETURN_IF_ERROR(matrix("model.norm", shape.dim, 1));
  CINNABAR_RETURN_IF_ERROR(matrix("lm_head", shape.vocabulary, shape.dim));
  for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const int64_t q = int64_t{shape.num_heads} * shape.head_dim();
    const int64_t kv = int64_t{shape.num_kv_heads} * shape.head_dim();
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "input_layernorm", shape.dim, 1));
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "post_attention_layernorm", shape.dim, 1));
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "self_attn.q_proj", q, shape.dim));
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "self_attn.k_proj", kv, shape.dim));
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "self_attn.v_proj", kv, shape.dim));
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "self_attn.o_proj", shape.dim, q));
    if (causal) {
      CINNABAR_RETURN_IF_ERROR(matrix(prefix + "self_attn.q_norm", shape.head_dim(), 1));
      CINNABAR_RETURN_IF_ERROR(matrix(prefix + "self_attn.k_norm", shape.head_dim(), 1));
    }
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "mlp.gate_proj", shape.ffn, shape.dim));
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "mlp.up_proj", shape.ffn, shape.dim));
    CINNABAR_RETURN_IF_ERROR(matrix(prefix + "mlp.down_proj", shape.dim, shape.ffn));
  }
  writer.WriteIndex();
  return absl::OkStatus();
}

}  // namespace cinnabar
