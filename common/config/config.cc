#include "common/config/config.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/text_format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/edit_distance.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr size_t kConfigBytesMax = 1 << 20;
constexpr size_t kSecretBytesMax = 4096;
constexpr int kModelsMax = 64;

// ---- Reading ---------------------------------------------------------------------------------

// "http_listen" for the place behind "http_listen: " or "gateway { http_listen: ": the last name that
// a ':', '{' or '<' follows before `column`.
std::string FieldBefore(absl::string_view line, size_t column) {
  line = line.substr(0, std::min(column, line.size()));
  const size_t mark = line.find_last_of(":{<");
  if (mark == absl::string_view::npos) return "";
  absl::string_view left = absl::StripTrailingAsciiWhitespace(line.substr(0, mark));
  size_t begin = left.size();
  while (begin > 0 && (absl::ascii_isalnum(left[begin - 1]) || left[begin - 1] == '_')) --begin;
  return std::string(left.substr(begin));
}

// Of the message that "Message type \"T\" has no field named \"f\"." speaks of.
std::string MeantField(const std::string& message) {
  const std::vector<std::string> parts = absl::StrSplit(message, '"');
  if (parts.size() < 4 || !absl::StrContains(message, "has no field named")) return "";
  const google::protobuf::Descriptor* type =
      google::protobuf::DescriptorPool::generated_pool()->FindMessageTypeByName(parts[1]);
  if (type == nullptr) return "";
  std::string best;
  size_t best_distance = 0;
  for (int i = 0; i < type->field_count(); ++i) {
    const std::string& name = type->field(i)->name();
    const size_t distance = EditDistance(parts[3], name);
    if (best.empty() || distance < best_distance) {
      best = name;
      best_distance = distance;
    }
  }
  return best_distance <= 3 ? best : "";
}

class ErrorLines : public google::protobuf::io::ErrorCollector {
 public:
  ErrorLines(absl::string_view text, absl::string_view where)
      : lines_(absl::StrSplit(text, '\n')), where_(where) {}

  void AddError(int line, google::protobuf::io::ColumnNumber column,
                const std::string& message) override {
    if (errors_.size() == 8) return;
    std::string error = absl::StrCat(where_, ":");
    if (line >= 0) absl::StrAppend(&error, line + 1, ":", column + 1, ":");
    if (absl::StrContains(message, "has no field named")) {
      const std::string meant = MeantField(message);
      const std::vector<std::string> parts = absl::StrSplit(message, '"');
      absl::StrAppend(&error, " ", parts.size() > 3 ? parts[3] : message, ": no such field",
                      parts.size() > 1 ? absl::StrCat(" in ", Short(parts[1])) : "",
                      meant.empty() ? "" : absl::StrCat("; did you mean ", meant, "?"));
    } else {
      const std::string field =
          line >= 0 && static_cast<size_t>(line) < lines_.size()
              ? FieldBefore(lines_[static_cast<size_t>(line)], static_cast<size_t>(column))
              : "";
      absl::StrAppend(&error, " ", field, field.empty() ? "" : ": ", message);
    }
    errors_.push_back(std::move(error));
  }

  absl::Status status() const {
    return absl::InvalidArgumentError(errors_.empty() ? absl::StrCat(where_, ": does not parse")
                                                      : absl::StrJoin(errors_, "\n"));
  }

 private:
  static std::string Short(absl::string_view type) {
    return std::string(absl::StripPrefix(type, "cinnabar.v1."));
  }
  const std::vector<std::string> lines_;
  const std::string where_;
  std::vector<std::string> errors_;
};

void ResolvePath(const std::filesystem::path& folder, std::string* path) {
  if (!path->empty() && std::filesystem::path(*path).is_relative()) {
    *path = (folder / *path).lexically_normal().string();
  }
}

