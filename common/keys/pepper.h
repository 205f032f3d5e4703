// The pepper: a secret of the site that digests of API keys are made with. Without it, a copy of
// Redis cannot even be tried against guesses.
#ifndef CINNABAR_COMMON_KEYS_PEPPER_H_
#define CINNABAR_COMMON_KEYS_PEPPER_H_

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace cinnabar {

// 32 random bytes. Wiped when it goes.
class Pepper {
 public:
  explicit Pepper(const std::array<uint8_t, 32>& bytes);
  ~Pepper();
  Pepper(const Pepper&) = default;
  Pepper& operator=(const Pepper&) = default;

  absl::Span<const uint8_t> bytes() const { return bytes_; }
  // 16 hex digits that tell peppers apart and say nothing of them.
  const std::string& id() const { return id_; }

 private:
  std::array<uint8_t, 32> bytes_;
  std::string id_;
};

// Reads the file, 64 hex digits. NotFound: it is not there. FailedPrecondition: others than owner
// and group may read it, or any but the owner may write it. InvalidArgument: it holds something
// else.
absl::StatusOr<Pepper> LoadPepper(const std::string& path);

// The same, and makes the file with mode 0400 and random content when it is not there. Of several
// processes that do so at once, all get the same pepper.
absl::StatusOr<Pepper> LoadOrCreatePepper(const std::string& path);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_KEYS_PEPPER_H_
