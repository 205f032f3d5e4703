#include "gateway/api/build_work.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/wire/decoding_params_wire.h"

namespace cinnabar {
namespace {

constexpr uint32_t kFormat = 1;

using Endpoint = GenerationRequest::Endpoint;

// Everything that a request leaves to the model, with a value.
struct Layout {
  int32_t prompt_length = 0;
  int32_t canvas_length = 0;
  int32_t suffix_length = 0;
  int32_t padded_masks = 0;  // positions to decide, with what fills up a block-causal model's block

  int32_t length() const { return prompt_length + canvas_length + suffix_length; }
};

std::string PromptParam(const GenerationRequest& request) {
  return request.endpoint == Endpoint::kChat ? "messages" : "prompt";
}

ApiResult<std::vector<TokenId>> EncodeChat(const ChatPrompt& chat, const ServedModel& model,
                                           std::optional<absl::Time> now) {
  if (!model.chat_template.has_value()) {
    return UnsupportedParameter("model", absl::StrCat("model: ", model.name,
                                                      " has no chat template; use /v1/completions "
                                                      "or /v1/fim/completions."));
  }
  ChatInput input;
  input.messages = chat.messages;
  input.tools = chat.tools;
  input.extra = chat.template_arguments;
  input.special_tokens = model.tokenizer.special_tokens();
  input.now = now;
  const absl::StatusOr<RenderedChat> rendered = model.chat_template->Render(input);
  if (!rendered.ok()) {
    const std::string message = absl::StrCat("messages: the model's chat template refuses them: ",
                                             rendered.status().message());
    const absl::StatusCode code = rendered.status().code();
    const bool is_ours =
        code == absl::StatusCode::kUnimplemented || code == absl::StatusCode::kFailedPrecondition;
    if (is_ours) return ServerError(message);
    return InvalidValue("messages", message);
  }
  return model.tokenizer.Encode(rendered->text,
                                {.parse_special = true, .plain_ranges = rendered->input_ranges});
}

// Ids that no given position may hold.
std::optional<ApiError> CheckIds(absl::Span<const TokenId> ids, const ServedModel& model,
                                 absl::string_view param) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= model.traits.vocab_size) {
      return InvalidValue(
          param, absl::StrCat(param, ": token id ", ids[i], " (number ", i,
                              ") is outside the vocabulary of ", model.traits.vocab_size, "."));
    }
    if (model.traits.mask_token >= 0 && ids[i] == model.traits.mask_token) {
      return InvalidValue(param, absl::StrCat(param, ": token id ", ids[i], " (number ", i,
                                              ") is the mask token; the canvas comes from "
                                              "max_tokens and the suffix."));
    }
  }
  return std::nullopt;
}

ApiResult<std::vector<TokenId>> EncodePrompt(const Prompt& prompt, const ServedModel& model,
                                             std::optional<absl::Time> now) {
  if (const auto* ids = std::get_if<PromptIds>(&prompt)) return *ids;
  if (const auto* chat = std::get_if<ChatPrompt>(&prompt)) return EncodeChat(*chat, model, now);
  // The prompt opens the sequence: what the tokenizer puts in front of a text (a begin token)
  // belongs there.
  return model.tokenizer.Encode(std::get<std::string>(prompt), {.add_special_tokens = true});
}

std::string EchoText(const Prompt& prompt, const Tokenizer& tokenizer) {
  if (const auto* ids = std::get_if<PromptIds>(&prompt)) {
    return tokenizer.DecodeText(*ids, {.skip_special = true});
  }
  const auto* text = std::get_if<std::string>(&prompt);
  return text == nullptr ? "" : *text;
}

