#include "cli/operator_queue.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace cinnabar {

absl::StatusOr<std::unique_ptr<OperatorQueue>> OperatorQueue::Open(const ProgramFlags& flags) {
  CINNABAR_ASSIGN_OR_RETURN(RedisOptions redis, flags.Redis("cli"));
  redis.retry.attempts_max = 3;
  QueueOptions options = flags.Queue();
  // Looking at the wrong Redis must not turn it into a queue.
  options.may_create_site = false;
  options.may_load_library = false;
  std::unique_ptr<OperatorQueue> opened(new OperatorQueue(redis, options));
  const absl::Status status = opened->queue().Open();
  if (absl::IsUnavailable(status)) {
    return absl::UnavailableError(
        absl::StrCat(status.message(),
                     "; is the cluster running? `cinnabar up` starts one here, --redis names the "
                     "Redis of another"));
  }
  if (absl::IsFailedPrecondition(status) || absl::IsUnimplemented(status)) {
    return absl::FailedPreconditionError(absl::StrCat(
        status.message(), "; does a cluster run there? --redis and --partition choose which"));
  }
  CINNABAR_RETURN_IF_ERROR(status);
  return opened;
}

}  // namespace cinnabar
