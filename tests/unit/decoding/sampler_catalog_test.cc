// The catalog that requests are checked against, the registry that implements it, and
// ResolveParams.
#include "common/request/sampler_catalog.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "tests/unit/decoding/decoding_harness.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr Knob kAllKnobs[] = {Knob::kNumSteps,
                              Knob::kBlockLength,
                              Knob::kTopP,
                              Knob::kTopK,
                              Knob::kThreshold,
                              Knob::kFactor,
                              Knob::kEntropyBound,
                              Knob::kAlgTemp,
                              Knob::kEps,
                              Knob::kCfgScale,
                              Knob::kEosSwitches,
                              Knob::kEta,
                              Knob::kRemaskingWindow,
                              Knob::kEditing,
                              Knob::kLowThreshold,
                              Knob::kEosEarlyStop,
                              Knob::kKvReuse,
                              Knob::kSubBlockLength,
                              Knob::kCooling,
                              Knob::kAdaptiveStop,
                              Knob::kRepeatPenalty};

std::vector<std::string> CatalogNames() {
  std::vector<std::string> names;
  for (const SamplerEntry& entry : SamplerCatalog()) names.emplace_back(entry.name);
  return names;
}

// --- Catalog and registry
// ----------------------------------------------------------------------------------

TEST(SamplerCatalogTest, NamesAndAliasesAreUniqueAndWellFormed) {
  std::set<std::string> seen;
  for (const SamplerEntry& entry : SamplerCatalog()) {
    SCOPED_TRACE(entry.name);
    EXPECT_TRUE(seen.insert(std::string(entry.name)).second);
    if (!entry.alias.empty()) {
      EXPECT_TRUE(seen.insert(std::string(entry.alias)).second);
    }
    for (const absl::string_view name : {entry.name, entry.alias}) {
      // FindSampler compares normalised names, so that any other spelling would never be found.
      EXPECT_EQ(std::string(name), absl::StrReplaceAll(absl::AsciiStrToLower(name), {{"-", "_"}}));
    }
    EXPECT_FALSE(entry.name.empty());
    EXPECT_FALSE(entry.source.empty());
    EXPECT_FALSE(entry.summary.empty());
    EXPECT_THAT(std::string(entry.summary), testing::Not(HasSubstr("\n")));
  }
}

TEST(SamplerCatalogTest, IsTheListThatIsRegistered) {
  std::vector<std::string> registered;
  for (const absl::string_view name : RegisteredSamplers()) registered.emplace_back(name);
  EXPECT_THAT(registered, ElementsAreArray(CatalogNames()));
  std::set<const Sampler*> samplers;
  for (const SamplerEntry& entry : SamplerCatalog()) {
    const absl::StatusOr<const Sampler*> sampler = GetSampler(entry.name);
    ASSERT_TRUE(sampler.ok()) << sampler.status();
    EXPECT_TRUE(samplers.insert(*sampler).second) << entry.name << " is another one's object";
    EXPECT_EQ(*GetSampler(entry.name), *sampler) << "a singleton";
    if (!entry.alias.empty()) {
      EXPECT_EQ(*GetSampler(entry.alias), *sampler) << entry.alias;
    }
  }
}

