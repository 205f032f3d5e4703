#include "common/base/log.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/time/clock.h"

namespace cinnabar {
namespace {

constexpr size_t kEventsMax = 256;
constexpr size_t kLeftOutRoom = 48;  // for the note on fields that were left out, colours and ends

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

bool WantsColours() {
  if (isatty(STDERR_FILENO) == 0) return false;
  const char* no_colour = std::getenv("NO_COLOR");  // no-color.org: any text but the empty one
  if (no_colour != nullptr && *no_colour != '\0') return false;
  const char* terminal = std::getenv("TERM");
  return terminal != nullptr && std::strcmp(terminal, "dumb") != 0;
}

// Quoted, with everything that is not a printable ASCII character as \u00XX: one escape for each
// byte, which JSON can read and no terminal obeys.
std::string Quote(absl::string_view text) {
  const bool cut = text.size() > kLogValueBytesMax;
  std::string quoted = "\"";
  for (const char c : text.substr(0, kLogValueBytesMax)) {
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
  quoted.append(cut ? "...\"" : "\"");
  return quoted;
}

bool IsPlain(absl::string_view text) {
  return !text.empty() && text.size() <= kLogValueBytesMax &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isgraph(static_cast<unsigned char>(c)) && c != '"' && c != '=' &&
                  c != '\\';
         });
}

// Names come from our code. One that does not look like a name must not break the line all the
// same.
std::string Name(absl::string_view text) {
  std::string name(text.substr(0, 64));
  for (char& c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '-' && c != '.') {
      c = '_';
    }
  }
  return name.empty() ? "_" : name;
}

// A field that is called like one of the line's own would hide it from a JSON reader.
std::string FieldName(absl::string_view text) {
  std::string name = Name(text);
  if (name == "time" || name == "level" || name == "program" || name == "event") name += '_';
  return name;
}

std::string FieldText(const LogField& field, bool json) {
  if (field.number) {
    // JSON has no words for these.
    const bool finite = field.value.find_first_not_of("0123456789+-.eE") == std::string::npos;
    return json && !finite ? Quote(field.value) : field.value;
  }
  return !json && IsPlain(field.value) ? field.value : Quote(field.value);
}

void Write(LogLevel level, const std::string& text) {
  static const bool colours = WantsColours();
  std::string line = text;
  const absl::string_view colour = LevelColour(level);
  if (colours && !Options().json && !colour.empty()) line = absl::StrCat(colour, text, "\033[0m");
  line.push_back('\n');
  // Nobody is there to be told when stderr is gone, or full and not waited for.
  ssize_t written = 0;
  do {
    written = write(STDERR_FILENO, line.data(), line.size());
  } while (written < 0 && errno == EINTR);
}

// The limiter of an event. They are never taken away, for others hold on to them.
LogLimiter& LimiterOf(absl::string_view event, absl::Duration period) {
  struct Limiters {
    Mutex mu;  // leaf
    std::map<std::string, std::unique_ptr<LogLimiter>, std::less<>> by_event ABSL_GUARDED_BY(mu);
  };
  static auto* const limiters = new Limiters();
  std::string name(event);
  MutexLock lock(limiters->mu);
  if (limiters->by_event.size() >= kEventsMax && limiters->by_event.count(name) == 0) name = "";
  std::unique_ptr<LogLimiter>& limiter = limiters->by_event[name];
  if (limiter == nullptr) limiter = std::make_unique<LogLimiter>(period);
  return *limiter;
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
                          absl::string_view event, std::initializer_list<LogField> fields,
                          int64_t held_back) {
  const std::string time = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", now, absl::UTCTimeZone());
  const absl::string_view program =
      options.program.empty() ? absl::string_view("cinnabar") : options.program;
  std::string line =
      options.json
          ? absl::StrCat("{\"time\":\"", time, "\",\"level\":\"", LevelName(level),
                         "\",\"program\":\"", Name(program), "\",\"event\":\"", Name(event), "\"")
          : absl::StrCat(time, " ", LevelName(level), " ", Name(program), " event=", Name(event));
  const auto append = [&](absl::string_view name, absl::string_view text) {
    if (options.json) {
      absl::StrAppend(&line, ",\"", name, "\":", text);
    } else {
      absl::StrAppend(&line, " ", name, "=", text);
    }
  };
  if (held_back > 0) append("held_back", absl::StrCat(held_back));
  int left_out = 0;
  for (const LogField& field : fields) {
    const std::string name = FieldName(field.name);
    const std::string text = FieldText(field, options.json);
    if (line.size() + name.size() + text.size() + kLeftOutRoom > kLogLineBytesMax) {
      ++left_out;
    } else {
      append(name, text);
    }
  }
  if (left_out > 0) append("fields_left_out", absl::StrCat(left_out));
  if (options.json) line.push_back('}');
  return line;
}

void Log(LogLevel level, absl::string_view event, std::initializer_list<LogField> fields) {
  if (level < Options().level) return;
  Write(level, FormatLogLine(Options(), absl::Now(), level, event, fields));
}

bool LogEvery(absl::Duration period, LogLevel level, absl::string_view event,
              std::initializer_list<LogField> fields) {
  if (level < Options().level) return false;
  const absl::Time now = absl::Now();
  const int64_t held_back = LimiterOf(event, period).Admit(now);
  if (held_back < 0) return false;
  Write(level, FormatLogLine(Options(), now, level, event, fields, held_back));
  return true;
}

int64_t LogLimiter::Admit(absl::Time now) {
  MutexLock lock(mu_);
  // A clock that was set back must not silence an event until it has caught up.
  if (now < next_ && now >= next_ - period_) {
    ++held_back_;
    return -1;
  }
  next_ = now + period_;
  return std::exchange(held_back_, 0);
}

}  // namespace cinnabar
