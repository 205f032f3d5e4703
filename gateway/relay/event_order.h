// The events of one queue request, put in order and without a gap: pushes may be lost, late or
// double, and what Redis tells when asked fills in.
#ifndef CINNABAR_GATEWAY_RELAY_EVENT_ORDER_H_
#define CINNABAR_GATEWAY_RELAY_EVENT_ORDER_H_

#include <cstdint>
#include <map>
#include <optional>

#include "common/queue/types.h"

namespace cinnabar {

// Pure. One thread at a time.
class EventOrder {
 public:
  // An event that came: before its turn it is kept, after it ignored.
  void Add(QueueEvent event);
  // What Redis has after `next_step() - 1`; `all` when nothing was left off.
  void AddView(RequestView view, bool all);
  // The next event in order, once it is there. The one with a final_state is the last.
  std::optional<QueueEvent> Take();

  // Events may be missing: AddView() is wanted.
  void Miss() { missing_ = !done_; }
  bool missing() const;
  bool done() const { return done_; }
  void Close();  // no further events are wanted
  int32_t next_step() const { return next_step_; }

 private:
  bool HasNext() const { return !early_.empty() && early_.begin()->first == next_step_; }

  int32_t next_step_ = 1;
  std::map<int32_t, QueueEvent> early_;  // from next_step_ on
  bool missing_ = false;
  bool done_ = false;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_RELAY_EVENT_ORDER_H_
