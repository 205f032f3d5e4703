#include "common/http/http_server.h"

#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/status.hpp>
#include <boost/beast/http/string_body.hpp>
#include <boost/beast/ssl/ssl_stream.hpp>
#include <map>
#include <set>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/http/request_head.h"
#include "common/http/request_id.h"

namespace cinnabar {
namespace {

namespace beast = boost::beast;
using asio::ip::tcp;
using boost::system::error_code;

constexpr size_t kReadBytes = 4096;

auto Redirect(error_code& error) { return asio::redirect_error(asio::use_awaitable, error); }

// Plain or TLS, with a deadline for each write.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual asio::awaitable<error_code> Handshake(absl::Duration timeout) = 0;
  // Appends up to kReadBytes to `buffer`.
  virtual asio::awaitable<error_code> Read(std::string& buffer) = 0;
  virtual asio::awaitable<error_code> Write(absl::string_view bytes, absl::Duration timeout) = 0;
  virtual asio::awaitable<void> Shutdown(absl::Duration timeout) = 0;
  virtual void Close() = 0;  // whatever is under way ends with an error
};

template <typename Stream>
class StreamTransport : public Transport {
 public:
  explicit StreamTransport(Stream stream) : stream_(std::move(stream)) {}

  asio::awaitable<error_code> Handshake(absl::Duration timeout) override {
    error_code error;
    if constexpr (kTls) {
      lowest().expires_after(absl::ToChronoMilliseconds(timeout));
      co_await stream_.async_handshake(asio::ssl::stream_base::server, Redirect(error));
      lowest().expires_never();
    }
    co_return error;
  }

  asio::awaitable<error_code> Read(std::string& buffer) override {
    // A buffer of its own: `buffer` is read by others while this waits.
    char bytes[kReadBytes];
    error_code error;
    const size_t num_bytes =
        co_await stream_.async_read_some(asio::buffer(bytes, sizeof(bytes)), Redirect(error));
    buffer.append(bytes, num_bytes);
    co_return error;
  }

  asio::awaitable<error_code> Write(absl::string_view bytes, absl::Duration timeout) override {
    error_code error;
    lowest().expires_after(absl::ToChronoMilliseconds(timeout));
    co_await asio::async_write(stream_, asio::buffer(bytes.data(), bytes.size()), Redirect(error));
    lowest().expires_never();
    co_return error;
  }

  asio::awaitable<void> Shutdown(absl::Duration timeout) override {
    error_code error;
    if constexpr (kTls) {
      lowest().expires_after(absl::ToChronoMilliseconds(timeout));
      co_await stream_.async_shutdown(Redirect(error));
    }
    lowest().socket().shutdown(tcp::socket::shutdown_send, error);
    co_return;
  }

  void Close() override {
    error_code ignored;
    lowest().socket().close(ignored);
  }

 private:
  static constexpr bool kTls = !std::is_same_v<Stream, beast::tcp_stream>;
  beast::tcp_stream& lowest() {
    if constexpr (kTls) {
      return stream_.next_layer();
    } else {
      return stream_;
    }
  }
  Stream stream_;
};

std::string HttpDate() {
  return absl::FormatTime("%a, %d %b %Y %H:%M:%S GMT", absl::Now(), absl::UTCTimeZone());
}

bool MayHaveBody(int status) { return status >= 200 && status != 204 && status != 304; }

}  // namespace

struct HttpServer::Impl : std::enable_shared_from_this<Impl> {
  Impl(HttpServerOptions options_in, HttpHandler handler_in)
      : options(std::move(options_in)),
        handler(std::move(handler_in)),
        io(std::max(options.num_threads, 1)),
        acceptor(asio::make_strand(io)),
        tls(asio::ssl::context::tls_server) {}

  absl::Status Open();
  asio::awaitable<void> Accept();
  bool Admit(const std::string& peer);
  void Leave(const std::string& peer);

  HttpServerOptions options;
  HttpHandler handler;
  asio::io_context io;
  tcp::acceptor acceptor;
  asio::ssl::context tls;
  int port = 0;
  HttpCounters counters;
  std::atomic<bool> draining = false;
  std::vector<std::thread> threads;
  Mutex mu;  // leaf
  std::map<std::string, int32_t> by_peer ABSL_GUARDED_BY(mu);
  std::set<class Connection*> live ABSL_GUARDED_BY(mu);
};