TEST(SamplerCatalogTest, KnobsAreThoseOfTheSources) {
  const std::set<Knob> guided_blocks = {Knob::kBlockLength, Knob::kCfgScale};
  const auto with = [](std::set<Knob> knobs, std::initializer_list<Knob> more) {
    knobs.insert(more);
    return knobs;
  };
  const auto llada = with(guided_blocks, {Knob::kNumSteps, Knob::kEosSwitches});
  const auto fast_dllm = with(guided_blocks, {Knob::kEosSwitches});
  const auto dream = with(guided_blocks, {Knob::kNumSteps, Knob::kTopP, Knob::kTopK, Knob::kEps});
  const std::set<Knob> sdar = {Knob::kNumSteps, Knob::kBlockLength, Knob::kTopP, Knob::kTopK,
                               Knob::kEosEarlyStop};
  const std::set<Knob> remdm = {Knob::kNumSteps, Knob::kTopP};
  const std::map<std::string, std::set<Knob>> want = {
      {"low_confidence", with(llada, {Knob::kKvReuse})},
      {"random", llada},
      {"origin", dream},
      {"maskgit_plus", with(dream, {Knob::kAlgTemp})},
      {"topk_margin", with(dream, {Knob::kAlgTemp})},
      {"entropy", with(dream, {Knob::kAlgTemp})},
      {"threshold", with(fast_dllm, {Knob::kThreshold, Knob::kKvReuse})},
      {"factor", with(fast_dllm, {Knob::kFactor, Knob::kKvReuse})},
      {"fast_dllm_v2",
       {Knob::kThreshold, Knob::kBlockLength, Knob::kTopP, Knob::kSubBlockLength, Knob::kKvReuse}},
      {"entropy_bounded", with(guided_blocks, {Knob::kEntropyBound})},
      {"block_static", sdar},
      {"block_dynamic", with(sdar, {Knob::kThreshold})},
      {"block_sequential", sdar},
      {"mdlm_ancestral", {Knob::kNumSteps}},
      {"mdlm_cached", {Knob::kNumSteps}},
      {"mdlm_semi_ar", {Knob::kNumSteps, Knob::kBlockLength}},
      {"sedd_euler", {Knob::kNumSteps}},
      {"sedd_analytic", {Knob::kNumSteps}},
      {"remdm_cap", with(remdm, {Knob::kEta})},
      {"remdm_rescale", with(remdm, {Knob::kEta})},
      {"remdm_conf", remdm},
      {"remdm_loop", with(remdm, {Knob::kEta, Knob::kRemaskingWindow})},
      {"dfm_corrector", remdm},
      {"p2", with(guided_blocks, {Knob::kNumSteps, Knob::kEta})},
      {"p2_random", with(guided_blocks, {Knob::kNumSteps, Knob::kEta})},
      {"p2_open", with(guided_blocks, {Knob::kNumSteps, Knob::kTopP, Knob::kTopK})},
      {"rnd1", with(guided_blocks, {Knob::kNumSteps, Knob::kTopP, Knob::kTopK})},
      {"rnd1_entropy_bounded",
       with(guided_blocks, {Knob::kEntropyBound, Knob::kTopP, Knob::kTopK})},
      {"joint_threshold",
       {Knob::kBlockLength, Knob::kThreshold, Knob::kEditing, Knob::kRepeatPenalty, Knob::kTopP,
        Knob::kTopK, Knob::kEosEarlyStop}},
      {"joint_threshold_indel",
       {Knob::kBlockLength, Knob::kThreshold, Knob::kEditing, Knob::kEosEarlyStop}},
      {"hierarchical", with(fast_dllm, {Knob::kThreshold, Knob::kLowThreshold})},
      {"hierarchical_remask", with(fast_dllm, {Knob::kThreshold, Knob::kLowThreshold})},
      {"credit", with(guided_blocks, {Knob::kThreshold})},
      {"bd3lm_first_hitting", {Knob::kBlockLength, Knob::kTopP, Knob::kEosEarlyStop}},
      {"bd3lm_scheduled", {Knob::kNumSteps, Knob::kBlockLength, Knob::kTopP, Knob::kEosEarlyStop}},
      {"gemma_renoise",
       {Knob::kNumSteps, Knob::kEntropyBound, Knob::kCooling, Knob::kAdaptiveStop}},
  };
  ASSERT_EQ(want.size(), SamplerCatalog().size());
  for (const SamplerEntry& entry : SamplerCatalog()) {
    uint32_t bits = 0;
    for (const Knob knob : want.at(std::string(entry.name))) bits |= static_cast<uint32_t>(knob);
    EXPECT_EQ(entry.knobs, bits) << entry.name;
  }
}

TEST(FindSamplerTest, ByNameOrAliasHoweverSpelt) {
  const std::map<std::string, std::string> cases = {
      {"low_confidence", "low_confidence"},
      {"low-confidence", "low_confidence"},
      {"Low-Confidence", "low_confidence"},
      {"ENTROPY", "entropy"},
      {"maskgit-plus", "maskgit_plus"},
      {"static", "block_static"},
      {"dynamic", "block_dynamic"},
      {"Sequential", "block_sequential"},
      {"ddpm", "mdlm_ancestral"},
      {"ddpm-cache", "mdlm_cached"},
      {"euler", "sedd_euler"},
      {"analytic", "sedd_analytic"},
  };
  for (const auto& [spelt, name] : cases) {
    const absl::StatusOr<const SamplerEntry*> entry = FindSampler(spelt);
    ASSERT_TRUE(entry.ok()) << entry.status();
    EXPECT_EQ((*entry)->name, name) << spelt;
  }
}

TEST(FindSamplerTest, AnUnknownNameListsTheNames) {
  for (const char* name : {"", "low_confidence ", "lowconfidence", "_", "sedd", "block"}) {
    const absl::Status status = FindSampler(name).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << name;
    for (const std::string& known : CatalogNames()) {
      EXPECT_THAT(std::string(status.message()), HasSubstr(known));
    }
    EXPECT_EQ(GetSampler(name).status().code(), absl::StatusCode::kNotFound);
  }
}

// --- ResolveParams: errors
// ---------------------------------------------------------------------------------

struct ErrorCase {
  DecodingParams params;
  std::string starts_with;  // the field, and what follows it
  std::string says = "";    // the fix
  ModelTraits model = MaskModel();
};

void ExpectError(const ErrorCase& c, int32_t num_masked = 12, int32_t canvas_length = 12,
                 int32_t canvas_begin = 0) {
  const absl::Status status =
      ResolveParams(c.params, c.model, num_masked, canvas_length, canvas_begin).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.starts_with;
  EXPECT_THAT(std::string(status.message()), StartsWith(c.starts_with));
  EXPECT_THAT(std::string(status.message()), HasSubstr(c.says));
}

