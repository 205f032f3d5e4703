// Every state a request can be in, times every call: the verdict, the state after it, that the move
// is one MayMove allows, that all of Redis still makes sense, and that a second call changes
// nothing.
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/queue/queue.h"
#include "tests/support/queue_state.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

using Words = std::vector<std::string>;

const Words kStates = {"missing", "queued", "leased",    "running",
                       "done",    "failed", "cancelled", "expired"};

// One partition with at most one request, r, in a given state. Its worker is w1, its batch b1, its
// attempt 1; while it runs, steps 1 and 2 of 10 are published.
class Cell {
 public:
  Cell(RedisClient& redis, const std::string& partition)
      : redis_(redis), prefix_(absl::StrCat("cb:{", partition, "}:")) {
    Raw({"FLUSHALL"});  // functions stay
    epoch_ = Fcall({"lead", "s1", "60000"}).elements[2].integer;
  }

  RedisReply Fcall(const Words& words) {
    Words all = {"FCALL", absl::StrCat("cinnabar_v1_", words[0]), "1", prefix_};
    all.insert(all.end(), words.begin() + 1, words.end());
    const std::vector<absl::string_view> views(all.begin(), all.end());
    auto reply = redis_.Command(views);
    EXPECT_TRUE(reply.ok()) << absl::StrJoin(words, " ") << ": " << reply.status();
    return reply.ok() ? *std::move(reply) : RedisReply();
  }
  // The code, and for calls about rows the first row's verdict.
  std::string Verdict(const Words& words) {
    const RedisReply reply = Fcall(words);
    if (reply.elements.empty()) return "error";
    const std::string code = reply.elements[0].text;
    const bool rows = words[0] == "progress" || words[0] == "hand_back" || words[0] == "dispatch" ||
                      words[0] == "refuse";
    return code == "OK" && rows ? reply.elements[2].text : code;
  }
  std::string State() {
    const RedisReply reply = *redis_.Command({"HGET", absl::StrCat(prefix_, "r:r"), "st"});
    return reply.is_nil() ? "missing" : reply.text;
  }
  void Raw(const Words& words) {
    const std::vector<absl::string_view> views(words.begin(), words.end());
    ASSERT_TRUE(redis_.Command(views).ok());
  }
  std::string Key(const std::string& name) const { return prefix_ + name; }
  std::string Epoch() const { return absl::StrCat(epoch_); }
  std::string StaleEpoch() const { return absl::StrCat(epoch_ - 1); }
  RedisClient& redis() { return redis_; }
  const std::string& prefix() const { return prefix_; }

  Words Enqueue(const std::string& tenant, const std::string& digest) const {
    return {"enqueue", "r",   tenant,  "standard", "",   digest, "10",   "32",
            "10",      "420", "60000", "60000",    "gw", "tag",  "hint", "payload",
            "0",       "0",   "0",     "0",        "0",  "0",    "0",    "0",
            "0",       "0",   "0",     "",         "0",  "5",    "7"};
  }
  Words Dispatch(const std::string& epoch, const std::string& batch) const {
    return {"dispatch", epoch, batch, "any", "4", "10000", "info", "r"};
  }
  static Words Progress(const std::string& boot, const std::string& batch,
                        const std::string& attempt, int step) {
    return {"progress",
            boot,
            "10000",
            "r",
            batch,
            attempt,
            absl::StrCat(step),
            absl::StrCat(step, " ", step, " 10 0"),
            "delta",
            ""};
  }
  static Words Finish(const std::string& boot, const std::string& batch, const std::string& attempt,
                      int last, const std::string& outcome) {
    return {"finish",           boot,    "r",        batch,  attempt,
            absl::StrCat(last), outcome, "2 2 20 0", "stop", "result"};
  }
  static Words HandBack(const std::string& boot, const std::string& batch,
                        const std::string& attempt) {
    return {"hand_back", boot, "r", batch, attempt, "2", "canvas"};
  }
  Words Reap(const std::string& epoch) const { return {"reap", epoch, "10", "3", "10", "0"}; }
  void EndLeases() { Raw({"ZADD", Key("lease"), "XX", "1", "b1"}); }
  void EndDeadline() {
    if (State() == "missing") return;
    Raw({"HSET", Key("r:r"), "dl", "1"});
    Raw({"ZADD", Key("dl"), "XX", "1", "r"});
    const RedisReply row = *redis_.Command({"HGET", Key("b:b1"), "r"});
    std::vector<std::string> parts = absl::StrSplit(row.text, ' ');
    if (parts.size() < 4) return;  // attempt, step, steps, deadline, ... while it runs
    parts[3] = "1";
    Raw({"HSET", Key("b:b1"), "r", absl::StrJoin(parts, " ")});
  }

