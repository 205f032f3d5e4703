// Keys and values of block-causal sequences that have ended, kept while there is room: a sequence
// that begins with the same tokens takes them over instead of computing them. Exact: what a
// position leaves depends on the tokens up to the end of its block alone, to the last bit.
#ifndef CINNABAR_WORKER_ENGINE_PREFIX_CACHE_H_
#define CINNABAR_WORKER_ENGINE_PREFIX_CACHE_H_

#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "kernels/backend.h"
#include "worker/decoding/canvas.h"

namespace cinnabar {

// The number of equal tokens that both begin with.
int32_t CommonPrefix(absl::Span<const TokenId> a, absl::Span<const TokenId> b);

// One thread at a time.
class PrefixCache {
 public:
  // `kv` holds keys and values of positions [0, tokens.size()), and takes `bytes`. An entry that
  // these tokens begin with is dropped; where an entry begins with all of them, it is `kv` that
  // goes.
  void Keep(std::vector<TokenId> tokens, std::unique_ptr<KvMemory> kv, int64_t bytes);

  struct Match {
    const KvMemory* kv = nullptr;  // until the next call
    int32_t num_tokens = 0;
  };
  // The entry that shares most of the beginning of `tokens` (ties: the one used last), which counts
  // as used now.
  Match Find(absl::Span<const TokenId> tokens);

  // Drops what has not been used for longest until bytes() is at most `bytes_max`.
  void ShrinkTo(int64_t bytes_max);

  int64_t bytes() const { return bytes_; }
  int32_t num_entries() const { return static_cast<int32_t>(entries_.size()); }

 private:
  struct Entry {
    std::vector<TokenId> tokens;
    std::unique_ptr<KvMemory> kv;
    int64_t bytes = 0;
  };
  std::list<Entry> entries_;  // the one used last is first
  int64_t bytes_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_ENGINE_PREFIX_CACHE_H_