// One client. All its coroutines run on its strand: one reads whatever comes, so that a close is
// noticed while a reply is under way, the other takes requests out of what was read.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<HttpServer::Impl> server, std::unique_ptr<Transport> transport,
             std::string peer, asio::any_io_executor executor)
      : server_(std::move(server)),
        transport_(std::move(transport)),
        peer_(std::move(peer)),
        executor_(std::move(executor)),
        wake_(executor_),
        resume_reading_(executor_) {}

  void Start() {
    asio::co_spawn(
        executor_, [self = shared_from_this()] { return self->Serve(); }, asio::detached);
  }

  // From any thread. `idle_only` spares a connection with a reply under way.
  void Close(bool idle_only) {
    asio::post(executor_, [self = shared_from_this(), idle_only] {
      self->closing_ = true;
      self->wake_.cancel();
      if (!idle_only || !self->busy_) self->transport_->Close();
    });
  }

 private:
  class Exchange;

  asio::awaitable<void> Serve();
  static asio::awaitable<void> ReadFor(std::shared_ptr<Connection> self);
  asio::awaitable<void> ReadAll();
  asio::awaitable<bool> AwaitBytes(size_t more_than, absl::Time until);
  asio::awaitable<bool> ServeOne();
  asio::awaitable<bool> ReadHead(std::string& head);
  asio::awaitable<bool> ReadBody(const std::string& head, const RequestHead& parsed,
                                 std::string& body, const std::string& request_id);
  asio::awaitable<void> Answer(int status, absl::string_view code, absl::string_view message,
                               const std::string& request_id);
  asio::awaitable<absl::Status> Send(absl::string_view bytes);
  void Consume(size_t num_bytes) {
    buffer_.erase(0, num_bytes);
    if (buffer_.empty()) buffer_.shrink_to_fit();
    resume_reading_.cancel();
  }
  size_t BufferMax() const {
    return static_cast<size_t>(server_->options.limits.header_bytes_max) + kReadBytes;
  }

  std::shared_ptr<HttpServer::Impl> server_;
  std::unique_ptr<Transport> transport_;
  const std::string peer_;
  asio::any_io_executor executor_;
  asio::steady_timer wake_;            // the server coroutine waits on it for bytes
  asio::steady_timer resume_reading_;  // the reader waits on it for room
  std::string buffer_;                 // read and not yet consumed
  bool read_ended_ = false;            // the client closed its end, or the connection broke
  bool closing_ = false;
  bool busy_ = false;  // a request is being answered
  std::function<void()> on_gone_;
};

class Connection::Exchange : public HttpExchange {
 public:
  Exchange(Connection& connection, const HttpRequest& request, bool keep_alive, int minor)
      : connection_(connection), request_(request), keep_alive_(keep_alive), minor_(minor) {}

  asio::awaitable<absl::Status> Respond(HttpResponse response) override {
    CINNABAR_CHECK(!replied_) << "two replies to one request";
    replied_ = true;
    std::string out = Head(response.status, response.headers);
    if (MayHaveBody(response.status)) {
      absl::StrAppend(&out, "content-length: ", response.body.size(), "\r\n");
    }
    absl::StrAppend(&out, "\r\n");
    if (request_.method != "HEAD") absl::StrAppend(&out, response.body);
    finished_ = true;
    co_return co_await connection_.Send(out);
  }

  asio::awaitable<absl::Status> StartStream(int status, HttpHeaders headers) override {
    CINNABAR_CHECK(!replied_) << "two replies to one request";
    replied_ = true;
    // HTTP/1.0 knows no chunks: its stream ends with the connection.
    chunked_ = minor_ == 1;
    if (!chunked_) keep_alive_ = false;
    std::string out = Head(status, headers);
    absl::StrAppend(&out, chunked_ ? "transfer-encoding: chunked\r\n\r\n" : "\r\n");
    co_return co_await connection_.Send(out);
  }

  asio::awaitable<absl::Status> Write(std::string piece) override {
    CINNABAR_CHECK(replied_ && !finished_) << "no stream is open";
    if (piece.empty() || request_.method == "HEAD") co_return absl::OkStatus();
    if (chunked_) piece = absl::StrCat(absl::Hex(piece.size()), "\r\n", piece, "\r\n");
    co_return co_await connection_.Send(piece);
  }

