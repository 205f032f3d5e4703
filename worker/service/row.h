// One request as a worker runs it: from the queue's bytes to a sequence, from a step to the delta
// that is published, and back from deltas to the sequence, exactly. Pure.
#ifndef CINNABAR_WORKER_SERVICE_ROW_H_
#define CINNABAR_WORKER_SERVICE_ROW_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "cinnabar/v1/work.pb.h"
#include "common/queue/types.h"
#include "worker/engine/engine.h"

namespace cinnabar {

// What a row needs to know besides its sequence.
struct RowFacts {
  int32_t length = 0;  // as asked for; a block-causal sequence may be longer
  int32_t answer_begin = 0;
  int32_t answer_end = 0;
  bool stop_at_end_of_text = false;
  int32_t steps_budget = 0;  // what the scheduler lowered it to; 0: as asked for
};

struct RowPlan {
  RowFacts facts;
  SequenceState state;
};

// The row as it stood when its last step was published. `steps_budget` is what the pack grants it:
// it holds for a row without steps; a later attempt goes on with what the first had.
// FailedPrecondition: the item is for other weights than `fingerprint`: hand it back.
// InvalidArgument, DataLoss: it can never run here or elsewhere; the message holds no user text.
absl::StatusOr<RowPlan> BuildRow(const StartedRow& started, int32_t steps_budget,
                                 const ModelTraits& model, absl::string_view fingerprint);

// What one step did, an event of `report`; `after` is the state behind it.
v1::StepDelta MakeDelta(const StepReport& report, const StepEvent& event,
                        const SequenceState& after, const RowFacts& facts, const ModelTraits& model,
                        absl::Duration step_time, const Usage& usage);

// Makes the step of `delta` on `state`. DataLoss: it does not fit.
absl::Status ApplyDelta(const v1::StepDelta& delta, const ModelTraits& model, SequenceState& state);

// Whether the answer's text can no longer change though the sequence is not finished: an
// end-of-text token of it is final, and so is all before.
bool AnswerIsComplete(const SequenceState& state, const RowFacts& facts, const ModelTraits& model);

v1::WorkResult MakeResult(const SequenceState& state, const RowFacts& facts,
                          const ModelTraits& model, const Usage& usage);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_ROW_H_
