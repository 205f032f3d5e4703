#include "worker/model/body.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/model/family.h"

namespace cinnabar {
namespace {

// Logits come out in pieces of about this many floats.
constexpr int64_t kLogitsFloats = 1 << 20;

// To nearest even in the significant bits of `dtype`, for numbers far from its limits.
float RoundTo(DType dtype, float value) {
  if (dtype == DType::kF32) return value;
  int exponent = 0;
  const double fraction = std::frexp(static_cast<double>(value), &exponent);
  const int bits = dtype == DType::kBf16 ? 8 : 11;
  return static_cast<float>(
      std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits));
}

// The dtype of all parts; F32 where they differ, but for block formats, which a backend keeps as
// they are.
DType StoredAs(absl::Span<const HostMatrix> parts) {
  const DType dtype = parts[0].dtype;
  for (const HostMatrix& part : parts) {
    if (part.dtype != dtype && !(IsQuantized(part.dtype) && IsQuantized(dtype))) {
      return DType::kF32;
    }
  }
  return dtype;
}

}  // namespace

DType KeptDType(DType stored, int64_t cols, std::optional<DType> wanted) {
  const DType dtype = wanted.value_or(stored);
  if (IsQuantized(stored) && IsQuantized(dtype)) return stored;
  if (cols % BlockOf(dtype).elements == 0) return dtype;
  return cols % BlockOf(DType::kQ8_0).elements == 0 ? DType::kQ8_0 : stored;
}

// --- Loading
// ---------------------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<Weight>> WeightLoader::Matrix(const std::vector<std::string>& names,
                                                             RowOrder row_order) {
  return Load(names, row_order, dtype_);
}

absl::StatusOr<std::unique_ptr<Weight>> WeightLoader::SmallMatrix(
    const std::vector<std::string>& names) {
  const bool quantized = dtype_.has_value() && IsQuantized(*dtype_);
  return Load(names, RowOrder::kStacked, quantized ? std::nullopt : dtype_);
}

absl::StatusOr<std::unique_ptr<Weight>> WeightLoader::Load(const std::vector<std::string>& names,
                                                           RowOrder row_order,
                                                           std::optional<DType> wanted) {
  std::vector<HostMatrix> parts;
  for (const std::string& name : names) {
    CINNABAR_ASSIGN_OR_RETURN(const HostMatrix part, checkpoint_.Matrix(name));
    parts.push_back(part);
  }
  const DType dtype = KeptDType(StoredAs(parts), parts[0].cols, wanted);
  CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Weight> weight,
                            backend_.LoadWeight(parts, row_order, dtype), "load ", names[0]);
  for (const std::string& name : names) checkpoint_.Release(name);
  loaded_bytes_ += weight->memory_bytes();
  return weight;
}

absl::StatusOr<std::unique_ptr<Weight>> WeightLoader::ExpertMatrix(
    const std::vector<std::string>& names, RowOrder row_order) {
  std::vector<HostMatrix> parts;
  for (const std::string& name : names) {
    CINNABAR_ASSIGN_OR_RETURN(const HostMatrix part, checkpoint_.Matrix(name));
    parts.push_back(part);
    if (part.dtype != parts[0].dtype || part.dtype != KeptDType(part.dtype, part.cols, dtype_)) {
      return Matrix(names, row_order);
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Weight> weight, backend_.MapWeight(parts, row_order),
                            "load ", names[0]);
  loaded_bytes_ += weight->memory_bytes();
  return weight;
}

absl::StatusOr<std::vector<std::unique_ptr<Weight>>> WeightLoader::StackedExperts(
    const std::string& name, int32_t num_experts, int32_t num_parts, RowOrder row_order) {
  CINNABAR_ASSIGN_OR_RETURN(const HostMatrix all, checkpoint_.StackedMatrix(name));
  const int64_t part_rows = all.rows / num_experts / num_parts;
  const DType kept = KeptDType(all.dtype, all.cols, dtype_);
  const bool mapped = kept == all.dtype;
  std::vector<std::unique_ptr<Weight>> experts;
  for (int32_t expert = 0; expert < num_experts; ++expert) {
    std::vector<HostMatrix> parts(num_parts, all);
    for (int32_t part = 0; part < num_parts; ++part) {
      const int64_t row = (int64_t{expert} * num_parts + part) * part_rows;
      parts[part].rows = part_rows;
      parts[part].data = static_cast<const char*>(all.data) + BytesOf(all.dtype, row * all.cols);
    }
    absl::StatusOr<std::unique_ptr<Weight>> weight =
        mapped ? backend_.MapWeight(parts, row_order) : backend_.LoadWeight(parts, row_order, kept);
    CINNABAR_RETURN_IF_ERROR(weight.status(), "load ", name, " of expert ", expert);
    loaded_bytes_ += (*weight)->memory_bytes();
    experts.push_back(*std::move(weight));
  }
  if (!mapped) checkpoint_.Release(name);
  return experts;
}

absl::StatusOr<std::unique_ptr<Weight>> WeightLoader::Embedding(const std::string& name) {
  CINNABAR_ASSIGN_OR_RETURN(const HostMatrix table, checkpoint_.Matrix(name));
  CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Weight> weight, backend_.LoadEmbedding(table), "load ",
                            name);
  checkpoint_.Release(name);  // rows that are looked up come back by themselves
  loaded_bytes_ += weight->memory_bytes();
  return weight;
}

