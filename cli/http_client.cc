#include "cli/http_client.h"

#include <openssl/ssl.h>

#include <algorithm>
#include <array>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/ssl.hpp>
#include <chrono>
#include <optional>
#include <unordered_map>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using Clock = std::chrono::steady_clock;
using ErrorCode = boost::system::error_code;

constexpr uint32_t kHeaderBytesMax = 64 << 10;
constexpr size_t kPieceBytes = 4096;

absl::Status BadUrl(absl::string_view text, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a URL of a gateway: ", why,
                                                 "; one is http://127.0.0.1:8080"));
}

// One TCP or TLS stream; Visit hands the right one to generic code.
struct Connection {
  std::unique_ptr<beast::tcp_stream> plain;
  std::unique_ptr<beast::ssl_stream<beast::tcp_stream>> secure;
  beast::flat_buffer buffer;
  bool reused = false;

  beast::tcp_stream& lowest() { return secure ? beast::get_lowest_layer(*secure) : *plain; }
  template <typename F>
  void Visit(F&& f) {
    if (secure) {
      f(*secure);
    } else {
      f(*plain);
    }
  }
  void Close() {
    ErrorCode ignored;
    lowest().socket().close(ignored);
  }
};

struct Call {
  HttpClient::Id id = 0;
  std::string wire;  // the request as sent
  bool head_only = false;
  Clock::time_point deadline;
  absl::Duration timeout;
  HttpHandlers handlers;
  bool cancelled = false;
  bool retried = false;
  bool head_given = false;
  std::unique_ptr<Connection> connection;
  std::optional<http::response_parser<http::buffer_body>> parser;
  std::array<char, kPieceBytes> piece;
};
using CallPtr = std::shared_ptr<Call>;

std::string WireForm(const HttpUrl& url, const HttpRequest& request) {
  const bool default_port = url.port == (url.tls ? 443 : 80);
  const std::string host =
      absl::StrContains(url.host, ':') ? absl::StrCat("[", url.host, "]") : url.host;
  std::string wire =
      absl::StrCat(request.method, " ", request.target, " HTTP/1.1\r\nHost: ", host,
                   default_port ? "" : absl::StrCat(":", url.port), "\r\nUser-Agent: cinnabar\r\n");
  for (const auto& [name, value] : request.headers) {
    absl::StrAppend(&wire, name, ": ", value, "\r\n");
  }
  if (!request.body.empty() || request.method == "POST") {
    absl::StrAppend(&wire, "Content-Length: ", request.body.size(), "\r\n");
  }
  absl::StrAppend(&wire, "\r\n", request.body);
  return wire;
}

}  // namespace

std::string HttpUrl::ToString() const {
  return absl::StrCat(tls ? "https://" : "http://",
                      absl::StrContains(host, ':') ? absl::StrCat("[", host, "]") : host,
                      port == (tls ? 443 : 80) ? "" : absl::StrCat(":", port), path);
}

bool HttpUrl::loopback() const {
  return host == "localhost" || host == "::1" || absl::StartsWith(host, "127.");
}

absl::StatusOr<HttpUrl> ParseHttpUrl(absl::string_view text) {
  HttpUrl url;
  absl::string_view rest = text;
  if (absl::ConsumePrefix(&rest, "https://")) {
    url.tls = true;
    url.port = 443;
  } else if (!absl::ConsumePrefix(&rest, "http://") && absl::StrContains(rest, "://")) {
    return BadUrl(text, "only http and https are spoken");
  }
  for (const char c : rest) {
    if (static_cast<unsigned char>(c) <= ' ' || c == 0x7F) return BadUrl(text, "it has a space");
  }
  if (rest.find_first_of("?#@") != absl::string_view::npos) {
    return BadUrl(text, "it must be a host and a path only");
  }
  const size_t slash = rest.find('/');
  absl::string_view authority = rest.substr(0, slash);
  if (slash != absl::string_view::npos) {
    absl::string_view path = rest.substr(slash);
    while (absl::ConsumeSuffix(&path, "/")) {
    }
    url.path = std::string(path);
  }
  absl::string_view port;
  bool has_port = false;
  if (absl::ConsumePrefix(&authority, "[")) {
    const size_t close = authority.find(']');
    if (close == absl::string_view::npos) return BadUrl(text, "\"[\" is not closed");
    url.host = std::string(authority.substr(0, close));
    port = authority.substr(close + 1);
    has_port = absl::ConsumePrefix(&port, ":");
    if (!has_port && !port.empty()) return BadUrl(text, "after \"]\" comes \":\" and the port");
  } else {
    const size_t colon = authority.find(':');
    has_port = colon != absl::string_view::npos;
    url.host = std::string(authority.substr(0, colon));
    if (has_port) port = authority.substr(colon + 1);
  }
  if (url.host.empty()) return BadUrl(text, "it names no host");
  if (has_port && (!absl::SimpleAtoi(port, &url.port) || url.port < 1 || url.port > 65535)) {
    return BadUrl(text, "the port is a number from 1 to 65535");
  }
  return url;
}

