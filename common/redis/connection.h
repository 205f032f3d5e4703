// One socket to one server: whole exchanges under one deadline. Internal to common/redis.
#ifndef CINNABAR_COMMON_REDIS_CONNECTION_H_
#define CINNABAR_COMMON_REDIS_CONNECTION_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/redis/reply.h"

namespace cinnabar {

struct RedisAddress {
  std::string host = "127.0.0.1";  // name or number; a path that starts with '/' is a Unix socket
  int32_t port = 6379;
  std::string ToString() const;
  bool operator==(const RedisAddress& other) const {
    return host == other.host && port == other.port;
  }
};

// Appends the wire form of one command; arguments are any bytes.
void AppendRedisCommand(absl::Span<const absl::string_view> args, std::string& out);

// Any error leaves a late reply or half a command somewhere on the wire: the connection is then
// dead and stays so. Deadlines are on the steady clock and cover the whole call, not each read, so
// that a server which dribbles bytes cannot hold a caller. Writes never raise SIGPIPE. Not
// thread-safe.
class RedisConnection {
 public:
  // Unavailable when nobody answers in time. Name resolution is the system's and may take longer.
  static absl::StatusOr<std::unique_ptr<RedisConnection>> Open(const RedisAddress& address,
                                                               absl::Duration timeout,
                                                               ReplyLimits limits);
  ~RedisConnection();
  RedisConnection(const RedisConnection&) = delete;
  RedisConnection& operator=(const RedisConnection&) = delete;

  // Sends `out` and appends `num_replies` replies to `replies`, reading while it writes. On an
  // error `replies` holds those that came before it. Unavailable: cut off or out of time. DataLoss:
  // not RESP2, or over a limit. Error replies are replies. `bytes_max` bounds all the replies
  // together.
  absl::Status Exchange(absl::string_view out, size_t num_replies, absl::Duration timeout,
                        int64_t bytes_max, std::vector<RedisReply>& replies);

  // For replies that come unasked: waits up to `idle` for one to begin (false: none did, and the
  // connection lives on), then up to `timeout` for the rest of it.
  absl::StatusOr<bool> AwaitReply(absl::Duration idle, absl::Duration timeout, int64_t bytes_max,
                                  std::vector<RedisReply>& replies);

  bool alive() const { return fd_ >= 0; }
  // Whether the peer has closed, or sent what nobody asked for: such a connection is not fit for a
  // command.
  bool Stale();

 private:
  RedisConnection(int fd, std::string peer, ReplyLimits limits);
  absl::Status Die(absl::Status why);

  int fd_;
  std::string peer_;
  ReplyDecoder decoder_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_REDIS_CONNECTION_H_