absl::StatusOr<std::unique_ptr<Buffer>> WeightLoader::Vector(
    const std::vector<std::string>& names) {
  // Small, so parts are joined on the host: through the backend, which knows how to widen each
  // dtype.
  std::vector<float> joined;
  for (const std::string& name : names) {
    CINNABAR_ASSIGN_OR_RETURN(const HostMatrix part, checkpoint_.Matrix(name));
    CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Buffer> vector, backend_.LoadVector(part), "load ",
                              name);
    if (names.size() == 1) {
      loaded_bytes_ += vector->size_bytes();
      return vector;
    }
    const size_t begin = joined.size();
    joined.resize(begin + part.rows * part.cols);
    CINNABAR_RETURN_IF_ERROR(
        backend_.Download(vector->data(), absl::MakeSpan(joined).subspan(begin)), "load ", name);
  }
  return Vector(joined);
}

absl::StatusOr<std::unique_ptr<Buffer>> WeightLoader::Vector(absl::Span<const float> values) {
  CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Buffer> vector,
                            backend_.LoadVector({.data = values.data(),
                                                 .dtype = DType::kF32,
                                                 .rows = 1,
                                                 .cols = static_cast<int64_t>(values.size())}));
  loaded_bytes_ += vector->size_bytes();
  return vector;
}

Body::Body(ModelSpec spec, Checkpoint checkpoint, Backend& backend, const ForwardLimits& limits)
    : spec_(std::move(spec)),
      checkpoint_(std::move(checkpoint)),
      backend_(backend),
      limits_(limits) {}

absl::Status Body::Load(const LoadOptions& options) {
  CINNABAR_RETURN_IF_ERROR(TakeWorkspace());
  WeightLoader loader(checkpoint_, backend_, options.weight_dtype);
  CINNABAR_RETURN_IF_ERROR(LoadLayers(loader));
  CINNABAR_RETURN_IF_ERROR(LoadHead(loader));
  weights_bytes_ = loader.loaded_bytes();
  return backend_.Synchronize();
}

absl::Status Body::LoadHead(WeightLoader& loader) {
  const bool dit = spec_.body == BodyKind::kDiT;
  const std::string embedding =
      dit ? spec_.tensor_prefix + "vocab_embed.embedding" : spec_.names.embedding + ".weight";
  const std::string head = dit               ? spec_.tensor_prefix + "output_layer.linear.weight"
                           : spec_.tied_head ? embedding
                                             : spec_.names.head + ".weight";
  CINNABAR_ASSIGN_OR_RETURN(head_, loader.Matrix({head}));
  CINNABAR_ASSIGN_OR_RETURN(embedding_, loader.Embedding(embedding));
  if (spec_.scaled_embedding) {
    embedding_scale_ = RoundTo(embedding_->dtype(), std::sqrt(static_cast<float>(spec_.dim)));
  }
  if (dit) {
    CINNABAR_ASSIGN_OR_RETURN(head_bias_,
                              loader.Vector({spec_.tensor_prefix + "output_layer.linear.bias"}));
  }
  return absl::OkStatus();
}

