// Insertions and deletions in the open block: where its tokens stand afterwards. On plain data;
// pure.
#ifndef CINNABAR_WORKER_DECODING_TOKEN_MOVES_H_
#define CINNABAR_WORKER_DECODING_TOKEN_MOVES_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "common/request/sampler_catalog.h"
#include "worker/decoding/canvas.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {

struct MovedToken {
  TokenId token = -1;    // the mask token where nothing is decided
  int32_t from = -1;     // position where it stood, or was written; -1: a mask that is put in
  bool written = false;  // an edit's token, not the one that stood there
};

// What stands at each position of `block` after `edits`, each of which writes its token, takes the
// position out (delete_token) or puts a mask in before what stands there (split_token). A run of
// positions between given ones keeps its length: masks are put in at its end, or what is pushed out
// of it is lost. Source: sglang, dllm/algorithm/joint_threshold_indel.py, where the run is all that
// follows the prompt.
//   edits  ascending positions of the block that are not given, ids of the vocabulary
//   moved  [block.end - block.begin], overwritten
void MoveTokens(const Canvas& canvas, BlockRange block, absl::Span<const TokenEdit> edits,
                const ModelTraits& model, std::vector<MovedToken>& moved);

// Appends the transfers that turn the block into `moved`, with confidence 0: every position that
// holds another token then, or is masked again.
void AppendMoves(const Canvas& canvas, BlockRange block, absl::Span<const MovedToken> moved,
                 const ModelTraits& model, std::vector<Transfer>& transfers);

// Stands for the tokens of a block. Two that differ have the same key with a chance of 2^-64.
uint64_t BlockKey(const Canvas& canvas, BlockRange block);

// The tokens that were written at `position` before.
absl::Span<const TokenEdit> TriedAt(const BlockMemory& memory, int32_t position);

// Brings `memory` up to date with a step that makes `edits` on `canvas`, as it was before them.
void RememberEdits(const Canvas& canvas, BlockRange block, absl::Span<const TokenEdit> edits,
                   const ModelTraits& model, BlockMemory& memory);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_DECODING_TOKEN_MOVES_H_
