// Any text as the small files of a checkpoint folder: read without a fault, and a spec that is
// accepted has sizes that can be computed with. Files are separated by lines "====": config.json,
// generation_config.json, tokenizer.json, tokenizer_config.json, vocab.json, added_tokens.json.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "common/base/check.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/family.h"
#include "worker/model/model_spec.h"

namespace cinnabar {
namespace {

CheckpointTexts Split(absl::string_view input) {
  constexpr absl::string_view kSeparator = "\n====\n";
  CheckpointTexts texts;
  for (std::string* text : {&texts.config, &texts.generation_config, &texts.tokenizer,
                            &texts.tokenizer_config, &texts.vocab, &texts.added_tokens}) {
    const size_t end = input.find(kSeparator);
    *text = std::string(input.substr(0, end));
    if (end == absl::string_view::npos) break;
    input.remove_prefix(end + kSeparator.size());
  }
  return texts;
}

void CheckSpec(const ModelSpec& spec) {
  const ModelTraits& traits = spec.traits;
  CINNABAR_CHECK(spec.dim > 0 && spec.num_layers > 0 && spec.mlp_dim > 0 &&
                 traits.positions_max > 0);
  CINNABAR_CHECK(spec.head_dim > 0 && spec.head_dim % 2 == 0);
  CINNABAR_CHECK(spec.num_heads % spec.num_kv_heads == 0);
  CINNABAR_CHECK(traits.mask_token >= -1 && traits.mask_token < traits.vocab_size);
  CINNABAR_CHECK(traits.tokenizer_size >= 0 && traits.tokenizer_size <= traits.vocab_size);
  for (const TokenId id : traits.eos_tokens) CINNABAR_CHECK(id >= 0 && id < traits.vocab_size);
  CINNABAR_CHECK(ActivationBytes(spec, 2048, 64, traits.positions_max, 4) > 0);
  if (spec.num_layers > 8) return;  // names take time
  for (const ExpectedTensor& tensor : ExpectedTensors(spec)) {
    int64_t size = 1;
    for (const int64_t dimension : tensor.shape) {
      CINNABAR_CHECK(dimension > 0 && !__builtin_mul_overflow(size, dimension, &size));
    }
  }
}

}  // namespace
}  // namespace cinnabar

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::StatusOr<cinnabar::CheckpointFacts> facts = cinnabar::ReadCheckpointFacts(
      cinnabar::Split({reinterpret_cast<const char*>(data), size}), "input");
  if (!facts.ok()) return 0;
  const absl::StatusOr<cinnabar::ModelSpec> spec = cinnabar::ReadModelSpec(*facts);
  if (spec.ok()) cinnabar::CheckSpec(*spec);
  return 0;
}
