// The inner loops of the CPU backend, one table an instruction set, all compiled from
// isa_kernels.inc. Raw pointers and plain structs only: the including files are compiled with
// different flags, and an inline function or template that they share with the rest of the program
// could end up with instructions that the machine lacks.
//
// Every table gives the same bits: an output of a product is one float32 accumulator, fused over k
// = 0, 1, ... or, with block-quantised weights, over runs of 32 of them, each summed exactly in
// integers; sums over a row run in sixteen lanes, element i in lane i mod 16, joined in one fixed
// order.
#ifndef CINNABAR_KERNELS_CPU_ISA_KERNELS_H_
#define CINNABAR_KERNELS_CPU_ISA_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace cinnabar::cpu {

inline constexpr int32_t kPanelWidth = 32;    // outputs of a weight panel
inline constexpr int32_t kStripRowsMax = 14;  // largest strip of any instruction set

enum class Finish : uint8_t { kStore, kAdd, kGatedAdd, kSilu, kGeluTanh, kSwiGlu, kGeGlu };

// Rows of one panel's products on their way out: rows of 32 sums, of which the first `num_outputs`
// count (kSwiGlu, kGeGlu: the first num_outputs of each half).
struct FinishTask {
  Finish finish;
  const float* sums;
  int64_t sums_stride;
  int32_t num_rows;
  int32_t num_outputs;
  const float* bias_low;   // of sums 0..15, or null; num_outputs (or 16) of them
  const float* bias_high;  // of sums 16..31
  const float* gate;       // kGatedAdd: one row of num_outputs
  float* out;
  int64_t out_stride;
};

// Inputs that share a scale on both sides of a product with a block-quantised weight.
inline constexpr int32_t kRunLength = 32;

// Runs of one panel of a block-quantised weight as it is kept; see packed_weight.h.
struct ExpandTask {
  // 8 bits: int8 [inputs / 2][32 outputs][2]. 4 bits: [inputs / 4][32][2], the first two inputs in
  // the low nibble; `zero` is subtracted.
  const uint8_t* values;
  bool nibbles;
  int32_t zero;
  const int8_t* sub_scales;   // [inputs / sub_scale_length][32], or null
  int32_t sub_scale_length;   // 16 or 32
  const int8_t* sub_offsets;  // [inputs / 32][32], or null
  const float* scales;        // [inputs / scale_length][32]
  const float* offsets;       // the same, or null
  int32_t scale_length;       // 32 or 256
  int64_t num_runs;
};

// The same with everything multiplied out: weight (k, j) is
//   scales[k / 32][j] * values[k / 2][j][k % 2] + offsets[k / 32][j].
// |value| <= 4096.
struct RunScratch {
  int16_t* values;  // aligned to 64 bytes
  float* scales;
  float* offsets;  // null: none
};
// What a tile reads: such runs, or those of an 8-bit panel without sub-scales as they are kept.
struct RunPanel {
  const int16_t* values;
  const int8_t* bytes;  // instead of `values`, if not null
  const float* scales;
  const float* offsets;
};

// A row of the left side is rounded to 15 bits for each run, x[k] = scale * q[k]; a run is
// kRunWords words: 16 pairs (q[2p] in the low half, q[2p + 1] in the high one), the scale and scale
// * sum of q. A run with NaN or infinity has NaN for both, and q 0.
inline constexpr int32_t kRunWords = 18;

// Memory that is read soon: brought into the second-level cache while a tile is computed.
struct Ahead {
  const std::byte* bytes;
  int64_t size;  // 0: none
};

struct IsaKernels {
  const char* name;
  int32_t strip_rows;   // rows of a strip at most
  bool tiles_of_bytes;  // tile_runs is at least as fast from RunPanel::bytes

  // strip[k * num_rows + r] = x[r * stride + k] * scale.
  void (*pack_strip)(const float* x, int64_t stride, int32_t num_rows, int64_t dim, float scale,
                     float* strip);
  // c[r * c_stride + j] (+)= sum over k of strip[k * num_rows + r] * panel[k * 32 + j], j < 32.
  // When `resume`, the sums go on from what c holds. panel: 64-byte aligned.
  void (*tile)(const float* strip, int32_t num_rows, const float* panel, int64_t dim, bool resume,
               float* c, int64_t c_stride, const Ahead& ahead);
  // The same from rows that are not packed: x[r * x_stride + k].
  void (*tile_rows)(const float* x, int64_t x_stride, int32_t num_rows, const float* panel,
                    int64_t dim, bool resume, float* c, int64_t c_stride);
  // Products of block-quantised weights; dim is a multiple of 32. A strip is [runs][kRunWords]
  // [num_rows] words; quantize_row writes one row of it, from `out` on. tile_runs is as tile.
  void (*quantize_row)(const float* x, int64_t dim, float* out, int32_t num_rows);
  void (*expand)(const ExpandTask& task, const RunScratch& out);
  void (*tile_runs)(const float* strip, int32_t num_rows, const RunPanel& panel, int64_t num_runs,
                    bool resume, float* c, int64_t c_stride, const Ahead& ahead);
  void (*widen_bf16)(const uint16_t* source, int64_t count, float* out);  // count: multiple of 16
  void (*widen_f16)(const uint16_t* source, int64_t count, float* out);
  void (*finish)(const FinishTask& task);

  // out = w * x / sqrt(mean x^2 + eps)
  void (*rms_norm)(const float* x, const float* weight, int64_t dim, float eps, float* out);
  // out = (out + w * x / sqrt(mean x^2 + eps)) * scale
  void (*add_rms_norm)(const float* x, const float* weight, int64_t dim, float eps, float scale,
                       float* out);
  // out = LN(x) * w * (1 + scale) + shift
  void (*layer_norm)(const float* x, const float* weight, const float* shift, const float* scale,
                     int64_t dim, float eps, float* out);
  // x[i], x[i + half] rotated by (cosine[i], sine[i]), i < half.
  void (*rotate)(float* x, const float* cosine, const float* sine, int32_t half);
  // In place: x[i] = exp(x[i] - max) for i < count, 0 up to padded_count; returns 1 / sum.
  float (*softmax)(float* x, int64_t count, int64_t padded_count);
  // out = x * factor
  void (*scale)(const float* x, float factor, int64_t count, float* out);
};

// The AVX tables are there on x86-64 only, and may only be called where the processor has them.
// Those with VNNI differ in tile_runs and what it reads.
extern const IsaKernels kIsaAvx512Vnni;
extern const IsaKernels kIsaAvx512;
extern const IsaKernels kIsaAvx2Vnni;
extern const IsaKernels kIsaAvx2;
extern const IsaKernels kIsaGeneric;

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_ISA_KERNELS_H_
