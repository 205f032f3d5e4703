#include "gateway/api/render.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "nlohmann/json.hpp"
#include "tests/unit/gateway_api/served_model.h"

namespace cinnabar {
namespace {

using Endpoint = GenerationRequest::Endpoint;
using nlohmann::json;
using ::testing::UnorderedElementsAre;

ReplyInfo Info(Endpoint endpoint) {
  return {.endpoint = endpoint,
          .request_id = "r1",
          .model = "tiny",
          .created = absl::FromUnixMillis(1'700'000'000'900),
          .system_fingerprint = "fp-1"};
}

UsageReport Usage() {
  return {.prompt_tokens = 10,
          .completion_tokens = 6,
          .sampler = "threshold",
          .steps = 5,
          .forwards = 4,
          .tokens_committed = 8,
          .queue = absl::Milliseconds(250),
          .device = absl::Milliseconds(125),
          .price_dollars = 0.5};
}

std::set<std::string> Keys(const json& object) {
  std::set<std::string> keys;
  for (const auto& entry : object.items()) keys.insert(entry.key());
  return keys;
}

constexpr char kUsage[] =
    R"({"prompt_tokens":10,"completion_tokens":6,"total_tokens":16,"reasoning_tokens":0,)"
    R"("cached_input_tokens":0,"prompt_tokens_details":{"cached_tokens":0,"cache_write_tokens":0},)"
    R"("completion_tokens_details":{"reasoning_tokens":0,"accepted_prediction_tokens":0,)"
    R"("rejected_prediction_tokens":0},"diffusion":{"sampler":"threshold","steps":5,"forwards":4,)"
    R"("tokens_per_forward":2.0,"queue_seconds":0.25,"device_seconds":0.125,"price_dollars":0.5}})";

TEST(RenderReplyTest, ChatCompletion) {
  EXPECT_EQ(
      RenderReply(Info(Endpoint::kChat), {{0, "a\n\"b\"", FinishReason::kStop}}, Usage()),
      absl::StrCat(
          R"({"id":"chatcmpl-r1","object":"chat.completion","created":1700000000,"model":"tiny",)"
          R"("system_fingerprint":"fp-1","choices":[{"index":0,"message":{"role":"assistant",)"
          R"("content":"a\n\"b\"","refusal":null,"annotations":[]},"logprobs":null,)"
          R"("finish_reason":"stop"}],"usage":)",
          kUsage, "}"));
}

TEST(RenderReplyTest, TextCompletion) {
  for (const Endpoint endpoint : {Endpoint::kCompletion, Endpoint::kFim}) {
    EXPECT_EQ(
        RenderReply(Info(endpoint), {{0, "a", FinishReason::kLength}, {1, "", FinishReason::kStop}},
                    Usage()),
        absl::StrCat(R"({"id":"cmpl-r1","object":"text_completion","created":1700000000,)"
                     R"("model":"tiny","system_fingerprint":"fp-1","choices":[)"
                     R"({"index":0,"text":"a","logprobs":null,"finish_reason":"length"},)"
                     R"({"index":1,"text":"","logprobs":null,"finish_reason":"stop"}],"usage":)",
                     kUsage, "}"));
  }
}

TEST(RenderReplyTest, TierAndWarnings) {
  ReplyInfo info = Info(Endpoint::kChat);
  EXPECT_FALSE(json::parse(RenderReply(info, {}, Usage())).contains("warning"));
  EXPECT_FALSE(json::parse(RenderReply(info, {}, Usage())).contains("service_tier"));
  info.warnings = {"one", "two"};
  info.service_tier = "flex";
  const json reply = json::parse(RenderReply(info, {}, Usage()));
  EXPECT_EQ(reply["warning"], "one; two");
  EXPECT_EQ(reply["service_tier"], "flex");
}

