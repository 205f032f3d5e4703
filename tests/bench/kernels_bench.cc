// What share of the machine's float32 FMA rate each op of the CPU backend reaches.
//   kernels_bench [--filter=TEXT] [--rounds=N] [--isa=auto,avx2] [--threads=1,2]
// Every sample stands beside a sample of the peak taken in the same moment: two threads' worth of
// other work on the machine slows both. Rates are per second of processor time (of all threads,
// divided by their number; idle threads of the pool spin first, so waiting mostly counts), which
// other programs disturb least; "wall" is the best wall-clock rate. Prints the median share with
// its quartiles. Inputs are random with a fixed seed.
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/backend.h"

namespace cinnabar {
namespace {

double ProcessSeconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}
double WallSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// --- Peak
// ------------------------------------------------------------------------------------------

// Twelve independent chains of fused multiply-adds, in assembly so that they stay in registers.
#if defined(__x86_64__)
#define FMA_(reg, n) "vfmadd231ps %%" reg "14, %%" reg "15, %%" reg #n "\n\t"
#define TWELVE(reg)                                                                          \
  FMA_(reg, 0)                                                                               \
  FMA_(reg, 1)                                                                               \
  FMA_(reg, 2) FMA_(reg, 3) FMA_(reg, 4) FMA_(reg, 5) FMA_(reg, 6) FMA_(reg, 7) FMA_(reg, 8) \
      FMA_(reg, 9) FMA_(reg, 10) FMA_(reg, 11)
#define CLOBBERS                                                                           \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm14", "xmm15"
double PeakFlops(int64_t rounds) {
  static const bool wide = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") != 0;
  }();
  asm volatile("vxorps %%xmm14, %%xmm14, %%xmm14\n\tvxorps %%xmm15, %%xmm15, %%xmm15" ::: CLOBBERS);
  if (wide) {
    for (int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE("zmm")::: CLOBBERS);
    return 12.0 * 16 * 2 * static_cast<double>(rounds);
  }
  for (int64_t i = 0; i < rounds; ++i) asm volatile(TWELVE("ymm")::: CLOBBERS);
  return 12.0 * 8 * 2 * static_cast<double>(rounds);
}
#else
double PeakFlops(int64_t rounds) {
  float sum[16] = {};
  for (int64_t i = 0; i < rounds; ++i) {
    for (float& s : sum) s = __builtin_fmaf(s, 0.999F, 0.001F);
  }
  volatile float sink = sum[0];
  (void)sink;
  return 16.0 * 2 * static_cast<double>(rounds);
}
#endif

