#include "cli/canvas_view.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace cinnabar {
namespace {

constexpr char kReset[] = "\033[0m";
constexpr char kGiven[] = "\033[2;34m";      // dim blue
constexpr char kUndecided[] = "\033[2;37m";  // dim
constexpr char kFresh[] = "\033[1;92m";      // bright green: committed in this step
constexpr char kPlain[] = "";
constexpr char kBlock[] = "\u2591";  // light shade

// Lines of the frame under construction: wraps by columns and restores the colour on each new line.
class Lines {
 public:
  Lines(int32_t width, bool colour) : width_(width), colour_(colour) {}

  void Append(const std::string& text, const char* style) {
    SetStyle(style);
    for (size_t i = 0; i < text.size();) {
      const size_t length = CharacterLength(static_cast<unsigned char>(text[i]));
      const std::string character = text.substr(i, length);
      i += length;
      if (character == "\n") {
        Break();
      } else if (character == "\t") {
        for (int32_t space = 4 - column_ % 4; space > 0; --space) Put(" ");
      } else {
        const bool control =
            static_cast<unsigned char>(character[0]) < 0x20 || character[0] == 0x7F;
        Put(control ? "\uFFFD" : character);
      }
    }
  }

  std::vector<std::string> Take() {
    if (colour_) lines_.back() += kReset;
    return std::move(lines_);
  }

 private:
  static size_t CharacterLength(unsigned char lead) {
    return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  }
  void SetStyle(const char* style) {
    if (!colour_ || style == style_) return;
    style_ = style;
    absl::StrAppend(&lines_.back(), kReset, style_);
  }
  void Break() {
    if (colour_) lines_.back() += kReset;
    lines_.push_back(colour_ ? style_ : "");
    column_ = 0;
  }
  void Put(const std::string& character) {
    if (column_ == width_) Break();
    lines_.back() += character;
    ++column_;
  }

  int32_t width_;
  bool colour_;
  int32_t column_ = 0;
  const char* style_ = kPlain;
  std::vector<std::string> lines_ = {""};
};

}  // namespace

std::string RenderCanvas(const Canvas& canvas, int32_t visible_end,
                         const std::vector<int32_t>& new_positions, const Tokenizer& tokenizer,
                         const FrameStyle& style) {
  Lines lines(style.width, style.colour);
  for (int32_t position = 0; position < visible_end; ++position) {
    if (canvas.undecided(position)) {
      lines.Append(kBlock, kUndecided);
      continue;
    }
    const TokenId token = canvas.tokens[position];
    if (tokenizer.IsSpecial(token)) continue;
    const bool fresh = std::binary_search(new_positions.begin(), new_positions.end(), position);
    const bool given = canvas.states[position] == PositionState::kGiven;
    lines.Append(tokenizer.TokenText(token), fresh ? kFresh : given ? kGiven : kPlain);
  }
  std::vector<std::string> all = lines.Take();
  const size_t first = all.size() - std::min<size_t>(all.size(), style.height_max);
  std::string text;
  for (size_t line = first; line < all.size(); ++line) absl::StrAppend(&text, all[line], "\n");
  return text;
}

CanvasView::CanvasView(std::FILE* out, Tokenizer tokenizer, int32_t visible_end)
    : out_(out), tokenizer_(std::move(tokenizer)), visible_end_(visible_end) {
  std::fputs("\033[?25l", out_);
}

CanvasView::~CanvasView() {
  std::fputs("\033[?25h", out_);
  std::fflush(out_);
}

void CanvasView::Draw(const Canvas& canvas, const DecodingState& state,
                      const std::vector<int32_t>& new_positions, int32_t tokens_committed,
                      absl::Duration elapsed) {
  FrameStyle style;
  winsize size{};
  if (ioctl(fileno(out_), TIOCGWINSZ, &size) == 0 && size.ws_col > 10 && size.ws_row > 4) {
    style.width = size.ws_col;
    style.height_max = size.ws_row - 3;
  }
  const double seconds = absl::ToDoubleSeconds(elapsed);
  std::string frame = RenderCanvas(canvas, visible_end_, new_positions, tokenizer_, style);
  absl::StrAppend(
      &frame, kUndecided,
      absl::StrFormat("step %d   %d tokens   %.2f tokens per forward   %.1f tokens/s   %.1f s",
                      state.step, tokens_committed,
                      static_cast<double>(tokens_committed) / std::max(1, state.nfe),
                      seconds > 0 ? tokens_committed / seconds : 0.0, seconds),
      kReset, "\n");
  // Up over the last frame, and clear from there to the end of the screen.
  if (lines_drawn_ > 0) std::fprintf(out_, "\033[%dA", lines_drawn_);
  std::fprintf(out_, "\r\033[J%s", frame.c_str());
  std::fflush(out_);
  lines_drawn_ = static_cast<int32_t>(std::count(frame.begin(), frame.end(), '\n'));
}

}  // namespace cinnabar
