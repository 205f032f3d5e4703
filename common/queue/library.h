// The Functions library inside this binary, and which of two versions a server should hold.
#ifndef CINNABAR_COMMON_QUEUE_LIBRARY_H_
#define CINNABAR_COMMON_QUEUE_LIBRARY_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "common/redis/client.h"

namespace cinnabar {

// Texts of one layout (the v1 in their names) differ by revision and work with each other's
// callers.
struct LibraryVersion {
  int64_t revision = 0;
  std::string digest;  // SHA-256 of the text
};

extern const LibraryVersion kQueueLibraryVersion;
extern const char kQueueLibraryText[];

enum class LibraryAction {
  kUse,     // the server's is ours, or newer
  kLoad,    // it has none, or an older one
  kRefuse,  // two texts claim one revision
};

LibraryAction DecideLibrary(const std::optional<LibraryVersion>& server,
                            const LibraryVersion& ours);

// Asks the server and loads our text where DecideLibrary says so. With `may_load` false, or for a
// user without the right to load: FailedPrecondition that says what to run.
absl::Status EnsureQueueLibrary(RedisClient& redis, bool may_load);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_QUEUE_LIBRARY_H_
