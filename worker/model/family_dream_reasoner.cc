// The block-causal Dream: the body of Qwen3, no shift. It shares its model_type with the first Dream and
// nothing else. Source: SJTU-DENG-Lab/Diffulex.
#include "worker/model/family.h"
#include "worker/model/family_common.h"

namespace cinnabar {
namespace {

constexpr int64_t kBlockLength = 32;

absl::StatusOr<ModelSpec> Read(const CheckpointFacts& facts) {
  return ReadBlockCausalQwen3(facts, kBlockLength);
}

}  // namespace

Family MakeDreamReasonerFamily() {
  return {.name = "dream_reasoner", .architectures = {"DreamForCausalLM"}, .read = Read};
}

}  // namespace cinnabar