void ResolvePaths(const std::filesystem::path& folder, v1::ClusterConfig* config) {
  // Only of what is there, so that an absent field stays absent.
  const auto resolve = [&](bool there, auto mutable_path) {
    if (there) ResolvePath(folder, mutable_path());
  };
  v1::RedisConfig& redis = *config->mutable_redis();
  resolve(redis.has_password_file(), [&] { return redis.mutable_password_file(); });
  resolve(redis.has_sentinel_password_file(),
          [&] { return redis.mutable_sentinel_password_file(); });
  for (v1::ModelConfig& model : *config->mutable_models()) {
    ResolvePath(folder, model.mutable_path());
  }
  v1::GatewayConfig& gateway = *config->mutable_gateway();
  resolve(gateway.has_tls_certificate(), [&] { return gateway.mutable_tls_certificate(); });
  resolve(gateway.has_tls_key(), [&] { return gateway.mutable_tls_key(); });
  resolve(gateway.has_tls_client_ca(), [&] { return gateway.mutable_tls_client_ca(); });
  resolve(gateway.has_pepper_file(), [&] { return gateway.mutable_pepper_file(); });
}

// ---- Defaults --------------------------------------------------------------------------------

#define CINNABAR_DEFAULT(message, field, value) \
  if (!(message).has_##field()) (message).set_##field(value)

void FillClassValues(double interactive, double standard, double batch, v1::ClassValues* values) {
  CINNABAR_DEFAULT(*values, interactive, interactive);
  CINNABAR_DEFAULT(*values, standard, standard);
  CINNABAR_DEFAULT(*values, batch, batch);
}

void FillPlan(v1::PlanConfig* plan) {
  FillClassValues(8, 3, 1, plan->mutable_class_weight());
  CINNABAR_DEFAULT(*plan, ageing_period_seconds, 60);
  CINNABAR_DEFAULT(*plan, starvation_wait_seconds, 240);
  CINNABAR_DEFAULT(*plan, starvation_share, 0.1);
  FillClassValues(1, 1, 0.75, plan->mutable_tokens_share());
  CINNABAR_DEFAULT(*plan, padding_max, 0.2);
  CINNABAR_DEFAULT(*plan, window_max_seconds, 0.05);
  CINNABAR_DEFAULT(*plan, pressure_backlog_seconds, 4);
  CINNABAR_DEFAULT(*plan, drain_after_seconds, 0.2);
  CINNABAR_DEFAULT(*plan, turn_spare_seconds, 5);
  CINNABAR_DEFAULT(*plan, drain_share, 0.5);
  CINNABAR_DEFAULT(*plan, deadline_margin, 0.2);
  FillClassValues(2, 1.5, 1, plan->mutable_class_value());
  CINNABAR_DEFAULT(*plan, shed, true);
}

void FillRedis(v1::RedisConfig* redis) {
  if (redis->sentinels().empty()) CINNABAR_DEFAULT(*redis, address, "127.0.0.1:6379");
  CINNABAR_DEFAULT(*redis, connect_timeout_seconds, 1);
  CINNABAR_DEFAULT(*redis, command_timeout_seconds, 2);
}

void FillModel(v1::ModelConfig* model) {
  CINNABAR_DEFAULT(*model, owner, "cinnabar");
  CINNABAR_DEFAULT(*model, price_input_per_million, 0);
  CINNABAR_DEFAULT(*model, price_output_per_million, 0);
  CINNABAR_DEFAULT(*model, default_canvas_tokens, 128);
  CINNABAR_DEFAULT(*model, canvas_tokens_max, 4096);
  CINNABAR_DEFAULT(*model, context_tokens_max, 0);
}

bool ListensOnLoopback(absl::string_view listen) {
  const absl::StatusOr<HostPort> address = ParseHostPort(listen);
  return address.ok() && IsLoopback(address->host);
}

void FillGateway(v1::GatewayConfig* gateway) {
  CINNABAR_DEFAULT(*gateway, http_listen, "127.0.0.1:8080");
  CINNABAR_DEFAULT(*gateway, http_threads, 1);
  CINNABAR_DEFAULT(*gateway, body_bytes_max, 1 << 20);
  CINNABAR_DEFAULT(*gateway, connections_max, 4096);
  CINNABAR_DEFAULT(*gateway, connections_per_address_max, 1024);
  CINNABAR_DEFAULT(*gateway, requests_max, 8192);
  CINNABAR_DEFAULT(*gateway, deadline_default_seconds, 60);
  CINNABAR_DEFAULT(*gateway, deadline_max_seconds, 600);
  const bool loopback =
      ListensOnLoopback(gateway->http_listen()) &&
      (gateway->grpc_listen().empty() || ListensOnLoopback(gateway->grpc_listen()));
  CINNABAR_DEFAULT(*gateway, keys_required, !loopback);
  CINNABAR_DEFAULT(*gateway, key_environment, "live");
  v1::KeyLimits& limits = *gateway->mutable_limits();
  CINNABAR_DEFAULT(limits, requests_per_minute, 0);
  CINNABAR_DEFAULT(limits, tokens_per_minute, 0);
  CINNABAR_DEFAULT(limits, token_steps_per_minute, 0);
  CINNABAR_DEFAULT(limits, concurrency_max, 0);
  CINNABAR_DEFAULT(limits, budget_dollars_per_month, 0);
  CINNABAR_DEFAULT(*gateway, token_steps_max, 200'000'000);
  CINNABAR_DEFAULT(*gateway, queue_requests_max, 1000);
}

void FillScheduler(v1::SchedulerConfig* scheduler) {
  CINNABAR_DEFAULT(*scheduler, metrics_listen, "127.0.0.1:9101");
  CINNABAR_DEFAULT(*scheduler, lead_lease_seconds, 5);
  CINNABAR_DEFAULT(*scheduler, ready_packs_max, 2);
  CINNABAR_DEFAULT(*scheduler, start_within_seconds, 10);
  CINNABAR_DEFAULT(*scheduler, attempts_without_progress_max, 3);
  CINNABAR_DEFAULT(*scheduler, crashes_max, 10);
  FillPlan(scheduler->mutable_plan());
}

void FillWorker(v1::WorkerConfig* worker) {
  CINNABAR_DEFAULT(*worker, metrics_listen, "127.0.0.1:9102");
  CINNABAR_DEFAULT(*worker, rows_max, 16);
  CINNABAR_DEFAULT(*worker, tokens_max, 0);
  CINNABAR_DEFAULT(*worker, kv_bytes_max, 0);
  CINNABAR_DEFAULT(*worker, snapshot_every_steps, 8);
  CINNABAR_DEFAULT(*worker, lease_seconds, 10);
  CINNABAR_DEFAULT(*worker, drain_seconds, 20);
  CINNABAR_DEFAULT(*worker, device_dollars_per_hour, 0);
  CINNABAR_DEFAULT(*worker, dollars_per_kilowatt_hour, 0);
  CINNABAR_DEFAULT(*worker, power_usage_effectiveness, 1);
}

#undef CINNABAR_DEFAULT

// ---- Checks ----------------------------------------------------------------------------------

bool IsIdentifier(absl::string_view text) {
  return !text.empty() && text.size() <= 64 && std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '-';
  });
}

