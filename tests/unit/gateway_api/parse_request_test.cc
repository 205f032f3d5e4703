#include "gateway/api/parse_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace cinnabar {
namespace {

using Endpoint = GenerationRequest::Endpoint;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Optional;
using ::testing::UnorderedElementsAre;

constexpr Endpoint kAll[] = {Endpoint::kCompletion, Endpoint::kFim, Endpoint::kChat};

// A body that asks for nothing but what is required, with `fields` ("\"n\": 2") in it.
std::string Body(Endpoint endpoint, const std::string& fields) {
  const std::string input = endpoint == Endpoint::kChat
                                ? R"("messages": [{"role": "user", "content": "hi"}])"
                                : R"("prompt": "hi")";
  return absl::StrCat(R"({"model": "m", )", input, fields.empty() ? "" : ", ", fields, "}");
}

ApiResult<GenerationRequest> Parse(Endpoint endpoint, const std::string& fields) {
  return ParseGenerationRequest(endpoint, Body(endpoint, fields));
}

GenerationRequest ParseOk(Endpoint endpoint, const std::string& fields) {
  const ApiResult<GenerationRequest> request = Parse(endpoint, fields);
  EXPECT_TRUE(request.ok()) << fields << ": " << ErrorBody(request.error());
  return request.ok() ? *request : GenerationRequest{};
}

GenerationRequest ParseBodyOk(Endpoint endpoint, const std::string& body) {
  const ApiResult<GenerationRequest> request = ParseGenerationRequest(endpoint, body);
  EXPECT_TRUE(request.ok()) << body << ": " << ErrorBody(request.error());
  return request.ok() ? *request : GenerationRequest{};
}

struct Refusal {
  const char* body;  // fields of an else valid body, or a whole body when it begins with '{' or '['
  const char* code;
  const char* param;
  const char* message = "";  // part of it
};

void ExpectRefused(Endpoint endpoint, const Refusal& refusal) {
  SCOPED_TRACE(refusal.body);
  const std::string text = refusal.body;
  const bool is_whole = text.empty() || text[0] == '{' || text[0] == '[' || text[0] == '!';
  const ApiResult<GenerationRequest> request =
      is_whole ? ParseGenerationRequest(endpoint, text[0] == '!' ? text.substr(1) : text)
               : Parse(endpoint, text);
  ASSERT_FALSE(request.ok());
  const ApiError& error = request.error();
  EXPECT_EQ(error.http_status, 400);
  EXPECT_EQ(error.type, "invalid_request_error");
  EXPECT_EQ(error.code, refusal.code);
  EXPECT_EQ(error.param, refusal.param);
  EXPECT_THAT(error.message, HasSubstr(refusal.message));
}

TEST(ParseRequestTest, TheSmallestBodiesGiveTheDefaults) {
  for (const Endpoint endpoint : kAll) {
    const GenerationRequest request = ParseOk(endpoint, "");
    EXPECT_EQ(request.endpoint, endpoint);
    EXPECT_EQ(request.model, "m");
    ASSERT_EQ(request.prompts.size(), 1);
    EXPECT_EQ(request.n, 1);
    EXPECT_EQ(request.num_choices(), 1);
    EXPECT_FALSE(request.suffix.has_value());
    EXPECT_FALSE(request.max_tokens.has_value());
    EXPECT_FALSE(request.canvas_tokens.has_value());
    EXPECT_FALSE(request.seed.has_value());
    EXPECT_FALSE(request.echo || request.stream || request.include_usage || request.diffusing ||
                 request.diffusion_frames || request.may_degrade);
    EXPECT_FALSE(request.deadline.has_value());
    EXPECT_THAT(request.params_set, IsEmpty());
    EXPECT_THAT(request.warnings, IsEmpty());
    EXPECT_EQ(request.service_tier, "");
  }
  EXPECT_EQ(ParseOk(Endpoint::kChat, "").priority, PriorityClass::kStandard);
  EXPECT_EQ(ParseOk(Endpoint::kFim, "").priority, PriorityClass::kInteractive);
  EXPECT_THAT(ParseOk(Endpoint::kCompletion, "").stop, IsEmpty());
  EXPECT_THAT(ParseOk(Endpoint::kFim, "").stop, ElementsAre("\n\n", "\n \n"));
}

TEST(ParseRequestTest, FieldsOfEveryEndpoint) {
  for (const Endpoint endpoint : kAll) {
    const GenerationRequest request = ParseOk(endpoint, R"(
        "n": 3, "best_of": 3, "max_tokens": 64, "temperature": 0.5, "top_p": 0.9, "top_k": 40,
        "seed": 18446744073709551615, "stop": ["a", "\u00e9"], "stream": true,
        "stream_options": {"include_usage": true, "include_obfuscation": false},
        "diffusing": true, "priority": "batch",
        "diffusion": {"sampler": "block-dynamic", "steps": 32, "block_length": 8, "threshold": 0.8,
                      "factor": 2, "entropy_bound": 0.2, "alg_temp": 0.3, "eps": 0.01,
                      "temperature_start": 0.9, "temperature_end": 0.3, "stable_steps": 2,
                      "confident_entropy": 0.1,
                      "cfg_scale": 1.5, "eos_penalty": -1, "logits_eos_inf": true,
                      "confidence_eos_eot_inf": true, "steps_min": 16, "deadline_seconds": 2.5,
                      "eta": 0.25, "t_on": 0.75, "t_off": 0.125, "alpha_on": 0.5,
                      "edit_threshold": 0.625, "edit_steps": 7, "repeat_penalty": 1.25,
                      "low_threshold": 0.375, "eos_early_stop": true,
                      "canvas_tokens": 48, "frames": true, "sub_block_length": 4,
                      "kv_reuse": "dual"})");
    EXPECT_EQ(request.n, 3);
    EXPECT_THAT(request.max_tokens, Optional(64));
    EXPECT_THAT(request.canvas_tokens, Optional(48));
    EXPECT_THAT(request.seed, Optional(18446744073709551615U));
    EXPECT_THAT(request.stop, ElementsAre("a", "é"));
    EXPECT_TRUE(request.stream && request.include_usage && request.diffusing &&
                request.diffusion_frames && request.may_degrade);
    EXPECT_EQ(request.steps_min, 16);
    EXPECT_THAT(request.deadline, Optional(absl::Milliseconds(2500)));
    EXPECT_EQ(request.priority, PriorityClass::kBatch);
    const DecodingParams& params = request.params;
    EXPECT_EQ(params.sampler, "block_dynamic");
    EXPECT_EQ(params.num_steps, 32);
    EXPECT_EQ(params.block_length, 8);
    EXPECT_FLOAT_EQ(params.temperature, 0.5F);
    EXPECT_FLOAT_EQ(params.top_p, 0.9F);
    EXPECT_EQ(params.top_k, 40);
    EXPECT_FLOAT_EQ(params.threshold, 0.8F);
    EXPECT_EQ(params.sub_block_length, 4);
    EXPECT_EQ(params.kv_reuse, KvReuse::kDual);
    EXPECT_FLOAT_EQ(params.factor, 2);
    EXPECT_FLOAT_EQ(params.entropy_bound, 0.2F);
    EXPECT_FLOAT_EQ(params.alg_temp, 0.3F);
    EXPECT_FLOAT_EQ(params.eps, 0.01F);
    EXPECT_FLOAT_EQ(params.temperature_start, 0.9F);
    EXPECT_FLOAT_EQ(params.temperature_end, 0.3F);
    EXPECT_EQ(params.stable_steps, 2);
    EXPECT_FLOAT_EQ(params.confident_entropy, 0.1F);
    EXPECT_FLOAT_EQ(params.cfg_scale, 1.5F);
    EXPECT_FLOAT_EQ(params.eos_penalty, -1);
    EXPECT_TRUE(params.logits_eos_inf && params.confidence_eos_eot_inf);
    EXPECT_EQ(params.eta, 0.25F);
    EXPECT_EQ(params.t_on, 0.75F);
    EXPECT_EQ(params.t_off, 0.125F);
    EXPECT_EQ(params.alpha_on, 0.5F);
    EXPECT_EQ(params.edit_threshold, 0.625F);
    EXPECT_EQ(params.edit_steps, 7);
    EXPECT_EQ(params.repeat_penalty, 1.25F);
    EXPECT_EQ(params.low_threshold, 0.375F);
    EXPECT_TRUE(params.eos_early_stop);
    EXPECT_THAT(request.params_set,
                UnorderedElementsAre(
                    "sampler", "num_steps", "block_length", "temperature", "top_p", "top_k",
                    "threshold", "factor", "entropy_bound", "alg_temp", "eps", "temperature_start",
                    "temperature_end", "stable_steps", "confident_entropy", "cfg_scale",
                    "eos_penalty", "logits_eos_inf", "confidence_eos_eot_inf", "eta", "t_on",
                    "t_off", "alpha_on", "edit_threshold", "edit_steps", "repeat_penalty",
                    "low_threshold", "eos_early_stop", "sub_block_length", "kv_reuse"));
    EXPECT_THAT(request.warnings, IsEmpty());
  }
}

TEST(ParseRequestTest, NullIsAbsent) {
  for (const Endpoint endpoint : kAll) {
    const GenerationRequest request =
        ParseOk(endpoint,
                R"("n": null, "max_tokens": null, "temperature": null, "stop": null, "stream": null,
           "stream_options": null, "seed": null, "suffix": null, "logit_bias": null,
           "logprobs": null, "tools": null, "tool_choice": null, "response_format": null,
           "diffusion": null, "service_tier": null, "user": null, "extra_body": null,
           "best_of": null, "presence_penalty": null, "modalities": null, "audio": null)");
    EXPECT_EQ(request.n, 1);
    EXPECT_THAT(request.params_set, IsEmpty());
    EXPECT_THAT(request.warnings, IsEmpty());
  }
}

TEST(ParseRequestTest, WhatAsksForNothingIsAccepted) {
  for (const Endpoint endpoint : kAll) {
    EXPECT_THAT(ParseOk(endpoint,
                        R"("logit_bias": {}, "logprobs": false, "top_logprobs": 0, "tools": [],
                           "tool_choice": "auto", "response_format": {"type": "text"},
                           "modalities": ["text"], "frequency_penalty": 0, "presence_penalty": 0,
                           "repetition_penalty": 1, "min_p": 0, "echo": false, "ignore_eos": false,
                           "stop_token_ids": [], "functions": [], "function_call": "none",
                           "best_of": 1, "min_tokens": 0, "add_generation_prompt": true,
                           "reasoning_effort": "instant", "stop": [])")
                    .warnings,
                IsEmpty());
  }
  // Tools that may not be called change nothing.
  ParseOk(Endpoint::kChat, R"("tools": [{"type": "function"}], "tool_choice": "none")");
}

TEST(ParseRequestTest, BookkeepingAndUnknownFieldsAreIgnored) {
  for (const Endpoint endpoint : kAll) {
    EXPECT_THAT(ParseOk(endpoint,
                        R"("user": 7, "metadata": {"a": [1]}, "store": true, "nextEdit": true,
                           "safety_identifier": "x", "prompt_cache_key": "k", "verbosity": "low",
                           "prediction": {"type": "content", "content": "x"}, "moderation": {},
                           "parallel_tool_calls": false, "some_new_field": {"deep": [[[1]]]},
                           "reasoning_summary": true, "reasoning_summary_wait": true)")
                    .warnings,
                IsEmpty());
  }
}

TEST(ParseRequestTest, WhatIsIgnoredAlthoughItMeansSomethingIsWarnedOf) {
  for (const Endpoint endpoint : kAll) {
    EXPECT_THAT(
        ParseOk(endpoint,
                R"("frequency_penalty": 0.5, "presence_penalty": -2, "repetition_penalty": 1.1,
                   "min_p": 0.05, "reasoning_effort": "high", "diffusing": true,
                   "diffusion": {"frames": true})")
            .warnings,
        UnorderedElementsAre(HasSubstr("frequency_penalty"), HasSubstr("presence_penalty"),
                             HasSubstr("repetition_penalty"), HasSubstr("min_p"),
                             HasSubstr("reasoning_effort"), HasSubstr("diffusing"),
                             HasSubstr("diffusion.frames")));
  }
}

TEST(ParseRequestTest, MaxTokensHasTwoNames) {
  EXPECT_THAT(ParseOk(Endpoint::kChat, R"("max_completion_tokens": 5)").max_tokens, Optional(5));
  EXPECT_THAT(ParseOk(Endpoint::kChat, R"("max_completion_tokens": 5, "max_tokens": 5)").max_tokens,
              Optional(5));
  ExpectRefused(Endpoint::kChat, {R"("max_completion_tokens": 5, "max_tokens": 6)", "invalid_value",
                                  "max_completion_tokens", "one of the two"});
}

TEST(ParseRequestTest, StopIsAStringOrAFewOfThem) {
  EXPECT_THAT(ParseOk(Endpoint::kChat, R"("stop": "END")").stop, ElementsAre("END"));
  EXPECT_THAT(ParseOk(Endpoint::kFim, R"("stop": "END")").stop, ElementsAre("END"));
  EXPECT_THAT(ParseOk(Endpoint::kFim, R"("stop": [])").stop, IsEmpty());
  EXPECT_THAT(ParseOk(Endpoint::kChat, R"("stop": ["1", "2", "3", "4"])").stop.size(), 4);
}

TEST(ParseRequestTest, SeedsHave64Bits) {
  EXPECT_THAT(ParseOk(Endpoint::kChat, R"("seed": 0)").seed, Optional(0U));
  EXPECT_THAT(ParseOk(Endpoint::kChat, R"("seed": -1)").seed, Optional(~uint64_t{0}));
  EXPECT_THAT(ParseOk(Endpoint::kChat, R"("seed": -9223372036854775808)").seed,
              Optional(uint64_t{1} << 63));
}

TEST(ParseRequestTest, TopKMinusOneIsOff) {
  EXPECT_EQ(ParseOk(Endpoint::kFim, R"("top_k": -1)").params.top_k, 0);
  EXPECT_EQ(ParseOk(Endpoint::kFim, R"("top_k": 0)").params.top_k, 0);
}

TEST(ParseRequestTest, PriorityComesFromTierOrName) {
  const auto priority = [](const char* fields) {
    return ParseOk(Endpoint::kChat, fields).priority;
  };
  EXPECT_EQ(priority(R"("service_tier": "auto")"), PriorityClass::kStandard);
  EXPECT_EQ(priority(R"("service_tier": "default")"), PriorityClass::kStandard);
  EXPECT_EQ(priority(R"("service_tier": "flex")"), PriorityClass::kBatch);
  EXPECT_EQ(priority(R"("service_tier": "scale")"), PriorityClass::kInteractive);
  EXPECT_EQ(priority(R"("service_tier": "priority")"), PriorityClass::kInteractive);
  EXPECT_EQ(priority(R"("service_tier": "fast")"), PriorityClass::kInteractive);
  EXPECT_EQ(priority(R"("realtime": true)"), PriorityClass::kInteractive);
  EXPECT_EQ(priority(R"("realtime": true, "service_tier": "flex")"), PriorityClass::kBatch);
  EXPECT_EQ(priority(R"("priority": "interactive")"), PriorityClass::kInteractive);
  EXPECT_EQ(priority(R"("priority": "standard")"), PriorityClass::kStandard);
  EXPECT_EQ(priority(R"("priority": "batch", "service_tier": "fast")"), PriorityClass::kBatch);
  EXPECT_EQ(ParseOk(Endpoint::kChat, R"("service_tier": "auto")").service_tier, "default");
  EXPECT_EQ(ParseOk(Endpoint::kChat, R"("service_tier": "flex")").service_tier, "flex");
}

TEST(ParseRequestTest, MayDegrade) {
  EXPECT_TRUE(ParseOk(Endpoint::kChat, R"("diffusion": {"may_degrade": true})").may_degrade);
  EXPECT_TRUE(ParseOk(Endpoint::kChat, R"("diffusion": {"steps_min": 2})").may_degrade);
  EXPECT_FALSE(ParseOk(Endpoint::kChat, R"("diffusion": {"may_degrade": false})").may_degrade);
}

TEST(ParseRequestTest, ExtraBodyIsPartOfTheBody) {
  const GenerationRequest request = ParseOk(
      Endpoint::kChat, R"("extra_body": {"diffusing": true, "diffusion": {"steps": 3}, "x": 1},
                          "stream": true)");
  EXPECT_TRUE(request.diffusing);
  EXPECT_EQ(request.params.num_steps, 3);
  ExpectRefused(Endpoint::kChat, {R"("extra_body": {"n": 2}, "n": 1)", "invalid_value",
                                  "extra_body.n", "keep one of the two"});
  ExpectRefused(Endpoint::kChat,
                {R"("extra_body": [])", "invalid_type", "extra_body", "an object"});
}

TEST(ParseRequestTest, PromptsOfCompletions) {
  const auto prompts = [](const std::string& prompt, const std::string& more = "") {
    return ParseBodyOk(Endpoint::kCompletion,
                       absl::StrCat(R"({"model": "m", "prompt": )", prompt, more, "}"));
  };
  EXPECT_EQ(std::get<std::string>(prompts(R"("a\u0000b")").prompts[0]), std::string("a\0b", 3));
  EXPECT_EQ(std::get<std::string>(prompts(R"("")").prompts[0]), "");
  const GenerationRequest two = prompts(R"(["a", "b"])", R"(, "n": 2, "echo": true)");
  EXPECT_EQ(std::get<std::string>(two.prompts[1]), "b");
  EXPECT_EQ(two.num_choices(), 4);
  EXPECT_TRUE(two.echo);
  EXPECT_THAT(std::get<PromptIds>(prompts("[1, 2, 2147483647]").prompts[0]),
              ElementsAre(1, 2, 2147483647));
  const GenerationRequest lists = prompts(R"([[1], [], "t"])");
  EXPECT_THAT(std::get<PromptIds>(lists.prompts[0]), ElementsAre(1));
  EXPECT_THAT(std::get<PromptIds>(lists.prompts[1]), IsEmpty());
  EXPECT_EQ(std::get<std::string>(lists.prompts[2]), "t");
}

TEST(ParseRequestTest, Suffixes) {
  EXPECT_THAT(ParseOk(Endpoint::kCompletion, R"("suffix": "s")").suffix,
              Optional(std::string("s")));
  EXPECT_THAT(ParseOk(Endpoint::kFim, R"("suffix": "")").suffix, Optional(std::string()));
  // Continue sends this for a blank suffix.
  EXPECT_THAT(ParseOk(Endpoint::kFim, R"("suffix": "<|endoftext|>")").suffix,
              Optional(std::string()));
  EXPECT_THAT(ParseOk(Endpoint::kCompletion, R"("suffix": "<|endoftext|>")").suffix,
              Optional(std::string("<|endoftext|>")));
}

TEST(ParseRequestTest, MessagesAsTheTemplateSeesThem) {
  const GenerationRequest request = ParseBodyOk(Endpoint::kChat, R"({"model": "m",
      "chat_template_kwargs": {"enable_thinking": false},
      "messages": [
        {"role": "developer", "content": "d", "name": "n", "unknown": 1},
        {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "role": "user"},
        {"role": "assistant", "content": null, "tool_calls": [
          {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}},
          {"id": "2", "type": "function", "function": {"name": "g", "arguments": "not json"}}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant"}]})");
  ASSERT_EQ(request.prompts.size(), 1);
  const ChatPrompt& chat = std::get<ChatPrompt>(request.prompts[0]);
  EXPECT_EQ(chat.messages.dump(),
            R"([{"role":"system","content":"d","name":"n"},)"
            R"({"role":"user","content":"a\nb"},)"
            R"({"role":"assistant","content":null,"tool_calls":[)"
            R"({"id":"1","type":"function","function":{"name":"f","arguments":{"b":1,"a":2}}},)"
            R"({"id":"2","type":"function","function":{"name":"g","arguments":"not json"}}]},)"
            R"({"role":"tool","content":"42","tool_call_id":"1"},)"
            R"({"role":"assistant","content":""}])");
  EXPECT_EQ(chat.template_arguments.dump(), R"({"enable_thinking":false})");
  EXPECT_TRUE(chat.tools.is_null());
}

TEST(ParseRequestTest, RefusalsOfEveryEndpoint) {
  const Refusal refusals[] = {
      {R"("n": 0)", "invalid_value", "n", "0 is out of range; send an integer from 1 to 16"},
      {R"("n": 17)", "invalid_value", "n"},
      {R"("n": 1.5)", "invalid_type", "n", "found a number with a fraction"},
      {R"("n": "2")", "invalid_type", "n", "found a string; send it without quotes"},
      {R"("n": 99999999999999999999)", "invalid_type", "n", "too large"},
      {R"("n": 18446744073709551615)", "invalid_value", "n"},
      {R"("n": true)", "invalid_type", "n", "found true"},
      {R"("best_of": 2)", "unsupported_parameter", "best_of", "n: 1"},
      {R"("best_of": "x")", "invalid_type", "best_of"},
      {R"("max_tokens": 0)", "invalid_value", "max_tokens"},
      {R"("max_tokens": -5)", "invalid_value", "max_tokens", "-5"},
      {R"("max_tokens": [])", "invalid_type", "max_tokens", "found an array"},
      {R"("max_completion_tokens": 0)", "invalid_value", "max_completion_tokens"},
      {R"("temperature": 2.1)", "invalid_value", "temperature", "from 0 to 2"},
      {R"("temperature": -0.1)", "invalid_value", "temperature"},
      {R"("temperature": "0.5")", "invalid_type", "temperature", "without quotes"},
      {R"("temperature": {})", "invalid_type", "temperature", "found an object"},
      {R"("top_p": 0)", "invalid_value", "top_p", "above 0 to 1"},
      {R"("top_p": 1.1)", "invalid_value", "top_p"},
      {R"("top_k": -2)", "invalid_value", "top_k"},
      {R"("top_k": 1.0)", "invalid_type", "top_k"},
      {R"("top_k": 2147483648)", "invalid_value", "top_k"},
      {R"("seed": 1.5)", "invalid_type", "seed"},
      {R"("seed": "1")", "invalid_type", "seed", "without quotes"},
      {R"("seed": 18446744073709551616)", "invalid_type", "seed"},
      {R"("stop": 5)", "invalid_type", "stop", "at most 4 strings"},
      {R"("stop": ["a", "b", "c", "d", "e"])", "invalid_value", "stop", "at most 4"},
      {R"("stop": ["a", 5])", "invalid_type", "stop[1]", "found an integer"},
      {R"("stop": ["a", null])", "invalid_type", "stop[1]", "found null"},
      {R"("stop": "")", "invalid_value", "stop", "empty"},
      {R"("stop": ["a", ""])", "invalid_value", "stop[1]", "empty"},
      {R"("stream": 1)", "invalid_type", "stream", "true or false"},
      {R"("stream": "true")", "invalid_type", "stream"},
      {R"("stream_options": true)", "invalid_type", "stream_options"},
      {R"("stream_options": {"include_usage": 1})", "invalid_type", "stream_options.include_usage"},
      {R"("diffusing": "yes")", "invalid_type", "diffusing"},
      {R"("priority": "high")", "invalid_value", "priority", "interactive, standard, batch"},
      {R"("priority": 1)", "invalid_type", "priority"},
      {R"("service_tier": "gold")", "invalid_value", "service_tier"},
      {R"("realtime": 1)", "invalid_type", "realtime"},
      {R"("frequency_penalty": 2.5)", "invalid_value", "frequency_penalty"},
      {R"("presence_penalty": "1")", "invalid_type", "presence_penalty"},
      {R"("repetition_penalty": 0)", "invalid_value", "repetition_penalty"},
      {R"("min_p": 2)", "invalid_value", "min_p"},
      {R"("reasoning_effort": 3)", "invalid_type", "reasoning_effort"},
      {R"("reasoning_summary": "x")", "invalid_type", "reasoning_summary"},
      {R"("logit_bias": {"50256": -100})", "unsupported_parameter", "logit_bias"},
      {R"("logprobs": true)", "unsupported_parameter", "logprobs"},
      {R"("logprobs": 0)", "unsupported_parameter", "logprobs"},
      {R"("logprobs": 5)", "unsupported_parameter", "logprobs"},
      {R"("top_logprobs": 5)", "unsupported_parameter", "top_logprobs"},
      {R"("prompt_logprobs": 1)", "unsupported_parameter", "prompt_logprobs"},
      {R"("audio": {"voice": "x"})", "unsupported_parameter", "audio"},
      {R"("web_search_options": {"a": 1})", "unsupported_parameter", "web_search_options"},
      {R"("modalities": ["text", "audio"])", "unsupported_parameter", "modalities"},
      {R"("modalities": "text")", "invalid_type", "modalities"},
      {R"("response_format": {"type": "json_object"})", "unsupported_parameter", "response_format"},
      {R"("response_format": {"type": "json_schema"})", "unsupported_parameter", "response_format"},
      {R"("response_format": {})", "unsupported_parameter", "response_format"},
      {R"("response_format": "text")", "invalid_type", "response_format"},
      {R"("tools": [{"type": "function"}])", "unsupported_parameter", "tools", "tool_choice"},
      {R"("tool_choice": "required")", "unsupported_parameter", "tool_choice"},
      {R"("tool_choice": {"type": "function"})", "unsupported_parameter", "tool_choice"},
      {R"("functions": [{"name": "f"}])", "unsupported_parameter", "functions"},
      {R"("function_call": {"name": "f"})", "unsupported_parameter", "function_call"},
      {R"("min_tokens": 5)", "unsupported_parameter", "min_tokens"},
      {R"("ignore_eos": true)", "unsupported_parameter", "ignore_eos"},
      {R"("stop_token_ids": [1])", "unsupported_parameter", "stop_token_ids"},
      {R"("bad_words": ["x"])", "unsupported_parameter", "bad_words"},
      {R"("allowed_token_ids": [1])", "unsupported_parameter", "allowed_token_ids"},
      {R"("use_beam_search": true)", "unsupported_parameter", "use_beam_search"},
      {R"("guided_json": {"a": 1})", "unsupported_parameter", "guided_json"},
      {R"("guided_regex": "a")", "unsupported_parameter", "guided_regex"},
      {R"("guided_choice": ["a"])", "unsupported_parameter", "guided_choice"},
      {R"("guided_grammar": "a")", "unsupported_parameter", "guided_grammar"},
      {R"("structured_outputs": {"json": {}})", "unsupported_parameter", "structured_outputs"},
      {R"("grammar": "a")", "unsupported_parameter", "grammar"},
      {R"("chat_template": "{{x}}")", "unsupported_parameter", "chat_template"},
      {R"("continue_final_message": true)", "unsupported_parameter", "continue_final_message"},
      {R"("documents": [1])", "unsupported_parameter", "documents"},
      {R"("add_generation_prompt": false)", "unsupported_parameter", "add_generation_prompt"},
      {R"("echo": 1)", "invalid_type", "echo"},
      {R"("diffusion": [])", "invalid_type", "diffusion", "an object"},
  };
  for (const Endpoint endpoint : kAll) {
    for (const Refusal& refusal : refusals) ExpectRefused(endpoint, refusal);
  }
}

TEST(ParseRequestTest, RefusalsOfTheDiffusionContract) {
  const Refusal refusals[] = {
      {R"("sampler": "nucleus")", "invalid_value", "diffusion.sampler", "low_confidence"},
      {R"("sampler": "")", "invalid_value", "diffusion.sampler"},
      {R"("sampler": 1)", "invalid_type", "diffusion.sampler"},
      {R"("steps": 0)", "invalid_value", "diffusion.steps"},
      {R"("steps": 65537)", "invalid_value", "diffusion.steps"},
      {R"("steps": "8")", "invalid_type", "diffusion.steps"},
      {R"("block_length": 0)", "invalid_value", "diffusion.block_length"},
      {R"("threshold": 1.01)", "invalid_value", "diffusion.threshold"},
      {R"("threshold": true)", "invalid_type", "diffusion.threshold"},
      {R"("factor": 0)", "invalid_value", "diffusion.factor", "above 0"},
      {R"("entropy_bound": -1)", "invalid_value", "diffusion.entropy_bound"},
      {R"("alg_temp": -1)", "invalid_value", "diffusion.alg_temp"},
      {R"("eps": 0)", "invalid_value", "diffusion.eps"},
      {R"("kv_reuse": "full")", "invalid_value", "diffusion.kv_reuse", "exact, prefix, dual"},
      {R"("kv_reuse": 1)", "invalid_type", "diffusion.kv_reuse"},
      {R"("sub_block_length": 0)", "invalid_value", "diffusion.sub_block_length"},
      {R"("cfg_scale": -1)", "invalid_value", "diffusion.cfg_scale"},
      {R"("cfg_scale": 1e300)", "invalid_value", "diffusion.cfg_scale"},
      {R"("eos_penalty": "x")", "invalid_type", "diffusion.eos_penalty"},
      {R"("logits_eos_inf": 1)", "invalid_type", "diffusion.logits_eos_inf"},
      {R"("confidence_eos_eot_inf": 1)", "invalid_type", "diffusion.confidence_eos_eot_inf"},
      {R"("eta": -0.1)", "invalid_value", "diffusion.eta"},
      {R"("t_on": 0)", "invalid_value", "diffusion.t_on"},
      {R"("t_off": 2)", "invalid_value", "diffusion.t_off"},
      {R"("alpha_on": "1")", "invalid_type", "diffusion.alpha_on"},
      {R"("edit_threshold": 1.5)", "invalid_value", "diffusion.edit_threshold"},
      {R"("edit_steps": -1)", "invalid_value", "diffusion.edit_steps"},
      {R"("edit_steps": 1.5)", "invalid_type", "diffusion.edit_steps"},
      {R"("repeat_penalty": -1)", "invalid_value", "diffusion.repeat_penalty"},
      {R"("low_threshold": 1.5)", "invalid_value", "diffusion.low_threshold"},
      {R"("eos_early_stop": 1)", "invalid_type", "diffusion.eos_early_stop"},
      {R"("steps_min": 0)", "invalid_value", "diffusion.steps_min"},
      {R"("steps_min": 9, "steps": 8)", "invalid_value", "diffusion.steps_min", "above"},
      {R"("steps_min": 2, "may_degrade": false)", "invalid_value", "diffusion.steps_min"},
      {R"("may_degrade": "no")", "invalid_type", "diffusion.may_degrade"},
      {R"("deadline_seconds": 0)", "invalid_value", "diffusion.deadline_seconds"},
      {R"("deadline_seconds": 3601)", "invalid_value", "diffusion.deadline_seconds"},
      {R"("canvas_tokens": 0)", "invalid_value", "diffusion.canvas_tokens"},
      {R"("canvas_tokens": 11)", "invalid_value", "diffusion.canvas_tokens", "max_tokens: 10"},
      {R"("frames": 1)", "invalid_type", "diffusion.frames"},
      // Unknown ones name the nearest.
      {R"("treshold": 0.5)", "unknown_parameter", "diffusion.treshold", "`threshold`"},
      {R"("num_steps": 8)", "unknown_parameter", "diffusion.num_steps", "`steps`"},
      {R"("step": 8)", "unknown_parameter", "diffusion.step", "`steps`"},
      {R"("blocklength": 8)", "unknown_parameter", "diffusion.blocklength", "`block_length`"},
      {R"("Sampler": "x")", "unknown_parameter", "diffusion.Sampler", "`sampler`"},
      {R"("temperature": 1)", "unknown_parameter", "diffusion.temperature", "top level"},
      {R"("seed": 1)", "unknown_parameter", "diffusion.seed", "top level"},
      {R"("": null)", "unknown_parameter", "diffusion."},
      // The first of the body, also when it is null.
      {R"("zzz": null, "aaa": 1)", "unknown_parameter", "diffusion.zzz"},
  };
  for (const Endpoint endpoint : kAll) {
    for (Refusal refusal : refusals) {
      const std::string fields =
          absl::StrCat(R"("max_tokens": 10, "diffusion": {)", refusal.body, "}");
      refusal.body = fields.c_str();
      ExpectRefused(endpoint, refusal);
    }
  }
}

TEST(ParseRequestTest, RefusalsOfPrompts) {
  const Refusal completions[] = {
      {R"({"model": "m"})", "missing_required_parameter", "prompt"},
      {R"({"model": "m", "prompt": null})", "missing_required_parameter", "prompt"},
      {R"({"model": "m", "prompt": 5})", "invalid_type", "prompt", "token ids"},
      {R"({"model": "m", "prompt": {}})", "invalid_type", "prompt"},
      {R"({"model": "m", "prompt": []})", "invalid_value", "prompt", "empty"},
      {R"({"model": "m", "prompt": [1, "a"]})", "invalid_type", "prompt[1]"},
      {R"({"model": "m", "prompt": ["a", 1]})", "invalid_type", "prompt[1]"},
      {R"({"model": "m", "prompt": ["a", null]})", "invalid_type", "prompt[1]"},
      {R"({"model": "m", "prompt": [1.5]})", "invalid_type", "prompt[0]"},
      {R"({"model": "m", "prompt": [-1]})", "invalid_value", "prompt[0]"},
      {R"({"model": "m", "prompt": [2147483648]})", "invalid_value", "prompt[0]"},
      {R"({"model": "m", "prompt": [[1], [2, true]]})", "invalid_type", "prompt[1][1]"},
      {R"({"model": "m", "prompt": [[[1]]]})", "invalid_type", "prompt[0][0]"},
      {R"({"model": "m", "prompt": ["a", "b", "c"], "n": 6})", "invalid_value", "n", "18"},
      {R"({"model": "m", "prompt": "a", "suffix": 1})", "invalid_type", "suffix"},
  };
  for (const Refusal& refusal : completions) ExpectRefused(Endpoint::kCompletion, refusal);
  std::string many = R"({"model": "m", "prompt": ["a")";
  for (int i = 0; i < 16; ++i) many += R"(, "a")";
  ExpectRefused(Endpoint::kCompletion, {(many += "]}").c_str(), "invalid_value", "prompt", "17"});

  const Refusal fim[] = {
      {R"({"model": "m", "prompt": ["a"]})", "invalid_type", "prompt", "a string"},
      {R"({"model": "m", "suffix": "a"})", "missing_required_parameter", "prompt"},
      {R"("echo": true)", "unsupported_parameter", "echo"},
  };
  for (const Refusal& refusal : fim) ExpectRefused(Endpoint::kFim, refusal);
}

TEST(ParseRequestTest, RefusalsOfMessages) {
  const Refusal whole[] = {
      {R"({"model": "m"})", "missing_required_parameter", "messages"},
      {R"({"model": "m", "prompt": "x"})", "missing_required_parameter", "messages"},
      {R"({"model": "m", "messages": []})", "missing_required_parameter", "messages"},
      {R"({"model": "m", "messages": "hi"})", "invalid_type", "messages", "an array"},
  };
  for (const Refusal& refusal : whole) ExpectRefused(Endpoint::kChat, refusal);
  const Refusal second[] = {
      {R"("hi")", "invalid_type", "messages[1]"},
      {R"({"content": "x"})", "missing_required_parameter", "messages[1].role"},
      {R"({"role": "wizard", "content": "x"})", "invalid_value", "messages[1].role", "developer"},
      {R"({"role": 1, "content": "x"})", "invalid_type", "messages[1].role"},
      {R"({"role": "user"})", "missing_required_parameter", "messages[1].content"},
      {R"({"role": "user", "content": null})", "missing_required_parameter", "messages[1].content"},
      {R"({"role": "user", "content": 5})", "invalid_type", "messages[1].content"},
      {R"({"role": "user", "content": ["x"]})", "invalid_type", "messages[1].content[0]"},
      {R"({"role": "user", "content": [{"text": "x"}]})", "unsupported_parameter",
       "messages[1].content[0].type"},
      {R"({"role": "user", "content": [{"type": "text"}]})", "missing_required_parameter",
       "messages[1].content[0].text"},
      {R"({"role": "user", "content": [{"type": "text", "text": 1}]})", "invalid_type",
       "messages[1].content[0].text"},
      {R"({"role": "user", "content": [{"type": "text", "text": "a"},
           {"type": "image_url", "image_url": {"url": "http://x"}}]})",
       "unsupported_parameter", "messages[1].content[1].type", "no images"},
      {R"({"role": "user", "content": [{"type": "input_audio"}]})", "unsupported_parameter",
       "messages[1].content[0].type"},
      {R"({"role": "user", "content": "x", "name": 1})", "invalid_type", "messages[1].name"},
      {R"({"role": "tool", "content": "x", "tool_call_id": 1})", "invalid_type",
       "messages[1].tool_call_id"},
      {R"({"role": "assistant", "tool_calls": {}})", "invalid_type", "messages[1].tool_calls"},
      {R"({"role": "assistant", "tool_calls": [1]})", "invalid_type", "messages[1].tool_calls[0]"},
      {R"({"role": "assistant", "audio": {"id": "1"}})", "unsupported_parameter",
       "messages[1].audio"},
      {R"({"role": "assistant", "function_call": {"name": "f"}})", "unsupported_parameter",
       "messages[1].function_call", "tool_calls"},
  };
  for (Refusal refusal : second) {
    const std::string body = absl::StrCat(
        R"({"model": "m", "messages": [{"role": "user", "content": "x"}, )", refusal.body, "]}");
    refusal.body = body.c_str();
    ExpectRefused(Endpoint::kChat, refusal);
  }
  ExpectRefused(Endpoint::kChat,
                {R"("chat_template_kwargs": 1)", "invalid_type", "chat_template_kwargs"});
  ExpectRefused(Endpoint::kChat, {R"("echo": true)", "unsupported_parameter", "echo"});
  RequestLimits limits;
  limits.messages_max = 1;
  const ApiResult<GenerationRequest> many =
      ParseGenerationRequest(Endpoint::kChat,
                             R"({"model": "m", "messages": [{"role": "user", "content": "a"},
                                     {"role": "user", "content": "a"}]})",
                             limits);
  ASSERT_FALSE(many.ok());
  EXPECT_EQ(many.error().param, "messages");
}

