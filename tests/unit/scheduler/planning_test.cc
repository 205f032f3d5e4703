#include "scheduler/planning.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace cinnabar {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

const absl::Time kNow = absl::FromUnixSeconds(1000);

// A request of 16 steps over 256 positions; alone on the default cost model a step takes 4.9 ms.
PlanRequest Request(RequestId id) {
  PlanRequest request;
  request.id = id;
  request.sequence_tokens = 256;
  request.canvas_tokens = 32;
  request.steps_budget = 16;
  request.arrival = kNow - absl::Seconds(1);
  return request;
}

WorkerState Worker(int32_t id, int32_t rows_max = 1) {
  return {.id = id,
          .model = 0,
          .rows_max = rows_max,
          .tokens_max = 32768,
          .tokens_target = 8192,
          .pads = true,
          .rows = {}};
}

RunningRow Running(RequestId id, int32_t tokens, int32_t steps) {
  return {
      .id = id, .kind = {}, .sequence_tokens = tokens, .canvas_tokens = 32, .steps_budget = steps};
}

Plan PlanOf(const std::vector<PlanRequest>& waiting, const std::vector<WorkerState>& workers,
            const PlanOptions& options = {}, const ShareState& shares = {}) {
  return PlanPacks(waiting, workers, CostModel{}, shares, options, kNow);
}

std::vector<RequestId> Members(const Plan& plan) {
  std::vector<RequestId> ids;
  for (const PlannedPack& pack : plan.packs) {
    for (const PackMember& member : pack.members) ids.push_back(member.id);
  }
  return ids;
}

// The order of service when one row is free at a time, fairness carried along, and nobody arrives.
std::vector<RequestId> ServiceOrder(std::vector<PlanRequest> waiting,
                                    const PlanOptions& options = {}) {
  std::vector<RequestId> order;
  ShareState shares;
  while (!waiting.empty()) {
    const Plan plan = PlanOf(waiting, {Worker(1)}, options, shares);
    shares = plan.shares;
    const std::vector<RequestId> now = Members(plan);
    if (now.size() != 1) break;
    order.push_back(now[0]);
    waiting.erase(std::find_if(waiting.begin(), waiting.end(),
                               [&](const PlanRequest& r) { return r.id == now[0]; }));
  }
  return order;
}

TEST(BucketTest, LengthsShareABucketWithinAFactor) {
  EXPECT_EQ(LengthBucket(1), 0);
  EXPECT_EQ(LengthBucket(32), 0);
  EXPECT_EQ(LengthBucket(33), 1);
  EXPECT_EQ(LengthBucket(38), 1);
  EXPECT_EQ(LengthBucket(39), 2);
  EXPECT_EQ(LengthBucket(64), 4);
  EXPECT_EQ(LengthBucket(65), 5);
  EXPECT_EQ(LengthBucket(32768), 40);
  for (int32_t tokens = 33; tokens < 20000; ++tokens) {
    const double top = 32.0 * std::exp2(LengthBucket(tokens) / 4.0);
    ASSERT_LE(tokens, top + 1e-6);
    ASSERT_GT(tokens, top / std::exp2(0.25) - 1e-6);
  }
  EXPECT_EQ(StepsBucket(1.0), 0);
  EXPECT_EQ(StepsBucket(2.0), 1);
  EXPECT_EQ(StepsBucket(2.1), 2);
  EXPECT_EQ(StepsBucket(64.0), 6);
}

TEST(PlanTest, NothingToDoIsAnEmptyPlan) {
  EXPECT_THAT(PlanOf({}, {}).packs, IsEmpty());
  EXPECT_THAT(PlanOf({}, {Worker(1)}).packs, IsEmpty());
  const Plan plan = PlanOf({Request(1)}, {});
  EXPECT_THAT(plan.packs, IsEmpty());
  EXPECT_THAT(plan.refused, IsEmpty());
}

TEST(PlanTest, AnExpiredRequestTakesNoRow) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2), Request(3)};
  waiting[0].deadline = kNow - absl::Seconds(1);
  waiting[1].deadline = kNow;
  waiting[2].deadline = kNow + absl::Seconds(10);
  const Plan plan = PlanOf(waiting, {Worker(1, 8)});
  EXPECT_THAT(plan.expired, ElementsAre(1, 2));
  EXPECT_THAT(Members(plan), ElementsAre(3));
}