absl::StatusOr<Rows> Body::TakeRows(int64_t rows, int64_t cols, DType dtype) {
  // Rows begin on cache lines.
  const int64_t per_line = 64 / BytesOf(dtype);
  const int64_t stride = (cols + per_line - 1) / per_line * per_line;
  CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Buffer> buffer,
                            backend_.Allocate(rows * stride * BytesOf(dtype)), "take ", rows, " x ",
                            cols, " ", NameOf(dtype), " of workspace");
  buffers_bytes_ += buffer->size_bytes();
  const Rows result{.data = buffer->data(), .stride = stride, .dtype = dtype};
  buffers_.push_back(std::move(buffer));
  return result;
}

WorkspaceShape WorkspaceFor(const ModelSpec& spec, const ForwardLimits& limits) {
  return {.rows_max = limits.rows_max,
          .cols_max = std::max({int64_t{spec.dim}, WidestQ(spec), int64_t{spec.mlp_dim},
                                int64_t{spec.experts.mlp_dim}, int64_t{spec.experts.shared_mlp_dim},
                                int64_t{spec.cond_dim}, int64_t{kSigmaFrequencies}}),
          .vocabulary = spec.traits.vocab_size,
          .queries_max = kQueriesPerRowMax * int64_t{limits.rows_max},
          .positions_max = limits.positions_max,
          .head_dim_max = std::max(spec.head_dim, spec.windows.full_head_dim),
          .num_experts = spec.experts.num_experts,
          .experts_per_row = spec.experts.experts_per_token,
          .expert_dim = spec.dim,
          .expert_mlp_dim = spec.experts.mlp_dim,
          .soft_rows_max = spec.traits.causal_encoder ? spec.traits.causal_block_length : 0};
}

int64_t KvBytesPerPosition(const ModelSpec& spec, int32_t positions_max, KvReuse reuse,
                           const Backend& backend) {
  const int64_t bytes = backend.KvBytes(KvShapeOf(spec, positions_max, reuse));
  return (bytes + positions_max - 1) / positions_max;
}

int64_t PredictionBytes(const ModelSpec& spec, const Backend& backend) {
  if (!spec.traits.causal_encoder) return 0;
  return int64_t{spec.traits.causal_block_length} * spec.dim * BytesOf(backend.activation_dtype());
}

int32_t LogitsRows(const ModelSpec& spec, const ForwardLimits& limits) {
  return static_cast<int32_t>(
      std::clamp<int64_t>(kLogitsFloats / spec.traits.vocab_size, 1, limits.rows_max));
}

int64_t LogitsBytes(const ModelSpec& spec, const ForwardLimits& limits) {
  return int64_t{LogitsRows(spec, limits)} * spec.traits.vocab_size * BytesOf(DType::kF32);
}

