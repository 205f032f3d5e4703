// A loaded diffusion transformer: token ids in, statistics over the vocabulary out. One forward
// pass serves many sequences of different lengths, packed row after row.
#ifndef CINNABAR_WORKER_MODEL_DENOISER_H_
#define CINNABAR_WORKER_MODEL_DENOISER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/request/sampler_catalog.h"
#include "kernels/backend.h"

namespace cinnabar {

// How the weights are kept in memory; products are computed in float32 whatever this says.
struct LoadOptions {
  std::optional<DType> weight_dtype;  // empty: as the checkpoint stores them
};

// Largest forward pass that will be asked for; scratch is taken for it at load.
struct ForwardLimits {
  int32_t rows_max = 2048;  // packed rows of one forward pass
  int32_t sequences_max = 64;
  int32_t positions_max = 2048;  // longest sequence; at most the model's own limit
};

// As many queries Answer() takes for each of rows_max.
inline constexpr int32_t kQueriesPerRowMax = 3;

// What one step of a block hands to the next, for networks that read their own last prediction.
// Buffers are of SelfConditioningBytes().
struct SelfConditioning {
  const Buffer* previous = nullptr;  // what the step before left; null: the block's first step
  float temperature = 1.0F;          // of the prediction that is read
  Buffer* next = nullptr;            // gets what the next step reads; every row is wanted then
};

// One forward pass. Spans are host memory, borrowed for the call.
struct ForwardBatch {
  absl::Span<const TokenId> ids;             // [rows], packed
  absl::Span<const SequenceSpan> sequences;  // rows in order, without gaps; `kv` set by the caller
  // [sequences]; read by networks conditioned on it, else may be empty.
  absl::Span<const float> sigmas = {};
  // Packed rows whose final hidden state is wanted, ascending. Empty: only keys and values are
  // computed.
  absl::Span<const int32_t> wanted_rows = {};
  // [sequences] or empty; read for open blocks of networks that have such a thing.
  absl::Span<const SelfConditioning> self_conditioning = {};
};

// A forward pass and its answers, to be had without waiting. Spans are host memory, borrowed until
// Await() returns for this pass.
struct DenoiserPass {
  ForwardBatch batch;
  // At most two for a row; hidden rows index into batch.wanted_rows.
  absl::Span<const VocabularyQuery> queries;
  absl::Span<VocabularyAnswer> answers;
  // A pass ahead: what is selected of the answers of the pass begun before this one becomes part of
  // batch.ids (SelectTransfersArgs: `candidates` name its rows). Where there are selections,
  // `chosen` [rows] gets the ids that were read.
  absl::Span<const TransferSelection> selections = {};
  absl::Span<const TransferCandidate> candidates = {};
  absl::Span<TokenId> chosen = {};
};

class Denoiser {
 public:
  virtual ~Denoiser() = default;

  virtual const ModelTraits& traits() const = 0;
  virtual Backend& backend() const = 0;

  // Shape of the KvMemory that one sequence of up to `positions` needs. Block-causal models, and
  // any `reuse` but the exact one, keep all layers (the cache); else a full-attention model needs
  // one layer, overwritten by each layer in turn.
  virtual KvShape SequenceKvShape(int32_t positions, KvReuse reuse) const = 0;

  // Device memory of one SelfConditioning buffer; 0: the network does not read its last prediction.
  virtual int64_t SelfConditioningBytes() const { return 0; }

  // Runs the network. Afterwards hidden row i of Answer() and Logits() is the final, normed state
  // of packed row wanted_rows[i], until the next Forward(). For block-causal sequences the keys and
  // values of all rows are in their KvMemory, as for any sequence whose memory keeps all layers; a
  // full-attention one without those starts at position 0. Where traits().causal_encoder, rows to
  // encode are a span of block_length 1, wanted by nobody, and an open block is a span of
  // block_length 0; a sequence may have both in one pass, in that order.
  // Synchronizes. InvalidArgument for an id outside the vocabulary; any other misfit of the batch
  // is the caller's bug.
  virtual absl::Status Forward(const ForwardBatch& batch) = 0;

  // Fills answers for queries, at most kQueriesPerRowMax * rows_max, whose hidden rows index into
  // wanted_rows.
  // Synchronizes.
  virtual absl::Status Answer(absl::Span<const VocabularyQuery> queries,
                              absl::Span<VocabularyAnswer> answers) = 0;

  // Forward() and Answer() of one pass, which may return before the device has come so far. Await()
  // waits for the oldest pass begun; where RunsAhead(), another may be begun before that, no third,
  // and neither Forward() nor Answer() goes with a pass that was not waited for. After an error
  // nothing is under way.
  virtual absl::Status Begin(const DenoiserPass& pass) {
    const absl::Status status = Forward(pass.batch);
    return status.ok() ? Answer(pass.queries, pass.answers) : status;
  }
  virtual absl::Status Await() { return absl::OkStatus(); }
  virtual bool RunsAhead() const { return false; }

  // Float32 logits of hidden rows [begin, begin + count), unshifted, as the network gives them: for
  // SEDD the log-scores (scaled, own entry 0). `out` is host memory, [count, vocab_size].
  // Synchronizes.
  virtual absl::Status Logits(int32_t begin, int32_t count, absl::Span<float> out) = 0;

  // What the network subtracts from every logit at this noise level (SEDD with scale_by_sigma:
  // ln(e^sigma - 1)
  // + ln(V - 1)); else 0. Answer() leaves it out of log_sum_exp: the caller subtracts it.
  virtual double OutputOffset(float sigma) const = 0;

  struct Memory {
    int64_t weights_bytes = 0;
    int64_t workspace_bytes = 0;        // activations and scratch for the limits given at load
    int64_t kv_bytes_per_position = 0;  // one sequence; with guidance there are two
    int64_t reused_kv_bytes_per_position = 0;  // one with any KvReuse but the exact one
    int64_t prediction_bytes = 0;              // beside them: both SelfConditioning buffers
  };
  virtual Memory memory() const = 0;
};

// Loads the Hugging Face folder `directory` (config.json, *.safetensors). Errors name file, tensor
// or field: NotFound, InvalidArgument (broken files, shapes that do not fit), Unimplemented (an
// architecture or feature that is not supported, saying which), ResourceExhausted. `backend` is
// borrowed and outlives the model.
absl::StatusOr<std::unique_ptr<Denoiser>> LoadDenoiser(const std::string& directory,
                                                       Backend& backend, const LoadOptions& options,
                                                       const ForwardLimits& limits);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_DENOISER_H_