  void Bring(const std::string& state) {
    if (state == "missing") return;
    ASSERT_EQ(Verdict(Enqueue("t", "d")), "OK");
    if (state == "queued") return;
    ASSERT_EQ(Verdict(Dispatch(Epoch(), "b1")), "OK");
    if (state == "leased") return;
    ASSERT_EQ(Verdict({"start", "w1", "b1", "10000"}), "OK");
    for (int step : {1, 2}) {
      ASSERT_EQ(Verdict(Progress("w1", "b1", "1", step)), "OK");
    }
    if (state == "done" || state == "failed") {
      ASSERT_EQ(Verdict(Finish("w1", "b1", "1", 2, state)), "OK");
    }
    if (state == "cancelled") {
      ASSERT_EQ(Verdict({"cancel", "r", "t", "client"}), "OK");
    }
    if (state == "expired") {
      EndDeadline();
      ASSERT_EQ(Verdict(Reap(Epoch())), "OK");
    }
    ASSERT_EQ(State(), state);
  }

 private:
  RedisClient& redis_;
  std::string prefix_;
  int64_t epoch_ = 0;
};

struct Call {
  std::string name;
  std::function<Words(Cell&)> words;
  // "VERDICT" where the state stays, "VERDICT>state" where it moves; in the order of kStates. One
  // entry stands for all; "*" in it for the state's name in capitals.
  std::string expected;
};

