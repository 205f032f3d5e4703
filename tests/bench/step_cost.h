// What one denoising step must compute and read, counted from a model's shape. Pure.
#ifndef CINNABAR_TESTS_BENCH_STEP_COST_H_
#define CINNABAR_TESTS_BENCH_STEP_COST_H_

#include <cstdint>

#include "worker/model/model_spec.h"

namespace cinnabar::bench {

// A forward pass of `sequences` alike: `rows` positions behind `cached` ones, of which `answered`
// go through the vocabulary head. Cached positions are of whole blocks.
struct StepShape {
  int64_t sequences = 1;
  int64_t rows = 1;
  int64_t cached = 0;
  int64_t answered = 1;
};

// Bytes of one element in the device's memory.
struct StepTypes {
  int64_t dense_bytes = 2;   // q, k, v, o and MLPs, the shared expert's among them
  int64_t weight_bytes = 2;  // embedding, routers, experts, vocabulary head
  int64_t kv_bytes = 2;
};

struct StepCost {
  // Two for each multiply-add of the matrix products and of attention; nothing for norms, rotation,
  // softmax and routing.
  double flops = 0;
  // Elements of all weights that the step reads, once each: those of experts by expectation, if a
  // row's experts were drawn evenly.
  double weight_elements = 0;
  double dense_elements = 0;    // those of them that StepTypes::dense_bytes is of
  double weight_bytes = 0;      // those, and rows of the embedding
  double kv_read_bytes = 0;     // of cached positions, once for each sequence and layer
  double kv_written_bytes = 0;  // of the rows

  // A floor: activations and logits need not leave the chip.
  double bytes() const { return weight_bytes + kv_read_bytes + kv_written_bytes; }
};

// (row, position it sees), summed over the rows [first, first + rows) of one sequence.
// `block_length` 0: all of them see all; else those up to the end of their block, and no further
// than the rows.
int64_t AttendedPairs(int64_t first, int64_t rows, int64_t block_length);

// kDecoder bodies only (CINNABAR_CHECK).
StepCost CountStep(const ModelSpec& spec, const StepShape& shape, const StepTypes& types);

}  // namespace cinnabar::bench

#endif  // CINNABAR_TESTS_BENCH_STEP_COST_H_