// Names of models are written in URLs and JSON by clients: "org/name" is one.
bool IsModelName(absl::string_view text) {
  return !text.empty() && text.size() <= 128 && text.front() != '/' &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
                  absl::StrContains("_.-/:", absl::string_view(&c, 1));
         });
}

// Keeps the first error; paths are of fields, "gateway.http_listen".
class Checks {
 public:
  const absl::Status& status() const { return status_; }

  void Fail(absl::string_view field, absl::string_view message) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(field, ": ", message));
  }
  void Require(bool condition, absl::string_view field, absl::string_view message) {
    if (!condition) Fail(field, message);
  }
  template <typename T>
  void Range(absl::string_view field, T value, T least, T most) {
    if (!(value >= least && value <= most)) {  // catches a NaN
      Fail(field, absl::StrCat(value, " is not in [", least, ", ", most, "]; choose one that is"));
    }
  }
  // Seconds: a day is more than anybody waits for.
  void Seconds(absl::string_view field, double value) {
    if (!(value > 0 && value <= 86400)) {
      Fail(field, absl::StrCat(value, " seconds; choose more than 0 and at most 86400"));
    }
  }
  void Listen(absl::string_view field, absl::string_view value) {
    if (const auto address = ParseHostPort(value); !address.ok()) {
      Fail(field, address.status().message());
    }
  }
  void Identifier(absl::string_view field, absl::string_view value) {
    if (!IsIdentifier(value)) {
      Fail(field, absl::StrCat("\"", value, "\" is no name; take 1 to 64 of A-Z a-z 0-9 _ . -"));
    }
  }
  void ClassValues(absl::string_view field, const v1::ClassValues& values, double least,
                   double most) {
    Range(absl::StrCat(field, ".interactive"), values.interactive(), least, most);
    Range(absl::StrCat(field, ".standard"), values.standard(), least, most);
    Range(absl::StrCat(field, ".batch"), values.batch(), least, most);
  }

 private:
  absl::Status status_;
};