TEST(RenderReplyTest, UsageOfDegradedRequestsAndSums) {
  UsageReport total = Usage();
  UsageReport second = Usage();
  second.prompt_tokens = 0;
  second.queue = absl::Seconds(1);
  second.degraded_steps = 3;
  AddUsage(total, second);
  const json usage = json::parse(RenderReply(Info(Endpoint::kChat), {}, total))["usage"];
  EXPECT_EQ(usage["prompt_tokens"], 10);
  EXPECT_EQ(usage["completion_tokens"], 12);
  EXPECT_EQ(usage["total_tokens"], 22);
  EXPECT_EQ(usage["diffusion"]["steps"], 10);
  EXPECT_EQ(usage["diffusion"]["tokens_per_forward"], 2.0);
  EXPECT_EQ(usage["diffusion"]["queue_seconds"], 1.0);
  EXPECT_EQ(usage["diffusion"]["device_seconds"], 0.25);
  EXPECT_EQ(usage["diffusion"]["degraded_steps"], 3);
  // Nothing computed: no division by nothing.
  EXPECT_EQ(json::parse(RenderReply(Info(Endpoint::kChat), {},
                                    {}))["usage"]["diffusion"]["tokens_per_forward"],
            0.0);
}

TEST(RenderChunkTest, AChatStream) {
  const ReplyInfo info = Info(Endpoint::kChat);
  const std::string head =
      R"({"id":"chatcmpl-r1","object":"chat.completion.chunk","created":1700000000,)"
      R"("model":"tiny","system_fingerprint":"fp-1","choices":[{"index":1,"delta":)";
  EXPECT_EQ(RenderFirstChunk(info, 1),
            head + R"({"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]})");
  EXPECT_EQ(RenderTextChunk(info, 1, "é"),
            head + R"({"content":"é"},"logprobs":null,"finish_reason":null}]})");
  EXPECT_EQ(RenderFinishChunk(info, 1, FinishReason::kStop),
            head + R"({},"logprobs":null,"finish_reason":"stop"}]})");
  EXPECT_EQ(RenderFinishChunk(info, 1, FinishReason::kLength, "all"),
            head + R"({"content":"all"},"logprobs":null,"finish_reason":"length"}]})");
}

TEST(RenderChunkTest, ATextStream) {
  const ReplyInfo info = Info(Endpoint::kFim);
  const std::string head =
      R"({"id":"cmpl-r1","object":"text_completion","created":1700000000,"model":"tiny",)"
      R"("system_fingerprint":"fp-1","choices":[{"index":0,"text":)";
  EXPECT_EQ(RenderFirstChunk(info, 0), head + R"("","logprobs":null,"finish_reason":null}]})");
  EXPECT_EQ(RenderTextChunk(info, 0, "a"), head + R"("a","logprobs":null,"finish_reason":null}]})");
  EXPECT_EQ(RenderFinishChunk(info, 0, FinishReason::kLength),
            head + R"("","logprobs":null,"finish_reason":"length"}]})");
}

TEST(RenderChunkTest, UsageIsNullUntilTheLastChunk) {
  for (const Endpoint endpoint : {Endpoint::kChat, Endpoint::kCompletion}) {
    ReplyInfo info = Info(endpoint);
    EXPECT_FALSE(json::parse(RenderTextChunk(info, 0, "a")).contains("usage"));
    info.include_usage = true;
    const DiffusionFrame frame;
    for (const std::string& chunk :
         {RenderFirstChunk(info, 0), RenderTextChunk(info, 0, "a"),
          RenderFinishChunk(info, 0, FinishReason::kStop),
          RenderFrameChunk(info, 0, frame, {.begin = 0, .end = 4}, TinyTokenizer())}) {
      const json parsed = json::parse(chunk);
      ASSERT_TRUE(parsed.contains("usage")) << chunk;
      EXPECT_TRUE(parsed["usage"].is_null());
    }
    const json last = json::parse(RenderUsageChunk(info, Usage()));
    EXPECT_EQ(last["choices"], json::array());
    EXPECT_EQ(last["usage"], json::parse(kUsage));
    EXPECT_EQ(last["id"], json::parse(RenderFirstChunk(info, 0))["id"]);
    EXPECT_EQ(last["object"], json::parse(RenderFirstChunk(info, 0))["object"]);
  }
}

