// The vocabulary's queries in the device's terms, and its answers in the backend's.
#ifndef CINNABAR_KERNELS_CUDA_QUERY_BATCH_H_
#define CINNABAR_KERNELS_CUDA_QUERY_BATCH_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {

// A query that kernels/backend.h does not allow is a caller's bug (CINNABAR_CHECK).
void CheckQuery(const VocabularyQuery& query, int64_t vocabulary);
// Whether it has filters, and whether it needs its row of logits as a whole: with filters, or for a
// Tweedie step.
bool IsFiltered(const VocabularyQuery& query);
bool NeedsWholeRow(const VocabularyQuery& query);

// Of logits at `temperature`, in units of ln 2: log2(e) / temperature.
float ExponentScale(float temperature);

// Queries of one launch, their rules and the rows they read. A slot is a row that is read: a
// query's own, and with guidance behind it the unconditional one. Both lie in one tile, for tiles
// have an even number of slots and the first of a pair an even one: one is skipped before it where
// need be.
struct QueryBatch {
  std::vector<DeviceQuery> queries;
  std::vector<DeviceRule> rules;
  std::vector<int32_t> slot_rows;
  std::vector<int32_t> slot_queries;  // kNoRow: no query's own row

  void Add(const VocabularyQuery& query, int64_t vocabulary);
  // How many slots there would be with `query`.
  size_t SlotsWith(const VocabularyQuery& query) const;
  int64_t staged_bytes() const;
};

VocabularyAnswer AnswerOf(const DeviceAnswer& answer);

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_QUERY_BATCH_H_
