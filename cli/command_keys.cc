// `cinnabar keys`: the API keys of a cluster.
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "cli/commands.h"
#include "cli/terminal.h"
#include "common/base/json.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/keys/key_store.h"
#include "common/program/program.h"

namespace cinnabar {
namespace {

constexpr char kUsage[] =
    "usage: cinnabar keys create --pepper FILE --tenant NAME [flags]\n"
    "       cinnabar keys list [--json]\n"
    "       cinnabar keys revoke ID\n"
    "       cinnabar keys forget ID\n"
    "\n"
    "API keys: who may use the cluster, and how much. `create` shows a key once; Redis holds a "
    "keyed hash of it.\n"
    "Gateways started with --keys-pepper FILE take them, and notice changes within seconds.\n"
    "`cinnabar keys create --help` lists the limits.\n";

struct Flags {
  ProgramFlags program;
  std::string pepper;
  std::string tenant, label, environment = "live", class_max = "interactive";
  std::vector<std::string> models;
  float weight = 1;
  uint64_t requests = 0, tokens = 0, token_steps = 0, concurrency = 0;
  float budget = 0;
  bool json = false;
};

void RegisterCreate(Flags& flags, FlagSet& set) {
  set.Section("Key");
  set.Add("pepper", &flags.pepper, "FILE",
          "the site's secret that hashes are made with; made when it is not there. Gateways get it "
          "with --keys-pepper. Keep a copy: without it no key works");
  set.Add("tenant", &flags.tenant, "NAME", "whose key: limits, shares and bills go by tenant");
  set.Add("label", &flags.label, "TEXT", "for people");
  set.Add("environment", &flags.environment, "NAME", "part of the key's text, as live or test");
  set.Add("class-max", &flags.class_max, "CLASS",
          "interactive, standard or batch: more urgent requests become this");
  set.Add("weight", &flags.weight, "W", "of the tenant's share when the cluster is full");
  set.Add("model", &flags.models, "NAME", "that it may use; repeatable [all]");
  set.Section("Limits (0: none; left out: the gateway's defaults)");
  set.Add("requests-per-minute", &flags.requests, "N", "");
  set.Add("tokens-per-minute", &flags.tokens, "N", "prompt and canvas");
  set.Add("token-steps-per-minute", &flags.token_steps, "N", "predicted tokens x denoising steps");
  set.Add("concurrency", &flags.concurrency, "N", "live requests");
  set.Add("budget-dollars-per-month", &flags.budget, "DOLLARS", "calendar month, UTC");
  set.Examples(
      "examples:\n"
      "  cinnabar keys create --pepper /etc/cinnabar/pepper --tenant acme --label 'CI of acme'\n"
      "  cinnabar keys create --pepper pepper --tenant batch-jobs --class-max batch "
      "--tokens-per-minute 200000\n");
}

KeySpec SpecOf(const Flags& flags, const FlagSet& set, RequestClass class_max) {
  KeySpec spec = {.environment = flags.environment,
                  .tenant = flags.tenant,
                  .name = flags.label,
                  .class_max = class_max,
                  .weight = flags.weight,
                  .models = flags.models};
  const auto limit = [&](const char* name, uint64_t value, std::optional<int64_t>& to) {
    if (set.Has(name)) to = static_cast<int64_t>(value);
  };
  limit("requests-per-minute", flags.requests, spec.limits.requests_per_minute);
  limit("tokens-per-minute", flags.tokens, spec.limits.tokens_per_minute);
  limit("token-steps-per-minute", flags.token_steps, spec.limits.token_steps_per_minute);
  limit("concurrency", flags.concurrency, spec.limits.concurrency_max);
  if (set.Has("budget-dollars-per-month")) spec.limits.budget_dollars_per_month = flags.budget;
  return spec;
}

std::string When(absl::Time time) {
  return absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", time, absl::UTCTimeZone());
}

nlohmann::json ToJson(const ApiKey& key) {
  nlohmann::json limits = nlohmann::json::object();
  const auto add = [&](const char* name, const auto& limit) {
    if (limit.has_value()) limits[name] = *limit;
  };
  add("requests_per_minute", key.spec.limits.requests_per_minute);
  add("tokens_per_minute", key.spec.limits.tokens_per_minute);
  add("token_steps_per_minute", key.spec.limits.token_steps_per_minute);
  add("concurrency", key.spec.limits.concurrency_max);
  add("budget_dollars_per_month", key.spec.limits.budget_dollars_per_month);
  nlohmann::json json = {{"id", key.id},
                         {"tenant", key.spec.tenant},
                         {"label", key.spec.name},
                         {"environment", key.spec.environment},
                         {"class_max", RequestClassName(key.spec.class_max)},
                         {"weight", key.spec.weight},
                         {"models", key.spec.models},
                         {"limits", std::move(limits)},
                         {"created", When(key.created)},
                         {"revoked", nullptr}};
  if (!key.live()) json["revoked"] = When(key.revoked);
  return json;
}

std::string DescribeLimits(const KeyLimits& limits) {
  std::vector<std::string> parts;
  const auto add = [&](const std::optional<int64_t>& limit, absl::string_view unit) {
    if (limit.has_value()) parts.push_back(absl::StrCat(ShowWhole(*limit), " ", unit));
  };
  add(limits.requests_per_minute, "requests/min");
  add(limits.tokens_per_minute, "tokens/min");
  add(limits.token_steps_per_minute, "token-steps/min");
  add(limits.concurrency_max, "at once");
  if (limits.budget_dollars_per_month.has_value()) {
    parts.push_back(absl::StrCat("$", *limits.budget_dollars_per_month, "/month"));
  }
  return parts.empty() ? "defaults" : absl::StrJoin(parts, ", ");
}

absl::Status Create(const Flags& flags, const FlagSet& set, KeyStore& store) {
  if (flags.pepper.empty()) {
    return absl::InvalidArgumentError(
        "--pepper is missing: name the site's pepper file; it is made when it is not there");
  }
  CINNABAR_ASSIGN_OR_RETURN(const RequestClass class_max, ParseRequestClass(flags.class_max),
                            "--class-max");
  const KeySpec spec = SpecOf(flags, set, class_max);
  CINNABAR_RETURN_IF_ERROR(ValidateKeySpec(spec), "--");
  CINNABAR_ASSIGN_OR_RETURN(const Pepper pepper, LoadOrCreatePepper(flags.pepper));
  CINNABAR_ASSIGN_OR_RETURN(const CreatedKey created, store.Create(spec, pepper, absl::Now()));
  if (flags.json) {
    nlohmann::json json = ToJson(created.key);
    json["key"] = created.text;
    std::printf("%s\n", json.dump(2).c_str());
    return absl::OkStatus();
  }
  std::printf("%s\n", created.text.c_str());
  std::fprintf(stderr,
               "key %s of tenant %s, limits: %s. It is shown this once; give it to its user as\n"
               "\"Authorization: Bearer KEY\" or OPENAI_API_KEY.\n",
               created.key.id.c_str(), spec.tenant.c_str(), DescribeLimits(spec.limits).c_str());
  return absl::OkStatus();
}

absl::Status List(const Flags& flags, KeyStore& store) {
  CINNABAR_ASSIGN_OR_RETURN(const KeyListing listing, store.List());
  if (flags.json) {
    nlohmann::json keys = nlohmann::json::array();
    for (const StoredKey& stored : listing.keys) keys.push_back(ToJson(stored.key));
    std::printf("%s\n", keys.dump(2).c_str());
  } else if (listing.keys.empty()) {
    std::printf("no keys yet; `cinnabar keys create` makes one\n");
  } else {
    std::printf("%-24s %-16s %-20s %-21s %-21s %s\n", "id", "tenant", "label", "created", "revoked",
                "class, limits");
    for (const StoredKey& stored : listing.keys) {
      const ApiKey& key = stored.key;
      std::printf("%-24s %s %s %-21s %-21s %s, %s\n", key.id.c_str(),
                  FitLeft(key.spec.tenant, 16).c_str(),
                  FitLeft(Printable(key.spec.name), 20).c_str(), When(key.created).c_str(),
                  key.live() ? "" : When(key.revoked).c_str(),
                  std::string(RequestClassName(key.spec.class_max)).c_str(),
                  DescribeLimits(key.spec.limits).c_str());
    }
  }
  if (listing.num_unreadable > 0) {
    std::fprintf(stderr, "%ld records could not be read; a newer version may have made them\n",
                 static_cast<long>(listing.num_unreadable));
  }
  return absl::OkStatus();
}

absl::Status Run(const std::string& verb, const Flags& flags, const FlagSet& set) {
  CINNABAR_ASSIGN_OR_RETURN(const RedisOptions options, flags.program.Redis("keys"));
  RedisClient redis(options);
  KeyStore store(redis, flags.program.partition);
  const size_t num_ids = verb == "revoke" || verb == "forget" ? 1 : 0;
  if (set.positional().size() != num_ids) {
    return absl::InvalidArgumentError(
        num_ids == 1 ? absl::StrCat(verb, " takes one key's id; `cinnabar keys list` shows them")
                     : absl::StrCat("\"", set.positional()[0], "\" is too much; --help explains"));
  }
  if (verb == "create") return Create(flags, set, store);
  if (verb == "list") return List(flags, store);
  const std::string& id = set.positional()[0];
  if (verb == "forget") {
    CINNABAR_RETURN_IF_ERROR(store.Forget(id));
    std::printf("key %s is forgotten\n", id.c_str());
    return absl::OkStatus();
  }
  CINNABAR_ASSIGN_OR_RETURN(const ApiKey key, store.Revoke(id, absl::Now()));
  std::printf("key %s of tenant %s is revoked since %s; gateways refuse it within seconds\n",
              key.id.c_str(), key.spec.tenant.c_str(), When(key.revoked).c_str());
  return absl::OkStatus();
}

}  // namespace

int RunKeys(const std::vector<std::string>& args) {
  const std::string verb = args.empty() ? "" : args[0];
  if (verb == "--help" || verb == "-h") {
    std::fputs(kUsage, stdout);
    return 0;
  }
  if (verb != "create" && verb != "list" && verb != "revoke" && verb != "forget") {
    std::fputs(kUsage, stderr);
    return 2;
  }
  Flags flags;
  FlagSet set(absl::StrCat("cinnabar keys ", verb,
                           verb == "create" ? " --pepper FILE --tenant NAME [flags]"
                           : verb == "list" ? " [flags]"
                                            : " ID [flags]"),
              "API keys of a cluster: `cinnabar keys --help` says how they work.");
  if (verb == "create") RegisterCreate(flags, set);
  if (verb == "create" || verb == "list") set.Add("json", &flags.json, "one JSON document");
  flags.program.RegisterCluster(set);
  return RunCommand("keys", set, {args.begin() + 1, args.end()},
                    [&] { return Run(verb, flags, set); });
}

}  // namespace cinnabar
