#include "gateway/api/build_work.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/wire/decoding_params_wire.h"
#include "tests/unit/gateway_api/served_model.h"

namespace cinnabar {
namespace {

using Endpoint = GenerationRequest::Endpoint;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kTemplate[] =
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}";

ServedModel ChatModel() {
  ServedModel model = TinyModel();
  model.chat_template = *ChatTemplate::Parse(kTemplate);
  return model;
}

GenerationRequest Request(Endpoint endpoint, const std::string& body) {
  const ApiResult<GenerationRequest> request = ParseGenerationRequest(endpoint, body);
  CINNABAR_CHECK(request.ok()) << ErrorBody(request.error());
  return *request;
}

// A completion with `fields` after model and prompt.
GenerationRequest Completion(const std::string& fields = "",
                             const std::string& prompt = "\"x = \"") {
  return Request(Endpoint::kCompletion, absl::StrCat(R"({"model": "tiny", "prompt": )", prompt,
                                                     fields.empty() ? "" : ", ", fields, "}"));
}

Work BuildOk(const GenerationRequest& request, const ServedModel& model, int32_t choice = 0,
             uint64_t random = 7) {
  const ApiResult<Work> work = BuildWork(request, model, choice, random);
  CINNABAR_CHECK(work.ok()) << ErrorBody(work.error());
  return *work;
}

ApiError BuildError(const GenerationRequest& request, const ServedModel& model) {
  const ApiResult<Work> work = BuildWork(request, model, 0, 7);
  CINNABAR_CHECK(!work.ok());
  return work.error();
}

std::vector<TokenId> With(TokenId first, const std::vector<TokenId>& rest) {
  std::vector<TokenId> all = {first};
  all.insert(all.end(), rest.begin(), rest.end());
  return all;
}

std::vector<TokenId> IdsOf(const Work& work) {
  return {work.item.ids().begin(), work.item.ids().end()};
}

TEST(BuildWorkTest, ACompletionIsPromptAndCanvas) {
  const Work work = BuildOk(Completion(R"("max_tokens": 8)"), TinyModel());
  const std::vector<TokenId> prompt = With(kTinyBos, TinyTokenizer().Encode("x = "));
  std::vector<TokenId> want = prompt;
  want.resize(prompt.size() + 8, kTinyMask);
  EXPECT_THAT(IdsOf(work), ElementsAreArray(want));
  const int32_t begin = static_cast<int32_t>(prompt.size());
  EXPECT_EQ(work.item.format(), 1);
  EXPECT_EQ(work.item.model(), "tiny");
  EXPECT_EQ(work.item.model_fingerprint(), "fp-1");
  ASSERT_EQ(work.item.undecided_size(), 1);
  EXPECT_EQ(work.item.undecided(0).begin(), begin);
  EXPECT_EQ(work.item.undecided(0).end(), begin + 8);
  EXPECT_EQ(work.item.answer().begin(), begin);
  EXPECT_EQ(work.item.answer().end(), begin + 8);
  EXPECT_TRUE(work.item.stop_at_end_of_text());
  const DecodingParams params = *FromWire(work.item.params());
  EXPECT_EQ(params.sampler, "low_confidence");
  EXPECT_EQ(params.num_steps, 8);
  EXPECT_EQ(params.block_length, 8);
  EXPECT_EQ(params.seed, 7);
  EXPECT_EQ(params.pickable_ids,
            TinyTokenizer().vocab_size() < 2048 ? TinyTokenizer().vocab_size() : 0);
  EXPECT_EQ(work.hint.model(), "tiny");
  EXPECT_EQ(work.hint.sampler(), "low_confidence");
  EXPECT_EQ(work.hint.threshold_percent(), 0);
  EXPECT_EQ(work.hint.steps_budget(), 8);
  EXPECT_EQ(work.hint.steps_min(), 0);
  EXPECT_EQ(work.prompt_tokens, begin);
  EXPECT_EQ(work.canvas_tokens, 8);
  EXPECT_EQ(work.cost, (begin + 8) * 8);
  EXPECT_EQ(work.steps_max, 8 + 1 + 2);
  EXPECT_EQ(work.input_price_microdollars, (begin + 3) / 4);  // 0.25 a token, rounded up
  EXPECT_EQ(work.output_price_microdollars, 12);
  EXPECT_EQ(work.text.begin, begin);
  EXPECT_EQ(work.text.end, begin + 8);
  EXPECT_THAT(work.text.end_tokens, ElementsAre(kTinyEos));
  EXPECT_TRUE(work.text.commits_stay);
  EXPECT_EQ(work.text.echo, "");
  EXPECT_THAT(work.warnings, IsEmpty());
}

TEST(BuildWorkTest, ASuffixFollowsTheCanvas) {
  for (const Endpoint endpoint : {Endpoint::kCompletion, Endpoint::kFim}) {
    const Work work = BuildOk(
        Request(endpoint, R"({"model": "tiny", "prompt": "a", "suffix": " b", "max_tokens": 3})"),
        TinyModel());
    std::vector<TokenId> want = With(kTinyBos, TinyTokenizer().Encode("a"));
    const size_t begin = want.size();
    want.resize(begin + 3, kTinyMask);
    const std::vector<TokenId> suffix = TinyTokenizer().Encode(" b");
    want.insert(want.end(), suffix.begin(), suffix.end());
    EXPECT_THAT(IdsOf(work), ElementsAreArray(want));
    EXPECT_EQ(work.item.undecided(0).end(), begin + 3);
    EXPECT_EQ(work.prompt_tokens, begin + suffix.size());
    EXPECT_EQ(work.cost, want.size() * 3);
  }
}

TEST(BuildWorkTest, TheMaskTokensTextIsText) {
  for (const std::string field : {"prompt", "suffix"}) {
    const Work work = BuildOk(
        Request(Endpoint::kFim,
                absl::StrCat(R"({"model": "tiny", "max_tokens": 2, "prompt": "a", ")",
                             field == "prompt" ? "x" : "suffix", R"(": "<mask><eos><bos>"})")),
        TinyModel());
    for (int32_t i = 1; i < work.item.ids_size(); ++i) {
      const bool undecided =
          i >= work.item.undecided(0).begin() && i < work.item.undecided(0).end();
      EXPECT_EQ(work.item.ids(i) <= 3, undecided) << i;
    }
  }
  const Work prompt = BuildOk(Completion(R"("max_tokens": 2)", R"("<mask>")"), TinyModel());
  EXPECT_GT(prompt.prompt_tokens, 3);
}

