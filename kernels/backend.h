// The one interface between the denoiser and the machine it runs on: one contract per op, two
// implementations (kernels/cpu, kernels/cuda). The ops are what a diffusion transformer needs and
// no more; the forward pass in worker/model is written once, against this page.
//
// What every implementation keeps, and tests/unit/kernels checks on each:
//   * Batch invariance. Each output row is a function of its own inputs alone: the same bits
//   whatever
//     rows stand beside it, however many there are, and whatever the number of threads. Sums run in
//     an order that depends on the row's own length only.
//   * Packed rows. A batch is rows of many sequences one after another; nothing is padded.
//   * No allocation after Reserve(): scratch is taken once.
// Ops are enqueued in call order; what they read must stay alive and unchanged, and what they write
// must not be read by the host, until Synchronize() returned OK, or WaitStep() for their step. Only
// KvMemory may go while ops that use it are enqueued. One thread at a time calls a Backend. Shapes
// that do not fit each other are a caller's bug (CINNABAR_CHECK).
#ifndef CINNABAR_KERNELS_BACKEND_H_
#define CINNABAR_KERNELS_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/philox.h"

namespace cinnabar {

// How numbers are kept. The last five are block formats, of weights only: runs of a row share a
// scale. Their layouts are GGUF's; see kernels/quantized.h.
enum class DType : uint8_t { kF32, kF16, kBf16, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ6_K };

const char* NameOf(DType dtype);  // "F32", "F16", "BF16", "Q8_0", ..., as the files write them

// The smallest piece of a row.
struct BlockShape {
  int64_t elements = 1;
  int64_t bytes = 0;
};
constexpr BlockShape BlockOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {1, 4};
    case DType::kF16:
    case DType::kBf16:
      return {1, 2};
    case DType::kQ8_0:
      return {32, 34};
    case DType::kQ4_0:
      return {32, 18};
    case DType::kQ4_1:
      return {32, 20};
    case DType::kQ4_K:
      return {256, 144};
    case DType::kQ6_K:
      return {256, 210};
  }
  return {};
}
constexpr bool IsQuantized(DType dtype) { return BlockOf(dtype).elements > 1; }
// Of `count` elements, which are whole blocks.
constexpr int64_t BytesOf(DType dtype, int64_t count = 1) {
  return count / BlockOf(dtype).elements * BlockOf(dtype).bytes;
}

// --- Weights
// ---------------------------------------------------------------------------------------

// A matrix in host memory: [rows, cols] row-major, that is PyTorch's [out, in]; a row is whole
// blocks. `data` need not be aligned. Borrowed.
struct HostMatrix {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
};

// How the rows of several host matrices become the rows of one weight.
enum class RowOrder : uint8_t {
  kStacked,     // one matrix after another (q | k | v)
  kGatedPairs,  // exactly two of equal shape, gate and up, kept so that Epilogue::kSwiGlu and
                // kGeGlu can pair them
};

// A weight as its backend wants it (packed, converted, on the device). Immutable; any thread.
class Weight {
 public:
  virtual ~Weight() = default;
  int64_t rows() const { return rows_; }  // outputs; with kGatedPairs gate and up together
  int64_t cols() const { return cols_; }  // inputs
  RowOrder row_order() const { return row_order_; }
  DType dtype() const { return dtype_; }
  virtual int64_t memory_bytes() const = 0;

 protected:
  Weight(int64_t rows, int64_t cols, RowOrder row_order, DType dtype)
      : rows_(rows), cols_(cols), row_order_(row_order), dtype_(dtype) {}

 private:
  int64_t rows_;
  int64_t cols_;
  RowOrder row_order_;
  DType dtype_;
};

// --- Memory
// ----------------------------------------------------------------------------------------

// Device memory, zeroed, aligned to 64 bytes. On the CPU `data` is ordinary memory.
class Buffer {
 public:
  virtual ~Buffer() = default;
  void* data() const { return data_; }
  int64_t size_bytes() const { return size_bytes_; }

