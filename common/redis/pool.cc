#include "common/redis/pool.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/check.h"

namespace cinnabar {

RedisPool::RedisPool(RedisOptions options, int32_t clients_max,
                     std::function<void(RedisClient&)> prepare)
    : options_(std::move(options)), clients_max_(clients_max), prepare_(std::move(prepare)) {
  CINNABAR_CHECK(clients_max_ > 0);
}

RedisPool::Loan::~Loan() {
  if (client_ != nullptr) pool_->Return(std::move(client_));
}

absl::StatusOr<RedisPool::Loan> RedisPool::Borrow(absl::Duration wait_max) {
  const absl::Time deadline = absl::Now() + wait_max;
  {
    MutexLock lock(mu_);
    while (idle_.empty() && num_clients_ == clients_max_) {
      const absl::Duration left = deadline - absl::Now();
      if (left <= absl::ZeroDuration()) {
        return absl::ResourceExhaustedError(
            absl::StrCat("all ", clients_max_, " Redis clients are busy"));
      }
      (void)returned_.WaitFor(mu_, left);
    }
    if (!idle_.empty()) {
      std::unique_ptr<RedisClient> client = std::move(idle_.back());
      idle_.pop_back();
      return Loan(*this, std::move(client));
    }
    ++num_clients_;
  }
  auto client = std::make_unique<RedisClient>(options_);
  if (prepare_) prepare_(*client);
  return Loan(*this, std::move(client));
}

void RedisPool::Return(std::unique_ptr<RedisClient> client) {
  MutexLock lock(mu_);
  idle_.push_back(std::move(client));
  returned_.NotifyOne();
}

}  // namespace cinnabar
