#include "gateway/api/text_assembler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/check.h"
#include "common/tokenizer/utf8.h"

namespace cinnabar {
namespace {

constexpr char kShade[] = "\u2591";

const Tokenizer& Tiny() {
  static const Tokenizer* tokenizer = [] {
    const char* source_dir = std::getenv("CINNABAR_SOURCE_DIR");
    absl::StatusOr<Tokenizer> loaded = Tokenizer::Load(
        absl::StrCat(source_dir == nullptr ? "." : source_dir, "/models/cinnabar-tiny"));
    CINNABAR_CHECK(loaded.ok()) << loaded.status().ToString();
    return new Tokenizer(*std::move(loaded));
  }();
  return *tokenizer;
}

constexpr TokenId kEos = 1;
constexpr TokenId kBos = 2;

// The id of exactly these bytes; with it a test chooses where tokens are cut.
TokenId Id(absl::string_view bytes) {
  const std::optional<int32_t> id = Tiny().IdOf(bytes);
  CINNABAR_CHECK(id.has_value()) << std::string(bytes);
  return *id;
}

// One token a byte.
std::vector<TokenId> Bytes(absl::string_view text) {
  std::vector<TokenId> ids;
  for (const char& byte : text) ids.push_back(Id(absl::string_view(&byte, 1)));
  return ids;
}

TextOptions Span(int32_t begin, int32_t length, std::vector<std::string> stop = {}) {
  return {.begin = begin, .end = begin + length, .end_tokens = {kEos}, .stop = std::move(stop)};
}

// Feeds one token after the other, each at once final.
std::vector<std::string> Feed(TextAssembler& assembler, const std::vector<TokenId>& tokens,
                              int32_t begin) {
  std::vector<std::string> pieces;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int32_t position = begin + static_cast<int32_t>(i);
    const absl::StatusOr<std::string> piece = assembler.Add({position}, {tokens[i]}, position + 1);
    EXPECT_TRUE(piece.ok()) << piece.status();
    pieces.push_back(piece.value_or("?"));
  }
  return pieces;
}

using ::testing::ElementsAre;

TEST(TextAssemblerTest, OnlyTheContiguousFinalPrefixGoesOut) {
  TextAssembler assembler(Tiny(), Span(10, 4));
  EXPECT_EQ(assembler.Add({11, 13}, {Id("b"), Id("d")}, 10).value(), "");
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat(kShade, "b", kShade, "d"));
  EXPECT_EQ(assembler.Add({10}, {Id("a")}, 12).value(), "ab");
  EXPECT_EQ(assembler.completion_tokens(), 2);
  EXPECT_FALSE(assembler.done());
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat("ab", kShade, "d"));
  EXPECT_EQ(assembler.Add({12}, {Id("c")}, 14).value(), "cd");
  EXPECT_TRUE(assembler.done());
  EXPECT_EQ(assembler.finish_reason(), FinishReason::kLength);
  EXPECT_EQ(assembler.completion_tokens(), 4);
  EXPECT_EQ(assembler.text(), "abcd");
  EXPECT_EQ(assembler.Snapshot(), "abcd");
}

TEST(TextAssemblerTest, ATokenIsNotFinalBeforeItsBlockIs) {
  TextAssembler assembler(Tiny(), Span(0, 4));
  EXPECT_EQ(assembler.Add({0, 1}, {Id("a"), Id("b")}, 0).value(), "");
  EXPECT_EQ(assembler.Add({2, 3}, {Id("c"), Id("d")}, 4).value(), "abcd");
}

TEST(TextAssemblerTest, TheTextEndsAtAnEndToken) {
  TextAssembler assembler(Tiny(), Span(0, 8));
  EXPECT_EQ(assembler.Add({0, 1, 2}, {Id("a"), Id("b"), kEos}, 3).value(), "ab");
  EXPECT_TRUE(assembler.done());
  EXPECT_EQ(assembler.finish_reason(), FinishReason::kStop);
  EXPECT_EQ(assembler.completion_tokens(), 2);
  EXPECT_EQ(assembler.Snapshot(), "ab");
  // What follows is of no interest, broken or not.
  EXPECT_EQ(assembler.Add({3}, {Id("c")}, 8).value(), "");
  EXPECT_EQ(assembler.text(), "ab");
}

