// Which of the scored positions are transferred: the rules of the greedy samplers, on plain
// numbers.
#ifndef CINNABAR_WORKER_DECODING_SELECTION_H_
#define CINNABAR_WORKER_DECODING_SELECTION_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace cinnabar {

// Indices of all scores, best first; ties: the lower index first. `order` keeps its capacity.
void OrderByScore(absl::Span<const double> scores, std::vector<int32_t>& order);

// Keeps the first `count` of `order` (all when there are fewer), ascending.
void KeepFirst(int32_t count, std::vector<int32_t>& order);

// Both: the indices of the `count` best scores, ascending.
void TakeBest(absl::Span<const double> scores, int32_t count, std::vector<int32_t>& chosen);

// Fast-dLLM's factor rule: how many of the probabilities, in the given order (best first), are
// transferred. Rank r = 2, 3, ... must reach 1 - factor / (r + 1). Keeps the published quirk that a
// lone failure in the last rank is transferred all the same. At least 1 of a non-empty list.
int32_t FactorCount(absl::Span<const double> probabilities, absl::Span<const int32_t> order,
                    double factor);

// Length of the longest prefix, in the given order (lowest entropy first), whose entropies before
// the last sum to at most `bound`; at least 1 of a non-empty list.
int32_t EntropyBoundedCount(absl::Span<const double> entropies, absl::Span<const int32_t> order,
                            double bound);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_DECODING_SELECTION_H_
