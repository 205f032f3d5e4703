#include "worker/engine/engine.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {

static_assert(kQueriesPerPositionMax <= kQueriesPerRowMax);

// What a pass computes for one sequence.
struct Engine::Member {
  Sequence* sequence = nullptr;  // null: it has left, or is not where the pass took it to be
  int32_t first_query = 0;
  int32_t num_queries = 0;
  int32_t row_begin = 0;  // packed row of rows.begin, where `ahead`
  RowRange rows;
  bool keys_and_values_only = false;  // no step yet: a long prompt, or what a resumed one reuses
  bool ahead = false;                 // its step was not known when the pass was begun
};

// One forward pass, reused from turn to turn: what it computes, for whom, and what came of it.
struct Engine::Pass {
  std::vector<Member> members;  // never grown while sequences point into it
  std::vector<TokenId> ids;
  std::vector<SequenceSpan> spans;
  std::vector<float> sigmas;
  std::vector<SelfConditioning> conditioning;
  std::vector<int32_t> wanted_rows;
  std::vector<VocabularyQuery> queries;
  std::vector<VocabularyAnswer> answers;
  std::vector<VocabularyRule> rules;  // never grown while queries point into it
  // What the members ahead take over from the pass before, and the ids that were computed.
  std::vector<TransferSelection> selections;
  std::vector<TransferCandidate> candidates;
  std::vector<TokenId> chosen;
  bool begun = false;

  explicit Pass(const ForwardLimits& limits) {
    const auto rows = static_cast<size_t>(limits.rows_max);
    const auto sequences = static_cast<size_t>(limits.sequences_max);
    members.reserve(sequences);
    ids.reserve(rows);
    spans.reserve(sequences);
    sigmas.reserve(sequences);
    conditioning.reserve(sequences);
    wanted_rows.reserve(rows);
    queries.reserve(kQueriesPerPositionMax * rows);
    answers.reserve(kQueriesPerPositionMax * rows);
    rules.reserve(kQueriesPerPositionMax * rows * kVocabularyRulesMax);
    selections.reserve(sequences);
    candidates.reserve(kQueriesPerPositionMax * rows);
    chosen.reserve(rows);
  }

  void Clear() {
    members.clear();
    ids.clear();
    spans.clear();
    sigmas.clear();
    conditioning.clear();
    wanted_rows.clear();
    queries.clear();
    answers.clear();
    rules.clear();
    selections.clear();
    candidates.clear();
    begun = false;
  }

  // Index among the hidden rows of a packed row that is not before the last one asked for.
  int32_t HiddenRowOf(int32_t packed_row) {
    if (wanted_rows.empty() || wanted_rows.back() != packed_row) wanted_rows.push_back(packed_row);
    return static_cast<int32_t>(wanted_rows.size()) - 1;
  }
};

// Where a sequence may stand after the step that is under way.
struct Engine::Outlook {
  Canvas canvas;
  DecodingState decoding;
  BlockRange block;
  StepPlan plan;
};

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
  // kv_reuse: `kv` holds what the whole pass over state.decoding.reused_block left.
  bool kv_reusable = false;
  bool whole_pass = false;  // the pass that is being concluded
  BlockRange block;         // the open block, set with the plan
  // Networks that read their last prediction: it, once the open block has one, and room for the
  // next.
  std::unique_ptr<Buffer> prediction;
  std::unique_ptr<Buffer> next_prediction;
  float prediction_temperature = 1.0F;
  bool has_prediction = false;
  // While the open block's steps are made again, to have its last prediction: what they lead to.
  std::optional<SequenceState> resumed;
  StepPlan plan;
  StepOutcome outcome;
  Member* member = nullptr;  // in the last pass that was begun, or is being put together

  bool guided() const { return state.params.cfg_scale > 0; }
  bool reuses() const { return state.params.kv_reuse != KvReuse::kExact; }
  // The step computes rows of its own choice. False where the sequence was resumed and their
  // neighbours must be computed again first.
  bool partial() const { return plan.rows_end > plan.rows_begin && kv_reusable; }
  bool restoring() const { return plan.rows_end > plan.rows_begin && !kv_reusable; }
  const SequenceState& known_state() const { return resumed.has_value() ? *resumed : state; }
};

namespace {

// An id that stands for a token which is not known yet.
TokenId PlaceholderOf(const ModelTraits& model) {
  TokenId id = 0;
  while (id == model.mask_token || id == model.eot_token ||
         absl::c_linear_search(model.eos_tokens, id)) {
    ++id;
  }
  return id;
}

bool SameRule(const VocabularyRule& a, const VocabularyRule& b) {
  return a.id == b.id && a.bias == b.bias && a.counted == b.counted && a.pickable == b.pickable;
}

// Whether both have the same answer in every bit, if their rows have. Neither is guided.
bool SameQuery(const VocabularyQuery& a, const VocabularyQuery& b) {
  const bool random = a.pick_temperature > 0 || a.pick == PickRule::kUniformTweedie;
  return a.noise.position == b.noise.position && a.pick == b.pick &&
         a.pick_temperature == b.pick_temperature &&
         a.statistics_temperature == b.statistics_temperature && a.top_k == b.top_k &&
         a.top_p == b.top_p && a.top_p_rule == b.top_p_rule && a.filter_order == b.filter_order &&
         a.noise.seed == b.noise.seed && (!random || a.noise.step == b.noise.step) &&
         a.own_token == b.own_token && a.sigma_step == b.sigma_step && a.want_top == b.want_top &&
         a.pickable_ids == b.pickable_ids && absl::c_equal(a.rules, b.rules, SameRule);
}

}  // namespace

