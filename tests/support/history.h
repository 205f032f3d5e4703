// What clients saw of the service, and whether the promises held. Pure: for chaos tests of any
// size.
#ifndef CINNABAR_TESTS_SUPPORT_HISTORY_H_
#define CINNABAR_TESTS_SUPPORT_HISTORY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "common/queue/types.h"

namespace cinnabar {

// In the order in which one observer (a client's stream, an exporter) saw them; order between
// observers means nothing.
struct HistoryEvent {
  enum class Kind {
    kAccepted,  // the client has an answer that says so
    kUnknown,   // the enqueue's answer was lost: it may or may not be accepted, but not both
    kRefused,
    kProgress,  // event `step` with `data`, seen by `observer`
    kFinal,     // `state` as event `step`, with `data`, seen by `observer`
    kLedger,    // an entry with `state`
  };
  Kind kind = Kind::kAccepted;
  std::string request;
  std::string observer;
  int32_t step = 0;
  RequestState state = RequestState::kDone;
  std::string data;
};

// The violations, one line each; empty when all holds:
//   an accepted request ends exactly once, for every observer in the same state, and has one ledger
//   entry of that state; a refused one leaves no trace; each observer's steps go up by one (a
//   resumed observer starts where it likes), the final event is the last; a step has one content,
//   whoever saw it. `complete` false allows what has not ended yet.
std::vector<std::string> CheckHistory(absl::Span<const HistoryEvent> events, bool complete);

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SUPPORT_HISTORY_H_
