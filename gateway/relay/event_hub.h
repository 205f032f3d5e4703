// The one subscription of a gateway: events of all its requests come in on a channel and go to the
// inbox of each. At most once: after a lost subscription every inbox is told to look in Redis.
#ifndef CINNABAR_GATEWAY_RELAY_EVENT_HUB_H_
#define CINNABAR_GATEWAY_RELAY_EVENT_HUB_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "common/base/mutex.h"
#include "common/queue/queue.h"

namespace cinnabar {

// Where the events of some requests go. Called from the hub's thread; must not block.
class EventInbox {
 public:
  virtual ~EventInbox() = default;
  virtual void Deliver(QueueEvent event) = 0;
  // Events may be missing.
  virtual void Resync() = 0;
};

// Thread-safe.
class EventHub {
 public:
  // `gateway` is the name that requests carry (EnqueueRequest::gateway).
  EventHub(RedisOptions redis, QueueOptions queue, std::string gateway);
  ~EventHub();
  EventHub(const EventHub&) = delete;

  const std::string& gateway() const { return gateway_; }
  // A request may have several inboxes: retries of one idempotency key. Adding one twice is once.
  void Add(const std::string& request, std::shared_ptr<EventInbox> inbox);
  void Remove(const std::string& request, const EventInbox* inbox);
  bool Waited(const std::string& request) const;  // whether it has an inbox

  struct Counters {
    int64_t events = 0;
    int64_t strangers = 0;  // events of requests that nobody here waits for (any more)
    int64_t subscriptions = 0;
    int64_t inboxes = 0;
    bool subscribed = false;
  };
  Counters counters() const;

 private:
  void Listen();
  void Route(std::vector<QueueEvent> events);
  void ResyncAll();

  const RedisOptions redis_;
  const QueueOptions queue_;
  const std::string gateway_;
  std::atomic<bool> stopping_ = false;
  mutable Mutex mu_;  // leaf: inboxes are called without it
  using Inboxes = absl::InlinedVector<std::shared_ptr<EventInbox>, 1>;
  absl::flat_hash_map<std::string, Inboxes> inboxes_ ABSL_GUARDED_BY(mu_);
  Counters counters_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_RELAY_EVENT_HUB_H_
