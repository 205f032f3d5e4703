// The scheduler's picture of the cluster, made of what the queue's feed, the workers' beats and its
// own dispatches tell. Pure: time comes in, nothing is read or sent. It may be wrong for a moment
// (a beat is a second old); then a dispatch is refused, and nothing worse.
#ifndef CINNABAR_SCHEDULER_SERVICE_CLUSTER_VIEW_H_
#define CINNABAR_SCHEDULER_SERVICE_CLUSTER_VIEW_H_

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "cinnabar/v1/work.pb.h"
#include "common/queue/types.h"
#include "scheduler/planning.h"

namespace cinnabar {

struct ClusterViewOptions {
  int64_t waiting_max = 200'000;  // beyond it new ones are left to the next scan
  int32_t tenants_max = 100'000;
  // A pack that a worker has not reported within this has been taken by nobody, or its beat was
  // lost: the rows are forgotten here. Longer than start_within of the dispatch and a beat.
  absl::Duration sent_max = absl::Seconds(12);
};

// One thread at a time.
class ClusterView {
 public:
  explicit ClusterView(ClusterViewOptions options = {});

  // --- what happened
  void Scan(const std::vector<WaitingRequest>& waiting);  // all that wait; replaces the set
  void Apply(const FeedEntry& entry, absl::Time now);
  void SetWorkers(const std::vector<WorkerEntry>& workers, absl::Time now);
  // `dispatched` went to a worker as `batch`; its rows no longer wait.
  void Dispatched(const std::string& batch, const PlannedPack& pack, absl::Time now);
  // A request that the queue did not let go: it is not waiting, whatever we thought.
  void Forget(RequestId id);
  // Not before then (a suspect's back-off, by the queue's clock).
  void Postpone(RequestId id, absl::Time until);

  // --- what PlanPacks needs
  // Those that may be dispatched now; `next` becomes the earliest time at which another may.
  std::vector<PlanRequest> Waiting(absl::Time now, absl::Time& next) const;
  std::vector<WorkerState> Workers() const;
  const CostModel& cost() const { return cost_; }
  ShareState& shares() { return shares_; }

  // --- names
  // CHECKs that the id waits.
  const WaitingRequest& Request(RequestId id) const;
  // The lane of a worker of the last Workers().
  const std::string& Lane(int32_t worker) const;
  std::string ModelName(int32_t model) const;

  // --- for metrics and notes
  struct ModelLoad {
    int64_t waiting = 0;
    int64_t workers = 0;  // that take work
    int64_t rows = 0;
    double token_steps = 0;     // predicted, of what waits
    double device_seconds = 0;  // predicted, of what waits and runs
  };
  std::map<std::string, ModelLoad> LoadByModel() const;
  struct ClassLoad {
    int64_t waiting = 0;
    int64_t token_steps = 0;
    absl::Duration oldest;
  };
  std::array<ClassLoad, kNumClasses> LoadByClass(absl::Time now) const;
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_workers() const { return static_cast<int64_t>(workers_.size()); }
  // Hints of requests and states of workers, so far.
  int64_t num_unreadable() const { return num_unreadable_; }

 private:
  struct Waiting_ {
    WaitingRequest request;
    PlanRequest plan;
  };
  struct Sent {
    std::string worker;  // lane
    absl::Time at;
    std::map<std::string, RunningRow> rows;
  };
  struct Worker {
    int32_t id = 0;
    v1::WorkerStatus status;
    std::string boot;
    int64_t samples_seen = 0;
  };

  void Add(const WaitingRequest& request);
  int32_t ModelIndex(const std::string& model, const std::string& fingerprint);
  TenantIndex Tenant(const std::string& name);

  const ClusterViewOptions options_;
  CostModel cost_;
  ShareState shares_;
  std::map<RequestId, Waiting_> waiting_;
  absl::flat_hash_map<std::string, RequestId> ids_;  // of those that wait
  std::map<std::string, Worker> workers_;            // by lane
  std::map<int32_t, std::string> lanes_;             // by worker id
  std::map<std::string, Sent> sent_;                 // by batch
  absl::flat_hash_map<std::string, int32_t> models_;
  std::vector<std::string> model_names_;
  absl::flat_hash_map<std::string, TenantIndex> tenants_;
  int32_t next_worker_ = 1;
  int64_t num_unreadable_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_SCHEDULER_SERVICE_CLUSTER_VIEW_H_
