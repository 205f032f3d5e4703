#include "worker/service/publisher.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/base/log.h"

namespace cinnabar {
namespace {

constexpr size_t kStepsPerCall = 512;

}  // namespace

Publisher::Publisher(std::string boot, absl::Duration lease_for,
                     std::function<void(const RowLease& row)> dropped)
    : boot_(std::move(boot)), lease_for_(lease_for), dropped_(std::move(dropped)) {}

void Publisher::Start(const RedisOptions& redis, const QueueOptions& queue,
                      Environment& environment) {
  CINNABAR_CHECK(!thread_.joinable()) << "started twice";
  thread_ = std::thread([this, redis, queue, &environment] { Serve(redis, queue, environment); });
}

Publisher::~Publisher() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  if (thread_.joinable()) thread_.join();
}

void Publisher::Open(const RowLease& lease, int32_t step, std::vector<std::string> deltas) {
  MutexLock lock(mu_);
  Row row;
  row.lease = lease;
  row.first = step + 1 - static_cast<int32_t>(deltas.size());
  for (std::string& delta : deltas) {
    const int32_t number = row.first + static_cast<int32_t>(row.kept.size());
    row.kept.push_back({.lease = lease, .step = number, .delta = std::move(delta)});
  }
  row.num_sent = row.kept.size();
  rows_.insert_or_assign(lease.request, std::move(row));
}

Publisher::Row* Publisher::Find(const RowLease& lease) {
  const auto found = rows_.find(lease.request);
  return found != rows_.end() && found->second.lease == lease ? &found->second : nullptr;
}

void Publisher::Step(ProgressRow progress) {
  MutexLock lock(mu_);
  Row* const found = Find(progress.lease);
  if (found == nullptr) return;  // dropped meanwhile
  Row& row = *found;
  if (row.kept.empty()) row.first = progress.step;
  CINNABAR_CHECK(progress.step == row.first + static_cast<int32_t>(row.kept.size()))
      << "steps come in order";
  row.kept.push_back(std::move(progress));
  ++counters_.pending;
  changed_.NotifyAll();
}

void Publisher::Finish(FinishRow end) {
  MutexLock lock(mu_);
  Row* const found = Find(end.lease);
  if (found == nullptr) return;
  found->finish = std::move(end);
  changed_.NotifyAll();
}

void Publisher::HandBack(HandBackRow row) {
  MutexLock lock(mu_);
  Row* const found = Find(row.lease);
  if (found == nullptr) return;
  found->hand_back = std::move(row);
  changed_.NotifyAll();
}

void Publisher::Drop(const RowLease& lease) {
  MutexLock lock(mu_);
  Row* const found = Find(lease);
  if (found == nullptr) return;
  counters_.pending -= static_cast<int64_t>(found->kept.size() - found->num_sent);
  rows_.erase(lease.request);
  changed_.NotifyAll();
}

bool Publisher::AwaitRoom(int64_t steps_max, absl::Duration timeout) {
  const absl::Time until = absl::Now() + timeout;
  MutexLock lock(mu_);
  while (counters_.pending > steps_max) {
    const absl::Duration left = until - absl::Now();
    if (left <= absl::ZeroDuration()) return false;
    changed_.WaitFor(mu_, left);
  }
  return true;
}

bool Publisher::Idle() const {
  return !sending_ && counters_.pending == 0 &&
         std::none_of(rows_.begin(), rows_.end(), [](const auto& row) {
           return row.second.finish.has_value() || row.second.hand_back.has_value();
         });
}

bool Publisher::Flush(absl::Duration timeout) {
  const absl::Time until = absl::Now() + timeout;
  MutexLock lock(mu_);
  while (!Idle()) {
    const absl::Duration left = until - absl::Now();
    if (left <= absl::ZeroDuration()) return false;
    changed_.WaitFor(mu_, left);
  }
  return true;
}

PublisherCounters Publisher::counters() const {
  MutexLock lock(mu_);
  return counters_;
}

void Publisher::Rewind(Row& row, int32_t step) {
  // Redis has `step`: what follows is sent again. What came before our first kept step is gone for
  // good; then the row starts anew elsewhere, with what Redis has.
  const int32_t from = std::max(step + 1 - row.first, 0);
  row.num_sent = std::min(static_cast<size_t>(from), row.kept.size());
}

void Publisher::Forget(const RowLease& lease, RowVerdict verdict, std::vector<RowLease>& dropped) {
  Row* const found = Find(lease);
  if (found == nullptr) return;
  if (verdict == RowVerdict::kStale) ++counters_.fenced;
  if (verdict == RowVerdict::kGone) ++counters_.lost;
  counters_.pending -= static_cast<int64_t>(found->kept.size() - found->num_sent);
  dropped.push_back(lease);
  rows_.erase(lease.request);
}

