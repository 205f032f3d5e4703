#include "tests/bench/step_cost.h"

#include <algorithm>
#include <cmath>

#include "common/base/check.h"

namespace cinnabar::bench {
namespace {

// Distinct experts among `rows` draws of `per_row` each: a given one is missed by all of them with
// (1 - per_row / num_experts)^rows.
double ExpectedExperts(double num_experts, double per_row, double rows) {
  return num_experts * (1 - std::pow(1 - per_row / num_experts, rows));
}

}  // namespace

int64_t AttendedPairs(int64_t first, int64_t rows, int64_t block_length) {
  const int64_t end = first + rows;
  if (block_length == 0) return rows * end;
  int64_t pairs = 0;
  for (int64_t position = first; position < end;) {
    const int64_t block_end = std::min((position / block_length + 1) * block_length, end);
    pairs += (block_end - position) * block_end;
    position = block_end;
  }
  return pairs;
}

StepCost CountStep(const ModelSpec& spec, const StepShape& shape, const StepTypes& types) {
  CINNABAR_CHECK(spec.body == BodyKind::kDecoder);
  CINNABAR_CHECK(shape.answered >= 1 && shape.answered <= shape.rows);
  const double dim = spec.dim;
  const double q_dim = static_cast<double>(spec.num_heads) * spec.head_dim;
  const double kv_dim = static_cast<double>(spec.num_kv_heads) * spec.head_dim;
  const double all_rows = static_cast<double>(shape.sequences * shape.rows);
  const double answered = static_cast<double>(shape.sequences * shape.answered);
  const double pairs =
      static_cast<double>(shape.sequences) *
      static_cast<double>(AttendedPairs(shape.cached, shape.rows, spec.traits.causal_block_length));
  const ExpertSpec& experts = spec.experts;

  StepCost cost;
  const auto product = [&](double rows, double elements) {
    cost.flops += 2 * rows * elements;
    cost.weight_elements += elements;
  };
  const auto dense_product = [&](double rows, double elements) {
    product(rows, elements);
    cost.dense_elements += elements;
  };
  for (int32_t layer = 0; layer < spec.num_layers; ++layer) {
    // Behind its attention, the last layer goes on with the answered rows alone.
    const double rows = layer + 1 == spec.num_layers ? answered : all_rows;
    dense_product(all_rows, dim * (q_dim + 2 * kv_dim));
    cost.flops += 4 * pairs * q_dim;
    dense_product(rows, dim * q_dim);
    if (!HasExperts(spec, layer)) {
      dense_product(rows, 3 * dim * spec.mlp_dim);
      continue;
    }
    product(rows, dim * experts.num_experts);
    const double expert = 3 * dim * experts.mlp_dim;
    cost.flops += 2 * rows * experts.experts_per_token * expert;
    cost.weight_elements +=
        ExpectedExperts(experts.num_experts, experts.experts_per_token, rows) * expert;
    dense_product(rows, 3 * dim * experts.shared_mlp_dim);
  }
  product(answered, dim * spec.traits.vocab_size);
  cost.weight_bytes = cost.dense_elements * static_cast<double>(types.dense_bytes) +
                      (cost.weight_elements - cost.dense_elements + all_rows * dim) *
                          static_cast<double>(types.weight_bytes);
  const double position_bytes = 2 * kv_dim * spec.num_layers * static_cast<double>(types.kv_bytes);
  cost.kv_read_bytes = static_cast<double>(shape.sequences * shape.cached) * position_bytes;
  cost.kv_written_bytes = all_rows * position_bytes;
  return cost;
}

}  // namespace cinnabar::bench