TEST(PlanTest, ADeadlineThatCannotBeMetIsRefusedAtOnce) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2)};
  waiting[0].steps_budget = 1000;  // five seconds even alone
  waiting[0].deadline = kNow + absl::Seconds(2);
  waiting[1].deadline = kNow + absl::Seconds(2);
  const Plan plan = PlanOf(waiting, {Worker(1, 8)});
  ASSERT_EQ(plan.refused.size(), 1U);
  EXPECT_EQ(plan.refused[0].id, 1);
  EXPECT_EQ(plan.refused[0].reason, RefusalReason::kDeadlineInfeasible);
  EXPECT_THAT(Members(plan), ElementsAre(2));
}

TEST(PlanTest, ALowerStepBudgetSavesADeadlineWhereItMayBeLowered) {
  std::vector<PlanRequest> waiting = {Request(1)};
  waiting[0].steps_budget = 1000;
  waiting[0].steps_min = 200;
  waiting[0].deadline = kNow + absl::Seconds(2);
  const Plan plan = PlanOf(waiting, {Worker(1)});
  EXPECT_THAT(plan.refused, IsEmpty());
  ASSERT_EQ(plan.packs.size(), 1U);
  EXPECT_EQ(plan.packs[0].members[0].steps_budget, 200);
  // One that has begun keeps its schedule: its bytes depend on it.
  waiting[0].steps_done = 1;
  EXPECT_EQ(PlanOf(waiting, {Worker(1)}).refused.size(), 1U);
}

TEST(PlanTest, StepsAreLoweredUnderPressureOnly) {
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 2; ++id) {
    waiting.push_back(Request(id));
    waiting.back().steps_min = 8;
  }
  for (const PlannedPack& pack : PlanOf(waiting, {Worker(1, 8)}).packs) {
    for (const PackMember& member : pack.members) EXPECT_EQ(member.steps_budget, 16);
  }
  for (RequestId id = 2; id < 3000; ++id) {
    waiting.push_back(Request(id));
    if (id % 2 == 0) waiting.back().steps_min = 8;
  }
  const Plan plan = PlanOf(waiting, {Worker(1, 8)});
  ASSERT_FALSE(plan.packs.empty());
  EXPECT_EQ(plan.pressure, 1.0);
  for (const PlannedPack& pack : plan.packs) {
    for (const PackMember& member : pack.members) {
      EXPECT_EQ(member.steps_budget, member.id < 2 || member.id % 2 == 0 ? 8 : 16) << member.id;
    }
  }
}

TEST(PlanTest, ASequenceThatFitsNoWorkerIsRefused) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2)};
  waiting[0].sequence_tokens = 40000;
  waiting[1].sequence_tokens = 20000;  // beyond the target, within memory: runs alone
  const Plan plan = PlanOf(waiting, {Worker(1, 8)});
  ASSERT_EQ(plan.refused.size(), 1U);
  EXPECT_EQ(plan.refused[0].reason, RefusalReason::kTooLong);
  EXPECT_THAT(Members(plan), ElementsAre(2));
}

TEST(PlanTest, ModelsGoToTheirWorkers) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2), Request(3)};
  waiting[1].kind.model = 7;
  waiting[2].kind.model = 8;  // nobody serves it: it waits
  WorkerState other = Worker(2, 8);
  other.model = 7;
  const Plan plan = PlanOf(waiting, {Worker(1, 8), other});
  ASSERT_EQ(plan.packs.size(), 2U);
  EXPECT_EQ(plan.packs[0].worker, 1);
  EXPECT_EQ(plan.packs[0].members[0].id, 1);
  EXPECT_EQ(plan.packs[1].worker, 2);
  EXPECT_EQ(plan.packs[1].bucket.model, 7);
  EXPECT_THAT(plan.refused, IsEmpty());
}