TEST(TextAssemblerTest, SpecialTokensAreNotShown) {
  TextAssembler assembler(Tiny(), Span(0, 3));
  EXPECT_EQ(assembler.Add({0, 1, 2}, {Id("a"), kBos, Id("b")}, 3).value(), "ab");
  EXPECT_EQ(assembler.completion_tokens(), 3);
}

TEST(TextAssemblerTest, NoCharacterIsCutInTwo) {
  TextAssembler assembler(Tiny(), Span(0, 6));
  EXPECT_THAT(Feed(assembler, Bytes("é🦙"), 0), ElementsAre("", "é", "", "", "", "🦙"));
  EXPECT_EQ(assembler.text(), "é🦙");
}

TEST(TextAssemblerTest, ACutCharacterAtTheEndIsReplaced) {
  TextAssembler whole(Tiny(), Span(0, 2));
  EXPECT_EQ(whole.Add({0, 1}, {Id("a"), Id("\xC3")}, 2).value(), "a\uFFFD");
  EXPECT_EQ(whole.Snapshot(), "a\uFFFD");
  TextAssembler ended(Tiny(), Span(0, 9));
  EXPECT_EQ(ended.Add({0, 1}, {Id("\xC3"), kEos}, 2).value(), "\uFFFD");
  EXPECT_EQ(ended.finish_reason(), FinishReason::kStop);
}

TEST(TextAssemblerTest, AStopStringAcrossChunksIsNotReturned) {
  TextAssembler assembler(Tiny(), Span(0, 8, {"END"}));
  EXPECT_THAT(Feed(assembler, Bytes("aENbENDz"), 0),
              ElementsAre("a", "", "", "ENb", "", "", "", ""));
  EXPECT_EQ(assembler.text(), "aENb");
  EXPECT_EQ(assembler.finish_reason(), FinishReason::kStop);
  EXPECT_EQ(assembler.completion_tokens(), 7);
  EXPECT_EQ(assembler.Snapshot(), "aENb");
}

TEST(TextAssemblerTest, OnlyAStopStringCutsWorkShort) {
  TextAssembler cut(Tiny(), Span(0, 8, {"END"}));
  Feed(cut, Bytes("aEN"), 0);
  EXPECT_FALSE(cut.cut_short());
  EXPECT_TRUE(cut.Add({3}, Bytes("D"), 4).ok());
  EXPECT_TRUE(cut.cut_short());
  TextAssembler at_the_end(Tiny(), Span(0, 4, {"END"}));
  Feed(at_the_end, Bytes("aEND"), 0);
  EXPECT_TRUE(at_the_end.done());
  EXPECT_FALSE(at_the_end.cut_short());
  TextAssembler by_token(Tiny(), Span(0, 8, {"END"}));
  EXPECT_TRUE(by_token.Add({0}, {kEos}, 1).ok());
  EXPECT_TRUE(by_token.done());
  EXPECT_FALSE(by_token.cut_short());
}

TEST(TextAssemblerTest, WhatOnlyLookedLikeAStopStringComesAtTheEnd) {
  TextAssembler by_length(Tiny(), Span(0, 3, {"END"}));
  EXPECT_THAT(Feed(by_length, Bytes("aEN"), 0), ElementsAre("a", "", "EN"));
  EXPECT_EQ(by_length.finish_reason(), FinishReason::kLength);
  TextAssembler by_token(Tiny(), Span(0, 5, {"END"}));
  EXPECT_EQ(Feed(by_token, Bytes("EN"), 0).back(), "");
  EXPECT_EQ(by_token.Add({2}, {kEos}, 3).value(), "EN");
  TextAssembler broken_off(Tiny(), Span(0, 5, {"END"}));
  Feed(broken_off, Bytes("EN"), 0);
  EXPECT_EQ(broken_off.Finish(), "EN");
  EXPECT_EQ(broken_off.Finish(), "");
  EXPECT_TRUE(broken_off.done());
}

