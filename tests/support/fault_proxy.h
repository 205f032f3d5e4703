// A TCP proxy on loopback that does to the traffic what networks do.
#ifndef CINNABAR_TESTS_SUPPORT_FAULT_PROXY_H_
#define CINNABAR_TESTS_SUPPORT_FAULT_PROXY_H_

#include <cstdint>
#include <thread>

#include "absl/time/time.h"
#include "common/base/mutex.h"

namespace cinnabar {

struct Fault {
  enum class Kind {
    kNone,
    kSwallowReplies,  // requests arrive, replies vanish
    kDropRequests,    // requests vanish
    kDelayReplies,    // by `delay`, each time some arrive
    kDribble,         // one byte of a reply each `delay`
    kCutReplies,      // after `bytes` more bytes of replies, then both sides are closed
    kCutRequests,     // after `bytes` more bytes of requests
    kRefuse,          // new connections are closed at once
  };
  Kind kind = Kind::kNone;
  absl::Duration delay;
  int64_t bytes = 0;
};

// Serves any number of connections to 127.0.0.1:`target_port` on threads of its own, until it goes.
class FaultProxy {
 public:
  explicit FaultProxy(int target_port);
  ~FaultProxy();
  FaultProxy(const FaultProxy&) = delete;

  int port() const { return port_; }
  void Set(Fault fault);  // for all connections, from the next bytes on
  int64_t num_connections() const;

 private:
  void Serve();
  void Pump(int client, int server);
  Fault Get() const;

  const int target_port_;
  int listener_ = -1;
  int port_ = 0;
  mutable Mutex mu_;
  Fault fault_ ABSL_GUARDED_BY(mu_);
  int64_t num_connections_ ABSL_GUARDED_BY(mu_) = 0;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::thread acceptor_;
};

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SUPPORT_FAULT_PROXY_H_
