#include "gateway/relay/event_hub.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace cinnabar {

EventHub::EventHub(RedisOptions redis, QueueOptions queue, std::string gateway)
    : redis_(std::move(redis)), queue_(std::move(queue)), gateway_(std::move(gateway)) {
  thread_ = std::thread([this] { Listen(); });
}

EventHub::~EventHub() {
  stopping_ = true;
  thread_.join();
}

void EventHub::Add(const std::string& request, std::shared_ptr<EventInbox> inbox) {
  MutexLock lock(mu_);
  Inboxes& inboxes = inboxes_[request];
  if (std::find(inboxes.begin(), inboxes.end(), inbox) == inboxes.end()) {
    inboxes.push_back(std::move(inbox));
  }
}

void EventHub::Remove(const std::string& request, const EventInbox* inbox) {
  MutexLock lock(mu_);
  const auto found = inboxes_.find(request);
  if (found == inboxes_.end()) return;
  Inboxes& inboxes = found->second;
  const auto is_it = [inbox](const std::shared_ptr<EventInbox>& one) { return one.get() == inbox; };
  inboxes.erase(std::remove_if(inboxes.begin(), inboxes.end(), is_it), inboxes.end());
  if (inboxes.empty()) inboxes_.erase(found);
}

bool EventHub::Waited(const std::string& request) const {
  MutexLock lock(mu_);
  return inboxes_.contains(request);
}

EventHub::Counters EventHub::counters() const {
  MutexLock lock(mu_);
  Counters counters = counters_;
  counters.inboxes = static_cast<int64_t>(inboxes_.size());
  return counters;
}

void EventHub::Listen() {
  RedisClient redis(redis_);
  const std::vector<std::string> channels = {Queue(redis, queue_).EventChannel(gateway_)};
  int32_t attempt = 1;
  while (!stopping_) {
    // The queue takes the client's on_connect for its calls; a subscription makes none.
    redis.set_on_connect(nullptr);
    if (const absl::Status status = redis.Subscribe(channels); !status.ok()) {
      redis.environment().Sleep(
          RedisBackoff(redis.options().retry, ++attempt, redis.environment().Uniform()));
      continue;
    }
    attempt = 1;
    {
      MutexLock lock(mu_);
      ++counters_.subscriptions;
      counters_.subscribed = true;
    }
    ResyncAll();
    while (!stopping_) {
      absl::StatusOr<std::optional<RedisMessage>> message = redis.ReadMessage(absl::Seconds(0.5));
      if (!message.ok()) break;
      if (!message->has_value()) continue;
      absl::StatusOr<std::vector<QueueEvent>> events =
          Queue::ParseEventMessage((*message)->payload);
      // What cannot be read is fetched by those who miss it.
      if (events.ok()) Route(*std::move(events));
    }
    MutexLock lock(mu_);
    counters_.subscribed = false;
  }
}

void EventHub::Route(std::vector<QueueEvent> events) {
  std::vector<std::pair<std::shared_ptr<EventInbox>, QueueEvent>> deliveries;
  deliveries.reserve(events.size());
  {
    MutexLock lock(mu_);
    counters_.events += static_cast<int64_t>(events.size());
    for (QueueEvent& event : events) {
      const auto found = inboxes_.find(event.request);
      if (found == inboxes_.end()) {
        ++counters_.strangers;
        continue;
      }
      const Inboxes& inboxes = found->second;
      for (size_t i = 1; i < inboxes.size(); ++i) deliveries.emplace_back(inboxes[i], event);
      deliveries.emplace_back(inboxes[0], std::move(event));
    }
  }
  for (auto& [inbox, event] : deliveries) inbox->Deliver(std::move(event));
}

void EventHub::ResyncAll() {
  std::vector<std::shared_ptr<EventInbox>> inboxes;
  {
    MutexLock lock(mu_);
    inboxes.reserve(inboxes_.size());
    for (const auto& [request, of_request] : inboxes_) {
      inboxes.insert(inboxes.end(), of_request.begin(), of_request.end());
    }
  }
  for (const std::shared_ptr<EventInbox>& inbox : inboxes) inbox->Resync();
}

}  // namespace cinnabar