TEST(BuildWorkTest, AChatGoesThroughTheTemplate) {
  const GenerationRequest request = Request(
      Endpoint::kChat,
      R"({"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi<eos><mask>"}]})");
  const Work work = BuildOk(request, ChatModel());
  std::vector<TokenId> want = {kTinyBos};
  const auto append = [&](const std::vector<TokenId>& ids) {
    want.insert(want.end(), ids.begin(), ids.end());
  };
  const std::vector<TokenId> ids = IdsOf(work);
  // The template's tokens are tokens, the user's text is text.
  EXPECT_EQ(std::count(ids.begin(), ids.begin() + work.text.begin, kTinyBos), 2);
  EXPECT_EQ(std::count(ids.begin(), ids.begin() + work.text.begin, kTinyEos), 1);
  EXPECT_EQ(std::count(ids.begin(), ids.begin() + work.text.begin, kTinyMask), 0);
  append(TinyTokenizer().Encode("user\nhi<eos><mask>"));
  append({kTinyEos, kTinyBos});
  append(TinyTokenizer().Encode("assistant\n"));
  want.resize(want.size() + 4, kTinyMask);
  EXPECT_THAT(ids, ElementsAreArray(want));
  EXPECT_EQ(work.text.echo, "");
}

TEST(BuildWorkTest, ChatsThatCannotBe) {
  const GenerationRequest request = Request(
      Endpoint::kChat, R"({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]})");
  const ApiError none = BuildError(request, TinyModel());
  EXPECT_EQ(none.http_status, 400);
  EXPECT_EQ(none.param, "model");
  EXPECT_THAT(none.message, HasSubstr("/v1/completions"));

  ServedModel model = TinyModel();
  model.chat_template = *ChatTemplate::Parse("{{ raise_exception('roles must alternate') }}");
  const ApiError raised = BuildError(request, model);
  EXPECT_EQ(raised.http_status, 400);
  EXPECT_EQ(raised.param, "messages");
  EXPECT_THAT(raised.message, HasSubstr("roles must alternate"));

  // What the template needs and does not get is our fault, not the client's.
  model.chat_template = *ChatTemplate::Parse("{{ strftime_now('%Y') }}{{ messages[0].content }}");
  EXPECT_EQ(BuildError(request, model).http_status, 500);
  EXPECT_TRUE(BuildWork(request, model, 0, 0, absl::FromUnixSeconds(1'700'000'000)).ok());
}

TEST(BuildWorkTest, TokenIdsAreTakenAsTheyAre) {
  const Work work = BuildOk(Completion(R"("max_tokens": 1)", "[5, 1, 2047]"), TinyModel());
  EXPECT_THAT(IdsOf(work), ElementsAre(5, 1, 2047, kTinyMask));
  EXPECT_EQ(BuildOk(Completion(R"("max_tokens": 1)", "[[]]"), TinyModel()).prompt_tokens, 0);
  const ApiError large = BuildError(Completion("", "[5, 2048]"), TinyModel());
  EXPECT_EQ(large.param, "prompt");
  EXPECT_THAT(large.message, HasSubstr("2048"));
  const ApiError mask = BuildError(Completion("", "[5, 0]"), TinyModel());
  EXPECT_EQ(mask.param, "prompt");
  EXPECT_THAT(mask.message, HasSubstr("mask token"));
}

TEST(BuildWorkTest, EchoIsThePromptsText) {
  EXPECT_EQ(BuildOk(Completion(R"("echo": true)"), TinyModel()).text.echo, "x = ");
  const std::vector<TokenId> ids = TinyTokenizer().Encode("x = ");
  EXPECT_EQ(
      BuildOk(Completion(R"("echo": true)", absl::StrCat("[2, ", absl::StrJoin(ids, ", "), "]")),
              TinyModel())
          .text.echo,
      "x = ");
}

TEST(BuildWorkTest, TheCanvasIsWhatWasAskedForOrTheDefaultThatFits) {
  const ServedModel model = TinyModel();
  EXPECT_EQ(BuildOk(Completion(), model).canvas_tokens, 64);
  EXPECT_EQ(BuildOk(Completion(R"("max_tokens": 128)"), model).canvas_tokens, 128);
  EXPECT_EQ(BuildOk(Completion(R"("max_tokens": 100, "diffusion": {"canvas_tokens": 20})"), model)
                .canvas_tokens,
            20);
  std::string ids = "5";
  for (int i = 1; i < 180; ++i) ids += ",5";
  // 180 of 192: the default shrinks, a number that was asked for does not.
  const std::string prompt = absl::StrCat("[", ids, "]");
  EXPECT_EQ(BuildOk(Completion("", prompt), model).canvas_tokens, 12);
  EXPECT_EQ(BuildOk(Completion(R"("max_tokens": 12)", prompt), model).canvas_tokens, 12);
  const ApiError error = BuildError(Completion(R"("max_tokens": 13)", prompt), model);
  EXPECT_EQ(error.code, "context_length_exceeded");
  EXPECT_EQ(error.param, "prompt");
  EXPECT_THAT(error.message,
              HasSubstr("192 tokens. The request has 193: 180 in the prompt and 13"));
  for (int i = 180; i < 192; ++i) ids += ",5";
  EXPECT_EQ(BuildError(Completion("", absl::StrCat("[", ids, "]")), model).code,
            "context_length_exceeded");

  const ApiError too_many = BuildError(Completion(R"("max_tokens": 129)"), model);
  EXPECT_EQ(too_many.code, "invalid_value");
  EXPECT_EQ(too_many.param, "max_tokens");
  EXPECT_THAT(too_many.message, HasSubstr("128"));
  EXPECT_EQ(BuildError(Completion(R"("diffusion": {"canvas_tokens": 129})"), model).param,
            "diffusion.canvas_tokens");

  ServedModel narrow = TinyModel();
  narrow.context_tokens_max = 20;
  EXPECT_EQ(ContextTokensMax(narrow), 20);
  EXPECT_EQ(BuildOk(Completion("", "[5,5]"), narrow).canvas_tokens, 18);
  narrow.context_tokens_max = 2000;
  EXPECT_EQ(ContextTokensMax(narrow), 192);
}

TEST(BuildWorkTest, ChatsNameTheMessages) {
  ServedModel model = ChatModel();
  model.context_tokens_max = 10;
  EXPECT_EQ(BuildError(Request(Endpoint::kChat, R"({"model": "tiny", "max_tokens": 9,
                "messages": [{"role": "user", "content": "hi"}]})"),
                       model)
                .param,
            "messages");
}

TEST(BuildWorkTest, BlockCausalModelsFillUpTheirLastBlock) {
  ServedModel model = TinyModel();
  model.traits.causal_block_length = 16;
  model.traits.positions_max = 100;  // 6 whole blocks
  model.traits.default_sampler = "block_dynamic";
  const Work work = BuildOk(Completion(R"("max_tokens": 20)", "[5,5,5]"), model);
  EXPECT_EQ(work.item.ids_size(), 23);
  EXPECT_EQ(work.item.params().block_length(), 16);
  EXPECT_EQ(work.item.params().num_steps(), 32);
  EXPECT_EQ(work.hint.threshold_percent(), 90);
  // 23 positions become 32: 29 to decide, two blocks.
  EXPECT_EQ(work.steps_max, 32 + 16 + 2 + 2);
  const ApiError error = BuildError(Completion(R"("max_tokens": 94)", "[5,5,5]"), model);
  EXPECT_THAT(error.message, HasSubstr("maximum context length is 96"));
  EXPECT_EQ(BuildOk(Completion(R"("max_tokens": 93)", "[5,5,5]"), model).canvas_tokens, 93);
  // With a suffix the canvas does not reach the end.
  EXPECT_EQ(
      BuildOk(Completion(R"("max_tokens": 94, "suffix": "a")", "[5,5,5]"), model).canvas_tokens,
      94);
}

TEST(BuildWorkTest, SeedsDifferBetweenChoices) {
  const GenerationRequest seeded = Completion(R"("n": 2, "seed": 18446744073709551615)");
  EXPECT_EQ(BuildOk(seeded, TinyModel(), 0).item.params().seed(), ~uint64_t{0});
  EXPECT_EQ(BuildOk(seeded, TinyModel(), 1).item.params().seed(), 0);
  EXPECT_EQ(BuildOk(Completion(R"("n": 2)"), TinyModel(), 1, 40).item.params().seed(), 41);
}

TEST(BuildWorkTest, ChoicesArePromptsTimesAnswers) {
  const GenerationRequest request =
      Completion(R"("n": 2, "max_tokens": 4, "temperature": 1)", R"(["a", [7, 8]])");
  const ApiResult<std::vector<Work>> all = BuildAllWork(request, TinyModel(), 100);
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(all->size(), 4);
  for (int32_t choice = 0; choice < 4; ++choice) {
    const Work one = BuildOk(request, TinyModel(), choice, 100);
    EXPECT_EQ((*all)[choice].item.SerializeAsString(), one.item.SerializeAsString()) << choice;
    EXPECT_EQ(one.item.params().seed(), 100 + choice);
    EXPECT_EQ(one.item.ids(0), choice < 2 ? kTinyBos : 7);
  }
  EXPECT_EQ(BuildAllWork(Completion("", R"(["a", [5000]])"), TinyModel(), 0).error().param,
            "prompt");
}

TEST(BuildWorkTest, ParamsAreResolvedAndErrorsNameTheField) {
  struct Case {
    const char* fields;
    const char* param;
    const char* message;
  };
  const Case cases[] = {
      {R"("diffusion": {"threshold": 0.5})", "diffusion.threshold", "use threshold, fast_dllm_v2"},
      {R"("diffusion": {"alg_temp": 0.5})", "diffusion.alg_temp", "does not read it"},
      {R"("diffusion": {"sampler": "threshold", "steps": 8})", "diffusion.steps",
       "diffusion.steps: sampler"},
      {R"("diffusion": {"sampler": "sedd_euler"})", "diffusion.sampler", "needs a model"},
      {R"("max_tokens": 12, "diffusion": {"block_length": 4, "steps": 8})", "diffusion.steps",
       "use 6 or 9"},
      {R"("diffusion": {"sampler": "mdlm_cached", "block_length": 4})", "diffusion.block_length",
       "leave it out"},
      {R"("diffusion": {"sampler": "threshold", "steps_min": 4})", "diffusion.steps_min",
       "no step budget"},
      {R"("max_tokens": 4, "diffusion": {"steps_min": 5})", "diffusion.steps_min", "above the 4"},
      {R"("temperature": 1e-7)", "temperature", "use 0 or at least"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.fields);
    const ApiError error = BuildError(Completion(c.fields), TinyModel());
    EXPECT_EQ(error.http_status, 400);
    EXPECT_EQ(error.code, "invalid_value");
    EXPECT_EQ(error.param, c.param);
    EXPECT_THAT(error.message, HasSubstr(c.message));
    EXPECT_THAT(error.message, HasSubstr(c.param));
  }
  ServedModel nameless = TinyModel();
  nameless.traits.default_sampler = "";
  EXPECT_EQ(BuildError(Completion(), nameless).param, "diffusion.sampler");
}

TEST(BuildWorkTest, SamplersWithoutABudgetMayNeedAStepForEachPosition) {
  const Work work = BuildOk(
      Completion(R"("max_tokens": 10, "diffusion": {"sampler": "threshold", "threshold": 0.75,
                    "may_degrade": true})",
                 "[5,5]"),
      TinyModel());
  EXPECT_EQ(work.hint.steps_budget(), 10);
  EXPECT_EQ(work.hint.steps_min(), 0);
  EXPECT_EQ(work.hint.threshold_percent(), 75);
  EXPECT_EQ(work.cost, 12 * 10);
  EXPECT_GE(work.steps_max, 10);
}

