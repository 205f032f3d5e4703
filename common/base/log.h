// Log lines: one event each, to stderr.
//   2026-11-23T10:11:12.123Z WARN scheduler event=lease_expired request=r-12 waited_ms=5012
// Values are ids, counts and states, never prompt or answer text. What comes from outside cannot
// break the line: blanks, quotes, control bytes and bytes above ASCII are quoted and escaped; a
// value is cut after kLogValueBytesMax bytes, and fields that would take the line beyond
// kLogLineBytesMax are left out ("fields_left_out=2").
#ifndef CINNABAR_COMMON_BASE_LOG_H_
#define CINNABAR_COMMON_BASE_LOG_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace cinnabar {

inline constexpr size_t kLogValueBytesMax = 512;
// What a pipe takes whole (PIPE_BUF): lines of several processes do not mix.
inline constexpr size_t kLogLineBytesMax = 4096;

enum class LogLevel { kDebug, kInfo, kWarn, kError };
absl::StatusOr<LogLevel> ParseLogLevel(absl::string_view name);  // "debug", "info", "warn", "error"

struct LogOptions {
  std::string program;
  LogLevel level = LogLevel::kInfo;
  bool json = false;  // an object a line instead
};
// Once, before other threads start. Without it everything from kInfo on is logged, as text. Levels
// are coloured where stderr is a terminal, NO_COLOR is not set and TERM is not dumb.
void InitLog(const LogOptions& options);

struct LogField {
  LogField(absl::string_view name, absl::string_view value)  // NOLINT
      : name(name), value(value) {}
  LogField(absl::string_view name, const char* value) : name(name), value(value) {}
  LogField(absl::string_view name, const std::string& value) : name(name), value(value) {}
  LogField(absl::string_view name, bool value) : name(name), value(value ? "true" : "false") {}
  LogField(absl::string_view name, double value)
      : name(name), value(absl::StrCat(value)), number(true) {}
  template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
  LogField(absl::string_view name, T value)
      : name(name), value(absl::StrCat(value)), number(true) {}
  LogField(absl::string_view name, absl::Duration value)  // in milliseconds: name it so
      : LogField(name, absl::ToInt64Milliseconds(value)) {}
  LogField(absl::string_view name, const absl::Status& value)  // "UNAVAILABLE: connection refused"
      : name(name), value(value.ToString(absl::StatusToStringMode::kWithNoExtraData)) {}

  std::string name;
  std::string value;
  bool number = false;
};

// Thread-safe; one write(2) a line.
void Log(LogLevel level, absl::string_view event, std::initializer_list<LogField> fields = {});

// The line without its end, for tests. Pure. Names are written in the code: what is not of
// [A-Za-z0-9_.-] in them becomes '_'.
std::string FormatLogLine(const LogOptions& options, absl::Time now, LogLevel level,
                          absl::string_view event, std::initializer_list<LogField> fields,
                          int64_t held_back = 0);

// The same, at most once in `period` for an event; the line tells how many were held back since the
// last ("held_back=41"). Returns whether it was printed. Events are names written in the code: at
// most 256 of them are told apart, all others count as one.
bool LogEvery(absl::Duration period, LogLevel level, absl::string_view event,
              std::initializer_list<LogField> fields = {});

// What LogEvery keeps of an event: lets it through once in `period` and counts the others.
class LogLimiter {  // thread-safe
 public:
  explicit LogLimiter(absl::Duration period) : period_(period) {}
  // How many were held back since the last one let through, -1: hold this one back.
  int64_t Admit(absl::Time now);

 private:
  const absl::Duration period_;
  Mutex mu_;  // leaf
  absl::Time next_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  int64_t held_back_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_BASE_LOG_H_
