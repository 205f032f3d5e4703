// API keys: their text, their digest, and what a key stands for.
//   cinnabar_<environment>_<id, 22>_<secret, 43><checksum, 6>
//   cinnabar_live_3fPq0Zr1xYw8KdNb5TsLmA_...
// Id and secret are random base62 characters from the kernel (131 and 256 bits), the checksum is
// the CRC-32 of all before it in base62: a typo, or a scanner's find, is recognised without asking
// anybody. The secret exists in the text alone: we keep HMAC-SHA-256(pepper, text), and the pepper
// is kept outside of Redis.
#ifndef CINNABAR_COMMON_KEYS_API_KEY_H_
#define CINNABAR_COMMON_KEYS_API_KEY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "cinnabar/v1/keys.pb.h"
#include "common/keys/pepper.h"
#include "common/queue/types.h"

namespace cinnabar {

inline constexpr size_t kKeyIdLength = 22;
inline constexpr size_t kKeySecretLength = 43;
inline constexpr size_t kKeyChecksumLength = 6;
inline constexpr size_t kKeyEnvironmentLengthMax = 16;

// What a key may use; 0 is no limit, nullopt the cluster's default.
struct KeyLimits {
  std::optional<int64_t> requests_per_minute;
  std::optional<int64_t> tokens_per_minute;       // prompt + canvas
  std::optional<int64_t> token_steps_per_minute;  // predicted cost
  std::optional<int64_t> concurrency_max;         // live requests of the tenant
  std::optional<double> budget_dollars_per_month;

  bool operator==(const KeyLimits&) const = default;
};
KeyLimits FromWire(const v1::KeyLimits& wire);
v1::KeyLimits ToWire(const KeyLimits& limits);

// The key's own limits over the cluster's: the part of AdmissionLimits that belongs to a tenant.
// Rates may burst up to one minute's worth. `now` picks the budget's month (UTC). Pure.
AdmissionLimits AdmissionLimitsFor(const KeyLimits& key, const KeyLimits& cluster, absl::Time now);

// What an operator says of a key that is to be made.
struct KeySpec {
  std::string environment = "live";                     // 1 to 16 of [a-z0-9]
  std::string tenant;                                   // an identifier: 1 to 64 of [A-Za-z0-9_.-]
  std::string name;                                     // for people; printable, at most 128 bytes
  RequestClass class_max = RequestClass::kInteractive;  // it may ask for nothing more urgent
  double weight = 1.0;                                  // of the tenant's share, in (0, 1000]
  KeyLimits limits;
  std::vector<std::string> models;  // that it may use; empty: all; at most 64
};
absl::Status ValidateKeySpec(const KeySpec& spec);  // InvalidArgument naming the field

struct ApiKey {
  std::string id;
  KeySpec spec;
  absl::Time created;
  absl::Time revoked = absl::InfiniteFuture();

  bool live() const { return revoked == absl::InfiniteFuture(); }
};

using KeyDigest = std::array<uint8_t, 32>;

// A key as it is stored.
struct StoredKey {
  ApiKey key;
  KeyDigest digest = {};
  std::string pepper_id;
};
// DataLoss: it is no record, or of a newer format.
absl::StatusOr<StoredKey> ParseKeyRecord(absl::string_view bytes);
std::string SerializeKeyRecord(const StoredKey& stored);

// What the text of a key says without its secret.
struct ParsedKey {
  std::string environment;
  std::string id;
};
// InvalidArgument, with no word of the text: it is no key, or mistyped. Pure.
absl::StatusOr<ParsedKey> ParseKeyText(absl::string_view text);

struct KeyText {
  std::string text;  // with the secret: show it once, keep it nowhere
  std::string id;
};
// Random. Unavailable: the kernel gives no random bytes.
absl::StatusOr<KeyText> GenerateKeyText(absl::string_view environment);

KeyDigest DigestOf(const Pepper& pepper, absl::string_view text);
// Takes the same time wherever they differ.
bool EqualDigests(const KeyDigest& a, const KeyDigest& b);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_KEYS_API_KEY_H_
