// What the bodies share: reading weights into a backend, the embedding, the wanted rows, the
// vocabulary head. A body adds its layers.
#ifndef CINNABAR_WORKER_MODEL_BODY_H_
#define CINNABAR_WORKER_MODEL_BODY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "worker/model/checkpoint.h"
#include "worker/model/denoiser.h"
#include "worker/model/model_spec.h"

namespace cinnabar {

// What matrices stored as `stored`, with rows of `cols`, are kept as where `wanted` is asked for
// (empty: as stored): blocks stay in their format where any block format is; one that rows do not
// fill gives way to Q8_0, and that to how they are stored.
DType KeptDType(DType stored, int64_t cols, std::optional<DType> wanted);

// Moves tensors of a checkpoint into a backend, letting go of the file's pages as it goes. Errors
// name the tensor.
class WeightLoader {
 public:
  WeightLoader(const Checkpoint& checkpoint, Backend& backend, std::optional<DType> dtype)
      : checkpoint_(checkpoint), backend_(backend), dtype_(dtype) {}

  // The matrices `names` as one weight, kept as KeptDType() says (F32 where they are not stored
  // alike and not all in block formats).
  absl::StatusOr<std::unique_ptr<Weight>> Matrix(const std::vector<std::string>& names,
                                                 RowOrder row_order = RowOrder::kStacked);
  // As Matrix(), for small ones on which much hangs (a router): dtype_ does not quantise them.
  absl::StatusOr<std::unique_ptr<Weight>> SmallMatrix(const std::vector<std::string>& names);
  // As Matrix(), for an expert's: left in the file where neither it nor dtype_ asks for a
  // conversion.
  absl::StatusOr<std::unique_ptr<Weight>> ExpertMatrix(const std::vector<std::string>& names,
                                                       RowOrder row_order = RowOrder::kStacked);
  // Experts whose matrices lie in one tensor [num_experts, rows, cols], rows those of `num_parts`
  // equal parts; each as ExpertMatrix() of its parts.
  absl::StatusOr<std::vector<std::unique_ptr<Weight>>> StackedExperts(const std::string& name,
                                                                      int32_t num_experts,
                                                                      int32_t num_parts,
                                                                      RowOrder row_order);
  absl::StatusOr<std::unique_ptr<Weight>> Embedding(const std::string& name);
  // The vectors `names` one after another, as floats.
  absl::StatusOr<std::unique_ptr<Buffer>> Vector(const std::vector<std::string>& names);
  // A vector computed here.
  absl::StatusOr<std::unique_ptr<Buffer>> Vector(absl::Span<const float> values);

  int64_t loaded_bytes() const { return loaded_bytes_; }

 private:
  absl::StatusOr<std::unique_ptr<Weight>> Load(const std::vector<std::string>& names,
                                               RowOrder row_order, std::optional<DType> wanted);

  const Checkpoint& checkpoint_;
  Backend& backend_;
  std::optional<DType> dtype_;
  int64_t loaded_bytes_ = 0;
};

inline const float* AsFloats(const std::unique_ptr<Buffer>& buffer) {
  return buffer == nullptr ? nullptr : static_cast<const float*>(buffer->data());
}

// Everything of a Denoiser but the layers.
class Body : public Denoiser {
 public:
  const ModelTraits& traits() const override { return spec_.traits; }
  Backend& backend() const override { return backend_; }
  KvShape SequenceKvShape(int32_t positions, KvReuse reuse) const override;
  absl::Status Forward(const ForwardBatch& batch) override;
  absl::Status Answer(absl::Span<const VocabularyQuery> queries,
                      absl::Span<VocabularyAnswer> answers) override;
  absl::Status Begin(const DenoiserPass& pass) override;
  absl::Status Await() override;
  // Noise levels are uploaded in the middle of a pass, which waits for it; a last prediction that
  // is read is the host's to swap.
  bool RunsAhead() const override {
    return !spec_.traits.conditioned_on_sigma && SelfConditioningBytes() == 0;
  }
  absl::Status Logits(int32_t begin, int32_t count, absl::Span<float> out) override;
  double OutputOffset(float sigma) const override;
  Memory memory() const override;

 protected:
  // `limits` is within what the model allows.
  Body(ModelSpec spec, Checkpoint checkpoint, Backend& backend, const ForwardLimits& limits);

  // Runs the layers: residual_ holds the embedded rows, hidden_ gets the final state of wanted
  // rows.
  virtual absl::Status RunLayers(const ForwardBatch& batch) = 0;
  // Loads what the body itself needs. Runs once, before any Forward().
  virtual absl::Status LoadLayers(WeightLoader& loader) = 0;

  const ModelSpec& spec() const { return spec_; }
  const ForwardLimits& limits() const { return limits_; }
  HeadShape heads() const {
    return {.num_heads = spec_.num_heads,
            .num_kv_heads = spec_.num_kv_heads,
            .head_dim = spec_.head_dim};
  }
  const RotaryTable& rotary() const { return rotary_; }
  float attention_scale() const;
  const Weight& head() const { return *head_; }
  const Weight& embedding() const { return *embedding_; }
  float embedding_scale() const { return embedding_scale_; }

