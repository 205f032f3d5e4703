#include "tests/bench/cuda_ceilings.h"

namespace cinnabar::bench {

std::string MeasureCudaCeilings(int, CudaCeilingsResult&) {
  return "this build has no CUDA; use --device cpu";
}

}  // namespace cinnabar::bench
