// The tables of a Tokenizer: filled by tokenizer_loader.cc, read by tokenizer.cc. Private to this
// folder.
#ifndef CINNABAR_COMMON_TOKENIZER_TOKENIZER_STATE_H_
#define CINNABAR_COMMON_TOKENIZER_TOKENIZER_STATE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "common/tokenizer/bpe.h"
#include "common/tokenizer/normalizer.h"
#include "common/tokenizer/regex.h"
#include "common/tokenizer/tokenizer.h"

namespace cinnabar {

struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
  bool special = false;
};

// Finds the longest of a set of texts at a position.
class TokenTrie {
 public:
  TokenTrie() : nodes_(1) {}
  // A text added twice keeps the later value. `text` is not empty.
  void Add(absl::string_view text, int32_t value);
  bool empty() const { return nodes_.size() == 1; }
  bool MayStart(uint8_t byte) const { return starts_[byte]; }
  // The value of the longest text at text[at..], its length in *num_bytes; -1 for none.
  int32_t LongestAt(absl::string_view text, size_t at, size_t* num_bytes) const;

 private:
  struct Node {
    int32_t value = -1;
    std::vector<std::pair<uint8_t, int32_t>> children;  // by byte, ascending
  };
  std::vector<Node> nodes_;
  bool starts_[256] = {};
};

enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct SplitStep {
  std::optional<Regex> regex;  // absent: `literal`
  std::string literal;         // not empty
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;
};

struct Tokenizer::State {
  // Bytes of id i: bytes.substr(text_begin[i], text_begin[i] + num_bytes[i]).
  struct TokenEntry {
    uint32_t begin = 0;
    uint32_t num_bytes = 0;
    bool is_special = false;
    bool is_added = false;
  };
  std::string bytes;
  std::vector<TokenEntry> entries;

  Normalizer normalizer;
  std::vector<SplitStep> splits;  // in order; each piece of one step goes through the next
  bool add_prefix_space = false;  // of the byte-level step, on each piece the splits left
  std::vector<SplitStep> splits_after_prefix;

  BpeModel bpe;
  // Pieces that are one token, without going through the merges: those the merges would give too,
  // or, with ignore_merges, every vocabulary entry. Never a special token. Keys point into `bytes`.
  absl::flat_hash_map<absl::string_view, int32_t> whole_pieces;
  absl::flat_hash_map<absl::string_view, int32_t> ids;  // for IdOf

  std::vector<AddedToken> added;    // by index, the trie's value
  TokenTrie raw_added;              // searched in the text as it came
  TokenTrie normalized_added;       // searched after normalization
  std::vector<int32_t> prefix_ids;  // of the post-processor
  std::vector<int32_t> suffix_ids;

  std::optional<int32_t> bos_id, eos_id, pad_id, mask_id;
  std::map<std::string, std::string> special_tokens;
  std::map<std::string, std::string> chat_templates;

  absl::string_view BytesOf(size_t id) const {
    return absl::string_view(bytes).substr(entries[id].begin, entries[id].num_bytes);
  }
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_TOKENIZER_STATE_H_
