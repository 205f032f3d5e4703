// Seeded random histories with zombies, repeats, stale leaders and lost leases: all of Redis must
// make sense after every call. The same driver must catch a library that is broken on purpose.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/queue/library.h"
#include "common/queue/queue.h"
#include "tests/support/history.h"
#include "tests/support/queue_state.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

class Driver {
 public:
  Driver(RedisClient& redis, uint32_t seed)
      : redis_(redis), random_(seed), queue_(redis, {.partition = "rnd"}) {}

  // The first violation, or empty.
  std::string Run(int num_calls) {
    (void)redis_.Command({"FLUSHALL"});
    redis_.Close();
    const auto leadership = queue_.Lead("s1", absl::Hours(1));
    if (!leadership.ok()) return leadership.status().ToString();
    epoch_ = leadership->epoch;
    for (int i = 0; i < num_calls && wrong_.empty(); ++i) {
      Step();
      if (!wrong_.empty()) break;
      CheckMoves();
      if (i % 3 != 0 && i + 1 != num_calls) continue;
      const auto state = CheckQueueState(redis_, "cb:{rnd}:");
      if (!state.ok()) return state.status().ToString();
      if (!state->empty()) wrong_ = state->front();
    }
    if (wrong_.empty()) CheckOutcome();
    return wrong_.empty() ? "" : absl::StrCat(wrong_, " (after ", last_, ")");
  }
  int64_t num_ended() const { return num_ended_; }

 private:
  struct Held {
    RowLease lease;
    std::string boot;
    int32_t step = 0;
  };
  int Pick(size_t size) { return static_cast<int>(random_() % size); }
  std::string AnyRequest() {
    return absl::StrCat("r", Pick(static_cast<size_t>(num_requests_) + 1));
  }
  template <typename T>
  bool Ok(const absl::StatusOr<T>& result) {
    if (!result.ok()) wrong_ = result.status().ToString();
    return result.ok();
  }
  std::vector<std::string> Record(const std::string& id) {
    const auto reply =
        redis_.Command({"HMGET", absl::StrCat("cb:{rnd}:r:", id), "st", "own", "bid", "att"});
    std::vector<std::string> fields;
    for (const RedisReply& each : reply->elements) fields.push_back(each.text);
    return fields;
  }
  // Whether this worker may write: it has the request now.
  bool Owns(const Held& held) {
    const auto record = Record(held.lease.request);
    return record[0] == "running" && record[1] == held.boot && record[2] == held.lease.batch &&
           record[3] == absl::StrCat(held.lease.attempt);
  }
  void Judge(const Held& held, bool owned, RowVerdict verdict, absl::string_view call) {
    const bool terminal = verdict == RowVerdict::kDone || verdict == RowVerdict::kFailed ||
                          verdict == RowVerdict::kCancelled || verdict == RowVerdict::kExpired;
    if (!owned && (verdict == RowVerdict::kOk || verdict == RowVerdict::kRewind ||
                   verdict == RowVerdict::kBadStep)) {
      const auto record = Record(held.lease.request);
      // An end that is repeated is told OK again.
      const bool repeated = call == "finish" && (record[0] == "done" || record[0] == "failed") &&
                            record[1] == held.boot;
      if (!repeated)
        wrong_ = absl::StrCat(call, " of a worker that lost ", held.lease.request, " was taken");
    }
    if (owned && (verdict == RowVerdict::kStale || verdict == RowVerdict::kGone || terminal)) {
      wrong_ = absl::StrCat(call, " of the owner of ", held.lease.request, " was refused");
    }
  }

