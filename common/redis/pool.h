// A bounded set of clients lent to threads, one call or pipeline at a time.
#ifndef CINNABAR_COMMON_REDIS_POOL_H_
#define CINNABAR_COMMON_REDIS_POOL_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/mutex.h"
#include "common/redis/client.h"

namespace cinnabar {

// Thread-safe. Clients are made when first needed and keep their connection between loans.
class RedisPool {
 public:
  // Gives its client back when it goes. The pool outlives its loans.
  class Loan {
   public:
    Loan(Loan&& other) noexcept : pool_(other.pool_), client_(std::move(other.client_)) {}
    Loan& operator=(Loan&&) = delete;
    ~Loan();
    RedisClient& operator*() const { return *client_; }
    RedisClient* operator->() const { return client_.get(); }

   private:
    friend class RedisPool;
    Loan(RedisPool& pool, std::unique_ptr<RedisClient> client)
        : pool_(&pool), client_(std::move(client)) {}
    RedisPool* pool_;
    std::unique_ptr<RedisClient> client_;
  };

  // `prepare`, when given, sees every new client once (to set its on_connect).
  RedisPool(RedisOptions options, int32_t clients_max,
            std::function<void(RedisClient&)> prepare = nullptr);

  // ResourceExhausted when all clients stay lent for `wait_max`.
  absl::StatusOr<Loan> Borrow(absl::Duration wait_max);

 private:
  void Return(std::unique_ptr<RedisClient> client);

  const RedisOptions options_;
  const int32_t clients_max_;
  const std::function<void(RedisClient&)> prepare_;
  Mutex mu_;  // leaf: held for list moves only, never across a Redis call
  ConditionVariable returned_;
  std::vector<std::unique_ptr<RedisClient>> idle_ ABSL_GUARDED_BY(mu_);
  int32_t num_clients_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_REDIS_POOL_H_
