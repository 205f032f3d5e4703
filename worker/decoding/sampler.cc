#include "worker/decoding/sampler.h"

#include <algorithm>

#include "absl/algorithm/container.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/decoding/sampler_support.h"
#include "worker/decoding/token_moves.h"

namespace cinnabar {

// ResolveParams counts with this number but cannot see the header.
static_assert(kVocabularyRulesMax == 16);

namespace {

struct Registration {
  absl::string_view name;
  const Sampler* (*get)();
};

constexpr Registration kRegistry[] = {
    {"low_confidence", LowConfidenceSampler},
    {"random", RandomSampler},
    {"origin", OriginSampler},
    {"maskgit_plus", MaskgitPlusSampler},
    {"topk_margin", TopkMarginSampler},
    {"entropy", EntropySampler},
    {"threshold", ThresholdSampler},
    {"factor", FactorSampler},
    {"fast_dllm_v2", FastDllmV2Sampler},
    {"entropy_bounded", EntropyBoundedSampler},
    {"block_static", BlockStaticSampler},
    {"block_dynamic", BlockDynamicSampler},
    {"block_sequential", BlockSequentialSampler},
    {"mdlm_ancestral", MdlmAncestralSampler},
    {"mdlm_cached", MdlmCachedSampler},
    {"mdlm_semi_ar", MdlmSemiArSampler},
    {"sedd_euler", SeddEulerSampler},
    {"sedd_analytic", SeddAnalyticSampler},
    {"remdm_cap", RemdmCapSampler},
    {"remdm_rescale", RemdmRescaleSampler},
    {"remdm_conf", RemdmConfSampler},
    {"remdm_loop", RemdmLoopSampler},
    {"dfm_corrector", DfmCorrectorSampler},
    {"p2", PathPlanningSampler},
    {"p2_random", PathPlanningRandomSampler},
    {"p2_open", PathPlanningOpenSampler},
    {"rnd1", Rnd1Sampler},
    {"rnd1_entropy_bounded", Rnd1EntropyBoundedSampler},
    {"joint_threshold", JointThresholdSampler},
    {"joint_threshold_indel", JointThresholdInDelSampler},
    {"hierarchical", HierarchicalSampler},
    {"hierarchical_remask", HierarchicalRemaskSampler},
    {"credit", CreditSampler},
    {"bd3lm_first_hitting", Bd3lmFirstHittingSampler},
    {"bd3lm_scheduled", Bd3lmScheduledSampler},
    {"gemma_renoise", GemmaRenoiseSampler},
};

// Keeps capacity.
void ClearMemory(DecodingState& state) {
  state.memory.original.clear();
  state.memory.tried.clear();
  state.memory.seen.clear();
}

// Whether the open block has undecided positions; where tokens move, of those it was opened with.
bool HasMasks(const Canvas& canvas, BlockRange block, const BlockMemory& memory) {
  for (int32_t i = block.begin; i < block.end; ++i) {
    if (!canvas.undecided(i)) continue;
    if (memory.original.empty() || memory.original[i - block.begin] != 0) return true;
  }
  return false;
}

// Opens block `index` or the first one after it that has something to fill.
void OpenBlock(const Canvas& canvas, const DecodingParams& params, const ModelTraits& model,
               int32_t index, DecodingState& state) {
  const int32_t num_blocks = NumBlocks(canvas, model, params.block_length);
  state.block_step = 0;
  state.reused_block.clear();
  state.block_edits = 0;
  state.predictions.clear();
  state.stable_steps = 0;
  state.credits.clear();
  ClearMemory(state);
  for (; index < num_blocks; ++index) {
    const BlockRange block = BlockAt(canvas, model, params.block_length, index);
    state.block_masks = CountUndecided(canvas, block.begin, block.end);
    if (state.block_masks == 0) continue;
    state.block_index = index;
    if (SamplerMovesTokens(params.sampler)) {
      for (int32_t i = block.begin; i < block.end; ++i) {
        state.memory.original.push_back(canvas.undecided(i) ? 1 : 0);
      }
    }
    return;
  }
  state.block_index = num_blocks;
  state.block_masks = 0;
  state.finished = true;
}

}  // namespace

void StepPlan::Clear() {
  forward = true;
  sigma = 0.0F;
  prediction_temperature = 1.0F;
  visible_begin = 0;
  visible_end = 0;
  rows_begin = 0;
  rows_end = 0;
  queries.clear();
}

void StepOutcome::Clear() {
  transfers.clear();
  settled = false;
  stays_open = false;
  predictions.clear();
  credits.clear();
  edits.clear();
}

absl::StatusOr<const Sampler*> GetSampler(absl::string_view name) {
  CINNABAR_ASSIGN_OR_RETURN(const SamplerEntry* const entry, FindSampler(name));
  for (const Registration& registration : kRegistry) {
    if (registration.name == entry->name) return registration.get();
  }
  return absl::NotFoundError(absl::StrCat("sampler ", entry->name, " is not part of this build"));
}

std::vector<absl::string_view> RegisteredSamplers() {
  std::vector<absl::string_view> names;
  for (const Registration& registration : kRegistry) names.push_back(registration.name);
  return names;
}

DecodingState BeginDecoding(const Canvas& canvas, const DecodingParams& params,
                            const ModelTraits& model) {
  DecodingState state;
  const absl::StatusOr<const SamplerEntry*> entry = FindSampler(params.sampler);
  if (entry.ok() && (*entry)->remembers) state.confidences.resize(canvas.length());
  OpenBlock(canvas, params, model, 0, state);
  return state;
}

void RememberBlock(const Canvas& canvas, const BlockRange& block, DecodingState& state) {
  state.reused_block.assign(canvas.tokens.begin() + block.begin, canvas.tokens.begin() + block.end);
}

void ApplyOutcome(const StepOutcome& outcome, bool forward, const DecodingParams& params,
                  const ModelTraits& model, Canvas& canvas, DecodingState& state) {
  CINNABAR_CHECK(!state.finished) << "a step after the last";
  const BlockRange block = BlockAt(canvas, model, params.block_length, state.block_index);
  const bool edits = !HasMasks(canvas, block, state.memory);
  const bool revises = SamplerRevises(params.sampler);
  if (!state.memory.original.empty()) {
    RememberEdits(canvas, block, outcome.edits, model, state.memory);
  }
  int32_t previous = -1;
  for (const Transfer& transfer : outcome.transfers) {
    const int32_t position = transfer.position;
    CINNABAR_CHECK(position > previous && position >= block.begin && position < block.end)
        << "transfer to position " << position << " of block " << block.begin << " .. "
        << block.end;
    previous = position;
    const bool committed = canvas.states[position] == PositionState::kCommitted;
    CINNABAR_CHECK(committed ? revises : canvas.undecided(position))
        << "position " << position << " is decided";
    if (!state.confidences.empty()) state.confidences[position] = transfer.confidence;
    if (transfer.token == kMaskedAgain) {
      CINNABAR_CHECK(committed && model.mask_token >= 0)
          << "token " << transfer.token << " at position " << position;
      canvas.tokens[position] = model.mask_token;
      canvas.states[position] = PositionState::kMasked;
      continue;
    }
    CINNABAR_CHECK(transfer.token >= 0 && transfer.token < model.vocab_size &&
                   transfer.token != model.mask_token)
        << "token " << transfer.token << " at position " << position;
    canvas.tokens[position] = transfer.token;
    if (canvas.states[position] == PositionState::kMasked) {
      canvas.states[position] = PositionState::kCommitted;
    }
  }
  if (outcome.settled) {
    for (int32_t i = block.begin; i < block.end; ++i) {
      if (canvas.states[i] == PositionState::kNoise) canvas.states[i] = PositionState::kCommitted;
    }
  }
  ++state.step;
  ++state.block_step;
  if (edits) ++state.block_edits;
  state.credits.assign(outcome.credits.begin(), outcome.credits.end());
  if (forward) ++state.nfe;
  if (!outcome.predictions.empty()) {
    state.stable_steps = outcome.predictions == state.predictions ? state.stable_steps + 1 : 1;
    state.predictions.assign(outcome.predictions.begin(), outcome.predictions.end());
  }
  if (!outcome.stays_open && CountUndecided(canvas, block.begin, block.end) == 0) {
    OpenBlock(canvas, params, model, state.block_index + 1, state);
  }
  if (params.eos_early_stop && FindEndOfText(canvas, state, params, model) < canvas.end) {
    state.finished = true;
    ClearMemory(state);
  }
}

bool MemoryFits(const BlockMemory& memory, const Canvas& canvas, BlockRange block,
                int32_t block_step, const ModelTraits& model) {
  if (static_cast<int32_t>(memory.original.size()) != block.end - block.begin ||
      static_cast<int64_t>(memory.seen.size()) > block_step) {
    return false;
  }
  for (int32_t i = block.begin; i < block.end; ++i) {
    const bool given = canvas.states[i] == PositionState::kGiven;
    if (memory.original[i - block.begin] > (given ? 0 : 1)) return false;
  }
  size_t num_of_position = 0;
  for (size_t i = 0; i < memory.tried.size(); ++i) {
    const TokenEdit& tried = memory.tried[i];
    const bool same = i > 0 && memory.tried[i - 1].position == tried.position;
    num_of_position = same ? num_of_position + 1 : 1;
    if ((i > 0 && memory.tried[i - 1].position > tried.position) ||
        num_of_position > kTriedPerPositionMax || tried.position < block.begin ||
        tried.position >= block.end || canvas.states[tried.position] == PositionState::kGiven ||
        tried.token < 0 || tried.token >= model.vocab_size) {
      return false;
    }
  }
  return true;
}

bool CreditsFit(absl::Span<const Credit> credits, const Canvas& canvas, BlockRange block,
                const ModelTraits& model) {
  size_t num_of_position = 0;
  for (size_t i = 0; i < credits.size(); ++i) {
    const Credit& credit = credits[i];
    const bool same = i > 0 && credits[i - 1].position == credit.position;
    num_of_position = same ? num_of_position + 1 : 1;
    const bool after = i == 0 || credits[i - 1].position < credit.position ||
                       (same && credits[i - 1].token < credit.token);
    if (!after || num_of_position > kCreditsPerPositionMax || credit.position < block.begin ||
        credit.position >= block.end || !canvas.undecided(credit.position) || credit.token < 0 ||
        credit.token >= model.vocab_size || credit.token == model.mask_token ||
        !(credit.value >= 0 && credit.value <= kCreditMax)) {
      return false;
    }
  }
  return true;
}

int32_t FinalEnd(const Canvas& canvas, const DecodingState& state, const DecodingParams& params,
                 const ModelTraits& model) {
  int32_t open = canvas.length();
  if (!state.finished && SamplerRevises(params.sampler)) {
    open = BlockAt(canvas, model, params.block_length, state.block_index).begin;
  }
  int32_t position = 0;
  while (position < canvas.length() && !canvas.undecided(position) &&
         (position < open || canvas.states[position] == PositionState::kGiven)) {
    ++position;
  }
  return position;
}

int32_t FindEndOfText(const Canvas& canvas, const DecodingState& state,
                      const DecodingParams& params, const ModelTraits& model) {
  const int32_t final_end = std::min(FinalEnd(canvas, state, params, model), canvas.end);
  for (int32_t i = canvas.begin; i < final_end; ++i) {
    if (canvas.states[i] == PositionState::kGiven) continue;
    const TokenId token = canvas.tokens[i];
    if (token == model.eot_token || absl::c_linear_search(model.eos_tokens, token)) return i;
  }
  return canvas.end;
}

int32_t StepsPerBlock(const Canvas& canvas, const DecodingParams& params,
                      const ModelTraits& model) {
  const int32_t num_blocks = std::max(NumBlocks(canvas, model, params.block_length), 1);
  return std::max(params.num_steps / num_blocks, 1);
}

}  // namespace cinnabar
