#include "gateway/service/http_routes.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/metrics/metrics_server.h"
#include "gateway/api/render.h"

namespace cinnabar {
namespace {

using Headers = std::vector<std::pair<std::string, std::string>>;

constexpr absl::Duration kLookForClient = absl::Seconds(30);
constexpr char kOk[] = "ok";
constexpr char kCancelled[] = "cancelled";

HttpResponse Json(int status, std::string body, Headers headers = {}) {
  headers.emplace_back("content-type", "application/json");
  return {.status = status, .headers = std::move(headers), .body = std::move(body)};
}

ReplyInfo InfoOf(const GenerationSession& session) {
  ReplyInfo info;
  info.endpoint = session.request().endpoint;
  info.request_id = session.request_id();
  info.model = session.model().name;
  info.created = absl::Now();
  info.system_fingerprint = absl::StrCat("fp_", session.model().fingerprint.substr(0, 12));
  info.service_tier = session.request().service_tier;
  info.include_usage = session.request().stream && session.request().include_usage;
  info.warnings = session.warnings();
  return info;
}

struct Route {
  enum class Kind { kNone, kGenerate, kModels, kRequest, kMetrics };
  Kind kind = Kind::kNone;
  absl::string_view method;
  GenerationRequest::Endpoint endpoint = GenerationRequest::Endpoint::kCompletion;
  std::string id;  // of a model or a request
};

Route RouteOf(absl::string_view path) {
  using Endpoint = GenerationRequest::Endpoint;
  constexpr std::pair<absl::string_view, Endpoint> kGenerationPaths[] = {
      {"/v1/completions", Endpoint::kCompletion},
      {"/v1/fim/completions", Endpoint::kFim},
      {"/v1/chat/completions", Endpoint::kChat},
  };
  for (const auto& [known, endpoint] : kGenerationPaths) {
    absl::string_view rest = path;
    if (!absl::ConsumePrefix(&rest, known)) continue;
    if (rest.empty()) return {Route::Kind::kGenerate, "POST", endpoint, ""};
    if (rest == "/models") return {Route::Kind::kModels, "GET", endpoint, ""};
  }
  if (path == "/v1/models") return {.kind = Route::Kind::kModels, .method = "GET"};
  absl::string_view id = path;
  if (absl::ConsumePrefix(&id, "/v1/models/") && !id.empty()) {
    return {.kind = Route::Kind::kModels, .method = "GET", .id = std::string(id)};
  }
  if (absl::ConsumePrefix(&id, "/v1/requests/") && !id.empty()) {
    return {.kind = Route::Kind::kRequest, .method = "DELETE", .id = std::string(id)};
  }
  if (path == "/healthz" || path == "/readyz" || path == "/metrics") {
    return {.kind = Route::Kind::kMetrics, .method = "GET"};
  }
  return {};
}

}  // namespace

HttpRoutes::HttpRoutes(HttpRoutesOptions options, const SessionContext& context,
                       const Authenticator& authenticator,
                       std::function<absl::Duration()> wait_estimate,
                       std::function<std::string()> ready, Metrics& metrics)
    : options_(std::move(options)),
      context_(context),
      authenticator_(authenticator),
      wait_estimate_(std::move(wait_estimate)),
      ready_(std::move(ready)),
      metrics_(metrics) {}

asio::awaitable<void> HttpRoutes::Refuse(const ApiError& error, HttpExchange& exchange,
                                         Headers headers) {
  for (auto& header : ErrorHeaders(error)) headers.push_back(std::move(header));
  HttpResponse response = Json(error.http_status, ErrorBody(error), std::move(headers));
  (void)co_await exchange.Respond(std::move(response));
}

// What g++ 12 does to temporaries in the full expression of a co_await (it may destroy them twice)
// is avoided throughout: whatever owns something has a name.
asio::awaitable<void> HttpRoutes::Handle(const HttpRequest& request, HttpExchange& exchange) {
  const std::string& path = request.path;
  const Route route = RouteOf(path);
  const bool get = request.method == "GET" || request.method == "HEAD";
  if (route.kind != Route::Kind::kNone && request.method != route.method &&
      !(get && route.method == "GET")) {
    const ApiError error =
        MethodNotAllowed(request.method, route.method == "GET" ? "GET, HEAD" : route.method);
    co_await Refuse(error, exchange);
    co_return;
  }
  switch (route.kind) {
    case Route::Kind::kGenerate:
      co_await Generate(route.endpoint, request, exchange);
      co_return;
    case Route::Kind::kModels:
      co_await Models(route.id, request, exchange);
      co_return;
    case Route::Kind::kRequest:
      co_await CancelRequest(route.id, request, exchange);
      co_return;
    case Route::Kind::kMetrics: {
      std::optional<HttpResponse> response = MetricsResponse(request, metrics_, ready_);
      CINNABAR_CHECK(response.has_value());
      (void)co_await exchange.Respond(*std::move(response));
      co_return;
    }
    case Route::Kind::kNone: {
      const ApiError error = NotFound("no such URL; the API begins at /v1/models");
      co_await Refuse(error, exchange);
      co_return;
    }
  }
}

asio::awaitable<void> HttpRoutes::Models(const std::string& id, const HttpRequest& request,
                                         HttpExchange& exchange) {
  const ApiResult<Caller> caller = authenticator_.Check(request.Header("authorization"));
  if (!caller.ok()) {
    co_await Refuse(caller.error(), exchange);
    co_return;
  }
  const std::vector<ModelDirectory::Entry> entries = context_.models.List();
  std::vector<const ServedModel*> models;
  for (const ModelDirectory::Entry& entry : entries) {
    const bool allowed =
        caller->models.empty() ||
        std::count(caller->models.begin(), caller->models.end(), entry.model->name) > 0;
    if (allowed && (id.empty() || IsCalled(*entry.model, id))) models.push_back(entry.model.get());
  }
  if (!id.empty() && models.empty()) {
    const ApiError error = ModelNotFound(id);
    co_await Refuse(error, exchange);
    co_return;
  }
  HttpResponse response = Json(200, id.empty() ? RenderModelList(models) : RenderModel(*models[0]));
  (void)co_await exchange.Respond(std::move(response));
}

asio::awaitable<void> HttpRoutes::CancelRequest(const std::string& id, const HttpRequest& request,
                                                HttpExchange& exchange) {
  const ApiResult<Caller> caller = authenticator_.Check(request.Header("authorization"));
  if (!caller.ok()) {
    co_await Refuse(caller.error(), exchange);
    co_return;
  }
  const ApiResult<std::string> state =
      co_await CancelRequestById(context_.executor, id, caller->tenant);
  if (!state.ok()) {
    co_await Refuse(state.error(), exchange);
    co_return;
  }
  HttpResponse response = Json(200, RenderCancelled(id, *state));
  (void)co_await exchange.Respond(std::move(response));
}

asio::awaitable<void> HttpRoutes::Generate(GenerationRequest::Endpoint endpoint,
                                           const HttpRequest& request, HttpExchange& exchange) {
  const absl::Time begin = absl::Now();
  std::string model;
  RequestClass request_class = RequestClass::kStandard;
  const auto count = [&](absl::string_view outcome) {
    context_.metrics.RequestDone(model, request_class, "http", outcome, absl::Now() - begin);
  };
  ApiResult<Caller> caller = authenticator_.Check(request.Header("authorization"));
  if (!caller.ok()) {
    count(ErrorOutcome(caller.error()));
    co_await Refuse(caller.error(), exchange);
    co_return;
  }
  ApiResult<GenerationRequest> parsed =
      ParseGenerationRequest(endpoint, request.body, options_.limits);
  if (!parsed.ok()) {
    count(ErrorOutcome(parsed.error()));
    co_await Refuse(parsed.error(), exchange);
    co_return;
  }
  const asio::any_io_executor executor = co_await asio::this_coro::executor;
  GenerationSession session(context_, executor);
  exchange.OnClientGone([&session] { session.Interrupt(); });
  const bool stream = parsed->stream;
  BeginOptions options;
  options.request_id = request.request_id;
  options.idempotency_key = request.Header("idempotency-key");
  options.body = request.body;
  options.wait_estimate = wait_estimate_();
  options.resume_after = request.Header("last-event-id");
  const std::optional<ApiError> refused = co_await session.Begin(*parsed, *caller, options);
  if (refused.has_value()) {
    exchange.OnClientGone(nullptr);
    count(ErrorOutcome(*refused));
    Headers limits = session.rate_limit_headers();
    co_await Refuse(*refused, exchange, std::move(limits));
    co_return;
  }
  model = session.model().name;
  request_class = session.request_class();
  std::string outcome;
  if (stream) {
    outcome = co_await Stream(session, exchange);
  } else {
    outcome = co_await Reply(session, exchange);
  }
  exchange.OnClientGone(nullptr);
  count(outcome);
}

// Waits for the whole answer. Returns the outcome for the metrics.
asio::awaitable<std::string> HttpRoutes::Reply(GenerationSession& session, HttpExchange& exchange) {
  while (!session.finished()) {
    ApiResult<std::optional<SessionOutput>> output =
        co_await session.Next(absl::Now() + kLookForClient);
    if (exchange.client_gone()) {
      session.Abandon("client_gone");
      co_return std::string(kCancelled);
    }
    if (!output.ok()) {
      co_await Refuse(output.error(), exchange);
      co_return std::string(ErrorOutcome(output.error()));
    }
  }
  std::vector<ChoiceResult> choices;
  for (int32_t i = 0; i < session.num_choices(); ++i) {
    choices.push_back(
        {.index = i, .text = session.Text(i), .finish_reason = session.finish_reason(i)});
  }
  HttpResponse response = Json(200, RenderReply(InfoOf(session), choices, session.TotalUsage()),
                               session.rate_limit_headers());
  (void)co_await exchange.Respond(std::move(response));
  co_return std::string(kOk);
}

asio::awaitable<std::string> HttpRoutes::Stream(GenerationSession& session,
                                                HttpExchange& exchange) {
  const ReplyInfo info = InfoOf(session);
  const GenerationRequest& request = session.request();
  bool started = false;
  std::string out;
  std::vector<bool> opened(session.num_choices(), false);
  const auto open = [&](int32_t choice) {
    if (opened[choice]) return;
    opened[choice] = true;
    if (info.endpoint == GenerationRequest::Endpoint::kChat) {
      absl::StrAppend(&out, SseEvent(RenderFirstChunk(info, choice)));
    }
  };
  // Sends what has piled up; the headers go with the first of it.
  const auto flush = [&]() -> asio::awaitable<bool> {
    if (!started) {
      started = true;
      Headers headers = session.rate_limit_headers();
      headers.emplace_back("content-type", "text/event-stream");
      headers.emplace_back("cache-control", "no-store");
      headers.emplace_back("x-accel-buffering", "no");
      headers.emplace_back("cinnabar-request-id", session.request_id());
      const absl::Status status = co_await exchange.StartStream(200, std::move(headers));
      if (!status.ok()) co_return false;
      context_.metrics.OpenStreams("http", 1);
    }
    if (out.empty()) co_return true;
    std::string piece = std::exchange(out, {});
    const absl::Status status = co_await exchange.Write(std::move(piece));
    co_return status.ok();
  };

  std::string outcome = kOk;
  while (!session.finished()) {
    const absl::Duration patience = started ? options_.keep_alive : options_.header_patience;
    ApiResult<std::optional<SessionOutput>> next = co_await session.Next(absl::Now() + patience);
    if (exchange.client_gone()) {
      outcome = kCancelled;
      break;
    }
    if (!next.ok()) {
      outcome = std::string(ErrorOutcome(next.error()));
      if (!started) {
        co_await Refuse(next.error(), exchange);
        co_return outcome;
      }
      // The SDKs raise an error for a payload with an `error` object.
      absl::StrAppend(&out, SseEvent(ErrorBody(next.error())));
      break;
    }
    if (!next->has_value()) {
      if (session.finished()) break;
      if (started) absl::StrAppend(&out, kSseKeepAlive);
      if (!co_await flush()) {
        outcome = kCancelled;
        break;
      }
      continue;
    }
    const SessionOutput& output = **next;
    const int32_t choice = output.choice;
    const bool last = output.finish_reason != FinishReason::kNone;
    open(choice);
    if (request.diffusion_frames && output.delta.has_value()) {
      const v1::StepDelta& delta = *output.delta;
      DiffusionFrame frame;
      frame.step = output.step;
      frame.block_begin = delta.block_begin();
      frame.block_end = delta.block_end();
      frame.positions = absl::MakeConstSpan(delta.positions().data(), delta.positions_size());
      frame.tokens = absl::MakeConstSpan(delta.tokens().data(), delta.tokens_size());
      frame.confidences = delta.confidences();
      frame.final_end = delta.final_end();
      absl::StrAppend(&out,
                      SseEvent(RenderFrameChunk(info, choice, frame, session.text_options(choice),
                                                session.model().tokenizer),
                               output.event_id));
    }
    if (request.diffusing) {
      // Snapshots: the whole text each time, the last one with the reason.
      const std::string draft = session.Snapshot(choice);
      absl::StrAppend(&out,
                      last ? SseEvent(RenderFinishChunk(info, choice, output.finish_reason, draft),
                                      output.event_id)
                           : SseEvent(RenderTextChunk(info, choice, draft), output.event_id));
    } else {
      if (!output.text.empty()) {
        absl::StrAppend(&out,
                        SseEvent(RenderTextChunk(info, choice, output.text), output.event_id));
      }
      if (last) {
        absl::StrAppend(
            &out, SseEvent(RenderFinishChunk(info, choice, output.finish_reason), output.event_id));
      }
    }
    if (!out.empty() && !co_await flush()) {
      outcome = kCancelled;
      break;
    }
  }
  if (outcome == kCancelled) {
    session.Abandon("client_gone");
  } else {
    if (outcome == kOk) {
      if (info.include_usage) {
        absl::StrAppend(&out, SseEvent(RenderUsageChunk(info, session.TotalUsage())));
      }
      absl::StrAppend(&out, kSseDone);
    }
    if (co_await flush()) (void)co_await exchange.Finish();
  }
  if (started) context_.metrics.OpenStreams("http", -1);
  co_return outcome;
}

}  // namespace cinnabar
