#include "gateway/grpc/grpc_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <atomic>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cinnabar/v1/generation.grpc.pb.h"
#include "common/base/status.h"
#include "common/http/async_queue.h"
#include "common/http/request_id.h"
#include "gateway/grpc/grpc_request.h"

namespace cinnabar {
namespace {

constexpr absl::Duration kLong = absl::Hours(24);

grpc::Status ToGrpc(const ApiError& error, grpc::CallbackServerContext& call) {
  if (error.retry_after.has_value()) {
    call.AddTrailingMetadata("retry-after-ms",
                             absl::StrCat(absl::ToInt64Milliseconds(*error.retry_after)));
  }
  if (!error.code.empty()) call.AddTrailingMetadata("error-code", error.code);
  const std::string field = error.param.empty() ? "" : absl::StrCat(error.param, ": ");
  return grpc::Status(static_cast<grpc::StatusCode>(GrpcStatusCode(error)),
                      absl::StrCat(field, error.message));
}

std::string AuthorizationOf(const grpc::CallbackServerContext& call) {
  const auto found = call.client_metadata().find("authorization");
  if (found == call.client_metadata().end()) return "";
  return std::string(found->second.data(), found->second.size());
}

v1::GenerationUsage ToWire(const UsageReport& usage) {
  v1::GenerationUsage wire;
  wire.set_prompt_tokens(static_cast<int32_t>(usage.prompt_tokens));
  wire.set_completion_tokens(static_cast<int32_t>(usage.completion_tokens));
  wire.set_steps(static_cast<int32_t>(usage.steps));
  wire.set_forwards(static_cast<int32_t>(usage.forwards));
  if (usage.forwards > 0) {
    wire.set_tokens_per_forward(static_cast<double>(usage.tokens_committed) /
                                static_cast<double>(usage.forwards));
  }
  wire.set_queue_seconds(absl::ToDoubleSeconds(usage.queue));
  wire.set_device_seconds(absl::ToDoubleSeconds(usage.device));
  wire.set_price_dollars(usage.price_dollars);
  wire.set_sampler(usage.sampler);
  return wire;
}

// What every call needs.
struct Shared {
  asio::any_io_executor io;
  const SessionContext& context;
  const Authenticator& authenticator;
  std::function<absl::Duration()> wait_estimate;
  RequestLimits limits;
};

// One streaming call. Two hold it: gRPC until OnDone, and the coroutine until it has ended.
class StreamCall : public grpc::ServerWriteReactor<v1::GenerateEvent>,
                   public std::enable_shared_from_this<StreamCall> {
 public:
  StreamCall(const Shared& shared, grpc::CallbackServerContext& call)
      : shared_(shared), call_(call), written_(shared.io, 4), session_(shared.context, shared.io) {}

  void Start(v1::GenerateRequest request, std::string resume_after) {
    held_by_grpc_ = shared_from_this();
    asio::co_spawn(
        shared_.io,
        [self = shared_from_this(), request = std::move(request),
         resume_after = std::move(resume_after)]() mutable -> asio::awaitable<void> {
          const grpc::Status status =
              co_await self->Run(std::move(request), std::move(resume_after));
          self->Finish(status);
        },
        asio::detached);
  }

  void OnWriteDone(bool ok) override { written_.Push(ok); }
  void OnCancel() override {
    session_.Interrupt();
    gone_ = true;
  }
  void OnDone() override { held_by_grpc_.reset(); }

 private:
  asio::awaitable<grpc::Status> Run(v1::GenerateRequest wire, std::string resume_after) {
    const absl::Time begin = absl::Now();
    std::string model;
    RequestClass request_class = RequestClass::kStandard;
    const auto done = [&](absl::string_view outcome) {
      shared_.context.metrics.RequestDone(model, request_class, "grpc", outcome,
                                          absl::Now() - begin);
    };
    ApiResult<Caller> caller = shared_.authenticator.Check(AuthorizationOf(call_));
    if (!caller.ok()) {
      done(ErrorOutcome(caller.error()));
      co_return ToGrpc(caller.error(), call_);
    }
    ApiResult<GenerationRequest> request = FromGrpc(wire, shared_.limits);
    if (!request.ok()) {
      done(ErrorOutcome(request.error()));
      co_return ToGrpc(request.error(), call_);
    }
    const absl::Duration left = absl::FromChrono(call_.deadline()) - absl::Now();
    if (left < shared_.limits.deadline_max &&
        (!request->deadline.has_value() || left < *request->deadline)) {
      request->deadline = std::max(left, absl::Milliseconds(1));
    }
    const bool frames = request->diffusion_frames;
    BeginOptions options;
    options.request_id = NewRequestId();
    options.idempotency_key = wire.idempotency_key();
    options.body = wire.SerializeAsString();
    options.wait_estimate = shared_.wait_estimate();
    options.resume_after = std::move(resume_after);
    const std::optional<ApiError> refused = co_await session_.Begin(*request, *caller, options);
    if (refused.has_value()) {
      done(ErrorOutcome(*refused));
      co_return ToGrpc(*refused, call_);
    }
    model = session_.model().name;
    request_class = session_.request_class();
    shared_.context.metrics.OpenStreams("grpc", 1);
    const grpc::Status status = co_await Relay(frames, done);
    shared_.context.metrics.OpenStreams("grpc", -1);
    co_return status;
  }

  template <typename Done>
  asio::awaitable<grpc::Status> Relay(bool frames, Done done) {
    while (!session_.finished()) {
      ApiResult<std::optional<SessionOutput>> output =
          co_await session_.Next(absl::Now() + absl::Seconds(30));
      if (gone_) {
        session_.Abandon("client_gone");
        done("cancelled");
        co_return grpc::Status::CANCELLED;
      }
      if (!output.ok()) {
        done(ErrorOutcome(output.error()));
        co_return ToGrpc(output.error(), call_);
      }
      if (!output->has_value()) continue;
      const SessionOutput& out = **output;
      const bool last = out.finish_reason != FinishReason::kNone;
      if (out.text.empty() && !last && !(frames && out.delta.has_value())) continue;
      v1::GenerateEvent event;
      event.set_id(out.event_id);
      event.set_request_id(session_.request_id());
      event.set_choice(out.choice);
      event.set_text(out.text);
      if (frames && out.delta.has_value()) SetFrame(out, *event.mutable_frame());
      if (last) {
        event.set_done(true);
        event.set_finish_reason(std::string(FinishReasonName(out.finish_reason)));
        *event.mutable_usage() = ToWire(session_.Usage(out.choice));
      }
      event_ = std::move(event);
      StartWrite(&event_);
      const std::optional<bool> written = co_await written_.Pop(kLong);
      if (!written.value_or(false)) {
        session_.Abandon("client_gone");
        done("cancelled");
        co_return grpc::Status::CANCELLED;
      }
    }
    done("ok");
    co_return grpc::Status::OK;
  }

  // Positions of the answer, counted from its start.
  void SetFrame(const SessionOutput& out, v1::DiffusionFrame& frame) const {
    const TextOptions& span = session_.text_options(out.choice);
    const v1::StepDelta& delta = *out.delta;
    const auto relative = [&](int32_t position) {
      return std::clamp(position, span.begin, span.end) - span.begin;
    };
    frame.set_step(out.step);
    for (int i = 0; i < delta.positions_size(); ++i) {
      const int32_t position = delta.positions(i);
      if (position < span.begin || position >= span.end || i >= delta.tokens_size()) continue;
      frame.add_positions(position - span.begin);
      frame.add_tokens(delta.tokens(i));
      const size_t index = static_cast<size_t>(i);
      if (index < delta.confidences().size()) {
        frame.add_confidences(static_cast<uint8_t>(delta.confidences()[index]) / 255.0F);
      }
    }
    frame.set_final_end(relative(delta.final_end()));
    frame.set_block_begin(relative(delta.block_begin()));
    frame.set_block_end(relative(delta.block_end()));
  }

  const Shared& shared_;
  grpc::CallbackServerContext& call_;
  AsyncQueue<bool> written_;
  GenerationSession session_;
  std::atomic<bool> gone_ = false;
  v1::GenerateEvent event_;  // the one that is being written
  std::shared_ptr<StreamCall> held_by_grpc_;
};

class Service final : public v1::Generation::CallbackService {
 public:
  explicit Service(Shared shared) : shared_(std::move(shared)) {}

