// Denoising steps of published models' shapes on one device: how long, and what share of what the
// device can do.
#ifndef CINNABAR_TESTS_BENCH_SHAPE_BENCH_H_
#define CINNABAR_TESTS_BENCH_SHAPE_BENCH_H_

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace cinnabar::bench {

struct ShapeBenchOptions {
  std::vector<std::string> shapes;  // of memory_checkpoint.h
  std::string device = "cpu";
  std::string dtype = "bfloat16";                // of the weights: float32 or bfloat16
  std::string activations = "auto";              // auto, float32, bfloat16
  bool fp8 = false;                              // BackendOptions::fp8
  std::vector<std::string> products = {"auto"};  // BackendOptions::products: auto, mma, wgmma
  std::vector<std::string> graphs = {"on"};      // on, off: Backend::UseGraphs()
  // "block:SxB@C" is S sequences, each a block of B against C cached positions (a block-causal
  // model); "canvas:SxL" is S whole sequences of L.
  std::vector<std::string> cells = {"block:1x32@512", "block:64x32@1024", "canvas:8x1024"};
  int32_t num_threads = 0;
  int32_t steps_max = 30;     // timed, behind three that are not
  double seconds_max = 3;     // of a cell; at least three steps are timed
  std::string ceilings_path;  // what device_ceilings wrote; empty: on a CPU they are measured here
  std::string json_path;      // empty: none
  bool invariance = false;    // also: the answers of a sequence alone and in the batch, bit for bit
};

// InvalidArgument for an option; otherwise what the device says. Internal when answers differ.
absl::Status RunShapeBench(const ShapeBenchOptions& options);

}  // namespace cinnabar::bench

#endif  // CINNABAR_TESTS_BENCH_SHAPE_BENCH_H_
