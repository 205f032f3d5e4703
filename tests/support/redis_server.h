// A real redis-server of a test's own: a free loopback port, a temporary folder, gone with the
// object.
#ifndef CINNABAR_TESTS_SUPPORT_REDIS_SERVER_H_
#define CINNABAR_TESTS_SUPPORT_REDIS_SERVER_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/redis/client.h"

namespace cinnabar {

// A port nobody listens on right now.
int FreePort();

struct RedisServerOptions {
  std::string appendfsync = "everysec";  // with appendonly yes
  bool sentinel = false;
  std::vector<std::string> config;  // further lines of redis.conf
};

class RedisServer {
 public:
  // Returns when it answers PING, or Unavailable after ten seconds.
  static absl::StatusOr<std::unique_ptr<RedisServer>> Start(RedisServerOptions options = {});
  ~RedisServer();
  RedisServer(const RedisServer&) = delete;

  int port() const { return port_; }
  pid_t pid() const { return pid_; }
  const std::string& directory() const { return directory_; }
  // Settings for a client of it; quick to give up, so that a test that fails does so soon.
  RedisOptions client_options() const;

  void Signal(int signal) const;
  void Kill();             // SIGKILL, and waits
  void Shutdown();         // SIGTERM, and waits: all is on disk
  absl::Status Restart();  // the same port and folder

 private:
  RedisServer() = default;
  absl::Status Spawn();
  RedisServerOptions options_;
  std::string directory_;
  int port_ = 0;
  pid_t pid_ = -1;
};

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SUPPORT_REDIS_SERVER_H_