 protected:
  Buffer(void* data, int64_t size_bytes) : data_(data), size_bytes_(size_bytes) {}

 private:
  void* data_;
  int64_t size_bytes_;
};

// Rows of device memory: row r starts at element r * stride. The CPU backend takes kF32 only.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;  // in elements
  DType dtype = DType::kF32;

  float* f32() const { return static_cast<float*>(data); }
};

// Keys and values of one sequence, for `num_layers` layers and positions 0 .. positions_max-1. The
// layout is the backend's own. Keys are kept after per-head norm and rotation: positions are
// absolute and never move.
class KvMemory {
 public:
  virtual ~KvMemory() = default;
  virtual int64_t memory_bytes() const = 0;
};

struct KvShape {
  int32_t num_layers = 1;
  int32_t num_kv_heads = 1;
  int32_t head_dim = 1;
  int32_t positions_max = 1;
  // Layers num_layers .. num_layers + num_other_layers - 1 have heads of their own.
  int32_t num_other_layers = 0;
  int32_t other_kv_heads = 0;
  int32_t other_head_dim = 0;

  // Where layer `layer` is kept: memory of one layer is used by every layer in turn.
  int32_t kept_layer(int32_t layer) const {
    return num_layers == 1 && num_other_layers == 0 ? 0 : layer;
  }
  bool is_other(int32_t layer) const { return kept_layer(layer) >= num_layers; }
  int32_t kv_heads_of(int32_t layer) const {
    return is_other(layer) ? other_kv_heads : num_kv_heads;
  }
  int32_t head_dim_of(int32_t layer) const { return is_other(layer) ? other_head_dim : head_dim; }
};

// --- Batch geometry
// ----------------------------------------------------------------------------------

// The rows of one sequence in a packed batch. Its rows are the consecutive absolute positions
// first_position .. first_position + num_rows - 1.
struct SequenceSpan {
  int32_t row_begin = 0;  // first row in the packed batch
  int32_t num_rows = 0;   // >= 1
  int32_t first_position = 0;
  // 0: full attention, every row sees positions 0 .. keys_end - 1.
  // B > 0: block-causal, a row at position p sees the positions of blocks 0 .. p / B below
  // keys_end. Positions outside the span are read from `kv`, where an earlier pass has left them.
  int32_t block_length = 0;
  int32_t keys_end = 0;  // 0: the end of the span; else at or after it
  KvMemory* kv = nullptr;
  // Row of the modulation tensor that belongs to this sequence (DiT bodies); else unused.
  int32_t modulation_row = 0;
};

// --- Ops
// -----------------------------------------------------------------------------------------------

// What happens to y = x W^T (+ bias) on its way out.
enum class Epilogue : uint8_t {
  kStore,     // out = y
  kAdd,       // out += y                     (residual)
  kGatedAdd,  // out += gate[modulation_row] * y   (residual of a DiT body)
  kSilu,      // out = y * sigmoid(y)
  kGeluTanh,  // out = gelu(y), tanh form
  kSwiGlu,    // out = silu(gate half) * (up half); weight in kGatedPairs, out has rows()/2 columns
  kGeGlu,     // the same with gelu, tanh form, in the place of silu
};

struct LinearArgs {
  Rows x;  // [num_rows, weight.cols()]
  int64_t num_rows = 0;
  const Weight* weight = nullptr;
  const float* bias =
      nullptr;  // device, [weight.rows()] in the order of the stacked rows; optional
  Epilogue epilogue = Epilogue::kStore;
  Rows out;  // [num_rows, weight.rows()] (kSwiGlu, kGeGlu: half); must not overlap x
  // kGatedAdd only: gate value of output column c for row r is gate[modulation_row(r)][c].
  Rows gate = {};                                 // [num modulation rows, weight.rows()]
  absl::Span<const SequenceSpan> sequences = {};  // which modulation row a row belongs to
};