  asio::awaitable<absl::Status> Finish() override {
    CINNABAR_CHECK(replied_ && !finished_) << "no stream is open";
    finished_ = true;
    if (!chunked_ || request_.method == "HEAD") co_return absl::OkStatus();
    co_return co_await connection_.Send("0\r\n\r\n");
  }

  bool client_gone() const override { return connection_.read_ended_; }
  void OnClientGone(std::function<void()> callback) override {
    connection_.on_gone_ = std::move(callback);
    if (connection_.read_ended_ && connection_.on_gone_) {
      std::exchange(connection_.on_gone_, nullptr)();
    }
  }

  bool replied() const { return replied_; }
  // Whether another request may follow on this connection.
  bool reusable() const { return finished_ && keep_alive_; }

 private:
  std::string Head(int status, const HttpHeaders& headers) {
    if (connection_.server_->draining) keep_alive_ = false;
    const boost::beast::string_view reason =
        beast::http::obsolete_reason(static_cast<beast::http::status>(status));
    std::string out =
        absl::StrCat("HTTP/1.1 ", status, " ", absl::string_view(reason.data(), reason.size()),
                     "\r\n", "date: ", HttpDate(), "\r\n", "x-request-id: ", request_.request_id,
                     "\r\n", "connection: ", keep_alive_ ? "keep-alive" : "close", "\r\n");
    for (const auto& [name, value] : headers) absl::StrAppend(&out, name, ": ", value, "\r\n");
    return out;
  }

  Connection& connection_;
  const HttpRequest& request_;
  bool keep_alive_;
  const int minor_;
  bool replied_ = false;
  bool finished_ = false;
  bool chunked_ = false;
};

asio::awaitable<absl::Status> Connection::Send(absl::string_view bytes) {
  const error_code error = co_await transport_->Write(bytes, server_->options.limits.write_timeout);
  if (!error) co_return absl::OkStatus();
  if (error == beast::error::timeout) ++server_->counters.slow_readers;
  transport_->Close();
  co_return absl::UnavailableError("the client does not take the reply");
}

asio::awaitable<void> Connection::ReadAll() {
  while (!read_ended_) {
    if (buffer_.size() >= BufferMax()) {
      error_code ignored;
      resume_reading_.expires_at(asio::steady_timer::time_point::max());
      co_await resume_reading_.async_wait(Redirect(ignored));
      continue;
    }
    const error_code error = co_await transport_->Read(buffer_);
    if (error) read_ended_ = true;
    wake_.cancel();
  }
  if (on_gone_) std::exchange(on_gone_, nullptr)();
}

// Waits until the buffer holds more than `more_than` bytes. False at `until`, or when no more come.
asio::awaitable<bool> Connection::AwaitBytes(size_t more_than, absl::Time until) {
  while (buffer_.size() <= more_than) {
    const absl::Duration left = until - absl::Now();
    if (read_ended_ || closing_ || left <= absl::ZeroDuration()) co_return false;
    error_code ignored;
    wake_.expires_after(absl::ToChronoNanoseconds(std::min(left, absl::Hours(24))));
    co_await wake_.async_wait(Redirect(ignored));
  }
  co_return true;
}

// Holds the connection until the reader has ended.
asio::awaitable<void> Connection::ReadFor(std::shared_ptr<Connection> self) {
  co_await self->ReadAll();
}

asio::awaitable<void> Connection::Serve() {
  const std::shared_ptr<Connection> self = shared_from_this();
  const HttpLimits& limits = server_->options.limits;
  const error_code handshake = co_await transport_->Handshake(limits.header_timeout);
  if (!handshake) {
    if (!server_->Admit(peer_)) {
      const std::string request_id = NewRequestId();
      co_await Answer(503, "server_overloaded", "too many connections; try again", request_id);
    } else {
      asio::co_spawn(
          executor_, [self] { return ReadFor(self); }, asio::detached);
      while (co_await ServeOne()) {
      }
      server_->Leave(peer_);
    }
    // What the client may still be sending is taken for a moment, so that it reads the reply.
    co_await transport_->Shutdown(absl::Seconds(1));
    const absl::Time linger = absl::Now() + absl::Seconds(1);
    while (!closing_ && !read_ended_ && absl::Now() < linger) {
      Consume(buffer_.size());
      (void)co_await AwaitBytes(0, linger);
    }
  }
  transport_->Close();
  closing_ = read_ended_ = true;
  resume_reading_.cancel();
  MutexLock lock(server_->mu);
  server_->live.erase(this);
  --server_->counters.connections;
}

