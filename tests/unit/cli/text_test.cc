// What is read from a gateway and shown in a terminal: events, chunks, refusals, URLs, frames.
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/api_client.h"
#include "cli/http_client.h"
#include "cli/sse.h"
#include "cli/stream_view.h"
#include "cli/terminal.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace cinnabar {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<std::string> Decode(const std::string& bytes, size_t piece) {
  std::vector<std::string> events;
  SseDecoder decoder;
  for (size_t at = 0; at < bytes.size(); at += piece) {
    const absl::Status status = decoder.Feed(bytes.substr(at, piece), [&](const SseEvent& event) {
      events.push_back(absl::StrCat(event.id, "|", event.event, "|", event.data));
    });
    EXPECT_TRUE(status.ok()) << status;
  }
  return events;
}

TEST(SseTest, ReadsEveryFormHoweverItIsCut) {
  const std::string bytes =
      "\xEF\xBB\xBF: a comment\r\n"
      "id: 7\r\ndata: {\"a\":1}\r\n\r\n"
      "data:no space\n\n"
      "event: error\rdata: one\rdata: two\r\r"
      "data\n\n"
      "unknown: x\n\n"
      "id\ndata: [DONE]\n\n"
      "data: cut off";
  for (size_t piece = 1; piece <= bytes.size(); ++piece) {
    SCOPED_TRACE(piece);
    EXPECT_THAT(Decode(bytes, piece),
                ElementsAre("7||{\"a\":1}", "7||no space", "7|error|one\ntwo", "7||", "||[DONE]"));
  }
}

TEST(SseTest, AnEventIsBounded) {
  SseDecoder decoder(100);
  const absl::Status status =
      decoder.Feed("data: " + std::string(200, 'x'), [](const SseEvent&) { FAIL(); });
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
}

TEST(HttpUrlTest, ReadsWhatPeopleWrite) {
  const struct {
    const char* text;
    const char* shown;
    const char* models;
  } cases[] = {
      {"http://127.0.0.1:8080", "http://127.0.0.1:8080", "/v1/models"},
      {"http://127.0.0.1:8080/", "http://127.0.0.1:8080", "/v1/models"},
      {"http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1", "/v1/models"},
      {"localhost:9", "http://localhost:9", "/v1/models"},
      {"https://example.org", "https://example.org", "/v1/models"},
      {"https://example.org/llm", "https://example.org/llm", "/llm/v1/models"},
      {"http://[::1]:80/", "http://[::1]", "/v1/models"},
  };
  for (const auto& c : cases) {
    const auto url = ParseHttpUrl(c.text);
    ASSERT_TRUE(url.ok()) << url.status();
    EXPECT_EQ(url->ToString(), c.shown);
    EXPECT_EQ(ApiPath(*url, "/models"), c.models);
  }
  for (const char* text : {"", "ftp://x", "http://", "http://a:0", "http://a:99999", "http://a:b",
                           "http://a b", "http://[::1", "http://a/?q=1", "http://user@a"}) {
    const auto url = ParseHttpUrl(text);
    EXPECT_EQ(url.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(url.status().message()), HasSubstr("http://127.0.0.1:8080")) << text;
  }
  EXPECT_TRUE(ParseHttpUrl("localhost:1")->loopback());
  EXPECT_FALSE(ParseHttpUrl("10.0.0.1:1")->loopback());
}

