// One API request over a real Redis, with a test for a worker: what comes out, and every way to
// end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/wire/model_traits_wire.h"
#include "gateway/relay/event_hub.h"
#include "gateway/relay/queue_executor.h"
#include "gateway/service/generation_session.h"
#include "tests/integration/gateway/fake_worker.h"
#include "tests/unit/gateway_api/served_model.h"

namespace cinnabar {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr char kText[] = "return a + b";

class SessionTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto server = RedisServer::Start();
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = server->release();
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void SetUp() override {
    RedisClient redis(server_->client_options());
    ASSERT_TRUE(redis.Command({"FLUSHALL"}).ok());
    const char* source = std::getenv("CINNABAR_SOURCE_DIR");
    const std::string path =
        absl::StrCat(source == nullptr ? "." : source, "/models/cinnabar-tiny");
    auto models =
        ModelDirectory::Load({{.path = path, .name = "tiny"}, {.path = path, .name = "away"}});
    ASSERT_TRUE(models.ok()) << models.status();
    models_ = *std::move(models);
    ServeTiny(/*draining=*/false);
    worker_ = std::make_unique<FakeWorker>(*server_);
    executor_ = std::make_unique<QueueExecutor>(QueueExecutorOptions{
        .redis = server_->client_options(), .queue = kGatewayTestQueue, .num_threads = 2});
    hub_ = std::make_unique<EventHub>(server_->client_options(), kGatewayTestQueue, "g1");
    context_ = std::make_unique<SessionContext>(SessionContext{
        .executor = *executor_, .hub = *hub_, .models = *models_, .metrics = gateway_metrics_});
    auto ids = TinyTokenizer().Encode(kText);
    tokens_.assign(ids.begin(), ids.end());
  }
  void ServeTiny(bool draining) {
    v1::WorkerStatus status;
    status.set_model("tiny");
    status.set_model_fingerprint("fingerprint-1");
    status.set_draining(draining);
    *status.mutable_traits() = ToWire(TinyModel().traits);
    models_->Update({status});
  }

  static GenerationRequest Parse(const std::string& fields) {
    const std::string body =
        absl::StrCat("{\"model\": \"tiny\", \"prompt\": \"def f(a, b):\", \"seed\": 1",
                     fields.empty() ? "" : ", ", fields, "}");
    auto parsed =
        ParseGenerationRequest(GenerationRequest::Endpoint::kCompletion, body, RequestLimits{});
    CINNABAR_CHECK(parsed.ok()) << parsed.error().message;
    return *std::move(parsed);
  }
  std::unique_ptr<GenerationSession> Session() {
    return std::make_unique<GenerationSession>(*context_, io_.get_executor());
  }
  std::optional<ApiError> Begin(GenerationSession& session, const std::string& fields,
                                BeginOptions options, Caller caller = {}) {
    if (options.request_id.empty()) options.request_id = "req_1";
    if (options.body.empty()) options.body = fields;
    std::optional<ApiError> refused;
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      GenerationRequest request = Parse(fields);
      refused = co_await session.Begin(request, caller, options);
    });
    return refused;
  }
  // Begins with as many tokens as the worker will write.
  std::unique_ptr<GenerationSession> Begun(const std::string& more = "") {
    auto session = Session();
    const auto refused =
        Begin(*session,
              absl::StrCat("\"max_tokens\": ", tokens_.size(), more.empty() ? "" : ", ", more), {});
    EXPECT_FALSE(refused.has_value()) << refused->message;
    return session;
  }
  // All outputs until there are `count` or the session has ended; the error if there is one.
  std::optional<ApiError> Read(GenerationSession& session, size_t count,
                               std::vector<SessionOutput>& outputs) {
    std::optional<ApiError> error;
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      const absl::Time until = absl::Now() + absl::Seconds(10);
      for (size_t i = 0; i < count && !session.finished(); ++i) {
        ApiResult<std::optional<SessionOutput>> output = co_await session.Next(until);
        if (!output.ok()) {
          error = output.error();
          co_return;
        }
        if (!output->has_value()) co_return;
        outputs.push_back(**output);
      }
    });
    return error;
  }
  // Step `i` (from 1) decides token i - 1 of the answer, left to right.
  void Step(const std::string& id, int32_t step) {
    const Work work = BuildOne();
    v1::StepDelta delta;
    delta.add_positions(work.text.begin + step - 1);
    delta.add_tokens(tokens_[step - 1]);
    delta.set_confidences("\xff");
    delta.set_forward(true);
    delta.set_final_end(work.text.begin + step);
    worker_->Step(id, step, delta.SerializeAsString());
  }
  Work BuildOne() {
    auto entry = models_->Find("tiny");
    auto work =
        BuildWork(Parse(absl::StrCat("\"max_tokens\": ", tokens_.size())), *entry->model, 0, 1);
    CINNABAR_CHECK(work.ok());
    return *std::move(work);
  }
  void End(const std::string& id, int32_t steps) {
    v1::WorkResult result;
    for (const int32_t token : tokens_) result.add_tokens(token);
    result.set_steps(steps);
    result.set_nfe(steps);
    result.set_device_us(2500);
    worker_->End(id, steps, result.SerializeAsString());
  }
  int32_t num_tokens() const { return static_cast<int32_t>(tokens_.size()); }

  static RedisServer* server_;
  asio::io_context io_;
  Metrics metrics_;
  GatewayMetrics gateway_metrics_{metrics_};
  std::unique_ptr<ModelDirectory> models_;
  std::unique_ptr<FakeWorker> worker_;
  std::unique_ptr<QueueExecutor> executor_;
  std::unique_ptr<EventHub> hub_;
  std::unique_ptr<SessionContext> context_;
  std::vector<int32_t> tokens_;
};
RedisServer* SessionTest::server_ = nullptr;