TEST(RenderChunkTest, WarningsComeWithTheEnd) {
  ReplyInfo info = Info(Endpoint::kChat);
  info.warnings = {"w"};
  EXPECT_FALSE(json::parse(RenderTextChunk(info, 0, "a")).contains("warning"));
  EXPECT_EQ(json::parse(RenderFinishChunk(info, 0, FinishReason::kStop))["warning"], "w");
}

TEST(RenderChunkTest, FramesAreValidChunksWithAnEmptyDelta) {
  const std::vector<int32_t> positions = {99, 100, 102, 103, 108};
  const std::vector<int32_t> tokens = {5, *TinyTokenizer().IdOf("a"), kTinyEos, -1, 5};
  const std::string confidences("\x01\xFF\x80\x00\x01", 5);
  const DiffusionFrame frame = {.step = 3,
                                .block_begin = 96,
                                .block_end = 104,
                                .positions = positions,
                                .tokens = tokens,
                                .confidences = confidences,
                                .final_end = 101};
  const TextOptions text = {.begin = 100, .end = 108};
  const json chat =
      json::parse(RenderFrameChunk(Info(Endpoint::kChat), 2, frame, text, TinyTokenizer()));
  EXPECT_EQ(chat["object"], "chat.completion.chunk");
  EXPECT_EQ(chat["choices"],
            json::parse(R"([{"index":2,"delta":{},"logprobs":null,"finish_reason":null}])"));
  EXPECT_EQ(
      chat["diffusion"],
      json::parse(absl::StrCat(
          R"({"step":3,"canvas_tokens":8,"block":[0,4],"positions":[0,2,3],"tokens":[)", tokens[1],
          R"(,1,-1],"texts":["a","<eos>",""],"confidence":[1.0,0.502,0.0],"final_end":1})")));
  const json plain =
      json::parse(RenderFrameChunk(Info(Endpoint::kFim), 0, frame, text, TinyTokenizer()));
  EXPECT_EQ(plain["choices"][0]["text"], "");
  EXPECT_EQ(plain["diffusion"], chat["diffusion"]);
}

// Field lists of the OpenAI objects and of Mercury's; what is not here is in the README with its
// reason.
TEST(RenderTest, FieldListsOfTheReference) {
  const json chat = json::parse(RenderReply(Info(Endpoint::kChat), {{0, "a"}}, Usage()));
  EXPECT_THAT(Keys(chat), UnorderedElementsAre("id", "object", "created", "model",
                                               "system_fingerprint", "choices", "usage"));
  EXPECT_THAT(Keys(chat["choices"][0]),
              UnorderedElementsAre("index", "message", "finish_reason", "logprobs"));
  EXPECT_THAT(Keys(chat["choices"][0]["message"]),
              UnorderedElementsAre("role", "content", "refusal", "annotations"));
  EXPECT_TRUE(chat["choices"][0]["finish_reason"].is_null());
  EXPECT_THAT(
      Keys(chat["usage"]),
      UnorderedElementsAre("prompt_tokens", "completion_tokens", "total_tokens", "reasoning_tokens",
                           "cached_input_tokens", "prompt_tokens_details",
                           "completion_tokens_details", "diffusion"));
  const json chunk = json::parse(RenderTextChunk(Info(Endpoint::kChat), 0, "a"));
  EXPECT_THAT(Keys(chunk["choices"][0]),
              UnorderedElementsAre("index", "delta", "finish_reason", "logprobs"));
}

TEST(RenderTest, TextIsValidUtf8WhateverComes) {
  EXPECT_EQ(json::parse(RenderTextChunk(Info(Endpoint::kChat), 0,
                                        "a\xC3"))["choices"][0]["delta"]["content"],
            "a\uFFFD");
  EXPECT_EQ(json::parse(RenderReply(Info(Endpoint::kFim), {{0, std::string("\0\xFF", 2)}},
                                    {}))["choices"][0]["text"],
            std::string("\0\xEF\xBF\xBD", 4));
}

