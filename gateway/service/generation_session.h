// One API request from its admission to its last event, whatever protocol it came by: choices are
// enqueued, their steps come in order, and out go pieces of text, frames, ends and usage.
#ifndef CINNABAR_GATEWAY_SERVICE_GENERATION_SESSION_H_
#define CINNABAR_GATEWAY_SERVICE_GENERATION_SESSION_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "cinnabar/v1/work.pb.h"
#include "common/http/asio.h"
#include "gateway/api/api_error.h"
#include "gateway/api/build_work.h"
#include "gateway/api/parse_request.h"
#include "gateway/api/render.h"
#include "gateway/api/text_assembler.h"
#include "gateway/relay/request_relay.h"
#include "gateway/service/admission.h"
#include "gateway/service/gateway_metrics.h"
#include "gateway/service/model_directory.h"

namespace cinnabar {

// What all sessions of a gateway share; borrowed, outlives them.
struct SessionContext {
  QueueExecutor& executor;
  EventHub& hub;
  ModelDirectory& models;
  GatewayMetrics& metrics;
  absl::Duration deadline_default = absl::Seconds(120);
  absl::Duration keep = absl::Minutes(10);  // of a result, for Last-Event-ID and idempotency
  // How long a request with an idempotency key runs on when its client is gone: it may try again.
  absl::Duration retry_grace = absl::Seconds(5);
};

struct BeginOptions {
  std::string request_id;        // names the queue requests: "<request_id>.<choice>"
  std::string idempotency_key;   // as the client sent it; empty: none
  std::string body;              // for the digest that tells one request from another
  absl::Duration wait_estimate;  // for Retry-After
  // Last-Event-ID: attaches to that request instead of admitting a new one, and gives only what
  // came after. Empty: a new request.
  std::string resume_after;
};

struct SessionOutput {
  int32_t choice = 0;
  std::string text;                    // final text, to be appended; may be empty
  std::optional<v1::StepDelta> delta;  // of a step
  int32_t step = 0;
  FinishReason finish_reason = FinishReason::kNone;  // set on the last output of a choice
  std::string event_id;                              // behind this output, for Last-Event-ID
};

// One coroutine at a time; Interrupt() from any thread.
class GenerationSession {
 public:
  GenerationSession(const SessionContext& context, asio::any_io_executor io);

  // Checks the request against its model, and admits all choices or none.
  asio::awaitable<std::optional<ApiError>> Begin(GenerationRequest request, Caller caller,
                                                 BeginOptions options);

  // The next output; nullopt at `until`, after Interrupt(), or when finished(). An error ends the
  // request: all its choices are given up.
  asio::awaitable<ApiResult<std::optional<SessionOutput>>> Next(absl::Time until);

  void Interrupt() { relay_.Interrupt(); }
  // Ends what still runs and nobody else waits for: the client is gone. One that gave an
  // idempotency key has retry_grace to come back.
  void Abandon(const std::string& why);

  bool finished() const;
  const ServedModel& model() const { return *model_; }
  const GenerationRequest& request() const { return request_; }
  RequestClass request_class() const { return request_class_; }
  // The id that the client resumes and cancels by. Differs from BeginOptions::request_id when an
  // idempotency key led to an earlier request.
  const std::string& request_id() const { return request_id_; }
  const std::vector<std::pair<std::string, std::string>>& rate_limit_headers() const {
    return rate_limit_headers_;
  }
  const std::vector<std::string>& warnings() const { return warnings_; }
  // The draft of a choice (`diffusing`), and its options for frames.
  std::string Snapshot(int32_t choice) const { return choices_[choice].assembler->Snapshot(); }
  const std::string& Text(int32_t choice) const { return choices_[choice].assembler->text(); }
  const TextOptions& text_options(int32_t choice) const { return choices_[choice].work.text; }
  FinishReason finish_reason(int32_t choice) const {
    return choices_[choice].assembler->finish_reason();
  }
  UsageReport Usage(int32_t choice) const;
  UsageReport TotalUsage() const;
  int32_t num_choices() const { return static_cast<int32_t>(choices_.size()); }

 private:
  struct Choice {
    Work work;
    std::unique_ptr<TextAssembler> assembler;
    int32_t step = 0;     // of the last event
    int32_t skip_to = 0;  // events up to here the client has already (Last-Event-ID)
    int32_t forwards = 0;
    int64_t num_committed = 0;
    int64_t device_us = 0;
    int32_t steps_budget = 0;  // lowered; 0: as asked for
    std::optional<absl::Duration> queue;
    bool done = false;
  };

  asio::awaitable<std::optional<ApiError>> Admit(const Caller& caller, const BeginOptions& options);
  asio::awaitable<std::optional<ApiError>> Reattach(const Caller& caller,
                                                    const BeginOptions& options);
  ApiResult<SessionOutput> Progress(int32_t index, const QueueEvent& event);
  ApiResult<SessionOutput> End(int32_t index, const QueueEvent& event);
  void CloseChoice(int32_t index);
  std::string EventId() const;

  const SessionContext& context_;
  RequestRelay relay_;
  GenerationRequest request_;
  std::shared_ptr<const ServedModel> model_;
  RequestClass request_class_ = RequestClass::kStandard;
  std::string tenant_;
  std::string request_id_;
  std::vector<std::pair<std::string, std::string>> rate_limit_headers_;
  std::vector<std::string> warnings_;
  std::vector<Choice> choices_;
  absl::Time begun_;
  bool first_seen_ = false;
  bool may_come_back_ = false;
};

// "<request id>:<steps of choice 0>,<of choice 1>..." and back. InvalidArgument.
struct ResumePoint {
  std::string request_id;
  std::vector<int32_t> steps;
};
absl::StatusOr<ResumePoint> ParseEventId(absl::string_view id);

// Ends all choices of a request of `tenant`. The state they had when they had ended already, else
// "cancelled". 404: no such request of this tenant.
asio::awaitable<ApiResult<std::string>> CancelRequestById(QueueExecutor& executor,
                                                          std::string request_id,
                                                          std::string tenant);

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_GENERATION_SESSION_H_