TEST_F(SessionTest, FromAdmissionToUsage) {
  const auto session = Begun();
  worker_->Start("req_1.0");
  for (int32_t step = 1; step <= num_tokens(); ++step) Step("req_1.0", step);
  End("req_1.0", num_tokens());
  std::vector<SessionOutput> outputs;
  EXPECT_FALSE(Read(*session, 100, outputs).has_value());
  EXPECT_TRUE(session->finished());
  std::string text;
  for (const SessionOutput& output : outputs) text += output.text;
  EXPECT_EQ(text, kText);
  EXPECT_EQ(session->Text(0), kText);
  EXPECT_EQ(outputs[0].event_id, "req_1:1");
  EXPECT_EQ(outputs[0].step, 1);
  EXPECT_EQ(outputs.back().finish_reason, FinishReason::kLength);
  for (size_t i = 0; i + 1 < outputs.size(); ++i) {
    EXPECT_EQ(outputs[i].finish_reason, FinishReason::kNone);
  }
  const UsageReport usage = session->TotalUsage();
  EXPECT_EQ(usage.completion_tokens, num_tokens());
  EXPECT_EQ(usage.forwards, num_tokens());
  EXPECT_GT(usage.prompt_tokens, 0);
}

TEST_F(SessionTest, AStopStringEndsTheWork) {
  const auto session = Begun("\"stop\": [\" +\"]");
  worker_->Start("req_1.0");
  for (int32_t step = 1; step <= num_tokens(); ++step) Step("req_1.0", step);
  std::vector<SessionOutput> outputs;
  EXPECT_FALSE(Read(*session, 100, outputs).has_value());
  EXPECT_EQ(session->Text(0), "return a");
  EXPECT_EQ(session->finish_reason(0), FinishReason::kStop);
  EXPECT_EQ(outputs.back().finish_reason, FinishReason::kStop);
  EXPECT_TRUE(worker_->Becomes("req_1.0", "local", RequestState::kCancelled));
}

