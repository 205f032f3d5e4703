#include "scheduler/service/cluster_view.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/request/sampler_catalog.h"

namespace cinnabar {
namespace {

int32_t SamplerIndex(const std::string& name) {
  const absl::Span<const SamplerEntry> catalog = SamplerCatalog();
  for (size_t i = 0; i < catalog.size(); ++i) {
    if (catalog[i].name == absl::string_view(name)) return static_cast<int32_t>(i);
  }
  return -1;
}

PriorityClass ToPriority(RequestClass request_class) {
  switch (request_class) {
    case RequestClass::kInteractive:
      return PriorityClass::kInteractive;
    case RequestClass::kStandard:
      return PriorityClass::kStandard;
    case RequestClass::kBatch:
      return PriorityClass::kBatch;
  }
  CINNABAR_CHECK(false) << "not a class: " << static_cast<int>(request_class);
}

}  // namespace

ClusterView::ClusterView(ClusterViewOptions options) : options_(options) {}

int32_t ClusterView::ModelIndex(const std::string& model, const std::string& fingerprint) {
  const std::string key = absl::StrCat(model, "\n", fingerprint);
  const auto [found, added] = models_.emplace(key, static_cast<int32_t>(model_names_.size()));
  if (added) model_names_.push_back(model);
  return found->second;
}

TenantIndex ClusterView::Tenant(const std::string& name) {
  const auto found = tenants_.find(name);
  if (found != tenants_.end()) return found->second;
  // More tenants than we tell apart share one turn.
  if (static_cast<int32_t>(tenants_.size()) >= options_.tenants_max) return options_.tenants_max;
  const auto index = static_cast<TenantIndex>(tenants_.size());
  tenants_.emplace(name, index);
  return index;
}

void ClusterView::Add(const WaitingRequest& request) {
  v1::WorkHint hint;
  if (!hint.ParseFromString(request.hint)) ++num_unreadable_;  // planned as it can be
  if (static_cast<int64_t>(waiting_.size()) >= options_.waiting_max) return;
  PlanRequest plan;
  plan.id = request.sequence;
  plan.tenant = Tenant(request.tenant);
  plan.tenant_weight = hint.tenant_weight() > 0 ? hint.tenant_weight() : 1.0;
  plan.priority = ToPriority(request.request_class);
  plan.kind = {.model = ModelIndex(hint.model(), hint.model_fingerprint()),
               .sampler = SamplerIndex(hint.sampler()),
               .threshold_percent = std::clamp(hint.threshold_percent(), 0, 100)};
  plan.sequence_tokens = static_cast<int32_t>(
      std::clamp<int64_t>(request.prompt_tokens + request.canvas_tokens, 1, INT32_MAX));
  plan.canvas_tokens =
      static_cast<int32_t>(std::clamp<int64_t>(request.canvas_tokens, 1, plan.sequence_tokens));
  plan.steps_done = std::max(request.step, 0);
  const int32_t budget = hint.steps_budget() > 0 ? hint.steps_budget() : request.steps_max;
  plan.steps_budget = std::max(budget, plan.steps_done + 1);
  plan.steps_min = std::clamp(hint.steps_min(), 0, plan.steps_budget);
  if (plan.steps_done > 0) plan.steps_min = 0;  // what it began with holds
  plan.suspect = request.attempts_without_progress > 0;
  plan.arrival = request.enqueued_at;
  plan.deadline = request.deadline;
  ids_[request.id] = plan.id;
  waiting_[plan.id] = {.request = request, .plan = plan};
}

void ClusterView::Forget(RequestId id) {
  const auto found = waiting_.find(id);
  if (found == waiting_.end()) return;
  ids_.erase(found->second.request.id);
  waiting_.erase(found);
}

void ClusterView::Postpone(RequestId id, absl::Time until) {
  const auto found = waiting_.find(id);
  if (found != waiting_.end()) found->second.request.not_before = until;
}

void ClusterView::Scan(const std::vector<WaitingRequest>& waiting) {
  waiting_.clear();
  ids_.clear();
  for (const WaitingRequest& request : waiting) Add(request);
}

void ClusterView::Apply(const FeedEntry& entry, absl::Time now) {
  switch (entry.kind) {
    case FeedEntry::Kind::kQueued: {
      // Queued again: it is not on a worker any more.
      for (auto& [batch, sent] : sent_) sent.rows.erase(entry.request.id);
      Add(entry.request);
      return;
    }
    case FeedEntry::Kind::kPackStarted: {
      const auto found = sent_.find(entry.batch);
      if (found != sent_.end()) found->second.at = now;
      return;
    }
    case FeedEntry::Kind::kTerminal: {
      const auto waits = ids_.find(entry.request.id);
      if (waits != ids_.end()) Forget(waits->second);
      for (auto& [lane, worker] : workers_) {
        auto& rows = *worker.status.mutable_rows();
        rows.erase(std::remove_if(rows.begin(), rows.end(),
                                  [&](const v1::WorkerStatus::Row& row) {
                                    return row.request() == entry.request.id;
                                  }),
                   rows.end());
      }
      for (auto it = sent_.begin(); it != sent_.end();) {
        it->second.rows.erase(entry.request.id);
        it = it->second.rows.empty() ? sent_.erase(it) : std::next(it);
      }
      v1::WorkHint hint;
      if (entry.state == RequestState::kDone && entry.request.step > 0 &&
          hint.ParseFromString(entry.request.hint) && hint.steps_budget() > 0) {
        ObserveSteps({.kind = {.model = ModelIndex(hint.model(), hint.model_fingerprint()),
                               .sampler = SamplerIndex(hint.sampler()),
                               .threshold_percent = std::clamp(hint.threshold_percent(), 0, 100)},
                      .canvas_tokens =
                          static_cast<int32_t>(std::max<int64_t>(entry.request.canvas_tokens, 1)),
                      .steps_budget = hint.steps_budget(),
                      .steps_used = std::min(entry.request.step, hint.steps_budget())},
                     cost_);
      }
      return;
    }
  }
}

void ClusterView::SetWorkers(const std::vector<WorkerEntry>& workers, absl::Time now) {
  std::set<std::string> alive;
  for (const WorkerEntry& entry : workers) {
    v1::WorkerStatus status;
    if (!status.ParseFromString(entry.state) || status.worker().empty()) {
      ++num_unreadable_;
      continue;
    }
    const std::string lane = status.worker();
    alive.insert(lane);
    Worker& worker = workers_[lane];
    if (worker.id == 0) {
      worker.id = next_worker_++;
      lanes_[worker.id] = lane;
    }
    if (worker.boot != entry.boot) {
      worker.boot = entry.boot;
      worker.samples_seen = 0;
    }
    const int32_t model = ModelIndex(status.model(), status.model_fingerprint());
    const int64_t fresh =
        std::clamp<int64_t>(status.samples_end() - worker.samples_seen, 0, status.samples_size());
    for (int64_t i = status.samples_size() - fresh; i < status.samples_size(); ++i) {
      const v1::WorkerStatus::StepSample& sample = status.samples(static_cast<int>(i));
      ObserveStep(
          model,
          {.rows = sample.rows(), .positions = sample.positions(), .seconds = sample.seconds()},
          cost_);
    }
    worker.samples_seen = status.samples_end();
    // What the worker reports itself need not be remembered as sent.
    for (auto& [batch, sent] : sent_) {
      if (sent.worker != lane) continue;
      for (const v1::WorkerStatus::Row& row : status.rows()) sent.rows.erase(row.request());
    }
    worker.status = std::move(status);
  }
  for (auto it = workers_.begin(); it != workers_.end();) {
    if (alive.count(it->first) > 0) {
      ++it;
      continue;
    }
    lanes_.erase(it->second.id);
    it = workers_.erase(it);
  }
  for (auto it = sent_.begin(); it != sent_.end();) {
    const bool over = it->second.rows.empty() || now - it->second.at > options_.sent_max ||
                      workers_.find(it->second.worker) == workers_.end();
    it = over ? sent_.erase(it) : std::next(it);
  }
}

void ClusterView::Dispatched(const std::string& batch, const PlannedPack& pack, absl::Time now) {
  Sent& sent = sent_[batch];
  sent.worker = Lane(pack.worker);
  sent.at = now;
  for (const PackMember& member : pack.members) {
    const auto found = waiting_.find(member.id);
    if (found == waiting_.end()) continue;  // refused by the queue
    const PlanRequest& plan = found->second.plan;
    sent.rows[found->second.request.id] = {.id = plan.id,
                                           .kind = plan.kind,
                                           .sequence_tokens = plan.sequence_tokens,
                                           .canvas_tokens = plan.canvas_tokens,
                                           .steps_budget = member.steps_budget,
                                           .steps_done = plan.steps_done,
                                           .suspect = plan.suspect,
                                           .deadline = plan.deadline};
    Forget(member.id);
  }
}

std::vector<PlanRequest> ClusterView::Waiting(absl::Time now, absl::Time& next) const {
  std::vector<PlanRequest> ready;
  ready.reserve(waiting_.size());
  for (const auto& [id, entry] : waiting_) {
    if (entry.request.not_before > now) {
      next = std::min(next, entry.request.not_before);
    } else {
      ready.push_back(entry.plan);
    }
  }
  return ready;
}

std::vector<WorkerState> ClusterView::Workers() const {
  std::vector<WorkerState> states;
  for (const auto& [lane, worker] : workers_) {
    const v1::WorkerStatus& status = worker.status;
    const auto model = models_.find(absl::StrCat(status.model(), "\n", status.model_fingerprint()));
    WorkerState state;
    state.id = worker.id;
    state.model = model->second;
    state.rows_max = status.rows_max();
    state.tokens_max = status.tokens_max();
    state.tokens_target = std::min(status.tokens_target(), status.tokens_max());
    state.accepting = !status.draining();
    int64_t made_up = -1;  // ids of rows that we know from the beat alone: never those of requests
    for (const v1::WorkerStatus::Row& row : status.rows()) {
      state.rows.push_back({.id = made_up--,
                            .kind = {.model = state.model, .sampler = -1},
                            .sequence_tokens = std::max(row.sequence_tokens(), 1),
                            .canvas_tokens = std::max(row.canvas_tokens(), 1),
                            .steps_budget = std::max(row.steps_budget(), row.step() + 1),
                            .steps_done = row.step()});
    }
    for (const auto& [batch, sent] : sent_) {
      if (sent.worker != lane) continue;
      for (const auto& [request, row] : sent.rows) state.rows.push_back(row);
    }
    states.push_back(std::move(state));
  }
  return states;
}

const WaitingRequest& ClusterView::Request(RequestId id) const {
  const auto found = waiting_.find(id);
  CINNABAR_CHECK(found != waiting_.end()) << "request " << id << " does not wait";
  return found->second.request;
}

const std::string& ClusterView::Lane(int32_t worker) const {
  const auto found = lanes_.find(worker);
  CINNABAR_CHECK(found != lanes_.end()) << "no worker " << worker;
  return found->second;
}

std::string ClusterView::ModelName(int32_t model) const {
  return model >= 0 && model < static_cast<int32_t>(model_names_.size())
             ? model_names_[static_cast<size_t>(model)]
             : "";
}

std::map<std::string, ClusterView::ModelLoad> ClusterView::LoadByModel() const {
  std::map<std::string, ModelLoad> loads;
  for (const auto& [id, entry] : waiting_) {
    const PlanRequest& plan = entry.plan;
    ModelLoad& load = loads[ModelName(plan.kind.model)];
    ++load.waiting;
    const StepsForecast forecast = ForecastSteps(
        BlendFractions(cost_, plan.kind, plan.canvas_tokens), plan.steps_budget, plan.steps_done);
    load.token_steps += forecast.mean * plan.sequence_tokens;
    load.device_seconds += forecast.mean * PredictStepSeconds(StepTimeOf(cost_, plan.kind.model), 1,
                                                              plan.sequence_tokens);
  }
  for (const auto& [lane, worker] : workers_) {
    ModelLoad& load = loads[worker.status.model()];
    if (!worker.status.draining()) ++load.workers;
    load.rows += worker.status.rows_size();
  }
  return loads;
}

std::array<ClusterView::ClassLoad, kNumClasses> ClusterView::LoadByClass(absl::Time now) const {
  std::array<ClassLoad, kNumClasses> loads = {};
  for (const auto& [id, entry] : waiting_) {
    ClassLoad& load = loads[static_cast<size_t>(entry.plan.priority)];
    ++load.waiting;
    load.token_steps += entry.request.cost;
    load.oldest = std::max(load.oldest, now - entry.plan.arrival);
  }
  return loads;
}

}  // namespace cinnabar