std::string ApiPath(const HttpUrl& url, absl::string_view endpoint) {
  return absl::StrCat(url.path, absl::EndsWith(url.path, "/v1") ? "" : "/v1", endpoint);
}

absl::string_view HttpHead::Find(absl::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return "";
}

struct HttpClient::Impl {
  HttpUrl url;
  HttpClientOptions options;
  asio::io_context io{1};
  std::optional<asio::ssl::context> tls;
  tcp::resolver::results_type endpoints;
  const Clock::time_point born = Clock::now();
  std::vector<std::unique_ptr<Connection>> idle;  // the last one back goes first
  std::unordered_map<Id, CallPtr> calls;
  Id next_id = 1;
  int64_t connections_made = 0;

  void Begin(const CallPtr& call);
  void Connect(const CallPtr& call);
  void Handshake(const CallPtr& call);
  void Send(const CallPtr& call);
  void ReadHead(const CallPtr& call);
  void ReadBody(const CallPtr& call);
  void Fail(const CallPtr& call, const ErrorCode& error, absl::string_view doing);
  void Finish(const CallPtr& call, const absl::Status& status);
};

void HttpClient::Impl::Begin(const CallPtr& call) {
  if (call->cancelled) return Finish(call, absl::CancelledError("cancelled"));
  if (idle.empty()) return Connect(call);
  call->connection = std::move(idle.back());
  idle.pop_back();
  call->connection->reused = true;
  Send(call);
}

void HttpClient::Impl::Connect(const CallPtr& call) {
  ++connections_made;
  call->connection = std::make_unique<Connection>();
  Connection& connection = *call->connection;
  if (tls) {
    connection.secure = std::make_unique<beast::ssl_stream<beast::tcp_stream>>(io, *tls);
  } else {
    connection.plain = std::make_unique<beast::tcp_stream>(io);
  }
  connection.buffer.reserve(kPieceBytes);
  connection.lowest().expires_at(
      std::min(call->deadline, Clock::now() + absl::ToChronoNanoseconds(options.connect_timeout)));
  connection.lowest().async_connect(
      endpoints, [this, call](const ErrorCode& error, const tcp::endpoint&) {
        if (error) return Fail(call, error, "connect");
        ErrorCode ignored;
        call->connection->lowest().socket().set_option(tcp::no_delay(true), ignored);
        if (tls) {
          Handshake(call);
        } else {
          Send(call);
        }
      });
}

void HttpClient::Impl::Handshake(const CallPtr& call) {
  auto& stream = *call->connection->secure;
  // The name that a server with several certificates chooses by.
  SSL_set_tlsext_host_name(stream.native_handle(), url.host.c_str());
  ErrorCode ignored;
  stream.set_verify_callback(asio::ssl::host_name_verification(url.host), ignored);
  stream.async_handshake(asio::ssl::stream_base::client, [this, call](const ErrorCode& error) {
    if (error) return Fail(call, error, "TLS");
    Send(call);
  });
}

void HttpClient::Impl::Send(const CallPtr& call) {
  call->connection->lowest().expires_at(call->deadline);
  call->connection->Visit([&](auto& stream) {
    asio::async_write(stream, asio::buffer(call->wire),
                      [this, call](const ErrorCode& error, size_t) {
                        if (error) return Fail(call, error, "send");
                        ReadHead(call);
                      });
  });
}