TEST(TextAssemblerTest, TheStopStringThatIsCompleteFirstWins) {
  // "b" is complete before "abc" is, though "abc" begins before it.
  TextAssembler first(Tiny(), Span(0, 4, {"abc", "b"}));
  EXPECT_EQ(first.Add({0, 1, 2, 3}, Bytes("xabc"), 4).value(), "xa");
  // Also within one token.
  TextAssembler token(Tiny(), Span(0, 4, {"return", "tur"}));
  EXPECT_EQ(token.Add({0}, {Id("return")}, 1).value(), "re");
  // Of two that end together the longer.
  TextAssembler longer(Tiny(), Span(0, 4, {"bc", "abc"}));
  EXPECT_EQ(longer.Add({0, 1, 2, 3}, Bytes("xabc"), 4).value(), "x");
}

TEST(TextAssemblerTest, EchoComesFirstAndStopsNothing) {
  TextOptions options = Span(0, 2, {"END"});
  options.echo = "the END: E";
  TextAssembler assembler(Tiny(), options);
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat("the END: E", kShade, kShade));
  EXPECT_EQ(assembler.Add({}, {}, 0).value(), "the END: E");
  EXPECT_EQ(assembler.Add({0, 1}, Bytes("ND"), 2).value(), "ND");
  EXPECT_EQ(assembler.text(), "the END: END");
  TextAssembler nothing(Tiny(), options);
  EXPECT_EQ(nothing.Finish(), "the END: E");
}

TEST(TextAssemblerTest, GivenPositionsOfTheSpan) {
  TextOptions options = Span(5, 3);
  options.given = {-1, Id("b"), -1};
  TextAssembler assembler(Tiny(), options);
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat(kShade, "b", kShade));
  EXPECT_EQ(assembler.Add({5}, {Id("a")}, 7).value(), "ab");
}

TEST(TextAssemblerTest, ModelsWithoutAMaskTokenChangeTheirMinds) {
  TextOptions options = Span(0, 3);
  options.commits_stay = false;
  TextAssembler assembler(Tiny(), options);
  EXPECT_EQ(assembler.Add({0, 1, 2}, Bytes("xyz"), 0).value(), "");
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat(kShade, kShade, kShade));
  EXPECT_EQ(assembler.Add({0, 2}, Bytes("ac"), 1).value(), "a");
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat("a", kShade, kShade));
  EXPECT_EQ(assembler.Add({1}, Bytes("b"), 3).value(), "bc");
}

TEST(TextAssemblerTest, SnapshotsEndAtTheFirstEndTokenThatIsThere) {
  TextAssembler assembler(Tiny(), Span(0, 6));
  ASSERT_TRUE(assembler.Add({1, 3, 4}, {Id("b"), kEos, Id("z")}, 0).ok());
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat(kShade, "b", kShade));
  ASSERT_TRUE(assembler.Add({2}, {Id("\xC3")}, 0).ok());
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat(kShade, "b\uFFFD"));
}

TEST(TextAssemblerTest, PositionsOutsideAreIgnored) {
  TextAssembler assembler(Tiny(), Span(4, 2));
  EXPECT_EQ(
      assembler.Add({0, 3, 4, 6, 2000000000, -5}, {9, 9, Id("a"), 9, 9, 9}, 1000).status().code(),
      absl::StatusCode::kDataLoss);  // position 5 is final without a token
  EXPECT_EQ(assembler.Add({0, 3, 4, 6}, {9, 9, Id("a"), 9}, 5).value(), "a");
  EXPECT_EQ(assembler.Add({5, 6}, {Id("b"), 9}, 1000).value(), "b");
  EXPECT_TRUE(assembler.done());
}

