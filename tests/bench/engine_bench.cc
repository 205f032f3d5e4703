// Whole denoising steps of dense models with random weights: GFLOP/s, the share of the FMA rate
// that this machine reaches in the same minute, and tokens x steps a second; then block-cached
// against uncached decoding.
//
//   engine_bench --help           steps of models that fit a CPU
//   engine_bench --shape --help   steps of published models' shapes on any device, with weights
//                                 made up in memory
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "common/base/check.h"
#include "common/config/flags.h"
#include "tests/bench/peak.h"
#include "tests/bench/shape_bench.h"
#include "tests/support/random_checkpoint.h"
#include "worker/engine/engine.h"

namespace cinnabar {
namespace {

using Clock = std::chrono::steady_clock;

struct Model {
  const char* name;
  RandomCheckpoint shape;
};

std::vector<Model> Models() {
  return {
      {"small",
       {.num_layers = 12,
        .dim = 768,
        .ffn = 2048,
        .num_heads = 12,
        .num_kv_heads = 12,
        .vocabulary = 32000}},
      {"medium",
       {.num_layers = 24,
        .dim = 1024,
        .ffn = 2816,
        .num_heads = 16,
        .num_kv_heads = 16,
        .vocabulary = 32000}},
      {"half",
       {.num_layers = 24,
        .dim = 1024,
        .ffn = 4096,
        .num_heads = 16,
        .num_kv_heads = 16,
        .vocabulary = 50304}},
  };
}

double Parameters(const RandomCheckpoint& shape) {
  return static_cast<double>(shape.num_layers * shape.LayerProducts() + 2 * shape.HeadProducts());
}

// Floating-point operations of one step in which every position is computed and `answered` of them
// have logits.
double StepFlops(const RandomCheckpoint& shape, int64_t batch, int64_t length, int64_t answered) {
  const double rows = static_cast<double>(batch * length);
  const double keys_values = 2.0 * shape.dim * shape.num_kv_heads * shape.head_dim();
  const double others = static_cast<double>(shape.LayerProducts()) - keys_values;
  const double attention = 2.0 * static_cast<double>(length) * shape.num_heads * shape.head_dim();
  // The last layer computes keys and values of every row, and the rest for the rows that are
  // answered.
  double products = rows * keys_values * shape.num_layers;
  products +=
      (rows * (shape.num_layers - 1) + static_cast<double>(answered)) * (others + attention);
  products += static_cast<double>(answered) * static_cast<double>(shape.HeadProducts());
  return 2.0 * products;
}

SequenceState MakeState(const Denoiser& denoiser, int32_t given, int32_t length,
                        DecodingParams params) {
  std::vector<TokenId> ids(length);
  std::vector<bool> flags(length);
  for (int32_t i = 0; i < given; ++i) {
    ids[i] = (i * 131 + 7) % 1000;
    flags[i] = true;
  }
  auto state = MakeSequence(ids, flags, params, denoiser.traits());
  CINNABAR_CHECK(state.ok()) << state.status();
  return *std::move(state);
}

double Quantile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
}

struct Options {
  std::vector<std::string> models = {"small", "half"};
  std::vector<std::string> threads = {"1", "2"};
  std::vector<std::string> rows = {"128", "256", "512"};
  std::vector<std::string> batches = {"1", "8"};
  std::vector<std::string> dtypes = {"float32", "bfloat16"};
  std::string isa = "auto";
  int rounds = 5;
  bool cache = true;
};

std::unique_ptr<Denoiser> Load(const std::string& directory, Backend& backend,
                               const std::string& dtype, const ForwardLimits& limits) {
  const std::map<std::string, DType> dtypes = {{"float32", DType::kF32}, {"bfloat16", DType::kBf16},
                                               {"q8_0", DType::kQ8_0},   {"q4_0", DType::kQ4_0},
                                               {"q4_1", DType::kQ4_1},   {"q4_k", DType::kQ4_K},
                                               {"q6_k", DType::kQ6_K}};
  const auto found = dtypes.find(dtype);
  CINNABAR_CHECK(found != dtypes.end()) << dtype << " is no dtype";
  auto denoiser = LoadDenoiser(directory, backend, {.weight_dtype = found->second}, limits);
  CINNABAR_CHECK(denoiser.ok()) << denoiser.status();
  return *std::move(denoiser);
}

int ToInt(const std::string& text) {
  int value = 0;
  CINNABAR_CHECK(absl::SimpleAtoi(text, &value)) << text << " is not a number";
  return value;
}

// The steps of one dtype in one cell.
struct Contender {
  std::string dtype;
  std::unique_ptr<Denoiser> denoiser;
  std::unique_ptr<Engine> engine;
  std::vector<double> rates;   // FLOP/s
  std::vector<double> shares;  // of the peak before or after, whichever was more
  std::vector<double> ratios;  // to the first contender's rate in the same round

