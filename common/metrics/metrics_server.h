// /metrics, /healthz and /readyz of a program that serves nothing else over HTTP.
#ifndef CINNABAR_COMMON_METRICS_METRICS_SERVER_H_
#define CINNABAR_COMMON_METRICS_METRICS_SERVER_H_

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "common/http/http_server.h"
#include "common/metrics/metrics.h"

namespace cinnabar {

// Starts it. `metrics` is borrowed and outlives the server. `ready` says what is missing, nothing
// when the program is ready; it is called from the server's thread.
absl::StatusOr<std::unique_ptr<HttpServer>> StartMetricsServer(const std::string& listen,
                                                               Metrics& metrics,
                                                               std::function<std::string()> ready);

// The three paths, for servers that have others as well. Null: it is none of them.
std::optional<HttpResponse> MetricsResponse(const HttpRequest& request, Metrics& metrics,
                                            const std::function<std::string()>& ready);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_METRICS_METRICS_SERVER_H_