// An error of the server itself; the connection is closed behind it.
asio::awaitable<void> Connection::Answer(int status, absl::string_view code,
                                         absl::string_view message, const std::string& request_id) {
  HttpRequest request;
  request.request_id = request_id;
  Exchange exchange(*this, request, /*keep_alive=*/false, /*minor=*/1);
  HttpResponse response = {.status = status, .headers = {{"content-type", "application/json"}}};
  if (status == 503) response.headers.emplace_back("retry-after", "1");
  if (server_->options.error_body) {
    response.body = server_->options.error_body(status, code, message);
  }
  (void)co_await exchange.Respond(std::move(response));
}

// The bytes up to and with the empty line; answers and returns false when there is no such thing.
asio::awaitable<bool> Connection::ReadHead(std::string& head) {
  const HttpLimits& limits = server_->options.limits;
  busy_ = false;
  if (closing_ || server_->draining) co_return false;
  if (!co_await AwaitBytes(0, absl::Now() + limits.idle_timeout)) co_return false;
  // Empty lines in front of a request are skipped, as RFC 9112 (2.2) has it.
  const absl::Time until = absl::Now() + limits.header_timeout;
  size_t searched = 0;
  for (;;) {
    while (absl::StartsWith(buffer_, "\r\n")) Consume(2);
    const size_t from = searched < 3 ? 0 : searched - 3;
    const size_t end = buffer_.find("\r\n\r\n", std::min(from, buffer_.size()));
    if (end != std::string::npos && end + 4 <= static_cast<size_t>(limits.header_bytes_max)) {
      head = buffer_.substr(0, end + 4);
      busy_ = true;
      co_return true;
    }
    if (buffer_.size() > static_cast<size_t>(limits.header_bytes_max)) {
      ++server_->counters.too_large;
      const std::string message =
          absl::StrCat("at most ", limits.header_bytes_max, " bytes of headers");
      const std::string request_id = NewRequestId();
      co_await Answer(431, "headers_too_large", message, request_id);
      co_return false;
    }
    // A bare LF where the head should end would wait for ever: it is refused when it is seen.
    if (buffer_.find("\n\n") != std::string::npos || buffer_.find("\n\r\n") == 0) {
      ++server_->counters.malformed;
      const std::string request_id = NewRequestId();
      co_await Answer(400, "bad_request", "a line end that is not CR LF", request_id);
      co_return false;
    }
    searched = buffer_.size();
    if (!co_await AwaitBytes(searched, until)) {
      if (!read_ended_ && !closing_) {
        ++server_->counters.timeouts;
        const std::string request_id = NewRequestId();
        co_await Answer(408, "request_timeout", "the headers took too long", request_id);
      }
      co_return false;
    }
  }
}

// Beast's parser takes the body out of the bytes, whose head has been checked.
asio::awaitable<bool> Connection::ReadBody(const std::string& head, const RequestHead& parsed,
                                           std::string& body, const std::string& request_id) {
  const HttpLimits& limits = server_->options.limits;
  const auto body_max = static_cast<uint64_t>(limits.body_bytes_max);
  const std::string too_large = absl::StrCat("at most ", body_max, " bytes of body are taken");
  if (parsed.content_length.value_or(0) > body_max) {
    ++server_->counters.too_large;
    co_await Answer(413, "request_too_large", too_large, request_id);
    co_return false;
  }
  if (parsed.expects_continue && (parsed.chunked || parsed.content_length.value_or(0) > 0)) {
    const absl::Status status = co_await Send("HTTP/1.1 100 Continue\r\n\r\n");
    if (!status.ok()) co_return false;
  }
  beast::http::request_parser<beast::http::string_body> parser;
  parser.header_limit(static_cast<uint32_t>(limits.header_bytes_max) + 1024);
  parser.body_limit(body_max);
  parser.eager(true);
  error_code error;
  parser.put(asio::buffer(head), error);
  const absl::Time until = absl::Now() + limits.body_timeout;
  while (!parser.is_done()) {
    if (!error || error == beast::http::error::need_more) {
      if (!co_await AwaitBytes(0, until)) {
        if (!read_ended_ && !closing_) {
          ++server_->counters.timeouts;
          co_await Answer(408, "request_timeout", "the body took too long", request_id);
        }
        co_return false;
      }
      error = {};
      size_t taken = parser.put(asio::buffer(buffer_), error);
      if (taken == 0 && error == beast::http::error::need_more) {
        // Half a chunk header: more bytes, or it is none.
        const size_t size = buffer_.size();
        if (size > 4096) {
          error = beast::http::error::bad_chunk;
        } else if (!co_await AwaitBytes(size, until)) {
          continue;
        }
      }
      Consume(taken);
      if (!error || error == beast::http::error::need_more) continue;
    }
    if (error == beast::http::error::body_limit) {
      ++server_->counters.too_large;
      co_await Answer(413, "request_too_large", too_large, request_id);
    } else {
      ++server_->counters.malformed;
      const std::string message = absl::StrCat("the body is broken: ", error.message());
      co_await Answer(400, "bad_request", message, request_id);
    }
    co_return false;
  }
  body = std::move(parser.get().body());
  co_return true;
}

