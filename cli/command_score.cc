#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/model_session.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"
#include "worker/engine/likelihood.h"

namespace cinnabar {
namespace {

constexpr size_t kTextBytesMax = size_t{256} << 20;
constexpr int32_t kWindowDefault = 512;
// Positions of one forward pass: as many samples as fit.
constexpr int32_t kRows = 2048;

struct ScoreFlags {
  ModelFlags model;
  std::string prompt;
  std::string answer;
  std::string text_file;
  std::string input;
  int32_t window = kWindowDefault;
  std::string rule = "nelbo";
  LikelihoodOptions options;
  bool json = false;

  void Register(FlagSet& flags) {
    model.Register(flags);
    flags.Section("What to score (one of --answer, --text-file, --input)");
    flags.Add("prompt", &prompt, "TEXT", "text before the answer, given and not scored");
    flags.Add("answer", &answer, "TEXT", "the text that is scored");
    flags.Add("text-file", &text_file, "FILE", "a whole file, in windows that are scored alone");
    flags.Add("window", &window, "N", "tokens of such a window");
    flags.Add("input", &input, "FILE",
              "JSON {\"ids\": [...], \"given\": [...]}: scores the ids where given is false");
    flags.Section("How");
    flags.Add("rule", &rule, "NAME",
              "nelbo (MDLM's bound; BD3-LM's by blocks; SEDD's score entropy) or llada");
    flags.Add("samples", &options.num_samples, "N", "draws of noise for each window or block");
    flags.Add("seed", &options.seed, "N", "same seed, same bytes");
    flags.Section("Output");
    flags.Add("json", &json, "one JSON object");
    flags.Examples(
        "examples:\n"
        "  cinnabar score --model DIR --prompt 'def add(a, b):' --answer ' return a + b'\n"
        "  cinnabar score --model DIR --text-file held_out.py --samples 16 --json\n");
  }
};

struct Window {
  std::vector<TokenId> ids;
  std::vector<bool> scored;
};

// What is scored, and how many bytes of text that is (0: unknown).
struct Job {
  std::vector<Window> windows;
  int64_t bytes = 0;
};

absl::StatusOr<Job> MakeJob(const ScoreFlags& flags, const FlagSet& set) {
  if (set.Has("answer") + set.Has("text-file") + set.Has("input") != 1) {
    return absl::InvalidArgumentError("say what to score: one of --answer, --text-file, --input");
  }
  if (set.Has("prompt") && !set.Has("answer")) {
    return absl::InvalidArgumentError("--prompt goes with --answer, the text that is scored");
  }
  if (set.Has("window") && !set.Has("text-file")) {
    return absl::InvalidArgumentError("--window goes with --text-file");
  }
  Job job;
  if (set.Has("input")) {
    CINNABAR_ASSIGN_OR_RETURN(const InputFile input, ReadInputFile(flags.input));
    if (input.sigma.has_value()) {
      return absl::InvalidArgumentError("sigma: the noise levels are drawn; leave it out");
    }
    Window& window = job.windows.emplace_back();
    window.ids = input.ids;
    for (const bool given : input.given) window.scored.push_back(!given);
    return job;
  }
  CINNABAR_ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(flags.model.directory));
  if (set.Has("answer")) {
    // What the tokenizer puts in front of a text (a begin token) is given.
    Window& window = job.windows.emplace_back();
    window.ids = tokenizer.Encode(flags.prompt, {.add_special_tokens = true});
    window.scored.resize(window.ids.size(), false);
    const std::vector<TokenId> answer = tokenizer.Encode(flags.answer);
    window.ids.insert(window.ids.end(), answer.begin(), answer.end());
    window.scored.resize(window.ids.size(), true);
    job.bytes = static_cast<int64_t>(flags.answer.size());
    return job;
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::string text, ReadFile(flags.text_file, kTextBytesMax));
  const std::vector<TokenId> opening = tokenizer.Encode("", {.add_special_tokens = true});
  const auto room = flags.window - static_cast<int32_t>(opening.size());
  if (room < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--window ", flags.window, ": take at least ", opening.size() + 1));
  }
  const std::vector<TokenId> ids = tokenizer.Encode(text);
  for (size_t begin = 0; begin < ids.size(); begin += room) {
    const size_t end = std::min(begin + room, ids.size());
    Window& window = job.windows.emplace_back();
    window.ids = opening;
    window.ids.insert(window.ids.end(), ids.begin() + begin, ids.begin() + end);
    window.scored.resize(opening.size(), false);
    window.scored.resize(window.ids.size(), true);
  }
  job.bytes = static_cast<int64_t>(text.size());
  return job;
}

absl::Status Score(ScoreFlags flags, const FlagSet& set) {
  if (flags.model.directory.empty()) {
    return absl::InvalidArgumentError(
        "--model is missing: name a folder with config.json and *.safetensors");
  }
  if (flags.rule == "llada") {
    flags.options.rule = LikelihoodRule::kLlada;
  } else if (flags.rule != "nelbo") {
    return absl::InvalidArgumentError(absl::StrCat("--rule ", flags.rule, ": take nelbo or llada"));
  }
  CINNABAR_ASSIGN_OR_RETURN(const Job job, MakeJob(flags, set));
  int32_t longest = 1;
  for (const Window& window : job.windows) {
    longest = std::max(longest, static_cast<int32_t>(window.ids.size()));
  }
  const ForwardLimits limits = {.rows_max = std::max(kRows, longest + kBlockLengthMax),
                                .sequences_max = std::max(1, kRows / longest),
                                .positions_max = longest};
  CINNABAR_ASSIGN_OR_RETURN(const ModelSession session, OpenModel(flags.model, limits));

  const bool shows = isatty(STDERR_FILENO) != 0;
  Likelihood total;
  double variance = 0.0;
  for (size_t i = 0; i < job.windows.size(); ++i) {
    const Window& window = job.windows[i];
    const auto progress = [&](double share) {
      if (!shows) return;
      std::fprintf(stderr, "\rscored %5.1f %%",
                   100.0 * (static_cast<double>(i) + share) / job.windows.size());
    };
    LikelihoodOptions options = flags.options;
    options.seed += i;  // windows draw noise of their own
    CINNABAR_ASSIGN_OR_RETURN(const Likelihood part,
                              EstimateLikelihood(*session.denoiser, limits, window.ids,
                                                 window.scored, options, progress));
    total.log_likelihood += part.log_likelihood;
    total.num_scored += part.num_scored;
    total.forwards += part.forwards;
    variance += part.standard_error * part.standard_error;
  }
  if (shows) std::fprintf(stderr, "\r                \r");
  if (total.num_scored == 0) return absl::InvalidArgumentError("there is no token to score");
  const double error = std::sqrt(variance);
  const double nats = -total.log_likelihood / total.num_scored;
  const double bits_per_byte =
      job.bytes > 0 ? -total.log_likelihood / std::log(2.0) / static_cast<double>(job.bytes) : 0.0;
  if (flags.json) {
    nlohmann::json json = {{"log_likelihood", total.log_likelihood},
                           {"standard_error", error},
                           {"tokens", total.num_scored},
                           {"nats_per_token", nats},
                           {"perplexity", std::exp(nats)},
                           {"rule", flags.rule},
                           {"samples", flags.options.num_samples},
                           {"forwards", total.forwards}};
    json["bits_per_byte"] = job.bytes > 0 ? nlohmann::json(bits_per_byte) : nlohmann::json();
    std::printf("%s\n", json.dump().c_str());
    return absl::OkStatus();
  }
  std::printf("log-likelihood at least  %.3f nats (standard error %.3f, %s, %d samples)\n",
              total.log_likelihood, error, flags.rule.c_str(), flags.options.num_samples);
  std::printf("a token                  %.4f nats over %d tokens, perplexity at most %.3f\n", nats,
              total.num_scored, std::exp(nats));
  if (job.bytes > 0) {
    std::printf("a byte                   %.4f bits over %lld bytes\n", bits_per_byte,
                static_cast<long long>(job.bytes));
  }
  return absl::OkStatus();
}

}  // namespace

int RunScore(const std::vector<std::string>& args) {
  ScoreFlags flags;
  FlagSet set(
      "cinnabar score --model DIR (--answer TEXT [--prompt TEXT] | --text-file FILE | --input "
      "FILE)",
      "Estimates the likelihood of a text under a diffusion language model: a lower bound, "
      "by drawing noise.");
  flags.Register(set);
  return RunCommand("score", set, args, [&]() -> absl::Status {
    CINNABAR_RETURN_IF_ERROR(TakesNoText(set, "text goes behind --answer"));
    return Score(flags, set);
  });
}

}  // namespace cinnabar
