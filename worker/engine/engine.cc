#include "worker/engine/engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {

struct Engine::Sequence {
  SequenceId id = 0;
  SequenceState state;
  const Sampler* sampler = nullptr;
  absl::Time deadline;
  bool cancelled = false;
  bool ended = false;
  std::unique_ptr<KvMemory> kv;
  std::unique_ptr<KvMemory> kv_unconditional;  // classifier-free guidance only
  int64_t kv_bytes = 0;
  // Block-causal: positions [0, kv_final) have the keys and values of their final tokens in `kv`.
  int32_t kv_final = 0;
  BlockRange block;  // the open block, set with the plan
  StepPlan plan;
  StepOutcome outcome;

  bool guided() const { return state.params.cfg_scale > 0; }
};

// Everything one forward pass needs, reused from turn to turn.
struct Engine::Scratch {
  struct Member {
    Sequence* sequence;
    int32_t first_query;
    bool prefill_only;
  };
  std::vector<Member> members;
  std::vector<TokenId> ids;
  std::vector<SequenceSpan> spans;
  std::vector<float> sigmas;
  std::vector<int32_t> wanted_rows;
  std::vector<VocabularyQuery> queries;
  std::vector<VocabularyAnswer> answers;
  std::vector<VocabularyRule> rules;  // never grown while queries point into it

  void Clear() {
    members.clear();
    ids.clear();
    spans.clear();
    sigmas.clear();
    wanted_rows.clear();
    queries.clear();
    answers.clear();
    rules.clear();
  }
};

Engine::Engine(Denoiser& denoiser, const EngineOptions& options)
    : denoiser_(denoiser),
      model_(denoiser.traits()),
      options_(options),
      scratch_(std::make_unique<Scratch>()) {
  const int32_t rows = options_.limits.rows_max;
  scratch_->members.reserve(options_.limits.sequences_max);
  scratch_->ids.reserve(rows);
  scratch_->spans.reserve(options_.limits.sequences_max);
  scratch_->sigmas.reserve(options_.limits.sequences_max);
  scratch_->wanted_rows.reserve(rows);
  // A sampler may ask twice for a position.
  scratch_->queries.reserve(2 * static_cast<size_t>(rows));
  scratch_->answers.reserve(2 * static_cast<size_t>(rows));
  scratch_->rules.reserve(2 * static_cast<size_t>(rows) * kVocabularyRulesMax);
}

Engine::~Engine() = default;

absl::StatusOr<SequenceId> Engine::Add(SequenceState state, absl::Time deadline) {
  auto sequence = std::make_unique<Sequence>();
  const int32_t length = state.canvas.length();
  const int32_t copies = state.params.cfg_scale > 0 ? 2 : 1;
  if (length > options_.limits.positions_max) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a sequence of ", length, " positions; this engine takes ", options_.limits.positions_max));
  }
  if (model_.causal_block_length > 0) {
    if (copies > 1) return absl::InvalidArgumentError("cfg_scale: not for block-causal models");
    if (model_.shift_logits)
      return absl::UnimplementedError("block-causal model with shifted logits");
    // A step computes the open block and, once, the block before it.
    if (2 * model_.causal_block_length > options_.limits.rows_max) {
      return absl::InvalidArgumentError(
          absl::StrCat("blocks of ", model_.causal_block_length,
                       " positions need rows_max of at least twice that"));
    }
  } else if (copies * length > options_.limits.rows_max) {
    return absl::InvalidArgumentError(absl::StrCat("a step computes ", copies * length,
                                                   " rows; this engine takes ",
                                                   options_.limits.rows_max));
  }
  CINNABAR_ASSIGN_OR_RETURN(sequence->sampler, GetSampler(state.params.sampler));
  if (num_sequences() >= options_.limits.sequences_max) {
    return absl::ResourceExhaustedError(
        absl::StrCat(num_sequences(), " sequences are running already"));
  }
  const KvShape shape = denoiser_.SequenceKvShape(length);
  const int64_t kv_bytes = copies * denoiser_.backend().KvBytes(shape);
  if (kv_bytes > options_.kv_bytes_max) {
    return absl::InvalidArgumentError(absl::StrCat("the sequence needs ", kv_bytes,
                                                   " bytes of KV memory; this engine has ",
                                                   options_.kv_bytes_max));
  }
  if (kv_bytes_ + kv_bytes > options_.kv_bytes_max) {
    return absl::ResourceExhaustedError(
        absl::StrCat(kv_bytes_, " of ", options_.kv_bytes_max, " bytes of KV memory are in use"));
  }
  CINNABAR_ASSIGN_OR_RETURN(sequence->kv, denoiser_.backend().AllocateKv(shape), "KV memory");
  if (copies > 1) {
    CINNABAR_ASSIGN_OR_RETURN(sequence->kv_unconditional, denoiser_.backend().AllocateKv(shape),
                              "KV memory");
  }
  sequence->id = next_id_++;
  sequence->state = std::move(state);
  sequence->deadline = deadline;
  sequence->kv_bytes = kv_bytes;
  sequence->plan.queries.reserve(2 * static_cast<size_t>(length));
  sequence->outcome.transfers.reserve(length);
  kv_bytes_ += kv_bytes;
  active_.push_back(std::move(sequence));
  return active_.back()->id;
}

