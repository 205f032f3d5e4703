// ModelTraits to and from the wire.
#ifndef CINNABAR_COMMON_WIRE_MODEL_TRAITS_WIRE_H_
#define CINNABAR_COMMON_WIRE_MODEL_TRAITS_WIRE_H_

#include "absl/status/statusor.h"
#include "cinnabar/v1/work.pb.h"
#include "common/request/sampler_catalog.h"

namespace cinnabar {

// InvalidArgument: a parameterization that this build does not know.
absl::StatusOr<ModelTraits> FromWire(const v1::ModelTraits& wire);
v1::ModelTraits ToWire(const ModelTraits& traits);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_WIRE_MODEL_TRAITS_WIRE_H_