// False: the connection ends.
asio::awaitable<bool> Connection::ServeOne() {
  std::string head;
  if (!co_await ReadHead(head)) co_return false;
  HttpRequest request;
  request.request_id = NewRequestId();
  request.peer = peer_;
  RequestHead parsed;
  const std::optional<HeadError> wrong =
      ParseRequestHead(head, server_->options.limits.headers_max, parsed);
  if (wrong.has_value()) {
    ++(wrong->status == 431 || wrong->status == 414 ? server_->counters.too_large
                                                    : server_->counters.malformed);
    co_await Answer(wrong->status, wrong->status == 431 ? "headers_too_large" : "bad_request",
                    wrong->message, request.request_id);
    co_return false;
  }
  Consume(head.size());
  if (!co_await ReadBody(head, parsed, request.body, request.request_id)) co_return false;
  head.clear();
  head.shrink_to_fit();
  request.method = std::move(parsed.method);
  request.path = std::move(parsed.path);
  request.query = std::move(parsed.query);
  request.headers = std::move(parsed.headers);
  ++server_->counters.requests_total;
  Exchange exchange(*this, request, parsed.keep_alive, parsed.minor);
  co_await server_->handler(request, exchange);
  on_gone_ = nullptr;
  if (!exchange.replied()) {
    ++server_->counters.handler_failures;
    co_await Answer(500, "server_error", "no answer was made", request.request_id);
    co_return false;
  }
  busy_ = false;
  co_return exchange.reusable() && !closing_;
}

std::string HttpRequest::Header(absl::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (absl::string_view(key) == name) return value;
  }
  return "";
}

// An address may have its share of the connections, and all together theirs.
bool HttpServer::Impl::Admit(const std::string& peer) {
  MutexLock lock(mu);
  const bool full = counters.connections > options.limits.connections_max ||
                    by_peer[peer] >= options.limits.connections_per_address_max;
  if (full) {
    ++counters.refused_connections;
    if (by_peer[peer] == 0) by_peer.erase(peer);
    return false;
  }
  ++by_peer[peer];
  return true;
}

void HttpServer::Impl::Leave(const std::string& peer) {
  MutexLock lock(mu);
  if (--by_peer[peer] == 0) by_peer.erase(peer);
}

asio::awaitable<void> HttpServer::Impl::Accept() {
  while (!draining) {
    error_code error;
    auto strand = asio::make_strand(io);
    tcp::socket socket(strand);
    co_await acceptor.async_accept(socket, Redirect(error));
    if (error == asio::error::operation_aborted || error == asio::error::bad_descriptor) co_return;
    if (error) {  // out of descriptors, most likely: the next one may succeed
      asio::steady_timer pause(acceptor.get_executor(), std::chrono::milliseconds(50));
      co_await pause.async_wait(Redirect(error));
      continue;
    }
    socket.set_option(tcp::no_delay(true), error);
    const tcp::endpoint remote = socket.remote_endpoint(error);
    if (error) continue;
    std::string peer = remote.address().to_string(error);
    beast::tcp_stream plain(std::move(socket));
    std::unique_ptr<Transport> transport;
    if (options.certificate_file.empty()) {
      transport = std::make_unique<StreamTransport<beast::tcp_stream>>(std::move(plain));
    } else {
      transport = std::make_unique<StreamTransport<beast::ssl_stream<beast::tcp_stream>>>(
          beast::ssl_stream<beast::tcp_stream>(std::move(plain), tls));
    }
    auto connection = std::make_shared<Connection>(shared_from_this(), std::move(transport),
                                                   std::move(peer), strand);
    {
      MutexLock lock(mu);
      live.insert(connection.get());
      ++counters.connections;
      ++counters.connections_total;
    }
    connection->Start();
  }
}

