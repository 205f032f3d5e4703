#include "cli/stream_view.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/match.h"
#include "cli/terminal.h"

namespace cinnabar {
namespace {

constexpr double kSureFrom = 0.8;

// The names that checkpoints give to tokens which are not text.
bool LooksSpecial(const std::string& text) {
  static constexpr absl::string_view kNames[] = {"<s>",   "</s>",  "<bos>",  "<eos>",
                                                 "<pad>", "<unk>", "<mask>", "[MASK]"};
  return (absl::StartsWith(text, "<|") && absl::EndsWith(text, "|>")) ||
         std::count(std::begin(kNames), std::end(kNames), text) > 0;
}

}  // namespace

void StreamedCanvas::Add(const ApiFrame& frame) {
  if (frame.canvas_tokens > canvas_tokens()) cells_.resize(frame.canvas_tokens);
  step_ = frame.step;
  for (size_t i = 0; i < frame.positions.size(); ++i) {
    const int32_t position = frame.positions[i];
    if (position < 0 || position >= canvas_tokens()) continue;
    Cell& cell = cells_[position];
    const bool masked_again = i < frame.masked_again.size() && frame.masked_again[i];
    num_decided_ += (masked_again ? 0 : 1) - (cell.decided ? 1 : 0);
    if (masked_again) {
      cell = Cell();
      continue;
    }
    cell = {.decided = true,
            .step = frame.step,
            .confidence = frame.confidences.empty() ? 1.0 : frame.confidences[i],
            .text = frame.texts[i]};
  }
}

std::string StreamedCanvas::Render(const std::string& prompt, const std::string& suffix,
                                   int32_t columns, int32_t lines_max, bool colour) const {
  StyledLines lines(columns, colour);
  lines.Append(prompt, ansi::kGiven);
  if (cells_.empty()) lines.Append(text_, "");
  for (const Cell& cell : cells_) {
    if (!cell.decided) {
      lines.Append("\u2591", ansi::kUndecided);
    } else if (LooksSpecial(cell.text)) {
      lines.Append("\u00B7", ansi::kUndecided);
    } else {
      const bool fresh = cell.step == step_;
      lines.Append(cell.text, !fresh                         ? ""
                              : cell.confidence >= kSureFrom ? ansi::kFresh
                                                             : ansi::kYellow);
    }
  }
  lines.Append(suffix, ansi::kGiven);
  return lines.Take(lines_max);
}

}  // namespace cinnabar
