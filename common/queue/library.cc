#include "common/queue/library.h"

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {

LibraryAction DecideLibrary(const std::optional<LibraryVersion>& server,
                            const LibraryVersion& ours) {
  if (!server.has_value() || server->revision < ours.revision) return LibraryAction::kLoad;
  if (server->revision == ours.revision && server->digest != ours.digest)
    return LibraryAction::kRefuse;
  return LibraryAction::kUse;
}

absl::Status EnsureQueueLibrary(RedisClient& redis, bool may_load) {
  std::optional<LibraryVersion> server;
  const absl::StatusOr<RedisReply> reply = redis.Command({"FCALL", "cinnabar_v1_version", "0"});
  if (reply.ok()) {
    if (!reply->is_array() || reply->elements.size() != 2 || !reply->elements[0].is_integer()) {
      return absl::DataLossError(
          "cinnabar_v1_version answers in a form of its own: not our library");
    }
    server =
        LibraryVersion{.revision = reply->elements[0].integer, .digest = reply->elements[1].text};
  } else if (!absl::IsUnimplemented(reply.status())) {
    return internal::WithContext(reply.status(), "ask for the queue library's version");
  }
  const std::string has = server.has_value() ? absl::StrCat("revision ", server->revision) : "none";
  switch (DecideLibrary(server, kQueueLibraryVersion)) {
    case LibraryAction::kUse:
      return absl::OkStatus();
    case LibraryAction::kRefuse:
      return absl::FailedPreconditionError(absl::StrCat(
          "Redis holds another text of the queue library with our revision ",
          kQueueLibraryVersion.revision,
          ": run one build everywhere, or raise REVISION in queue_functions.lua and load it"));
    case LibraryAction::kLoad: {
      if (!may_load) {
        return absl::FailedPreconditionError(absl::StrCat(
            "the queue library in Redis is ", has, ", we need revision ",
            kQueueLibraryVersion.revision, ": load it with an admin user (FUNCTION LOAD REPLACE)"));
      }
      const absl::StatusOr<RedisReply> loaded =
          redis.Command({"FUNCTION", "LOAD", "REPLACE", kQueueLibraryText});
      if (absl::IsPermissionDenied(loaded.status())) {
        return absl::FailedPreconditionError(absl::StrCat(
            "this Redis user may not load the queue library (has ", has, ", needs revision ",
            kQueueLibraryVersion.revision, "): load it with an admin user"));
      }
      return internal::Annotate(loaded.status(), "load the queue library");
    }
  }
  CINNABAR_CHECK(false) << "not an action";
  return absl::InternalError("unreachable");
}

}  // namespace cinnabar
