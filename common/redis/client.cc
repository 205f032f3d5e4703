#include "common/redis/client.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr absl::Duration kBlockMargin = absl::Seconds(1);

// The value of `field:` in the text of INFO.
std::string InfoField(absl::string_view info, absl::string_view field) {
  for (absl::string_view line : absl::StrSplit(info, '\n')) {
    line = absl::StripSuffix(line, "\r");
    if (absl::ConsumePrefix(&line, field) && absl::ConsumePrefix(&line, ":"))
      return std::string(line);
  }
  return "";
}

}  // namespace

absl::Duration RedisBackoff(const RedisRetryPolicy& policy, int32_t attempt, double uniform) {
  const double doublings = std::clamp(attempt - 2, 0, 30);
  const absl::Duration wait =
      std::min(policy.backoff_min * std::exp2(doublings), policy.backoff_max);
  return wait * (1.0 - policy.jitter * uniform);
}

absl::Status ValidateRedisOptions(const RedisOptions& options) {
  if (options.sentinels.empty() && options.address.host.empty()) {
    return absl::InvalidArgumentError("redis: neither address nor sentinels");
  }
  if (!options.sentinels.empty() && options.master_name.empty()) {
    return absl::InvalidArgumentError("redis: sentinels without master_name");
  }
  if (!options.username.empty() && options.password.empty()) {
    return absl::InvalidArgumentError("redis: username without password");
  }
  if (options.connect_timeout <= absl::ZeroDuration() ||
      options.command_timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        "redis: connect_timeout and command_timeout must be positive");
  }
  if (options.retry.attempts_max < 1 || options.retry.jitter < 0 || options.retry.jitter > 1 ||
      options.retry.backoff_min > options.retry.backoff_max) {
    return absl::InvalidArgumentError(
        "redis: retry needs attempts_max >= 1, jitter in [0, 1], backoff_min <= backoff_max");
  }
  return absl::OkStatus();
}

RedisClient::RedisClient(RedisOptions options, Environment& environment)
    : options_(std::move(options)), environment_(environment) {
  const absl::Status valid = ValidateRedisOptions(options_);
  CINNABAR_CHECK(valid.ok()) << valid.message();
}

RedisClient::~RedisClient() = default;

void RedisClient::Close() {
  connection_.reset();
  subscribed_ = false;
}

absl::StatusOr<RedisAddress> RedisClient::FindPrimary() {
  if (options_.sentinels.empty()) return options_.address;
  std::string failures;
  for (const RedisAddress& sentinel : options_.sentinels) {
    auto connection =
        RedisConnection::Open(sentinel, options_.connect_timeout, options_.reply_limits);
    if (!connection.ok()) {
      absl::StrAppend(&failures, "; ", connection.status().message());
      continue;
    }
    std::string out;
    size_t num_replies = 1;
    if (!options_.sentinel_password.empty()) {
      AppendRedisCommand({"AUTH", options_.sentinel_password}, out);
      ++num_replies;
    }
    AppendRedisCommand({"SENTINEL", "get-master-addr-by-name", options_.master_name}, out);
    std::vector<RedisReply> replies;
    const absl::Status status = (*connection)
                                    ->Exchange(out, num_replies, options_.command_timeout,
                                               options_.pipeline_bytes_max, replies);
    if (!status.ok()) {
      absl::StrAppend(&failures, "; ", status.message());
      continue;
    }
    const RedisReply& reply = replies.back();
    RedisAddress primary;
    if (reply.is_array() && reply.elements.size() == 2 &&
        absl::SimpleAtoi(reply.elements[1].text, &primary.port)) {
      primary.host = reply.elements[0].text;
      return primary;
    }
    absl::StrAppend(&failures, "; ", sentinel.ToString(), " knows no primary '",
                    options_.master_name, "' ", reply.text);
  }
  return absl::UnavailableError(absl::StrCat("no Sentinel named the primary", failures));
}

