#include "common/tokenizer/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>

#include "common/base/check.h"
#include "common/tokenizer/tokenizer_state.h"
#include "common/tokenizer/utf8.h"

namespace cinnabar {

void TokenTrie::Add(absl::string_view text, int32_t value) {
  CINNABAR_CHECK(!text.empty());
  starts_[static_cast<uint8_t>(text[0])] = true;
  int32_t at = 0;
  for (const char c : text) {
    const auto byte = static_cast<uint8_t>(c);
    auto& children = nodes_[at].children;
    const auto child =
        std::lower_bound(children.begin(), children.end(), std::pair<uint8_t, int32_t>(byte, 0));
    if (child != children.end() && child->first == byte) {
      at = child->second;
    } else {
      const int32_t next = static_cast<int32_t>(nodes_.size());
      children.insert(child, {byte, next});
      nodes_.emplace_back();
      at = next;
    }
  }
  nodes_[at].value = value;
}

int32_t TokenTrie::LongestAt(absl::string_view text, size_t at, size_t* num_bytes) const {
  int32_t node = 0;
  int32_t found = -1;
  for (size_t i = at; i < text.size(); ++i) {
    const auto byte = static_cast<uint8_t>(text[i]);
    const auto& children = nodes_[node].children;
    const auto child =
        std::lower_bound(children.begin(), children.end(), std::pair<uint8_t, int32_t>(byte, 0));
    if (child == children.end() || child->first != byte) break;
    node = child->second;
    if (nodes_[node].value >= 0) {
      found = nodes_[node].value;
      *num_bytes = i + 1 - at;
    }
  }
  return found;
}

namespace {

using State = Tokenizer::State;

size_t CharBegin(absl::string_view text, size_t end) {
  size_t at = end - 1;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

// The class \w of Rust's regex crate, as the single_word flag asks for.
bool IsWordCharacter(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return (c >= 0x24B6 && c <= 0x24E9) || c == 0x200C || c == 0x200D;
  }
}

size_t SpacesBefore(absl::string_view text, size_t end, size_t not_before) {
  while (end > not_before) {
    const size_t begin = CharBegin(text, end);
    if (begin < not_before || !IsWhitespace(ReadUtf8(text, begin).code_point)) break;
    end = begin;
  }
  return end;
}

size_t SpacesAfter(absl::string_view text, size_t at) {
  while (at < text.size()) {
    const Utf8Char c = ReadUtf8(text, at);
    if (!IsWhitespace(c.code_point)) break;
    at += c.num_bytes;
  }
  return at;
}

// Says whether a special token may be recognised in bytes [begin, end) of a text.
struct SpecialPolicy {
  bool parse_special = false;
  absl::Span<const TextRange> plain_ranges;
  size_t offset = 0;  // of the text at hand in the text the ranges are about