TEST(ApiClientTest, RefusalsBecomeStatusesThatSayWhatToDo) {
  const auto fail = [](int32_t http, const std::string& body, HttpHeaders headers = {}) {
    return ReadFailure({.status = http, .headers = std::move(headers)}, body);
  };
  const ApiFailure wrong =
      fail(400, R"({"error":{"message":"too many","param":"max_tokens","code":"invalid_value"}})");
  EXPECT_EQ(wrong.status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(wrong.status.message(), "max_tokens: too many");
  EXPECT_EQ(wrong.code, "invalid_value");
  EXPECT_THAT(std::string(fail(401, "{}").status.message()), HasSubstr("--key-file"));
  EXPECT_THAT(std::string(fail(429, "{}", {{"retry-after", "3"}}).status.message()),
              HasSubstr("try again in 3 s"));
  EXPECT_THAT(std::string(fail(500, "<html>", {{"x-request-id", "r-1"}}).status.message()),
              HasSubstr("r-1"));
  // What a server says is shown on a terminal, so it must not drive it.
  EXPECT_THAT(std::string(fail(400, "{\"error\":{\"message\":\"\\u001b[2J\"}}").status.message()),
              testing::Not(HasSubstr("\033")));
}

TEST(ApiClientTest, Chunks) {
  const auto text = ReadChunk(R"({"choices":[{"index":0,"delta":{"content":"hi"}}],"usage":null})");
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(text->text, "hi");
  EXPECT_FALSE(text->usage.has_value());
  EXPECT_EQ(
      ReadChunk(R"({"choices":[{"index":0,"text":"yo","finish_reason":"stop"}]})")->finish_reason,
      "stop");
  EXPECT_EQ(ReadChunk(R"({"choices":[{"index":1,"text":"other"}]})")->text, "");
  EXPECT_TRUE(ReadChunk("[DONE]")->done);
  const auto usage = ReadChunk(
      R"({"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":8,"diffusion":{"forwards":4,"tokens_per_forward":2.0}}})");
  EXPECT_EQ(usage->usage->completion_tokens, 8);
  EXPECT_EQ(usage->usage->forwards, 4);
  const auto frame = ReadChunk(
      R"({"choices":[{"index":0,"delta":{}}],"diffusion":{"step":2,"canvas_tokens":4,"positions":[1,3],)"
      R"("tokens":[5,-1],"texts":["a",""],"confidence":[0.9,0.0],"block":[0,4],"final_end":0}})");
  ASSERT_TRUE(frame->frame.has_value());
  EXPECT_THAT(frame->frame->positions, ElementsAre(1, 3));
  EXPECT_THAT(frame->frame->texts, ElementsAre("a", ""));
  EXPECT_THAT(frame->frame->masked_again, ElementsAre(false, true));
  const auto broken = ReadChunk(R"({"error":{"message":"late","code":"deadline_exceeded"}})");
  ASSERT_TRUE(broken->failure.has_value());
  EXPECT_EQ(broken->failure->status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ReadChunk("nonsense").status().code(), absl::StatusCode::kInvalidArgument);
  for (const char* odd :
       {"{}", "[]", "1", R"({"choices":1})", R"({"choices":[null]})",
        R"({"choices":[{"index":0,"delta":{"content":7}}]})",
        R"({"choices":[{"index":1e300}],"usage":[1]})",
        R"({"choices":[{"index":0}],"diffusion":{"canvas_tokens":1e18,"positions":["x"]}})"}) {
    EXPECT_TRUE(ReadChunk(odd).ok()) << odd;
  }
}

TEST(StreamedCanvasTest, TokensAppearWhereTheyWereDecided) {
  StreamedCanvas canvas;
  canvas.Add(
      {.step = 1, .canvas_tokens = 4, .positions = {2}, .texts = {"c"}, .confidences = {0.9}});
  EXPECT_EQ(canvas.Render("p", "s", 80, 10, false), "p░░c░s\n");
  canvas.Add({.step = 2, .canvas_tokens = 4, .positions = {0, 99, -1}, .texts = {"a", "x", "y"}});
  EXPECT_EQ(canvas.Render("", "", 80, 10, false), "a░c░\n");
  EXPECT_EQ(canvas.num_decided(), 2);
  EXPECT_EQ(canvas.step(), 2);
  const std::string coloured = canvas.Render("", "", 80, 10, true);
  EXPECT_THAT(coloured, HasSubstr(absl::StrCat(ansi::kFresh, "a")));
  EXPECT_THAT(coloured, testing::Not(HasSubstr(absl::StrCat(ansi::kFresh, "c"))));
  canvas.Add({.step = 3, .canvas_tokens = 4, .positions = {1, 3}, .texts = {"\n", "<eos>"}});
  EXPECT_EQ(canvas.Render("", "", 80, 10, false), "a\nc·\n");
  EXPECT_EQ(canvas.Render("", "", 80, 1, false), "c·\n");
  canvas.Add({.step = 4,
              .canvas_tokens = 4,
              .positions = {0, 2},
              .texts = {"", "d"},
              .masked_again = {true, false}});
  EXPECT_EQ(canvas.Render("", "", 80, 10, false), "░\nd·\n");
  EXPECT_EQ(canvas.num_decided(), 3);
  canvas.Add({.step = 5,
              .canvas_tokens = 4,
              .positions = {0},
              .texts = {""},
              .masked_again = {true}});  // told twice
  EXPECT_EQ(canvas.num_decided(), 3);
}

TEST(TerminalTest, FittingCountsCharactersAndKeepsEscapes) {
  EXPECT_EQ(DisplayWidth("a░\033[1mb\033[0m"), 3);
  EXPECT_EQ(FitLeft("ab", 4), "ab  ");
  EXPECT_EQ(FitRight("ab", 4), "  ab");
  EXPECT_EQ(FitLeft("abcdef", 4), "abc…");
  EXPECT_EQ(FitLeft("\033[1mabcdef\033[0m", 4), "\033[1mabc…\033[0m");
  EXPECT_EQ(FitLeft("░░░", 2), "░…");
  EXPECT_EQ(Printable("a\033[2J\x9b\xC2\x9B\tb░"), "a\uFFFD[2J\uFFFD\uFFFD\tb░");
}

TEST(TerminalTest, LinesWrapAndKeepTheirStyle) {
  StyledLines lines(3, true);
  lines.Append("abcd", ansi::kFresh);
  lines.Append("e\tf", "");
  const std::string text = lines.Take(10);
  EXPECT_EQ(text, absl::StrCat("\033[0m", ansi::kFresh, "abc\033[0m\n", ansi::kFresh,
                               "d\033[0me \033[0m\n f\033[0m\n"));
}

TEST(TerminalTest, NumbersForPeople) {
  EXPECT_EQ(ShowWhole(0), "0");
  EXPECT_EQ(ShowWhole(-1234567), "-1,234,567");
  EXPECT_EQ(ShowCount(0), "0");
  EXPECT_EQ(ShowCount(1.5), "1.50");
  EXPECT_EQ(ShowCount(12.34), "12.3");
  EXPECT_EQ(ShowCount(1234), "1,234");
  EXPECT_EQ(ShowCount(12345), "12.3k");
  EXPECT_EQ(ShowCount(1234567), "1.23M");
  EXPECT_EQ(ShowSeconds(0.0005), "0.50 ms");
  EXPECT_EQ(ShowSeconds(0.25), "250 ms");
  EXPECT_EQ(ShowSeconds(12.34), "12.3 s");
  EXPECT_EQ(ShowSeconds(200), "3 min 20 s");
  EXPECT_EQ(ShowSeconds(7260), "2 h 01 min");
}

}  // namespace
}  // namespace cinnabar