TEST(ResolveParamsErrorTest, RangesNameTheField) {
  for (const ErrorCase& c : std::vector<ErrorCase>{
           {{.num_steps = -1}, "num_steps: -1 ", "one step per position"},
           {{.num_steps = 65537}, "num_steps: 65537 ", "65536"},
           {{.block_length = -1}, "block_length: -1 ", "0 takes the default"},
           {{.temperature = -0.5F}, "temperature: -0.5", "use 0 or at least"},
           {{.temperature = 1e-9F}, "temperature: 1e-09", "use 0 or at least"},
           {{.temperature = kNan}, "temperature: nan"},
           {{.temperature = kInfinity}, "temperature: inf"},
           {{.sampler = "entropy", .top_p = 0.0F}, "top_p: 0 ", "(0, 1]"},
           {{.sampler = "entropy", .top_p = -0.1F}, "top_p: -0.1"},
           {{.sampler = "entropy", .top_p = 1.01F}, "top_p: 1.01"},
           {{.sampler = "entropy", .top_p = kNan}, "top_p: nan"},
           {{.sampler = "entropy", .top_k = -1}, "top_k: -1 ", "0 switches it off"},
           {{.sampler = "threshold", .threshold = -0.1F}, "threshold: -0.1", "[0, 1]"},
           {{.sampler = "threshold", .threshold = 1.1F}, "threshold: 1.1"},
           {{.sampler = "threshold", .threshold = kNan}, "threshold: nan"},
           {{.sampler = "factor", .factor = 0.0F}, "factor: 0", "above 0"},
           {{.sampler = "factor", .factor = -1.0F}, "factor: -1"},
           {{.sampler = "factor", .factor = kInfinity}, "factor: inf"},
           {{.sampler = "factor", .factor = kNan}, "factor: nan"},
           {{.sampler = "entropy_bounded", .entropy_bound = -0.1F},
            "entropy_bound: -0.1",
            "0 or more"},
           {{.sampler = "entropy_bounded", .entropy_bound = kNan}, "entropy_bound: nan"},
           {{.sampler = "entropy", .alg_temp = -1.0F}, "alg_temp: -1", "use 0 or at least"},
           {{.sampler = "entropy", .alg_temp = 1e-8F}, "alg_temp: 1e-08"},
           {{.sampler = "entropy", .alg_temp = kNan}, "alg_temp: nan"},
           {{.sampler = "entropy", .eps = 0.0F}, "eps: 0 ", "(0, 1)"},
           {{.sampler = "entropy", .eps = 1.0F}, "eps: 1 "},
           {{.sampler = "entropy", .eps = kNan}, "eps: nan"},
           {{.temperature_end = 0.0F}, "temperature_end: 0; ", "at least"},
           {{.temperature_end = kNan}, "temperature_end: nan"},
           {{.temperature_start = 0.3F}, "temperature_start: 0.3", "at least temperature_end, 0.4"},
           {{.temperature_start = kInfinity}, "temperature_start: inf"},
           {{.stable_steps = -1}, "stable_steps: -1 ", "0 .. "},
           {{.confident_entropy = -0.1F}, "confident_entropy: -0.1", "0 or more"},
           {{.confident_entropy = kNan}, "confident_entropy: nan"},
           {{.cfg_scale = -1.0F}, "cfg_scale: -1", "0 (off)"},
           {{.cfg_scale = kInfinity}, "cfg_scale: inf"},
           {{.cfg_scale = kNan}, "cfg_scale: nan"},
           {{.eos_penalty = kInfinity}, "eos_penalty: "},
           {{.eos_penalty = kNan}, "eos_penalty: "},
           {{.forbidden_ids = {0, 1, 2, 3, 5, 6, 7, 8, 10}}, "forbidden_ids: 9 ids", "at most 8"},
           {{.forbidden_ids = {0, -1}}, "forbidden_ids: -1 ", "vocabulary of 23"},
           {{.forbidden_ids = {23}}, "forbidden_ids: 23 "},
           {{.pickable_ids = -1}, "pickable_ids: -1 ", "0 .. 23"},
           {{.pickable_ids = 24}, "pickable_ids: 24 "},
           {{.sampler = "remdm_cap", .eta = -0.5F}, "eta: -0.5", "0 or more"},
           {{.sampler = "remdm_cap", .eta = 1.5F}, "eta: 1.5", "[0, 1]"},
           {{.sampler = "remdm_cap", .eta = kNan}, "eta: nan"},
           {{.sampler = "remdm_loop", .t_on = 1.0F}, "t_on: 1 ", "(0, 1)"},
           {{.sampler = "remdm_loop", .t_on = kNan}, "t_on: nan"},
           {{.sampler = "remdm_loop", .t_off = 0.55F}, "t_off: 0.55 ", "below t_on"},
           {{.sampler = "remdm_loop", .t_off = 0.0F}, "t_off: 0 ", "above 0"},
           {{.sampler = "remdm_loop", .t_off = kNan}, "t_off: nan"},
           {{.sampler = "remdm_loop", .alpha_on = 1.0F}, "alpha_on: 1 ", "(0, 1)"},
           {{.sampler = "remdm_loop", .alpha_on = kNan}, "alpha_on: nan"},
           {{.edit_threshold = 1.5F}, "edit_threshold: 1.5", "[0, 1]"},
           {{.edit_threshold = kNan}, "edit_threshold: nan"},
           {{.edit_steps = -1}, "edit_steps: -1 ", "0 .. 1024"},
           {{.edit_steps = 1025}, "edit_steps: 1025 "},
           {{.repeat_penalty = -1.0F}, "repeat_penalty: -1", "0 (off)"},
           {{.repeat_penalty = kInfinity}, "repeat_penalty: inf"},
           {{.low_threshold = -1.0F}, "low_threshold: -1", "[0, 1]"},
           {{.low_threshold = kNan}, "low_threshold: nan"},
       }) {
    ExpectError(c);
  }
}