  // Angles of position p: p * theta^(-2 i / rotary_dim) for i < num_angles, else 0.
  absl::StatusOr<RotaryTable> MakeRotaryTable(double theta, int32_t rotary_dim, int32_t num_angles);

  // A buffer for `rows` rows of `cols` activations (or floats), counted as workspace.
  absl::StatusOr<Rows> TakeRows(int64_t rows, int64_t cols, DType dtype);

  // The sequences of the wanted rows alone, as they lie once gathered; for ops that only ask which
  // modulation row a row has.
  absl::Span<const SequenceSpan> WantedSequences(const ForwardBatch& batch,
                                                 absl::Span<const SequenceSpan> sequences);

  // One layer's attention over all rows: `normed` [rows, dim] through `qkv` into attention_.
  absl::Status Attention(absl::Span<const SequenceSpan> sequences, int64_t num_rows, int32_t layer,
                         const Weight& qkv, const float* qkv_bias, const float* q_norm,
                         const float* k_norm, bool keys_and_values_only);

  // The wanted rows of residual_ and attention_ into wanted_residual_ and wanted_attention_: nobody
  // reads the other rows of the last layer.
  absl::Status GatherWanted(const ForwardBatch& batch);

  Rows residual_;          // [rows_max, dim], float32
  Rows normed_;            // [rows_max, dim]
  Rows qkv_;               // [rows_max, q | k | v]
  Rows attention_;         // [rows_max, heads * head_dim]
  Rows mlp_;               // [rows_max, mlp_dim]
  Rows wanted_residual_;   // [rows_max, dim], float32: the last layer's rows
  Rows wanted_attention_;  // [rows_max, heads * head_dim]
  Rows hidden_;            // [rows_max, dim]
  Rows router_logits_;     // [rows_max, num_experts], float32; these three where there are experts
  Rows chosen_experts_;    // int32 [rows_max, experts_per_token]
  Rows expert_weights_;    // [rows_max, experts_per_token], float32

 private:
  friend absl::StatusOr<std::unique_ptr<Denoiser>> LoadDenoiser(const std::string&, Backend&,
                                                                const LoadOptions&,
                                                                const ForwardLimits&);
  absl::Status Load(const LoadOptions& options);
  absl::Status LoadHead(WeightLoader& loader);
  absl::Status TakeWorkspace();
  absl::Status TakeRouting();
  absl::Status CheckBatch(const ForwardBatch& batch) const;
  absl::Status EnqueueForward(const DenoiserPass& pass);
  absl::Status EnqueueAnswers(absl::Span<const VocabularyQuery> queries,
                              absl::Span<VocabularyAnswer> answers);
  void RememberWanted(const ForwardBatch& batch);

  ModelSpec spec_;
  Checkpoint checkpoint_;  // the embedding may be read from its mapping
  Backend& backend_;
  ForwardLimits limits_;
  std::unique_ptr<Weight> embedding_;
  float embedding_scale_ = 1.0F;
  std::unique_ptr<Weight> head_;
  std::unique_ptr<Buffer> head_bias_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  RotaryTable rotary_;
  Rows ids_;     // int32 [rows_max]: of a pass ahead
  Rows logits_;  // a few rows of float32 logits
  int32_t logits_rows_ = 1;
  int64_t weights_bytes_ = 0;
  int64_t buffers_bytes_ = 0;

  int32_t num_wanted_ = 0;            // hidden rows of the last Forward()
  std::vector<TokenId> wanted_ids_;   // their own tokens
  std::vector<float> wanted_sigmas_;  // and noise levels
  std::vector<SequenceSpan> wanted_sequences_;
};

// What a body takes of its backend, from its spec alone. `limits` is within what the model allows.
WorkspaceShape WorkspaceFor(const ModelSpec& spec, const ForwardLimits& limits);
// Of one sequence, rounded up; those of the longest one over its positions.
int64_t KvBytesPerPosition(const ModelSpec& spec, int32_t positions_max, KvReuse reuse,
                           const Backend& backend);
int64_t PredictionBytes(const ModelSpec& spec, const Backend& backend);  // one SelfConditioning's
// Rows of logits that come out at a time, and their bytes.
int32_t LogitsRows(const ModelSpec& spec, const ForwardLimits& limits);
int64_t LogitsBytes(const ModelSpec& spec, const ForwardLimits& limits);

// In body_decoder.cc, body_dit.cc and body_gemma.cc.
std::unique_ptr<Body> MakeDecoderBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend,
                                      const ForwardLimits& limits);
std::unique_ptr<Body> MakeDiTBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend,
                                  const ForwardLimits& limits);
std::unique_ptr<Body> MakeGemmaBody(ModelSpec spec, Checkpoint checkpoint, Backend& backend,
                                    const ForwardLimits& limits);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_BODY_H_
