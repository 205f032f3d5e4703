// Mixtures of experts: routing, grouping, grouped products, the weighted sum.
#include "kernels/cuda/block_product.cuh"
#include "kernels/cuda/hopper_product.cuh"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {
namespace {

constexpr int kRouteThreads = 128;

// One of the choices that are left; id -1: none.
struct Choice {
  float value;
  int id;
};
CINNABAR_DEVICE bool Better(const Choice& a, const Choice& b) {
  if (a.id < 0) return false;
  return b.id < 0 || a.value > b.value || (a.value == b.value && a.id < b.id);
}

// A warp a row. Shared memory of a warp: score, choice and state of each expert.
CINNABAR_KERNEL(kRouteThreads, 4)
RouteKernel(RouteTask task) {
  const int warp = ThreadIndex() / 32;
  const int lane = ThreadIndex() % 32;
  const int n = task.num_experts;
  float* scores = reinterpret_cast<float*>(SharedBytes()) + warp * 3 * n;
  float* choices = scores + n;
  float* states = choices + n;  // 0: out, 1: may win, 2: has won
  const int64_t row = static_cast<int64_t>(BlockX()) * (kRouteThreads / 32) + warp;
  const bool exists = row < task.num_rows;
  const auto logit = [&](int e) { return exists ? LoadAt(task.logits, row, e) : 0.0F; };

  if (task.softmax) {
    float largest = -kInfinityF;
    for (int e = lane; e < n; e += 32) largest = fmaxf(largest, logit(e));
    largest = WarpMax(largest);
    float sum = 0.0F;
    for (int e = lane; e < n; e += 32) sum += scores[e] = expf(logit(e) - largest);
    sum = WarpSum(sum);
    for (int e = lane; e < n; e += 32) scores[e] = scores[e] / sum;
  } else {
    for (int e = lane; e < n; e += 32) scores[e] = Sigmoid(logit(e));
  }
  for (int e = lane; e < n; e += 32) {
    choices[e] = task.bias == nullptr ? scores[e] : scores[e] + task.bias[e];
    states[e] = task.groups_kept == task.num_groups ? 1.0F : 0.0F;
  }
  WarpBarrier();

  if (task.groups_kept < task.num_groups) {
    const int size = n / task.num_groups;
    const auto group_score = [&](int group) {
      float first = -kInfinityF, second = -kInfinityF;
      for (int e = group * size; e < (group + 1) * size; ++e) {
        const float c = choices[e];
        if (c > first) {
          second = first;
          first = c;
        } else if (c > second) {
          second = c;
        }
      }
      return size > 1 ? first + second : first;
    };
    for (int group = lane; group < task.num_groups; group += 32) {
      const float mine = group_score(group);
      int better = 0;
      for (int other = 0; other < task.num_groups; ++other) {
        const float theirs = group_score(other);
        if (theirs > mine || (theirs == mine && other < group)) ++better;
      }
      for (int e = group * size; better < task.groups_kept && e < (group + 1) * size; ++e) {
        states[e] = 1.0F;
      }
    }
    WarpBarrier();
  }

  for (int winner = 0; winner < task.experts_per_row; ++winner) {
    Choice best = {0.0F, -1};
    for (int e = lane; e < n; e += 32) {
      const Choice mine = {choices[e], e};
      if (states[e] == 1.0F && Better(mine, best)) best = mine;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const Choice other = {ShuffleXor(best.value, mask), ShuffleXor(best.id, mask)};
      if (Better(other, best)) best = other;
    }
    const int id = Shuffle(best.id, 0);
    if (lane == 0 && id >= 0) states[id] = 2.0F;
    WarpBarrier();
  }

  // Winners by ascending id, their weights summed in that order: one lane, a few numbers.
  if (lane == 0 && exists) {
    int32_t* experts = task.experts + row * task.experts_per_row;
    float* weights = task.weights + row * task.experts_per_row;
    float sum = 0.0F;
    int count = 0;
    for (int e = 0; e < n && count < task.experts_per_row; ++e) {
      if (states[e] != 2.0F) continue;
      experts[count] = e;
      weights[count] = task.bias_counts ? choices[e] : scores[e];
      sum += weights[count];
      ++count;
    }
    const float factor = task.renormalize ? task.scale / (sum + 1e-20F) : task.scale;
    for (int i = 0; i < count; ++i) {
      weights[i] *= factor;
      if (task.expert_scales != nullptr) weights[i] *= task.expert_scales[experts[i]];
    }
  }
}

constexpr int kGroupThreads = 512;

// One block: num_places is a few thousand. Shared memory: count and cursor of each expert.
CINNABAR_KERNEL(kGroupThreads, 1)
GroupKernel(GroupTask task) {
  int32_t* counts = reinterpret_cast<int32_t*>(SharedBytes());
  int32_t* cursors = counts + task.num_experts;
  for (int e = ThreadIndex(); e < task.num_experts; e += kGroupThreads) counts[e] = 0;
  BlockBarrier();
  for (int place = ThreadIndex(); place < task.num_places; place += kGroupThreads) {
    AtomicAdd(counts + task.experts[place], 1);
  }
  BlockBarrier();
  if (ThreadIndex() == 0) {
    int begin = 0, tiles = 0;
    for (int e = 0; e < task.num_experts; ++e) {
      task.begins[e] = cursors[e] = begin;
      task.tile_begins[e] = tiles;
      begin += counts[e];
      tiles += (counts[e] + task.tile_rows - 1) / task.tile_rows;
    }
    task.begins[task.num_experts] = begin;
    task.tile_begins[task.num_experts] = tiles;
  }
  BlockBarrier();
  for (int place = ThreadIndex(); place < task.num_places; place += kGroupThreads) {
    const int at = AtomicAdd(cursors + task.experts[place], 1);
    task.places[at] = place;
    task.where[place] = at;
  }
}

// A grid for as many row tiles as there can be: blocks beyond the last end at once. Tiles of one
// expert follow each other, so its weight is read from device memory once.
template <class Product>
CINNABAR_KERNEL(Product::kThreads, Product::kBlocks)
ExpertLinearKernel(ExpertLinearTask task) {
  const int tile = BlockX();
  if (tile >= task.tile_begins[task.num_experts]) return;
  int expert = 0;  // the last whose first tile is not beyond; experts without rows have none
  for (int low = 0, high = task.num_experts; low < high;) {
    const int middle = (low + high) / 2;
    if (task.tile_begins[middle + 1] <= tile) {
      low = middle + 1;
    } else {
      high = middle;
    }
    expert = low;
  }
  const int first = task.begins[expert] + (tile - task.tile_begins[expert]) * Product::kRows;
  const int left = task.begins[expert + 1] - first;
  const int num_rows = left < Product::kRows ? left : Product::kRows;
  const int output_begin = BlockY() * Product::kOutputs;

  ProductOperands operands;
  operands.weight = static_cast<const unsigned char*>(task.weights[expert]) +
                    output_begin * task.weight.row_bytes;
  operands.weight_row_bytes = task.weight.row_bytes;
  operands.weight_element = task.weight.element;
  operands.weight_tiled = task.weight.tiled;
  operands.x = static_cast<const unsigned char*>(task.x.data);
  operands.x_element = task.x.element;
  operands.x_row_bytes = task.x.stride * (task.x.element == Element::kF32 ? 4 : 2);
  operands.x_index = task.x_by_place ? task.places + first : nullptr;
  operands.x_divisor = task.experts_per_row;
  operands.x_first = first;
  operands.num_rows = num_rows;
  operands.cols = task.weight.cols;
  operands.k_end = task.weight.k_bytes;
  operands.segment_bytes = task.weight.k_bytes;
  const float* sums = Product::Run(operands, SharedBytes());

  FinishTask finish;
  finish.finish = task.finish;
  finish.bias = nullptr;
  finish.weight_scales = nullptr;
  finish.x_scales = nullptr;
  finish.out = task.out;
  finish.num_outputs = task.num_outputs;
  finish.rows = nullptr;
  FinishTile<Product>(finish, sums, first, num_rows, output_begin);
}

constexpr int kCombineThreads = 256;

CINNABAR_KERNEL(kCombineThreads, 4)
CombineKernel(CombineTask task) {
  const int64_t row = BlockX();
  for (int i = ThreadIndex(); i < task.dim; i += kCombineThreads) {
    float sum = task.add ? LoadAt(task.out, row, i) : 0.0F;
    for (int slot = 0; slot < task.experts_per_row; ++slot) {
      const int64_t place = row * task.experts_per_row + slot;
      sum += task.weights[place] * task.outputs[task.where[place] * task.stride + i];
    }
    StoreAt(task.out, row, i, sum);
  }
}

template <class Product>
int LaunchExpertTile(const ExpertLinearTask& task, void* stream) {
  return Launch(ExpertLinearKernel<Product>,
                {task.num_tiles_max, (task.weight.rows + Product::kOutputs - 1) / Product::kOutputs,
                 1, Product::kThreads, Product::kSharedBytes, stream},
                task);
}

}  // namespace

