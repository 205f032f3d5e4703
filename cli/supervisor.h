// Runs programs as children of this one, as a service manager does: starts them, passes their lines
// on, knows when they are ready (sd_notify), starts again what ends, and stops them in order.
#ifndef CINNABAR_CLI_SUPERVISOR_H_
#define CINNABAR_CLI_SUPERVISOR_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace cinnabar {

struct ChildSpec {
  std::string name;               // shown with its lines
  std::vector<std::string> args;  // args[0] is the program's path
  int32_t stop_order = 0;         // lower ones are stopped, and have ended, before higher ones
  bool notifies = true;           // tells READY=1 by sd_notify; otherwise it is ready when started
};

struct SupervisorOptions {
  std::function<void(absl::string_view name, absl::string_view line)> on_line;
  // What happens to a child, in words: "ended by signal 9; starts again in 0.5 s".
  std::function<void(absl::string_view name, absl::string_view what)> on_event;
  absl::Duration backoff_min = absl::Milliseconds(500);  // before a restart; doubles
  absl::Duration backoff_max = absl::Seconds(15);
  absl::Duration settled_after = absl::Seconds(60);  // the back-off starts anew after this long
  int32_t failed_starts_max = 5;                     // in a row, ended before it was ready
  absl::Duration stop_grace = absl::Seconds(40);     // then SIGKILL; for each stop order
};

// One thread, and one Supervisor a process: it takes SIGINT, SIGTERM and SIGCHLD while it lives.
// Children run in process groups of their own, so that Ctrl-C reaches this program alone, and get
// SIGTERM when this program dies.
class Supervisor {
 public:
  // Internal: no socket or signal descriptor to be had.
  static absl::StatusOr<std::unique_ptr<Supervisor>> Make(SupervisorOptions options);
  // Kills what still runs.
  ~Supervisor();
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  // NotFound: no such program.
  absl::Status Start(ChildSpec spec);
  // Serves the children until `done` is true, which is asked after every event and ten times a
  // second, or until a signal asks to stop (then stopping() is true). FailedPrecondition: a child
  // refused its command line (exit status 2) or ended too often before it was ready.
  absl::Status RunUntil(const std::function<bool()>& done);
  bool stopping() const { return stopping_; }
  bool AllReady() const;
  // SIGTERM by stop order, SIGKILL after the grace or on a second signal. False: some were killed.
  bool Stop();

 private:
  struct Child;
  explicit Supervisor(SupervisorOptions options);

  absl::Status Spawn(Child& child);
  absl::Status PollOnce(absl::Duration timeout);
  void ReadLines(Child& child, bool to_the_end);
  void ReadSignals();
  void ReadNotifications();
  absl::Status Reap();
  absl::Status Ended(Child& child, int wait_status);
  void Event(const Child& child, const std::string& what) const;

  SupervisorOptions options_;
  std::vector<std::unique_ptr<Child>> children_;
  std::string notify_name_;  // abstract socket, without its leading NUL
  int notify_fd_ = -1;
  int signal_fd_ = -1;
  int signals_seen_ = 0;
  absl::Time last_signal_ = absl::InfinitePast();
  bool stopping_ = false;
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_SUPERVISOR_H_
