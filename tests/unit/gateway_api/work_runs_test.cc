// What BuildWork makes, run by the worker's own sequence and samplers with made-up predictions.
#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/wire/decoding_params_wire.h"
#include "tests/unit/gateway_api/served_model.h"
#include "worker/decoding/sampler.h"
#include "worker/engine/sequence_state.h"

namespace cinnabar {
namespace {

// As a worker reads the item.
absl::StatusOr<SequenceState> ReadItem(const v1::WorkItem& item, const ModelTraits& traits) {
  std::vector<bool> given(item.ids_size(), true);
  for (const v1::Span& span : item.undecided()) {
    std::fill(given.begin() + span.begin(), given.begin() + span.end(), false);
  }
  return MakeSequence(std::vector<TokenId>(item.ids().begin(), item.ids().end()), given,
                      *FromWire(item.params()), traits);
}

// Steps until nothing is undecided, when no prediction is ever better than `confidence`. A model
// that inserts does so in two of three steps.
int32_t CountSteps(SequenceState state, const ModelTraits& traits, double confidence,
                   int32_t steps_max) {
  const Sampler& sampler = **GetSampler(state.params.sampler);
  int32_t steps = 0;
  while (!state.decoding.finished && steps <= steps_max + 100) {
    const StepContext context{
        state.canvas, state.decoding, state.params, traits,
        BlockAt(state.canvas, traits, state.params.block_length, state.decoding.block_index)};
    StepPlan plan;
    sampler.Plan(context, plan);
    std::vector<VocabularyAnswer> answers(plan.queries.size(),
                                          VocabularyAnswer{.token = 7,
                                                           .token_logit = 1,
                                                           .probability = confidence,
                                                           .margin = confidence / 2,
                                                           .entropy = 5,
                                                           .log_sum_exp = 1});
    for (size_t i = 0; i < answers.size() && traits.split_token >= 0 && steps % 3 != 0; ++i) {
      const auto& rules = plan.queries[i].rules;
      if (std::none_of(rules.begin(), rules.end(), [&](const VocabularyRule& rule) {
            return rule.id == traits.split_token && !rule.pickable;
          })) {
        answers[i].token = traits.split_token;
      }
    }
    StepOutcome outcome;
    sampler.Decide(context, plan, answers, outcome);
    ApplyOutcome(outcome, plan.forward, state.params, traits, state.canvas, state.decoding);
    ++steps;
  }
  return steps;
}

TEST(WorkRunsTest, AWorkerAcceptsTheItemAndNeedsNoMoreStepsThanWasSaid) {
  int num_runs = 0;
  for (const SamplerEntry& entry : SamplerCatalog()) {
    if (entry.name == "gemma_renoise") continue;  // of a model with an encoder
    const bool score = entry.name.substr(0, 5) == "sedd_";
    for (const int canvas : {1, 5, 16, 33, 90}) {
      for (const int causal_block : {0, 8}) {
        for (const std::string more : {"", R"(, "steps": 4)", R"(, "steps": 90)"}) {
          ServedModel model = TinyModel();
          model.traits.causal_block_length = causal_block;
          if (entry.moves_tokens) {
            model.traits.delete_token = 5;
            model.traits.split_token = 6;
          }
          if (score) {
            model.traits.parameterization = Parameterization::kAbsorbScore;
            model.traits.sigma_max = 20;
            model.traits.sigma_min = 1e-4F;
          }
          const auto request = ParseGenerationRequest(
              GenerationRequest::Endpoint::kCompletion,
              absl::StrCat(R"({"model": "tiny", "prompt": "a b c", "max_tokens": )", canvas,
                           R"(, "diffusion": {"sampler": ")", entry.name, "\"", more, "}}"));
          ASSERT_TRUE(request.ok());
          const ApiResult<Work> work = BuildWork(*request, model, 0, 3);
          if (!work.ok()) {
            EXPECT_FALSE(more.empty()) << ErrorBody(work.error());
            continue;
          }
          SCOPED_TRACE(absl::StrCat(entry.name, " canvas ", canvas, " block ", causal_block, more));
          const absl::StatusOr<SequenceState> state = ReadItem(work->item, model.traits);
          ASSERT_TRUE(state.ok()) << state.status();
          EXPECT_EQ(ToWire(state->params).SerializeAsString(),
                    work->item.params().SerializeAsString());
          for (const double confidence : {0.01, 0.999}) {
            EXPECT_LE(CountSteps(*state, model.traits, confidence, work->steps_max),
                      work->steps_max);
            ++num_runs;
          }
        }
      }
    }
  }
  EXPECT_GT(num_runs, 400);
}

}  // namespace
}  // namespace cinnabar