// out[i] = y, or with `add` (out[i] + y) * scale(i), for y = w * x[row(i)] *
// rsqrt(mean(x[row(i)]^2) + eps). Without `add` and row_indices, out may be x. Source:
// arXiv:1910.07467.
struct RmsNormArgs {
  Rows x;
  int64_t num_rows = 0;
  int64_t dim = 0;
  const float* weight = nullptr;  // device, [dim]
  float eps = 1e-6F;
  Rows out;  // kF32 with `add`
  // Host, [num_rows] when not empty: row(i) = row_indices[i]; else row(i) = i.
  absl::Span<const int32_t> row_indices = {};
  bool add = false;
  // With `add`: scale(i) = scales[m], m the modulation row of row i of `out`; null: 1.
  const float* scales = nullptr;                  // device, [num modulation rows]
  absl::Span<const SequenceSpan> sequences = {};  // read where there are scales
};

// out[i] = LN(x[row(i)]) * w * (1 + scale[m]) + shift[m], m the modulation row of row(i). LN
// subtracts the mean, divides by sqrt(variance + eps), no bias. Source: DiT, arXiv:2212.09748
// (adaLN).
struct LayerNormModulateArgs {
  Rows x;
  int64_t num_rows = 0;
  int64_t dim = 0;
  const float* weight = nullptr;  // device, [dim]
  float eps = 1e-5F;
  Rows shift;  // [num modulation rows, dim]
  Rows scale;  // [num modulation rows, dim]
  absl::Span<const SequenceSpan> sequences;
  Rows out;
  absl::Span<const int32_t> row_indices = {};  // as in RmsNormArgs
};

// out[i] = x[row_indices[i]]. For the last layer, of which only some rows are wanted.
struct GatherRowsArgs {
  Rows x;
  int64_t dim = 0;
  absl::Span<const int32_t> row_indices;  // host
  Rows out;                               // dtype of x; must not overlap it
};

// Cosines and sines of the rotary embedding, [positions_max, rotary_dim / 2] each, float32 computed
// in double. Half-split pairs (i, i + rotary_dim / 2). Source: arXiv:2104.09864.
struct RotaryTable {
  const float* cosine = nullptr;  // device
  const float* sine = nullptr;    // device
  int32_t rotary_dim = 0;         // even, <= head_dim; 0 rotates nothing
  int32_t positions_max = 0;
};

struct HeadShape {
  int32_t num_heads = 1;
  int32_t num_kv_heads = 1;  // divides num_heads
  int32_t head_dim = 1;
};

// Splits fused rows [q heads | k heads | v heads], applies the per-head RMSNorm to q, k and v where
// weights are given, rotates q and k at the row's absolute position, leaves q in place and writes k
// and v of every row into its sequence's KvMemory at `layer`.
struct PrepareHeadsArgs {
  Rows qkv;  // [num_rows, (num_heads + 2 * num_kv_heads) * head_dim], read and written
  int64_t num_rows = 0;
  HeadShape heads;
  const float* q_norm = nullptr;  // device, [head_dim]; optional
  const float* k_norm = nullptr;
  const float* v_norm = nullptr;  // of v, which is not rotated
  float norm_eps = 1e-6F;
  RotaryTable rotary;
  absl::Span<const SequenceSpan> sequences;
  int32_t layer = 0;  // of KvMemory; memory of one layer is used by every layer in turn
};

// out = softmax(q k^T * scale) v for every head over the keys that SequenceSpan lets a row see, all
// of which are in KvMemory by now. Query head h reads kv head h / (num_heads / num_kv_heads). With
// a window W > 0 a row at position p sees no position before p - W + 1, and a row of a span with
// full attention none before first_position - W + 1: its window is that of the span.
struct AttendArgs {
  Rows q;  // [num_rows, >= num_heads * head_dim]: the q part of the fused rows
  int64_t num_rows = 0;
  HeadShape heads;
  float scale = 1.0F;
  absl::Span<const SequenceSpan> sequences;
  int32_t layer = 0;   // as in PrepareHeadsArgs
  int32_t window = 0;  // 0: none
  Rows out;            // [num_rows, num_heads * head_dim]
};

