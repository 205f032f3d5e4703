// The queue of a running cluster as an operator opens it: to look and to end requests, never to
// set it up.
#ifndef CINNABAR_CLI_OPERATOR_QUEUE_H_
#define CINNABAR_CLI_OPERATOR_QUEUE_H_

#include <memory>

#include "absl/status/statusor.h"
#include "common/program/program.h"
#include "common/queue/queue.h"
#include "common/redis/client.h"

namespace cinnabar {

class OperatorQueue {
 public:
  // Unavailable and FailedPrecondition say what to start or to name. Gives up after a few seconds.
  static absl::StatusOr<std::unique_ptr<OperatorQueue>> Open(const ProgramFlags& flags);

  Queue& queue() { return queue_; }

 private:
  OperatorQueue(const RedisOptions& redis, const QueueOptions& options)
      : redis_(redis), queue_(redis_, options) {}

  RedisClient redis_;
  Queue queue_;
};

}  // namespace cinnabar

#endif  // CINNABAR_CLI_OPERATOR_QUEUE_H_