  bool Touches(size_t begin, size_t end) const {
    begin += offset;
    end += offset;
    const auto range = std::partition_point(plain_ranges.begin(), plain_ranges.end(),
                                            [&](const TextRange& r) { return r.end <= begin; });
    return range != plain_ranges.end() && range->begin < end;
  }
  bool Allows(size_t begin, size_t end) const { return parse_special && !Touches(begin, end); }
};

// Calls on_token(id) for each added token found in `text` and on_text(begin, end) for each stretch
// between. Leftmost first, then longest.
template <typename OnToken, typename OnText>
void SplitOnAdded(const State& state, const TokenTrie& trie, absl::string_view text,
                  const SpecialPolicy& policy, const OnToken& on_token, const OnText& on_text) {
  size_t done = 0;
  size_t at = 0;
  while (!trie.empty() && at < text.size()) {
    if (!trie.MayStart(static_cast<uint8_t>(text[at]))) {
      ++at;
      continue;
    }
    size_t num_bytes = 0;
    const int32_t index = trie.LongestAt(text, at, &num_bytes);
    if (index < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = state.added[index];
    size_t begin = at;
    size_t end = at + num_bytes;
    if (token.special && !policy.Allows(begin, end)) {
      // Only one byte is skipped: a stranger's text must not swallow the template's token behind
      // it.
      ++at;
      continue;
    }
    at = end;
    if (token.single_word &&
        ((begin > 0 && IsWordCharacter(ReadUtf8(text, CharBegin(text, begin)).code_point)) ||
         (end < text.size() && IsWordCharacter(ReadUtf8(text, end).code_point)))) {
      continue;
    }
    if (token.lstrip) begin = SpacesBefore(text, begin, done);
    if (token.rstrip) end = SpacesAfter(text, end);
    if (done < begin) on_text(done, begin);
    on_token(token.id);
    done = end;
    // The text a token stripped is gone; a token that starts in it is not looked for.
    at = std::max(at, end);
  }
  if (done < text.size()) on_text(done, text.size());
}

// Finds the matches of a split step one after the other, never the same empty match twice.
class MatchCursor {
 public:
  MatchCursor(const SplitStep& step, absl::string_view text) : step_(step), text_(text) {}

  // False after the last match. After a pattern gave up, there are no further matches.
  bool Next(size_t* begin, size_t* end) {
    if (from_ > text_.size()) return false;
    if (step_.regex.has_value()) {
      if (step_.regex->Find(text_, from_, begin, end) != Regex::Outcome::kMatch) return false;
    } else {
      *begin = text_.find(step_.literal, from_);
      if (*begin == absl::string_view::npos) return false;
      *end = *begin + step_.literal.size();
    }
    from_ = *end;
    if (*begin == *end) from_ += *end < text_.size() ? ReadUtf8(text_, *end).num_bytes : 1;
    return true;
  }

 private:
  const SplitStep& step_;
  const absl::string_view text_;
  size_t from_ = 0;
};

struct Stretch {
  size_t begin = 0;
  size_t end = 0;
  bool is_match = false;
};

std::vector<Stretch> Stretches(const SplitStep& step, absl::string_view text) {
  std::vector<Stretch> stretches;
  MatchCursor cursor(step, text);
  size_t done = 0;
  size_t begin = 0;
  size_t end = 0;
  while (cursor.Next(&begin, &end)) {
    if (done < begin) stretches.push_back({done, begin, step.invert});
    stretches.push_back({begin, end, !step.invert});
    done = end;
  }
  if (done < text.size()) stretches.push_back({done, text.size(), step.invert});
  return stretches;
}

// Calls on_piece(piece) for each non-empty piece of `text`.
template <typename OnPiece>
void Split(const SplitStep& step, absl::string_view text, const OnPiece& on_piece) {
  const auto emit = [&](size_t begin, size_t end) {
    if (begin < end) on_piece(text.substr(begin, end - begin));
  };
  if (step.behavior == SplitBehavior::kIsolated) {
    // The common case: no list of stretches is needed.
    MatchCursor cursor(step, text);
    size_t done = 0;
    size_t begin = 0;
    size_t end = 0;
    while (cursor.Next(&begin, &end)) {
      emit(done, begin);
      emit(begin, end);
      done = end;
    }
    emit(done, text.size());
    return;
  }
  std::vector<Stretch> stretches = Stretches(step, text);
  std::vector<Stretch> merged;
  bool was_match = false;
  switch (step.behavior) {
    case SplitBehavior::kIsolated:
      break;
    case SplitBehavior::kRemoved:
      for (const Stretch& s : stretches) {
        if (!s.is_match) merged.push_back(s);
      }
      break;
    case SplitBehavior::kContiguous:
      for (const Stretch& s : stretches) {
        if (!merged.empty() && merged.back().is_match == s.is_match) {
          merged.back().end = s.end;
        } else {
          merged.push_back(s);
        }
      }
      break;
    case SplitBehavior::kMergedWithPrevious:
      for (const Stretch& s : stretches) {
        if (s.is_match && !was_match && !merged.empty()) {
          merged.back().end = s.end;
        } else {
          merged.push_back(s);
        }
        was_match = s.is_match;
      }
      break;
    case SplitBehavior::kMergedWithNext:
      for (size_t i = stretches.size(); i-- > 0;) {
        const Stretch& s = stretches[i];
        if (s.is_match && !was_match && !merged.empty()) {
          merged.back().begin = s.begin;
        } else {
          merged.push_back(s);
        }
        was_match = s.is_match;
      }
      std::reverse(merged.begin(), merged.end());
      break;
  }
  for (const Stretch& s : merged) emit(s.begin, s.end);
}

void EncodePiece(const State& state, absl::string_view piece, std::vector<int32_t>* ids) {
  if (piece.size() == 1) {
    ids->push_back(state.bpe.byte_id(static_cast<uint8_t>(piece[0])));
    return;
  }
  const auto whole = state.whole_pieces.find(piece);
  if (whole != state.whole_pieces.end()) {
    ids->push_back(whole->second);
    return;
  }
  state.bpe.Encode(piece, ids);
}

void SplitAndEncode(const State& state, const std::vector<SplitStep>& steps, size_t step_index,
                    bool may_prefix, absl::string_view text, std::vector<int32_t>* ids) {
  if (step_index < steps.size()) {
    Split(steps[step_index], text, [&](absl::string_view piece) {
      SplitAndEncode(state, steps, step_index + 1, may_prefix, piece, ids);
    });
    return;
  }
  if (!may_prefix) {
    EncodePiece(state, text, ids);
    return;
  }
  if (state.add_prefix_space && text[0] != ' ') {
    std::string prefixed = " ";
    prefixed.append(text.data(), text.size());
    SplitAndEncode(state, state.splits_after_prefix, 0, false, prefixed, ids);
  } else {
    SplitAndEncode(state, state.splits_after_prefix, 0, false, text, ids);
  }
}

// `text` is valid UTF-8; the policy's offset is its place in the whole text.
void EncodeValid(const State& state, absl::string_view text, const SpecialPolicy& policy,
                 std::vector<int32_t>* ids) {
  const auto on_token = [&](int32_t id) { ids->push_back(id); };
  SplitOnAdded(state, state.raw_added, text, policy, on_token, [&](size_t begin, size_t end) {
    const absl::string_view raw = text.substr(begin, end - begin);
    absl::string_view piece = raw;
    std::string normalized;
    SpecialPolicy piece_policy = policy;
    piece_policy.offset += begin;
    if (!state.normalizer.is_identity()) {
      normalized = state.normalizer.Apply(raw);
      piece = normalized;
      // Ranges of the raw text say nothing exact about changed text: all of it counts as touched.
      if (piece != raw && policy.Touches(begin, end)) piece_policy.parse_special = false;
    }
    SplitOnAdded(state, state.normalized_added, piece, piece_policy, on_token,
                 [&](size_t b, size_t e) {
                   SplitAndEncode(state, state.splits, 0, true, piece.substr(b, e - b), ids);
                 });
  });
}

}  // namespace

std::vector<int32_t> Tokenizer::Encode(absl::string_view text, const EncodeOptions& options) const {
  const State& state = *state_;
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + 8);
  if (options.add_special_tokens) {
    ids.insert(ids.end(), state.prefix_ids.begin(), state.prefix_ids.end());
  }
  SpecialPolicy policy{options.parse_special, options.plain_ranges, 0};
  for (size_t at = 0; at < text.size();) {
    const size_t end = ValidUtf8End(text, at);
    if (end == at) {
      ids.push_back(state.bpe.byte_id(static_cast<uint8_t>(text[at])));
      ++at;
      continue;
    }
    policy.offset = at;
    EncodeValid(state, text.substr(at, end - at), policy, &ids);
    at = end;
  }
  if (options.add_special_tokens) {
    ids.insert(ids.end(), state.suffix_ids.begin(), state.suffix_ids.end());
  }
  return ids;
}

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, const DecodeOptions& options) const {
  std::string text;
  text.reserve(ids.size() * 4);
  for (const int32_t id : ids) {
    if (options.skip_special && IsSpecial(id)) continue;
    const absl::string_view bytes = TokenBytes(id);
    text.append(bytes.data(), bytes.size());
  }
  return text;
}

