#include "common/request/sampler_catalog.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/check.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr uint32_t Bits() { return 0; }
template <typename... Rest>
constexpr uint32_t Bits(Knob first, Rest... rest) {
  return static_cast<uint32_t>(first) | Bits(rest...);
}

constexpr uint32_t kGuidedBlocks = Bits(Knob::kBlockLength, Knob::kCfgScale);
// Those whose authors run them on reused keys and values.
constexpr uint32_t kReusing = Bits(Knob::kKvReuse);
constexpr uint32_t kLlada = kGuidedBlocks | Bits(Knob::kNumSteps, Knob::kEosSwitches);
constexpr uint32_t kFastDllm = kGuidedBlocks | Bits(Knob::kEosSwitches);
constexpr uint32_t kDream =
    kGuidedBlocks | Bits(Knob::kNumSteps, Knob::kTopP, Knob::kTopK, Knob::kEps);
constexpr uint32_t kBlockDiffusion =
    Bits(Knob::kNumSteps, Knob::kBlockLength, Knob::kTopP, Knob::kTopK, Knob::kEosEarlyStop);
constexpr uint32_t kRemdm = Bits(Knob::kNumSteps, Knob::kTopP);

constexpr std::array kCatalog = {
    SamplerEntry{"low_confidence", "", "LLaDA, arXiv:2502.09992",
                 "the most probable predictions first, a fixed share in each step",
                 kLlada | kReusing},
    SamplerEntry{"random", "", "LLaDA, arXiv:2502.09992",
                 "positions in random order, a fixed share in each step", kLlada,
                 /*draws_positions=*/true},
    SamplerEntry{"origin", "", "Dream, arXiv:2508.15487",
                 "each position independently, by the time schedule", kDream,
                 /*draws_positions=*/true},
    SamplerEntry{"maskgit_plus", "", "Dream, arXiv:2508.15487",
                 "the most probable predictions first, by the time schedule",
                 kDream | Bits(Knob::kAlgTemp)},
    SamplerEntry{"topk_margin", "", "Dream, arXiv:2508.15487",
                 "the widest gap between the two best tokens first, by the time schedule",
                 kDream | Bits(Knob::kAlgTemp)},
    SamplerEntry{"entropy", "", "Dream, arXiv:2508.15487",
                 "the lowest entropy first, by the time schedule", kDream | Bits(Knob::kAlgTemp)},
    SamplerEntry{"threshold", "", "Fast-dLLM, arXiv:2505.22618",
                 "every prediction at least as probable as the threshold, and the best one",
                 kFastDllm | kReusing | Bits(Knob::kThreshold)},
    SamplerEntry{"factor", "", "Fast-dLLM, arXiv:2505.22618",
                 "as many as their probabilities allow under a bound that grows with the rank",
                 kFastDllm | kReusing | Bits(Knob::kFactor)},
    SamplerEntry{
        "fast_dllm_v2", "hierarchy_block", "Fast-dLLM v2, arXiv:2509.26328",
        "blocks of a block left to right, every prediction above the threshold, and the "
        "best one",
        kReusing | Bits(Knob::kThreshold, Knob::kBlockLength, Knob::kTopP, Knob::kSubBlockLength)},
    SamplerEntry{"entropy_bounded", "", "EB-Sampler, arXiv:2505.24857",
                 "the longest prefix by entropy whose joint entropy stays under a bound",
                 kGuidedBlocks | Bits(Knob::kEntropyBound)},
    SamplerEntry{"block_static", "static", "SDAR, arXiv:2510.06303",
                 "the most probable predictions of the block, a fixed share in each step",
                 kBlockDiffusion},
    SamplerEntry{"block_dynamic", "dynamic", "SDAR, arXiv:2510.06303",
                 "all above the threshold, at least the fixed share",
                 kBlockDiffusion | Bits(Knob::kThreshold)},
    SamplerEntry{"block_sequential", "sequential", "SDAR, arXiv:2510.06303",
                 "left to right, a fixed share in each step", kBlockDiffusion},
    SamplerEntry{"mdlm_ancestral", "ddpm", "MDLM, arXiv:2406.07524",
                 "ancestral sampling of the masked process, one forward pass in each step",
                 Bits(Knob::kNumSteps), /*draws_positions=*/true},
    SamplerEntry{"mdlm_cached", "ddpm_cache", "MDLM, arXiv:2406.07524",
                 "the same, without the passes of steps that unmask nothing", Bits(Knob::kNumSteps),
                 /*draws_positions=*/true},
    SamplerEntry{"mdlm_semi_ar", "", "MDLM, arXiv:2406.07524",
                 "the same block by block; later blocks are not seen",
                 Bits(Knob::kNumSteps, Knob::kBlockLength), /*draws_positions=*/true},
    SamplerEntry{"sedd_euler", "euler", "SEDD, arXiv:2310.16834",
                 "Euler steps of the reverse process", Bits(Knob::kNumSteps),
                 /*draws_positions=*/true},
    SamplerEntry{"sedd_analytic", "analytic", "SEDD, arXiv:2310.16834",
                 "Tweedie tau-leaping steps of the reverse process", Bits(Knob::kNumSteps),
                 /*draws_positions=*/true},
    SamplerEntry{
        .name = "remdm_cap",
        .source = "ReMDM, arXiv:2503.00307",
        .summary = "ancestral sampling that masks tokens again, each at most with chance eta",
        .knobs = kRemdm | Bits(Knob::kEta),
        .draws_positions = true,
        .revises = true,
        .eta = 0.008F},
    SamplerEntry{.name = "remdm_rescale",
                 .source = "ReMDM, arXiv:2503.00307",
                 .summary = "the same with eta times the largest chance that the process allows",
                 .knobs = kRemdm | Bits(Knob::kEta),
                 .draws_positions = true,
                 .revises = true,
                 .eta = 0.015F},
    SamplerEntry{
        .name = "remdm_conf",
        .source = "ReMDM, arXiv:2503.00307",
        .summary = "the same, rather those tokens that were improbable when they were taken",
        .knobs = kRemdm,
        .draws_positions = true,
        .revises = true,
        .remembers = true},
    SamplerEntry{.name = "remdm_loop",
                 .source = "ReMDM, arXiv:2503.00307",
                 .summary = "fills most of the canvas, revises it for a while, fills the rest",
                 .knobs = kRemdm | Bits(Knob::kEta, Knob::kRemaskingWindow),
                 .draws_positions = true,
                 .revises = true,
                 .eta = 0.02F},
    SamplerEntry{.name = "dfm_corrector",
                 .alias = "dfm",
                 .source = "Discrete Flow Matching, arXiv:2407.15595",
                 .summary = "forward and backward rates at once: unmasks faster, masks again",
                 .knobs = kRemdm,
                 .draws_positions = true,
                 .revises = true},
    SamplerEntry{
        .name = "p2",
        .alias = "path_planning",
        .source = "Path planning, arXiv:2502.03540",
        .summary = "predicts all positions in each step and masks the least probable again",
        .knobs = kGuidedBlocks | Bits(Knob::kNumSteps, Knob::kEta),
        .revises = true,
        .eta = 1.0F},
    SamplerEntry{.name = "p2_random",
                 .source = "Path planning, arXiv:2502.03540",
                 .summary = "the same in random order; eta 0 masks nothing again",
                 .knobs = kGuidedBlocks | Bits(Knob::kNumSteps, Knob::kEta),
                 .draws_positions = true,
                 .revises = true,
                 .eta = 0.0F},
    SamplerEntry{
        .name = "p2_open",
        .source = "Open-dLLM, github.com/pengzhangzhi/Open-dLLM",
        .summary = "path planning by the filtered probability, exactly as many as scheduled",
        .knobs = kGuidedBlocks | Bits(Knob::kNumSteps, Knob::kTopP, Knob::kTopK),
        .revises = true},
    SamplerEntry{.name = "rnd1",
                 .source = "RND1, github.com/RadicalNumerics/RND1",
                 .summary = "the lowest entropy first, a linear schedule",
                 .knobs = kGuidedBlocks | Bits(Knob::kNumSteps, Knob::kTopP, Knob::kTopK)},
    SamplerEntry{
        .name = "rnd1_entropy_bounded",
        .source = "RND1, github.com/RadicalNumerics/RND1",
        .summary = "the most probable first, as long as their joint entropy stays under a bound",
        .knobs = kGuidedBlocks | Bits(Knob::kEntropyBound, Knob::kTopP, Knob::kTopK)},
    SamplerEntry{
        .name = "joint_threshold",
        .alias = "t2t",
        .source = "LLaDA2.1, arXiv:2602.08676",
        .summary = "fills above one threshold, and replaces committed tokens above another",
        .knobs = Bits(Knob::kBlockLength, Knob::kThreshold, Knob::kEditing, Knob::kRepeatPenalty,
                      Knob::kTopP, Knob::kTopK, Knob::kEosEarlyStop),
        .revises = true},
    SamplerEntry{
        .name = "joint_threshold_indel",
        .alias = "indel",
        .source = "LLaDA2.x InDel, github.com/sgl-project/sglang",
        .summary = "the same, and deletes and inserts tokens in the open block, which move then",
        .knobs = Bits(Knob::kBlockLength, Knob::kThreshold, Knob::kEditing, Knob::kEosEarlyStop),
        .revises = true,
        .remembers = true,
        .row_rules = 7,
        .moves_tokens = true},
    SamplerEntry{.name = "hierarchical",
                 .source = "dInfer, arXiv:2510.08666",
                 .summary = "the best of each run of masks, and all above the threshold",
                 .knobs = kFastDllm | Bits(Knob::kThreshold, Knob::kLowThreshold)},
    SamplerEntry{
        .name = "hierarchical_remask",
        .source = "dInfer, arXiv:2510.08666",
        .summary = "the same, and masks again what is predicted with too little confidence",
        .knobs = kFastDllm | Bits(Knob::kThreshold, Knob::kLowThreshold),
        .revises = true},
    SamplerEntry{.name = "credit",
                 .source = "dInfer, arXiv:2510.08666",
                 .summary = "the threshold, on probabilities that what was best before has raised",
                 .knobs = kGuidedBlocks | Bits(Knob::kThreshold),
                 .row_rules = 6,
                 .gives_credit = true},
    SamplerEntry{
        .name = "bd3lm_first_hitting",
        .alias = "first_hitting",
        .source = "BD3-LM, arXiv:2503.09573",
        .summary = "block by block, one random position in each step, at times that are drawn",
        .knobs = Bits(Knob::kBlockLength, Knob::kTopP, Knob::kEosEarlyStop),
        .draws_positions = true},
    SamplerEntry{
        .name = "bd3lm_scheduled",
        .source = "BD3-LM, arXiv:2503.09573",
        .summary = "block by block, ancestral sampling of the masked process inside each",
        .knobs = Bits(Knob::kNumSteps, Knob::kBlockLength, Knob::kTopP, Knob::kEosEarlyStop),
        .draws_positions = true},
    SamplerEntry{"gemma_renoise", "", "DiffusionGemma, huggingface/transformers",
                 "draws under an entropy bound, noise elsewhere, until the best tokens stay",
                 Bits(Knob::kNumSteps, Knob::kEntropyBound, Knob::kCooling, Knob::kAdaptiveStop),
                 /*draws_positions=*/true},
};