TEST(PlanTest, APackIsNoLongerThanTheQueueTakes) {
  std::vector<PlanRequest> waiting;
  for (RequestId id = 1; id <= 600; ++id) {
    waiting.push_back(Request(id));
    waiting.back().sequence_tokens = 32;
  }
  WorkerState worker = Worker(1, 1000);
  worker.tokens_target = worker.tokens_max;
  PlanOptions options;
  options.pack_rows_max = 100;
  const Plan plan = PlanOf(waiting, {worker, Worker(2, 1000)}, options);
  ASSERT_EQ(plan.packs.size(), 2U);
  for (const PlannedPack& pack : plan.packs) EXPECT_EQ(pack.members.size(), 100U);
  EXPECT_THAT(plan.refused, IsEmpty());
}

TEST(PlanTest, ADrainingWorkerGetsNothing) {
  WorkerState draining = Worker(1, 8);
  draining.accepting = false;
  EXPECT_THAT(PlanOf({Request(1)}, {draining}).packs, IsEmpty());
  const Plan plan = PlanOf({Request(1)}, {draining, Worker(2)});
  ASSERT_EQ(plan.packs.size(), 1U);
  EXPECT_EQ(plan.packs[0].worker, 2);
}

TEST(OrderTest, EarliestDeadlineFirstInALane) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2), Request(3), Request(4)};
  waiting[0].deadline = kNow + absl::Seconds(90);
  waiting[1].deadline = kNow + absl::Seconds(30);
  waiting[2].deadline = kNow + absl::Seconds(60);
  EXPECT_THAT(ServiceOrder(waiting), ElementsAre(2, 3, 1, 4));
}

TEST(OrderTest, TiesGoToTheOlderRequest) {
  EXPECT_THAT(ServiceOrder({Request(3), Request(1), Request(2)}), ElementsAre(1, 2, 3));
}

TEST(OrderTest, ClassesShareByWeight) {
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 90; ++id) {
    waiting.push_back(Request(id));
    waiting.back().priority = static_cast<PriorityClass>(id % 3);
  }
  std::vector<RequestId> order = ServiceOrder(waiting);
  ASSERT_EQ(order.size(), 90U);
  order.resize(24);
  std::array<int, 3> served = {};
  for (const RequestId id : order) ++served[static_cast<size_t>(id % 3)];
  // Weights 8:3:1 of 24.
  EXPECT_NEAR(served[0], 16, 1);
  EXPECT_NEAR(served[1], 6, 1);
  EXPECT_NEAR(served[2], 2, 1);
}

TEST(OrderTest, WaitingLiftsARequest) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2)};
  waiting[0].priority = PriorityClass::kBatch;
  waiting[1].priority = PriorityClass::kInteractive;
  EXPECT_THAT(ServiceOrder(waiting), ElementsAre(2, 1));
  // After two periods it competes with interactive ones, as the older of them.
  waiting[0].arrival = kNow - absl::Seconds(121);
  EXPECT_THAT(ServiceOrder(waiting), ElementsAre(1, 2));
}

TEST(OrderTest, WhoStarvesGetsItsShareWhateverElseWaits) {
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 10; ++id) {
    waiting.push_back(Request(id));
    waiting.back().priority = PriorityClass::kBatch;
    waiting.back().arrival = kNow - absl::Seconds(241);
  }
  for (RequestId id = 10; id < 100; ++id) {
    waiting.push_back(Request(id));
    waiting.back().priority = PriorityClass::kInteractive;
    waiting.back().deadline = kNow + absl::Seconds(3);
  }
  std::vector<RequestId> order = ServiceOrder(waiting);
  ASSERT_GE(order.size(), 30U);
  order.resize(30);
  // A tenth of the device time, the oldest first, one at once.
  EXPECT_EQ(order[0], 0);
  EXPECT_NEAR(std::count_if(order.begin(), order.end(), [](RequestId id) { return id < 10; }), 3,
              1);
}

TEST(OrderTest, ADeadlineAboutToBeMissedGoesBeforeItsTurn) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2)};
  waiting[0].priority = PriorityClass::kInteractive;
  waiting[0].deadline = kNow + absl::Seconds(60);
  waiting[1].priority = PriorityClass::kBatch;
  waiting[1].deadline = kNow + absl::Seconds(1);
  EXPECT_THAT(ServiceOrder(waiting), ElementsAre(2, 1));
}

