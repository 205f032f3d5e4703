// A Redis client for one thread: commands, pipelines, blocking reads and subscriptions over one
// connection that is rebuilt when it breaks. Written for the traps of hiredis 0.14 (README.md):
// only its reply parser is used; sockets, deadlines and reconnects are ours.
#ifndef CINNABAR_COMMON_REDIS_CLIENT_H_
#define CINNABAR_COMMON_REDIS_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/environment.h"
#include "common/redis/connection.h"
#include "common/redis/reply.h"

namespace cinnabar {

// How often and how patiently a call that may run twice is repeated after Unavailable.
struct RedisRetryPolicy {
  int32_t attempts_max = 8;  // the first one counts
  absl::Duration backoff_min = absl::Milliseconds(50);
  absl::Duration backoff_max = absl::Seconds(2);
  double jitter = 0.5;  // in [0, 1]: the share of a wait that is random
};

// The wait before attempt `attempt` (2 is the second): doubling from backoff_min, capped at
// backoff_max, less a random part. `uniform` is in [0, 1). Pure.
absl::Duration RedisBackoff(const RedisRetryPolicy& policy, int32_t attempt, double uniform);

struct RedisOptions {
  RedisAddress address;                 // read when `sentinels` is empty
  std::vector<RedisAddress> sentinels;  // asked in order for the primary named `master_name`
  std::string master_name;
  std::string username;  // of an ACL user; empty: the default user
  std::string password;  // empty: no AUTH. Never printed
  std::string sentinel_password;
  std::string client_name = "cinnabar";  // shown by CLIENT LIST
  absl::Duration connect_timeout = absl::Seconds(1);
  absl::Duration command_timeout = absl::Seconds(2);  // for a whole command or pipeline
  ReplyLimits reply_limits;
  int64_t pipeline_bytes_max = 64 << 20;  // unsent commands, and again all replies of one pipeline
  RedisRetryPolicy retry;
};

// InvalidArgument naming the field.
absl::Status ValidateRedisOptions(const RedisOptions& options);

struct RedisServerInfo {
  std::string version;
  std::string run_id;  // another one after each start of the server, and on another server
  RedisAddress address;
};

struct RedisCounters {
  int64_t connects = 0;
  int64_t connect_failures = 0;
  int64_t connections_lost = 0;  // by an error or a timeout in the middle of an exchange
  int64_t retries = 0;
  int64_t error_replies = 0;
};

struct RedisMessage {
  std::string channel;
  std::string payload;
};

using RedisArgs = absl::Span<const absl::string_view>;

// Connects on the first use and again after every loss. One thread at a time.
class RedisClient {
 public:
  // `environment` (of the retries) is borrowed and outlives the client.
  explicit RedisClient(RedisOptions options, Environment& environment = Environment::Real());
  ~RedisClient();
  RedisClient(const RedisClient&) = delete;
  RedisClient& operator=(const RedisClient&) = delete;

  // Runs on every new connection, before any command on it; its error closes the connection and is
  // the command's. It may call Command() on the client it is given.
  void set_on_connect(std::function<absl::Status(RedisClient&)> on_connect) {
    on_connect_ = std::move(on_connect);
  }

  // No-op when connected. Finds the primary (asking the Sentinels), authenticates, and requires a
  // primary of Redis 7: Unavailable while there is none, FailedPrecondition for an older server.
  absl::Status Connect();
  void Close();
  // Of the present or last connection.
  const RedisServerInfo& server() const { return server_; }

  // One attempt. An error reply becomes the status of StatusFromRedisError; errors inside arrays
  // stay replies. Unavailable leaves open whether the command ran. `timeout` zero: command_timeout.
  absl::StatusOr<RedisReply> Command(RedisArgs args, absl::Duration timeout = absl::ZeroDuration());
  // Repeats after Unavailable by the retry policy: only for what may run twice.
  absl::StatusOr<RedisReply> Retry(RedisArgs args, absl::Duration timeout = absl::ZeroDuration());
  // A command that the server holds for up to `block` (which is also in `args`, not 0): the client
  // waits a second longer than that. One attempt.
  absl::StatusOr<RedisReply> Block(RedisArgs args, absl::Duration block);

  // A pipeline: Append queues, Flush sends all and returns one result for each in order. When the
  // connection breaks on the way the results so far stand, and the rest are Unavailable: they may
  // have run. ResourceExhausted: over pipeline_bytes_max, and the command was not queued.
  absl::Status Append(RedisArgs args);
  std::vector<absl::StatusOr<RedisReply>> Flush();

  // Subscribes this connection, which from then on serves ReadMessage only, until it is lost or
  // closed. A lost one is Unavailable: subscribe again, and read elsewhere what was missed
  // meanwhile.
  absl::Status Subscribe(absl::Span<const std::string> channels);
  // The next message, or nullopt after `timeout`.
  absl::StatusOr<std::optional<RedisMessage>> ReadMessage(absl::Duration timeout);

  const RedisCounters& counters() const { return counters_; }
  const RedisOptions& options() const { return options_; }
  Environment& environment() { return environment_; }

 private:
  absl::StatusOr<RedisAddress> FindPrimary();
  absl::Status Handshake(const RedisAddress& address);
  absl::StatusOr<RedisReply> Check(RedisReply reply);

  RedisOptions options_;
  Environment& environment_;
  std::function<absl::Status(RedisClient&)> on_connect_;
  std::unique_ptr<RedisConnection> connection_;
  bool connecting_ = false;
  bool subscribed_ = false;
  RedisServerInfo server_;
  std::string pipeline_;
  size_t num_appended_ = 0;
  RedisCounters counters_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_REDIS_CLIENT_H_
