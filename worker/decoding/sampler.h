// Samplers: pure functions from the canvas and per-position statistics to transfers.
//
// A denoising step of one sequence is: Plan() says which positions need which statistics, the
// engine runs one forward pass for the whole batch and answers, Decide() turns the answers into
// transfers, and ApplyOutcome() writes them and moves DecodingState on. No sampler keeps state of
// its own: everything is in Canvas, DecodingState and DecodingParams, and randomness is
// NoiseWord(seed, position, step), so a sequence runs the same alone or in any batch and resumes
// bit-exactly from any step.
#ifndef CINNABAR_WORKER_DECODING_SAMPLER_H_
#define CINNABAR_WORKER_DECODING_SAMPLER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/request/decoding_params.h"
#include "common/request/sampler_catalog.h"
#include "kernels/backend.h"
#include "worker/decoding/canvas.h"

namespace cinnabar {

// How often a plan may ask for one position, so that room for the answers can be taken at start-up.
inline constexpr int32_t kQueriesPerPositionMax = 3;

// What a masked position remembers of a token that was its best in earlier steps (sampler credit).
struct Credit {
  int32_t position = 0;
  TokenId token = 0;
  float value = 0.0F;  // in [0, kCreditMax]
};
inline constexpr size_t kCreditsPerPositionMax = 6;
inline constexpr float kCreditMax = 5.0F;  // of at most 1 in each step, times 0.8 from step to step

// A token that was written to a position of the open block (samplers that move tokens).
struct TokenEdit {
  int32_t position = 0;
  TokenId token = 0;
};
inline constexpr size_t kTriedPerPositionMax = 7;

// What a sampler that moves tokens knows of the open block. `original` moves with the tokens,
// `tried` stays at its positions.
struct BlockMemory {
  // For each position of the block, 1 where what stands there, masked or not, has been the block's
  // since it was opened; 0 for given positions and for masks that were put in later, whatever they
  // became.
  std::vector<uint8_t> original;
  // By ascending position, then in the order of their first being written; of more than
  // kTriedPerPositionMax the oldest is forgotten.
  std::vector<TokenEdit> tried;
  // BlockKey() of the block before each step so far, those that came again once.
  std::vector<uint64_t> seen;
};

// Where a sequence stands between two denoising steps. With the canvas and the params it is all
// that is needed to go on.
struct DecodingState {
  int32_t block_index = 0;
  int32_t block_step = 0;   // steps done in the open block
  int32_t block_masks = 0;  // undecided positions when the open block was opened
  // Steps done in the open block that began with nothing undecided in it; where tokens move, with
  // nothing undecided that was so when the block was opened.
  int32_t block_edits = 0;
  int32_t step = 0;  // denoising steps done in all; keys the random source
  int32_t nfe = 0;   // forward passes taken part in
  bool finished = false;
  // By position, the confidence with which its token was committed (0: not committed). Empty unless
  // the sampler remembers (SamplerEntry).
  std::vector<float> confidences;
  // kv_reuse other than exact: the open block's tokens as they stood in the last pass that computed
  // every position, from which reused keys and values can be had again. Empty: no such pass yet.
  std::vector<TokenId> reused_block;
  // Of the open block, for samplers that look whether their predictions still change: those of the
  // last step, and in how many steps up to it they were the same.
  std::vector<TokenId> predictions;
  int32_t stable_steps = 0;
  // Of undecided positions of the open block, by ascending position, then token.
  std::vector<Credit> credits;
  BlockMemory memory;  // empty unless the sampler moves tokens
};

// Everything a sampler may look at.
struct StepContext {
  const Canvas& canvas;
  const DecodingState& state;
  const DecodingParams& params;  // resolved (ResolveParams)
  const ModelTraits& model;
  BlockRange block;  // the open block
};

// Statistics wanted for one position: VocabularyQuery without rows. The engine adds rows, guidance
// and the rules common to all (mask token not pickable, EOS penalty, forbidden ids); a rule given
// here for the same id wins over the common one.
struct PositionQuery {
  int32_t position = 0;
  PickRule pick = PickRule::kSoftmax;
  float pick_temperature = 0.0F;
  float statistics_temperature = 1.0F;
  int32_t top_k = 0;
  float top_p = 1.0F;
  TopPRule top_p_rule = TopPRule::kCrossing;
  FilterOrder filter_order = FilterOrder::kTopPThenTopK;
  float sigma_step = 0.0F;
  bool want_top = false;
  absl::InlinedVector<VocabularyRule, kForbiddenIdsMax> rules;  // usually empty
};

struct StepPlan {
  bool forward = true;  // false: nothing to compute, Decide() is called with no answers
  float sigma = 0.0F;   // noise level for networks that read it
  float prediction_temperature = 1.0F;  // at which the next step reads this one's prediction
  // Positions [begin, end) that the network sees; positions restart from 0 at `begin`. Block-causal
  // models see everything up to the end of the open block, or up to `end` where that comes before.
  int32_t visible_begin = 0;
  int32_t visible_end = 0;
  // Not empty: positions [begin, end) alone are computed, and see the others' keys and values as
  // the last whole pass of the open block left them (state.reused_block is not empty).
  int32_t rows_begin = 0;
  int32_t rows_end = 0;
  // Ascending positions, inside the open block; a position may be asked for up to
  // kQueriesPerPositionMax times.
  std::vector<PositionQuery> queries;

