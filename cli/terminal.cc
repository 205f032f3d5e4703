#include "cli/terminal.h"

#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

constexpr char kHideCursor[] = "\033[?25l";
constexpr char kShowCursor[] = "\033[?25h";
constexpr char kOtherScreen[] = "\033[?1049h\033[H";
constexpr char kBackToScreen[] = "\033[?25h\033[?1049l";
constexpr char kReplacement[] = "\uFFFD";

// What a signal handler must write, and where; fd -1: nothing.
std::atomic<int> restore_fd{-1};
std::atomic<const char*> restore_text{nullptr};

void RestoreAndDie(int signal_number) {
  const int fd = restore_fd.load();
  const char* text = restore_text.load();
  if (fd >= 0 && text != nullptr) {
    const ssize_t ignored = write(fd, text, strlen(text));
    static_cast<void>(ignored);
  }
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

// The length of the escape "\033[...X" at the start of `text`; 0: there is none.
size_t EscapeBytes(absl::string_view text) {
  if (text.size() < 2 || text[0] != '\033' || text[1] != '[') return 0;
  size_t end = 2;
  while (end < text.size() && (text[end] < '@' || text[end] > '~')) ++end;
  return std::min(end + 1, text.size());
}

bool IsControl(absl::string_view character) {
  const auto byte = static_cast<unsigned char>(character[0]);
  if (byte < 0x20 || byte == 0x7F) return true;
  // C1 controls, U+0080 to U+009F: some terminals take U+009B for an escape.
  return character.size() == 2 && byte == 0xC2 && static_cast<unsigned char>(character[1]) < 0xA0;
}

}  // namespace

TerminalSize GetTerminalSize(int fd) {
  TerminalSize size;
  winsize window{};
  if (ioctl(fd, TIOCGWINSZ, &window) == 0 && window.ws_col > 10 && window.ws_row > 4) {
    size.columns = window.ws_col;
    size.rows = window.ws_row;
  }
  return size;
}

bool WantsColour(int fd) {
  const char* no_colour = std::getenv("NO_COLOR");
  const char* term = std::getenv("TERM");
  return isatty(fd) != 0 && (no_colour == nullptr || *no_colour == '\0') &&
         (term == nullptr || std::strcmp(term, "dumb") != 0);
}

size_t CharacterBytes(absl::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const size_t length = lead < 0xC2 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
  if (length > text.size()) return 1;
  for (size_t i = 1; i < length; ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xC0) != 0x80) return 1;
  }
  return length;
}

int32_t DisplayWidth(absl::string_view text) {
  int32_t width = 0;
  while (!text.empty()) {
    const size_t escape = EscapeBytes(text);
    if (escape == 0) ++width;
    text.remove_prefix(escape > 0 ? escape : CharacterBytes(text));
  }
  return width;
}

namespace {

std::string Fit(absl::string_view text, int32_t columns, bool right) {
  const int32_t width = DisplayWidth(text);
  if (width <= columns) {
    const std::string padding(static_cast<size_t>(columns - width), ' ');
    return right ? absl::StrCat(padding, text) : absl::StrCat(text, padding);
  }
  std::string cut;
  bool escaped = false;
  for (int32_t left = columns - 1; left > 0;) {
    const size_t escape = EscapeBytes(text);
    const size_t length = escape > 0 ? escape : CharacterBytes(text);
    if (escape == 0) --left;
    escaped = escaped || escape > 0;
    cut.append(text.data(), length);
    text.remove_prefix(length);
  }
  if (columns > 0) cut += "…";
  if (escaped) cut += ansi::kReset;
  return cut;
}

}  // namespace

std::string FitLeft(absl::string_view text, int32_t columns) { return Fit(text, columns, false); }
std::string FitRight(absl::string_view text, int32_t columns) { return Fit(text, columns, true); }

std::string Printable(absl::string_view text) {
  std::string out;
  while (!text.empty()) {
    const absl::string_view character = text.substr(0, CharacterBytes(text));
    text.remove_prefix(character.size());
    const bool broken = character.size() == 1 && static_cast<unsigned char>(character[0]) >= 0x80;
    if (broken || (IsControl(character) && character[0] != '\t')) {
      out += kReplacement;
    } else {
      out.append(character.data(), character.size());
    }
  }
  return out;
}

