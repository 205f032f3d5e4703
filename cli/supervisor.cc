#include "cli/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr size_t kLineBytesMax = 16 << 10;
constexpr int kWrongCommandLine = 2;  // the exit status of our programs for it
constexpr absl::Duration kSameSignal = absl::Milliseconds(300);
constexpr absl::Duration kTurn = absl::Milliseconds(100);

sigset_t WatchedSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&signals, signal);
  return signals;
}

std::string DescribeEnd(int wait_status) {
  if (WIFSIGNALED(wait_status)) return absl::StrCat("ended by signal ", WTERMSIG(wait_status));
  return absl::StrCat("ended with status ", WEXITSTATUS(wait_status));
}

absl::Status SystemError(absl::string_view what) {
  return absl::InternalError(absl::StrCat(what, ": ", std::strerror(errno)));
}

}  // namespace

struct Supervisor::Child {
  ChildSpec spec;
  pid_t pid = -1;      // -1: it does not run
  int output_fd = -1;  // stdout and stderr
  std::string line;    // the last one, unfinished
  bool ready = false;
  int32_t failed_starts = 0;
  absl::Time started;
  absl::Time start_again = absl::InfiniteFuture();
  absl::Duration backoff;
};

Supervisor::Supervisor(SupervisorOptions options) : options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<Supervisor>> Supervisor::Make(SupervisorOptions options) {
  auto supervisor = std::unique_ptr<Supervisor>(new Supervisor(std::move(options)));
  const sigset_t signals = WatchedSignals();
  if (sigprocmask(SIG_BLOCK, &signals, nullptr) != 0) return SystemError("sigprocmask");
  supervisor->signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
  if (supervisor->signal_fd_ < 0) return SystemError("signalfd");
  const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return SystemError("socket");
  supervisor->notify_fd_ = fd;
  supervisor->notify_name_ = absl::StrCat("cinnabar-up-", getpid());
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, supervisor->notify_name_.data(),
              supervisor->notify_name_.size());
  const auto size =
      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + supervisor->notify_name_.size());
  const int yes = 1;  // each message tells which process sent it
  if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &yes, sizeof(yes)) != 0 ||
      bind(fd, reinterpret_cast<const sockaddr*>(&address), size) != 0) {
    return SystemError("notification socket");
  }
  return supervisor;
}

Supervisor::~Supervisor() {
  for (const std::unique_ptr<Child>& child : children_) {
    if (child->pid > 0) {
      kill(child->pid, SIGKILL);
      waitpid(child->pid, nullptr, 0);
    }
    if (child->output_fd >= 0) close(child->output_fd);
  }
  if (notify_fd_ >= 0) close(notify_fd_);
  if (signal_fd_ >= 0) close(signal_fd_);
  const sigset_t signals = WatchedSignals();
  sigprocmask(SIG_UNBLOCK, &signals, nullptr);
}

void Supervisor::Event(const Child& child, const std::string& what) const {
  if (options_.on_event) options_.on_event(child.spec.name, what);
}

absl::Status Supervisor::Start(ChildSpec spec) {
  CINNABAR_CHECK(!spec.args.empty());
  if (access(spec.args[0].c_str(), X_OK) != 0) {
    return absl::NotFoundError(absl::StrCat("there is no program ", spec.args[0]));
  }
  children_.push_back(std::make_unique<Child>());
  Child& child = *children_.back();
  child.spec = std::move(spec);
  child.backoff = options_.backoff_min;
  return Spawn(child);
}

absl::Status Supervisor::Spawn(Child& child) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return SystemError("pipe");
  const int null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  // All that allocates comes before fork.
  std::vector<char*> args;
  for (std::string& arg : child.spec.args) args.push_back(arg.data());
  args.push_back(nullptr);
  std::string notify = absl::StrCat("NOTIFY_SOCKET=@", notify_name_);
  std::vector<char*> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!absl::StartsWith(*entry, "NOTIFY_SOCKET=")) environment.push_back(*entry);
  }
  environment.push_back(notify.data());
  environment.push_back(nullptr);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(1);  // it died before the line above
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    dup2(null_fd, STDIN_FILENO);
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    execve(args[0], args.data(), environment.data());
    _exit(127);
  }
  const absl::Status status = pid < 0 ? SystemError("fork") : absl::OkStatus();
  close(ends[1]);
  if (null_fd >= 0) close(null_fd);
  if (!status.ok()) {
    close(ends[0]);
    return status;
  }
  fcntl(ends[0], F_SETFL, O_NONBLOCK);
  child.pid = pid;
  child.output_fd = ends[0];
  child.ready = !child.spec.notifies;
  child.started = absl::Now();
  child.start_again = absl::InfiniteFuture();
  return absl::OkStatus();
}

bool Supervisor::AllReady() const {
  return std::all_of(children_.begin(), children_.end(),
                     [](const auto& child) { return child->pid > 0 && child->ready; });
}

void Supervisor::ReadLines(Child& child, bool to_the_end) {
  char buffer[4096];
  while (child.output_fd >= 0) {
    const ssize_t size = read(child.output_fd, buffer, sizeof(buffer));
    if (size < 0 && errno == EINTR) continue;
    if (size == 0) {  // it ended, or closed its output
      close(child.output_fd);
      child.output_fd = -1;
    }
    if (size <= 0) break;
    for (const char c : absl::string_view(buffer, static_cast<size_t>(size))) {
      if (c != '\n' && child.line.size() < kLineBytesMax) {
        child.line += c;
        continue;
      }
      if (options_.on_line) options_.on_line(child.spec.name, child.line);
      child.line.clear();
    }
  }
  if (to_the_end && !child.line.empty()) {
    if (options_.on_line) options_.on_line(child.spec.name, child.line);
    child.line.clear();
  }
}

