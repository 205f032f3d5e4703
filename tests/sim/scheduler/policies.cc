#include "tests/sim/scheduler/policies.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <queue>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace cinnabar::sim {
namespace {

// A worker as the simple policies see it.
struct Slot {
  int32_t worker = 0;
  int32_t rows = 0;
  int64_t tokens = 0;
  int64_t longest = 0;
  int32_t rows_max = 0;
  int64_t tokens_target = 0;
  int64_t tokens_max = 0;
  bool pads = true;

  int64_t Positions() const { return pads ? rows * longest : tokens; }
  int64_t PositionsWith(int64_t more) const {
    return pads ? (rows + 1) * std::max(longest, more) : tokens + more;
  }
  bool HasRoom(int64_t more, double share = 1.0) const {
    if (rows == 0) return more <= tokens_max;
    const int64_t limit =
        std::min(tokens_max, static_cast<int64_t>(share * static_cast<double>(tokens_target)));
    return rows < rows_max && PositionsWith(more) <= limit;
  }
  void Add(int64_t more) {
    ++rows;
    tokens += more;
    longest = std::max(longest, more);
  }
};

std::vector<Slot> SlotsOf(absl::Span<const WorkerState> workers) {
  std::vector<Slot> slots;
  for (const WorkerState& worker : workers) {
    Slot slot = {.worker = worker.id,
                 .rows_max = worker.rows_max,
                 .tokens_target = worker.tokens_target,
                 .tokens_max = worker.tokens_max,
                 .pads = worker.pads};
    for (const RunningRow& row : worker.rows) slot.Add(row.sequence_tokens);
    slots.push_back(slot);
  }
  return slots;
}

std::vector<const PlanRequest*> ByArrival(absl::Span<const PlanRequest> waiting) {
  std::vector<const PlanRequest*> order;
  for (const PlanRequest& request : waiting) order.push_back(&request);
  std::sort(order.begin(), order.end(),
            [](const PlanRequest* a, const PlanRequest* b) { return a->id < b->id; });
  return order;
}

class PlannerPolicy : public Policy {
 public:
  explicit PlannerPolicy(const PlanOptions& options) : options_(options) {}

  std::string Name() const override { return "cinnabar"; }

  Decision Decide(absl::Span<const PlanRequest> waiting, absl::Span<const WorkerState> workers,
                  double now_seconds) override {
    const absl::Time now = absl::UnixEpoch() + absl::Seconds(now_seconds);
    const Plan plan = PlanPacks(waiting, workers, cost_, shares_, options_, now);
    shares_ = plan.shares;
    Decision decision;
    for (const PlannedPack& pack : plan.packs) {
      for (const PackMember& member : pack.members) {
        decision.starts.push_back({member.id, pack.worker, member.steps_budget});
      }
    }
    for (const Refusal& refusal : plan.refused) decision.refused.push_back(refusal.id);
    if (plan.next < absl::InfiniteFuture()) {
      decision.next_seconds = absl::ToDoubleSeconds(plan.next - absl::UnixEpoch());
    }
    return decision;
  }
  void OnStep(const StepSample& sample) override { ObserveStep(/*model=*/0, sample, cost_); }
  void OnFinished(const StepsSample& sample) override { ObserveSteps(sample, cost_); }

 private:
  const PlanOptions options_;
  CostModel cost_;
  ShareState shares_;
};

class FcfsPolicy : public Policy {
 public:
  std::string Name() const override { return "fcfs"; }

  Decision Decide(absl::Span<const PlanRequest> waiting, absl::Span<const WorkerState> workers,
                  double) override {
    Decision decision;
    std::vector<Slot> slots = SlotsOf(workers);
    for (const PlanRequest* request : ByArrival(waiting)) {
      Slot* best = nullptr;
      for (Slot& slot : slots) {
        if (!slot.HasRoom(request->sequence_tokens)) continue;
        if (best == nullptr || slot.Positions() < best->Positions()) best = &slot;
      }
      if (best == nullptr) break;
      best->Add(request->sequence_tokens);
      decision.starts.push_back({request->id, best->worker, request->steps_budget});
    }
    return decision;
  }
};

class BucketedFcfsPolicy : public Policy {
 public:
  std::string Name() const override { return "fcfs-bucketed"; }

