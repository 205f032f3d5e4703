// The server over real sockets: framing, every limit with its answer and its counter, streams, TLS,
// and the end.
#include "common/http/http_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/integration/http/http_client.h"

namespace cinnabar {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

// What the handler saw, and how it is let go.
struct Seen {
  std::atomic<int> gone = 0;  // calls of OnClientGone's callback
  std::atomic<int> write_failed = 0;
  std::atomic<int> slow_started = 0;
  std::atomic<bool> release = false;  // of /slow
};

asio::awaitable<void> Pause(absl::Duration duration) {
  const asio::any_io_executor executor = co_await asio::this_coro::executor;
  asio::steady_timer timer(executor, absl::ToChronoNanoseconds(duration));
  boost::system::error_code ignored;
  co_await timer.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
}

// A way to answer for every path.
asio::awaitable<void> Handle(Seen& seen, const HttpRequest& request, HttpExchange& exchange) {
  exchange.OnClientGone([&seen] { ++seen.gone; });
  if (request.path == "/nothing") {
    co_return;
  }
  if (request.path == "/stream") {
    HttpHeaders headers = {{"content-type", "text/plain"}};
    (void)co_await exchange.StartStream(200, std::move(headers));
    for (int i = 0; i < 3; ++i) {
      std::string piece = absl::StrCat("piece", i, ";");
      (void)co_await exchange.Write(std::move(piece));
    }
    (void)co_await exchange.Finish();
    co_return;
  }
  if (request.path == "/endless") {
    HttpHeaders headers;
    (void)co_await exchange.StartStream(200, std::move(headers));
    for (;;) {
      std::string piece(64 << 10, 'x');
      const absl::Status status = co_await exchange.Write(std::move(piece));
      if (!status.ok()) break;
    }
    ++seen.write_failed;
    co_return;
  }
  if (request.path == "/slow") {
    ++seen.slow_started;
    while (!seen.release && !exchange.client_gone()) co_await Pause(absl::Milliseconds(2));
  }
  HttpResponse response;
  response.headers = {{"x-method", request.method}, {"x-query", request.query}};
  response.body = absl::StrCat(request.path, "|", request.body);
  (void)co_await exchange.Respond(std::move(response));
}

std::string Get(absl::string_view path, absl::string_view headers = "") {
  return absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: a\r\n", headers, "\r\n");
}
std::string Post(absl::string_view body, absl::string_view headers = "") {
  return absl::StrCat("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: ", body.size(), "\r\n",
                      headers, "\r\n", body);
}
std::string Chunked(absl::string_view chunks) {
  return absl::StrCat("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
                      chunks);
}

class HttpServerTest : public testing::Test {
 protected:
  void Start(HttpServerOptions options = {}) {
    options.listen = "127.0.0.1:0";
    options.error_body = [](int status, absl::string_view code, absl::string_view message) {
      return absl::StrCat(status, " ", code, " ", message);
    };
    server_ = std::make_unique<HttpServer>(
        std::move(options), [this](const HttpRequest& request, HttpExchange& exchange) {
          return Handle(seen_, request, exchange);
        });
    const absl::Status status = server_->Start();
    ASSERT_TRUE(status.ok()) << status;
  }
  std::unique_ptr<HttpClient> Connect(HttpClient::Options options = {}) {
    auto client = std::make_unique<HttpClient>(server_->port(), options);
    EXPECT_TRUE(client->connected());
    return client;
  }
  // What the server has to say to these bytes, on a connection of their own.
  HttpReply Ask(absl::string_view bytes) {
    const auto client = Connect();
    client->Send(bytes);
    return client->ReadReply().value_or(HttpReply());
  }
  // The server refuses, says why, and closes.
  void ExpectRefusal(absl::string_view bytes, int status, absl::string_view code) {
    const auto client = Connect();
    client->Send(bytes);
    std::optional<HttpReply> reply = client->ReadReply();
    ASSERT_TRUE(reply.has_value()) << testing::PrintToString(bytes);
    EXPECT_EQ(reply->status, status) << testing::PrintToString(bytes);
    EXPECT_THAT(reply->body, StartsWith(absl::StrCat(status, " ", code, " ")));
    EXPECT_THAT(reply->headers["x-request-id"], StartsWith("req_"));
    EXPECT_EQ(reply->headers["connection"], "close");
    const std::optional<std::string> rest = client->ReadToEnd();
    EXPECT_TRUE(rest.has_value()) << "left open";
    EXPECT_EQ(rest.value_or(""), "") << "answered twice";
  }
  bool Eventually(const std::function<bool()>& condition,
                  absl::Duration timeout = absl::Seconds(10)) {
    const absl::Time until = absl::Now() + timeout;
    while (!condition() && absl::Now() < until) absl::SleepFor(absl::Milliseconds(5));
    return condition();
  }
  void ExpectAlive() { EXPECT_EQ(Ask(Get("/alive")).status, 200); }
  const HttpCounters& counters() const { return server_->counters(); }

