// The API keys of a partition in Redis: one hash, `cb:{partition}:keys`, of records by id, and a
// token, `cb:{partition}:keys_version`, that changes with every change. Ids and digests only; the
// secret is never sent.
#ifndef CINNABAR_COMMON_KEYS_KEY_STORE_H_
#define CINNABAR_COMMON_KEYS_KEY_STORE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/keys/api_key.h"
#include "common/keys/pepper.h"
#include "common/redis/client.h"

namespace cinnabar {

inline constexpr int64_t kKeysMax = 10'000;  // of a partition, revoked ones counted

struct CreatedKey {
  ApiKey key;
  std::string text;  // with the secret: show it once, keep it nowhere
};

struct KeyListing {
  std::string version;          // empty: there never was a change
  std::vector<StoredKey> keys;  // by creation, then id
  int64_t num_unreadable = 0;   // records that are none, or of a newer format
};

// One thread at a time. `redis` is borrowed and outlives this. Errors of Redis pass through;
// Unavailable leaves open whether a change happened, and all but Create may be repeated.
class KeyStore {
 public:
  // `partition` is an identifier: [A-Za-z0-9_.-], at most 64.
  KeyStore(RedisClient& redis, absl::string_view partition);

  // InvalidArgument: the spec. ResourceExhausted: kKeysMax.
  absl::StatusOr<CreatedKey> Create(const KeySpec& spec, const Pepper& pepper, absl::Time now);
  // By time of creation; ties by id.
  absl::StatusOr<KeyListing> List();
  // NotFound. DataLoss: the record does not parse.
  absl::StatusOr<StoredKey> Find(absl::string_view id);
  // From now on it is refused, by every gateway after its next refresh. Of a revoked key: when that
  // happened. NotFound.
  absl::StatusOr<ApiKey> Revoke(absl::string_view id, absl::Time now);
  // Removes the record of a revoked key. NotFound; FailedPrecondition while it is live.
  absl::Status Forget(absl::string_view id);

  // Changes with every change, and never comes back, whatever Redis forgets.
  absl::StatusOr<std::string> Version();

 private:
  absl::Status Write(absl::string_view command, absl::string_view id, absl::string_view record);

  RedisClient& redis_;
  const std::string keys_;     // name of the hash
  const std::string version_;  // name of the token
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_KEYS_KEY_STORE_H_