  // One step of `batch` sequences, anew when the last ones have ended; its rate.
  double Step(const RandomCheckpoint& shape, int32_t batch, int32_t length) {
    for (int32_t i = 0; i < batch && engine->num_sequences() < batch; ++i) {
      const auto added = engine->Add(MakeState(
          *denoiser, 1, length, {.sampler = "low_confidence", .seed = static_cast<uint64_t>(i)}));
      CINNABAR_CHECK(added.ok()) << added.status();
    }
    const int64_t answered_before = engine->counters().rows_answered;
    StepReport report;
    const auto begin = Clock::now();
    CINNABAR_CHECK(engine->Step(absl::InfinitePast(), report).ok());
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    return StepFlops(shape, batch, length, engine->counters().rows_answered - answered_before) /
           seconds;
  }
};

// Dtypes take turns in each round, so that what else the machine does meets all of them.
void BenchCell(const Model& model, const Options& options, const ForwardLimits& limits,
               int32_t threads, int32_t length, int32_t batch, std::vector<Contender>& contenders) {
  for (Contender& each : contenders) {
    each.engine = std::make_unique<Engine>(
        *each.denoiser, EngineOptions{.limits = limits, .kv_bytes_max = int64_t{4} << 30});
    each.rates.clear();
    each.shares.clear();
    each.ratios.clear();
    each.Step(model.shape, batch, length);  // warm-up
  }
  double peak_before = bench::MeasurePeakFlops(threads);
  for (int round = 0; round < options.rounds; ++round) {
    for (Contender& each : contenders) {
      each.rates.push_back(each.Step(model.shape, batch, length));
      const double peak_after = bench::MeasurePeakFlops(threads);
      each.shares.push_back(each.rates.back() / std::max(peak_before, peak_after));
      each.ratios.push_back(each.rates.back() / contenders[0].rates.back());
      peak_before = peak_after;
    }
  }
  const double step_flops = StepFlops(model.shape, batch, length, int64_t{batch} * (length - 1));
  for (Contender& each : contenders) {
    const double rate = Quantile(each.rates, 0.5);
    std::printf(
        "%-6s %4.2fB  %-8s  %d thr  T=%-3d  batch %d   %6.1f GFLOP/s   %5.1f%% of peak (%.1f .. "
        "%.1f)   %7.0f tokens x steps/s",
        model.name, Parameters(model.shape) / 1e9, each.dtype.c_str(), threads, length, batch,
        rate / 1e9, 100 * Quantile(each.shares, 0.5), 100 * Quantile(each.shares, 0.25),
        100 * Quantile(each.shares, 0.75), batch * length * rate / step_flops);
    if (&each != &contenders[0]) {
      std::printf("   %.2f x %s (%.2f .. %.2f)", Quantile(each.ratios, 0.5),
                  contenders[0].dtype.c_str(), Quantile(each.ratios, 0.25),
                  Quantile(each.ratios, 0.75));
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

void BenchSteps(const Model& model, const std::string& directory, const Options& options) {
  const ForwardLimits limits{.rows_max = 4096, .sequences_max = 8, .positions_max = 512};
  for (const std::string& threads : options.threads) {
    auto backend =
        *MakeBackend(BackendKind::kCpu, {.num_threads = ToInt(threads), .isa = options.isa});
    std::vector<Contender> contenders(options.dtypes.size());
    for (size_t i = 0; i < contenders.size(); ++i) {
      contenders[i].dtype = options.dtypes[i];
      contenders[i].denoiser = Load(directory, *backend, options.dtypes[i], limits);
    }
    for (const std::string& rows : options.rows) {
      for (const std::string& batch : options.batches) {
        BenchCell(model, options, limits, ToInt(threads), ToInt(rows), ToInt(batch), contenders);
      }
    }
  }
}

// Decodes 512 tokens in blocks of 32 with four tokens a step, with and without the cache of
// finished blocks.
void BenchCache(const std::string& directory, const RandomCheckpoint& shape,
                const Options& options) {
  constexpr int32_t kLength = 512;
  for (const std::string& threads_text : options.threads) {
    auto backend =
        *MakeBackend(BackendKind::kCpu, {.num_threads = ToInt(threads_text), .isa = options.isa});
    const ForwardLimits limits{.rows_max = kLength, .sequences_max = 1, .positions_max = kLength};
    auto denoiser = Load(directory, *backend, "float32", limits);
    double seconds[2];
    std::vector<TokenId> tokens[2];
    for (const bool cached : {false, true}) {
      Engine engine(*denoiser, {.limits = limits, .block_cache = cached});
      const auto added = engine.Add(
          MakeState(*denoiser, 4, kLength, {.sampler = "block_static", .num_steps = 128}));
      CINNABAR_CHECK(added.ok()) << added.status();
      StepReport report;
      const auto begin = Clock::now();
      std::vector<std::pair<SequenceId, SequenceState>> finished;
      while (finished.empty()) {
        CINNABAR_CHECK(engine.Step(absl::InfinitePast(), report).ok());
        finished = engine.TakeFinished();
      }
      seconds[cached] = std::chrono::duration<double>(Clock::now() - begin).count();
      tokens[cached] = finished[0].second.canvas.tokens;
    }
    std::printf(
        "block cache  %.2fB, blocks of %d, %d tokens, %s thr:  uncached %.2f s, cached %.2f s, "
        "ratio %.1f, tokens %s\n",
        Parameters(shape) / 1e9, shape.block_length, kLength, threads_text.c_str(), seconds[0],
        seconds[1], seconds[0] / seconds[1], tokens[0] == tokens[1] ? "identical" : "DIFFER");
    CINNABAR_CHECK(tokens[0] == tokens[1]);
  }
}

constexpr char kHelp[] =
    R"(engine_bench: whole denoising steps of dense models with random weights.

  --model small,half     small (0.13 B), medium (0.35 B), half (0.5 B) or all
  --threads 1,2          of the CPU backend
  --rows 128,256,512     positions of a sequence, all computed
  --batch 1,8            sequences
  --dtype float32,...    of the weights: float32, bfloat16, q8_0, q4_0, q4_1, q4_k, q6_k; they take
                         turns in each round, and each is compared with the first
  --isa auto             avx512vnni, avx512, avx2vnni, avx2 or generic
  --rounds 5
  --skip-cache           leaves out block-cached against uncached decoding

engine_bench --shape NAME [flags] measures published models' shapes; --shape --help tells more.
)";

int ShapesMain(int argc, char** argv) {
  bench::ShapeBenchOptions options;
  FlagSet set("engine_bench --shape NAME,NAME [flags]", "Steps of published models' shapes.");
  std::string shapes, cells, products, graphs;
  float seconds = static_cast<float>(options.seconds_max);
  set.Add("shape", &shapes, "NAMES", "memory_checkpoint.h lists them");
  set.Add("device", &options.device, "DEVICE", "cpu, cuda or cuda:N");
  set.Add("dtype", &options.dtype, "TYPE", "of the weights: float32 or bfloat16");
  set.Add("activations", &options.activations, "TYPE", "auto, float32 or bfloat16");
  set.Add("fp8", &options.fp8, "large matrices in FP8 (cuda)");
  set.Add("products", &products, "NAMES", "auto, mma, wgmma; one after the other");
  set.Add("graphs", &graphs, "on,off", "steps as CUDA graphs, or op by op; one after the other");
  set.Add("cells", &cells, "CELLS", "block:64x32@1024 or canvas:8x1024, with commas");
  set.Add("steps", &options.steps_max, "N", "timed at most");
  set.Add("seconds", &seconds, "S", "that a cell may take");
  set.Add("threads", &options.num_threads, "N", "of the CPU");
  set.Add("ceilings", &options.ceilings_path, "FILE", "what device_ceilings wrote");
  set.Add("json", &options.json_path, "FILE", "where the figures go as well");
  set.Add("invariance", &options.invariance, "compare a sequence alone with itself in the batch");
  absl::Status status = set.Parse(std::vector<std::string>(argv + 1, argv + argc));
  if (set.help_asked()) {
    std::fputs(set.Help().c_str(), stdout);
    return 0;
  }
  options.seconds_max = seconds;
  options.shapes = absl::StrSplit(shapes, ',', absl::SkipEmpty());
  if (!cells.empty()) options.cells = absl::StrSplit(cells, ',');
  if (!products.empty()) options.products = absl::StrSplit(products, ',');
  if (!graphs.empty()) options.graphs = absl::StrSplit(graphs, ',');
  if (status.ok()) status = bench::RunShapeBench(options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "engine_bench: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? 2 : 1;
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--help") {
      std::fputs(kHelp, stdout);
      return 0;
    }
    if (flag == "--skip-cache") {
      options.cache = false;
      continue;
    }
    if (i + 1 == argc) {
      std::fprintf(stderr, "engine_bench: %s needs a value; --help lists the flags\n", argv[i]);
      return 2;
    }
    const std::vector<std::string> value = absl::StrSplit(argv[++i], ',');
    if (flag == "--model")
      options.models =
          value[0] == "all" ? std::vector<std::string>{"small", "medium", "half"} : value;
    else if (flag == "--threads")
      options.threads = value;
    else if (flag == "--rows")
      options.rows = value;
    else if (flag == "--batch")
      options.batches = value;
    else if (flag == "--dtype")
      options.dtypes = value;
    else if (flag == "--isa")
      options.isa = value[0];
    else if (flag == "--rounds")
      options.rounds = ToInt(value[0]);
    else {
      std::fprintf(stderr, "engine_bench: unknown flag %s; --help lists the flags\n", flag.c_str());
      return 2;
    }
  }
  const std::filesystem::path root =
      std::filesystem::temp_directory_path() / "cinnabar_engine_bench";
  const auto write = [&](const RandomCheckpoint& shape) {
    std::filesystem::remove_all(root);
    std::filesystem::create_directories(root);
    const absl::Status written = WriteRandomCheckpoint(shape, root.string());
    CINNABAR_CHECK(written.ok()) << written;
  };
  std::printf("%s\n", (*MakeBackend(BackendKind::kCpu, {.isa = options.isa}))->Describe().c_str());
  for (const Model& model : Models()) {
    if (std::count(options.models.begin(), options.models.end(), model.name) == 0) continue;
    write(model.shape);
    BenchSteps(model, root.string(), options);
  }
  if (options.cache) {
    RandomCheckpoint blocks = Models()[0].shape;
    blocks.block_length = 32;
    write(blocks);
    BenchCache(root.string(), blocks, options);
  }
  std::filesystem::remove_all(root);
  return 0;
}

}  // namespace
}  // namespace cinnabar

int main(int argc, char** argv) {
  const bool shapes = std::any_of(argv + 1, argv + argc, [](absl::string_view arg) {
    return arg == "--shape" || absl::StartsWith(arg, "--shape=");
  });
  return shapes ? cinnabar::ShapesMain(argc, argv) : cinnabar::Main(argc, argv);
}