TEST_F(SessionTest, ABrokenStreamGoesOnWhereItWas) {
  const auto session = Begun();
  worker_->Start("req_1.0");
  Step("req_1.0", 1);
  Step("req_1.0", 2);
  std::vector<SessionOutput> outputs;
  EXPECT_FALSE(Read(*session, 2, outputs).has_value());
  const std::string seen = outputs[0].text + outputs[1].text;
  for (int32_t step = 3; step <= num_tokens(); ++step) Step("req_1.0", step);
  End("req_1.0", num_tokens());

  const std::string fields = absl::StrCat("\"max_tokens\": ", tokens_.size());
  const auto again = Session();
  EXPECT_FALSE(Begin(*again, fields, {.request_id = "req_2", .resume_after = outputs[1].event_id})
                   .has_value());
  EXPECT_EQ(again->request_id(), "req_1");
  std::vector<SessionOutput> rest;
  EXPECT_FALSE(Read(*again, 100, rest).has_value());
  std::string text = seen;
  for (const SessionOutput& output : rest) text += output.text;
  EXPECT_EQ(text, kText);
  EXPECT_EQ(rest[0].step, 3);

  Caller stranger;
  stranger.tenant = "stranger";
  EXPECT_EQ(Begin(*Session(), fields, {.resume_after = outputs[1].event_id}, stranger)->http_status,
            404);
  for (const char* wrong : {"req_1", "req_1:", "req_1:1,1", "{x}:1", "req_1:x"}) {
    const auto refused = Begin(*Session(), fields, {.resume_after = wrong});
    ASSERT_TRUE(refused.has_value()) << wrong;
    EXPECT_EQ(refused->http_status, 400);
    EXPECT_EQ(refused->param, "Last-Event-ID");
  }
}

TEST_F(SessionTest, AnIdempotencyKeyLeadsToTheFirst) {
  const auto session = Session();
  EXPECT_FALSE(Begin(*session, "\"max_tokens\": 4", {.idempotency_key = "k"}).has_value());
  const auto twin = Session();
  EXPECT_FALSE(Begin(*twin, "\"max_tokens\": 4", {.request_id = "req_2", .idempotency_key = "k"})
                   .has_value());
  EXPECT_EQ(twin->request_id(), "req_1");
  const auto refused =
      Begin(*Session(), "\"max_tokens\": 5", {.request_id = "req_3", .idempotency_key = "k"});
  ASSERT_TRUE(refused.has_value());
  EXPECT_EQ(refused->http_status, 422);
}

TEST_F(SessionTest, ModelsThatAreNotThere) {
  const auto begin = [&](const std::string& model, Caller caller = {}) {
    const auto session = Session();
    std::optional<ApiError> refused;
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      GenerationRequest request = Parse("");
      request.model = model;
      BeginOptions options;
      options.request_id = "req_1";
      refused = co_await session->Begin(request, caller, options);
    });
    return refused.has_value() ? absl::StrCat(refused->http_status, " ", refused->code) : "";
  };
  EXPECT_EQ(begin("none"), "404 model_not_found");
  EXPECT_EQ(begin("away"), "503 unavailable");  // never served
  Caller restricted;
  restricted.models = {"away"};
  EXPECT_EQ(begin("tiny", restricted), "404 model_not_found");
  ServeTiny(/*draining=*/true);
  EXPECT_EQ(begin("tiny"), "503 unavailable");
}

TEST_F(SessionTest, AllChoicesAreAdmittedOrNone) {
  Caller caller;
  caller.limits.tenant_requests_max = 2;
  const auto refused = Begin(*Session(), "\"n\": 3", {}, caller);
  ASSERT_TRUE(refused.has_value());
  EXPECT_EQ(refused->http_status, 429);
  EXPECT_TRUE(worker_->Becomes("req_1.0", "local", RequestState::kCancelled));
  EXPECT_TRUE(worker_->Becomes("req_1.1", "local", RequestState::kCancelled));
  caller.limits = {.cost_max = 1};
  const auto full =
      Begin(*Session(), "", {.request_id = "req_2", .wait_estimate = absl::Seconds(7)}, caller);
  ASSERT_TRUE(full.has_value());
  EXPECT_EQ(full->http_status, 503);
  EXPECT_EQ(full->retry_after, absl::Seconds(7));
}

