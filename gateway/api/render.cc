#include "gateway/api/render.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "common/base/check.h"
#include "common/request/sampler_catalog.h"
#include "nlohmann/json.hpp"

namespace cinnabar {
namespace {

using Json = nlohmann::ordered_json;
using Endpoint = GenerationRequest::Endpoint;

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

bool IsChat(const ReplyInfo& info) { return info.endpoint == Endpoint::kChat; }

Json ReasonJson(FinishReason reason) {
  return reason == FinishReason::kNone ? Json() : Json(std::string(FinishReasonName(reason)));
}

Json Header(const ReplyInfo& info, absl::string_view object) {
  Json reply;
  reply["id"] = ReplyId(info.endpoint, info.request_id);
  reply["object"] = std::string(object);
  reply["created"] = absl::ToUnixSeconds(info.created);
  reply["model"] = info.model;
  reply["system_fingerprint"] =
      info.system_fingerprint.empty() ? Json() : Json(info.system_fingerprint);
  if (!info.service_tier.empty()) reply["service_tier"] = info.service_tier;
  return reply;
}

void AddWarning(const ReplyInfo& info, Json& reply) {
  if (!info.warnings.empty()) reply["warning"] = absl::StrJoin(info.warnings, "; ");
}

Json UsageJson(const UsageReport& usage) {
  const double forwards = static_cast<double>(std::max<int64_t>(usage.forwards, 1));
  Json diffusion = {{"sampler", usage.sampler},
                    {"steps", usage.steps},
                    {"forwards", usage.forwards},
                    {"tokens_per_forward", static_cast<double>(usage.tokens_committed) / forwards},
                    {"queue_seconds", absl::ToDoubleSeconds(usage.queue)},
                    {"device_seconds", absl::ToDoubleSeconds(usage.device)},
                    {"price_dollars", usage.price_dollars}};
  if (usage.degraded_steps > 0) diffusion["degraded_steps"] = usage.degraded_steps;
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          // Mercury's places for what OpenAI nests below.
          {"reasoning_tokens", usage.reasoning_tokens},
          {"cached_input_tokens", usage.cached_tokens},
          {"prompt_tokens_details",
           {{"cached_tokens", usage.cached_tokens}, {"cache_write_tokens", 0}}},
          {"completion_tokens_details",
           {{"reasoning_tokens", usage.reasoning_tokens},
            {"accepted_prediction_tokens", 0},
            {"rejected_prediction_tokens", 0}}},
          {"diffusion", std::move(diffusion)}};
}

// A chunk with one choice: `delta` for chat, `text` otherwise.
Json Chunk(const ReplyInfo& info, int32_t index, Json delta, absl::string_view text,
           FinishReason reason) {
  Json chunk = Header(info, IsChat(info) ? "chat.completion.chunk" : "text_completion");
  Json choice;
  choice["index"] = index;
  if (IsChat(info)) {
    choice["delta"] = std::move(delta);
  } else {
    choice["text"] = std::string(text);
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = ReasonJson(reason);
  chunk["choices"] = Json::array({std::move(choice)});
  if (info.include_usage) chunk["usage"] = nullptr;
  return chunk;
}

Json ContentDelta(absl::string_view text) { return {{"content", std::string(text)}}; }

// Dollars for one token, without an exponent: "0.00000025".
std::string PricePerToken(double dollars_per_million) {
  std::string text = absl::StrFormat("%.12f", dollars_per_million / 1e6);
  text.erase(text.find_last_not_of('0') + 1);
  if (absl::EndsWith(text, ".")) text.pop_back();
  return text;
}

bool Reads(const SamplerEntry& entry, Knob knob) {
  return (entry.knobs & static_cast<uint32_t>(knob)) != 0;
}

// Fields of `diffusion` (and of the body) that a sampler reads.
Json KnobNames(const SamplerEntry& entry) {
  static constexpr std::pair<Knob, const char*> kNames[] = {
      {Knob::kNumSteps, "steps"},
      {Knob::kBlockLength, "block_length"},
      {Knob::kTopP, "top_p"},
      {Knob::kTopK, "top_k"},
      {Knob::kThreshold, "threshold"},
      {Knob::kFactor, "factor"},
      {Knob::kEntropyBound, "entropy_bound"},
      {Knob::kAlgTemp, "alg_temp"},
      {Knob::kEps, "eps"},
      {Knob::kSubBlockLength, "sub_block_length"},
      {Knob::kKvReuse, "kv_reuse"},
      {Knob::kCooling, "temperature_start"},
      {Knob::kCooling, "temperature_end"},
      {Knob::kAdaptiveStop, "stable_steps"},
      {Knob::kAdaptiveStop, "confident_entropy"},
      {Knob::kCfgScale, "cfg_scale"},
      {Knob::kEosSwitches, "logits_eos_inf"},
      {Knob::kEosSwitches, "confidence_eos_eot_inf"},
      {Knob::kEta, "eta"},
      {Knob::kRemaskingWindow, "t_on"},
      {Knob::kRemaskingWindow, "t_off"},
      {Knob::kRemaskingWindow, "alpha_on"},
      {Knob::kEditing, "edit_threshold"},
      {Knob::kEditing, "edit_steps"},
      {Knob::kRepeatPenalty, "repeat_penalty"},
      {Knob::kLowThreshold, "low_threshold"},
      {Knob::kEosEarlyStop, "eos_early_stop"}};
  Json names = Json::array();
  for (const auto& [knob, name] : kNames) {
    if (Reads(entry, knob)) names.push_back(name);
  }
  return names;
}

Json ModelJson(const ServedModel& model) {
  const int32_t context = ContextTokensMax(model);
  const std::string sampler =
      model.defaults.sampler.empty() ? model.traits.default_sampler : model.defaults.sampler;
  Json parameters = {"max_tokens", "temperature", "seed", "stop"};
  Json samplers = Json::array();
  for (const SamplerEntry& entry : SamplerCatalog()) {
    // Those that fit: ResolveParams is the judge.
    DecodingParams params;
    params.sampler = std::string(entry.name);
    if (!ResolveParams(params, model.traits, 1, 1).ok()) continue;
    samplers.push_back({{"name", std::string(entry.name)}, {"knobs", KnobNames(entry)}});
    if (entry.name == sampler && Reads(entry, Knob::kTopP)) parameters.push_back("top_p");
    if (entry.name == sampler && Reads(entry, Knob::kTopK)) parameters.push_back("top_k");
  }
  Json features = Json::array();
  features.push_back("fill_in_the_middle");
  if (model.chat_template.has_value()) features.push_back("chat");

  Json json;
  json["id"] = model.name;
  json["object"] = "model";
  json["created"] = absl::ToUnixSeconds(model.created);
  json["owned_by"] = model.owned_by;
  json["name"] = model.name;
  json["description"] = model.description;
  json["aliases"] = model.aliases;
  json["input_modalities"] = {"text"};
  json["output_modalities"] = {"text"};
  json["context_length"] = context;
  json["max_output_length"] = std::min(model.canvas_tokens_max, context);
  json["pricing"] = {{"prompt", PricePerToken(model.prices.input_dollars_per_million)},
                     {"completion", PricePerToken(model.prices.output_dollars_per_million)},
                     {"input_cache_reads", PricePerToken(model.prices.input_dollars_per_million)},
                     {"input_cache_writes", "0"}};
  json["supported_sampling_parameters"] = std::move(parameters);
  json["supported_features"] = std::move(features);
  json["datacenters"] = Json::array();
  if (model.shutdown_date.has_value()) {
    json["shutdown_date"] = absl::FormatTime("%Y-%m-%d", *model.shutdown_date, absl::UTCTimeZone());
  }
  json["diffusion"] = {{"family", model.traits.family},
                       {"default_sampler", sampler},
                       {"default_canvas_tokens", model.default_canvas_tokens},
                       {"block_length", model.traits.causal_block_length},
                       {"samplers", std::move(samplers)}};
  return json;
}

}  // namespace

std::string ReplyId(Endpoint endpoint, absl::string_view request_id) {
  return absl::StrCat(endpoint == Endpoint::kChat ? "chatcmpl-" : "cmpl-", request_id);
}

void AddUsage(UsageReport& total, const UsageReport& choice) {
  total.prompt_tokens += choice.prompt_tokens;
  total.completion_tokens += choice.completion_tokens;
  total.cached_tokens += choice.cached_tokens;
  total.reasoning_tokens += choice.reasoning_tokens;
  total.sampler = choice.sampler;
  total.steps += choice.steps;
  total.forwards += choice.forwards;
  total.tokens_committed += choice.tokens_committed;
  total.queue = std::max(total.queue, choice.queue);
  total.device += choice.device;
  total.price_dollars += choice.price_dollars;
  total.degraded_steps += choice.degraded_steps;
}

std::string RenderReply(const ReplyInfo& info, absl::Span<const ChoiceResult> choices,
                        const UsageReport& usage) {
  Json reply = Header(info, IsChat(info) ? "chat.completion" : "text_completion");
  Json list = Json::array();
  for (const ChoiceResult& result : choices) {
    Json choice;
    choice["index"] = result.index;
    if (IsChat(info)) {
      choice["message"] = {{"role", "assistant"},
                           {"content", result.text},
                           {"refusal", nullptr},
                           {"annotations", Json::array()}};
    } else {
      choice["text"] = result.text;
    }
    choice["logprobs"] = nullptr;
    choice["finish_reason"] = ReasonJson(result.finish_reason);
    list.push_back(std::move(choice));
  }
  reply["choices"] = std::move(list);
  reply["usage"] = UsageJson(usage);
  AddWarning(info, reply);
  return Dump(reply);
}

std::string RenderFirstChunk(const ReplyInfo& info, int32_t index) {
  return Dump(
      Chunk(info, index, {{"role", "assistant"}, {"content", ""}}, "", FinishReason::kNone));
}

std::string RenderTextChunk(const ReplyInfo& info, int32_t index, absl::string_view text) {
  return Dump(Chunk(info, index, ContentDelta(text), text, FinishReason::kNone));
}

std::string RenderFinishChunk(const ReplyInfo& info, int32_t index, FinishReason reason,
                              absl::string_view text) {
  Json delta = text.empty() ? Json::object() : ContentDelta(text);
  Json chunk = Chunk(info, index, std::move(delta), text, reason);
  AddWarning(info, chunk);
  return Dump(chunk);
}

std::string RenderUsageChunk(const ReplyInfo& info, const UsageReport& usage) {
  Json chunk = Header(info, IsChat(info) ? "chat.completion.chunk" : "text_completion");
  chunk["choices"] = Json::array();
  chunk["usage"] = UsageJson(usage);
  return Dump(chunk);
}

std::string RenderFrameChunk(const ReplyInfo& info, int32_t index, const DiffusionFrame& frame,
                             const TextOptions& text, const Tokenizer& tokenizer) {
  CINNABAR_CHECK(frame.positions.size() == frame.tokens.size());
  const int32_t length = text.end - text.begin;
  const auto relative = [&](int32_t position) {
    return std::clamp(position, text.begin, text.end) - text.begin;
  };
  Json positions = Json::array();
  Json tokens = Json::array();
  Json texts = Json::array();
  Json confidences = Json::array();
  for (size_t i = 0; i < frame.positions.size(); ++i) {
    if (frame.positions[i] < text.begin || frame.positions[i] >= text.end) continue;
    positions.push_back(frame.positions[i] - text.begin);
    tokens.push_back(frame.tokens[i]);
    // Masked again: no text.
    texts.push_back(frame.tokens[i] < 0 ? std::string() : tokenizer.TokenText(frame.tokens[i]));
    if (i < frame.confidences.size()) {
      const double confidence = static_cast<uint8_t>(frame.confidences[i]) / 255.0;
      confidences.push_back(std::round(confidence * 1000) / 1000);
    }
  }
  Json chunk = Chunk(info, index, Json::object(), "", FinishReason::kNone);
  chunk["diffusion"] = {
      {"step", frame.step},
      {"canvas_tokens", length},
      {"block", Json::array({relative(frame.block_begin), relative(frame.block_end)})},
      {"positions", std::move(positions)},
      {"tokens", std::move(tokens)},
      {"texts", std::move(texts)},
      {"confidence", std::move(confidences)},
      {"final_end", relative(frame.final_end)}};
  return Dump(chunk);
}

std::string SseEvent(absl::string_view json, absl::string_view id) {
  CINNABAR_CHECK(json.find_first_of("\r\n") == absl::string_view::npos);
  CINNABAR_CHECK(id.find_first_of("\r\n") == absl::string_view::npos);
  if (id.empty()) return absl::StrCat("data: ", json, "\n\n");
  return absl::StrCat("id: ", id, "\ndata: ", json, "\n\n");
}

std::string RenderCancelled(absl::string_view request_id, absl::string_view state) {
  return Dump(
      {{"id", std::string(request_id)}, {"object", "request"}, {"state", std::string(state)}});
}

std::string RenderModel(const ServedModel& model) { return Dump(ModelJson(model)); }

std::string RenderModelList(absl::Span<const ServedModel* const> models) {
  Json list = Json::array();
  for (const ServedModel* model : models) list.push_back(ModelJson(*model));
  return Dump({{"object", "list"}, {"data", std::move(list)}});
}

}  // namespace cinnabar
