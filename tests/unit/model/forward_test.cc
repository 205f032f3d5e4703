// The forward pass of every family, on every backend: against the golden logits, alone against
// packed, cached against uncached.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/json.h"
#include "tests/support/golden_models.h"
#include "tests/unit/model/reference_backend.h"
#include "worker/model/checkpoint.h"
#include "worker/model/denoiser.h"

namespace cinnabar {
namespace {

using nlohmann::json;

std::string GoldenFolder() {
  const char* source = std::getenv("CINNABAR_SOURCE_DIR");
  return absl::StrCat(source == nullptr ? "." : source, "/tests/golden");
}

// "reference", "cpu" (two threads, the best instructions) or "cpu_generic" (one thread, plain
// code).
std::unique_ptr<Backend> MakeTestBackend(const std::string& name) {
  if (name == "reference") return MakeReferenceBackend();
  const std::string isa = name == "cpu_generic" ? "generic" : "auto";
  absl::StatusOr<std::unique_ptr<Backend>> backend =
      MakeBackend(BackendKind::kCpu, {.num_threads = name == "cpu" ? 2 : 1, .isa = isa});
  EXPECT_TRUE(backend.ok()) << backend.status();
  return std::move(*backend);
}

// One sequence of a batch.
struct Part {
  std::vector<TokenId> ids;
  int32_t first_position = 0;
  float sigma = 0.5F;
  KvMemory* kv = nullptr;
  std::vector<int32_t> wanted = {};  // rows of this sequence
  int32_t encoded = 0;               // causal encoder: leading rows that it takes
};

// Runs the parts as one batch; logits of the wanted rows, part after part.
std::vector<std::vector<float>> RunParts(Denoiser& model, const std::vector<Part>& parts) {
  std::vector<TokenId> ids;
  std::vector<SequenceSpan> sequences;
  std::vector<float> sigmas;
  std::vector<int32_t> wanted;
  for (const Part& part : parts) {
    const auto row_begin = static_cast<int32_t>(ids.size());
    const bool two_halves = model.traits().causal_encoder;
    if (part.encoded > 0) {
      sequences.push_back({.row_begin = row_begin,
                           .num_rows = part.encoded,
                           .first_position = part.first_position,
                           .block_length = 1,
                           .kv = part.kv});
      sigmas.push_back(part.sigma);
    }
    if (part.encoded < static_cast<int32_t>(part.ids.size())) {
      sequences.push_back({.row_begin = row_begin + part.encoded,
                           .num_rows = static_cast<int32_t>(part.ids.size()) - part.encoded,
                           .first_position = part.first_position + part.encoded,
                           .block_length = two_halves ? 0 : model.traits().causal_block_length,
                           .kv = part.kv});
      sigmas.push_back(part.sigma);
    }
    ids.insert(ids.end(), part.ids.begin(), part.ids.end());
    for (const int32_t row : part.wanted) wanted.push_back(row_begin + row);
  }
  const absl::Status status =
      model.Forward({.ids = ids, .sequences = sequences, .sigmas = sigmas, .wanted_rows = wanted});
  EXPECT_TRUE(status.ok()) << status;
  std::vector<std::vector<float>> logits;
  int32_t begin = 0;
  for (const Part& part : parts) {
    const auto count = static_cast<int32_t>(part.wanted.size());
    logits.emplace_back(int64_t{count} * model.traits().vocab_size);
    const absl::Status read = model.Logits(begin, count, absl::MakeSpan(logits.back()));
    EXPECT_TRUE(read.ok()) << read;
    begin += count;
  }
  return logits;
}

std::vector<int32_t> AllRows(size_t count) {
  std::vector<int32_t> rows(count);
  for (size_t i = 0; i < count; ++i) rows[i] = static_cast<int32_t>(i);
  return rows;
}

struct Loaded {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Denoiser> model;
  std::vector<std::unique_ptr<KvMemory>> memories;