absl::Status RedisClient::Handshake(const RedisAddress& address) {
  CINNABAR_ASSIGN_OR_RETURN(
      connection_, RedisConnection::Open(address, options_.connect_timeout, options_.reply_limits));
  std::string out;
  std::vector<absl::string_view> steps;
  if (!options_.password.empty()) {
    if (options_.username.empty()) {
      AppendRedisCommand({"AUTH", options_.password}, out);
    } else {
      AppendRedisCommand({"AUTH", options_.username, options_.password}, out);
    }
    steps.push_back("AUTH");
  }
  AppendRedisCommand({"CLIENT", "SETNAME", options_.client_name}, out);
  AppendRedisCommand({"ROLE"}, out);
  AppendRedisCommand({"INFO", "server"}, out);
  steps.insert(steps.end(), {"CLIENT SETNAME", "ROLE", "INFO"});
  std::vector<RedisReply> replies;
  CINNABAR_RETURN_IF_ERROR(connection_->Exchange(out, steps.size(), options_.command_timeout,
                                                 options_.pipeline_bytes_max, replies));
  for (size_t i = 0; i < replies.size(); ++i) {
    if (replies[i].is_error()) {
      return internal::WithContext(StatusFromRedisError(replies[i].text),
                                   absl::StrCat(address.ToString(), " refused ", steps[i]));
    }
  }
  const RedisReply& role = replies[replies.size() - 2];
  if (!role.is_array() || role.elements.empty() || role.elements[0].text != "master") {
    return absl::UnavailableError(absl::StrCat(address.ToString(), " is not a primary"));
  }
  server_ = {.version = InfoField(replies.back().text, "redis_version"),
             .run_id = InfoField(replies.back().text, "run_id"),
             .address = address};
  int32_t major = 0;
  if (!absl::SimpleAtoi(server_.version.substr(0, server_.version.find('.')), &major) ||
      major < 7) {
    return absl::FailedPreconditionError(absl::StrCat(address.ToString(), " is Redis ",
                                                      server_.version, "; Functions need Redis 7"));
  }
  return absl::OkStatus();
}

absl::Status RedisClient::Connect() {
  if (connecting_)
    return absl::OkStatus();  // on_connect_ issues its commands on the new connection
  if (connection_ != nullptr && connection_->alive()) {
    // Found before anything is written on it, a closed peer costs a reconnect and no doubt.
    if (subscribed_ || !connection_->Stale()) return absl::OkStatus();
    ++counters_.connections_lost;
  }
  Close();
  ++counters_.connects;
  absl::Status status = [&]() -> absl::Status {
    CINNABAR_ASSIGN_OR_RETURN(const RedisAddress primary, FindPrimary());
    CINNABAR_RETURN_IF_ERROR(Handshake(primary));
    if (on_connect_) {
      connecting_ = true;
      const absl::Status greeted = on_connect_(*this);
      connecting_ = false;
      return greeted;
    }
    return absl::OkStatus();
  }();
  if (!status.ok()) {
    ++counters_.connect_failures;
    Close();
  }
  return status;
}

absl::StatusOr<RedisReply> RedisClient::Check(RedisReply reply) {
  if (!reply.is_error()) return reply;
  ++counters_.error_replies;
  if (RedisErrorMovesPrimary(reply.text)) Close();
  return StatusFromRedisError(reply.text);
}

absl::StatusOr<RedisReply> RedisClient::Command(RedisArgs args, absl::Duration timeout) {
  CINNABAR_CHECK(num_appended_ == 0) << "Flush the pipeline first";
  CINNABAR_CHECK(!subscribed_) << "a subscribed connection takes no commands";
  CINNABAR_RETURN_IF_ERROR(Connect());
  if (connection_ == nullptr || !connection_->alive())
    return absl::UnavailableError("connection lost");
  std::string out;
  AppendRedisCommand(args, out);
  if (static_cast<int64_t>(out.size()) > options_.pipeline_bytes_max) {
    return absl::ResourceExhaustedError(absl::StrCat("a command of ", out.size(), " bytes"));
  }
  std::vector<RedisReply> replies;
  const absl::Status status = connection_->Exchange(
      out, 1, timeout > absl::ZeroDuration() ? timeout : options_.command_timeout,
      options_.pipeline_bytes_max, replies);
  if (!status.ok()) {
    ++counters_.connections_lost;
    Close();
    return status;
  }
  return Check(std::move(replies[0]));
}

