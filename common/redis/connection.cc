#include "common/redis/connection.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

using Clock = std::chrono::steady_clock;

Clock::time_point DeadlineAfter(absl::Duration timeout) {
  return Clock::now() + absl::ToChronoMilliseconds(std::min(timeout, absl::Hours(24)));
}

// Waits for `events`; false when the deadline passed.
bool PollUntil(int fd, short events, Clock::time_point deadline) {  // NOLINT: the type of poll
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry = {.fd = fd, .events = events, .revents = 0};
    const int ready = poll(&entry, 1, static_cast<int>(std::max<int64_t>(left, 0)));
    if (ready > 0) return true;
    if (ready == 0) return false;
    if (errno != EINTR) return true;  // the next call on the socket reports it
  }
}

// A connected, non-blocking socket, or the errno.
absl::StatusOr<int> Connect(int family, const sockaddr* address, socklen_t size,
                            Clock::time_point deadline) {
  const int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return absl::ErrnoToStatus(errno, "socket");
  int error = connect(fd, address, size) == 0 ? 0 : errno;
  if (error == EINPROGRESS) {
    socklen_t error_size = sizeof(error);
    if (!PollUntil(fd, POLLOUT, deadline)) {
      error = ETIMEDOUT;
    } else if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_size) != 0) {
      error = errno;
    }
  }
  if (error != 0) {
    close(fd);
    return absl::UnavailableError(std::strerror(error));
  }
  return fd;
}

}  // namespace

std::string RedisAddress::ToString() const {
  return !host.empty() && host[0] == '/' ? host : absl::StrCat(host, ":", port);
}

void AppendRedisCommand(absl::Span<const absl::string_view> args, std::string& out) {
  absl::StrAppend(&out, "*", args.size(), "\r\n");
  for (const absl::string_view arg : args)
    absl::StrAppend(&out, "$", arg.size(), "\r\n", arg, "\r\n");
}

absl::StatusOr<std::unique_ptr<RedisConnection>> RedisConnection::Open(const RedisAddress& address,
                                                                       absl::Duration timeout,
                                                                       ReplyLimits limits) {
  const Clock::time_point deadline = DeadlineAfter(timeout);
  absl::StatusOr<int> fd = absl::UnavailableError("no address");
  if (!address.host.empty() && address.host[0] == '/') {
    sockaddr_un path{};
    path.sun_family = AF_UNIX;
    if (address.host.size() >= sizeof(path.sun_path))
      return absl::InvalidArgumentError("socket path is too long");
    std::memcpy(path.sun_path, address.host.data(), address.host.size());
    fd = Connect(AF_UNIX, reinterpret_cast<const sockaddr*>(&path), sizeof(path), deadline);
  } else {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    const int error =
        getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found);
    if (error != 0)
      return absl::UnavailableError(
          absl::StrCat("resolve ", address.host, ": ", gai_strerror(error)));
    for (const addrinfo* each = found; each != nullptr && !fd.ok(); each = each->ai_next) {
      fd = Connect(each->ai_family, each->ai_addr, each->ai_addrlen, deadline);
    }
    freeaddrinfo(found);
    if (fd.ok()) {
      const int on = 1;  // best effort: a socket without them works, only slower to fail
      (void)setsockopt(*fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
      (void)setsockopt(*fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    }
  }
  if (!fd.ok()) {
    return absl::UnavailableError(
        absl::StrCat("connect to Redis at ", address.ToString(), ": ", fd.status().message()));
  }
  return std::unique_ptr<RedisConnection>(new RedisConnection(*fd, address.ToString(), limits));
}

RedisConnection::RedisConnection(int fd, std::string peer, ReplyLimits limits)
    : fd_(fd), peer_(std::move(peer)), decoder_(limits) {}

RedisConnection::~RedisConnection() {
  if (fd_ >= 0) close(fd_);
}

absl::Status RedisConnection::Die(absl::Status why) {
  close(fd_);
  fd_ = -1;
  return absl::Status(why.code(), absl::StrCat("Redis at ", peer_, ": ", why.message()));
}

bool RedisConnection::Stale() {
  if (fd_ < 0) return true;
  pollfd entry = {.fd = fd_, .events = POLLIN, .revents = 0};
  return poll(&entry, 1, 0) != 0;
}

absl::StatusOr<bool> RedisConnection::AwaitReply(absl::Duration idle, absl::Duration timeout,
                                                 int64_t bytes_max,
                                                 std::vector<RedisReply>& replies) {
  CINNABAR_CHECK(fd_ >= 0) << "a dead connection";
  absl::StatusOr<std::optional<RedisReply>> reply = decoder_.Next();
  if (!reply.ok()) return Die(reply.status());
  if (reply->has_value()) {
    replies.push_back(*std::move(*reply));
    return true;
  }
  if (!PollUntil(fd_, POLLIN, DeadlineAfter(idle))) return false;
  const absl::Status status = Exchange("", 1, timeout, bytes_max, replies);
  if (!status.ok()) return status;
  return true;
}

absl::Status RedisConnection::Exchange(absl::string_view out, size_t num_replies,
                                       absl::Duration timeout, int64_t bytes_max,
                                       std::vector<RedisReply>& replies) {
  CINNABAR_CHECK(fd_ >= 0) << "a dead connection";
  const Clock::time_point deadline = DeadlineAfter(timeout);
  const size_t want = replies.size() + num_replies;
  int64_t received_bytes = 0;
  char buffer[32 << 10];
  while (true) {
    while (replies.size() < want) {
      absl::StatusOr<std::optional<RedisReply>> reply = decoder_.Next();
      if (!reply.ok()) return Die(reply.status());
      if (!reply->has_value()) break;
      replies.push_back(*std::move(*reply));
    }
    if (replies.size() == want && out.empty()) return absl::OkStatus();
    if (!out.empty()) {
      const ssize_t sent = send(fd_, out.data(), out.size(), MSG_NOSIGNAL);
      if (sent > 0) {
        out.remove_prefix(static_cast<size_t>(sent));
        if (out.empty() && replies.size() == want) return absl::OkStatus();
      } else if (sent < 0 && errno != EAGAIN && errno != EINTR) {
        return Die(absl::UnavailableError(absl::StrCat("send: ", std::strerror(errno))));
      }
    }
    const short events =
        static_cast<short>(POLLIN | (out.empty() ? 0 : POLLOUT));  // NOLINT: of poll
    if (!PollUntil(fd_, events, deadline)) {
      return Die(absl::UnavailableError(absl::StrCat(
          "no reply within ", absl::FormatDuration(timeout), "; the command may have run")));
    }
    const ssize_t got = recv(fd_, buffer, sizeof(buffer), 0);
    if (got == 0)
      return Die(absl::UnavailableError("closed by the server; the command may have run"));
    if (got < 0) {
      if (errno == EAGAIN || errno == EINTR) continue;
      return Die(absl::UnavailableError(absl::StrCat("receive: ", std::strerror(errno))));
    }
    received_bytes += got;
    if (received_bytes > bytes_max) {
      return Die(
          absl::DataLossError(absl::StrCat("replies are longer than ", bytes_max, " bytes")));
    }
    if (absl::Status fed = decoder_.Feed({buffer, static_cast<size_t>(got)}); !fed.ok())
      return Die(std::move(fed));
  }
}

}  // namespace cinnabar