TEST(ParseRequestTest, RefusalsOfModels) {
  const Refusal refusals[] = {
      {R"({"prompt": "x"})", "missing_required_parameter", "model", "/v1/models"},
      {R"({"prompt": "x", "model": ""})", "missing_required_parameter", "model"},
      {R"({"prompt": "x", "model": 1})", "invalid_type", "model"},
  };
  for (const Refusal& refusal : refusals) ExpectRefused(Endpoint::kCompletion, refusal);
  const std::string body =
      absl::StrCat(R"({"prompt": "x", "model": ")", std::string(257, 'm'), "\"}");
  ExpectRefused(Endpoint::kCompletion, {body.c_str(), "invalid_value", "model", "257"});
}

TEST(ParseRequestTest, LimitsOfLists) {
  RequestLimits limits;
  limits.prompt_ids_max = 3;
  limits.stop_bytes_max = 2;
  const auto code = [&](const char* fields) -> std::string {
    const auto request = ParseGenerationRequest(
        Endpoint::kCompletion, absl::StrCat("{\"model\":\"m\",", fields, "}"), limits);
    return request.ok() ? "ok" : request.error().param;
  };
  EXPECT_EQ(code(R"("prompt": [1,2,3])"), "ok");
  EXPECT_EQ(code(R"("prompt": [1,2,3,4])"), "prompt");
  EXPECT_EQ(code(R"("prompt": [[1,2,3,4]])"), "prompt");
  EXPECT_EQ(code(R"("prompt": "", "stop": "ab")"), "ok");
  EXPECT_EQ(code(R"("prompt": "", "stop": "abc")"), "stop");
}