  grpc::ServerWriteReactor<v1::GenerateEvent>* Generate(
      grpc::CallbackServerContext* call, const v1::GenerateRequest* request) override {
    return Stream(*call, *request, "");
  }
  grpc::ServerWriteReactor<v1::GenerateEvent>* Resume(grpc::CallbackServerContext* call,
                                                      const v1::ResumeRequest* request) override {
    // An empty id would admit it anew; "0" names nothing and is refused as it should be.
    const std::string& after = request->after_event_id();
    return Stream(*call, request->request(), after.empty() ? "-" : after);
  }

  grpc::ServerUnaryReactor* Cancel(grpc::CallbackServerContext* call,
                                   const v1::CancelRequest* request,
                                   v1::CancelResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    asio::co_spawn(
        shared_.io,
        [this, call, request, response, reactor]() -> asio::awaitable<void> {
          const ApiResult<Caller> caller = shared_.authenticator.Check(AuthorizationOf(*call));
          if (!caller.ok()) {
            reactor->Finish(ToGrpc(caller.error(), *call));
            co_return;
          }
          const ApiResult<std::string> state = co_await CancelRequestById(
              shared_.context.executor, request->request_id(), caller->tenant);
          if (state.ok()) response->set_state(*state);
          reactor->Finish(state.ok() ? grpc::Status::OK : ToGrpc(state.error(), *call));
        },
        asio::detached);
    return reactor;
  }

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* call,
                                       const v1::ListModelsRequest* /*request*/,
                                       v1::ListModelsResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    const ApiResult<Caller> caller = shared_.authenticator.Check(AuthorizationOf(*call));
    if (!caller.ok()) {
      reactor->Finish(ToGrpc(caller.error(), *call));
      return reactor;
    }
    for (const ModelDirectory::Entry& entry : shared_.context.models.List()) {
      v1::ModelDescription& model = *response->add_models();
      model.set_name(entry.model->name);
      model.mutable_aliases()->Assign(entry.model->aliases.begin(), entry.model->aliases.end());
      model.set_family(entry.model->traits.family);
      model.set_context_tokens_max(ContextTokensMax(*entry.model));
      model.set_canvas_tokens_max(entry.model->canvas_tokens_max);
      model.set_default_sampler(entry.model->traits.default_sampler);
      model.set_ready(entry.num_workers > 0);
    }
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