TEST(FairnessTest, ATenantWithAFloodTakesItsTurnOnly) {
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 100; ++id) waiting.push_back(Request(id));
  for (RequestId id = 100; id < 105; ++id) {
    waiting.push_back(Request(id));
    waiting.back().tenant = 1;
  }
  std::vector<RequestId> order = ServiceOrder(waiting);
  ASSERT_EQ(order.size(), 105U);
  order.resize(10);
  EXPECT_EQ(std::count_if(order.begin(), order.end(), [](RequestId id) { return id >= 100; }), 5);
}

TEST(FairnessTest, WeightsAreShares) {
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 80; ++id) {
    waiting.push_back(Request(id));
    waiting.back().tenant = static_cast<TenantIndex>(id % 2);
    if (id % 2 == 1) waiting.back().tenant_weight = 3.0;
  }
  std::vector<RequestId> order = ServiceOrder(waiting);
  ASSERT_EQ(order.size(), 80U);
  order.resize(40);
  EXPECT_NEAR(std::count_if(order.begin(), order.end(), [](RequestId id) { return id % 2 == 1; }),
              30, 1);
}

TEST(FairnessTest, CostIsSharedNotRequests) {
  // Tenant 0 asks for four times the steps: it gets a quarter of the requests.
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 80; ++id) {
    waiting.push_back(Request(id));
    waiting.back().tenant = static_cast<TenantIndex>(id % 2);
    if (id % 2 == 0) waiting.back().steps_budget = 64;
  }
  std::vector<RequestId> order = ServiceOrder(waiting);
  ASSERT_EQ(order.size(), 80U);
  order.resize(25);
  EXPECT_NEAR(std::count_if(order.begin(), order.end(), [](RequestId id) { return id % 2 == 0; }),
              5, 1);
}

TEST(FairnessTest, AnAbsenceIsNoCredit) {
  ShareState shares;
  std::vector<PlanRequest> waiting;
  RequestId next_id = 0;
  const auto serve_one = [&] {
    const Plan plan = PlanOf(waiting, {Worker(1)}, {}, shares);
    shares = plan.shares;
    const RequestId id = Members(plan).at(0);
    const auto served = std::find_if(waiting.begin(), waiting.end(),
                                     [&](const PlanRequest& r) { return r.id == id; });
    const TenantIndex tenant = served->tenant;
    waiting.erase(served);
    return tenant;
  };
  for (int i = 0; i < 60; ++i) waiting.push_back(Request(next_id++));
  for (int i = 0; i < 40; ++i) serve_one();
  // Tenant 1 comes after forty requests of tenant 0; from now on they take turns.
  for (int i = 0; i < 20; ++i) {
    waiting.push_back(Request(next_id++));
    waiting.back().tenant = 1;
  }
  int of_new = 0;
  for (int i = 0; i < 10; ++i) of_new += serve_one();
  EXPECT_NEAR(of_new, 5, 1);
}

TEST(FairnessTest, StateIsBoundedByWhoMatters) {
  ShareState shares;
  for (int round = 0; round < 1000; ++round) {
    PlanRequest request = Request(round);
    request.tenant = round;
    PlanRequest steady = Request(100000 + round);
    steady.tenant = -1;
    const Plan plan = PlanOf({request, steady}, {Worker(1, 2)}, {}, shares);
    shares = plan.shares;
  }
  EXPECT_LT(shares.tenants.size(), 10U);
}

TEST(PackTest, OnePackIsOneBucketForOneWorker) {
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 6; ++id) {
    waiting.push_back(Request(id));
    waiting.back().sequence_tokens = id % 2 == 0 ? 250 : 1000;
    waiting.back().steps_budget = id < 3 ? 16 : 64;
  }
  const Plan plan = PlanOf(waiting, {Worker(1, 8), Worker(2, 8)});
  EXPECT_EQ(Members(plan).size(), 6U);
  for (const PlannedPack& pack : plan.packs) {
    for (const PackMember& member : pack.members) {
      const PlanRequest& request = waiting[static_cast<size_t>(member.id)];
      EXPECT_EQ(pack.bucket.length, LengthBucket(request.sequence_tokens));
      EXPECT_EQ(pack.bucket.steps, StepsBucket(request.steps_budget));
    }
    EXPECT_GT(pack.cost_token_steps, 0.0);
  }
}

