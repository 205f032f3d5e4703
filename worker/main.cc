// cinnabar-worker: one device, one model, one place in the cluster.
#include <openssl/rand.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/base/check.h"
#include "common/base/host_memory.h"
#include "common/base/log.h"
#include "common/base/status.h"
#include "common/base/version.h"
#include "common/config/flags.h"
#include "common/metrics/metrics_server.h"
#include "common/program/program.h"
#include "kernels/backend.h"
#include "kernels/device_name.h"
#include "worker/engine/warm_up.h"
#include "worker/model/fingerprint.h"
#include "worker/model/inspect.h"
#include "worker/model/load_estimate.h"
#include "worker/service/device_monitor.h"
#include "worker/service/memory_plan.h"
#include "worker/service/null_denoiser.h"
#include "worker/service/nvml_sampler.h"
#include "worker/service/worker_loop.h"

namespace cinnabar {
namespace {

struct Flags {
  ProgramFlags program;
  std::string model;
  std::string model_name;
  std::string device = "cpu";
  std::string dtype = "auto";
  std::string activations = "auto";
  bool fp8 = false;
  std::string products = "auto";
  std::string nvml = kNvmlLibrary;
  std::string isa = "auto";
  int32_t threads = 0;
  int32_t rows_max = 16;
  int32_t tokens_max = 4096;
  int32_t positions_max = 2048;
  int32_t kv_mib = 0;
  bool no_prefix_reuse = false;
  int32_t snapshot_every = 8;
  float lease_seconds = 10;
  float drain_seconds = 10;
  float hang_seconds = 30;
  float dollars_per_hour = 0;
  int32_t null_step_us = 1000;
  int32_t null_faults = -1;
  int32_t null_passes = -1;

  void Register(FlagSet& flags) {
    program.Register(flags);
    flags.Section("Model");
    flags.Add("model", &model, "DIR|FILE.gguf",
              "a Hugging Face folder (config.json, *.safetensors) or a GGUF file");
    flags.Add("model-name", &model_name, "NAME", "what requests call it [the folder's name]");
    flags.Add("device", &device, "DEVICE",
              "cpu, cuda, cuda:N; or null, which computes nothing and makes tokens up: for load "
              "tests only");
    flags.Add("null-step-us", &null_step_us, "US", "with --device null: time of a step");
    flags.Add("null-faults", &null_faults, "ID",
              "with --device null: prompts that begin with token ID abort the worker, ID+1 hang a "
              "step for 10 s, ID+2 fail it, ID+3 give no finite numbers");
    flags.Add("null-passes", &null_passes, "N",
              "with --device null: after N forward passes the device is gone");
    flags.Add("dtype", &dtype, "TYPE",
              "of the weights in memory: auto, float32, bfloat16, q8_0, q4_k");
    flags.Add("activations", &activations, "TYPE",
              "of what flows between the weights: auto, float32, bfloat16 (cuda)");
    flags.Add(
        "fp8", &fp8,
        "keep large matrices that are not in 8 or 4 bits in FP8 and compute in it (cuda, Ada and "
        "newer)");
    flags.Add("products", &products, "NAME",
              "what matrix products are made of: auto, mma or wgmma (H100, H200); bits differ");
    flags.Add("isa", &isa, "ISA",
              "auto, avx512vnni, avx512, avx2vnni, avx2 or generic: the same bits");
    flags.Add("threads", &threads, "N", "0 takes every core");
    flags.Section("Room");
    flags.Add("rows-max", &rows_max, "N", "sequences at once");
    flags.Add("tokens-max", &tokens_max, "N", "positions of a step, over all sequences");
    flags.Add("positions-max", &positions_max, "N", "longest sequence");
    flags.Add(
        "kv-mib", &kv_mib, "MIB",
        "memory for keys and values; 0 takes what the sequences can need, as far as there is room");
    flags.Add("no-prefix-reuse", &no_prefix_reuse,
              "compute a prompt that begins as another did all the same: how soon an answer comes "
              "then tells nothing of what others asked");
    flags.Section("Reliability");
    flags.Add("snapshot-every", &snapshot_every, "STEPS", "how often the canvas is stored");
    flags.Add("lease-seconds", &lease_seconds, "S",
              "after a worker dies its requests go on elsewhere within this and a second");
    flags.Add("drain-seconds", &drain_seconds, "S",
              "on SIGTERM, requests that end within this are finished, others handed back");
    flags.Add("hang-seconds", &hang_seconds, "S",
              "a step that takes longer is a hung device: its leases run out");
    flags.Section("Cost");
    flags.Add("nvml", &nvml, "FILE", "library that tells a GPU's power and energy; may be absent");
    flags.Add("dollars-per-hour", &dollars_per_hour, "D", "price of this device, for the metrics");
    flags.Examples(
        "examples:\n"
        "  cinnabar-worker --redis 127.0.0.1:6379 --model models/cinnabar-tiny\n"
        "  cinnabar-worker --redis 127.0.0.1:6379 --model DIR --model-name coder --threads 8 "
        "--rows-max 32\n");
  }
};

std::string NewBoot(const std::string& name) {
  unsigned char bits[8];
  CINNABAR_CHECK(RAND_bytes(bits, sizeof(bits)) == 1) << "no random bits";
  const std::string tail =
      absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(bits), sizeof(bits)));
  return absl::StrCat(name.substr(0, 40), "-", tail);
}

