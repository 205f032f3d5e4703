// What the commands need of a terminal: its size, colours, lines wrapped by columns, frames drawn
// over each other. Plain ANSI escapes.
#ifndef CINNABAR_CLI_TERMINAL_H_
#define CINNABAR_CLI_TERMINAL_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace cinnabar {

namespace ansi {
inline constexpr char kReset[] = "\033[0m";
inline constexpr char kBold[] = "\033[1m";
inline constexpr char kDim[] = "\033[2m";
inline constexpr char kRed[] = "\033[31m";
inline constexpr char kGreen[] = "\033[32m";
inline constexpr char kYellow[] = "\033[33m";
inline constexpr char kGiven[] = "\033[2;34m";      // dim blue
inline constexpr char kUndecided[] = "\033[2;37m";  // dim
inline constexpr char kFresh[] = "\033[1;92m";      // bright green
}  // namespace ansi

struct TerminalSize {
  int32_t columns = 80;
  int32_t rows = 24;
};
// Of the terminal that `fd` is; 80 x 24 where it is none.
TerminalSize GetTerminalSize(int fd);

// Whether to colour what goes to `fd`: it is a terminal, NO_COLOR is not set, TERM is not "dumb".
bool WantsColour(int fd);

// The bytes of the UTF-8 character at the start of `text`, which is not empty; 1 where it is no
// UTF-8.
size_t CharacterBytes(absl::string_view text);
// Columns that `text` takes: its characters, escapes ("\033[...m") not counted.
int32_t DisplayWidth(absl::string_view text);
// `text` in exactly `columns` columns: padded with spaces, or cut and ended with "…". Escapes are
// kept whole, and colours reset at a cut.
std::string FitLeft(absl::string_view text, int32_t columns);
std::string FitRight(absl::string_view text, int32_t columns);  // padded on the left
// Characters that a terminal would act on, as U+FFFD: for text that somebody else wrote.
std::string Printable(absl::string_view text);

// Lines of a frame under construction: wraps by columns and restores the style on each new line.
class StyledLines {
 public:
  // `style` is one of ansi::k..., or "".
  StyledLines(int32_t width, bool colour) : width_(width), colour_(colour) {}
  void Append(absl::string_view text, const char* style);
  // The last `lines_max` lines, each ended with "\n".
  std::string Take(int32_t lines_max);

 private:
  void SetStyle(const char* style);
  void Break();
  void Put(absl::string_view character);

  int32_t width_;
  bool colour_;
  int32_t column_ = 0;
  const char* style_ = "";
  std::vector<std::string> lines_ = {""};
};

// Draws frames over each other, without a cursor. When the program ends by a signal on the way, the
// terminal is put back in order first. One at a time.
class LiveFrame {
 public:
  enum class Place { kHere, kWholeScreen };  // the latter leaves what was on the screen as it was
  explicit LiveFrame(std::FILE* out, Place place = Place::kHere);
  ~LiveFrame();
  LiveFrame(const LiveFrame&) = delete;
  LiveFrame& operator=(const LiveFrame&) = delete;

  // `frame`: lines ended with "\n", none wider than the terminal, fewer than it has rows.
  void Draw(const std::string& frame);

 private:
  std::FILE* out_;
  Place place_;
  int32_t lines_drawn_ = 0;
};

// Numbers for people: "1,234", "12.3k", "1.2M"; "0.53 ms", "12.4 s", "3 min 20 s".
std::string ShowCount(double count);
std::string ShowWhole(int64_t count);
std::string ShowSeconds(double seconds);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_TERMINAL_H_
