#include "tests/support/history.h"

#include <map>
#include <optional>
#include <set>

#include "absl/strings/str_cat.h"

namespace cinnabar {

std::vector<std::string> CheckHistory(absl::Span<const HistoryEvent> events, bool complete) {
  struct Seen {
    bool accepted = false, unknown = false, refused = false;
    std::set<RequestState> finals;
    int ledger_entries = 0;
    std::set<RequestState> ledger_states;
    std::map<int32_t, std::string> content;    // step -> what it was
    std::map<std::string, int32_t> last_step;  // observer ->
    std::set<std::string> ended;               // observers
  };
  std::vector<std::string> wrong;
  std::map<std::string, Seen> requests;
  for (const HistoryEvent& event : events) {
    Seen& seen = requests[event.request];
    const auto complain = [&](absl::string_view what) {
      wrong.push_back(
          absl::StrCat(event.request, " step ", event.step, " (", event.observer, "): ", what));
    };
    switch (event.kind) {
      case HistoryEvent::Kind::kAccepted:
        seen.accepted = true;
        break;
      case HistoryEvent::Kind::kUnknown:
        seen.unknown = true;
        break;
      case HistoryEvent::Kind::kRefused:
        seen.refused = true;
        break;
      case HistoryEvent::Kind::kLedger:
        ++seen.ledger_entries;
        seen.ledger_states.insert(event.state);
        break;
      case HistoryEvent::Kind::kFinal:
        if (!IsTerminal(event.state)) complain("the final state is not terminal");
        seen.finals.insert(event.state);
        [[fallthrough]];
      case HistoryEvent::Kind::kProgress: {
        if (seen.ended.contains(event.observer)) complain("an event after the final one");
        const auto last = seen.last_step.find(event.observer);
        if (last != seen.last_step.end() && event.step != last->second + 1) {
          complain(absl::StrCat("follows step ", last->second));
        }
        seen.last_step[event.observer] = event.step;
        const bool final = event.kind == HistoryEvent::Kind::kFinal;
        const std::string content =
            absl::StrCat(final ? RequestStateName(event.state) : "p", ":", event.data);
        const auto [known, fresh] = seen.content.emplace(event.step, content);
        if (!fresh && known->second != content) complain("another content than before");
        if (final) seen.ended.insert(event.observer);
        break;
      }
    }
  }
  for (const auto& [id, seen] : requests) {
    const auto complain = [&, &id = id](absl::string_view what) {
      wrong.push_back(absl::StrCat(id, ": ", what));
    };
    if (seen.finals.size() > 1) complain("two terminal states");
    if (seen.ledger_entries > 1) complain(absl::StrCat(seen.ledger_entries, " ledger entries"));
    if (seen.refused && !seen.accepted && !seen.unknown &&
        (!seen.finals.empty() || seen.ledger_entries > 0)) {
      complain("refused, and yet it ran");
    }
    if (!seen.finals.empty() && seen.ledger_entries > 0 && seen.finals != seen.ledger_states) {
      complain("the ledger says another state");
    }
    if (complete && seen.accepted) {
      if (seen.finals.empty()) complain("accepted and lost");
      if (seen.ledger_entries == 0) complain("no ledger entry");
    }
    if (complete && !seen.finals.empty() && seen.ledger_entries == 0 && !seen.accepted)
      complain("no ledger entry");
  }
  return wrong;
}

}  // namespace cinnabar
