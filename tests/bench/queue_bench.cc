// Whole life-cycles through the queue: enqueue, dispatch, take, start, progress each step, finish.
// A few gateway threads, one scheduler thread, a few workers, a real redis-server on this machine.
//   queue_bench [--seconds=5] [--gateways=8] [--workers=8] [--rows=8] [--steps=32] [--delta=64]
//   [--fsync=everysec|always]
// Prints life-cycles a second, publish calls a second, and the latency of a publish call.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/queue/queue.h"
#include "tests/support/redis_server.h"

namespace cinnabar {
namespace {

// Seconds of CPU that the server has used.
double ServerCpuSeconds(RedisClient& redis) {
  const auto info = redis.Command({"INFO", "cpu"});
  CINNABAR_CHECK(info.ok()) << info.status();
  double seconds = 0;
  for (absl::string_view line : absl::StrSplit(info->text, absl::ByAnyChar("\r\n"))) {
    double value = 0;
    if (absl::ConsumePrefix(&line, "used_cpu_sys:") ||
        absl::ConsumePrefix(&line, "used_cpu_user:")) {
      CINNABAR_CHECK(absl::SimpleAtod(line, &value));
      seconds += value;
    }
  }
  return seconds;
}

struct Settings {
  int64_t seconds = 5;
  int64_t gateways = 8;  // connections that enqueue
  int64_t workers = 8;
  int64_t rows = 8;
  int64_t steps = 32;
  int64_t delta = 64;
  std::string fsync;  // empty: both
};

void RunOnce(const Settings& settings, const std::string& fsync) {
  auto server = RedisServer::Start({.appendfsync = fsync});
  CINNABAR_CHECK(server.ok()) << server.status();
  const RedisOptions options = (*server)->client_options();
  std::atomic<bool> stop = false;
  std::atomic<int64_t> num_done = 0;
  std::atomic<int64_t> num_live = 0;
  const int64_t live_max = settings.workers * settings.rows * 3;

  std::vector<std::thread> threads;
  for (int64_t g = 0; g < settings.gateways; ++g)
    threads.emplace_back([&, g] {
      RedisClient redis(options);
      Queue queue(redis, {});
      EnqueueRequest request = {
          .tenant = "t", .body_digest = "d", .prompt_tokens = 200, .canvas_tokens = 128};
      request.steps_max = static_cast<int32_t>(settings.steps);
      request.cost = 1000;
      request.keep = absl::Seconds(2);
      request.gateway = "g1";
      request.payload = std::string(800, 'p');
      for (int64_t i = 0; !stop;) {
        if (num_live >= live_max) {
          absl::SleepFor(absl::Microseconds(200));
          continue;
        }
        request.id = absl::StrCat("r", g, "-", i++);
        CINNABAR_CHECK(queue.Enqueue(request, {}).ok());
        ++num_live;
      }
    });
  threads.emplace_back([&] {  // scheduler
    RedisClient redis(options);
    Queue queue(redis, {});
    const int64_t epoch = queue.Lead("s", absl::Hours(1))->epoch;
    std::string position;
    std::vector<std::string> waiting;
    const auto found = queue.ScanWaiting(1000, position);
    CINNABAR_CHECK(found.ok()) << found.status();
    for (const WaitingRequest& request : *found) waiting.push_back(request.id);
    int64_t num_packs = 0;
    while (!stop) {
      const auto feed = queue.ReadFeed(position, 512, absl::Milliseconds(10));
      CINNABAR_CHECK(feed.ok()) << feed.status();
      position = feed->position;
      for (const FeedEntry& entry : feed->entries) {
        if (entry.kind == FeedEntry::Kind::kQueued) waiting.push_back(entry.request.id);
      }
      while (static_cast<int64_t>(waiting.size()) >= settings.rows) {
        PackOrder order = {.batch = absl::StrCat(epoch, "-", num_packs++),
                           .ready_packs_max = settings.workers + 2};
        order.requests.assign(waiting.begin(), waiting.begin() + settings.rows);
        const auto result = queue.Dispatch(epoch, order);
        CINNABAR_CHECK(result.ok()) << result.status();
        if (result->outcome == DispatchResult::Outcome::kReadyFull) break;
        waiting.erase(waiting.begin(), waiting.begin() + settings.rows);
      }
    }
  });
  std::vector<std::vector<double>> latencies(static_cast<size_t>(settings.workers));
  for (int64_t w = 0; w < settings.workers; ++w) {
    threads.emplace_back([&, w] {
      RedisClient redis(options);
      Queue queue(redis, {});
      const std::string boot = absl::StrCat("w", w);
      const std::string delta(static_cast<size_t>(settings.delta), 'd');
      const std::string snapshot(1000, 's');
      while (!stop) {
        const auto pack = queue.TakePack("any", absl::Milliseconds(100));
        if (!pack.ok() || !pack->has_value()) continue;
        const auto started = queue.Start(boot, (*pack)->batch, absl::Seconds(10));
        CINNABAR_CHECK(started.ok()) << started.status();
        for (int32_t step = 1; step <= settings.steps; ++step) {
          PublishReport report;
          for (const StartedRow& row : started->rows) {
            report.progress.push_back({.lease = row.lease,
                                       .step = step,
                                       .usage = {.output_tokens = step},
                                       .delta = delta});
            if (step % 8 == 0) report.progress.back().snapshot = snapshot;
            if (step == settings.steps)
              report.finished.push_back({.lease = row.lease, .last_step = step, .result = delta});
          }
          const absl::Time before = absl::Now();
          const auto reply = queue.Publish(boot, report);
          CINNABAR_CHECK(reply.ok() && reply->progress[0].verdict == RowVerdict::kOk)
              << reply.status();
          latencies[static_cast<size_t>(w)].push_back(
              absl::ToDoubleMilliseconds(absl::Now() - before));
        }
        num_done += static_cast<int64_t>(started->rows.size());
        num_live -= static_cast<int64_t>(started->rows.size());
      }
    });
  }
  absl::SleepFor(absl::Seconds(1));  // warm
  RedisClient observer(options);
  const double cpu_before = ServerCpuSeconds(observer);
  const int64_t done_before = num_done;
  const absl::Time from = absl::Now();
  absl::SleepFor(absl::Seconds(settings.seconds));
  const double seconds = absl::ToDoubleSeconds(absl::Now() - from);
  const int64_t done = num_done - done_before;
  const double cpu = ServerCpuSeconds(observer) - cpu_before;
  stop = true;
  for (std::thread& thread : threads) thread.join();
  std::vector<double> all;
  for (const std::vector<double>& each : latencies) all.insert(all.end(), each.begin(), each.end());
  std::sort(all.begin(), all.end());
  if (all.empty()) all.push_back(0);
  std::printf(
      "appendfsync %-8s  %ld workers x %ld rows x %ld steps: %.0f life-cycles/s, %.0f events/s, "
      "publish p50 %.2f ms p99 %.2f ms, "
      "Redis %.0f us of CPU a life-cycle, %.0f%% busy\n",
      fsync.c_str(), static_cast<long>(settings.workers), static_cast<long>(settings.rows),
      static_cast<long>(settings.steps), static_cast<double>(done) / seconds,
      static_cast<double>(done * settings.steps) / seconds, all[all.size() / 2],
      all[all.size() * 99 / 100], 1e6 * cpu / static_cast<double>(std::max<int64_t>(done, 1)),
      100 * cpu / seconds);
}

}  // namespace
}  // namespace cinnabar

