#include <unistd.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "cli/api_client.h"
#include "cli/cluster_meter.h"
#include "cli/commands.h"
#include "cli/http_client.h"
#include "cli/operator_queue.h"
#include "cli/terminal.h"
#include "cli/top_view.h"
#include "common/base/status.h"
#include "common/config/flags.h"

namespace cinnabar {
namespace {

constexpr int32_t kFeedEntriesMax = 1024;
constexpr absl::Duration kScrapeTimeout = absl::Seconds(2);
// Workers say how they are about once a second: two beats come within this.
constexpr absl::Duration kTwoBeats = absl::Seconds(4);

struct TopFlags {
  ProgramFlags program;
  std::string gateway;
  std::string ca_file;
  float interval = 1.0F;
  bool once = false;
  bool json = false;

  void Register(FlagSet& flags) {
    program.RegisterCluster(flags);
    flags.Add("gateway", &gateway, "URL", "its /metrics too: requests, refusals, latency, price");
    flags.Add("ca-file", &ca_file, "FILE", "certificates to trust, for https");
    flags.Section("Output");
    flags.Add("interval", &interval, "S", "between two looks");
    flags.Add("once", &once, "one look instead of a live screen; takes a few seconds");
    flags.Add("json", &json, "with --once: one JSON object; rates are null while unknown");
    flags.Examples(
        "What the words mean: rows are the requests that a worker denoises at once; a forward is "
        "one pass of the\nmodel, NFE/answer counts those that an answer took; tokens/forward is "
        "how many tokens a request decides\nin one of them; wasted is the share of device time "
        "that went into requests that were cancelled, expired\nor failed. Rates are those of the "
        "last five seconds.\n\n"
        "examples:\n"
        "  cinnabar top --redis 127.0.0.1:6379 --gateway http://127.0.0.1:8080\n"
        "  cinnabar top --once --json | jq .tokens_per_second\n");
  }
};

// Looks at one cluster.
class ClusterWatcher {
 public:
  static absl::StatusOr<std::unique_ptr<ClusterWatcher>> Make(const TopFlags& flags) {
    std::unique_ptr<ClusterWatcher> watcher(new ClusterWatcher);
    CINNABAR_ASSIGN_OR_RETURN(watcher->opened_, OperatorQueue::Open(flags.program));
    if (!flags.gateway.empty()) {
      CINNABAR_ASSIGN_OR_RETURN(const HttpUrl url, ParseHttpUrl(flags.gateway), "--gateway");
      CINNABAR_ASSIGN_OR_RETURN(watcher->http_, HttpClient::Make(url, {.ca_file = flags.ca_file}));
    }
    CINNABAR_RETURN_IF_ERROR(watcher->FindFeed());
    return watcher;
  }

  absl::StatusOr<ClusterLook> Look() {
    Queue& queue = opened_->queue();
    ClusterLook look;
    CINNABAR_ASSIGN_OR_RETURN(look.queue, queue.Stats());
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<WorkerEntry> workers, queue.Workers());
    for (const WorkerEntry& entry : workers) {
      v1::WorkerStatus status;
      if (status.ParseFromString(entry.state)) {
        look.workers.emplace_back(entry.boot, std::move(status));
      }
    }
    CINNABAR_RETURN_IF_ERROR(ReadFeed(look.ended));
    if (http_) {
      CINNABAR_ASSIGN_OR_RETURN(look.gateway, Scrape());
    }
    look.at = absl::Now();
    return look;
  }

 private:
  ClusterWatcher() = default;

  absl::Status FindFeed() {
    CINNABAR_RETURN_IF_ERROR(opened_->queue().ScanWaiting(0, position_).status());
    generation_ = opened_->queue().mark().generation;
    return absl::OkStatus();
  }

  absl::Status ReadFeed(EndedRequests& ended) {
    Queue& queue = opened_->queue();
    // A restarted Redis may have gone back in its history: then our position means nothing.
    if (queue.mark().generation != generation_) return FindFeed();
    for (bool more = true; more;) {
      CINNABAR_ASSIGN_OR_RETURN(const Feed feed,
                                queue.ReadFeed(position_, kFeedEntriesMax, absl::Milliseconds(1)));
      for (const FeedEntry& entry : feed.entries) ended.Add(entry);
      position_ = feed.position;
      more = feed.entries.size() == kFeedEntriesMax;
    }
    return absl::OkStatus();
  }