  void Clear();  // keeps capacity
};

// Transfer::token of a position that is masked again.
inline constexpr TokenId kMaskedAgain = -1;

struct Transfer {
  int32_t position = 0;
  TokenId token = 0;
  float confidence = 0.0F;  // probability of the token as the sampler saw it
  bool revises = false;     // the position was committed before; set by the engine, for its report

  // What it adds to the number of decided positions.
  int32_t num_committed() const { return !revises ? 1 : token == kMaskedAgain ? -1 : 0; }
};

struct StepOutcome {
  // Ascending positions. For kMasked positions the token becomes committed. For kNoise positions it
  // replaces the token; `settled` says whether all kNoise positions of the block are now committed.
  // Samplers that revise may also name committed positions: the token replaces theirs, or masks
  // them again.
  std::vector<Transfer> transfers;
  bool settled = false;
  bool stays_open = false;           // the block goes on though nothing of it is undecided
  std::vector<TokenId> predictions;  // see DecodingState; empty: the sampler keeps none
  std::vector<Credit> credits;       // DecodingState::credits after this step
  // Samplers that move tokens: what is written before they move, the mask token, delete_token and
  // split_token included, at ascending positions of the open block that are not given. `transfers`
  // are what follows from it (AppendMoves).
  std::vector<TokenEdit> edits;

  void Clear();
};

class Sampler {
 public:
  virtual ~Sampler() = default;

  // Fills `plan` (cleared before). Called at the start of each denoising step, with at least one
  // undecided position in the open block unless the outcome before it said that it stays open.
  // Pure; no allocation beyond growing plan's vectors.
  virtual void Plan(const StepContext& context, StepPlan& plan) const = 0;

  // answers[i] belongs to plan.queries[i]; log_sum_exp already includes the network's output offset
  // (SEDD). Every answer is finite (the engine fails a sequence whose row is not). Ties: the lower
  // position.
  virtual void Decide(const StepContext& context, const StepPlan& plan,
                      absl::Span<const VocabularyAnswer> answers, StepOutcome& outcome) const = 0;

  // Decide() in terms that a device can follow before the host has seen the answers: whatever they
  // are, it transfers those that the rule takes, candidates being the queries of `plan` in their
  // order, and does nothing else. Empty where it does more, or otherwise. Pure.
  virtual std::optional<TransferRule> Describe(const StepContext&, const StepPlan&) const {
    return std::nullopt;
  }
};

// Stateless singletons, one line of registration each. NotFound lists the names.
absl::StatusOr<const Sampler*> GetSampler(absl::string_view name);
std::vector<absl::string_view> RegisteredSamplers();

// The state before the first step: block 0 open (blocks without undecided positions are passed
// over); finished at once when nothing is undecided.
DecodingState BeginDecoding(const Canvas& canvas, const DecodingParams& params,
                            const ModelTraits& model);

// kv_reuse: a pass over the whole open block has been made, with the tokens that stand there now.
void RememberBlock(const Canvas& canvas, const BlockRange& block, DecodingState& state);

// Writes the transfers (CHECKs that none touches a given position, none a committed one unless the
// sampler revises, and none writes the mask token), brings the memory of what the edits moved up to
// date, counts the step (and the forward pass when `forward`), and opens the next block when the
// open one has no undecided position left and does not stay open; finished after the last, and with
// `eos_early_stop` when an end of text (EOS or EoT) and all before it is final.
void ApplyOutcome(const StepOutcome& outcome, bool forward, const DecodingParams& params,
                  const ModelTraits& model, Canvas& canvas, DecodingState& state);

// Whether `memory` is as BlockMemory says, for an open block of which `block_step` steps are done.
bool MemoryFits(const BlockMemory& memory, const Canvas& canvas, BlockRange block,
                int32_t block_step, const ModelTraits& model);

// Whether `credits` are as DecodingState::credits says.
bool CreditsFit(absl::Span<const Credit> credits, const Canvas& canvas, BlockRange block,
                const ModelTraits& model);

// Positions [0, this) never change again.
int32_t FinalEnd(const Canvas& canvas, const DecodingState& state, const DecodingParams& params,
                 const ModelTraits& model);

// The first end of text among the final positions that were not given; canvas.end when there is
// none.
int32_t FindEndOfText(const Canvas& canvas, const DecodingState& state,
                      const DecodingParams& params, const ModelTraits& model);

// Steps that the open block gets: num_steps split evenly over the blocks (validated to divide).
int32_t StepsPerBlock(const Canvas& canvas, const DecodingParams& params, const ModelTraits& model);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_DECODING_SAMPLER_H_
