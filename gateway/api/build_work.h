// From a typed request and a served model to the work that goes into the queue: tokens, canvas,
// resolved parameters, cost.
#ifndef CINNABAR_GATEWAY_API_BUILD_WORK_H_
#define CINNABAR_GATEWAY_API_BUILD_WORK_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "cinnabar/v1/work.pb.h"
#include "common/request/sampler_catalog.h"
#include "common/tokenizer/chat_template.h"
#include "common/tokenizer/tokenizer.h"
#include "gateway/api/api_error.h"
#include "gateway/api/parse_request.h"
#include "gateway/api/text_assembler.h"

namespace cinnabar {

struct Prices {
  double input_dollars_per_million = 0;
  double output_dollars_per_million = 0;
};

// A model as the gateway serves it. Immutable once made; safe from any thread.
struct ServedModel {
  std::string name;
  std::vector<std::string> aliases;
  Tokenizer tokenizer;
  std::optional<ChatTemplate> chat_template;
  ModelTraits traits;
  std::string fingerprint;
  int32_t default_canvas_tokens = 128;
  int32_t canvas_tokens_max = 4096;
  int32_t context_tokens_max = 0;  // prompt + canvas + suffix; 0: traits.positions_max
  Prices prices;
  // Take the place of what a request leaves out (seed and ids are not read). Knobs other than the
  // temperature belong to `defaults.sampler` and are left out when the request names another
  // sampler. num_steps is for default_canvas_tokens and grows and shrinks with the canvas.
  DecodingParams defaults;

  // For the models list.
  std::string description;
  std::string owned_by = "cinnabar";
  absl::Time created = absl::UnixEpoch();
  std::optional<absl::Time> shutdown_date;
};

// Whether `name` is the model's name or one of its aliases.
bool IsCalled(const ServedModel& model, absl::string_view name);
// The longest sequence: the smaller of context_tokens_max and what the network takes.
int32_t ContextTokensMax(const ServedModel& model);

// For start-up: that the tokenizer cannot write the mask token, that the vocabularies fit each
// other and that a request that asks for nothing is possible. FailedPrecondition names what is
// wrong.
absl::Status CheckServedModel(const ServedModel& model);

struct Work {
  v1::WorkItem item;
  v1::WorkHint hint;          // without tenant_weight
  int32_t prompt_tokens = 0;  // suffix included
  int32_t canvas_tokens = 0;
  int32_t steps_max = 0;  // no run makes more events
  int64_t cost = 0;       // token-steps: sequence length x predicted steps, doubled by guidance
  int64_t input_price_microdollars = 0;   // rounded up
  int64_t output_price_microdollars = 0;  // of a full canvas
  TextOptions text;                       // for the answer's TextAssembler
  std::vector<std::string> warnings;      // about this model; the same for every choice
};

// The work of one choice, 0 <= choice_index < request.num_choices(). The seed is request.seed, else
// `random`, plus the choice's index. `now` is what a chat template may print as the date; without
// it, a template that asks is an error. Errors: 400 naming the field, or 500 when the model's chat
// template needs what ours cannot do. Pure.
ApiResult<Work> BuildWork(const GenerationRequest& request, const ServedModel& model,
                          int32_t choice_index, uint64_t random,
                          std::optional<absl::Time> now = std::nullopt);

// The same for all choices, in order; each prompt is encoded once.
ApiResult<std::vector<Work>> BuildAllWork(const GenerationRequest& request,
                                          const ServedModel& model, uint64_t random,
                                          std::optional<absl::Time> now = std::nullopt);

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_API_BUILD_WORK_H_
