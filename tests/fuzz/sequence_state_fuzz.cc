// Any bytes as a SequenceState: an error or a state that decodes to its end under predictions of a
// toy network, which deletes and inserts now and then.
#include <google/protobuf/stubs/logging.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/base/check.h"
#include "worker/engine/sequence_state.h"

namespace cinnabar {
namespace {

void Decode(SequenceState state, const ModelTraits& model) {
  const Sampler* sampler = *GetSampler(state.params.sampler);
  StepPlan plan;
  StepOutcome outcome;
  std::vector<VocabularyAnswer> answers;
  for (int step = 0; !state.decoding.finished && step < 200; ++step) {
    const BlockRange block =
        BlockAt(state.canvas, model, state.params.block_length, state.decoding.block_index);
    const StepContext context{state.canvas, state.decoding, state.params, model, block};
    plan.Clear();
    plan.visible_end = state.canvas.length();
    sampler->Plan(context, plan);
    answers.assign(plan.queries.size(),
                   {.token = 1, .probability = 0.5, .margin = 0.2, .entropy = 1.0});
    for (size_t i = 0; i < answers.size(); ++i) {
      const TokenId moves[] = {1, model.delete_token, model.split_token};
      const TokenId token = moves[(i + static_cast<size_t>(step)) % 3];
      const auto& rules = plan.queries[i].rules;
      if (std::none_of(rules.begin(), rules.end(), [&](const VocabularyRule& rule) {
            return rule.id == token && !rule.pickable;
          })) {
        answers[i].token = token;
      }
    }
    outcome.Clear();
    sampler->Decide(context, plan, answers, outcome);
    ApplyOutcome(outcome, plan.forward, state.params, model, state.canvas, state.decoding);
  }
}

}  // namespace
}  // namespace cinnabar

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace cinnabar;  // NOLINT
  static auto* const quiet = google::protobuf::SetLogHandler(nullptr);
  (void)quiet;
  v1::SequenceState wire;
  if (!wire.ParseFromArray(data, static_cast<int>(size))) return 0;
  for (const int32_t block_length : {0, 4}) {
    ModelTraits model;
    model.vocab_size = 100;
    model.mask_token = 99;
    model.eos_tokens = {98};
    model.delete_token = 96;
    model.split_token = 97;
    model.positions_max = 64;
    model.causal_block_length = block_length;
    model.default_sampler = "low_confidence";
    const absl::StatusOr<SequenceState> state = FromWire(wire, model, "m");
    if (!state.ok()) continue;
    const absl::StatusOr<SequenceState> again = FromWire(ToWire(*state, "m"), model, "m");
    CINNABAR_CHECK(again.ok()) << again.status();
    Decode(*state, model);
  }
  return 0;
}
