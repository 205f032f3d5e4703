#include "cli/model_session.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"
#include "kernels/device_name.h"

namespace cinnabar {
namespace {

constexpr size_t kInputBytesMax = size_t{64} << 20;

absl::StatusOr<std::optional<DType>> ParseDType(const std::string& name) {
  if (name == "auto") return std::optional<DType>();
  if (name == "float32" || name == "f32") return std::optional<DType>(DType::kF32);
  if (name == "bfloat16" || name == "bf16") return std::optional<DType>(DType::kBf16);
  if (name == "float16" || name == "f16") return std::optional<DType>(DType::kF16);
  if (name == "q8_0") return std::optional<DType>(DType::kQ8_0);
  if (name == "q4_k") return std::optional<DType>(DType::kQ4_K);
  return absl::InvalidArgumentError(absl::StrCat(
      "--dtype ", name, ": take auto (as stored), float32, bfloat16, float16, q8_0 or q4_k"));
}

}  // namespace

void ModelFlags::Register(FlagSet& flags) {
  flags.Section("Model");
  flags.Add("model", &directory, "DIR|FILE.gguf",
            "Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a GGUF file");
  flags.Add("device", &device, "DEVICE", "cpu, cuda or cuda:N");
  flags.Add("dtype", &dtype, "TYPE",
            "weights in memory: auto (as stored), float32, bfloat16, float16, q8_0, q4_k");
  flags.Add("activations", &activations, "TYPE",
            "what flows between them: auto, float32, bfloat16 (cuda)");
  flags.Add("fp8", &fp8, "keep large matrices in FP8 and compute in it (cuda, Ada and newer)");
  flags.Add("products", &products, "NAME",
            "what matrix products are made of: auto, mma or wgmma (H100, H200); bits differ");
  flags.Add("threads", &num_threads, "N", "threads; 0 takes every core");
  flags.Add("isa", &isa, "NAME",
            "auto, avx512vnni, avx512, avx2vnni, avx2 or generic; all give the same bits");
}

absl::StatusOr<ModelSession> OpenModel(const ModelFlags& flags, const ForwardLimits& limits) {
  if (flags.directory.empty()) {
    return absl::InvalidArgumentError(
        "--model is missing: name a folder with config.json and *.safetensors, or a GGUF file");
  }
  CINNABAR_ASSIGN_OR_RETURN(const DeviceName device, ParseDeviceName(flags.device), "--device");
  CINNABAR_ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseDType(flags.dtype));
  CINNABAR_ASSIGN_OR_RETURN(const DType activation, ParseActivation(flags.activations, device.kind),
                            "--activations");
  CINNABAR_ASSIGN_OR_RETURN(const Products products, ParseProducts(flags.products, device.kind),
                            "--products");
  ModelSession session;
  CINNABAR_ASSIGN_OR_RETURN(session.backend,
                            MakeBackend(device.kind, {.num_threads = flags.num_threads,
                                                      .isa = flags.isa,
                                                      .device = device.index,
                                                      .activation = activation,
                                                      .fp8 = flags.fp8,
                                                      .products = products}));
  CINNABAR_ASSIGN_OR_RETURN(session.denoiser, LoadDenoiser(flags.directory, *session.backend,
                                                           {.weight_dtype = dtype}, limits));
  return session;
}

absl::StatusOr<InputFile> ReadInputFile(const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kInputBytesMax));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object())
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  InputFile input;
  for (const auto& [key, value] : json.items()) {
    if (key == "ids") {
      if (!value.is_array())
        return absl::InvalidArgumentError(absl::StrCat(path, ": ids is not an array"));
      for (const auto& id : value) {
        if (!id.is_number_integer() || id.get<int64_t>() < 0 ||
            id.get<int64_t>() > std::numeric_limits<int32_t>::max()) {
          return absl::InvalidArgumentError(
              absl::StrCat(path, ": ids[", input.ids.size(), "] is not a token id"));
        }
        input.ids.push_back(id.get<int32_t>());
      }
    } else if (key == "given") {
      if (!value.is_array())
        return absl::InvalidArgumentError(absl::StrCat(path, ": given is not an array"));
      for (const auto& flag : value) {
        if (!flag.is_boolean()) {
          return absl::InvalidArgumentError(
              absl::StrCat(path, ": given[", input.given.size(), "] is not true or false"));
        }
        input.given.push_back(flag.get<bool>());
      }
    } else if (key == "sigma") {
      if (!value.is_number())
        return absl::InvalidArgumentError(absl::StrCat(path, ": sigma is not a number"));
      input.sigma = value.get<float>();
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": unknown field \"", key, "\"; there are ids, given and sigma"));
    }
  }
  if (input.ids.empty())
    return absl::InvalidArgumentError(absl::StrCat(path, ": ids is missing or empty"));
  if (input.given.empty()) input.given.assign(input.ids.size(), true);
  if (input.given.size() != input.ids.size()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", input.given.size(), " given for ",
                                                   input.ids.size(), " ids; they go in pairs"));
  }
  return input;
}

}  // namespace cinnabar