TEST(ResolveParamsErrorTest, SamplerAndModelMustFit) {
  ModelTraits nameless = MaskModel();
  nameless.default_sampler.clear();
  ModelTraits unmasked = MaskModel();
  unmasked.mask_token = -1;
  ModelTraits endless = MaskModel();
  endless.eos_tokens.clear();
  ModelTraits rigid = MaskModel();
  rigid.delete_token = rigid.split_token = -1;
  ModelTraits shifted = MaskModel();
  shifted.shift_logits = true;
  ModelTraits neither = endless;
  neither.eot_token = -1;
  for (const ErrorCase& c : std::vector<ErrorCase>{
           {{}, "sampler: ", "choose one", nameless},
           {{.sampler = "nonsense"}, "sampler: ", "low_confidence, random"},
           {{.sampler = "sedd_euler"}, "sampler: sedd_euler ", "use low_confidence"},
           {{.sampler = "sedd_analytic"},
            "sampler: sedd_analytic ",
            "use low_confidence",
            nameless},
           {{.sampler = "random"},
            "sampler: random ",
            "sedd_analytic or sedd_euler",
            AbsorbModel()},
           {{.sampler = "mdlm_cached"}, "sampler: mdlm_cached ", "sedd_analytic", UniformModel()},
           {{.sampler = "gemma_renoise"}, "sampler: gemma_renoise ", "use low_confidence"},
           {{.sampler = "joint_threshold_indel"},
            "sampler: joint_threshold_indel ",
            "delete_token_id and split_token_id in its config.json",
            rigid},
           {{.sampler = "indel", .pickable_ids = 19},
            "sampler: joint_threshold_indel ",
            "the tokenizer has 19 ids; use joint_threshold"},
           {{.sampler = "gemma_renoise"}, "sampler: gemma_renoise ", "use sedd", UniformModel()},
           {{.sampler = "block_dynamic"},
            "sampler: block_dynamic ",
            "use gemma_renoise",
            NoiseModel()},
           {{.sampler = "sedd_euler"}, "sampler: sedd_euler ", "use gemma_renoise", NoiseModel()},
           {{.temperature = 0.5F}, "temperature: ", "temperature_start", NoiseModel()},
           {{.cfg_scale = 1.0F}, "cfg_scale: ", "leave it out", NoiseModel()},
           {{.block_length = 8}, "block_length: 8", "blocks of 4", NoiseModel()},
           {{.temperature = 0.5F}, "temperature: ", "leave it out or use 1", AbsorbModel()},
           {{.temperature = 2.0F}, "temperature: ", "leave it out or use 1", UniformModel()},
           {{.sampler = "random", .cfg_scale = 0.5F}, "cfg_scale: ", "leave it out", BlockModel()},
           {{.cfg_scale = 0.5F}, "cfg_scale: ", "no mask token", unmasked},
           {{.logits_eos_inf = true}, "logits_eos_inf: ", "no EOS", endless},
           {{.confidence_eos_eot_inf = true}, "confidence_eos_eot_inf: ", "neither", neither},
           {{.sampler = "threshold", .kv_reuse = KvReuse::kDual},
            "kv_reuse: ",
            "reused exactly",
            BlockModel()},
           {{.sampler = "fast_dllm_v2", .kv_reuse = KvReuse::kPrefix}, "kv_reuse: ", "takes dual"},
           {{.sampler = "threshold", .kv_reuse = KvReuse::kPrefix, .cfg_scale = 1.0F},
            "kv_reuse: ",
            "not with cfg_scale"},
           {{.kv_reuse = KvReuse::kDual}, "kv_reuse: ", "use threshold", shifted},
           {{.sampler = "fast_dllm_v2", .sub_block_length = 3},
            "sub_block_length: 3 ",
            "blocks of 4",
            BlockModel()},
           {{.sampler = "fast_dllm_v2", .sub_block_length = -1},
            "sub_block_length: -1 ",
            "default"},
           {{.sampler = "block_static", .eos_early_stop = true},
            "eos_early_stop: ",
            "neither",
            neither},
           {{.block_length = 8}, "block_length: 8", "blocks of 4", BlockModel()},
           {{.sampler = "mdlm_ancestral", .block_length = 4}, "block_length: ", "leave it out"},
           {{.block_length = 4}, "block_length: ", "the whole canvas", UniformModel()},
       }) {
    ExpectError(c);
  }
  EXPECT_TRUE(ResolveParams({.confidence_eos_eot_inf = true}, endless, 4, 4).ok());  // there is EoT
}

