// What the samplers share. Private to this folder.
#ifndef CINNABAR_WORKER_DECODING_SAMPLER_SUPPORT_H_
#define CINNABAR_WORKER_DECODING_SAMPLER_SUPPORT_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "common/base/philox.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {

// Working memory of Decide(), kept from call to call so that a warm step allocates nothing. It
// carries no information between calls.
struct SelectionScratch {
  std::vector<double> scores;
  std::vector<int32_t> chosen;
};
SelectionScratch& ThreadScratch();

// Clears the plan; the network sees the whole sequence.
void StartPlan(const StepContext& context, StepPlan& plan);

// Leaves to earlier passes what params.kv_reuse says. With shifted logits a block's first position
// is decided by the row before it, which only whole passes compute: then the plan asks for that
// position alone in the block's first step (Fast-dLLM, dream/model/generation_utils_block.py).
// True: it does, and the rest of the plan must be left as it is.
bool ReuseKv(const StepContext& context, StepPlan& plan);

// Appends a query for `position`, with neutral settings.
PositionQuery& AddQuery(int32_t position, StepPlan& plan);
// A query for every undecided position of the open block.
void QueryUndecided(const StepContext& context, StepPlan& plan);

// Steps of the open block, and whether this is the last of them (or beyond, after which nothing may
// be left).
int32_t StepsOf(const StepContext& context);
bool IsLastStep(const StepContext& context);

// A uniform number and a Gumbel variate of this step, one for each position and stream.
double StepUniform(const StepContext& context, NoiseStream stream, int32_t position);
double StepGumbel(const StepContext& context, NoiseStream stream, int32_t position);

// Temperature of the statistics where they follow the sampling temperature (Dream, SDAR).
inline float TemperedStatistics(const DecodingParams& params) {
  return params.temperature > 0 ? params.temperature : 1.0F;
}

// Token and statistics from the distribution after temperature, top-p and top-k.
void SetFiltered(const DecodingParams& params, FilterOrder order, PositionQuery& query);

// LLaDA's end-of-text switches, as rules for every query of the plan.
void AddEosRules(const StepContext& context, StepPlan& plan);
// Confidence under those switches: the probability, or exactly 0 for what is to be transferred
// last.
double EosAwareConfidence(const StepContext& context, const VocabularyAnswer& answer);

// Transfers of answers chosen[...] (ascending), or of all answers.
void TransferChosen(const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
                    absl::Span<const int32_t> chosen, StepOutcome& outcome);
void TransferAll(const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
                 StepOutcome& outcome);
// TransferAll() as a rule.
inline TransferRule TakeAll(const StepPlan& plan) {
  return {.count = static_cast<int32_t>(plan.queries.size())};
}

// The samplers; each is a stateless singleton.
const Sampler* LowConfidenceSampler();
const Sampler* RandomSampler();
const Sampler* OriginSampler();
const Sampler* MaskgitPlusSampler();
const Sampler* TopkMarginSampler();
const Sampler* EntropySampler();
const Sampler* ThresholdSampler();
const Sampler* FactorSampler();
const Sampler* FastDllmV2Sampler();
const Sampler* EntropyBoundedSampler();
const Sampler* BlockStaticSampler();
const Sampler* BlockDynamicSampler();
const Sampler* BlockSequentialSampler();
const Sampler* MdlmAncestralSampler();
const Sampler* MdlmCachedSampler();
const Sampler* MdlmSemiArSampler();
const Sampler* SeddEulerSampler();
const Sampler* SeddAnalyticSampler();
const Sampler* RemdmCapSampler();
const Sampler* RemdmRescaleSampler();
const Sampler* RemdmConfSampler();
const Sampler* RemdmLoopSampler();
const Sampler* DfmCorrectorSampler();
const Sampler* PathPlanningSampler();
const Sampler* PathPlanningRandomSampler();
const Sampler* PathPlanningOpenSampler();
const Sampler* Rnd1Sampler();
const Sampler* Rnd1EntropyBoundedSampler();
const Sampler* JointThresholdSampler();
const Sampler* JointThresholdInDelSampler();
const Sampler* HierarchicalSampler();
const Sampler* HierarchicalRemaskSampler();
const Sampler* CreditSampler();
const Sampler* Bd3lmFirstHittingSampler();
const Sampler* Bd3lmScheduledSampler();
const Sampler* GemmaRenoiseSampler();

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_DECODING_SAMPLER_SUPPORT_H_
