#include "gateway/service/generation_session.h"

#include <openssl/rand.h>
#include <openssl/sha.h>

#include <algorithm>
#include <set>

#include "absl/algorithm/container.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

std::string Digest(absl::string_view text) {
  unsigned char hash[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), hash);
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(hash), sizeof(hash)));
}

constexpr char kNameCharacters[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-";

uint64_t RandomSeed() {
  uint64_t seed = 0;
  CINNABAR_CHECK(RAND_bytes(reinterpret_cast<unsigned char*>(&seed), sizeof(seed)) == 1);
  return seed >> 1;  // clients that count in signed numbers can send it back
}

RequestClass ToRequestClass(PriorityClass priority) {
  switch (priority) {
    case PriorityClass::kInteractive:
      return RequestClass::kInteractive;
    case PriorityClass::kStandard:
      return RequestClass::kStandard;
    case PriorityClass::kBatch:
      return RequestClass::kBatch;
  }
  CINNABAR_CHECK(false) << "not a class: " << static_cast<int>(priority);
}

}  // namespace

absl::StatusOr<ResumePoint> ParseEventId(absl::string_view id) {
  const std::vector<absl::string_view> parts = absl::StrSplit(id, ':');
  ResumePoint point;
  if (parts.size() != 2 || parts[0].empty() || parts[0].size() > 60 ||
      parts[0].find_first_not_of(kNameCharacters) != absl::string_view::npos) {
    return absl::InvalidArgumentError("not an event id of ours");
  }
  point.request_id = std::string(parts[0]);
  for (const absl::string_view step : absl::StrSplit(parts[1], ',')) {
    int32_t value = 0;
    if (!absl::SimpleAtoi(step, &value) || value < 0 || point.steps.size() >= 64) {
      return absl::InvalidArgumentError("not an event id of ours");
    }
    point.steps.push_back(value);
  }
  return point;
}

asio::awaitable<ApiResult<std::string>> CancelRequestById(QueueExecutor& executor,
                                                          std::string request_id,
                                                          std::string tenant) {
  RequestState state = RequestState::kCancelled;
  for (int32_t i = 0;; ++i) {
    const std::string id = absl::StrCat(request_id, ".", i);
    // What is no name of ours is no request of anybody.
    const bool name =
        id.size() <= 64 && request_id.find_first_not_of(kNameCharacters) == std::string::npos;
    absl::StatusOr<RequestState> ended = absl::NotFoundError("no name");
    if (name) {
      const QueueCall<RequestState> cancel = [id, tenant](Queue& queue) {
        return queue.Cancel(id, tenant, "client_cancelled");
      };
      ended = co_await executor.Run<RequestState>(cancel);
    }
    if (absl::IsNotFound(ended.status())) {
      if (i == 0) co_return NotFound("no such request, or its result is no longer kept");
      co_return std::string(RequestStateName(state));
    }
    if (!ended.ok()) co_return QueueError(ended.status(), absl::Seconds(2));
    state = *ended;
  }
}

GenerationSession::GenerationSession(const SessionContext& context, asio::any_io_executor io)
    : context_(context), relay_(std::move(io), context.executor, context.hub) {}

asio::awaitable<std::optional<ApiError>> GenerationSession::Begin(GenerationRequest request,
                                                                  Caller caller,
                                                                  BeginOptions options) {
  begun_ = absl::Now();
  request_ = std::move(request);
  tenant_ = caller.tenant;
  request_id_ = options.request_id;
  may_come_back_ = !options.idempotency_key.empty();
  request_class_ = ClassFor(ToRequestClass(request_.priority), caller);
  warnings_ = request_.warnings;
  const absl::StatusOr<ModelDirectory::Entry> entry = context_.models.Find(request_.model);
  if (!entry.ok()) co_return ModelNotFound(request_.model);
  if (entry->model == nullptr) {
    co_return Unavailable("no worker has served this model yet", absl::Seconds(5));
  }
  model_ = entry->model;
  if (!caller.models.empty() &&
      std::find(caller.models.begin(), caller.models.end(), model_->name) == caller.models.end()) {
    co_return ModelNotFound(request_.model);
  }
  const uint64_t random = RandomSeed();
  for (int32_t i = 0; i < request_.num_choices(); ++i) {
    ApiResult<Work> work = BuildWork(request_, *model_, i, random);
    if (!work.ok()) co_return work.error();
    Choice& choice = choices_.emplace_back();
    choice.work = std::move(work).value();
    choice.work.hint.set_tenant_weight(caller.weight);
    choice.work.hint.set_model_fingerprint(model_->fingerprint);
    choice.assembler = std::make_unique<TextAssembler>(model_->tokenizer, choice.work.text);
    if (i == 0) {
      warnings_.insert(warnings_.end(), choice.work.warnings.begin(), choice.work.warnings.end());
    }
  }
  if (!options.resume_after.empty()) {
    std::optional<ApiError> refused = co_await Reattach(caller, options);
    co_return refused;
  }
  if (entry->num_workers == 0) {
    co_return Unavailable("no worker serves this model at the moment", absl::Seconds(5));
  }
  std::optional<ApiError> refused = co_await Admit(caller, options);
  co_return refused;
}