void CheckRedis(const v1::RedisConfig& redis, Checks& checks) {
  if (redis.sentinels().empty()) {
    if (const auto address = ParseRedisAddress(redis.address()); !address.ok()) {
      checks.Fail("redis.address", address.status().message());
    }
    checks.Require(redis.sentinel_master().empty(), "redis.sentinel_master",
                   "there are no sentinels to ask for it; add redis.sentinels or remove it");
    checks.Require(redis.sentinel_password_file().empty(), "redis.sentinel_password_file",
                   "there are no sentinels to show it to; add redis.sentinels or remove it");
  } else {
    checks.Require(!redis.has_address(), "redis.address",
                   "the sentinels name the address; remove one of the two");
    checks.Require(!redis.sentinel_master().empty(), "redis.sentinel_master",
                   "missing; give the name that the sentinels know the primary by");
    for (int i = 0; i < redis.sentinels_size(); ++i) {
      if (const auto address = ParseRedisAddress(redis.sentinels(i)); !address.ok()) {
        checks.Fail(absl::StrCat("redis.sentinels[", i, "]"), address.status().message());
      }
    }
  }
  checks.Require(redis.username().empty() || !redis.password_file().empty(), "redis.username",
                 "has no password; add redis.password_file");
  checks.Seconds("redis.connect_timeout_seconds", redis.connect_timeout_seconds());
  checks.Seconds("redis.command_timeout_seconds", redis.command_timeout_seconds());
}