Engine::Engine(Denoiser& denoiser, const EngineOptions& options)
    : denoiser_(denoiser),
      model_(denoiser.traits()),
      options_(options),
      looks_ahead_(options.look_ahead && denoiser.RunsAhead()),
      placeholder_(PlaceholderOf(model_)),
      pass_(std::make_unique<Pass>(options.limits)),
      next_(std::make_unique<Pass>(options.limits)),
      outlooks_(looks_ahead_ ? 2 : 0) {
  const auto rows = static_cast<size_t>(options_.limits.rows_max);
  waiting_.reserve(options_.limits.sequences_max);
  answers_.reserve(kQueriesPerPositionMax * rows);
  rules_.reserve(kVocabularyRulesMax);
  for (Outlook& outlook : outlooks_) outlook.plan.queries.reserve(kQueriesPerPositionMax * rows);
  if (looks_ahead_) outcome_.transfers.reserve(rows);
}

Engine::~Engine() { DropPasses(); }

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
    // A step computes the open block and, once, the block before it; an encoder may take that in
    // pieces.
    const int32_t blocks = model_.causal_encoder ? 1 : 2;
    if (blocks * model_.causal_block_length > options_.limits.rows_max) {
      return absl::InvalidArgumentError(absl::StrCat("blocks of ", model_.causal_block_length,
                                                     " positions need rows_max of at least ",
                                                     blocks == 1 ? "that" : "twice that"));
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
  const KvShape shape = denoiser_.SequenceKvShape(length, state.params.kv_reuse);
  const int64_t prediction_bytes = denoiser_.SelfConditioningBytes();
  const int64_t kv_bytes = copies * denoiser_.backend().KvBytes(shape) + 2 * prediction_bytes;
  if (kv_bytes > options_.kv_bytes_max) {
    return absl::InvalidArgumentError(absl::StrCat("the sequence needs ", kv_bytes,
                                                   " bytes of KV memory; this engine has ",
                                                   options_.kv_bytes_max));
  }
  if (kv_bytes_ + kv_bytes > options_.kv_bytes_max) {
    return absl::ResourceExhaustedError(
        absl::StrCat(kv_bytes_, " of ", options_.kv_bytes_max, " bytes of KV memory are in use"));
  }
  prefixes_.ShrinkTo(options_.kv_bytes_max - kv_bytes_ - kv_bytes);
  CINNABAR_ASSIGN_OR_RETURN(sequence->kv, denoiser_.backend().AllocateKv(shape), "KV memory");
  if (copies > 1) {
    CINNABAR_ASSIGN_OR_RETURN(sequence->kv_unconditional, denoiser_.backend().AllocateKv(shape),
                              "KV memory");
  }
  if (prediction_bytes > 0) {
    for (auto* buffer : {&sequence->prediction, &sequence->next_prediction}) {
      CINNABAR_ASSIGN_OR_RETURN(*buffer, denoiser_.backend().Allocate(prediction_bytes),
                                "self-conditioning");
    }
  }
  sequence->id = next_id_++;
  sequence->state = std::move(state);
  sequence->deadline = deadline;
  sequence->kv_bytes = kv_bytes;
  sequence->plan.queries.reserve(kQueriesPerPositionMax * static_cast<size_t>(length));
  sequence->outcome.transfers.reserve(length);
  if (SamplerMovesTokens(sequence->state.params.sampler)) ReserveMemory(*sequence);
  if (sequence->reuses()) sequence->state.decoding.reused_block.reserve(length);
  if (prediction_bytes > 0) RepeatOpenBlock(*sequence);
  CINNABAR_RETURN_IF_ERROR(ReusePrefix(*sequence), "take over a prefix");
  kv_bytes_ += kv_bytes;
  active_.push_back(std::move(sequence));
  return active_.back()->id;
}

bool Engine::SharesPrefixes(const Sequence& sequence) const {
  return model_.causal_block_length > 0 && options_.block_cache && options_.prefix_reuse &&
         !sequence.reuses();
}

// What lies before the open block is final. Whole blocks of it are taken, or with a causal encoder
// positions, from the sequence that has most of it.
absl::Status Engine::ReusePrefix(Sequence& sequence) {
  const SequenceState& state = sequence.state;
  if (!SharesPrefixes(sequence) || state.decoding.finished) return absl::OkStatus();
  const int32_t end =
      BlockAt(state.canvas, model_, state.params.block_length, state.decoding.block_index).begin;
  const absl::Span<const TokenId> wanted = absl::MakeConstSpan(state.canvas.tokens).first(end);
  PrefixCache::Match best = prefixes_.Find(wanted);
  for (const auto& other : active_) {
    if (!SharesPrefixes(*other)) continue;
    const int32_t common = CommonPrefix(
        absl::MakeConstSpan(other->state.canvas.tokens).first(other->kv_final), wanted);
    if (common > best.num_tokens) best = {.kv = other->kv.get(), .num_tokens = common};
  }
  const int32_t unit = model_.causal_encoder ? 1 : model_.causal_block_length;
  const int32_t taken = best.num_tokens / unit * unit;
  if (taken == 0) return absl::OkStatus();
  CINNABAR_RETURN_IF_ERROR(denoiser_.backend().CopyKv(*best.kv, taken, *sequence.kv));
  sequence.kv_final = taken;
  counters_.positions_reused += taken;
  return absl::OkStatus();
}

