// The strict head parser: what is taken, how it is understood, and a table of what is refused.
#include "common/http/request_head.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace cinnabar {
namespace {

using testing::ElementsAre;
using testing::Pair;

constexpr int32_t kHeadersMax = 8;

// A head that is fine but for what a test puts in.
std::string Head(absl::string_view line, absl::string_view headers = "") {
  return absl::StrCat(line, "\r\nHost: a\r\n", headers, "\r\n");
}
std::string WithHeaders(absl::string_view headers) { return Head("GET / HTTP/1.1", headers); }

RequestHead Parse(const std::string& head) {
  RequestHead parsed;
  const auto error = ParseRequestHead(head, kHeadersMax, parsed);
  EXPECT_FALSE(error.has_value()) << error->status << " " << error->message << "\n" << head;
  return parsed;
}

// The status of the refusal, 200 when there is none.
int StatusOf(absl::string_view head) {
  RequestHead parsed;
  const auto error = ParseRequestHead(head, kHeadersMax, parsed);
  if (!error.has_value()) return 200;
  EXPECT_FALSE(error->message.empty());
  return error->status;
}

TEST(RequestHeadTest, TakesAHeadApart) {
  const RequestHead head = Parse(
      "POST /v1/a%20b?x=%31&y HTTP/1.1\r\nHost: example.org:80\r\nX-Thing:\t two  words \r\n"
      "Content-Length: 12\r\nEXPECT: 100-Continue\r\nempty:\r\n\r\n");
  EXPECT_EQ(head.method, "POST");
  EXPECT_EQ(head.path, "/v1/a b");
  EXPECT_EQ(head.query, "x=%31&y");
  EXPECT_EQ(head.minor, 1);
  EXPECT_THAT(head.headers, ElementsAre(Pair("host", "example.org:80"),
                                        Pair("x-thing", "two  words"), Pair("content-length", "12"),
                                        Pair("expect", "100-Continue"), Pair("empty", "")));
  EXPECT_EQ(head.content_length, 12U);
  EXPECT_FALSE(head.chunked);
  EXPECT_TRUE(head.keep_alive);
  EXPECT_TRUE(head.expects_continue);
}

TEST(RequestHeadTest, ConnectionsStayOrClose) {
  EXPECT_TRUE(Parse(Head("GET / HTTP/1.1")).keep_alive);
  EXPECT_FALSE(Parse(Head("GET / HTTP/1.0")).keep_alive);
  EXPECT_TRUE(Parse(Head("GET / HTTP/1.0", "Connection: Keep-Alive\r\n")).keep_alive);
  EXPECT_FALSE(Parse(WithHeaders("Connection: x, CLOSE\r\n")).keep_alive);
  // Close wins, in either order and over two headers.
  EXPECT_FALSE(Parse(WithHeaders("Connection: close, keep-alive\r\n")).keep_alive);
  EXPECT_FALSE(Parse(WithHeaders("Connection: close\r\nConnection: keep-alive\r\n")).keep_alive);
}

TEST(RequestHeadTest, AnOldClientExpectsNothing) {
  EXPECT_FALSE(Parse(Head("GET / HTTP/1.0", "Expect: 100-continue\r\n")).expects_continue);
}

TEST(RequestHeadTest, Http10NeedsNoHost) { EXPECT_EQ(Parse("GET / HTTP/1.0\r\n\r\n").minor, 0); }

TEST(RequestHeadTest, AProxysFormGivesItsPath) {
  EXPECT_EQ(Parse(Head("GET http://other.example/v1/models HTTP/1.1")).path, "/v1/models");
  EXPECT_EQ(Parse(Head("GET HTTPS://other.example HTTP/1.1")).path, "/");
  EXPECT_EQ(Parse(Head("OPTIONS * HTTP/1.1")).path, "*");
}

TEST(RequestHeadTest, ExactlyAsManyHeadersAsThereMayBe) {
  std::string headers;
  for (int i = 0; i < kHeadersMax - 1; ++i) absl::StrAppend(&headers, "x", i, ": 1\r\n");
  EXPECT_EQ(StatusOf(WithHeaders(headers)), 200);
  EXPECT_EQ(StatusOf(WithHeaders(headers + "more: 1\r\n")), 431);
}

TEST(RequestHeadTest, GoodOnes) {
  for (const std::string& head : {
           Head("GET / HTTP/1.1"),
           Head("M-SEARCH /a/../b//c?d?e HTTP/1.1"),
           Head("GET /%C3%A9 HTTP/1.1"),
           WithHeaders("x: \x80\xff\r\n"),
           WithHeaders("x: a\tb\r\n"),
           WithHeaders("Transfer-Encoding: Chunked\r\n"),
           WithHeaders("Content-Length: 0\r\n"),
           WithHeaders("Content-Length: 007\r\n"),
           WithHeaders("Content-Encoding: identity\r\n"),
           WithHeaders("!#$%&'*+-.^_`|~09: odd but a token\r\n"),
           std::string("GET / HTTP/1.1\r\nHost:\r\n\r\n"),
       }) {
    EXPECT_EQ(StatusOf(head), 200) << head;
  }
}

TEST(RequestHeadTest, BadOnes) {
  struct Case {
    int status;
    std::string head;
  };
  const std::vector<Case> cases = {
      // Request lines.
      {400, ""},
      {400, "\r\n\r\n"},
      {400, "GET / HTTP/1.1\r\nHost: a\r\n"},
      {400, Head("GET /")},
      {400, Head("GET  / HTTP/1.1")},
      {400, Head(" GET / HTTP/1.1")},
      {400, Head("GET / HTTP/1.1 ")},
      {400, Head("GET\t/ HTTP/1.1")},
      {400, Head("GET /a b HTTP/1.1")},
      {400, Head("G@T / HTTP/1.1")},
      {400, Head(absl::StrCat(std::string(33, 'G'), " / HTTP/1.1"))},
      {400, Head("GET / HTTP/1")},
      {400, Head("GET / HTTP/1.10")},
      {400, Head("GET / http/1.1")},
      {400, Head("GET / HTTP/+1.1")},
      {400, Head("GET / HTTPS/1.1")},
      {505, Head("GET / HTTP/2.0")},
      {505, Head("GET / HTTP/0.9")},
      {505, Head("GET / HTTP/1.2")},
      {505, "PRI * HTTP/2.0\r\n\r\n"},
      // Targets.
      {400, Head("GET v1/models HTTP/1.1")},
      {400, Head("GET example.org:80 HTTP/1.1")},
      {400, Head("GET ftp://a/b HTTP/1.1")},
      {400, Head("GET /a#b HTTP/1.1")},
      {400, Head("GET /%zz HTTP/1.1")},
      {400, Head("GET /% HTTP/1.1")},
      {400, Head("GET /%2 HTTP/1.1")},
      {400, Head("GET /a%00b HTTP/1.1")},
      {400, Head("GET /a%0d%0ab HTTP/1.1")},
      {400, Head("GET /\xc3\xa9 HTTP/1.1")},
      {400, Head("GET /\x7f HTTP/1.1")},
      {414, Head(absl::StrCat("GET /", std::string(8192, 'a'), " HTTP/1.1"))},
      // Lines.
      {400, "GET / HTTP/1.1\nHost: a\r\n\r\n"},
      {400, "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"},
      {400, "GET / HTTP/1.1\rHost: a\r\n\r\n"},
      {400, "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n"},
      {400, "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n"},
      {400, std::string("GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n", 31)},
      {400, "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"},
      // Headers.
      {400, WithHeaders(" folded: x\r\n")},
      {400, WithHeaders("x: a\r\n b\r\n")},
      {400, WithHeaders("x: a\r\n\tb\r\n")},
      {400, WithHeaders("no colon\r\n")},
      {400, WithHeaders(": no name\r\n")},
      {400, WithHeaders("blank : x\r\n")},
      {400, WithHeaders("two words: x\r\n")},
      {400, WithHeaders("na\xc3\xafve: x\r\n")},
      {400, WithHeaders("x: \x01\r\n")},
      {400, WithHeaders("x: \x7f\r\n")},
      {400, WithHeaders("x: \x1b[31m\r\n")},
      {400, WithHeaders("(x): 1\r\n")},
      // Hosts.
      {400, "GET / HTTP/1.1\r\n\r\n"},
      {400, WithHeaders("Host: a\r\n")},
      {400, "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"},
      {400, "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"},
      {400, "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"},
      {400, "GET / HTTP/1.1\r\nHost: a,b\r\n\r\n"},
      // Framing.
      {400, WithHeaders("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n")},
      {400, WithHeaders("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n")},
      {400, WithHeaders("Content-Length: 5\r\nContent-Length: 5\r\n")},
      {400, WithHeaders("Content-Length: 5\r\nContent-Length: 6\r\n")},
      {400, WithHeaders("Content-Length: 5, 5\r\n")},
      {400, WithHeaders("Content-Length: +5\r\n")},
      {400, WithHeaders("Content-Length: -5\r\n")},
      {400, WithHeaders("Content-Length: 0x5\r\n")},
      {400, WithHeaders("Content-Length: 5 5\r\n")},
      {400, WithHeaders("Content-Length: 5.0\r\n")},
      {400, WithHeaders("Content-Length:\r\n")},
      {400, WithHeaders("Content-Length: 99999999999999999999\r\n")},
      {400, WithHeaders("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n")},
      {400, Head("GET / HTTP/1.0", "Transfer-Encoding: chunked\r\n")},
      {501, WithHeaders("Transfer-Encoding: gzip\r\n")},
      {501, WithHeaders("Transfer-Encoding: gzip, chunked\r\n")},
      {501, WithHeaders("Transfer-Encoding: chunked, identity\r\n")},
      {501, WithHeaders("Transfer-Encoding: xchunked\r\n")},
      {501, WithHeaders("Transfer-Encoding:\r\n")},
      {415, WithHeaders("Content-Encoding: gzip\r\n")},
      {417, WithHeaders("Expect: a miracle\r\n")},
  };
  for (const Case& bad : cases) {
    EXPECT_EQ(StatusOf(bad.head), bad.status) << testing::PrintToString(bad.head);
  }
}

}  // namespace
}  // namespace cinnabar