absl::Status Body::TakeWorkspace() {
  const DType activation = backend_.activation_dtype();
  const int64_t rows = limits_.rows_max;
  const int64_t q_dim = WidestQ(spec_);
  const int64_t kv_dim = WidestKv(spec_);
  const std::tuple<Rows*, int64_t, DType> wanted[] = {
      {&residual_, spec_.dim, DType::kF32},
      {&normed_, spec_.dim, activation},
      {&qkv_, q_dim + 2 * kv_dim, activation},
      {&attention_, q_dim, activation},
      {&mlp_, std::max(spec_.mlp_dim, spec_.experts.shared_mlp_dim), activation},
      {&wanted_residual_, spec_.dim, DType::kF32},
      {&wanted_attention_, q_dim, activation},
      {&hidden_, spec_.dim, activation}};
  for (const auto& [member, cols, dtype] : wanted) {
    CINNABAR_ASSIGN_OR_RETURN(*member, TakeRows(rows, cols, dtype));
  }
  CINNABAR_ASSIGN_OR_RETURN(ids_, TakeRows(1, rows, DType::kF32));  // as wide as an id
  const int64_t vocab_size = spec_.traits.vocab_size;
  logits_rows_ = LogitsRows(spec_, limits_);
  CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Buffer> logits,
                            backend_.Allocate(LogitsBytes(spec_, limits_)));
  buffers_bytes_ += logits->size_bytes();
  logits_ = {.data = logits->data(), .stride = vocab_size, .dtype = DType::kF32};
  buffers_.push_back(std::move(logits));
  wanted_ids_.reserve(rows);
  wanted_sigmas_.reserve(rows);
  wanted_sequences_.reserve(limits_.sequences_max);
  const int32_t rotary_dim = spec_.rotary_dim > 0 ? spec_.rotary_dim : spec_.head_dim;
  CINNABAR_ASSIGN_OR_RETURN(rotary_, MakeRotaryTable(spec_.rope_theta, rotary_dim, rotary_dim / 2));
  if (spec_.experts.num_experts > 0) CINNABAR_RETURN_IF_ERROR(TakeRouting());
  return backend_.Reserve(WorkspaceFor(spec_, limits_));
}

absl::Status Body::TakeRouting() {
  const ExpertSpec& experts = spec_.experts;
  const int64_t rows = limits_.rows_max;
  CINNABAR_ASSIGN_OR_RETURN(router_logits_, TakeRows(rows, experts.num_experts, DType::kF32));
  // Dense [rows, experts_per_token]: taken as one row each.
  CINNABAR_ASSIGN_OR_RETURN(chosen_experts_,
                            TakeRows(1, rows * experts.experts_per_token, DType::kF32));
  CINNABAR_ASSIGN_OR_RETURN(expert_weights_,
                            TakeRows(1, rows * experts.experts_per_token, DType::kF32));
  return absl::OkStatus();
}

absl::StatusOr<RotaryTable> Body::MakeRotaryTable(double theta, int32_t rotary_dim,
                                                  int32_t num_angles) {
  const int64_t half = rotary_dim / 2, positions = limits_.positions_max;
  std::vector<float> cosine(positions * half), sine(positions * half);
  for (int64_t i = 0; i < half; ++i) {
    const double frequency =
        i < num_angles ? std::pow(theta, -static_cast<double>(i) / static_cast<double>(half)) : 0.0;
    for (int64_t position = 0; position < positions; ++position) {
      const double angle = static_cast<double>(position) * frequency;
      cosine[position * half + i] = static_cast<float>(std::cos(angle));
      sine[position * half + i] = static_cast<float>(std::sin(angle));
    }
  }
  RotaryTable result{.rotary_dim = rotary_dim, .positions_max = limits_.positions_max};
  for (const auto& [table, member] : {std::pair{&cosine, &result.cosine}, {&sine, &result.sine}}) {
    CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Buffer> buffer,
                              backend_.LoadVector({.data = table->data(),
                                                   .dtype = DType::kF32,
                                                   .rows = 1,
                                                   .cols = static_cast<int64_t>(table->size())}),
                              "rotary table");
    *member = static_cast<const float*>(buffer->data());
    buffers_bytes_ += buffer->size_bytes();
    buffers_.push_back(std::move(buffer));
  }
  CINNABAR_RETURN_IF_ERROR(backend_.Synchronize());  // the tables of this function go
  return result;
}