// The sequence leaves: its memory is free, or kept for those that begin as it did.
void Engine::Retire(Sequence& sequence) {
  kv_bytes_ -= sequence.kv_bytes;
  if (!SharesPrefixes(sequence) || sequence.kv_final == 0) return;
  const std::vector<TokenId>& tokens = sequence.state.canvas.tokens;
  const int64_t bytes = sequence.kv->memory_bytes();
  prefixes_.Keep({tokens.begin(), tokens.begin() + sequence.kv_final}, std::move(sequence.kv),
                 bytes);
  prefixes_.ShrinkTo(options_.kv_bytes_max - kv_bytes_);
}

// What a block's steps may add to.
void Engine::ReserveMemory(Sequence& sequence) {
  const DecodingParams& params = sequence.state.params;
  const auto block =
      static_cast<size_t>(std::min(params.block_length, sequence.state.canvas.length()));
  BlockMemory& memory = sequence.state.decoding.memory;
  memory.original.reserve(block);
  memory.tried.reserve(block * kTriedPerPositionMax);
  memory.seen.reserve(block + params.edit_steps + 1);
  sequence.outcome.edits.reserve(block);
}

bool Engine::Cancel(SequenceId id) {
  for (const auto& sequence : active_) {
    if (sequence->id == id) return sequence->cancelled = true;
  }
  return false;
}

const SequenceState* Engine::Find(SequenceId id) const {
  for (const auto& sequence : active_) {
    if (sequence->id == id) return &sequence->known_state();
  }
  return nullptr;
}

absl::StatusOr<SequenceState> Engine::Remove(SequenceId id) {
  for (auto it = active_.begin(); it != active_.end(); ++it) {
    if ((*it)->id != id) continue;
    Restore(**it);
    Detach(**it);
    Retire(**it);
    SequenceState state = std::move((*it)->state);
    active_.erase(it);
    return state;
  }
  return absl::NotFoundError(absl::StrCat("no sequence ", id));
}

std::vector<std::pair<SequenceId, SequenceState>> Engine::TakeFinished() {
  return std::exchange(finished_, {});
}

// The last prediction is big, and not part of a state: a sequence that comes in with steps in its
// open block makes them again, from the noise that the block began as. Nobody hears of it.
void Engine::RepeatOpenBlock(Sequence& sequence) {
  SequenceState& state = sequence.state;
  state.decoding.predictions.reserve(state.canvas.length());
  sequence.outcome.predictions.reserve(state.canvas.length());
  if (state.decoding.finished || state.decoding.block_step == 0) return;
  sequence.resumed = state;
  DecodingState& decoding = state.decoding;
  const BlockRange block =
      BlockAt(state.canvas, model_, state.params.block_length, decoding.block_index);
  for (int32_t i = block.begin; i < block.end; ++i) {
    if (!state.canvas.undecided(i)) continue;
    state.canvas.tokens[i] =
        UniformToken(state.params, NoiseStream::kInitial, i, /*step=*/0, model_.vocab_size);
  }
  decoding.step -= decoding.block_step;
  decoding.block_step = 0;
  decoding.predictions.clear();
  decoding.stable_steps = 0;
}

// Back to the state that came in, whether or not its steps have been made again. What they were
// worth is in the canvas that came: on another device they may differ in the last bits.
void Engine::Restore(Sequence& sequence) {
  if (!sequence.resumed.has_value()) return;
  DecodingState& decoding = sequence.state.decoding;
  std::swap(sequence.resumed->decoding.predictions, decoding.predictions);
  sequence.resumed->decoding.stable_steps = decoding.stable_steps;
  sequence.state = *std::move(sequence.resumed);
  sequence.resumed.reset();
}