  void Step() {
    switch (Pick(13)) {
      case 0:
      case 1:
        return Enqueue();
      case 2:
      case 3:
        return Dispatch();
      case 4:
      case 5:
        return Start();
      case 6:
      case 7:
      case 8:
      case 9:
        return Progress();
      case 10:
        return Finish();
      case 11:
        return Pick(2) == 0 ? HandBack() : Cancel();
      case 12:
        return Reap();
    }
  }
  void Enqueue() {
    const bool repeat = num_requests_ > 0 && Pick(4) == 0;
    EnqueueRequest request;
    request.id = repeat ? AnyRequest() : absl::StrCat("r", ++num_requests_);
    last_ = absl::StrCat("enqueue ", request.id);
    const auto known = Record(request.id);
    request.tenant = absl::StrCat("t", std::hash<std::string>()(request.id) % 3);
    request.request_class = kRequestClasses[std::hash<std::string>()(request.id) % 3];
    request.body_digest = "d";
    request.steps_max = 1 + static_cast<int32_t>(std::hash<std::string>()(request.id) % 5);
    request.cost = 10;
    request.payload = "p";
    request.output_price_microdollars = 7;
    const auto result = queue_.Enqueue(request, {});
    if (!Ok(result)) return;
    if ((result->outcome == EnqueueOutcome::kAccepted) != known[0].empty())
      wrong_ = "a request was admitted twice or not at all";
    history_.push_back({.kind = HistoryEvent::Kind::kAccepted, .request = request.id});
  }
  void Dispatch() {
    PackOrder order;
    order.batch = batches_.empty() || Pick(8) != 0 ? absl::StrCat("b", ++num_batches_)
                                                   : batches_[Pick(batches_.size())];
    order.ready_packs_max = 1000;
    for (int i = Pick(4); i >= 0; --i) order.requests.push_back(AnyRequest());
    last_ = absl::StrCat("dispatch ", order.batch);
    const bool stale = Pick(8) == 0;
    std::vector<std::string> before;
    for (const std::string& id : order.requests) before.push_back(Record(id)[0]);
    const auto result = queue_.Dispatch(epoch_ - (stale ? 1 : 0), order);
    if (!Ok(result)) return;
    if (stale != (result->outcome == DispatchResult::Outcome::kStaleEpoch))
      wrong_ = "a deposed leader was heard";
    for (size_t i = 0; i < result->rows.size(); ++i) {
      if (result->rows[i].verdict == DispatchVerdict::kOk && before[i] != "queued" &&
          Record(order.requests[i])[2] != order.batch) {
        wrong_ = absl::StrCat(order.requests[i], " was dispatched while ", before[i]);
      }
    }
    batches_.push_back(order.batch);
  }
  void Start() {
    if (batches_.empty()) return;
    const std::string batch = batches_[Pick(batches_.size())];
    const std::string boot = absl::StrCat("w", Pick(3));
    last_ = absl::StrCat("start ", batch, " by ", boot);
    const auto result = queue_.Start(boot, batch, absl::Hours(1));
    if (!Ok(result)) return;
    for (const StartedRow& row : result->rows) {
      held_.push_back({.lease = row.lease, .boot = boot, .step = row.step});
      if (!Owns(held_.back()))
        wrong_ = absl::StrCat(row.lease.request, " was started for somebody else");
      // The canvas that the snapshot and the deltas build is the one the events tell of.
      std::string built = row.snapshot;
      for (const std::string& delta : row.deltas) built += delta;
      const auto view = queue_.Events(row.lease.request, Tenant(row.lease.request), 0, 100);
      if (!Ok(view)) return;
      std::string told;
      for (const QueueEvent& event : view->events) told += event.data;
      if (built != told)
        wrong_ = absl::StrCat(row.lease.request, " resumes from ", built, ", not ", told);
    }
  }
  std::string Tenant(const std::string& id) const {
    return absl::StrCat("t", std::hash<std::string>()(id) % 3);
  }
  void Progress() {
    if (held_.empty()) return;
    // The newest of the leases most often; the rest are zombies.
    Held& real = held_[Pick(3) == 0 ? Pick(held_.size())
                                    : static_cast<int>(held_.size()) - 1 -
                                          Pick(std::min<size_t>(held_.size(), 4))];
    Held forged = real;
    forged.boot = absl::StrCat("w", Pick(3));
    Held& held = Pick(8) == 0 ? forged : real;
    const int32_t step = Pick(6) == 0 ? 1 + Pick(6) : held.step + 1;
    last_ = absl::StrCat("progress ", held.lease.request, " step ", step, " by ", held.boot);
    const bool owned = Owns(held);
    // What each worker computes differs: a delta of a zombie would show.
    const std::string delta = absl::StrCat("[", step, held.boot, held.lease.batch, "]");
    PublishReport report = {
        .lease_for = absl::Hours(1),
        .progress = {
            {.lease = held.lease, .step = step, .usage = {.output_tokens = step}, .delta = delta}}};
    if (Pick(3) == 0 && owned && step == held.step + 1) {
      const auto view = queue_.Events(held.lease.request, Tenant(held.lease.request), 0, 100);
      if (!Ok(view)) return;
      if (view->step == held.step) {
        for (const QueueEvent& event : view->events) report.progress[0].snapshot += event.data;
        report.progress[0].snapshot += delta;
      }
    }
    if (Pick(2) == 0) report.progress.push_back(report.progress[0]);
    const auto result = queue_.Publish(held.boot, report);
    if (!Ok(result)) return;
    Judge(held, owned, result->progress[0].verdict, "progress");
    if (result->progress[0].verdict == RowVerdict::kOk)
      held.step = std::max(held.step, result->progress[0].step);
  }
  void Finish() {
    if (held_.empty()) return;
    Held held = held_[Pick(held_.size())];
    if (Pick(8) == 0) held.boot = absl::StrCat("w", Pick(3));
    const int32_t too_far = Pick(5) == 0 ? 1 : 0;
    last_ = absl::StrCat("finish ", held.lease.request, " by ", held.boot);
    const bool owned = Owns(held);
    const FinishRow row = {.lease = held.lease,
                           .last_step = held.step + too_far,
                           .failed = Pick(4) == 0,
                           .result = held.boot};
    const auto result = queue_.Publish(held.boot, {.finished = {row, row}});
    if (!Ok(result)) return;
    Judge(held, owned, result->finished[0].verdict, "finish");
    if (owned && too_far > 0 && result->finished[0].verdict == RowVerdict::kOk)
      wrong_ = "an end came before its steps";
    if (result->finished[0].verdict != result->finished[1].verdict)
      wrong_ = "a repeated end got another answer";
  }
  void HandBack() {
    if (held_.empty()) return;
    const Held& held = held_[Pick(held_.size())];
    last_ = absl::StrCat("hand back ", held.lease.request, " by ", held.boot);
    const bool owned = Owns(held);
    const HandBackRow row = {.lease = held.lease};
    const auto result = queue_.HandBack(held.boot, {&row, 1});
    if (!Ok(result)) return;
    Judge(held, owned, (*result)[0].verdict, "hand back");
  }
  void Cancel() {
    const std::string id = AnyRequest();
    last_ = absl::StrCat("cancel ", id);
    const auto result = queue_.Cancel(id, Pick(2) == 0 ? Tenant(id) : "stranger", "test");
    if (!result.ok() && !absl::IsNotFound(result.status())) wrong_ = result.status().ToString();
  }
  void Reap() {
    last_ = "reap";
    if (Pick(2) == 0 && !batches_.empty()) {
      const std::string batch = batches_[Pick(batches_.size())];
      absl::StrAppend(&last_, " after the lease of ", batch);
      (void)redis_.Command({"ZADD", "cb:{rnd}:lease", "XX", "1", batch});
    }
    const bool stale = Pick(6) == 0;
    const auto result = queue_.Reap(epoch_ - (stale ? 1 : 0), {.backoff = absl::ZeroDuration()});
    if (!Ok(result)) return;
    if (stale != result->stale_epoch) wrong_ = "a deposed leader was heard";
  }
  void CheckMoves() {
    for (int i = 1; i <= num_requests_; ++i) {
      const std::string key = absl::StrCat("cb:{rnd}:r:r", i);
      (void)redis_.Append({"HGET", key, "st"});
    }
    const auto replies = redis_.Flush();
    for (int i = 1; i <= num_requests_; ++i) {
      const std::string id = absl::StrCat("r", i);
      const auto& reply = replies[static_cast<size_t>(i) - 1];
      const auto state = ParseRequestState(reply.ok() ? reply->text : "");
      if (!state.ok()) {
        wrong_ = absl::StrCat(id, " is lost");
        continue;
      }
      const auto [before, fresh] = states_.emplace(id, *state);
      if (!fresh && before->second != *state && !MayMove(before->second, *state)) {
        wrong_ = absl::StrCat(id, " moved from ", RequestStateName(before->second), " to ",
                              RequestStateName(*state));
      }
      before->second = *state;
    }
  }
  // What a gateway and an exporter would have seen, for the history checker.
  void CheckOutcome() {
    for (const auto& [id, state] : states_) {
      const auto view = queue_.Events(id, Tenant(id), 0, 100);
      if (!Ok(view)) return;
      for (const QueueEvent& event : view->events) {
        history_.push_back(
            {.kind = event.final_state ? HistoryEvent::Kind::kFinal : HistoryEvent::Kind::kProgress,
             .request = id,
             .observer = "gateway",
             .step = event.step,
             .state = event.final_state.value_or(RequestState::kDone),
             .data = event.data});
      }
      num_ended_ += IsTerminal(state) ? 1 : 0;
    }
    const auto ledger = queue_.ReadLedger("0", 100000);
    if (!Ok(ledger)) return;
    for (const LedgerEntry& entry : *ledger) {
      history_.push_back(
          {.kind = HistoryEvent::Kind::kLedger, .request = entry.request, .state = entry.state});
    }
    const std::vector<std::string> broken = CheckHistory(history_, /*complete=*/false);
    if (!broken.empty()) wrong_ = broken.front();
  }

