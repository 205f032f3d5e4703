// cinnabar-gateway: the front door.
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/config/flags.h"
#include "common/http/http_server.h"
#include "common/keys/key_cache.h"
#include "common/metrics/metrics.h"
#include "common/program/program.h"
#include "gateway/grpc/grpc_server.h"
#include "gateway/relay/event_hub.h"
#include "gateway/relay/queue_executor.h"
#include "gateway/service/cluster_watch.h"
#include "gateway/service/http_routes.h"
#include "gateway/service/key_lookup.h"

namespace cinnabar {
namespace {

struct Flags {
  ProgramFlags program;
  std::string listen = "127.0.0.1:8080";
  std::string grpc_listen = "127.0.0.1:8081";
  std::vector<std::string> models;
  std::vector<std::string> aliases;
  std::string certificate, key, client_ca;
  std::string keys_pepper;
  int32_t key_requests = 0, key_concurrency = 0;
  uint64_t key_tokens = 0, key_token_steps = 0;
  float key_budget = 0;
  float price_input = 0;
  float price_output = 0;
  int32_t default_tokens = 128;
  int32_t threads = 1;
  int32_t redis_connections = 8;
  float deadline_seconds = 120;
  float drain_seconds = 20;
  float retry_grace_seconds = 5;
  float header_seconds = 5, body_seconds = 15, write_seconds = 30, idle_seconds = 60;
  int32_t body_kib = 1024;
  int32_t connections_max = 4096;
  int32_t connections_per_address_max = 1024;
  int32_t queue_requests_max = 1000;
  uint64_t token_steps_max = 200'000'000;

  KeyLimits KeyDefaults() const {
    KeyLimits limits;
    limits.requests_per_minute = key_requests;
    limits.tokens_per_minute = static_cast<int64_t>(key_tokens);
    limits.token_steps_per_minute = static_cast<int64_t>(key_token_steps);
    limits.concurrency_max = key_concurrency;
    limits.budget_dollars_per_month = key_budget;
    return limits;
  }

  void Register(FlagSet& flags) {
    flags.Section("Listening");
    flags.Add("listen", &listen, "HOST:PORT", "HTTP: the API, /metrics, /healthz, /readyz");
    flags.Add("grpc-listen", &grpc_listen, "HOST:PORT", "gRPC; empty: none");
    flags.Add("tls-certificate", &certificate, "FILE", "PEM chain, for both listeners");
    flags.Add("tls-key", &key, "FILE", "its key");
    flags.Add("grpc-client-ca", &client_ca, "FILE", "gRPC clients must show a certificate of it");
    flags.Section("API keys");
    flags.Add(
        "keys-pepper", &keys_pepper, "FILE",
        "ask for keys, made with this pepper by `cinnabar keys`; without it everybody on this "
        "machine is served");
    flags.Add("key-requests-per-minute", &key_requests, "N",
              "of a key that has no such limit of its own; 0: no limit");
    flags.Add("key-tokens-per-minute", &key_tokens, "N", "prompt and canvas, likewise");
    flags.Add("key-token-steps-per-minute", &key_token_steps, "N",
              "predicted cost: tokens x denoising steps, likewise");
    flags.Add("key-concurrency", &key_concurrency, "N", "live requests, likewise");
    flags.Add("key-budget-dollars", &key_budget, "DOLLARS", "a calendar month (UTC), likewise");
    flags.Section("Models");
    flags.Add("model", &models, "NAME=DIR", "a model and the folder of its tokenizer; repeatable");
    flags.Add("alias", &aliases, "ALIAS=NAME", "another name for a model; repeatable");
    flags.Add("price-input", &price_input, "DOLLARS", "per million prompt tokens");
    flags.Add("price-output", &price_output, "DOLLARS", "per million canvas tokens committed");
    flags.Add("default-tokens", &default_tokens, "N", "canvas of a request without max_tokens");
    program.Register(flags);
    flags.Section("Limits");
    flags.Add("deadline-seconds", &deadline_seconds, "S", "of requests that name none");
    flags.Add("drain-seconds", &drain_seconds, "S", "on SIGTERM, for replies under way");
    flags.Add(
        "retry-grace-seconds", &retry_grace_seconds, "S",
        "a request with an Idempotency-Key runs on when its client is gone: it may try again");
    flags.Add("header-seconds", &header_seconds, "S", "for a request's head, from its first byte");
    flags.Add("body-seconds", &body_seconds, "S", "for its body");
    flags.Add("write-seconds", &write_seconds, "S", "until a client that does not read is cut off");
    flags.Add("idle-seconds", &idle_seconds, "S", "until an unused connection is closed");
    flags.Add("body-kib", &body_kib, "KIB", "largest request body");
    flags.Add("connections-max", &connections_max, "N", "open at once");
    flags.Add("connections-per-address-max", &connections_per_address_max, "N", "of one client");
    flags.Add("queue-requests-max", &queue_requests_max, "N", "waiting, of a tenant and class");
    flags.Add("token-steps-max", &token_steps_max, "N", "of all requests under way: 503 beyond");
    flags.Add("threads", &threads, "N", "that serve connections");
    flags.Add("redis-connections", &redis_connections, "N", "to the queue");
    flags.Examples(
        "examples:\n"
        "  cinnabar-gateway --redis 127.0.0.1:6379 --model coder=models/cinnabar-py-4m\n"
        "  curl -s http://127.0.0.1:8080/v1/completions -d '{\"model\": \"coder\", \"prompt\": "
        "\"def f(\"}'\n");
  }
};

// "name=value". InvalidArgument names the flag.
absl::StatusOr<std::pair<std::string, std::string>> SplitPair(const std::string& text,
                                                              absl::string_view flag) {
  const size_t equal = text.find('=');
  if (equal == std::string::npos || equal == 0 || equal + 1 == text.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, " ", text, ": write it as name=value"));
  }
  return std::make_pair(text.substr(0, equal), text.substr(equal + 1));
}