  Seen seen_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, AnswersAndKeepsTheConnection) {
  Start();
  const auto client = Connect();
  std::set<std::string> ids;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client->Send(Post(absl::StrCat("body", i))));
    std::optional<HttpReply> reply = client->ReadReply();
    ASSERT_TRUE(reply.has_value());
    EXPECT_EQ(reply->status, 200);
    EXPECT_EQ(reply->body, absl::StrCat("/echo|body", i));
    EXPECT_EQ(reply->headers["x-method"], "POST");
    EXPECT_EQ(reply->headers["connection"], "keep-alive");
    EXPECT_THAT(reply->headers["date"], HasSubstr(" GMT"));
    ids.insert(reply->headers["x-request-id"]);
  }
  EXPECT_EQ(ids.size(), 3U);
  EXPECT_EQ(counters().connections, 1);
  EXPECT_EQ(counters().connections_total, 1);
  EXPECT_EQ(counters().requests_total, 3);
}

TEST_F(HttpServerTest, PipelinedRequestsAreAnsweredInTheirOrder) {
  Start();
  const auto client = Connect();
  std::string all;
  for (int i = 0; i < 50; ++i) {
    absl::StrAppend(&all, Get(absl::StrCat("/g", i)), Post(absl::StrCat("p", i)),
                    Chunked("3\r\nabc\r\n0\r\n\r\n"), "\r\n");  // the empty line is allowed
  }
  client->Send(all);
  for (int i = 0; i < 50; ++i) {
    for (const std::string& want :
         {absl::StrCat("/g", i, "|"), absl::StrCat("/echo|p", i), std::string("/echo|abc")}) {
      const std::optional<HttpReply> reply = client->ReadReply();
      ASSERT_TRUE(reply.has_value());
      EXPECT_EQ(reply->body, want);
    }
  }
  EXPECT_EQ(counters().connections_total, 1);
}

TEST_F(HttpServerTest, BytesMayComeOneByOne) {
  Start();
  const auto client = Connect();
  for (const char c :
       Post("slowly") + Chunked("1;ext=1\r\na\r\n2\r\nbc\r\n0\r\nTrailer: x\r\n\r\n")) {
    ASSERT_TRUE(client->Send(absl::string_view(&c, 1)));
  }
  EXPECT_EQ(client->ReadReply()->body, "/echo|slowly");
  EXPECT_EQ(client->ReadReply()->body, "/echo|abc");
}

TEST_F(HttpServerTest, AnOldClientGetsItsAnswerAndTheEnd) {
  Start();
  auto client = Connect();
  client->Send("GET /old HTTP/1.0\r\n\r\n");
  EXPECT_EQ(client->ReadReply()->body, "/old|");
  EXPECT_EQ(client->ReadToEnd(), "");
  client = Connect();
  client->Send("GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /new HTTP/1.0\r\n\r\n");
  EXPECT_EQ(client->ReadReply()->body, "/old|");
  EXPECT_EQ(client->ReadReply()->body, "/new|");
  // A stream without chunks: it ends with the connection.
  client = Connect();
  client->Send("GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  const std::optional<HttpReply> reply = client->ReadReply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->headers.count("transfer-encoding"), 0U);
  EXPECT_EQ(reply->body, "piece0;piece1;piece2;");
}

TEST_F(HttpServerTest, AStreamIsChunkedAndTheConnectionGoesOn) {
  Start();
  const auto client = Connect();
  client->Send(Get("/stream") + Get("/after"));
  std::optional<HttpReply> reply = client->ReadReply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->headers["transfer-encoding"], "chunked");
  EXPECT_EQ(reply->headers.count("content-length"), 0U);
  EXPECT_EQ(reply->body, "piece0;piece1;piece2;");
  EXPECT_EQ(client->ReadReply()->body, "/after|");
}

