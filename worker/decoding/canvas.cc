#include "worker/decoding/canvas.h"

#include <algorithm>

#include "absl/algorithm/container.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

int32_t BlockLengthOf(const Canvas& canvas, const ModelTraits& model, int32_t block_length) {
  if (model.causal_block_length > 0) return model.causal_block_length;
  return block_length > 0 ? block_length : std::max(canvas.end - canvas.begin, 1);
}

int32_t FirstBlockBegin(const Canvas& canvas, const ModelTraits& model) {
  const int32_t block = model.causal_block_length;
  return block > 0 && !model.causal_encoder ? canvas.begin / block * block : canvas.begin;
}

}  // namespace

absl::StatusOr<Canvas> MakeCanvas(absl::Span<const TokenId> ids, const std::vector<bool>& given,
                                  const ModelTraits& model, const DecodingParams& params) {
  if (ids.size() != given.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(ids.size(), " ids, but ", given.size(), " marks of which are given"));
  }
  if (ids.empty()) return absl::InvalidArgumentError("an empty sequence");
  if (ids.size() > static_cast<size_t>(std::max(model.positions_max, 0))) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a sequence of ", ids.size(), " positions; the model takes ", model.positions_max));
  }
  const int32_t length = static_cast<int32_t>(ids.size());
  Canvas canvas;
  canvas.tokens.resize(length);
  canvas.states.resize(length);
  bool any = false;
  for (int32_t i = 0; i < length; ++i) {
    if (given[i]) {
      if (ids[i] < 0 || ids[i] >= model.vocab_size) {
        return absl::InvalidArgumentError(absl::StrCat(
            "ids[", i, "] = ", ids[i], " is outside the vocabulary of ", model.vocab_size));
      }
      if (model.mask_token >= 0 && ids[i] == model.mask_token) {
        return absl::InvalidArgumentError(absl::StrCat(
            "ids[", i, "] is the mask token, yet marked as given; mark it as to be filled"));
      }
      canvas.tokens[i] = ids[i];
      canvas.states[i] = PositionState::kGiven;
      continue;
    }
    if (model.mask_token >= 0) {
      canvas.tokens[i] = model.mask_token;
      canvas.states[i] = PositionState::kMasked;
    } else {
      canvas.tokens[i] =
          UniformToken(params, NoiseStream::kInitial, i, /*step=*/0, model.vocab_size);
      canvas.states[i] = PositionState::kNoise;
    }
    if (!any) canvas.begin = i;
    any = true;
    canvas.end = i + 1;
  }
  return canvas;
}

// By the upper half of a 64-bit product, and rejection. A forbidden id would be a state that the
// reverse process may have to leave without any id to go to.
TokenId UniformToken(const DecodingParams& params, NoiseStream stream, int32_t position,
                     int32_t step, int32_t vocab_size) {
  const bool limited = params.pickable_ids > 0 && params.pickable_ids < vocab_size;
  const uint64_t num_ids = static_cast<uint64_t>(limited ? params.pickable_ids : vocab_size);
  const NoiseKey key{.seed = params.seed,
                     .position = static_cast<uint32_t>(position),
                     .step = static_cast<uint32_t>(step)};
  constexpr uint32_t kDrawsMax =
      256;  // ends when all ids are forbidden; such a request cannot end well
  TokenId id = 0;
  for (uint32_t draw = 0; draw < kDrawsMax; ++draw) {
    const uint64_t word = NoiseWord(key, stream, draw);
    id = static_cast<TokenId>((word * num_ids) >> 32);
    if (!absl::c_linear_search(params.forbidden_ids, id)) break;
  }
  return id;
}

int32_t CountUndecided(const Canvas& canvas, int32_t begin, int32_t end) {
  CINNABAR_CHECK(0 <= begin && begin <= end && end <= canvas.length()) << begin << " .. " << end;
  int32_t count = 0;
  for (int32_t i = begin; i < end; ++i) count += canvas.undecided(i) ? 1 : 0;
  return count;
}

BlockRange BlockAt(const Canvas& canvas, const ModelTraits& model, int32_t block_length,
                   int32_t index) {
  CINNABAR_CHECK(index >= 0) << "block " << index;
  const int64_t block = BlockLengthOf(canvas, model, block_length);
  const int64_t begin = FirstBlockBegin(canvas, model) + index * block;
  if (begin >= canvas.end) return {canvas.end, canvas.end};
  const int32_t limit = model.causal_block_length > 0 ? canvas.length() : canvas.end;
  return {static_cast<int32_t>(begin),
          static_cast<int32_t>(std::min<int64_t>(begin + block, limit))};
}

int32_t NumBlocks(const Canvas& canvas, const ModelTraits& model, int32_t block_length) {
  if (canvas.begin == canvas.end) return 0;
  const int64_t block = BlockLengthOf(canvas, model, block_length);
  return static_cast<int32_t>((canvas.end - FirstBlockBegin(canvas, model) + block - 1) / block);
}

}  // namespace cinnabar