void HttpClient::Impl::ReadHead(const CallPtr& call) {
  call->parser.emplace();
  call->parser->header_limit(kHeaderBytesMax);
  // Not boost::none: Boost 1.74 takes that for a limit of nothing.
  call->parser->body_limit(std::numeric_limits<uint64_t>::max());
  call->parser->skip(call->head_only);
  call->connection->Visit([&](auto& stream) {
    http::async_read_header(
        stream, call->connection->buffer, *call->parser,
        [this, call](const ErrorCode& error, size_t) {
          if (error) return Fail(call, error, "read");
          HttpHead head;
          head.status = static_cast<int32_t>(call->parser->get().result_int());
          for (const auto& field : call->parser->get()) {
            head.headers.emplace_back(
                absl::AsciiStrToLower({field.name_string().data(), field.name_string().size()}),
                std::string(field.value().data(), field.value().size()));
          }
          call->head_given = true;
          if (call->handlers.on_head) call->handlers.on_head(head);
          ReadBody(call);
        });
  });
}

void HttpClient::Impl::ReadBody(const CallPtr& call) {
  if (call->cancelled) return Finish(call, absl::CancelledError("cancelled"));
  if (call->parser->is_done()) return Finish(call, absl::OkStatus());
  auto& body = call->parser->get().body();
  body.data = call->piece.data();
  body.size = call->piece.size();
  body.more = true;
  call->connection->Visit([&](auto& stream) {
    http::async_read_some(
        stream, call->connection->buffer, *call->parser, [this, call](ErrorCode error, size_t) {
          if (error == http::error::need_buffer) error = {};
          const size_t size = call->piece.size() - call->parser->get().body().size;
          if (size > 0 && !call->cancelled && call->handlers.on_body) {
            call->handlers.on_body({call->piece.data(), size});
          }
          if (error) return Fail(call, error, "read");
          ReadBody(call);
        });
  });
}

void HttpClient::Impl::Fail(const CallPtr& call, const ErrorCode& error, absl::string_view doing) {
  if (call->cancelled) return Finish(call, absl::CancelledError("cancelled"));
  const bool timed_out = error == beast::error::timeout;
  // The server may close a kept connection at any time; then no byte of an answer came.
  const bool untouched = !call->parser || !call->parser->got_some();
  if (call->connection->reused && untouched && !timed_out && !call->retried) {
    call->retried = true;
    call->connection.reset();
    call->parser.reset();
    return Connect(call);
  }
  const std::string where = absl::StrCat(url.host, ":", url.port);
  if (doing == "connect") {
    return Finish(call, absl::UnavailableError(timed_out ? absl::StrCat(where, " does not answer")
                                                         : absl::StrCat("cannot connect to ", where,
                                                                        ": ", error.message())));
  }
  if (timed_out) {
    return Finish(call, absl::DeadlineExceededError(absl::StrCat(
                            "no full answer within ", absl::FormatDuration(call->timeout))));
  }
  if (doing == "TLS") {
    return Finish(
        call, absl::UnavailableError(absl::StrCat("no TLS with ", where, ": ", error.message())));
  }
  if (error.category() == http::make_error_code(http::error::bad_version).category() &&
      error != http::error::end_of_stream && error != http::error::partial_message) {
    return Finish(
        call, absl::DataLossError(absl::StrCat(where, " does not speak HTTP: ", error.message())));
  }
  Finish(call, absl::UnavailableError("the connection broke off"));
}

void HttpClient::Impl::Finish(const CallPtr& call, const absl::Status& status) {
  calls.erase(call->id);
  if (call->connection) {
    const bool keep = status.ok() && call->parser->keep_alive() &&
                      call->connection->buffer.size() == 0 &&
                      static_cast<int32_t>(idle.size()) < options.idle_connections_max;
    if (keep) {
      call->connection->lowest().expires_never();
      idle.push_back(std::move(call->connection));
    } else {
      call->connection->Close();
      call->connection.reset();
    }
  }
  // The handlers may hold the caller's objects: they go with the call.
  HttpHandlers handlers = std::move(call->handlers);
  if (handlers.on_done) handlers.on_done(status);
}

