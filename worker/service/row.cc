#include "worker/service/row.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/wire/decoding_params_wire.h"
#include "worker/decoding/sampler.h"
#include "worker/decoding/token_moves.h"

namespace cinnabar {
namespace {

constexpr uint32_t kFormat = 1;

bool IsEnd(TokenId token, const ModelTraits& model) {
  return token == model.eot_token || std::find(model.eos_tokens.begin(), model.eos_tokens.end(),
                                               token) != model.eos_tokens.end();
}

int32_t FinalEnd(const SequenceState& state, const ModelTraits& model) {
  return FinalEnd(state.canvas, state.decoding, state.params, model);
}

// The first end of text that the canvas was given, or answer_end: all before it is final.
int32_t FindEnd(const SequenceState& state, const RowFacts& facts, const ModelTraits& model) {
  const int32_t final_end = std::min(FinalEnd(state, model), facts.answer_end);
  for (int32_t i = facts.answer_begin; i < final_end; ++i) {
    if (state.canvas.states[i] != PositionState::kGiven && IsEnd(state.canvas.tokens[i], model)) {
      return i;
    }
  }
  return facts.answer_end;
}

absl::Status CheckSpan(const v1::Span& span, int32_t from, int32_t length, absl::string_view name) {
  if (span.begin() < from || span.end() <= span.begin() || span.end() > length) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": [", span.begin(), ", ", span.end(), ") of a sequence of ", length));
  }
  return absl::OkStatus();
}

// False: the edits are none that could be made, or the transfers are not what follows from them.
bool ReadEdits(const v1::StepDelta& delta, const Canvas& canvas, BlockRange block,
               const BlockMemory& memory, const ModelTraits& model, StepOutcome& outcome) {
  if (delta.edit_positions_size() != delta.edit_tokens_size()) return false;
  if (memory.original.empty()) return delta.edit_positions().empty();
  int32_t last = block.begin - 1;
  for (int i = 0; i < delta.edit_positions_size(); ++i) {
    const int32_t position = delta.edit_positions(i);
    const TokenId token = delta.edit_tokens(i);
    if (position <= last || position >= block.end || token < 0 || token >= model.vocab_size ||
        canvas.states[position] == PositionState::kGiven) {
      return false;
    }
    last = position;
    outcome.edits.push_back({.position = position, .token = token});
  }
  std::vector<MovedToken> moved;
  std::vector<Transfer> transfers;
  MoveTokens(canvas, block, outcome.edits, model, moved);
  AppendMoves(canvas, block, moved, model, transfers);
  return std::equal(transfers.begin(), transfers.end(), outcome.transfers.begin(),
                    outcome.transfers.end(), [](const Transfer& a, const Transfer& b) {
                      return a.position == b.position && a.token == b.token;
                    });
}

}  // namespace

absl::StatusOr<RowPlan> BuildRow(const StartedRow& started, int32_t steps_budget,
                                 const ModelTraits& model, absl::string_view fingerprint) {
  v1::WorkItem item;
  if (!item.ParseFromString(started.payload)) {
    return absl::InvalidArgumentError("the payload is no work item");
  }
  if (item.format() == 0 || item.format() > kFormat) {
    return absl::InvalidArgumentError(absl::StrCat("work item of format ", item.format()));
  }
  if (!item.model_fingerprint().empty() && item.model_fingerprint() != fingerprint) {
    return absl::FailedPreconditionError("the work item is for other weights");
  }
  const int32_t length = item.ids_size();
  std::vector<bool> given(length, true);
  int32_t from = 0;
  for (const v1::Span& span : item.undecided()) {
    CINNABAR_RETURN_IF_ERROR(CheckSpan(span, from, length, "undecided"));
    std::fill(given.begin() + span.begin(), given.begin() + span.end(), false);
    from = span.end();
  }
  CINNABAR_RETURN_IF_ERROR(CheckSpan(item.answer(), 0, length, "answer"));
  CINNABAR_ASSIGN_OR_RETURN(DecodingParams params, FromWire(item.params()));

  std::vector<v1::StepDelta> deltas(started.deltas.size());
  for (size_t i = 0; i < deltas.size(); ++i) {
    if (!deltas[i].ParseFromString(started.deltas[i])) {
      return absl::DataLossError("a delta does not parse");
    }
  }
  if (started.step > 0) {
    // The row has steps: what it was granted first holds. With a snapshot, its params tell.
    steps_budget = deltas.empty() ? 0 : deltas.front().steps_budget();
  }
  RowPlan plan;
  plan.facts = {.length = length,
                .answer_begin = item.answer().begin(),
                .answer_end = item.answer().end(),
                .stop_at_end_of_text = item.stop_at_end_of_text()};
  if (steps_budget > 0 && steps_budget < params.num_steps) {
    params.num_steps = steps_budget;
    plan.facts.steps_budget = steps_budget;
  }
  if (started.snapshot_step > 0) {
    v1::SequenceState snapshot;
    if (!snapshot.ParseFromString(started.snapshot)) {
      return absl::DataLossError("the snapshot does not parse");
    }
    CINNABAR_ASSIGN_OR_RETURN(plan.state, FromWire(snapshot, model, fingerprint), "snapshot");
    if (plan.state.decoding.step != started.snapshot_step || plan.state.canvas.length() < length) {
      return absl::DataLossError("the snapshot is of another step or sequence");
    }
    if (plan.state.params.num_steps < item.params().num_steps()) {
      plan.facts.steps_budget = plan.state.params.num_steps;
    }
  } else {
    const std::vector<TokenId> ids(item.ids().begin(), item.ids().end());
    CINNABAR_ASSIGN_OR_RETURN(plan.state, MakeSequence(ids, given, params, model));
  }
  for (const v1::StepDelta& delta : deltas) {
    CINNABAR_RETURN_IF_ERROR(ApplyDelta(delta, model, plan.state));
  }
  if (plan.state.decoding.step != started.step) {
    return absl::DataLossError(
        absl::StrCat("rebuilt to step ", plan.state.decoding.step, " of ", started.step));
  }
  return plan;
}