TEST(BuildWorkTest, StepsMayBeLowered) {
  const auto steps_min = [](const char* diffusion) {
    return BuildOk(Completion(absl::StrCat(R"("max_tokens": 12, "diffusion": {"block_length": 4, )",
                                           diffusion, "}")),
                   TinyModel())
        .hint.steps_min();
  };
  EXPECT_EQ(steps_min(R"("steps": 12)"), 0);
  EXPECT_EQ(steps_min(R"("steps": 12, "may_degrade": true)"), 6);
  EXPECT_EQ(steps_min(R"("steps": 9, "may_degrade": true)"), 6);  // half is 5: whole blocks
  EXPECT_EQ(steps_min(R"("steps": 12, "steps_min": 4)"), 6);
  EXPECT_EQ(steps_min(R"("steps": 12, "steps_min": 1)"), 3);
  EXPECT_EQ(steps_min(R"("steps": 3, "may_degrade": true)"), 0);  // nothing to lower
}

TEST(BuildWorkTest, GuidanceCostsTwice) {
  const Work plain = BuildOk(Completion(R"("max_tokens": 4)"), TinyModel());
  const Work guided =
      BuildOk(Completion(R"("max_tokens": 4, "diffusion": {"cfg_scale": 1})"), TinyModel());
  EXPECT_EQ(guided.cost, 2 * plain.cost);
}

