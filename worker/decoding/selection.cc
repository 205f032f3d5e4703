#include "worker/decoding/selection.h"

#include <algorithm>
#include <numeric>

namespace cinnabar {

void OrderByScore(absl::Span<const double> scores, std::vector<int32_t>& order) {
  order.resize(scores.size());
  std::iota(order.begin(), order.end(), 0);
  // Not stable_sort, which allocates.
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
}

void KeepFirst(int32_t count, std::vector<int32_t>& order) {
  const size_t kept = std::min(order.size(), static_cast<size_t>(std::max(count, 0)));
  order.resize(kept);
  std::sort(order.begin(), order.end());
}

void TakeBest(absl::Span<const double> scores, int32_t count, std::vector<int32_t>& chosen) {
  OrderByScore(scores, chosen);
  KeepFirst(count, chosen);
}

int32_t FactorCount(absl::Span<const double> probabilities, absl::Span<const int32_t> order,
                    double factor) {
  const int32_t size = static_cast<int32_t>(order.size());
  if (size == 0) return 0;
  int32_t failure = size - 1;  // the code's answer when nothing fails, too: hence the quirk
  for (int32_t i = 1; i < size; ++i) {
    if (probabilities[order[i]] < 1 - factor / (i + 2)) {
      failure = i;
      break;
    }
  }
  return failure == 0 || failure == size - 1 ? failure + 1 : failure;
}

int32_t EntropyBoundedCount(absl::Span<const double> entropies, absl::Span<const int32_t> order,
                            double bound) {
  int32_t count = 0;
  double before = 0;
  for (const int32_t index : order) {
    if (count > 0 && before > bound) break;
    before += entropies[index];
    ++count;
  }
  return count;
}

}  // namespace cinnabar
