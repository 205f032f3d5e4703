#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "cli/canvas_view.h"
#include "cli/commands.h"
#include "cli/model_session.h"
#include "cli/remote_generate.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/tokenizer/chat_template.h"
#include "worker/engine/engine.h"

namespace cinnabar {
namespace {

constexpr int32_t kDefaultGenLength = 128;

struct GenerateFlags {
  ModelFlags model;
  std::string prompt;
  std::string suffix;
  std::string chat;
  std::string input;
  int32_t gen_length = 0;
  std::string forbid;
  std::string kv_reuse = NameOf(KvReuse::kExact);
  DecodingParams params;
  bool json = false;
  bool watch = false;
  bool trace = false;
  RemoteGeneration remote;
  std::vector<std::string> stop;
  float deadline_seconds = 0.0F;

  void Register(FlagSet& flags);
};

void GenerateFlags::Register(FlagSet& flags) {
  model.Register(flags);
  flags.Section("Or a running gateway");
  flags.Add("url", &remote.url, "URL",
            "ask this gateway, http://127.0.0.1:8080; --model is then a name that it serves "
            "[its first]");
  flags.Add("key-file", &remote.key_file, "FILE", "the API key, in a file [CINNABAR_API_KEY]");
  flags.Add("ca-file", &remote.ca_file, "FILE", "certificates to trust, for https");
  flags.Section("What to fill (one of --prompt, --chat, --input)");
  flags.Add("prompt", &prompt, "TEXT", "text before the canvas");
  flags.Add("suffix", &suffix, "TEXT", "text after the canvas: the model fills the gap");
  flags.Add("chat", &chat, "TEXT", "one user message, put into the model's chat template");
  flags.Add("input", &input, "FILE",
            "JSON {\"ids\": [...], \"given\": [...]}: fills where given is false");
  flags.Add("gen-length", &gen_length, "N",
            "length of the canvas in tokens [128; with --input what it says]");
  flags.Section("How (cinnabar samplers tells which knobs a sampler reads)");
  flags.Add("sampler", &params.sampler, "NAME", "default: the model's own");
  flags.Add("steps", &params.num_steps, "N",
            "denoising steps; default one for each position, or as the sampler has it");
  flags.Add("block-length", &params.block_length, "N",
            "blocks are decoded left to right; default the whole canvas");
  flags.Add("threshold", &params.threshold, "P", "confidence from which a token is transferred");
  flags.Add("factor", &params.factor, "F", "factor of the parallel rule");
  flags.Add("entropy-bound", &params.entropy_bound, "NATS", "joint entropy that a step may commit");
  flags.Add("temperature", &params.temperature, "T", "0 takes the most likely token");
  flags.Add("top-p", &params.top_p, "P", "nucleus; 1 is off");
  flags.Add("top-k", &params.top_k, "K", "most likely K tokens; 0 is off");
  flags.Add("alg-temp", &params.alg_temp, "T", "randomness of the order of transfers");
  flags.Add("eps", &params.eps, "E", "end of the time schedule");
  flags.Add("sub-block-length", &params.sub_block_length, "N", "blocks inside a block");
  flags.Add("kv-reuse", &kv_reuse, "WHAT",
            "exact, or approximate and faster: prefix, dual (Fast-dLLM)");
  flags.Add("temperature-start", &params.temperature_start, "T", "of a block's first step");
  flags.Add("temperature-end", &params.temperature_end, "T", "what it falls to");
  flags.Add("stable-steps", &params.stable_steps, "N",
            "a block ends when its best tokens stayed for so many steps");
  flags.Add("confident-entropy", &params.confident_entropy, "NATS",
            "and when their mean entropy is below this");
  flags.Add("cfg-scale", &params.cfg_scale, "S", "classifier-free guidance; doubles the work");
  flags.Add("logits-eos-inf", &params.logits_eos_inf, "never predict the end of text");
  flags.Add("confidence-eos-eot-inf", &params.confidence_eos_eot_inf,
            "transfer the end of text last");
  flags.Add("eos-penalty", &params.eos_penalty, "NATS", "taken off the logit of the end of text");
  flags.Add("forbid", &forbid, "IDS", "token ids, comma-separated, that must not appear");
  flags.Add("eta", &params.eta, "E", "how readily committed tokens are masked again");
  flags.Add("t-on", &params.t_on, "T", "time from which they are (remdm_loop)");
  flags.Add("t-off", &params.t_off, "T", "time until which they are (remdm_loop)");
  flags.Add("alpha-on", &params.alpha_on, "A", "share that is committed meanwhile (remdm_loop)");
  flags.Add("edit-threshold", &params.edit_threshold, "P",
            "probability above which a committed token is replaced");
  flags.Add("edit-steps", &params.edit_steps, "N",
            "steps that may replace tokens in a block without masks");
  flags.Add("repeat-penalty", &params.repeat_penalty, "NATS",
            "taken off the logit of the token to the left");
  flags.Add("low-threshold", &params.low_threshold, "P",
            "confidence that the best of a run of masks needs");
  flags.Add("eos-early-stop", &params.eos_early_stop, "end at the first final end of text");
  flags.Add("seed", &params.seed, "N", "same seed, same bytes");
  flags.Add("stop", &stop, "TEXT", "with --url: the answer ends before this text; up to four");
  flags.Add("deadline", &deadline_seconds, "SECONDS", "with --url: no answer after that");
  flags.Section("Output");
  flags.Add("json", &json,
            "one JSON object: tokens, text, steps, nfe, tokens_per_forward, seconds");
  flags.Add("trace", &trace, "with --json: the positions that each step changed");
  flags.Add("watch", &watch, "show the canvas while it is denoised");
  flags.Examples(
      "examples:\n"
      "  cinnabar generate --model DIR --prompt 'def add(a, b):' --gen-length 32 --watch\n"
      "  cinnabar generate --model DIR --prompt 'def f(x):\\n    return ' --suffix '\\n' "
      "--gen-length 8\n"
      "  cinnabar generate --model DIR --chat 'Sort a list in C++' --sampler threshold --threshold "
      "0.9\n"
      "  cinnabar generate --url http://127.0.0.1:8080 --prompt 'def add(a, b):' --watch\n");
}

// The sequence to fill, and where the answer is in it.
struct Job {
  std::vector<TokenId> ids;
  std::vector<bool> given;
  int32_t answer_begin = 0;  // `tokens` of the answer
  int32_t answer_end = 0;
};

void AppendGiven(Job& job, const std::vector<int32_t>& ids) {
  job.ids.insert(job.ids.end(), ids.begin(), ids.end());
  job.given.resize(job.ids.size(), true);
}
void AppendCanvas(Job& job, int32_t length) {
  job.ids.resize(job.ids.size() + length, 0);
  job.given.resize(job.ids.size(), false);
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const std::string& message,
                                                const Tokenizer& tokenizer) {
  const auto& templates = tokenizer.chat_templates();
  const auto found = templates.find("default");
  if (found == templates.end()) {
    return absl::FailedPreconditionError("--chat: the model has no chat template; use --prompt");
  }
  CINNABAR_ASSIGN_OR_RETURN(const ChatTemplate chat, ChatTemplate::Parse(found->second),
                            "chat template");
  ChatInput input;
  input.messages.push_back({{"role", "user"}, {"content", message}});
  input.special_tokens = tokenizer.special_tokens();
  CINNABAR_ASSIGN_OR_RETURN(const RenderedChat rendered, chat.Render(input), "chat template");
  return tokenizer.Encode(rendered.text,
                          {.parse_special = true, .plain_ranges = rendered.input_ranges});
}

absl::StatusOr<Job> MakeJob(const GenerateFlags& flags, const FlagSet& set,
                            const absl::StatusOr<Tokenizer>& tokenizer) {
  const int32_t sources = set.Has("prompt") + set.Has("chat") + set.Has("input");
  if (sources != 1) {
    return absl::InvalidArgumentError(
        sources == 0 ? "say what to fill: one of --prompt, --chat, --input"
                     : "--prompt, --chat and --input exclude each other; keep one");
  }
  if (set.Has("suffix") && !set.Has("prompt")) {
    return absl::InvalidArgumentError("--suffix goes with --prompt (it may be empty)");
  }
  if (set.Has("gen-length") && flags.gen_length < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--gen-length ", flags.gen_length, ": take at least 1"));
  }
  Job job;
  if (set.Has("input")) {
    CINNABAR_ASSIGN_OR_RETURN(InputFile input, ReadInputFile(flags.input));
    job.ids = std::move(input.ids);
    job.given = std::move(input.given);
    AppendCanvas(job, flags.gen_length);
    job.answer_end = static_cast<int32_t>(job.ids.size());
    return job;
  }
  if (!tokenizer.ok()) return tokenizer.status();
  if (set.Has("chat")) {
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, EncodeChat(flags.chat, *tokenizer));
    AppendGiven(job, ids);
  } else {
    // The prompt opens the sequence: what the tokenizer puts in front of a text (a begin token)
    // belongs there.
    AppendGiven(job, tokenizer->Encode(flags.prompt, {.add_special_tokens = true}));
  }
  job.answer_begin = static_cast<int32_t>(job.ids.size());
  AppendCanvas(job, set.Has("gen-length") ? flags.gen_length : kDefaultGenLength);
  job.answer_end = static_cast<int32_t>(job.ids.size());
  AppendGiven(job, tokenizer->Encode(flags.suffix));
  return job;
}

// The text of the answer: up to the first end of text, without special tokens.
std::string AnswerText(const Job& job, const SequenceState& state, const ModelTraits& model,
                       const Tokenizer& tokenizer) {
  std::vector<TokenId> tokens;
  for (int32_t position = job.answer_begin; position < job.answer_end; ++position) {
    const TokenId token = state.canvas.tokens[position];
    if (state.canvas.undecided(position)) break;  // it ended before
    const bool filled = state.canvas.states[position] != PositionState::kGiven;
    if (filled && std::count(model.eos_tokens.begin(), model.eos_tokens.end(), token) > 0) break;
    tokens.push_back(token);
  }
  return tokenizer.DecodeText(tokens, {.skip_special = true});
}

// The body for a gateway: only what was asked for, so that the model's own defaults hold.
absl::StatusOr<RemoteGeneration> MakeRemote(const GenerateFlags& flags, const FlagSet& set) {
  for (const char* name : {"device", "dtype", "isa", "threads", "input", "trace", "forbid"}) {
    if (set.Has(name)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", name, " is for a model on this machine; leave it out with --url"));
    }
  }
  if (set.Has("prompt") == set.Has("chat")) {
    return absl::InvalidArgumentError(set.Has("chat")
                                          ? "--prompt and --chat exclude each other; keep one"
                                          : "say what to fill: one of --prompt, --chat");
  }
  if (set.Has("suffix") && !set.Has("prompt")) {
    return absl::InvalidArgumentError("--suffix goes with --prompt (it may be empty)");
  }
  RemoteGeneration remote = flags.remote;
  remote.watch = flags.watch;
  remote.json = flags.json;
  nlohmann::json& body = remote.body;
  body = nlohmann::json::object();
  if (set.Has("model")) body["model"] = flags.model.directory;
  if (set.Has("chat")) {
    remote.endpoint = ApiEndpoint::kChat;
    body["messages"] = {{{"role", "user"}, {"content", flags.chat}}};
  } else {
    remote.endpoint = set.Has("suffix") ? ApiEndpoint::kFim : ApiEndpoint::kCompletion;
    remote.prompt = flags.prompt;
    remote.suffix = flags.suffix;
    body["prompt"] = flags.prompt;
    if (set.Has("suffix")) body["suffix"] = flags.suffix;
  }
  const DecodingParams& params = flags.params;
  const auto add = [&](nlohmann::json& object, const char* flag, const char* field,
                       const nlohmann::json& value) {
    if (set.Has(flag)) object[field] = value;
  };
  add(body, "gen-length", "max_tokens", flags.gen_length);
  add(body, "temperature", "temperature", params.temperature);
  add(body, "top-p", "top_p", params.top_p);
  add(body, "top-k", "top_k", params.top_k);
  add(body, "seed", "seed", params.seed);
  add(body, "stop", "stop", flags.stop);
  nlohmann::json diffusion = nlohmann::json::object();
  add(diffusion, "sampler", "sampler", params.sampler);
  add(diffusion, "steps", "steps", params.num_steps);
  add(diffusion, "block-length", "block_length", params.block_length);
  add(diffusion, "threshold", "threshold", params.threshold);
  add(diffusion, "factor", "factor", params.factor);
  add(diffusion, "entropy-bound", "entropy_bound", params.entropy_bound);
  add(diffusion, "alg-temp", "alg_temp", params.alg_temp);
  add(diffusion, "eps", "eps", params.eps);
  add(diffusion, "sub-block-length", "sub_block_length", params.sub_block_length);
  add(diffusion, "kv-reuse", "kv_reuse", flags.kv_reuse);
  add(diffusion, "temperature-start", "temperature_start", params.temperature_start);
  add(diffusion, "temperature-end", "temperature_end", params.temperature_end);
  add(diffusion, "stable-steps", "stable_steps", params.stable_steps);
  add(diffusion, "confident-entropy", "confident_entropy", params.confident_entropy);
  add(diffusion, "cfg-scale", "cfg_scale", params.cfg_scale);
  add(diffusion, "eos-penalty", "eos_penalty", params.eos_penalty);
  add(diffusion, "logits-eos-inf", "logits_eos_inf", params.logits_eos_inf);
  add(diffusion, "confidence-eos-eot-inf", "confidence_eos_eot_inf", params.confidence_eos_eot_inf);
  add(diffusion, "eta", "eta", params.eta);
  add(diffusion, "t-on", "t_on", params.t_on);
  add(diffusion, "t-off", "t_off", params.t_off);
  add(diffusion, "alpha-on", "alpha_on", params.alpha_on);
  add(diffusion, "edit-threshold", "edit_threshold", params.edit_threshold);
  add(diffusion, "edit-steps", "edit_steps", params.edit_steps);
  add(diffusion, "repeat-penalty", "repeat_penalty", params.repeat_penalty);
  add(diffusion, "low-threshold", "low_threshold", params.low_threshold);
  add(diffusion, "eos-early-stop", "eos_early_stop", params.eos_early_stop);
  add(diffusion, "deadline", "deadline_seconds", flags.deadline_seconds);
  if (!diffusion.empty()) body["diffusion"] = std::move(diffusion);
  return remote;
}

absl::Status Generate(GenerateFlags flags, const FlagSet& set) {
  if (flags.watch && flags.json) {
    return absl::InvalidArgumentError("--watch and --json exclude each other; keep one");
  }
  if (set.Has("url")) {
    CINNABAR_ASSIGN_OR_RETURN(RemoteGeneration remote, MakeRemote(flags, set));
    return GenerateRemotely(std::move(remote));
  }
  for (const char* name : {"key-file", "ca-file", "stop", "deadline"}) {
    if (set.Has(name)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", name, " goes with --url, which asks a running gateway"));
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(flags.params.kv_reuse, ParseKvReuse(flags.kv_reuse), "--kv-reuse");
  for (const absl::string_view id : absl::StrSplit(flags.forbid, ',', absl::SkipEmpty())) {
    if (!absl::SimpleAtoi(id, &flags.params.forbidden_ids.emplace_back())) {
      return absl::InvalidArgumentError(absl::StrCat("--forbid ", flags.forbid, ": not token ids"));
    }
  }
  if (flags.model.directory.empty()) {
    return absl::InvalidArgumentError(
        "--model is missing: name a folder with config.json and *.safetensors, or a running "
        "gateway "
        "with --url");
  }
  const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(flags.model.directory);
  CINNABAR_ASSIGN_OR_RETURN(const Job job, MakeJob(flags, set, tokenizer));
  if (flags.watch && !tokenizer.ok()) return tokenizer.status();

  const int32_t length = static_cast<int32_t>(job.ids.size());
  const int32_t rows = (length + kBlockLengthMax) * (flags.params.cfg_scale > 0 ? 2 : 1);
  const ForwardLimits limits = {
      .rows_max = rows, .sequences_max = 2, .positions_max = length + kBlockLengthMax};
  CINNABAR_ASSIGN_OR_RETURN(const ModelSession session, OpenModel(flags.model, limits));
  const ModelTraits& model = session.denoiser->traits();
  // Exact control takes every id; text takes those that have one.
  if (!set.Has("input") && tokenizer->vocab_size() < model.vocab_size) {
    flags.params.pickable_ids = tokenizer->vocab_size();
  }
  CINNABAR_ASSIGN_OR_RETURN(SequenceState state,
                            MakeSequence(job.ids, job.given, flags.params, model));
  const int32_t num_undecided = CountUndecided(state.canvas, 0, length);
  EngineOptions options;
  options.limits = limits;
  options.kv_bytes_max = int64_t{1} << 40;
  options.look_ahead = flags.model.device != "cpu";  // as a worker's
  Engine engine(*session.denoiser, options);
  CINNABAR_ASSIGN_OR_RETURN(const SequenceId id, engine.Add(std::move(state)));

  std::optional<CanvasView> view;
  if (flags.watch && isatty(STDERR_FILENO) != 0) view.emplace(stderr, *tokenizer, length);
  nlohmann::json trace = nlohmann::json::array();
  const absl::Time begin = absl::Now();
  StepReport report;
  std::vector<std::pair<SequenceId, SequenceState>> finished;
  int32_t committed = 0;
  while (finished.empty()) {
    CINNABAR_RETURN_IF_ERROR(engine.Step(absl::Now(), report));
    finished = engine.TakeFinished();
    std::vector<int32_t> positions;
    for (const StepEvent& event : report.events) {
      if (!event.status.ok()) return event.status;
      std::vector<int32_t> of_step;
      for (const Transfer& transfer : report.TransfersOf(event)) {
        if (transfer.position >= length) continue;
        of_step.push_back(transfer.position);
        committed += transfer.num_committed();
      }
      positions.insert(positions.end(), of_step.begin(), of_step.end());
      if (flags.trace) trace.push_back(of_step);
    }
    if (view) {
      const SequenceState& now = finished.empty() ? *engine.Find(id) : finished[0].second;
      std::sort(positions.begin(), positions.end());
      view->Draw(now.canvas, now.decoding, positions, std::min(committed, num_undecided),
                 absl::Now() - begin);
    }
  }
  view.reset();
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  const SequenceState& done = finished[0].second;
  const std::string text = tokenizer.ok() ? AnswerText(job, done, model, *tokenizer) : "";
  if (!flags.json) {
    if (!tokenizer.ok()) return tokenizer.status();
    if (!flags.watch || isatty(STDOUT_FILENO) == 0) std::printf("%s\n", text.c_str());
    return absl::OkStatus();
  }
  const std::vector<TokenId>& all = done.canvas.tokens;
  const int32_t decided = num_undecided - CountUndecided(done.canvas, 0, length);
  nlohmann::json json = {
      {"tokens",
       std::vector<TokenId>(all.begin() + job.answer_begin, all.begin() + job.answer_end)},
      {"ids", std::vector<TokenId>(all.begin(), all.begin() + length)},
      {"sampler", done.params.sampler},
      {"steps", done.decoding.step},
      {"nfe", done.decoding.nfe},
      {"tokens_per_forward", static_cast<double>(decided) / std::max(1, done.decoding.nfe)},
      {"seconds", seconds},
      {"tokens_per_second", seconds > 0 ? decided / seconds : 0.0},
  };
  json["text"] = tokenizer.ok() ? nlohmann::json(text) : nlohmann::json();
  if (flags.trace) json["trace"] = std::move(trace);
  std::printf("%s\n", json.dump().c_str());
  return absl::OkStatus();
}

}  // namespace

int RunGenerate(const std::vector<std::string>& args) {
  GenerateFlags flags;
  FlagSet set(
      "cinnabar generate (--model DIR | --url URL) (--prompt TEXT [--suffix TEXT] | --chat TEXT | "
      "--input FILE) "
      "[flags]",
      "Fills a canvas with a diffusion language model: one on this machine, or one that a gateway "
      "serves.");
  flags.Register(set);
  return RunCommand("generate", set, args, [&]() -> absl::Status {
    CINNABAR_RETURN_IF_ERROR(TakesNoText(set, "text goes behind --prompt or --chat"));
    return Generate(flags, set);
  });
}

}  // namespace cinnabar
