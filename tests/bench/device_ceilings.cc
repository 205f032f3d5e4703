// What a device can do at most, measured: bytes a second copied and read, and the rate of large
// matrix products by dtype. Shares are quoted of these, from the same run.
//
//   device_ceilings [--device cpu|cuda[:N]] [--threads N] [--json FILE]
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "kernels/backend.h"
#include "kernels/device_name.h"
#include "nlohmann/json.hpp"
#include "tests/bench/cuda_ceilings.h"
#include "tests/bench/peak.h"

namespace cinnabar::bench {
namespace {

using nlohmann::ordered_json;

ordered_json CpuCeilings(int32_t threads) {
  return {{"device", absl::StrCat("cpu, ", threads, " threads")},
          {"bytes_per_second",
           {{"copy", MeasureCopyBytesPerSecond(threads)},
            {"read", MeasureReadBytesPerSecond(threads)}}},
          // The rate of fused multiply-adds, which no product can pass.
          {"matrix_flops", {{"float32", MeasurePeakFlops(threads)}}}};
}

absl::StatusOr<ordered_json> CudaCeilings(int32_t index) {
  CudaCeilingsResult result;
  const std::string error = MeasureCudaCeilings(index, result);
  if (!error.empty()) return absl::UnavailableError(error);
  ordered_json out = {
      {"device", result.device},
      {"bytes_per_second",
       {{"copy", result.copy_bytes_per_second}, {"read", result.read_bytes_per_second}}}};
  ordered_json& flops = out["matrix_flops"];
  flops = ordered_json::object();
  for (const auto& [dtype, rate] : {std::pair{"bfloat16", result.bf16_flops},
                                    {"float8", result.fp8_flops},
                                    {"float32", result.f32_flops},
                                    {"tf32", result.tf32_flops}}) {
    if (rate > 0) flops[dtype] = rate;
  }
  return out;
}

absl::Status Run(const std::string& device_name, int32_t threads, const std::string& path) {
  CINNABAR_ASSIGN_OR_RETURN(const DeviceName device, ParseDeviceName(device_name), "--device");
  if (threads == 0) threads = static_cast<int32_t>(std::thread::hardware_concurrency());
  ordered_json ceilings;
  if (device.kind == BackendKind::kCpu) {
    ceilings = CpuCeilings(threads);
  } else {
    CINNABAR_ASSIGN_OR_RETURN(ceilings, CudaCeilings(device.index));
  }
  const std::string text = ceilings.dump(1) + "\n";
  std::fputs(text.c_str(), stdout);
  if (path.empty()) return absl::OkStatus();
  std::ofstream out(path);
  out << text;
  out.close();
  return out ? absl::OkStatus() : absl::InternalError(absl::StrCat("cannot write ", path));
}

int Main(int argc, char** argv) {
  std::string device = "cpu", path;
  int32_t threads = 0;
  FlagSet set("device_ceilings [flags]", "What a device can do at most, measured.");
  set.Add("device", &device, "DEVICE", "cpu, cuda or cuda:N");
  set.Add("threads", &threads, "N", "of the CPU; 0 takes every core");
  set.Add("json", &path, "FILE", "where the figures go as well");
  absl::Status status = set.Parse(std::vector<std::string>(argv + 1, argv + argc));
  if (set.help_asked()) {
    std::fputs(set.Help().c_str(), stdout);
    return 0;
  }
  if (status.ok()) status = Run(device, threads, path);
  if (status.ok()) return 0;
  std::fprintf(stderr, "device_ceilings: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? 2 : 1;
}

}  // namespace
}  // namespace cinnabar::bench

int main(int argc, char** argv) { return cinnabar::bench::Main(argc, argv); }