TEST(ParseRequestTest, RefusalsOfJson) {
  const std::string deep = absl::StrCat(R"({"model":"m","prompt":"x","x":)", std::string(32, '['),
                                        std::string(32, ']'), "}");
  const std::string not_too_deep = absl::StrCat(R"({"model":"m","prompt":"x","x":)",
                                                std::string(31, '['), std::string(31, ']'), "}");
  EXPECT_TRUE(ParseGenerationRequest(Endpoint::kCompletion, not_too_deep).ok());
  const Refusal refusals[] = {
      {"", "invalid_json", "", "not JSON"},
      {"{", "invalid_json", "", "at byte"},
      {"[]", "invalid_json", "", "object, found an array"},
      {"!null", "invalid_json", ""},
      {"!\"text\"", "invalid_json", ""},
      {R"({"model": "m", "prompt": "x"} x)", "invalid_json", ""},
      {R"({"model": "m", "prompt": "x",})", "invalid_json", ""},
      {R"({'model': 'm'})", "invalid_json", ""},
      {R"({"model": "m", /* c */ "prompt": "x"})", "invalid_json", ""},
      {R"({"model": "m", "prompt": NaN})", "invalid_json", ""},
      {R"({"model": "m", "model": "m", "prompt": "x"})", "invalid_json", "", "\"model\""},
      {R"({"model": "m", "prompt": "x", "diffusion": {"steps": 1, "steps": 2}})", "invalid_json",
       "", "\"steps\""},
      {R"({"model": "m", "prompt": "x", "a": {"b": [{"c": 1, "\u0063": 1}]}})", "invalid_json", "",
       "\"c\""},
      {R"({"model": "m", "prompt": "\ud800"})", "invalid_json", ""},
      {R"({"model": "m", "prompt": "\udc00x"})", "invalid_json", ""},
      {R"({"model": "m", "prompt": "\ud800\u0041"})", "invalid_json", ""},
      {"{\"model\": \"m\", \"prompt\": \"\xff\"}", "invalid_json", ""},
      {"{\"model\": \"m\", \"prompt\": \"\xc0\x80\"}", "invalid_json", ""},
      {"{\"model\": \"m\", \"prompt\": \"\xed\xa0\x80\"}", "invalid_json", ""},
      {"{\"model\": \"m\", \"prompt\": \"a\nb\"}", "invalid_json", ""},
      {R"({"model": "m", "prompt": "x", "temperature": 1e400})", "invalid_json", "", "too large"},
      {R"({"model": "m", "prompt": "x", "temperature": -1e400})", "invalid_json", ""},
      {R"({"model": "m", "prompt": "x", "temperature": 01})", "invalid_json", ""},
      {deep.c_str(), "invalid_json", "", "nested deeper than 32"},
  };
  for (const Refusal& refusal : refusals) ExpectRefused(Endpoint::kCompletion, refusal);
}