void Publisher::Settle(const PublishReport& report, const PublishReply& reply) {
  std::vector<RowLease> dropped;
  {
    MutexLock lock(mu_);
    const auto judge = [&](const RowLease& lease, const RowReply& answer, bool end) {
      Row* const found = Find(lease);
      // The answer may be to a row that was dropped, or started again, meanwhile.
      if (found == nullptr) return;
      Row& row = *found;
      switch (answer.verdict) {
        case RowVerdict::kOk:
          if (end) rows_.erase(lease.request);
          return;
        case RowVerdict::kRewind: {
          const auto before = static_cast<int64_t>(row.num_sent);
          if (answer.step + 1 < row.first) {
            return Forget(lease, RowVerdict::kGone, dropped);
          }
          Rewind(row, answer.step);
          counters_.pending += before - static_cast<int64_t>(row.num_sent);
          ++counters_.rewinds;
          return;
        }
        case RowVerdict::kBadStep:
          Log(LogLevel::kError, "bad_step",
              {{"request", lease.request}, {"redis_step", answer.step}});
          [[fallthrough]];
        case RowVerdict::kGone:
        case RowVerdict::kStale:
        case RowVerdict::kDone:
        case RowVerdict::kFailed:
        case RowVerdict::kCancelled:
        case RowVerdict::kExpired:
          return Forget(lease, answer.verdict, dropped);
      }
    };
    for (size_t i = 0; i < report.progress.size() && i < reply.progress.size(); ++i) {
      judge(report.progress[i].lease, reply.progress[i], /*end=*/false);
    }
    for (size_t i = 0; i < report.finished.size() && i < reply.finished.size(); ++i) {
      judge(report.finished[i].lease, reply.finished[i], /*end=*/true);
    }
  }
  for (const RowLease& lease : dropped) dropped_(lease);
}

void Publisher::Serve(const RedisOptions& redis, const QueueOptions& options,
                      Environment& environment) {
  RedisClient client(redis, environment);
  Queue queue(client, options);
  for (;;) {
    {
      MutexLock lock(mu_);
      while (!stopping_ && Idle()) changed_.Wait(mu_);
      if (stopping_) return;
    }
    if (!Send(queue)) environment.Sleep(absl::Milliseconds(200));
  }
}

bool Publisher::Send(Queue& queue) {
  PublishReport report;
  report.lease_for = lease_for_;
  std::vector<HandBackRow> hand_back;
  {
    MutexLock lock(mu_);
    for (auto& [request, row] : rows_) {
      while (row.num_sent < row.kept.size() && report.progress.size() < kStepsPerCall) {
        report.progress.push_back(row.kept[row.num_sent]);
        // A snapshot is only wanted at its own step; a replay does without it.
        row.kept[row.num_sent].snapshot.clear();
        ++row.num_sent;
        --counters_.pending;
        ++counters_.steps;
        if (!report.progress.back().snapshot.empty()) ++counters_.snapshots;
      }
      if (row.num_sent < row.kept.size()) continue;
      if (row.finish.has_value()) {
        report.finished.push_back(*row.finish);
      } else if (row.hand_back.has_value()) {
        hand_back.push_back(*row.hand_back);
      }
    }
    if (report.progress.empty() && report.finished.empty() && hand_back.empty()) return true;
    sending_ = true;
    ++counters_.calls;
  }
  bool away = false;
  if (!report.progress.empty() || !report.finished.empty()) {
    const absl::StatusOr<PublishReply> reply = queue.Publish(boot_, report);
    away = !reply.ok();
    if (reply.ok()) {
      Settle(report, *reply);
    } else {
      LogEvery(absl::Seconds(5), LogLevel::kWarn, "publish_failed", {{"error", reply.status()}});
    }
  }
  if (!away && !hand_back.empty()) {
    const absl::StatusOr<std::vector<RowReply>> replies = queue.HandBack(boot_, hand_back);
    away = !replies.ok();
    MutexLock lock(mu_);
    for (size_t i = 0; replies.ok() && i < replies->size() && i < hand_back.size(); ++i) {
      if (Find(hand_back[i].lease) == nullptr) continue;
      if ((*replies)[i].verdict == RowVerdict::kStale) ++counters_.fenced;
      rows_.erase(hand_back[i].lease.request);
    }
  }
  MutexLock lock(mu_);
  sending_ = false;
  if (away) {
    ++counters_.failures;
    // What was in the call may have arrived or not: it is sent again, and twice is once.
    for (auto step = report.progress.rbegin(); step != report.progress.rend(); ++step) {
      Row* const found = Find(step->lease);
      if (found == nullptr) continue;
      Row& row = *found;
      const size_t index = static_cast<size_t>(step->step - row.first);
      if (index < row.num_sent) {
        counters_.pending += static_cast<int64_t>(row.num_sent - index);
        row.num_sent = index;
      }
    }
  }
  changed_.NotifyAll();
  return !away;
}

}  // namespace cinnabar
