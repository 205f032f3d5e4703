#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "cli/commands.h"
#include "cli/operator_queue.h"
#include "cli/terminal.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "nlohmann/json.hpp"

namespace cinnabar {
namespace {

using Json = nlohmann::json;

constexpr int32_t kChoicesMax = 128;
constexpr size_t kDropAtOnce = 256;

struct QueueFlags {
  ProgramFlags program;
  int32_t entries_max = 50;
  bool drop = false;
  bool json = false;

  void Register(FlagSet& flags) {
    program.RegisterCluster(flags);
    flags.Section("Output");
    flags.Add("max", &entries_max, "N", "dead: so many of the newest");
    flags.Add("drop", &drop, "dead: forget those that were printed; they can not run again");
    flags.Add("json", &json, "JSON: one object, for dead and for several requests one a line");
    flags.Examples(
        "An ID is the one of the reply (cmpl-req_..., chatcmpl-req_...) or of its x-request-id "
        "(req_...), which means all\nchoices of the request, or one of them (req_....0).\n\n"
        "examples:\n"
        "  cinnabar queue stats --redis 127.0.0.1:6379\n"
        "  cinnabar queue show cmpl-req_632eb6949a68d2808babd7b135d9e53c\n"
        "  cinnabar queue dead --max 10 --json\n"
        "  cinnabar queue dead --max 100000 --json --drop >> dead_letters.jsonl\n");
  }
};

void Print(const Json& json) {
  std::printf("%s\n", json.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
}

absl::Status ShowStats(Queue& queue, const QueueFlags& flags) {
  CINNABAR_ASSIGN_OR_RETURN(const QueueStats stats, queue.Stats());
  Json waiting = Json::object();
  Json oldest = Json::object();
  std::string classes;
  for (size_t i = 0; i < kRequestClasses.size(); ++i) {
    const std::string name(RequestClassName(kRequestClasses[i]));
    const double age = absl::ToDoubleSeconds(stats.oldest_age[i]);
    waiting[name] = stats.waiting[i];
    oldest[name] = age;
    absl::StrAppendFormat(&classes, "  %-18s%s", name, ShowWhole(stats.waiting[i]));
    if (stats.waiting[i] > 0) absl::StrAppend(&classes, ", the oldest for ", ShowSeconds(age));
    classes += '\n';
  }
  if (flags.json) {
    Print({{"site", queue.mark().site},
           {"partition", flags.program.partition},
           {"live", stats.live},
           {"cost_token_steps", stats.cost},
           {"waiting", std::move(waiting)},
           {"oldest_seconds", std::move(oldest)},
           {"batches", stats.batches},
           {"ready_packs", stats.ready_packs},
           {"workers", stats.workers},
           {"dead_letters", stats.dead_letters},
           {"ledger_entries", stats.ledger_entries}});
    return absl::OkStatus();
  }
  std::printf(
      "%-20s%s (partition %s)\n"
      "%-20s%s, %s token-steps\n"
      "waiting\n%s"
      "%-20s%s\n"
      "%-20s%s\n"
      "%-20s%s\n"
      "%-20s%s%s\n"
      "%-20s%s\n",
      "site", queue.mark().site.c_str(), flags.program.partition.c_str(), "under way",
      ShowWhole(stats.live).c_str(), ShowWhole(stats.cost).c_str(), classes.c_str(), "batches",
      ShowWhole(stats.batches).c_str(), "packs on the way", ShowWhole(stats.ready_packs).c_str(),
      "workers", ShowWhole(stats.workers).c_str(), "dead letters",
      ShowWhole(stats.dead_letters).c_str(),
      stats.dead_letters > 0 ? "   (cinnabar queue dead shows why)" : "", "ledger entries",
      ShowWhole(stats.ledger_entries).c_str());
  return absl::OkStatus();
}

absl::Status ShowDead(Queue& queue, const QueueFlags& flags) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<DeadLetter> letters,
                            queue.DeadLetters(flags.entries_max));
  for (const DeadLetter& letter : letters) {
    if (flags.json) {
      Print({{"request", letter.request},
             {"tenant", letter.tenant},
             {"tag", letter.tag},
             {"why", letter.why},
             {"worker", letter.worker},
             {"attempts", letter.attempts},
             {"step", letter.step}});
      continue;
    }
    std::printf("%s   tenant %s   %d attempts, %d steps   worker %s\n    %s\n",
                Printable(letter.request).c_str(), Printable(letter.tenant).c_str(),
                static_cast<int>(letter.attempts), letter.step,
                letter.worker.empty() ? "-" : Printable(letter.worker).c_str(),
                Printable(letter.why).c_str());
  }
  if (letters.empty() && !flags.json) std::puts("no dead letters");
  if (!flags.drop || letters.empty()) return absl::OkStatus();
  if (std::fflush(stdout) != 0)
    return absl::DataLossError("stdout cannot be written; none forgotten");
  int64_t num_dropped = 0;
  for (size_t first = 0; first < letters.size(); first += kDropAtOnce) {
    std::vector<std::string> positions;
    for (size_t i = first; i < std::min(letters.size(), first + kDropAtOnce); ++i) {
      positions.push_back(letters[i].position);
    }
    CINNABAR_ASSIGN_OR_RETURN(const int64_t dropped, queue.DropDeadLetters(positions));
    num_dropped += dropped;
  }
  if (!flags.json) std::printf("%s forgotten\n", ShowWhole(num_dropped).c_str());
  return absl::OkStatus();
}

// Calls `act` with each request of the queue that `given` means, and its tenant.
absl::Status ForEachRequest(
    Queue& queue, absl::string_view given,
    const std::function<absl::Status(const std::string& id, const std::string& tenant)>& act) {
  absl::string_view id = given;
  if (!absl::ConsumePrefix(&id, "chatcmpl-")) absl::ConsumePrefix(&id, "cmpl-");
  int32_t found = 0;
  const auto one = [&](const std::string& request) -> absl::StatusOr<bool> {
    const absl::StatusOr<std::string> tenant = queue.Tenant(request);
    if (absl::IsNotFound(tenant.status())) return false;
    CINNABAR_RETURN_IF_ERROR(tenant.status());
    ++found;
    CINNABAR_RETURN_IF_ERROR(act(request, *tenant));
    return true;
  };
  CINNABAR_ASSIGN_OR_RETURN(bool more, one(std::string(id)));
  for (int32_t choice = 0; choice < kChoicesMax && (choice == 0 || more); ++choice) {
    CINNABAR_ASSIGN_OR_RETURN(more, one(absl::StrCat(id, ".", choice)));
  }
  if (found > 0) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat(
      "no request \"", Printable(given),
      "\": an ID is that of a reply, cmpl-req_...; ended ones are forgotten after a while"));
}

