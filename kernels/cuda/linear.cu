// Linear: a grid of tiles, [row tiles] x [output tiles] (x [segments] when split). Row tiles run
// fastest, so that the blocks that share a tile of the weight read it together and device memory
// gives it once; of many row tiles kRowTilesTogether at a time pass over all outputs, so that what
// runs at the same time shares rows as well.
#include "kernels/cuda/block_product.cuh"
#include "kernels/cuda/hopper_product.cuh"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {
namespace {

constexpr int kRowTilesTogether = 8;

template <class Product>
CINNABAR_KERNEL(Product::kThreads, Product::kBlocks)
LinearKernel(LinearTask task) {
  unsigned char* shared = SharedBytes();
  const int tile = BlockY() * GridX() + BlockX();
  const int first_row_tile = tile / (kRowTilesTogether * GridY()) * kRowTilesTogether;
  const int row_tiles_left = GridX() - first_row_tile;
  const int together = row_tiles_left < kRowTilesTogether ? row_tiles_left : kRowTilesTogether;
  const int of_these = tile - first_row_tile * GridY();
  const int row_begin = (first_row_tile + of_these % together) * Product::kRows;
  const int output_begin = of_these / together * Product::kOutputs;
  const int num_rows =
      task.num_rows - row_begin < Product::kRows ? task.num_rows - row_begin : Product::kRows;

  ProductOperands operands;
  operands.weight =
      static_cast<const unsigned char*>(task.weight.data) + output_begin * task.weight.row_bytes;
  operands.weight_row_bytes = task.weight.row_bytes;
  operands.weight_element = task.weight.element;
  operands.weight_tiled = task.weight.tiled;
  operands.x = static_cast<const unsigned char*>(task.x.data);
  operands.x_element = task.x.element;
  operands.x_row_bytes = task.x.stride * (task.x.element == Element::kF32    ? 4
                                          : task.x.element == Element::kE4m3 ? 1
                                                                             : 2);
  operands.x_index = task.x_index == nullptr ? nullptr : task.x_index + row_begin;
  operands.x_first = row_begin;
  operands.num_rows = num_rows;
  operands.cols = task.weight.cols;
  operands.segment_bytes = task.weight.segment_bytes;
  operands.k_begin = task.split ? BlockZ() * task.weight.segment_bytes : 0;
  operands.k_end = task.weight.k_bytes;
  if (task.split && operands.k_begin + task.weight.segment_bytes < operands.k_end) {
    operands.k_end = operands.k_begin + task.weight.segment_bytes;
  }
  float* sums = Product::Run(operands, shared);
  if (task.split) {
    constexpr int kTile = Product::kRows * Product::kOutputs;
    float* partials = task.partials + static_cast<int64_t>(tile) * task.weight.num_segments * kTile;
    float* mine = partials + static_cast<int64_t>(BlockZ()) * kTile;
    for (int i = ThreadIndex(); i < kTile; i += Product::kThreads) {
      mine[i] = sums[i / Product::kOutputs * Product::kSumStride + i % Product::kOutputs];
    }
    DeviceFence();
    BlockBarrier();
    // Behind the sums: read after a barrier by all.
    int32_t* ticket = reinterpret_cast<int32_t*>(shared + Product::kSharedBytes);
    if (ThreadIndex() == 0) *ticket = AtomicAdd(task.tickets + tile, 1);
    BlockBarrier();
    if (*ticket != task.weight.num_segments - 1) return;
    // The last to come adds all segments in their order, and leaves the ticket as it was.
    DeviceFence();
    if (ThreadIndex() == 0) task.tickets[tile] = 0;
    for (int i = ThreadIndex(); i < kTile; i += Product::kThreads) {
      float total = 0.0F;
      for (int segment = 0; segment < task.weight.num_segments; ++segment) {
        total += partials[static_cast<int64_t>(segment) * kTile + i];
      }
      sums[i / Product::kOutputs * Product::kSumStride + i % Product::kOutputs] = total;
    }
    BlockBarrier();
  }
  FinishTask finish;
  finish.finish = task.finish;
  finish.bias = task.bias;
  finish.weight_scales = Product::kIsFp8 ? task.weight.scales + output_begin : nullptr;
  finish.x_scales = Product::kIsFp8 ? task.x_scales + row_begin : nullptr;
  finish.out = task.out;
  finish.num_outputs = task.num_outputs;
  finish.gate = task.gate;
  finish.rows = task.rows;
  finish.cap = task.cap;
  FinishTile<Product>(finish, sums, row_begin, num_rows, output_begin);
}

template <class Product>
int LaunchTile(const LinearTask& task, void* stream) {
  const bool fold = task.weight.num_segments > 1 && !task.split;
  const LaunchShape shape = {(task.num_rows + Product::kRows - 1) / Product::kRows,
                             (task.weight.rows + Product::kOutputs - 1) / Product::kOutputs,
                             task.split ? task.weight.num_segments : 1,
                             Product::kThreads,
                             (fold ? Product::kFoldBytes : Product::kSharedBytes) + 16,
                             stream};
  return Launch(LinearKernel<Product>, shape, task);
}

template <bool kFold, bool kFp8>
int LaunchTensor(const LinearTask& task, void* stream) {
  switch (task.tile_rows) {
    case 16:
      return LaunchTile<TensorProduct<64, 16, 4, 1, 4, kFold, kFp8>>(task, stream);
    case 32:
      return LaunchTile<TensorProduct<64, 32, 4, 1, 4, kFold, kFp8>>(task, stream);
    case 64:
      return LaunchTile<TensorProduct<64, 64, 4, 1, 4, kFold, kFp8>>(task, stream);
    default:
      if constexpr (!kFp8) {
        return LaunchTile<TensorProduct<128, 128, 4, 2, 3, kFold, false>>(task, stream);
      }
      return 1;  // cudaErrorInvalidValue: the planner gives none such
  }
}

template <bool kFold>
int LaunchBlocks(const LinearTask& task, void* stream) {
  switch (task.tile_rows) {
    case 16:
      return LaunchTile<BlockProduct<64, 16, 4, 1, 4, kFold>>(task, stream);
    case 32:
      return LaunchTile<BlockProduct<64, 32, 4, 1, 4, kFold>>(task, stream);
    case 64:
      return LaunchTile<BlockProduct<64, 64, 4, 1, 4, kFold>>(task, stream);
    default:
      return LaunchTile<BlockProduct<128, 128, 4, 2, 3, kFold>>(task, stream);
  }
}

template <bool kFp8>
int LaunchHopper(const LinearTask& task, void* stream) {
  switch (task.tile_rows) {
    case 16:
      return LaunchTile<HopperProduct<16, kFp8>>(task, stream);
    case 32:
      return LaunchTile<HopperProduct<32, kFp8>>(task, stream);
    case 64:
      return LaunchTile<HopperProduct<64, kFp8>>(task, stream);
    case 128:
      return LaunchTile<HopperProduct<128, kFp8>>(task, stream);
    default:
      if constexpr (!kFp8) return LaunchTile<HopperProduct<256, false>>(task, stream);
      return 1;  // cudaErrorInvalidValue: the planner gives none such
  }
}

CINNABAR_KERNEL(128, 8)
QuantizeKernel(QuantizeTask task) {
  float* scratch = reinterpret_cast<float*>(SharedBytes());
  const int64_t row = BlockX();
  const int64_t source = task.x_index == nullptr ? row : task.x_index[row];
  float largest = 0.0F;
  for (int i = ThreadIndex(); i < task.cols; i += NumThreads()) {
    const float size = fabsf(LoadAt(task.x, source, i));
    largest = size > largest || size != size ? size : largest;
  }
  // A NaN in the row must reach its outputs: the scale carries it.
  const bool nan = BlockMax(largest != largest ? 1 : 0, reinterpret_cast<int*>(scratch)) != 0;
  largest = BlockMax(largest != largest ? 0.0F : largest, scratch);
  const float scale = largest > 0.0F ? largest / kE4m3Max : 1.0F;
  for (int i = ThreadIndex(); i < task.out_stride; i += NumThreads()) {
    task.out[row * task.out_stride + i] =
        i < task.cols ? ToE4m3(LoadAt(task.x, source, i) / scale) : static_cast<uint8_t>(0);
  }
  if (ThreadIndex() == 0) task.scales[row] = nan ? FloatOfBits(0x7FC00000U) : scale;
}

}  // namespace

int LaunchLinear(const LinearTask& task, void* stream) {
  if (task.weight.segment_bytes == 0) return LaunchTile<PlainProduct>(task, stream);
  const bool fp8 = task.x.element == Element::kE4m3;
  if (task.weight.tiled) {
    return fp8 ? LaunchHopper<true>(task, stream) : LaunchHopper<false>(task, stream);
  }
  const bool fold = task.weight.num_segments > 1 && !task.split;
  if (fp8) {
    return fold ? LaunchTensor<true, true>(task, stream) : LaunchTensor<false, true>(task, stream);
  }
  if (IsBlocks(task.weight.element)) {
    return fold ? LaunchBlocks<true>(task, stream) : LaunchBlocks<false>(task, stream);
  }
  return fold ? LaunchTensor<true, false>(task, stream) : LaunchTensor<false, false>(task, stream);
}

int LaunchQuantize(const QuantizeTask& task, void* stream) {
  return Launch(QuantizeKernel, {task.num_rows, 1, 1, 128, 16 * 4, stream}, task);
}

}  // namespace cinnabar::cuda
