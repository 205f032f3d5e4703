// The bare product of the stand-in backend: rows x packed panels of 32 outputs.
#ifndef CINNABAR_TESTS_UNIT_KERNELS_STAND_IN_PRODUCT_H_
#define CINNABAR_TESTS_UNIT_KERNELS_STAND_IN_PRODUCT_H_

#include <cstdint>

namespace cinnabar::stand_in {

inline constexpr int32_t kStripRows = 12;

// out[row][i] for num_panels panels [dim][32].
using Product = void (*)(const float* x, int64_t x_stride, int32_t num_rows, const float* panels,
                         int64_t dim, int32_t num_panels, float* out, int64_t out_stride);
extern const Product kProductAvx512;
extern const Product kProductAvx2;
extern const Product kProductGeneric;

}  // namespace cinnabar::stand_in

#endif  // CINNABAR_TESTS_UNIT_KERNELS_STAND_IN_PRODUCT_H_