  Decision Decide(absl::Span<const PlanRequest> waiting, absl::Span<const WorkerState> workers,
                  double) override {
    Decision decision;
    std::vector<Slot> slots = SlotsOf(workers);
    bucket_of_.resize(workers.size(), -1);
    std::map<int32_t, std::pair<std::vector<const PlanRequest*>, size_t>> buckets;
    for (const PlanRequest* request : ByArrival(waiting)) {
      buckets[LengthBucket(request->sequence_tokens)].first.push_back(request);
    }
    const auto head = [&buckets](int32_t bucket) -> const PlanRequest* {
      const auto found = buckets.find(bucket);
      if (found == buckets.end() || found->second.second >= found->second.first.size())
        return nullptr;
      return found->second.first[found->second.second];
    };
    for (size_t w = 0; w < slots.size(); ++w) {
      if (slots[w].rows == 0) bucket_of_[w] = -1;
    }
    while (true) {
      // The oldest head of a bucket that no worker has.
      const PlanRequest* unserved = nullptr;
      for (const auto& [bucket, queue] : buckets) {
        const PlanRequest* first = head(bucket);
        if (first == nullptr) continue;
        if (std::find(bucket_of_.begin(), bucket_of_.end(), bucket) != bucket_of_.end()) continue;
        if (unserved == nullptr || first->id < unserved->id) unserved = first;
      }
      // The oldest request that some worker may take now.
      const PlanRequest* next = nullptr;
      size_t taker = 0;
      for (size_t w = 0; w < slots.size(); ++w) {
        if (slots[w].rows == 0) {
          for (const auto& [bucket, queue] : buckets) {
            const PlanRequest* first = head(bucket);
            if (first != nullptr && (next == nullptr || first->id < next->id)) {
              next = first;
              taker = w;
            }
          }
          continue;
        }
        const PlanRequest* first = head(bucket_of_[w]);
        if (first == nullptr || !slots[w].HasRoom(first->sequence_tokens)) continue;
        if (unserved != nullptr && unserved->id < first->id) continue;  // let it run empty
        if (next == nullptr || first->id < next->id) {
          next = first;
          taker = w;
        }
      }
      if (next == nullptr) break;
      const int32_t bucket = LengthBucket(next->sequence_tokens);
      ++buckets[bucket].second;
      bucket_of_[taker] = bucket;
      slots[taker].Add(next->sequence_tokens);
      decision.starts.push_back({next->id, slots[taker].worker, next->steps_budget});
    }
    return decision;
  }

 private:
  std::vector<int32_t> bucket_of_;
};

class OraclePolicy : public Policy {
 public:
  OraclePolicy(const Workload& workload, const ClusterModel& cluster, const OracleOptions& options)
      : workload_(workload), cluster_(cluster), options_(options) {}

  std::string Name() const override { return "oracle"; }