void Engine::EndSequence(Sequence& sequence, absl::Status status, StepReport& report) {
  Restore(sequence);
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
  if (sequence.resumed.has_value()) {
    sequence.outcome.settled = false;  // it was not, when the step was first made
    ApplyOutcome(sequence.outcome, forward, state.params, model_, state.canvas, state.decoding);
    KeepPrediction(sequence);
    if (state.decoding.block_step == sequence.resumed->decoding.block_step) Restore(sequence);
    return;
  }
  const int32_t begin = static_cast<int32_t>(report.transfers.size());
  std::vector<Transfer>& transfers = sequence.outcome.transfers;
  int32_t num_committed = 0;
  for (Transfer& transfer : transfers) {
    transfer.revises = state.canvas.states[transfer.position] == PositionState::kCommitted;
    num_committed += transfer.num_committed();
  }
  report.transfers.insert(report.transfers.end(), transfers.begin(), transfers.end());
  const std::vector<TokenEdit>& edits = sequence.outcome.edits;
  const int32_t edits_begin = static_cast<int32_t>(report.edits.size());
  report.edits.insert(report.edits.end(), edits.begin(), edits.end());
  report.events.push_back({.sequence = sequence.id,
                           .step = state.decoding.step,
                           .transfers_begin = begin,
                           .transfers_end = static_cast<int32_t>(report.transfers.size()),
                           .edits_begin = edits_begin,
                           .edits_end = static_cast<int32_t>(report.edits.size()),
                           .forward = forward,
                           .settled = sequence.outcome.settled,
                           .whole_pass = forward && sequence.whole_pass,
                           .stays_open = sequence.outcome.stays_open,
                           .block = sequence.block});
  ApplyOutcome(sequence.outcome, forward, state.params, model_, state.canvas, state.decoding);
  if (state.decoding.reused_block.empty()) sequence.kv_reusable = false;  // another block is open
  KeepPrediction(sequence);
  ++counters_.steps;
  counters_.tokens_committed += num_committed;
  if (state.decoding.finished) EndSequence(sequence, absl::OkStatus(), report);
}