inline int32_t KeysEnd(const SequenceSpan& span) {
  return span.keys_end > 0 ? span.keys_end : span.first_position + span.num_rows;
}

// --- Experts
// -------------------------------------------------------------------------------------------

enum class RouterScore : uint8_t { kSoftmax, kSigmoid };

inline constexpr int32_t kExpertsPerRowMax = 64;

// Which experts a row goes to, and how much each counts. From the router's logits, in float32:
//   score = softmax(logits) or sigmoid(logits);  choice = score + bias
//   groups: experts in num_groups equal runs; the groups_kept runs whose two largest choices have
//     the largest sum stay, the others are out (num_groups 1: none is)
//   the experts_per_row largest choices win; ties: the lower id, of groups and of experts
//   weight = score (or, where bias_counts, choice) of each winner; renormalize: divided by their
//     sum + 1e-20;  then times `scale`, and times the expert's own of expert_scales
// Source: arXiv:2101.03961 (softmax), arXiv:2412.19437 (sigmoid, groups, bias).
struct RouteArgs {
  Rows logits;  // [num_rows, num_experts], float32; overwritten
  int64_t num_rows = 0;
  int32_t num_experts = 0;
  int32_t experts_per_row = 0;  // 1 .. kExpertsPerRowMax, within what the kept groups hold
  RouterScore score = RouterScore::kSoftmax;
  const float* bias = nullptr;  // device, [num_experts]; optional
  bool bias_counts = false;
  int32_t num_groups = 1;
  int32_t groups_kept = 1;
  bool renormalize = false;
  float scale = 1.0F;
  const float* expert_scales = nullptr;  // device, [num_experts]; optional
  int32_t* experts = nullptr;  // device, [num_rows, experts_per_row]: ascending ids in a row
  float* weights = nullptr;    // device, [num_rows, experts_per_row]
};

// out[r] += sum over a row's experts e, in their order, of weight * down_e(silu(gate_e x[r]) *
// up_e x[r]); with kGeGlu gelu in the place of silu. Rows are grouped by expert; only experts that
// some row goes to are read.
struct ExpertsArgs {
  Rows x;  // [num_rows, dim]
  int64_t num_rows = 0;
  absl::Span<const std::unique_ptr<Weight>> gate_up;  // host, [num_experts], kGatedPairs
  absl::Span<const std::unique_ptr<Weight>> down;     // host, [num_experts], kStacked
  int32_t experts_per_row = 0;
  const int32_t* experts = nullptr;  // what Route() wrote
  const float* weights = nullptr;
  Epilogue activation = Epilogue::kSwiGlu;  // or kGeGlu
  bool add = true;                          // false: out is set, not added to
  Rows out;                                 // [num_rows, dim], float32; must not overlap x
};

// --- Vocabulary head
// -----------------------------------------------------------------------------------

// An exception for one vocabulary id in one row. Ids in a query are distinct; at most
// kVocabularyRulesMax.
struct VocabularyRule {
  int32_t id = 0;
  float bias = 0.0F;     // added to the logit before anything else; -inf is allowed
  bool counted = true;   // in the softmax statistics (normaliser, entropy, margin, filters)
  bool pickable = true;  // may become the token
};
inline constexpr int32_t kVocabularyRulesMax = 16;

// Which token is drawn, and from what.
enum class PickRule : uint8_t {
  // temperature 0: the largest logit, ties to the lower id. temperature > 0: Gumbel-max, the
  // largest
  // logit / temperature + g(id), a draw from softmax(logits / temperature) over the pickable ids
  // (and
  // inside the top-k / top-p set when there is one). g(id) = -ln(-ln u), u = UniformFromWord of
  // NoiseStream::kToken, index id; computed so that the float32 result keeps its relative precision
  // at
  // both ends of (0, 1).
  kSoftmax,
  // SEDD's Tweedie step on the uniform graph (needs the sum before any weight is known): with
  // s[y] = exp(logit[y]), s[own] = 1 and S = sum s over all ids, draws y with weight
  //   max(0, (q - 1) / (N q) * S + s[y] / q) * transition[y], q = exp(-sigma_step), N = vocabulary
  //   size,
  //   transition[y] = (1 - q) / N off the own token, 1 - (N - 1) (1 - q) / N on it.
  // `own_token` and `sigma_step` are read, the pick temperature is not; filters do not go with it
  // (a
  // caller's bug). s is that after the rules' biases; `counted` leaves S alone. Weights and draw
  // are
  // double. Source: Score-Entropy-Discrete-Diffusion, graph_lib.py.
  kUniformTweedie,
};

