// The ops of kernels/backend.h written down as their contracts read, one row after another, sums in
// double. Slow; for tests of the forward pass that should not depend on a real backend. Vocabulary
// answers are not given: Logits() says everything a test of the network needs.
#ifndef CINNABAR_TESTS_UNIT_MODEL_REFERENCE_BACKEND_H_
#define CINNABAR_TESTS_UNIT_MODEL_REFERENCE_BACKEND_H_

#include <memory>

#include "kernels/backend.h"

namespace cinnabar {

std::unique_ptr<Backend> MakeReferenceBackend();

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_UNIT_MODEL_REFERENCE_BACKEND_H_