TEST(TextAssemblerTest, ADeltaThatMakesNoSenseChangesNothing) {
  TextAssembler assembler(Tiny(), Span(0, 3));
  ASSERT_TRUE(assembler.Add({0}, {Id("a")}, 1).ok());
  EXPECT_EQ(assembler.Add({1, 2}, {Id("b")}, 2).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(assembler.Add({2}, {Id("c")}, 3).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat("a", kShade, kShade));
  // A repeated step is no error, nor does `final_end` go back.
  EXPECT_EQ(assembler.Add({0}, {Id("a")}, 0).value(), "");
  EXPECT_EQ(assembler.Add({1, 2}, Bytes("bc"), 3).value(), "bc");
}

TEST(TextAssemblerTest, WhatMayStillChangeIsDraftAndNotText) {
  TextAssembler assembler(Tiny(), Span(0, 3));
  EXPECT_EQ(assembler.Add({0, 1, 2}, Bytes("axc"), 0).value(), "");
  EXPECT_EQ(assembler.Snapshot(), "axc");
  EXPECT_EQ(assembler.Add({0, 1}, std::vector<TokenId>{-1, Id("b")}, 0).value(), "");
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat(kShade, "bc"));
  EXPECT_EQ(assembler.Add({1, 2}, std::vector<TokenId>{Id("b"), -1}, 1).status().code(),
            absl::StatusCode::kDataLoss);  // a mask cannot be final
  EXPECT_EQ(assembler.Add({0}, {Id("d")}, 1).value(), "d");
  EXPECT_EQ(assembler.Add({0, 2}, std::vector<TokenId>{-1, -1}, 1).value(), "");  // 0 is final
  EXPECT_EQ(assembler.Snapshot(), absl::StrCat("db", kShade));
  EXPECT_EQ(assembler.Add({2}, {Id("c")}, 3).value(), "bc");
}

TEST(TextAssemblerTest, AResultFillsWhatIsMissing) {
  TextAssembler assembler(Tiny(), Span(2, 5));
  ASSERT_TRUE(assembler.Add({2}, {Id("a")}, 3).ok());
  EXPECT_EQ(assembler.AddResult(std::vector<TokenId>{Id("a"), Id("b"), kEos, -1, -1}).value(), "b");
  EXPECT_EQ(assembler.finish_reason(), FinishReason::kStop);
  EXPECT_EQ(assembler.AddResult(std::vector<TokenId>{0, 0, 0, 0, 0}).value(), "");

  const auto code = [](std::vector<TokenId> result) {
    TextAssembler other(Tiny(), Span(2, 3));
    CINNABAR_CHECK(other.Add({2}, {Id("a")}, 3).ok());
    return other.AddResult(result).status().code();
  };
  EXPECT_EQ(code({Id("a"), Id("b"), Id("c")}), absl::StatusCode::kOk);
  EXPECT_EQ(code({Id("a"), Id("b")}), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code({Id("x"), Id("b"), Id("c")}), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code({Id("a"), Id("b"), -1}), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code({-1, -1, -1}), absl::StatusCode::kDataLoss);
}

// ---- Properties ----

struct Answer {
  std::string text;
  FinishReason reason = FinishReason::kLength;
};

// The definition of the header, in one go over the full text.
Answer OneShot(const std::vector<TokenId>& tokens, const std::vector<std::string>& stop) {
  Answer answer;
  const auto end = std::find(tokens.begin(), tokens.end(), kEos);
  if (end != tokens.end()) answer.reason = FinishReason::kStop;
  answer.text =
      Tiny().DecodeText(std::vector<TokenId>(tokens.begin(), end), {.skip_special = true});
  for (size_t stop_end = 1; stop_end <= answer.text.size(); ++stop_end) {
    size_t longest = 0;
    for (const std::string& string : stop) {
      if (absl::EndsWith(absl::string_view(answer.text).substr(0, stop_end), string)) {
        longest = std::max(longest, string.size());
      }
    }
    if (longest == 0) continue;
    answer.text.resize(stop_end - longest);
    answer.reason = FinishReason::kStop;
    break;
  }
  return answer;
}