bool Engine::Cancel(SequenceId id) {
  for (const auto& sequence : active_) {
    if (sequence->id == id) return sequence->cancelled = true;
  }
  return false;
}

const SequenceState* Engine::Find(SequenceId id) const {
  for (const auto& sequence : active_) {
    if (sequence->id == id) return &sequence->state;
  }
  return nullptr;
}

absl::StatusOr<SequenceState> Engine::Remove(SequenceId id) {
  for (auto it = active_.begin(); it != active_.end(); ++it) {
    if ((*it)->id != id) continue;
    SequenceState state = std::move((*it)->state);
    kv_bytes_ -= (*it)->kv_bytes;
    active_.erase(it);
    return state;
  }
  return absl::NotFoundError(absl::StrCat("no sequence ", id));
}

std::vector<std::pair<SequenceId, SequenceState>> Engine::TakeFinished() {
  return std::exchange(finished_, {});
}

void Engine::EndSequence(Sequence& sequence, absl::Status status, StepReport& report) {
  const int32_t end = static_cast<int32_t>(report.transfers.size());
  if (status.ok()) {
    // The event of its last step says that it was the last. A sequence that came in finished made
    // no step.
    if (report.events.empty() || report.events.back().sequence != sequence.id) {
      report.events.push_back({.sequence = sequence.id,
                               .step = sequence.state.decoding.step,
                               .transfers_begin = end,
                               .transfers_end = end});
    }
    report.events.back().finished = true;
    ++counters_.sequences_finished;
  } else {
    report.events.push_back({.sequence = sequence.id,
                             .step = sequence.state.decoding.step,
                             .transfers_begin = end,
                             .transfers_end = end,
                             .finished = true,
                             .status = std::move(status)});
    ++counters_.sequences_failed;
  }
  sequence.ended = true;
}

void Engine::Conclude(Sequence& sequence, absl::Span<const VocabularyAnswer> answers, bool forward,
                      StepReport& report) {
  SequenceState& state = sequence.state;
  const StepContext context{state.canvas, state.decoding, state.params, model_, sequence.block};
  sequence.outcome.Clear();
  sequence.sampler->Decide(context, sequence.plan, answers, sequence.outcome);
  const int32_t begin = static_cast<int32_t>(report.transfers.size());
  std::vector<Transfer>& transfers = sequence.outcome.transfers;
  int32_t num_committed = 0;
  for (Transfer& transfer : transfers) {
    transfer.revises = state.canvas.states[transfer.position] == PositionState::kCommitted;
    num_committed += transfer.num_committed();
  }
  report.transfers.insert(report.transfers.end(), transfers.begin(), transfers.end());
  report.events.push_back({.sequence = sequence.id,
                           .step = state.decoding.step,
                           .transfers_begin = begin,
                           .transfers_end = static_cast<int32_t>(report.transfers.size()),
                           .forward = forward,
                           .settled = sequence.outcome.settled,
                           .stays_open = sequence.outcome.stays_open,
                           .block = sequence.block});
  ApplyOutcome(sequence.outcome, forward, state.params, model_, state.canvas, state.decoding);
  ++counters_.steps;
  counters_.tokens_committed += num_committed;
  if (state.decoding.finished) EndSequence(sequence, absl::OkStatus(), report);
}

// Plans the next step; steps that need no forward pass are made on the spot.
void Engine::PlanUntilForward(Sequence& sequence, StepReport& report) {
  SequenceState& state = sequence.state;
  if (state.decoding.finished) EndSequence(sequence, absl::OkStatus(), report);
  while (!sequence.ended) {
    sequence.block =
        BlockAt(state.canvas, model_, state.params.block_length, state.decoding.block_index);
    sequence.plan.Clear();
    sequence.plan.visible_end = state.canvas.length();
    const StepContext context{state.canvas, state.decoding, state.params, model_, sequence.block};
    sequence.sampler->Plan(context, sequence.plan);
    if (sequence.plan.forward) return;
    Conclude(sequence, {}, /*forward=*/false, report);
  }
}