  Decision Decide(absl::Span<const PlanRequest> waiting, absl::Span<const WorkerState> workers,
                  double now) override {
    Decision decision;
    std::vector<Slot> slots = SlotsOf(workers);
    std::vector<double> step_max(slots.size(), 1e300);
    std::vector<double> steps_longest(slots.size(), 0.0);
    std::vector<Job> jobs;
    for (size_t w = 0; w < workers.size(); ++w) {
      const double pace =
          cluster_.StepSeconds(slots[w].rows, static_cast<double>(slots[w].Positions()));
      for (const RunningRow& row : workers[w].rows) {
        const SimRequest& request = workload_.requests[static_cast<size_t>(row.id)];
        const double left = request.TrueSteps(row.steps_budget) - row.steps_done;
        steps_longest[w] = std::max(steps_longest[w], left);
        const double bound = (request.deadline_seconds - now) / left;
        if (bound > pace) step_max[w] = std::min(step_max[w], bound);
        jobs.push_back(JobOf(request, left, now, true));
      }
    }
    for (const PlanRequest& waiting_request : waiting) {
      const SimRequest& request = workload_.requests[static_cast<size_t>(waiting_request.id)];
      const Job job = JobOf(request, request.true_steps, now, false);
      const double alone = request.true_steps * cluster_.StepSeconds(1.0, job.tokens);
      if (alone > job.slack_seconds) {
        decision.refused.push_back(waiting_request.id);
        continue;
      }
      jobs.push_back(job);
    }
    if (options_.order == OracleOptions::Order::kMooreHodgson) PutOff(jobs);
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const Job& job) { return job.running; }),
               jobs.end());
    std::sort(jobs.begin(), jobs.end(), [this](const Job& a, const Job& b) {
      if (a.put_off != b.put_off) return b.put_off;
      const bool by_cost = a.put_off || options_.order == OracleOptions::Order::kShortestFirst;
      const double x = by_cost ? a.device_seconds : a.slack_seconds;
      const double y = by_cost ? b.device_seconds : b.slack_seconds;
      return std::tie(x, a.id) < std::tie(y, b.id);
    });
    std::vector<bool> drained(slots.size(), false);
    int drains_left = std::max<int>(1, static_cast<int>(slots.size()) / 2);
    for (const Job& job : jobs) {
      size_t best = slots.size();
      double best_finish = 1e300;
      bool has_company = false;  // somebody's batch is of its length, with room or without
      const int64_t tokens = static_cast<int64_t>(job.tokens);
      for (size_t w = 0; w < slots.size(); ++w) {
        const Slot& slot = slots[w];
        if (drained[w] || tokens > slot.tokens_max) continue;
        const double positions = static_cast<double>(slot.PositionsWith(tokens));
        if (slot.rows > 0 && positions - static_cast<double>(slot.tokens + tokens) >
                                 options_.padding_max * positions) {
          continue;
        }
        has_company = true;
        if (!slot.HasRoom(tokens, options_.tokens_share)) continue;
        const double step = cluster_.StepSeconds(slot.rows + 1, positions);
        if (options_.protect_running && step > step_max[w]) continue;
        const double finish = job.steps * step;
        if (finish > job.slack_seconds && slot.rows > 0) continue;
        if (finish < best_finish) {
          best = w;
          best_finish = finish;
        }
      }
      if (best == slots.size()) {
        // The worker that is free first is kept for it.
        if (!options_.drain || has_company || job.put_off || drains_left <= 0) continue;
        size_t soonest = slots.size();
        double soonest_seconds = 1e300;
        for (size_t w = 0; w < slots.size(); ++w) {
          if (drained[w]) continue;
          const double pace =
              cluster_.StepSeconds(slots[w].rows, static_cast<double>(slots[w].Positions()));
          if (steps_longest[w] * pace < soonest_seconds) {
            soonest = w;
            soonest_seconds = steps_longest[w] * pace;
          }
        }
        if (soonest == slots.size()) continue;
        drained[soonest] = true;
        --drains_left;
        continue;
      }
      slots[best].Add(tokens);
      steps_longest[best] = std::max(steps_longest[best], job.steps);
      const double pace =
          cluster_.StepSeconds(slots[best].rows, static_cast<double>(slots[best].Positions()));
      const double bound = job.slack_seconds / job.steps;
      if (bound > pace) step_max[best] = std::min(step_max[best], bound);
      decision.starts.push_back(
          {job.id, slots[best].worker,
           workload_.requests[static_cast<size_t>(job.id)].request.steps_budget});
    }
    return decision;
  }

 private:
  struct Job {
    RequestId id = 0;
    double tokens = 0.0;
    double steps = 0.0;
    double slack_seconds = 0.0;
    double device_seconds = 0.0;  // of one worker
    double run_seconds = 0.0;
    bool running = false;
    bool put_off = false;
  };

  Job JobOf(const SimRequest& request, double steps, double now, bool running) const {
    const double tokens = request.request.sequence_tokens;
    const double rows = std::max(
        1.0, std::min<double>(cluster_.rows_max,
                              std::floor(static_cast<double>(cluster_.tokens_target) / tokens)));
    const double step = cluster_.StepSeconds(rows, rows * tokens);
    return {request.request.id,  tokens,       steps,   request.deadline_seconds - now,
            steps * step / rows, steps * step, running, false};
  }

  void PutOff(std::vector<Job>& jobs) const {
    std::sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) {
      return std::tie(a.slack_seconds, a.id) < std::tie(b.slack_seconds, b.id);
    });
    std::priority_queue<std::pair<double, size_t>> dearest;
    double busy = 0.0;
    for (size_t i = 0; i < jobs.size(); ++i) {
      const double share = jobs[i].device_seconds / cluster_.num_workers;
      double start = busy;
      busy += share;
      if (jobs[i].running) continue;
      dearest.emplace(jobs[i].device_seconds, i);
      const double latest = jobs[i].slack_seconds - std::max(jobs[i].run_seconds, share);
      while (start > latest && !dearest.empty()) {
        const auto [seconds, victim] = dearest.top();
        dearest.pop();
        jobs[victim].put_off = true;
        busy -= seconds / cluster_.num_workers;
        start -= seconds / cluster_.num_workers;
        if (victim == i) break;
      }
    }
  }

  const Workload& workload_;
  const ClusterModel cluster_;
  const OracleOptions options_;
};

}  // namespace

