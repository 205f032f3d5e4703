#include "gateway/service/cluster_watch.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "common/base/log.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr absl::Duration kStale = absl::Seconds(5);

}  // namespace

ClusterWatch::ClusterWatch(RedisOptions redis, QueueOptions queue, ModelDirectory& models,
                           absl::Duration every)
    : redis_(std::move(redis)), queue_(std::move(queue)), models_(models), every_(every) {
  thread_ = std::thread([this] { Watch(); });
}

ClusterWatch::~ClusterWatch() {
  stopping_ = true;
  stop_.NotifyAll();
  thread_.join();
}

std::string ClusterWatch::Missing() const {
  {
    MutexLock lock(mu_);
    if (absl::Now() - looked_at_ > kStale) return "Redis is not there";
  }
  return models_.AllServed() ? "" : "a model has no worker";
}

absl::Duration ClusterWatch::WaitEstimate() const {
  MutexLock lock(mu_);
  return wait_;
}

// Workers tell how fast they compute positions and how much they hold; the queue how much waits.
absl::Status ClusterWatch::Look(Queue& queue) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<WorkerEntry> entries, queue.Workers());
  std::vector<v1::WorkerStatus> workers;
  double positions_per_second = 0;
  for (const WorkerEntry& entry : entries) {
    v1::WorkerStatus status;
    if (!status.ParseFromString(entry.state)) continue;
    double seconds = 0;
    double positions = 0;
    for (const v1::WorkerStatus::StepSample& sample : status.samples()) {
      seconds += sample.seconds();
      positions += static_cast<double>(sample.positions());
    }
    if (seconds > 0 && !status.draining()) positions_per_second += positions / seconds;
    workers.push_back(std::move(status));
  }
  models_.Update(workers);
  CINNABAR_ASSIGN_OR_RETURN(const QueueStats stats, queue.Stats());
  MutexLock lock(mu_);
  looked_at_ = absl::Now();
  wait_ = positions_per_second > 0
              ? absl::Seconds(static_cast<double>(stats.cost) / positions_per_second)
              : absl::Seconds(2);
  return absl::OkStatus();
}

void ClusterWatch::Watch() {
  RedisClient redis(redis_);
  Queue queue(redis, queue_);
  while (!stopping_) {
    if (const absl::Status status = Look(queue); !status.ok()) {
      LogEvery(absl::Seconds(5), LogLevel::kWarn, "redis_failed", {{"error", status}});
    }
    const absl::Time next = absl::Now() + every_;
    MutexLock lock(mu_);
    while (!stopping_ && absl::Now() < next) stop_.WaitFor(mu_, next - absl::Now());
  }
}

}  // namespace cinnabar
