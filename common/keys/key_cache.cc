#include "common/keys/key_cache.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/keys/key_store.h"

namespace cinnabar {

absl::string_view KeyRefusalName(KeyRefusal refusal) {
  switch (refusal) {
    case KeyRefusal::kNone:
      return "none";
    case KeyRefusal::kMalformed:
      return "malformed";
    case KeyRefusal::kUnknown:
      return "unknown";
    case KeyRefusal::kWrongSecret:
      return "wrong_secret";
    case KeyRefusal::kRevoked:
      return "revoked";
    case KeyRefusal::kNotLoaded:
      return "not_loaded";
  }
  return "unknown";
}

KeyCache::KeyCache(KeyCacheOptions options, RedisOptions redis, Pepper pepper)
    : options_(std::move(options)), pepper_(std::move(pepper)), redis_(std::move(redis)) {
  thread_ = std::thread([this] { Run(); });
}

KeyCache::~KeyCache() {
  {
    MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

std::shared_ptr<const KeyCache::Copy> KeyCache::copy() const {
  MutexLock lock(mu_);
  return copy_;
}

KeyCheck KeyCache::Check(absl::string_view text) const {
  const std::shared_ptr<const Copy> keys = copy();
  if (keys == nullptr) return {.refusal = KeyRefusal::kNotLoaded};
  const absl::StatusOr<ParsedKey> parsed = ParseKeyText(text);
  if (!parsed.ok()) return {.refusal = KeyRefusal::kMalformed};
  // The digest is made and compared for ids that do not exist, too.
  const KeyDigest digest = DigestOf(pepper_, text);
  const auto found = keys->find(parsed->id);
  static const KeyDigest kNoDigest = {};
  const bool equal = EqualDigests(digest, found == keys->end() ? kNoDigest : found->second.digest);
  if (found == keys->end()) return {.refusal = KeyRefusal::kUnknown};
  if (!equal) return {.refusal = KeyRefusal::kWrongSecret};
  if (!found->second.key->live()) return {.refusal = KeyRefusal::kRevoked};
  return {.key = found->second.key};
}

std::shared_ptr<const ApiKey> KeyCache::Find(absl::string_view id) const {
  const std::shared_ptr<const Copy> keys = copy();
  if (keys == nullptr) return nullptr;
  const auto found = keys->find(id);
  return found == keys->end() ? nullptr : found->second.key;
}

KeyCacheStats KeyCache::stats() const {
  MutexLock lock(mu_);
  return stats_;
}

absl::Status KeyCache::RefreshOnce(KeyStore& store, absl::Time now) {
  if (now < reread_at_) {
    CINNABAR_ASSIGN_OR_RETURN(const std::string version, store.Version());
    if (version == version_) return absl::OkStatus();
  }
  CINNABAR_ASSIGN_OR_RETURN(KeyListing listing, store.List());
  auto fresh = std::make_shared<Copy>();
  int64_t num_live = 0;
  int64_t num_other_pepper = 0;
  for (StoredKey& stored : listing.keys) {
    if (stored.key.live()) ++(stored.pepper_id == pepper_.id() ? num_live : num_other_pepper);
    std::string id = stored.key.id;
    fresh->emplace(std::move(id),
                   Entry{.key = std::make_shared<const ApiKey>(std::move(stored.key)),
                         .digest = stored.digest});
  }
  if (num_other_pepper > 0 && num_other_pepper != num_other_pepper_logged_) {
    Log(LogLevel::kWarn, "keys_of_another_pepper",
        {{"keys", num_other_pepper},
         {"note", "made with another pepper file: nobody can use them"}});
  }
  num_other_pepper_logged_ = num_other_pepper;
  version_ = std::move(listing.version);
  reread_at_ = now + options_.reread;
  MutexLock lock(mu_);
  stats_.loaded = true;
  stats_.num_keys = static_cast<int64_t>(fresh->size());
  stats_.num_live = num_live;
  stats_.num_other_pepper = num_other_pepper;
  stats_.num_unreadable = listing.num_unreadable;
  copy_ = std::move(fresh);
  return absl::OkStatus();
}

void KeyCache::Run() {
  KeyStore store(redis_, options_.partition);
  bool failing = false;
  for (;;) {
    int64_t asked = 0;
    {
      MutexLock lock(mu_);
      if (stopping_) return;
      asked = refreshes_asked_;
    }
    const absl::Status status = RefreshOnce(store, absl::Now());
    if (status.ok() == failing) {
      failing = !status.ok();
      Log(failing ? LogLevel::kWarn : LogLevel::kInfo, failing ? "keys_stale" : "keys_fresh",
          {{"status", status.ToString()}});
    }
    MutexLock lock(mu_);
    ++stats_.refreshes;
    stats_.last = status;
    if (status.ok()) {
      stats_.read_at = absl::Now();
    } else {
      ++stats_.failures;
    }
    refreshes_done_ = asked;
    changed_.NotifyAll();
    const absl::Time next = absl::Now() + options_.refresh;
    while (!stopping_ && refreshes_asked_ == asked && absl::Now() < next) {
      changed_.WaitFor(mu_, next - absl::Now());
    }
  }
}

absl::Status KeyCache::Refresh(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  MutexLock lock(mu_);
  const int64_t mine = ++refreshes_asked_;
  changed_.NotifyAll();
  while (refreshes_done_ < mine) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError("the API keys were not read in time");
    }
    changed_.WaitFor(mu_, left);
  }
  return stats_.last;
}

}  // namespace cinnabar