TEST_F(SessionTest, EveryEndWithoutAnAnswerHasItsError) {
  std::vector<SessionOutput> outputs;
  {
    const auto session = Begun();
    worker_->Start("req_1.0");
    worker_->End("req_1.0", 0, "", /*failed=*/true);
    const auto error = Read(*session, 9, outputs);
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code, "request_failed");
    EXPECT_THAT(error->message, HasSubstr("req_1"));
  }
  {
    const auto session = Session();
    Begin(*session, "\"max_tokens\": 4", {.request_id = "req_2"});
    ASSERT_TRUE(worker_->queue().Cancel("req_2.0", "local", "client_cancelled").ok());
    const auto error = Read(*session, 9, outputs);
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->http_status, 499);
  }
  {  // One choice that fails ends its siblings.
    const auto session = Session();
    Begin(*session, "\"max_tokens\": 4, \"n\": 2", {.request_id = "req_3"});
    worker_->Start("req_3.0");
    worker_->End("req_3.0", 0, "", /*failed=*/true);
    EXPECT_TRUE(Read(*session, 9, outputs).has_value());
    EXPECT_TRUE(worker_->Becomes("req_3.1", "local", RequestState::kCancelled));
  }
  {  // What a worker sends is not trusted.
    const auto session = Session();
    Begin(*session, "\"max_tokens\": 4", {.request_id = "req_4"});
    worker_->Start("req_4.0");
    worker_->Step("req_4.0", 1, "\xff\xff no delta");
    const auto error = Read(*session, 9, outputs);
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->http_status, 500);
    EXPECT_TRUE(worker_->Becomes("req_4.0", "local", RequestState::kCancelled));
  }
  EXPECT_TRUE(outputs.empty());
}

TEST_F(SessionTest, AnAbandonedRequestIsCancelled) {
  const auto session = Begun();
  session->Interrupt();
  std::vector<SessionOutput> outputs;
  EXPECT_FALSE(Read(*session, 1, outputs).has_value());
  EXPECT_TRUE(outputs.empty());
  session->Abandon("client_gone");
  EXPECT_TRUE(worker_->Becomes("req_1.0", "local", RequestState::kCancelled));
}

TEST_F(SessionTest, ARequestIsCancelledByItsId) {
  const auto session = Session();
  Begin(*session, "\"max_tokens\": 4, \"n\": 2", {});
  const auto cancel = [&](std::string id, std::string tenant) {
    std::string said;
    RunCoroutine(io_, [&]() -> asio::awaitable<void> {
      const ApiResult<std::string> state = co_await CancelRequestById(*executor_, id, tenant);
      said = state.ok() ? *state : absl::StrCat(state.error().http_status);
    });
    return said;
  };
  EXPECT_EQ(cancel("req_1", "stranger"), "404");
  EXPECT_EQ(cancel("req_2", "local"), "404");
  EXPECT_EQ(cancel("no name {}", "local"), "404");
  EXPECT_EQ(cancel(std::string(100, 'r'), "local"), "404");
  EXPECT_EQ(cancel("req_1", "local"), "cancelled");
  EXPECT_EQ(worker_->View("req_1.0", "local").state, RequestState::kCancelled);
  EXPECT_EQ(worker_->View("req_1.1", "local").state, RequestState::kCancelled);
}

TEST(EventIdTest, IdsAreReadAsTheyAreWritten) {
  const auto point = ParseEventId("req_ab:3,0,12");
  ASSERT_TRUE(point.ok());
  EXPECT_EQ(point->request_id, "req_ab");
  EXPECT_THAT(point->steps, ElementsAre(3, 0, 12));
  for (const std::string& wrong :
       {std::string(), std::string(":"), std::string(":1"), std::string("a"), std::string("a:"),
        std::string("a:1:2"), std::string("a:-1"), std::string("a:1,"), std::string("a:x"),
        std::string("a b:1"), std::string("a{}:1"), std::string("a:99999999999"),
        std::string(61, 'a') + ":1", "a:1" + std::string(400, ',') + "1"}) {
    EXPECT_FALSE(ParseEventId(wrong).ok()) << wrong;
  }
}

}  // namespace
}  // namespace cinnabar