TEST(PackTest, RemainingStepsCountNotTheBudget) {
  std::vector<PlanRequest> waiting = {Request(1)};
  waiting[0].steps_budget = 64;
  waiting[0].steps_done = 60;
  const Plan plan = PlanOf(waiting, {Worker(1)});
  ASSERT_EQ(plan.packs.size(), 1U);
  EXPECT_EQ(plan.packs[0].bucket.steps, 2);
  EXPECT_EQ(plan.packs[0].cost_token_steps, 4.0 * 256);
}

TEST(PackTest, ABusyPaddingWorkerTakesItsOwnLengthsOnly) {
  WorkerState worker = Worker(1, 8);
  worker.rows = {Running(100, 1000, 50), Running(101, 980, 50)};
  std::vector<PlanRequest> waiting = {Request(1), Request(2)};
  waiting[0].sequence_tokens = 100;
  waiting[0].arrival = kNow - absl::Milliseconds(100);
  waiting[1].sequence_tokens = 900;
  EXPECT_THAT(Members(PlanOf(waiting, {worker})), ElementsAre(2));
  // A ragged worker pads nothing and takes both.
  worker.pads = false;
  EXPECT_THAT(Members(PlanOf(waiting, {worker})), testing::UnorderedElementsAre(1, 2));
}

TEST(PackTest, AWorkerRunsEmptyForALengthThatNobodyServes) {
  WorkerState worker = Worker(1, 8);
  worker.rows = {Running(100, 1000, 50), Running(101, 980, 50)};
  std::vector<PlanRequest> waiting = {Request(1), Request(2)};
  waiting[0].sequence_tokens = 100;
  waiting[0].priority = PriorityClass::kInteractive;
  waiting[1].sequence_tokens = 900;
  EXPECT_THAT(Members(PlanOf(waiting, {worker})), IsEmpty());
  // Freshly arrived, it may wait a little for luck.
  waiting[0].arrival = kNow - absl::Milliseconds(100);
  EXPECT_THAT(Members(PlanOf(waiting, {worker})), ElementsAre(2));
}

TEST(PackTest, AnIdleWorkerWaitsForNobody) {
  std::vector<PlanRequest> waiting = {Request(1)};
  waiting[0].arrival = kNow;
  EXPECT_THAT(Members(PlanOf(waiting, {Worker(1, 8)})), ElementsAre(1));
}

TEST(PackTest, RefillingABusyWorkerWaitsForCompanyUnderLoad) {
  WorkerState worker = Worker(1, 8);
  for (RequestId id = 100; id < 107; ++id) worker.rows.push_back(Running(id, 256, 4000));
  std::vector<PlanRequest> waiting = {Request(1)};
  waiting[0].arrival = kNow - absl::Milliseconds(10);
  const Plan plan = PlanOf(waiting, {worker});
  EXPECT_GT(plan.pressure, 0.9);
  EXPECT_THAT(Members(plan), IsEmpty());
  EXPECT_LT(plan.next, kNow + absl::Milliseconds(60));
  EXPECT_GT(plan.next, kNow);
  waiting[0].arrival = kNow - absl::Milliseconds(60);
  EXPECT_THAT(Members(PlanOf(waiting, {worker})), ElementsAre(1));
}

TEST(PackTest, NobodyJoinsWhoWouldMakeARunningRowLate) {
  WorkerState worker = Worker(1, 8);
  worker.rows = {Running(100, 4000, 100)};
  // 100 steps of 41 ms take 4.2 s; with company they would take twice that.
  worker.rows[0].deadline = kNow + absl::Seconds(6);
  std::vector<PlanRequest> waiting = {Request(1)};
  waiting[0].sequence_tokens = 4000;
  EXPECT_THAT(Members(PlanOf(waiting, {worker})), IsEmpty());
  worker.rows[0].deadline = kNow + absl::Seconds(60);
  EXPECT_THAT(Members(PlanOf(waiting, {worker})), ElementsAre(1));
}