// The canvas that was asked for, or the default cut to what fits.
ApiResult<Layout> LayOut(const GenerationRequest& request, const ServedModel& model,
                         size_t prompt_length, size_t suffix_length) {
  const int32_t block = model.traits.causal_block_length;
  const bool padded = block > 0 && suffix_length == 0;
  int64_t limit = ContextTokensMax(model);
  // A canvas at the end of a block-causal model's sequence is filled up to whole blocks.
  // Its blocks begin at 0, or behind the prompt of a model that encodes it.
  const int64_t aligned_at =
      model.traits.causal_encoder
          ? std::min<int64_t>(static_cast<int64_t>(prompt_length), model.traits.positions_max)
          : 0;
  if (padded) {
    const int64_t room = model.traits.positions_max - aligned_at;
    limit = std::min<int64_t>(limit, aligned_at + room / block * block);
  }
  const int64_t given = static_cast<int64_t>(prompt_length) + static_cast<int64_t>(suffix_length);

  const std::optional<int32_t> asked =
      request.canvas_tokens.has_value() ? request.canvas_tokens : request.max_tokens;
  int64_t canvas = asked.value_or(std::min(model.default_canvas_tokens, model.canvas_tokens_max));
  if (asked.has_value() && canvas > model.canvas_tokens_max) {
    const absl::string_view param =
        request.canvas_tokens.has_value() ? "diffusion.canvas_tokens" : "max_tokens";
    return InvalidValue(
        param, absl::StrCat(param, ": ", canvas, " is more than the ", model.canvas_tokens_max,
                            " tokens that ", model.name, " writes at once."));
  }
  if (!asked.has_value() && given < limit) canvas = std::min(canvas, limit - given);
  if (given + canvas > limit) {
    return ContextLengthExceeded(PromptParam(request), limit, given, canvas);
  }
  Layout layout;
  layout.prompt_length = static_cast<int32_t>(prompt_length);
  layout.suffix_length = static_cast<int32_t>(suffix_length);
  layout.canvas_length = static_cast<int32_t>(canvas);
  layout.padded_masks = layout.canvas_length;
  if (padded) {
    const auto beyond = static_cast<int32_t>((layout.length() - aligned_at) % block);
    layout.padded_masks += (block - beyond) % block;
  }
  return layout;
}

bool Reads(const SamplerEntry& entry, Knob knob) {
  return (entry.knobs & static_cast<uint32_t>(knob)) != 0;
}

int32_t CountBlocks(const ModelTraits& traits, const Layout& layout, int32_t block_length) {
  if (traits.causal_block_length > 0) {
    const int32_t block = traits.causal_block_length;
    const int32_t lead = traits.causal_encoder ? 0 : layout.prompt_length % block;
    return (lead + layout.canvas_length + block - 1) / block;
  }
  return block_length > 0 ? (layout.canvas_length + block_length - 1) / block_length : 1;
}

int32_t RoundUp(int64_t value, int32_t multiple) {
  return static_cast<int32_t>((value + multiple - 1) / multiple * multiple);
}

// What the request says, over what the model does by default.
DecodingParams MergeParams(const GenerationRequest& request, const ServedModel& model) {
  const auto is_set = [&](absl::string_view field) {
    return request.params_set.count(std::string(field)) > 0;
  };
  const DecodingParams& asked = request.params;
  DecodingParams merged = model.defaults;
  if (merged.sampler.empty()) merged.sampler = model.traits.default_sampler;
  if (is_set("sampler") && asked.sampler != merged.sampler) {
    merged = DecodingParams{.sampler = asked.sampler, .temperature = merged.temperature};
  }
  merged.forbidden_ids.clear();
  if (is_set("num_steps")) merged.num_steps = asked.num_steps;
  if (is_set("block_length")) merged.block_length = asked.block_length;
  if (is_set("temperature")) merged.temperature = asked.temperature;
  if (is_set("top_p")) merged.top_p = asked.top_p;
  if (is_set("top_k")) merged.top_k = asked.top_k;
  if (is_set("threshold")) merged.threshold = asked.threshold;
  if (is_set("factor")) merged.factor = asked.factor;
  if (is_set("entropy_bound")) merged.entropy_bound = asked.entropy_bound;
  if (is_set("alg_temp")) merged.alg_temp = asked.alg_temp;
  if (is_set("sub_block_length")) merged.sub_block_length = asked.sub_block_length;
  if (is_set("kv_reuse")) merged.kv_reuse = asked.kv_reuse;
  if (is_set("eps")) merged.eps = asked.eps;
  if (is_set("temperature_start")) merged.temperature_start = asked.temperature_start;
  if (is_set("temperature_end")) merged.temperature_end = asked.temperature_end;
  if (is_set("stable_steps")) merged.stable_steps = asked.stable_steps;
  if (is_set("confident_entropy")) merged.confident_entropy = asked.confident_entropy;
  if (is_set("cfg_scale")) merged.cfg_scale = asked.cfg_scale;
  if (is_set("eos_penalty")) merged.eos_penalty = asked.eos_penalty;
  if (is_set("logits_eos_inf")) merged.logits_eos_inf = asked.logits_eos_inf;
  if (is_set("confidence_eos_eot_inf")) {
    merged.confidence_eos_eot_inf = asked.confidence_eos_eot_inf;
  }
  if (is_set("eta")) merged.eta = asked.eta;
  if (is_set("t_on")) merged.t_on = asked.t_on;
  if (is_set("t_off")) merged.t_off = asked.t_off;
  if (is_set("alpha_on")) merged.alpha_on = asked.alpha_on;
  if (is_set("edit_threshold")) merged.edit_threshold = asked.edit_threshold;
  if (is_set("edit_steps")) merged.edit_steps = asked.edit_steps;
  if (is_set("repeat_penalty")) merged.repeat_penalty = asked.repeat_penalty;
  if (is_set("low_threshold")) merged.low_threshold = asked.low_threshold;
  if (is_set("eos_early_stop")) merged.eos_early_stop = asked.eos_early_stop;
  // Rows of a padded vocabulary that have no text are never an answer.
  const int32_t tokens = model.tokenizer.vocab_size();
  merged.pickable_ids = tokens < model.traits.vocab_size ? tokens : 0;
  return merged;
}

