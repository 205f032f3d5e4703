#include "cli/sse.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace cinnabar {

absl::Status SseDecoder::Feed(absl::string_view bytes,
                              absl::FunctionRef<void(const SseEvent&)> on_event) {
  while (!bytes.empty()) {
    if (after_cr_ && bytes[0] == '\n') bytes.remove_prefix(1);
    after_cr_ = false;
    const size_t end = bytes.find_first_of("\r\n");
    const absl::string_view piece = bytes.substr(0, end);
    if (line_.size() + piece.size() + event_.data.size() > event_bytes_max_) {
      return absl::DataLossError(absl::StrCat("an event of over ", event_bytes_max_, " bytes"));
    }
    if (end == absl::string_view::npos) {
      line_.append(piece.data(), piece.size());
      return absl::OkStatus();
    }
    if (line_.empty()) {
      TakeLine(piece, on_event);
    } else {
      line_.append(piece.data(), piece.size());
      TakeLine(line_, on_event);
      line_.clear();
    }
    after_cr_ = bytes[end] == '\r';
    bytes.remove_prefix(end + 1);
  }
  return absl::OkStatus();
}

void SseDecoder::TakeLine(absl::string_view line,
                          absl::FunctionRef<void(const SseEvent&)> on_event) {
  if (at_start_ && absl::StartsWith(line, "\xEF\xBB\xBF")) line.remove_prefix(3);
  at_start_ = false;
  if (line.empty()) {
    if (has_data_) on_event(event_);
    has_data_ = false;
    event_.event.clear();
    event_.data.clear();
    return;
  }
  const size_t colon = line.find(':');
  const absl::string_view field = line.substr(0, colon);
  absl::string_view value =
      colon == absl::string_view::npos ? absl::string_view() : line.substr(colon + 1);
  if (absl::StartsWith(value, " ")) value.remove_prefix(1);
  if (field == "data") {
    if (has_data_) event_.data.push_back('\n');
    event_.data.append(value.data(), value.size());
    has_data_ = true;
  } else if (field == "event") {
    event_.event = std::string(value);
  } else if (field == "id" && !absl::StrContains(value, '\0')) {
    event_.id = std::string(value);
  }
}

}  // namespace cinnabar