asio::awaitable<std::optional<ApiError>> GenerationSession::Admit(const Caller& caller,
                                                                  const BeginOptions& options) {
  const std::string digest = Digest(options.body);
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Work& work = choices_[i].work;
    EnqueueRequest request;
    request.id = absl::StrCat(options.request_id, ".", i);
    request.tenant = caller.tenant;
    request.request_class = request_class_;
    if (!options.idempotency_key.empty()) {
      request.idempotency_key = Digest(absl::StrCat(i, " ", options.idempotency_key));
    }
    request.body_digest = digest;
    request.prompt_tokens = work.prompt_tokens;
    request.canvas_tokens = work.canvas_tokens;
    request.steps_max = work.steps_max;
    request.cost = work.cost;
    request.deadline = request_.deadline.value_or(context_.deadline_default);
    request.keep = context_.keep;
    request.tag = absl::StrCat(caller.key_id, " ", model_->name).substr(0, 256);
    request.hint = work.hint.SerializeAsString();
    request.payload = work.item.SerializeAsString();
    request.input_price_microdollars = work.input_price_microdollars;
    request.output_price_microdollars = work.output_price_microdollars;
    const absl::StatusOr<EnqueueResult> result =
        co_await relay_.Enqueue(std::move(request), caller.limits);
    const bool taken = result.ok() && (result->outcome == EnqueueOutcome::kAccepted ||
                                       result->outcome == EnqueueOutcome::kDuplicate);
    if (!taken) {
      relay_.Leave("not_admitted", absl::ZeroDuration());
      if (!result.ok()) {
        context_.metrics.Rejected("queue", request_class_);
        co_return QueueError(result.status(), options.wait_estimate);
      }
      const ApiError error = RefusalError(*result, options.wait_estimate);
      if (result->outcome == EnqueueOutcome::kRate) {
        rate_limit_headers_ = RateLimitHeaders(caller, *result);
      }
      context_.metrics.Rejected(error.code, request_class_);
      co_return error;
    }
    if (i == 0) {
      rate_limit_headers_ = RateLimitHeaders(caller, *result);
      // "<request id>.0" of the request that an idempotency key led to.
      if (result->outcome == EnqueueOutcome::kDuplicate && result->id.size() > 2) {
        request_id_ = result->id.substr(0, result->id.rfind('.'));
      }
    }
  }
  co_return std::nullopt;
}

asio::awaitable<std::optional<ApiError>> GenerationSession::Reattach(const Caller& caller,
                                                                     const BeginOptions& options) {
  const absl::StatusOr<ResumePoint> point = ParseEventId(options.resume_after);
  if (!point.ok() || point->steps.size() != choices_.size()) {
    co_return InvalidValue("Last-Event-ID",
                           "this is not the id of an event of such a request; send the same "
                           "body again with the last id that came");
  }
  request_id_ = point->request_id;
  for (size_t i = 0; i < choices_.size(); ++i) {
    choices_[i].skip_to = point->steps[i];
    std::string id = absl::StrCat(request_id_, ".", i);
    const absl::Status status = co_await relay_.Attach(std::move(id), caller.tenant);
    if (absl::IsNotFound(status)) {
      co_return NotFound("no such request, or its events are no longer kept; send it anew");
    }
    if (!status.ok()) co_return QueueError(status, options.wait_estimate);
  }
  co_return std::nullopt;
}

asio::awaitable<ApiResult<std::optional<SessionOutput>>> GenerationSession::Next(absl::Time until) {
  using Result = ApiResult<std::optional<SessionOutput>>;
  for (;;) {
    if (finished()) co_return Result(std::optional<SessionOutput>());
    absl::StatusOr<std::optional<RelayEvent>> event = co_await relay_.Next(until);
    if (!event.ok()) {
      relay_.Leave("gateway_lost_it", absl::ZeroDuration());
      co_return Result(QueueError(event.status(), absl::Seconds(2)));
    }
    if (!event->has_value()) co_return Result(std::optional<SessionOutput>());
    const int32_t index = (*event)->choice;
    const QueueEvent& told = (*event)->event;
    ApiResult<SessionOutput> output =
        told.final_state.has_value() ? End(index, told) : Progress(index, told);
    if (!output.ok()) {
      relay_.Leave("sibling_failed", absl::ZeroDuration());
      co_return Result(output.error());
    }
    Choice& choice = choices_[index];
    if (!choice.done && choice.assembler->cut_short()) {
      // The rest is not needed. The work ends, the answer stands. A text that ended otherwise waits
      // for its worker's last word, which is on its way and carries the usage.
      relay_.Cancel(index, "stop");
      CloseChoice(index);
      output->finish_reason = choice.assembler->finish_reason();
    }
    output->event_id = EventId();
    if (told.step <= choice.skip_to && output->finish_reason == FinishReason::kNone) continue;
    co_return Result(std::optional<SessionOutput>(std::move(output).value()));
  }
}