int32_t Engine::RowsOf(const Sequence& sequence) const {
  if (model_.causal_block_length > 0) {
    const int32_t rows = sequence.block.end - sequence.kv_final;
    if (rows <= options_.limits.rows_max) return rows;
    const int32_t whole_blocks =
        options_.limits.rows_max / model_.causal_block_length * model_.causal_block_length;
    return std::min(whole_blocks, sequence.block.begin - sequence.kv_final);
  }
  return (sequence.plan.visible_end - sequence.plan.visible_begin) * (sequence.guided() ? 2 : 1);
}

void Engine::AppendSpan(Sequence& sequence, bool unconditional) {
  Scratch& batch = *scratch_;
  const Canvas& canvas = sequence.state.canvas;
  SequenceSpan span{.row_begin = static_cast<int32_t>(batch.ids.size()),
                    .kv = unconditional ? sequence.kv_unconditional.get() : sequence.kv.get(),
                    .modulation_row = static_cast<int32_t>(batch.spans.size())};
  int32_t begin = sequence.plan.visible_begin;
  if (model_.causal_block_length > 0) {
    begin = sequence.kv_final;
    span.first_position = begin;
    span.block_length = model_.causal_block_length;
    span.num_rows = RowsOf(sequence);
  } else {
    span.num_rows = sequence.plan.visible_end - begin;
  }
  for (int32_t position = begin; position < begin + span.num_rows; ++position) {
    const bool hidden = unconditional && canvas.states[position] == PositionState::kGiven;
    batch.ids.push_back(hidden ? model_.mask_token : canvas.tokens[position]);
  }
  batch.spans.push_back(span);
  batch.sigmas.push_back(sequence.plan.sigma);
}

// The rules that hold for every query of a sequence, then those of the query itself, which win.
void Engine::AppendQuery(const Sequence& sequence, const PositionQuery& wanted) {
  Scratch& batch = *scratch_;
  const DecodingParams& params = sequence.state.params;
  const size_t rules_begin = batch.rules.size();
  CINNABAR_CHECK(batch.rules.capacity() - rules_begin >= kVocabularyRulesMax);
  const auto rule_of = [&](TokenId id) -> VocabularyRule& {
    for (size_t i = rules_begin; i < batch.rules.size(); ++i) {
      if (batch.rules[i].id == id) return batch.rules[i];
    }
    batch.rules.push_back({.id = id});
    return batch.rules.back();
  };
  if (model_.mask_token >= 0) rule_of(model_.mask_token).pickable = false;
  if (params.eos_penalty != 0) {
    for (const TokenId eos : model_.eos_tokens) rule_of(eos).bias = -params.eos_penalty;
  }
  for (const TokenId id : params.forbidden_ids) {
    rule_of(id) = {.id = id, .bias = 0.0F, .counted = false, .pickable = false};
  }
  for (const VocabularyRule& rule : wanted.rules) rule_of(rule.id) = rule;
  CINNABAR_CHECK(batch.rules.size() - rules_begin <= kVocabularyRulesMax);

  VocabularyQuery query;
  query.guidance_scale = params.cfg_scale;
  query.pick = wanted.pick;
  query.pick_temperature = wanted.pick_temperature;
  query.statistics_temperature = wanted.statistics_temperature;
  query.top_k = wanted.top_k;
  query.top_p = wanted.top_p;
  query.top_p_inside = wanted.top_p_inside;
  query.filter_order = wanted.filter_order;
  query.noise = {.seed = params.seed,
                 .position = static_cast<uint32_t>(wanted.position),
                 .step = static_cast<uint32_t>(sequence.state.decoding.step)};
  query.own_token = sequence.state.canvas.tokens[wanted.position];
  query.sigma_step = wanted.sigma_step;
  query.rules = absl::MakeConstSpan(batch.rules).subspan(rules_begin);
  query.pickable_ids = params.pickable_ids;
  batch.queries.push_back(query);
}

