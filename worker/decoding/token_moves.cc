#include "worker/decoding/token_moves.h"

#include <algorithm>

#include "absl/algorithm/container.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

// Appends what stands in the run [begin, end) afterwards; edits[next] is its first edit.
void MoveRun(const Canvas& canvas, int32_t begin, int32_t end, absl::Span<const TokenEdit> edits,
             const ModelTraits& model, size_t& next, std::vector<MovedToken>& moved) {
  const size_t run_end = moved.size() + static_cast<size_t>(end - begin);
  const auto append = [&](const MovedToken& token) {
    if (moved.size() < run_end) moved.push_back(token);
  };
  for (int32_t i = begin; i < end; ++i) {
    const bool edited = next < edits.size() && edits[next].position == i;
    const TokenId written = edited ? edits[next++].token : -1;
    if (edited && written == model.delete_token) continue;
    if (edited && written == model.split_token) append({.token = model.mask_token});
    if (edited && written != model.split_token) {
      append({.token = written, .from = i, .written = true});
    } else {
      append({.token = canvas.tokens[i], .from = i});
    }
  }
  moved.resize(run_end, {.token = model.mask_token});
}

}  // namespace

void MoveTokens(const Canvas& canvas, BlockRange block, absl::Span<const TokenEdit> edits,
                const ModelTraits& model, std::vector<MovedToken>& moved) {
  moved.clear();
  size_t next = 0;
  for (int32_t i = block.begin; i < block.end;) {
    if (canvas.states[i] == PositionState::kGiven) {
      moved.push_back({.token = canvas.tokens[i], .from = i});
      ++i;
      continue;
    }
    int32_t end = i + 1;
    while (end < block.end && canvas.states[end] != PositionState::kGiven) ++end;
    MoveRun(canvas, i, end, edits, model, next, moved);
    i = end;
  }
  CINNABAR_CHECK(next == edits.size()) << "an edit of a given position, or out of order";
}

void AppendMoves(const Canvas& canvas, BlockRange block, absl::Span<const MovedToken> moved,
                 const ModelTraits& model, std::vector<Transfer>& transfers) {
  for (int32_t i = block.begin; i < block.end; ++i) {
    const TokenId token = moved[i - block.begin].token;
    if (token == canvas.tokens[i]) continue;
    transfers.push_back({.position = i, .token = token == model.mask_token ? kMaskedAgain : token});
  }
}

uint64_t BlockKey(const Canvas& canvas, BlockRange block) {
  uint64_t key = 0;
  for (int32_t i = block.begin; i < block.end; ++i) {
    // SplitMix64, of the key so far and the token.
    key = (key ^ static_cast<uint32_t>(canvas.tokens[i])) + 0x9E3779B97F4A7C15U;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9U;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBU;
    key ^= key >> 31;
  }
  return key;
}

absl::Span<const TokenEdit> TriedAt(const BlockMemory& memory, int32_t position) {
  const auto range = std::equal_range(
      memory.tried.begin(), memory.tried.end(), TokenEdit{.position = position},
      [](const TokenEdit& a, const TokenEdit& b) { return a.position < b.position; });
  return absl::MakeConstSpan(memory.tried)
      .subspan(range.first - memory.tried.begin(), range.second - range.first);
}

void RememberEdits(const Canvas& canvas, BlockRange block, absl::Span<const TokenEdit> edits,
                   const ModelTraits& model, BlockMemory& memory) {
  const uint64_t key = BlockKey(canvas, block);
  if (!absl::c_linear_search(memory.seen, key)) memory.seen.push_back(key);
  for (const TokenEdit& edit : edits) {
    const absl::Span<const TokenEdit> tried = TriedAt(memory, edit.position);
    if (absl::c_any_of(tried, [&](const TokenEdit& t) { return t.token == edit.token; })) continue;
    const auto first = memory.tried.begin() + (tried.data() - memory.tried.data());
    auto last = first + static_cast<std::ptrdiff_t>(tried.size());
    if (tried.size() == kTriedPerPositionMax) {
      std::move(first + 1, last, first);
      *(last - 1) = edit;
    } else {
      memory.tried.insert(last, edit);
    }
  }
  thread_local std::vector<MovedToken> moved;
  thread_local std::vector<uint8_t> before;
  MoveTokens(canvas, block, edits, model, moved);
  before.assign(memory.original.begin(), memory.original.end());
  for (size_t i = 0; i < moved.size(); ++i) {
    memory.original[i] = moved[i].from < 0 ? 0 : before[moved[i].from - block.begin];
  }
}

}  // namespace cinnabar
