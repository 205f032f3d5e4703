// SDAR on the body of Qwen3's mixture of experts (30B-A3B). Source: JetAstra/SDAR.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr int64_t kBlockLength = 4;  // of the variants without a -bN in their name

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  return ReadBlockCausalQwen3(facts, kBlockLength, /*experts=*/true);
}

}  // namespace

Family MakeSdarMoeFamily() {
  return {.name = "sdar_moe",
          .architectures = {"SDARMoeForCausalLM", "SDARMoEForCausalLM"},
          .read = Read};
}

}  // namespace cinnabar