void CheckModels(const v1::ClusterConfig& config, Checks& checks) {
  checks.Range<int>("models", config.models_size(), 0, kModelsMax);
  std::set<std::string> names;
  for (int i = 0; i < config.models_size(); ++i) {
    const v1::ModelConfig& model = config.models(i);
    const std::string field = absl::StrCat("models[", i, "].");
    const auto check_name = [&](const std::string& name, absl::string_view which) {
      if (!IsModelName(name)) {
        checks.Fail(absl::StrCat(field, which),
                    absl::StrCat("\"", name,
                                 "\" is no name for a model; take 1 to 128 of A-Z a-z 0-9 _ . - "
                                 "/ :, not '/' first"));
      }
      if (!names.insert(name).second) {
        checks.Fail(absl::StrCat(field, which),
                    absl::StrCat("\"", name, "\" is taken; names and aliases must differ"));
      }
    };
    check_name(model.name(), "name");
    for (int j = 0; j < model.aliases_size(); ++j) {
      check_name(model.aliases(j), absl::StrCat("aliases[", j, "]"));
    }
    checks.Require(!model.path().empty(), absl::StrCat(field, "path"),
                   "missing; give the folder of the checkpoint");
    checks.Range(absl::StrCat(field, "price_input_per_million"), model.price_input_per_million(),
                 0.0, 1e6);
    checks.Range(absl::StrCat(field, "price_output_per_million"), model.price_output_per_million(),
                 0.0, 1e6);
    checks.Range(absl::StrCat(field, "canvas_tokens_max"), model.canvas_tokens_max(), 1, 1 << 20);
    if (model.default_canvas_tokens() < 1 ||
        model.default_canvas_tokens() > model.canvas_tokens_max()) {
      checks.Fail(absl::StrCat(field, "default_canvas_tokens"),
                  absl::StrCat(model.default_canvas_tokens(), " is not in [1, canvas_tokens_max = ",
                               model.canvas_tokens_max(), "]; lower it or raise the other"));
    }
    checks.Range(absl::StrCat(field, "context_tokens_max"), model.context_tokens_max(), 0, 1 << 24);
    checks.Require(
        model.context_tokens_max() == 0 ||
            model.context_tokens_max() > model.default_canvas_tokens(),
        absl::StrCat(field, "context_tokens_max"),
        "leaves no room for a prompt beside default_canvas_tokens; raise it, or 0 for no limit");
  }
}

void CheckLimits(const v1::KeyLimits& limits, Checks& checks) {
  constexpr int64_t kMost = int64_t{1} << 50;
  checks.Range("gateway.limits.requests_per_minute", limits.requests_per_minute(), int64_t{0},
               kMost);
  checks.Range("gateway.limits.tokens_per_minute", limits.tokens_per_minute(), int64_t{0}, kMost);
  checks.Range("gateway.limits.token_steps_per_minute", limits.token_steps_per_minute(), int64_t{0},
               kMost);
  checks.Range("gateway.limits.concurrency_max", limits.concurrency_max(), int64_t{0}, kMost);
  checks.Range("gateway.limits.budget_dollars_per_month", limits.budget_dollars_per_month(), 0.0,
               1e9);
}

