// The whole state of one partition in Redis, as text, and whether it makes sense.
#ifndef CINNABAR_TESTS_SUPPORT_QUEUE_STATE_H_
#define CINNABAR_TESTS_SUPPORT_QUEUE_STATE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/redis/client.h"

namespace cinnabar {

// Every key and value with `prefix`, sorted; lease times left out, for a repeated call may renew
// one.
absl::StatusOr<std::string> DumpKeys(RedisClient& redis, const std::string& prefix);

// What must hold between any two calls; a line for each violation:
//   a queued request is in its queue and nowhere else; a leased or running one in its batch, which
//   has a lease; a live one has a deadline, a payload, and events 1 ... step; a terminal one has
//   one ledger entry, its final event last, and nothing else; counters add up to the live requests.
absl::StatusOr<std::vector<std::string>> CheckQueueState(RedisClient& redis,
                                                         const std::string& prefix);

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SUPPORT_QUEUE_STATE_H_