// The step that was made is the last one now. Only here: a turn that fails may be repeated.
void Engine::KeepPrediction(Sequence& sequence) {
  if (sequence.prediction == nullptr) return;
  std::swap(sequence.prediction, sequence.next_prediction);
  sequence.prediction_temperature = sequence.plan.prediction_temperature;
  sequence.has_prediction = sequence.state.decoding.block_step > 0;  // else a new block is open
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

Engine::RowRange Engine::RowsOf(const Sequence& sequence) const {
  if (sequence.partial()) return {sequence.plan.rows_begin, sequence.plan.rows_end};
  return RowsOf(sequence.plan, sequence.block, sequence.kv_final);
}

Engine::RowRange Engine::RowsOf(const StepPlan& plan, BlockRange block, int32_t kv_final) const {
  if (model_.causal_block_length == 0) return {plan.visible_begin, plan.visible_end};
  const int32_t end = std::min(block.end, plan.visible_end);
  int32_t begin = std::min(kv_final, end);
  // Shifted, the prediction for the block's first position is the last row of the block before.
  if (model_.shift_logits && begin == block.begin && begin > 0 && !plan.queries.empty() &&
      plan.queries[0].position == begin) {
    --begin;
  }
  const int32_t rows_max = options_.limits.rows_max;
  if (model_.causal_encoder) {  // which takes rows in any pieces, but has a span of its own
    const bool room = begin == block.begin || options_.limits.sequences_max > 1;
    if (end - begin <= rows_max && room) return {begin, end};
    return {begin, std::min(begin + rows_max, block.begin)};
  }
  if (end - begin <= rows_max) return {begin, end};
  const int32_t whole_blocks = rows_max / model_.causal_block_length * model_.causal_block_length;
  return {begin, std::min(begin + whole_blocks, block.begin)};
}

// Of a model with a causal encoder: what is final and not encoded yet, then the open block.
void Engine::AppendHalves(Sequence& sequence, Pass& batch) const {
  const std::vector<TokenId>& tokens = sequence.state.canvas.tokens;
  const int32_t end = RowsOf(sequence).end;
  const int32_t middle = std::min(end, sequence.block.begin);
  const auto add = [&](int32_t first, int32_t last, int32_t block_length,
                       const SelfConditioning& conditioning) {
    if (first == last) return;
    batch.spans.push_back({.row_begin = static_cast<int32_t>(batch.ids.size()),
                           .num_rows = last - first,
                           .first_position = first,
                           .block_length = block_length,
                           .kv = sequence.kv.get()});
    batch.ids.insert(batch.ids.end(), tokens.begin() + first, tokens.begin() + last);
    batch.sigmas.push_back(sequence.plan.sigma);
    batch.conditioning.push_back(conditioning);
  };
  add(sequence.kv_final, middle, /*block_length=*/1, {});
  add(middle, end, /*block_length=*/0,
      {.previous = sequence.has_prediction ? sequence.prediction.get() : nullptr,
       .temperature = sequence.prediction_temperature,
       .next = sequence.next_prediction.get()});
}

void Engine::AppendSpan(Sequence& sequence, bool unconditional, Pass& batch) const {
  const Canvas& canvas = sequence.state.canvas;
  SequenceSpan span{.row_begin = static_cast<int32_t>(batch.ids.size()),
                    .kv = unconditional ? sequence.kv_unconditional.get() : sequence.kv.get(),
                    .modulation_row = static_cast<int32_t>(batch.spans.size())};
  const RowRange rows = RowsOf(sequence);
  span.num_rows = rows.end - rows.begin;
  span.block_length = model_.causal_block_length;
  if (model_.causal_block_length > 0 || sequence.partial()) span.first_position = rows.begin;
  if (sequence.partial()) {
    span.keys_end = model_.causal_block_length > 0 ? sequence.block.end : canvas.length();
  }
  for (int32_t position = rows.begin; position < rows.end; ++position) {
    const bool hidden = unconditional && canvas.states[position] == PositionState::kGiven;
    batch.ids.push_back(hidden ? model_.mask_token : canvas.tokens[position]);
  }
  if (sequence.restoring()) {
    const std::vector<TokenId>& block = sequence.state.decoding.reused_block;
    for (int32_t position = std::max(rows.begin, sequence.block.begin);
         position < std::min(rows.end, sequence.block.end); ++position) {
      batch.ids[span.row_begin + position - rows.begin] = block[position - sequence.block.begin];
    }
  }
  batch.spans.push_back(span);
  batch.sigmas.push_back(sequence.plan.sigma);
}

// The rules that hold for every query of a sequence, then those of the query itself, which win.
// They are put behind `rules`, which must have room. Rows are the caller's to set.
VocabularyQuery Engine::QueryFor(const SequenceState& state, const PositionQuery& wanted,
                                 int32_t step, std::vector<VocabularyRule>& rules) const {
  const DecodingParams& params = state.params;
  const size_t rules_begin = rules.size();
  CINNABAR_CHECK(rules.capacity() - rules_begin >= kVocabularyRulesMax);
  const auto rule_of = [&](TokenId id) -> VocabularyRule& {
    for (size_t i = rules_begin; i < rules.size(); ++i) {
      if (rules[i].id == id) return rules[i];
    }
    rules.push_back({.id = id});
    return rules.back();
  };
  if (model_.mask_token >= 0) rule_of(model_.mask_token).pickable = false;
  if (params.eos_penalty != 0) {
    for (const TokenId eos : model_.eos_tokens) rule_of(eos).bias = -params.eos_penalty;
  }
  for (const TokenId id : params.forbidden_ids) {
    rule_of(id) = {.id = id, .bias = 0.0F, .counted = false, .pickable = false};
  }
  for (const VocabularyRule& rule : wanted.rules) rule_of(rule.id) = rule;
  CINNABAR_CHECK(rules.size() - rules_begin <= kVocabularyRulesMax);

  VocabularyQuery query;
  query.guidance_scale = params.cfg_scale;
  query.pick = wanted.pick;
  query.pick_temperature = wanted.pick_temperature;
  query.statistics_temperature = wanted.statistics_temperature;
  query.top_k = wanted.top_k;
  query.top_p = wanted.top_p;
  query.top_p_rule = wanted.top_p_rule;
  query.filter_order = wanted.filter_order;
  query.noise = {.seed = params.seed,
                 .position = static_cast<uint32_t>(wanted.position),
                 .step = static_cast<uint32_t>(step)};
  query.own_token = state.canvas.tokens[wanted.position];
  query.sigma_step = wanted.sigma_step;
  query.want_top = wanted.want_top;
  query.rules = absl::MakeConstSpan(rules).subspan(rules_begin);
  query.pickable_ids = params.pickable_ids;
  return query;
}

bool Engine::HasRoom(const Pass& pass, int32_t num_rows, int32_t num_spans) const {
  return static_cast<int32_t>(pass.ids.size()) + num_rows <= options_.limits.rows_max &&
         static_cast<int32_t>(pass.spans.size()) + num_spans <= options_.limits.sequences_max;
}

// Puts the step that is planned into `batch`. False: it does not fit beside what is there.
bool Engine::Append(Sequence& sequence, Pass& batch) const {
  const RowRange rows = RowsOf(sequence);
  const int32_t spans = sequence.guided() || model_.causal_encoder ? 2 : 1;
  const int32_t num_rows = rows.size() * (sequence.guided() ? 2 : 1);
  if (!HasRoom(batch, num_rows, spans) && !batch.members.empty()) return false;
  const int32_t first_query = static_cast<int32_t>(batch.queries.size());
  if (model_.causal_encoder) {
    AppendHalves(sequence, batch);
  } else {
    AppendSpan(sequence, /*unconditional=*/false, batch);
  }
  const SequenceSpan span = batch.spans.back();
  const bool prefill_only = model_.causal_block_length > 0 && !sequence.partial() &&
                            rows.end < std::min(sequence.block.end, sequence.plan.visible_end);
  const bool step = !prefill_only && !sequence.restoring();
  batch.members.push_back(
      {.sequence = &sequence,
       .first_query = first_query,
       .num_queries = step ? static_cast<int32_t>(sequence.plan.queries.size()) : 0,
       .rows = rows,
       .keys_and_values_only = !step});
  sequence.member = &batch.members.back();
  if (!step) return true;

  // Packed row that holds the prediction for a position: its own, or with shifted logits the one
  // before.
  const int32_t first = model_.causal_encoder ? span.first_position : rows.begin;
  const auto row_of = [&](int32_t position, const SequenceSpan& in) {
    const int32_t row = position - first;
    return in.row_begin + (model_.shift_logits && row > 0 ? row - 1 : row);
  };
  const auto first_wanted = static_cast<int32_t>(batch.wanted_rows.size());
  if (sequence.prediction != nullptr) {  // all of it is read by the next step
    for (int32_t row = 0; row < span.num_rows; ++row) batch.HiddenRowOf(span.row_begin + row);
  }
  for (const PositionQuery& wanted : sequence.plan.queries) {
    VocabularyQuery query =
        QueryFor(sequence.state, wanted, sequence.state.decoding.step, batch.rules);
    query.hidden_row = sequence.prediction != nullptr
                           ? first_wanted + wanted.position - first
                           : batch.HiddenRowOf(row_of(wanted.position, span));
    batch.queries.push_back(query);
  }
  if (!sequence.guided()) return true;
  AppendSpan(sequence, /*unconditional=*/true, batch);
  const SequenceSpan twin = batch.spans.back();
  for (size_t i = 0; i < sequence.plan.queries.size(); ++i) {
    batch.queries[first_query + i].unconditional_row =
        batch.HiddenRowOf(row_of(sequence.plan.queries[i].position, twin));
  }
  return true;
}

// --- Looking ahead

// Where the sequence stands, if the step under way transfers all that it asks for, or nothing of
// it: what lies between asks for positions that one of the two asks for, too. False: it has
// finished.
bool Engine::Suppose(const Sequence& sequence, bool transfers_all, Outlook& outlook) {
  const DecodingParams& params = sequence.state.params;
  outlook.canvas = sequence.state.canvas;
  outlook.decoding = sequence.state.decoding;
  outcome_.Clear();
  if (transfers_all) {
    for (const PositionQuery& query : sequence.plan.queries) {
      outcome_.transfers.push_back({.position = query.position, .token = placeholder_});
    }
  }
  for (bool forward = true;; forward = false) {  // then steps that need no pass
    ApplyOutcome(outcome_, forward, params, model_, outlook.canvas, outlook.decoding);
    if (outlook.decoding.finished) return false;
    outlook.block =
        BlockAt(outlook.canvas, model_, params.block_length, outlook.decoding.block_index);
    outlook.plan.Clear();
    outlook.plan.visible_end = outlook.canvas.length();
    const StepContext context{outlook.canvas, outlook.decoding, params, model_, outlook.block};
    sequence.sampler->Plan(context, outlook.plan);
    if (outlook.plan.forward) return true;
    sequence.sampler->Decide(context, outlook.plan, {}, outcome_);
  }
}

// Puts the step behind the one that `member` of `pass` makes into `ahead`: nothing, if the sequence
// will have finished. False: it cannot be told, does not fit, or would cost too much.
bool Engine::AppendAhead(const Pass& pass, const Member& member, Pass& ahead) {
  Sequence& sequence = *member.sequence;
  sequence.member = nullptr;
  if (member.keys_and_values_only || sequence.guided() || sequence.reuses()) return false;
  const SequenceState& state = sequence.state;
  const StepContext context{state.canvas, state.decoding, state.params, model_, sequence.block};
  const std::optional<TransferRule> rule = sequence.sampler->Describe(context, sequence.plan);
  if (!rule.has_value()) return false;

  const bool all = rule->count >= static_cast<int64_t>(sequence.plan.queries.size());
  const bool may_be_all = all || rule->threshold < std::numeric_limits<double>::infinity();
  const bool causal = model_.causal_block_length > 0;
  const int32_t kv_final =
      causal && options_.block_cache ? std::min(RowsOf(sequence).end, sequence.block.begin) : 0;
  RowRange rows;
  int32_t num_outlooks = 0;
  for (const bool transfers_all : {false, true}) {
    if (transfers_all ? !may_be_all : all) continue;
    Outlook& outlook = outlooks_[num_outlooks];
    if (!Suppose(sequence, transfers_all, outlook)) continue;
    const RowRange own = RowsOf(outlook.plan, outlook.block, kv_final);
    if (causal && own.end < std::min(outlook.block.end, outlook.plan.visible_end)) return false;
    if (num_outlooks == 0) {
      rows = own;
    } else if (causal) {  // rows see none of later blocks
      rows = {std::min(rows.begin, own.begin), std::max(rows.end, own.end)};
    } else if (own != rows) {
      return false;
    }
    ++num_outlooks;
  }
  if (num_outlooks == 0) return true;
  if (num_outlooks == 2) {
    spare_queries_ += static_cast<int32_t>(outlooks_[1].plan.queries.size());
    if (spare_queries_ > options_.spare_queries_max) return false;
  }
  if (!HasRoom(ahead, rows.size(), 1)) return false;

  const auto row_begin = static_cast<int32_t>(ahead.ids.size());
  const auto first_query = static_cast<int32_t>(ahead.queries.size());
  ahead.spans.push_back({.row_begin = row_begin,
                         .num_rows = rows.size(),
                         .first_position = causal ? rows.begin : 0,
                         .block_length = model_.causal_block_length,
                         .kv = sequence.kv.get(),
                         .modulation_row = static_cast<int32_t>(ahead.spans.size())});
  ahead.sigmas.push_back(0.0F);
  ahead.ids.insert(ahead.ids.end(), state.canvas.tokens.begin() + rows.begin,
                   state.canvas.tokens.begin() + rows.end);
  for (int32_t i = 0; i < num_outlooks; ++i) {
    for (const PositionQuery& wanted : outlooks_[i].plan.queries) {
      const bool asked =
          static_cast<int32_t>(ahead.queries.size()) > first_query &&
          wanted.position <= static_cast<int32_t>(ahead.queries.back().noise.position);
      if (asked) continue;
      const bool before = model_.shift_logits && wanted.position > 0;
      const int32_t row = wanted.position - (before ? 1 : 0) - rows.begin;
      CINNABAR_CHECK(row >= 0) << "position " << wanted.position << ", rows from " << rows.begin;
      VocabularyQuery query = QueryFor(state, wanted, outlooks_[i].decoding.step, ahead.rules);
      query.hidden_row = ahead.HiddenRowOf(row_begin + row);
      ahead.queries.push_back(query);
    }
  }
  ahead.members.push_back({.sequence = &sequence,
                           .first_query = first_query,
                           .num_queries = static_cast<int32_t>(ahead.queries.size()) - first_query,
                           .row_begin = row_begin,
                           .rows = rows,
                           .ahead = true});
  sequence.member = &ahead.members.back();

  const auto candidates_begin = static_cast<int32_t>(ahead.candidates.size());
  ForEachAnswer(pass, member, [&](const PositionQuery& query, int32_t answer) {
    ahead.candidates.push_back({answer, row_begin + query.position - rows.begin});
  });
  ahead.selections.push_back(
      {candidates_begin, static_cast<int32_t>(ahead.candidates.size()), *rule});
  return true;
}

// Puts the pass behind `pass` together: what waits, and every sequence of `pass` one step on.
// Either all find a place, or there is no pass ahead: nobody is left behind for another's guess.
bool Engine::PlanAhead(const Pass& pass, absl::Span<Sequence* const> waiting, Pass& ahead) {
  if (!looks_ahead_) return false;
  spare_queries_ = 0;
  bool fits = absl::c_all_of(waiting, [&](Sequence* sequence) { return Append(*sequence, ahead); });
  for (const Member& member : pass.members) {
    fits = fits && (member.sequence == nullptr || AppendAhead(pass, member, ahead));
  }
  if (fits) return true;
  for (const Member& member : ahead.members) member.sequence->member = nullptr;
  ahead.Clear();
  return false;
}

// Visits each query of the member's plan with the index of its answer.
template <typename Visit>
void Engine::ForEachAnswer(const Pass& pass, const Member& member, const Visit& visit) {
  int32_t answer = member.first_query;
  for (const PositionQuery& query : member.sequence->plan.queries) {
    while (member.ahead &&
           static_cast<int32_t>(pass.queries[answer].noise.position) < query.position) {
      ++answer;
    }
    visit(query, answer++);
  }
}

// Whether the pass under way computes the step that is planned, provided that it read the right
// ids.
bool Engine::IsCovered(const Sequence& sequence) {
  const Member& member = *sequence.member;
  const RowRange rows = RowsOf(sequence);
  const bool causal = model_.causal_block_length > 0;
  if (causal ? rows.begin < member.rows.begin || rows.end > member.rows.end ||
                   rows.end < std::min(sequence.block.end, sequence.plan.visible_end)
             : rows != member.rows) {
    return false;
  }
  const auto queries =
      absl::MakeConstSpan(pass_->queries).subspan(member.first_query, member.num_queries);
  size_t next = 0;
  for (const PositionQuery& wanted : sequence.plan.queries) {
    rules_.clear();
    const VocabularyQuery query =
        QueryFor(sequence.state, wanted, sequence.state.decoding.step, rules_);
    while (next < queries.size() && queries[next].noise.position < query.noise.position) ++next;
    if (next == queries.size() || !SameQuery(queries[next], query)) return false;
    ++next;
  }
  return true;
}

bool Engine::ReadTheCanvas(const Pass& pass, const Member& member, RowRange rows) {
  const std::vector<TokenId>& tokens = member.sequence->state.canvas.tokens;
  return std::equal(tokens.begin() + rows.begin, tokens.begin() + rows.end,
                    pass.chosen.begin() + member.row_begin + rows.begin - member.rows.begin);
}

// What the last pass begun computes for the sequence is for nothing.
void Engine::Detach(Sequence& sequence) {
  if (sequence.member == nullptr) return;
  Member& member = *std::exchange(sequence.member, nullptr);
  member.sequence = nullptr;
  if (member.ahead) ++counters_.ahead_dropped;
  counters_.rows_wasted += member.rows.size();
}

void Engine::DropPasses() {
  for (Pass* pass : {pass_.get(), next_.get()}) {
    if (pass->begun) (void)denoiser_.Await();
    pass->Clear();
  }
  for (const auto& sequence : active_) sequence->member = nullptr;
}

bool Engine::pass_under_way() const { return pass_->begun; }

// --- A turn

absl::Status Engine::Begin(Pass& pass) {
  pass.answers.resize(pass.queries.size());
  if (!pass.selections.empty()) pass.chosen.resize(pass.ids.size());
  CINNABAR_RETURN_IF_ERROR(
      denoiser_.Begin({.batch = {.ids = pass.ids,
                                 .sequences = pass.spans,
                                 .sigmas = pass.sigmas,
                                 .wanted_rows = pass.wanted_rows,
                                 .self_conditioning = pass.conditioning},
                       .queries = pass.queries,
                       .answers = absl::MakeSpan(pass.answers),
                       .selections = pass.selections,
                       .candidates = pass.candidates,
                       .chosen = absl::MakeSpan(pass.chosen.data(),
                                                pass.selections.empty() ? 0 : pass.chosen.size())}),
      "begin a forward pass");
  pass.begun = true;
  ++counters_.forwards;
  counters_.rows_computed += static_cast<int64_t>(pass.ids.size());
  counters_.rows_answered += static_cast<int64_t>(pass.wanted_rows.size());
  return absl::OkStatus();
}

// Waits for a pass that was begun, and makes its sequences' steps.
absl::Status Engine::Finish(Pass& pass, StepReport& report) {
  pass.begun = false;
  CINNABAR_RETURN_IF_ERROR(denoiser_.Await(), "forward pass");
  ++report.num_forwards;
  report.rows += static_cast<int32_t>(pass.ids.size());
  for (Member& member : pass.members) {
    if (member.sequence == nullptr) continue;
    Sequence& sequence = *member.sequence;
    if (sequence.member == &member) sequence.member = nullptr;
    RowRange rows = member.rows;
    if (member.ahead) {
      rows = RowsOf(sequence);
      if (!ReadTheCanvas(pass, member, rows)) {
        Detach(sequence);  // what was begun behind this
        ++counters_.ahead_dropped;
        counters_.rows_wasted += member.rows.size();
        continue;
      }
      ++counters_.ahead_used;
      counters_.rows_wasted += member.rows.size() - rows.size();
    }
    const bool partial = sequence.partial();
    if (model_.causal_block_length > 0 && options_.block_cache && !partial) {
      const int32_t final_end = std::min(rows.end, sequence.block.begin);
      counters_.rows_prefilled += final_end - sequence.kv_final;
      sequence.kv_final = final_end;
    }
    const bool whole = sequence.reuses() && !partial && rows.end >= sequence.block.end;
    sequence.whole_pass = whole && !sequence.restoring();
    if (sequence.whole_pass) {
      RememberBlock(sequence.state.canvas, sequence.block, sequence.state.decoding);
    }
    sequence.kv_reusable = sequence.kv_reusable || whole;
    if (member.keys_and_values_only) continue;
    const double offset = denoiser_.OutputOffset(sequence.plan.sigma);
    bool finite = true;
    answers_.clear();
    ForEachAnswer(pass, member, [&](const PositionQuery& query, int32_t index) {
      VocabularyAnswer& answer = answers_.emplace_back(pass.answers[index]);
      finite = finite && answer.finite && answer.token >= 0;
      answer.log_sum_exp -= offset / query.statistics_temperature;
    });
    if (finite) {
      Conclude(sequence, answers_, /*forward=*/true, report);
    } else {
      EndSequence(sequence,
                  absl::DataLossError(absl::StrCat("the network gave no finite prediction in step ",
                                                   sequence.state.decoding.step)),
                  report);
    }
  }
  pass.Clear();
  return absl::OkStatus();
}

absl::Status Engine::MakeTurn(absl::Time now, StepReport& report) {
  waiting_.clear();
  for (const auto& sequence : active_) {
    if (sequence->cancelled) {
      EndSequence(*sequence, absl::CancelledError("cancelled"), report);
    } else if (sequence->deadline <= now) {
      EndSequence(*sequence, absl::DeadlineExceededError("the deadline has passed"), report);
    } else if (sequence->member == nullptr) {
      PlanUntilForward(*sequence, report);
    } else if (sequence->member->ahead) {
      PlanUntilForward(*sequence, report);
      if (!sequence->ended && !IsCovered(*sequence)) Detach(*sequence);
    }
    if (sequence->ended) {
      Detach(*sequence);
    } else if (sequence->member == nullptr) {
      waiting_.push_back(sequence.get());
    }
  }
  // All that it was begun for have left.
  if (pass_->begun && absl::c_all_of(pass_->members, [](const Member& member) {
        return member.sequence == nullptr;
      })) {
    CINNABAR_RETURN_IF_ERROR(Finish(*pass_, report));
  }
  absl::Span<Sequence* const> waiting = waiting_;
  bool ahead = false;
  do {
    if (!pass_->begun) {
      while (!waiting.empty() && Append(*waiting[0], *pass_)) waiting.remove_prefix(1);
      if (pass_->members.empty()) break;
      CINNABAR_RETURN_IF_ERROR(Begin(*pass_));
    }
    ahead = PlanAhead(*pass_, waiting, *next_);
    if (ahead && !next_->members.empty()) CINNABAR_RETURN_IF_ERROR(Begin(*next_));
    CINNABAR_RETURN_IF_ERROR(Finish(*pass_, report));
  } while (!ahead && !waiting.empty());
  if (next_->begun) std::swap(pass_, next_);
  return absl::OkStatus();
}

absl::Status Engine::Step(absl::Time now, StepReport& report) {
  report.events.clear();
  report.transfers.clear();
  report.edits.clear();
  // Where tokens move, a later step may change more positions than those so far.
  report.transfers.reserve(options_.limits.rows_max);
  report.edits.reserve(options_.limits.rows_max);
  report.rows = 0;
  report.num_forwards = 0;
  const absl::Status device = MakeTurn(now, report);
  if (!device.ok()) DropPasses();

  // Sequences that ended leave, in the order of arrival.
  for (const auto& sequence : active_) {
    if (!sequence->ended) continue;
    Detach(*sequence);
    Retire(*sequence);
    finished_.emplace_back(sequence->id, std::move(sequence->state));
  }
  std::erase_if(active_, [](const auto& sequence) { return sequence->ended; });
  return device;
}

}  // namespace cinnabar