void CheckGateway(const v1::GatewayConfig& gateway, Checks& checks) {
  checks.Listen("gateway.http_listen", gateway.http_listen());
  if (!gateway.grpc_listen().empty()) checks.Listen("gateway.grpc_listen", gateway.grpc_listen());
  checks.Require(gateway.tls_certificate().empty() == gateway.tls_key().empty(),
                 gateway.tls_key().empty() ? "gateway.tls_key" : "gateway.tls_certificate",
                 "missing; a certificate and its key go together");
  checks.Require(gateway.tls_client_ca().empty() || !gateway.tls_certificate().empty(),
                 "gateway.tls_client_ca", "needs gateway.tls_certificate and gateway.tls_key");
  // Debian's gRPC gets no fixes of its HTTP/2 stack.
  checks.Require(gateway.grpc_listen().empty() || ListensOnLoopback(gateway.grpc_listen()) ||
                     !gateway.tls_client_ca().empty(),
                 "gateway.grpc_listen",
                 "is reached from other machines; set gateway.tls_client_ca, so that only known "
                 "clients connect, or listen on 127.0.0.1");
  checks.Range("gateway.http_threads", gateway.http_threads(), 1, 64);
  checks.Range("gateway.body_bytes_max", gateway.body_bytes_max(), int64_t{1024},
               int64_t{64} << 20);
  checks.Range("gateway.connections_max", gateway.connections_max(), 1, 1 << 20);
  checks.Range("gateway.connections_per_address_max", gateway.connections_per_address_max(), 1,
               1 << 20);
  checks.Range("gateway.requests_max", gateway.requests_max(), 1, 1 << 20);
  checks.Seconds("gateway.deadline_default_seconds", gateway.deadline_default_seconds());
  checks.Seconds("gateway.deadline_max_seconds", gateway.deadline_max_seconds());
  if (gateway.deadline_max_seconds() < gateway.deadline_default_seconds()) {
    checks.Fail("gateway.deadline_max_seconds",
                absl::StrCat(gateway.deadline_max_seconds(), " is below deadline_default_seconds = ",
                             gateway.deadline_default_seconds(), "; raise it or lower the other"));
  }
  if (gateway.keys_required()) {
    checks.Require(!gateway.pepper_file().empty(), "gateway.pepper_file",
                   "missing; keys cannot be checked without it (or listen on 127.0.0.1 with "
                   "keys_required: false)");
  } else {
    checks.Require(ListensOnLoopback(gateway.http_listen()) &&
                       (gateway.grpc_listen().empty() || ListensOnLoopback(gateway.grpc_listen())),
                   "gateway.keys_required",
                   "false lets everybody in who can connect; set it to true, or listen on "
                   "127.0.0.1 only");
  }
  const std::string& environment = gateway.key_environment();
  checks.Require(!environment.empty() && environment.size() <= 16 &&
                     std::all_of(environment.begin(), environment.end(),
                                 [](char c) {
                                   return absl::ascii_islower(static_cast<unsigned char>(c)) ||
                                          absl::ascii_isdigit(static_cast<unsigned char>(c));
                                 }),
                 "gateway.key_environment", "take 1 to 16 of a-z 0-9, such as \"live\"");
  CheckLimits(gateway.limits(), checks);
  constexpr int64_t kMost = int64_t{1} << 50;
  checks.Range("gateway.token_steps_max", gateway.token_steps_max(), int64_t{0}, kMost);
  checks.Range("gateway.queue_requests_max", gateway.queue_requests_max(), int64_t{0}, kMost);
}

void CheckPlan(const v1::PlanConfig& plan, Checks& checks) {
  const std::string field = "scheduler.plan.";
  checks.ClassValues(field + "class_weight", plan.class_weight(), 0.01, 1000);
  checks.Seconds(field + "ageing_period_seconds", plan.ageing_period_seconds());
  checks.Seconds(field + "starvation_wait_seconds", plan.starvation_wait_seconds());
  checks.Range(field + "starvation_share", plan.starvation_share(), 0.0, 0.9);
  checks.ClassValues(field + "tokens_share", plan.tokens_share(), 0.01, 1);
  checks.Range(field + "padding_max", plan.padding_max(), 0.0, 0.99);
  checks.Range(field + "window_max_seconds", plan.window_max_seconds(), 0.0, 10.0);
  checks.Seconds(field + "pressure_backlog_seconds", plan.pressure_backlog_seconds());
  checks.Range(field + "drain_after_seconds", plan.drain_after_seconds(), 0.0, 3600.0);
  checks.Range(field + "turn_spare_seconds", plan.turn_spare_seconds(), 0.0, 3600.0);
  checks.Range(field + "drain_share", plan.drain_share(), 0.0, 1.0);
  checks.Range(field + "deadline_margin", plan.deadline_margin(), 0.0, 10.0);
  checks.ClassValues(field + "class_value", plan.class_value(), 0.01, 1000);
}

void CheckScheduler(const v1::SchedulerConfig& scheduler, Checks& checks) {
  checks.Listen("scheduler.metrics_listen", scheduler.metrics_listen());
  checks.Range("scheduler.lead_lease_seconds", scheduler.lead_lease_seconds(), 0.5, 300.0);
  checks.Range("scheduler.ready_packs_max", scheduler.ready_packs_max(), int64_t{1},
               int64_t{1024});
  checks.Seconds("scheduler.start_within_seconds", scheduler.start_within_seconds());
  checks.Range("scheduler.attempts_without_progress_max",
               scheduler.attempts_without_progress_max(), 1, 100);
  checks.Range("scheduler.crashes_max", scheduler.crashes_max(), 1, 1000);
  CheckPlan(scheduler.plan(), checks);
}

