#include <cstdio>

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/model_session.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "worker/decoding/canvas.h"
#include "worker/model/safetensors.h"

namespace cinnabar {
namespace {

absl::Status WriteLogits(const ModelFlags& flags, const std::string& input_path,
                         const std::string& output_path) {
  if (input_path.empty())
    return absl::InvalidArgumentError("--input is missing: a JSON file with ids");
  if (output_path.empty())
    return absl::InvalidArgumentError("--output is missing: where the safetensors file goes");
  CINNABAR_ASSIGN_OR_RETURN(const InputFile input, ReadInputFile(input_path));
  const int32_t length = static_cast<int32_t>(input.ids.size());
  CINNABAR_ASSIGN_OR_RETURN(
      const ModelSession session,
      OpenModel(flags, {.rows_max = length + kBlockLengthMax,
                        .sequences_max = 2,  // a causal encoder's rows are a span of their own
                        .positions_max = length + kBlockLengthMax}));
  Denoiser& denoiser = *session.denoiser;
  const ModelTraits& model = denoiser.traits();
  if (input.sigma.has_value() && !model.conditioned_on_sigma) {
    return absl::InvalidArgumentError(
        "sigma: this network is not conditioned on the noise level; leave it out");
  }
  if (length > model.positions_max) {
    return absl::InvalidArgumentError(
        absl::StrCat(length, " ids; the model takes ", model.positions_max));
  }
  // Positions that are not given hold the mask token, where there is one.
  std::vector<TokenId> ids = input.ids;
  for (int32_t i = 0; i < length; ++i) {
    if (!input.given[i] && model.mask_token >= 0) ids[i] = model.mask_token;
    if (ids[i] >= model.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          "ids[", i, "] = ", ids[i], " is outside the vocabulary of ", model.vocab_size));
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(
      const std::unique_ptr<KvMemory> kv,
      session.backend->AllocateKv(denoiser.SequenceKvShape(length, KvReuse::kExact)));
  // A causal encoder takes what is given before the open block, and predicts nothing for it.
  int32_t begin = 0;
  while (model.causal_encoder && begin < length && input.given[begin]) ++begin;
  const int32_t num_rows = length - begin;
  if (model.causal_encoder && (num_rows == 0 || num_rows > model.causal_block_length)) {
    return absl::InvalidArgumentError(
        absl::StrCat("given: ", num_rows,
                     " positions behind the last that is given before them; a block has 1 to ",
                     model.causal_block_length));
  }
  std::vector<SequenceSpan> spans;
  if (begin > 0) spans.push_back({.num_rows = begin, .block_length = 1, .kv = kv.get()});
  spans.push_back({.row_begin = begin,
                   .num_rows = num_rows,
                   .first_position = begin,
                   .block_length = model.causal_encoder ? 0 : model.causal_block_length,
                   .kv = kv.get()});
  const std::vector<float> sigmas(spans.size(), input.sigma.value_or(0.0F));
  std::vector<int32_t> wanted(num_rows);
  for (int32_t i = 0; i < num_rows; ++i) wanted[i] = begin + i;
  CINNABAR_RETURN_IF_ERROR(
      denoiser.Forward({.ids = ids, .sequences = spans, .sigmas = sigmas, .wanted_rows = wanted}));
  std::vector<float> logits(static_cast<size_t>(num_rows) * model.vocab_size);
  CINNABAR_RETURN_IF_ERROR(denoiser.Logits(0, num_rows, absl::MakeSpan(logits)));
  return WriteSafetensors(output_path, "logits", {num_rows, model.vocab_size}, logits);
}

}  // namespace

int RunLogits(const std::vector<std::string>& args) {
  ModelFlags model;
  std::string input;
  std::string output;
  FlagSet set(
      "cinnabar logits --model DIR --input FILE.json --output FILE.safetensors",
      "Writes the float32 logits of one forward pass: tensor \"logits\", [positions, "
      "vocabulary], unshifted "
      "rows as the\nnetwork gives them (SEDD: log-scores; DiffusionGemma: of the block that begins "
      "where nothing is given).");
  model.Register(set);
  set.Section("Files");
  set.Add("input", &input, "FILE",
          "{\"ids\": [...], \"given\": [...], \"sigma\": number}; the last two may be left out");
  set.Add("output", &output, "FILE", "safetensors file to write");
  return RunCommand("logits", set, args, [&]() -> absl::Status {
    CINNABAR_RETURN_IF_ERROR(TakesNoText(set, "--help lists them"));
    return WriteLogits(model, input, output);
  });
}

}  // namespace cinnabar