std::vector<Call> Calls() {
  const std::string terminal = "DONE FAILED CANCELLED EXPIRED";
  const std::string fenced_out = "GONE STALE STALE STALE STALE STALE STALE STALE";
  const std::string visible = "NOT_FOUND OK OK OK OK OK OK OK";
  return {
      {"enqueue", [](Cell& c) { return c.Enqueue("t", "d"); },
       "OK>queued DUPLICATE DUPLICATE DUPLICATE DUPLICATE DUPLICATE DUPLICATE DUPLICATE"},
      {"enqueue another body", [](Cell& c) { return c.Enqueue("t", "other"); },
       "OK>queued MISMATCH MISMATCH MISMATCH MISMATCH MISMATCH MISMATCH MISMATCH"},
      {"enqueue another tenant", [](Cell& c) { return c.Enqueue("other", "d"); },
       "OK>queued MISMATCH MISMATCH MISMATCH MISMATCH MISMATCH MISMATCH MISMATCH"},
      {"dispatch", [](Cell& c) { return c.Dispatch(c.Epoch(), "b2"); },
       "GONE OK>leased NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED"},
      {"dispatch the same batch", [](Cell& c) { return c.Dispatch(c.Epoch(), "b1"); },
       "GONE OK>leased OK OK NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED"},
      {"dispatch by a deposed leader", [](Cell& c) { return c.Dispatch(c.StaleEpoch(), "b2"); },
       "STALE_EPOCH"},
      {"dispatch after the deadline",
       [](Cell& c) {
         c.EndDeadline();
         return c.Dispatch(c.Epoch(), "b2");
       },
       "GONE EXPIRED NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED"},
      {"refuse",
       [](Cell& c) {
         return Words{"refuse", c.Epoch(), "too late", "r"};
       },
       "GONE OK>cancelled NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED"},
      {"refuse what was cancelled so",
       [](Cell& c) {
         return Words{"refuse", c.Epoch(), "client", "r"};
       },
       "GONE OK>cancelled NOT_QUEUED NOT_QUEUED NOT_QUEUED NOT_QUEUED OK NOT_QUEUED"},
      {"refuse by a deposed leader",
       [](Cell& c) {
         return Words{"refuse", c.StaleEpoch(), "too late", "r"};
       },
       "STALE_EPOCH"},
      {"forget a dead letter",
       [](Cell&) {
         return Words{"dlq_drop", "1-1"};
       },
       "OK"},
      {"start",
       [](Cell&) {
         return Words{"start", "w1", "b1", "10000"};
       },
       "GONE GONE OK>running OK GONE GONE GONE GONE"},
      {"start by another worker",
       [](Cell&) {
         return Words{"start", "w2", "b1", "10000"};
       },
       "GONE GONE OK>running STALE GONE GONE GONE GONE"},
      {"start after the deadline",
       [](Cell& c) {
         c.EndDeadline();
         return Words{"start", "w1", "b1", "10000"};
       },
       "GONE GONE OK>expired OK>expired GONE GONE GONE GONE"},
      {"progress", [](Cell&) { return Cell::Progress("w1", "b1", "1", 3); },
       "GONE STALE STALE OK " + terminal},
      {"progress again", [](Cell&) { return Cell::Progress("w1", "b1", "1", 2); },
       "GONE STALE STALE OK " + terminal},
      {"progress with a gap", [](Cell&) { return Cell::Progress("w1", "b1", "1", 4); },
       "GONE STALE STALE REWIND " + terminal},
      {"progress beyond", [](Cell&) { return Cell::Progress("w1", "b1", "1", 11); },
       "GONE STALE STALE BAD_STEP " + terminal},
      {"progress of another worker", [](Cell&) { return Cell::Progress("w2", "b1", "1", 3); },
       fenced_out},
      {"progress of another batch", [](Cell&) { return Cell::Progress("w1", "b9", "1", 3); },
       fenced_out},
      {"progress of another attempt", [](Cell&) { return Cell::Progress("w1", "b1", "2", 3); },
       fenced_out},
      {"progress after the deadline",
       [](Cell& c) {
         c.EndDeadline();
         return Cell::Progress("w1", "b1", "1", 3);
       },
       "GONE STALE STALE EXPIRED>expired " + terminal},
      {"finish", [](Cell&) { return Cell::Finish("w1", "b1", "1", 2, "done"); },
       "GONE STALE STALE OK>done DUPLICATE FAILED CANCELLED EXPIRED"},
      {"finish failed", [](Cell&) { return Cell::Finish("w1", "b1", "1", 2, "failed"); },
       "GONE STALE STALE OK>failed DONE DUPLICATE CANCELLED EXPIRED"},
      {"finish with a gap", [](Cell&) { return Cell::Finish("w1", "b1", "1", 3, "done"); },
       "GONE STALE STALE REWIND DUPLICATE FAILED CANCELLED EXPIRED"},
      {"finish too early", [](Cell&) { return Cell::Finish("w1", "b1", "1", 1, "done"); },
       "GONE STALE STALE BAD_STEP DUPLICATE FAILED CANCELLED EXPIRED"},
      {"finish of another worker", [](Cell&) { return Cell::Finish("w2", "b1", "1", 2, "done"); },
       fenced_out},
      {"finish of another batch", [](Cell&) { return Cell::Finish("w1", "b9", "1", 2, "done"); },
       fenced_out},
      {"finish of another attempt", [](Cell&) { return Cell::Finish("w1", "b1", "2", 2, "done"); },
       fenced_out},
      {"hand back", [](Cell&) { return Cell::HandBack("w1", "b1", "1"); },
       "GONE STALE STALE OK>queued " + terminal},
      {"hand back of another worker", [](Cell&) { return Cell::HandBack("w2", "b1", "1"); },
       fenced_out},
      {"hand back of another attempt", [](Cell&) { return Cell::HandBack("w1", "b1", "2"); },
       fenced_out},
      {"cancel",
       [](Cell&) {
         return Words{"cancel", "r", "t", "client"};
       },
       "NOT_FOUND OK>cancelled OK>cancelled OK>cancelled ALREADY ALREADY ALREADY ALREADY"},
      {"cancel because the client of its gateway left",
       [](Cell&) {
         return Words{"cancel", "r", "t", "client", "gw"};
       },
       "NOT_FOUND OK>cancelled OK>cancelled OK>cancelled ALREADY ALREADY ALREADY ALREADY"},
      {"cancel because a client left while another gateway waits",
       [](Cell& c) {
         if (c.State() != "missing") c.Fcall({"attach", "r", "t", "0", "1", "gw2"});
         return Words{"cancel", "r", "t", "client", "gw"};
       },
       "NOT_FOUND WATCHED WATCHED WATCHED ALREADY ALREADY ALREADY ALREADY"},
      {"cancel by another tenant",
       [](Cell&) {
         return Words{"cancel", "r", "other", "client"};
       },
       "NOT_FOUND"},
      {"events",
       [](Cell&) {
         return Words{"events", "r", "t", "0", "100"};
       },
       visible},
      {"events by another tenant",
       [](Cell&) {
         return Words{"events", "r", "other", "0", "100"};
       },
       "NOT_FOUND"},
      {"attach", [](Cell&) { return Words{"attach", "r", "t", "0", "100", "gw2"}; }, visible},
      {"attach by another tenant",
       [](Cell&) { return Words{"attach", "r", "other", "0", "100", "gw2"}; }, "NOT_FOUND"},
      {"reap with nothing due", [](Cell& c) { return c.Reap(c.Epoch()); }, "OK"},
      {"reap after the lease",
       [](Cell& c) {
         c.EndLeases();
         return c.Reap(c.Epoch());
       },
       "OK OK OK>queued OK>queued OK OK OK OK"},
      {"reap after the deadline",
       [](Cell& c) {
         c.EndDeadline();
         return c.Reap(c.Epoch());
       },
       "OK OK>expired OK>expired OK>expired OK OK OK OK"},
      {"reap by a deposed leader",
       [](Cell& c) {
         c.EndLeases();
         c.EndDeadline();
         return c.Reap(c.StaleEpoch());
       },
       "STALE_EPOCH"},
      {"abandon",
       [](Cell&) {
         return Words{"abandon", "w1", "b1"};
       },
       "OK"},
      {"reap what was abandoned",
       [](Cell& c) {
         c.Fcall({"abandon", "w1", "b1"});
         return c.Reap(c.Epoch());
       },
       "OK OK OK OK>queued OK OK OK OK"},
      {"reap what another abandoned",
       [](Cell& c) {
         c.Fcall({"abandon", "w2", "b1"});
         return c.Reap(c.Epoch());
       },
       "OK"},
      {"beat", [](Cell&) { return Words{"beat", "w1", "10000", "10000", "state", "b1"}; }, "OK"},
      {"leave",
       [](Cell&) {
         return Words{"leave", "w1"};
       },
       "OK"},
      {"drain",
       [](Cell&) {
         return Words{"drain", "w1"};
       },
       "OK"},
      {"lane",
       [](Cell&) {
         return Words{"lane", "any"};
       },
       "OK"},
      {"lead by another",
       [](Cell&) {
         return Words{"lead", "s2", "1000"};
       },
       "FOLLOWER"},
      {"resign by another",
       [](Cell&) {
         return Words{"resign", "s2"};
       },
       "NOT_LEADER"},
      {"open", [](Cell&) { return Words{"open", "site", "run", "0", "0", "1", "0"}; }, "OK"},
      {"queues", [](Cell&) { return Words{"queues"}; }, "OK"},
      {"waiting",
       [](Cell&) {
         return Words{"waiting", "standard", "t", "0", "10"};
       },
       "OK"},
      {"workers", [](Cell&) { return Words{"workers"}; }, "OK"},
      {"stats", [](Cell&) { return Words{"stats"}; }, "OK"},
  };
}

