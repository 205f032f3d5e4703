#include "tests/support/fault_proxy.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <list>

#include "absl/time/clock.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

bool SendAll(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    data += sent;
    size -= static_cast<size_t>(sent);
  }
  return true;
}

}  // namespace

FaultProxy::FaultProxy(int target_port) : target_port_(target_port) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  CINNABAR_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0);
  CINNABAR_CHECK(listen(listener_, 64) == 0);
  CINNABAR_CHECK(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
  acceptor_ = std::thread([this] { Serve(); });
}

FaultProxy::~FaultProxy() {
  {
    MutexLock lock(mu_);
    stop_ = true;
  }
  acceptor_.join();
  close(listener_);
}

void FaultProxy::Set(Fault fault) {
  MutexLock lock(mu_);
  fault_ = fault;
}

Fault FaultProxy::Get() const {
  MutexLock lock(const_cast<Mutex&>(mu_));
  return fault_;
}

int64_t FaultProxy::num_connections() const {
  MutexLock lock(const_cast<Mutex&>(mu_));
  return num_connections_;
}

void FaultProxy::Serve() {
  std::list<std::thread> pumps;
  while (true) {
    {
      MutexLock lock(mu_);
      if (stop_) break;
    }
    pollfd entry = {.fd = listener_, .events = POLLIN, .revents = 0};
    if (poll(&entry, 1, 10) <= 0) continue;
    const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (client < 0) continue;
    {
      MutexLock lock(mu_);
      ++num_connections_;
    }
    const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in target = Loopback(target_port_);
    if (Get().kind == Fault::Kind::kRefuse ||
        connect(server, reinterpret_cast<const sockaddr*>(&target), sizeof(target)) != 0) {
      close(client);
      close(server);
      continue;
    }
    pumps.emplace_back([this, client, server] { Pump(client, server); });
  }
  for (std::thread& pump : pumps) pump.join();
}

void FaultProxy::Pump(int client, int server) {
  char buffer[16 << 10];
  bool open = true;
  while (open) {
    {
      MutexLock lock(mu_);
      if (stop_) break;
    }
    pollfd entries[2] = {{.fd = client, .events = POLLIN, .revents = 0},
                         {.fd = server, .events = POLLIN, .revents = 0}};
    if (poll(entries, 2, 10) <= 0) continue;
    for (const bool request : {true, false}) {
      if (entries[request ? 0 : 1].revents == 0) continue;
      const ssize_t got = recv(request ? client : server, buffer, sizeof(buffer), 0);
      if (got <= 0) {
        open = false;
        break;
      }
      const int to = request ? server : client;
      size_t size = static_cast<size_t>(got);
      const Fault fault = Get();
      switch (fault.kind) {
        case Fault::Kind::kNone:
        case Fault::Kind::kRefuse:
          break;
        case Fault::Kind::kSwallowReplies:
          if (!request) size = 0;
          break;
        case Fault::Kind::kDropRequests:
          if (request) size = 0;
          break;
        case Fault::Kind::kDelayReplies:
          if (!request) absl::SleepFor(fault.delay);
          break;
        case Fault::Kind::kDribble:
          for (size_t i = 0; !request && i < size && Get().kind == Fault::Kind::kDribble; ++i) {
            if (!SendAll(to, buffer + i, 1)) {
              open = false;
              break;
            }
            absl::SleepFor(fault.delay);
          }
          if (!request) size = 0;
          break;
        case Fault::Kind::kCutReplies:
        case Fault::Kind::kCutRequests:
          if (request == (fault.kind == Fault::Kind::kCutRequests)) {
            MutexLock lock(mu_);
            size = std::min(size, static_cast<size_t>(fault_.bytes));
            fault_.bytes -= static_cast<int64_t>(size);
            if (fault_.bytes == 0) open = false;
          }
          break;
      }
      if (size > 0 && !SendAll(to, buffer, size)) open = false;
    }
  }
  close(client);
  close(server);
}

}  // namespace cinnabar