// OpenAI clients send sampling knobs to every model: those that the sampler does not read are left
// out with a warning. Knobs of `diffusion` are an error instead (ResolveParams).
void DropUnreadKnobs(const SamplerEntry& entry, DecodingParams& params,
                     std::vector<std::string>& warnings) {
  const DecodingParams unset;
  if (!Reads(entry, Knob::kTopP) && params.top_p != unset.top_p) {
    params.top_p = unset.top_p;
    warnings.push_back(
        absl::StrCat("top_p was ignored: sampler ", entry.name, " does not read it"));
  }
  if (!Reads(entry, Knob::kTopK) && params.top_k != unset.top_k) {
    params.top_k = unset.top_k;
    warnings.push_back(
        absl::StrCat("top_k was ignored: sampler ", entry.name, " does not read it"));
  }
  const bool is_score_sampler = absl::string_view(entry.name).substr(0, 5) == "sedd_";
  if (is_score_sampler && params.temperature != 0 && params.temperature != 1) {
    params.temperature = 0;
    warnings.push_back(absl::StrCat("temperature was ignored: sampler ", entry.name,
                                    " draws from the scores as they are"));
  }
}

bool IsDeterministic(const DecodingParams& params, const SamplerEntry& sampler) {
  return params.temperature == 0 && params.alg_temp == 0 && !sampler.draws_positions;
}

// "num_steps: 7 do not split ..." becomes an error about diffusion.steps.
ApiError ParamsError(const absl::Status& status) {
  const absl::string_view message = status.message();
  const size_t colon = message.find_first_of(": ");
  if (message.substr(colon, 2) != ": ") return InvalidValue("diffusion", message);
  const absl::string_view field = message.substr(0, colon);
  if (field == "pickable_ids" || field == "forbidden_ids") return ServerError(message);
  const std::string param = RequestFieldName(field);
  return InvalidValue(param, absl::StrCat(param, message.substr(colon), "."));
}

int64_t Microdollars(int64_t tokens, double dollars_per_million) {
  const double price = std::ceil(static_cast<double>(tokens) * dollars_per_million - 1e-9);
  return static_cast<int64_t>(std::clamp(price, 0.0, 1e18));
}

}  // namespace

bool IsCalled(const ServedModel& model, absl::string_view name) {
  return model.name == name ||
         std::find(model.aliases.begin(), model.aliases.end(), name) != model.aliases.end();
}

int32_t ContextTokensMax(const ServedModel& model) {
  return model.context_tokens_max > 0
             ? std::min(model.context_tokens_max, model.traits.positions_max)
             : model.traits.positions_max;
}