// A step costs a forward pass, so an absurd count is a mistake, not a wish.
constexpr int32_t kNumStepsMax = 1 << 16;
constexpr int32_t kEditStepsMax = 1024;
// gemma_renoise: steps of a block, unless a request says otherwise.
constexpr int32_t kRenoiseSteps = 48;
// Smaller ones overflow what they divide; 0 is the way to say "none".
constexpr float kTemperatureMin = 1e-6F;
constexpr int32_t kSubBlockLength = 8;  // of Fast-dLLM v2
// The vocabulary head takes 16 exceptions for a row (kVocabularyRulesMax in kernels/backend.h,
// which this folder does not see; worker/decoding asserts that they agree).
constexpr size_t kRulesMax = 16;

std::string Normalized(absl::string_view name) {
  std::string result = absl::AsciiStrToLower(name);
  std::replace(result.begin(), result.end(), '-', '_');
  return result;
}

const SamplerEntry* Canonical(absl::string_view name) {
  for (const SamplerEntry& entry : kCatalog) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

bool Reads(const SamplerEntry& entry, Knob knob) {
  return (entry.knobs & static_cast<uint32_t>(knob)) != 0;
}

template <typename... Words>
absl::Status Invalid(const Words&... words) {
  return absl::InvalidArgumentError(absl::StrCat(words...));
}

// NaN fails every comparison, so ranges are written as what must hold.
absl::Status CheckRanges(const DecodingParams& p, const ModelTraits& model) {
  const auto temperature_ok = [](float t) {
    return t == 0 || (t >= kTemperatureMin && std::isfinite(t));
  };
  if (p.num_steps < 0 || p.num_steps > kNumStepsMax) {
    return Invalid("num_steps: ", p.num_steps, " is not in 0 .. ", kNumStepsMax,
                   "; leave it out for one step per position");
  }
  if (p.block_length < 0) {
    return Invalid("block_length: ", p.block_length, " is negative; 0 takes the default");
  }
  if (!temperature_ok(p.temperature)) {
    return Invalid("temperature: ", p.temperature, "; use 0 or at least ", kTemperatureMin);
  }
  if (!(p.top_p > 0 && p.top_p <= 1)) {
    return Invalid("top_p: ", p.top_p, " is not in (0, 1]; 1 switches it off");
  }
  if (p.top_k < 0) return Invalid("top_k: ", p.top_k, " is negative; 0 switches it off");
  if (!(p.threshold >= 0 && p.threshold <= 1)) {
    return Invalid("threshold: ", p.threshold, " is not in [0, 1]");
  }
  if (!(p.factor > 0 && std::isfinite(p.factor))) {
    return Invalid("factor: ", p.factor, "; use a number above 0");
  }
  if (!(p.entropy_bound >= 0)) {
    return Invalid("entropy_bound: ", p.entropy_bound, "; use 0 or more nats");
  }
  if (!temperature_ok(p.alg_temp)) {
    return Invalid("alg_temp: ", p.alg_temp, "; use 0 or at least ", kTemperatureMin);
  }
  if (p.sub_block_length < 0) {
    return Invalid("sub_block_length: ", p.sub_block_length, " is negative; 0 takes the default");
  }
  if (!(p.eps > 0 && p.eps < 1)) return Invalid("eps: ", p.eps, " is not in (0, 1)");
  if (!(p.temperature_end >= kTemperatureMin && std::isfinite(p.temperature_end))) {
    return Invalid("temperature_end: ", p.temperature_end, "; use at least ", kTemperatureMin);
  }
  if (!(p.temperature_start >= p.temperature_end && std::isfinite(p.temperature_start))) {
    return Invalid("temperature_start: ", p.temperature_start, "; use at least temperature_end, ",
                   p.temperature_end);
  }
  if (p.stable_steps < 0 || p.stable_steps > kNumStepsMax) {
    return Invalid("stable_steps: ", p.stable_steps, " is not in 0 .. ", kNumStepsMax);
  }
  if (!(p.confident_entropy >= 0)) {
    return Invalid("confident_entropy: ", p.confident_entropy, "; use 0 or more nats");
  }
  if (!(p.cfg_scale >= 0 && std::isfinite(p.cfg_scale))) {
    return Invalid("cfg_scale: ", p.cfg_scale, "; use 0 (off) or more");
  }
  if (!std::isfinite(p.eos_penalty)) return Invalid("eos_penalty: not a finite number");
  if (p.forbidden_ids.size() > static_cast<size_t>(kForbiddenIdsMax)) {
    return Invalid("forbidden_ids: ", p.forbidden_ids.size(), " ids; at most ", kForbiddenIdsMax);
  }
  for (const TokenId id : p.forbidden_ids) {
    if (id < 0 || id >= model.vocab_size) {
      return Invalid("forbidden_ids: ", id, " is outside the vocabulary of ", model.vocab_size);
    }
  }
  if (p.pickable_ids < 0 || p.pickable_ids > model.vocab_size) {
    return Invalid("pickable_ids: ", p.pickable_ids, " is not in 0 .. ", model.vocab_size);
  }
  return absl::OkStatus();
}

// block_length is not here: its resolved value is compared instead.
absl::Status CheckUnread(const DecodingParams& p, const SamplerEntry& entry) {
  const DecodingParams unset;
  struct Setting {
    Knob knob;
    absl::string_view field;
    bool set;
  };
  const Setting settings[] = {
      {Knob::kNumSteps, "num_steps", p.num_steps != unset.num_steps},
      {Knob::kTopP, "top_p", p.top_p != unset.top_p},
      {Knob::kTopK, "top_k", p.top_k != unset.top_k},
      {Knob::kThreshold, "threshold", p.threshold != unset.threshold},
      {Knob::kFactor, "factor", p.factor != unset.factor},
      {Knob::kEntropyBound, "entropy_bound", p.entropy_bound != unset.entropy_bound},
      {Knob::kAlgTemp, "alg_temp", p.alg_temp != unset.alg_temp},
      {Knob::kSubBlockLength, "sub_block_length", p.sub_block_length != 0},
      {Knob::kKvReuse, "kv_reuse", p.kv_reuse != KvReuse::kExact},
      {Knob::kEps, "eps", p.eps != unset.eps},
      {Knob::kCooling, "temperature_start", p.temperature_start != unset.temperature_start},
      {Knob::kCooling, "temperature_end", p.temperature_end != unset.temperature_end},
      {Knob::kAdaptiveStop, "stable_steps", p.stable_steps != unset.stable_steps},
      {Knob::kAdaptiveStop, "confident_entropy", p.confident_entropy != unset.confident_entropy},
      {Knob::kCfgScale, "cfg_scale", p.cfg_scale != unset.cfg_scale},
      {Knob::kEosSwitches, "logits_eos_inf", p.logits_eos_inf},
      {Knob::kEosSwitches, "confidence_eos_eot_inf", p.confidence_eos_eot_inf},
      {Knob::kEta, "eta", p.eta != unset.eta},
      {Knob::kRemaskingWindow, "t_on", p.t_on != unset.t_on},
      {Knob::kRemaskingWindow, "t_off", p.t_off != unset.t_off},
      {Knob::kRemaskingWindow, "alpha_on", p.alpha_on != unset.alpha_on},
      {Knob::kEditing, "edit_threshold", p.edit_threshold != unset.edit_threshold},
      {Knob::kEditing, "edit_steps", p.edit_steps != unset.edit_steps},
      {Knob::kRepeatPenalty, "repeat_penalty", p.repeat_penalty != unset.repeat_penalty},
      {Knob::kLowThreshold, "low_threshold", p.low_threshold != unset.low_threshold},
      {Knob::kEosEarlyStop, "eos_early_stop", p.eos_early_stop},
  };
  for (const Setting& setting : settings) {
    if (!setting.set || Reads(entry, setting.knob)) continue;
    std::vector<absl::string_view> readers;
    for (const SamplerEntry& other : kCatalog) {
      if (Reads(other, setting.knob)) readers.push_back(other.name);
    }
    return Invalid(setting.field, ": sampler ", entry.name,
                   " does not read it; leave it out or use ", absl::StrJoin(readers, ", "));
  }
  return absl::OkStatus();
}

absl::Status CheckRevision(const DecodingParams& p, const SamplerEntry& entry) {
  if (p.eta != -1 && !(p.eta >= 0 && std::isfinite(p.eta))) {
    return Invalid("eta: ", p.eta, "; use 0 or more");
  }
  if (p.eta > 1 && absl::string_view(entry.name).substr(0, 6) == "remdm_") {
    return Invalid("eta: ", p.eta, " is not in [0, 1]");
  }
  if (!(p.t_on > 0 && p.t_on < 1)) return Invalid("t_on: ", p.t_on, " is not in (0, 1)");
  if (!(p.t_off > 0 && p.t_off < p.t_on)) {
    return Invalid("t_off: ", p.t_off, " is not above 0 and below t_on, ", p.t_on);
  }
  if (!(p.alpha_on > 0 && p.alpha_on < 1)) {
    return Invalid("alpha_on: ", p.alpha_on, " is not in (0, 1)");
  }
  if (!(p.edit_threshold >= 0 && p.edit_threshold <= 1)) {
    return Invalid("edit_threshold: ", p.edit_threshold, " is not in [0, 1]");
  }
  if (p.edit_steps < 0 || p.edit_steps > kEditStepsMax) {
    return Invalid("edit_steps: ", p.edit_steps, " is not in 0 .. ", kEditStepsMax);
  }
  if (!(p.repeat_penalty >= 0 && std::isfinite(p.repeat_penalty))) {
    return Invalid("repeat_penalty: ", p.repeat_penalty, "; use 0 (off) or more nats");
  }
  if (!(p.low_threshold >= 0 && p.low_threshold <= 1)) {
    return Invalid("low_threshold: ", p.low_threshold, " is not in [0, 1]");
  }
  return absl::OkStatus();
}

absl::Status CheckEditTokens(const DecodingParams& p, const SamplerEntry& entry,
                             const ModelTraits& model) {
  if (model.delete_token < 0 || model.split_token < 0) {
    return Invalid("sampler: ", entry.name,
                   " needs a model that predicts deletions and insertions (delete_token_id and "
                   "split_token_id in its config.json); use joint_threshold");
  }
  if (p.pickable_ids > 0 && std::max(model.delete_token, model.split_token) >= p.pickable_ids) {
    return Invalid("sampler: ", entry.name, " cannot predict delete_token_id ", model.delete_token,
                   " and split_token_id ", model.split_token, ": the tokenizer has ",
                   p.pickable_ids, " ids; use joint_threshold");
  }
  return absl::OkStatus();
}

absl::Status CheckModelFits(const DecodingParams& p, const SamplerEntry& entry,
                            const ModelTraits& model) {
  const bool is_score_sampler = absl::string_view(entry.name).substr(0, 5) == "sedd_";
  const bool is_renoising = Reads(entry, Knob::kCooling);
  const bool is_renoised = model.parameterization == Parameterization::kUniformPrediction;
  const bool is_score_model =
      !is_renoised && model.parameterization != Parameterization::kMaskPrediction;
  if (is_renoising && !is_renoised) {
    return Invalid("sampler: ", entry.name,
                   " needs a model that predicts clean tokens from noise (DiffusionGemma); use ",
                   model.default_sampler.empty() ? "low_confidence" : model.default_sampler);
  }
  if (!is_renoising && is_renoised) {
    return Invalid("sampler: ", entry.name,
                   is_score_sampler ? " needs a model that predicts scores (SEDD)"
                                    : " needs a model that predicts the token of a mask",
                   "; this one predicts clean tokens from noise: use gemma_renoise");
  }
  if (is_renoising && p.temperature != 0 && p.temperature != 1) {
    return Invalid("temperature: sampler ", entry.name,
                   " cools from temperature_start to temperature_end; leave it out or use 1");
  }
  if (is_score_sampler && !is_score_model) {
    return Invalid("sampler: ", entry.name, " needs a model that predicts scores (SEDD); use ",
                   model.default_sampler.empty() ? "low_confidence" : model.default_sampler);
  }
  if (!is_score_sampler && is_score_model) {
    return Invalid("sampler: ", entry.name,
                   " needs a model that predicts the token of a mask; this"
                   " one predicts scores: use sedd_analytic or sedd_euler");
  }
  if (is_score_sampler && p.temperature != 0 && p.temperature != 1) {
    return Invalid("temperature: sampler ", entry.name,
                   " draws from the scores as they are; leave "
                   "it out or use 1");
  }
  if (entry.moves_tokens) CINNABAR_RETURN_IF_ERROR(CheckEditTokens(p, entry, model));
  if (p.kv_reuse != KvReuse::kExact) {
    // Sub-blocks reuse inside of a block; finished blocks of a block-causal model are exact anyhow.
    const bool inside = Reads(entry, Knob::kSubBlockLength);
    if (model.parameterization != Parameterization::kMaskPrediction) {
      return Invalid("kv_reuse: not for models that predict scores; leave it out");
    }
    if (p.cfg_scale > 0) return Invalid("kv_reuse: not with cfg_scale; leave one of them out");
    if (inside && p.kv_reuse != KvReuse::kDual) {
      return Invalid("kv_reuse: sampler ", entry.name, " takes dual; use that or leave it out");
    }
    if (!inside && model.causal_block_length > 0) {
      return Invalid("kv_reuse: this model's finished blocks are reused exactly; leave it out");
    }
    if (entry.name == "low_confidence" && model.shift_logits) {
      return Invalid(
          "kv_reuse: with shifted logits a block's first position takes a step of its "
          "own, which the shares of low_confidence leave no room for; use threshold");
    }
  }
  if (p.cfg_scale > 0 && model.causal_block_length > 0) {
    return Invalid("cfg_scale: not for block-causal models; leave it out");
  }
  if (p.cfg_scale > 0 && model.mask_token < 0) {
    return Invalid("cfg_scale: the model has no mask token to hide the prompt with; leave it out");
  }
  if (p.logits_eos_inf && model.eos_tokens.empty()) {
    return Invalid("logits_eos_inf: the model has no EOS id; leave it out");
  }
  if (p.confidence_eos_eot_inf && model.eos_tokens.empty() && model.eot_token < 0) {
    return Invalid("confidence_eos_eot_inf: the model has neither EOS nor EoT; leave it out");
  }
  if (p.eos_early_stop && model.eos_tokens.empty() && model.eot_token < 0) {
    return Invalid("eos_early_stop: the model has neither EOS nor EoT; leave it out");
  }
  // Worst case of the exceptions for one row: mask or own token, the repeated one, those with
  // credits, EOS ids, EoT, forbidden ids.
  size_t rules = 1 + (p.repeat_penalty > 0 ? 1 : 0) + entry.row_rules + p.forbidden_ids.size();
  if (p.eos_penalty != 0 || p.logits_eos_inf || p.confidence_eos_eot_inf) {
    rules += model.eos_tokens.size() + (p.confidence_eos_eot_inf ? 1 : 0);
  }
  if (rules > kRulesMax && rules - kRulesMax > p.forbidden_ids.size()) {
    return Invalid(p.eos_penalty != 0 ? "eos_penalty"
                   : p.logits_eos_inf ? "logits_eos_inf"
                                      : "confidence_eos_eot_inf",
                   ": the model's ", model.eos_tokens.size(),
                   " EOS ids are more exceptions than the ", kRulesMax,
                   " of the vocabulary head; leave it out");
  }
  if (rules > kRulesMax) {
    return Invalid("forbidden_ids: with the model's ", model.eos_tokens.size(),
                   " EOS ids these are more exceptions than the ", kRulesMax,
                   " of the vocabulary head; forbid ", rules - kRulesMax, " ids fewer");
  }
  return absl::OkStatus();
}

int32_t CountBlocks(const ModelTraits& model, int32_t block_length, int32_t canvas_begin,
                    int32_t canvas_length) {
  if (canvas_length == 0 || block_length == 0) return 0;
  const bool aligned = model.causal_block_length > 0 && !model.causal_encoder;
  const int32_t lead = aligned ? canvas_begin % block_length : 0;
  return static_cast<int32_t>((int64_t{lead} + canvas_length + block_length - 1) / block_length);
}

}  // namespace

