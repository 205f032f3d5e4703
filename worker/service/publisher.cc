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

Publisher::Publisher(RedisOptions redis, QueueOptions queue, std::string boot,
                     absl::Duration lease_for,
                     std::function<void(const std::string& request)> dropped)
    : redis_(std::move(redis)),
      queue_(std::move(queue)),
      boot_(std::move(boot)),
      lease_for_(lease_for),
      dropped_(std::move(dropped)) {
  thread_ = std::thread([this] { Serve(); });
}

Publisher::~Publisher() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
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

void Publisher::Step(ProgressRow progress) {
  MutexLock lock(mu_);
  const auto found = rows_.find(progress.lease.request);
  if (found == rows_.end()) return;  // dropped meanwhile
  Row& row = found->second;
  if (row.kept.empty()) row.first = progress.step;
  CINNABAR_CHECK(progress.step == row.first + static_cast<int32_t>(row.kept.size()))
      << "steps come in order";
  row.kept.push_back(std::move(progress));
  ++counters_.pending;
  changed_.NotifyAll();
}

void Publisher::Finish(FinishRow end) {
  MutexLock lock(mu_);
  const auto found = rows_.find(end.lease.request);
  if (found == rows_.end()) return;
  found->second.finish = std::move(end);
  changed_.NotifyAll();
}

void Publisher::HandBack(HandBackRow row) {
  MutexLock lock(mu_);
  const auto found = rows_.find(row.lease.request);
  if (found == rows_.end()) return;
  found->second.hand_back = std::move(row);
  changed_.NotifyAll();
}

void Publisher::Drop(const std::string& request) {
  MutexLock lock(mu_);
  const auto found = rows_.find(request);
  if (found == rows_.end()) return;
  counters_.pending -= static_cast<int64_t>(found->second.kept.size() - found->second.num_sent);
  rows_.erase(found);
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

void Publisher::Forget(const std::string& request, RowVerdict verdict,
                       std::vector<std::string>& dropped) {
  const auto found = rows_.find(request);
  if (found == rows_.end()) return;
  if (verdict == RowVerdict::kStale) ++counters_.fenced;
  if (verdict == RowVerdict::kGone) ++counters_.lost;
  counters_.pending -= static_cast<int64_t>(found->second.kept.size() - found->second.num_sent);
  rows_.erase(found);
  dropped.push_back(request);
}

void Publisher::Settle(const PublishReport& report, const PublishReply& reply) {
  std::vector<std::string> dropped;
  {
    MutexLock lock(mu_);
    const auto judge = [&](const RowLease& lease, const RowReply& answer, bool end) {
      const auto found = rows_.find(lease.request);
      // The answer may be to a row that was dropped, or started again, meanwhile.
      if (found == rows_.end() || found->second.lease.attempt != lease.attempt) return;
      Row& row = found->second;
      switch (answer.verdict) {
        case RowVerdict::kOk:
          if (end) rows_.erase(found);
          return;
        case RowVerdict::kRewind: {
          const auto before = static_cast<int64_t>(row.num_sent);
          if (answer.step + 1 < row.first) {
            return Forget(lease.request, RowVerdict::kGone, dropped);
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
          return Forget(lease.request, answer.verdict, dropped);
      }
    };
    for (size_t i = 0; i < report.progress.size() && i < reply.progress.size(); ++i) {
      judge(report.progress[i].lease, reply.progress[i], /*end=*/false);
    }
    for (size_t i = 0; i < report.finished.size() && i < reply.finished.size(); ++i) {
      judge(report.finished[i].lease, reply.finished[i], /*end=*/true);
    }
  }
  for (const std::string& request : dropped) dropped_(request);
}

void Publisher::Serve() {
  RedisClient redis(redis_);
  Queue queue(redis, queue_);
  LogLimiter limiter(absl::Seconds(5));
  for (;;) {
    PublishReport report;
    report.lease_for = lease_for_;
    std::vector<HandBackRow> hand_back;
    {
      MutexLock lock(mu_);
      while (!stopping_ && Idle()) changed_.Wait(mu_);
      if (stopping_) return;
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
        const int64_t held = limiter.Admit(absl::Now());
        if (held >= 0) {
          Log(LogLevel::kWarn, "publish_failed",
              {{"error", reply.status().ToString()}, {"repeated", held}});
        }
      }
    }
    if (!away && !hand_back.empty()) {
      const absl::StatusOr<std::vector<RowReply>> replies = queue.HandBack(boot_, hand_back);
      away = !replies.ok();
      MutexLock lock(mu_);
      for (size_t i = 0; replies.ok() && i < replies->size() && i < hand_back.size(); ++i) {
        const auto found = rows_.find(hand_back[i].lease.request);
        if (found == rows_.end()) continue;
        if ((*replies)[i].verdict == RowVerdict::kStale) ++counters_.fenced;
        rows_.erase(found);
      }
    }
    {
      MutexLock lock(mu_);
      sending_ = false;
      if (away) {
        ++counters_.failures;
        // What was in the call may have arrived or not: it is sent again, and twice is once.
        for (auto step = report.progress.rbegin(); step != report.progress.rend(); ++step) {
          const auto found = rows_.find(step->lease.request);
          if (found == rows_.end() || found->second.lease.attempt != step->lease.attempt) continue;
          Row& row = found->second;
          const size_t index = static_cast<size_t>(step->step - row.first);
          if (index < row.num_sent) {
            counters_.pending += static_cast<int64_t>(row.num_sent - index);
            row.num_sent = index;
          }
        }
      }
      changed_.NotifyAll();
    }
    if (away) absl::SleepFor(absl::Milliseconds(200));
  }
}

}  // namespace cinnabar
