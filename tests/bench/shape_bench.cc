#include "tests/bench/shape_bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/check.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"
#include "kernels/device_name.h"
#include "tests/bench/peak.h"
#include "tests/bench/step_cost.h"
#include "tests/support/memory_checkpoint.h"
#include "worker/model/denoiser.h"

namespace cinnabar::bench {
namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::ordered_json;

constexpr int32_t kWarmUpSteps = 3;
constexpr int32_t kCausalBlock = 32;

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Cell {
  std::string name;
  int32_t sequences = 1;
  int32_t rows = 1;    // of each
  int32_t cached = 0;  // 0 in a canvas
  bool block = false;
};

absl::StatusOr<Cell> ParseCell(const std::string& text) {
  Cell cell{.name = text};
  absl::string_view rest = text;
  cell.block = absl::ConsumePrefix(&rest, "block:");
  if (!cell.block && !absl::ConsumePrefix(&rest, "canvas:")) rest = "";
  const std::vector<absl::string_view> numbers = absl::StrSplit(rest, absl::ByAnyChar("x@"));
  const bool well_formed = numbers.size() == (cell.block ? 3U : 2U) &&
                           absl::SimpleAtoi(numbers[0], &cell.sequences) &&
                           absl::SimpleAtoi(numbers[1], &cell.rows) &&
                           (!cell.block || absl::SimpleAtoi(numbers[2], &cell.cached));
  if (!well_formed || cell.sequences < 1 || cell.rows < 1 || cell.cached < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("cell \"", text, "\": write it as block:64x32@1024 or canvas:8x1024"));
  }
  if (cell.block && (cell.rows > kCausalBlock || cell.cached % kCausalBlock != 0)) {
    return absl::InvalidArgumentError(absl::StrCat("cell \"", text, "\": blocks are of ",
                                                   kCausalBlock, ", and cached ones are whole"));
  }
  return cell;
}

absl::StatusOr<std::optional<DType>> ParseType(const std::string& name) {
  if (name == "auto") return std::optional<DType>();
  if (name == "float32") return std::optional<DType>(DType::kF32);
  if (name == "bfloat16") return std::optional<DType>(DType::kBf16);
  return absl::InvalidArgumentError(absl::StrCat("type ", name, ": take float32 or bfloat16"));
}

// What the device was measured to do; 0: not known, and then no share is printed.
struct Ceilings {
  double bytes_per_second = 0;
  double flops = 0;  // of matrix products in the dtype that is computed in
};

absl::StatusOr<Ceilings> ReadCeilings(const ShapeBenchOptions& options, BackendKind kind) {
  if (options.ceilings_path.empty()) {
    if (kind != BackendKind::kCpu) return Ceilings{};
    const int32_t threads = options.num_threads > 0
                                ? options.num_threads
                                : static_cast<int32_t>(std::thread::hardware_concurrency());
    return Ceilings{.bytes_per_second = MeasureReadBytesPerSecond(threads),
                    .flops = MeasurePeakFlops(threads)};
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::string text, ReadFile(options.ceilings_path, 1 << 20));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto number = [&](const char* group, const std::string& key) {
    const auto found = json.is_object() ? json.find(group) : json.end();
    if (found == json.end() || !found->is_object()) return 0.0;
    const auto value = found->find(key);
    return value != found->end() && value->is_number() ? value->get<double>() : 0.0;
  };
  if (number("bytes_per_second", "copy") <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.ceilings_path, " is not what device_ceilings writes"));
  }
  // The CPU computes in float32 whatever the weights are kept in.
  const std::string type = kind == BackendKind::kCpu ? "float32"
                           : options.fp8             ? "float8"
                                                     : options.dtype;
  return Ceilings{.bytes_per_second = std::max(number("bytes_per_second", "copy"),
                                               number("bytes_per_second", "read")),
                  .flops = number("matrix_flops", type)};
}

