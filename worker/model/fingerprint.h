// Names a model and its weights, so that a request that began with some never goes on with others.
#ifndef CINNABAR_WORKER_MODEL_FINGERPRINT_H_
#define CINNABAR_WORKER_MODEL_FINGERPRINT_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace cinnabar {

// 32 hexadecimal digits of a SHA-256 over config.json, the names, sizes and headers of the weight
// files, and pages spread over their data (a whole checkpoint would take minutes): another training
// run, another quantisation and a file that was cut all show. `variant` tells apart what computes
// differently from the same files: Backend::Numerics() and weight type. NotFound: no such folder, or no weights
// in it.
absl::StatusOr<std::string> ModelFingerprint(const std::string& directory,
                                             absl::string_view variant);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_FINGERPRINT_H_
