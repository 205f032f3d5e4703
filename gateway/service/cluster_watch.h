// Looks at the cluster now and then: which workers serve which models, and how long the queue is.
#ifndef CINNABAR_GATEWAY_SERVICE_CLUSTER_WATCH_H_
#define CINNABAR_GATEWAY_SERVICE_CLUSTER_WATCH_H_

#include <atomic>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/queue/queue.h"
#include "gateway/service/model_directory.h"

namespace cinnabar {

// Thread-safe. Keeps `models` up to date.
class ClusterWatch {
 public:
  ClusterWatch(RedisOptions redis, QueueOptions queue, ModelDirectory& models,
               absl::Duration every);
  ~ClusterWatch();
  ClusterWatch(const ClusterWatch&) = delete;

  // Nothing when requests can be taken, else what is missing.
  std::string Missing() const;
  // How long a request that comes now will wait, roughly: what Retry-After is made of.
  absl::Duration WaitEstimate() const;

 private:
  void Watch();
  absl::Status Look(Queue& queue);

  const RedisOptions redis_;
  const QueueOptions queue_;
  ModelDirectory& models_;
  const absl::Duration every_;
  std::atomic<bool> stopping_ = false;
  mutable Mutex mu_;  // leaf
  ConditionVariable stop_;
  absl::Time looked_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Duration wait_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_CLUSTER_WATCH_H_
