// A Redis reply as a value, the decoder that makes it from bytes, and what a server's error means.
#ifndef CINNABAR_COMMON_REDIS_REPLY_H_
#define CINNABAR_COMMON_REDIS_REPLY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

struct redisReader;

namespace cinnabar {

// One RESP2 value; it owns everything below it.
struct RedisReply {
  enum class Kind { kNil, kString, kStatus, kError, kInteger, kArray };
  Kind kind = Kind::kNil;
  int64_t integer = 0;               // kInteger
  std::string text;                  // kString (any bytes), kStatus, kError
  std::vector<RedisReply> elements;  // kArray

  bool is_nil() const { return kind == Kind::kNil; }
  bool is_text() const { return kind == Kind::kString || kind == Kind::kStatus; }
  bool is_integer() const { return kind == Kind::kInteger; }
  bool is_array() const { return kind == Kind::kArray; }
  bool is_error() const { return kind == Kind::kError; }
};

// What the caller should do about an error reply, as a code:
//   Unavailable         LOADING READONLY MASTERDOWN UNBLOCKED MISCONF NOREPLICAS BUSY TRYAGAIN:
//   again, later ResourceExhausted   OOM: refuse new work Unauthenticated     NOAUTH WRONGPASS;
//   PermissionDenied  NOPERM: fix the user's ACL Unimplemented       a function or a command that
//   this server lacks: load the library FailedPrecondition  MOVED ASK CROSSSLOT CLUSTERDOWN: Redis
//   Cluster, which is not supported NotFound NOGROUP, AlreadyExists BUSYGROUP, DataLoss WRONGTYPE,
//   InvalidArgument everything else
absl::Status StatusFromRedisError(absl::string_view error);

// True for the errors after which the connection points at the wrong server: look for the primary
// anew.
bool RedisErrorMovesPrimary(absl::string_view error);

struct ReplyLimits {
  int64_t reply_bytes_max = 64 << 20;  // of one reply on the wire
  int32_t elements_max = 1 << 20;      // of one reply, nested ones counted
};

// Bytes in, replies out. After an error it is of no more use, and neither is its connection.
// Not thread-safe. RESP3 types, depth over 7 and sizes over the limits are errors (DataLoss).
class ReplyDecoder {
 public:
  explicit ReplyDecoder(ReplyLimits limits);
  ~ReplyDecoder();
  ReplyDecoder(const ReplyDecoder&) = delete;
  ReplyDecoder& operator=(const ReplyDecoder&) = delete;

  absl::Status Feed(absl::string_view bytes);
  // The next whole reply, or nullopt when more bytes are needed.
  absl::StatusOr<std::optional<RedisReply>> Next();

  struct Budget {  // of the reply being built
    ReplyLimits limits;
    int64_t elements = 0;
  };

 private:
  Budget budget_;
  int64_t pending_bytes_ = 0;  // fed since the last whole reply
  redisReader* reader_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_REDIS_REPLY_H_
