// An HTTP/1.1 client for the operator's commands: many exchanges at once on one thread, bodies as
// they arrive, connections kept for the next exchange. Built on Asio and Beast, which stay in the
// .cc.
#ifndef CINNABAR_CLI_HTTP_CLIENT_H_
#define CINNABAR_CLI_HTTP_CLIENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace cinnabar {

struct HttpUrl {
  bool tls = false;
  std::string host;  // a name or a number, without brackets
  int32_t port = 80;
  std::string path;  // "" or "/a/b": no slash at the end, no query

  std::string ToString() const;
  bool loopback() const;  // "localhost", 127.0.0.0/8, ::1
};

// "http://host:8080/v1", "https://host", "host:8080" (http), "[::1]:8080". InvalidArgument says
// what is wrong and shows one that is right.
absl::StatusOr<HttpUrl> ParseHttpUrl(absl::string_view text);

// "/models" -> "/v1/models" below the URL's path, which may end in "/v1" already, as the base URL
// of the OpenAI SDKs does.
std::string ApiPath(const HttpUrl& url, absl::string_view endpoint);

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method = "GET";
  std::string target = "/";
  HttpHeaders headers;  // besides host, content-length, user-agent
  std::string body;
};

struct HttpHead {
  int32_t status = 0;
  HttpHeaders headers;  // names in lower case
  // The value of the first such header, or empty.
  absl::string_view Find(absl::string_view name) const;
};

struct HttpHandlers {
  absl::AnyInvocable<void(const HttpHead&)> on_head;      // at most once
  absl::AnyInvocable<void(absl::string_view)> on_body;    // after on_head; never empty
  absl::AnyInvocable<void(const absl::Status&)> on_done;  // exactly once, last
};

struct HttpClientOptions {
  absl::Duration connect_timeout = absl::Seconds(5);
  int32_t idle_connections_max = 4096;
  std::string ca_file;  // PEM; empty: the system's certificates
};

struct HttpReply {
  HttpHead head;
  std::string body;
};

// One host. One thread: handlers and timers run inside Run(), and may call everything but Run() and
// Fetch().
//
// on_done's status: OK, the whole reply came (whatever its HTTP status); Unavailable, nobody
// answers or the connection broke; DeadlineExceeded; Cancelled; DataLoss, not HTTP. A kept
// connection that the server has closed meanwhile is replaced without a word.
class HttpClient {
 public:
  // Resolves the host. Unavailable: no such host. FailedPrecondition: `ca_file` does not read.
  static absl::StatusOr<std::unique_ptr<HttpClient>> Make(const HttpUrl& url,
                                                          HttpClientOptions options = {});
  ~HttpClient();

  const HttpUrl& url() const;

  // `timeout` bounds the whole exchange.
  using Id = uint64_t;
  Id Start(HttpRequest request, absl::Duration timeout, HttpHandlers handlers);
  // Closes the connection; on_done(Cancelled) runs later. An exchange that is over: nothing
  // happens.
  void Cancel(Id id);

  // Since the client was made, by a clock that never jumps.
  absl::Duration Now() const;
  // Runs `then` at `when` of Now(), or at once when that has passed.
  void At(absl::Duration when, absl::AnyInvocable<void()> then);

  // Until nothing is left to wait for, or Stop().
  void Run();
  void Stop();

  // One exchange, start to end. `body_bytes_max`: a longer body is ResourceExhausted.
  absl::StatusOr<HttpReply> Fetch(HttpRequest request, absl::Duration timeout,
                                  size_t body_bytes_max = 64 << 20);

  int64_t connections_made() const;

 private:
  struct Impl;
  explicit HttpClient(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_HTTP_CLIENT_H_
