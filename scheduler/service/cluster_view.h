// The scheduler's picture of the cluster, made of what the queue's feed, the workers' beats and the
// answers to its own dispatches tell. Pure: time comes in (by the queue's clock), nothing is read or
// sent. It may be wrong for a moment, since a beat is a second old and others change the queue too;
// then a dispatch is refused, which says so, and nothing worse happens.
//
// A request is known here in one of two places: it waits, or it is in flight (sent to a worker, or
// begun there). What ends, vanishes or is lost track of is forgotten; when it is queued again the
// feed brings all of it back. The planner's name of a request is its arrival number in the queue,
// which it keeps when it is queued again.
#ifndef CINNABAR_SCHEDULER_SERVICE_CLUSTER_VIEW_H_
#define CINNABAR_SCHEDULER_SERVICE_CLUSTER_VIEW_H_

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "cinnabar/v1/work.pb.h"
#include "common/queue/types.h"
#include "scheduler/planning.h"

namespace cinnabar {

struct ClusterViewOptions {
  int64_t waiting_max = 200'000;  // beyond it new ones are left to a scan: wants_scan()
  int32_t tenants_max = 100'000;  // beyond it new ones share one turn
  int32_t models_max = 1024;      // beyond it a new one's requests wait
  int32_t ready_packs_max = 2;    // sent to a worker and not begun
  absl::Duration start_within = absl::Seconds(10);  // as PackOrder's
  absl::Duration silent_after = absl::Seconds(3);   // a worker whose beat is older gets nothing
  absl::Duration unnamed_max = absl::Seconds(3);    // a row that no beat names for so long has left
  absl::Duration lane_full_for = absl::Milliseconds(200);  // after the queue said so
  // Handed back twice or more without a step in between: the wait before it is sent again, doubling.
  absl::Duration hand_back_hold = absl::Milliseconds(50);
  absl::Duration hand_back_hold_max = absl::Seconds(2);
  absl::Duration endless_after = absl::Hours(1);  // a deadline further away is none for the planner
};

// A request as the scheduler knows it.
struct KnownRequest {
  enum class Place { kWaiting, kSent, kRunning };
  std::string id;
  PlanRequest plan;         // steps_budget: as granted once it has begun
  int32_t steps_asked = 0;  // the budget it came with
  int64_t cost = 0;         // token-steps, predicted at its admission
  Place place = Place::kWaiting;
  absl::Time not_before = absl::InfinitePast();  // waiting: a back-off
  int32_t num_returns = 0;  // times in a row that a worker handed it back without a step
  int32_t worker = 0;       // in flight: the planner's; 0: one that we have not heard of
  std::string batch;        // sent: its pack
  int32_t steps_sent = 0;   // in flight: the steps it had when it was sent
  absl::Time since;         // in flight: when it was sent, begun, or last named by a beat
};

// One thread at a time.
class ClusterView {
 public:
  explicit ClusterView(ClusterViewOptions options = {});

  // --- What happened.
  // All that wait, as read from the queue: what waits here and is not among them is forgotten.
  void Scan(absl::Span<const WaitingRequest> waiting, absl::Time now);
  void Apply(const FeedEntry& entry, absl::Time now);
  // All workers that are registered. A beat may be given many times.
  void SetWorkers(absl::Span<const WorkerEntry> workers, absl::Time now);
  // The queue's answer (kOk) to a pack; `rows` as the pack's members.
  void Dispatched(const PlannedPack& pack, const std::string& batch,
                  absl::Span<const DispatchResult::Row> rows, absl::Time now);
  // The queue holds as many packs for it as it may.
  void LaneFull(int32_t worker, absl::Time now);
  // Ended, expired or gone: it does not wait, whatever we thought. Nothing when it is unknown.
  void Forget(RequestId id);
  // Everything but what was learned: the queue lost changes that we have seen.
  void Reset();

  // Something is missing that only a scan (a look at the workers) can bring.
  bool wants_scan() const;
  bool wants_look() const { return wants_look_; }

  // --- What PlanPacks needs. Ids as in Request(), workers as in Lane().
  // Those that may be dispatched now; `next` is lowered to the time at which another may.
  std::vector<PlanRequest> Waiting(absl::Time now, absl::Time& next) const;
  // Rows with the steps that they should have made since their worker last told.
  std::vector<WorkerState> Workers(absl::Time now) const;
  const CostModel& cost() const { return cost_; }
  const ShareState& shares() const { return shares_; }
  void set_shares(ShareState shares) { shares_ = std::move(shares); }
  // The packs of a plan, as many for a worker as it may be sent: what is beyond goes with its last.
  // Packs with a suspect stay alone.
  std::vector<PlannedPack> FitLanes(std::vector<PlannedPack> packs) const;