absl::StatusOr<std::vector<ModelSource>> ReadModels(const Flags& flags) {
  if (flags.models.empty()) {
    return absl::InvalidArgumentError("--model is missing: name one as NAME=DIR");
  }
  std::vector<ModelSource> sources;
  for (const std::string& text : flags.models) {
    CINNABAR_ASSIGN_OR_RETURN(const auto pair, SplitPair(text, "model"));
    ModelSource source;
    source.name = pair.first;
    source.path = pair.second;
    source.default_canvas_tokens = flags.default_tokens;
    source.prices = {.input_dollars_per_million = flags.price_input,
                     .output_dollars_per_million = flags.price_output};
    sources.push_back(std::move(source));
  }
  for (const std::string& text : flags.aliases) {
    CINNABAR_ASSIGN_OR_RETURN(const auto pair, SplitPair(text, "alias"));
    bool found = false;
    for (ModelSource& source : sources) {
      if (source.name != pair.second) continue;
      source.aliases.push_back(pair.first);
      found = true;
    }
    if (!found) {
      return absl::InvalidArgumentError(
          absl::StrCat("--alias ", text, ": there is no --model ", pair.second));
    }
  }
  return sources;
}

bool IsLoopbackAddress(absl::string_view listen) {
  return absl::StartsWith(listen, "127.") || absl::StartsWith(listen, "localhost:") ||
         absl::StartsWith(listen, "[::1]:");
}

std::string ServerErrorBody(int status, absl::string_view code, absl::string_view message) {
  ApiError error;
  error.http_status = status;
  error.type = status >= 500 ? "server_error" : "invalid_request_error";
  error.code = std::string(code);
  error.message = std::string(message);
  return ErrorBody(error);
}

