#include "common/keys/key_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace cinnabar {

KeyStore::KeyStore(RedisClient& redis, absl::string_view partition)
    : redis_(redis),
      keys_(absl::StrCat("cb:{", partition, "}:keys")),
      version_(absl::StrCat("cb:{", partition, "}:keys_version")) {}

// The record and a fresh token in one transaction. HSETNX and HDEL may fail to change anything,
// which the caller has ruled out or does not mind.
absl::Status KeyStore::Write(absl::string_view command, absl::string_view id,
                             absl::string_view record) {
  CINNABAR_ASSIGN_OR_RETURN(KeyText random, GenerateKeyText("version"));
  std::vector<absl::string_view> change = {command, keys_, id};
  if (!record.empty()) change.push_back(record);
  const std::vector<std::vector<absl::string_view>> commands = {
      {"MULTI"}, change, {"SET", version_, random.id}, {"EXEC"}};
  for (const std::vector<absl::string_view>& each : commands) {
    CINNABAR_RETURN_IF_ERROR(redis_.Append(each));
  }
  absl::Status status;
  for (const absl::StatusOr<RedisReply>& reply : redis_.Flush()) status.Update(reply.status());
  return status;
}

absl::StatusOr<CreatedKey> KeyStore::Create(const KeySpec& spec, const Pepper& pepper,
                                            absl::Time now) {
  CINNABAR_RETURN_IF_ERROR(ValidateKeySpec(spec));
  CINNABAR_ASSIGN_OR_RETURN(const RedisReply count, redis_.Retry({"HLEN", keys_}));
  if (count.integer >= kKeysMax) {
    return absl::ResourceExhaustedError(
        absl::StrCat("there are ", count.integer, " keys already; forget revoked ones first"));
  }
  CINNABAR_ASSIGN_OR_RETURN(KeyText text, GenerateKeyText(spec.environment));
  StoredKey stored = {.key = {.id = text.id, .spec = spec, .created = now},
                      .digest = DigestOf(pepper, text.text),
                      .pepper_id = pepper.id()};
  CINNABAR_RETURN_IF_ERROR(Write("HSETNX", text.id, SerializeKeyRecord(stored)));
  return CreatedKey{.key = std::move(stored.key), .text = std::move(text.text)};
}

absl::StatusOr<KeyListing> KeyStore::List() {
  KeyListing listing;
  // Before the records: a change in between makes the next look read them again.
  CINNABAR_ASSIGN_OR_RETURN(listing.version, Version());
  CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Retry({"HVALS", keys_}));
  for (const RedisReply& record : reply.elements) {
    absl::StatusOr<StoredKey> stored = ParseKeyRecord(record.text);
    if (!stored.ok()) {
      ++listing.num_unreadable;
      continue;
    }
    listing.keys.push_back(*std::move(stored));
  }
  std::sort(listing.keys.begin(), listing.keys.end(), [](const StoredKey& a, const StoredKey& b) {
    return std::tie(a.key.created, a.key.id) < std::tie(b.key.created, b.key.id);
  });
  return listing;
}

absl::StatusOr<StoredKey> KeyStore::Find(absl::string_view id) {
  CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Retry({"HGET", keys_, id}));
  if (!reply.is_text()) {
    return absl::NotFoundError(absl::StrCat("there is no key ", absl::CHexEscape(id),
                                            "; `cinnabar keys list` shows them"));
  }
  return ParseKeyRecord(reply.text);
}

absl::StatusOr<ApiKey> KeyStore::Revoke(absl::string_view id, absl::Time now) {
  CINNABAR_ASSIGN_OR_RETURN(StoredKey stored, Find(id));
  if (!stored.key.live()) return stored.key;
  stored.key.revoked = now;
  CINNABAR_RETURN_IF_ERROR(Write("HSET", id, SerializeKeyRecord(stored)));
  return stored.key;
}

absl::Status KeyStore::Forget(absl::string_view id) {
  CINNABAR_ASSIGN_OR_RETURN(const StoredKey stored, Find(id));
  if (stored.key.live()) {
    return absl::FailedPreconditionError(absl::StrCat("key ", id, " is live; revoke it first"));
  }
  return Write("HDEL", id, "");
}

absl::StatusOr<std::string> KeyStore::Version() {
  CINNABAR_ASSIGN_OR_RETURN(const RedisReply reply, redis_.Retry({"GET", version_}));
  return reply.text;
}

}  // namespace cinnabar
