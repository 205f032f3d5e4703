#include "tests/sim/cluster/cluster_sim.h"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cinnabar/v1/work.pb.h"
#include "common/base/check.h"
#include "common/base/environment.h"
#include "common/metrics/metrics.h"
#include "common/queue/queue.h"
#include "common/wire/decoding_params_wire.h"
#include "gateway/relay/event_order.h"
#include "scheduler/service/scheduler_loop.h"
#include "tests/support/history.h"
#include "tests/support/queue_state.h"
#include "worker/service/row.h"
#include "worker/service/worker_loop.h"

namespace cinnabar {
namespace {

constexpr char kPartition[] = "sim";
constexpr char kModel[] = "model";
constexpr char kFingerprint[] = "weights";
constexpr int32_t kNumRequests = 12;
constexpr absl::Duration kFaultsEnd = absl::Seconds(16);
constexpr absl::Duration kGiveUp = absl::Minutes(4);
constexpr absl::Duration kSettle = absl::Seconds(7);
constexpr absl::Duration kDeadline = absl::Seconds(150);

// Time passes a little whenever somebody looks at the clock, and as the simulation says.
class SimEnvironment : public Environment {
 public:
  explicit SimEnvironment(uint64_t seed)
      : now_(absl::FromUnixSeconds(1'800'000'000)), random_(seed) {}
  absl::Time Now() override { return now_ += absl::Microseconds(200); }
  void Sleep(absl::Duration duration) override { now_ += duration; }
  double Uniform() override { return std::uniform_real_distribution<double>(0.0, 1.0)(random_); }

  void AdvanceTo(absl::Time time) { now_ = std::max(now_, time); }
  absl::Time now() const { return now_; }
  int32_t Pick(int32_t from, int32_t to) {  // both included
    return from + static_cast<int32_t>(Uniform() * (to - from + 1));
  }
  absl::Duration Between(int32_t from_ms, int32_t to_ms) {
    return absl::Microseconds(Pick(from_ms * 1000, to_ms * 1000));
  }
  bool Chance(double p) { return Uniform() < p; }

 private:
  absl::Time now_;
  std::mt19937_64 random_;
};

class Simulation {
 public:
  Simulation(VirtualRedis& redis, SimModels& models, uint64_t seed)
      : redis_(redis), models_(models), faults_(FaultsOf(seed)), env_(seed) {}
  SimReport Run(const LibraryEdit* edit);

 private:
  // A connection of its own.
  struct Line {
    Line(VirtualRedis& redis, Environment& env)
        : client(FewRetries(redis.client_options()), env), queue(client, Options()) {}
    static RedisOptions FewRetries(RedisOptions options) {
      options.retry.attempts_max = 2;
      return options;
    }
    static QueueOptions Options() {
      QueueOptions options;
      options.partition = kPartition;
      options.site = "sim";
      return options;
    }
    RedisClient client;
    Queue queue;
  };
  struct SchedulerProcess {
    explicit SchedulerProcess(SchedulerOptions options)
        : metrics(registry), loop(std::move(options), metrics) {}
    Metrics registry;
    SchedulerMetrics metrics;
    SchedulerLoop loop;
  };
  struct WorkerProcess {
    WorkerProcess(WorkerOptions options, Denoiser& denoiser, VirtualRedis& redis, Environment& env)
        : metrics(registry, kModel, 0.0),
          loop(std::move(options), denoiser, metrics),
          intake(redis, env),
          beat(redis, env),
          publish(redis, env) {}
    Metrics registry;
    WorkerMetrics metrics;
    WorkerLoop loop;
    Line intake, beat, publish;
    bool ended = false;  // its compute has
  };
  template <typename Process>
  struct Slot {
    std::unique_ptr<Process> process;  // null while it is dead
    int32_t starts = 0;
    absl::Time frozen_until = absl::InfinitePast();
  };
  // One request as its client sees it, and what its gateway holds for it.
  struct Client {
    int32_t index = 0;
    EnqueueRequest request;
    v1::WorkResult expected;
    std::vector<TokenId> answer;  // committed so far, of the answer; -1 otherwise
    int32_t answer_begin = 0;
    int32_t gateway = 0;
    int32_t tries = 0;
    int32_t observers = 0;
    std::string id;  // of the request in the queue, once it was taken
    EventOrder order;
    bool holds_payload = false;
    absl::Time deadline_at;
    bool may_cancel = false;
    bool may_expire = false;
    bool done = false;
  };

  void At(absl::Time time, std::function<void()> act) {
    agenda_.emplace(std::make_pair(time, num_acts_++), std::move(act));
  }
  void After(absl::Duration wait, std::function<void()> act) {
    At(env_.now() + wait, std::move(act));
  }
  void Note(const std::string& line) {
    absl::StrAppend(&report_.trace, absl::ToInt64Milliseconds(env_.now() - begin_), " ", line,
                    "\n");
  }
  void Violate(const std::string& line) {
    Note(absl::StrCat("VIOLATION ", line));
    report_.violations.push_back(line);
  }
  bool faults_over() const { return env_.now() - begin_ > kFaultsEnd; }

  void StartScheduler(int32_t i);
  void SchedulerTurn(int32_t i, int32_t start);
  void StartWorker(int32_t i);
  // Repeats `turn` of this start of a worker, with a pause that it returns; nullopt ends it.
  void WorkerTurns(int32_t i, int32_t start,
                   std::function<std::optional<absl::Duration>(WorkerProcess&)> turn);
  void RetireWorker(int32_t i, int32_t start);

  void MakeClients();
  v1::WorkResult Expected(const std::string& payload);
  void Submit(Client& client);
  void Attach(Client& client);
  void Poll(Client& client);
  void Look(Client& client);
  void Replay(Client& client);
  void TakeEvents(Client& client);
  void Progress(Client& client, const QueueEvent& event);
  void End(Client& client, const QueueEvent& event);
  void CancelByClient(Client& client);

  void PlanFaults();
  void CheckEnd();

  VirtualRedis& redis_;
  SimModels& models_;
  const SimFaults faults_;
  SimEnvironment env_;
  absl::Time begin_;
  std::multimap<std::pair<absl::Time, int64_t>, std::function<void()>> agenda_;
  int64_t num_acts_ = 0;
  std::vector<Slot<SchedulerProcess>> schedulers_{kSimSchedulers};
  std::vector<Slot<WorkerProcess>> workers_{kSimWorkers};
  std::vector<std::unique_ptr<Line>> gateways_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::vector<HistoryEvent> history_;
  std::set<std::string> lost_;  // ids whose end a client knew, and Redis forgot
  SimReport report_;
};

// --- Schedulers and workers ----------------------------------------------------------------------

void Simulation::StartScheduler(int32_t i) {
  Slot<SchedulerProcess>& slot = schedulers_[i];
  SchedulerOptions options;
  options.redis = Line::FewRetries(redis_.client_options());
  options.queue = Line::Options();
  options.name = absl::StrCat("s", i);
  options.boot = absl::StrCat("s", i, "-", ++slot.starts);
  options.lease_for = absl::Seconds(3);
  options.start_within = absl::Seconds(3);
  options.view.sent_max = absl::Seconds(5);
  options.reap.attempts_without_progress_max = 6;
  options.reap.backoff = absl::Milliseconds(200);
  options.environment = &env_;
  slot.process = std::make_unique<SchedulerProcess>(options);
  slot.frozen_until = absl::InfinitePast();
  After(env_.Between(1, 100), [this, i, start = slot.starts] { SchedulerTurn(i, start); });
}

void Simulation::SchedulerTurn(int32_t i, int32_t start) {
  Slot<SchedulerProcess>& slot = schedulers_[i];
  if (slot.process == nullptr || slot.starts != start) return;
  if (slot.frozen_until > env_.now()) {
    At(slot.frozen_until, [this, i, start] { SchedulerTurn(i, start); });
    return;
  }
  const absl::Status status = slot.process->loop.Turn(absl::ZeroDuration());
  After(status.ok() ? env_.Between(30, 250) : env_.Between(100, 400),
        [this, i, start] { SchedulerTurn(i, start); });
}

void Simulation::StartWorker(int32_t i) {
  Slot<WorkerProcess>& slot = workers_[i];
  const int32_t start = ++slot.starts;
  WorkerOptions options;
  options.redis = Line::FewRetries(redis_.client_options());
  options.queue = Line::Options();
  options.name = absl::StrCat("w", i);
  options.boot = absl::StrCat("w", i, "-", start);
  options.model = kModel;
  options.fingerprint = kFingerprint;
  options.engine.limits = kSimLimits;
  constexpr int32_t kSnapshots[] = {1, 3, 8};
  options.snapshot_every = kSnapshots[env_.Pick(0, 2)];
  options.lease_for = absl::Seconds(3);
  options.alive_for = absl::Seconds(4);
  options.drain_for = absl::Milliseconds(500);
  options.environment = &env_;
  slot.process = std::make_unique<WorkerProcess>(options, *models_.workers[i], redis_, env_);
  slot.frozen_until = absl::InfinitePast();
  Note(absl::StrCat(options.boot, " starts"));
  WorkerTurns(i, start, [this](WorkerProcess& worker) -> std::optional<absl::Duration> {
    if (worker.ended) return std::nullopt;
    (void)worker.loop.TakePack(worker.intake.queue, absl::ZeroDuration()).ok();
    return env_.Between(50, 250);
  });
  WorkerTurns(i, start, [this](WorkerProcess& worker) -> std::optional<absl::Duration> {
    if (worker.ended) return std::nullopt;
    worker.loop.Beat(worker.beat.queue);
    return env_.Between(800, 1200);
  });
  WorkerTurns(i, start, [this](WorkerProcess& worker) -> std::optional<absl::Duration> {
    (void)worker.loop.publisher().Send(worker.publish.queue);
    return env_.Between(5, 200);
  });
  WorkerTurns(i, start, [this, i, start](WorkerProcess& worker) -> std::optional<absl::Duration> {
    if (worker.loop.Compute() != WorkerLoop::Turn::kEnded) return env_.Between(10, 120);
    worker.ended = true;
    RetireWorker(i, start);
    return std::nullopt;
  });
}

void Simulation::WorkerTurns(int32_t i, int32_t start,
                             std::function<std::optional<absl::Duration>(WorkerProcess&)> turn) {
  After(env_.Between(1, 50), [this, i, start, turn = std::move(turn)] {
    Slot<WorkerProcess>& slot = workers_[i];
    if (slot.process == nullptr || slot.starts != start) return;
    if (slot.frozen_until > env_.now()) {
      At(slot.frozen_until, [this, i, start, turn] { WorkerTurns(i, start, turn); });
      return;
    }
    const std::optional<absl::Duration> pause = turn(*slot.process);
    if (!pause.has_value()) return;
    After(*pause, [this, i, start, turn] { WorkerTurns(i, start, turn); });
  });
}

// What Run() does behind its loop: what is left is sent, then it leaves.
void Simulation::RetireWorker(int32_t i, int32_t start) {
  Slot<WorkerProcess>& slot = workers_[i];
  if (slot.process == nullptr || slot.starts != start) return;
  if (!slot.process->loop.publisher().Flush(absl::ZeroDuration())) {
    After(absl::Milliseconds(100), [this, i, start] { RetireWorker(i, start); });
    return;
  }
  (void)slot.process->beat.queue.Leave(absl::StrCat("w", i, "-", start)).ok();
  Note(absl::StrCat("w", i, "-", start, " has left"));
  slot.process.reset();
  After(env_.Between(200, 3000), [this, i] { StartWorker(i); });
}

// --- Clients and gateways ------------------------------------------------------------------------

v1::WorkResult Simulation::Expected(const std::string& payload) {
  StartedRow row;
  row.payload = payload;
  absl::StatusOr<RowPlan> plan = BuildRow(row, 0, models_.reference->traits(), kFingerprint);
  CINNABAR_CHECK(plan.ok()) << plan.status().ToString();
  Engine engine(*models_.reference, {.limits = kSimLimits});
  const absl::StatusOr<SequenceId> id = engine.Add(std::move(plan->state));
  CINNABAR_CHECK(id.ok()) << id.status().ToString();
  StepReport report;
  for (;;) {
    CINNABAR_CHECK(engine.Step(absl::InfinitePast(), report).ok());
    for (auto& [sequence, state] : engine.TakeFinished()) {
      return MakeResult(state, plan->facts, models_.reference->traits(), Usage{});
    }
  }
}

void Simulation::MakeClients() {
  constexpr const char* kSamplers[] = {"low_confidence", "random", "threshold", "entropy_bounded"};
  for (int32_t i = 0; i < kNumRequests; ++i) {
    auto client = std::make_unique<Client>();
    client->index = i;
    const int32_t prompt = env_.Pick(2, 12);
    const int32_t canvas = env_.Pick(4, 28);
    const int32_t suffix = env_.Chance(0.3) ? env_.Pick(1, 8) : 0;
    v1::WorkItem item;
    item.set_format(1);
    item.set_model(kModel);
    item.set_model_fingerprint(kFingerprint);
    for (int32_t k = 0; k < prompt + canvas + suffix; ++k) item.add_ids(env_.Pick(10, 250));
    v1::Span* undecided = item.add_undecided();
    undecided->set_begin(prompt);
    undecided->set_end(prompt + canvas);
    *item.mutable_answer() = *undecided;
    DecodingParams params;
    params.sampler = kSamplers[env_.Pick(0, 3)];
    const bool adaptive = params.sampler == "threshold" || params.sampler == "entropy_bounded";
    const int32_t steps_max = adaptive ? canvas : env_.Pick(2, canvas);
    if (!adaptive) params.num_steps = steps_max;
    params.temperature = env_.Chance(0.5) ? 0.8F : 0.0F;
    if (params.sampler == "threshold") params.threshold = 0.5F;
    if (params.sampler == "entropy_bounded") params.entropy_bound = 4.0F;
    params.seed = static_cast<uint64_t>(env_.Pick(1, 1 << 30));
    *item.mutable_params() = ToWire(params);
    v1::WorkHint hint;
    hint.set_model(kModel);
    hint.set_model_fingerprint(kFingerprint);
    hint.set_sampler(params.sampler);
    hint.set_steps_budget(steps_max);
    hint.set_tenant_weight(1.0);

    EnqueueRequest& request = client->request;
    request.tenant = absl::StrCat("t", i % 3);
    request.request_class = static_cast<RequestClass>(env_.Pick(0, 2));
    request.idempotency_key = absl::StrCat("key", i);
    request.body_digest = absl::StrCat("body", i);
    request.prompt_tokens = prompt + suffix;
    request.canvas_tokens = canvas;
    request.steps_max = steps_max;
    request.cost = int64_t{prompt + canvas + suffix} * steps_max;
    client->may_expire = env_.Chance(0.1);
    request.deadline = client->may_expire ? env_.Between(300, 4000) : kDeadline;
    request.hint = hint.SerializeAsString();
    request.payload = item.SerializeAsString();
    request.input_price_microdollars = 7;
    request.output_price_microdollars = 1000;
    client->answer.assign(canvas, -1);
    client->answer_begin = prompt;
    client->expected = Expected(request.payload);
    client->gateway = env_.Pick(0, kSimGateways - 1);
    Client* const raw = client.get();
    After(env_.Between(0, 7000), [this, raw] { Submit(*raw); });
    if (env_.Chance(0.15)) After(env_.Between(500, 9000), [this, raw] { CancelByClient(*raw); });
    clients_.push_back(std::move(client));
  }
}

void Simulation::Submit(Client& client) {
  if (client.done) return;
  EnqueueRequest request = client.request;
  request.id = absl::StrCat("r", client.index, ".", ++client.tries);
  request.gateway = absl::StrCat("g", client.gateway);
  Queue& queue = gateways_[client.gateway]->queue;
  const absl::StatusOr<EnqueueResult> result = queue.Enqueue(request, AdmissionLimits{});
  client.order = EventOrder();
  client.holds_payload = false;
  ++client.observers;
  std::fill(client.answer.begin(), client.answer.end(), -1);
  if (!result.ok()) {
    history_.push_back({.kind = HistoryEvent::Kind::kUnknown, .request = request.id});
    Note(absl::StrCat(request.id, " is not admitted: ", result.status().ToString()));
    // As the relay does, behind everything else; the client tries again.
    After(env_.Between(100, 800), [this, &client, id = request.id] {
      (void)gateways_[client.gateway]->queue.Cancel(id, client.request.tenant, "not_admitted").ok();
    });
    client.gateway = env_.Pick(0, kSimGateways - 1);
    After(env_.Between(300, 2000), [this, &client] { Submit(client); });
    return;
  }
  client.id = result->id;
  Note(absl::StrCat(
      request.id, result->outcome == EnqueueOutcome::kAccepted ? " is accepted" : " was known as ",
      result->outcome == EnqueueOutcome::kAccepted ? "" : result->id));
  if (result->outcome == EnqueueOutcome::kAccepted) {
    history_.push_back({.kind = HistoryEvent::Kind::kAccepted, .request = client.id});
    client.holds_payload = true;
    client.request.id = client.id;
    client.deadline_at = env_.now() + request.deadline;
    After(env_.Between(50, 300), [this, &client] { Poll(client); });
    return;
  }
  CINNABAR_CHECK(result->outcome == EnqueueOutcome::kDuplicate);
  Attach(client);
}

void Simulation::Attach(Client& client) {
  if (client.done) return;
  const absl::StatusOr<RequestView> view = gateways_[client.gateway]->queue.Attach(
      client.id, client.request.tenant, 0, 1, absl::StrCat("g", client.gateway));
  if (absl::IsNotFound(view.status())) {
    After(env_.Between(50, 300), [this, &client] { Submit(client); });
    return;
  }
  if (!view.ok()) {
    After(env_.Between(200, 800), [this, &client] { Attach(client); });
    return;
  }
  client.order.Miss();
  After(env_.Between(50, 300), [this, &client] { Poll(client); });
}

void Simulation::Poll(Client& client) {
  if (client.done) return;
  Queue& queue = gateways_[client.gateway]->queue;
  const int32_t observer = client.observers;
  if (env_.Chance(0.5)) {
    // Pushes: some of what there is, in any order, some of it twice.
    const int32_t after = std::max(client.order.next_step() - 1 - env_.Pick(0, 2), 0);
    absl::StatusOr<RequestView> view = queue.Events(client.id, client.request.tenant, after, 512);
    if (view.ok()) {
      for (size_t k = view->events.size(); k > 1; --k) {
        std::swap(view->events[k - 1], view->events[env_.Pick(0, static_cast<int32_t>(k) - 1)]);
      }
      for (QueueEvent& event : view->events) {
        if (env_.Chance(0.7)) client.order.Add(std::move(event));
      }
    }
  } else {
    if (env_.Chance(0.3)) client.order.Miss();
    if (client.order.missing()) Look(client);
  }
  TakeEvents(client);
  // Look() may have begun something else.
  if (!client.done && client.observers == observer) {
    After(env_.Between(50, 500), [this, &client, observer] {
      if (client.observers == observer) Poll(client);
    });
  }
}

void Simulation::Look(Client& client) {
  constexpr int32_t kEvents = 5;
  absl::StatusOr<RequestView> view = gateways_[client.gateway]->queue.Events(
      client.id, client.request.tenant, client.order.next_step() - 1, kEvents);
  if (absl::IsNotFound(view.status())) {
    if (client.holds_payload) {
      Replay(client);
    } else {  // the client hears of it, and sends its request again
      ++client.observers;
      Note(absl::StrCat(client.id, " is gone"));
      if (!faults_.rewinds) Violate(absl::StrCat(client.id, " is gone, and Redis lost nothing"));
      After(env_.Between(100, 500), [this, &client] { Submit(client); });
    }
    return;
  }
  if (!view.ok()) return;
  const bool all = static_cast<int32_t>(view->events.size()) < kEvents;
  client.order.AddView(*std::move(view), all);
}

void Simulation::Replay(Client& client) {
  EnqueueRequest request = client.request;
  request.gateway = absl::StrCat("g", client.gateway);
  request.replay = true;
  request.deadline = std::max(client.deadline_at - env_.now(), absl::Milliseconds(1));
  const absl::StatusOr<EnqueueResult> result =
      gateways_[client.gateway]->queue.Enqueue(request, AdmissionLimits{});
  if (!result.ok()) return;  // the next look finds out
  ++report_.replays;
  Note(absl::StrCat(client.id, " is enqueued again as ", result->id));
  if (!faults_.rewinds) Violate(absl::StrCat(client.id, " was lost, and Redis lost nothing"));
  client.id = result->id;
}

void Simulation::TakeEvents(Client& client) {
  while (std::optional<QueueEvent> event = client.order.Take()) {
    if (event->final_state.has_value()) return End(client, *event);
    Progress(client, *event);
  }
}

void Simulation::Progress(Client& client, const QueueEvent& event) {
  v1::StepDelta delta;
  if (!delta.ParseFromString(event.data)) {
    return Violate(absl::StrCat(client.id, " step ", event.step, " cannot be read"));
  }
  history_.push_back({.kind = HistoryEvent::Kind::kProgress,
                      .request = client.id,
                      .observer = absl::StrCat("c", client.index, ".", client.observers),
                      .step = event.step,
                      .data = absl::StrCat(absl::StrJoin(delta.positions(), ","), "=",
                                           absl::StrJoin(delta.tokens(), ","))});
  for (int k = 0; k < delta.positions_size(); ++k) {
    const int32_t at = delta.positions(k) - client.answer_begin;
    if (at < 0 || at >= static_cast<int32_t>(client.answer.size()) || client.answer[at] != -1) {
      Violate(absl::StrCat(client.id, " step ", event.step, " commits position ",
                           delta.positions(k), " twice or outside"));
      continue;
    }
    client.answer[at] = delta.tokens(k);
  }
}

void Simulation::End(Client& client, const QueueEvent& event) {
  client.done = true;
  const RequestState state = *event.final_state;
  Note(absl::StrCat(client.id, " ends as ", RequestStateName(state), " at ", event.step));
  history_.push_back({.kind = HistoryEvent::Kind::kFinal,
                      .request = client.id,
                      .observer = absl::StrCat("c", client.index, ".", client.observers),
                      .step = event.step,
                      .state = state});
  if (state == RequestState::kDone) {
    ++report_.done;
    v1::WorkResult result;
    if (!result.ParseFromString(event.data)) return Violate(client.id + " has no result");
    const auto tokens = absl::MakeConstSpan(result.tokens().data(), result.tokens_size());
    const auto expected =
        absl::MakeConstSpan(client.expected.tokens().data(), client.expected.tokens_size());
    if (tokens != expected || result.steps() != client.expected.steps() ||
        result.nfe() != client.expected.nfe()) {
      Violate(absl::StrCat(client.id, " is not what it is undisturbed: ",
                           absl::StrJoin(tokens, " "), " in ", result.steps(), " steps, not ",
                           absl::StrJoin(expected, " "), " in ", client.expected.steps()));
    }
    if (absl::MakeConstSpan(client.answer) != tokens) {
      Violate(absl::StrCat(client.id, ": its steps do not add up to its result"));
    }
    return;
  }
  if (state == RequestState::kCancelled && client.may_cancel) {
    ++report_.cancelled;
  } else if (state == RequestState::kExpired && client.may_expire) {
    ++report_.expired;
  } else if (state == RequestState::kCancelled && client.may_expire &&
             event.data == "deadline_infeasible") {
    ++report_.expired;
  } else {
    Violate(absl::StrCat(client.id, " ends as ", RequestStateName(state), " (", event.data,
                         "), which nothing calls for"));
  }
}

void Simulation::CancelByClient(Client& client) {
  if (client.done || client.id.empty()) return;
  client.may_cancel = true;
  const absl::StatusOr<RequestState> state =
      gateways_[client.gateway]->queue.Cancel(client.id, client.request.tenant, "client_cancelled");
  Note(absl::StrCat(client.id, " is cancelled by its client",
                    state.ok() ? "" : state.status().ToString()));
}

// --- Faults --------------------------------------------------------------------------------------

void Simulation::PlanFaults() {
  const auto at = [this](std::function<void()> act) { After(env_.Between(500, 8500), act); };
  const bool processes = faults_.processes || faults_.outages || faults_.rewinds;
  for (int32_t k = processes ? env_.Pick(1, 4) : 0; k > 0; --k) {
    at([this] {
      const int32_t i = env_.Pick(0, kSimWorkers - 1);
      if (workers_[i].process == nullptr) return;
      ++report_.kills;
      Note(absl::StrCat("w", i, " is killed"));
      workers_[i].process.reset();
      After(env_.Between(100, 6000), [this, i] { StartWorker(i); });
    });
  }
  for (int32_t k = processes ? env_.Pick(0, 3) : 0; k > 0; --k) {
    at([this] {
      const int32_t i = env_.Pick(0, kSimWorkers - 1);
      ++report_.freezes;
      Note(absl::StrCat("w", i, " freezes"));
      workers_[i].frozen_until = env_.now() + env_.Between(500, 12000);
    });
  }
  for (int32_t k = processes ? env_.Pick(0, 2) : 0; k > 0; --k) {
    at([this] {
      const int32_t i = env_.Pick(0, kSimWorkers - 1);
      if (workers_[i].process == nullptr) return;
      ++report_.drains;
      Note(absl::StrCat("w", i, " drains"));
      workers_[i].process->loop.Drain();
    });
  }
  for (int32_t k = processes ? env_.Pick(0, 3) : 0; k > 0; --k) {
    at([this] {
      const int32_t i = env_.Pick(0, kSimSchedulers - 1);
      if (env_.Chance(0.5)) {
        ++report_.freezes;
        Note(absl::StrCat("s", i, " freezes"));
        schedulers_[i].frozen_until = env_.now() + env_.Between(500, 9000);
      } else if (schedulers_[i].process != nullptr) {
        ++report_.kills;
        Note(absl::StrCat("s", i, " is killed"));
        schedulers_[i].process.reset();
        After(env_.Between(100, 6000), [this, i] { StartScheduler(i); });
      }
    });
  }
  for (int32_t k = processes ? env_.Pick(0, 4) : 0; k > 0; --k) {
    at([this] {  // connections of one program break
      const int32_t i = env_.Pick(0, kSimWorkers - 1);
      gateways_[env_.Pick(0, kSimGateways - 1)]->client.Close();
      if (workers_[i].process == nullptr) return;
      workers_[i].process->publish.client.Close();
      workers_[i].process->intake.client.Close();
    });
  }
  // A gateway dies: its clients come back with the id of their last event. What it held for a
  // replay is gone, so a Redis that rewinds as well would be one fault too many.
  for (int32_t k = processes && !faults_.rewinds ? env_.Pick(0, 2) : 0; k > 0; --k) {
    at([this] {
      const int32_t gateway = env_.Pick(0, kSimGateways - 1);
      ++report_.kills;
      Note(absl::StrCat("g", gateway, " is killed"));
      gateways_[gateway] = std::make_unique<Line>(redis_, env_);
      for (const std::unique_ptr<Client>& each : clients_) {
        Client& client = *each;
        if (client.done || client.gateway != gateway || client.id.empty()) continue;
        ++client.observers;
        client.order = EventOrder();
        client.holds_payload = false;
        std::fill(client.answer.begin(), client.answer.end(), -1);
        client.gateway = 1 - gateway;
        After(env_.Between(50, 1500), [this, &client] { Attach(client); });
      }
    });
  }
  if (faults_.outages) {
    at([this] {
      ++report_.outages;
      Note("Redis goes away");
      CINNABAR_CHECK(redis_.Save().ok());
      redis_.Kill();
      After(env_.Between(200, 5000), [this] {
        Note("Redis is back");
        CINNABAR_CHECK(redis_.Restart().ok());
      });
    });
  }
  if (faults_.rewinds) {
    const absl::Duration saved = env_.Between(1000, 7000);
    After(saved, [this] { CINNABAR_CHECK(redis_.Save().ok()); });
    After(saved + env_.Between(100, 4000), [this] {
      ++report_.rewinds;
      Note("Redis rewinds");
      CINNABAR_CHECK(redis_.Rewind().ok());
      // Whoever had its answer before does not enqueue it again: such a request may be run again
      // for nobody, or be unknown.
      for (const std::unique_ptr<Client>& client : clients_) {
        if (client->done) lost_.insert(client->id);
      }
    });
  }
}

// --- The end -------------------------------------------------------------------------------------

void Simulation::CheckEnd() {
  for (const std::unique_ptr<Client>& client : clients_) {
    if (!client->done) Violate(absl::StrCat("r", client->index, " (", client->id, ") never ended"));
  }
  Queue& queue = gateways_[0]->queue;
  const absl::StatusOr<std::vector<LedgerEntry>> ledger = queue.ReadLedger("0", 1000);
  CINNABAR_CHECK(ledger.ok()) << ledger.status().ToString();
  for (const LedgerEntry& entry : *ledger) {
    history_.push_back(
        {.kind = HistoryEvent::Kind::kLedger, .request = entry.request, .state = entry.state});
    const int64_t full = 7 + 1000;
    if (entry.state == RequestState::kDone && entry.charge_microdollars != full) {
      Violate(absl::StrCat(entry.request, " is charged ", entry.charge_microdollars));
    }
    if (entry.state == RequestState::kExpired && entry.charge_microdollars != 0) {
      Violate(absl::StrCat(entry.request, " expired and is charged"));
    }
  }
  history_.erase(
      std::remove_if(history_.begin(), history_.end(),
                     [&](const HistoryEvent& event) { return lost_.count(event.request) > 0; }),
      history_.end());
  for (const std::string& line : CheckHistory(history_, /*complete=*/true)) Violate(line);
  const absl::StatusOr<QueueStats> stats = queue.Stats();
  CINNABAR_CHECK(stats.ok()) << stats.status().ToString();
  if (stats->live != 0 || stats->cost != 0 || stats->batches != 0 || stats->ready_packs != 0) {
    Violate(absl::StrCat("left behind: ", stats->live, " requests, ", stats->cost, " token-steps, ",
                         stats->batches, " batches, ", stats->ready_packs, " packs"));
  }
  const auto state = CheckQueueState(redis_.control(), absl::StrCat("cb:{", kPartition, "}:"));
  CINNABAR_CHECK(state.ok()) << state.status().ToString();
  for (const std::string& line : *state) Violate(line);
}

SimReport Simulation::Run(const LibraryEdit* edit) {
  CINNABAR_CHECK(redis_.Reset(edit).ok());
  begin_ = env_.now();
  CINNABAR_CHECK(redis_.SetTime(begin_).ok());
  for (int32_t i = 0; i < kSimGateways; ++i) {
    gateways_.push_back(std::make_unique<Line>(redis_, env_));
  }
  for (int32_t i = 0; i < kSimSchedulers; ++i) StartScheduler(i);
  for (int32_t i = 0; i < kSimWorkers; ++i) StartWorker(i);
  MakeClients();
  PlanFaults();
  absl::Time until = begin_ + kGiveUp;
  bool settling = false;
  while (!agenda_.empty()) {
    const auto next = agenda_.begin();
    env_.AdvanceTo(next->first.first);
    if (env_.now() > until) break;
    const std::function<void()> act = std::move(next->second);
    agenda_.erase(next);
    CINNABAR_CHECK(redis_.SetTime(env_.now()).ok());
    act();
    const bool all_done =
        std::all_of(clients_.begin(), clients_.end(),
                    [](const std::unique_ptr<Client>& client) { return client->done; });
    if (!settling && all_done && faults_over()) {
      settling = true;
      until = env_.now() + kSettle;
    }
  }
  CheckEnd();
  return std::move(report_);
}

}  // namespace

SimFaults FaultsOf(uint64_t seed) {
  SimFaults faults;
  faults.processes = seed % 4 == 1;
  faults.outages = seed % 4 == 2;
  faults.rewinds = seed % 4 == 3;
  return faults;
}

SimReport SimulateCluster(VirtualRedis& redis, SimModels& models, uint64_t seed,
                          const LibraryEdit* edit) {
  return Simulation(redis, models, seed).Run(edit);
}

}  // namespace cinnabar