TEST(SuspectTest, RunsAlone) {
  std::vector<PlanRequest> waiting = {Request(1), Request(2), Request(3)};
  waiting[0].suspect = true;
  const Plan plan = PlanOf(waiting, {Worker(1, 8), Worker(2, 8)});
  ASSERT_GE(plan.packs.size(), 2U);
  std::map<int32_t, std::set<RequestId>> on_worker;
  for (const PlannedPack& pack : plan.packs) {
    for (const PackMember& member : pack.members) on_worker[pack.worker].insert(member.id);
  }
  for (const auto& [worker, ids] : on_worker) {
    if (ids.count(1) > 0) {
      EXPECT_EQ(ids.size(), 1U);
    }
  }
}

TEST(SuspectTest, NeitherJoinsABatchNorIsJoined) {
  WorkerState busy = Worker(1, 8);
  busy.rows = {Running(100, 256, 16)};
  std::vector<PlanRequest> waiting = {Request(1)};
  waiting[0].suspect = true;
  EXPECT_THAT(Members(PlanOf(waiting, {busy})), IsEmpty());
  // The worker is even emptied for it.
  EXPECT_THAT(Members(PlanOf({waiting[0], Request(2)}, {busy})), IsEmpty());
  busy.rows[0].suspect = true;
  EXPECT_THAT(Members(PlanOf({Request(2)}, {busy})), IsEmpty());
}

TEST(ShedTest, TheDearestIsPutOffWhenNotAllCanBeDone) {
  // 16 steps take 0.08 s of the one row; a hundred of them fit into nine seconds, a long one
  // besides does not.
  std::vector<PlanRequest> waiting;
  for (RequestId id = 0; id < 100; ++id) {
    waiting.push_back(Request(id));
    waiting.back().deadline = kNow + absl::Seconds(9.5);
  }
  waiting.push_back(Request(100));
  waiting.back().steps_budget = 1000;
  waiting.back().deadline = kNow + absl::Seconds(9.4);
  const std::vector<WorkerState> workers = {Worker(1)};
  const Plan plan = PlanOf(waiting, workers);
  EXPECT_EQ(plan.num_put_off, 1);
  EXPECT_THAT(Members(plan), ElementsAre(0));
  EXPECT_THAT(plan.refused, IsEmpty());  // it may be that somebody cancels
  PlanOptions no_shed;
  no_shed.shed = false;
  EXPECT_THAT(Members(PlanOf(waiting, workers, no_shed)), ElementsAre(100));
}

// Random waiting sets and workers: what must hold for every plan.
struct Random {
  explicit Random(uint64_t seed) : generator(seed) {}
  int64_t Int(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
  }
  bool Chance(double share) { return std::bernoulli_distribution(share)(generator); }
  std::mt19937_64 generator;
};

struct Case {
  std::vector<PlanRequest> waiting;
  std::vector<WorkerState> workers;
  CostModel cost;
  ShareState shares;
  PlanOptions options;
};

