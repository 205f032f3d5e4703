// A model loaded for one command: backend, network and, where the folder has one, the tokenizer.
#ifndef CINNABAR_CLI_MODEL_SESSION_H_
#define CINNABAR_CLI_MODEL_SESSION_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/config/flags.h"
#include "common/tokenizer/tokenizer.h"
#include "kernels/backend.h"
#include "worker/model/denoiser.h"

namespace cinnabar {

// Room that a block-causal model may add to a sequence to make it whole blocks.
inline constexpr int32_t kBlockLengthMax = 128;

struct ModelFlags {
  std::string directory;
  std::string device = "cpu";
  std::string dtype = "auto";
  std::string activations = "auto";
  bool fp8 = false;
  std::string products = "auto";
  std::string isa = "auto";
  int32_t num_threads = 0;

  void Register(FlagSet& flags);
};

struct ModelSession {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Denoiser> denoiser;
};

// Loads the network with scratch for passes of `limits`.
absl::StatusOr<ModelSession> OpenModel(const ModelFlags& flags, const ForwardLimits& limits);

// The input file of `generate` and `logits`: {"ids": [...], "given": [...], "sigma": number}.
// Unknown fields, wrong types and lengths are errors that name the field. Without "given" every
// position is given.
struct InputFile {
  std::vector<int32_t> ids;
  std::vector<bool> given;
  std::optional<float> sigma;
};
absl::StatusOr<InputFile> ReadInputFile(const std::string& path);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_MODEL_SESSION_H_