class MatrixTest : public testing::Test {
 protected:
  void SetUp() override {
    auto server = RedisServer::Start();
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    redis_ = std::make_unique<RedisClient>(server_->client_options());
    Queue queue(*redis_, {});
    ASSERT_TRUE(queue.Open().ok());
    redis_->set_on_connect(nullptr);
  }
  std::unique_ptr<RedisServer> server_;
  std::unique_ptr<RedisClient> redis_;
};

TEST_F(MatrixTest, EveryStateTimesEveryCallTwice) {
  int num_cells = 0;
  for (const Call& call : Calls()) {
    const Words expected = absl::StrSplit(call.expected, ' ');
    ASSERT_TRUE(expected.size() == 1 || expected.size() == kStates.size()) << call.name;
    for (size_t i = 0; i < kStates.size(); ++i) {
      SCOPED_TRACE(absl::StrCat(call.name, " when ", kStates[i]));
      Cell cell(*redis_, absl::StrCat("m", num_cells++));
      cell.Bring(kStates[i]);
      if (HasFatalFailure()) return;
      const Words words = call.words(cell);
      const std::vector<std::string> want =
          absl::StrSplit(expected[expected.size() == 1 ? 0 : i], '>');
      EXPECT_EQ(cell.Verdict(words), want[0]);
      const std::string after = cell.State();
      EXPECT_EQ(after, want.size() == 2 ? want[1] : kStates[i]);
      if (after != kStates[i]) {
        EXPECT_TRUE(kStates[i] == "missing"
                        ? after == "queued"
                        : MayMove(*ParseRequestState(kStates[i]), *ParseRequestState(after)));
      }
      const bool tampered = call.name.find("deadline") != std::string::npos ||
                            call.name.find("deposed") != std::string::npos;
      if (!tampered) {
        const auto wrong = CheckQueueState(*redis_, cell.prefix());
        ASSERT_TRUE(wrong.ok()) << wrong.status();
        for (const std::string& line : *wrong) ADD_FAILURE() << line;
      }
      const std::string once = *DumpKeys(*redis_, cell.prefix());
      (void)cell.Verdict(words);
      EXPECT_EQ(*DumpKeys(*redis_, cell.prefix()), once) << "a second call changed something";
    }
  }
  EXPECT_GE(num_cells, 8 * 40);
}

