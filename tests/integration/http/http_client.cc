#include "tests/integration/http/http_client.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"

namespace cinnabar {

HttpClient::HttpClient(int port, Options options) {
  fd_ = socket(AF_INET, SOCK_STREAM, 0);
  if (options.receive_buffer_bytes > 0) {
    setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &options.receive_buffer_bytes, sizeof(int));
  }
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    close(fd_);
    fd_ = -1;
    return;
  }
  const int yes = 1;
  setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
  if (!options.tls) return;
  context_.reset(SSL_CTX_new(TLS_client_method()));
  ssl_.reset(SSL_new(context_.get()));
  SSL_set_fd(ssl_.get(), fd_);
  if (SSL_connect(ssl_.get()) != 1) {
    close(fd_);
    fd_ = -1;
  }
}

HttpClient::~HttpClient() {
  if (fd_ >= 0) close(fd_);
}

bool HttpClient::Wait(short events, absl::Time until) const {
  const int64_t ms = absl::ToInt64Milliseconds(until - absl::Now());
  pollfd poll_fd = {.fd = fd_, .events = events, .revents = 0};
  return poll(&poll_fd, 1, static_cast<int>(std::clamp<int64_t>(ms, 0, 60'000))) > 0;
}

bool HttpClient::Send(absl::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ssl_ != nullptr
                             ? SSL_write(ssl_.get(), bytes.data(), static_cast<int>(bytes.size()))
                             : send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

size_t HttpClient::SendForever(absl::string_view piece, absl::Duration patience, size_t bytes_max) {
  size_t total = 0;
  while (total < bytes_max && Wait(POLLOUT, absl::Now() + patience)) {
    const ssize_t sent = send(fd_, piece.data(), piece.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent <= 0) break;
    total += static_cast<size_t>(sent);
  }
  return total;
}

void HttpClient::HalfClose() { shutdown(fd_, SHUT_WR); }

void HttpClient::Reset() {
  const linger now = {.l_onoff = 1, .l_linger = 0};
  setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  close(fd_);
  fd_ = -1;
}

bool HttpClient::ReadMore(absl::Time until) {
  if (ended_ || fd_ < 0) return false;
  const bool pending = ssl_ != nullptr && SSL_pending(ssl_.get()) > 0;
  if (!pending && !Wait(POLLIN, until)) return false;
  char bytes[16384];
  const ssize_t size = ssl_ != nullptr ? SSL_read(ssl_.get(), bytes, sizeof(bytes))
                                       : recv(fd_, bytes, sizeof(bytes), 0);
  if (size <= 0) {
    ended_ = true;
    return false;
  }
  buffer_.append(bytes, static_cast<size_t>(size));
  return true;
}

std::optional<HttpReply> HttpClient::ReadReply(absl::Duration timeout, bool head_only) {
  const absl::Time until = absl::Now() + timeout;
  size_t end = 0;
  while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
    if (!ReadMore(until)) return std::nullopt;
  }
  HttpReply reply;
  const std::vector<std::string> lines = absl::StrSplit(buffer_.substr(0, end), "\r\n");
  buffer_.erase(0, end + 4);
  const std::vector<std::string> words = absl::StrSplit(lines[0], ' ');
  if (words.size() < 2 || !absl::SimpleAtoi(words[1], &reply.status)) return std::nullopt;
  for (size_t i = 1; i < lines.size(); ++i) {
    const size_t colon = std::min(lines[i].find(':'), lines[i].size() - 1);
    reply.headers[absl::AsciiStrToLower(lines[i].substr(0, colon))] =
        std::string(absl::StripAsciiWhitespace(lines[i].substr(colon + 1)));
  }
  if (head_only || reply.status < 200 || reply.status == 204) return reply;
  if (const auto found = reply.headers.find("content-length"); found != reply.headers.end()) {
    size_t length = 0;
    if (!absl::SimpleAtoi(found->second, &length)) return std::nullopt;
    while (buffer_.size() < length) {
      if (!ReadMore(until)) return std::nullopt;
    }
    reply.body = buffer_.substr(0, length);
    buffer_.erase(0, length);
    return reply;
  }
  if (reply.headers.count("transfer-encoding") > 0) {
    for (;;) {
      size_t line = 0;
      while ((line = buffer_.find("\r\n")) == std::string::npos) {
        if (!ReadMore(until)) return std::nullopt;
      }
      const size_t size = std::strtoul(buffer_.c_str(), nullptr, 16);
      while (buffer_.size() < line + 2 + size + 2) {
        if (!ReadMore(until)) return std::nullopt;
      }
      reply.body += buffer_.substr(line + 2, size);
      const bool whole = buffer_.substr(line + 2 + size, 2) == "\r\n";
      buffer_.erase(0, line + 2 + size + 2);
      if (!whole) return std::nullopt;
      if (size == 0) return reply;
    }
  }
  // Until the connection ends.
  while (ReadMore(until)) {
  }
  if (!ended_) return std::nullopt;
  reply.body = std::exchange(buffer_, {});
  return reply;
}

std::optional<std::string> HttpClient::ReadToEnd(absl::Duration timeout) {
  const absl::Time until = absl::Now() + timeout;
  while (ReadMore(until)) {
  }
  if (!ended_) return std::nullopt;
  return std::exchange(buffer_, {});
}

}  // namespace cinnabar
