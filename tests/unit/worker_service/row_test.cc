// A request killed after any step and taken up elsewhere, from any snapshot, publishes the same
// deltas and ends with the same bytes as the run that nobody disturbed: on the golden checkpoints,
// by the worker's own conversions.
#include "worker/service/row.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/wire/decoding_params_wire.h"
#include "kernels/backend.h"
#include "worker/engine/sequence_state.h"

namespace cinnabar {
namespace {

constexpr char kFingerprint[] = "weights";
constexpr ForwardLimits kLimits{.rows_max = 128, .sequences_max = 2, .positions_max = 96};

struct Case {
  const char* model;
  const char* sampler;
  int32_t num_steps;  // 0: a position each
  float temperature;
  KvReuse kv_reuse = KvReuse::kExact;
};

// What a worker published of a row from where it took it up.
struct Course {
  std::vector<std::string> deltas;
  std::vector<std::optional<std::string>> snapshots;  // behind step i + 1; none within a turn
  std::string result;
};

class RowTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    backend_ = *MakeBackend(BackendKind::kCpu, {.num_threads = 1});
    const char* source = std::getenv("CINNABAR_SOURCE_DIR");
    auto denoiser = LoadDenoiser(
        absl::StrCat(source == nullptr ? "." : source, "/tests/golden/models/", GetParam().model),
        *backend_, {}, kLimits);
    ASSERT_TRUE(denoiser.ok()) << denoiser.status();
    denoiser_ = *std::move(denoiser);
  }
  const ModelTraits& traits() const { return denoiser_->traits(); }

  // Prompt, 16 positions to fill, and a suffix where the model can read one.
  std::string Payload() const {
    v1::WorkItem item;
    item.set_format(1);
    item.set_model("m");
    item.set_model_fingerprint(kFingerprint);
    const int32_t length = traits().causal_block_length > 0 ? 24 : 27;
    for (int32_t i = 0; i < length; ++i) {
      TokenId id = (i * 7 + 3) % std::min(traits().vocab_size, 90);
      if (id == traits().mask_token) ++id;
      item.add_ids(id);
    }
    v1::Span& undecided = *item.add_undecided();
    undecided.set_begin(8);
    undecided.set_end(24);
    *item.mutable_answer() = undecided;
    DecodingParams params;
    params.sampler = GetParam().sampler;
    params.seed = 11;
    params.num_steps = GetParam().num_steps;
    params.temperature = GetParam().temperature;
    if ((*FindSampler(params.sampler))->eta >= 0) params.eta = 0.3F;
    params.kv_reuse = GetParam().kv_reuse;
    if (params.kv_reuse != KvReuse::kExact) params.threshold = 0.5F;
    if (params.sampler == "fast_dllm_v2") params.sub_block_length = 4;
    if (params.sampler == "joint_threshold" || params.sampler == "joint_threshold_indel") {
      params.edit_threshold = 0.2F;
    }
    *item.mutable_params() = ToWire(params);
    return item.SerializeAsString();
  }