TEST_F(HttpServerTest, HeadHasNoBody) {
  Start();
  const auto client = Connect();
  for (const char* path : {"/x", "/stream"}) {
    client->Send(absl::StrCat("HEAD ", path, " HTTP/1.1\r\nHost: a\r\n\r\n"));
    const std::optional<HttpReply> reply = client->ReadReply(absl::Seconds(10), /*head_only=*/true);
    ASSERT_TRUE(reply.has_value());
    EXPECT_EQ(reply->status, 200);
  }
  client->Send(Get("/after"));
  EXPECT_EQ(client->ReadReply()->body, "/after|");
}

TEST_F(HttpServerTest, ContinueIsSaidOnlyWhenTheBodyIsWanted) {
  Start({.limits = {.body_bytes_max = 10}});
  const auto client = Connect();
  client->Send(
      "POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n");
  EXPECT_EQ(client->ReadReply()->status, 100);
  client->Send("body");
  EXPECT_EQ(client->ReadReply()->body, "/echo|body");
  // Too large: the answer comes instead.
  client->Send(
      "POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 11\r\n\r\n");
  EXPECT_EQ(client->ReadReply()->status, 413);
  // No body, or an old client: nothing to wait for.
  EXPECT_EQ(Ask(Get("/x", "Expect: 100-continue\r\n")).status, 200);
  EXPECT_EQ(Ask("POST /echo HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab").body,
            "/echo|ab");
}