TEST(ResolveParamsErrorTest, AKnobThatIsNotReadIsAnErrorThatNamesTheReaders) {
  struct Setting {
    Knob knob;
    std::string field;
    DecodingParams params;
  };
  const std::vector<Setting> settings = {
      {Knob::kNumSteps, "num_steps", {.num_steps = 12}},
      {Knob::kTopP, "top_p", {.top_p = 0.5F}},
      {Knob::kTopK, "top_k", {.top_k = 5}},
      {Knob::kThreshold, "threshold", {.threshold = 0.5F}},
      {Knob::kFactor, "factor", {.factor = 2.0F}},
      {Knob::kEntropyBound, "entropy_bound", {.entropy_bound = 0.5F}},
      {Knob::kAlgTemp, "alg_temp", {.alg_temp = 0.5F}},
      {Knob::kEps, "eps", {.eps = 0.5F}},
      {Knob::kSubBlockLength, "sub_block_length", {.sub_block_length = 4}},
      {Knob::kKvReuse, "kv_reuse", {.kv_reuse = KvReuse::kDual}},
      {Knob::kCooling, "temperature_start", {.temperature_start = 0.9F}},
      {Knob::kCooling, "temperature_end", {.temperature_end = 0.3F}},
      {Knob::kAdaptiveStop, "stable_steps", {.stable_steps = 2}},
      {Knob::kAdaptiveStop, "confident_entropy", {.confident_entropy = 0.1F}},
      {Knob::kCfgScale, "cfg_scale", {.cfg_scale = 0.5F}},
      {Knob::kEosSwitches, "logits_eos_inf", {.logits_eos_inf = true}},
      {Knob::kEosSwitches, "confidence_eos_eot_inf", {.confidence_eos_eot_inf = true}},
      {Knob::kBlockLength, "block_length", {.block_length = 6}},
      {Knob::kEta, "eta", {.eta = 0.5F}},
      {Knob::kRemaskingWindow, "t_on", {.t_on = 0.7F}},
      {Knob::kRemaskingWindow, "t_off", {.t_off = 0.2F}},
      {Knob::kRemaskingWindow, "alpha_on", {.alpha_on = 0.7F}},
      {Knob::kEditing, "edit_threshold", {.edit_threshold = 0.5F}},
      {Knob::kEditing, "edit_steps", {.edit_steps = 5}},
      {Knob::kRepeatPenalty, "repeat_penalty", {.repeat_penalty = 0.5F}},
      {Knob::kLowThreshold, "low_threshold", {.low_threshold = 0.5F}},
      {Knob::kEosEarlyStop, "eos_early_stop", {.eos_early_stop = true}},
  };
  for (const SamplerEntry& entry : SamplerCatalog()) {
    const ModelTraits model = Fits(entry, MaskModel())     ? MaskModel()
                              : Fits(entry, AbsorbModel()) ? AbsorbModel()
                                                           : NoiseModel();
    for (const Setting& setting : settings) {
      if (model.causal_block_length > 0 && setting.knob == Knob::kBlockLength) continue;
      SCOPED_TRACE(absl::StrCat(entry.name, " ", setting.field));
      DecodingParams params = setting.params;
      params.sampler = std::string(entry.name);
      const absl::StatusOr<DecodingParams> resolved = ResolveParams(params, model, 12, 12);
      if (Reads(entry, setting.knob)) {
        EXPECT_TRUE(resolved.ok()) << resolved.status();
        continue;
      }
      ASSERT_FALSE(resolved.ok());
      const std::string message(resolved.status().message());
      EXPECT_THAT(message, StartsWith(setting.field + ": sampler " + std::string(entry.name)));
      EXPECT_THAT(message, HasSubstr("leave it out"));
      if (setting.knob == Knob::kBlockLength) continue;
      for (const SamplerEntry& other : SamplerCatalog()) {
        if (Reads(other, setting.knob)) {
          EXPECT_THAT(message, HasSubstr(std::string(other.name)));
        }
      }
    }
  }
}