// Flops per second of processor time and thread, `num_threads` at once.
double PeakRate(int32_t num_threads) {
  const auto work = [] { PeakFlops(400'000); };  // about 1.5 ms
  const double begin = ProcessSeconds();
  std::vector<std::thread> others;
  for (int32_t thread = 1; thread < num_threads; ++thread) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  const double seconds = ProcessSeconds() - begin;
  static const double flops_each = PeakFlops(400'000);
  return flops_each * num_threads / seconds;
}

// --- Cases
// -----------------------------------------------------------------------------------------

struct Case {
  std::string name;
  double flops = 0;  // 0: bytes count
  double bytes = 0;
  std::function<absl::Status()> run;
};

struct Bench {
  std::unique_ptr<Backend> backend;
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<std::unique_ptr<KvMemory>> kvs;
  std::vector<std::unique_ptr<std::vector<SequenceSpan>>> spans;
  std::vector<Case> cases;
  std::string filter;

  bool Wanted(const std::string& name) const { return name.find(filter) != std::string::npos; }

  float* Random(int64_t count) {
    std::vector<float> values(count);
    std::mt19937 random(7);
    std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
    for (float& value : values) value = uniform(random);
    buffers.push_back(*backend->Allocate(count * 4));
    (void)backend->Upload(values, buffers.back()->data());
    return static_cast<float*>(buffers.back()->data());
  }

  void AddLinear(const char* what, int64_t rows, int64_t dim, int64_t outputs, DType dtype,
                 Epilogue epilogue) {
    const bool paired = epilogue == Epilogue::kSwiGlu;
    const std::string name =
        absl::StrCat("linear ", what, " ", rows, "x", dim, "x", outputs, " ", NameOf(dtype));
    if (!Wanted(name)) return;
    const float* w = Random(outputs * dim);
    const int64_t half = outputs / 2;
    std::vector<HostMatrix> parts = {{w, DType::kF32, outputs, dim}};
    if (paired) parts = {{w, DType::kF32, half, dim}, {w + half * dim, DType::kF32, half, dim}};
    weights.push_back(
        *backend->LoadWeight(parts, paired ? RowOrder::kGatedPairs : RowOrder::kStacked, dtype));
    buffers.pop_back();
    float* x = Random(rows * dim);
    float* out = Random(rows * outputs);
    LinearArgs args;
    args.x = {x, dim};
    args.num_rows = rows;
    args.weight = weights.back().get();
    args.epilogue = epilogue;
    args.out = {out, paired ? half : outputs};
    cases.push_back({name, 2.0 * rows * dim * outputs,
                     rows < 64 ? static_cast<double>(weights.back()->memory_bytes()) : 0.0,
                     [this, args] { return backend->Linear(args); }});
  }

  void AddAttention(int32_t positions, int32_t heads, int32_t kv_heads, int32_t head_dim) {
    const std::string name =
        absl::StrCat("attend T", positions, " heads ", heads, "/", kv_heads, " hd ", head_dim);
    const std::string prepare = absl::StrCat("prepare heads T", positions, " heads ", heads, "/",
                                             kv_heads, " hd ", head_dim);
    const int64_t width = int64_t{heads + 2 * kv_heads} * head_dim;
    float* qkv = Random(positions * width);
    float* out = Random(int64_t{positions} * heads * head_dim);
    float* table = Random(int64_t{positions} * head_dim / 2);
    float* norm = Random(head_dim);
    kvs.push_back(*backend->AllocateKv({1, kv_heads, head_dim, positions}));
    spans.push_back(std::make_unique<std::vector<SequenceSpan>>());
    spans.back()->push_back({.row_begin = 0, .num_rows = positions, .kv = kvs.back().get()});
    PrepareHeadsArgs heads_args;
    heads_args.qkv = {qkv, width};
    heads_args.num_rows = positions;
    heads_args.heads = {heads, kv_heads, head_dim};
    heads_args.q_norm = norm;
    heads_args.k_norm = norm;
    heads_args.rotary = {table, table, head_dim, positions};
    heads_args.sequences = *spans.back();
    (void)backend->PrepareHeads(heads_args);
    AttendArgs args;
    args.q = heads_args.qkv;
    args.num_rows = positions;
    args.heads = heads_args.heads;
    args.scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    args.sequences = *spans.back();
    args.out = {out, int64_t{heads} * head_dim};
    if (Wanted(name)) {
      cases.push_back({name, 4.0 * positions * positions * heads * head_dim, 0,
                       [this, args] { return backend->Attend(args); }});
    }
    if (Wanted(prepare)) {
      cases.push_back({prepare, 0, 4.0 * (2.0 * width) * positions,
                       [this, heads_args] { return backend->PrepareHeads(heads_args); }});
    }
  }

  void AddRowOps(int64_t rows, int64_t dim) {
    float* x = Random(rows * dim);
    float* out = Random(rows * dim);
    float* w = Random(3 * dim);
    const std::string suffix = absl::StrCat(" ", rows, "x", dim);
    if (Wanted("rms norm" + suffix)) {
      RmsNormArgs args;
      args.x = {x, dim};
      args.num_rows = rows;
      args.dim = dim;
      args.weight = w;
      args.out = {out, dim};
      cases.push_back({"rms norm" + suffix, 0, 8.0 * rows * dim,
                       [this, args] { return backend->RmsNorm(args); }});
    }
    if (Wanted("layer norm" + suffix)) {
      spans.push_back(std::make_unique<std::vector<SequenceSpan>>());
      spans.back()->push_back({.row_begin = 0, .num_rows = static_cast<int32_t>(rows)});
      LayerNormModulateArgs args;
      args.x = {x, dim};
      args.num_rows = rows;
      args.dim = dim;
      args.weight = w;
      args.shift = {w + dim, dim};
      args.scale = {w + 2 * dim, dim};
      args.sequences = *spans.back();
      args.out = {out, dim};
      cases.push_back({"layer norm" + suffix, 0, 8.0 * rows * dim,
                       [this, args] { return backend->LayerNormModulate(args); }});
    }
  }

  void AddAll() {
    for (const int64_t rows : {128, 256, 512}) {
      for (const DType dtype : {DType::kF32, DType::kBf16, DType::kQ8_0, DType::kQ4_K}) {
        AddLinear("S qkv", rows, 768, 2304, dtype, Epilogue::kStore);
        AddLinear("S out", rows, 768, 768, dtype, Epilogue::kAdd);
        AddLinear("S gate-up", rows, 768, 4096, dtype, Epilogue::kSwiGlu);
        AddLinear("S down", rows, 2048, 768, dtype, Epilogue::kAdd);
        AddLinear("S up-gelu", rows, 768, 3072, dtype, Epilogue::kGeluTanh);
        AddLinear("S logits", rows, 768, 32000, dtype, Epilogue::kStore);
        AddLinear("M qkv", rows, 1024, 3072, dtype, Epilogue::kStore);
        AddLinear("M out", rows, 1024, 1024, dtype, Epilogue::kAdd);
        AddLinear("M gate-up", rows, 1024, 5632, dtype, Epilogue::kSwiGlu);
        AddLinear("M down", rows, 2816, 1024, dtype, Epilogue::kAdd);
        AddLinear("M down4k", rows, 4096, 1024, dtype, Epilogue::kAdd);
      }
    }
    for (const int64_t rows : {1, 4, 16, 32}) {
      for (const DType dtype : {DType::kF32, DType::kBf16, DType::kQ8_0, DType::kQ4_K}) {
        AddLinear("M gate-up", rows, 1024, 5632, dtype, Epilogue::kSwiGlu);
        AddLinear("M down", rows, 2816, 1024, dtype, Epilogue::kAdd);
      }
    }
    for (const int32_t positions : {128, 256, 512}) {
      AddAttention(positions, 12, 12, 64);
      AddAttention(positions, 8, 2, 128);
    }
    AddRowOps(256, 768);
    AddRowOps(256, 1024);
  }
};

struct Samples {
  std::vector<double> shares;
  double best_wall_rate = 0;
};

double Quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1) + 0.5)];
}

