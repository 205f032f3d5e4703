#include "worker/engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <memory>
#include <utility>
#include <vector>

namespace cinnabar {
namespace {

class FakeKv : public KvMemory {
 public:
  explicit FakeKv(int* num_alive) : num_alive_(num_alive) { ++*num_alive_; }
  ~FakeKv() override { --*num_alive_; }
  int64_t memory_bytes() const override { return 10; }

 private:
  int* num_alive_;
};

struct Kept {
  PrefixCache cache;
  int num_alive = 0;

  const KvMemory* Keep(std::vector<TokenId> tokens) {
    auto kv = std::make_unique<FakeKv>(&num_alive);
    const KvMemory* const raw = kv.get();
    cache.Keep(std::move(tokens), std::move(kv), 10);
    return raw;
  }
};

TEST(PrefixCacheTest, FindsTheLongestCommonBeginning) {
  Kept kept;
  EXPECT_EQ(kept.cache.Find({1, 2}).kv, nullptr);
  const KvMemory* const one = kept.Keep({1, 2, 3, 4});
  const KvMemory* const two = kept.Keep({1, 2, 9});
  EXPECT_EQ(kept.cache.Find({1, 2, 3, 7, 7}).kv, one);
  EXPECT_EQ(kept.cache.Find({1, 2, 3, 7, 7}).num_tokens, 3);
  EXPECT_EQ(kept.cache.Find({1, 2, 9, 9}).kv, two);
  EXPECT_EQ(kept.cache.Find({1, 2, 9, 9}).num_tokens, 3);
  EXPECT_EQ(kept.cache.Find({1, 2}).kv, two);  // a tie: the one used last
  EXPECT_EQ(kept.cache.Find({5}).kv, nullptr);
  EXPECT_EQ(kept.cache.Find({}).kv, nullptr);
}

TEST(PrefixCacheTest, KeepsNoBeginningOfAnother) {
  Kept kept;
  kept.Keep({1, 2});
  const KvMemory* const longer = kept.Keep({1, 2, 3});
  EXPECT_EQ(kept.num_alive, 1);
  kept.Keep({1});
  kept.Keep({1, 2, 3});
  EXPECT_EQ(kept.num_alive, 1);
  EXPECT_EQ(kept.cache.bytes(), 10);
  EXPECT_EQ(kept.cache.Find({1}).kv, longer);
  kept.Keep({1, 2, 4});
  EXPECT_EQ(kept.cache.num_entries(), 2);
}

TEST(PrefixCacheTest, DropsWhatWasNotUsedForLongest) {
  Kept kept;
  const KvMemory* const one = kept.Keep({1});
  kept.Keep({2});
  const KvMemory* const three = kept.Keep({3});
  EXPECT_EQ(kept.cache.Find({1}).kv, one);
  kept.cache.ShrinkTo(29);
  EXPECT_EQ(kept.num_alive, 2);
  EXPECT_EQ(kept.cache.Find({2}).kv, nullptr);
  EXPECT_EQ(kept.cache.Find({3}).kv, three);
  kept.cache.ShrinkTo(20);
  EXPECT_EQ(kept.num_alive, 2);
  kept.cache.ShrinkTo(0);
  EXPECT_EQ(kept.num_alive, 0);
  EXPECT_EQ(kept.cache.bytes(), 0);
  kept.cache.ShrinkTo(-5);  // what runs may take more than is left
}

}  // namespace
}  // namespace cinnabar