void StyledLines::Append(absl::string_view text, const char* style) {
  SetStyle(style);
  while (!text.empty()) {
    const absl::string_view character = text.substr(0, CharacterBytes(text));
    text.remove_prefix(character.size());
    if (character == "\n") {
      Break();
    } else if (character == "\t") {
      for (int32_t space = 4 - column_ % 4; space > 0; --space) Put(" ");
    } else if (character.size() == 1 && static_cast<unsigned char>(character[0]) >= 0x80) {
      // Tokens may hold pieces of a character: the terminal puts them together again.
      if ((static_cast<unsigned char>(character[0]) & 0xC0) == 0x80) {
        lines_.back().append(character.data(), 1);
      } else {
        Put(character);
      }
    } else if (character != "\r") {
      Put(Printable(character));
    }
  }
}

std::string StyledLines::Take(int32_t lines_max) {
  if (colour_) lines_.back() += ansi::kReset;
  const size_t kept = std::min<size_t>(lines_.size(), static_cast<size_t>(std::max(0, lines_max)));
  std::string text;
  for (size_t i = lines_.size() - kept; i < lines_.size(); ++i) {
    absl::StrAppend(&text, lines_[i], "\n");
  }
  return text;
}

void StyledLines::SetStyle(const char* style) {
  if (!colour_ || style == style_) return;
  style_ = style;
  absl::StrAppend(&lines_.back(), ansi::kReset, style_);
}

void StyledLines::Break() {
  if (colour_) lines_.back() += ansi::kReset;
  lines_.push_back(colour_ ? style_ : "");
  column_ = 0;
}

void StyledLines::Put(absl::string_view character) {
  if (column_ == width_) Break();
  lines_.back().append(character.data(), character.size());
  ++column_;
}

LiveFrame::LiveFrame(std::FILE* out, Place place) : out_(out), place_(place) {
  const bool whole = place_ == Place::kWholeScreen;
  CINNABAR_CHECK(restore_fd.load() < 0) << "two live frames";
  restore_text.store(whole ? kBackToScreen : kShowCursor);
  restore_fd.store(fileno(out_));
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) signal(number, RestoreAndDie);
  std::fputs(whole ? kOtherScreen : "", out_);
  std::fputs(kHideCursor, out_);
}

LiveFrame::~LiveFrame() {
  std::fputs(place_ == Place::kWholeScreen ? kBackToScreen : kShowCursor, out_);
  std::fflush(out_);
  restore_fd.store(-1);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) signal(number, SIG_DFL);
}

void LiveFrame::Draw(const std::string& frame) {
  // Line by line over the old one, each cleared to its end, and all below it: nothing flickers.
  std::string text;
  if (place_ == Place::kWholeScreen) {
    text = "\033[H";
  } else if (lines_drawn_ > 0) {
    text = absl::StrFormat("\033[%dA\r", lines_drawn_);
  }
  for (const char c : frame) {
    if (c == '\n') text += "\033[K";
    text += c;
  }
  text += "\033[J";
  std::fwrite(text.data(), 1, text.size(), out_);
  std::fflush(out_);
  lines_drawn_ = static_cast<int32_t>(std::count(frame.begin(), frame.end(), '\n'));
}

std::string ShowWhole(int64_t count) {
  const std::string digits = absl::StrCat(count < 0 ? -count : count);
  std::string text = count < 0 ? "-" : "";
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string ShowCount(double count) {
  if (!std::isfinite(count)) return "-";
  const double size = std::abs(count);
  if (size >= 999.5e9) return absl::StrFormat("%.3g", count);
  if (size >= 999.5e6) return absl::StrFormat("%.2fG", count / 1e9);
  if (size >= 999.5e3) return absl::StrFormat("%.2fM", count / 1e6);
  if (size >= 99.95e3) return absl::StrFormat("%.0fk", count / 1e3);
  if (size >= 9.995e3) return absl::StrFormat("%.1fk", count / 1e3);
  if (size >= 99.95) return ShowWhole(std::llround(count));
  if (count == std::floor(count)) return absl::StrFormat("%.0f", count);
  return absl::StrFormat(size >= 9.995 ? "%.1f" : "%.2f", count);
}

std::string ShowSeconds(double seconds) {
  if (!std::isfinite(seconds)) return "-";
  if (seconds < 0.0) return absl::StrCat("-", ShowSeconds(-seconds));
  if (seconds == 0.0) return "0 s";
  if (seconds < 0.00995) return absl::StrFormat("%.2f ms", seconds * 1e3);
  if (seconds < 0.0995) return absl::StrFormat("%.1f ms", seconds * 1e3);
  if (seconds < 0.9995) return absl::StrFormat("%.0f ms", seconds * 1e3);
  if (seconds < 99.95) return absl::StrFormat(seconds < 9.995 ? "%.2f s" : "%.1f s", seconds);
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (whole < 3600) return absl::StrFormat("%d min %02d s", whole / 60, whole % 60);
  return absl::StrFormat("%d h %02d min", whole / 3600, whole / 60 % 60);
}

}  // namespace cinnabar