int main(int argc, char** argv) {
  cinnabar::Settings settings;
  for (int i = 1; i < argc; ++i) {
    absl::string_view arg = argv[i];
    bool ok = false;
    if (absl::ConsumePrefix(&arg, "--seconds="))
      ok = absl::SimpleAtoi(arg, &settings.seconds);
    else if (absl::ConsumePrefix(&arg, "--gateways="))
      ok = absl::SimpleAtoi(arg, &settings.gateways);
    else if (absl::ConsumePrefix(&arg, "--workers="))
      ok = absl::SimpleAtoi(arg, &settings.workers);
    else if (absl::ConsumePrefix(&arg, "--rows="))
      ok = absl::SimpleAtoi(arg, &settings.rows);
    else if (absl::ConsumePrefix(&arg, "--steps="))
      ok = absl::SimpleAtoi(arg, &settings.steps);
    else if (absl::ConsumePrefix(&arg, "--delta="))
      ok = absl::SimpleAtoi(arg, &settings.delta);
    else if (absl::ConsumePrefix(&arg, "--fsync="))
      ok = !(settings.fsync = std::string(arg)).empty();
    if (!ok) {
      std::fprintf(stderr, "what is %s?\n", argv[i]);
      return 2;
    }
  }
  for (const char* fsync : {"everysec", "always"}) {
    if (settings.fsync.empty() || settings.fsync == fsync) cinnabar::RunOnce(settings, fsync);
  }
  return 0;
}
