// A real redis-server with our real queue functions, whose clock is ours: TIME and every expiry
// follow a clock that only SetTime() moves.
#ifndef CINNABAR_TESTS_SIM_CLUSTER_VIRTUAL_REDIS_H_
#define CINNABAR_TESTS_SIM_CLUSTER_VIRTUAL_REDIS_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/redis/client.h"
#include "tests/support/redis_server.h"

namespace cinnabar {

// A text of the library with `find` replaced by `replace` (a broken queue, for tests of tests).
struct LibraryEdit {
  std::string find;
  std::string replace;
};

class VirtualRedis {
 public:
  static absl::StatusOr<std::unique_ptr<VirtualRedis>> Start();

  // An empty data set, with the library as it is or edited. CHECKs that the edit applies.
  absl::Status Reset(const LibraryEdit* edit = nullptr);
  // Moves the clock forward; what has expired by then is gone. No-op while the server is down.
  absl::Status SetTime(absl::Time now);

  // What a crash loses: Save() remembers the data set, Rewind() starts the server with it.
  absl::Status Save();
  absl::Status Rewind();
  void Kill();             // loses nothing that Restart() would not bring back
  absl::Status Restart();  // with what Save() remembered
  bool up() const { return up_; }

  RedisOptions client_options() const { return server_->client_options(); }
  RedisClient& control() { return *control_; }

 private:
  VirtualRedis() = default;
  std::unique_ptr<RedisServer> server_;
  std::unique_ptr<RedisClient> control_;
  bool up_ = true;
};

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SIM_CLUSTER_VIRTUAL_REDIS_H_