enum class FilterOrder : uint8_t { kTopPThenTopK, kTopKThenTopP };

// Which ids top_p keeps, in descending order (ties: lower id first): those with no more than top_p
// before them, so the one that crosses, too; all but that one, though never none (ReMDM, BD3-LM:
// they sum to at most top_p); the first again, but two at least (RND1).
enum class TopPRule : uint8_t { kCrossing, kInside, kCrossingTwoAtLeast };

// What one row of logits is wanted for. l = logits (+ guidance) + rule biases.
struct VocabularyQuery {
  int32_t hidden_row = 0;
  // Classifier-free guidance: when >= 0, l = l_u + (guidance_scale + 1) * (l_c - l_u) with l_c the
  // logits of hidden_row and l_u those of this row (one fused multiply-add in float32).
  int32_t unconditional_row = -1;
  float guidance_scale = 0.0F;

  PickRule pick = PickRule::kSoftmax;
  float pick_temperature = 0.0F;  // 0: argmax; else above 1e-30
  // Softmax statistics are those of l / statistics_temperature (above 1e-30): 1 for LLaDA's clean
  // confidence, the sampling temperature for Dream's.
  float statistics_temperature = 1.0F;
  // Filters, on l / statistics_temperature over the counted ids; token and statistics then come
  // from the kept set alone. top_k 0: off; keeps ids with l >= the k-th largest (ties survive).
  // top_p 1: off. The whole mass, and so where top_p crosses, is exact to about 1e-6 of itself. A
  // rule that is not counted is in no kept set, so never the token then.
  int32_t top_k = 0;
  float top_p = 1.0F;
  TopPRule top_p_rule = TopPRule::kCrossing;
  FilterOrder filter_order = FilterOrder::kTopPThenTopK;

  NoiseKey noise;                          // read when the pick is random
  int32_t own_token = -1;                  // kUniformTweedie only
  float sigma_step = 0.0F;                 // kUniformTweedie only
  absl::Span<const VocabularyRule> rules;  // host memory, alive until Synchronize()
  // Ids >= this are never picked (rows of the table above the tokenizer's size); they are counted.
  // 0: no limit.
  int32_t pickable_ids = 0;
  bool want_top = false;  // fills top_token; does not go with filters (a caller's bug)
};

// One row's answer. Probabilities are of softmax(l / statistics_temperature) over the counted ids
// (the kept ones when filtered), from float32 logits and float32 sums of bounded length merged in
// double: probability and margin within 1e-5, entropy within 1e-4 of exact, relative, on the same
// logits.
struct VocabularyAnswer {
  int32_t token = -1;        // the pick; -1 when nothing was pickable. An l of -inf is never picked
  float token_logit = 0.0F;  // l[token] without noise and temperature
  double probability = 0.0;  // of `token`; a token that is pickable but not counted: exp of its
                             // logit over the counted mass, capped at 1
  double margin = 0.0;       // largest minus second largest probability
  double entropy = 0.0;      // nats
  // ln sum exp(l / statistics_temperature) over the counted ids, unfiltered; -inf when none has a
  // finite l, and then probability, margin and entropy are 0.
  double log_sum_exp = 0.0;
  // want_top: the largest l among the pickable ids, ties to the lower id, whatever was drawn; -1
  // when nothing was pickable or it was not asked for.
  int32_t top_token = -1;
  double top_probability = 0.0;  // of top_token, as `probability` is of `token`
  bool finite = true;  // false: a NaN or +inf among the logits, every other field is undefined
};

