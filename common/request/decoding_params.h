// What a request may say about how its canvas is denoised: the diffusion contract.
#ifndef CINNABAR_COMMON_REQUEST_DECODING_PARAMS_H_
#define CINNABAR_COMMON_REQUEST_DECODING_PARAMS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace cinnabar {

using TokenId = int32_t;

// Which keys and values a step takes from earlier ones. Anything but kExact is an approximation:
// what is reused was computed while other tokens stood in the open block. Source: Fast-dLLM,
// arXiv:2505.22618.
enum class KvReuse : uint8_t {
  kExact,   // what cannot have changed: finished blocks of a block-causal model
  kPrefix,  // positions before the open block, computed when it was opened
  kDual,    // all positions outside the open block (block-causal: outside the open sub-block)
};
const char* NameOf(KvReuse reuse);                             // "exact", "prefix", "dual"
absl::StatusOr<KvReuse> ParseKvReuse(absl::string_view name);  // InvalidArgument lists the names

// Settings of one generation. A sampler reads only the knobs that its SamplerEntry names
// (sampler_catalog.h); setting another one is an error, not a no-op. Lengths count tokens.
struct DecodingParams {
  std::string sampler;    // canonical name; empty takes the model's default
  // Denoising steps of the whole canvas. 0: one for each masked position; gemma_renoise: 48 a block.
  int32_t num_steps = 0;
  int32_t block_length =
      0;  // blocks are decoded left to right; 0: the model's block, else the canvas
  float temperature = 0.0F;    // >= 0; 0 takes the argmax
  float top_p = 1.0F;          // in (0, 1]; 1 is off
  int32_t top_k = 0;           // >= 0; 0 is off
  float threshold = 0.9F;      // confidence, in [0, 1]
  float factor = 1.0F;         // > 0
  float entropy_bound = 0.1F;  // nats, >= 0
  float alg_temp = 0.0F;       // >= 0; randomises the order of transfers
  // Blocks of a block are decoded left to right too; divides block_length. 0: the sampler's
  // default.
  int32_t sub_block_length = 0;
  KvReuse kv_reuse = KvReuse::kExact;
  float eps = 1e-3F;  // end of the time schedule, in (0, 1)
  // Of a block's steps: falls evenly from the first to what the step after the last would have.
  float temperature_start = 0.8F;  // > 0, at least temperature_end
  float temperature_end = 0.4F;    // > 0
  int32_t stable_steps = 1;  // >= 0; a block ends when its best tokens stayed for so many steps
  float confident_entropy = 0.005F;  // nats; and their mean entropy is below this
  float eta = -1.0F;  // >= 0; how readily committed positions are masked again; -1: the sampler's
  // remdm_loop: masks again while t_off < time <= t_on, at a share alpha_on of committed positions.
  float t_on = 0.55F;
  float t_off = 0.05F;
  float alpha_on = 0.9F;
  float edit_threshold = 0.9F;  // in [0, 1]; probability above which a committed token is replaced
  int32_t edit_steps = 16;      // >= 0; steps of a block that has nothing masked any more
  float repeat_penalty = 0.0F;  // nats, >= 0; taken off the logit of the token one position before
  float low_threshold = 0.4F;   // confidence, in [0, 1]
  bool eos_early_stop = false;  // ends at an EOS that is final; what follows stays undecided
  float cfg_scale = 0.0F;       // >= 0; classifier-free guidance, doubles the forward
  bool logits_eos_inf = false;  // EOS may never be predicted
  bool confidence_eos_eot_inf = false;  // EOS and EoT are transferred last
  float eos_penalty = 0.0F;             // nats taken off the logit of every EOS id
  std::vector<TokenId> forbidden_ids;   // removed from the distribution; at most kForbiddenIdsMax
  // Ids at or above this are never picked: rows of a padded vocabulary that the tokenizer has no
  // text for. 0: no limit. They stay in the softmax.
  int32_t pickable_ids = 0;
  uint64_t seed = 0;
};
inline constexpr int32_t kForbiddenIdsMax = 8;

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_REQUEST_DECODING_PARAMS_H_
