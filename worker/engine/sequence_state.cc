#include "worker/engine/sequence_state.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/decoding_params_wire.h"

namespace cinnabar {
namespace {

constexpr uint32_t kFormat = 1;
constexpr int kStatesPerByte = 4;

// Sets the span of the canvas from the states: first to last position that is not given.
void SetCanvasSpan(Canvas& canvas) {
  const auto open = [](PositionState state) { return state != PositionState::kGiven; };
  const auto first = std::find_if(canvas.states.begin(), canvas.states.end(), open);
  const auto last = std::find_if(canvas.states.rbegin(), canvas.states.rend(), open);
  canvas.begin = static_cast<int32_t>(first - canvas.states.begin());
  canvas.end = static_cast<int32_t>(last.base() - canvas.states.begin());
  if (first == canvas.states.end()) canvas.begin = canvas.end = 0;
}

absl::Status CheckPosition(const Canvas& canvas, int32_t position, const ModelTraits& model) {
  const TokenId token = canvas.tokens[position];
  const PositionState state = canvas.states[position];
  if (token < 0 || token >= model.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tokens[", position, "] = ", token, " is outside the vocabulary of ", model.vocab_size));
  }
  const bool has_mask_token = model.mask_token >= 0;
  if (state == PositionState::kNoise && has_mask_token) {
    return absl::InvalidArgumentError(
        absl::StrCat("position ", position, " holds noise, but the model has a mask token"));
  }
  if (state == PositionState::kMasked && !has_mask_token) {
    return absl::InvalidArgumentError(
        absl::StrCat("position ", position, " is masked, but the model has no mask token"));
  }
  if (has_mask_token && (token == model.mask_token) != (state == PositionState::kMasked)) {
    return absl::InvalidArgumentError(
        absl::StrCat("position ", position, " and its token disagree about being masked"));
  }
  return absl::OkStatus();
}

// What the decoding state must satisfy for its canvas, so that going on cannot run out of range.
absl::Status CheckDecodingState(const SequenceState& state, const ModelTraits& model) {
  const Canvas& canvas = state.canvas;
  const DecodingState& decoding = state.decoding;
  const SamplerEntry& sampler = **FindSampler(state.params.sampler);
  const bool remembers = sampler.remembers;
  if (decoding.confidences.size() != (remembers ? canvas.tokens.size() : 0) ||
      !std::all_of(decoding.confidences.begin(), decoding.confidences.end(),
                   [](float p) { return p >= 0 && p <= 1; })) {
    return absl::InvalidArgumentError(absl::StrCat(
        decoding.confidences.size(), " confidences, or some that are no probabilities"));
  }
  const int32_t undecided = CountUndecided(canvas, 0, canvas.length());
  if (!decoding.credits.empty() && (decoding.finished || !sampler.gives_credit)) {
    return absl::InvalidArgumentError("credits that no sampler reads");
  }
  const BlockMemory& memory = decoding.memory;
  if ((decoding.finished || !sampler.moves_tokens) &&
      !(memory.original.empty() && memory.tried.empty() && memory.seen.empty())) {
    return absl::InvalidArgumentError("original_masks, tried or seen_blocks that no sampler reads");
  }
  if (decoding.finished) {
    const bool stopped = state.params.eos_early_stop &&
                         FindEndOfText(canvas, decoding, state.params, model) < canvas.end;
    if (undecided > 0 && !stopped) {
      return absl::InvalidArgumentError("finished, with undecided positions left");
    }
    return absl::OkStatus();
  }
  if (decoding.block_step < 0 || decoding.step < decoding.block_step || decoding.nfe < 0 ||
      decoding.nfe > decoding.step || decoding.block_edits < 0 ||
      decoding.block_edits > decoding.block_step) {
    return absl::InvalidArgumentError(absl::StrCat("step counts ", decoding.block_step, " / ",
                                                   decoding.step, " / ", decoding.nfe,
                                                   " contradict each other"));
  }
  const int32_t num_blocks = NumBlocks(canvas, model, state.params.block_length);
  if (decoding.block_index < 0 || decoding.block_index >= num_blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("block_index ", decoding.block_index, " of ", num_blocks, " blocks"));
  }
  const int32_t steps = StepsPerBlock(canvas, state.params, model);
  if (model.causal_encoder && decoding.block_step >= steps) {
    return absl::InvalidArgumentError(
        absl::StrCat("block_step ", decoding.block_step, " of ", steps));
  }
  const BlockRange block = BlockAt(canvas, model, state.params.block_length, decoding.block_index);
  if (CountUndecided(canvas, 0, block.begin) > 0) {
    return absl::InvalidArgumentError("undecided positions before the open block");
  }
  if (!CreditsFit(decoding.credits, canvas, block, model)) {
    return absl::InvalidArgumentError("credits out of order or range");
  }
  if (sampler.moves_tokens && !MemoryFits(memory, canvas, block, decoding.block_step, model)) {
    return absl::InvalidArgumentError("original_masks, tried or seen_blocks out of order or range");
  }
  const int32_t open = CountUndecided(canvas, block.begin, block.end);
  const bool stays_open = SamplerRevises(state.params.sampler) && decoding.block_step > 0;
  if ((open == 0 && !stays_open) || decoding.block_masks < std::max(open, 1) ||
      decoding.block_masks > block.end - block.begin) {
    return absl::InvalidArgumentError(absl::StrCat(
        "block_masks ", decoding.block_masks, " for a block with ", open, " undecided positions"));
  }
  if (decoding.reused_block.empty()) return absl::OkStatus();
  if (state.params.kv_reuse == KvReuse::kExact ||
      static_cast<int32_t>(decoding.reused_block.size()) != block.end - block.begin) {
    return absl::InvalidArgumentError(absl::StrCat(
        "reused_block has ", decoding.reused_block.size(), " tokens; the open block reuses ",
        state.params.kv_reuse == KvReuse::kExact ? 0 : block.end - block.begin));
  }
  for (const TokenId token : decoding.reused_block) {
    if (token < 0 || token >= model.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("reused_block: ", token, " is outside the vocabulary"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SequenceState> MakeSequence(absl::Span<const TokenId> ids,
                                           const std::vector<bool>& given,
                                           const DecodingParams& params, const ModelTraits& model) {
  std::vector<TokenId> all_ids(ids.begin(), ids.end());
  std::vector<bool> all_given = given;
  const int32_t block = model.causal_block_length;
  if (block > 0 && all_given.size() == all_ids.size() && !all_given.empty() && !all_given.back()) {
    // With a causal encoder blocks begin where the canvas does.
    const size_t first =
        model.causal_encoder ? std::find(given.begin(), given.end(), false) - given.begin() : 0;
    const size_t whole_blocks = first + (all_ids.size() - first + block - 1) / block * block;
    all_ids.resize(whole_blocks, 0);
    all_given.resize(whole_blocks, false);
  }
  SequenceState state;
  CINNABAR_ASSIGN_OR_RETURN(state.canvas, MakeCanvas(all_ids, all_given, model, params));
  const Canvas& canvas = state.canvas;
  CINNABAR_ASSIGN_OR_RETURN(state.params,
                            ResolveParams(params, model, CountUndecided(canvas, 0, canvas.length()),
                                          canvas.end - canvas.begin, canvas.begin));
  state.decoding = BeginDecoding(canvas, state.params, model);
  return state;
}

v1::SequenceState ToWire(const SequenceState& state, absl::string_view model_fingerprint) {
  v1::SequenceState wire;
  wire.set_format(kFormat);
  wire.set_model_fingerprint(std::string(model_fingerprint));
  wire.mutable_tokens()->Assign(state.canvas.tokens.begin(), state.canvas.tokens.end());
  std::string& packed = *wire.mutable_position_states();
  packed.assign((state.canvas.states.size() + kStatesPerByte - 1) / kStatesPerByte, '\0');
  for (size_t i = 0; i < state.canvas.states.size(); ++i) {
    packed[i / kStatesPerByte] |= static_cast<char>(static_cast<unsigned>(state.canvas.states[i])
                                                    << (i % kStatesPerByte * 2));
  }
  *wire.mutable_params() = ToWire(state.params);
  wire.set_block_index(state.decoding.block_index);
  wire.set_block_step(state.decoding.block_step);
  wire.set_block_masks(state.decoding.block_masks);
  wire.set_step(state.decoding.step);
  wire.set_nfe(state.decoding.nfe);
  wire.set_finished(state.decoding.finished);
  wire.mutable_reused_block()->Assign(state.decoding.reused_block.begin(),
                                      state.decoding.reused_block.end());
  wire.set_block_edits(state.decoding.block_edits);
  wire.mutable_confidences()->Add(state.decoding.confidences.begin(),
                                  state.decoding.confidences.end());
  for (const Credit& credit : state.decoding.credits) {
    v1::Credit& entry = *wire.add_credits();
    entry.set_position(credit.position);
    entry.set_token(credit.token);
    entry.set_value(credit.value);
  }
  const BlockMemory& memory = state.decoding.memory;
  wire.set_original_masks(std::string(memory.original.begin(), memory.original.end()));
  for (const TokenEdit& tried : memory.tried) {
    v1::TriedToken& entry = *wire.add_tried();
    entry.set_position(tried.position);
    entry.set_token(tried.token);
  }
  wire.mutable_seen_blocks()->Add(memory.seen.begin(), memory.seen.end());
  return wire;
}

absl::StatusOr<SequenceState> FromWire(const v1::SequenceState& wire, const ModelTraits& model,
                                       absl::string_view model_fingerprint) {
  if (wire.format() != kFormat) {
    return absl::FailedPreconditionError(absl::StrCat("sequence state of format ", wire.format(),
                                                      "; this build reads format ", kFormat));
  }
  if (wire.model_fingerprint() != model_fingerprint) {
    return absl::FailedPreconditionError(absl::StrCat("sequence state of model ",
                                                      wire.model_fingerprint(),
                                                      "; this worker serves ", model_fingerprint));
  }
  const int32_t length = wire.tokens_size();
  if (length == 0 || length > model.positions_max) {
    return absl::InvalidArgumentError(
        absl::StrCat(length, " tokens; the model takes 1 to ", model.positions_max));
  }
  if (wire.position_states().size() !=
      static_cast<size_t>(length + kStatesPerByte - 1) / kStatesPerByte) {
    return absl::InvalidArgumentError(absl::StrCat(
        wire.position_states().size(), " bytes of position_states for ", length, " tokens"));
  }
  SequenceState state;
  state.canvas.tokens.assign(wire.tokens().begin(), wire.tokens().end());
  state.canvas.states.resize(length);
  for (int32_t i = 0; i < length; ++i) {
    const unsigned byte = static_cast<uint8_t>(wire.position_states()[i / kStatesPerByte]);
    state.canvas.states[i] = static_cast<PositionState>(byte >> (i % kStatesPerByte * 2) & 3U);
    CINNABAR_RETURN_IF_ERROR(CheckPosition(state.canvas, i, model));
  }
  SetCanvasSpan(state.canvas);
  CINNABAR_ASSIGN_OR_RETURN(const DecodingParams params, FromWire(wire.params()));
  const int32_t num_open = static_cast<int32_t>(
      std::count_if(state.canvas.states.begin(), state.canvas.states.end(),
                    [](PositionState s) { return s != PositionState::kGiven; }));
  CINNABAR_ASSIGN_OR_RETURN(
      state.params, ResolveParams(params, model, num_open, state.canvas.end - state.canvas.begin,
                                  state.canvas.begin));
  state.decoding = {.block_index = wire.block_index(),
                    .block_step = wire.block_step(),
                    .block_masks = wire.block_masks(),
                    .block_edits = wire.block_edits(),
                    .step = wire.step(),
                    .nfe = wire.nfe(),
                    .finished = wire.finished(),
                    .confidences = {wire.confidences().begin(), wire.confidences().end()},
                    .reused_block = {wire.reused_block().begin(), wire.reused_block().end()}};
  for (const v1::Credit& credit : wire.credits()) {
    state.decoding.credits.push_back({credit.position(), credit.token(), credit.value()});
  }
  BlockMemory& memory = state.decoding.memory;
  memory.original.assign(wire.original_masks().begin(), wire.original_masks().end());
  for (const v1::TriedToken& tried : wire.tried()) {
    memory.tried.push_back({tried.position(), tried.token()});
  }
  memory.seen.assign(wire.seen_blocks().begin(), wire.seen_blocks().end());
  CINNABAR_RETURN_IF_ERROR(CheckDecodingState(state, model));
  return state;
}

}  // namespace cinnabar