struct VocabularyArgs {
  Rows hidden;                     // [.., weight.cols()]
  const Weight* weight = nullptr;  // [vocabulary, dim], kStacked
  const float* bias = nullptr;     // device, [vocabulary]; optional
  // c > 0: a logit x is c * tanh(x / c) before all else, to 2e-7 c; x of +inf counts as finite
  // then. Goes with neither bias nor guidance (a caller's bug).
  float logit_cap = 0.0F;
  absl::Span<const VocabularyQuery> queries;
  absl::Span<VocabularyAnswer> answers;  // host, as long as queries
};

// --- Transfers
// -----------------------------------------------------------------------------------------

enum class TransferScore : uint8_t { kProbability, kMargin, kNegativeEntropy };

// Which of some answers are taken: the `count` of the highest scores (all, where there are fewer;
// ties: the earlier answer), and every other whose score is above `threshold`, or at least that
// where it is `inclusive`. Scores are the answers' doubles, compared as such: the choice is exact.
struct TransferRule {
  TransferScore score = TransferScore::kProbability;
  int32_t count = 0;
  double threshold = std::numeric_limits<double>::infinity();
  bool inclusive = false;
};

struct TransferCandidate {
  int32_t answer = 0;  // among those of the last AnswerVocabulary()
  int32_t target =
      0;  // the element of SelectTransfersArgs::ids that gets its token when it is taken
};

// The candidates of one sequence; each sequence's are judged on their own.
struct TransferSelection {
  int32_t candidates_begin = 0;
  int32_t candidates_end = 0;
  TransferRule rule;
};

// ids = known, but for the tokens of the answers that are taken. What a step's answers lead to is
// so on the device before the host has seen them. An answer without a token (-1), or not finite,
// changes nothing; beside one that is not finite, which others are taken is undefined.
struct SelectTransfersArgs {
  absl::Span<const TransferSelection> selections;
  absl::Span<const TransferCandidate> candidates;  // targets are distinct
  absl::Span<const int32_t> known;                 // host, [num_ids]
  int32_t* ids = nullptr;                          // device, [num_ids]
  absl::Span<int32_t> chosen;  // host, [num_ids]: a copy of `ids`; may be read as answers may
};

// Plain logits: out[i] = hidden[i] W^T + bias, [num_rows, vocabulary] float32. For inspection and
// for samplers that need whole rows, a few at a time.
struct LogitsArgs {
  Rows hidden;
  int64_t num_rows = 0;
  const Weight* weight = nullptr;
  const float* bias = nullptr;
  float logit_cap = 0.0F;  // as in VocabularyArgs
  Rows out;
};

// The embedding that a row's prediction is on average: out[i] = scale * sum over all ids v of p(v)
// * table[v], p = softmax(l / temperature) of the row's logits l = hidden[i] W^T under the cap. In
// float32 (with rows in bf16 p may be rounded to bf16, and its sum with it), tile by tile: a row's
// probabilities are never there as a whole. Terms of relative size
// below 2^-126 count as 0.
struct SoftEmbedArgs {
  Rows hidden;  // [num_rows, weight.cols()]
  int64_t num_rows = 0;
  const Weight* weight = nullptr;  // [vocabulary, dim], kStacked: the head
  float logit_cap = 0.0F;          // as in VocabularyArgs
  float temperature = 1.0F;        // above 1e-30
  const Weight* table = nullptr;   // [vocabulary, dim] of LoadEmbedding()
  float scale = 1.0F;
  Rows out;  // [num_rows, dim], float32; must not overlap hidden
};

// The largest shapes that later calls will have; Reserve() takes scratch for them.
struct WorkspaceShape {
  int64_t rows_max = 0;  // packed rows of a batch
  int64_t cols_max = 0;  // widest input of a Linear
  int64_t vocabulary = 0;
  int64_t queries_max = 0;
  int32_t positions_max = 0;  // longest sequence
  int32_t head_dim_max = 0;
  // Experts(); 0: none.
  int32_t num_experts = 0;
  int32_t experts_per_row = 0;
  int64_t expert_dim = 0;      // columns of x
  int64_t expert_mlp_dim = 0;  // columns between gate, up and down
  int64_t soft_rows_max = 0;   // rows of one SoftEmbed(), of cols_max columns; 0: none
};

