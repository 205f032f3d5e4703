// Runs samplers without a model: a fake network (logits are a function of what it sees), a real or
// a reference vocabulary head, and the loop around Plan(), Decide() and ApplyOutcome().
#ifndef CINNABAR_TESTS_UNIT_DECODING_DECODING_HARNESS_H_
#define CINNABAR_TESTS_UNIT_DECODING_DECODING_HARNESS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/request/decoding_params.h"
#include "common/request/sampler_catalog.h"
#include "kernels/backend.h"
#include "worker/decoding/canvas.h"
#include "worker/decoding/sampler.h"

namespace cinnabar {

// Small models, one of each kind that decoding tells apart. The mask token of the first two is not
// the last id, their last two ids have no text, and they predict insertions and deletions.
ModelTraits MaskModel();     // full attention
ModelTraits BlockModel();    // block-causal, blocks of 4
ModelTraits AbsorbModel();   // SEDD, log-linear noise
ModelTraits UniformModel();  // SEDD without a mask token, geometric noise
ModelTraits NoiseModel();    // predicts clean tokens from noise, causal encoder, blocks of 4
std::vector<ModelTraits> AllModels();
bool Fits(const SamplerEntry& entry, const ModelTraits& model);
bool Reads(const SamplerEntry& entry, Knob knob);
const SamplerEntry& EntryOf(absl::string_view name);  // CHECKs that there is one

// The logits [vocab_size] of `position`, when the network sees `tokens` at noise level `sigma`.
using Network = std::function<std::vector<float>(absl::Span<const TokenId> tokens, int32_t position,
                                                 float sigma)>;

// Logits that change altogether when any token, the position or sigma does, `spread` wide; exact in
// float32 and never equal in one row. For score models log-scores, with 0 for the own token. Any id
// may be the best one, the mask token and those without text too, unless `text_is_best`: then these
// stay below the others' best, so that a filter always keeps an id that may be picked.
Network HashNetwork(const ModelTraits& model, double spread, uint64_t seed,
                    bool text_is_best = false);
// The same rows whatever it sees.
Network FixedNetwork(std::vector<std::vector<float>> rows);

// Answers queries about rows of logits: hidden_row and unconditional_row index `rows`.
class Head {
 public:
  virtual ~Head() = default;
  virtual std::vector<VocabularyAnswer> Answer(const std::vector<std::vector<float>>& rows,
                                               absl::Span<const VocabularyQuery> queries) = 0;
};
std::unique_ptr<Head> CpuHead();        // the CPU backend
std::unique_ptr<Head> ReferenceHead();  // in double (tests/unit/kernels/vocabulary_reference.h)

struct Request {
  std::vector<TokenId> ids;
  std::vector<bool> given;
  DecodingParams params;
};

struct Sequence {
  Canvas canvas;
  DecodingParams params;  // resolved
  DecodingState state;
  ModelTraits model;
  Network network;

  StepContext context() const;
};

// CHECKs that the request is valid.
Sequence Begin(const Request& request, const ModelTraits& model, const Network& network);

// One step: Plan() into `plan`, then the queries of the plan as the engine would complete them.
// `queries` point into `rules`, which must not grow afterwards.
void PlanStep(const Sequence& sequence, StepPlan& plan);
struct StepQueries {
  std::vector<std::vector<float>> rows;
  std::vector<std::vector<VocabularyRule>> rules;
  std::vector<VocabularyQuery> queries;
};
// `rows_of_network` false leaves the rows out: hidden_row is then the position.
StepQueries QueriesOf(const Sequence& sequence, const StepPlan& plan, bool rows_of_network = true);
std::vector<VocabularyAnswer> AnswerStep(const Sequence& sequence, const StepPlan& plan,
                                         Head& head);
// Decide() and ApplyOutcome(). Fails the test when the outcome breaks the contract of StepOutcome.
StepOutcome FinishStep(const StepPlan& plan, absl::Span<const VocabularyAnswer> answers,
                       Sequence& sequence);

struct StepRecord {
  DecodingState before;
  BlockRange block;
  StepPlan plan;
  StepOutcome outcome;
};
// To the end, or for `num_steps_max` steps.
std::vector<StepRecord> RunToEnd(Sequence& sequence, Head& head, int32_t num_steps_max = 100000);

// A random request of up to 26 positions that the sampler and the model take: prompt, suffix,
// holes, nothing given or one hole; every knob that the sampler reads is set in some of them (but
// not eos_early_stop, so that all is filled), and so are the penalty, the forbidden ids (2, 4 and
// 7) and the limit of ids.
Request RandomRequest(const SamplerEntry& entry, const ModelTraits& model, uint32_t seed);

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_UNIT_DECODING_DECODING_HARNESS_H_