void Supervisor::ReadSignals() {
  signalfd_siginfo info;
  while (read(signal_fd_, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
    if (info.ssi_signo == SIGCHLD) continue;  // Reap looks at every child anyway
    // `timeout` and some shells send one signal twice, to the process and to its group.
    if (absl::Now() - last_signal_ > kSameSignal) ++signals_seen_;
    last_signal_ = absl::Now();
    stopping_ = true;
  }
}

void Supervisor::ReadNotifications() {
  for (;;) {
    char text[1024];
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(ucred))];
    iovec part = {.iov_base = text, .iov_len = sizeof(text)};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t size = recvmsg(notify_fd_, &message, MSG_CMSG_CLOEXEC);
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return;
    const cmsghdr* const header = CMSG_FIRSTHDR(&message);
    if (header == nullptr || header->cmsg_type != SCM_CREDENTIALS) continue;
    ucred sender;
    std::memcpy(&sender, CMSG_DATA(header), sizeof(sender));
    const bool ready =
        absl::StrContains(absl::string_view(text, static_cast<size_t>(size)), "READY=1");
    for (const std::unique_ptr<Child>& child : children_) {
      if (child->pid != sender.pid || !ready) continue;
      child->ready = true;
      child->failed_starts = 0;
    }
  }
}

absl::Status Supervisor::Ended(Child& child, int wait_status) {
  ReadLines(child, /*to_the_end=*/true);
  if (child.output_fd >= 0) close(child.output_fd);
  child.output_fd = -1;
  child.pid = -1;
  const std::string end = DescribeEnd(wait_status);
  if (stopping_) {
    if (!WIFEXITED(wait_status) || WEXITSTATUS(wait_status) != 0) Event(child, end);
    return absl::OkStatus();
  }
  const bool was_ready = std::exchange(child.ready, false);
  if (!was_ready) {
    ++child.failed_starts;
    const bool refused = WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == kWrongCommandLine;
    if (refused || child.failed_starts >= options_.failed_starts_max) {
      return absl::FailedPreconditionError(
          absl::StrCat(child.spec.name, " does not start: ", end, "; its last lines say why"));
    }
  }
  if (absl::Now() - child.started > options_.settled_after) child.backoff = options_.backoff_min;
  child.start_again = absl::Now() + child.backoff;
  Event(child, absl::StrCat(end, "; starts again in ", absl::FormatDuration(child.backoff)));
  child.backoff = std::min(child.backoff * 2, options_.backoff_max);
  return absl::OkStatus();
}

absl::Status Supervisor::Reap() {
  absl::Status status;
  for (const std::unique_ptr<Child>& child : children_) {
    int wait_status = 0;
    if (child->pid <= 0 || waitpid(child->pid, &wait_status, WNOHANG) != child->pid) continue;
    status.Update(Ended(*child, wait_status));
  }
  return status;
}

absl::Status Supervisor::PollOnce(absl::Duration timeout) {
  std::vector<pollfd> fds = {{.fd = signal_fd_, .events = POLLIN, .revents = 0},
                             {.fd = notify_fd_, .events = POLLIN, .revents = 0}};
  for (const std::unique_ptr<Child>& child : children_) {
    if (child->output_fd >= 0)
      fds.push_back({.fd = child->output_fd, .events = POLLIN, .revents = 0});
  }
  (void)poll(fds.data(), fds.size(), static_cast<int>(absl::ToInt64Milliseconds(timeout)));
  ReadSignals();
  ReadNotifications();
  for (const std::unique_ptr<Child>& child : children_) {
    ReadLines(*child, /*to_the_end=*/false);
  }
  CINNABAR_RETURN_IF_ERROR(Reap());
  for (const std::unique_ptr<Child>& child : children_) {
    if (stopping_ || child->start_again > absl::Now()) continue;
    CINNABAR_RETURN_IF_ERROR(Spawn(*child));
  }
  return absl::OkStatus();
}

absl::Status Supervisor::RunUntil(const std::function<bool()>& done) {
  while (!stopping_ && !done()) CINNABAR_RETURN_IF_ERROR(PollOnce(kTurn));
  return absl::OkStatus();
}

bool Supervisor::Stop() {
  stopping_ = true;
  const int signals_before = signals_seen_;
  bool clean = true;
  std::set<int32_t> orders;
  for (const std::unique_ptr<Child>& child : children_) orders.insert(child->spec.stop_order);
  for (const int32_t order : orders) {
    const auto for_each_running = [&](auto&& act) {
      bool any = false;
      for (const std::unique_ptr<Child>& child : children_) {
        if (child->pid <= 0 || child->spec.stop_order != order) continue;
        act(*child);
        any = true;
      }
      return any;
    };
    for_each_running([](const Child& child) { kill(child.pid, SIGTERM); });
    const absl::Time deadline = absl::Now() + options_.stop_grace;
    bool killed = false;
    while (for_each_running([](const Child&) {})) {
      if (!killed && (absl::Now() > deadline || signals_seen_ > signals_before)) {
        killed = true;
        clean = false;
        for_each_running([](const Child& child) { kill(child.pid, SIGKILL); });
      }
      (void)PollOnce(kTurn);  // a child that ends is no error any more
    }
  }
  return clean;
}

}  // namespace cinnabar