TEST(BuildWorkTest, KnobsThatTheSamplerDoesNotReadAreDroppedWithAWarning) {
  const Work work =
      BuildOk(Completion(R"("top_p": 0.5, "top_k": 5, "temperature": 0.5)"), TinyModel());
  EXPECT_EQ(work.item.params().top_p(), 1);
  EXPECT_EQ(work.item.params().top_k(), 0);
  EXPECT_FLOAT_EQ(work.item.params().temperature(), 0.5);
  EXPECT_THAT(work.warnings, ElementsAre(HasSubstr("top_p"), HasSubstr("top_k")));
  const Work dream = BuildOk(
      Completion(R"("top_p": 0.5, "top_k": 5, "diffusion": {"sampler": "entropy"})"), TinyModel());
  EXPECT_FLOAT_EQ(dream.item.params().top_p(), 0.5);
  EXPECT_THAT(dream.warnings, IsEmpty());

  ServedModel sedd = TinyModel();
  sedd.traits.parameterization = Parameterization::kUniformScore;
  sedd.traits.mask_token = -1;
  sedd.traits.default_sampler = "sedd_analytic";
  const Work score = BuildOk(Completion(R"("temperature": 0.7, "max_tokens": 4)"), sedd);
  EXPECT_EQ(score.item.params().temperature(), 0);
  EXPECT_THAT(score.warnings, ElementsAre(HasSubstr("temperature")));
  EXPECT_FALSE(score.text.commits_stay);
}