  RedisClient& redis_;
  std::mt19937 random_;
  Queue queue_;
  int64_t epoch_ = 0;
  int num_requests_ = 0;
  int num_batches_ = 0;
  int64_t num_ended_ = 0;
  std::vector<std::string> batches_;
  std::vector<Held> held_;
  std::map<std::string, RequestState> states_;
  std::vector<HistoryEvent> history_;
  std::string wrong_;
  std::string last_;
};

class RandomTest : public testing::Test {
 protected:
  void SetUp() override {
    auto server = RedisServer::Start({.config = {"appendonly no"}});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    redis_ = std::make_unique<RedisClient>(server_->client_options());
    ASSERT_TRUE(EnsureQueueLibrary(*redis_, true).ok());
  }
  std::unique_ptr<RedisServer> server_;
  std::unique_ptr<RedisClient> redis_;
};

TEST_F(RandomTest, RandomHistoriesKeepEveryPromise) {
  for (const uint32_t seed : {1U, 2U, 3U, 4U, 5U, 6U}) {
    SCOPED_TRACE(absl::StrCat("seed=", seed));
    Driver driver(*redis_, seed);
    EXPECT_EQ(driver.Run(300), "");
    EXPECT_GT(driver.num_ended(), 5);
  }
}

struct Mutant {
  const char* name;
  const char* find;
  const char* replace;
};

