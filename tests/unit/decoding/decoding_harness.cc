#include "tests/unit/decoding/decoding_harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/base/check.h"
#include "tests/unit/kernels/vocabulary_reference.h"

namespace cinnabar {
namespace {

uint64_t Mixed(uint64_t x) {  // SplitMix64
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31);
}

class DoubleHead final : public Head {
 public:
  std::vector<VocabularyAnswer> Answer(const std::vector<std::vector<float>>& rows,
                                       absl::Span<const VocabularyQuery> queries) override {
    static const std::vector<float> kNone;
    std::vector<VocabularyAnswer> answers;
    for (const VocabularyQuery& query : queries) {
      answers.push_back(
          AnswerInDouble(query, rows[query.hidden_row],
                         query.unconditional_row < 0 ? kNone : rows[query.unconditional_row])
              .answer);
    }
    return answers;
  }
};

// Hidden rows are the logits themselves and the vocabulary's weight is the identity, so that the
// backend computes on exactly the rows given.
class BackendHead final : public Head {
 public:
  BackendHead() : backend_(*MakeBackend(BackendKind::kCpu, {.num_threads = 1})) {}

  std::vector<VocabularyAnswer> Answer(const std::vector<std::vector<float>>& rows,
                                       absl::Span<const VocabularyQuery> queries) override {
    if (queries.empty()) return {};
    const int64_t vocabulary = static_cast<int64_t>(rows[0].size());
    const int64_t num_rows = static_cast<int64_t>(rows.size());
    if (weight_ == nullptr || weight_->rows() != vocabulary) {
      std::vector<float> identity(vocabulary * vocabulary);
      for (int64_t i = 0; i < vocabulary; ++i) identity[i * vocabulary + i] = 1.0F;
      const HostMatrix matrix = {.data = identity.data(), .rows = vocabulary, .cols = vocabulary};
      weight_ = *backend_->LoadWeight({&matrix, 1}, RowOrder::kStacked, DType::kF32);
      rows_max_ = queries_max_ = 0;
    }
    if (num_rows > rows_max_ || static_cast<int64_t>(queries.size()) > queries_max_) {
      rows_max_ = std::max(rows_max_, num_rows);
      queries_max_ = std::max(queries_max_, static_cast<int64_t>(queries.size()));
      CINNABAR_CHECK(backend_
                         ->Reserve({.rows_max = rows_max_,
                                    .cols_max = vocabulary,
                                    .vocabulary = vocabulary,
                                    .queries_max = queries_max_})
                         .ok());
      hidden_ = *backend_->Allocate(rows_max_ * vocabulary * 4);
    }
    std::vector<float> flat;
    for (const std::vector<float>& row : rows) flat.insert(flat.end(), row.begin(), row.end());
    CINNABAR_CHECK(backend_->Upload(flat, hidden_->data()).ok());
    std::vector<VocabularyAnswer> answers(queries.size());
    const absl::Status status =
        backend_->AnswerVocabulary({.hidden = {.data = hidden_->data(), .stride = vocabulary},
                                    .weight = weight_.get(),
                                    .queries = queries,
                                    .answers = absl::MakeSpan(answers)});
    CINNABAR_CHECK(status.ok()) << status.ToString();
    CINNABAR_CHECK(backend_->Synchronize().ok());
    return answers;
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weight> weight_;
  std::unique_ptr<Buffer> hidden_;
  int64_t rows_max_ = 0;
  int64_t queries_max_ = 0;
};

// As sampler.h says of PositionQuery: the common rules, then those of the query, which win.
std::vector<VocabularyRule> RulesOf(const Sequence& sequence, const PositionQuery& wanted) {
  std::vector<VocabularyRule> rules;
  const auto rule_of = [&](TokenId id) -> VocabularyRule& {
    for (VocabularyRule& rule : rules) {
      if (rule.id == id) return rule;
    }
    rules.push_back({.id = id});
    return rules.back();
  };
  const DecodingParams& params = sequence.params;
  if (sequence.model.mask_token >= 0) rule_of(sequence.model.mask_token).pickable = false;
  if (params.eos_penalty != 0) {
    for (const TokenId eos : sequence.model.eos_tokens) rule_of(eos).bias = -params.eos_penalty;
  }
  for (const TokenId id : params.forbidden_ids) {
    rule_of(id) = {.id = id, .counted = false, .pickable = false};
  }
  for (const VocabularyRule& rule : wanted.rules) rule_of(rule.id) = rule;
  EXPECT_LE(rules.size(), static_cast<size_t>(kVocabularyRulesMax));
  return rules;
}

}  // namespace

ModelTraits MaskModel() {
  return {.family = "mask",
          .vocab_size = 23,
          .tokenizer_size = 21,
          .mask_token = 17,
          .eos_tokens = {4, 11},
          .eot_token = 9,
          .delete_token = 13,
          .split_token = 19,
          .positions_max = 96,
          .default_sampler = "low_confidence"};
}

ModelTraits BlockModel() {
  ModelTraits model = MaskModel();
  model.family = "block";
  model.causal_block_length = 4;
  model.default_sampler = "block_dynamic";
  return model;
}

ModelTraits AbsorbModel() {
  return {.family = "absorb",
          .vocab_size = 13,
          .mask_token = 12,
          .parameterization = Parameterization::kAbsorbScore,
          .conditioned_on_sigma = true,
          .positions_max = 96,
          .default_sampler = "sedd_analytic"};
}

ModelTraits UniformModel() {
  return {.family = "uniform",
          .vocab_size = 13,
          .parameterization = Parameterization::kUniformScore,
          .conditioned_on_sigma = true,
          .sigma_min = 1e-4F,
          .sigma_max = 20.0F,
          .positions_max = 96,
          .default_sampler = "sedd_euler"};
}

ModelTraits NoiseModel() {
  return {.family = "noise",
          .vocab_size = 13,
          .tokenizer_size = 11,
          .eos_tokens = {4},
          .causal_block_length = 4,
          .causal_encoder = true,
          .parameterization = Parameterization::kUniformPrediction,
          .positions_max = 96,
          .default_sampler = "gemma_renoise"};
}

std::vector<ModelTraits> AllModels() {
  return {MaskModel(), BlockModel(), AbsorbModel(), UniformModel(), NoiseModel()};
}

bool Fits(const SamplerEntry& entry, const ModelTraits& model) {
  return ResolveParams({.sampler = std::string(entry.name)}, model, 1, 1).ok();
}

bool Reads(const SamplerEntry& entry, Knob knob) {
  return (entry.knobs & static_cast<uint32_t>(knob)) != 0;
}

const SamplerEntry& EntryOf(absl::string_view name) {
  const absl::StatusOr<const SamplerEntry*> entry = FindSampler(name);
  CINNABAR_CHECK(entry.ok()) << entry.status().ToString();
  return **entry;
}

Network HashNetwork(const ModelTraits& model, double spread, uint64_t seed, bool text_is_best) {
  const bool scores = model.parameterization == Parameterization::kAbsorbScore ||
                      model.parameterization == Parameterization::kUniformScore;
  const int32_t vocab_size = model.vocab_size;
  const int32_t text_end = model.tokenizer_size > 0 ? model.tokenizer_size : vocab_size;
  const TokenId mask_token = model.mask_token;
  return [=](absl::Span<const TokenId> tokens, int32_t position, float sigma) {
    uint64_t hash = Mixed(seed ^ static_cast<uint64_t>(sigma * 4096.0F));
    for (const TokenId token : tokens) hash = Mixed(hash ^ static_cast<uint64_t>(token));
    hash = Mixed(hash ^ static_cast<uint64_t>(position));
    std::vector<float> logits(vocab_size);
    for (int32_t id = 0; id < vocab_size; ++id) {
      uint64_t word = Mixed(hash + static_cast<uint64_t>(id));
      double sum = -2;  // of four uniform numbers: bell-shaped, in [-2, 2)
      for (int i = 0; i < 4; ++i, word >>= 16) sum += static_cast<double>(word & 0xFFFF) / 65536;
      const double coarse = std::round((sum * spread - (scores ? 2 : 0)) * 256) / 256;
      logits[id] = static_cast<float>(coarse + static_cast<double>(id) / 65536);
    }
    if (scores) logits[tokens[position]] = 0;
    for (int32_t id = 0; text_is_best && id < vocab_size; ++id) {
      if (id >= text_end || id == mask_token) logits[id] = std::min(logits[id], -1.0F);
    }
    return logits;
  };
}

Network FixedNetwork(std::vector<std::vector<float>> rows) {
  return [rows = std::move(rows)](absl::Span<const TokenId>, int32_t position, float) {
    return rows[position];
  };
}

std::unique_ptr<Head> CpuHead() { return std::make_unique<BackendHead>(); }
std::unique_ptr<Head> ReferenceHead() { return std::make_unique<DoubleHead>(); }

StepContext Sequence::context() const {
  return {canvas, state, params, model,
          BlockAt(canvas, model, params.block_length, state.block_index)};
}

Sequence Begin(const Request& request, const ModelTraits& model, const Network& network) {
  absl::StatusOr<Canvas> canvas = MakeCanvas(request.ids, request.given, model, request.params);
  CINNABAR_CHECK(canvas.ok()) << canvas.status().ToString();
  const absl::StatusOr<DecodingParams> params =
      ResolveParams(request.params, model, CountUndecided(*canvas, 0, canvas->length()),
                    canvas->end - canvas->begin, canvas->begin);
  CINNABAR_CHECK(params.ok()) << params.status().ToString();
  Sequence sequence{.canvas = *std::move(canvas),
                    .params = *params,
                    .state = {},
                    .model = model,
                    .network = network};
  sequence.state = BeginDecoding(sequence.canvas, sequence.params, model);
  return sequence;
}

void PlanStep(const Sequence& sequence, StepPlan& plan) {
  const absl::StatusOr<const Sampler*> sampler = GetSampler(sequence.params.sampler);
  CINNABAR_CHECK(sampler.ok()) << sampler.status().ToString();
  (*sampler)->Plan(sequence.context(), plan);
}

StepQueries QueriesOf(const Sequence& sequence, const StepPlan& plan, bool rows_of_network) {
  const Canvas& canvas = sequence.canvas;
  const bool guided = sequence.params.cfg_scale > 0;
  const bool causal = sequence.model.causal_block_length > 0;
  const int32_t begin = causal ? 0 : plan.visible_begin;
  const int32_t end = causal ? sequence.context().block.end : plan.visible_end;
  EXPECT_LE(0, begin);
  EXPECT_LE(end, canvas.length());
  const absl::Span<const TokenId> seen =
      absl::MakeConstSpan(canvas.tokens).subspan(begin, end - begin);
  std::vector<TokenId> hidden(seen.begin(), seen.end());
  for (int32_t i = begin; i < end; ++i) {
    if (canvas.states[i] == PositionState::kGiven) hidden[i - begin] = sequence.model.mask_token;
  }
  StepQueries step;
  for (const PositionQuery& wanted : plan.queries) step.rules.push_back(RulesOf(sequence, wanted));
  for (size_t i = 0; i < plan.queries.size(); ++i) {
    const PositionQuery& wanted = plan.queries[i];
    VocabularyQuery query;
    query.hidden_row = wanted.position;
    if (rows_of_network) {
      EXPECT_TRUE(begin <= wanted.position && wanted.position < end) << wanted.position;
      query.hidden_row = static_cast<int32_t>(step.rows.size());
      step.rows.push_back(sequence.network(seen, wanted.position - begin, plan.sigma));
      if (guided) {
        query.unconditional_row = static_cast<int32_t>(step.rows.size());
        step.rows.push_back(sequence.network(hidden, wanted.position - begin, plan.sigma));
      }
    }
    query.guidance_scale = sequence.params.cfg_scale;
    query.pick = wanted.pick;
    query.pick_temperature = wanted.pick_temperature;
    query.statistics_temperature = wanted.statistics_temperature;
    query.top_k = wanted.top_k;
    query.top_p = wanted.top_p;
    query.top_p_rule = wanted.top_p_rule;
    query.filter_order = wanted.filter_order;
    query.noise = {.seed = sequence.params.seed,
                   .position = static_cast<uint32_t>(wanted.position),
                   .step = static_cast<uint32_t>(sequence.state.step)};
    query.own_token = canvas.tokens[wanted.position];
    query.sigma_step = wanted.sigma_step;
    query.want_top = wanted.want_top;
    query.rules = step.rules[i];
    query.pickable_ids = sequence.params.pickable_ids;
    step.queries.push_back(query);
  }
  return step;
}

std::vector<VocabularyAnswer> AnswerStep(const Sequence& sequence, const StepPlan& plan,
                                         Head& head) {
  if (!plan.forward) return {};
  const StepQueries step = QueriesOf(sequence, plan);
  return head.Answer(step.rows, step.queries);
}

StepOutcome FinishStep(const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
                       Sequence& sequence) {
  const StepContext context = sequence.context();
  StepOutcome outcome;
  (*GetSampler(sequence.params.sampler))->Decide(context, plan, answers, outcome);
  int32_t previous = context.block.begin - 1;
  for (const Transfer& transfer : outcome.transfers) {
    EXPECT_GT(transfer.position, previous);
    EXPECT_LT(transfer.position, context.block.end);
    const bool committed = context.canvas.states[transfer.position] == PositionState::kCommitted;
    const bool masked_again = committed && transfer.token == kMaskedAgain;
    EXPECT_TRUE(context.canvas.undecided(transfer.position) ||
                (committed && SamplerRevises(sequence.params.sampler)));
    EXPECT_TRUE(masked_again ||
                (transfer.token >= 0 && transfer.token != sequence.model.mask_token))
        << transfer.token;
    EXPECT_TRUE(transfer.confidence >= 0 && transfer.confidence <= 1) << transfer.confidence;
    previous = transfer.position;
  }
  ApplyOutcome(outcome, plan.forward, sequence.params, sequence.model, sequence.canvas,
               sequence.state);
  return outcome;
}

std::vector<StepRecord> RunToEnd(Sequence& sequence, Head& head, int32_t num_steps_max) {
  std::vector<StepRecord> records;
  while (!sequence.state.finished && static_cast<int32_t>(records.size()) < num_steps_max) {
    StepRecord& record = records.emplace_back();
    record.before = sequence.state;
    record.block = sequence.context().block;
    PlanStep(sequence, record.plan);
    record.outcome = FinishStep(record.plan, AnswerStep(sequence, record.plan, head), sequence);
  }
  return records;
}

Request RandomRequest(const SamplerEntry& entry, const ModelTraits& model, uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](int32_t bound) { return static_cast<int32_t>(random() % bound); };
  const auto maybe = [&] { return random() % 2 == 0; };
  const auto one_of = [&](std::vector<float> choices) { return choices[below(choices.size())]; };
  Request request;
  const int32_t length = 1 + below(26);
  const int32_t shape = below(6);
  const int32_t hole = below(length);
  for (int32_t i = 0; i < length; ++i) {
    TokenId id = below(model.vocab_size);
    if (id == model.mask_token) id = 0;
    request.ids.push_back(id);
    request.given.push_back(shape == 0   ? i < length / 3
                            : shape == 1 ? i < length / 4 || i >= length - 1 - length / 8
                            : shape == 2 ? maybe()
                            : shape == 3 ? i != hole
                            : shape == 4 ? (i / 5) % 2 == 0  // holes of five
                                         : false);
  }
  DecodingParams& params = request.params;
  params.sampler = std::string(entry.name);
  params.seed = (static_cast<uint64_t>(random()) << 32) + random();
  const bool score_model = model.parameterization != Parameterization::kMaskPrediction;
  if (score_model) {
    params.temperature = one_of({0.0F, 1.0F});
  } else {
    params.temperature = one_of({0.0F, 0.0F, 0.3F, 1.0F, 1.6F});
  }
  // As many as to keep an id that may be picked beside those that may not.
  if (Reads(entry, Knob::kTopP) && maybe()) params.top_p = one_of({0.97F, 0.8F});
  if (Reads(entry, Knob::kTopK) && maybe()) params.top_k = 6 + below(10);
  if (Reads(entry, Knob::kThreshold)) params.threshold = one_of({0.0F, 0.2F, 0.5F, 0.9F, 1.0F});
  if (Reads(entry, Knob::kSubBlockLength) && model.causal_block_length == 0) {
    params.block_length = 6;
    params.sub_block_length = static_cast<int32_t>(one_of({1, 2, 3, 6}));
  }
  if (Reads(entry, Knob::kFactor)) params.factor = one_of({0.2F, 1.0F, 2.0F, 8.0F});
  if (Reads(entry, Knob::kEntropyBound)) params.entropy_bound = one_of({0.0F, 0.1F, 2.0F, 50.0F});
  if (Reads(entry, Knob::kCooling)) {
    params.temperature_end = one_of({0.2F, 0.4F, 1.0F});
    params.temperature_start = params.temperature_end + one_of({0.0F, 0.5F});
  }
  if (Reads(entry, Knob::kAdaptiveStop)) {
    params.stable_steps = below(3);
    params.confident_entropy = one_of({0.0F, 0.005F, 0.6F, 50.0F});
  }
  if (Reads(entry, Knob::kAlgTemp) && maybe()) params.alg_temp = one_of({0.1F, 1.0F});
  if (Reads(entry, Knob::kEps) && maybe()) params.eps = one_of({0.2F, 1e-5F});
  if (Reads(entry, Knob::kCfgScale) && maybe() && model.causal_block_length == 0) {
    params.cfg_scale = 0.7F;
  }
  if (Reads(entry, Knob::kEosSwitches)) {
    params.logits_eos_inf = maybe();
    params.confidence_eos_eot_inf = maybe();
  }
  if (Reads(entry, Knob::kEta) && maybe()) params.eta = one_of({0.0F, 0.3F, 1.0F});
  if (Reads(entry, Knob::kRemaskingWindow) && maybe()) {
    params.t_on = 0.8F;
    params.t_off = 0.3F;
    params.alpha_on = 0.6F;
  }
  if (Reads(entry, Knob::kEditing)) {
    params.edit_threshold = one_of({0.0F, 0.3F, 0.9F});
    params.edit_steps = below(4);
  }
  if (Reads(entry, Knob::kRepeatPenalty) && maybe()) params.repeat_penalty = 1.5F;
  if (Reads(entry, Knob::kLowThreshold)) params.low_threshold = one_of({0.0F, 0.2F, 0.4F, 1.0F});
  if (maybe()) params.eos_penalty = one_of({1.5F, -2.0F});
  if (maybe()) params.forbidden_ids = {2, 7, 4};
  if (maybe()) params.pickable_ids = model.tokenizer_size;
  if (Reads(entry, Knob::kBlockLength) && params.block_length == 0 &&
      model.causal_block_length == 0 && maybe()) {
    params.block_length = 1 + below(9);
  }
  if (Reads(entry, Knob::kNumSteps) && (below(4) != 0 || model.causal_encoder)) {
    const Canvas canvas = *MakeCanvas(request.ids, request.given, model, {});
    const int32_t num_blocks = std::max(NumBlocks(canvas, model, params.block_length), 1);
    params.num_steps = num_blocks * (1 + below(2 * length / num_blocks + 2));
  }
  return request;
}

}  // namespace cinnabar
