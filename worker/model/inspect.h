// What a checkpoint is and whether it can be served, from its headers alone: no weight is read.
#ifndef CINNABAR_WORKER_MODEL_INSPECT_H_
#define CINNABAR_WORKER_MODEL_INSPECT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "worker/model/denoiser.h"
#include "worker/model/model_spec.h"

namespace cinnabar {

struct ModelReport {
  std::string directory;
  std::vector<std::string> architectures;  // as config.json names them
  std::optional<ModelSpec> spec;           // empty: no family reads it; `problems` says why

  // From the safetensors headers; zero when they cannot be read.
  int64_t num_files = 0;
  int64_t file_bytes = 0;
  int64_t num_parameters = 0;  // of the tensors that are read; without a spec of all float ones
  struct DTypeCount {
    std::string dtype;
    int64_t num_tensors = 0;
    int64_t num_elements = 0;
  };
  std::vector<DTypeCount> dtypes;  // most elements first

  // Estimates in bytes, for ForwardLimits{} within the model's positions; zero without a spec. A
  // backend adds its own scratch, and padding of packed weights.
  int64_t weights_f32_bytes = 0;
  int64_t weights_half_bytes = 0;     // F16 or BF16; the embedding stays as stored
  int64_t mapped_bytes = 0;           // experts as stored, read from the file; beside those
  int64_t workspace_bytes = 0;        // activations in float32
  int64_t kv_bytes_per_position = 0;  // one sequence, float32

  std::vector<std::string> problems;  // what stands in the way of loading; empty: it loads
  std::vector<std::string> notes;     // worth knowing, harmless
};

// NotFound without a folder or config.json, InvalidArgument when config.json is no JSON object;
// anything else that is wrong becomes a problem of the report.
absl::StatusOr<ModelReport> InspectModel(const std::string& directory);

// For people: aligned lines, sizes in MiB or GiB, control characters out of files as '?'.
std::string FormatReport(const ModelReport& report);

// For programs: sizes in bytes, absent values null. Dump it with error_handler_t::replace: a path
// can be any bytes.
nlohmann::ordered_json ReportToJson(const ModelReport& report);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_INSPECT_H_