  // --- Names. The id, and the worker, must be known (CINNABAR_CHECK).
  bool Waits(RequestId id) const { return waiting_.find(id) != waiting_.end(); }
  const KnownRequest& Request(RequestId id) const;
  const std::string& Lane(int32_t worker) const;
  std::string ModelName(int32_t model) const;   // "" for an unknown one
  std::string TenantName(TenantIndex tenant) const;

  // --- For metrics and notes.
  struct ClassLoad {
    int64_t waiting = 0;
    double token_steps = 0;  // as predicted at admission, of the steps that are left
    absl::Duration oldest;
  };
  struct ModelLoad {
    std::array<ClassLoad, kNumClasses> classes = {};
    int32_t workers = 0;  // that take work
    int32_t rows = 0;     // running, or sent
    double tokens_per_second = 0;
  };
  // By model's number; of those that are served or waited for.
  std::map<int32_t, ModelLoad> Loads(absl::Time now) const;
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_in_flight() const { return static_cast<int64_t>(in_flight_.size()); }
  int64_t num_workers() const { return static_cast<int64_t>(workers_.size()); }
  int64_t num_malformed() const { return num_malformed_; }  // hints and beats, so far

  // What was learned, as text; Load takes it into an empty view. DataLoss: learn anew.
  std::string SaveLearned() const;
  absl::Status LoadLearned(absl::string_view text);

  // What must hold between two calls, a line for each violation. For tests.
  std::vector<std::string> Check() const;

 private:
  struct Worker {
    std::string boot;
    std::string lane;
    int32_t model = -1;
    v1::WorkerStatus status;  // without its rows
    absl::Time beat_at;       // when the newest beat was first seen
    bool superseded = false;  // a later start of the process with its name is there
    absl::Time lane_full_until = absl::InfinitePast();
    double tokens_per_second = 0;
    // Rows that it names and we do not know, from a former leader; their ids are negative.
    std::map<std::string, RunningRow> strangers;
  };
  struct Batch {
    int32_t worker = 0;
    absl::Time sent_at;
    absl::flat_hash_set<RequestId> rows;
  };
  struct Model {
    std::string name;
    std::string fingerprint;  // empty: requests that take any
    int32_t served_as = -1;   // the model whose workers run it
  };
  struct Tenant {
    std::string name;
    double weight = 1.0;
  };

  KnownRequest Make(const WaitingRequest& request, absl::Time now);
  void PutWaiting(KnownRequest request);
  void Drop(std::map<RequestId, KnownRequest>::iterator in_flight);
  void LeaveBatch(const KnownRequest& request);
  void TakeBeat(int32_t id, Worker& worker, v1::WorkerStatus status, absl::Time now);
  void Learn(const FeedEntry& entry);
  void Bury(const std::string& id, absl::Time now);
  void SweepInFlight(absl::Time now);
  void PruneTenants();
  int32_t ModelIndex(const std::string& name, const std::string& fingerprint);
  TenantIndex TenantIndexOf(const std::string& name, double weight);
  WorkKind KindOf(const v1::WorkHint& hint);
  bool Accepts(const Worker& worker, absl::Time now) const;

  const ClusterViewOptions options_;
  CostModel cost_;
  ShareState shares_;
  std::map<RequestId, KnownRequest> waiting_;
  std::map<RequestId, KnownRequest> in_flight_;
  absl::flat_hash_map<std::string, RequestId> ids_;  // of both
  std::map<int32_t, Worker> workers_;                // by the planner's number
  absl::flat_hash_map<std::string, int32_t> boots_;
  std::map<std::string, Batch> batches_;  // sent and not begun
  // What ended a moment ago: a beat that still names it is old.
  std::deque<std::pair<absl::Time, std::string>> ended_;
  absl::flat_hash_set<std::string> ended_ids_;
  std::vector<Model> models_;
  absl::flat_hash_map<std::string, int32_t> model_index_;  // by name and fingerprint
  std::vector<Tenant> tenants_;
  std::vector<TenantIndex> free_tenants_;
  absl::flat_hash_map<std::string, TenantIndex> tenant_index_;
  int32_t next_worker_ = 1;
  int64_t next_stranger_ = -1;
  bool overflowed_ = false;
  bool wants_look_ = false;
  int64_t num_malformed_ = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_SCHEDULER_SERVICE_CLUSTER_VIEW_H_