absl::StatusOr<RedisReply> RedisClient::Retry(RedisArgs args, absl::Duration timeout) {
  for (int32_t attempt = 1;; ++attempt) {
    absl::StatusOr<RedisReply> reply = Command(args, timeout);
    if (!absl::IsUnavailable(reply.status()) || attempt >= options_.retry.attempts_max)
      return reply;
    ++counters_.retries;
    environment_.Sleep(RedisBackoff(options_.retry, attempt + 1, environment_.Uniform()));
  }
}

absl::StatusOr<RedisReply> RedisClient::Block(RedisArgs args, absl::Duration block) {
  CINNABAR_CHECK(block > absl::ZeroDuration())
      << "blocking for ever cannot be told from a dead server";
  return Command(args, block + std::max(kBlockMargin, options_.command_timeout));
}

absl::Status RedisClient::Append(RedisArgs args) {
  const size_t before = pipeline_.size();
  AppendRedisCommand(args, pipeline_);
  if (static_cast<int64_t>(pipeline_.size()) > options_.pipeline_bytes_max) {
    pipeline_.resize(before);
    return absl::ResourceExhaustedError(absl::StrCat("the pipeline holds ", before, " bytes"));
  }
  ++num_appended_;
  return absl::OkStatus();
}

std::vector<absl::StatusOr<RedisReply>> RedisClient::Flush() {
  const std::string out = std::exchange(pipeline_, "");
  const size_t num_commands = std::exchange(num_appended_, 0);
  std::vector<absl::StatusOr<RedisReply>> results;
  if (num_commands == 0) return results;
  results.reserve(num_commands);
  std::vector<RedisReply> replies;
  absl::Status status = Connect();
  if (status.ok() && connection_ == nullptr) status = absl::UnavailableError("connection lost");
  if (status.ok()) {
    status = connection_->Exchange(out, num_commands, options_.command_timeout,
                                   options_.pipeline_bytes_max, replies);
    if (!status.ok()) {
      ++counters_.connections_lost;
      Close();
    }
  }
  for (RedisReply& reply : replies) results.push_back(Check(std::move(reply)));
  while (results.size() < num_commands) results.push_back(status);
  return results;
}

absl::Status RedisClient::Subscribe(absl::Span<const std::string> channels) {
  CINNABAR_CHECK(!channels.empty());
  CINNABAR_RETURN_IF_ERROR(Connect());
  std::vector<absl::string_view> args = {"SUBSCRIBE"};
  args.insert(args.end(), channels.begin(), channels.end());
  std::string out;
  AppendRedisCommand(args, out);
  std::vector<RedisReply> replies;
  const absl::Status status = connection_->Exchange(out, channels.size(), options_.command_timeout,
                                                    options_.pipeline_bytes_max, replies);
  if (!status.ok()) {
    ++counters_.connections_lost;
    Close();
    return status;
  }
  for (RedisReply& reply : replies) {
    if (absl::StatusOr<RedisReply> checked = Check(std::move(reply)); !checked.ok()) {
      Close();
      return checked.status();
    }
  }
  subscribed_ = true;
  return absl::OkStatus();
}

absl::StatusOr<std::optional<RedisMessage>> RedisClient::ReadMessage(absl::Duration timeout) {
  if (!subscribed_ || connection_ == nullptr || !connection_->alive()) {
    Close();
    return absl::UnavailableError("not subscribed: the connection was lost");
  }
  std::vector<RedisReply> replies;
  CINNABAR_ASSIGN_OR_RETURN(const bool ready,
                            connection_->AwaitReply(timeout, options_.command_timeout,
                                                    options_.pipeline_bytes_max, replies));
  if (!ready) return std::optional<RedisMessage>();
  RedisReply& reply = replies[0];
  if (!reply.is_array() || reply.elements.size() != 3 || reply.elements[0].text != "message") {
    Close();
    return absl::DataLossError("not a message");
  }
  return std::optional<RedisMessage>(RedisMessage{.channel = std::move(reply.elements[1].text),
                                                  .payload = std::move(reply.elements[2].text)});
}

}  // namespace cinnabar
