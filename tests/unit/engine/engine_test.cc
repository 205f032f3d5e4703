// The batched loop on the golden checkpoints: output that depends on the request alone, sequences
// that join, leave, fail and resume without disturbing others, and no allocation while it runs.
#include "worker/engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "absl/base/casts.h"
#include "absl/strings/str_cat.h"
#include "tests/support/golden_models.h"

namespace {
std::atomic<int64_t> num_allocations{0};
}  // namespace

// Counts every allocation of this program.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(size_t size) {
  num_allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = std::malloc(size);
  if (memory == nullptr) std::abort();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace cinnabar {
namespace {

using ::testing::HasSubstr;

constexpr ForwardLimits kLimits{.rows_max = 400, .sequences_max = 12, .positions_max = 96};

struct Loaded {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Denoiser> denoiser;
};

Loaded Load(const std::string& model, int32_t num_threads = 1,
            const ForwardLimits& limits = kLimits) {
  Loaded loaded;
  loaded.backend = *MakeBackend(BackendKind::kCpu, {.num_threads = num_threads});
  auto denoiser = LoadDenoiser(GoldenModelPath(model), *loaded.backend, {}, limits);
  EXPECT_TRUE(denoiser.ok()) << denoiser.status();
  loaded.denoiser = *std::move(denoiser);
  return loaded;
}

// A model and the samplers that fit it.
struct Family {
  const char* model;
  std::vector<const char*> samplers;
};

std::vector<Family> Families() {
  const std::vector<const char*> mask_samplers = {"low_confidence",
                                                  "random",
                                                  "origin",
                                                  "maskgit_plus",
                                                  "topk_margin",
                                                  "entropy",
                                                  "threshold",
                                                  "factor",
                                                  "entropy_bounded",
                                                  "block_static",
                                                  "block_dynamic",
                                                  "block_sequential",
                                                  "mdlm_ancestral",
                                                  "mdlm_cached",
                                                  "mdlm_semi_ar",
                                                  "fast_dllm_v2",
                                                  "p2",
                                                  "p2_random",
                                                  "p2_open",
                                                  "rnd1",
                                                  "rnd1_entropy_bounded",
                                                  "joint_threshold",
                                                  "hierarchical",
                                                  "hierarchical_remask",
                                                  "credit"};
  return {{"dream", mask_samplers},
          {"llada", mask_samplers},
          {"open_dcoder", {"threshold", "entropy"}},
          {"a2d_qwen3", {"low_confidence", "block_dynamic"}},
          {"a2d_llama", {"low_confidence", "factor"}},
          {"mdlm",
           {"mdlm_cached", "mdlm_ancestral", "low_confidence", "remdm_cap", "remdm_rescale",
            "remdm_conf", "remdm_loop", "dfm_corrector"}},
          {"sdar_b4",
           {"block_static", "block_dynamic", "block_sequential", "low_confidence", "threshold",
            "entropy", "remdm_conf", "p2", "joint_threshold", "hierarchical_remask",
            "bd3lm_first_hitting", "bd3lm_scheduled"}},
          {"sdar_b8", {"block_dynamic", "entropy_bounded"}},
          {"sdar_moe", {"block_dynamic", "threshold"}},
          {"rnd1", {"entropy", "threshold"}},
          {"rnd1_bf16", {"entropy"}},
          {"llada_moe", {"low_confidence", "factor"}},
          {"llada2", {"block_dynamic", "block_static", "low_confidence", "joint_threshold"}},
          {"llada2_indel", {"joint_threshold_indel", "low_confidence"}},
          {"fast_dllm_v2", {"fast_dllm_v2", "block_dynamic", "threshold", "joint_threshold"}},
          {"bd3lm", {"bd3lm_first_hitting", "bd3lm_scheduled", "block_dynamic", "mdlm_ancestral"}},
          {"diffusion_gemma", {"gemma_renoise"}},
          {"diffusion_gemma_bf16", {"gemma_renoise"}},
          {"sedd_absorb", {"sedd_euler", "sedd_analytic"}},
          {"sedd_uniform", {"sedd_euler", "sedd_analytic"}}};
}

// A random request: prompt, suffix and holes, all knobs that the sampler takes.
SequenceState RandomSequence(const ModelTraits& model, const std::string& sampler, int seed) {
  std::mt19937 random(seed);
  const int32_t length = 4 + static_cast<int32_t>(random() % 36);
  std::vector<TokenId> ids(length);
  std::vector<bool> given(length);
  const uint32_t shape = random() % 3;
  for (int32_t i = 0; i < length; ++i) {
    do {
      ids[i] = static_cast<TokenId>(random() % std::min(model.vocab_size, 90));
    } while (ids[i] == model.mask_token);
    given[i] = shape == 0   ? i < length / 3
               : shape == 1 ? (i < length / 4 || i > length - 3)
                            : random() % 2 == 0;
  }
  given[0] = true;
  given[length - 1] = given[length - 1] && shape != 0;
  DecodingParams params;
  params.sampler = sampler;
  params.seed = random();
  if (model.parameterization == Parameterization::kMaskPrediction && random() % 2 == 0)
    params.temperature = 0.8F;
  const SamplerEntry& entry = **FindSampler(sampler);
  const auto reads = [&](Knob knob) { return (entry.knobs & static_cast<uint32_t>(knob)) != 0; };
  if (reads(Knob::kCfgScale) && random() % 3 == 0 && model.causal_block_length == 0)
    params.cfg_scale = 0.7F;
  if (reads(Knob::kTopP) && random() % 2 == 0) params.top_p = 0.9F;
  if (reads(Knob::kTopK) && random() % 2 == 0) params.top_k = 20;
  if (reads(Knob::kThreshold)) params.threshold = 0.5F;
  if (reads(Knob::kSubBlockLength)) {
    params.sub_block_length = 4;
    if (model.causal_block_length == 0) params.block_length = 8;
    if (random() % 2 == 0) params.kv_reuse = KvReuse::kDual;
  } else if (reads(Knob::kKvReuse) && random() % 2 == 0 && params.cfg_scale == 0 &&
             model.causal_block_length == 0 &&
             !(model.shift_logits && sampler == "low_confidence")) {
    params.kv_reuse = random() % 2 == 0 ? KvReuse::kPrefix : KvReuse::kDual;
    params.block_length = 6;
    if (reads(Knob::kNumSteps)) params.block_length = 0;
  }
  if (reads(Knob::kEta)) params.eta = 0.3F;
  if (reads(Knob::kEditing)) {
    params.edit_threshold = 0.3F;
    params.edit_steps = 3;
  }
  if (reads(Knob::kLowThreshold)) params.low_threshold = 0.2F;
  if (reads(Knob::kAlgTemp) && random() % 2 == 0) params.alg_temp = 0.3F;
  if (model.parameterization != Parameterization::kMaskPrediction) params.num_steps = 5;
  if (model.causal_encoder) {
    const auto first = std::find(given.begin(), given.end(), false);
    const auto last = std::find(given.rbegin(), given.rend(), false).base();
    const auto span = static_cast<int32_t>(last - first);
    const int32_t block = model.causal_block_length;
    params.num_steps = 6 * std::max((span + block - 1) / block, 1);
    params.entropy_bound = 1.0F;
    params.confident_entropy = 0.7F;
  }
  auto state = MakeSequence(ids, given, params, model);
  EXPECT_TRUE(state.ok()) << state.status();
  return *std::move(state);
}

// Runs what is in the engine to the end; the final state of each sequence.
std::map<SequenceId, SequenceState> Finish(Engine& engine) {
  std::map<SequenceId, SequenceState> done;
  StepReport report;
  for (int turn = 0; engine.num_sequences() > 0; ++turn) {
    EXPECT_LT(turn, 1000);
    EXPECT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
    for (const StepEvent& event : report.events) EXPECT_TRUE(event.status.ok()) << event.status;
    for (auto& [id, state] : engine.TakeFinished()) done[id] = std::move(state);
  }
  return done;
}

SequenceState RunAlone(Denoiser& denoiser, const SequenceState& state, bool block_cache = true) {
  Engine engine(denoiser, {.limits = kLimits, .block_cache = block_cache});
  const absl::StatusOr<SequenceId> id = engine.Add(state);
  EXPECT_TRUE(id.ok()) << id.status();
  return Finish(engine).at(*id);
}

void ExpectSameResult(const SequenceState& got, const SequenceState& want) {
  EXPECT_EQ(got.canvas.tokens, want.canvas.tokens);
  EXPECT_EQ(got.decoding.step, want.decoding.step);
  EXPECT_EQ(got.decoding.nfe, want.decoding.nfe);
  EXPECT_TRUE(got.decoding.finished);
}

class EngineTest : public testing::TestWithParam<Family> {};

TEST_P(EngineTest, OutputDependsOnTheRequestAlone) {
  const Family& family = GetParam();
  const Loaded one = Load(family.model, 1);
  const Loaded two = Load(family.model, 2);
  const ModelTraits& model = one.denoiser->traits();
  std::vector<SequenceState> requests;
  std::vector<SequenceState> alone;
  for (const char* sampler : family.samplers) {
    for (int seed = 0; seed < 3; ++seed) {
      SCOPED_TRACE(absl::StrCat(sampler, " seed ", seed));
      requests.push_back(RandomSequence(model, sampler, seed));
      alone.push_back(RunAlone(*one.denoiser, requests.back()));
      ExpectSameResult(RunAlone(*two.denoiser, requests.back()), alone.back());
      const Canvas& before = requests.back().canvas;
      for (int32_t i = 0; i < before.length(); ++i) {
        if (before.states[i] == PositionState::kGiven) {
          EXPECT_EQ(alone.back().canvas.tokens[i], before.tokens[i]);
        } else {
          EXPECT_EQ(alone.back().canvas.states[i], PositionState::kCommitted);
          EXPECT_NE(alone.back().canvas.tokens[i], model.mask_token);
        }
      }
    }
  }
  // All of them in one engine of two threads, joining at different turns; some leave in the middle,
  // travel as bytes and come back.
  Engine engine(*two.denoiser, {.limits = kLimits});
  std::mt19937 random(5);
  std::map<SequenceId, size_t> request_of;
  std::vector<size_t> waiting(requests.size());
  for (size_t i = 0; i < waiting.size(); ++i) waiting[i] = i;
  std::map<size_t, SequenceState> now;
  for (size_t i = 0; i < requests.size(); ++i) now[i] = requests[i];
  size_t num_done = 0;
  StepReport report;
  for (int turn = 0; num_done < requests.size(); ++turn) {
    ASSERT_LT(turn, 5000);
    while (!waiting.empty() && random() % 3 != 0) {
      const size_t pick = random() % waiting.size();
      const absl::StatusOr<SequenceId> id = engine.Add(now[waiting[pick]]);
      if (!id.ok()) {
        EXPECT_EQ(id.status().code(), absl::StatusCode::kResourceExhausted) << id.status();
        break;
      }
      request_of[*id] = waiting[pick];
      waiting.erase(waiting.begin() + pick);
    }
    ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
    for (auto& [id, state] : engine.TakeFinished()) {
      SCOPED_TRACE(
          absl::StrCat(requests[request_of[id]].params.sampler, " request ", request_of[id]));
      ExpectSameResult(state, alone[request_of[id]]);
      request_of.erase(id);
      ++num_done;
    }
    if (!request_of.empty() && random() % 4 == 0) {
      const auto leaving = std::next(request_of.begin(), random() % request_of.size());
      const size_t request = leaving->second;
      const SequenceState taken = *engine.Remove(leaving->first);
      v1::SequenceState read;
      ASSERT_TRUE(read.ParseFromString(ToWire(taken, "model").SerializeAsString()));
      const absl::StatusOr<SequenceState> back = FromWire(read, model, "model");
      ASSERT_TRUE(back.ok()) << back.status();
      now[request] = *back;
      waiting.push_back(request);
      request_of.erase(leaving);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, EngineTest, testing::ValuesIn(Families()),
                         [](const auto& info) { return std::string(info.param.model); });

TEST(EngineCacheTest, TheBlockCacheChangesNoByte) {
  for (const char* name :
       {"sdar_b4", "sdar_b8", "sdar_b4_f16", "sdar_moe", "llada2", "diffusion_gemma"}) {
    const Loaded loaded = Load(name);
    for (int seed = 0; seed < 6; ++seed) {
      const SequenceState request = RandomSequence(
          loaded.denoiser->traits(),
          loaded.denoiser->traits().causal_encoder ? "gemma_renoise" : "block_dynamic", seed);
      ExpectSameResult(RunAlone(*loaded.denoiser, request, /*block_cache=*/true),
                       RunAlone(*loaded.denoiser, request, /*block_cache=*/false));
    }
  }
}

TEST(EngineCacheTest, ALongPromptIsEncodedInPieces) {
  const Loaded loaded = Load("sdar_b4");
  std::vector<TokenId> ids(80, 5);
  std::vector<bool> given(80, true);
  for (int32_t i = 70; i < 80; ++i) given[i] = false;
  const SequenceState request =
      *MakeSequence(ids, given, {.sampler = "block_dynamic"}, loaded.denoiser->traits());
  ForwardLimits narrow = kLimits;
  narrow.rows_max = 17;
  Engine engine(*loaded.denoiser, {.limits = narrow});
  const SequenceId id = *engine.Add(request);
  ExpectSameResult(Finish(engine).at(id), RunAlone(*loaded.denoiser, request));
  EXPECT_EQ(engine.counters().rows_prefilled, 76);
}

// Requests that begin with the same `shared` tokens, of different lengths behind them.
std::vector<SequenceState> Siblings(const ModelTraits& model, const char* sampler, int32_t shared,
                                    int count) {
  std::vector<SequenceState> result;
  for (int i = 0; i < count; ++i) {
    const int32_t given = shared + 3 * i, length = given + 9 + i;
    std::vector<TokenId> ids(length);
    for (int32_t p = 0; p < given; ++p) ids[p] = 3 + (p < shared ? p * 7 % 50 : (p + i) % 40);
    std::vector<bool> flags(length, false);
    std::fill_n(flags.begin(), given, true);
    DecodingParams params{.sampler = sampler, .seed = static_cast<uint64_t>(i)};
    if (model.causal_encoder) {
      const int32_t block = model.causal_block_length;
      params.num_steps = 4 * ((length - given + block - 1) / block);
    }
    auto state = MakeSequence(ids, flags, params, model);
    EXPECT_TRUE(state.ok()) << state.status();
    result.push_back(*std::move(state));
  }
  return result;
}

TEST(EnginePrefixTest, ASharedPrefixIsTakenOverAndChangesNoByte) {
  for (const auto& [name, sampler] :
       std::vector<std::pair<const char*, const char*>>{{"sdar_b4", "block_dynamic"},
                                                        {"sdar_b8", "entropy_bounded"},
                                                        {"sdar_moe", "threshold"},
                                                        {"llada2", "joint_threshold"},
                                                        {"fast_dllm_v2", "fast_dllm_v2"},
                                                        {"bd3lm", "bd3lm_first_hitting"},
                                                        {"diffusion_gemma", "gemma_renoise"}}) {
    SCOPED_TRACE(name);
    const Loaded loaded = Load(name);
    const ModelTraits& model = loaded.denoiser->traits();
    const int32_t shared = 34, unit = model.causal_encoder ? 1 : model.causal_block_length;
    const std::vector<SequenceState> requests = Siblings(model, sampler, shared, 4);
    Engine engine(*loaded.denoiser, {.limits = kLimits});
    // The first has ended when the second comes; the third comes while the second runs, the fourth
    // when both have ended.
    std::map<SequenceId, size_t> request_of;
    std::map<SequenceId, SequenceState> done;
    StepReport report;
    const auto add = [&](size_t i) { request_of[*engine.Add(requests[i])] = i; };
    add(0);
    done.merge(Finish(engine));
    add(1);
    ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
    for (auto& [id, state] : engine.TakeFinished()) done[id] = std::move(state);
    add(2);
    done.merge(Finish(engine));
    add(3);
    done.merge(Finish(engine));
    ASSERT_EQ(done.size(), 4U);
    for (const auto& [id, state] : done) {
      ExpectSameResult(state, RunAlone(*loaded.denoiser, requests[request_of[id]]));
    }
    // What is reused: whole blocks of what is shared, or more by chance; never what is not there.
    EXPECT_GE(engine.counters().positions_reused, 3 * (std::min(shared, 32) / unit * unit));
    Engine apart(*loaded.denoiser, {.limits = kLimits, .prefix_reuse = false});
    for (const SequenceState& request : requests) {
      ASSERT_TRUE(apart.Add(request).ok());
      Finish(apart);
    }
    EXPECT_EQ(apart.counters().positions_reused, 0);
    EXPECT_EQ(apart.counters().rows_computed,
              engine.counters().rows_computed + engine.counters().positions_reused);
  }
}

TEST(EnginePrefixTest, WhatIsKeptMakesRoomForWhatRuns) {
  const Loaded loaded = Load("sdar_b4");
  const std::vector<SequenceState> requests =
      Siblings(loaded.denoiser->traits(), "block_dynamic", 34, 3);
  const int64_t room = loaded.backend->KvBytes(
      loaded.denoiser->SequenceKvShape(requests[2].canvas.length(), KvReuse::kExact));
  Engine engine(*loaded.denoiser, {.limits = kLimits, .kv_bytes_max = room});
  for (const SequenceState& request : requests) {
    const absl::StatusOr<SequenceId> id = engine.Add(request);
    ASSERT_TRUE(id.ok()) << id.status();
    ExpectSameResult(Finish(engine).at(*id), RunAlone(*loaded.denoiser, request));
  }
  EXPECT_EQ(engine.counters().positions_reused, 0);  // each had to go before the next could come
}

void ExpectNoAllocationOnceWarm(Engine& engine) {
  StepReport report;
  for (int turn = 0; turn < 12; ++turn) ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
  const int64_t before = num_allocations.load();
  for (int turn = 0; turn < 12; ++turn) {
    const absl::Status status = engine.Step(absl::InfinitePast(), report);
    ASSERT_TRUE(status.ok());
  }
  EXPECT_EQ(num_allocations.load() - before, 0);
}

TEST(EngineStepTest, AllocatesNothingOnceWarm) {
  for (const char* name : {"llada", "dream", "sdar_b4", "mdlm", "sedd_absorb", "llada2",
                           "llada2_indel", "diffusion_gemma"}) {
    SCOPED_TRACE(name);
    const Loaded loaded = Load(name, 2);
    const ModelTraits& model = loaded.denoiser->traits();
    Engine engine(*loaded.denoiser, {.limits = kLimits});
    std::vector<bool> given(48, false);
    given[0] = true;
    for (int i = 0; i < 4; ++i) {
      DecodingParams params{.sampler = model.default_sampler, .seed = static_cast<uint64_t>(i)};
      if (model.causal_block_length > 0 && !model.causal_encoder) params.sampler = "block_static";
      // mdlm_cached makes a random number of steps a turn, and so of events in the report.
      if (model.family == "mdlm") params.sampler = "mdlm_ancestral";
      if (model.parameterization != Parameterization::kMaskPrediction) params.num_steps = 6000;
      if (model.causal_encoder) params.confident_entropy = 0.0F;
      if (model.delete_token >= 0) params.sampler = "joint_threshold_indel";
      ASSERT_TRUE(
          engine.Add(*MakeSequence(std::vector<TokenId>(48, 3), given, params, model)).ok());
    }
    ExpectNoAllocationOnceWarm(engine);
    EXPECT_EQ(engine.num_sequences(), 4);
  }
}

// A batch of which nearly every row is asked for twice.
TEST(EngineStepTest, AFullBatchHasRoomForAllQueries) {
  const Loaded loaded = Load("llada");
  std::vector<bool> given(40, false);
  given[0] = true;
  const SequenceState request =
      *MakeSequence(std::vector<TokenId>(40, 3), given, {.sampler = "credit", .threshold = 1.0F},
                    loaded.denoiser->traits());
  Engine engine(*loaded.denoiser, {.limits = kLimits});
  std::vector<SequenceId> ids;
  for (int i = 0; i < 10; ++i) ids.push_back(*engine.Add(request));
  const SequenceState want = RunAlone(*loaded.denoiser, request);
  const std::map<SequenceId, SequenceState> done = Finish(engine);
  for (const SequenceId id : ids) ExpectSameResult(done.at(id), want);
}

TEST(EngineStepTest, CancelledAndExpiredSequencesLeaveAndDisturbNobody) {
  const Loaded loaded = Load("llada");
  const ModelTraits& model = loaded.denoiser->traits();
  const SequenceState request = RandomSequence(model, "low_confidence", 1);
  const SequenceState alone = RunAlone(*loaded.denoiser, request);
  const absl::Time start = absl::FromUnixSeconds(1000);
  Engine engine(*loaded.denoiser, {.limits = kLimits});
  const SequenceId cancelled = *engine.Add(RandomSequence(model, "low_confidence", 2));
  const SequenceId kept = *engine.Add(request);
  const SequenceId expired =
      *engine.Add(RandomSequence(model, "random", 4), start + absl::Seconds(1));
  StepReport report;
  ASSERT_TRUE(engine.Step(start, report).ok());
  EXPECT_EQ(report.events.size(), 3U);
  EXPECT_TRUE(engine.Cancel(cancelled));
  EXPECT_FALSE(engine.Cancel(999));
  ASSERT_TRUE(engine.Step(start + absl::Seconds(2), report).ok());
  std::map<SequenceId, absl::StatusCode> ended;
  for (const StepEvent& event : report.events) {
    if (event.finished) ended[event.sequence] = event.status.code();
  }
  EXPECT_EQ(ended[cancelled], absl::StatusCode::kCancelled);
  EXPECT_EQ(ended[expired], absl::StatusCode::kDeadlineExceeded);
  (void)engine.TakeFinished();
  EXPECT_EQ(engine.Find(cancelled), nullptr);
  ExpectSameResult(Finish(engine).at(kept), alone);
}

// A network whose numbers go bad for one sequence.
class PoisonedDenoiser : public Denoiser {
 public:
  explicit PoisonedDenoiser(Denoiser& real) : real_(real) {}
  const ModelTraits& traits() const override { return real_.traits(); }
  Backend& backend() const override { return real_.backend(); }
  KvShape SequenceKvShape(int32_t positions, KvReuse reuse) const override {
    return real_.SequenceKvShape(positions, reuse);
  }
  absl::Status Forward(const ForwardBatch& batch) override {
    return fail_next ? (fail_next = false, absl::UnavailableError("device lost"))
                     : real_.Forward(batch);
  }
  absl::Status Answer(absl::Span<const VocabularyQuery> queries,
                      absl::Span<VocabularyAnswer> answers) override {
    if (fail_answer) return fail_answer = false, absl::UnavailableError("device lost");
    const absl::Status status = real_.Answer(queries, answers);
    for (size_t i = 0; i < queries.size(); ++i) {
      if (queries[i].noise.seed == bad_seed) answers[i].finite = false;
    }
    return status;
  }
  absl::Status Logits(int32_t begin, int32_t count, absl::Span<float> out) override {
    return real_.Logits(begin, count, out);
  }
  double OutputOffset(float sigma) const override { return real_.OutputOffset(sigma); }
  int64_t SelfConditioningBytes() const override { return real_.SelfConditioningBytes(); }
  Memory memory() const override { return real_.memory(); }

  uint64_t bad_seed = ~uint64_t{0};
  bool fail_next = false;
  bool fail_answer = false;

 private:
  Denoiser& real_;
};

TEST(EngineStepTest, ASequenceWithoutFinitePredictionsFailsAlone) {
  const Loaded loaded = Load("dream");
  const SequenceState good = RandomSequence(loaded.denoiser->traits(), "entropy", 1);
  SequenceState bad = RandomSequence(loaded.denoiser->traits(), "entropy", 2);
  bad.params.seed = 77;
  PoisonedDenoiser poisoned(*loaded.denoiser);
  poisoned.bad_seed = 77;
  Engine engine(poisoned, {.limits = kLimits});
  const SequenceId bad_id = *engine.Add(bad);
  const SequenceId good_id = *engine.Add(good);
  StepReport report;
  std::map<SequenceId, SequenceState> done;
  while (engine.num_sequences() > 0) {
    ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
    for (const StepEvent& event : report.events) {
      if (event.sequence == bad_id && event.finished) {
        EXPECT_EQ(event.status.code(), absl::StatusCode::kDataLoss);
        EXPECT_THAT(std::string(event.status.message()), HasSubstr("no finite prediction"));
      }
    }
    for (auto& [id, state] : engine.TakeFinished()) done[id] = std::move(state);
  }
  ExpectSameResult(done.at(good_id), RunAlone(*loaded.denoiser, good));
  EXPECT_EQ(engine.counters().sequences_failed, 1);
}

TEST(EngineStepTest, AfterADeviceErrorTheTurnIsRepeated) {
  const Loaded loaded = Load("sdar_b4");
  const SequenceState request = RandomSequence(loaded.denoiser->traits(), "block_dynamic", 3);
  PoisonedDenoiser failing(*loaded.denoiser);
  Engine engine(failing, {.limits = kLimits});
  const SequenceId id = *engine.Add(request);
  StepReport report;
  ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
  failing.fail_next = true;
  EXPECT_EQ(engine.Step(absl::InfinitePast(), report).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(report.events.empty());
  ExpectSameResult(Finish(engine).at(id), RunAlone(*loaded.denoiser, request));
}

// A sequence that reads its last prediction, which is in no state.
SequenceState GemmaRequest(const ModelTraits& model) {
  std::vector<TokenId> ids(31, 5);
  std::vector<bool> given(31, true);
  for (int32_t i = 11; i < 31; ++i) given[i] = false;  // three blocks, the last one padded
  for (int32_t i = 0; i < 11; ++i) ids[i] = 7 * i + 3;
  given[14] = false;
  given[15] = true;  // held inside a block
  return *MakeSequence(
      ids, given, {.num_steps = 15, .entropy_bound = 1.0F, .confident_entropy = 0.6F, .seed = 9},
      model);
}

TEST(EngineSelfConditioningTest, ResumesFromAnyStepToTheSameBytes) {
  const Loaded one = Load("diffusion_gemma", 1);
  const Loaded two = Load("diffusion_gemma", 2);
  const ModelTraits& model = one.denoiser->traits();
  const SequenceState request = GemmaRequest(model);
  ASSERT_EQ(request.canvas.length(), 35);

  // The steps as they are made without a break.
  Engine whole(*one.denoiser, {.limits = kLimits});
  const SequenceId whole_id = *whole.Add(request);
  std::vector<v1::SequenceState> states = {ToWire(request, "model")};
  std::vector<std::vector<Transfer>> transfers;
  StepReport report;
  SequenceState want;
  while (whole.num_sequences() > 0) {
    ASSERT_TRUE(whole.Step(absl::InfinitePast(), report).ok());
    ASSERT_EQ(report.events.size(), 1U);
    const auto made = report.TransfersOf(report.events[0]);
    transfers.emplace_back(made.begin(), made.end());
    if (whole.Find(whole_id) != nullptr) states.push_back(ToWire(*whole.Find(whole_id), "model"));
    for (auto& [id, state] : whole.TakeFinished()) want = std::move(state);
  }
  ASSERT_GE(states.size(), 6U);
  EXPECT_LE(states.size(), 15U);

  for (size_t at = 0; at < states.size(); ++at) {
    SCOPED_TRACE(at);
    const absl::StatusOr<SequenceState> resumed = FromWire(states[at], model, "model");
    ASSERT_TRUE(resumed.ok()) << resumed.status();
    const int32_t in_block = resumed->decoding.block_step;
    Engine engine(*two.denoiser, {.limits = kLimits});
    ASSERT_TRUE(engine.Add(RandomSequence(model, "gemma_renoise", static_cast<int>(at))).ok());
    const SequenceId id = *engine.Add(*resumed);
    size_t step = at;
    int turns = 0;
    for (; engine.Find(id) != nullptr; ++turns) {
      // Steps that are made again are nobody's business.
      if (turns <= in_block) {
        EXPECT_EQ(ToWire(*engine.Find(id), "model").SerializeAsString(),
                  states[at].SerializeAsString());
      }
      ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
      for (const StepEvent& event : report.events) {
        if (event.sequence != id) continue;
        ASSERT_LT(step, transfers.size());
        EXPECT_EQ(event.step, static_cast<int32_t>(step));
        const auto made = report.TransfersOf(event);
        ASSERT_EQ(made.size(), transfers[step].size());
        for (size_t i = 0; i < made.size(); ++i) {
          EXPECT_EQ(made[i].position, transfers[step][i].position);
          EXPECT_EQ(made[i].token, transfers[step][i].token);
          EXPECT_EQ(made[i].confidence, transfers[step][i].confidence);
        }
        ++step;
      }
    }
    EXPECT_EQ(step, transfers.size());
    EXPECT_EQ(turns, static_cast<int>(transfers.size() - at) + in_block);
    for (auto& [finished, state] : engine.TakeFinished()) {
      if (finished == id) ExpectSameResult(state, want);
    }
    // Taken out while its steps are being made again, it is as it came in.
    if (in_block < 2) continue;
    Engine left(*one.denoiser, {.limits = kLimits});
    const SequenceId leaving = *left.Add(*resumed);
    ASSERT_TRUE(left.Step(absl::InfinitePast(), report).ok());
    EXPECT_TRUE(report.events.empty());
    EXPECT_EQ(ToWire(*left.Remove(leaving), "model").SerializeAsString(),
              states[at].SerializeAsString());
  }
}

TEST(EngineSelfConditioningTest, AFailedTurnIsRepeatedFromTheSamePrediction) {
  const Loaded loaded = Load("diffusion_gemma");
  const SequenceState request = GemmaRequest(loaded.denoiser->traits());
  PoisonedDenoiser failing(*loaded.denoiser);
  Engine engine(failing, {.limits = kLimits});
  const SequenceId id = *engine.Add(request);
  StepReport report;
  for (int turn = 0; turn < 4; ++turn) {
    ASSERT_TRUE(engine.Step(absl::InfinitePast(), report).ok());
    (turn % 2 == 0 ? failing.fail_answer : failing.fail_next) = true;
    EXPECT_EQ(engine.Step(absl::InfinitePast(), report).code(), absl::StatusCode::kUnavailable);
  }
  ExpectSameResult(Finish(engine).at(id), RunAlone(*loaded.denoiser, request));
}

TEST(EngineSelfConditioningTest, ThePromptIsEncodedInPieces) {
  const Loaded loaded = Load("diffusion_gemma");
  const SequenceState request = GemmaRequest(loaded.denoiser->traits());
  const SequenceState want = RunAlone(*loaded.denoiser, request);
  for (const auto& [rows, sequences] : {std::pair{8, 2}, {9, 1}, {19, 1}, {19, 2}}) {
    ForwardLimits narrow = kLimits;
    narrow.rows_max = rows;
    narrow.sequences_max = sequences;
    Engine engine(*loaded.denoiser, {.limits = narrow});
    const SequenceId id = *engine.Add(request);
    ExpectSameResult(Finish(engine).at(id), want);
  }
  ForwardLimits narrow = kLimits;
  narrow.rows_max = 7;
  Engine engine(*loaded.denoiser, {.limits = narrow});
  EXPECT_EQ(engine.Add(request).status().code(), absl::StatusCode::kInvalidArgument);
}

// --- Looking ahead

constexpr ForwardLimits kWide{.rows_max = 800, .sequences_max = 12, .positions_max = 96};

// A device that breaks to order, or chooses other tokens than its host.
class UnrulyDenoiser : public Denoiser {
 public:
  explicit UnrulyDenoiser(Denoiser& real) : real_(real) {}
  const ModelTraits& traits() const override { return real_.traits(); }
  Backend& backend() const override { return real_.backend(); }
  KvShape SequenceKvShape(int32_t positions, KvReuse reuse) const override {
    return real_.SequenceKvShape(positions, reuse);
  }
  absl::Status Forward(const ForwardBatch& batch) override { return real_.Forward(batch); }
  absl::Status Answer(absl::Span<const VocabularyQuery> queries,
                      absl::Span<VocabularyAnswer> answers) override {
    return real_.Answer(queries, answers);
  }
  absl::Status Begin(const DenoiserPass& pass) override {
    if (calls_until_failure-- == 0) return absl::UnavailableError("device lost");
    EXPECT_LT(num_under_way_, 2);
    DenoiserPass other = pass;
    std::vector<TransferSelection> selections(pass.selections.begin(), pass.selections.end());
    if (lies) {
      for (TransferSelection& selection : selections) {
        selection.rule.count += selection.rule.count > 0 ? -1 : 1;
        selection.rule.threshold = std::numeric_limits<double>::infinity();
      }
      other.selections = selections;
    }
    const absl::Status status = real_.Begin(other);
    if (status.ok()) ++num_under_way_;
    return status;
  }
  absl::Status Await() override {
    const absl::Status status = real_.Await();
    --num_under_way_;
    return calls_until_failure-- == 0 ? absl::UnavailableError("device lost") : status;
  }
  bool RunsAhead() const override { return real_.RunsAhead(); }
  absl::Status Logits(int32_t begin, int32_t count, absl::Span<float> out) override {
    return real_.Logits(begin, count, out);
  }
  double OutputOffset(float sigma) const override { return real_.OutputOffset(sigma); }
  int64_t SelfConditioningBytes() const override { return real_.SelfConditioningBytes(); }
  Memory memory() const override { return real_.memory(); }

  int num_under_way() const { return num_under_way_; }
  int calls_until_failure = -1;  // of Begin() and Await()
  bool lies = false;

 private:
  Denoiser& real_;
  int num_under_way_ = 0;
};

// All that anybody hears of a sequence: its events, and its state behind each of its steps.
struct Story {
  std::vector<std::string> events;
  std::map<int32_t, std::string> states;
  std::string last;
};

std::string Told(const StepReport& report, const StepEvent& event) {
  std::string told = absl::StrCat(event.step, event.forward, event.settled, event.whole_pass,
                                  event.stays_open, " ", event.block.begin, "-", event.block.end,
                                  event.finished, " ", event.status.ToString());
  for (const Transfer& transfer : report.TransfersOf(event)) {
    absl::StrAppend(&told, " ", transfer.position, ":", transfer.token, ":", transfer.revises, ":",
                    absl::Hex(absl::bit_cast<uint32_t>(transfer.confidence)));
  }
  return told;
}

// Runs the requests in one engine. They come at different turns; with `chaos`, some leave, travel
// as bytes and come back, and the device breaks now and then.
std::vector<Story> RunAll(Denoiser& real, const std::vector<SequenceState>& requests,
                          EngineOptions options, bool chaos, bool lies, EngineCounters* counters) {
  UnrulyDenoiser denoiser(real);
  denoiser.lies = lies;
  std::vector<Story> stories(requests.size());
  {
    Engine engine(denoiser, options);
    std::mt19937 random(3);
    std::map<SequenceId, size_t> running;
    std::vector<std::pair<size_t, SequenceState>> waiting;
    for (size_t i = requests.size(); i-- > 0;) waiting.emplace_back(i, requests[i]);
    StepReport report;
    for (int turn = 0; !waiting.empty() || !running.empty(); ++turn) {
      if (turn > 5000) {
        ADD_FAILURE() << "no end";
        break;
      }
      while (!waiting.empty() && (running.empty() || random() % 3 != 0)) {
        const absl::StatusOr<SequenceId> id = engine.Add(waiting.back().second);
        if (!id.ok()) {
          EXPECT_EQ(id.status().code(), absl::StatusCode::kResourceExhausted) << id.status();
          break;
        }
        running[*id] = waiting.back().first;
        waiting.pop_back();
      }
      denoiser.calls_until_failure =
          chaos && random() % 4 == 0 ? static_cast<int>(random() % 4) : -1;
      const absl::Status status = engine.Step(absl::InfinitePast(), report);
      EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kUnavailable) << status;
      if (!status.ok()) {
        EXPECT_EQ(denoiser.num_under_way(), 0);
      }
      EXPECT_LE(denoiser.num_under_way(), options.look_ahead ? 1 : 0);
      for (const StepEvent& event : report.events) {
        stories[running.at(event.sequence)].events.push_back(Told(report, event));
      }
      for (auto& [id, state] : engine.TakeFinished()) {
        stories[running.at(id)].last = ToWire(state, "model").SerializeAsString();
        running.erase(id);
      }
      for (const auto& [id, request] : running) {
        const SequenceState& state = *engine.Find(id);
        const std::string bytes = ToWire(state, "model").SerializeAsString();
        const std::string& known =
            stories[request].states.emplace(state.decoding.step, bytes).first->second;
        EXPECT_EQ(bytes, known);
      }
      if (chaos && !running.empty() && random() % 4 == 0) {
        const auto leaving = std::next(running.begin(), random() % running.size());
        const SequenceState taken = *engine.Remove(leaving->first);
        v1::SequenceState read;
        EXPECT_TRUE(read.ParseFromString(ToWire(taken, "model").SerializeAsString()));
        waiting.emplace_back(leaving->second, *FromWire(read, real.traits(), "model"));
        running.erase(leaving);
      }
    }
    *counters = engine.counters();
  }
  EXPECT_EQ(denoiser.num_under_way(), 0) << "an engine that goes waits for what it has begun";
  return stories;
}

void ExpectSameStories(const std::vector<Story>& got, const std::vector<Story>& want,
                       const std::vector<SequenceState>& requests) {
  for (size_t i = 0; i < want.size(); ++i) {
    SCOPED_TRACE(absl::StrCat(requests[i].params.sampler, " request ", i));
    EXPECT_EQ(got[i].events, want[i].events);
    EXPECT_EQ(got[i].last, want[i].last);
    for (const auto& [step, bytes] : got[i].states) {
      const auto found = want[i].states.find(step);
      if (found == want[i].states.end()) continue;
      EXPECT_EQ(bytes, found->second) << "step " << step;
    }
  }
}

TEST_P(EngineTest, LookingAheadChangesNoByte) {
  const Family& family = GetParam();
  const Loaded loaded = Load(family.model, 1, kWide);
  std::vector<SequenceState> requests;
  std::vector<Story> want;
  const EngineOptions plain{.limits = kWide};
  EngineOptions looking = plain;
  looking.look_ahead = true;
  EngineCounters counters;
  for (const char* sampler : family.samplers) {
    for (int seed = 0; seed < 3; ++seed) {
      SCOPED_TRACE(absl::StrCat(sampler, " seed ", seed));
      const SequenceState request = RandomSequence(loaded.denoiser->traits(), sampler, seed);
      EngineCounters without;
      want.push_back(RunAll(*loaded.denoiser, {request}, plain, false, false, &without)[0]);
      ExpectSameStories(RunAll(*loaded.denoiser, {request}, looking, false, false, &counters),
                        {want.back()}, {request});
      // Alone, no pass is for nothing but one behind the last.
      EXPECT_LE(counters.forwards, without.forwards + (sampler == std::string("entropy") ? 2 : 1));
      EXPECT_EQ(counters.steps, without.steps);
      requests.push_back(request);
    }
  }
  for (const bool chaos : {false, true}) {
    SCOPED_TRACE(chaos);
    ExpectSameStories(RunAll(*loaded.denoiser, requests, looking, chaos, false, &counters), want,
                      requests);
  }
  // So little room that not all find a place in one pass.
  looking.limits.rows_max = 100;
  ExpectSameStories(RunAll(*loaded.denoiser, requests, looking, true, false, &counters), want,
                    requests);
}

TEST(EngineLookAheadTest, StepsTakeTheAnswersOfPassesAhead) {
  struct Case {
    const char* model;
    const char* sampler;
    int64_t passes_more;  // than without
  };
  for (const Case& c : {Case{"llada", "low_confidence", 0},
                        {"llada", "random", 0},
                        {"llada", "threshold", 1},
                        {"dream", "maskgit_plus", 0},
                        {"dream", "topk_margin", 0},
                        {"sdar_b4", "block_static", 0},
                        {"sdar_b4", "block_dynamic", 1},
                        {"sdar_b4", "block_sequential", 0},
                        {"llada2", "block_dynamic", 1},
                        {"fast_dllm_v2", "fast_dllm_v2", 1}}) {
    SCOPED_TRACE(absl::StrCat(c.model, " ", c.sampler));
    const Loaded loaded = Load(c.model, 1, kWide);
    std::vector<TokenId> ids(40, 5);
    std::vector<bool> given(40, false);
    for (int i = 0; i < 9; ++i) given[i] = true;
    DecodingParams params{.sampler = c.sampler, .temperature = 0.8F, .seed = 3};
    params.threshold = params.sampler == "threshold" ? 0.999F : 0.6F;
    const SamplerEntry& entry = **FindSampler(params.sampler);
    if ((entry.knobs & static_cast<uint32_t>(Knob::kThreshold)) == 0)
      params.threshold = DecodingParams().threshold;
    const absl::StatusOr<SequenceState> request =
        MakeSequence(ids, given, params, loaded.denoiser->traits());
    ASSERT_TRUE(request.ok()) << request.status();
    EngineCounters without, with, lied;
    const auto want =
        RunAll(*loaded.denoiser, {*request}, {.limits = kWide}, false, false, &without);
    const EngineOptions looking{.limits = kWide, .look_ahead = true};
    ExpectSameStories(RunAll(*loaded.denoiser, {*request}, looking, false, false, &with), want,
                      {*request});
    EXPECT_GT(with.ahead_used, 4);
    EXPECT_EQ(with.ahead_used, without.forwards - 1) << "all but the first pass";
    EXPECT_LE(with.ahead_dropped, c.passes_more);
    EXPECT_LE(with.forwards, without.forwards + c.passes_more);
    if (with.forwards == without.forwards) {
      EXPECT_EQ(with.rows_computed - with.rows_wasted, without.rows_computed);
    }
    // A device that chooses otherwise costs passes, and no byte.
    ExpectSameStories(RunAll(*loaded.denoiser, {*request}, looking, false, true, &lied), want,
                      {*request});
    EXPECT_GT(lied.ahead_dropped, 0);
    EXPECT_EQ(lied.steps, without.steps);
  }
}

TEST(EngineLookAheadTest, CostsNoMoreThanItMay) {
  const Loaded loaded = Load("sdar_b4", 1, kWide);
  const SequenceState request = RandomSequence(loaded.denoiser->traits(), "block_dynamic", 3);
  EngineOptions options{.limits = kWide, .look_ahead = true, .spare_queries_max = 0};
  EngineCounters counters;
  (void)RunAll(*loaded.denoiser, {request}, options, false, false, &counters);
  EXPECT_LE(counters.rows_wasted, 8) << "only where a step takes all there is";
}

TEST(EngineLookAheadTest, WhoLeavesWithAPassUnderWayDisturbsNobody) {
  const Loaded loaded = Load("llada", 1, kWide);
  const ModelTraits& model = loaded.denoiser->traits();
  const SequenceState request = RandomSequence(model, "block_static", 1);
  const SequenceState alone = RunAlone(*loaded.denoiser, request);
  const absl::Time start = absl::FromUnixSeconds(1000);
  Engine engine(*loaded.denoiser, {.limits = kWide, .look_ahead = true});
  const SequenceId cancelled = *engine.Add(RandomSequence(model, "block_static", 2));
  const SequenceId kept = *engine.Add(request);
  const SequenceId expired =
      *engine.Add(RandomSequence(model, "block_static", 4), start + absl::Seconds(1));
  const SequenceId removed = *engine.Add(RandomSequence(model, "block_static", 5));
  StepReport report;
  ASSERT_TRUE(engine.Step(start, report).ok());
  EXPECT_EQ(report.events.size(), 4U);
  EXPECT_TRUE(engine.Cancel(cancelled));
  EXPECT_TRUE(engine.Remove(removed).ok());
  // Its memory goes to another at once.
  const SequenceId late = *engine.Add(RandomSequence(model, "random", 6));
  ASSERT_TRUE(engine.Step(start + absl::Seconds(2), report).ok());
  std::map<SequenceId, absl::StatusCode> ended;
  for (const StepEvent& event : report.events) {
    if (event.finished) ended[event.sequence] = event.status.code();
    EXPECT_NE(event.sequence, late) << "it makes its first step in the pass behind";
  }
  EXPECT_EQ(ended[cancelled], absl::StatusCode::kCancelled);
  EXPECT_EQ(ended[expired], absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(engine.counters().ahead_dropped, 3);
  (void)engine.TakeFinished();
  const auto done = Finish(engine);
  ExpectSameResult(done.at(kept), alone);
  ExpectSameResult(done.at(late), RunAlone(*loaded.denoiser, RandomSequence(model, "random", 6)));
  // All leave at once; what is under way belongs to nobody.
  const SequenceId last = *engine.Add(request);
  ASSERT_TRUE(engine.Step(start, report).ok());
  ASSERT_TRUE(engine.Remove(last).ok());
  ASSERT_TRUE(engine.Step(start, report).ok());
  EXPECT_TRUE(report.events.empty());
  const SequenceId again = *engine.Add(request);
  ExpectSameResult(Finish(engine).at(again), alone);
}

TEST(EngineLookAheadTest, AllocatesNothingOnceWarm) {
  for (const char* name : {"llada", "dream", "sdar_b4", "llada2"}) {
    SCOPED_TRACE(name);
    const Loaded loaded = Load(name, 2, kWide);
    const ModelTraits& model = loaded.denoiser->traits();
    Engine engine(*loaded.denoiser, {.limits = kWide, .look_ahead = true});
    std::vector<bool> given(48, false);
    given[0] = true;
    for (int i = 0; i < 4; ++i) {
      DecodingParams params{.sampler = model.default_sampler, .seed = static_cast<uint64_t>(i)};
      if (model.causal_block_length > 0) params.sampler = "block_static";
      ASSERT_TRUE(
          engine.Add(*MakeSequence(std::vector<TokenId>(48, 3), given, params, model)).ok());
    }
    ExpectNoAllocationOnceWarm(engine);
    EXPECT_GT(engine.counters().ahead_used, 80);
  }
}

TEST(EngineAddTest, RefusesWhatCannotFitAndSaysWhether) {
  const Loaded loaded = Load("llada");
  const ModelTraits& model = loaded.denoiser->traits();
  const SequenceState request = RandomSequence(model, "low_confidence", 1);
  Engine tiny(*loaded.denoiser,
              {.limits = {.rows_max = 2, .sequences_max = 1, .positions_max = 96}});
  EXPECT_EQ(tiny.Add(request).status().code(), absl::StatusCode::kInvalidArgument);
  Engine one(*loaded.denoiser,
             {.limits = {.rows_max = 96, .sequences_max = 1, .positions_max = 96}});
  ASSERT_TRUE(one.Add(request).ok());
  EXPECT_EQ(one.Add(request).status().code(), absl::StatusCode::kResourceExhausted);
  Engine poor(*loaded.denoiser, {.limits = kLimits, .kv_bytes_max = 10});
  EXPECT_EQ(poor.Add(request).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace cinnabar