absl::Status Serve(Flags flags) {
  if (flags.program.name.empty()) flags.program.name = absl::StrCat(HostName(), "-gateway");
  CINNABAR_RETURN_IF_ERROR(flags.program.Start("gateway"));
  if (flags.certificate.empty() != flags.key.empty()) {
    return absl::InvalidArgumentError("--tls-certificate and --tls-key go together");
  }
  for (const std::string& listen : {flags.listen, flags.grpc_listen}) {
    if (listen.empty() || IsLoopbackAddress(listen)) continue;
    if (flags.keys_pepper.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("without API keys only this machine is served: ", listen,
                       " is not a loopback address. Listen on 127.0.0.1, or make keys with "
                       "`cinnabar keys create` "
                       "and name their pepper with --keys-pepper"));
    }
    if (flags.certificate.empty()) {
      Log(LogLevel::kWarn, "no_tls",
          {{"listen", listen}, {"note", "keys and prompts cross the network in clear"}});
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(const RedisOptions redis, flags.program.Redis("gateway"));
  const QueueOptions queue = flags.program.Queue();
  CINNABAR_ASSIGN_OR_RETURN(std::vector<ModelSource> sources, ReadModels(flags));
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<ModelDirectory> models,
                            ModelDirectory::Load(std::move(sources)));
  Metrics metrics;
  GatewayMetrics gateway_metrics(metrics);
  ClusterWatch watch(redis, queue, *models, absl::Milliseconds(500));
  QueueExecutor executor({.redis = redis, .queue = queue, .num_threads = flags.redis_connections});
  EventHub hub(redis, queue, flags.program.name);
  const SessionContext context = {.executor = executor,
                                  .hub = hub,
                                  .models = *models,
                                  .metrics = gateway_metrics,
                                  .deadline_default = absl::Seconds(flags.deadline_seconds),
                                  .retry_grace = absl::Seconds(flags.retry_grace_seconds)};
  Caller open;
  open.limits.queue_requests_max = flags.queue_requests_max;
  open.limits.cost_max = static_cast<int64_t>(flags.token_steps_max);
  std::unique_ptr<KeyCache> keys;
  Authenticator::Lookup lookup;
  if (!flags.keys_pepper.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(Pepper pepper, LoadPepper(flags.keys_pepper), "--keys-pepper");
    keys = std::make_unique<KeyCache>(KeyCacheOptions{.partition = flags.program.partition}, redis,
                                      std::move(pepper));
    lookup = MakeKeyLookup(*keys, flags.KeyDefaults(), open.limits, [&](KeyRefusal refusal) {
      gateway_metrics.AuthFailure(KeyRefusalName(refusal));
    });
  }
  const Authenticator authenticator(std::move(lookup), open);
  std::atomic<bool> draining = false;
  const auto ready = [&watch, &draining] { return draining ? "draining" : watch.Missing(); };
  const auto wait_estimate = [&watch] { return watch.WaitEstimate(); };
  HttpRoutes routes({}, context, authenticator, wait_estimate, ready, metrics);
  HttpServerOptions options;
  options.listen = flags.listen;
  options.num_threads = flags.threads;
  options.certificate_file = flags.certificate;
  options.key_file = flags.key;
  options.limits.body_bytes_max = int64_t{flags.body_kib} << 10;
  options.limits.header_timeout = absl::Seconds(flags.header_seconds);
  options.limits.body_timeout = absl::Seconds(flags.body_seconds);
  options.limits.write_timeout = absl::Seconds(flags.write_seconds);
  options.limits.idle_timeout = absl::Seconds(flags.idle_seconds);
  options.limits.connections_max = flags.connections_max;
  options.limits.connections_per_address_max = flags.connections_per_address_max;
  options.error_body = ServerErrorBody;
  HttpServer server(options, [&routes](const HttpRequest& request, HttpExchange& exchange) {
    return routes.Handle(request, exchange);
  });
  metrics.OnScrape([&] {
    if (keys != nullptr) gateway_metrics.Show(keys->stats());
    gateway_metrics.Show(server.counters());
    gateway_metrics.Show(hub.counters(), executor.counters());
  });
  CINNABAR_RETURN_IF_ERROR(server.Start());
  std::unique_ptr<GrpcServer> grpc;
  if (!flags.grpc_listen.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(
        grpc, GrpcServer::Start({.listen = flags.grpc_listen,
                                 .certificate_file = flags.certificate,
                                 .key_file = flags.key,
                                 .client_ca_file = flags.client_ca,
                                 .message_bytes_max = flags.body_kib << 10},
                                server.executor(), context, authenticator, wait_estimate));
  }
  Log(LogLevel::kInfo, "gateway_starts",
      {{"version", kVersion},
       {"name", flags.program.name},
       {"http_port", server.port()},
       {"grpc_port", grpc == nullptr ? 0 : grpc->port()},
       {"keys", keys == nullptr ? "none: only this machine is served" : "asked for"}});
  Mutex mu;
  ConditionVariable stop;
  {
    const SignalThread signals([&] {
      MutexLock lock(mu);
      draining = true;
      stop.NotifyAll();
    });
    NotifyReady();
    MutexLock lock(mu);
    while (!draining) stop.Wait(mu);
  }
  const absl::Duration grace = absl::Seconds(flags.drain_seconds);
  Log(LogLevel::kInfo, "drains", {{"grace_ms", grace}});
  if (grpc != nullptr) grpc->SetServing(false);
  if (grpc != nullptr) grpc->Drain(grace);
  server.Drain(grace);
  Log(LogLevel::kInfo, "gateway_stops");
  return absl::OkStatus();
}

}  // namespace
}  // namespace cinnabar

int main(int argc, char** argv) {
  cinnabar::Flags flags;
  cinnabar::FlagSet set("cinnabar-gateway --redis HOST:PORT --model NAME=DIR [flags]",
                        "Serves the OpenAI-compatible HTTP API and gRPC: checks and admits "
                        "requests, queues them, and streams the\nanswers as they are denoised.");
  flags.Register(set);
  return cinnabar::RunProgram(set, argc, argv, [&] { return cinnabar::Serve(flags); });
}