// What a device tells of itself; a field that it cannot tell stays as it is here.
struct DeviceStats {
  std::string pci_address;  // "0000:4b:00.0"; empty: no PCI device
  int64_t memory_total_bytes = -1;
  int64_t memory_free_bytes = -1;
  double busy_seconds = -1;  // that steps ran (BeginStep() to EndStep()), by its own clock
  int64_t graph_hits = 0;    // steps that ran as a recorded graph
  int64_t graph_misses = 0;  // steps whose shape had none
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string Describe() const = 0;  // "cpu avx512, 2 threads"
  // What the bits of results depend on beside weights and requests: work that one backend began may
  // go on only on another that says the same. "cpu" (each instruction set gives the same bits),
  // "cuda/sm_90/BF16".
  virtual std::string Numerics() const = 0;
  // From any thread, beside the other calls. May take a millisecond: not once a step.
  virtual DeviceStats Stats() const { return {}; }
  virtual DType activation_dtype()
      const = 0;  // of every Rows but the residual stream, which is float32

  // ResourceExhausted when the memory cannot be had.
  virtual absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size_bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<KvMemory>> AllocateKv(const KvShape& shape) = 0;
  virtual int64_t KvBytes(const KvShape& shape) const = 0;
  // Positions [0, num_positions) of all layers of `to` become those of `from`, in order with the
  // ops. Both are of one shape but for positions_max. What is behind them in `to` may change.
  virtual absl::Status CopyKv(const KvMemory& from, int32_t num_positions, KvMemory& to) = 0;
  virtual absl::Status Reserve(const WorkspaceShape& shape) = 0;
  virtual int64_t WorkspaceBytes(const WorkspaceShape& shape) const = 0;

  // Stacks `parts` (equal cols; the sources may be let go afterwards). `dtype` is how the values
  // are kept. Floats: narrowing rounds to nearest even, widening is exact; products read the kept
  // values and compute in float32. A block format (rows of whole blocks): parts that are in any
  // block format stay as they are, floats are rounded as kernels/quantized.h says; products of them
  // may round x to 15 bits for each 32 columns, no further, and sum integers; with rows in bf16
  // each value of the weight may be rounded to bf16, once.
  virtual absl::StatusOr<std::unique_ptr<Weight>> LoadWeight(absl::Span<const HostMatrix> parts,
                                                             RowOrder row_order, DType dtype) = 0;
  // Device memory of `rows` of a LoadWeight() weight that is kept as `dtype`, padding of rows left
  // out.
  virtual int64_t WeightBytes(DType dtype, int64_t rows, int64_t cols) const {
    return BytesOf(dtype, rows * cols);
  }
  // LoadWeight() for a weight of which most passes read nothing (an expert), kept in the dtype of
  // `parts`, which are of one. The CPU backend keeps no copy and computes from where the parts lie,
  // to the same bits: they must outlive the weight.
  virtual absl::StatusOr<std::unique_ptr<Weight>> MapWeight(absl::Span<const HostMatrix> parts,
                                                            RowOrder row_order) = 0;
  // An embedding table: rows are looked up, never multiplied. The CPU backend keeps no copy:
  // `table` must outlive it.
  virtual absl::StatusOr<std::unique_ptr<Weight>> LoadEmbedding(const HostMatrix& table) = 0;
  // A float32 vector on the device.
  virtual absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(const HostMatrix& vector) = 0;
  // Copies host floats into device memory, in order with the ops.
  virtual absl::Status Upload(absl::Span<const float> host, void* device) = 0;
  // Copies device floats to the host; implies Synchronize().
  virtual absl::Status Download(const void* device, absl::Span<float> host) = 0;

