#include "tests/sim/cluster/virtual_redis.h"

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/queue/library.h"

namespace cinnabar {
namespace {

// Stands for redis.call. Keys whose time would run by the server's clock are in sim:ttl instead.
constexpr char kClock[] = R"lua(
local function sim_now() return tonumber(redis.call('GET', 'sim:now') or '0') end
local function sim_call(name, ...)
  if name == 'TIME' then
    local us = sim_now()
    return {string.format('%.0f', math.floor(us / 1e6)), string.format('%.0f', us % 1e6)}
  elseif name == 'PEXPIRE' then
    local key, ms = ...
    redis.call('ZADD', 'sim:ttl', sim_now() + tonumber(ms) * 1000, key)
    return 1
  elseif name == 'SET' then
    local key, value, px, ms = ...
    redis.call('ZREM', 'sim:ttl', key)
    if px == 'PX' then redis.call('ZADD', 'sim:ttl', sim_now() + tonumber(ms) * 1000, key) end
    return redis.call('SET', key, value)
  elseif name == 'DEL' then
    redis.call('ZREM', 'sim:ttl', ...)
  end
  return redis.call(name, ...)
end
)lua";

constexpr char kAdvance[] = R"lua(
redis.register_function('cinnabar_sim_advance', function(keys, args)
  redis.call('SET', 'sim:now', args[1])
  for _, key in ipairs(redis.call('ZRANGEBYSCORE', 'sim:ttl', '-inf', args[1])) do
    redis.call('DEL', key)
    redis.call('ZREM', 'sim:ttl', key)
  end
  return 0
end)
)lua";

std::string VirtualLibrary(const LibraryEdit* edit) {
  std::string text = kQueueLibraryText;
  const auto replace = [&text](absl::string_view from, absl::string_view to) {
    CINNABAR_CHECK(absl::StrReplaceAll({{from, to}}, &text) == 1) << "not once there: " << from;
  };
  if (edit != nullptr) replace(edit->find, edit->replace);
  // A newer revision than the clients': they use it.
  replace(absl::StrCat("local REVISION = ", kQueueLibraryVersion.revision),
          "local REVISION = 1000000");
  replace("  call = redis.call\n", "  call = sim_call\n");
  const size_t line_end = text.find('\n');
  text.insert(line_end + 1, kClock);
  return absl::StrCat(text, kAdvance);
}

}  // namespace

absl::StatusOr<std::unique_ptr<VirtualRedis>> VirtualRedis::Start() {
  std::unique_ptr<VirtualRedis> redis(new VirtualRedis);
  CINNABAR_ASSIGN_OR_RETURN(redis->server_, RedisServer::Start({.config = {"appendonly no"}}));
  redis->control_ = std::make_unique<RedisClient>(redis->server_->client_options());
  return redis;
}

absl::Status VirtualRedis::Reset(const LibraryEdit* edit) {
  CINNABAR_RETURN_IF_ERROR(control_->Command({"FLUSHALL"}).status());
  CINNABAR_RETURN_IF_ERROR(
      control_->Command({"FUNCTION", "LOAD", "REPLACE", VirtualLibrary(edit)}).status());
  return Save();
}

absl::Status VirtualRedis::SetTime(absl::Time now) {
  if (!up_) return absl::OkStatus();
  const std::string us = absl::StrCat(absl::ToUnixMicros(now));
  return control_->Command({"FCALL", "cinnabar_sim_advance", "0", us}).status();
}

absl::Status VirtualRedis::Save() { return control_->Command({"SAVE"}).status(); }

absl::Status VirtualRedis::Rewind() {
  Kill();
  return Restart();
}

void VirtualRedis::Kill() {
  server_->Kill();
  up_ = false;
}

absl::Status VirtualRedis::Restart() {
  CINNABAR_RETURN_IF_ERROR(server_->Restart());
  up_ = true;
  return absl::OkStatus();
}

}  // namespace cinnabar