absl::StatusOr<std::optional<DType>> ParseWeightType(const std::string& name) {
  if (name == "auto") return std::optional<DType>();
  if (name == "float32" || name == "f32") return std::optional<DType>(DType::kF32);
  if (name == "bfloat16" || name == "bf16") return std::optional<DType>(DType::kBf16);
  if (name == "q8_0") return std::optional<DType>(DType::kQ8_0);
  if (name == "q4_k") return std::optional<DType>(DType::kQ4_K);
  return absl::InvalidArgumentError(
      absl::StrCat("--dtype ", name, ": take auto, float32, bfloat16, q8_0 or q4_k"));
}

NullFaults NullFaultsFrom(int32_t first, int32_t passes) {
  NullFaults faults{.passes = passes, .hang_for = absl::Seconds(10)};
  if (first < 0) return faults;
  faults.abort = first;
  faults.hang = first + 1;
  faults.fail = first + 2;
  faults.not_finite = first + 3;
  return faults;
}

DeviceRoom RoomOf(const Backend& backend, BackendKind kind) {
  if (kind == BackendKind::kCpu) {
    const HostMemory memory = ReadHostMemory();
    return {.total_bytes = memory.total_bytes, .free_bytes = memory.free_bytes};
  }
  const DeviceStats stats = backend.Stats();
  return {.total_bytes = stats.memory_total_bytes, .free_bytes = stats.memory_free_bytes};
}

// Absent is fine: a CPU has none, and a container may hide the driver's library.
std::unique_ptr<NvmlSampler> OpenNvml(const std::string& library, const Backend& backend) {
  const std::string address = backend.Stats().pci_address;
  if (address.empty() || library.empty()) return nullptr;
  absl::StatusOr<std::unique_ptr<NvmlSampler>> sampler = NvmlSampler::Open(library, address);
  if (sampler.ok()) return *std::move(sampler);
  Log(LogLevel::kWarn, "no_device_power", {{"error", sampler.status().ToString()}});
  return nullptr;
}