TEST_F(HttpServerTest, BrokenHeadsAreRefused) {
  Start();
  ExpectRefusal("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505, "http_version_not_supported");
  ExpectRefusal("nonsense\r\n\r\n", 400, "bad_request");
  ExpectRefusal(Get("/", "Transfer-Encoding: gzip\r\n"), 501, "not_implemented");
  ExpectRefusal(Get("/", "Content-Encoding: gzip\r\n"), 415, "unsupported_media_type");
  ExpectRefusal(Get("/", "Expect: more\r\n"), 417, "expectation_failed");
  ExpectRefusal(Get("/", "X : y\r\n"), 400, "bad_request");
  ExpectRefusal(Get("/", "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"), 400,
                "bad_request");
  EXPECT_EQ(counters().malformed, 7);
  EXPECT_EQ(counters().requests_total, 0);
  ExpectAlive();
}

// These have no end of a head, so waiting for it would be waiting for the time-out.
TEST_F(HttpServerTest, BareLineFeedsAreRefusedAtOnce) {
  Start({.limits = {.header_timeout = absl::Seconds(60)}});
  for (const char* head :
       {"GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\r\nHost: a\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\n", "\nGET / HTTP/1.1\r\n", "GET / HTTP/1.1\n"}) {
    ExpectRefusal(head, 400, "bad_request");
  }
  EXPECT_EQ(counters().malformed, 5);
  EXPECT_EQ(counters().timeouts, 0);
}

TEST_F(HttpServerTest, ASmuggledRequestIsNotServed) {
  Start();
  const auto client = Connect();
  client->Send(Get("/", "Content-Length: 5\r\nContent-Length: 40\r\n") + Get("/smuggled"));
  EXPECT_EQ(client->ReadReply()->status, 400);
  EXPECT_EQ(client->ReadToEnd(), "");
  EXPECT_EQ(counters().requests_total, 0);
}

TEST_F(HttpServerTest, HeadsHaveABound) {
  Start({.limits = {.header_bytes_max = 1000, .headers_max = 5}});
  const std::string bare = Get("/");
  const auto padded = [&](size_t bytes) {  // a head of exactly so many
    return Get("/", absl::StrCat("x: ", std::string(bytes - bare.size() - 5, 'a'), "\r\n"));
  };
  EXPECT_EQ(Ask(padded(1000)).status, 200);
  ExpectRefusal(padded(1001), 431, "headers_too_large");
  ExpectRefusal(std::string(5000, 'x'), 431, "headers_too_large");
  EXPECT_EQ(Ask(Get("/", "a: 1\r\nb: 1\r\nc: 1\r\nd: 1\r\n")).status, 200);
  ExpectRefusal(Get("/", "a: 1\r\nb: 1\r\nc: 1\r\nd: 1\r\ne: 1\r\n"), 431, "headers_too_large");
  EXPECT_EQ(counters().too_large, 3);
}

TEST_F(HttpServerTest, ALongUrlIsRefused) {
  Start();
  ExpectRefusal(Get(absl::StrCat("/", std::string(9000, 'a'))), 414, "url_too_long");
  EXPECT_EQ(counters().too_large, 1);
}

TEST_F(HttpServerTest, BodiesHaveABound) {
  Start({.limits = {.body_bytes_max = 20000}});
  EXPECT_EQ(Ask(Post(std::string(20000, 'b'))).body.size(), 20006U);
  ExpectRefusal(Post(std::string(20001, 'b')), 413, "request_too_large");
  // Before the body, whatever it claims.
  ExpectRefusal("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999999999\r\n\r\n", 413,
                "request_too_large");
  std::string chunks;
  for (int i = 0; i < 25; ++i) absl::StrAppend(&chunks, "320\r\n", std::string(800, 'c'), "\r\n");
  EXPECT_EQ(Ask(Chunked(absl::StrCat(chunks, "0\r\n\r\n"))).body.size(), 20006U);
  ExpectRefusal(Chunked(absl::StrCat(chunks, "1\r\nc\r\n0\r\n\r\n")), 413, "request_too_large");
  EXPECT_EQ(counters().too_large, 3);
}

TEST_F(HttpServerTest, BrokenChunksAreRefused) {
  Start();
  const std::vector<std::string> broken = {
      "x\r\nabc\r\n0\r\n\r\n",                     // no number
      "\r\nabc\r\n0\r\n\r\n",                      // none at all
      "-3\r\nabc\r\n0\r\n\r\n",                    //
      "0x3\r\nabc\r\n0\r\n\r\n",                   //
      "3 3\r\nabc\r\n0\r\n\r\n",                   //
      "ffffffffffffffffff\r\nabc\r\n0\r\n\r\n",    // more than 64 bits
      "3\r\nabcd\r\n0\r\n\r\n",                    // longer than it says
      "4\r\nabc\r\n0\r\n\r\n0\r\n\r\n",            // shorter
      "3\r\nabc0\r\n\r\n",                         // no line end behind the data
      "0\r\nno colon\r\n\r\n",                     // a broken trailer
      absl::StrCat("3;", std::string(9000, 'e')),  // an extension without an end
  };
  for (const std::string& chunks : broken) ExpectRefusal(Chunked(chunks), 400, "bad_request");
  EXPECT_EQ(counters().malformed, static_cast<int64_t>(broken.size()));
  EXPECT_EQ(counters().requests_total, 0);
  ExpectAlive();
}

// Half a chunk header at the end of what comes: more is waited for, without a thread that spins.
TEST_F(HttpServerTest, HalfAChunkHeaderDoesNotHoldTheServer) {
  Start({.limits = {.body_timeout = absl::Milliseconds(200)}});
  {
    const auto gone = Connect();
    gone->Send(Chunked("3\r\nabc\r\n5"));
    gone->HalfClose();
    EXPECT_EQ(gone->ReadToEnd(), "");
  }
  const auto slow = Connect();
  slow->Send(Chunked("3\r\nabc\r\n5"));
  ExpectAlive();
  const std::optional<HttpReply> reply = slow->ReadReply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->status, 408);
  ExpectAlive();
}