Case MakeCase(uint64_t seed) {
  Random random(seed);
  Case c;
  const int64_t num_waiting = random.Int(0, 120);
  const auto kind = [&] {
    return WorkKind{.model = static_cast<int32_t>(random.Int(0, 2)),
                    .sampler = static_cast<int32_t>(random.Int(0, 2)),
                    .threshold_percent = 90};
  };
  for (int64_t id = 0; id < num_waiting; ++id) {
    PlanRequest request;
    request.id = id;
    request.tenant = static_cast<TenantIndex>(random.Int(0, 5));
    request.tenant_weight = 1.0 + request.tenant % 3;
    request.priority = static_cast<PriorityClass>(random.Int(0, 2));
    request.kind = kind();
    request.canvas_tokens = static_cast<int32_t>(32 * random.Int(1, 16));
    request.sequence_tokens = request.canvas_tokens + static_cast<int32_t>(random.Int(0, 6000));
    request.steps_budget = static_cast<int32_t>(random.Int(1, 256));
    request.steps_done =
        random.Chance(0.2) ? static_cast<int32_t>(random.Int(0, request.steps_budget - 1)) : 0;
    request.steps_min = random.Chance(0.3) ? (request.steps_budget + 1) / 2 : 0;
    request.suspect = random.Chance(0.05);
    request.arrival = kNow - absl::Milliseconds(random.Int(0, 300000));
    if (random.Chance(0.8)) request.deadline = kNow + absl::Milliseconds(random.Int(-500, 60000));
    c.waiting.push_back(request);
  }
  const int64_t num_workers = random.Int(0, 6);
  for (int64_t w = 0; w < num_workers; ++w) {
    WorkerState worker = Worker(static_cast<int32_t>(w), static_cast<int32_t>(random.Int(1, 12)));
    worker.model = static_cast<int32_t>(random.Int(0, 1));
    worker.tokens_max = random.Int(2000, 20000);
    worker.tokens_target = random.Int(1000, worker.tokens_max);
    worker.pads = random.Chance(0.7);
    worker.accepting = random.Chance(0.9);
    const int32_t length = static_cast<int32_t>(random.Int(100, 900));
    for (int64_t r = random.Int(0, std::min<int64_t>(worker.rows_max, worker.tokens_max / 1000));
         r > 0; --r) {
      RunningRow row = Running(1000 + 100 * w + r, length, static_cast<int32_t>(random.Int(2, 99)));
      row.kind.model = worker.model;
      row.steps_done = static_cast<int32_t>(random.Int(0, row.steps_budget - 1));
      if (random.Chance(0.5)) row.deadline = kNow + absl::Milliseconds(random.Int(-100, 30000));
      worker.rows.push_back(row);
    }
    c.workers.push_back(worker);
  }
  for (int64_t i = random.Int(0, 50); i > 0; --i) {
    ObserveStep(0, {4, random.Int(100, 8000), 0.001 * static_cast<double>(random.Int(1, 90))},
                c.cost);
    const WorkKind k = kind();
    ObserveSteps({k, 64, 64, static_cast<int32_t>(random.Int(1, 64))}, c.cost);
  }
  // Shares as a former plan left them.
  c.shares = PlanPacks(c.waiting, c.workers, c.cost, {}, c.options, kNow - absl::Seconds(1)).shares;
  return c;
}

std::string Describe(const Plan& plan) {
  std::string text;
  for (const PlannedPack& pack : plan.packs) {
    absl::StrAppend(&text, "pack ", pack.worker, " ", pack.bucket.model, ".", pack.bucket.length,
                    ".", pack.bucket.steps, " cost ", pack.cost_token_steps, ":");
    for (const PackMember& member : pack.members)
      absl::StrAppend(&text, " ", member.id, "/", member.steps_budget);
    text += '\n';
  }
  for (const Refusal& refusal : plan.refused)
    absl::StrAppend(&text, "refuse ", refusal.id, " ", static_cast<int>(refusal.reason), "\n");
  for (const RequestId id : plan.expired) absl::StrAppend(&text, "expire ", id, "\n");
  for (const TenantShare& share : plan.shares.tenants) {
    absl::StrAppend(&text, "share ", share.lane, " ", share.tenant, " ", share.virtual_time, "\n");
  }
  absl::StrAppend(&text, plan.num_put_off, " ", plan.pressure, " ",
                  absl::FormatDuration(plan.backlog), " ", absl::FormatTime(plan.next));
  return text;
}

TEST(PropertyTest, TheOrderOfTheInputsDoesNotMatter) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Case c = MakeCase(seed);
    const std::string once =
        Describe(PlanPacks(c.waiting, c.workers, c.cost, c.shares, c.options, kNow));
    ASSERT_EQ(once, Describe(PlanPacks(c.waiting, c.workers, c.cost, c.shares, c.options, kNow)));
    std::mt19937_64 generator(seed);
    std::shuffle(c.waiting.begin(), c.waiting.end(), generator);
    std::shuffle(c.workers.begin(), c.workers.end(), generator);
    for (WorkerState& worker : c.workers)
      std::shuffle(worker.rows.begin(), worker.rows.end(), generator);
    ASSERT_EQ(once, Describe(PlanPacks(c.waiting, c.workers, c.cost, c.shares, c.options, kNow)));
  }
}

