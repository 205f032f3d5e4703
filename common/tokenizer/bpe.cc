#include "common/tokenizer/bpe.h"

#include <algorithm>
#include <cstddef>
#include <queue>

#include "common/base/check.h"

namespace cinnabar {
namespace {

// Up to here scanning for the best pair beats a heap, and its square is still small.
constexpr size_t kShortPieceMax = 48;

uint64_t PairKey(int32_t left, int32_t right) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
}

}  // namespace

BpeModel::BpeModel(const std::array<int32_t, 256>& byte_ids, absl::Span<const BpeMerge> merges)
    : byte_ids_(byte_ids) {
  CINNABAR_CHECK(merges.size() < (1U << 30));
  int bits = 4;
  while ((size_t{1} << bits) < 2 * merges.size() + 2) ++bits;
  slots_.resize(size_t{1} << bits);
  shift_ = 64 - bits;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t pair = PairKey(merges[rank].left, merges[rank].right);
    *FindSlot(pair) = {pair, static_cast<int32_t>(rank), merges[rank].result};
  }
}

BpeModel::Slot* BpeModel::FindSlot(uint64_t pair) {
  size_t at = (pair * 0x9E3779B97F4A7C15ULL) >> shift_;
  while (slots_[at].pair != kEmpty && slots_[at].pair != pair) at = (at + 1) & (slots_.size() - 1);
  return &slots_[at];
}

const BpeModel::Slot& BpeModel::Find(int32_t left, int32_t right) const {
  static constexpr Slot kNone = {kEmpty, kNoRank, 0};
  const uint64_t pair = PairKey(left, right);
  size_t at = (pair * 0x9E3779B97F4A7C15ULL) >> shift_;
  while (slots_[at].pair != pair) {
    if (slots_[at].pair == kEmpty) return kNone;
    at = (at + 1) & (slots_.size() - 1);
  }
  return slots_[at];
}

void BpeModel::Encode(absl::string_view piece, std::vector<int32_t>* ids) const {
  if (piece.size() <= kShortPieceMax) {
    EncodeShort(piece, ids);
  } else {
    EncodeLong(piece, ids);
  }
}

void BpeModel::EncodeShort(absl::string_view piece, std::vector<int32_t>* ids) const {
  struct Symbol {
    int32_t id;
    int32_t rank;    // of the pair with the next symbol
    int32_t result;  // of that merge
  };
  Symbol symbols[kShortPieceMax];
  size_t size = piece.size();
  const auto rate = [&](size_t i) {
    const Slot& slot = Find(symbols[i].id, symbols[i + 1].id);
    symbols[i].rank = slot.rank;
    symbols[i].result = slot.result;
  };
  for (size_t i = 0; i < size; ++i) symbols[i].id = byte_ids_[static_cast<uint8_t>(piece[i])];
  for (size_t i = 0; i + 1 < size; ++i) rate(i);
  while (size > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < size; ++i) {
      if (symbols[i].rank < symbols[best].rank) best = i;
    }
    if (symbols[best].rank == kNoRank) break;
    symbols[best].id = symbols[best].result;
    std::copy(symbols + best + 2, symbols + size, symbols + best + 1);
    --size;
    if (best > 0) rate(best - 1);
    if (best + 1 < size) rate(best);
  }
  for (size_t i = 0; i < size; ++i) ids->push_back(symbols[i].id);
}

void BpeModel::EncodeLong(absl::string_view piece, std::vector<int32_t>* ids) const {
  // A linked list of symbols over arrays, and a heap of candidate merges. A candidate is stale when
  // its symbol's pair changed since; the symbol's current rank tells.
  struct Symbol {
    int32_t id;
    int32_t rank;
    int32_t result;
    int32_t previous;
    int32_t next;  // num_symbols: none
  };
  CINNABAR_CHECK(piece.size() < INT32_MAX) << "piece of " << piece.size() << " bytes";
  const int32_t num_symbols = static_cast<int32_t>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  const auto rate = [&](int32_t i) {
    Symbol& symbol = symbols[i];
    if (symbol.next == num_symbols) {
      symbol.rank = kNoRank;
      return;
    }
    const Slot& slot = Find(symbol.id, symbols[symbol.next].id);
    symbol.rank = slot.rank;
    symbol.result = slot.result;
  };
  // Rank above position, so that the smallest number is the next merge.
  const auto candidate = [&](int32_t i) {
    return (static_cast<uint64_t>(symbols[i].rank) << 32) | static_cast<uint32_t>(i);
  };
  for (int32_t i = 0; i < num_symbols; ++i) {
    symbols[i] = {byte_ids_[static_cast<uint8_t>(piece[i])], kNoRank, 0, i - 1, i + 1};
  }
  std::vector<uint64_t> first;
  for (int32_t i = 0; i < num_symbols; ++i) {
    rate(i);
    if (symbols[i].rank != kNoRank) first.push_back(candidate(i));
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<uint64_t>> heap(
      std::greater<uint64_t>(), std::move(first));
  while (!heap.empty()) {
    const int32_t rank = static_cast<int32_t>(heap.top() >> 32);
    const int32_t at = static_cast<int32_t>(heap.top() & 0xFFFFFFFFU);
    heap.pop();
    Symbol& symbol = symbols[at];
    if (symbol.rank != rank) continue;
    Symbol& eaten = symbols[symbol.next];
    symbol.id = symbol.result;
    symbol.next = eaten.next;
    eaten.rank = kNoRank;
    if (symbol.next < num_symbols) symbols[symbol.next].previous = at;
    rate(at);
    if (symbol.rank != kNoRank) heap.push(candidate(at));
    if (symbol.previous >= 0) {
      rate(symbol.previous);
      if (symbols[symbol.previous].rank != kNoRank) heap.push(candidate(symbol.previous));
    }
  }
  for (int32_t i = 0; i < num_symbols; i = symbols[i].next) ids->push_back(symbols[i].id);
}

}  // namespace cinnabar
