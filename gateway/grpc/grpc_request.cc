#include "gateway/grpc/grpc_request.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/wire/decoding_params_wire.h"

namespace cinnabar {
namespace {

// Which knobs a message sets: proto3 cannot tell an unset number from 0, so a knob counts as set
// when it differs from the default, and an optional one when it is there.
std::set<std::string> KnobsSet(const v1::DecodingParams& wire) {
  std::set<std::string> set;
  const auto add = [&](bool is_set, const char* name) {
    if (is_set) set.insert(name);
  };
  add(!wire.sampler().empty(), "sampler");
  add(wire.num_steps() != 0, "num_steps");
  add(wire.block_length() != 0, "block_length");
  add(wire.temperature() != 0, "temperature");
  add(wire.has_top_p(), "top_p");
  add(wire.top_k() != 0, "top_k");
  add(wire.has_threshold(), "threshold");
  add(wire.has_factor(), "factor");
  add(wire.has_entropy_bound(), "entropy_bound");
  add(wire.alg_temp() != 0, "alg_temp");
  add(wire.has_eps(), "eps");
  add(wire.sub_block_length() != 0, "sub_block_length");
  add(wire.kv_reuse() != v1::KV_REUSE_EXACT, "kv_reuse");
  add(wire.has_temperature_start(), "temperature_start");
  add(wire.has_temperature_end(), "temperature_end");
  add(wire.has_stable_steps(), "stable_steps");
  add(wire.has_confident_entropy(), "confident_entropy");
  add(wire.cfg_scale() != 0, "cfg_scale");
  add(wire.logits_eos_inf(), "logits_eos_inf");
  add(wire.confidence_eos_eot_inf(), "confidence_eos_eot_inf");
  add(wire.eos_penalty() != 0, "eos_penalty");
  add(wire.has_eta(), "eta");
  add(wire.has_t_on(), "t_on");
  add(wire.has_t_off(), "t_off");
  add(wire.has_alpha_on(), "alpha_on");
  add(wire.has_edit_threshold(), "edit_threshold");
  add(wire.has_edit_steps(), "edit_steps");
  add(wire.repeat_penalty() != 0, "repeat_penalty");
  add(wire.has_low_threshold(), "low_threshold");
  add(wire.eos_early_stop(), "eos_early_stop");
  return set;
}

}  // namespace

ApiResult<GenerationRequest> FromGrpc(const v1::GenerateRequest& wire,
                                      const RequestLimits& limits) {
  GenerationRequest request;
  if (wire.model().empty())
    return MissingParameter("model", "say which model; ListModels lists them");
  request.model = wire.model();
  switch (wire.input_case()) {
    case v1::GenerateRequest::kPrompt:
      request.prompts.emplace_back(wire.prompt());
      request.endpoint = wire.has_suffix() ? GenerationRequest::Endpoint::kFim
                                           : GenerationRequest::Endpoint::kCompletion;
      break;
    case v1::GenerateRequest::kTokens:
      if (wire.tokens().ids_size() > limits.prompt_ids_max) {
        return InvalidValue("tokens", absl::StrCat("at most ", limits.prompt_ids_max, " ids"));
      }
      request.prompts.emplace_back(
          PromptIds(wire.tokens().ids().begin(), wire.tokens().ids().end()));
      break;
    case v1::GenerateRequest::kChat: {
      request.endpoint = GenerationRequest::Endpoint::kChat;
      if (wire.chat().messages().empty() || wire.chat().messages_size() > limits.messages_max) {
        return InvalidValue("chat.messages",
                            absl::StrCat("send 1 to ", limits.messages_max, " messages"));
      }
      ChatPrompt chat;
      for (const v1::ChatMessage& message : wire.chat().messages()) {
        const std::string role = message.role() == "developer" ? "system" : message.role();
        if (role != "system" && role != "user" && role != "assistant") {
          return InvalidValue("chat.messages.role", "system, developer, user or assistant");
        }
        chat.messages.push_back({{"role", role}, {"content", message.content()}});
      }
      request.prompts.emplace_back(std::move(chat));
      break;
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      return MissingParameter("prompt", "say what to fill: prompt, chat or tokens");
  }
  if (wire.has_suffix()) {
    if (wire.input_case() != v1::GenerateRequest::kPrompt) {
      return InvalidValue("suffix", "goes with prompt");
    }
    request.suffix = wire.suffix();
  }
  request.n = wire.n() == 0 ? 1 : wire.n();
  if (request.n < 1 || request.n > limits.choices_max) {
    return InvalidValue("n", absl::StrCat("take 1 to ", limits.choices_max));
  }
  if (wire.max_tokens() < 0 || wire.max_tokens() > limits.max_tokens_max) {
    return InvalidValue("max_tokens", absl::StrCat("take 1 to ", limits.max_tokens_max));
  }
  if (wire.max_tokens() > 0) request.max_tokens = wire.max_tokens();
  if (wire.stop_size() > limits.stop_max) {
    return InvalidValue("stop", absl::StrCat("at most ", limits.stop_max, " strings"));
  }
  for (const std::string& stop : wire.stop()) {
    if (stop.empty() || stop.size() > limits.stop_bytes_max) {
      return InvalidValue("stop", absl::StrCat("1 to ", limits.stop_bytes_max, " bytes each"));
    }
    request.stop.push_back(stop);
  }
  absl::StatusOr<DecodingParams> params = FromWire(wire.params());
  if (!params.ok()) return InvalidValue("params.forbidden_ids", params.status().message());
  request.params = *std::move(params);
  request.params_set = KnobsSet(wire.params());
  if (request.params.num_steps < 0 || request.params.num_steps > limits.num_steps_max) {
    return InvalidValue("params.num_steps", absl::StrCat("take 1 to ", limits.num_steps_max));
  }
  if (wire.params().has_top_p() && !(request.params.top_p > 0 && request.params.top_p <= 1)) {
    return InvalidValue("params.top_p", "above 0, at most 1");
  }
  if (request.params.top_k < -1) return InvalidValue("params.top_k", "-1 and 0 are off");
  request.params.top_k = std::max(request.params.top_k, 0);
  // The model's own are used: to take these and ignore them would be a lie.
  if (wire.params().forbidden_ids_size() > 0) {
    return UnsupportedParameter("params.forbidden_ids", "cannot be set; leave it out");
  }
  if (wire.params().pickable_ids() != 0) {
    return UnsupportedParameter("params.pickable_ids", "cannot be set; leave it out");
  }
  if (wire.params().seed() != 0) request.seed = wire.params().seed();
  if (wire.priority() == "interactive") {
    request.priority = PriorityClass::kInteractive;
  } else if (wire.priority() == "batch") {
    request.priority = PriorityClass::kBatch;
  } else if (!wire.priority().empty() && wire.priority() != "standard") {
    return InvalidValue("priority", "interactive, standard or batch");
  }
  if (wire.deadline_seconds() < 0 ||
      wire.deadline_seconds() > absl::ToDoubleSeconds(limits.deadline_max)) {
    return InvalidValue("deadline_seconds",
                        absl::StrCat("at most ", absl::FormatDuration(limits.deadline_max)));
  }
  if (wire.deadline_seconds() > 0) request.deadline = absl::Seconds(wire.deadline_seconds());
  request.may_degrade = wire.may_degrade();
  request.stream = true;
  request.diffusion_frames = wire.frames();
  return request;
}

}  // namespace cinnabar
