#include "common/queue/types.h"

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/check.h"

namespace cinnabar {

bool IsTerminal(RequestState state) {
  switch (state) {
    case RequestState::kQueued:
    case RequestState::kLeased:
    case RequestState::kRunning:
      return false;
    case RequestState::kDone:
    case RequestState::kFailed:
    case RequestState::kCancelled:
    case RequestState::kExpired:
      return true;
  }
  CINNABAR_CHECK(false) << "not a state: " << static_cast<int>(state);
  return true;
}

bool MayMove(RequestState from, RequestState to) {
  using enum RequestState;
  switch (from) {
    case kQueued:
      return to == kLeased || to == kCancelled || to == kExpired;
    // queued: nobody started it in time; failed: its payload is lost
    case kLeased:
      return to == kRunning || to == kQueued || to == kFailed || to == kCancelled || to == kExpired;
    // queued: handed back, or its worker's lease ran out
    case kRunning:
      return to == kQueued || IsTerminal(to);
    case kDone:
    case kFailed:
    case kCancelled:
    case kExpired:
      return false;
  }
  CINNABAR_CHECK(false) << "not a state: " << static_cast<int>(from);
  return false;
}

absl::string_view RequestStateName(RequestState state) {
  switch (state) {
    case RequestState::kQueued:
      return "queued";
    case RequestState::kLeased:
      return "leased";
    case RequestState::kRunning:
      return "running";
    case RequestState::kDone:
      return "done";
    case RequestState::kFailed:
      return "failed";
    case RequestState::kCancelled:
      return "cancelled";
    case RequestState::kExpired:
      return "expired";
  }
  CINNABAR_CHECK(false) << "not a state: " << static_cast<int>(state);
  return "";
}

absl::StatusOr<RequestState> ParseRequestState(absl::string_view name) {
  for (const RequestState state : kRequestStates) {
    if (RequestStateName(state) == name) return state;
  }
  return absl::DataLossError(absl::StrCat("not a request state: ", name));
}

absl::string_view RequestClassName(RequestClass request_class) {
  switch (request_class) {
    case RequestClass::kInteractive:
      return "interactive";
    case RequestClass::kStandard:
      return "standard";
    case RequestClass::kBatch:
      return "batch";
  }
  CINNABAR_CHECK(false) << "not a class: " << static_cast<int>(request_class);
  return "";
}

absl::StatusOr<RequestClass> ParseRequestClass(absl::string_view name) {
  for (const RequestClass request_class : kRequestClasses) {
    if (RequestClassName(request_class) == name) return request_class;
  }
  return absl::DataLossError(absl::StrCat("not a request class: ", name));
}

std::string FormatUsage(const Usage& usage) {
  return absl::StrCat(usage.output_tokens, " ", usage.forwards, " ", usage.device_us, " ",
                      usage.energy_mj);
}

absl::StatusOr<Usage> ParseUsage(absl::string_view text) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ' ');
  Usage usage;
  if (parts.size() != 4 || !absl::SimpleAtoi(parts[0], &usage.output_tokens) ||
      !absl::SimpleAtoi(parts[1], &usage.forwards) ||
      !absl::SimpleAtoi(parts[2], &usage.device_us) ||
      !absl::SimpleAtoi(parts[3], &usage.energy_mj)) {
    return absl::DataLossError("usage does not parse");
  }
  return usage;
}

}  // namespace cinnabar