  absl::StatusOr<MetricsText> Scrape() {
    absl::StatusOr<HttpReply> reply =
        http_->Fetch({.target = absl::StrCat(http_->url().path, "/metrics")}, kScrapeTimeout);
    if (!reply.ok()) return WithHint(reply.status(), http_->url());
    if (reply->head.status != 200) return ReadFailure(reply->head, reply->body).status;
    CINNABAR_ASSIGN_OR_RETURN(MetricsText metrics, MetricsText::Parse(reply->body),
                              http_->url().ToString(), "/metrics");
    return metrics;
  }

  std::unique_ptr<OperatorQueue> opened_;
  std::unique_ptr<HttpClient> http_;
  std::string position_;  // in the feed
  int64_t generation_ = 0;
};

TopViewOptions ViewOptions(const TopFlags& flags, int fd) {
  const TerminalSize size = GetTerminalSize(fd);
  return {.title = absl::StrCat(
              flags.program.sentinels.empty() ? flags.program.redis : flags.program.master_name,
              " ", flags.program.partition),
          .columns = size.columns - 1,
          .lines_max = size.rows - 1,
          .colour = WantsColour(fd),
          .zone = absl::LocalTimeZone()};
}

absl::Status ShowOnce(const TopFlags& flags, ClusterWatcher& watcher) {
  ClusterMeter meter;
  const absl::Time end = absl::Now() + kTwoBeats;
  for (;;) {
    CINNABAR_ASSIGN_OR_RETURN(ClusterLook look, watcher.Look());
    meter.Take(std::move(look));
    if (meter.Complete() || absl::Now() >= end) break;
    absl::SleepFor(absl::Milliseconds(500));
  }
  const ClusterFigures figures = meter.Figures();
  if (flags.json) {
    std::printf(
        "%s\n",
        figures.ToJson().dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    TopViewOptions options = ViewOptions(flags, STDOUT_FILENO);
    options.lines_max = 1 << 20;  // it scrolls
    std::fputs(RenderTop(figures, options).c_str(), stdout);
  }
  return absl::OkStatus();
}

// Until a signal ends it.
absl::Status ShowLive(const TopFlags& flags, ClusterWatcher& watcher) {
  ClusterMeter meter;
  CINNABAR_ASSIGN_OR_RETURN(ClusterLook first, watcher.Look());
  meter.Take(std::move(first));
  LiveFrame frame(stdout, LiveFrame::Place::kWholeScreen);
  std::string problem;
  for (;;) {
    TopViewOptions options = ViewOptions(flags, STDOUT_FILENO);
    options.problem = problem;
    frame.Draw(RenderTop(meter.Figures(), options));
    absl::SleepFor(absl::Seconds(flags.interval));
    absl::StatusOr<ClusterLook> look = watcher.Look();
    problem = look.ok() ? "" : std::string(look.status().message());
    if (look.ok()) meter.Take(*std::move(look));
  }
}

absl::Status Top(const TopFlags& flags) {
  if (flags.json && !flags.once) {
    return absl::InvalidArgumentError("--json goes with --once");
  }
  if (!(flags.interval >= 0.1F && flags.interval <= 3600.0F)) {
    return absl::InvalidArgumentError("--interval: take 0.1 to 3600 seconds");
  }
  if (!flags.once && isatty(STDOUT_FILENO) == 0) {
    return absl::InvalidArgumentError("not a terminal: take --once, with --json for scripts");
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<ClusterWatcher> watcher,
                            ClusterWatcher::Make(flags));
  return flags.once ? ShowOnce(flags, *watcher) : ShowLive(flags, *watcher);
}

}  // namespace

int RunTop(const std::vector<std::string>& args) {
  TopFlags flags;
  FlagSet set(
      "cinnabar top [--redis HOST:PORT] [--gateway URL] [flags]",
      "Shows a running cluster, live: what waits in each class, what the workers do, tokens "
      "a second, forwards,\nwaste and cost. Looks only, changes nothing. Ctrl-C ends it.");
  flags.Register(set);
  return RunCommand("top", set, args, [&]() -> absl::Status {
    CINNABAR_RETURN_IF_ERROR(TakesNoText(set, "--redis names the cluster"));
    return Top(flags);
  });
}

}  // namespace cinnabar
