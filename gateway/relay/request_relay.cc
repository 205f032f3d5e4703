#include "gateway/relay/request_relay.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/http/asio.h"
#include "common/http/async_queue.h"

namespace cinnabar {
namespace {

// A silent request is looked up now and then: a push may be lost without a trace.
constexpr absl::Duration kLookEvery = absl::Seconds(5);
constexpr absl::Duration kLookAgain = absl::Milliseconds(200);  // while Redis is away
constexpr int32_t kEventsPerLook = 512;
constexpr size_t kInboxMax = 1024;

}  // namespace

// Signals that fit no more are dropped, and Redis is asked instead.
class RequestRelay::Inbox : public EventInbox {
 public:
  explicit Inbox(asio::any_io_executor executor) : queue_(std::move(executor), kInboxMax) {}

  void Deliver(QueueEvent event) override {
    if (!queue_.Push(std::move(event))) missed_ = true;
  }
  void Resync() override {
    missed_ = true;
    queue_.Push(QueueEvent{});
  }
  void Interrupt() {
    interrupted_ = true;
    queue_.Push(QueueEvent{});
  }
  bool TakeMissed() { return missed_.exchange(false); }
  bool interrupted() const { return interrupted_; }
  AsyncQueue<QueueEvent>& queue() { return queue_; }

