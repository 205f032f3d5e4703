// The backend's inner loops for generic; the flags are in kernels/CMakeLists.txt.
#include "kernels/cpu/isa_kernels.h"

namespace cinnabar::cpu {
namespace {
#include "kernels/cpu/isa_kernels.inc"
}  // namespace

extern const IsaKernels kIsaGeneric = kTable;

}  // namespace cinnabar::cpu