absl::Status Serve(Flags flags) {
  if (flags.model.empty()) {
    return absl::InvalidArgumentError(
        "--model is missing: name a folder with config.json and *.safetensors, or a GGUF file");
  }
  const bool null_device = flags.device == "null";
  DeviceName device;
  if (!null_device) {
    CINNABAR_ASSIGN_OR_RETURN(device, ParseDeviceName(flags.device), "--device");
  }
  while (flags.model.size() > 1 && flags.model.back() == '/') flags.model.pop_back();
  if (flags.model_name.empty()) flags.model_name = flags.model.substr(flags.model.rfind('/') + 1);
  if (flags.program.name.empty()) {
    flags.program.name =
        absl::StrCat(HostName(), "-", absl::StrReplaceAll(flags.device, {{":", ""}}));
  }
  CINNABAR_RETURN_IF_ERROR(flags.program.Start("worker"));
  WorkerOptions options;
  CINNABAR_ASSIGN_OR_RETURN(options.redis, flags.program.Redis("worker"));
  CINNABAR_ASSIGN_OR_RETURN(const std::optional<DType> dtype, ParseWeightType(flags.dtype));
  CINNABAR_ASSIGN_OR_RETURN(const DType activation, ParseActivation(flags.activations, device.kind),
                            "--activations");
  CINNABAR_ASSIGN_OR_RETURN(const Products products, ParseProducts(flags.products, device.kind),
                            "--products");
  if (flags.fp8 && device.kind == BackendKind::kCpu) {
    return absl::InvalidArgumentError("--fp8 goes with --device cuda");
  }
  CINNABAR_ASSIGN_OR_RETURN(const ModelReport report, InspectModel(flags.model));
  if (!report.problems.empty() || !report.spec.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(
        flags.model, ": ", report.problems.empty() ? "not supported" : report.problems[0]));
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend,
                            MakeBackend(device.kind, {.num_threads = flags.threads,
                                                      .isa = flags.isa,
                                                      .device = device.index,
                                                      .activation = activation,
                                                      .fp8 = flags.fp8,
                                                      .products = products}));
  options.engine.limits = {
      .rows_max = flags.tokens_max,
      .sequences_max = flags.rows_max,
      .positions_max = std::min(flags.positions_max, report.spec->traits.positions_max)};
  options.engine.limits.rows_max =
      std::max(options.engine.limits.rows_max, options.engine.limits.positions_max);
  options.engine.kv_bytes_max = int64_t{flags.kv_mib} << 20;
  options.engine.prefix_reuse = !flags.no_prefix_reuse;
  // A CPU computes on the thread that waits for it: there is nothing to gain.
  options.engine.look_ahead = device.kind == BackendKind::kCuda;
  const LoadOptions load{.weight_dtype = dtype};
  if (null_device) {
    if (options.engine.kv_bytes_max == 0) options.engine.kv_bytes_max = int64_t{2} << 30;
  } else {
    CINNABAR_ASSIGN_OR_RETURN(
        const Denoiser::Memory needs,
        EstimateLoad(flags.model, *backend,
                     {.in_place = device.kind == BackendKind::kCpu, .fp8 = flags.fp8}, load,
                     options.engine.limits));
    CINNABAR_ASSIGN_OR_RETURN(const RoomPlan plan,
                              PlanRoom(flags.model, NameOf(device), needs,
                                       {.sequences_max = options.engine.limits.sequences_max,
                                        .positions_max = options.engine.limits.positions_max,
                                        .kv_bytes_max = options.engine.kv_bytes_max},
                                       RoomOf(*backend, device.kind)));
    options.engine.limits.sequences_max = plan.sequences_max;
    options.engine.kv_bytes_max = plan.kv_bytes_max;
  }

  const absl::Time begin = absl::Now();
  std::unique_ptr<Denoiser> denoiser;
  if (null_device) {
    Log(LogLevel::kWarn, "null_device",
        {{"note", "this worker computes nothing: its tokens are made up"}});
    denoiser = MakeNullDenoiser(report.spec->traits, absl::Microseconds(flags.null_step_us),
                                *backend, NullFaultsFrom(flags.null_faults, flags.null_passes));
  } else {
    CINNABAR_ASSIGN_OR_RETURN(
        denoiser, LoadDenoiser(flags.model, *backend, load, options.engine.limits), flags.model);
  }
  const absl::Duration load_time = absl::Now() - begin;
  // A CPU has nothing to load and nothing to record.
  if (!null_device && device.kind == BackendKind::kCuda) {
    const absl::Time warm_up_begin = absl::Now();
    CINNABAR_ASSIGN_OR_RETURN(const int32_t steps, WarmUp(*denoiser, options.engine), "warm-up");
    Log(LogLevel::kInfo, "warmed_up", {{"steps", steps}, {"ms", absl::Now() - warm_up_begin}});
  }
  CINNABAR_ASSIGN_OR_RETURN(
      options.fingerprint,
      ModelFingerprint(flags.model,
                       // Bytes depend on how the backend computes and on the weights' type, not on
                       // which device of its kind.
                       absl::StrCat(null_device ? "null" : backend->Numerics(), "/", flags.dtype)));
  options.queue = flags.program.Queue();
  options.name = flags.program.name;
  options.boot = NewBoot(options.name);
  options.model = flags.model_name;
  options.device = null_device ? "null" : backend->Describe();
  options.dtype = flags.dtype;
  options.snapshot_every = flags.snapshot_every;
  options.lease_for = absl::Seconds(flags.lease_seconds);
  options.drain_for = absl::Seconds(flags.drain_seconds);
  options.hang_after = absl::Seconds(flags.hang_seconds);
  options.dollars_per_hour = flags.dollars_per_hour;

  Metrics metrics;
  WorkerMetrics worker_metrics(metrics, options.model, options.dollars_per_hour);
  const DeviceMonitor monitor(*backend, OpenNvml(flags.nvml, *backend), worker_metrics);
  std::unique_ptr<WorkerLoop> loop;
  std::atomic<WorkerLoop*> running = nullptr;
  CINNABAR_ASSIGN_OR_RETURN(
      const std::unique_ptr<HttpServer> server,
      StartMetricsServer(flags.program.metrics_listen, metrics, [&running]() -> std::string {
        WorkerLoop* const worker = running;
        return worker == nullptr ? "starting" : worker->Missing();
      }));
  options.metrics_address = flags.program.MetricsAddress(server->port());
  Log(LogLevel::kInfo, "worker_starts",
      {{"version", kVersion},
       {"name", options.name},
       {"boot", options.boot},
       {"model", options.model},
       {"device", options.device},
       {"load_ms", load_time},
       {"load_gb_s", static_cast<double>(denoiser->memory().weights_bytes) / 1e9 /
                         std::max(absl::ToDoubleSeconds(load_time), 1e-9)},
       {"weights_mib", denoiser->memory().weights_bytes >> 20},
       {"workspace_mib", denoiser->memory().workspace_bytes >> 20},
       {"kv_mib", options.engine.kv_bytes_max >> 20},
       {"rows_max", options.engine.limits.sequences_max},
       {"tokens_max", options.engine.limits.rows_max},
       {"metrics", options.metrics_address}});
  loop = std::make_unique<WorkerLoop>(options, *denoiser, worker_metrics);
  running = loop.get();
  const SignalThread signals([&loop] { loop->Drain(); });
  NotifyReady();
  const absl::Status status = loop->Run();
  running = nullptr;
  Log(LogLevel::kInfo, "worker_stops", {{"status", status.ToString()}});
  return status;
}

}  // namespace
}  // namespace cinnabar

int main(int argc, char** argv) {
  cinnabar::Flags flags;
  cinnabar::FlagSet set("cinnabar-worker --redis HOST:PORT --model DIR [flags]",
                        "Denoises the requests that the scheduler sends it. It takes them from "
                        "Redis, publishes every step\nand can be killed at any time: others go on "
                        "where it was.");
  flags.Register(set);
  return cinnabar::RunProgram(set, argc, argv, [&] { return cinnabar::Serve(flags); });
}