absl::Status HttpServer::Impl::Open() {
  const size_t colon = options.listen.rfind(':');
  std::string host = options.listen.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  uint32_t number = 0;
  error_code error;
  const asio::ip::address address =
      asio::ip::make_address(host == "localhost" ? "127.0.0.1" : host, error);
  if (colon == std::string::npos || error ||
      !absl::SimpleAtoi(options.listen.substr(colon + 1), &number) || number > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", options.listen, "\" is no address to listen on; write it as 127.0.0.1:8080"));
  }
  if (!options.certificate_file.empty()) {
    tls.set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_sslv2 |
                    asio::ssl::context::no_sslv3 | asio::ssl::context::no_tlsv1 |
                    asio::ssl::context::no_tlsv1_1);
    tls.use_certificate_chain_file(options.certificate_file, error);
    if (!error) tls.use_private_key_file(options.key_file, asio::ssl::context::pem, error);
    if (error) {
      return absl::InvalidArgumentError(absl::StrCat("TLS certificate ", options.certificate_file,
                                                     ", key ", options.key_file, ": ",
                                                     error.message()));
    }
  }
  const tcp::endpoint endpoint(address, static_cast<uint16_t>(number));
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(asio::socket_base::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(SOMAXCONN, error);
  if (error) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options.listen, ": ", error.message()));
  }
  port = acceptor.local_endpoint(error).port();
  return absl::OkStatus();
}

HttpServer::HttpServer(HttpServerOptions options, HttpHandler handler)
    : impl_(std::make_shared<Impl>(std::move(options), std::move(handler))) {}

HttpServer::~HttpServer() { Drain(absl::ZeroDuration()); }
int HttpServer::port() const { return impl_->port; }
asio::any_io_executor HttpServer::executor() { return impl_->io.get_executor(); }
const HttpCounters& HttpServer::counters() const { return impl_->counters; }

absl::Status HttpServer::Start() {
  CINNABAR_RETURN_IF_ERROR(impl_->Open());
  asio::co_spawn(
      impl_->acceptor.get_executor(), [impl = impl_] { return impl->Accept(); }, asio::detached);
  for (int32_t i = 0; i < std::max(impl_->options.num_threads, 1); ++i) {
    impl_->threads.emplace_back([impl = impl_.get()] {
      const auto work = asio::make_work_guard(impl->io);
      impl->io.run();
    });
  }
  return absl::OkStatus();
}

void HttpServer::Drain(absl::Duration grace) {
  impl_->draining = true;
  asio::post(impl_->acceptor.get_executor(), [impl = impl_] {
    error_code ignored;
    impl->acceptor.close(ignored);
  });
  const auto close_all = [&](bool idle_only) {
    std::vector<std::shared_ptr<Connection>> connections;
    {
      MutexLock lock(impl_->mu);
      for (Connection* connection : impl_->live) {
        // One that is being taken apart has left already, or is about to.
        if (auto shared = connection->weak_from_this().lock()) connections.push_back(shared);
      }
    }
    for (const auto& connection : connections) connection->Close(idle_only);
  };
  if (!impl_->threads.empty()) {
    close_all(/*idle_only=*/true);
    const absl::Time until = absl::Now() + grace;
    while (impl_->counters.connections > 0 && absl::Now() < until) {
      absl::SleepFor(absl::Milliseconds(10));
    }
    close_all(/*idle_only=*/false);
    const absl::Time hard = absl::Now() + absl::Seconds(2);
    while (impl_->counters.connections > 0 && absl::Now() < hard) {
      absl::SleepFor(absl::Milliseconds(5));
    }
  }
  impl_->io.stop();
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
}

}  // namespace cinnabar