TEST(ResolveParamsErrorTest, StepsThatDoNotSplitNameTheNextThatDo) {
  ExpectError({{.num_steps = 10, .block_length = 3}, "num_steps: 10 ", "use 8 or 12"});
  ExpectError({{.num_steps = 3, .block_length = 3}, "num_steps: 3 ", "use 4"});
  ExpectError({{.num_steps = 10, .block_length = 5}, "num_steps: 10 ", "3 blocks; use 9 or 12"});
  // 12 positions from position 3 touch four blocks of 4.
  ExpectError({{.num_steps = 6}, "num_steps: 6 ", "4 blocks; use 4 or 8", BlockModel()}, 12, 12, 3);
}

TEST(ResolveParamsErrorTest, MoreExceptionsThanTheHeadTakes) {
  ModelTraits model = MaskModel();
  model.eos_tokens = {0, 1, 2, 3, 4, 5, 6, 7, 8};
  // Mask token, nine EOS and eight forbidden ids: two too many.
  const std::vector<TokenId> eight = {10, 11, 12, 13, 14, 15, 16, 18};
  const std::vector<TokenId> six = {10, 11, 12, 13, 14, 15};
  ExpectError(
      {{.eos_penalty = 1.0F, .forbidden_ids = eight}, "forbidden_ids: ", "2 ids fewer", model});
  EXPECT_TRUE(ResolveParams({.eos_penalty = 1.0F, .forbidden_ids = six}, model, 4, 4).ok());
  EXPECT_TRUE(ResolveParams({.forbidden_ids = eight}, model, 4, 4).ok());
  ExpectError({{.confidence_eos_eot_inf = true, .forbidden_ids = six},
               "forbidden_ids: ",
               "1 ids fewer",
               model});
  // Where forbidding fewer ids does not help, the switch that makes the exceptions is named.
  model.eos_tokens = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  ExpectError({{.eos_penalty = 1.0F}, "eos_penalty: ", "17 EOS", model});
  ExpectError({{.logits_eos_inf = true}, "logits_eos_inf: ", "leave it out", model});
  ExpectError({{.confidence_eos_eot_inf = true, .forbidden_ids = {20}},
               "confidence_eos_eot_inf: ",
               "leave it out",
               model});
  EXPECT_TRUE(ResolveParams({.forbidden_ids = eight}, model, 4, 4).ok());
}

TEST(ResolveParamsErrorTest, MoreBlocksThanSteps) {
  ModelTraits model = MaskModel();
  model.positions_max = 1 << 20;
  ExpectError({{.block_length = 1}, "block_length: 1 ", "at least 2", model}, 70000, 70000);
  EXPECT_TRUE(ResolveParams({.block_length = 2}, model, 70000, 70000).ok());
  EXPECT_TRUE(ResolveParams({.sampler = "threshold", .block_length = 1}, model, 70000, 70000).ok());
}

TEST(ResolveParamsErrorTest, ACanvasThatCannotBe) {
  ExpectError({{}, "a canvas of 3 positions from 0 with 4 to fill"}, 4, 3);
  ExpectError({{}, "a canvas of 3 positions from 0 with -1 to fill"}, -1, 3);
  ExpectError({{}, "a canvas of 3 positions from -1 with 3 to fill"}, 3, 3, -1);
}

// --- ResolveParams: defaults
// -------------------------------------------------------------------------------

TEST(ResolveParamsTest, FillsInWhatWasLeftOut) {
  struct Case {
    DecodingParams params;
    ModelTraits model;
    int32_t num_masked;
    int32_t canvas_length;
    int32_t canvas_begin;
    std::string sampler;
    int32_t block_length;
    int32_t num_steps;
  };
  for (const Case& c : std::vector<Case>{
           // One block: as many steps as masked positions.
           {{}, MaskModel(), 12, 20, 5, "low_confidence", 20, 12},
           {{.sampler = "entropy"}, MaskModel(), 12, 20, 5, "entropy", 20, 12},
           {{.block_length = 30}, MaskModel(), 12, 20, 5, "low_confidence", 30, 12},
           // Several blocks: as many in each as it has positions.
           {{.block_length = 8}, MaskModel(), 12, 20, 5, "low_confidence", 8, 24},
           {{.block_length = 8}, MaskModel(), 16, 16, 5, "low_confidence", 8, 16},
           {{.block_length = 1}, MaskModel(), 7, 7, 0, "low_confidence", 1, 7},
           // The share of a block diffusion step is one of a full block.
           {{.sampler = "block_static"}, MaskModel(), 12, 20, 5, "block_static", 20, 20},
           // Samplers without a number of steps.
           {{.sampler = "threshold"}, MaskModel(), 12, 20, 5, "threshold", 20, 0},
           {{.sampler = "threshold", .block_length = 8}, MaskModel(), 12, 20, 5, "threshold", 8, 0},
           // What was given stays.
           {{.num_steps = 5}, MaskModel(), 12, 20, 5, "low_confidence", 20, 5},
           {{.num_steps = 6, .block_length = 8}, MaskModel(), 12, 20, 5, "low_confidence", 8, 6},
           {{.num_steps = 100}, MaskModel(), 1, 1, 0, "low_confidence", 1, 100},
           // An alias becomes the name.
           {{.sampler = "DDPM-Cache"}, MaskModel(), 6, 6, 0, "mdlm_cached", 6, 6},
           // Nothing to fill.
           {{}, MaskModel(), 0, 0, 0, "low_confidence", 0, 1},
           // Score models.
           {{}, AbsorbModel(), 6, 9, 2, "sedd_analytic", 9, 6},
           {{.num_steps = 128}, UniformModel(), 6, 9, 2, "sedd_euler", 9, 128},
           // Noise: 48 steps for each block, counted from where the canvas begins.
           {{}, NoiseModel(), 6, 9, 2, "gemma_renoise", 4, 144},
           {{}, NoiseModel(), 8, 8, 3, "gemma_renoise", 4, 96},
           {{.num_steps = 10}, NoiseModel(), 8, 8, 3, "gemma_renoise", 4, 10},
           // No more steps than are taken, and as many for each block.
           {{}, MaskModel(), 70000, 70000, 0, "low_confidence", 70000, 65536},
           {{.block_length = 30000}, MaskModel(), 70000, 70000, 0, "low_confidence", 30000, 65535},
       }) {
    const absl::StatusOr<DecodingParams> resolved =
        ResolveParams(c.params, c.model, c.num_masked, c.canvas_length, c.canvas_begin);
    ASSERT_TRUE(resolved.ok()) << resolved.status();
    EXPECT_EQ(resolved->sampler, c.sampler);
    EXPECT_EQ(resolved->block_length, c.block_length) << c.sampler;
    EXPECT_EQ(resolved->num_steps, c.num_steps) << c.sampler;
  }
}

