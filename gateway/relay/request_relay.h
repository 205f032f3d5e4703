// The events of one API request, which may be several queue requests (choices), in order and
// without a gap: pushed by the hub, filled in from Redis where a push was lost, and enqueued again
// when Redis has forgotten a request that it had accepted.
#ifndef CINNABAR_GATEWAY_RELAY_REQUEST_RELAY_H_
#define CINNABAR_GATEWAY_RELAY_REQUEST_RELAY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/http/asio.h"
#include "common/queue/types.h"
#include "gateway/relay/event_hub.h"
#include "gateway/relay/event_order.h"
#include "gateway/relay/queue_executor.h"

namespace cinnabar {

struct RelayEvent {
  int32_t choice = 0;
  QueueEvent event;  // in order of its steps; the last one of a choice has a final_state
};

// One coroutine at a time; the inbox takes deliveries from any thread. `executor` and `hub` are
// borrowed and outlive it.
class RequestRelay {
 public:
  // Its coroutines run on `io`.
  RequestRelay(asio::any_io_executor io, QueueExecutor& executor, EventHub& hub);
  ~RequestRelay();
  RequestRelay(const RequestRelay&) = delete;

  // Enqueues one more choice. Accepted: its events come. Duplicate (idempotency): attached to the
  // request that exists, all its events come from the first. Other outcomes, and errors: nothing is
  // held.
  asio::awaitable<absl::StatusOr<EnqueueResult>> Enqueue(EnqueueRequest request,
                                                         AdmissionLimits limits);
  // Attaches one more choice to a request that exists. NotFound: none of this tenant.
  asio::awaitable<absl::Status> Attach(std::string request, std::string tenant);

  // The next event of any choice; nullopt at `until`, or when Interrupt() was called. NotFound: a
  // request that this gateway only attached to is gone from Redis. Redis being away is not an
  // error: it waits.
  asio::awaitable<absl::StatusOr<std::optional<RelayEvent>>> Next(absl::Time until);

  // Ends a wait in Next(); from any thread. Stays set.
  void Interrupt();
  bool interrupted() const;

  // Ends the choice in the queue, without waiting, whoever else waits for it.
  void Cancel(int32_t choice, const std::string& why);
  // Waits for no choice any more. Those that nobody else waits for, here or at another gateway, are
  // ended in the queue: at once, or for a client that may come back when `grace` has passed.
  void Leave(const std::string& why, absl::Duration grace);

  int32_t num_choices() const { return static_cast<int32_t>(choices_.size()); }
  bool finished() const;  // every choice had its last event
  const std::string& request_id(int32_t choice) const { return choices_[choice].id; }
  int64_t replays() const { return replays_; }  // enqueued again after a rewind

 private:
  class Inbox;
  struct Choice {
    std::string id;
    std::string tenant;
    std::optional<EnqueueRequest> payload;  // of what was enqueued here, until its end
    absl::Time deadline;                    // by our clock, for a replay
    EventOrder order;
  };

  asio::awaitable<absl::Status> Look(int32_t choice);
  asio::awaitable<absl::Status> Replay(int32_t choice);
  std::optional<RelayEvent> Take();
  void Accept(QueueEvent event);
  void Forget(Choice& choice);

  const asio::any_io_executor io_;
  QueueExecutor& executor_;
  EventHub& hub_;
  std::shared_ptr<Inbox> inbox_;
  std::vector<Choice> choices_;
  int64_t replays_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_RELAY_REQUEST_RELAY_H_
