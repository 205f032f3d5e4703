// The canvas in a terminal while it is denoised: redrawn in place after each step, undecided
// positions dimmed.
#ifndef CINNABAR_CLI_CANVAS_VIEW_H_
#define CINNABAR_CLI_CANVAS_VIEW_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "cli/terminal.h"
#include "common/tokenizer/tokenizer.h"
#include "worker/decoding/canvas.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {

// One frame as text with ANSI colours, wrapped at `width` columns and cut to the last `height_max`
// lines. Committed tokens of the last step are bright, earlier ones plain, given text dim blue,
// undecided positions dim blocks. Pure.
struct FrameStyle {
  int32_t width = 80;
  int32_t height_max = 40;
  bool colour = true;
};
std::string RenderCanvas(const Canvas& canvas, int32_t visible_end,
                         const std::vector<int32_t>& new_positions, const Tokenizer& tokenizer,
                         const FrameStyle& style);

// Draws frames over each other on a terminal.
class CanvasView {
 public:
  // `out` is borrowed. `visible_end`: positions from there on (a block's padding) are not shown.
  CanvasView(std::FILE* out, Tokenizer tokenizer, int32_t visible_end);

  void Draw(const Canvas& canvas, const DecodingState& state,
            const std::vector<int32_t>& new_positions, int32_t tokens_committed,
            absl::Duration elapsed);

 private:
  std::FILE* out_;
  LiveFrame frame_;
  Tokenizer tokenizer_;
  int32_t visible_end_;
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_CANVAS_VIEW_H_
