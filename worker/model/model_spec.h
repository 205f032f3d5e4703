// A model as plain data: what the forward pass and the checks need to know, with nothing left of
// the family it came from but names. Families (family_*.cc) write it, the bodies (body_*.cc) read
// it.
#ifndef CINNABAR_WORKER_MODEL_MODEL_SPEC_H_
#define CINNABAR_WORKER_MODEL_MODEL_SPEC_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/request/sampler_catalog.h"
#include "kernels/backend.h"
#include "worker/model/checkpoint.h"

namespace cinnabar {

enum class BodyKind : uint8_t {
  kDecoder,  // pre-norm RMSNorm, rotary attention with grouped heads, SwiGLU (Llama, Qwen, LLaDA)
  kDiT,      // layer norms modulated by the noise level, GELU (SEDD, MDLM)
  kGemma,    // norms around each part, windows, an MLP beside experts, encoder and decoder (Gemma)
};

// Where a decoder keeps its tensors, without ".weight" and ".bias". Those of a layer follow
// layer_prefix, the layer's index and a dot.
struct DecoderNames {
  std::string embedding = "model.embed_tokens";
  std::string final_norm = "model.norm";
  std::string head = "lm_head";
  std::string layer_prefix = "model.layers.";
  std::string attention_norm = "input_layernorm";
  std::string qkv;  // one tensor of the rows q | k | v; empty: three
  std::string q = "self_attn.q_proj";
  std::string k = "self_attn.k_proj";
  std::string v = "self_attn.v_proj";
  std::string o = "self_attn.o_proj";
  std::string q_norm = "self_attn.q_norm";
  std::string k_norm = "self_attn.k_norm";
  std::string mlp_norm = "post_attention_layernorm";
  std::string gate = "mlp.gate_proj";
  std::string up = "mlp.up_proj";
  std::string down = "mlp.down_proj";
  std::string router = "mlp.gate";
  std::string router_bias = "mlp.gate.expert_bias";  // the whole name
  std::string experts = "mlp.experts.";              // then the expert's index, a dot and a leaf
  std::string shared_expert = "mlp.shared_experts.";
  std::string expert_gate = "gate_proj";
  std::string expert_up = "up_proj";
  std::string expert_down = "down_proj";
};

// Experts in place of the MLP; see RouteArgs of kernels/backend.h for the rules of the router.
struct ExpertSpec {
  int32_t num_experts = 0;  // 0: every layer has one MLP
  int32_t experts_per_token = 0;
  int32_t mlp_dim = 0;             // of one expert
  int32_t shared_mlp_dim = 0;      // of the one that every token goes to; 0: there is none
  std::vector<bool> dense_layers;  // [num_layers]: those that have one MLP all the same
  RouterScore score = RouterScore::kSoftmax;
  bool bias = false;
  bool bias_counts = false;
  int32_t num_groups = 1;
  int32_t groups_per_token = 1;
  bool renormalize = false;
  float scale = 1.0F;
};

// Layers that see everything among those that see a window; num_kv_heads, head_dim and rope_theta
// of ModelSpec are the latter's.
struct WindowSpec {
  int32_t window = 0;             // positions that a row sees, its own included
  std::vector<bool> full_layers;  // [num_layers]
  int32_t full_kv_heads = 0;
  int32_t full_head_dim = 0;  // even
  double full_rope_theta = 1e6;
  int32_t full_rotary_angles = 0;  // of full_head_dim / 2; the rest of a head is not rotated
};

struct ModelSpec {
  ModelTraits traits;
  std::string architecture;  // as config.json names it
  BodyKind body = BodyKind::kDecoder;

  int32_t dim = 0;  // width of the residual stream
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;  // divides num_heads
  int32_t head_dim = 0;      // even
  int32_t mlp_dim = 0;
  float norm_eps = 1e-6F;
  double rope_theta = 10000.0;
  int32_t rotary_dim = 0;  // leading dimensions of a head that are rotated, even; 0: all

  // kDecoder, kGemma
  ExpertSpec experts;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;              // RMSNorm of each head of q and k, before the rotation
  bool tied_head = false;            // the head is the embedding
  bool tied_unless_present = false;  // the config does not say: tied when there is no head tensor
  DecoderNames names;

  // kGemma
  WindowSpec windows;
  std::string encoder_layer_prefix;  // of the scalars that the encoder has for itself
  std::string conditioning_prefix;   // of the MLP that reads the last prediction
  bool scaled_embedding = false;     // by sqrt(dim), rounded to the dtype of the embedding
  float logit_cap = 0.0F;            // see VocabularyArgs; 0: none

  // kDiT; names are those of SEDD's code after this prefix
  std::string tensor_prefix;
  int32_t cond_dim = 0;
  bool scale_by_sigma = false;  // logits are lowered by OutputOffset(sigma)
};

// Width of the sinusoidal embedding of sigma.
inline constexpr int32_t kSigmaFrequencies = 256;

struct ExpectedTensor {
  std::string name;
  std::vector<int64_t> shape;
};

// Every tensor the forward pass reads, in the order of the network.
std::vector<ExpectedTensor> ExpectedTensors(const ModelSpec& spec);

// Settles what only the checkpoint can tell (tied_unless_present), then lists what stands in the
// way of loading, one line each: a tensor missing, wrongly shaped or of a dtype that is not read,
// or one that lies inside a layer and that this spec would leave out. Other extra tensors do no
// harm. At most 50 lines.
std::vector<std::string> CheckTensors(const Checkpoint& checkpoint, ModelSpec& spec);

// Tensors the forward pass does not read, those of CheckTensors left out.
std::vector<std::string> UnusedTensors(const Checkpoint& checkpoint, const ModelSpec& spec);

// Device memory of activations (`activation_bytes` an element; the residual stream takes 4) for a
// forward pass of these sizes, without the backend's own scratch.
int64_t ActivationBytes(const ModelSpec& spec, int64_t rows_max, int64_t sequences_max,
                        int64_t positions_max, int64_t activation_bytes);

// Layers of keys and values that one sequence keeps.
inline int32_t KvLayers(const ModelSpec& spec) {
  return spec.traits.causal_block_length > 0 ? spec.num_layers : 1;
}
// The memory of a sequence: layers with a window first, then those that see everything.
KvShape KvShapeOf(const ModelSpec& spec, int32_t positions, KvReuse reuse);

// Heads of a layer, and the widest q, and k (or v), of any.
HeadShape HeadsOf(const ModelSpec& spec, int32_t layer);
int64_t WidestQ(const ModelSpec& spec);
int64_t WidestKv(const ModelSpec& spec);

// Whether a layer has experts.
bool HasExperts(const ModelSpec& spec, int32_t layer);

// The name of layer `layer`'s tensor, and of an expert's (without ".weight").
std::string LayerTensor(absl::string_view prefix, int32_t layer, absl::string_view leaf);
std::string ExpertTensor(const DecoderNames& names, int32_t layer, int32_t expert,
                         absl::string_view leaf);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_MODEL_SPEC_H_
