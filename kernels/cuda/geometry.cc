#include "kernels/cuda/geometry.h"

#include <algorithm>

#include "common/base/check.h"
#include "common/base/status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/paged_kv.h"
#include "kernels/cuda/plan.h"

namespace cinnabar::cuda {

absl::Status Geometries::MakeRoom(int64_t bytes, Steps& steps) {
  CINNABAR_RETURN_IF_ERROR(steps.MakeRoom(bytes));
  if (staged_turn_ != steps.staged_turn()) geometries_.clear();
  staged_turn_ = steps.staged_turn();
  return absl::OkStatus();
}

absl::StatusOr<Geometry*> Geometries::Of(absl::Span<const SequenceSpan> sequences,
                                         int64_t more_bytes, Steps& steps) {
  CINNABAR_RETURN_IF_ERROR(MakeRoom(more_bytes, steps));
  for (const auto& geometry : geometries_) {
    if (geometry->sequences.data() == sequences.data() &&
        geometry->sequences.size() == sequences.size()) {
      return geometry.get();
    }
  }
  auto geometry = std::make_unique<Geometry>();
  geometry->sequences = sequences;
  std::vector<RowFacts> rows;
  std::vector<SpanFacts> spans;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const SequenceSpan& span = sequences[s];
    CINNABAR_CHECK(span.row_begin == static_cast<int32_t>(rows.size()) && span.num_rows > 0)
        << "sequences leave a gap";
    SpanFacts facts;
    facts.row_begin = span.row_begin;
    facts.num_rows = span.num_rows;
    facts.first_position = span.first_position;
    facts.block_length = span.block_length;
    if (span.kv != nullptr) {
      const auto& kv = dynamic_cast<const PagedKv&>(*span.kv);
      facts.pages = kv.device_table();
      facts.pages_per_layer = kv.one_layer() ? 0 : kv.layout().pages_per_layer;
    }
    spans.push_back(facts);
    for (int32_t row = 0; row < span.num_rows; ++row) {
      const int32_t num_keys = VisibleKeys(span, row);
      geometry->keys_max = std::max(geometry->keys_max, num_keys);
      rows.push_back(
          {span.first_position + row, span.modulation_row, static_cast<int32_t>(s), num_keys});
    }
  }
  geometry->num_rows = static_cast<int64_t>(rows.size());
  CINNABAR_RETURN_IF_ERROR(
      MakeRoom(GeometryBytes(rows.size(), spans.size(), 0) + more_bytes, steps));
  CINNABAR_ASSIGN_OR_RETURN(geometry->rows, steps.Stage(absl::MakeConstSpan(rows)));
  CINNABAR_ASSIGN_OR_RETURN(geometry->spans, steps.Stage(absl::MakeConstSpan(spans)));
  geometries_.push_back(std::move(geometry));
  return geometries_.back().get();
}

absl::StatusOr<const Geometry::Tiles*> Geometries::TilesOf(Geometry*& geometry,
                                                           absl::Span<const SequenceSpan> sequences,
                                                           int32_t group, int32_t window,
                                                           Steps& steps) {
  const std::pair key(group, window);
  const auto found = geometry->tiles.find(key);
  if (found != geometry->tiles.end()) return &found->second;
  std::vector<AttendTile> host = AttendTiles(sequences, group, window);
  // Room may cost the geometry itself: then it is made again, with room for the tiles.
  CINNABAR_ASSIGN_OR_RETURN(geometry,
                            Of(sequences, StagedBytesOf(absl::MakeConstSpan(host)), steps));
  Geometry::Tiles& tiles = geometry->tiles[key];
  tiles.host = std::move(host);
  CINNABAR_ASSIGN_OR_RETURN(tiles.device, steps.Stage(absl::MakeConstSpan(tiles.host)));
  return &tiles;
}

}  // namespace cinnabar::cuda