TEST_F(HttpServerTest, SlowHeadsEnd) {
  Start({.limits = {.header_timeout = absl::Milliseconds(200)}});
  const auto client = Connect();
  const absl::Time begin = absl::Now();
  // A byte now and then does not buy time.
  std::thread writer([&] {
    for (int i = 0; i < 40 && client->Send(i == 0 ? "GET / HTTP/1.1\r\nx: " : "a"); ++i) {
      absl::SleepFor(absl::Milliseconds(20));
    }
  });
  const std::optional<HttpReply> reply = client->ReadReply();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  writer.join();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->status, 408);
  EXPECT_THAT(reply->body, StartsWith("408 request_timeout"));
  // Empty lines without end are no request either.
  const auto empty = Connect();
  std::thread lines([&] {
    for (int i = 0; i < 40 && empty->Send("\r\n"); ++i) absl::SleepFor(absl::Milliseconds(20));
  });
  EXPECT_EQ(empty->ReadReply().value_or(HttpReply()).status, 408);
  lines.join();
  EXPECT_EQ(counters().timeouts, 2);
}

TEST_F(HttpServerTest, SlowBodiesEnd) {
  Start({.limits = {.body_timeout = absl::Milliseconds(200)}});
  for (const std::string& head :
       {std::string("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"),
        Chunked("3e8\r\n")}) {
    const auto client = Connect();
    std::thread writer([&] {
      for (int i = 0; i < 40 && client->Send(i == 0 ? head : "b"); ++i) {
        absl::SleepFor(absl::Milliseconds(20));
      }
    });
    EXPECT_EQ(client->ReadReply().value_or(HttpReply()).status, 408);
    writer.join();
  }
  EXPECT_EQ(counters().timeouts, 2);
  EXPECT_EQ(counters().requests_total, 0);
}

TEST_F(HttpServerTest, IdleConnectionsAreClosedWithoutAWord) {
  Start({.limits = {.idle_timeout = absl::Milliseconds(100)}});
  const auto fresh = Connect();
  EXPECT_EQ(fresh->ReadToEnd(), "");
  const auto used = Connect();
  used->Send(Get("/x"));
  EXPECT_TRUE(used->ReadReply().has_value());
  EXPECT_EQ(used->ReadToEnd(), "");
  EXPECT_EQ(counters().timeouts, 0);
}

TEST_F(HttpServerTest, ASlowReaderIsDropped) {
  Start({.limits = {.write_timeout = absl::Milliseconds(200)}});
  const auto client = Connect({.receive_buffer_bytes = 4096});
  client->Send(Get("/endless"));
  EXPECT_TRUE(Eventually([&] { return seen_.write_failed == 1; }));
  EXPECT_EQ(counters().slow_readers, 1);
  EXPECT_TRUE(Eventually([&] { return counters().connections == 0; }));
  ExpectAlive();
}

// A server that reads on while it cannot write would hold what a client pipelines.
TEST_F(HttpServerTest, PipelinedBytesAreNotTakenWithoutBound) {
  Start();
  const auto client = Connect();
  client->Send(Get("/slow"));
  ASSERT_TRUE(Eventually([&] { return seen_.slow_started == 1; }));
  constexpr size_t kEnough = 64 << 20;  // far beyond what the kernel holds for both ends
  const size_t taken =
      client->SendForever(std::string(64 << 10, 'x'), absl::Milliseconds(200), kEnough);
  EXPECT_LT(taken, kEnough);
  seen_.release = true;
  EXPECT_EQ(client->ReadReply()->body, "/slow|");
}

// The deadline of a write must not become that of a read which begins beside it.
TEST_F(HttpServerTest, AnAnsweredClientMayThink) {
  Start({.limits = {.header_bytes_max = 1024, .write_timeout = absl::Milliseconds(150)}});
  // What is pipelined behind a slow request stops the reader, which begins again while the replies
  // are written.
  constexpr int kMore = 400;
  const auto client = Connect();
  std::string all = Get("/slow");
  for (int i = 0; i < kMore; ++i) absl::StrAppend(&all, Get("/x"));
  client->Send(all);
  ASSERT_TRUE(Eventually([&] { return seen_.slow_started == 1; }));
  absl::SleepFor(absl::Milliseconds(50));
  seen_.release = true;
  for (int i = 0; i <= kMore; ++i) {
    ASSERT_EQ(client->ReadReply().value_or(HttpReply()).status, 200) << i;
  }
  absl::SleepFor(absl::Milliseconds(500));
  client->Send(Get("/still"));
  EXPECT_EQ(client->ReadReply().value_or(HttpReply()).body, "/still|");
}

