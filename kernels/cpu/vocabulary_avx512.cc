// The vocabulary head's loops for avx512; the flags are in CMakeLists.txt.
#include <immintrin.h>

#include "kernels/cpu/vocabulary_kernels.h"

namespace cinnabar::cpu {
namespace {
#include "kernels/cpu/vocabulary_kernels.inc"
}  // namespace

extern const VocabularyKernels kVocabularyAvx512 = kKernels;

}  // namespace cinnabar::cpu