TEST(BuildWorkTest, EqualAnswersAreWarnedOf) {
  EXPECT_THAT(BuildOk(Completion(R"("n": 3)"), TinyModel()).warnings,
              ElementsAre(HasSubstr("3 answers are the same")));
  EXPECT_THAT(BuildOk(Completion(R"("n": 3, "temperature": 1)"), TinyModel()).warnings, IsEmpty());
  EXPECT_THAT(
      BuildOk(Completion(R"("n": 3, "diffusion": {"sampler": "random"})"), TinyModel()).warnings,
      IsEmpty());
}

TEST(BuildWorkTest, TheModelsDefaultsTakeThePlaceOfWhatIsLeftOut) {
  ServedModel model = TinyModel();
  model.defaults.sampler = "block_dynamic";
  model.defaults.threshold = 0.7F;
  model.defaults.block_length = 16;
  model.defaults.num_steps = 32;  // for a canvas of 64
  model.defaults.temperature = 0.5F;
  model.defaults.forbidden_ids = {9};
  ASSERT_TRUE(CheckServedModel(model).ok());
  const v1::DecodingParams whole = BuildOk(Completion(), model).item.params();
  EXPECT_EQ(whole.sampler(), "block_dynamic");
  EXPECT_FLOAT_EQ(whole.threshold(), 0.7F);
  EXPECT_EQ(whole.num_steps(), 32);
  EXPECT_FLOAT_EQ(whole.temperature(), 0.5F);
  EXPECT_EQ(whole.forbidden_ids_size(), 0);
  // The steps follow the canvas, in whole blocks.
  const auto steps = [&](int canvas) {
    return BuildOk(Completion(absl::StrCat("\"max_tokens\": ", canvas)), model)
        .item.params()
        .num_steps();
  };
  EXPECT_EQ(steps(128), 64);
  EXPECT_EQ(steps(40), 21);  // 20 over 3 blocks
  EXPECT_EQ(steps(3), 2);
  // What was asked for wins; another sampler does not inherit knobs it may not read.
  EXPECT_FLOAT_EQ(
      BuildOk(Completion(R"("diffusion": {"threshold": 0.95})"), model).item.params().threshold(),
      0.95F);
  const v1::DecodingParams other =
      BuildOk(Completion(R"("diffusion": {"sampler": "low_confidence"})"), model).item.params();
  EXPECT_EQ(other.num_steps(), 64);
  EXPECT_FLOAT_EQ(other.threshold(), DecodingParams().threshold);
  EXPECT_FLOAT_EQ(other.temperature(), 0.5F);
  EXPECT_FLOAT_EQ(BuildOk(Completion(R"("temperature": 0)"), model).item.params().temperature(), 0);
  EXPECT_EQ(BuildOk(Completion(R"("diffusion": {"sampler": "block_dynamic"})"), model)
                .item.params()
                .num_steps(),
            32);
}

