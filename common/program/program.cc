#include "common/program/program.h"

#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/base/version.h"

namespace cinnabar {
namespace {

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGUSR2);  // ends the SignalThread
  return signals;
}

void Notify(const char* state) {
  const char* path = std::getenv("NOTIFY_SOCKET");
  if (path == nullptr || path[0] == '\0') return;
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  const size_t length = std::strlen(path);
  if (length >= sizeof(address.sun_path)) return;
  std::memcpy(address.sun_path, path, length);
  if (path[0] == '@') address.sun_path[0] = '\0';  // an abstract name
  const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length);
  (void)sendto(fd, state, std::strlen(state), MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&address),
               size);
  close(fd);
}

}  // namespace

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 && name[0] != '\0' ? name : "localhost";
}

void ProgramFlags::RegisterCluster(FlagSet& flags) {
  flags.Section("Cluster");
  flags.Add("redis", &redis, "HOST:PORT", "the cluster's Redis 7, or the path of its socket");
  flags.Add("sentinel", &sentinels, "HOST:PORT", "a Sentinel to ask for the primary; repeatable");
  flags.Add("sentinel-master", &master_name, "NAME", "the primary's name among the Sentinels");
  flags.Add("redis-user", &redis_user, "NAME", "ACL user");
  flags.Add("redis-password-file", &redis_password_file, "FILE", "its password, on one line");
  flags.Add("partition", &partition, "NAME", "the part of the cluster that shares queues");
  flags.Add("site", &site, "NAME", "refuse a Redis that holds another site's data");
}

void ProgramFlags::Register(FlagSet& flags) {
  RegisterCluster(flags);
  flags.Add("name", &name, "NAME", "of this process, kept over restarts [host and program]");
  flags.Section("Operation");
  flags.Add("metrics-listen", &metrics_listen, "HOST:PORT",
            "/metrics, /healthz, /readyz; port 0 takes a free one");
  flags.Add("log-level", &log_level, "LEVEL", "debug, info, warn or error");
  flags.Add("log-format", &log_format, "FORMAT", "text or json");
}

absl::Status ProgramFlags::Start(const std::string& program) const {
  CINNABAR_ASSIGN_OR_RETURN(const LogLevel level, ParseLogLevel(log_level), "--log-level");
  if (log_format != "text" && log_format != "json") {
    return absl::InvalidArgumentError(
        absl::StrCat("--log-format ", log_format, ": take text or json"));
  }
  InitLog({.program = program, .level = level, .json = log_format == "json"});
  return absl::OkStatus();
}

absl::StatusOr<RedisAddress> ParseRedisAddress(absl::string_view text) {
  RedisAddress address;
  if (!text.empty() && text[0] == '/') {
    address.host = std::string(text);
    return address;
  }
  const size_t colon = text.rfind(':');
  absl::string_view host = text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  if (colon == absl::string_view::npos || host.empty() ||
      !absl::SimpleAtoi(text.substr(colon + 1), &address.port) || address.port < 1 ||
      address.port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text, "\" is no address; write it as 127.0.0.1:6379"));
  }
  address.host = std::string(host);
  return address;
}

absl::StatusOr<RedisOptions> ProgramFlags::Redis(const std::string& program) const {
  RedisOptions options;
  CINNABAR_ASSIGN_OR_RETURN(options.address, ParseRedisAddress(redis), "--redis");
  for (const std::string& sentinel : sentinels) {
    CINNABAR_ASSIGN_OR_RETURN(const RedisAddress address, ParseRedisAddress(sentinel),
                              "--sentinel");
    options.sentinels.push_back(address);
  }
  options.master_name = master_name;
  options.username = redis_user;
  if (!redis_password_file.empty()) {
    std::ifstream file(redis_password_file);
    std::stringstream text;
    text << file.rdbuf();
    options.password = std::string(absl::StripAsciiWhitespace(text.str()));
    if (options.password.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--redis-password-file ", redis_password_file, ": holds no password"));
    }
  }
  options.client_name = absl::StrCat("cinnabar-", program);
  CINNABAR_RETURN_IF_ERROR(ValidateRedisOptions(options), "Redis flags");
  return options;
}

QueueOptions ProgramFlags::Queue(bool may_create_site) const {
  return {.partition = partition,
          .site = site,
          .may_create_site = may_create_site,
          .site_memory = std::make_shared<SiteMemory>()};
}

std::string ProgramFlags::MetricsAddress(int port) const {
  return absl::StrCat(metrics_listen.substr(0, metrics_listen.rfind(':')), ":", port);
}

SignalThread::SignalThread(std::function<void()> stop) {
  thread_ = std::thread([stop = std::move(stop)] {
    const sigset_t signals = StopSignals();
    bool stopping = false;
    for (;;) {
      int signal = 0;
      if (sigwait(&signals, &signal) != 0) continue;
      if (signal == SIGUSR2) return;
      if (stopping) {
        Log(LogLevel::kWarn, "stops_at_once", {{"signal", signal}});
        _exit(130);
      }
      stopping = true;
      Log(LogLevel::kInfo, "stops", {{"signal", signal}});
      NotifyStopping();
      stop();
    }
  });
}

SignalThread::~SignalThread() {
  pthread_kill(thread_.native_handle(), SIGUSR2);
  thread_.join();
}

void NotifyReady() { Notify("READY=1"); }
void NotifyStopping() { Notify("STOPPING=1"); }

int RunProgram(FlagSet& flags, int argc, char** argv, const std::function<absl::Status()>& serve) {
  const std::string program = argv[0] == nullptr ? "cinnabar" : argv[0];
  const std::string name = program.substr(program.rfind('/') + 1);
  signal(SIGPIPE, SIG_IGN);
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (args.size() == 1 && args[0] == "--version") {
    std::printf("%s %s (%s)\n", name.c_str(), kVersion, kRevision);
    return 0;
  }
  absl::Status status = flags.Parse(args);
  if (flags.help_asked()) {
    std::fputs(flags.Help().c_str(), stdout);
    return 0;
  }
  if (status.ok() && !flags.positional().empty()) {
    status = absl::InvalidArgumentError(
        absl::StrCat("\"", flags.positional()[0], "\" is not a flag; --help lists them"));
  }
  if (!status.ok()) {
    std::fprintf(stderr, "%s: %s\n", name.c_str(), std::string(status.message()).c_str());
    return 2;
  }
  status = serve();
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s: %s\n", name.c_str(), std::string(status.message()).c_str());
  if (absl::IsInvalidArgument(status)) return 2;
  return absl::IsAborted(status) ? 3 : 1;
}

}  // namespace cinnabar