absl::Status CheckServedModel(const ServedModel& model) {
  const auto wrong = [&](const auto&... words) {
    return absl::FailedPreconditionError(absl::StrCat("model ", model.name, ": ", words...));
  };
  if (model.name.empty()) return absl::FailedPreconditionError("a model without a name");
  if (ContextTokensMax(model) < 2) {
    return wrong("a context of ", ContextTokensMax(model), " tokens has no room for an answer");
  }
  if (model.default_canvas_tokens < 1 || model.canvas_tokens_max < 1) {
    return wrong("default_canvas_tokens and canvas_tokens_max are at least 1");
  }
  if (model.tokenizer.vocab_size() > model.traits.vocab_size) {
    return wrong("the tokenizer has ", model.tokenizer.vocab_size(),
                 " ids, the network's vocabulary ", model.traits.vocab_size);
  }
  const TokenId mask = model.traits.mask_token;
  if (mask >= 0 && !model.tokenizer.TokenBytes(mask).empty() && !model.tokenizer.IsSpecial(mask)) {
    return wrong("the tokenizer does not know that id ", mask,
                 " is the mask token, so that text "
                 "could write it; name it as its mask token");
  }
  GenerationRequest request;
  request.model = model.name;
  request.prompts = {PromptIds{}};
  const ApiResult<Work> work = BuildWork(request, model, 0, 0);
  if (!work.ok()) return wrong("its defaults are refused: ", work.error().message);
  return absl::OkStatus();
}