TEST_F(HttpServerTest, ConnectionsHaveABound) {
  Start({.limits = {.connections_max = 3}});
  std::vector<std::unique_ptr<HttpClient>> clients;
  for (int i = 0; i < 3; ++i) {
    clients.push_back(Connect());
    clients.back()->Send(Get("/x"));
    EXPECT_EQ(clients.back()->ReadReply()->status, 200);
  }
  const auto refused = Connect();
  std::optional<HttpReply> reply = refused->ReadReply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->status, 503);
  EXPECT_THAT(reply->body, StartsWith("503 server_overloaded"));
  EXPECT_EQ(reply->headers["retry-after"], "1");
  EXPECT_EQ(refused->ReadToEnd(), "");
  EXPECT_EQ(counters().refused_connections, 1);
  clients.clear();
  EXPECT_TRUE(Eventually([&] { return counters().connections == 0; }));
  ExpectAlive();
}

TEST_F(HttpServerTest, AnAddressHasItsShareOfConnections) {
  Start({.limits = {.connections_per_address_max = 2}});
  auto first = Connect(), second = Connect();
  first->Send(Get("/x"));
  second->Send(Get("/x"));
  EXPECT_EQ(first->ReadReply()->status, 200);
  EXPECT_EQ(second->ReadReply()->status, 200);
  EXPECT_EQ(Connect()->ReadReply()->status, 503);
  first.reset();
  EXPECT_TRUE(Eventually([&] { return counters().connections == 1; }));
  ExpectAlive();
}

TEST_F(HttpServerTest, AClientThatLeavesIsNoticed) {
  Start();
  auto client = Connect();
  client->Send(Get("/slow"));
  ASSERT_TRUE(Eventually([&] { return seen_.slow_started == 1; }));
  client->Reset();
  EXPECT_TRUE(Eventually([&] { return seen_.gone == 1; }));
  EXPECT_TRUE(Eventually([&] { return counters().connections == 0; }));
  // Half closed counts as gone; what was asked before is answered.
  client = Connect();
  client->Send(Get("/a") + Get("/b"));
  client->HalfClose();
  EXPECT_EQ(client->ReadReply()->body, "/a|");
  EXPECT_EQ(client->ReadReply()->body, "/b|");
  EXPECT_EQ(client->ReadToEnd(), "");
}

TEST_F(HttpServerTest, AHandlerWithoutAnAnswerIsAnsweredFor) {
  Start();
  ExpectRefusal(Get("/nothing"), 500, "server_error");
  EXPECT_EQ(counters().handler_failures, 1);
}

TEST_F(HttpServerTest, ADrainLetsRepliesEnd) {
  Start();
  const auto idle = Connect();
  idle->Send(Get("/x"));
  EXPECT_TRUE(idle->ReadReply().has_value());
  const auto busy = Connect();
  busy->Send(Get("/slow"));
  ASSERT_TRUE(Eventually([&] { return seen_.slow_started == 1; }));
  std::thread drain([&] { server_->Drain(absl::Seconds(30)); });
  EXPECT_EQ(idle->ReadToEnd(), "");
  EXPECT_FALSE(HttpClient(server_->port()).connected());
  seen_.release = true;
  std::optional<HttpReply> reply = busy->ReadReply();
  ASSERT_TRUE(reply.has_value());
  EXPECT_EQ(reply->body, "/slow|");
  EXPECT_EQ(reply->headers["connection"], "close");
  EXPECT_EQ(busy->ReadToEnd(), "");
  drain.join();
  EXPECT_EQ(counters().connections, 0);
}

