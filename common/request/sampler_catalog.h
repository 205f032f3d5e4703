// The samplers by name: which knobs each one reads, what they default to, and which models they
// fit. The gateway validates with it, the command line prints it, worker/decoding implements it (a
// test holds the two lists against each other).
#ifndef CINNABAR_COMMON_REQUEST_SAMPLER_CATALOG_H_
#define CINNABAR_COMMON_REQUEST_SAMPLER_CATALOG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/request/decoding_params.h"

namespace cinnabar {

// Knobs of DecodingParams that not every sampler reads. temperature, seed, eos_penalty and
// forbidden_ids belong to all.
enum class Knob : uint32_t {
  kNumSteps = 1U << 0,
  kBlockLength = 1U << 1,
  kTopP = 1U << 2,
  kTopK = 1U << 3,
  kThreshold = 1U << 4,
  kFactor = 1U << 5,
  kEntropyBound = 1U << 6,
  kAlgTemp = 1U << 7,
  kEps = 1U << 8,
  kCfgScale = 1U << 9,
  kEosSwitches = 1U << 10,  // logits_eos_inf, confidence_eos_eot_inf
  kEta = 1U << 11,
  kRemaskingWindow = 1U << 12,  // t_on, t_off, alpha_on
  kEditing = 1U << 13,          // edit_threshold, edit_steps
  kLowThreshold = 1U << 14,
  kEosEarlyStop = 1U << 15,
  kKvReuse = 1U << 16,
  kSubBlockLength = 1U << 17,
  kCooling = 1U << 18,       // temperature_start, temperature_end
  kAdaptiveStop = 1U << 19,  // stable_steps, confident_entropy
  kRepeatPenalty = 1U << 20,
};

// What the network's output means; a sampler fits some kinds.
enum class Parameterization : uint8_t {
  kMaskPrediction,     // logits of the token at a masked position (LLaDA, Dream, SDAR, MDLM)
  kAbsorbScore,        // SEDD, absorbing graph
  kUniformScore,       // SEDD, uniform graph: no mask token
  kUniformPrediction,  // logits of the clean token where noise may be (DiffusionGemma): no mask
                       // token
};

// What a model is, as far as decoding cares. Filled from the checkpoint; plain data.
struct ModelTraits {
  std::string family;               // "llada", "dream", "sdar", ...
  int32_t vocab_size = 0;           // rows of the vocabulary head
  int32_t tokenizer_size = 0;       // ids at or above it have no text; 0: unknown
  TokenId mask_token = -1;          // -1: none (uniform noise)
  std::vector<TokenId> eos_tokens;  // end of text and end of turn; may be empty
  TokenId eot_token = -1;  // LLaDA's <|eot_id|>, which ends a turn too; not in eos_tokens; -1: none
  // What an editing model predicts where a token is to go, and where one is to be put in before it;
  // both or neither. -1: none.
  TokenId delete_token = -1;
  TokenId split_token = -1;
  // The prediction for position i is row i-1 (row 0 for position 0). A block-causal model's first
  // row of a block is that of the block before, once its tokens are final.
  bool shift_logits = false;
  int32_t causal_block_length = 0;  // > 0: block-causal attention in blocks of this many positions
  // With causal_block_length: blocks are counted from where the canvas begins. What lies before the
  // open block is encoded causally, position by position, by the network's other half.
  bool causal_encoder = false;
  Parameterization parameterization = Parameterization::kMaskPrediction;
  bool conditioned_on_sigma = false;  // the network reads the noise level
  float sigma_min = 0.0F;             // geometric noise (SEDD); both 0: log-linear
  float sigma_max = 0.0F;
  int32_t positions_max = 0;  // longest sequence
  std::string default_sampler;
};

struct SamplerEntry {
  absl::string_view name;        // canonical: "low_confidence"
  absl::string_view alias;       // one other published name, or empty
  absl::string_view source;      // paper or repository
  absl::string_view summary;     // one line for --help
  uint32_t knobs = 0;            // Knob bits
  bool draws_positions = false;  // random even at temperature 0
  // Committed positions of the open block may be masked again or get another token; they are final
  // when the block is left.
  bool revises = false;
  bool remembers = false;     // reads the confidences with which tokens were committed
  float eta = -1.0F;          // default of DecodingParams::eta; -1: not read
  uint32_t row_rules = 0;     // exceptions of the vocabulary head that it may make for a row
  bool gives_credit = false;  // keeps DecodingState::credits
  // Deletes and inserts in the open block, whose tokens move then: keeps DecodingState::memory, and
  // needs a model with ModelTraits::delete_token and split_token.
  bool moves_tokens = false;
};

// Every sampler, in the order in which help lists them.
absl::Span<const SamplerEntry> SamplerCatalog();

// By name or alias, '-' and '_' alike. NotFound lists the names.
absl::StatusOr<const SamplerEntry*> FindSampler(absl::string_view name);

// Whether the sampler of that canonical name revises; false for an unknown one. Allocates nothing.
bool SamplerRevises(absl::string_view name);
// Likewise whether it moves tokens.
bool SamplerMovesTokens(absl::string_view name);

// Checks `params` against ranges, the sampler's knobs and the model, and fills in what was left to
// default (sampler, block length, steps, eta). `num_masked` is how many positions are to be filled,
// `canvas_length` the length of the span from the first to the last of them. InvalidArgument names
// the field and the fix. A knob counts as set when it differs from DecodingParams{}.
// `canvas_begin`, where that span starts, is read for block-causal models only: it decides how many
// blocks the span touches. Idempotent: resolving a result again, for the same canvas and model,
// gives the same.
absl::StatusOr<DecodingParams> ResolveParams(const DecodingParams& params, const ModelTraits& model,
                                             int32_t num_masked, int32_t canvas_length,
                                             int32_t canvas_begin = 0);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_REQUEST_SAMPLER_CATALOG_H_
