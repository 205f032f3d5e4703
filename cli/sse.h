// Server-sent events from bytes, as a browser's EventSource reads them (WHATWG HTML, section 9.2).
#ifndef CINNABAR_CLI_SSE_H_
#define CINNABAR_CLI_SSE_H_

#include <cstddef>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace cinnabar {

struct SseEvent {
  std::string id;     // the last one seen, on this event or before it
  std::string event;  // empty: "message"
  std::string data;   // lines joined with "\n"
};

// Comments, unknown fields and events without data are skipped. Not thread-safe.
class SseDecoder {
 public:
  // `event_bytes_max` bounds one event; more is DataLoss, and the decoder is of no more use.
  explicit SseDecoder(size_t event_bytes_max = 8 << 20) : event_bytes_max_(event_bytes_max) {}

  // Calls `on_event` for each event that `bytes` complete. Pieces may be cut anywhere.
  absl::Status Feed(absl::string_view bytes, absl::FunctionRef<void(const SseEvent&)> on_event);

 private:
  void TakeLine(absl::string_view line, absl::FunctionRef<void(const SseEvent&)> on_event);

  size_t event_bytes_max_;
  std::string line_;       // begun, not ended
  bool after_cr_ = false;  // a "\n" now belongs to the line before
  bool at_start_ = true;   // a byte order mark may come
  bool has_data_ = false;
  SseEvent event_;
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_SSE_H_
