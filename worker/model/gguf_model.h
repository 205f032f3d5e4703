// A GGUF file as the checkpoint of a family: the small files of a Hugging Face folder made from its
// metadata, and its tensors under the family's names. Source: llama.cpp, src/models/{dream,llada,
// llada-moe,rnd1}.cpp and conversion/.
#ifndef CINNABAR_WORKER_MODEL_GGUF_MODEL_H_
#define CINNABAR_WORKER_MODEL_GGUF_MODEL_H_

#include <vector>

#include "absl/status/statusor.h"
#include "common/gguf/gguf.h"
#include "worker/model/checkpoint_facts.h"
#include "worker/model/safetensors.h"

namespace cinnabar {

// general.architecture of files whose tensors have their Hugging Face names already and whose other
// facts lie in the folder beside them: what `cinnabar model quantize` writes.
inline constexpr char kNamedTensors[] = "cinnabar-tensors";

// config.json and the tokenizer files. Unimplemented for an architecture that is not dream, llada,
// llada-moe or rnd1, or a field that asks for what is not computed; InvalidArgument for a field
// that is missing or wrong, naming it.
absl::StatusOr<CheckpointTexts> GgufTexts(const GgufHeader& header);

// The tensors in file order, under the names of the family that the architecture means. Experts are
// taken apart. A tensor of a layer that has no name there keeps its own behind the layer's prefix,
// so that CheckTensors sees it. Of an unknown architecture all keep their names.
absl::StatusOr<std::vector<TensorEntry>> GgufTensors(const GgufHeader& header);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_GGUF_MODEL_H_
