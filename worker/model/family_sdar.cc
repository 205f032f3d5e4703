// SDAR: the body of Qwen3 with block-causal attention, the prompt included. Source: JetAstra/SDAR.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr int64_t kBlockLength = 4;  // of the variants without a -bN in their name

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  return ReadBlockCausalQwen3(facts, kBlockLength);
}

}  // namespace

Family MakeSdarFamily() {
  return {.name = "sdar", .architectures = {"SDARForCausalLM"}, .read = Read};
}

}  // namespace cinnabar
