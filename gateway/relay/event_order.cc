#include "gateway/relay/event_order.h"

#include <utility>

namespace cinnabar {

void EventOrder::Add(QueueEvent event) {
  if (done_ || event.step < next_step_) return;
  if (event.step > next_step_) missing_ = true;
  const int32_t step = event.step;
  early_.emplace(step, std::move(event));
}

void EventOrder::AddView(RequestView view, bool all) {
  if (done_) return;
  missing_ = !all;
  for (QueueEvent& event : view.events) {
    const int32_t step = event.step;
    if (step >= next_step_) early_.emplace(step, std::move(event));
  }
  // The events of a request that ended long ago are gone while its record is kept: the end is told
  // from the record.
  if (all && IsTerminal(view.state) && !HasNext()) {
    early_.clear();
    QueueEvent last;
    last.step = next_step_;
    last.final_state = view.state;
    last.data = view.result.empty() ? view.why : view.result;
    early_.emplace(last.step, std::move(last));
  }
}

std::optional<QueueEvent> EventOrder::Take() {
  if (!HasNext()) return std::nullopt;
  QueueEvent next = std::move(early_.begin()->second);
  early_.erase(early_.begin());
  ++next_step_;
  if (next.final_state.has_value()) Close();
  return next;
}

bool EventOrder::missing() const { return missing_ && !done_ && !HasNext(); }

void EventOrder::Close() {
  done_ = true;
  missing_ = false;
  early_.clear();
}

}  // namespace cinnabar