void CheckWorker(const v1::WorkerConfig& worker, Checks& checks) {
  checks.Listen("worker.metrics_listen", worker.metrics_listen());
  checks.Range("worker.rows_max", worker.rows_max(), 1, 4096);
  checks.Range("worker.tokens_max", worker.tokens_max(), int64_t{0}, int64_t{1} << 30);
  checks.Range("worker.kv_bytes_max", worker.kv_bytes_max(), int64_t{0}, int64_t{1} << 50);
  checks.Range("worker.snapshot_every_steps", worker.snapshot_every_steps(), 1, 1 << 16);
  checks.Range("worker.lease_seconds", worker.lease_seconds(), 1.0, 3600.0);
  checks.Range("worker.drain_seconds", worker.drain_seconds(), 0.0, 3600.0);
  checks.Range("worker.device_dollars_per_hour", worker.device_dollars_per_hour(), 0.0, 1e6);
  checks.Range("worker.dollars_per_kilowatt_hour", worker.dollars_per_kilowatt_hour(), 0.0, 1e3);
  checks.Range("worker.power_usage_effectiveness", worker.power_usage_effectiveness(), 1.0, 10.0);
}

}  // namespace

absl::StatusOr<v1::ClusterConfig> ParseConfig(absl::string_view text, absl::string_view where) {
  if (text.size() > kConfigBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": longer than ", kConfigBytesMax, " bytes"));
  }
  v1::ClusterConfig config;
  ErrorLines errors(text, where);
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  google::protobuf::io::ArrayInputStream stream(text.data(), static_cast<int>(text.size()));
  if (!parser.Parse(&stream, &config)) return errors.status();
  return config;
}

absl::StatusOr<v1::ClusterConfig> LoadConfig(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kConfigBytesMax));
  CINNABAR_ASSIGN_OR_RETURN(v1::ClusterConfig config, ParseConfig(text, path));
  ResolvePaths(std::filesystem::path(path).parent_path(), &config);
  FillDefaults(&config);
  CINNABAR_RETURN_IF_ERROR(ValidateConfig(config), path);
  return config;
}

void FillDefaults(v1::ClusterConfig* config) {
  FillRedis(config->mutable_redis());
  if (!config->has_partition()) config->set_partition("default");
  if (!config->has_site()) config->set_site("");
  for (v1::ModelConfig& model : *config->mutable_models()) FillModel(&model);
  FillGateway(config->mutable_gateway());
  FillScheduler(config->mutable_scheduler());
  FillWorker(config->mutable_worker());
}

v1::ClusterConfig DefaultConfig() {
  v1::ClusterConfig config;
  FillDefaults(&config);
  return config;
}

absl::Status ValidateConfig(const v1::ClusterConfig& config) {
  Checks checks;
  CheckRedis(config.redis(), checks);
  checks.Identifier("partition", config.partition());
  if (!config.site().empty()) checks.Identifier("site", config.site());
  CheckModels(config, checks);
  CheckGateway(config.gateway(), checks);
  CheckScheduler(config.scheduler(), checks);
  CheckWorker(config.worker(), checks);
  // A lease that ends within a call to Redis would be lost while it is being renewed.
  if (config.worker().lease_seconds() <= 2 * config.redis().command_timeout_seconds()) {
    checks.Fail("worker.lease_seconds",
                absl::StrCat(config.worker().lease_seconds(),
                             " is not above twice redis.command_timeout_seconds = ",
                             config.redis().command_timeout_seconds(),
                             "; raise it or lower the other"));
  }
  return checks.status();
}

std::string DescribeConfig(const v1::ClusterConfig& config) {
  std::string text;
  google::protobuf::TextFormat::Printer printer;
  printer.SetUseUtf8StringEscaping(false);
  printer.SetUseShortRepeatedPrimitives(true);
  printer.PrintToString(config, &text);
  return text;
}

