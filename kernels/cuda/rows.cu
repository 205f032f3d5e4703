// What works on single rows: embedding, norms, gathers, and the heads of a row. All are bound by
// the bytes of the row, which are read once and written once; a block a row, float32 arithmetic,
// sums by thread (columns thread, thread + threads ..), then lanes, then warps: an order that
// depends on the width alone.
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {
namespace {

constexpr int kRowThreads = 256;

// out[i] = table[ids[i]] * scale. Blocks: rows.
CINNABAR_KERNEL(kRowThreads, 4)
EmbedKernel(EmbedTask task) {
  const int64_t row = BlockX();
  const unsigned char* from =
      static_cast<const unsigned char*>(task.table) + task.ids[row] * task.row_bytes;
  for (int64_t i = ThreadIndex(); i < task.cols; i += NumThreads()) {
    StoreAt(task.out, row, i, LoadWeightElement(from, task.element, i) * task.scale);
  }
}

// RmsNorm, or LayerNormModulate where task.modulated. The row is read twice (three times with a
// mean); the second time it comes from the first-level cache.
CINNABAR_KERNEL(kRowThreads, 4)
NormKernel(NormTask task) {
  float* scratch = reinterpret_cast<float*>(SharedBytes());
  const int64_t row = BlockX();
  const int64_t source = task.index == nullptr ? row : task.index[row];
  float mean = 0.0F;
  if (task.modulated) {
    float sum = 0.0F;
    for (int i = ThreadIndex(); i < task.dim; i += NumThreads()) sum += LoadAt(task.x, source, i);
    mean = BlockSum(sum, scratch) / static_cast<float>(task.dim);
  }
  float squares = 0.0F;
  for (int i = ThreadIndex(); i < task.dim; i += NumThreads()) {
    const float d = LoadAt(task.x, source, i) - mean;
    squares = fmaf(d, d, squares);
  }
  squares = BlockSum(squares, scratch);
  const float factor = 1.0F / sqrtf(squares / static_cast<float>(task.dim) + task.eps);
  const int64_t modulation = task.modulated ? task.rows[source].modulation_row : 0;
  const float scale = task.scales == nullptr ? 1.0F : task.scales[task.rows[row].modulation_row];
  for (int i = ThreadIndex(); i < task.dim; i += NumThreads()) {
    float y = (LoadAt(task.x, source, i) - mean) * factor * task.weight[i];
    if (task.modulated) {
      y = fmaf(y, 1.0F + LoadAt(task.scale, modulation, i), LoadAt(task.shift, modulation, i));
    }
    if (task.add) y = (LoadAt(task.out, row, i) + y) * scale;
    StoreAt(task.out, row, i, y);
  }
}

CINNABAR_KERNEL(kRowThreads, 4)
GatherKernel(GatherTask task) {
  const int64_t row = BlockX();
  const int64_t source = task.index[row];
  for (int i = ThreadIndex(); i < task.dim; i += NumThreads()) {
    StoreAt(task.out, row, i, LoadAt(task.x, source, i));
  }
}

constexpr int kPrepareThreads = 128;

// A block a row, a warp a head at a time; shared memory: head_dim floats a warp.
CINNABAR_KERNEL(kPrepareThreads, 8)
PrepareKernel(PrepareTask task) {
  const int64_t row = BlockX();
  const int warp = ThreadIndex() / 32;
  const int lane = ThreadIndex() % 32;
  float* x = reinterpret_cast<float*>(SharedBytes()) + warp * task.head_dim;
  const RowFacts facts = task.rows[row];
  const SpanFacts span = task.spans[facts.span];
  unsigned char* page = static_cast<unsigned char*>(
      span.pages[task.layer * span.pages_per_layer + facts.position / kPagePositions]);
  const int half = task.rotary_dim / 2;
  const int num_heads = task.num_heads + 2 * task.num_kv_heads;
  for (int head = warp; head < num_heads; head += NumThreads() / 32) {
    const bool is_query = head < task.num_heads;
    const bool is_value = head >= task.num_heads + task.num_kv_heads;
    const int64_t column = static_cast<int64_t>(head) * task.head_dim;
    float squares = 0.0F;
    for (int i = lane; i < task.head_dim; i += 32) {
      const float value = LoadAt(task.qkv, row, column + i);
      x[i] = value;
      squares = fmaf(value, value, squares);
    }
    squares = WarpSum(squares);
    WarpBarrier();
    const float* norm = is_query ? task.q_norm : is_value ? task.v_norm : task.k_norm;
    if (norm != nullptr) {
      const float factor = 1.0F / sqrtf(squares / static_cast<float>(task.head_dim) + task.eps);
      for (int i = lane; i < task.head_dim; i += 32) x[i] = x[i] * factor * norm[i];
      WarpBarrier();
    }
    if (!is_value) {
      for (int i = lane; i < half; i += 32) {
        const float c = task.cosine[static_cast<int64_t>(facts.position) * half + i];
        const float s = task.sine[static_cast<int64_t>(facts.position) * half + i];
        const float a = x[i];
        const float b = x[half + i];
        x[i] = fmaf(a, c, -(b * s));
        x[half + i] = fmaf(b, c, a * s);
      }
      WarpBarrier();
    }
    if (is_query) {
      for (int i = lane; i < task.head_dim; i += 32) StoreAt(task.qkv, row, column + i, x[i]);
    } else {
      // Zeros behind head_dim: products run over head_stride.
      const int kept = head - task.num_heads;  // keys, then values: as they lie in a page
      const int64_t at =
          (static_cast<int64_t>(kept) * kPagePositions + facts.position % kPagePositions) *
          task.head_stride;
      for (int i = lane; i < task.head_stride; i += 32) {
        StoreElement(page, task.qkv.element, at + i, i < task.head_dim ? x[i] : 0.0F);
      }
    }
    WarpBarrier();
  }
}

}  // namespace

int LaunchEmbed(const EmbedTask& task, void* stream) {
  return Launch(EmbedKernel, {task.num_rows, 1, 1, kRowThreads, 0, stream}, task);
}
int LaunchNorm(const NormTask& task, void* stream) {
  return Launch(NormKernel, {task.num_rows, 1, 1, kRowThreads, kRowThreads / 32 * 4, stream}, task);
}
int LaunchGather(const GatherTask& task, void* stream) {
  return Launch(GatherKernel, {task.num_rows, 1, 1, kRowThreads, 0, stream}, task);
}
int LaunchPrepare(const PrepareTask& task, void* stream) {
  return Launch(PrepareKernel,
                {task.num_rows, 1, 1, kPrepareThreads,
                 static_cast<int64_t>(kPrepareThreads / 32) * task.head_dim * 4, stream},
                task);
}

}  // namespace cinnabar::cuda