  // out[i] = table[ids[i]] * scale, float32. Ids are in range.
  virtual absl::Status Embed(const Weight& table, absl::Span<const int32_t> ids, float scale,
                             const Rows& out) = 0;
  // The same with `num_rows` ids that lie on the device, as SelectTransfers() leaves them.
  virtual absl::Status EmbedChosen(const Weight& table, const int32_t* ids, int64_t num_rows,
                                   float scale, const Rows& out) = 0;
  virtual absl::Status Linear(const LinearArgs& args) = 0;
  virtual absl::Status RmsNorm(const RmsNormArgs& args) = 0;
  virtual absl::Status LayerNormModulate(const LayerNormModulateArgs& args) = 0;
  virtual absl::Status GatherRows(const GatherRowsArgs& args) = 0;
  virtual absl::Status PrepareHeads(const PrepareHeadsArgs& args) = 0;
  virtual absl::Status Attend(const AttendArgs& args) = 0;
  virtual absl::Status Route(const RouteArgs& args) = 0;
  virtual absl::Status Experts(const ExpertsArgs& args) = 0;
  virtual absl::Status AnswerVocabulary(const VocabularyArgs& args) = 0;
  // Reads the answers of the last AnswerVocabulary() where they are: on the device, or (CPU) in its
  // args.answers, unchanged since. At most WorkspaceShape::rows_max ids, queries_max candidates.
  virtual absl::Status SelectTransfers(const SelectTransfersArgs& args) = 0;
  virtual absl::Status Logits(const LogitsArgs& args) = 0;
  virtual absl::Status SoftEmbed(const SoftEmbedArgs& args) = 0;

  // Brackets the ops of one denoising step, as a hint: a backend may keep what it is given in
  // between and run it as one (a CUDA graph) at EndStep() or Synchronize(). Results are the same
  // without. Neither nests; a failed step needs no EndStep().
  virtual absl::Status BeginStep() { return absl::OkStatus(); }
  virtual absl::Status EndStep() { return absl::OkStatus(); }
  // Waits for the oldest step that has ended and was not waited for; another may be enqueued behind
  // it, no third. At once where none is left, after Synchronize() for one.
  virtual absl::Status WaitStep() { return Synchronize(); }
  // Whether BeginStep() does anything, as it does at first: for measurements. Not within a step.
  virtual void UseGraphs(bool /*use*/) {}

  // Waits for everything enqueued. A device error surfaces here or at a later call (Unavailable),
  // and then at every call: make a new Backend.
  virtual absl::Status Synchronize() = 0;
};

enum class BackendKind : uint8_t { kCpu, kCuda };

// CUDA: the instruction that products of bf16 and FP8 rows are made of. Bits differ between the
// two.
enum class Products : uint8_t {
  kAuto,   // kMma, until the other has been measured on a device
  kMma,    // mma.sync, on every device
  kWgmma,  // wgmma, on sm_90 (H100, H200) alone
};

struct BackendOptions {
  int32_t num_threads = 0;  // CPU: 0 takes every core
  // CPU: "auto", "avx512vnni", "avx512", "avx2vnni", "avx2" or "generic". Every choice gives the
  // same bits.
  std::string isa = "auto";
  // CUDA: which of the devices that the driver shows.
  int32_t device = 0;
  // CUDA: activation_dtype(), and that of keys and values. kBf16, or kF32 for comparison with the
  // CPU: float32 arithmetic throughout, whatever the weights are kept in, and slow.
  DType activation = DType::kBf16;
  // CUDA: LoadWeight() keeps large matrices as FP8 (e4m3, a scale an output), and their products
  // round each row of x to FP8 with a scale of its own. Not the vocabulary head, routers, experts,
  // and nothing in a block format.
  bool fp8 = false;
  Products products = Products::kAuto;
};

// Unimplemented when that backend was not built or the device lacks what an option asks for,
// Unavailable when there is no device (or the CPU lacks the asked instruction set), InvalidArgument
// for an unknown isa.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(BackendKind kind,
                                                     const BackendOptions& options);

}  // namespace cinnabar

#endif  // CINNABAR_KERNELS_BACKEND_H_
