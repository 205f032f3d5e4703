// Byte-pair encoding of one piece.
//
// Source: Sennrich et al., arXiv:1508.07909; GPT-2's byte-level form; ties as in the Hugging Face
// tokenizers library (lowest rank first, then the leftmost position).
#ifndef CINNABAR_COMMON_TOKENIZER_BPE_H_
#define CINNABAR_COMMON_TOKENIZER_BPE_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace cinnabar {

// left + right -> result, all token ids.
struct BpeMerge {
  int32_t left = 0;
  int32_t right = 0;
  int32_t result = 0;
};

// Immutable; safe from any thread.
class BpeModel {
 public:
  BpeModel() = default;
  // byte_ids   the id of each byte's symbol
  // merges     a merge's rank is its index; of two merges of one pair the later one counts
  BpeModel(const std::array<int32_t, 256>& byte_ids, absl::Span<const BpeMerge> merges);

  // Appends the ids of `piece`, any bytes. O(n log n) in its length.
  void Encode(absl::string_view piece, std::vector<int32_t>* ids) const;

  int32_t byte_id(uint8_t byte) const { return byte_ids_[byte]; }

 private:
  struct Slot {
    uint64_t pair = kEmpty;
    int32_t rank = 0;
    int32_t result = 0;
  };
  static constexpr uint64_t kEmpty = ~0ULL;
  static constexpr int32_t kNoRank = INT32_MAX;

  Slot* FindSlot(uint64_t pair);
  const Slot& Find(int32_t left, int32_t right) const;
  void EncodeShort(absl::string_view piece, std::vector<int32_t>* ids) const;
  void EncodeLong(absl::string_view piece, std::vector<int32_t>* ids) const;

  std::array<int32_t, 256> byte_ids_ = {};
  std::vector<Slot> slots_;  // open addressing, a power of two, at most half full
  int shift_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_BPE_H_