absl::StatusOr<std::unique_ptr<Denoiser>> LoadDenoiser(const std::string& directory,
                                                       Backend& backend, const LoadOptions& options,
                                                       const ForwardLimits& limits) {
  CINNABAR_CHECK(limits.rows_max > 0 && limits.sequences_max > 0 && limits.positions_max > 0);
  CINNABAR_ASSIGN_OR_RETURN(const CheckpointFacts facts, ReadCheckpointFacts(directory));
  CINNABAR_ASSIGN_OR_RETURN(ModelSpec spec, ReadModelSpec(facts));
  CINNABAR_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(directory));
  std::vector<std::string> problems = CheckTensors(checkpoint, spec);
  if (!problems.empty()) {
    const size_t num_problems = problems.size();
    problems.resize(std::min<size_t>(num_problems, 5));
    return absl::InvalidArgumentError(
        absl::StrCat(directory, ": ", absl::StrJoin(problems, "; "),
                     num_problems > problems.size()
                         ? absl::StrCat("; and ", num_problems - problems.size(), " more")
                         : ""));
  }
  ForwardLimits within = limits;
  within.positions_max = std::min(limits.positions_max, spec.traits.positions_max);
  const auto make = spec.body == BodyKind::kDiT     ? &MakeDiTBody
                    : spec.body == BodyKind::kGemma ? &MakeGemmaBody
                                                    : &MakeDecoderBody;
  std::unique_ptr<Body> body = make(std::move(spec), std::move(checkpoint), backend, within);
  CINNABAR_RETURN_IF_ERROR(body->Load(options), directory);
  return std::unique_ptr<Denoiser>(std::move(body));
}

// --- Running
// ---------------------------------------------------------------------------------------------

float Body::attention_scale() const {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(spec_.head_dim)));
}

KvShape Body::SequenceKvShape(int32_t positions, KvReuse reuse) const {
  return KvShapeOf(spec_, positions, reuse);
}

absl::Status Body::CheckBatch(const ForwardBatch& batch) const {
  const auto num_rows = static_cast<int64_t>(batch.ids.size());
  const auto num_sequences = static_cast<int64_t>(batch.sequences.size());
  CINNABAR_CHECK(num_rows > 0 && num_rows <= limits_.rows_max) << num_rows << " rows";
  CINNABAR_CHECK(num_sequences > 0 && num_sequences <= limits_.sequences_max)
      << num_sequences << " sequences";
  CINNABAR_CHECK(!spec_.traits.conditioned_on_sigma ||
                 batch.sigmas.size() == batch.sequences.size())
      << "one sigma a sequence";
  int64_t row = 0;
  for (const SequenceSpan& sequence : batch.sequences) {
    CINNABAR_CHECK(sequence.row_begin == row && sequence.num_rows > 0) << "sequences leave a gap";
    CINNABAR_CHECK(sequence.kv != nullptr && sequence.first_position >= 0);
    CINNABAR_CHECK(spec_.traits.causal_encoder
                       ? sequence.block_length == 0 || sequence.block_length == 1
                       : sequence.block_length == spec_.traits.causal_block_length)
        << "block length " << sequence.block_length;
    CINNABAR_CHECK(int64_t{sequence.first_position} + sequence.num_rows <= KeysEnd(sequence) &&
                   KeysEnd(sequence) <= limits_.positions_max)
        << "positions " << sequence.first_position << " + " << sequence.num_rows << " of "
        << KeysEnd(sequence);
    row += sequence.num_rows;
  }
  CINNABAR_CHECK(row == num_rows) << "sequences have " << row << " of " << num_rows << " rows";
  int64_t before = -1;
  for (const int32_t wanted : batch.wanted_rows) {
    CINNABAR_CHECK(wanted > before && wanted < num_rows) << "wanted row " << wanted;
    before = wanted;
  }
  // Ids come from requests.
  for (const TokenId id : batch.ids) {
    if (id < 0 || id >= spec_.traits.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          "token id ", id, " is not below the ", spec_.traits.vocab_size, " of the vocabulary"));
    }
  }
  return absl::OkStatus();
}

absl::Span<const SequenceSpan> Body::WantedSequences(const ForwardBatch& batch,
                                                     absl::Span<const SequenceSpan> sequences) {
  wanted_sequences_.clear();
  size_t next = 0;
  for (const SequenceSpan& sequence : sequences) {
    SequenceSpan wanted = sequence;
    wanted.row_begin = static_cast<int32_t>(next);
    const int32_t end = sequence.row_begin + sequence.num_rows;
    while (next < batch.wanted_rows.size() && batch.wanted_rows[next] < end) ++next;
    wanted.num_rows = static_cast<int32_t>(next) - wanted.row_begin;
    if (wanted.num_rows > 0) wanted_sequences_.push_back(wanted);
  }
  return wanted_sequences_;
}