TEST(TextAssemblerTest, AnyOrderGivesTheTextOfTheWhole) {
  std::mt19937 random(20261123);
  // Few letters, so that stop strings are met and nearly met; bytes of characters, whole or torn.
  const std::vector<TokenId> alphabet = {Id("return"), Id("a"),  Id("b"),    Id("a"),
                                         Id("b"),      Id("\n"), Id("\xC3"), Id("\xA9"),
                                         Id("\xF0"),   kBos,     kEos};
  const std::vector<std::string> stops = {"ab", "aab",    "b\n", "abab", "\n\n",   "é",
                                          "aé", "\uFFFD", "ba",  "tur",  "return", "nr"};
  int num_stopped = 0, num_full = 0;
  for (int round = 0; round < 4000; ++round) {
    SCOPED_TRACE(absl::StrCat("round ", round));
    const int32_t length = 1 + static_cast<int32_t>(random() % 40);
    const int32_t begin = static_cast<int32_t>(random() % 5);
    const int32_t block = 1 + static_cast<int32_t>(random() % length);
    std::vector<TokenId> tokens(length);
    for (TokenId& token : tokens) {
      token = alphabet[random() % (alphabet.size() - (random() % 8 == 0 ? 0 : 1))];
    }
    std::vector<std::string> stop;
    for (size_t count = random() % 4; count > 0; --count)
      stop.push_back(stops[random() % stops.size()]);
    const Answer want = OneShot(tokens, stop);

    TextAssembler assembler(Tiny(), Span(begin, length, stop));
    std::string streamed;
    std::vector<bool> decided(length, false);
    // Blocks from left to right; inside a block any order, several at a time.
    for (int32_t from = 0; from < length; from += block) {
      std::vector<int32_t> order(std::min(block, length - from));
      std::iota(order.begin(), order.end(), from);
      std::shuffle(order.begin(), order.end(), random);
      const bool finalize_each = random() % 2 == 0;
      for (size_t next = 0; next < order.size();) {
        const size_t count = std::min<size_t>(1 + random() % 4, order.size() - next);
        std::vector<int32_t> positions(order.begin() + next, order.begin() + next + count);
        std::sort(positions.begin(), positions.end());
        next += count;
        std::vector<int32_t> step_tokens;
        for (int32_t& position : positions) {
          decided[position] = true;
          step_tokens.push_back(tokens[position]);
          position += begin;
        }
        int32_t final_end = from;
        if (finalize_each) {
          while (final_end < length && decided[final_end]) ++final_end;
        } else if (next == order.size()) {
          final_end = from + static_cast<int32_t>(order.size());
        }
        const absl::StatusOr<std::string> piece =
            assembler.Add(positions, step_tokens, begin + final_end);
        ASSERT_TRUE(piece.ok()) << piece.status();
        streamed += *piece;
        // Append-safe: each piece is whole characters, and what went out is part of the answer.
        ASSERT_EQ(ValidUtf8End(*piece, 0), piece->size());
        ASSERT_TRUE(absl::StartsWith(want.text, streamed)) << streamed << " | " << want.text;
        const std::string snapshot = assembler.Snapshot();
        ASSERT_EQ(ValidUtf8End(snapshot, 0), snapshot.size());
        ASSERT_TRUE(absl::StartsWith(snapshot, streamed)) << snapshot << " | " << streamed;
      }
    }
    ASSERT_TRUE(assembler.done());
    EXPECT_EQ(streamed, want.text);
    EXPECT_EQ(assembler.text(), want.text);
    EXPECT_EQ(assembler.Snapshot(), want.text);
    EXPECT_EQ(assembler.finish_reason(), want.reason);
    EXPECT_EQ(assembler.Finish(), "");

    // All at once: the same text and the same count.
    TextAssembler whole(Tiny(), Span(begin, length, stop));
    EXPECT_EQ(whole.AddResult(tokens).value(), want.text);
    EXPECT_EQ(whole.completion_tokens(), assembler.completion_tokens());
    EXPECT_EQ(whole.finish_reason(), want.reason);
    (want.reason == FinishReason::kStop ? num_stopped : num_full) += 1;
  }
  // The draw met both kinds.
  EXPECT_GT(num_stopped, 500);
  EXPECT_GT(num_full, 500);
}

}  // namespace
}  // namespace cinnabar