int LaunchRoute(const RouteTask& task, void* stream) {
  constexpr int kRows = kRouteThreads / 32;
  return Launch(RouteKernel,
                {(task.num_rows + kRows - 1) / kRows, 1, 1, kRouteThreads,
                 static_cast<int64_t>(kRows) * 3 * task.num_experts * 4, stream},
                task);
}

int LaunchGroup(const GroupTask& task, void* stream) {
  return Launch(GroupKernel,
                {1, 1, 1, kGroupThreads, static_cast<int64_t>(task.num_experts) * 8, stream}, task);
}

int LaunchExpertLinear(const ExpertLinearTask& task, void* stream) {
  if (task.weight.segment_bytes == 0) return LaunchExpertTile<PlainProduct>(task, stream);
  if (IsBlocks(task.weight.element)) {
    switch (task.tile_rows) {
      case 16:
        return LaunchExpertTile<BlockProduct<64, 16, 4, 1, 4, false>>(task, stream);
      case 32:
        return LaunchExpertTile<BlockProduct<64, 32, 4, 1, 4, false>>(task, stream);
      case 64:
        return LaunchExpertTile<BlockProduct<64, 64, 4, 1, 4, false>>(task, stream);
      default:
        return LaunchExpertTile<BlockProduct<128, 128, 4, 2, 3, false>>(task, stream);
    }
  }
  if (task.weight.tiled) {
    switch (task.tile_rows) {
      case 16:
        return LaunchExpertTile<HopperProduct<16, false>>(task, stream);
      case 32:
        return LaunchExpertTile<HopperProduct<32, false>>(task, stream);
      case 64:
        return LaunchExpertTile<HopperProduct<64, false>>(task, stream);
      default:
        return LaunchExpertTile<HopperProduct<128, false>>(task, stream);
    }
  }
  switch (task.tile_rows) {
    case 16:
      return LaunchExpertTile<TensorProduct<64, 16, 4, 1, 4, false, false>>(task, stream);
    case 32:
      return LaunchExpertTile<TensorProduct<64, 32, 4, 1, 4, false, false>>(task, stream);
    case 64:
      return LaunchExpertTile<TensorProduct<64, 64, 4, 1, 4, false, false>>(task, stream);
    default:
      return LaunchExpertTile<TensorProduct<128, 128, 4, 2, 3, false, false>>(task, stream);
  }
}

int LaunchCombine(const CombineTask& task, void* stream) {
  return Launch(CombineKernel, {task.num_rows, 1, 1, kCombineThreads, 0, stream}, task);
}

}  // namespace cinnabar::cuda
