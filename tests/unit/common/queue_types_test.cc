#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "absl/strings/str_cat.h"
#include "common/queue/library.h"
#include "common/queue/queue.h"
#include "common/queue/types.h"
#include "tests/support/history.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

TEST(LifeCycleTest, OnlyTheseMoves) {
  int num_moves = 0;
  for (const RequestState from : kRequestStates) {
    EXPECT_FALSE(MayMove(from, from));
    for (const RequestState to : kRequestStates) {
      num_moves += MayMove(from, to) ? 1 : 0;
      EXPECT_FALSE(IsTerminal(from) && MayMove(from, to));
      EXPECT_TRUE(to != RequestState::kDone ||
                  MayMove(from, to) == (from == RequestState::kRunning));
    }
    EXPECT_EQ(*ParseRequestState(RequestStateName(from)), from);
  }
  EXPECT_EQ(num_moves, 13);
}

TEST(UsageTest, RoundTrips) {
  const Usage usage = {.output_tokens = 8, .forwards = 3, .device_us = 123456789, .energy_mj = 7};
  EXPECT_EQ(*ParseUsage(FormatUsage(usage)), usage);
  EXPECT_FALSE(ParseUsage("1 2 3").ok());
  EXPECT_FALSE(ParseUsage("1 2 3 x").ok());
}

TEST(EventMessageTest, DataIsAnyBytes) {
  const auto events = Queue::ParseEventMessage("r-1 12 p 5 a b\ncr-2 13 done 0 ");
  ASSERT_TRUE(events.ok()) << events.status();
  ASSERT_EQ(events->size(), 2U);
  EXPECT_EQ((*events)[0].request, "r-1");
  EXPECT_EQ((*events)[0].step, 12);
  EXPECT_FALSE((*events)[0].final_state.has_value());
  EXPECT_EQ((*events)[0].data, "a b\nc");
  EXPECT_EQ((*events)[1].request, "r-2");
  EXPECT_EQ((*events)[1].final_state, RequestState::kDone);
  for (const char* wrong : {"r-1 13 what 1 x", "r-1", "r-1 1 p 9 short", "r-1 x p 1 y",
                            "r-1 1 p -1 y", "r-1 1 p 1 yz"}) {
    EXPECT_FALSE(Queue::ParseEventMessage(wrong).ok()) << wrong;
  }
}

TEST(LibraryVersionTest, NewerReplacesAndATwinIsRefused) {
  const LibraryVersion ours = {.revision = 3, .digest = "a"};
  EXPECT_EQ(DecideLibrary(std::nullopt, ours), LibraryAction::kLoad);
  EXPECT_EQ(DecideLibrary(LibraryVersion{2, "b"}, ours), LibraryAction::kLoad);
  EXPECT_EQ(DecideLibrary(LibraryVersion{3, "a"}, ours), LibraryAction::kUse);
  EXPECT_EQ(DecideLibrary(LibraryVersion{3, "b"}, ours), LibraryAction::kRefuse);
  EXPECT_EQ(DecideLibrary(LibraryVersion{4, "b"}, ours), LibraryAction::kUse);
}

using Kind = HistoryEvent::Kind;

std::vector<HistoryEvent> GoodHistory() {
  return {{.kind = Kind::kAccepted, .request = "r"},
          {.kind = Kind::kProgress, .request = "r", .observer = "a", .step = 1, .data = "x"},
          {.kind = Kind::kProgress, .request = "r", .observer = "a", .step = 2, .data = "y"},
          {.kind = Kind::kProgress, .request = "r", .observer = "b", .step = 2, .data = "y"},
          {.kind = Kind::kFinal,
           .request = "r",
           .observer = "a",
           .step = 3,
           .state = RequestState::kDone},
          {.kind = Kind::kFinal,
           .request = "r",
           .observer = "b",
           .step = 3,
           .state = RequestState::kDone},
          {.kind = Kind::kLedger, .request = "r", .state = RequestState::kDone}};
}

TEST(HistoryCheckerTest, AcceptsAGoodOneAndNamesEachBreach) {
  EXPECT_THAT(CheckHistory(GoodHistory(), true), IsEmpty());
  const auto broken = [](const std::function<void(std::vector<HistoryEvent>&)>& change) {
    std::vector<HistoryEvent> events = GoodHistory();
    change(events);
    std::string all;
    for (const std::string& line : CheckHistory(events, true)) absl::StrAppend(&all, line, "\n");
    return all;
  };
  EXPECT_THAT(broken([](auto& e) { e.push_back(e.back()); }), HasSubstr("2 ledger entries"));
  EXPECT_THAT(broken([](auto& e) { e.pop_back(); }), HasSubstr("no ledger entry"));
  EXPECT_THAT(broken([](auto& e) { e.erase(e.begin() + 1, e.end()); }),
              HasSubstr("accepted and lost"));
  EXPECT_THAT(broken([](auto& e) { e.erase(e.begin() + 2); }), HasSubstr("follows step 1"));
  EXPECT_THAT(broken([](auto& e) { e[3].data = std::string(1, 'z'); }),
              HasSubstr("another content"));
  EXPECT_THAT(broken([](auto& e) { e[5].state = RequestState::kFailed; }),
              HasSubstr("two terminal states"));
  EXPECT_THAT(broken([](auto& e) { std::swap(e[2], e[4]); }), HasSubstr("after the final one"));
  EXPECT_THAT(broken([](auto& e) { e[0].kind = Kind::kRefused; }), HasSubstr("yet it ran"));
}

}  // namespace
}  // namespace cinnabar