absl::StatusOr<RedisOptions> MakeRedisOptions(const v1::RedisConfig& config,
                                              std::string client_name) {
  RedisOptions options;
  if (config.sentinels().empty()) {
    CINNABAR_ASSIGN_OR_RETURN(options.address, ParseRedisAddress(config.address()),
                              "redis.address");
  }
  for (const std::string& sentinel : config.sentinels()) {
    CINNABAR_ASSIGN_OR_RETURN(RedisAddress address, ParseRedisAddress(sentinel),
                              "redis.sentinels");
    options.sentinels.push_back(std::move(address));
  }
  options.master_name = config.sentinel_master();
  options.username = config.username();
  if (!config.password_file().empty()) {
    CINNABAR_ASSIGN_OR_RETURN(options.password, ReadSecretFile(config.password_file()),
                              "redis.password_file");
  }
  if (!config.sentinel_password_file().empty()) {
    CINNABAR_ASSIGN_OR_RETURN(options.sentinel_password,
                              ReadSecretFile(config.sentinel_password_file()),
                              "redis.sentinel_password_file");
  }
  options.client_name = std::move(client_name);
  options.connect_timeout = absl::Seconds(config.connect_timeout_seconds());
  options.command_timeout = absl::Seconds(config.command_timeout_seconds());
  CINNABAR_RETURN_IF_ERROR(ValidateRedisOptions(options), "redis");
  return options;
}

absl::StatusOr<HostPort> ParseHostPort(absl::string_view text) {
  const auto wrong = [&] {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", text, "\" is no address; write host:port, such as 127.0.0.1:8080 or [::1]:8080"));
  };
  HostPort address;
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return wrong();
  absl::string_view host = text.substr(0, colon);
  const absl::string_view port = text.substr(colon + 1);
  const bool bracketed = absl::ConsumePrefix(&host, "[") && absl::ConsumeSuffix(&host, "]");
  if (host.empty() || (absl::StrContains(host, ':') && !bracketed)) return wrong();
  const bool plain = std::all_of(host.begin(), host.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
           absl::StrContains("_.-:%", absl::string_view(&c, 1));
  });
  // SimpleAtoi takes signs and blanks.
  if (!plain || port.empty() || port.size() > 5 ||
      !std::all_of(port.begin(), port.end(), absl::ascii_isdigit) ||
      !absl::SimpleAtoi(port, &address.port) || address.port > 65535) {
    return wrong();
  }
  address.host = std::string(host);
  return address;
}

absl::StatusOr<RedisAddress> ParseRedisAddress(absl::string_view text) {
  if (absl::StartsWith(text, "/")) return RedisAddress{.host = std::string(text), .port = 0};
  const absl::StatusOr<HostPort> address = ParseHostPort(text);
  if (!address.ok() || address->port == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", text,
                     "\" is no address of a Redis; write host:port, such as 127.0.0.1:6379, or the "
                     "path of a Unix socket"));
  }
  return RedisAddress{.host = address->host, .port = address->port};
}

bool IsLoopback(absl::string_view host) {
  if (host == "localhost" || host == "::1") return true;
  // A name such as 127.evil.example is not an address.
  const std::vector<absl::string_view> parts = absl::StrSplit(host, '.');
  return parts.size() == 4 && parts[0] == "127" &&
         std::all_of(parts.begin(), parts.end(), [](absl::string_view part) {
           int value = 0;
           return !part.empty() && part.size() <= 3 &&
                  std::all_of(part.begin(), part.end(), absl::ascii_isdigit) &&
                  absl::SimpleAtoi(part, &value) && value <= 255;
         });
}

absl::StatusOr<std::string> ReadSecretFile(const std::string& path) {
  return cinnabar::ReadSecret(path, kSecretBytesMax);
}

}  // namespace cinnabar
