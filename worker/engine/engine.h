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
  // Begins a step's forward pass before the step before it is concluded, where samplers can
  // describe what they will decide and the denoiser RunsAhead(): a device does not wait for its
  // host. Same bytes. A sequence that comes in between two passes makes its first step a turn
  // later.
  bool look_ahead = false;
  // While a threshold leaves open whether a block will be full, a pass ahead asks for the block and
  // for the one behind it, one of them for nothing. No look ahead where that were more queries (of
  // all sequences) than this: a device computes some more rows in the time in which it reads its
  // weights, but no more.
  int32_t spare_queries_max = 256;
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
  int64_t ahead_used = 0;     // steps, summed over sequences, that took the answers of a pass ahead
  int64_t ahead_dropped = 0;  // parts of passes ahead that no step took
  int64_t rows_wasted = 0;    // of rows_computed: that no step took
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
  // the network reads its last prediction; with look_ahead, one that no pass under way computes
  // waits for the next). `report` is overwritten. An error is the device's:
  // sequences without an event in the report have not changed, so the turn may be repeated, or the
  // sequences removed and resumed elsewhere. A failure of one sequence is in its event and disturbs
  // no other. Sequences that ended are forgotten afterwards; their last state is in TakeFinished().
  absl::Status Step(absl::Time now, StepReport& report);

  // States of sequences that ended in the last Step(), in the order of their events.
  std::vector<std::pair<SequenceId, SequenceState>> TakeFinished();

  int64_t kv_bytes() const { return kv_bytes_; }  // in use, by sequences that run
  int32_t num_sequences() const { return static_cast<int32_t>(active_.size()); }
  bool pass_under_way() const;  // look_ahead: since the last Step()
  const EngineCounters& counters() const { return counters_; }

 private:
  struct Sequence;
  struct Member;
  struct Pass;
  struct Outlook;

  struct RowRange {  // positions that a pass computes
    int32_t begin = 0;
    int32_t end = 0;
    int32_t size() const { return end - begin; }
    bool operator==(const RowRange&) const = default;
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
  RowRange RowsOf(const StepPlan& plan, BlockRange block, int32_t kv_final) const;
  bool HasRoom(const Pass& pass, int32_t num_rows, int32_t num_spans) const;
  bool Append(Sequence& sequence, Pass& pass) const;
  void AppendHalves(Sequence& sequence, Pass& pass) const;
  void AppendSpan(Sequence& sequence, bool unconditional, Pass& pass) const;
  VocabularyQuery QueryFor(const SequenceState& state, const PositionQuery& wanted, int32_t step,
                           std::vector<VocabularyRule>& rules) const;
  bool Suppose(const Sequence& sequence, bool transfers_all, Outlook& outlook);
  bool AppendAhead(const Pass& pass, const Member& member, Pass& ahead);
  bool PlanAhead(const Pass& pass, absl::Span<Sequence* const> waiting, Pass& ahead);
  template <typename Visit>
  static void ForEachAnswer(const Pass& pass, const Member& member, const Visit& visit);
  bool IsCovered(const Sequence& sequence);
  static bool ReadTheCanvas(const Pass& pass, const Member& member, RowRange rows);
  void Detach(Sequence& sequence);
  void DropPasses();
  absl::Status Begin(Pass& pass);
  absl::Status Finish(Pass& pass, StepReport& report);
  absl::Status MakeTurn(absl::Time now, StepReport& report);
  void Conclude(Sequence& sequence, absl::Span<const VocabularyAnswer> answers, bool forward,
                StepReport& report);

  Denoiser& denoiser_;
  const ModelTraits& model_;
  const EngineOptions options_;
  const bool looks_ahead_;
  const TokenId placeholder_;
  SequenceId next_id_ = 1;
  int64_t kv_bytes_ = 0;
  PrefixCache prefixes_;  // with kv_bytes_ within kv_bytes_max
  EngineCounters counters_;
  std::vector<std::unique_ptr<Sequence>> active_;  // in the order of arrival
  std::vector<std::pair<SequenceId, SequenceState>> finished_;
  // Between turns a pass ahead may be under way: pass_.
  std::unique_ptr<Pass> pass_;
  std::unique_ptr<Pass> next_;
  // Of one call, kept for their capacity.
  std::vector<Sequence*> waiting_;
  std::vector<VocabularyAnswer> answers_;
  std::vector<VocabularyRule> rules_;
  std::vector<Outlook> outlooks_;
  StepOutcome outcome_;
  int32_t spare_queries_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_ENGINE_ENGINE_H_
