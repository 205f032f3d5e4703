#include "common/keys/api_key.h"

#include <openssl/crypto.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include <algorithm>
#include <boost/crc.hpp>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr absl::string_view kPrefix = "cinnabar_";
constexpr absl::string_view kDigits =
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
constexpr uint32_t kRecordFormat = 1;
constexpr size_t kNameBytesMax = 128;
constexpr size_t kModelsMax = 64;
constexpr double kWeightMax = 1000;
constexpr double kMicrodollars = 1e6;

bool IsBase62(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return kDigits.find(c) != absl::string_view::npos; });
}

std::string Checksum(absl::string_view text) {
  boost::crc_32_type crc;
  crc.process_bytes(text.data(), text.size());
  uint32_t value = crc.checksum();
  std::string digits(kKeyChecksumLength, '0');
  for (auto digit = digits.rbegin(); digit != digits.rend(); ++digit) {
    *digit = kDigits[value % kDigits.size()];
    value /= kDigits.size();
  }
  return digits;
}

absl::StatusOr<std::string> RandomDigits(size_t count) {
  std::string digits;
  while (digits.size() < count) {
    unsigned char bytes[64];
    if (RAND_bytes(bytes, sizeof(bytes)) != 1) {
      return absl::UnavailableError("the kernel gives no random bytes");
    }
    constexpr size_t kEven = 256 / 62 * 62;  // above it a remainder would favour low digits
    for (const unsigned char byte : bytes) {
      if (byte < kEven && digits.size() < count) digits += kDigits[byte % kDigits.size()];
    }
    OPENSSL_cleanse(bytes, sizeof(bytes));
  }
  return digits;
}

bool IsEnvironment(absl::string_view text) {
  return !text.empty() && text.size() <= kKeyEnvironmentLengthMax &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); });
}

bool IsIdentifier(absl::string_view text) {
  return !text.empty() && text.size() <= 64 && std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '-';
  });
}

template <typename T>
absl::Status CheckLimit(const std::optional<T>& limit, absl::string_view field) {
  constexpr double kMax = 1e15;
  if (!limit.has_value()) return absl::OkStatus();
  const auto value = static_cast<double>(*limit);
  if (std::isfinite(value) && value >= 0 && value <= kMax) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, ": take 0 (no limit) or more"));
}

int64_t Milliseconds(absl::Time time) {
  return time == absl::InfiniteFuture() ? 0 : absl::ToUnixMillis(time);
}

}  // namespace

KeyLimits FromWire(const v1::KeyLimits& wire) {
  KeyLimits limits;
  if (wire.has_requests_per_minute()) limits.requests_per_minute = wire.requests_per_minute();
  if (wire.has_tokens_per_minute()) limits.tokens_per_minute = wire.tokens_per_minute();
  if (wire.has_token_steps_per_minute()) {
    limits.token_steps_per_minute = wire.token_steps_per_minute();
  }
  if (wire.has_concurrency_max()) limits.concurrency_max = wire.concurrency_max();
  if (wire.has_budget_dollars_per_month()) {
    limits.budget_dollars_per_month = wire.budget_dollars_per_month();
  }
  return limits;
}

v1::KeyLimits ToWire(const KeyLimits& limits) {
  v1::KeyLimits wire;
  if (limits.requests_per_minute) wire.set_requests_per_minute(*limits.requests_per_minute);
  if (limits.tokens_per_minute) wire.set_tokens_per_minute(*limits.tokens_per_minute);
  if (limits.token_steps_per_minute) {
    wire.set_token_steps_per_minute(*limits.token_steps_per_minute);
  }
  if (limits.concurrency_max) wire.set_concurrency_max(*limits.concurrency_max);
  if (limits.budget_dollars_per_month) {
    wire.set_budget_dollars_per_month(*limits.budget_dollars_per_month);
  }
  return wire;
}