  KvMemory* NewKv(int32_t positions) {
    absl::StatusOr<std::unique_ptr<KvMemory>> kv =
        backend->AllocateKv(model->SequenceKvShape(positions, KvReuse::kExact));
    EXPECT_TRUE(kv.ok()) << kv.status();
    memories.push_back(std::move(*kv));
    return memories.back().get();
  }
};

Loaded Load(const std::string& backend, const std::string& model, const LoadOptions& options = {}) {
  Loaded loaded;
  loaded.backend = MakeTestBackend(backend);
  absl::StatusOr<std::unique_ptr<Denoiser>> denoiser =
      LoadDenoiser(absl::StrCat(GoldenFolder(), "/models/", model), *loaded.backend, options,
                   {.rows_max = 128, .sequences_max = 8, .positions_max = 64});
  EXPECT_TRUE(denoiser.ok()) << denoiser.status();
  if (denoiser.ok()) loaded.model = std::move(*denoiser);
  return loaded;
}

// Ids that fit every model; varied and reproducible.
std::vector<TokenId> SomeIds(const Denoiser& model, size_t count, uint32_t seed) {
  std::vector<TokenId> ids(count);
  uint32_t state = seed;
  for (TokenId& id : ids) {
    state = state * 1664525U + 1013904223U;
    id = static_cast<TokenId>((state >> 8) % model.traits().vocab_size);
    if ((state >> 4) % 3 == 0 && model.traits().mask_token >= 0) id = model.traits().mask_token;
  }
  return ids;
}

// How many of a sequence's rows are encoded: all but a block.
int32_t EncodedRows(const Denoiser& model, size_t num_rows) {
  const ModelTraits& traits = model.traits();
  if (!traits.causal_encoder) return 0;
  return std::max(static_cast<int32_t>(num_rows) - traits.causal_block_length, 0);
}

bool SameBits(absl::Span<const float> a, absl::Span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class ForwardTest : public testing::TestWithParam<std::string> {};

TEST_P(ForwardTest, AgreesWithTheGoldenLogits) {
  const absl::StatusOr<json> index = ReadJsonFile(GoldenFolder() + "/index.json", 1U << 24);
  ASSERT_TRUE(index.ok()) << index.status();
  int num_cases = 0;
  double worst = 0;
  for (const json& entry : (*index)["logits"]) {
    const std::string name = entry["name"];
    SCOPED_TRACE(name);
    const std::string model_dir = entry["model_dir"];
    Loaded loaded = Load(GetParam(), model_dir.substr(model_dir.rfind('/') + 1));
    ASSERT_NE(loaded.model, nullptr);
    const absl::StatusOr<json> input =
        ReadJsonFile(absl::StrCat(GoldenFolder(), "/", std::string(entry["input_file"])), 1U << 24);
    ASSERT_TRUE(input.ok()) << input.status();
    const absl::StatusOr<Checkpoint> file =
        Checkpoint::OpenFile(absl::StrCat(GoldenFolder(), "/", std::string(entry["logits_file"])));
    ASSERT_TRUE(file.ok()) << file.status();
    const absl::StatusOr<HostMatrix> want = file->Matrix("logits");
    ASSERT_TRUE(want.ok()) << want.status();

    Part part{.ids = (*input)["ids"].get<std::vector<TokenId>>()};
    part.sigma = (*input).value("sigma", 0.0F);
    part.kv = loaded.NewKv(static_cast<int32_t>(part.ids.size()));
    part.wanted = AllRows(part.ids.size());
    part.encoded = EncodedRows(*loaded.model, part.ids.size());
    part.wanted.erase(part.wanted.begin(), part.wanted.begin() + part.encoded);
    const std::vector<float> got = RunParts(*loaded.model, {part})[0];
    ASSERT_EQ(static_cast<int64_t>(got.size()), want->rows * want->cols);
    for (size_t i = 0; i < got.size(); ++i) {
      float reference;
      std::memcpy(&reference, static_cast<const char*>(want->data) + i * sizeof(float),
                  sizeof(float));
      const double bound = std::max(1.0, std::abs(double{reference}));
      const double error = std::abs(double{got[i]} - reference) / bound;
      worst = std::max(worst, error / double{entry["bound"]});
      // Stated in tests/golden/README.md: float32 sums of a few dozen terms, through all layers;
      // more where block-quantised weights let the inputs be rounded to 15 bits.
      ASSERT_LE(error, double{entry["bound"]})
          << "element " << i << ": " << got[i] << " against " << reference;
    }
    ++num_cases;
  }
  EXPECT_GE(num_cases, 20);
  RecordProperty("worst_share_of_bound", absl::StrCat(worst));
  std::printf("%d cases, worst |difference| / max(1, |reference|) is %.2f of its bound\n",
              num_cases, worst);
}

TEST_P(ForwardTest, ASequenceGivesTheSameBitsAloneAndPacked) {
  for (const std::string& name : GoldenModels()) {
    SCOPED_TRACE(name);
    Loaded loaded = Load(GetParam(), name);
    ASSERT_NE(loaded.model, nullptr);
    Denoiser& model = *loaded.model;
    std::vector<Part> parts;
    for (const auto& [length, seed] : {std::pair{17, 1U}, {1, 2U}, {31, 3U}, {8, 4U}}) {
      Part part{.ids = SomeIds(model, length, seed), .sigma = 0.3F * static_cast<float>(seed)};
      part.kv = loaded.NewKv(length);
      part.wanted = AllRows(part.ids.size());
      part.encoded = EncodedRows(model, part.ids.size());
      parts.push_back(part);
    }
    std::vector<std::vector<float>> alone;
    for (const Part& part : parts) alone.push_back(RunParts(model, {part})[0]);
    const std::vector<std::vector<float>> packed = RunParts(model, parts);
    std::vector<Part> turned(parts.rbegin(), parts.rend());
    const std::vector<std::vector<float>> reversed = RunParts(model, turned);
    for (size_t i = 0; i < parts.size(); ++i) {
      EXPECT_TRUE(SameBits(alone[i], packed[i])) << "sequence " << i;
      EXPECT_TRUE(SameBits(alone[i], reversed[parts.size() - 1 - i])) << "sequence " << i;
    }
  }
}

TEST_P(ForwardTest, WhichRowsAreWantedDoesNotChangeThem) {
  for (const std::string& name : GoldenModels()) {
    SCOPED_TRACE(name);
    Loaded loaded = Load(GetParam(), name);
    ASSERT_NE(loaded.model, nullptr);
    const int64_t vocab_size = loaded.model->traits().vocab_size;
    Part first{.ids = SomeIds(*loaded.model, 19, 5), .sigma = 0.2F, .kv = loaded.NewKv(19)};
    Part second{.ids = SomeIds(*loaded.model, 13, 6), .sigma = 0.9F, .kv = loaded.NewKv(13)};
    first.encoded = EncodedRows(*loaded.model, 19);
    second.encoded = EncodedRows(*loaded.model, 13);
    first.wanted = AllRows(19);
    second.wanted = AllRows(13);
    const std::vector<std::vector<float>> all = RunParts(*loaded.model, {first, second});
    first.wanted = {};
    second.wanted = {0, 3, 12};
    const std::vector<std::vector<float>> some = RunParts(*loaded.model, {first, second});
    for (size_t i = 0; i < second.wanted.size(); ++i) {
      EXPECT_TRUE(
          SameBits(absl::MakeConstSpan(some[1]).subspan(i * vocab_size, vocab_size),
                   absl::MakeConstSpan(all[1]).subspan(second.wanted[i] * vocab_size, vocab_size)))
          << "row " << second.wanted[i];
    }
  }
}

TEST_P(ForwardTest, ABlockReadsFinishedBlocksFromTheCache) {
  for (const std::string name : {"sdar_b4", "sdar_b8", "sdar_b4_f16"}) {
    SCOPED_TRACE(name);
    Loaded loaded = Load(GetParam(), name);
    ASSERT_NE(loaded.model, nullptr);
    Denoiser& model = *loaded.model;
    const int32_t block = model.traits().causal_block_length;
    ASSERT_GT(block, 0);
    const int32_t length = 5 * block - 1;  // ends inside a block
    Part whole{.ids = SomeIds(model, length, 7), .kv = loaded.NewKv(length)};
    whole.wanted = AllRows(length);
    const std::vector<float> uncached = RunParts(model, {whole})[0];

    KvMemory* cache = loaded.NewKv(length);
    const int32_t prefix = 2 * block;
    Part commit{.ids = {whole.ids.begin(), whole.ids.begin() + prefix}, .kv = cache};
    RunParts(model, {commit});  // wants nothing: keys and values only
    std::vector<float> cached;
    for (int32_t begin = prefix; begin < length; begin += block) {
      const int32_t end = std::min(begin + block, length);
      Part part{.ids = {whole.ids.begin() + begin, whole.ids.begin() + end},
                .first_position = begin,
                .kv = cache};
      part.wanted = AllRows(part.ids.size());
      const std::vector<float> logits = RunParts(model, {part})[0];
      cached.insert(cached.end(), logits.begin(), logits.end());
    }
    EXPECT_TRUE(SameBits(cached, absl::MakeConstSpan(uncached).subspan(int64_t{prefix} *
                                                                       model.traits().vocab_size)));
  }
}

TEST(ForwardOnCpuTest, ThreadsAndInstructionsDoNotChangeBits) {
  for (const std::string& name : GoldenModels()) {
    SCOPED_TRACE(name);
    std::vector<std::vector<float>> logits;
    for (const char* backend : {"cpu", "cpu_generic"}) {
      Loaded loaded = Load(backend, name);
      ASSERT_NE(loaded.model, nullptr);
      Part part{
          .ids = SomeIds(*loaded.model, 23, 9), .kv = loaded.NewKv(23), .wanted = AllRows(23)};
      part.encoded = EncodedRows(*loaded.model, 23);
      logits.push_back(RunParts(*loaded.model, {part})[0]);
    }
    EXPECT_TRUE(SameBits(logits[0], logits[1]));
  }
}

// Steps of one block, each conditioned on the one before: against the golden logits, beside another
// sequence, and with what lies before the block encoded in pieces and passes of its own.
TEST_P(ForwardTest, ABlockReadsItsLastPrediction) {
  for (const std::string name :
       {"diffusion_gemma_13", "diffusion_gemma_37", "diffusion_gemma_bf16_13"}) {
    SCOPED_TRACE(name);
    Loaded loaded = Load(GetParam(), name.substr(0, name.rfind('_')));
    ASSERT_NE(loaded.model, nullptr);
    Denoiser& model = *loaded.model;
    const int32_t block = model.traits().causal_block_length;
    const int64_t vocab_size = model.traits().vocab_size;
    const std::string path = absl::StrCat(GoldenFolder(), "/logits/", name);
    const json input = *ReadJsonFile(path + ".json", 1U << 24);
    const absl::StatusOr<Checkpoint> file = Checkpoint::OpenFile(path + ".safetensors");
    ASSERT_TRUE(file.ok()) << file.status();
    const HostMatrix want = *file->Matrix("steps");
    const auto ids = input["ids"].get<std::vector<TokenId>>();
    const int32_t length = static_cast<int32_t>(ids.size()), begin = length - block;

    // A neighbour of one block without anything before it.
    const std::vector<TokenId> other = SomeIds(model, block, 3);
    KvMemory* const other_kv = loaded.NewKv(block);
    std::vector<std::vector<float>> runs;
    for (const bool in_pieces : {false, true}) {
      KvMemory* const kv = loaded.NewKv(length);
      std::unique_ptr<Buffer> kept[2] = {*loaded.backend->Allocate(model.SelfConditioningBytes()),
                                         *loaded.backend->Allocate(model.SelfConditioningBytes())};
      int32_t encoded = 0;
      for (const int32_t end : {2, 3, begin - 1}) {
        if (!in_pieces) break;
        Part piece{.ids = {ids.begin() + encoded, ids.begin() + end}, .first_position = encoded};
        piece.kv = kv;
        piece.encoded = end - encoded;
        RunParts(model, {piece});
        encoded = end;
      }
      std::vector<float>& got = runs.emplace_back();
      float temperature = 0;
      int step = 0;
      for (const json& entry : input["steps"]) {
        const auto block_ids = entry["ids"].get<std::vector<TokenId>>();
        std::vector<TokenId> rows;
        std::vector<SequenceSpan> spans;
        if (in_pieces) {
          rows = other;
          spans.push_back({.num_rows = block, .kv = other_kv});
        }
        if (encoded < begin) {
          spans.push_back({.row_begin = static_cast<int32_t>(rows.size()),
                           .num_rows = begin - encoded,
                           .first_position = encoded,
                           .block_length = 1,
                           .kv = kv});
          rows.insert(rows.end(), ids.begin() + encoded, ids.begin() + begin);
        }
        encoded = begin;
        const auto row_begin = static_cast<int32_t>(rows.size());
        spans.push_back(
            {.row_begin = row_begin, .num_rows = block, .first_position = begin, .kv = kv});
        rows.insert(rows.end(), block_ids.begin(), block_ids.end());
        std::vector<int32_t> wanted = {};
        if (in_pieces) wanted = {1, 4};
        for (int32_t i = 0; i < block; ++i) wanted.push_back(row_begin + i);
        std::vector<SelfConditioning> conditioning(spans.size());
        conditioning.back() = {.previous = step == 0 ? nullptr : kept[step % 2].get(),
                               .temperature = step == 0 ? 1.0F : temperature,
                               .next = kept[(step + 1) % 2].get()};
        ASSERT_TRUE(model
                        .Forward({.ids = rows,
                                  .sequences = spans,
                                  .wanted_rows = wanted,
                                  .self_conditioning = conditioning})
                        .ok());
        std::vector<float> logits(block * vocab_size);
        ASSERT_TRUE(
            model.Logits(static_cast<int32_t>(wanted.size()) - block, block, absl::MakeSpan(logits))
                .ok());
        got.insert(got.end(), logits.begin(), logits.end());
        temperature = entry["temperature"];
        ++step;
      }
    }
    ASSERT_EQ(static_cast<int64_t>(runs[0].size()), want.rows * want.cols);
    for (size_t i = 0; i < runs[0].size(); ++i) {
      float reference;
      std::memcpy(&reference, static_cast<const char*>(want.data) + i * sizeof(float),
                  sizeof(float));
      ASSERT_NEAR(runs[0][i], reference, 2e-4 * std::max(1.0F, std::abs(reference)))
          << "element " << i;
    }
    EXPECT_TRUE(SameBits(runs[0], runs[1]));
  }
}

TEST_P(ForwardTest, WeightsCanBeConverted) {
  Loaded as_stored = Load(GetParam(), "dream");
  Loaded narrowed = Load(GetParam(), "dream", {.weight_dtype = DType::kBf16});
  ASSERT_NE(as_stored.model, nullptr);
  ASSERT_NE(narrowed.model, nullptr);
  EXPECT_LT(narrowed.model->memory().weights_bytes, as_stored.model->memory().weights_bytes);
  Part part{.ids = SomeIds(*as_stored.model, 9, 8), .wanted = AllRows(9)};
  part.kv = as_stored.NewKv(9);
  const std::vector<float> exact = RunParts(*as_stored.model, {part})[0];
  part.kv = narrowed.NewKv(9);
  const std::vector<float> rounded = RunParts(*narrowed.model, {part})[0];
  double difference = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    difference += std::pow(exact[i] - rounded[i], 2);
    size += std::pow(exact[i], 2);
  }
  EXPECT_GT(difference, 0);
  EXPECT_LT(std::sqrt(difference / size), 0.05);  // bf16 keeps 8 bits
}

TEST_P(ForwardTest, AnIdOutsideTheVocabularyIsAnError) {
  Loaded loaded = Load(GetParam(), "llada");
  ASSERT_NE(loaded.model, nullptr);
  const std::vector<TokenId> ids = {1, loaded.model->traits().vocab_size};
  const std::vector<SequenceSpan> sequences = {{.num_rows = 2, .kv = loaded.NewKv(2)}};
  EXPECT_EQ(loaded.model->Forward({.ids = ids, .sequences = sequences}).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_P(ForwardTest, TheOffsetIsWhatTheScoresAreLoweredBy) {
  Loaded loaded = Load(GetParam(), "sedd_absorb");
  ASSERT_NE(loaded.model, nullptr);
  const double rest = loaded.model->traits().vocab_size - 1.0;
  for (const float sigma : {1e-4F, 0.5F, 1.5F, 20.0F, 2000.0F}) {
    const double direct = sigma > 100 ? sigma : std::log(std::expm1(double{sigma}));
    EXPECT_NEAR(loaded.model->OutputOffset(sigma), direct + std::log(rest), 1e-9) << sigma;
  }
  EXPECT_EQ(Load(GetParam(), "mdlm").model->OutputOffset(0.5F), 0.0);
  EXPECT_EQ(Load(GetParam(), "sedd_uniform").model->OutputOffset(0.5F), 0.0);
}

INSTANTIATE_TEST_SUITE_P(Backends, ForwardTest, testing::Values("reference", "cpu", "cpu_generic"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace cinnabar
