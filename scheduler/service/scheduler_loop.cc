#include "scheduler/service/scheduler_loop.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/log.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr int32_t kFeedEntries = 1024;
constexpr absl::Duration kFollowerPause = absl::Milliseconds(10);

std::string NewBoot() {
  std::random_device entropy;
  return absl::StrFormat("%08x%08x", entropy(), entropy());
}

}  // namespace

SchedulerLoop::SchedulerLoop(SchedulerOptions options, SchedulerMetrics& metrics)
    : options_(std::move(options)),
      metrics_(metrics),
      redis_(options_.redis, *options_.environment),
      queue_(redis_, options_.queue),
      view_(options_.view),
      boot_(options_.boot.empty() ? NewBoot() : options_.boot) {}

void SchedulerLoop::Run() {
  int32_t failures = 0;
  while (!stopping_) {
    const absl::Status status = Turn(options_.block_max);
    if (status.ok()) {
      failures = 0;
      if (!leading_) redis_.environment().Sleep(std::max(renew_at_ - Now(), kFollowerPause));
      continue;
    }
    LogEvery(absl::Seconds(5), LogLevel::kWarn, "redis_failed", {{"error", status}});
    redis_.environment().Sleep(RedisBackoff(options_.redis.retry, std::min(++failures + 1, 6),
                                            redis_.environment().Uniform()));
  }
  if (leading_) (void)queue_.Resign(options_.name).ok();
}

absl::Status SchedulerLoop::Turn(absl::Duration block) {
  absl::Status status = Serve(block);
  connected_ = status.ok();
  if (!status.ok()) metrics_.RedisError();
  // What was missed meanwhile, or forgotten by a Redis that started anew behind a call that was
  // repeated, is unknown: the lead is asked for again, and with it comes a scan.
  if (!status.ok() || queue_.mark().restarts != restarts_) LoseLead();
  restarts_ = queue_.mark().restarts;
  return status;
}

absl::Time SchedulerLoop::next_due() const {
  return leading_ ? std::min({renew_at_, look_at_, reap_at_, plan_at_}) : renew_at_;
}

void SchedulerLoop::LoseLead() {
  leading_ = false;
  metrics_.Leading(false);
  renew_at_ = absl::InfinitePast();
}

absl::Status SchedulerLoop::Serve(absl::Duration block) {
  const absl::Time now = Now();
  if (now >= renew_at_) CINNABAR_RETURN_IF_ERROR(Lead(now));
  if (!leading_) return absl::OkStatus();
  if (now >= look_at_) {
    look_at_ = now + options_.look_every;
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<WorkerEntry> workers, queue_.Workers());
    view_.SetWorkers(workers, now);
    changed_ = true;
    metrics_.Show(view_, now);
  }
  if (now >= reap_at_) {
    reap_at_ = now + options_.reap_every;
    CINNABAR_ASSIGN_OR_RETURN(const ReapResult reaped, queue_.Reap(epoch_, options_.reap));
    if (reaped.stale_epoch) {
      LoseLead();
      return absl::OkStatus();
    }
    metrics_.Reaped(reaped);
    if (reaped.requeued + reaped.not_started + reaped.dead + reaped.expired > 0) {
      Log(LogLevel::kInfo, "reaped",
          {{"lease_expired", reaped.requeued},
           {"not_started", reaped.not_started},
           {"dead_letters", reaped.dead},
           {"expired", reaped.expired}});
    }
  }
  if (changed_ || now >= plan_at_) CINNABAR_RETURN_IF_ERROR(Plan(now));
  return leading_ ? Follow(std::min(next_due() - Now(), block)) : absl::OkStatus();
}

absl::Status SchedulerLoop::Lead(absl::Time now) {
  CINNABAR_ASSIGN_OR_RETURN(const Leadership lead, queue_.Lead(options_.name, options_.lease_for));
  renew_at_ = now + (lead.leading ? options_.renew_every
                                  : std::min(options_.renew_every, absl::Milliseconds(500)));
  const bool was = leading_;
  leading_ = lead.leading;
  metrics_.Leading(leading_);
  if (!lead.leading) {
    if (was) Log(LogLevel::kWarn, "lead_lost", {{"leader", lead.leader}});
    return absl::OkStatus();
  }
  if (was && lead.epoch == epoch_) return absl::OkStatus();
  epoch_ = lead.epoch;
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<WaitingRequest> waiting,
                            queue_.ScanWaiting(options_.scan_max, position_));
  view_.Scan(waiting);
  look_at_ = reap_at_ = absl::InfinitePast();
  changed_ = true;
  Log(LogLevel::kInfo, "leads", {{"epoch", epoch_}, {"waiting", waiting.size()}});
  return absl::OkStatus();
}

absl::Status SchedulerLoop::Follow(absl::Duration block) {
  CINNABAR_ASSIGN_OR_RETURN(const Feed feed, queue_.ReadFeed(position_, kFeedEntries, block));
  position_ = feed.position;
  const absl::Time came = Now();
  for (const FeedEntry& entry : feed.entries) view_.Apply(entry, came);
  changed_ = changed_ || !feed.entries.empty();
  if (feed.gap) {
    Log(LogLevel::kWarn, "feed_gap", {});
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<WaitingRequest> waiting,
                              queue_.ScanWaiting(options_.scan_max, position_));
    view_.Scan(waiting);
    changed_ = true;
  }
  return absl::OkStatus();
}

