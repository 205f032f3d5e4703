#include "gateway/api/text_assembler.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr absl::string_view kUndecided = "\u2591";
constexpr TokenId kNoToken = -1;

// A stop string in `text`: the one that is complete first, of those the one that begins first.
struct StopMatch {
  size_t begin = 0;
  size_t end = 0;
};
std::optional<StopMatch> FindStop(absl::string_view text, const std::vector<std::string>& stop) {
  std::optional<StopMatch> best;
  for (const std::string& string : stop) {
    const size_t begin = text.find(string);
    if (begin == absl::string_view::npos) continue;
    const StopMatch match{begin, begin + string.size()};
    if (!best.has_value() || match.end < best->end ||
        (match.end == best->end && match.begin < best->begin)) {
      best = match;
    }
  }
  return best;
}

// The bytes at the end of `text` that may turn out to begin a stop string.
size_t UndecidedBytes(absl::string_view text, const std::vector<std::string>& stop) {
  size_t longest = 0;
  for (const std::string& string : stop) {
    for (size_t size = std::min(string.size() - 1, text.size()); size > longest; --size) {
      if (text.substr(text.size() - size) == absl::string_view(string).substr(0, size)) {
        longest = size;
      }
    }
  }
  return longest;
}

}  // namespace

absl::string_view FinishReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
  }
  CINNABAR_CHECK(false) << "not a finish reason: " << static_cast<int>(reason);
  return "";
}

TextAssembler::TextAssembler(Tokenizer tokenizer, TextOptions options)
    : tokenizer_(std::move(tokenizer)),
      options_(std::move(options)),
      decoder_(tokenizer_, {.skip_special = true}) {
  CINNABAR_CHECK(options_.begin >= 0 && options_.begin <= options_.end)
      << options_.begin << " .. " << options_.end;
  for (const std::string& stop : options_.stop) CINNABAR_CHECK(!stop.empty());
  const size_t length = options_.end - options_.begin;
  tokens_ = options_.given;
  if (tokens_.empty()) tokens_.assign(length, kNoToken);
  CINNABAR_CHECK(tokens_.size() == length) << tokens_.size() << " tokens for " << length;
}

bool TextAssembler::IsEnd(TokenId token) const {
  return std::find(options_.end_tokens.begin(), options_.end_tokens.end(), token) !=
         options_.end_tokens.end();
}

// `more` went out, with the echo before the first that does.
std::string TextAssembler::Take(std::string more) {
  if (!echoed_) {
    echoed_ = true;
    more.insert(0, options_.echo);
  }
  text_ += more;
  return more;
}

std::string TextAssembler::Emit(size_t num_bytes) {
  std::string out = held_.substr(0, num_bytes);
  held_.erase(0, num_bytes);
  return out;
}

// Ends the text with what is held back, a cut character included.
std::string TextAssembler::End(FinishReason reason) {
  held_ += decoder_.Flush();
  done_ = true;
  reason_ = reason;
  // The replacement of a cut character may complete a stop string.
  if (const std::optional<StopMatch> match = FindStop(held_, options_.stop)) {
    held_.resize(match->begin);
    reason_ = FinishReason::kStop;
  }
  return Emit(held_.size());
}

// Decodes what is final by now. Token by token, so that the count at which a stop string is
// complete does not depend on the deltas.
std::string TextAssembler::Advance() {
  std::string out;
  while (!done_ && num_final_ < final_end_) {
    const TokenId token = tokens_[num_final_++];
    if (IsEnd(token)) {
      out += End(FinishReason::kStop);
      break;
    }
    ++num_tokens_;
    const std::string piece = decoder_.Push(token);
    if (piece.empty()) continue;
    held_ += piece;
    if (const std::optional<StopMatch> match = FindStop(held_, options_.stop)) {
      out += Emit(match->begin);
      held_.clear();
      done_ = true;
      stop_string_ = true;
      reason_ = FinishReason::kStop;
      break;
    }
    out += Emit(held_.size() - UndecidedBytes(held_, options_.stop));
  }
  if (!done_ && num_final_ == static_cast<int32_t>(tokens_.size())) {
    out += End(FinishReason::kLength);
  }
  return out;
}

absl::StatusOr<std::string> TextAssembler::Add(absl::Span<const int32_t> positions,
                                               absl::Span<const int32_t> tokens,
                                               int32_t final_end) {
  if (positions.size() != tokens.size()) {
    return absl::DataLossError(
        absl::StrCat("a delta of ", positions.size(), " positions and ", tokens.size(), " tokens"));
  }
  if (done_) return std::string();
  // A copy, so that a delta that makes no sense changes nothing. It is as long as the canvas.
  std::vector<TokenId> updated = tokens_;
  for (size_t i = 0; i < positions.size(); ++i) {
    const int64_t index = int64_t{positions[i]} - options_.begin;
    if (index < final_end_ || index >= static_cast<int64_t>(updated.size())) continue;
    updated[index] = tokens[i];
  }
  const int32_t end =
      std::max(final_end_, std::clamp(final_end, options_.begin, options_.end) - options_.begin);
  for (int32_t i = final_end_; i < end; ++i) {
    if (updated[i] < 0) {
      return absl::DataLossError(
          absl::StrCat("position ", options_.begin + i, " is final without a token"));
    }
  }
  tokens_ = std::move(updated);
  final_end_ = end;
  return Take(Advance());
}

absl::StatusOr<std::string> TextAssembler::AddResult(absl::Span<const int32_t> tokens) {
  if (tokens.size() != tokens_.size()) {
    return absl::DataLossError(
        absl::StrCat("a result of ", tokens.size(), " tokens for an answer of ", tokens_.size()));
  }
  if (done_) return std::string();
  int32_t end = 0;
  while (end < static_cast<int32_t>(tokens.size()) && tokens[end] >= 0) ++end;
  if (end < final_end_ ||
      !std::equal(tokens_.begin(), tokens_.begin() + final_end_, tokens.begin())) {
    return absl::DataLossError("a result that contradicts tokens that were final");
  }
  const bool all = end == static_cast<int32_t>(tokens.size());
  if (!all && std::none_of(tokens.begin(), tokens.begin() + end,
                           [&](TokenId token) { return IsEnd(token); })) {
    return absl::DataLossError(
        absl::StrCat("a result without a token at position ", options_.begin + end));
  }
  tokens_.assign(tokens.begin(), tokens.end());
  final_end_ = end;
  return Take(Advance());
}

std::string TextAssembler::Finish() {
  if (done_) return "";
  return Take(End(FinishReason::kLength));
}

std::string TextAssembler::Snapshot() const {
  if (done_) return text_;
  std::string draft = options_.echo;
  std::vector<TokenId> run;
  const auto close_run = [&] {
    if (!run.empty()) draft += tokenizer_.DecodeText(run, {.skip_special = true});
    run.clear();
  };
  for (int32_t i = 0; i < static_cast<int32_t>(tokens_.size()); ++i) {
    const bool decided = tokens_[i] >= 0 && (options_.commits_stay || i < final_end_);
    if (!decided) {
      close_run();
      draft.append(kUndecided.data(), kUndecided.size());
      continue;
    }
    if (IsEnd(tokens_[i])) break;
    run.push_back(tokens_[i]);
  }
  close_run();
  return draft;
}

}  // namespace cinnabar
