// What the device knows of the sequences that an op names.
#ifndef CINNABAR_KERNELS_CUDA_GEOMETRY_H_
#define CINNABAR_KERNELS_CUDA_GEOMETRY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/steps.h"

namespace cinnabar::cuda {

struct Geometry {
  absl::Span<const SequenceSpan> sequences;
  int64_t num_rows = 0;
  const RowFacts* rows = nullptr;    // on the device
  const SpanFacts* spans = nullptr;  // on the device
  int32_t keys_max = 0;              // most that a row sees
  // Attention tiles by the number of query heads a kv head, and the window.
  struct Tiles {
    std::vector<AttendTile> host;
    const AttendTile* device = nullptr;
  };
  std::map<std::pair<int32_t, int32_t>, Tiles> tiles;
};

// Geometries of the step that ops belong to, made when a span of sequences is first seen: the
// contract keeps it alive and unchanged until Synchronize(). They lie where the step stages, and go
// with it. KvMemory of the sequences is PagedKv. Errors are those of staging; sequences that leave
// a gap are a caller's bug (CINNABAR_CHECK). One thread at a time.
class Geometries {
 public:
  // Of `sequences`; makes room for it and for `more_bytes` that the caller stages. Stays until
  // something else makes room.
  absl::StatusOr<Geometry*> Of(absl::Span<const SequenceSpan> sequences, int64_t more_bytes,
                               Steps& steps);
  // The tiles of attention, kept with *geometry, which Of() gave for `sequences`. May make it
  // again.
  absl::StatusOr<const Geometry::Tiles*> TilesOf(Geometry*& geometry,
                                                 absl::Span<const SequenceSpan> sequences,
                                                 int32_t group, int32_t window, Steps& steps);

 private:
  // Room that is made may cost those that are there.
  absl::Status MakeRoom(int64_t bytes, Steps& steps);

  std::vector<std::unique_ptr<Geometry>> geometries_;
  int64_t staged_turn_ = 0;  // of Steps, when they were staged
};

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_GEOMETRY_H_
