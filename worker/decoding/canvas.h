// The positions of one sequence and what is known about each. Plain data and pure functions.
#ifndef CINNABAR_WORKER_DECODING_CANVAS_H_
#define CINNABAR_WORKER_DECODING_CANVAS_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/philox.h"
#include "common/request/decoding_params.h"
#include "common/request/sampler_catalog.h"

namespace cinnabar {

enum class PositionState : uint8_t {
  kGiven,      // prompt, suffix or pinned span: never changes
  kMasked,     // undecided; holds the mask token
  kCommitted,  // decided by a transfer; final unless the sampler revises and its block is open
  kNoise,  // undecided in a model without a mask token: holds a noise token, may change each step
};

// A sequence: prompt + canvas (+ suffix), any positions given, any undecided.
struct Canvas {
  std::vector<TokenId> tokens;
  std::vector<PositionState> states;  // as long as tokens
  int32_t begin =
      0;  // the canvas spans [begin, end): first to last position that was undecided at the
  int32_t end = 0;  // start; equal when there was none

  int32_t length() const { return static_cast<int32_t>(tokens.size()); }
  bool undecided(int32_t position) const {
    return states[position] == PositionState::kMasked || states[position] == PositionState::kNoise;
  }
};

// Undecided positions are those where given[i] is false; their ids are ignored. They become the
// mask token, or noise drawn with (params.seed, position) among the ids that may be picked
// (params.forbidden_ids, params.pickable_ids) when the model has none. Nothing else of `params` is
// read. InvalidArgument: lengths differ, an empty sequence, more positions than the model takes, an
// id outside the vocabulary, or the mask token at a given position.
absl::StatusOr<Canvas> MakeCanvas(absl::Span<const TokenId> ids, const std::vector<bool>& given,
                                  const ModelTraits& model, const DecodingParams& params);

// A uniform draw of (params.seed, position, step, stream) among the ids that may be picked; with
// kInitial and step 0 what MakeCanvas() puts at an undecided position of a model without a mask
// token.
TokenId UniformToken(const DecodingParams& params, NoiseStream stream, int32_t position,
                     int32_t step, int32_t vocab_size);

int32_t CountUndecided(const Canvas& canvas, int32_t begin, int32_t end);

// The blocks of a canvas, decoded left to right. Full attention: runs of `block_length` from
// canvas.begin, the last may be short. Block-causal (model.causal_block_length > 0): absolute
// multiples of that length, from the one that holds canvas.begin; with a causal encoder they begin
// at canvas.begin. Returns [begin, end) of block `index`, clipped to the canvas span's end for full
// attention and to the sequence's end for block-causal models; begin == end after the last.
struct BlockRange {
  int32_t begin = 0;
  int32_t end = 0;
};
BlockRange BlockAt(const Canvas& canvas, const ModelTraits& model, int32_t block_length,
                   int32_t index);
int32_t NumBlocks(const Canvas& canvas, const ModelTraits& model, int32_t block_length);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_DECODING_CANVAS_H_