AdmissionLimits AdmissionLimitsFor(const KeyLimits& key, const KeyLimits& cluster, absl::Time now) {
  const auto rate = [](const std::optional<int64_t>& own, const std::optional<int64_t>& shared) {
    const int64_t per_minute = own.value_or(shared.value_or(0));
    return RateLimit{.per_minute = per_minute, .burst = per_minute};
  };
  AdmissionLimits limits;
  limits.requests = rate(key.requests_per_minute, cluster.requests_per_minute);
  limits.tokens = rate(key.tokens_per_minute, cluster.tokens_per_minute);
  limits.cost = rate(key.token_steps_per_minute, cluster.token_steps_per_minute);
  limits.tenant_requests_max = key.concurrency_max.value_or(cluster.concurrency_max.value_or(0));
  const double budget =
      key.budget_dollars_per_month.value_or(cluster.budget_dollars_per_month.value_or(0));
  limits.budget_max_microdollars = static_cast<int64_t>(std::llround(budget * kMicrodollars));
  limits.budget_period = absl::FormatTime("%Y-%m", now, absl::UTCTimeZone());
  return limits;
}

absl::Status ValidateKeySpec(const KeySpec& spec) {
  if (!IsEnvironment(spec.environment)) {
    return absl::InvalidArgumentError("environment: take 1 to 16 of a-z and 0-9, as live or test");
  }
  if (!IsIdentifier(spec.tenant)) {
    return absl::InvalidArgumentError("tenant: take 1 to 64 of A-Z, a-z, 0-9, '_', '.' and '-'");
  }
  const bool printable = std::all_of(spec.name.begin(), spec.name.end(),
                                     [](unsigned char c) { return c >= 0x20 && c != 0x7f; });
  if (spec.name.size() > kNameBytesMax || !printable) {
    return absl::InvalidArgumentError("name: at most 128 bytes, without control characters");
  }
  if (!(spec.weight > 0) || spec.weight > kWeightMax) {
    return absl::InvalidArgumentError("weight: take more than 0, at most 1000");
  }
  if (spec.models.size() > kModelsMax) {
    return absl::InvalidArgumentError("model: at most 64; leave it out to allow every model");
  }
  for (const std::string& model : spec.models) {
    if (model.empty() || model.size() > kNameBytesMax) {
      return absl::InvalidArgumentError("model: a name has 1 to 128 bytes");
    }
  }
  const KeyLimits& limits = spec.limits;
  CINNABAR_RETURN_IF_ERROR(CheckLimit(limits.requests_per_minute, "requests-per-minute"));
  CINNABAR_RETURN_IF_ERROR(CheckLimit(limits.tokens_per_minute, "tokens-per-minute"));
  CINNABAR_RETURN_IF_ERROR(CheckLimit(limits.token_steps_per_minute, "token-steps-per-minute"));
  CINNABAR_RETURN_IF_ERROR(CheckLimit(limits.concurrency_max, "concurrency"));
  return CheckLimit(limits.budget_dollars_per_month, "budget-dollars-per-month");
}

absl::StatusOr<StoredKey> ParseKeyRecord(absl::string_view bytes) {
  v1::ApiKeyRecord record;
  if (!record.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::DataLossError("a key's record does not parse");
  }
  if (record.format() != kRecordFormat) {
    return absl::DataLossError(absl::StrCat("a key's record is of format ", record.format(),
                                            ", this program reads ", kRecordFormat));
  }
  StoredKey stored;
  ApiKey& key = stored.key;
  key.id = record.id();
  if (key.id.size() != kKeyIdLength || !IsBase62(key.id) ||
      record.digest().size() != stored.digest.size()) {
    return absl::DataLossError("a key's record has no id or no digest");
  }
  std::copy(record.digest().begin(), record.digest().end(), stored.digest.begin());
  stored.pepper_id = record.pepper_id();
  key.spec.environment = record.environment();
  key.spec.tenant = record.tenant();
  key.spec.name = record.name();
  key.spec.weight = record.weight();
  key.spec.limits = FromWire(record.limits());
  key.spec.models.assign(record.models().begin(), record.models().end());
  const absl::StatusOr<RequestClass> class_max = ParseRequestClass(record.class_max());
  if (!class_max.ok() || !ValidateKeySpec(key.spec).ok()) {
    return absl::DataLossError(absl::StrCat("the record of key ", key.id, " makes no sense"));
  }
  key.spec.class_max = *class_max;
  key.created = absl::FromUnixMillis(record.created_unix_ms());
  if (record.revoked_unix_ms() != 0) key.revoked = absl::FromUnixMillis(record.revoked_unix_ms());
  return stored;
}