 private:
  AsyncQueue<QueueEvent> queue_;
  std::atomic<bool> missed_ = false;
  std::atomic<bool> interrupted_ = false;
};

RequestRelay::RequestRelay(asio::any_io_executor io, QueueExecutor& executor, EventHub& hub)
    : io_(io), executor_(executor), hub_(hub), inbox_(std::make_shared<Inbox>(std::move(io))) {}

RequestRelay::~RequestRelay() {
  for (Choice& choice : choices_) Forget(choice);
}

void RequestRelay::Forget(Choice& choice) {
  if (!choice.id.empty()) hub_.Remove(choice.id, inbox_.get());
  choice.payload.reset();
}

asio::awaitable<absl::StatusOr<EnqueueResult>> RequestRelay::Enqueue(EnqueueRequest request,
                                                                     AdmissionLimits limits) {
  request.gateway = hub_.gateway();
  // Listened for before it exists: its first event may come before the answer.
  hub_.Add(request.id, inbox_);
  const QueueCall<EnqueueResult> enqueue = [request, limits](Queue& queue) {
    return queue.Enqueue(request, limits);
  };
  absl::StatusOr<EnqueueResult> result = co_await executor_.Run<EnqueueResult>(enqueue);
  if (!result.ok() || result->outcome != EnqueueOutcome::kAccepted) {
    hub_.Remove(request.id, inbox_.get());
    if (!result.ok()) {
      // It may have been accepted all the same: what nobody waits for must not run.
      executor_.Post([id = request.id, tenant = request.tenant](
                         Queue& queue) { (void)queue.Cancel(id, tenant, "not_admitted").ok(); },
                     /*must=*/true);
      co_return result;
    }
    if (result->outcome == EnqueueOutcome::kDuplicate) {
      std::string id = result->id;
      const absl::Status attached = co_await Attach(std::move(id), request.tenant);
      if (!attached.ok()) co_return attached;
    }
    co_return result;
  }
  Choice choice;
  choice.id = request.id;
  choice.tenant = request.tenant;
  choice.deadline = absl::Now() + request.deadline;
  choice.payload = std::move(request);
  choices_.push_back(std::move(choice));
  co_return result;
}

asio::awaitable<absl::Status> RequestRelay::Attach(std::string request, std::string tenant) {
  hub_.Add(request, inbox_);
  const QueueCall<RequestView> attach = [request, tenant, gateway = hub_.gateway()](Queue& queue) {
    return queue.Attach(request, tenant, 0, 1, gateway);
  };
  absl::StatusOr<RequestView> view = co_await executor_.Run<RequestView>(attach);
  if (!view.ok()) {
    hub_.Remove(request, inbox_.get());
    co_return view.status();
  }
  Choice choice;
  choice.id = std::move(request);
  choice.tenant = std::move(tenant);
  choice.order.Miss();
  choices_.push_back(std::move(choice));
  co_return absl::OkStatus();
}

void RequestRelay::Accept(QueueEvent event) {
  for (Choice& choice : choices_) {
    if (choice.id == event.request) return choice.order.Add(std::move(event));
  }
}

std::optional<RelayEvent> RequestRelay::Take() {
  for (size_t i = 0; i < choices_.size(); ++i) {
    std::optional<QueueEvent> next = choices_[i].order.Take();
    if (!next.has_value()) continue;
    if (next->final_state.has_value()) Forget(choices_[i]);
    return RelayEvent{.choice = static_cast<int32_t>(i), .event = *std::move(next)};
  }
  return std::nullopt;
}

// Reads what Redis has from next_step on. Unavailable: Redis is away.
asio::awaitable<absl::Status> RequestRelay::Look(int32_t index) {
  const std::string id = choices_[index].id;
  const std::string tenant = choices_[index].tenant;
  const int32_t after = choices_[index].order.next_step() - 1;
  const QueueCall<RequestView> look = [id, tenant, after](Queue& queue) {
    return queue.Events(id, tenant, after, kEventsPerLook);
  };
  absl::StatusOr<RequestView> view = co_await executor_.Run<RequestView>(look);
  Choice& choice = choices_[index];
  if (absl::IsNotFound(view.status()) && choice.payload.has_value()) {
    const absl::Status replayed = co_await Replay(index);
    co_return replayed;
  }
  if (!view.ok()) co_return view.status();
  const bool all = static_cast<int32_t>(view->events.size()) < kEventsPerLook;
  choice.order.AddView(*std::move(view), all);
  co_return absl::OkStatus();
}

// Redis lost a request that it had accepted: it is enqueued as it was, past every limit, and its
// steps come again; the ones that were passed on already are skipped.
asio::awaitable<absl::Status> RequestRelay::Replay(int32_t index) {
  EnqueueRequest request = *choices_[index].payload;
  request.replay = true;
  request.deadline = std::max(choices_[index].deadline - absl::Now(), absl::Milliseconds(1));
  const QueueCall<EnqueueResult> enqueue = [request](Queue& queue) {
    return queue.Enqueue(request, AdmissionLimits{});
  };
  absl::StatusOr<EnqueueResult> result = co_await executor_.Run<EnqueueResult>(enqueue);
  if (!result.ok()) co_return result.status();
  ++replays_;
  Choice& choice = choices_[index];
  if (result->id != choice.id) {
    // Another gateway enqueued it under its own id meanwhile (the same idempotency key).
    hub_.Remove(choice.id, inbox_.get());
    choice.id = result->id;
    hub_.Add(choice.id, inbox_);
  }
  co_return absl::OkStatus();
}

asio::awaitable<absl::StatusOr<std::optional<RelayEvent>>> RequestRelay::Next(absl::Time until) {
  absl::Time look_at = absl::Now() + kLookEvery;
  for (;;) {
    if (std::optional<RelayEvent> next = Take(); next.has_value()) co_return next;
    if (inbox_->interrupted()) co_return std::nullopt;
    if (finished()) co_return std::nullopt;

    bool away = false;
    if (inbox_->TakeMissed() || absl::Now() >= look_at) {
      look_at = absl::Now() + kLookEvery;
      for (Choice& choice : choices_) choice.order.Miss();
    }
    bool looked = false;
    for (int32_t i = 0; i < num_choices(); ++i) {
      if (!choices_[i].order.missing()) continue;
      const absl::Status status = co_await Look(i);
      looked = true;
      if (absl::IsNotFound(status)) co_return status;
      if (absl::IsFailedPrecondition(status)) co_return status;
      away = away || !status.ok();
    }
    if (looked && !away) {
      if (std::optional<RelayEvent> next = Take(); next.has_value()) co_return next;
    }
    if (absl::Now() >= until) co_return std::nullopt;
    const absl::Time wake = std::min(until, away ? absl::Now() + kLookAgain : look_at);
    std::optional<QueueEvent> event = co_await inbox_->queue().Pop(wake - absl::Now());
    if (event.has_value() && !event->request.empty()) Accept(*std::move(event));
  }
}

void RequestRelay::Interrupt() { inbox_->Interrupt(); }
bool RequestRelay::interrupted() const { return inbox_->interrupted(); }

void RequestRelay::Cancel(int32_t index, const std::string& why) {
  Choice& choice = choices_[index];
  if (choice.order.done()) return;
  executor_.Post([id = choice.id, tenant = choice.tenant,
                  why](Queue& queue) { (void)queue.Cancel(id, tenant, why).ok(); },
                 /*must=*/true);
  choice.order.Close();
  Forget(choice);
}

void RequestRelay::Leave(const std::string& why, absl::Duration grace) {
  for (Choice& choice : choices_) {
    if (choice.order.done()) continue;
    const auto leave = [&executor = executor_, &hub = hub_, id = choice.id, tenant = choice.tenant,
                        why] {
      if (hub.Waited(id)) return;
      executor.Post([id, tenant, why, gateway = hub.gateway()](
                        Queue& queue) { (void)queue.Cancel(id, tenant, why, gateway).ok(); },
                    /*must=*/true);
    };
    choice.order.Close();
    Forget(choice);
    if (grace <= absl::ZeroDuration()) {
      leave();
      continue;
    }
    auto timer = std::make_shared<asio::steady_timer>(io_, absl::ToChronoNanoseconds(grace));
    timer->async_wait([timer, leave](const boost::system::error_code&) { leave(); });
  }
}

bool RequestRelay::finished() const {
  return std::all_of(choices_.begin(), choices_.end(),
                     [](const Choice& choice) { return choice.order.done(); });
}

}  // namespace cinnabar
