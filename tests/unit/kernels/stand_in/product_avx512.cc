#include <immintrin.h>

#include "tests/unit/kernels/stand_in/product.h"

namespace cinnabar::stand_in {
namespace {
#include "tests/unit/kernels/stand_in/product.inc"
}  // namespace

extern const Product kProductAvx512 = &Multiply;

}  // namespace cinnabar::stand_in
