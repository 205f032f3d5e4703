// The whole cluster in one thread under a virtual clock: real schedulers, workers with a real
// model, and the gateway's ordering of events, over the real queue functions in a real Redis. A
// seed decides who does what when, who is killed, frozen, cut off or rewound. Same seed, same run.
#ifndef CINNABAR_TESTS_SIM_CLUSTER_CLUSTER_SIM_H_
#define CINNABAR_TESTS_SIM_CLUSTER_CLUSTER_SIM_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/sim/cluster/virtual_redis.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

inline constexpr ForwardLimits kSimLimits{.rows_max = 160, .sequences_max = 4, .positions_max = 64};
inline constexpr int32_t kSimWorkers = 3;
inline constexpr int32_t kSimGateways = 2;
inline constexpr int32_t kSimSchedulers = 2;

// A model for each worker, and one to know the answers by.
struct SimModels {
  std::unique_ptr<Backend> backend;
  std::vector<std::unique_ptr<Denoiser>> workers;
  std::unique_ptr<Denoiser> reference;
};

struct SimFaults {
  bool processes = false;  // workers, schedulers and gateways are killed, frozen, drained, cut off
  bool outages = false;    // Redis is away for a while, and loses nothing
  bool rewinds = false;    // Redis loses its last seconds
};
SimFaults FaultsOf(uint64_t seed);  // every fourth seed each: none, processes, outages, rewinds

struct SimReport {
  std::vector<std::string> violations;
  std::string trace;  // what happened, a line each
  int32_t done = 0, cancelled = 0, expired = 0;
  int32_t kills = 0, freezes = 0, drains = 0, outages = 0, rewinds = 0;
  int32_t replays = 0;  // enqueued again by a gateway
};

// `redis` is reset. `edit`: a broken queue.
SimReport SimulateCluster(VirtualRedis& redis, SimModels& models, uint64_t seed,
                          const LibraryEdit* edit = nullptr);

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_SIM_CLUSTER_CLUSTER_SIM_H_
