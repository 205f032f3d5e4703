// The batched denoising loop: many sequences, one forward pass a turn, each on its own step, block,
// sampler and length. A sequence joins and leaves between any two turns; what it computes does not
// depend on who else is there.
#ifndef CINNABAR_WORKER_ENGINE_ENGINE_H_
#define CINNABAR_WORKER_ENGINE_ENGINE_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "worker/decoding/sampler.h"
#include "worker/engine/prefix_cache.h"
#include "worker/engine/sequence_state.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

struct EngineOptions {
  ForwardLimits limits;  // those that the denoiser was loaded with
  int64_t kv_bytes_max = int64_t{1} << 31;
  // Exact reuse of the keys and values of finished blocks (block-causal models). Off recomputes
  // every position each step, for tests and benchmarks: same bytes, more work.
  bool block_cache = true;
  // With block_cache: a sequence whose first blocks another has had, or has, takes over their keys
  // and values. Those of sequences that have ended stay while kv_bytes_max has room. Same bytes.
  bool prefix_reuse = true;
};

// Counts since the engine was made. Rows are positions computed in a forward pass.
struct EngineCounters {
  int64_t forwards = 0;
  int64_t rows_computed = 0;
  int64_t rows_answered = 0;     // that went through the vocabulary head
  int64_t rows_prefilled = 0;    // of rows_computed: positions already final, computed for their KV
  int64_t positions_reused = 0;  // whose KV was taken over from another sequence
  int64_t steps = 0;             // denoising steps, summed over sequences
  int64_t tokens_committed = 0;  // less those that were masked again
  int64_t sequences_finished = 0;
  int64_t sequences_failed = 0;  // cancelled and expired ones included
};

using SequenceId = int64_t;

// What one turn did to one sequence.
struct StepEvent {
  SequenceId sequence = 0;
  int32_t step = 0;  // index of the step that was made; events of a sequence count up without gaps
  int32_t transfers_begin = 0;  // range in StepReport::transfers
  int32_t transfers_end = 0;
  int32_t edits_begin = 0;  // range in StepReport::edits
  int32_t edits_end = 0;
  bool forward = false;     // the step made a forward pass
  bool settled = false;     // StepOutcome::settled
  bool whole_pass = false;  // kv_reuse: the pass computed the whole open block
  bool stays_open = false;  // StepOutcome::stays_open
  BlockRange block;         // the open block of the step
  bool finished = false;    // the last event of this sequence: complete when `status` is OK
  absl::Status status;      // Cancelled, DeadlineExceeded, or DataLoss (the network gave NaN)
};

struct StepReport {
  std::vector<StepEvent> events;
  std::vector<Transfer> transfers;
  std::vector<TokenEdit> edits;  // StepOutcome::edits
  int32_t rows = 0;              // of this turn's forward passes
  int32_t num_forwards = 0;

  absl::Span<const Transfer> TransfersOf(const StepEvent& event) const {
    return absl::MakeConstSpan(transfers).subspan(event.transfers_begin,
                                                  event.transfers_end - event.transfers_begin);
  }
  absl::Span<const TokenEdit> EditsOf(const StepEvent& event) const {
    return absl::MakeConstSpan(edits).subspan(event.edits_begin,
                                              event.edits_end - event.edits_begin);
  }
};

// One thread at a time. After warm-up (every sequence had a turn) Step() allocates nothing.
class Engine {
 public:
  // `denoiser` is borrowed and outlives the engine.
  Engine(Denoiser& denoiser, const EngineOptions& options);
  ~Engine();

  // Takes a new or a resumed sequence; it takes part from the next Step(). ResourceExhausted: no
  // row, sequence slot or KV memory is left now (try again when one has finished). InvalidArgument:
  // it can never fit, or asks for what the model cannot do.
  absl::StatusOr<SequenceId> Add(SequenceState state, absl::Time deadline = absl::InfiniteFuture());

  // The sequence ends with Cancelled in the next Step(). False: no such sequence.
  bool Cancel(SequenceId sequence);

  // The state between two turns; valid until the next call. Null: no such sequence (it has ended).
  const SequenceState* Find(SequenceId sequence) const;

  // Takes the sequence out and gives its state back, for handing it to another worker. NotFound.
  absl::StatusOr<SequenceState> Remove(SequenceId sequence);

  // One turn: every sequence makes one denoising step (a long prompt may first take turns of its
  // own to be encoded, and one that came in with steps in its open block makes those again where
  // the network reads its last prediction). `report` is overwritten. An error is the device's:
  // sequences without an event in the report have not changed, so the turn may be repeated, or the
  // sequences removed and resumed elsewhere. A failure of one sequence is in its event and disturbs
  // no other. Sequences that ended are forgotten afterwards; their last state is in TakeFinished().
  absl::Status Step(absl::Time now, StepReport& report);

  // States of sequences that ended in the last Step(), in the order of their events.
  std::vector<std::pair<SequenceId, SequenceState>> TakeFinished();

  int64_t kv_bytes() const { return kv_bytes_; }  // in use, by sequences that run
  int32_t num_sequences() const { return static_cast<int32_t>(active_.size()); }
  const EngineCounters& counters() const { return counters_; }

 private:
  struct Sequence;
  struct Scratch;

  struct RowRange {  // positions that the next pass computes
    int32_t begin = 0;
    int32_t end = 0;
  };

  absl::Status ReusePrefix(Sequence& sequence);
  bool SharesPrefixes(const Sequence& sequence) const;
  void Retire(Sequence& sequence);
  void RepeatOpenBlock(Sequence& sequence);
  static void ReserveMemory(Sequence& sequence);
  static void Restore(Sequence& sequence);
  static void KeepPrediction(Sequence& sequence);
  void EndSequence(Sequence& sequence, absl::Status status, StepReport& report);
  void PlanUntilForward(Sequence& sequence, StepReport& report);
  RowRange RowsOf(const Sequence& sequence) const;
  void AppendToBatch(Sequence& sequence);
  void AppendHalves(Sequence& sequence);
  void AppendSpan(Sequence& sequence, bool unconditional);
  void AppendQuery(const Sequence& sequence, const PositionQuery& position_query);
  absl::Status RunBatch(StepReport& report);
  void Conclude(Sequence& sequence, absl::Span<const VocabularyAnswer> answers, bool forward,
                StepReport& report);

  Denoiser& denoiser_;
  const ModelTraits& model_;
  const EngineOptions options_;
  SequenceId next_id_ = 1;
  int64_t kv_bytes_ = 0;
  PrefixCache prefixes_;  // with kv_bytes_ within kv_bytes_max
  EngineCounters counters_;
  std::vector<std::unique_ptr<Sequence>> active_;  // in the order of arrival
  std::vector<std::pair<SequenceId, SequenceState>> finished_;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_ENGINE_ENGINE_H_