// One denoiser and the sequences of one cell on it.
class StepRunner {
 public:
  static absl::StatusOr<StepRunner> Make(Denoiser& denoiser, const Cell& cell) {
    StepRunner runner(denoiser, cell);
    const int32_t positions = cell.cached + cell.rows;
    for (int32_t s = 0; s < cell.sequences; ++s) {
      CINNABAR_ASSIGN_OR_RETURN(
          std::unique_ptr<KvMemory> kv,
          denoiser.backend().AllocateKv(denoiser.SequenceKvShape(positions, KvReuse::kExact)),
          "sequence ", s);
      runner.kv_.push_back(std::move(kv));
    }
    if (cell.cached > 0) {
      for (int32_t s = 0; s < cell.sequences; ++s) {
        const std::vector<TokenId> ids = runner.Ids(s, 0, cell.cached);
        const SequenceSpan span = runner.Span(s, 0, 0, cell.cached);
        CINNABAR_RETURN_IF_ERROR(
            denoiser.Forward({.ids = ids, .sequences = absl::MakeConstSpan(&span, 1)}), "prefill");
      }
    }
    return runner;
  }

  // One step of the sequences [first, first + count): a pass over their rows, and an argmax with
  // its statistics for every one of them.
  absl::Status Step(int32_t first, int32_t count, std::vector<VocabularyAnswer>& answers) {
    ids_.clear();
    spans_.clear();
    wanted_.clear();
    for (int32_t s = first; s < first + count; ++s) {
      spans_.push_back(Span(s, static_cast<int32_t>(ids_.size()), cell_.cached, cell_.rows));
      const std::vector<TokenId> ids = Ids(s, cell_.cached, cell_.rows);
      ids_.insert(ids_.end(), ids.begin(), ids.end());
    }
    queries_.assign(ids_.size(), {});
    for (size_t row = 0; row < ids_.size(); ++row) {
      wanted_.push_back(static_cast<int32_t>(row));
      queries_[row].hidden_row = static_cast<int32_t>(row);
    }
    answers.assign(ids_.size(), {});
    CINNABAR_RETURN_IF_ERROR(
        denoiser_->Forward({.ids = ids_, .sequences = spans_, .wanted_rows = wanted_}));
    return denoiser_->Answer(queries_, absl::MakeSpan(answers));
  }

 private:
  StepRunner(Denoiser& denoiser, Cell cell) : denoiser_(&denoiser), cell_(std::move(cell)) {}

  SequenceSpan Span(int32_t sequence, int32_t row_begin, int32_t first, int32_t rows) const {
    return {.row_begin = row_begin,
            .num_rows = rows,
            .first_position = first,
            .block_length = denoiser_->traits().causal_block_length,
            .kv = kv_[sequence].get()};
  }
  // Prompt-like ids that differ from sequence to sequence.
  std::vector<TokenId> Ids(int32_t sequence, int32_t first, int32_t count) const {
    std::vector<TokenId> ids(count);
    for (int32_t i = 0; i < count; ++i) {
      ids[i] = static_cast<TokenId>((int64_t{sequence} * 7919 + (first + i) * 131 + 7) %
                                    denoiser_->traits().vocab_size);
    }
    return ids;
  }

  Denoiser* denoiser_;
  Cell cell_;
  std::vector<std::unique_ptr<KvMemory>> kv_;
  std::vector<TokenId> ids_;
  std::vector<SequenceSpan> spans_;
  std::vector<int32_t> wanted_;
  std::vector<VocabularyQuery> queries_;
};

bool SameBits(const VocabularyAnswer& a, const VocabularyAnswer& b) {
  const auto same = [](const auto& x, const auto& y) {
    return std::memcmp(&x, &y, sizeof(x)) == 0;
  };
  return a.token == b.token && same(a.token_logit, b.token_logit) &&
         same(a.probability, b.probability) && same(a.margin, b.margin) &&
         same(a.entropy, b.entropy) && same(a.log_sum_exp, b.log_sum_exp) && a.finite == b.finite;
}

// Rows whose answer alone is not that of the batch, of the sequences looked at: the first, the last
// and some between.
absl::StatusOr<int64_t> RowsThatDiffer(StepRunner& runner, const Cell& cell) {
  std::vector<VocabularyAnswer> together, alone;
  CINNABAR_RETURN_IF_ERROR(runner.Step(0, cell.sequences, together));
  int64_t different = 0;
  const int32_t stride = std::max(1, (cell.sequences - 1) / 3);
  for (int32_t s = 0; s < cell.sequences; s += stride) {
    CINNABAR_RETURN_IF_ERROR(runner.Step(s, 1, alone));
    for (int32_t row = 0; row < cell.rows; ++row) {
      different += !SameBits(alone[row], together[s * cell.rows + row]);
    }
  }
  return different;
}