absl::Status Body::GatherWanted(const ForwardBatch& batch) {
  CINNABAR_RETURN_IF_ERROR(backend_.GatherRows({.x = residual_,
                                                .dim = spec_.dim,
                                                .row_indices = batch.wanted_rows,
                                                .out = wanted_residual_}));
  return backend_.GatherRows({.x = attention_,
                              .dim = WidestQ(spec_),
                              .row_indices = batch.wanted_rows,
                              .out = wanted_attention_});
}

absl::Status Body::Attention(absl::Span<const SequenceSpan> sequences, int64_t num_rows,
                             int32_t layer, const Weight& qkv, const float* qkv_bias,
                             const float* q_norm, const float* k_norm, bool keys_and_values_only) {
  CINNABAR_RETURN_IF_ERROR(backend_.Linear(
      {.x = normed_, .num_rows = num_rows, .weight = &qkv, .bias = qkv_bias, .out = qkv_}));
  CINNABAR_RETURN_IF_ERROR(backend_.PrepareHeads({.qkv = qkv_,
                                                  .num_rows = num_rows,
                                                  .heads = heads(),
                                                  .q_norm = q_norm,
                                                  .k_norm = k_norm,
                                                  .norm_eps = spec_.norm_eps,
                                                  .rotary = rotary_,
                                                  .sequences = sequences,
                                                  .layer = layer}));
  if (keys_and_values_only) return absl::OkStatus();
  return backend_.Attend({.q = qkv_,
                          .num_rows = num_rows,
                          .heads = heads(),
                          .scale = attention_scale(),
                          .sequences = sequences,
                          .layer = layer,
                          .out = attention_});
}

void Body::RememberWanted(const ForwardBatch& batch) {
  num_wanted_ = static_cast<int32_t>(batch.wanted_rows.size());
  wanted_ids_.clear();
  wanted_sigmas_.clear();
  size_t sequence = 0;
  for (const int32_t row : batch.wanted_rows) {
    while (row >= batch.sequences[sequence].row_begin + batch.sequences[sequence].num_rows)
      ++sequence;
    wanted_ids_.push_back(batch.ids[row]);
    wanted_sigmas_.push_back(batch.sigmas.empty() ? 0.0F : batch.sigmas[sequence]);
  }
}

absl::Status Body::EnqueueForward(const DenoiserPass& pass) {
  const ForwardBatch& batch = pass.batch;
  num_wanted_ = 0;
  CINNABAR_RETURN_IF_ERROR(CheckBatch(batch));
  CINNABAR_RETURN_IF_ERROR(backend_.BeginStep());
  if (pass.selections.empty()) {
    CINNABAR_RETURN_IF_ERROR(backend_.Embed(*embedding_, batch.ids, embedding_scale_, residual_));
  } else {
    auto* ids = static_cast<int32_t*>(ids_.data);
    CINNABAR_RETURN_IF_ERROR(backend_.SelectTransfers({.selections = pass.selections,
                                                       .candidates = pass.candidates,
                                                       .known = batch.ids,
                                                       .ids = ids,
                                                       .chosen = pass.chosen}));
    CINNABAR_RETURN_IF_ERROR(backend_.EmbedChosen(
        *embedding_, ids, static_cast<int64_t>(batch.ids.size()), embedding_scale_, residual_));
  }
  CINNABAR_RETURN_IF_ERROR(RunLayers(batch));
  RememberWanted(batch);
  return absl::OkStatus();
}

absl::Status Body::EnqueueAnswers(absl::Span<const VocabularyQuery> queries,
                                  absl::Span<VocabularyAnswer> answers) {
  CINNABAR_CHECK(queries.size() == answers.size() &&
                 queries.size() <= kQueriesPerRowMax * static_cast<size_t>(limits_.rows_max));
  for (const VocabularyQuery& query : queries) {
    CINNABAR_CHECK(query.hidden_row >= 0 && query.hidden_row < num_wanted_ &&
                   query.unconditional_row < num_wanted_)
        << "hidden rows " << query.hidden_row << ", " << query.unconditional_row << " of "
        << num_wanted_;
  }
  if (queries.empty()) return absl::OkStatus();
  return backend_.AnswerVocabulary({.hidden = hidden_,
                                    .weight = head_.get(),
                                    .bias = AsFloats(head_bias_),
                                    .logit_cap = spec_.logit_cap,
                                    .queries = queries,
                                    .answers = answers});
}

