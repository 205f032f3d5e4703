// The worker's life: packs come from its lane, their rows join the running batch between two steps,
// every step is published while the next one runs, and rows leave when they are done, dropped or
// handed back.
#ifndef CINNABAR_WORKER_SERVICE_WORKER_LOOP_H_
#define CINNABAR_WORKER_SERVICE_WORKER_LOOP_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "cinnabar/v1/work.pb.h"
#include "common/base/environment.h"
#include "common/base/mutex.h"
#include "common/queue/queue.h"
#include "worker/engine/engine.h"
#include "worker/service/publisher.h"
#include "worker/service/row.h"
#include "worker/service/worker_metrics.h"

namespace cinnabar {

struct WorkerOptions {
  RedisOptions redis;
  QueueOptions queue;
  std::string name;         // the lane; kept over restarts
  std::string boot;         // this start of the process: never used before
  std::string model;        // the served name
  std::string fingerprint;  // of its weights
  std::string device;       // in words
  std::string dtype;
  std::string metrics_address;
  EngineOptions engine;
  int64_t tokens_target = 0;  // 0: rows_max of the forward pass
  int32_t snapshot_every = 8;
  absl::Duration lease_for = absl::Seconds(10);
  absl::Duration beat_every = absl::Seconds(1);
  absl::Duration alive_for = absl::Seconds(5);
  // A step that takes longer is a hung device: leases are renewed no more.
  absl::Duration hang_after = absl::Seconds(30);
  absl::Duration drain_for = absl::Seconds(10);  // rows that end sooner are finished on SIGTERM
  int64_t unpublished_steps_max = 4096;          // beyond it the compute waits for Redis
  double dollars_per_hour = 0;
  Environment* environment = &Environment::Real();  // borrowed
};

class WorkerLoop {
 public:
  // `denoiser` and `metrics` are borrowed and outlive it.
  WorkerLoop(WorkerOptions options, Denoiser& denoiser, WorkerMetrics& metrics);
  ~WorkerLoop();
  WorkerLoop(const WorkerLoop&) = delete;

  // Serves until Drain() has been called and every row is finished or handed back. Aborted: the
  // device failed again and again, or said that it is gone (Unavailable).
  absl::Status Run();

  // What Run()'s threads do, turn by turn, for a caller that is one thread and has no Run().
  // Takes a pack from the lane when there is room for its rows, waiting up to `block` for one.
  absl::Status TakePack(Queue& queue, absl::Duration block);
  // Tells Redis that it is alive, and renews its leases; not while the device hangs.
  void Beat(Queue& queue);
  Publisher& publisher() { return publisher_; }
  enum class Turn {
    kStepped,
    kIdle,         // nothing runs
    kRedisIsLate,  // too many steps wait to be sent
    kEnded,        // drained, or the device failed (result())
  };
  // Rows join and leave, and all that run make one step.
  Turn Compute();
  const absl::Status& result() const { return result_; }

  // From any thread (not from a signal handler).
  void Drain();

  // Nothing when it takes work, else why not.
  std::string Missing() const;

 private:
  struct Incoming {
    RowLease lease;
    RowPlan plan;
    int32_t step = 0;
    Usage usage;
    absl::Time deadline;
    bool solo = false;
  };
  struct Active {
    RowLease lease;
    RowFacts facts;
    int32_t step = 0;           // published, or about to be
    int32_t snapshot_step = 0;  // of the last snapshot that was sent
    Usage usage;
    bool solo = false;
  };

  void Intake();
  void Heartbeat();
  absl::Time Now() const { return options_.environment->Now(); }
  void TakeRows(Queue& queue, const Pack& pack);
  bool WantsRows();
  void JoinRows();
  void DropRows();
  void Report(const StepReport& report, absl::Duration step_time);
  // How a row leaves; the caller takes it out of the engine and of active_.
  void EndRow(const Active& row, const SequenceState& state, const absl::Status& status);
  void HandBack(const Active& row, const SequenceState& state);
  // All rows, or those that will not end within drain_for; and what waits to join.
  void HandBackRows(bool all);
  void HandBackIncoming();
  void AbandonRows();
  void StopIntake();
  std::string Snapshot(const SequenceState& state) const;
  v1::WorkerStatus Status();
  void Dropped(const RowLease& row);
  // Frees what a row held besides its place in the engine.
  void Release(const RowLease& lease, bool solo) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const WorkerOptions options_;
  Denoiser& denoiser_;
  WorkerMetrics& metrics_;
  std::unique_ptr<Engine> engine_;                     // compute thread
  std::map<SequenceId, Active> active_;                // compute thread
  bool solo_running_ = false;                          // compute thread
  StepReport report_;                                  // compute thread
  absl::Duration step_time_ = absl::Milliseconds(10);  // of the last step; compute thread
  absl::Time step_ended_;                              // likewise
  int device_failures_ = 0;                            // in a row; compute thread
  std::atomic<int64_t> kv_bytes_ = 0;                  // in use, as of the last turn
  std::set<std::string> abandoned_;  // batches under which the device failed; compute thread
  bool drained_ = false;             // compute thread
  absl::Time drain_until_ = absl::InfiniteFuture();  // compute thread
  absl::Status result_;                              // compute thread
  bool told_of_hang_ = false;                        // heartbeat

  mutable Mutex mu_;           // leaf
  ConditionVariable changed_;  // rows came or left, or it drains
  ConditionVariable beat_;     // it stops
  std::deque<Incoming> incoming_ ABSL_GUARDED_BY(mu_);
  std::set<RowLease> dropped_ ABSL_GUARDED_BY(mu_);
  std::vector<RowLease> lost_ ABSL_GUARDED_BY(mu_);  // rows whose batch is no longer ours
  // Rows held, by batch.
  std::map<std::string, std::set<RowLease>> batches_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, int32_t> steps_ ABSL_GUARDED_BY(mu_);  // of running rows
  std::map<RowLease, v1::WorkerStatus::Row> running_ ABSL_GUARDED_BY(mu_);
  std::deque<v1::WorkerStatus::StepSample> samples_ ABSL_GUARDED_BY(mu_);
  v1::WorkerStatus totals_ ABSL_GUARDED_BY(mu_);  // the counters of the status
  absl::Time step_began_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  bool solo_held_ ABSL_GUARDED_BY(mu_) = false;  // a suspect is here: nothing else comes
  bool registered_ ABSL_GUARDED_BY(mu_) = false;

  std::atomic<bool> draining_ = false;
  std::atomic<bool> stopping_ = false;
  absl::Time started_;
  Publisher publisher_;
  std::thread intake_;
  std::thread heartbeat_;
};

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_SERVICE_WORKER_LOOP_H_
