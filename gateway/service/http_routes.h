// The HTTP API: which URL does what. Requests come in whole, replies go out whole or as a stream of
// server-sent events.
#ifndef CINNABAR_GATEWAY_SERVICE_HTTP_ROUTES_H_
#define CINNABAR_GATEWAY_SERVICE_HTTP_ROUTES_H_

#include <functional>
#include <string>

#include "absl/time/time.h"
#include "common/http/asio.h"
#include "common/http/http_server.h"
#include "gateway/api/parse_request.h"
#include "gateway/service/authenticator.h"
#include "gateway/service/generation_session.h"

namespace cinnabar {

struct HttpRoutesOptions {
  RequestLimits limits;
  // A stream without anything to say sends a comment this often, so that no proxy closes it.
  absl::Duration keep_alive = absl::Seconds(15);
  // A stream's headers wait this long for its first event: what is refused at once gets a status.
  absl::Duration header_patience = absl::Seconds(1);
};

// Thread-safe. What it is given is borrowed and outlives it.
class HttpRoutes {
 public:
  // `wait_estimate` is for Retry-After; `ready` says what is missing, nothing when all is there.
  HttpRoutes(HttpRoutesOptions options, const SessionContext& context,
             const Authenticator& authenticator, std::function<absl::Duration()> wait_estimate,
             std::function<std::string()> ready, Metrics& metrics);

  // The handler of an HttpServer.
  asio::awaitable<void> Handle(const HttpRequest& request, HttpExchange& exchange);

 private:
  asio::awaitable<void> Generate(GenerationRequest::Endpoint endpoint, const HttpRequest& request,
                                 HttpExchange& exchange);
  asio::awaitable<std::string> Reply(GenerationSession& session, HttpExchange& exchange);
  asio::awaitable<std::string> Stream(GenerationSession& session, HttpExchange& exchange);
  asio::awaitable<void> CancelRequest(const std::string& id, const HttpRequest& request,
                                      HttpExchange& exchange);
  asio::awaitable<void> Models(const std::string& id, const HttpRequest& request,
                               HttpExchange& exchange);
  asio::awaitable<void> Refuse(const ApiError& error, HttpExchange& exchange,
                               std::vector<std::pair<std::string, std::string>> headers = {});

  const HttpRoutesOptions options_;
  const SessionContext& context_;
  const Authenticator& authenticator_;
  const std::function<absl::Duration()> wait_estimate_;
  const std::function<std::string()> ready_;
  Metrics& metrics_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_HTTP_ROUTES_H_