void Engine::AppendToBatch(Sequence& sequence) {
  Scratch& batch = *scratch_;
  const int32_t first_query = static_cast<int32_t>(batch.queries.size());
  const int32_t first_span = static_cast<int32_t>(batch.spans.size());
  AppendSpan(sequence, /*unconditional=*/false);
  const SequenceSpan span = batch.spans[first_span];
  const bool causal = model_.causal_block_length > 0;
  const bool prefill_only = causal && span.first_position + span.num_rows < sequence.block.end;
  batch.members.push_back({&sequence, first_query, prefill_only});
  if (prefill_only) return;

  // Packed row that holds the prediction for a position: its own, or with shifted logits the one
  // before.
  const int32_t span_first = causal ? span.first_position : sequence.plan.visible_begin;
  const auto row_of = [&](int32_t position, const SequenceSpan& in) {
    const int32_t row = position - span_first;
    return in.row_begin + (model_.shift_logits && row > 0 ? row - 1 : row);
  };
  const auto hidden_row_of = [&](int32_t packed_row) {
    if (batch.wanted_rows.empty() || batch.wanted_rows.back() != packed_row) {
      batch.wanted_rows.push_back(packed_row);
    }
    return static_cast<int32_t>(batch.wanted_rows.size()) - 1;
  };
  for (const PositionQuery& wanted : sequence.plan.queries) {
    AppendQuery(sequence, wanted);
    batch.queries.back().hidden_row = hidden_row_of(row_of(wanted.position, span));
  }
  if (!sequence.guided()) return;
  AppendSpan(sequence, /*unconditional=*/true);
  const SequenceSpan twin = batch.spans.back();
  for (size_t i = 0; i < sequence.plan.queries.size(); ++i) {
    batch.queries[first_query + i].unconditional_row =
        hidden_row_of(row_of(sequence.plan.queries[i].position, twin));
  }
}

absl::Status Engine::RunBatch(StepReport& report) {
  Scratch& batch = *scratch_;
  CINNABAR_RETURN_IF_ERROR(denoiser_.Forward({.ids = batch.ids,
                                              .sequences = batch.spans,
                                              .sigmas = batch.sigmas,
                                              .wanted_rows = batch.wanted_rows}),
                           "forward pass");
  batch.answers.resize(batch.queries.size());
  CINNABAR_RETURN_IF_ERROR(denoiser_.Answer(batch.queries, absl::MakeSpan(batch.answers)),
                           "vocabulary head");
  ++counters_.forwards;
  ++report.num_forwards;
  report.rows += static_cast<int32_t>(batch.ids.size());
  counters_.rows_computed += static_cast<int64_t>(batch.ids.size());
  counters_.rows_answered += static_cast<int64_t>(batch.wanted_rows.size());

  for (const Scratch::Member& member : batch.members) {
    Sequence& sequence = *member.sequence;
    if (model_.causal_block_length > 0 && options_.block_cache) {
      const int32_t final_end =
          member.prefill_only ? sequence.kv_final + RowsOf(sequence) : sequence.block.begin;
      counters_.rows_prefilled += final_end - sequence.kv_final;
      sequence.kv_final = final_end;
    }
    if (member.prefill_only) continue;
    const absl::Span<VocabularyAnswer> answers =
        absl::MakeSpan(batch.answers).subspan(member.first_query, sequence.plan.queries.size());
    const double offset = denoiser_.OutputOffset(sequence.plan.sigma);
    bool finite = true;
    for (size_t i = 0; i < answers.size(); ++i) {
      finite = finite && answers[i].finite && answers[i].token >= 0;
      answers[i].log_sum_exp -= offset / sequence.plan.queries[i].statistics_temperature;
    }
    if (finite) {
      Conclude(sequence, answers, /*forward=*/true, report);
    } else {
      EndSequence(sequence,
                  absl::DataLossError(absl::StrCat("the network gave no finite prediction in step ",
                                                   sequence.state.decoding.step)),
                  report);
    }
  }
  return absl::OkStatus();
}

absl::Status Engine::Step(absl::Time now, StepReport& report) {
  report.events.clear();
  report.transfers.clear();
  report.rows = 0;
  report.num_forwards = 0;

  absl::Status device = absl::OkStatus();
  scratch_->Clear();
  for (const auto& sequence : active_) {
    if (sequence->cancelled) {
      EndSequence(*sequence, absl::CancelledError("cancelled"), report);
    } else if (sequence->deadline <= now) {
      EndSequence(*sequence, absl::DeadlineExceededError("the deadline has passed"), report);
    } else {
      PlanUntilForward(*sequence, report);
    }
    if (sequence->ended) continue;
    const int32_t rows = RowsOf(*sequence);
    const int32_t spans = sequence->guided() ? 2 : 1;
    const bool full =
        static_cast<int32_t>(scratch_->ids.size()) + rows > options_.limits.rows_max ||
        static_cast<int32_t>(scratch_->spans.size()) + spans > options_.limits.sequences_max;
    if (full && !scratch_->members.empty()) {
      device = RunBatch(report);
      scratch_->Clear();
      if (!device.ok()) break;
    }
    AppendToBatch(*sequence);
  }
  if (device.ok() && !scratch_->members.empty()) device = RunBatch(report);

  // Sequences that ended leave, in the order of arrival.
  for (const auto& sequence : active_) {
    if (!sequence->ended) continue;
    kv_bytes_ -= sequence->kv_bytes;
    finished_.emplace_back(sequence->id, std::move(sequence->state));
  }
  std::erase_if(active_, [](const auto& sequence) { return sequence->ended; });
  return device;
}

}  // namespace cinnabar
