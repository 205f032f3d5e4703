// The scheduler's life: lead or stand by; follow the feed, plan, dispatch; take back what dead
// workers held. Its memory is a cache: losing it costs a scan.
#ifndef CINNABAR_SCHEDULER_SERVICE_SCHEDULER_LOOP_H_
#define CINNABAR_SCHEDULER_SERVICE_SCHEDULER_LOOP_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/queue/queue.h"
#include "scheduler/service/cluster_view.h"
#include "scheduler/service/scheduler_metrics.h"

namespace cinnabar {

struct SchedulerOptions {
  RedisOptions redis;
  QueueOptions queue;
  std::string name;  // unique among the schedulers
  PlanOptions plan;
  ReapLimits reap;
  ClusterViewOptions view;
  absl::Duration lease_for = absl::Seconds(5);
  absl::Duration renew_every = absl::Seconds(1);
  absl::Duration look_every = absl::Milliseconds(250);  // at the workers
  absl::Duration reap_every = absl::Seconds(1);
  absl::Duration block_max = absl::Milliseconds(250);  // waiting for the feed
  int64_t ready_packs_max = 4;                         // on a worker's lane, not started
  absl::Duration start_within = absl::Seconds(10);
  int64_t scan_max = 200'000;
  std::string boot;  // of this object, never used before; empty: a random one
  Environment* environment = &Environment::Real();  // borrowed
};

class SchedulerLoop {
 public:
  // `metrics` is borrowed and outlives it.
  SchedulerLoop(SchedulerOptions options, SchedulerMetrics& metrics);

  // Serves until Stop(), then gives up the lead. Redis being away is waited out.
  void Run();
  // What Run() does again and again, for a caller that is one thread and has no Run(): whatever is
  // due, then the feed, waited for up to `block`. After an error the lead is asked for again.
  absl::Status Turn(absl::Duration block);
  // When a turn has something to do by the clock.
  absl::Time next_due() const;
  void Stop() { stopping_ = true; }  // from any thread
  bool leading() const { return leading_; }
  bool connected() const { return connected_; }

 private:
  absl::Status Serve(absl::Duration block);
  absl::Status Lead(absl::Time now);
  absl::Status Follow(absl::Duration block);
  absl::Status Plan(absl::Time now);
  PackOrder Order(const PlannedPack& pack);
  void Dispatched(const PlannedPack& pack, const PackOrder& order, const DispatchResult& result,
                  absl::Time now);
  absl::Status Refuse(const ::cinnabar::Plan& plan);
  void LoseLead();
  absl::Time Now() const { return options_.environment->Now(); }

  const SchedulerOptions options_;
  SchedulerMetrics& metrics_;
  RedisClient redis_;
  Queue queue_;
  ClusterView view_;
  int64_t epoch_ = 0;
  // Ids of batches never come twice: whoever leads again keeps its epoch, in this process or in one
  // that was started in its place, and an id that is known means a repeated call to the queue.
  const std::string boot_;
  int64_t num_batches_ = 0;
  std::string position_;  // in the feed
  int64_t restarts_ = 0;  // of Redis, that have been answered with a scan
  bool changed_ = true;   // something to plan for
  absl::Time renew_at_ = absl::InfinitePast();
  absl::Time look_at_ = absl::InfinitePast();
  absl::Time reap_at_ = absl::InfinitePast();
  absl::Time plan_at_ = absl::InfinitePast();
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> leading_ = false;
  std::atomic<bool> connected_ = false;
};

}  // namespace cinnabar

#endif  // CINNABAR_SCHEDULER_SERVICE_SCHEDULER_LOOP_H_