std::unique_ptr<Policy> MakePlannerPolicy(const PlanOptions& options) {
  return std::make_unique<PlannerPolicy>(options);
}
std::unique_ptr<Policy> MakeFcfsPolicy() { return std::make_unique<FcfsPolicy>(); }
std::unique_ptr<Policy> MakeBucketedFcfsPolicy() { return std::make_unique<BucketedFcfsPolicy>(); }
std::unique_ptr<Policy> MakeOraclePolicy(const Workload& workload, const ClusterModel& cluster,
                                         const OracleOptions& options) {
  return std::make_unique<OraclePolicy>(workload, cluster, options);
}

std::vector<OracleOptions> OracleVariants() {
  std::vector<OracleOptions> variants;
  for (const double padding_max : {0.1, 0.2, 0.35}) {
    for (const double share : {0.5, 1.0, 2.0}) {
      variants.push_back({OracleOptions::Order::kMooreHodgson, padding_max, share, true, true});
    }
  }
  variants.push_back({OracleOptions::Order::kMooreHodgson, 0.2, 1.0, false, true});
  variants.push_back({OracleOptions::Order::kMooreHodgson, 0.2, 1.0, true, false});
  variants.push_back({OracleOptions::Order::kShortestFirst, 0.2, 1.0, true, true});
  return variants;
}

Outcome BestOracle(const Workload& workload, const ClusterModel& cluster,
                   const SimulationOptions& options) {
  Outcome best;
  for (const OracleOptions& variant : OracleVariants()) {
    const Outcome outcome =
        Simulate(workload, cluster, *MakeOraclePolicy(workload, cluster, variant), options);
    if (best.policy.empty() || outcome.in_time > best.in_time) best = outcome;
  }
  return best;
}

double RelaxedBound(const Workload& workload, const ClusterModel& cluster) {
  constexpr double kSlotSeconds = 1.0;
  struct Job {
    double device_seconds;
    size_t from;  // slots [from, to)
    size_t to;
  };
  std::vector<Job> jobs;
  size_t num_slots = 0;
  for (const SimRequest& request : workload.requests) {
    const double tokens = request.request.sequence_tokens;
    if (request.true_steps * cluster.StepSeconds(1.0, tokens) >
        request.deadline_seconds - request.arrival_seconds) {
      continue;
    }
    const double rows = std::max(
        1.0, std::min<double>(cluster.rows_max, static_cast<double>(cluster.tokens_max) / tokens));
    Job job;
    job.device_seconds = request.true_steps * cluster.StepSeconds(rows, rows * tokens) / rows;
    job.from = static_cast<size_t>(request.arrival_seconds / kSlotSeconds);
    job.to = static_cast<size_t>(std::ceil(request.deadline_seconds / kSlotSeconds));
    num_slots = std::max(num_slots, job.to);
    jobs.push_back(job);
  }
  std::sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) {
    return std::tie(a.device_seconds, a.from, a.to) < std::tie(b.device_seconds, b.from, b.to);
  });
  // spare[s][t]: what is left of the slots [s, t) after the work that lies wholly inside. By Hall's
  // theorem, work fits when no interval is overfull, and all that can be added to a job is the
  // least spare around its window.
  const size_t stride = num_slots + 1;
  std::vector<float> spare(stride * stride);
  for (size_t s = 0; s < num_slots; ++s) {
    for (size_t t = s; t <= num_slots; ++t) {
      spare[s * stride + t] =
          static_cast<float>(static_cast<double>(t - s) * kSlotSeconds * cluster.num_workers);
    }
  }
  double in_time = 0.0;
  for (const Job& job : jobs) {
    float least = static_cast<float>(job.device_seconds);
    for (size_t s = 0; s <= job.from; ++s) {
      const float* row = &spare[s * stride];
      float row_least = least;
      for (size_t t = job.to; t <= num_slots; ++t)
        row_least = row[t] < row_least ? row[t] : row_least;
      least = row_least;
      if (least <= 0.0F) break;
    }
    if (least <= 0.0F) continue;
    for (size_t s = 0; s <= job.from; ++s) {
      float* row = &spare[s * stride];
      for (size_t t = job.to; t <= num_slots; ++t) row[t] -= least;
    }
    in_time += least / job.device_seconds;
  }
  return in_time;
}

}  // namespace cinnabar::sim