absl::Status ShowRequest(Queue& queue, const QueueFlags& flags, const std::string& id,
                         const std::string& tenant) {
  CINNABAR_ASSIGN_OR_RETURN(const RequestView view, queue.Events(id, tenant, 0, 0));
  const double device_seconds = static_cast<double>(view.usage.device_us) / 1e6;
  const double charge_dollars = static_cast<double>(view.charge_microdollars) / 1e6;
  const double age = absl::ToDoubleSeconds(view.age);
  if (flags.json) {
    Print({{"request", id},
           {"tenant", tenant},
           {"state", std::string(RequestStateName(view.state))},
           {"step", view.step},
           {"attempt", view.attempt},
           {"why", view.why},
           {"age_seconds", age},
           {"tokens", view.usage.output_tokens},
           {"forwards", view.usage.forwards},
           {"device_seconds", device_seconds},
           {"charge_dollars", charge_dollars}});
    return absl::OkStatus();
  }
  std::printf("%-12s%s\n%-12s%s\n%-12s%s%s%s\n%-12s%s ago\n%-12s%d, attempt %d\n", "request",
              Printable(id).c_str(), "tenant", Printable(tenant).c_str(), "state",
              std::string(RequestStateName(view.state)).c_str(), view.why.empty() ? "" : ": ",
              Printable(view.why).c_str(), "came", ShowSeconds(age).c_str(), "step", view.step,
              static_cast<int>(view.attempt));
  std::printf("%-12s%s tokens, %s forwards, %s of device time", "used",
              ShowWhole(view.usage.output_tokens).c_str(), ShowWhole(view.usage.forwards).c_str(),
              ShowSeconds(device_seconds).c_str());
  if (charge_dollars > 0) std::printf(", $%.6f charged", charge_dollars);
  std::puts("");
  return absl::OkStatus();
}

absl::Status CancelRequest(Queue& queue, const QueueFlags& flags, const std::string& id,
                           const std::string& tenant) {
  CINNABAR_ASSIGN_OR_RETURN(const RequestState state,
                            queue.Cancel(id, tenant, "cancelled by an operator"));
  const std::string name(RequestStateName(state));
  if (flags.json) {
    Print({{"request", id}, {"tenant", tenant}, {"state", name}});
  } else {
    std::printf("%s: %s\n", Printable(id).c_str(), name.c_str());
  }
  return absl::OkStatus();
}

absl::Status Run(const QueueFlags& flags, const std::vector<std::string>& words) {
  const std::string verb = words.empty() ? "" : words[0];
  const bool names = verb == "show" || verb == "cancel";
  if (!names && verb != "stats" && verb != "dead") {
    return absl::InvalidArgumentError(
        absl::StrCat(words.empty() ? "say what" : absl::StrCat("no such word \"", verb, "\""),
                     ": stats, show ID, cancel ID or dead"));
  }
  if (flags.drop && verb != "dead") return absl::InvalidArgumentError("--drop is for dead");
  if (flags.entries_max < 1 || flags.entries_max > 100'000) {
    return absl::InvalidArgumentError("--max: take 1 to 100000");
  }
  if (names && words.size() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("name the request: cinnabar queue ", verb, " cmpl-req_..."));
  }
  if (!names && words.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat("\"", words[1], "\" is one word too many"));
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<OperatorQueue> opened,
                            OperatorQueue::Open(flags.program));
  Queue& queue = opened->queue();
  if (verb == "stats") return ShowStats(queue, flags);
  if (verb == "dead") return ShowDead(queue, flags);
  for (size_t i = 1; i < words.size(); ++i) {
    CINNABAR_RETURN_IF_ERROR(
        ForEachRequest(queue, words[i], [&](const std::string& id, const std::string& tenant) {
          return verb == "show" ? ShowRequest(queue, flags, id, tenant)
                                : CancelRequest(queue, flags, id, tenant);
        }));
  }
  return absl::OkStatus();
}

}  // namespace

int RunQueue(const std::vector<std::string>& args) {
  QueueFlags flags;
  FlagSet set("cinnabar queue (stats | show ID... | cancel ID... | dead) [flags]",
              "Looks into the queue of a running cluster, for operators of every tenant.\n"
              "  stats       what waits, runs, died\n"
              "  show ID     where a request is and what it has used\n"
              "  cancel ID   ends it now; its client is told, what it used stays on the bill\n"
              "  dead        requests that failed for good, the newest first, with the reason");
  flags.Register(set);
  return RunCommand("queue", set, args, [&] { return Run(flags, set.positional()); });
}

}  // namespace cinnabar