TEST_F(HttpServerTest, ADrainHasAnEnd) {
  Start();
  const auto busy = Connect();
  busy->Send(Get("/slow"));
  ASSERT_TRUE(Eventually([&] { return seen_.slow_started == 1; }));
  const absl::Time begin = absl::Now();
  server_->Drain(absl::Milliseconds(100));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_TRUE(busy->ReadToEnd().has_value());
}

TEST_F(HttpServerTest, ManyClientsOnSeveralThreads) {
  Start({.num_threads = 3});
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      HttpClient client(server_->port());
      for (int i = 0; i < 200; ++i) {
        const std::string body = absl::StrCat(t, ".", i, std::string(i * 13 % 3000, 'z'));
        client.Send(Post(body));
        const std::optional<HttpReply> reply = client.ReadReply();
        if (reply.has_value() && reply->body == absl::StrCat("/echo|", body)) ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 1200);
}

TEST_F(HttpServerTest, AddressesAreChecked) {
  const auto start = [](const std::string& listen) {
    HttpServer server({.listen = listen}, nullptr);
    return server.Start();
  };
  for (const char* listen :
       {"", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "nowhere:80", ":80"}) {
    EXPECT_EQ(start(listen).code(), absl::StatusCode::kInvalidArgument) << listen;
  }
  EXPECT_TRUE(start("localhost:0").ok());
  Start();
  EXPECT_EQ(start(absl::StrCat("127.0.0.1:", server_->port())).code(),
            absl::StatusCode::kUnavailable);
}

class TlsTest : public HttpServerTest {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) / absl::StrCat("tls", getpid());
    std::filesystem::create_directories(folder_);
    ASSERT_EQ(std::system(absl::StrCat("openssl req -x509 -newkey ec -pkeyopt "
                                       "ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=test "
                                       "-keyout ",
                                       File("key"), " -out ", File("certificate"), " 2>/dev/null")
                              .c_str()),
              0);
  }
  void TearDown() override {
    server_.reset();
    std::filesystem::remove_all(folder_);
  }
  std::string File(const std::string& name) const { return folder_ / (name + ".pem"); }
  HttpServerOptions Options(HttpLimits limits = {}) const {
    return {.certificate_file = File("certificate"), .key_file = File("key"), .limits = limits};
  }
  std::filesystem::path folder_;
};

TEST_F(TlsTest, RequestsAndStreams) {
  Start(Options());
  const auto client = Connect({.tls = true});
  const std::string large(100'000, 'l');
  client->Send(Post(large));
  EXPECT_EQ(client->ReadReply().value_or(HttpReply()).body, "/echo|" + large);
  client->Send(Get("/stream") + Get("/after"));
  EXPECT_EQ(client->ReadReply().value_or(HttpReply()).body, "piece0;piece1;piece2;");
  EXPECT_EQ(client->ReadReply().value_or(HttpReply()).body, "/after|");
  client->Send("broken\r\n\r\n");
  EXPECT_EQ(client->ReadReply().value_or(HttpReply()).status, 400);
  EXPECT_EQ(client->ReadToEnd(), "");
}

TEST_F(TlsTest, WhoDoesNotShakeHandsIsDropped) {
  Start(Options({.header_timeout = absl::Milliseconds(200)}));
  const auto silent = Connect();
  EXPECT_TRUE(silent->ReadToEnd().has_value());
  const auto plain = Connect();
  plain->Send(Get("/x"));
  const std::string answer = plain->ReadToEnd().value_or("");
  EXPECT_FALSE(absl::StrContains(answer, "HTTP/1.1 200"));
  EXPECT_TRUE(Eventually([&] { return counters().connections == 0; }));
  const auto client = Connect({.tls = true});
  client->Send(Get("/x"));
  EXPECT_EQ(client->ReadReply().value_or(HttpReply()).status, 200);
}

TEST_F(TlsTest, WrongFilesAreAnError) {
  HttpServer server(
      {.listen = "127.0.0.1:0", .certificate_file = File("none"), .key_file = File("key")},
      nullptr);
  const absl::Status status = server.Start();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("none.pem"));
}

}  // namespace
}  // namespace cinnabar