const char* NameOf(KvReuse reuse) {
  switch (reuse) {
    case KvReuse::kExact:
      return "exact";
    case KvReuse::kPrefix:
      return "prefix";
    case KvReuse::kDual:
      return "dual";
  }
  CINNABAR_CHECK(false) << "not a kv_reuse: " << static_cast<int>(reuse);
  return "";
}

absl::StatusOr<KvReuse> ParseKvReuse(absl::string_view name) {
  for (const KvReuse reuse : {KvReuse::kExact, KvReuse::kPrefix, KvReuse::kDual}) {
    if (name == NameOf(reuse)) return reuse;
  }
  return Invalid("\"", name.substr(0, 40), "\" is none of exact, prefix, dual");
}

absl::Span<const SamplerEntry> SamplerCatalog() { return kCatalog; }

absl::StatusOr<const SamplerEntry*> FindSampler(absl::string_view name) {
  const std::string wanted = Normalized(name);
  if (!wanted.empty()) {
    for (const SamplerEntry& entry : kCatalog) {
      if (entry.name == wanted || entry.alias == wanted) return &entry;
    }
  }
  return absl::NotFoundError(
      absl::StrCat("no sampler \"", name, "\"; there are ",
                   absl::StrJoin(kCatalog, ", ", [](std::string* out, const SamplerEntry& entry) {
                     absl::StrAppend(out, entry.name);
                   })));
}