  // BuildRow, and to its end.
  Course RunFrom(const StartedRow& started) {
    Course run;
    const absl::StatusOr<RowPlan> plan = BuildRow(started, 0, traits(), kFingerprint);
    EXPECT_TRUE(plan.ok()) << plan.status();
    if (!plan.ok()) return run;
    Engine engine(*denoiser_, {.limits = kLimits});
    const absl::StatusOr<SequenceId> id = engine.Add(plan->state);
    EXPECT_TRUE(id.ok()) << id.status();
    if (!id.ok()) return run;
    StepReport report;
    while (engine.num_sequences() > 0 && run.deltas.size() < 200) {
      const absl::Status status = engine.Step(absl::InfinitePast(), report);
      EXPECT_TRUE(status.ok()) << status;
      auto finished = engine.TakeFinished();
      const SequenceState* state = finished.empty() ? engine.Find(*id) : &finished[0].second;
      for (const StepEvent& event : report.events) {
        EXPECT_TRUE(event.status.ok()) << event.status;
        const v1::StepDelta delta =
            MakeDelta(report, event, *state, plan->facts, traits(), absl::ZeroDuration(), Usage{});
        run.deltas.push_back(delta.SerializeAsString());
        std::optional<std::string>& snapshot = run.snapshots.emplace_back();
        if (state->decoding.step == event.step + 1) {
          snapshot = ToWire(*state, kFingerprint).SerializeAsString();
        }
        if (event.finished) {
          run.result = MakeResult(*state, plan->facts, traits(), Usage{}).SerializeAsString();
        }
      }
    }
    return run;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Denoiser> denoiser_;
};

TEST_P(RowTest, ResumedAfterAnyStepFromAnySnapshotItEndsAlike) {
  StartedRow started;
  started.payload = Payload();
  const Course whole = RunFrom(started);
  ASSERT_FALSE(whole.result.empty());
  const auto num_steps = static_cast<int32_t>(whole.deltas.size());
  ASSERT_GT(num_steps, 1);
  int num_resumed = 0;
  for (int32_t step = 1; step < num_steps; ++step) {
    for (int32_t from = 0; from <= step; ++from) {
      // From the start, and from the last few snapshots.
      if (from > 0 && (from < step - 3 || !whole.snapshots[from - 1].has_value())) continue;
      SCOPED_TRACE(absl::StrCat("killed after step ", step, ", snapshot of step ", from));
      StartedRow again = started;
      again.step = step;
      again.snapshot_step = from;
      if (from > 0) again.snapshot = *whole.snapshots[from - 1];
      again.deltas.assign(whole.deltas.begin() + from, whole.deltas.begin() + step);
      const Course rest = RunFrom(again);
      EXPECT_EQ(rest.deltas,
                std::vector<std::string>(whole.deltas.begin() + step, whole.deltas.end()));
      EXPECT_EQ(rest.result, whole.result);
      if (HasFailure()) return;
      ++num_resumed;
    }
  }
  EXPECT_GE(num_resumed, num_steps);
}

// What a stream has sent as text does not change: no step touches a position that an earlier one
// called final.
TEST_P(RowTest, WhatIsFinalStays) {
  StartedRow started;
  started.payload = Payload();
  int32_t final_end = 0;
  int num_revised = 0;
  int32_t num_decided = 0;
  for (const std::string& bytes : RunFrom(started).deltas) {
    v1::StepDelta delta;
    ASSERT_TRUE(delta.ParseFromString(bytes));
    for (const int32_t position : delta.positions()) EXPECT_GE(position, final_end);
    EXPECT_GE(delta.final_end(), final_end);
    final_end = delta.final_end();
    num_revised += delta.num_revised();
    num_decided += delta.positions_size() - delta.num_revised();
    for (const TokenId token : delta.tokens()) num_decided -= token == kMaskedAgain ? 1 : 0;
  }
  EXPECT_GE(final_end, 24);
  // A canvas that reaches the end is lengthened to whole blocks.
  const int32_t block = std::max(traits().causal_block_length, 1);
  if (traits().mask_token >= 0) EXPECT_EQ(num_decided, 16 + (block - 24 % block) % block);
  EXPECT_EQ(num_revised > 0, SamplerRevises(GetParam().sampler)) << num_revised;
}

TEST_P(RowTest, WhatDoesNotFitIsRefused) {
  StartedRow started;
  started.payload = Payload();
  const Course whole = RunFrom(started);
  ASSERT_GT(whole.deltas.size(), 1U);
  const auto refusal = [&](const StartedRow& row) {
    return BuildRow(row, 0, traits(), kFingerprint).status();
  };
  StartedRow row = started;
  row.step = 2;
  row.deltas = {whole.deltas[0]};
  EXPECT_TRUE(absl::IsDataLoss(refusal(row)));  // a delta is missing
  row.deltas = {whole.deltas[0], whole.deltas[0]};
  v1::StepDelta first;
  ASSERT_TRUE(first.ParseFromString(whole.deltas[0]));
  // What decides nothing, or decides anew, may come twice.
  if (traits().mask_token >= 0 && !first.positions().empty()) {
    EXPECT_TRUE(absl::IsDataLoss(refusal(row)));
  }
  // Edits, and the transfers that follow from them, must agree; where nothing moves there are none.
  row.step = 1;
  const bool moves = SamplerMovesTokens(GetParam().sampler);
  ASSERT_EQ(first.edit_positions().empty(), !moves);
  std::vector<v1::StepDelta> broken(4, first);
  if (moves) {
    broken[0].set_edit_tokens(0, (first.edit_tokens(0) + 1) % 90);
    broken[1].set_edit_tokens(0, traits().vocab_size);
    broken[2].set_edit_positions(0, 1);  // given
    broken[3].mutable_edit_tokens()->RemoveLast();
  } else {
    for (v1::StepDelta& delta : broken) {
      delta.add_edit_positions(8);
      delta.add_edit_tokens(1);
    }
  }
  for (const v1::StepDelta& delta : broken) {
    row.deltas = {delta.SerializeAsString()};
    EXPECT_TRUE(absl::IsDataLoss(refusal(row))) << delta.ShortDebugString();
  }
  row.step = 2;
  row.deltas = {whole.deltas[0], "\xff"};
  EXPECT_TRUE(absl::IsDataLoss(refusal(row)));
  row = started;
  row.step = row.snapshot_step = 1;
  row.snapshot = "\xff";
  EXPECT_TRUE(absl::IsDataLoss(refusal(row)));
  EXPECT_TRUE(absl::IsFailedPrecondition(BuildRow(started, 0, traits(), "others").status()));
  row = started;
  row.payload = "\xff";
  EXPECT_TRUE(absl::IsInvalidArgument(refusal(row)));
  v1::WorkItem item;
  ASSERT_TRUE(item.ParseFromString(started.payload));
  item.set_format(2);
  row.payload = item.SerializeAsString();
  EXPECT_TRUE(absl::IsInvalidArgument(refusal(row)));
  item.set_format(1);
  item.mutable_answer()->set_end(4000);
  row.payload = item.SerializeAsString();
  EXPECT_TRUE(absl::IsInvalidArgument(refusal(row)));
}

INSTANTIATE_TEST_SUITE_P(
    Families, RowTest,
    testing::Values(Case{"dream", "entropy", 0, 0.8F}, Case{"dream", "threshold", 0, 0},
                    Case{"llada", "low_confidence", 8, 0.7F}, Case{"a2d_qwen3", "random", 5, 1},
                    Case{"sdar_b4", "block_dynamic", 0, 0}, Case{"mdlm", "mdlm_cached", 12, 1},
                    Case{"sedd_absorb", "sedd_euler", 24, 1},
                    Case{"sedd_uniform", "sedd_euler", 6, 1}, Case{"mdlm", "remdm_conf", 12, 1},
                    Case{"sdar_b4", "remdm_cap", 16, 0.5F}, Case{"llada", "dfm_corrector", 8, 1},
                    Case{"llada", "p2", 6, 0}, Case{"llada2", "joint_threshold", 0, 0},
                    Case{"llada2_indel", "joint_threshold_indel", 0, 0},
                    Case{"llada", "hierarchical_remask", 0, 0}, Case{"llada", "credit", 0, 0.7F},
                    Case{"sdar_b8", "bd3lm_first_hitting", 0, 1},
                    Case{"llada", "threshold", 0, 0, KvReuse::kDual},
                    Case{"dream", "threshold", 0, 0.5F, KvReuse::kPrefix},
                    Case{"fast_dllm_v2", "fast_dllm_v2", 0, 0, KvReuse::kDual},
                    Case{"diffusion_gemma", "gemma_renoise", 12, 1}),
    [](const auto& info) {
      return absl::StrCat(
          info.param.model, "_", info.param.sampler,
          info.param.kv_reuse == KvReuse::kExact ? "" : "_",
          info.param.kv_reuse == KvReuse::kExact ? "" : NameOf(info.param.kv_reuse));
    });

}  // namespace
}  // namespace cinnabar