TEST(ResolveParamsTest, BlockCausalModelsCountTheBlocksThatTheCanvasTouches) {
  struct Case {
    int32_t begin;
    int32_t length;
    int32_t num_blocks;  // of 4
  };
  for (const Case& c : std::vector<Case>{{0, 4, 1},
                                         {0, 5, 2},
                                         {3, 1, 1},
                                         {3, 2, 2},
                                         {4, 4, 1},
                                         {5, 4, 2},
                                         {7, 10, 4},
                                         {7, 14, 5},
                                         {8, 8, 2},
                                         {2, 2, 1}}) {
    SCOPED_TRACE(absl::StrCat(c.length, " positions from ", c.begin));
    const auto resolve = [&](int32_t num_steps) {
      return ResolveParams({.sampler = "block_static", .num_steps = num_steps}, BlockModel(), 1,
                           c.length, c.begin);
    };
    ASSERT_TRUE(resolve(0).ok());
    EXPECT_EQ(resolve(0)->num_steps, 4 * c.num_blocks);
    EXPECT_EQ(resolve(0)->block_length, 4);
    EXPECT_TRUE(resolve(3 * c.num_blocks).ok());
    EXPECT_EQ(resolve(3 * c.num_blocks + 1).ok(), c.num_blocks == 1);
  }
  // Where attention is full the canvas begins with its first block, wherever it is.
  for (int32_t begin = 0; begin < 5; ++begin) {
    EXPECT_EQ(ResolveParams({.block_length = 4}, MaskModel(), 5, 5, begin)->num_steps, 8);
  }
}

TEST(ResolveParamsTest, CountsBlocksAsTheCanvasDoes) {
  for (const ModelTraits& model : {MaskModel(), BlockModel()}) {
    for (int32_t begin = 0; begin < 9; ++begin) {
      for (int32_t end = begin + 1; end <= 14; ++end) {
        std::vector<bool> given(15, true);
        given[begin] = given[end - 1] = false;
        const Canvas canvas = *MakeCanvas(std::vector<TokenId>(15, 1), given, model, {});
        for (int32_t block_length = model.causal_block_length == 0 ? 1 : 4; block_length < 6;
             ++block_length) {
          if (model.causal_block_length > 0 && block_length != 4) continue;
          const absl::StatusOr<DecodingParams> resolved =
              ResolveParams({.sampler = "block_static", .block_length = block_length}, model,
                            begin + 1 == end ? 1 : 2, end - begin, begin);
          ASSERT_TRUE(resolved.ok()) << resolved.status();
          EXPECT_EQ(resolved->num_steps, block_length * NumBlocks(canvas, model, block_length));
          EXPECT_EQ(StepsPerBlock(canvas, *resolved, model), block_length);
        }
      }
    }
  }
}

// --- ResolveParams: properties
// -----------------------------------------------------------------------------

auto Fields(const DecodingParams& p) {
  return std::tie(p.sampler, p.num_steps, p.block_length, p.temperature, p.top_p, p.top_k,
                  p.threshold, p.factor, p.entropy_bound, p.alg_temp, p.eps, p.temperature_start,
                  p.temperature_end, p.stable_steps, p.confident_entropy, p.cfg_scale,
                  p.logits_eos_inf, p.confidence_eos_eot_inf, p.eos_penalty, p.forbidden_ids,
                  p.pickable_ids, p.seed);
}