// A refused argument is refused before anything is written, whatever the function.
TEST_F(MatrixTest, BadArgumentsChangeNothing) {
  Cell cell(*redis_, "bad");
  cell.Bring("running");
  const std::string before = *DumpKeys(*redis_, cell.prefix());
  int num_refused = 0;
  const Words good = cell.Enqueue("t", "d");
  for (size_t i = 1; i < good.size(); ++i) {
    for (const std::string& value :
         {std::string("-1.5e3\n"), std::string(2000, 'x'), std::string("a b")}) {
      Words words = good;
      words[1] = "fresh";
      words[i] = value;
      Words all = {"FCALL", "cinnabar_v1_enqueue", "1", cell.prefix()};
      all.insert(all.end(), words.begin() + 1, words.end());
      const std::vector<absl::string_view> views(all.begin(), all.end());
      const bool free_text = i == 5 || (i >= 13 && i <= 16);  // digest, tag, hint, payload, replay
      if (free_text && value.size() < 2000) continue;
      if (i == 15 || i == 16) continue;
      ++num_refused;
      EXPECT_TRUE(absl::IsInvalidArgument(redis_->Command(views).status()))
          << "argument " << i << " " << value;
    }
  }
  for (const Words& words :
       {Words{"progress", "w1", "10000", "r", "b1", "1"}, Words{"progress", "w1", "10000"},
        Words{"progress", "w1", "1000", "r", "b1", "1", "0", "1 1 1 1", "", ""},
        Words{"progress", "w1", "1000", "r", "b1", "1", "3", "1 1 1", "", ""},
        Words{"finish", "w1", "r", "b1", "1", "2", "expired", "0 0 0 0", "", ""},
        Words{"dispatch", "1", "b", "any", "1", "1", "info"}, Words{"hand_back", "w1"},
        Words{"ledger_ack", "what"}, Words{"refuse", "1", "why"}, Words{"refuse", "1", "", "r"},
        Words{"dlq_drop"}, Words{"dlq_drop", "1"}, Words{"start", "w 1", "b1", "1"},
        Words{"lead", "", "1"}}) {
    Words all = {"FCALL", absl::StrCat("cinnabar_v1_", words[0]), "1", cell.prefix()};
    all.insert(all.end(), words.begin() + 1, words.end());
    const std::vector<absl::string_view> views(all.begin(), all.end());
    EXPECT_TRUE(absl::IsInvalidArgument(redis_->Command(views).status()))
        << absl::StrJoin(words, " ");
    ++num_refused;
  }
  EXPECT_TRUE(absl::IsInvalidArgument(
      redis_->Command({"FCALL", "cinnabar_v1_stats", "1", "other:"}).status()));
  EXPECT_EQ(*DumpKeys(*redis_, cell.prefix()), before);
  EXPECT_GT(num_refused, 20);
}

// Somebody else's data under our names: an error before anything is written.
TEST_F(MatrixTest, KeysOfAnotherTypeAreAnErrorThatChangesNothing) {
  for (const Words& words :
       {Cell::Progress("w1", "b1", "1", 3), Cell::Finish("w1", "b1", "1", 2, "done"),
        Cell::HandBack("w1", "b1", "1"), Words{"cancel", "r", "t", ""}}) {
    Cell cell(*redis_, absl::StrCat("type_", words[0]));
    cell.Raw({"SET", cell.Key("r:r"), "not a hash"});
    const std::string before = *DumpKeys(*redis_, cell.prefix());
    Words all = {"FCALL", absl::StrCat("cinnabar_v1_", words[0]), "1", cell.prefix()};
    all.insert(all.end(), words.begin() + 1, words.end());
    const std::vector<absl::string_view> views(all.begin(), all.end());
    EXPECT_TRUE(absl::IsDataLoss(redis_->Command(views).status()))
        << redis_->Command(views).status();
    EXPECT_EQ(*DumpKeys(*redis_, cell.prefix()), before);
  }
}

}  // namespace
}  // namespace cinnabar