ApiResult<Work> BuildWork(const GenerationRequest& request, const ServedModel& model,
                          int32_t choice_index, uint64_t random, std::optional<absl::Time> now) {
  CINNABAR_CHECK(choice_index >= 0 && choice_index < request.num_choices()) << choice_index;
  const Prompt& prompt = request.prompts[choice_index / request.n];
  const ModelTraits& traits = model.traits;

  ApiResult<std::vector<TokenId>> encoded = EncodePrompt(prompt, model, now);
  if (!encoded.ok()) return encoded.error();
  const std::vector<TokenId>& ids = *encoded;
  const std::vector<TokenId> suffix =
      request.suffix.has_value() ? model.tokenizer.Encode(*request.suffix) : std::vector<TokenId>();
  if (auto error = CheckIds(ids, model, PromptParam(request))) return *std::move(error);
  if (auto error = CheckIds(suffix, model, "suffix")) return *std::move(error);
  const ApiResult<Layout> laid_out = LayOut(request, model, ids.size(), suffix.size());
  if (!laid_out.ok()) return laid_out.error();
  const Layout& layout = *laid_out;

  Work work;
  DecodingParams asked = MergeParams(request, model);
  const absl::StatusOr<const SamplerEntry*> found = FindSampler(asked.sampler);
  if (found.ok()) {
    DropUnreadKnobs(**found, asked, work.warnings);
    const bool own_steps = request.params_set.count("num_steps") > 0;
    if (!own_steps && asked.num_steps > 0 && Reads(**found, Knob::kNumSteps)) {
      const int64_t scaled =
          (int64_t{asked.num_steps} * layout.canvas_length + model.default_canvas_tokens - 1) /
          model.default_canvas_tokens;
      asked.num_steps = RoundUp(scaled, CountBlocks(traits, layout, asked.block_length));
    }
  }
  asked.seed = request.seed.value_or(random) + static_cast<uint64_t>(choice_index);
  const absl::StatusOr<DecodingParams> resolved = ResolveParams(
      asked, traits, layout.canvas_length, layout.canvas_length, layout.prompt_length);
  if (!resolved.ok()) return ParamsError(resolved.status());
  const DecodingParams& params = *resolved;
  const SamplerEntry& sampler = **FindSampler(params.sampler);
  const bool has_budget = Reads(sampler, Knob::kNumSteps);
  if (request.n > 1 && IsDeterministic(params, sampler)) {
    work.warnings.push_back(absl::StrCat("the ", request.n, " answers are the same: sampler ",
                                         params.sampler, " at temperature 0 draws nothing"));
  }

  // Samplers without a budget decide at least one position in each step.
  const int32_t steps = has_budget ? params.num_steps : layout.canvas_length;
  const int32_t num_blocks = CountBlocks(traits, layout, params.block_length);
  int32_t steps_min = 0;
  if (request.steps_min > 0 && !has_budget) {
    return InvalidValue("diffusion.steps_min",
                        absl::StrCat("diffusion.steps_min: sampler ", params.sampler,
                                     " has no step budget to lower; leave it out."));
  }
  if (request.steps_min > steps) {
    return InvalidValue("diffusion.steps_min",
                        absl::StrCat("diffusion.steps_min: ", request.steps_min, " is above the ",
                                     steps, " steps that this request gets."));
  }
  if (request.may_degrade && has_budget) {
    const int32_t wanted = request.steps_min > 0 ? request.steps_min : (steps + 1) / 2;
    steps_min = RoundUp(wanted, num_blocks);
    if (steps_min >= steps) steps_min = 0;
  }

  work.item.set_format(kFormat);
  work.item.set_model(model.name);
  work.item.set_model_fingerprint(model.fingerprint);
  auto& sequence = *work.item.mutable_ids();
  sequence.Reserve(layout.length());
  sequence.Add(ids.begin(), ids.end());
  sequence.Resize(layout.prompt_length + layout.canvas_length, std::max(traits.mask_token, 0));
  sequence.Add(suffix.begin(), suffix.end());
  for (v1::Span* span : {work.item.add_undecided(), work.item.mutable_answer()}) {
    span->set_begin(layout.prompt_length);
    span->set_end(layout.prompt_length + layout.canvas_length);
  }
  *work.item.mutable_params() = ToWire(params);
  work.item.set_stop_at_end_of_text(true);

  work.hint.set_model(model.name);
  work.hint.set_sampler(params.sampler);
  if (Reads(sampler, Knob::kThreshold)) {
    work.hint.set_threshold_percent(static_cast<int32_t>(std::lround(100 * params.threshold)));
  }
  work.hint.set_steps_budget(steps);
  work.hint.set_steps_min(steps_min);

  work.prompt_tokens = layout.prompt_length + layout.suffix_length;
  work.canvas_tokens = layout.canvas_length;
  // MDLM and SEDD close each block with a step beyond the budget.
  work.steps_max =
      std::max(steps, layout.padded_masks) + traits.causal_block_length + num_blocks + 2;
  // A corrector's steps are shorter where its rates are high: a few dozen more.
  if (sampler.revises) work.steps_max += num_blocks * 32;
  if (Reads(sampler, Knob::kEditing)) work.steps_max += num_blocks * params.edit_steps;
  // Masks may be put in: as many steps for a block as it has positions, whatever is given of them.
  if (sampler.moves_tokens) work.steps_max += num_blocks * params.block_length;
  work.cost = int64_t{layout.length()} * steps * (params.cfg_scale > 0 ? 2 : 1);
  work.input_price_microdollars =
      Microdollars(work.prompt_tokens, model.prices.input_dollars_per_million);
  work.output_price_microdollars =
      Microdollars(work.canvas_tokens, model.prices.output_dollars_per_million);

  work.text.begin = layout.prompt_length;
  work.text.end = layout.prompt_length + layout.canvas_length;
  work.text.end_tokens = traits.eos_tokens;
  if (traits.eot_token >= 0) work.text.end_tokens.push_back(traits.eot_token);
  work.text.stop = request.stop;
  if (request.echo) work.text.echo = EchoText(prompt, model.tokenizer);
  work.text.commits_stay = traits.mask_token >= 0;
  return work;
}

ApiResult<std::vector<Work>> BuildAllWork(const GenerationRequest& request,
                                          const ServedModel& model, uint64_t random,
                                          std::optional<absl::Time> now) {
  std::vector<Work> all;
  all.reserve(request.num_choices());
  for (int32_t choice = 0; choice < request.num_choices(); ++choice) {
    if (choice % request.n != 0) {
      // Another answer to the same prompt differs in its seed alone.
      Work work = all.back();
      work.item.mutable_params()->set_seed(all.back().item.params().seed() + 1);
      all.push_back(std::move(work));
      continue;
    }
    ApiResult<Work> work = BuildWork(request, model, choice, random, now);
    if (!work.ok()) return work.error();
    all.push_back(*std::move(work));
  }
  return all;
}

}  // namespace cinnabar