// Each field is left alone most of the time, else drawn from values that are mostly valid.
DecodingParams RandomParams(std::mt19937& random) {
  DecodingParams p;
  const auto rarely = [&] { return random() % 6 == 0; };
  const auto one_of = [&](auto... choices) {
    const double values[] = {static_cast<double>(choices)...};
    return values[random() % sizeof...(choices)];
  };
  const std::vector<std::string> names = CatalogNames();
  if (random() % 5 != 0) p.sampler = names[random() % names.size()];
  if (random() % 2 == 0) p.num_steps = static_cast<int32_t>(one_of(1, 2, 4, 12, 16, 60, 65536, -1));
  if (random() % 3 == 0) p.block_length = static_cast<int32_t>(one_of(1, 4, 4, 5, 16, 100, -1));
  if (rarely()) p.temperature = static_cast<float>(one_of(0, 0.7, 1, 1, 1e-9));
  if (rarely()) p.top_p = static_cast<float>(one_of(0.1, 0.9, 1, 0));
  if (rarely()) p.top_k = static_cast<int32_t>(one_of(0, 1, 50, -1));
  if (rarely()) p.threshold = static_cast<float>(one_of(0, 0.5, 1, 2));
  if (rarely()) p.factor = static_cast<float>(one_of(0.5, 3, 0));
  if (rarely()) p.entropy_bound = static_cast<float>(one_of(0, 0.5, kInfinity, -1));
  if (rarely()) p.alg_temp = static_cast<float>(one_of(0, 0.5, -1));
  if (rarely()) p.eps = static_cast<float>(one_of(0.5, 1e-5, 1));
  if (rarely()) p.temperature_start = static_cast<float>(one_of(0.9, 0.1, kNan));
  if (rarely()) p.temperature_end = static_cast<float>(one_of(0.9, 0.1, 0));
  if (rarely()) p.stable_steps = static_cast<int32_t>(one_of(0, 4, -1));
  if (rarely()) p.confident_entropy = static_cast<float>(one_of(0, 0.4, -1));
  if (rarely()) p.cfg_scale = static_cast<float>(one_of(0, 1.5, -1));
  if (rarely()) p.logits_eos_inf = true;
  if (rarely()) p.confidence_eos_eot_inf = true;
  if (rarely()) p.eos_penalty = static_cast<float>(one_of(1, -2, kNan));
  if (rarely()) p.forbidden_ids = {1, static_cast<TokenId>(one_of(2, 3, 90))};
  if (rarely()) p.pickable_ids = static_cast<int32_t>(one_of(13, 5, 80));
  p.seed = random();
  return p;
}

TEST(ResolveParamsTest, IsIdempotentAndTouchesOnlyWhatWasLeftOut) {
  std::mt19937 random(3);
  const std::vector<ModelTraits> models = AllModels();
  int num_ok = 0;
  for (int i = 0; i < 300000; ++i) {
    const ModelTraits& model = models[random() % models.size()];
    const DecodingParams params = RandomParams(random);
    const int32_t canvas_length = static_cast<int32_t>(random() % 40);
    const int32_t num_masked =
        canvas_length == 0 ? 0 : 1 + static_cast<int32_t>(random() % canvas_length);
    const int32_t canvas_begin = static_cast<int32_t>(random() % 10);
    const auto resolve = [&](const DecodingParams& p) {
      return ResolveParams(p, model, num_masked, canvas_length, canvas_begin);
    };
    const absl::StatusOr<DecodingParams> once = resolve(params);
    if (!once.ok()) {
      ASSERT_EQ(once.status().code(), absl::StatusCode::kInvalidArgument);
      continue;
    }
    ++num_ok;
    SCOPED_TRACE(absl::StrCat(once->sampler, " on ", model.family, ", ", num_masked, " of ",
                              canvas_length, " from ", canvas_begin, ", block ",
                              params.block_length, " -> ", once->block_length, ", steps ",
                              params.num_steps, " -> ", once->num_steps));
    const absl::StatusOr<DecodingParams> twice = resolve(*once);
    ASSERT_TRUE(twice.ok()) << twice.status();
    ASSERT_EQ(Fields(*twice), Fields(*once));
    DecodingParams expected = params;
    expected.sampler =
        std::string(EntryOf(params.sampler.empty() ? model.default_sampler : params.sampler).name);
    if (params.num_steps == 0) expected.num_steps = once->num_steps;
    if (params.block_length == 0) expected.block_length = once->block_length;
    ASSERT_EQ(Fields(*once), Fields(expected));
    if (Reads(EntryOf(once->sampler), Knob::kNumSteps)) {
      ASSERT_GE(once->num_steps, 1);
      ASSERT_LE(once->num_steps, 65536);
    } else {
      ASSERT_EQ(once->num_steps, 0);
    }
  }
  EXPECT_GT(num_ok, 8000) << "too few of the random requests are valid to prove anything";
}

}  // namespace
}  // namespace cinnabar
