#include "common/metrics/metrics_server.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

HttpResponse Text(int status, std::string body) {
  return {.status = status,
          .headers = {{"content-type", "text/plain; charset=utf-8"}},
          .body = std::move(body)};
}

}  // namespace

std::optional<HttpResponse> MetricsResponse(const HttpRequest& request, Metrics& metrics,
                                            const std::function<std::string()>& ready) {
  const bool known =
      request.path == "/metrics" || request.path == "/healthz" || request.path == "/readyz";
  if (!known) return std::nullopt;
  if (request.method != "GET" && request.method != "HEAD") {
    HttpResponse refused = Text(405, "only GET\n");
    refused.headers.emplace_back("allow", "GET, HEAD");
    return refused;
  }
  if (request.path == "/healthz") return Text(200, "ok\n");
  if (request.path == "/readyz") {
    const std::string missing = ready();
    return missing.empty() ? Text(200, "ready\n") : Text(503, absl::StrCat(missing, "\n"));
  }
  return HttpResponse{.status = 200,
                      .headers = {{"content-type", "text/plain; version=0.0.4; charset=utf-8"}},
                      .body = metrics.Render()};
}

absl::StatusOr<std::unique_ptr<HttpServer>> StartMetricsServer(const std::string& listen,
                                                               Metrics& metrics,
                                                               std::function<std::string()> ready) {
  HttpServerOptions options;
  options.listen = listen;
  options.limits.connections_max = 64;
  options.limits.body_bytes_max = 0;
  auto server = std::make_unique<HttpServer>(
      options,
      [&metrics, ready = std::move(ready)](const HttpRequest& request,
                                           HttpExchange& exchange) -> asio::awaitable<void> {
        std::optional<HttpResponse> response = MetricsResponse(request, metrics, ready);
        if (!response.has_value()) {
          response = Text(404, "here are /metrics, /healthz and /readyz\n");
        }
        (void)co_await exchange.Respond(*std::move(response));
      });
  CINNABAR_RETURN_IF_ERROR(server->Start(), "metrics");
  return server;
}

}  // namespace cinnabar
