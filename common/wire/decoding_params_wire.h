// DecodingParams to and from the wire. A field that the wire leaves out has the struct's default.
#ifndef CINNABAR_COMMON_WIRE_DECODING_PARAMS_WIRE_H_
#define CINNABAR_COMMON_WIRE_DECODING_PARAMS_WIRE_H_

#include "absl/status/statusor.h"
#include "cinnabar/v1/sequence.pb.h"
#include "common/request/decoding_params.h"

namespace cinnabar {

// Ranges are not checked here: ResolveParams does that against the model. InvalidArgument: more
// than kForbiddenIdsMax forbidden ids.
absl::StatusOr<DecodingParams> FromWire(const v1::DecodingParams& wire);
v1::DecodingParams ToWire(const DecodingParams& params);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_WIRE_DECODING_PARAMS_WIRE_H_