TEST(PropertyTest, EveryPlanKeepsTheRules) {
  int64_t packed = 0;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const Case c = MakeCase(seed);
    const Plan plan = PlanPacks(c.waiting, c.workers, c.cost, c.shares, c.options, kNow);
    std::set<RequestId> seen;
    for (const Refusal& refusal : plan.refused) ASSERT_TRUE(seen.insert(refusal.id).second);
    for (const RequestId id : plan.expired) {
      ASSERT_TRUE(seen.insert(id).second);
      ASSERT_LE(c.waiting[static_cast<size_t>(id)].deadline, kNow);
    }
    std::map<int32_t, std::vector<const PlanRequest*>> joined;
    for (const PlannedPack& pack : plan.packs) {
      ASSERT_FALSE(pack.members.empty());
      for (const PackMember& member : pack.members) {
        ASSERT_TRUE(seen.insert(member.id).second) << member.id;
        const PlanRequest& request = c.waiting[static_cast<size_t>(member.id)];
        ASSERT_GT(request.deadline, kNow);
        ASSERT_EQ(request.kind.model, pack.bucket.model);
        ASSERT_LE(member.steps_budget, request.steps_budget);
        ASSERT_TRUE(member.steps_budget == request.steps_budget ||
                    (request.steps_done == 0 && request.steps_min > 0 &&
                     member.steps_budget >= request.steps_min));
        joined[pack.worker].push_back(&request);
        ++packed;
      }
    }
    for (const WorkerState& worker : c.workers) {
      const std::vector<const PlanRequest*>& news = joined[worker.id];
      if (news.empty()) continue;
      ASSERT_TRUE(worker.accepting);
      const int64_t rows = static_cast<int64_t>(worker.rows.size() + news.size());
      int64_t sum = 0;
      int64_t longest = 0;
      for (const RunningRow& row : worker.rows) {
        sum += row.sequence_tokens;
        longest = std::max<int64_t>(longest, row.sequence_tokens);
      }
      for (const PlanRequest* request : news) {
        ASSERT_EQ(request->kind.model, worker.model);
        sum += request->sequence_tokens;
        longest = std::max<int64_t>(longest, request->sequence_tokens);
        if (request->suspect) {
          ASSERT_EQ(rows, 1);
        }
      }
      ASSERT_LE(rows, worker.rows_max);
      const int64_t positions = worker.pads ? rows * longest : sum;
      ASSERT_LE(positions, worker.tokens_max);
      if (rows > 1) {
        ASSERT_LE(positions, worker.tokens_target);
      }
      if (worker.pads && rows > 1) {
        ASSERT_LE(positions - sum, c.options.padding_max * static_cast<double>(positions) + 1e-9);
      }
    }
  }
  EXPECT_GT(packed, 1000);
}

// With idle workers of its model, work begins, unless it would probably be in vain (late).
TEST(PropertyTest, IdleWorkersNeverStayIdle) {
  for (uint64_t seed = 0; seed < 500; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Case c = MakeCase(seed);
    for (WorkerState& worker : c.workers) worker.rows.clear();
    const Plan plan = PlanPacks(c.waiting, c.workers, c.cost, c.shares, c.options, kNow);
    std::set<RequestId> gone;
    for (const Refusal& refusal : plan.refused) gone.insert(refusal.id);
    gone.insert(plan.expired.begin(), plan.expired.end());
    std::set<int32_t> used;
    for (const PlannedPack& pack : plan.packs) {
      used.insert(pack.worker);
      for (const PackMember& member : pack.members) gone.insert(member.id);
    }
    for (const WorkerState& worker : c.workers) {
      if (!worker.accepting || used.count(worker.id) > 0) continue;
      for (const PlanRequest& request : c.waiting) {
        const bool could =
            gone.count(request.id) == 0 && request.deadline == absl::InfiniteFuture() &&
            request.kind.model == worker.model && request.sequence_tokens <= worker.tokens_max;
        ASSERT_FALSE(could) << "request " << request.id << " waits, worker " << worker.id
                            << " is idle";
      }
    }
  }
}

}  // namespace
}  // namespace cinnabar