// Neither many keys nor deep nests cost more than their bytes: a million of either takes a moment.
TEST(ParseRequestTest, LargeBodiesEndSoon) {
  std::string wide = R"({"model": "m", "prompt": "x")";
  for (int i = 0; i < 120'000; ++i) absl::StrAppend(&wide, ",\"", i, "\":0");
  EXPECT_TRUE(ParseGenerationRequest(Endpoint::kCompletion, wide + "}").ok());
  wide += ",\"119999\":0}";
  const ApiResult<GenerationRequest> twice = ParseGenerationRequest(Endpoint::kCompletion, wide);
  ASSERT_FALSE(twice.ok());
  EXPECT_THAT(twice.error().message, HasSubstr("119999"));
  EXPECT_FALSE(ParseGenerationRequest(Endpoint::kCompletion, std::string(1'000'000, '[')).ok());
}

TEST(ParseRequestTest, FieldNames) {
  EXPECT_EQ(RequestFieldName("num_steps"), "diffusion.steps");
  EXPECT_EQ(RequestFieldName("block_length"), "diffusion.block_length");
  EXPECT_EQ(RequestFieldName("sampler"), "diffusion.sampler");
  EXPECT_EQ(RequestFieldName("temperature"), "temperature");
  EXPECT_EQ(RequestFieldName("top_k"), "top_k");
}

}  // namespace
}  // namespace cinnabar
