// Tensors of a PyTorch checkpoint (torch.save: a zip archive of a pickle and raw storages) without
// running it. The pickle is read by a machine that knows no code: every global but those that make
// tensors and dictionaries is refused by name. Formats: PKWARE APPNOTE 6.3, Python's pickletools,
// torch/serialization.py.
#ifndef CINNABAR_WORKER_MODEL_TORCH_FILE_H_
#define CINNABAR_WORKER_MODEL_TORCH_FILE_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "worker/model/safetensors.h"

namespace cinnabar {

// Whether a file begins as a zip archive does.
bool IsZip(absl::Span<const uint8_t> bytes);

// The tensors of `bytes`, the whole file, ascending by place; `what` names it in errors. What is
// saved is a dictionary of tensors by name, or one that holds it under "model" or "state_dict". An
// "ema" beside it (SEDD: {"shadow_params": [...]}, one for each tensor that is no buffer, in order)
// takes the place of its values. A prefix "module." is dropped. InvalidArgument for a broken
// archive or pickle and for tensors that lie outside their storage; Unimplemented for compressed
// entries, other globals or operations (naming them), big-endian storages and tensors that are not
// contiguous. Memory in proportion to the pickle.
absl::StatusOr<std::vector<TensorEntry>> ReadTorchFile(absl::Span<const uint8_t> bytes,
                                                       absl::string_view what);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_TORCH_FILE_H_
