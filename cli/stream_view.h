// The answer of a gateway in a terminal while it is denoised: tokens appear where they were
// decided, redrawn in place after each step.
#ifndef CINNABAR_CLI_STREAM_VIEW_H_
#define CINNABAR_CLI_STREAM_VIEW_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cli/api_client.h"

namespace cinnabar {

// What is known of the answer so far. Pure.
class StreamedCanvas {
 public:
  // Positions outside of the canvas are ignored.
  void Add(const ApiFrame& frame);
  void Append(const std::string& text) { text_ += text; }

  const std::string& text() const { return text_; }  // final
  int32_t step() const { return step_; }
  int32_t num_decided() const { return num_decided_; }
  int32_t canvas_tokens() const { return static_cast<int32_t>(cells_.size()); }

  // The frame: prompt and suffix dim, undecided positions dim blocks, tokens of the last step
  // bright (yellow where the model was less than 80% sure). Without frames from the server, the
  // final text. At most `lines_max` lines of `columns` columns, each ended with "\n".
  std::string Render(const std::string& prompt, const std::string& suffix, int32_t columns,
                     int32_t lines_max, bool colour) const;

 private:
  struct Cell {
    bool decided = false;
    int32_t step = 0;
    double confidence = 1.0;
    std::string text;
  };
  std::vector<Cell> cells_;
  std::string text_;
  int32_t step_ = 0;
  int32_t num_decided_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_STREAM_VIEW_H_