absl::StatusOr<std::unique_ptr<HttpClient>> HttpClient::Make(const HttpUrl& url,
                                                             HttpClientOptions options) {
  auto impl = std::make_unique<Impl>();
  impl->url = url;
  impl->options = std::move(options);
  ErrorCode error;
  tcp::resolver resolver(impl->io);
  impl->endpoints = resolver.resolve(url.host, absl::StrCat(url.port), error);
  if (error) {
    return absl::UnavailableError(
        absl::StrCat("cannot find the host \"", url.host, "\": ", error.message()));
  }
  if (url.tls) {
    impl->tls.emplace(asio::ssl::context::tls_client);
    impl->tls->set_verify_mode(asio::ssl::verify_peer, error);
    if (impl->options.ca_file.empty()) {
      impl->tls->set_default_verify_paths(error);
    } else {
      impl->tls->load_verify_file(impl->options.ca_file, error);
      if (error) {
        return absl::FailedPreconditionError(absl::StrCat(
            impl->options.ca_file, ": no certificates in PEM form: ", error.message()));
      }
    }
  }
  return std::unique_ptr<HttpClient>(new HttpClient(std::move(impl)));
}

HttpClient::HttpClient(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpClient::~HttpClient() = default;

const HttpUrl& HttpClient::url() const { return impl_->url; }
int64_t HttpClient::connections_made() const { return impl_->connections_made; }

HttpClient::Id HttpClient::Start(HttpRequest request, absl::Duration timeout,
                                 HttpHandlers handlers) {
  auto call = std::make_shared<Call>();
  call->id = impl_->next_id++;
  call->wire = WireForm(impl_->url, request);
  call->head_only = request.method == "HEAD";
  call->timeout = timeout;
  call->deadline = Clock::now() + absl::ToChronoNanoseconds(timeout);
  call->handlers = std::move(handlers);
  impl_->calls[call->id] = call;
  asio::post(impl_->io, [impl = impl_.get(), call] { impl->Begin(call); });
  return call->id;
}

void HttpClient::Cancel(Id id) {
  const auto found = impl_->calls.find(id);
  if (found == impl_->calls.end()) return;
  found->second->cancelled = true;
  if (found->second->connection) found->second->connection->Close();
}

absl::Duration HttpClient::Now() const { return absl::FromChrono(Clock::now() - impl_->born); }

void HttpClient::At(absl::Duration when, absl::AnyInvocable<void()> then) {
  auto timer = std::make_shared<asio::steady_timer>(impl_->io,
                                                    impl_->born + absl::ToChronoNanoseconds(when));
  timer->async_wait([timer, then = std::move(then)](const ErrorCode& error) mutable {
    if (!error) then();
  });
}

void HttpClient::Run() {
  impl_->io.restart();
  impl_->io.run();
}

void HttpClient::Stop() { impl_->io.stop(); }

absl::StatusOr<HttpReply> HttpClient::Fetch(HttpRequest request, absl::Duration timeout,
                                            size_t body_bytes_max) {
  HttpReply reply;
  absl::Status status;
  bool done = false;
  bool too_long = false;
  Id id = 0;
  HttpHandlers handlers;
  handlers.on_head = [&](const HttpHead& head) { reply.head = head; };
  handlers.on_body = [&](absl::string_view piece) {
    if (reply.body.size() + piece.size() > body_bytes_max) {
      too_long = true;
      Cancel(id);
      return;
    }
    reply.body.append(piece.data(), piece.size());
  };
  handlers.on_done = [&](const absl::Status& end) {
    status = end;
    done = true;
  };
  id = Start(std::move(request), timeout, std::move(handlers));
  impl_->io.restart();
  while (!done && impl_->io.run_one() > 0) {
  }
  if (too_long) {
    return absl::ResourceExhaustedError(
        absl::StrCat("an answer of over ", body_bytes_max, " bytes"));
  }
  CINNABAR_RETURN_IF_ERROR(status);
  return reply;
}

}  // namespace cinnabar