 private:
  grpc::ServerWriteReactor<v1::GenerateEvent>* Stream(grpc::CallbackServerContext& call,
                                                      const v1::GenerateRequest& request,
                                                      std::string resume_after) {
    const auto stream = std::make_shared<StreamCall>(shared_, call);
    stream->Start(request, std::move(resume_after));
    return stream.get();
  }

  const Shared shared_;
};

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  if (!file.good() || text.str().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  }
  return text.str();
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> Credentials(
    const GrpcServerOptions& options) {
  if (options.certificate_file.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions ssl(
      options.client_ca_file.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                     : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  CINNABAR_ASSIGN_OR_RETURN(pair.private_key, ReadFile(options.key_file), "gRPC key");
  CINNABAR_ASSIGN_OR_RETURN(pair.cert_chain, ReadFile(options.certificate_file),
                            "gRPC certificate");
  if (!options.client_ca_file.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadFile(options.client_ca_file),
                              "gRPC client CA");
  }
  ssl.pem_key_cert_pairs.push_back(std::move(pair));
  return grpc::SslServerCredentials(ssl);
}

}  // namespace

struct GrpcServer::Impl {
  explicit Impl(Shared shared) : service(std::move(shared)) {}
  Service service;
  int port = 0;
  std::unique_ptr<grpc::Server> server;
};

GrpcServer::GrpcServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
GrpcServer::~GrpcServer() { Drain(absl::ZeroDuration()); }
int GrpcServer::port() const { return impl_->port; }

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Start(
    const GrpcServerOptions& options, asio::any_io_executor io, const SessionContext& context,
    const Authenticator& authenticator, std::function<absl::Duration()> wait_estimate) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  auto impl = std::make_unique<Impl>(
      Shared{std::move(io), context, authenticator, std::move(wait_estimate), options.limits});
  CINNABAR_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ServerCredentials> credentials,
                            Credentials(options));
  grpc::ServerBuilder builder;
  builder.AddListeningPort(options.listen, credentials, &impl->port);
  builder.SetMaxReceiveMessageSize(options.message_bytes_max);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.streams_max);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.RegisterService(&impl->service);
  impl->server = builder.BuildAndStart();
  if (impl->server == nullptr || impl->port == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", options.listen, " for gRPC; is the address in use?"));
  }
  return std::unique_ptr<GrpcServer>(new GrpcServer(std::move(impl)));
}

void GrpcServer::SetServing(bool serving) {
  impl_->server->GetHealthCheckService()->SetServingStatus(serving);
}

void GrpcServer::Drain(absl::Duration grace) {
  if (impl_->server == nullptr) return;
  impl_->server->GetHealthCheckService()->Shutdown();
  impl_->server->Shutdown(absl::ToChronoTime(absl::Now() + grace));
  impl_->server->Wait();
  impl_->server.reset();
}

}  // namespace cinnabar