struct Timing {
  double median = 0, low = 0, high = 0;  // seconds of a step, by the host's clock
  double device = -1;                    // mean, by the device's; -1: it does not tell
  int32_t steps = 0;
};

absl::StatusOr<Timing> TimeSteps(StepRunner& runner, Denoiser& denoiser, const Cell& cell,
                                 const ShapeBenchOptions& options) {
  std::vector<VocabularyAnswer> answers;
  for (int32_t i = 0; i < kWarmUpSteps; ++i) {
    CINNABAR_RETURN_IF_ERROR(runner.Step(0, cell.sequences, answers));
  }
  const double busy_before = denoiser.backend().Stats().busy_seconds;
  std::vector<double> seconds;
  const auto begin = Clock::now();
  while (seconds.size() < 3 || (static_cast<int32_t>(seconds.size()) < options.steps_max &&
                                SecondsSince(begin) < options.seconds_max)) {
    const auto step_begin = Clock::now();
    CINNABAR_RETURN_IF_ERROR(runner.Step(0, cell.sequences, answers));
    seconds.push_back(SecondsSince(step_begin));
  }
  Timing timing{.steps = static_cast<int32_t>(seconds.size())};
  const double busy_after = denoiser.backend().Stats().busy_seconds;
  if (busy_before >= 0 && busy_after > busy_before) {
    timing.device = (busy_after - busy_before) / timing.steps;
  }
  for (const VocabularyAnswer& answer : answers) {
    if (!answer.finite) return absl::DataLossError("an answer is not finite");
  }
  std::sort(seconds.begin(), seconds.end());
  timing.median = seconds[seconds.size() / 2];
  timing.low = seconds.front();
  timing.high = seconds.back();
  return timing;
}

ordered_json Share(double value, double ceiling) {
  return ceiling > 0 ? ordered_json(value / ceiling) : ordered_json();
}

std::string Percent(double value, double ceiling) {
  if (ceiling <= 0) return "";
  char text[32];
  std::snprintf(text, sizeof(text), " (%.1f %%)", 100 * value / ceiling);
  return text;
}

// One way of running a shape's steps.
struct Way {
  std::string products;
  bool graphs = true;
};

ordered_json Report(const std::string& shape, const std::string& device, const Cell& cell,
                    const ShapeBenchOptions& options, const Way& way, const StepCost& cost,
                    const Timing& timing, const Ceilings& ceilings) {
  const double rate = cost.bytes() / timing.median, flops = cost.flops / timing.median;
  const double positions = static_cast<double>(cell.sequences) * cell.rows;
  std::printf(
      "%-11s %s%s%s %-17s step %9.3f ms (%.3f .. %.3f, %d steps)  %8.3f GB %7.1f GB/s%s  %8.4f "
      "TFLOP "
      "%7.2f TFLOP/s%s  %.0f tokens x steps/s\n",
      shape.c_str(), options.fp8 ? "float8" : options.dtype.c_str(),
      way.products == "auto" ? "" : absl::StrCat(" ", way.products).c_str(),
      way.graphs ? "" : " without graphs", cell.name.c_str(), 1e3 * timing.median, 1e3 * timing.low,
      1e3 * timing.high, timing.steps, cost.bytes() / 1e9, rate / 1e9,
      Percent(rate, ceilings.bytes_per_second).c_str(), cost.flops / 1e12, flops / 1e12,
      Percent(flops, ceilings.flops).c_str(), positions / timing.median);
  ordered_json out = {
      {"shape", shape},
      {"device", device},
      {"dtype", options.dtype},
      {"activations", options.activations},
      {"fp8", options.fp8},
      {"products", way.products},
      {"graphs", way.graphs},
      {"cell", cell.name},
      {"step_seconds", timing.median},
      {"step_seconds_low", timing.low},
      {"step_seconds_high", timing.high},
      {"steps", timing.steps},
      {"device_seconds", timing.device < 0 ? ordered_json() : ordered_json(timing.device)},
      {"bytes", cost.bytes()},
      {"weight_bytes", cost.weight_bytes},
      {"kv_read_bytes", cost.kv_read_bytes},
      {"flops", cost.flops},
      {"bandwidth_share", Share(rate, ceilings.bytes_per_second)},
      {"matrix_share", Share(flops, ceilings.flops)},
      // The time that the slower of both floors alone would take, over the step's.
      {"floor_share", ceilings.bytes_per_second > 0 && ceilings.flops > 0
                          ? ordered_json(std::max(cost.bytes() / ceilings.bytes_per_second,
                                                  cost.flops / ceilings.flops) /
                                         timing.median)
                          : ordered_json()},
      {"token_steps_per_second", positions / timing.median}};
  if (!cell.block) return out;
  std::printf("%11s if each forward commits 2, 4, 8 tokens a sequence: %.0f, %.0f, %.0f tokens/s\n",
              "", 2 * cell.sequences / timing.median, 4 * cell.sequences / timing.median,
              8 * cell.sequences / timing.median);
  ordered_json& headline = out["tokens_per_second_at_tokens_per_forward"];
  for (const int tokens : {2, 4, 8}) {
    headline[absl::StrCat(tokens)] = tokens * cell.sequences / timing.median;
  }
  return out;
}

