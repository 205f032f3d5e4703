#include "common/base/log.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "absl/strings/ascii.h"
#include "absl/time/clock.h"

namespace cinnabar {
namespace {

LogOptions& Options() {
  static auto* const options = new LogOptions();
  return *options;
}

absl::string_view LevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "DEBUG";
    case LogLevel::kInfo:
      return "INFO";
    case LogLevel::kWarn:
      return "WARN";
    case LogLevel::kError:
      return "ERROR";
  }
  return "?";
}

absl::string_view LevelColour(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "\033[2m";
    case LogLevel::kInfo:
      return "";
    case LogLevel::kWarn:
      return "\033[33m";
    case LogLevel::kError:
      return "\033[31m";
  }
  return "";
}

// Quoted, with everything that is not a printable ASCII character as \u00XX.
std::string Quote(absl::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      quoted.push_back('\\');
      quoted.push_back(c);
    } else if (byte < 0x20 || byte >= 0x7F) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", byte);
      quoted.append(escape);
    } else {
      quoted.push_back(c);
    }
  }
  quoted.push_back('"');
  return quoted;
}

bool IsPlain(absl::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c)) && c != '"' && c != '=' && c != '\\';
  });
}

}  // namespace

absl::StatusOr<LogLevel> ParseLogLevel(absl::string_view name) {
  for (const LogLevel level :
       {LogLevel::kDebug, LogLevel::kInfo, LogLevel::kWarn, LogLevel::kError}) {
    if (absl::AsciiStrToLower(LevelName(level)) == std::string_view(name.data(), name.size())) {
      return level;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("log level \"", name, "\": take debug, info, warn or error"));
}

void InitLog(const LogOptions& options) { Options() = options; }

std::string FormatLogLine(const LogOptions& options, absl::Time now, LogLevel level,
                          absl::string_view event, std::initializer_list<LogField> fields) {
  const std::string time = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", now, absl::UTCTimeZone());
  std::string line;
  if (options.json) {
    line = absl::StrCat("{\"time\":\"", time, "\",\"level\":\"", LevelName(level),
                        "\",\"program\":", Quote(options.program), ",\"event\":", Quote(event));
    for (const LogField& field : fields) {
      absl::StrAppend(&line, ",", Quote(field.name), ":",
                      field.number ? field.value : Quote(field.value));
    }
    line.push_back('}');
    return line;
  }
  line = absl::StrCat(time, " ", LevelName(level), " ", options.program, " event=", event);
  for (const LogField& field : fields) {
    absl::StrAppend(&line, " ", field.name, "=",
                    IsPlain(field.value) ? field.value : Quote(field.value));
  }
  return line;
}

void Log(LogLevel level, absl::string_view event, std::initializer_list<LogField> fields) {
  const LogOptions& options = Options();
  if (level < options.level) return;
  static const bool colours = isatty(STDERR_FILENO) != 0;
  std::string line = FormatLogLine(options, absl::Now(), level, event, fields);
  const absl::string_view colour = LevelColour(level);
  if (colours && !options.json && !colour.empty()) line = absl::StrCat(colour, line, "\033[0m");
  line.push_back('\n');
  // Nobody is there to be told when stderr is gone.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

int64_t LogLimiter::Admit(absl::Time now) {
  MutexLock lock(mu_);
  if (now < next_) {
    ++held_back_;
    return -1;
  }
  next_ = now + period_;
  return std::exchange(held_back_, 0);
}

}  // namespace cinnabar