// The attempt's part of the fence is not among them: a batch name is never used again, so only the
// direct test (matrix_test.cc) can tell.
TEST_F(RandomTest, ABrokenLibraryIsCaught) {
  const Mutant mutants[] = {
      {"no fence on the worker", "if owner ~= boot then return nil end", ""},
      {"ends are not remembered", "and TERMINAL[h[1]] then return string.upper(h[1]) end",
       "and false then return '' end"},
      {"steps forgotten when a request leaves",
       "if row then call('HSET', P .. 'r:' .. rid, 'stp', row.stp, 'use', row.use) end", ""},
      {"steps not kept", "if #written > 0 then call('HSET', batch.key, unpack(written)) end", ""},
      {"cancel ends twice", "if TERMINAL[h[1]] then return {'ALREADY', 0, h[1]} end", ""},
      {"no ledger entry", "call('XADD', P .. 'ledger', '*'", "call('EXISTS', P .. 'ledger', '*'"},
      {"no final event", "call('XADD', ev, string.format('%.0f-1', stp + 1), 'k', st, 'd', why)",
       ""},
      {"quota not released", "'n', (tonumber(lim[1]) or 0) - 1", "'n', (tonumber(lim[1]) or 0)"},
      {"cost not released",
       "'n', (tonumber(tot[1]) or 0) - 1, 'rsv', (tonumber(tot[2]) or 0) - cost",
       "'n', (tonumber(tot[1]) or 0) - 1"},
      {"payload kept", "call('DEL', P .. 'pl:' .. rid, P .. 'cv:' .. rid)", ""},
      {"steps twice", "if step == row.stp + 1 then\n          change(c)",
       "if step <= row.stp + 1 then\n          change(c)"},
      {"gaps taken",
       "if step > row.stp + 1 then verdict = 'REWIND'  -- Redis forgot steps: the worker sends "
       "them again\n      else\n"
       "        verdict = 'OK'\n        if step == row.stp + 1 then",
       "if true then\n        verdict = 'OK'\n        if step > row.stp then"},
      {"finish before its steps", "if last > stp then return {'REWIND', 0, stp} end", "stp = last"},
      {"not queued again", "call('ZADD', P .. 'q:' .. h.cl .. ':' .. h.tn, h.seq, rid)", ""},
      {"batch not left", "if call('HDEL', b, rid) == 1", "if false"},
      {"deposed leaders heard", "if current ~= epoch or epoch == 0 then", "if false then"},
      {"dispatched twice", "elseif h[1] ~= 'queued' or again then verdict = 'NOT_QUEUED'",
       "elseif TERMINAL[h[1]] then verdict = 'NOT_QUEUED'"},
      {"admitted twice", "if known[1] then\n    if known[2]", "if false then\n    if known[2]"},
      {"started twice", "if batch['@w'] ~= '' and batch['@w'] ~= boot then return {'STALE', 0} end",
       "batch['@w'] = ''"},
      {"owner kept", "'st', 'queued', 'bid', '', 'own', ''", "'st', 'queued', 'bid', ''"},
      {"deltas forgotten at a restart", "if upto > from then", "if false then"},
      {"dead letter forgotten", "if st == 'failed' then\n    call('XADD', P .. 'dlq'",
       "if false then\n    call('XADD', P .. 'dlq'"},
      {"reaped without its lease", "'-inf', t, 'LIMIT', 0, count)) do\n    change(c)\n",
       "'-inf', '+inf', 'LIMIT', 0, count)) do\n    change(c)\n    call('ZREM', P .. 'lease', "
       "bid)\n    if true then return {'OK', 0, 0, 0, 0, 0} end\n"},
  };
  for (const Mutant& mutant : mutants) {
    SCOPED_TRACE(mutant.name);
    const std::string text = kQueueLibraryText;
    ASSERT_TRUE(absl::StrContains(text, mutant.find)) << "the mutation finds nothing to change";
    const std::string broken = absl::StrReplaceAll(text, {{mutant.find, mutant.replace}});
    const auto loaded = redis_->Command({"FUNCTION", "LOAD", "REPLACE", broken});
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    std::string caught;
    for (uint32_t seed = 1; seed <= 6 && caught.empty(); ++seed)
      caught = Driver(*redis_, seed).Run(300);
    EXPECT_NE(caught, "");
    if (testing::Test::HasFailure()) continue;
    GTEST_LOG_(INFO) << mutant.name << ": " << caught.substr(0, 120);
  }
}

}  // namespace
}  // namespace cinnabar