ApiResult<SessionOutput> GenerationSession::Progress(int32_t index, const QueueEvent& event) {
  Choice& choice = choices_[index];
  SessionOutput output = {.choice = index, .step = event.step};
  v1::StepDelta& delta = output.delta.emplace();
  if (!delta.ParseFromString(event.data)) return ServerError("a worker sent what cannot be read");
  absl::StatusOr<std::string> text = choice.assembler->Add(
      absl::MakeConstSpan(delta.positions().data(), delta.positions_size()),
      absl::MakeConstSpan(delta.tokens().data(), delta.tokens_size()), delta.final_end());
  if (!text.ok()) return ServerError("a worker sent steps that contradict each other");
  if (event.step > choice.skip_to) output.text = *std::move(text);
  choice.step = event.step;
  choice.forwards += delta.forward() ? 1 : 0;
  // A position that is masked again was decided before and is no more.
  choice.num_committed += delta.positions_size() - delta.num_revised() -
                          static_cast<int32_t>(absl::c_count(delta.tokens(), -1));
  choice.device_us = delta.device_us();
  choice.steps_budget = delta.steps_budget();
  if (!choice.queue.has_value()) {
    choice.queue =
        std::max(absl::Now() - begun_ - absl::Microseconds(delta.step_us()), absl::ZeroDuration());
  }
  if (!first_seen_) {
    first_seen_ = true;
    context_.metrics.FirstPartial(model_->name, request_class_, absl::Now() - begun_);
  }
  return output;
}

ApiResult<SessionOutput> GenerationSession::End(int32_t index, const QueueEvent& event) {
  Choice& choice = choices_[index];
  choice.done = true;
  SessionOutput output = {.choice = index, .step = event.step};
  if (*event.final_state != RequestState::kDone) {
    return EndError(*event.final_state, event.data, request_id_);
  }
  v1::WorkResult result;
  if (!result.ParseFromString(event.data)) return ServerError("a worker sent what cannot be read");
  absl::StatusOr<std::string> text = choice.assembler->AddResult(
      absl::MakeConstSpan(result.tokens().data(), result.tokens_size()));
  if (!text.ok()) return ServerError("a worker sent a result that contradicts its steps");
  output.text = *std::move(text);
  choice.step = result.steps();
  choice.forwards = result.nfe();
  choice.device_us = result.device_us();
  output.finish_reason = choice.assembler->finish_reason();
  CloseChoice(index);
  return output;
}

void GenerationSession::CloseChoice(int32_t index) {
  choices_[index].done = true;
  context_.metrics.ChoiceDone(model_->name, request_class_, tenant_, Usage(index));
}

void GenerationSession::Abandon(const std::string& why) {
  relay_.Leave(why, may_come_back_ ? context_.retry_grace : absl::ZeroDuration());
}

bool GenerationSession::finished() const {
  return std::all_of(choices_.begin(), choices_.end(),
                     [](const Choice& choice) { return choice.done; });
}

std::string GenerationSession::EventId() const {
  return absl::StrCat(request_id_, ":",
                      absl::StrJoin(choices_, ",", [](std::string* out, const Choice& choice) {
                        absl::StrAppend(out, choice.step);
                      }));
}

UsageReport GenerationSession::Usage(int32_t index) const {
  const Choice& choice = choices_[index];
  const Work& work = choice.work;
  UsageReport usage;
  usage.prompt_tokens = work.prompt_tokens;
  usage.completion_tokens = choice.assembler->completion_tokens();
  usage.sampler = work.item.params().sampler();
  usage.steps = choice.step;
  usage.forwards = choice.forwards;
  usage.tokens_committed = choice.num_committed;
  usage.queue = choice.queue.value_or(absl::ZeroDuration());
  usage.device = absl::Microseconds(choice.device_us);
  // As the queue's ledger has it: the input, and the committed share of the canvas.
  const int64_t committed = std::min<int64_t>(choice.num_committed, work.canvas_tokens);
  const int64_t canvas = std::max(work.canvas_tokens, 1);
  const int64_t output = (work.output_price_microdollars * committed + canvas - 1) / canvas;
  usage.price_dollars = static_cast<double>(work.input_price_microdollars + output) / 1e6;
  if (choice.steps_budget > 0) {
    usage.degraded_steps = work.item.params().num_steps() - choice.steps_budget;
  }
  return usage;
}

UsageReport GenerationSession::TotalUsage() const {
  UsageReport total = Usage(0);
  for (int32_t i = 1; i < num_choices(); ++i) {
    UsageReport usage = Usage(i);
    if (i % request_.n != 0) usage.prompt_tokens = 0;  // another answer to the same prompt
    AddUsage(total, usage);
  }
  return total;
}

}  // namespace cinnabar