std::string SerializeKeyRecord(const StoredKey& stored) {
  const ApiKey& key = stored.key;
  v1::ApiKeyRecord record;
  record.set_format(kRecordFormat);
  record.set_id(key.id);
  record.set_digest(stored.digest.data(), stored.digest.size());
  record.set_pepper_id(stored.pepper_id);
  record.set_environment(key.spec.environment);
  record.set_tenant(key.spec.tenant);
  record.set_name(key.spec.name);
  record.set_created_unix_ms(Milliseconds(key.created));
  record.set_revoked_unix_ms(Milliseconds(key.revoked));
  record.set_class_max(std::string(RequestClassName(key.spec.class_max)));
  record.set_weight(key.spec.weight);
  *record.mutable_limits() = ToWire(key.spec.limits);
  for (const std::string& model : key.spec.models) record.add_models(model);
  return record.SerializeAsString();
}

absl::StatusOr<ParsedKey> ParseKeyText(absl::string_view text) {
  const absl::Status wrong = absl::InvalidArgumentError("this is no API key, or mistyped");
  constexpr size_t kTail = kKeyIdLength + 1 + kKeySecretLength + kKeyChecksumLength;
  if (!absl::StartsWith(text, kPrefix) ||
      text.size() > kPrefix.size() + kKeyEnvironmentLengthMax + 1 + kTail ||
      text.size() < kPrefix.size() + 2 + kTail) {
    return wrong;
  }
  const absl::string_view tail = text.substr(text.size() - kTail);
  const absl::string_view environment =
      text.substr(kPrefix.size(), text.size() - kTail - kPrefix.size() - 1);
  const absl::string_view id = tail.substr(0, kKeyIdLength);
  if (text[text.size() - kTail - 1] != '_' || tail[kKeyIdLength] != '_' ||
      !IsEnvironment(environment) || !IsBase62(id) || !IsBase62(tail.substr(kKeyIdLength + 1))) {
    return wrong;
  }
  const size_t covered = text.size() - kKeyChecksumLength;
  if (Checksum(text.substr(0, covered)) != text.substr(covered)) return wrong;
  return ParsedKey{.environment = std::string(environment), .id = std::string(id)};
}

absl::StatusOr<KeyText> GenerateKeyText(absl::string_view environment) {
  CINNABAR_CHECK(IsEnvironment(environment));
  CINNABAR_ASSIGN_OR_RETURN(std::string id, RandomDigits(kKeyIdLength));
  CINNABAR_ASSIGN_OR_RETURN(std::string secret, RandomDigits(kKeySecretLength));
  KeyText key = {.text = absl::StrCat(kPrefix, environment, "_", id, "_", secret), .id = id};
  key.text += Checksum(key.text);
  OPENSSL_cleanse(secret.data(), secret.size());
  return key;
}

KeyDigest DigestOf(const Pepper& pepper, absl::string_view text) {
  KeyDigest digest;
  unsigned int size = 0;
  const unsigned char* const made =
      HMAC(EVP_sha256(), pepper.bytes().data(), static_cast<int>(pepper.bytes().size()),
           reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data(), &size);
  CINNABAR_CHECK(made != nullptr && size == digest.size());
  return digest;
}

bool EqualDigests(const KeyDigest& a, const KeyDigest& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace cinnabar
