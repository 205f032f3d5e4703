#include "worker/service/worker_loop.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/program/program.h"
#include "common/wire/model_traits_wire.h"

namespace cinnabar {
namespace {

constexpr absl::Duration kTakeBlock = absl::Milliseconds(500);
constexpr size_t kSamplesMax = 64;
constexpr int kDeviceFailuresMax = 3;

v1::WorkerStatus::Row Describe(const RowLease& lease, const SequenceState& state, int32_t step) {
  v1::WorkerStatus::Row row;
  row.set_request(lease.request);
  row.set_step(step);
  row.set_sequence_tokens(state.canvas.length());
  row.set_canvas_tokens(state.canvas.end - state.canvas.begin);
  row.set_steps_budget(state.params.num_steps);
  return row;
}

}  // namespace

WorkerLoop::WorkerLoop(WorkerOptions options, Denoiser& denoiser, WorkerMetrics& metrics)
    : options_(std::move(options)),
      denoiser_(denoiser),
      metrics_(metrics),
      engine_(std::make_unique<Engine>(denoiser, options_.engine)),
      started_(Now()),
      publisher_(options_.boot, options_.lease_for, [this](const RowLease& row) { Dropped(row); }) {
}

WorkerLoop::~WorkerLoop() {
  stopping_ = draining_ = true;
  if (intake_.joinable()) intake_.join();
  if (heartbeat_.joinable()) heartbeat_.join();
}

void WorkerLoop::Drain() {
  draining_ = true;
  changed_.NotifyAll();
}

std::string WorkerLoop::Missing() const {
  if (draining_) return "draining";
  MutexLock lock(mu_);
  return registered_ ? "" : "not yet registered with Redis";
}

void WorkerLoop::Dropped(const RowLease& row) {
  MutexLock lock(mu_);
  const auto batch = batches_.find(row.batch);
  if (batch == batches_.end() || batch->second.count(row) == 0) return;  // it has left already
  dropped_.insert(row);
  changed_.NotifyAll();
}

// --- Intake: packs from the lane -----------------------------------------------------------------

bool WorkerLoop::WantsRows() {
  MutexLock lock(mu_);
  const size_t held = running_.size() + incoming_.size();
  return !solo_held_ && held < static_cast<size_t>(options_.engine.limits.sequences_max);
}

void WorkerLoop::Intake() {
  RedisClient redis(options_.redis, *options_.environment);
  Queue queue(redis, options_.queue);
  while (!draining_) {
    if (!WantsRows()) {
      MutexLock lock(mu_);
      changed_.WaitFor(mu_, absl::Milliseconds(20));
      continue;
    }
    const absl::Status status = TakePack(queue, kTakeBlock);
    if (!status.ok()) {
      LogEvery(absl::Seconds(5), LogLevel::kWarn, "take_failed", {{"error", status}});
      options_.environment->Sleep(absl::Milliseconds(200));
    }
  }
}

absl::Status WorkerLoop::TakePack(Queue& queue, absl::Duration block) {
  if (draining_ || !WantsRows()) return absl::OkStatus();
  CINNABAR_ASSIGN_OR_RETURN(const std::optional<Pack> pack, queue.TakePack(options_.name, block));
  if (pack.has_value()) TakeRows(queue, *pack);
  return absl::OkStatus();
}

void WorkerLoop::TakeRows(Queue& queue, const Pack& pack) {
  const absl::StatusOr<StartResult> started =
      queue.Start(options_.boot, pack.batch, options_.lease_for);
  if (!started.ok()) {  // it is queued again when its lease runs out
    Log(LogLevel::kWarn, "start_failed",
        {{"batch", pack.batch}, {"error", started.status().ToString()}});
    return;
  }
  if (started->outcome != StartResult::Outcome::kOk) return;
  v1::PackInfo info;
  (void)info.ParseFromString(pack.info);  // without it budgets are as asked for
  for (const StartedRow& row : started->rows) {
    const auto budget = info.steps_budget().find(row.lease.request);
    absl::StatusOr<RowPlan> plan =
        BuildRow(row, budget == info.steps_budget().end() ? 0 : budget->second, denoiser_.traits(),
                 options_.fingerprint);
    publisher_.Open(row.lease, row.step, row.deltas);
    if (!plan.ok()) {
      if (absl::IsFailedPrecondition(plan.status())) {
        publisher_.HandBack({.lease = row.lease});
      } else {
        Log(LogLevel::kWarn, "row_refused",
            {{"request", row.lease.request}, {"error", plan.status().ToString()}});
        publisher_.Finish({.lease = row.lease,
                           .last_step = row.step,
                           .failed = true,
                           .usage = row.usage,
                           .why = "malformed"});
      }
      continue;
    }
    metrics_.RowStarted(row.step > 0);
    MutexLock lock(mu_);
    // An earlier hold on the same request may still run here (this process was frozen meanwhile).
    for (const auto& [batch, rows] : batches_) {
      for (const RowLease& held : rows) {
        if (held.request == row.lease.request) dropped_.insert(held);
      }
    }
    batches_[row.lease.batch].insert(row.lease);
    solo_held_ = solo_held_ || pack.solo;
    incoming_.push_back({.lease = row.lease,
                         .plan = *std::move(plan),
                         .step = row.step,
                         .usage = row.usage,
                         .deadline = Now() + row.deadline_in,
                         .solo = pack.solo});
    changed_.NotifyAll();
  }
}

// --- Heartbeat -----------------------------------------------------------------------------------

v1::WorkerStatus WorkerLoop::Status() {
  MutexLock lock(mu_);
  v1::WorkerStatus status = totals_;
  status.set_format(1);
  status.set_worker(options_.name);
  status.set_host(HostName());
  status.set_device(options_.device);
  status.set_dtype(options_.dtype);
  status.set_model(options_.model);
  status.set_model_fingerprint(options_.fingerprint);
  *status.mutable_traits() = ToWire(denoiser_.traits());
  const ForwardLimits& limits = options_.engine.limits;
  status.set_rows_max(limits.sequences_max);
  status.set_tokens_max(limits.rows_max);
  status.set_tokens_target(options_.tokens_target > 0 ? options_.tokens_target : limits.rows_max);
  status.set_positions_max(limits.positions_max);
  status.set_draining(draining_);
  for (const auto& [lease, row] : running_) *status.add_rows() = row;
  for (const Incoming& row : incoming_) {
    *status.add_rows() = Describe(row.lease, row.plan.state, row.step);
  }
  for (const v1::WorkerStatus::StepSample& sample : samples_) *status.add_samples() = sample;
  status.set_uptime_seconds(absl::ToDoubleSeconds(Now() - started_));
  status.set_dollars_per_hour(options_.dollars_per_hour);
  status.set_weights_bytes(denoiser_.memory().weights_bytes);
  status.set_kv_bytes(kv_bytes_);
  status.set_metrics_address(options_.metrics_address);
  return status;
}

void WorkerLoop::Heartbeat() {
  RedisClient redis(options_.redis, *options_.environment);
  Queue queue(redis, options_.queue);
  while (!stopping_) {
    Beat(queue);
    const absl::Time next = Now() + options_.beat_every;
    MutexLock lock(mu_);
    while (!stopping_ && Now() < next) beat_.WaitFor(mu_, next - Now());
  }
  (void)queue.Leave(options_.boot).ok();
}

void WorkerLoop::Beat(Queue& queue) {
  absl::Duration step_age;
  std::vector<std::string> batches;
  int64_t num_rows = 0;
  {
    MutexLock lock(mu_);
    num_rows = static_cast<int64_t>(running_.size());
    step_age = std::max(Now() - step_began_, absl::ZeroDuration());
    for (const auto& [batch, rows] : batches_) batches.push_back(batch);
  }
  const bool hung = step_age > options_.hang_after;
  if (hung && !told_of_hang_) {
    Log(LogLevel::kError, "device_hangs", {{"step_age_ms", step_age}});
  }
  told_of_hang_ = hung;
  metrics_.Set(publisher_.counters());
  metrics_.SetState(Missing().empty(), draining_, step_age, num_rows, denoiser_.memory(),
                    kv_bytes_);
  if (hung) return;
  const absl::StatusOr<BeatReply> reply = queue.Beat(
      options_.boot, Status().SerializeAsString(), options_.alive_for, options_.lease_for, batches);
  if (reply.ok() && reply->drain && !draining_) {
    Log(LogLevel::kInfo, "drain_asked", {});
    Drain();
  }
  MutexLock lock(mu_);
  registered_ = reply.ok() && reply->registered;
  if (!reply.ok()) return;
  for (const std::string& batch : reply->lost_batches) {
    const auto found = batches_.find(batch);
    if (found == batches_.end()) continue;
    for (const RowLease& row : found->second) {
      dropped_.insert(row);
      lost_.push_back(row);
    }
    batches_.erase(found);
  }
  changed_.NotifyAll();
}

// --- Compute -------------------------------------------------------------------------------------

std::string WorkerLoop::Snapshot(const SequenceState& state) const {
  return ToWire(state, options_.fingerprint).SerializeAsString();
}

void WorkerLoop::JoinRows() {
  for (;;) {
    Incoming row;
    {
      MutexLock lock(mu_);
      if (incoming_.empty()) return;
      // A suspect runs alone, in its turn.
      if (solo_running_ || (incoming_.front().solo && !active_.empty())) return;
      row = std::move(incoming_.front());
      incoming_.pop_front();
      if (dropped_.erase(row.lease) > 0) {
        Release(row.lease, row.solo);
        continue;
      }
      running_[row.lease] = Describe(row.lease, row.plan.state, row.step);
    }
    Active active = {.lease = row.lease,
                     .facts = row.plan.facts,
                     .step = row.step,
                     .snapshot_step = 0,
                     .usage = row.usage,
                     .solo = row.solo};
    // Taken over between its last step and its end.
    const bool complete = row.plan.state.decoding.finished ||
                          AnswerIsComplete(row.plan.state, row.plan.facts, denoiser_.traits());
    if (complete) {
      EndRow(active, row.plan.state, absl::OkStatus());
      continue;
    }
    const SequenceState before = row.plan.state;
    absl::StatusOr<SequenceId> id = engine_->Add(std::move(row.plan.state), row.deadline);
    if (id.ok()) {
      solo_running_ = row.solo;
      active_.emplace(*id, std::move(active));
      continue;
    }
    if (absl::IsResourceExhausted(id.status()) && !active_.empty()) {
      // No memory now: it waits here for the next row that leaves.
      row.plan.state = before;
      MutexLock lock(mu_);
      running_.erase(row.lease);
      incoming_.push_front(std::move(row));
      return;
    }
    Log(LogLevel::kWarn, "row_does_not_fit",
        {{"request", row.lease.request}, {"error", id.status().ToString()}});
    if (absl::IsResourceExhausted(id.status())) {
      HandBack(active, before);
    } else {
      EndRow(active, before, id.status());
    }
  }
}

void WorkerLoop::Release(const RowLease& lease, bool solo) {
  running_.erase(lease);
  dropped_.erase(lease);
  const auto batch = batches_.find(lease.batch);
  if (batch != batches_.end()) {
    batch->second.erase(lease);
    if (batch->second.empty()) batches_.erase(batch);
  }
  if (solo) solo_held_ = false;
  changed_.NotifyAll();
}

void WorkerLoop::DropRows() {
  std::vector<RowLease> lost;
  std::set<RowLease> dropped;
  {
    MutexLock lock(mu_);
    lost.swap(lost_);
    // Rows that have not joined are looked for when they do.
    for (const auto& [id, row] : active_) {
      if (dropped_.erase(row.lease) > 0) dropped.insert(row.lease);
    }
  }
  for (const RowLease& row : lost) publisher_.Drop(row);
  for (auto it = active_.begin(); it != active_.end();) {
    const Active& row = it->second;
    if (dropped.count(row.lease) == 0) {
      ++it;
      continue;
    }
    (void)engine_->Remove(it->first).ok();
    metrics_.RowEnded("dropped", row.step, 0);
    if (row.solo) solo_running_ = false;
    {
      MutexLock lock(mu_);
      Release(row.lease, row.solo);
    }
    it = active_.erase(it);
  }
}

void WorkerLoop::EndRow(const Active& row, const SequenceState& state, const absl::Status& status) {
  FinishRow end = {.lease = row.lease, .last_step = row.step, .usage = row.usage};
  if (status.ok()) {
    const v1::WorkResult result = MakeResult(state, row.facts, denoiser_.traits(), row.usage);
    end.why = result.end_of_text() ? "stop" : "length";
    end.result = result.SerializeAsString();
    publisher_.Finish(std::move(end));
    metrics_.RowEnded("done", row.step,
                      static_cast<double>(row.usage.output_tokens) /
                          static_cast<double>(std::max<int64_t>(row.usage.forwards, 1)));
  } else if (absl::IsDeadlineExceeded(status)) {
    // Redis ends it by its own clock.
    publisher_.HandBack({.lease = row.lease});
    metrics_.RowEnded("expired", row.step, 0);
  } else {
    end.failed = true;
    end.why = absl::IsDataLoss(status) ? "not_finite" : "does_not_fit";
    Log(LogLevel::kWarn, "row_failed",
        {{"request", row.lease.request}, {"step", row.step}, {"error", status.ToString()}});
    publisher_.Finish(std::move(end));
    metrics_.RowEnded("failed", row.step, 0);
  }
  MutexLock lock(mu_);
  if (status.ok()) totals_.set_requests_finished(totals_.requests_finished() + 1);
  Release(row.lease, row.solo);
}

void WorkerLoop::HandBack(const Active& row, const SequenceState& state) {
  publisher_.HandBack({.lease = row.lease,
                       .snapshot_step = row.step,
                       .snapshot = row.step > 0 ? Snapshot(state) : ""});
  metrics_.RowEnded("handed_back", row.step, 0);
  MutexLock lock(mu_);
  Release(row.lease, row.solo);
}

void WorkerLoop::HandBackRows(bool all) {
  for (auto it = active_.begin(); it != active_.end();) {
    const SequenceState* state = engine_->Find(it->first);
    CINNABAR_CHECK(state != nullptr);
    const int32_t left = std::max(state->params.num_steps - state->decoding.step, 1);
    if (!all && left * step_time_ <= options_.drain_for) {
      ++it;
      continue;
    }
    HandBack(it->second, *state);
    if (it->second.solo) solo_running_ = false;
    (void)engine_->Remove(it->first).ok();
    it = active_.erase(it);
  }
  HandBackIncoming();
}

void WorkerLoop::HandBackIncoming() {
  std::deque<Incoming> incoming;
  {
    MutexLock lock(mu_);
    incoming.swap(incoming_);
  }
  for (const Incoming& row : incoming) {
    HandBack({.lease = row.lease, .facts = row.plan.facts, .step = row.step, .solo = row.solo},
             row.plan.state);
  }
}

void WorkerLoop::AbandonRows() {
  for (const auto& [id, row] : active_) {
    abandoned_.insert(row.lease.batch);
    metrics_.RowEnded("abandoned", row.step, 0);
    MutexLock lock(mu_);
    Release(row.lease, row.solo);
  }
  active_.clear();
  HandBackIncoming();
}

void WorkerLoop::Report(const StepReport& report, absl::Duration step_time) {
  std::map<SequenceId, SequenceState> finished;
  for (auto& [id, state] : engine_->TakeFinished()) finished.emplace(id, std::move(state));
  // Device time is shared out by length: what a row's step computed.
  int64_t lengths = 0;
  std::set<SequenceId> stepped;
  for (const StepEvent& event : report.events) {
    const auto row = active_.find(event.sequence);
    if (row != active_.end() && stepped.insert(event.sequence).second) {
      lengths += row->second.facts.length;
    }
  }
  int64_t committed = 0;
  stepped.clear();
  for (const StepEvent& event : report.events) {
    const auto found = active_.find(event.sequence);
    if (found == active_.end()) continue;
    Active& row = found->second;
    const auto ended = finished.find(event.sequence);
    const SequenceState* state =
        ended != finished.end() ? &ended->second : engine_->Find(event.sequence);
    CINNABAR_CHECK(state != nullptr);
    if (stepped.insert(event.sequence).second && lengths > 0) {
      row.usage.device_us += absl::ToInt64Microseconds(step_time) * row.facts.length / lengths;
    }
    const bool made_step = event.step >= row.step && event.status.ok();
    if (made_step) {
      int32_t in_answer = 0;
      for (const Transfer& transfer : report.TransfersOf(event)) {
        if (transfer.position < row.facts.length) in_answer += transfer.num_committed();
      }
      // A model without a mask token decides every position again each step, and commits at the
      // end.
      if (denoiser_.traits().mask_token >= 0 || event.settled) {
        row.usage.output_tokens += in_answer;
        committed += in_answer;
      }
      row.usage.forwards += event.forward ? 1 : 0;
      row.step = event.step + 1;
      ProgressRow progress = {.lease = row.lease, .step = row.step, .usage = row.usage};
      progress.delta =
          MakeDelta(report, event, *state, row.facts, denoiser_.traits(), step_time, row.usage)
              .SerializeAsString();
      // The state is behind the turn: it is that of this step when no other of the turn follows.
      if (row.step - row.snapshot_step >= options_.snapshot_every &&
          state->decoding.step == row.step && !event.finished) {
        progress.snapshot = Snapshot(*state);
        row.snapshot_step = row.step;
      }
      publisher_.Step(std::move(progress));
      MutexLock lock(mu_);
      running_[row.lease].set_step(row.step);
    }
    const bool complete = !event.finished && state->decoding.step == row.step &&
                          AnswerIsComplete(*state, row.facts, denoiser_.traits());
    if (event.finished || complete) {
      if (row.solo) solo_running_ = false;
      EndRow(row, *state, event.status);
      if (complete) (void)engine_->Remove(event.sequence).ok();
      active_.erase(found);
    }
  }
  metrics_.StepDone(static_cast<int32_t>(stepped.size()), committed,
                    options_.engine.limits.sequences_max, step_time);
  metrics_.Set(engine_->counters());
  MutexLock lock(mu_);
  totals_.set_forwards(totals_.forwards() + report.num_forwards);
  totals_.set_steps(totals_.steps() + static_cast<int64_t>(report.events.size()));
  totals_.set_tokens_committed(totals_.tokens_committed() + committed);
  totals_.set_positions_computed(totals_.positions_computed() + report.rows);
  totals_.set_device_busy_seconds(totals_.device_busy_seconds() + absl::ToDoubleSeconds(step_time));
  if (report.rows > 0) {
    v1::WorkerStatus::StepSample& sample = samples_.emplace_back();
    sample.set_rows(static_cast<int32_t>(stepped.size()));
    sample.set_positions(report.rows);
    sample.set_seconds(absl::ToDoubleSeconds(step_time));
    if (samples_.size() > kSamplesMax) samples_.pop_front();
    totals_.set_samples_end(totals_.samples_end() + 1);
  }
}

void WorkerLoop::StopIntake() {
  draining_ = drained_ = true;
  if (intake_.joinable()) intake_.join();
}

WorkerLoop::Turn WorkerLoop::Compute() {
  JoinRows();
  DropRows();
  kv_bytes_ = engine_->kv_bytes();
  if (draining_ && !drained_) {
    StopIntake();
    drain_until_ = Now() + options_.drain_for;
    Log(LogLevel::kInfo, "drains", {{"rows", active_.size()}});
    HandBackRows(/*all=*/false);
  }
  if (drained_ && Now() >= drain_until_) HandBackRows(/*all=*/true);
  if (active_.empty()) return drained_ ? Turn::kEnded : Turn::kIdle;
  if (!publisher_.AwaitRoom(options_.unpublished_steps_max, absl::Milliseconds(200))) {
    return Turn::kRedisIsLate;
  }
  const absl::Time begin = Now();
  {
    MutexLock lock(mu_);
    step_began_ = begin;
  }
  // A pass that was begun ahead has kept the device at work since the last step.
  const absl::Time device_begin = engine_->pass_under_way() ? step_ended_ : begin;
  const absl::Status status = engine_->Step(begin, report_);
  step_ended_ = Now();
  step_time_ = step_ended_ - device_begin;
  {
    MutexLock lock(mu_);
    step_began_ = absl::InfiniteFuture();
  }
  Report(report_, step_time_);
  if (status.ok()) {
    device_failures_ = 0;
    return Turn::kStepped;
  }
  metrics_.DeviceError();
  Log(LogLevel::kError, "device_failed",
      {{"error", status.ToString()}, {"in_a_row", ++device_failures_}});
  // A device that is gone does not come back to this process; any other error may pass.
  if (!absl::IsUnavailable(status) && device_failures_ < kDeviceFailuresMax) return Turn::kStepped;
  // Others may have a device that works; this process has not. Which row broke it nobody knows: all
  // that ran are suspects.
  result_ = absl::AbortedError(absl::StrCat("the device failed: ", status.message()));
  StopIntake();
  AbandonRows();
  return Turn::kEnded;
}

absl::Status WorkerLoop::Run() {
  publisher_.Start(options_.redis, options_.queue, *options_.environment);
  intake_ = std::thread([this] { Intake(); });
  heartbeat_ = std::thread([this] { Heartbeat(); });
  for (Turn turn = Turn::kIdle; turn != Turn::kEnded; turn = Compute()) {
    if (turn != Turn::kIdle) continue;
    MutexLock lock(mu_);
    if (incoming_.empty() && !draining_) changed_.WaitFor(mu_, absl::Milliseconds(100));
  }
  if (!publisher_.Flush(options_.lease_for)) {
    Log(LogLevel::kWarn, "left_unpublished", {{"steps", publisher_.counters().pending}});
  }
  stopping_ = true;
  beat_.NotifyAll();
  heartbeat_.join();
  if (!abandoned_.empty()) {
    RedisClient redis(options_.redis, *options_.environment);
    Queue queue(redis, options_.queue);
    const std::vector<std::string> batches(abandoned_.begin(), abandoned_.end());
    // Without it their leases run out.
    (void)queue.Abandon(options_.boot, batches).ok();
  }
  return result_;
}

}  // namespace cinnabar