TEST(BuildWorkTest, RowsOfAPaddedVocabularyAreNeverPicked) {
  ServedModel model = TinyModel();
  model.traits.vocab_size = 4096;
  EXPECT_EQ(BuildOk(Completion(), model).item.params().pickable_ids(),
            TinyTokenizer().vocab_size());
}

TEST(BuildWorkTest, StopStringsAndEndTokensGoToTheAssembler) {
  ServedModel model = TinyModel();
  model.traits.eot_token = 3;
  const Work work = BuildOk(Completion(R"("stop": ["a", "b"])"), model);
  EXPECT_THAT(work.text.stop, ElementsAre("a", "b"));
  EXPECT_THAT(work.text.end_tokens, ElementsAre(kTinyEos, 3));
}

// Every sampler that fits, over canvases and blocks: what is built is what a worker will accept.
TEST(BuildWorkTest, WhatIsBuiltResolvesAgainToTheSame) {
  for (const SamplerEntry& entry : SamplerCatalog()) {
    for (const int canvas : {1, 7, 32, 100}) {
      for (const bool causal : {false, true}) {
        ServedModel model = TinyModel();
        model.traits.causal_block_length = causal ? 8 : 0;
        const ApiResult<Work> work = BuildWork(
            Completion(absl::StrCat(R"("max_tokens": )", canvas, R"(, "diffusion": {"sampler": ")",
                                    entry.name, "\"}")),
            model, 0, 1);
        if (!work.ok()) {
          EXPECT_TRUE(absl::string_view(entry.name).substr(0, 5) == "sedd_" || entry.moves_tokens ||
                      entry.name == "gemma_renoise")
              << ErrorBody(work.error());
          continue;
        }
        const DecodingParams params = *FromWire(work->item.params());
        const absl::StatusOr<DecodingParams> again =
            ResolveParams(params, model.traits, canvas, canvas, work->text.begin);
        ASSERT_TRUE(again.ok()) << again.status();
        EXPECT_EQ(ToWire(*again).SerializeAsString(), work->item.params().SerializeAsString());
        EXPECT_GE(work->steps_max, std::max(params.num_steps, canvas));
        EXPECT_GT(work->cost, 0);
      }
    }
  }
}

