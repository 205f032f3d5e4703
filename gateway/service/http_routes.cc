#include "gateway/service/http_routes.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "gateway/api/render.h"

namespace cinnabar {
namespace {

using Headers = std::vector<std::pair<std::string, std::string>>;

constexpr absl::Duration kLookForClient = absl::Seconds(30);

HttpResponse Json(int status, std::string body, Headers headers = {}) {
  headers.emplace_back("content-type", "application/json");
  return {.status = status, .headers = std::move(headers), .body = std::move(body)};
}

HttpResponse Text(int status, std::string body) {
  return {.status = status,
          .headers = {{"content-type", "text/plain; charset=utf-8"}},
          .body = std::move(body)};
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

struct GenerationPath {
  absl::string_view path;
  GenerationRequest::Endpoint endpoint;
};
constexpr GenerationPath kGenerationPaths[] = {
    {"/v1/completions", GenerationRequest::Endpoint::kCompletion},
    {"/v1/fim/completions", GenerationRequest::Endpoint::kFim},
    {"/v1/chat/completions", GenerationRequest::Endpoint::kChat},
};

}  // namespace

HttpRoutes::HttpRoutes(HttpRoutesOptions options, const SessionContext& context,
                       const Authenticator& authenticator,
                       std::function<absl::Duration()> wait_estimate,
                       std::function<std::string()> ready,
                       std::function<std::string()> render_metrics)
    : options_(std::move(options)),
      context_(context),
      authenticator_(authenticator),
      wait_estimate_(std::move(wait_estimate)),
      ready_(std::move(ready)),
      render_metrics_(std::move(render_metrics)) {}

asio::awaitable<void> HttpRoutes::Refuse(const ApiError& error, HttpExchange& exchange) {
  (void)co_await exchange.Respond(Json(error.http_status, ErrorBody(error), ErrorHeaders(error)));
}

asio::awaitable<void> HttpRoutes::Handle(const HttpRequest& request, HttpExchange& exchange) {
  const std::string& path = request.path;
  const bool get = request.method == "GET" || request.method == "HEAD";
  const auto method_error = [&](absl::string_view allowed) {
    return Refuse(MethodNotAllowed(request.method, allowed), exchange);
  };
  for (const GenerationPath& known : kGenerationPaths) {
    if (path == known.path) {
      if (request.method != "POST") co_return co_await method_error("POST");
      co_return co_await Generate(known.endpoint, request, exchange);
    }
    if (path == absl::StrCat(known.path, "/models")) {
      if (!get) co_return co_await method_error("GET");
      co_return co_await Models("", request, exchange);
    }
  }
  if (path == "/v1/models" || absl::StartsWith(path, "/v1/models/")) {
    if (!get) co_return co_await method_error("GET");
    absl::string_view id = path;
    id.remove_prefix(std::min<size_t>(id.size(), sizeof("/v1/models/") - 1));
    co_return co_await Models(std::string(id), request, exchange);
  }
  if (absl::StartsWith(path, "/v1/requests/")) {
    if (request.method != "DELETE") co_return co_await method_error("DELETE");
    co_return co_await CancelRequest(path.substr(sizeof("/v1/requests/") - 1), request, exchange);
  }
  if (path == "/healthz" || path == "/readyz" || path == "/metrics") {
    if (!get) co_return co_await method_error("GET");
    HttpResponse response;
    if (path == "/metrics") {
      response = {.status = 200,
                  .headers = {{"content-type", "text/plain; version=0.0.4; charset=utf-8"}},
                  .body = render_metrics_()};
    } else if (path == "/healthz") {
      response = Text(200, "ok\n");
    } else {
      const std::string missing = ready_();
      response = missing.empty() ? Text(200, "ready\n") : Text(503, absl::StrCat(missing, "\n"));
    }
    (void)co_await exchange.Respond(std::move(response));
    co_return;
  }
  co_await Refuse(NotFound("no such URL; the API begins at /v1/models"), exchange);
}

asio::awaitable<void> HttpRoutes::Models(const std::string& id, const HttpRequest& request,
                                         HttpExchange& exchange) {
  const ApiResult<Caller> caller = authenticator_.Check(request.Header("authorization"));
  if (!caller.ok()) {
    context_.metrics.AuthFailure("http");
    co_return co_await Refuse(caller.error(), exchange);
  }
  const std::vector<ModelDirectory::Entry> entries = context_.models.List();
  std::vector<const ServedModel*> models;
  for (const ModelDirectory::Entry& entry : entries) {
    const bool allowed =
        caller->models.empty() ||
        std::count(caller->models.begin(), caller->models.end(), entry.model->name) > 0;
    if (allowed && (id.empty() || IsCalled(*entry.model, id))) models.push_back(entry.model.get());
  }
  if (!id.empty() && models.empty()) co_return co_await Refuse(ModelNotFound(id), exchange);
  (void)co_await exchange.Respond(
      Json(200, id.empty() ? RenderModelList(models) : RenderModel(*models[0])));
}

asio::awaitable<void> HttpRoutes::CancelRequest(const std::string& id, const HttpRequest& request,
                                                HttpExchange& exchange) {
  const ApiResult<Caller> caller = authenticator_.Check(request.Header("authorization"));
  if (!caller.ok()) co_return co_await Refuse(caller.error(), exchange);
  const ApiResult<std::string> state =
      co_await CancelRequestById(context_.executor, id, caller->tenant);
  if (!state.ok()) co_return co_await Refuse(state.error(), exchange);
  (void)co_await exchange.Respond(Json(
      200,
      absl::StrCat("{\"id\":\"", id, "\",\"object\":\"request\",\"state\":\"", *state, "\"}")));
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
    context_.metrics.AuthFailure("http");
    count(ErrorOutcome(caller.error()));
    co_return co_await Refuse(caller.error(), exchange);
  }
  ApiResult<GenerationRequest> parsed =
      ParseGenerationRequest(endpoint, request.body, options_.limits);
  if (!parsed.ok()) {
    count(ErrorOutcome(parsed.error()));
    co_return co_await Refuse(parsed.error(), exchange);
  }
  GenerationSession session(context_, co_await asio::this_coro::executor);
  exchange.OnClientGone([&session] { session.Interrupt(); });
  const bool stream = parsed->stream;
  BeginOptions options;
  options.request_id = request.request_id;
  options.idempotency_key = request.Header("idempotency-key");
  options.body = request.body;
  options.wait_estimate = wait_estimate_();
  options.resume_after = request.Header("last-event-id");
  const std::optional<ApiError> refused = co_await session.Begin(
      std::move(parsed).value(), std::move(caller).value(), std::move(options));
  if (refused.has_value()) {
    exchange.OnClientGone(nullptr);
    count(ErrorOutcome(*refused));
    co_return co_await Refuse(*refused, exchange);
  }
  model = session.model().name;
  request_class = session.request_class();
  const std::string outcome =
      co_await (stream ? Stream(session, exchange) : Reply(session, exchange));
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
      co_return "cancelled";
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
  (void)co_await exchange.Respond(Json(200,
                                       RenderReply(InfoOf(session), choices, session.TotalUsage()),
                                       session.rate_limit_headers()));
  co_return "ok";
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
    const absl::Status status = co_await exchange.Write(std::exchange(out, {}));
    co_return status.ok();
  };

  std::string outcome = "ok";
  while (!session.finished()) {
    const absl::Duration patience = started ? options_.keep_alive : options_.header_patience;
    ApiResult<std::optional<SessionOutput>> next = co_await session.Next(absl::Now() + patience);
    if (exchange.client_gone()) {
      outcome = "cancelled";
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
        outcome = "cancelled";
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
      outcome = "cancelled";
      break;
    }
  }
  if (outcome == "cancelled") {
    session.Abandon("client_gone");
  } else {
    if (outcome == "ok") {
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
