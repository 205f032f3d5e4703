// cinnabar-scheduler: packs waiting requests for the workers.
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/config/flags.h"
#include "common/metrics/metrics_server.h"
#include "common/program/program.h"
#include "scheduler/service/scheduler_loop.h"

namespace cinnabar {
namespace {

struct Flags {
  ProgramFlags program;
  float lease_seconds = 5;
  int32_t ready_packs_max = 4;
  float window_ms = 50;
  float starvation_seconds = 240;
  float ageing_seconds = 60;

  void Register(FlagSet& flags) {
    program.Register(flags);
    flags.Section("Planning");
    flags.Add("lead-seconds", &lease_seconds, "S", "a standby takes over within this");
    flags.Add("ready-packs-max", &ready_packs_max, "N", "packs sent ahead to one worker");
    flags.Add("window-ms", &window_ms, "MS",
              "how long the refill of a busy worker waits for company, at most");
    flags.Add("ageing-seconds", &ageing_seconds, "S", "waiting lifts a request a class for each");
    flags.Add("starvation-seconds", &starvation_seconds, "S",
              "what has waited longer gets its share whatever else waits");
    flags.Examples(
        "examples:\n"
        "  cinnabar-scheduler --redis 127.0.0.1:6379\n"
        "  cinnabar-scheduler --redis /run/redis.sock --name scheduler-b    (a standby)\n");
  }
};

absl::Status Serve(Flags flags) {
  if (flags.program.name.empty()) {
    flags.program.name = absl::StrCat(HostName(), "-scheduler");
  }
  CINNABAR_RETURN_IF_ERROR(flags.program.Start("scheduler"));
  SchedulerOptions options;
  CINNABAR_ASSIGN_OR_RETURN(options.redis, flags.program.Redis("scheduler"));
  options.queue = flags.program.Queue(/*may_create_site=*/true);
  options.name = flags.program.name;
  options.lease_for = absl::Seconds(flags.lease_seconds);
  options.renew_every = options.lease_for / 5;
  options.ready_packs_max = flags.ready_packs_max;
  options.plan.window_max = absl::Milliseconds(flags.window_ms);
  options.plan.ageing_period = absl::Seconds(flags.ageing_seconds);
  options.plan.starvation_wait = absl::Seconds(flags.starvation_seconds);
  Metrics metrics;
  SchedulerMetrics scheduler_metrics(metrics);
  SchedulerLoop loop(options, scheduler_metrics);
  CINNABAR_ASSIGN_OR_RETURN(
      const std::unique_ptr<HttpServer> server,
      StartMetricsServer(flags.program.metrics_listen, metrics, [&loop]() -> std::string {
        return loop.connected() ? "" : "Redis is not there";
      }));
  Log(LogLevel::kInfo, "scheduler_starts",
      {{"version", kVersion},
       {"name", options.name},
       {"metrics", flags.program.MetricsAddress(server->port())}});
  const SignalThread signals([&loop] { loop.Stop(); });
  NotifyReady();
  loop.Run();
  Log(LogLevel::kInfo, "scheduler_stops");
  return absl::OkStatus();
}

}  // namespace
}  // namespace cinnabar

int main(int argc, char** argv) {
  cinnabar::Flags flags;
  cinnabar::FlagSet set("cinnabar-scheduler --redis HOST:PORT [flags]",
                        "Packs waiting requests by model, length and remaining steps, and sends "
                        "them to the workers. Several may\nrun: one leads, the others stand by.");
  flags.Register(set);
  return cinnabar::RunProgram(set, argc, argv, [&] { return cinnabar::Serve(flags); });
}
