#include "cli/canvas_view.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/terminal.h"

namespace cinnabar {
namespace {

constexpr char kBlock[] = "\u2591";  // light shade

}  // namespace

std::string RenderCanvas(const Canvas& canvas, int32_t visible_end,
                         const std::vector<int32_t>& new_positions, const Tokenizer& tokenizer,
                         const FrameStyle& style) {
  StyledLines lines(style.width, style.colour);
  for (int32_t position = 0; position < visible_end; ++position) {
    if (canvas.undecided(position)) {
      lines.Append(kBlock, ansi::kUndecided);
      continue;
    }
    const TokenId token = canvas.tokens[position];
    if (tokenizer.IsSpecial(token)) continue;
    const bool fresh = std::binary_search(new_positions.begin(), new_positions.end(), position);
    const bool given = canvas.states[position] == PositionState::kGiven;
    lines.Append(tokenizer.TokenText(token), fresh ? ansi::kFresh : given ? ansi::kGiven : "");
  }
  return lines.Take(style.height_max);
}

CanvasView::CanvasView(std::FILE* out, Tokenizer tokenizer, int32_t visible_end)
    : out_(out), frame_(out), tokenizer_(std::move(tokenizer)), visible_end_(visible_end) {}

void CanvasView::Draw(const Canvas& canvas, const DecodingState& state,
                      const std::vector<int32_t>& new_positions, int32_t tokens_committed,
                      absl::Duration elapsed) {
  const TerminalSize size = GetTerminalSize(fileno(out_));
  const FrameStyle style = {.width = size.columns, .height_max = size.rows - 3};
  const double seconds = absl::ToDoubleSeconds(elapsed);
  std::string frame = RenderCanvas(canvas, visible_end_, new_positions, tokenizer_, style);
  absl::StrAppend(
      &frame, ansi::kUndecided,
      absl::StrFormat("step %d   %d tokens   %.2f tokens per forward   %.1f tokens/s   %.1f s",
                      state.step, tokens_committed,
                      static_cast<double>(tokens_committed) / std::max(1, state.nfe),
                      seconds > 0 ? tokens_committed / seconds : 0.0, seconds),
      ansi::kReset, "\n");
  frame_.Draw(frame);
}

}  // namespace cinnabar
