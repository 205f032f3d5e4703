#include "common/redis/reply.h"

#include <hiredis/read.h>

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

// hiredis parses, we build: its own reply objects would be copied once more, and it allocates an
// array of whatever length the wire names. Returning null makes it report an error.
RedisReply* Place(const redisReadTask* task) {
  if (task->parent == nullptr) return new RedisReply;
  auto* parent = static_cast<RedisReply*>(task->parent->obj);
  return &parent->elements[static_cast<size_t>(task->idx)];
}

void* CreateString(const redisReadTask* task, char* text, size_t size) {
  RedisReply* reply = Place(task);
  reply->kind = task->type == REDIS_REPLY_ERROR    ? RedisReply::Kind::kError
                : task->type == REDIS_REPLY_STATUS ? RedisReply::Kind::kStatus
                                                   : RedisReply::Kind::kString;
  reply->text.assign(text, size);
  return reply;
}

void* CreateArray(const redisReadTask* task, int num_elements) {
  auto* budget = static_cast<ReplyDecoder::Budget*>(task->privdata);
  if (num_elements < 0) return nullptr;
  budget->elements += num_elements;
  if (budget->elements > budget->limits.elements_max) return nullptr;
  RedisReply* reply = Place(task);
  reply->kind = RedisReply::Kind::kArray;
  reply->elements.resize(static_cast<size_t>(num_elements));
  return reply;
}

void* CreateInteger(const redisReadTask* task, long long value) {  // NOLINT: the type of hiredis
  RedisReply* reply = Place(task);
  reply->kind = RedisReply::Kind::kInteger;
  reply->integer = value;
  return reply;
}

void* CreateNil(const redisReadTask* task) { return Place(task); }

void FreeObject(void* reply) { delete static_cast<RedisReply*>(reply); }

redisReplyObjectFunctions kFunctions = {CreateString, CreateArray, CreateInteger, CreateNil,
                                        FreeObject};

}  // namespace

absl::Status StatusFromRedisError(absl::string_view error) {
  const absl::string_view kind = error.substr(0, error.find(' '));
  for (const absl::string_view again :
       {"LOADING", "READONLY", "MASTERDOWN", "-UNBLOCKED", "UNBLOCKED", "MISCONF", "NOREPLICAS",
        "BUSY", "TRYAGAIN", "NOTREADY"}) {
    if (kind == again) return absl::UnavailableError(error);
  }
  if (kind == "OOM") return absl::ResourceExhaustedError(error);
  if (kind == "NOAUTH" || kind == "WRONGPASS") return absl::UnauthenticatedError(error);
  if (kind == "NOPERM") return absl::PermissionDeniedError(error);
  if (kind == "MOVED" || kind == "ASK" || kind == "CROSSSLOT" || kind == "CLUSTERDOWN") {
    return absl::FailedPreconditionError(absl::StrCat(
        "Redis Cluster is not supported; name one primary, or the Sentinels of one: ", error));
  }
  if (kind == "NOGROUP") return absl::NotFoundError(error);
  if (kind == "BUSYGROUP") return absl::AlreadyExistsError(error);
  if (kind == "WRONGTYPE") return absl::DataLossError(error);
  if (absl::StartsWith(error, "ERR Function not found") ||
      absl::StartsWith(error, "ERR unknown command")) {
    return absl::UnimplementedError(error);
  }
  // A script that ran into one of the above reports it with its own words around it.
  if (absl::StartsWith(error, "ERR") && absl::StrContains(error, "-READONLY"))
    return absl::UnavailableError(error);
  return absl::InvalidArgumentError(error);
}

bool RedisErrorMovesPrimary(absl::string_view error) {
  return absl::StartsWith(error, "READONLY") || absl::StartsWith(error, "UNBLOCKED") ||
         absl::StartsWith(error, "-UNBLOCKED") || absl::StartsWith(error, "MASTERDOWN") ||
         absl::StartsWith(error, "LOADING");
}

ReplyDecoder::ReplyDecoder(ReplyLimits limits)
    : budget_{.limits = limits}, reader_(redisReaderCreateWithFunctions(&kFunctions)) {
  CINNABAR_CHECK(reader_ != nullptr);
  reader_->privdata = &budget_;
}

ReplyDecoder::~ReplyDecoder() { redisReaderFree(reader_); }

absl::Status ReplyDecoder::Feed(absl::string_view bytes) {
  pending_bytes_ += static_cast<int64_t>(bytes.size());
  if (redisReaderFeed(reader_, bytes.data(), bytes.size()) != REDIS_OK) {
    return absl::DataLossError(absl::StrCat("reply does not parse: ", reader_->errstr));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<RedisReply>> ReplyDecoder::Next() {
  void* root = nullptr;
  if (redisReaderGetReply(reader_, &root) != REDIS_OK) {
    return absl::DataLossError(absl::StrCat("reply does not parse: ", reader_->errstr));
  }
  if (root == nullptr) {
    if (pending_bytes_ > budget_.limits.reply_bytes_max) {
      return absl::DataLossError(
          absl::StrCat("a reply is longer than ", budget_.limits.reply_bytes_max, " bytes"));
    }
    return std::optional<RedisReply>();
  }
  const std::unique_ptr<RedisReply> reply(static_cast<RedisReply*>(root));
  budget_.elements = 0;
  pending_bytes_ = static_cast<int64_t>(reader_->len - reader_->pos);
  return std::optional<RedisReply>(std::move(*reply));
}

}  // namespace cinnabar