std::string Tokenizer::DecodeText(absl::Span<const int32_t> ids,
                                  const DecodeOptions& options) const {
  return ReplaceInvalidUtf8(Decode(ids, options));
}

absl::string_view Tokenizer::TokenBytes(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return state_->BytesOf(static_cast<size_t>(id));
}

std::string Tokenizer::TokenText(int32_t id) const { return ReplaceInvalidUtf8(TokenBytes(id)); }

std::optional<int32_t> Tokenizer::IdOf(absl::string_view token_bytes) const {
  const auto found = state_->ids.find(token_bytes);
  if (found == state_->ids.end()) return std::nullopt;
  return found->second;
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && state_->entries[id].is_special;
}

bool Tokenizer::IsAdded(int32_t id) const {
  return id >= 0 && id < vocab_size() && state_->entries[id].is_added;
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(state_->entries.size()); }
std::optional<int32_t> Tokenizer::bos_id() const { return state_->bos_id; }
std::optional<int32_t> Tokenizer::eos_id() const { return state_->eos_id; }
std::optional<int32_t> Tokenizer::pad_id() const { return state_->pad_id; }
std::optional<int32_t> Tokenizer::mask_id() const { return state_->mask_id; }
const std::map<std::string, std::string>& Tokenizer::special_tokens() const {
  return state_->special_tokens;
}
const std::map<std::string, std::string>& Tokenizer::chat_templates() const {
  return state_->chat_templates;
}

}  // namespace cinnabar
