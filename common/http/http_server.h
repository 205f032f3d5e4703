// The HTTP/1.1 server of every program: strict framing, every limit answered and counted, replies
// whole or streamed, TLS optional. It knows nothing of models, Redis or JSON.
#ifndef CINNABAR_COMMON_HTTP_HTTP_SERVER_H_
#define CINNABAR_COMMON_HTTP_HTTP_SERVER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/http/asio.h"

namespace cinnabar {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;
  std::string path;     // percent-decoded, without the query
  std::string query;    // as it came
  HttpHeaders headers;  // names in lower case
  std::string body;     // whole, chunks joined
  std::string peer;     // address without the port
  std::string request_id;

  // The first value of a header, name in lower case; empty when there is none.
  std::string Header(absl::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  HttpHeaders headers;  // content-length, date, x-request-id and connection are added
  std::string body;
};

// Note for callers: g++ 12 may destroy a temporary twice that owns something and stands in the full
// expression of a co_await. Give such an argument a name, and move it.
//
// The reply to one request. A coroutine at a time. After an error the client is gone.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;
  // A whole reply; once.
  virtual asio::awaitable<absl::Status> Respond(HttpResponse response) = 0;
  // A reply in pieces: StartStream, Write..., Finish. Each Write returns when the kernel has taken
  // the bytes, so a slow reader slows its writer and nothing piles up.
  virtual asio::awaitable<absl::Status> StartStream(int status, HttpHeaders headers) = 0;
  virtual asio::awaitable<absl::Status> Write(std::string piece) = 0;
  virtual asio::awaitable<absl::Status> Finish() = 0;

  // Whether the client closed its end. `callback` is called once, on the connection's executor,
  // when it does; null takes it back.
  virtual bool client_gone() const = 0;
  virtual void OnClientGone(std::function<void()> callback) = 0;
};

// Must reply exactly once; a handler that does not is answered for with 500.
using HttpHandler = std::function<asio::awaitable<void>(const HttpRequest&, HttpExchange&)>;

struct HttpLimits {
  int64_t header_bytes_max = 16 << 10;               // 431
  int32_t headers_max = 64;                          // 431
  int64_t body_bytes_max = 1 << 20;                  // 413
  absl::Duration header_timeout = absl::Seconds(5);  // 408, from the first byte
  absl::Duration body_timeout = absl::Seconds(15);   // 408
  absl::Duration write_timeout = absl::Seconds(30);  // closed: a reader that does not read
  absl::Duration idle_timeout = absl::Seconds(60);   // closed: between two requests
  int32_t connections_max = 4096;                    // 503 and closed
  int32_t connections_per_address_max = 1024;        // 503 and closed
};

struct HttpServerOptions {
  std::string listen = "127.0.0.1:8080";  // host:port, [v6]:port; port 0 takes a free one
  int32_t num_threads = 1;
  std::string certificate_file, key_file;  // PEM, both or none
  HttpLimits limits;
  // The body of an error that the server itself answers: status, code and message to a body.
  std::function<std::string(int, absl::string_view, absl::string_view)> error_body;
};

struct HttpCounters {
  std::atomic<int64_t> connections = 0;  // open now
  std::atomic<int64_t> connections_total = 0;
  std::atomic<int64_t> requests_total = 0;
  std::atomic<int64_t> refused_connections = 0;  // 503: connections_max
  std::atomic<int64_t> malformed = 0;            // 400, 405, 415, 501, 505 by the server itself
  std::atomic<int64_t> too_large = 0;            // 413, 431
  std::atomic<int64_t> timeouts = 0;             // 408, idle ones not counted
  std::atomic<int64_t> slow_readers = 0;         // closed by write_timeout
  std::atomic<int64_t> handler_failures = 0;     // 500
};

class HttpServer {
 public:
  HttpServer(HttpServerOptions options, HttpHandler handler);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;

  // Binds, listens, starts the threads. InvalidArgument: the address or the files. Unavailable: the
  // address is in use.
  absl::Status Start();
  int port() const;
  asio::any_io_executor executor();
  const HttpCounters& counters() const;

  // Takes no more connections, closes idle ones, and waits up to `grace` for replies that are under
  // way; then closes everything and stops the threads. Idempotent. Not from a handler.
  void Drain(absl::Duration grace);

  struct Impl;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_HTTP_HTTP_SERVER_H_