absl::Status Body::Begin(const DenoiserPass& pass) {
  CINNABAR_RETURN_IF_ERROR(EnqueueForward(pass));
  CINNABAR_RETURN_IF_ERROR(EnqueueAnswers(pass.queries, pass.answers));
  return backend_.EndStep();
}

absl::Status Body::Await() { return backend_.WaitStep(); }

absl::Status Body::Forward(const ForwardBatch& batch) {
  CINNABAR_RETURN_IF_ERROR(EnqueueForward({.batch = batch}));
  return backend_.Synchronize();
}

absl::Status Body::Answer(absl::Span<const VocabularyQuery> queries,
                          absl::Span<VocabularyAnswer> answers) {
  CINNABAR_RETURN_IF_ERROR(EnqueueAnswers(queries, answers));
  return queries.empty() ? absl::OkStatus() : backend_.Synchronize();
}

absl::Status Body::Logits(int32_t begin, int32_t count, absl::Span<float> out) {
  const int64_t vocab_size = spec_.traits.vocab_size;
  CINNABAR_CHECK(begin >= 0 && count >= 0 && count <= num_wanted_ - begin)
      << "hidden rows " << begin << " + " << count << " of " << num_wanted_;
  CINNABAR_CHECK(static_cast<int64_t>(out.size()) == count * vocab_size);
  for (int32_t done = 0; done < count; done += logits_rows_) {
    const int64_t num_rows = std::min(logits_rows_, count - done);
    Rows hidden = hidden_;
    hidden.data = static_cast<char*>(hidden_.data) +
                  int64_t{begin + done} * hidden_.stride * BytesOf(hidden_.dtype);
    CINNABAR_RETURN_IF_ERROR(backend_.Logits({.hidden = hidden,
                                              .num_rows = num_rows,
                                              .weight = head_.get(),
                                              .bias = AsFloats(head_bias_),
                                              .logit_cap = spec_.logit_cap,
                                              .out = logits_}));
    CINNABAR_RETURN_IF_ERROR(
        backend_.Download(logits_.data, out.subspan(done * vocab_size, num_rows * vocab_size)));
  }
  const Parameterization kind = spec_.traits.parameterization;
  if (kind != Parameterization::kAbsorbScore && kind != Parameterization::kUniformScore) {
    return absl::OkStatus();
  }
  for (int32_t row = 0; row < count; ++row) {
    const absl::Span<float> scores = out.subspan(row * vocab_size, vocab_size);
    const double offset = OutputOffset(wanted_sigmas_[begin + row]);
    for (float& score : scores) score = static_cast<float>(score - offset);
    scores[wanted_ids_[begin + row]] = 0.0F;
  }
  return absl::OkStatus();
}

double Body::OutputOffset(float sigma) const {
  if (!spec_.scale_by_sigma) return 0.0;
  // ln(e^sigma - 1), without overflow for large sigma.
  const double s = sigma;
  const double log_expm1 = s < 1.0 ? std::log(std::expm1(s)) : s + std::log1p(-std::exp(-s));
  return log_expm1 + std::log(spec_.traits.vocab_size - 1.0);
}

Denoiser::Memory Body::memory() const {
  return {.weights_bytes = weights_bytes_,
          .workspace_bytes = buffers_bytes_ + backend_.WorkspaceBytes(WorkspaceFor(spec_, limits_)),
          .kv_bytes_per_position =
              KvBytesPerPosition(spec_, limits_.positions_max, KvReuse::kExact, backend_),
          .reused_kv_bytes_per_position =
              KvBytesPerPosition(spec_, limits_.positions_max, KvReuse::kPrefix, backend_),
          .prediction_bytes = 2 * PredictionBytes(spec_, backend_)};
}

}  // namespace cinnabar
