// The experts of a layer as the kernels take them: what all have in common, and a table of where
// each one's rows lie.
#ifndef CINNABAR_KERNELS_CUDA_EXPERT_TABLES_H_
#define CINNABAR_KERNELS_CUDA_EXPERT_TABLES_H_

#include <map>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/steps.h"

namespace cinnabar::cuda {

// The view of each of `weights`, which are CudaWeights of one piece, but for its data.
WeightView CommonView(absl::Span<const std::unique_ptr<Weight>> weights);

// Tables by the array of weights that they were made of. One thread at a time.
class ExpertTables {
 public:
  // Device pointers to the data of each of `weights`. Made in a layer's first pass, which ends what
  // is captured; ResourceExhausted when there is no memory for it then. Weights that differ in
  // shape or dtype are a caller's bug (CINNABAR_CHECK).
  absl::StatusOr<const void* const*> Of(absl::Span<const std::unique_ptr<Weight>> weights,
                                        Steps& steps);

 private:
  struct Table {
    std::vector<const void*> host;
    DeviceMemory device;
  };
  std::map<const void*, Table> tables_;
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_EXPERT_TABLES_H_
