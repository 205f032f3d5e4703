#include "tests/support/redis_server.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/check.h"

namespace cinnabar {

int FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  CINNABAR_CHECK(bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0);
  CINNABAR_CHECK(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  close(fd);
  return ntohs(address.sin_port);
}

absl::StatusOr<std::unique_ptr<RedisServer>> RedisServer::Start(RedisServerOptions options) {
  std::unique_ptr<RedisServer> server(new RedisServer);
  server->options_ = std::move(options);
  std::string folder = (std::filesystem::temp_directory_path() / "cinnabar_redis_XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) return absl::ErrnoToStatus(errno, "mkdtemp");
  server->directory_ = folder;
  absl::Status status;
  for (int attempt = 0; attempt < 3;
       ++attempt) {  // the port may be taken between the look and the use
    server->port_ = FreePort();
    status = server->Spawn();
    if (status.ok()) return server;
  }
  return status;
}

absl::Status RedisServer::Spawn() {
  const std::string conf = directory_ + "/redis.conf";
  if (!options_.sentinel || !std::filesystem::exists(conf)) {  // a Sentinel rewrites its own
    std::ofstream out(conf);
    out << "port " << port_ << "\nbind 127.0.0.1\ndir " << directory_ << "\nlogfile " << directory_
        << "/log\n";
    if (!options_.sentinel) {
      out << "save \"\"\nappendonly yes\nappendfsync " << options_.appendfsync
          << "\nmaxmemory-policy noeviction\n";
    }
    for (const std::string& line : options_.config) out << line << "\n";
  }
  pid_ = fork();
  if (pid_ < 0) return absl::ErrnoToStatus(errno, "fork");
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // a crashed test leaves nothing behind
    const int null = open("/dev/null", O_RDWR);
    dup2(null, 0);
    dup2(null, 1);
    execlp("redis-server", "redis-server", conf.c_str(), options_.sentinel ? "--sentinel" : nullptr,
           nullptr);
    _exit(127);
  }
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  std::string ping;
  AppendRedisCommand({"PING"}, ping);
  while (absl::Now() < deadline) {
    auto connection = RedisConnection::Open({.port = port_}, absl::Seconds(1), {});
    if (connection.ok()) {
      std::vector<RedisReply> replies;
      if ((*connection)->Exchange(ping, 1, absl::Seconds(1), 1 << 20, replies).ok() &&
          replies[0].text == "PONG") {
        return absl::OkStatus();
      }
    }
    int state = 0;
    if (waitpid(pid_, &state, WNOHANG) == pid_) {
      pid_ = -1;
      return absl::UnavailableError(
          absl::StrCat("redis-server ended with ", state, "; see ", directory_, "/log"));
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
  Kill();
  return absl::UnavailableError("redis-server does not answer");
}

RedisServer::~RedisServer() {
  Kill();
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

RedisOptions RedisServer::client_options() const {
  RedisOptions options;
  options.address = {.host = "127.0.0.1", .port = port_};
  options.retry.backoff_min = absl::Milliseconds(5);
  options.retry.backoff_max = absl::Milliseconds(100);
  return options;
}

void RedisServer::Signal(int signal) const {
  if (pid_ > 0) kill(pid_, signal);
}

void RedisServer::Kill() {
  if (pid_ <= 0) return;
  Signal(SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

void RedisServer::Shutdown() {
  if (pid_ <= 0) return;
  Signal(SIGTERM);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

absl::Status RedisServer::Restart() {
  Kill();
  return Spawn();
}

}  // namespace cinnabar
