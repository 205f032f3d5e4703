#include "worker/engine/prefix_cache.h"

#include <algorithm>
#include <utility>

namespace cinnabar {

int32_t CommonPrefix(absl::Span<const TokenId> a, absl::Span<const TokenId> b) {
  const size_t length = std::min(a.size(), b.size());
  return static_cast<int32_t>(std::mismatch(a.begin(), a.begin() + length, b.begin()).first -
                              a.begin());
}

void PrefixCache::Keep(std::vector<TokenId> tokens, std::unique_ptr<KvMemory> kv, int64_t bytes) {
  for (auto it = entries_.begin(); it != entries_.end();) {
    const auto common = static_cast<size_t>(CommonPrefix(it->tokens, tokens));
    if (common == tokens.size()) {
      entries_.splice(entries_.begin(), entries_, it);
      return;
    }
    const bool covered = common == it->tokens.size();
    if (covered) bytes_ -= it->bytes;
    it = covered ? entries_.erase(it) : std::next(it);
  }
  entries_.push_front({std::move(tokens), std::move(kv), bytes});
  bytes_ += bytes;
}

PrefixCache::Match PrefixCache::Find(absl::Span<const TokenId> tokens) {
  auto best = entries_.end();
  int32_t most = 0;
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    const int32_t common = CommonPrefix(it->tokens, tokens);
    if (common <= most) continue;
    most = common;
    best = it;
  }
  if (best == entries_.end()) return {};
  entries_.splice(entries_.begin(), entries_, best);
  return {.kv = best->kv.get(), .num_tokens = most};
}

void PrefixCache::ShrinkTo(int64_t bytes_max) {
  while (bytes_ > bytes_max && !entries_.empty()) {
    bytes_ -= entries_.back().bytes;
    entries_.pop_back();
  }
}

}  // namespace cinnabar
