// A sequence as it stands between two denoising steps, and its wire form: what is snapshotted,
// handed to another worker and resumed to the same bytes.
#ifndef CINNABAR_WORKER_ENGINE_SEQUENCE_STATE_H_
#define CINNABAR_WORKER_ENGINE_SEQUENCE_STATE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "cinnabar/v1/sequence.pb.h"
#include "common/request/decoding_params.h"
#include "common/request/sampler_catalog.h"
#include "worker/decoding/canvas.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {

struct SequenceState {
  Canvas canvas;
  DecodingParams params;  // resolved against the model
  DecodingState decoding;
};

// A new sequence. Undecided positions are those with given[i] == false; their ids are ignored.
// A canvas that reaches the end of a block-causal model's sequence is lengthened to whole blocks,
// as SDAR does (what the added positions become is decided with the rest and not part of the
// answer). InvalidArgument names the field and the fix.
absl::StatusOr<SequenceState> MakeSequence(absl::Span<const TokenId> ids,
                                           const std::vector<bool>& given,
                                           const DecodingParams& params, const ModelTraits& model);

// `model_fingerprint` names model and weights; FromWire refuses a state of another.
v1::SequenceState ToWire(const SequenceState& state, absl::string_view model_fingerprint);

// Checks everything that decoding relies on, so that a hostile or stale message is an error
// (InvalidArgument, FailedPrecondition for another model or format) and never a crash.
absl::StatusOr<SequenceState> FromWire(const v1::SequenceState& wire, const ModelTraits& model,
                                       absl::string_view model_fingerprint);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_ENGINE_SEQUENCE_STATE_H_