bool SamplerRevises(absl::string_view name) {
  const SamplerEntry* const entry = Canonical(name);
  return entry != nullptr && entry->revises;
}

bool SamplerMovesTokens(absl::string_view name) {
  const SamplerEntry* const entry = Canonical(name);
  return entry != nullptr && entry->moves_tokens;
}

absl::StatusOr<DecodingParams> ResolveParams(const DecodingParams& params, const ModelTraits& model,
                                             int32_t num_masked, int32_t canvas_length,
                                             int32_t canvas_begin) {
  if (num_masked < 0 || canvas_length < num_masked || canvas_begin < 0) {
    return Invalid("a canvas of ", canvas_length, " positions from ", canvas_begin, " with ",
                   num_masked, " to fill");
  }
  DecodingParams result = params;
  if (result.sampler.empty()) result.sampler = model.default_sampler;
  if (result.sampler.empty()) {
    return Invalid("sampler: the model names no default; choose one");
  }
  const absl::StatusOr<const SamplerEntry*> found = FindSampler(result.sampler);
  if (!found.ok()) return Invalid("sampler: ", found.status().message());
  const SamplerEntry& entry = **found;
  result.sampler = std::string(entry.name);
  CINNABAR_RETURN_IF_ERROR(CheckRanges(result, model));
  CINNABAR_RETURN_IF_ERROR(CheckRevision(result, entry));
  CINNABAR_RETURN_IF_ERROR(CheckUnread(result, entry));
  CINNABAR_RETURN_IF_ERROR(CheckModelFits(result, entry, model));

  if (result.eta == -1) result.eta = entry.eta;

  const int32_t default_block =
      model.causal_block_length > 0 ? model.causal_block_length : canvas_length;
  if (result.block_length == 0) result.block_length = default_block;
  if (result.block_length != default_block) {
    if (model.causal_block_length > 0) {
      return Invalid("block_length: ", result.block_length, "; this model decodes blocks of ",
                     default_block, ", leave it out");
    }
    if (!Reads(entry, Knob::kBlockLength)) {
      return Invalid("block_length: sampler ", entry.name,
                     " decodes the whole canvas at once; leave it out");
    }
  }

  if (Reads(entry, Knob::kSubBlockLength)) {
    if (result.sub_block_length == 0) {
      result.sub_block_length =
          result.block_length % kSubBlockLength == 0 ? kSubBlockLength : result.block_length;
    }
    if (result.block_length % result.sub_block_length != 0) {
      return Invalid("sub_block_length: ", result.sub_block_length,
                     " does not divide the blocks of ", result.block_length);
    }
  }
  if (Reads(entry, Knob::kNumSteps)) {
    const int32_t num_blocks = CountBlocks(model, result.block_length, canvas_begin, canvas_length);
    if (num_blocks > kNumStepsMax) {
      return Invalid("block_length: ", result.block_length, " makes ", num_blocks,
                     " blocks, each of one step or more, but ", kNumStepsMax,
                     " steps are the most; use at least ",
                     (int64_t{canvas_length} + kNumStepsMax - 1) / kNumStepsMax);
    }
    if (result.num_steps == 0) {
      // A block of B positions in B steps takes one position at a time, and ends early when fewer
      // are masked; a single block can be given just as many steps as it needs.
      const bool one_block = model.causal_block_length == 0 && num_blocks <= 1 &&
                             absl::string_view(entry.name).substr(0, 6) != "block_";
      const int32_t of_block = Reads(entry, Knob::kCooling) ? kRenoiseSteps : result.block_length;
      const int64_t steps = one_block ? num_masked : int64_t{of_block} * std::max(num_blocks, 1);
      // Beyond the limit the same number of steps for each block, as many as fit.
      const int64_t most = kNumStepsMax / std::max(num_blocks, 1) * std::max(num_blocks, 1);
      result.num_steps = static_cast<int32_t>(std::clamp<int64_t>(steps, 1, most));
    }
    if (num_blocks > 1 && result.num_steps % num_blocks != 0) {
      const int32_t below = result.num_steps / num_blocks * num_blocks;
      return Invalid("num_steps: ", result.num_steps, " do not split evenly over ", num_blocks,
                     " blocks; use ", below > 0 ? absl::StrCat(below, " or ") : "",
                     below + num_blocks);
    }
  }
  return result;
}

}  // namespace cinnabar
