// The backend's inner loops for avx512vnni; the flags are in kernels/CMakeLists.txt.
#include <immintrin.h>

#include "kernels/cpu/isa_kernels.h"

namespace cinnabar::cpu {
namespace {
#include "kernels/cpu/isa_kernels.inc"
}  // namespace

extern const IsaKernels kIsaAvx512Vnni = kTable;

}  // namespace cinnabar::cpu
