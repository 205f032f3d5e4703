// A client that sends exactly the bytes it is told, over a socket or TLS on it.
#ifndef CINNABAR_TESTS_INTEGRATION_HTTP_HTTP_CLIENT_H_
#define CINNABAR_TESTS_INTEGRATION_HTTP_HTTP_CLIENT_H_

#include <openssl/ssl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace cinnabar {

struct HttpReply {
  int status = 0;
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
};

// One connection to 127.0.0.1. Not thread-safe. Nothing here throws or aborts; what fails is seen
// in what comes back.
class HttpClient {
 public:
  struct Options {
    bool tls = false;
    int receive_buffer_bytes = 0;  // 0: the system's
  };
  explicit HttpClient(int port) : HttpClient(port, Options()) {}
  HttpClient(int port, Options options);
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;

  bool connected() const { return fd_ >= 0; }
  // False when the peer does not take them.
  bool Send(absl::string_view bytes);
  // Bytes as fast as they go until the peer takes none for `patience`. How many went.
  size_t SendForever(absl::string_view piece, absl::Duration patience, size_t bytes_max);
  void HalfClose();  // no more will be sent
  void Reset();      // closes with RST

  // The next reply; nullopt at `timeout`, or when the connection ends before a whole one.
  // `head_only`: it has no body whatever its headers say (HEAD).
  std::optional<HttpReply> ReadReply(absl::Duration timeout = absl::Seconds(10),
                                     bool head_only = false);
  // Whatever comes until the peer closes; nullopt when it has not within `timeout`.
  std::optional<std::string> ReadToEnd(absl::Duration timeout = absl::Seconds(10));
  // At least one more byte, appended to `buffer`. False at the end or at `until`.
  bool ReadMore(absl::Time until);
  const std::string& buffer() const { return buffer_; }

 private:
  bool Wait(short events, absl::Time until) const;
  int fd_ = -1;
  bool ended_ = false;
  std::string buffer_;
  std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_{nullptr, &SSL_CTX_free};
  std::unique_ptr<SSL, decltype(&SSL_free)> ssl_{nullptr, &SSL_free};
};

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_INTEGRATION_HTTP_HTTP_CLIENT_H_
