#include "common/keys/pepper.h"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr size_t kPepperBytes = 32;
constexpr size_t kFileBytesMax = 256;

absl::string_view AsText(absl::Span<const uint8_t> bytes) {
  return absl::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace

Pepper::Pepper(const std::array<uint8_t, 32>& bytes) : bytes_(bytes) {
  // Of a hash with a prefix of its own: no digest of a key can ever be the same.
  std::string text = absl::StrCat("cinnabar pepper id ", AsText(bytes_));
  std::array<uint8_t, SHA256_DIGEST_LENGTH> digest;
  SHA256(reinterpret_cast<const uint8_t*>(text.data()), text.size(), digest.data());
  id_ = absl::BytesToHexString(AsText(digest).substr(0, 8));
  OPENSSL_cleanse(text.data(), text.size());
}

Pepper::~Pepper() { OPENSSL_cleanse(bytes_.data(), bytes_.size()); }

absl::StatusOr<Pepper> LoadPepper(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) {
    const std::string why = absl::StrCat("pepper file ", path, ": ", std::strerror(errno));
    return errno == ENOENT ? absl::NotFoundError(why) : absl::FailedPreconditionError(why);
  }
  struct stat info = {};
  char text[kFileBytesMax + 1];
  const bool known = fstat(fd, &info) == 0;
  const ssize_t size = known ? read(fd, text, sizeof(text)) : -1;
  close(fd);
  if (size < 0)
    return absl::FailedPreconditionError(absl::StrCat("pepper file ", path, ": unreadable"));
  if ((info.st_mode & (S_IROTH | S_IWOTH | S_IWGRP)) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("pepper file ", path, ": others may read or write it; chmod 600 it"));
  }
  const absl::string_view digits =
      absl::StripAsciiWhitespace(absl::string_view(text, static_cast<size_t>(size)));
  const bool is_hex = std::all_of(digits.begin(), digits.end(),
                                  [](unsigned char c) { return std::isxdigit(c) != 0; });
  if (digits.size() != 2 * kPepperBytes || !is_hex) {
    OPENSSL_cleanse(text, sizeof(text));
    return absl::InvalidArgumentError(
        absl::StrCat("pepper file ", path, ": holds something else than 64 hex digits"));
  }
  std::string raw = absl::HexStringToBytes(digits);
  std::array<uint8_t, kPepperBytes> bytes;
  std::memcpy(bytes.data(), raw.data(), bytes.size());
  OPENSSL_cleanse(raw.data(), raw.size());
  OPENSSL_cleanse(text, sizeof(text));
  const Pepper pepper(bytes);
  OPENSSL_cleanse(bytes.data(), bytes.size());
  return pepper;
}

// Written under another name and linked to its own: whoever comes first wins, and nobody ever reads
// half a file.
absl::StatusOr<Pepper> LoadOrCreatePepper(const std::string& path) {
  absl::StatusOr<Pepper> there = LoadPepper(path);
  if (there.ok() || !absl::IsNotFound(there.status())) return there;
  std::array<uint8_t, kPepperBytes> bytes;
  if (RAND_bytes(bytes.data(), static_cast<int>(bytes.size())) != 1) {
    return absl::UnavailableError("the kernel gives no random bytes");
  }
  std::string text = absl::BytesToHexString(AsText(bytes)) + "\n";
  OPENSSL_cleanse(bytes.data(), bytes.size());
  std::string draft = path + ".XXXXXX";
  const int fd = mkstemp(draft.data());
  const auto failed = [&] {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot make the pepper file ", path, ": ", std::strerror(errno)));
  };
  if (fd < 0) return failed();
  const bool written = write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
                       fchmod(fd, S_IRUSR) == 0 && fsync(fd) == 0;
  OPENSSL_cleanse(text.data(), text.size());
  absl::Status status = absl::OkStatus();
  if (!written || (link(draft.c_str(), path.c_str()) != 0 && errno != EEXIST)) status = failed();
  close(fd);
  unlink(draft.c_str());
  CINNABAR_RETURN_IF_ERROR(status);
  return LoadPepper(path);
}

}  // namespace cinnabar
