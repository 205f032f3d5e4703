// The vocabulary head's loops for generic; the flags are in CMakeLists.txt.

#include "kernels/cpu/vocabulary_kernels.h"

namespace cinnabar::cpu {
namespace {
#include "kernels/cpu/vocabulary_kernels.inc"
}  // namespace

extern const VocabularyKernels kVocabularyGeneric = kKernels;

}  // namespace cinnabar::cpu