TEST(SseTest, Events) {
  EXPECT_EQ(SseEvent("{}"), "data: {}\n\n");
  EXPECT_EQ(SseEvent("{}", "7"), "id: 7\ndata: {}\n\n");
  EXPECT_DEATH(SseEvent("a\nb"), "");
  EXPECT_DEATH(SseEvent("{}", "a\rb"), "");
  // Line breaks of the text never become lines of the stream.
  const std::string event = SseEvent(RenderTextChunk(Info(Endpoint::kChat), 0, "a\r\n\nb\u2028"));
  EXPECT_EQ(std::count(event.begin(), event.end(), '\n'), 2);
  EXPECT_EQ(std::count(event.begin(), event.end(), '\r'), 0);
}

TEST(RenderModelTest, OpenAiAndMercuryFields) {
  ServedModel model = TinyModel();
  model.created = absl::FromUnixSeconds(1'700'000'000);
  model.description = "a model";
  const json entry = json::parse(RenderModel(model));
  EXPECT_THAT(Keys(entry), UnorderedElementsAre(
                               "id", "object", "created", "owned_by", "name", "description",
                               "aliases", "input_modalities", "output_modalities", "context_length",
                               "max_output_length", "pricing", "supported_sampling_parameters",
                               "supported_features", "datacenters", "diffusion"));
  EXPECT_EQ(entry["id"], "tiny");
  EXPECT_EQ(entry["object"], "model");
  EXPECT_EQ(entry["created"], 1'700'000'000);
  EXPECT_EQ(entry["owned_by"], "cinnabar");
  EXPECT_EQ(entry["aliases"], json::array({"mercury-coder"}));
  EXPECT_EQ(entry["input_modalities"], json::array({"text"}));
  EXPECT_EQ(entry["context_length"], 192);
  EXPECT_EQ(entry["max_output_length"], 128);
  EXPECT_EQ(entry["pricing"], json::parse(R"({"prompt":"0.00000025","completion":"0.0000015",
      "input_cache_reads":"0.00000025","input_cache_writes":"0"})"));
  EXPECT_EQ(entry["supported_sampling_parameters"],
            json::array({"max_tokens", "temperature", "seed", "stop"}));
  EXPECT_EQ(entry["supported_features"], json::array({"fill_in_the_middle"}));
  EXPECT_EQ(entry["diffusion"]["default_sampler"], "low_confidence");
  std::set<std::string> samplers;
  for (const json& sampler : entry["diffusion"]["samplers"]) samplers.insert(sampler["name"]);
  EXPECT_TRUE(samplers.count("threshold"));
  EXPECT_FALSE(samplers.count("sedd_euler"));
  EXPECT_EQ(entry["diffusion"]["samplers"][0]["knobs"][0], "steps");

  model.shutdown_date = absl::FromUnixSeconds(1'700'000'000);
  model.defaults.sampler = "entropy";
  model.chat_template = *ChatTemplate::Parse("x");
  const json other = json::parse(RenderModel(model));
  EXPECT_EQ(other["shutdown_date"], "2023-11-14");
  EXPECT_EQ(other["supported_sampling_parameters"],
            json::array({"max_tokens", "temperature", "seed", "stop", "top_p", "top_k"}));
  EXPECT_EQ(other["supported_features"], json::array({"fill_in_the_middle", "chat"}));
}

TEST(RenderModelTest, TheList) {
  const ServedModel model = TinyModel();
  const json list = json::parse(RenderModelList({&model, &model}));
  EXPECT_EQ(list["object"], "list");
  ASSERT_EQ(list["data"].size(), 2);
  EXPECT_EQ(list["data"][0], json::parse(RenderModel(model)));
  EXPECT_EQ(RenderModelList({}), R"({"object":"list","data":[]})");
}

}  // namespace
}  // namespace cinnabar