absl::Status SchedulerLoop::Plan(absl::Time now) {
  changed_ = false;
  absl::Time next = absl::InfiniteFuture();
  const std::vector<PlanRequest> waiting = view_.Waiting(now, next);
  const std::vector<WorkerState> workers = view_.Workers();
  const absl::Time begin = Now();
  ::cinnabar::Plan plan =
      PlanPacks(waiting, workers, view_.cost(), view_.shares(), options_.plan, now);
  metrics_.Planned(Now() - begin, plan);
  view_.shares() = plan.shares;
  plan_at_ = std::min(next, plan.next);
  std::vector<PackOrder> orders;
  orders.reserve(plan.packs.size());
  for (const PlannedPack& pack : plan.packs) orders.push_back(Order(pack));
  if (!orders.empty()) {
    const auto results = queue_.DispatchAll(epoch_, orders);
    absl::Status status;
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].ok()) {
        Dispatched(plan.packs[i], orders[i], *results[i], now);
      } else {
        status = results[i].status();
      }
    }
    CINNABAR_RETURN_IF_ERROR(status);
    if (!leading_) return absl::OkStatus();
  }
  return Refuse(plan);
}

absl::Status SchedulerLoop::Refuse(const ::cinnabar::Plan& plan) {
  // They end as cancelled with this reason, which the gateway tells their clients, free of charge.
  for (const RefusalReason reason : {RefusalReason::kTooLong, RefusalReason::kDeadlineInfeasible}) {
    std::vector<std::string> requests;
    for (const Refusal& refusal : plan.refused) {
      if (refusal.reason != reason) continue;
      requests.push_back(view_.Request(refusal.id).id);
      metrics_.Refused(reason);
    }
    if (requests.empty()) continue;
    CINNABAR_ASSIGN_OR_RETURN(
        const RefuseResult result,
        queue_.Refuse(epoch_,
                      reason == RefusalReason::kTooLong ? "too_long" : "deadline_infeasible",
                      requests));
    if (result.stale_epoch) {
      LoseLead();
      return absl::OkStatus();
    }
  }
  for (const Refusal& refusal : plan.refused) view_.Forget(refusal.id);
  // The reaper ends what has expired; here it is no longer planned.
  for (const RequestId id : plan.expired) view_.Forget(id);
  return absl::OkStatus();
}

PackOrder SchedulerLoop::Order(const PlannedPack& pack) {
  PackOrder order;
  order.batch = absl::StrCat(epoch_, "-", boot_, "-", num_batches_++);
  order.lane = view_.Lane(pack.worker);
  order.ready_packs_max = options_.ready_packs_max;
  order.start_within = options_.start_within;
  v1::PackInfo info;
  info.set_model(view_.ModelName(pack.bucket.model));
  info.set_length_bucket(pack.bucket.length);
  info.set_steps_bucket(pack.bucket.steps);
  for (const PackMember& member : pack.members) {
    const WaitingRequest& request = view_.Request(member.id);
    order.requests.push_back(request.id);
    v1::WorkHint hint;
    if (hint.ParseFromString(request.hint) && member.steps_budget < hint.steps_budget()) {
      (*info.mutable_steps_budget())[request.id] = member.steps_budget;
    }
  }
  order.info = info.SerializeAsString();
  return order;
}

void SchedulerLoop::Dispatched(const PlannedPack& pack, const PackOrder& order,
                               const DispatchResult& result, absl::Time now) {
  switch (result.outcome) {
    case DispatchResult::Outcome::kStaleEpoch:
      Log(LogLevel::kWarn, "epoch_stale", {{"epoch", epoch_}});
      LoseLead();
      return;
    case DispatchResult::Outcome::kReadyFull:
      plan_at_ = std::min(plan_at_, now + absl::Milliseconds(20));  // they wait on
      return;
    case DispatchResult::Outcome::kOk:
      break;
  }
  PlannedPack taken = pack;
  taken.members.clear();
  for (size_t i = 0; i < pack.members.size() && i < result.rows.size(); ++i) {
    const PackMember& member = pack.members[i];
    metrics_.Verdict(result.rows[i].verdict);
    switch (result.rows[i].verdict) {
      case DispatchVerdict::kOk:
        taken.members.push_back(member);
        break;
      case DispatchVerdict::kGone:
      case DispatchVerdict::kNotQueued:
      case DispatchVerdict::kExpired:
        view_.Forget(member.id);
        break;
      case DispatchVerdict::kBackoff:
      case DispatchVerdict::kSuspect:
        // Our picture of it is old: the next scan or feed entry mends it; not at once again.
        view_.Postpone(member.id, now + absl::Seconds(1));
        break;
    }
  }
  if (taken.members.empty()) return;
  metrics_.Dispatched(static_cast<int32_t>(taken.members.size()));
  view_.Dispatched(order.batch, taken, now);
}

}  // namespace cinnabar
