// Reading what several families' configs share.
#ifndef CINNABAR_WORKER_MODEL_FAMILY_COMMON_H_
#define CINNABAR_WORKER_MODEL_FAMILY_COMMON_H_

#include "common/base/json.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/model_spec.h"

namespace cinnabar {

// Bounds on what a config may claim; generous, so that products of them stay far from overflow.
inline constexpr int64_t kVocabularyMax = 1 << 22;
inline constexpr int64_t kDimMax = 1 << 18;
inline constexpr int64_t kLayersMax = 1024;
inline constexpr int64_t kHeadsMax = 4096;
inline constexpr int64_t kPositionsMax = 1 << 24;
inline constexpr int64_t kBlockLengthMax = 1 << 16;
inline constexpr int64_t kExpertsMax = 1 << 12;

// The first row that Qwen3's tokenizer leaves unused, which its descendants took for the mask.
inline constexpr TokenId kQwen3Mask = 151669;

// How an architecture deviates from ReadTransformersDecoder().
struct DecoderKeys {
  absl::string_view mlp_dim = "intermediate_size";
  bool partial_rotary = false;  // the architecture obeys partial_rotary_factor
};

// The decoders of the transformers library: hidden_size, num_attention_heads, rope_theta and so on,
// with the features that are not computed refused by name. Sets everything of kDecoder but biases,
// norms of heads, experts and traits other than vocabulary and positions.
void ReadTransformersDecoder(JsonFields& config, ModelSpec& spec, const DecoderKeys& keys = {});

// Experts as Qwen3's mixtures have them: softmax, weights of the chosen renormalised, no shared
// one.
void ReadQwen3Experts(JsonFields& config, ModelSpec& spec);

// Numbers of experts, per token and groups against each other; InvalidArgument by field.
void SettleExperts(JsonFields& config, ModelSpec& spec);

// Refuses with Unimplemented, naming the field, unless `supported`.
void Require(bool supported, JsonFields& config, absl::string_view key, absl::string_view problem);

// Sets head_dim from dim / num_heads where the config does not say, and checks heads against each
// other.
void SettleHeads(JsonFields& config, absl::string_view heads_key, ModelSpec& spec);

// The body of Qwen3 (or of its mixtures of experts) with block-causal attention and no shift, as
// SDAR and the second Dream have it.
absl::StatusOr<ModelSpec> ReadBlockCausalQwen3(const CheckpointFacts& facts,
                                               int64_t block_length_default, bool experts = false);

// Mask token (InvalidArgument when there is none) and end-of-text ids of a masked family.
void ReadMaskedTokens(JsonFields& config, const CheckpointFacts& facts, TokenId mask_fallback,
                      ModelTraits& traits);

// The mask token: config's mask_token_id, else the tokenizer's, else `fallback` if the vocabulary
// is large enough to be the published model's (more than that id); -1: none found.
TokenId ReadMaskToken(JsonFields& config, const CheckpointFacts& facts, int32_t vocab_size,
                      TokenId fallback);

// End-of-text ids of the config files, then the turn ends among the added tokens.
std::vector<TokenId> ReadEosTokens(const CheckpointFacts& facts);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_FAMILY_COMMON_H_
