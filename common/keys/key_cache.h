// All API keys in memory, followed from Redis by a thread of its own: a check asks nobody, a
// revocation takes effect within a refresh, and while Redis is away the last good copy serves.
#ifndef CINNABAR_COMMON_KEYS_KEY_CACHE_H_
#define CINNABAR_COMMON_KEYS_KEY_CACHE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/keys/api_key.h"
#include "common/keys/pepper.h"
#include "common/redis/client.h"

namespace cinnabar {

// Why a key is not taken. Clients hear the same words for all but kNotLoaded; metrics count each.
enum class KeyRefusal {
  kNone,
  kMalformed,    // no key, or mistyped
  kUnknown,      // no such id
  kWrongSecret,  // or made with another pepper
  kRevoked,
  kNotLoaded,  // no copy of the keys has been read yet: 503, not 401
};
absl::string_view KeyRefusalName(KeyRefusal refusal);  // "wrong_secret"; "none"

struct KeyCheck {
  KeyRefusal refusal = KeyRefusal::kNone;
  std::shared_ptr<const ApiKey> key;  // set when kNone, and only then
};

struct KeyCacheOptions {
  std::string partition = "default";
  absl::Duration refresh = absl::Seconds(2);  // asks whether anything changed
  absl::Duration reread = absl::Seconds(60);  // reads everything though nothing did
};

struct KeyCacheStats {
  bool loaded = false;
  absl::Time read_at = absl::InfinitePast();  // when Redis last confirmed the copy
  int64_t num_keys = 0;                       // revoked ones counted
  int64_t num_live = 0;
  int64_t num_other_pepper = 0;  // live, but made with another pepper: nobody can use them
  int64_t num_unreadable = 0;    // records that are none, or of a newer format
  int64_t refreshes = 0;
  int64_t failures = 0;
  absl::Status last;  // of the last refresh
};

// Thread-safe. Starts its thread at once; destruction waits for a refresh that is under way (at
// most the timeouts of `redis`).
class KeyCache {
 public:
  KeyCache(KeyCacheOptions options, RedisOptions redis, Pepper pepper);
  ~KeyCache();
  KeyCache(const KeyCache&) = delete;
  KeyCache& operator=(const KeyCache&) = delete;

  // `text` as the client sent it. Does the same work for an id that exists and one that does not.
  KeyCheck Check(absl::string_view text) const;

  // Null when there is no such key. By id, without any secret: for operators' views.
  std::shared_ptr<const ApiKey> Find(absl::string_view id) const;

  KeyCacheStats stats() const;

  // Refreshes now and waits for it. For start-up and tests; not for what a client can trigger.
  // DeadlineExceeded after `timeout`; else the refresh's own error.
  absl::Status Refresh(absl::Duration timeout);

 private:
  struct Entry {
    std::shared_ptr<const ApiKey> key;
    KeyDigest digest = {};
  };
  using Copy = absl::flat_hash_map<std::string, Entry>;

  void Run();
  absl::Status RefreshOnce(class KeyStore& store, absl::Time now);
  std::shared_ptr<const Copy> copy() const;

  const KeyCacheOptions options_;
  const Pepper pepper_;
  RedisClient redis_;                            // the thread's
  std::string version_;                          // the thread's: of the copy
  absl::Time reread_at_ = absl::InfinitePast();  // the thread's
  int64_t num_other_pepper_logged_ = 0;          // the thread's

  mutable Mutex mu_;  // leaf
  ConditionVariable changed_;
  std::shared_ptr<const Copy> copy_ ABSL_GUARDED_BY(mu_);
  KeyCacheStats stats_ ABSL_GUARDED_BY(mu_);
  int64_t refreshes_asked_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t refreshes_done_ ABSL_GUARDED_BY(mu_) = 0;  // of those asked for
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_KEYS_KEY_CACHE_H_