v1::StepDelta MakeDelta(const StepReport& report, const StepEvent& event,
                        const SequenceState& after, const RowFacts& facts, const ModelTraits& model,
                        absl::Duration step_time, const Usage& usage) {
  v1::StepDelta delta;
  std::string confidences;
  const bool remembers = !after.decoding.confidences.empty();
  for (const Transfer& transfer : report.TransfersOf(event)) {
    if (transfer.revises) delta.set_num_revised(delta.num_revised() + 1);
    if (remembers) delta.add_exact_confidences(transfer.confidence);
    delta.add_positions(transfer.position);
    delta.add_tokens(transfer.token);
    const float p = std::clamp(transfer.confidence, 0.0F, 1.0F);
    confidences.push_back(static_cast<char>(std::lround(255.0F * (std::isfinite(p) ? p : 0.0F))));
  }
  delta.set_confidences(std::move(confidences));
  delta.set_forward(event.forward);
  delta.set_settled(event.settled);
  delta.set_stays_open(event.stays_open);
  delta.set_whole_pass(event.whole_pass);
  for (const Credit& credit : after.decoding.credits) {
    v1::Credit& entry = *delta.add_credits();
    entry.set_position(credit.position);
    entry.set_token(credit.token);
    entry.set_value(credit.value);
  }
  for (const TokenEdit& edit : report.EditsOf(event)) {
    delta.add_edit_positions(edit.position);
    delta.add_edit_tokens(edit.token);
  }
  delta.set_final_end(FinalEnd(after, model));
  delta.set_step_us(absl::ToInt64Microseconds(step_time));
  delta.set_steps_budget(facts.steps_budget);
  delta.set_block_begin(event.block.begin);
  delta.set_block_end(event.block.end);
  delta.set_device_us(usage.device_us);
  return delta;
}

absl::Status ApplyDelta(const v1::StepDelta& delta, const ModelTraits& model,
                        SequenceState& state) {
  const Canvas& canvas = state.canvas;
  const bool remembers = !state.decoding.confidences.empty();
  if (delta.positions_size() != delta.tokens_size() || state.decoding.finished ||
      delta.exact_confidences_size() != (remembers ? delta.positions_size() : 0)) {
    return absl::DataLossError("a delta does not fit");
  }
  const bool revises = SamplerRevises(state.params.sampler);
  const BlockRange block =
      BlockAt(canvas, model, state.params.block_length, state.decoding.block_index);
  StepOutcome outcome;
  outcome.settled = delta.settled();
  outcome.stays_open = delta.stays_open() && revises;
  int32_t last = -1;
  for (int i = 0; i < delta.positions_size(); ++i) {
    const int32_t position = delta.positions(i);
    const TokenId token = delta.tokens(i);
    if (position <= last || position < block.begin || position >= block.end) {
      return absl::DataLossError("a delta does not fit");
    }
    const bool committed = canvas.states[position] == PositionState::kCommitted;
    const bool masks = token == kMaskedAgain && committed;
    const bool writes = token >= 0 && token < model.vocab_size && token != model.mask_token &&
                        !(committed && token == canvas.tokens[position]);
    if (!(committed ? revises : canvas.undecided(position)) || !(masks || writes)) {
      return absl::DataLossError("a delta does not fit");
    }
    const float confidence = remembers ? delta.exact_confidences(i) : 0.0F;
    if (!(confidence >= 0 && confidence <= 1)) return absl::DataLossError("a delta does not fit");
    last = position;
    outcome.transfers.push_back({.position = position, .token = token, .confidence = confidence});
  }
  for (const v1::Credit& credit : delta.credits()) {
    outcome.credits.push_back({credit.position(), credit.token(), credit.value()});
  }
  const absl::StatusOr<const SamplerEntry*> sampler = FindSampler(state.params.sampler);
  if (!outcome.credits.empty() && !(sampler.ok() && (*sampler)->gives_credit &&
                                    CreditsFit(outcome.credits, canvas, block, model))) {
    return absl::DataLossError("a delta does not fit");
  }
  if (!ReadEdits(delta, canvas, block, state.decoding.memory, model, outcome)) {
    return absl::DataLossError("a delta does not fit");
  }
  if (delta.whole_pass()) {
    if (state.params.kv_reuse == KvReuse::kExact) {
      return absl::DataLossError("a delta does not fit");
    }
    RememberBlock(canvas, block, state.decoding);
  }
  ApplyOutcome(outcome, delta.forward(), state.params, model, state.canvas, state.decoding);
  return absl::OkStatus();
}

bool AnswerIsComplete(const SequenceState& state, const RowFacts& facts, const ModelTraits& model) {
  return facts.stop_at_end_of_text && FindEnd(state, facts, model) < facts.answer_end;
}

v1::WorkResult MakeResult(const SequenceState& state, const RowFacts& facts,
                          const ModelTraits& model, const Usage& usage) {
  v1::WorkResult result;
  for (int32_t i = facts.answer_begin; i < facts.answer_end; ++i) {
    result.add_tokens(state.canvas.undecided(i) ? -1 : state.canvas.tokens[i]);
  }
  result.set_steps(state.decoding.step);
  result.set_nfe(state.decoding.nfe);
  result.set_end_of_text(FindEnd(state, facts, model) < facts.answer_end);
  result.set_device_us(usage.device_us);
  return result;
}

}  // namespace cinnabar
