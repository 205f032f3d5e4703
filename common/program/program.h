// What the programs of a cluster have in common: how they find Redis, log, stop and say that they
// are ready.
#ifndef CINNABAR_COMMON_PROGRAM_PROGRAM_H_
#define CINNABAR_COMMON_PROGRAM_PROGRAM_H_

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/config/flags.h"
#include "common/queue/queue.h"

namespace cinnabar {

struct ProgramFlags {
  std::string redis = "127.0.0.1:6379";
  std::vector<std::string> sentinels;
  std::string master_name;
  std::string redis_user;
  std::string redis_password_file;
  std::string partition = "default";
  std::string site;
  std::string name;  // of this process; kept over restarts
  std::string metrics_listen = "127.0.0.1:0";
  std::string log_level = "info";
  std::string log_format = "text";

  void Register(FlagSet& flags);
  // The part of it that says where the cluster is: for commands.
  void RegisterCluster(FlagSet& flags);
  // Checks the log flags and starts the log.
  absl::Status Start(const std::string& program) const;
  // InvalidArgument names the flag. Reads the password file.
  absl::StatusOr<RedisOptions> Redis(const std::string& program) const;
  // One SiteMemory for all that is made of it. `may_create_site`: the scheduler's alone, so that a
  // Redis that comes back empty is an alarm, and not a fresh start of whoever was restarted
  // meanwhile.
  QueueOptions Queue(bool may_create_site = false) const;
  // Where others find the metrics: the listen address with the port that it got.
  std::string MetricsAddress(int port) const;
};

// "host:port", "[v6]:port" or "/path/of/a/socket". InvalidArgument.
absl::StatusOr<RedisAddress> ParseRedisAddress(absl::string_view text);

std::string HostName();

// Calls `stop` on the first SIGTERM or SIGINT, from its own thread; the second one ends the process
// at once. The signals must be blocked in all threads: RunProgram sees to that.
class SignalThread {
 public:
  explicit SignalThread(std::function<void()> stop);
  ~SignalThread();
  SignalThread(const SignalThread&) = delete;

 private:
  std::thread thread_;
};

// sd_notify without its library: no-ops unless systemd asked for it (NOTIFY_SOCKET).
void NotifyReady();
void NotifyStopping();

// The whole main(): blocks the signals, parses the flags, answers --help and --version, runs
// `serve` and prints its error. The exit status: 0, 2 for wrong flags (InvalidArgument), 3 for a
// device that failed while it served (Aborted), 1 for the rest.
int RunProgram(FlagSet& flags, int argc, char** argv, const std::function<absl::Status()>& serve);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_PROGRAM_PROGRAM_H_