absl::Status RunCells(const std::string& shape, const std::string& folder, const ModelSpec& spec,
                      const std::vector<Cell>& cells, const ShapeBenchOptions& options,
                      const std::string& products, Backend& backend, const Ceilings& ceilings,
                      ordered_json& results) {
  ForwardLimits limits{.rows_max = 1, .sequences_max = 1, .positions_max = 1};
  for (const Cell& cell : cells) {
    limits.rows_max = std::max({limits.rows_max, cell.sequences * cell.rows, cell.cached});
    limits.sequences_max = std::max(limits.sequences_max, cell.sequences);
    limits.positions_max = std::max(limits.positions_max, cell.cached + cell.rows);
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseType(options.dtype));
  const auto begin = Clock::now();
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<Denoiser> denoiser,
                            LoadDenoiser(folder, backend, {.weight_dtype = dtype}, limits));
  const double seconds = SecondsSince(begin);
  const Denoiser::Memory memory = denoiser->memory();
  std::printf(
      "%-11s loaded %.2f GB in %.2f s (%.2f GB/s), workspace %.2f GB, %lld KV bytes a position\n",
      shape.c_str(), static_cast<double>(memory.weights_bytes) / 1e9, seconds,
      static_cast<double>(memory.weights_bytes) / 1e9 / seconds,
      static_cast<double>(memory.workspace_bytes) / 1e9,
      static_cast<long long>(memory.kv_bytes_per_position));
  results["loads"].push_back({{"shape", shape},
                              {"products", products},
                              {"weights_bytes", memory.weights_bytes},
                              {"workspace_bytes", memory.workspace_bytes},
                              {"seconds", seconds}});
  const int64_t weight_bytes = BytesOf(dtype.value_or(DType::kBf16));
  const StepTypes types{.dense_bytes = options.fp8 ? 1 : weight_bytes,
                        .weight_bytes = weight_bytes,
                        .kv_bytes = BytesOf(backend.activation_dtype())};
  for (const Cell& cell : cells) {
    CINNABAR_ASSIGN_OR_RETURN(StepRunner runner, StepRunner::Make(*denoiser, cell), cell.name);
    const StepCost cost = CountStep(spec,
                                    {.sequences = cell.sequences,
                                     .rows = cell.rows,
                                     .cached = cell.cached,
                                     .answered = cell.rows},
                                    types);
    for (const std::string& graphs : options.graphs) {
      const Way way{.products = products, .graphs = graphs == "on"};
      backend.UseGraphs(way.graphs);
      CINNABAR_ASSIGN_OR_RETURN(const Timing timing, TimeSteps(runner, *denoiser, cell, options),
                                cell.name);
      ordered_json result =
          Report(shape, backend.Describe(), cell, options, way, cost, timing, ceilings);
      if (options.invariance) {
        CINNABAR_ASSIGN_OR_RETURN(const int64_t different, RowsThatDiffer(runner, cell), cell.name);
        result["rows_that_differ_alone"] = different;
        std::printf(
            "%11s alone and in the batch: %s\n", "",
            different == 0 ? "the same bits" : absl::StrCat(different, " ROWS DIFFER").c_str());
      }
      std::fflush(stdout);
      results["steps"].push_back(std::move(result));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunShapeBench(const ShapeBenchOptions& options) {
  std::vector<Cell> blocks, canvases;
  for (const std::string& text : options.cells) {
    CINNABAR_ASSIGN_OR_RETURN(Cell cell, ParseCell(text));
    (cell.block ? blocks : canvases).push_back(std::move(cell));
  }
  CINNABAR_ASSIGN_OR_RETURN(const DeviceName device, ParseDeviceName(options.device), "--device");
  CINNABAR_ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseType(options.dtype), "--dtype");
  CINNABAR_ASSIGN_OR_RETURN(const DType activation,
                            ParseActivation(options.activations, device.kind), "--activations");
  for (const std::string& graphs : options.graphs) {
    if (graphs != "on" && graphs != "off") {
      return absl::InvalidArgumentError(absl::StrCat("--graphs ", graphs, ": take on or off"));
    }
  }
  std::vector<std::unique_ptr<Backend>> backends;
  for (const std::string& name : options.products) {
    CINNABAR_ASSIGN_OR_RETURN(const Products products, ParseProducts(name, device.kind),
                              "--products");
    CINNABAR_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                              MakeBackend(device.kind, {.num_threads = options.num_threads,
                                                        .device = device.index,
                                                        .activation = activation,
                                                        .fp8 = options.fp8,
                                                        .products = products}));
    std::printf("%s; ", backend->Describe().c_str());
    backends.push_back(std::move(backend));
  }
  CINNABAR_ASSIGN_OR_RETURN(const Ceilings ceilings, ReadCeilings(options, device.kind));
  std::printf("made-up weights, seed 1");
  if (ceilings.bytes_per_second > 0) {
    std::printf("; shares are of %.1f GB/s and %.2f TFLOP/s, measured",
                ceilings.bytes_per_second / 1e9, ceilings.flops / 1e12);
  }
  std::printf("\n");
  ordered_json results = {
      {"device", backends[0]->Describe()},
      {"ceilings",
       {{"bytes_per_second", ceilings.bytes_per_second}, {"matrix_flops", ceilings.flops}}},
      {"loads", ordered_json::array()},
      {"steps", ordered_json::array()}};
  bool differ = false;
  for (const std::string& shape : options.shapes) {
    CINNABAR_ASSIGN_OR_RETURN(const nlohmann::json causal, ShapeConfig(shape, kCausalBlock));
    CINNABAR_ASSIGN_OR_RETURN(const nlohmann::json full, ShapeConfig(shape, 0));
    const auto begin = Clock::now();
    CINNABAR_ASSIGN_OR_RETURN(
        const std::unique_ptr<MemoryCheckpoint> checkpoint,
        MemoryCheckpoint::Make(causal, dtype.value_or(DType::kBf16), /*seed=*/1,
                               static_cast<int32_t>(std::thread::hardware_concurrency())));
    std::printf("%-11s %.2f GB of weights made up in %.1f s\n", shape.c_str(),
                static_cast<double>(checkpoint->bytes()) / 1e9, SecondsSince(begin));
    for (const auto& [config, cells] : {std::pair{&causal, &blocks}, {&full, &canvases}}) {
      if (cells->empty()) continue;
      CINNABAR_ASSIGN_OR_RETURN(const std::string folder, checkpoint->AddConfig(*config));
      ModelSpec spec = checkpoint->spec();
      // The architectures that have a cache anyway keep it.
      if (config == &full && spec.experts.num_experts == 0) spec.traits.causal_block_length = 0;
      for (size_t i = 0; i < backends.size(); ++i) {
        CINNABAR_RETURN_IF_ERROR(RunCells(shape, folder, spec, *cells, options, options.products[i],
                                          *backends[i], ceilings, results),
                                 shape);
      }
    }
  }
  for (const ordered_json& step : results["steps"]) {
    differ = differ || step.value("rows_that_differ_alone", 0) > 0;
  }
  if (!options.json_path.empty()) {
    std::ofstream out(options.json_path);
    out << results.dump(1) << "\n";
    out.close();
    if (!out) return absl::InternalError(absl::StrCat("cannot write ", options.json_path));
  }
  return differ ? absl::InternalError("answers depend on the batch") : absl::OkStatus();
}

}  // namespace cinnabar::bench