int Main(int argc, char** argv) {
  std::string filter;
  int rounds = 15;
  std::vector<std::string> isas = {"auto", "avx2"};
  std::vector<std::string> thread_counts = {"1", "2"};
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto value = [&](const char* flag) {
      const size_t size = std::strlen(flag);
      return arg.compare(0, size, flag) == 0 ? arg.substr(size) : std::string();
    };
    if (arg.rfind("--filter=", 0) == 0)
      filter = value("--filter=");
    else if (arg.rfind("--rounds=", 0) == 0)
      rounds = std::atoi(value("--rounds=").c_str());
    else if (arg.rfind("--isa=", 0) == 0)
      isas = absl::StrSplit(value("--isa="), ',');
    else if (arg.rfind("--threads=", 0) == 0)
      thread_counts = absl::StrSplit(value("--threads="), ',');
    else
      return std::fprintf(stderr, "unknown argument %s\n", argv[i]), 2;
  }
  for (const std::string& threads : thread_counts) {
    const int32_t num_threads = std::atoi(threads.c_str());
    std::vector<std::unique_ptr<Bench>> benches;
    for (const std::string& isa : isas) {
      auto bench = std::make_unique<Bench>();
      auto backend = MakeBackend(BackendKind::kCpu, {.num_threads = num_threads, .isa = isa});
      if (!backend.ok()) {
        std::fprintf(stderr, "%s: %s\n", isa.c_str(), backend.status().ToString().c_str());
        continue;
      }
      bench->backend = *std::move(backend);
      bench->filter = filter;
      const absl::Status reserved = bench->backend->Reserve(
          {.rows_max = 512, .cols_max = 4096, .positions_max = 512, .head_dim_max = 128});
      if (!reserved.ok()) return 1;
      bench->AddAll();
      benches.push_back(std::move(bench));
    }
    if (benches.empty()) return 1;
    std::vector<std::vector<Samples>> samples(benches.size());
    for (size_t b = 0; b < benches.size(); ++b) samples[b].resize(benches[b]->cases.size());
    std::vector<double> peaks;
    for (size_t c = 0; c < benches[0]->cases.size(); ++c) {
      for (int round = 0; round < rounds; ++round) {
        for (size_t b = 0; b < benches.size(); ++b) {
          const Case& test = benches[b]->cases[c];
          if (round == 0 && !test.run().ok()) return 1;
          const double work = test.flops > 0 ? test.flops : test.bytes;
          // About 6 ms of work a sample.
          const int repeats = std::max(
              1, static_cast<int>(0.006 * 8e10 * num_threads / (test.flops > 0 ? work : 8 * work)));
          const double before = PeakRate(num_threads);
          const double cpu_begin = ProcessSeconds();
          const double wall_begin = WallSeconds();
          for (int i = 0; i < repeats; ++i) {
            if (!test.run().ok()) return 1;
          }
          const double wall = (WallSeconds() - wall_begin) / repeats;
          const double cpu = (ProcessSeconds() - cpu_begin) / repeats;
          const double peak = 0.5 * (before + PeakRate(num_threads));
          peaks.push_back(peak);
          Samples& mine = samples[b][c];
          mine.shares.push_back(work / cpu / (test.flops > 0 ? peak : 1e9 / num_threads));
          mine.best_wall_rate = std::max(mine.best_wall_rate, work / wall);
        }
      }
      for (size_t b = 0; b < benches.size(); ++b) {
        const Case& test = benches[b]->cases[c];
        const Samples& mine = samples[b][c];
        const double unit = test.flops > 0 ? 100.0 : 1.0;
        std::printf("%-44s %-22s %6.1f %s [%.1f, %.1f]  wall best %.1f %s", test.name.c_str(),
                    benches[b]->backend->Describe().c_str(), unit * Quantile(mine.shares, 0.5),
                    test.flops > 0 ? "% of peak" : "GB/s", unit * Quantile(mine.shares, 0.25),
                    unit * Quantile(mine.shares, 0.75), mine.best_wall_rate * 1e-9,
                    test.flops > 0 ? "GFLOP/s" : "GB/s");
        if (test.flops > 0 && test.bytes > 0) {
          std::printf(" = %.1f GB/s of weight",
                      mine.best_wall_rate / test.flops * test.bytes * 1e-9);
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    }
    std::printf("peak, %d thread%s: median %.1f GFLOP/s a thread\n", num_threads,
                num_threads == 1 ? "" : "s", Quantile(peaks, 0.5) * 1e-9);
  }
  return 0;
}

}  // namespace
}  // namespace cinnabar

int main(int argc, char** argv) { return cinnabar::Main(argc, argv); }