TEST(CheckServedModelTest, FindsWhatIsWrong) {
  EXPECT_TRUE(CheckServedModel(TinyModel()).ok());
  EXPECT_TRUE(CheckServedModel(ChatModel()).ok());
  const auto message = [](auto change) {
    ServedModel model = TinyModel();
    change(model);
    return std::string(CheckServedModel(model).message());
  };
  EXPECT_THAT(message([](ServedModel& m) { m.name = ""; }), HasSubstr("without a name"));
  EXPECT_THAT(message([](ServedModel& m) { m.traits.positions_max = 1; }), HasSubstr("no room"));
  EXPECT_THAT(message([](ServedModel& m) { m.default_canvas_tokens = 0; }),
              HasSubstr("at least 1"));
  EXPECT_THAT(message([](ServedModel& m) { m.traits.vocab_size = 100; }),
              HasSubstr("vocabulary 100"));
  EXPECT_THAT(message([](ServedModel& m) { m.traits.mask_token = 40; }), HasSubstr("mask token"));
  EXPECT_THAT(message([](ServedModel& m) { m.traits.default_sampler = ""; }), HasSubstr("sampler"));
  EXPECT_THAT(message([](ServedModel& m) { m.defaults.threshold = 0.5F; }), HasSubstr("threshold"));
}

TEST(IsCalledTest, NamesAndAliases) {
  EXPECT_TRUE(IsCalled(TinyModel(), "tiny"));
  EXPECT_TRUE(IsCalled(TinyModel(), "mercury-coder"));
  EXPECT_FALSE(IsCalled(TinyModel(), "Tiny"));
  EXPECT_FALSE(IsCalled(TinyModel(), ""));
}

}  // namespace
}  // namespace cinnabar
