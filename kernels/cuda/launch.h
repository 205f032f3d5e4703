// What passes between the backend's host code and the kernels (.cu): plain structs of device
// pointers and sizes, and one function a kernel. Every function enqueues on `stream` and returns a
// cudaError_t as an int; shapes have been checked by the caller.
#ifndef CINNABAR_KERNELS_CUDA_LAUNCH_H_
#define CINNABAR_KERNELS_CUDA_LAUNCH_H_

#include <cstdint>

namespace cinnabar::cuda {

// The last five are of weights only, and kept as kernels/cuda/blocks.h says.
enum class Element : uint8_t { kF32, kF16, kBf16, kE4m3, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ6_K };

// Rows of device memory, as kernels/backend.h has them.
struct MatrixView {
  void* data = nullptr;
  int64_t stride = 0;  // elements
  Element element = Element::kF32;
};

// --- Geometry of a batch, made once a step

struct RowFacts {
  int32_t position = 0;
  int32_t modulation_row = 0;
  int32_t span = 0;
  int32_t num_keys = 0;  // positions 0 .. num_keys - 1 are seen, or those of them in the window
};

// Positions of a KV page. A page holds one layer's keys, then its values: each
// [kv heads][kPagePositions][head_stride], head_stride being head_dim rounded up to 16, zeros
// beyond head_dim.
inline constexpr int32_t kPagePositions = 64;

struct SpanFacts {
  int32_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t first_position = 0;
  int32_t block_length = 0;
  void* const* pages = nullptr;  // [layers][pages_per_layer]
  int32_t pages_per_layer = 0;   // 0: one layer, which all use in turn
};

// --- Linear

enum class Finish : uint8_t { kStore, kAdd, kGatedAdd, kSilu, kGeluTanh, kSwiGlu, kGeGlu };

// Rows are the weight's, with gated pairs interleaved: 8 gates, their 8 ups, the next 8 gates ..
// Padded with zeros to kWeightRowUnit rows and kWeightRowBytes bytes a row.
inline constexpr int32_t kWeightRowUnit = 128;
inline constexpr int32_t kWeightRowBytes = 128;
// A tiled weight (for wgmma): tiles of kWeightRowUnit rows x kWeightRowBytes, along a row first; in
// each, 16-byte piece p of row r at 128 r + 16 (p ^ r % 8).
inline constexpr int32_t kWeightTileBytes = kWeightRowUnit * kWeightRowBytes;
struct WeightView {
  const void* data = nullptr;
  const float* scales =
      nullptr;       // kE4m3: what an output is multiplied by; in the order of the rows
  int32_t rows = 0;  // as they lie in memory, without the padding
  int32_t cols = 0;
  int64_t row_bytes = 0;
  int64_t k_bytes = 0;  // of a row in a product: row_bytes, or of a block format those of its bf16
  Element element = Element::kF32;
  bool tiled = false;
  // Tensor cores: sums of so many bytes of a row each are made on their own and added in order.
  int64_t segment_bytes = 0;
  int32_t num_segments = 1;
};

inline constexpr int32_t kPlainRows =
    32;  // of a tile without tensor cores; segment_bytes is 0 then

struct LinearTask {
  MatrixView x;
  const float* x_scales = nullptr;   // kE4m3: of each row of x
  const int32_t* x_index = nullptr;  // row r reads row x_index[r] of x; null: row r
  int32_t num_rows = 0;
  WeightView weight;
  const float* bias = nullptr;  // in the caller's order: gates, then ups
  Finish finish = Finish::kStore;
  MatrixView out;
  int32_t num_outputs = 0;  // columns of out
  MatrixView gate;
  const RowFacts* rows = nullptr;
  float cap = 0.0F;            // of logits: SoftCap() of a sum; 0: none
  int32_t tile_rows = 16;      // plan.h
  bool split = false;          // segments side by side, through `partials`
  float* partials = nullptr;   // [tiles][segments][tile]
  int32_t* tickets = nullptr;  // [tiles], 0 before and after
};
int LaunchLinear(const LinearTask& task, void* stream);

// x as e4m3 with a scale a row: |x|'s largest over 448.
struct QuantizeTask {
  MatrixView x;
  const int32_t* x_index = nullptr;  // as in LinearTask
  int32_t num_rows = 0;
  int32_t cols = 0;
  uint8_t* out = nullptr;
  int64_t out_stride = 0;  // bytes, a multiple of 16; columns beyond cols are zeroed
  float* scales = nullptr;
};
int LaunchQuantize(const QuantizeTask& task, void* stream);

// --- Rows

struct EmbedTask {
  const void* table = nullptr;
  Element element = Element::kF32;
  int64_t cols = 0;
  int64_t row_bytes = 0;
  const int32_t* ids = nullptr;
  int32_t num_rows = 0;
  float scale = 1.0F;
  MatrixView out;
};
int LaunchEmbed(const EmbedTask& task, void* stream);

struct NormTask {
  MatrixView x;
  const int32_t* index = nullptr;  // optional
  int32_t num_rows = 0;
  int32_t dim = 0;
  const float* weight = nullptr;
  float eps = 0.0F;
  MatrixView out;
  bool modulated = false;  // LayerNormModulate; else RmsNorm
  MatrixView shift;
  MatrixView scale;
  bool add = false;               // RmsNorm only: out = (out + y) * scales[modulation row]
  const float* scales = nullptr;  // null: 1
  const RowFacts* rows = nullptr;
};
int LaunchNorm(const NormTask& task, void* stream);

struct GatherTask {
  MatrixView x;
  int32_t dim = 0;
  const int32_t* index = nullptr;
  int32_t num_rows = 0;
  MatrixView out;
};
int LaunchGather(const GatherTask& task, void* stream);

struct PrepareTask {
  MatrixView qkv;
  int32_t num_rows = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  const float* v_norm = nullptr;
  float eps = 0.0F;
  const float* cosine = nullptr;
  const float* sine = nullptr;
  int32_t rotary_dim = 0;
  const RowFacts* rows = nullptr;
  const SpanFacts* spans = nullptr;
  int32_t layer = 0;
  int32_t head_stride = 0;
};
int LaunchPrepare(const PrepareTask& task, void* stream);

// --- Attention

// Query rows of one span that a block takes together: items first .. of its num_rows * group (row
// major, group the query heads of a kv head), and the keys of one chunk.
struct AttendTile {
  int32_t span = 0;
  int32_t first = 0;
  int32_t chunk = 0;
  int32_t num_chunks = 0;  // most that a row of this tile has
};
inline constexpr int32_t kAttendItems = 64;
// Keys whose softmax is made on its own before the chunks are merged in order.
inline constexpr int32_t kAttendChunk = 512;

struct AttendTask {
  MatrixView q;
  int32_t row_base = 0;  // the rows that `tiles` cover: row_base .. row_base + num_rows - 1
  int32_t num_rows = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 1.0F;
  const RowFacts* rows = nullptr;
  const SpanFacts* spans = nullptr;
  int32_t layer = 0;
  int32_t head_stride = 0;
  int32_t window = 0;  // 0: none
  MatrixView out;
  const AttendTile* tiles = nullptr;
  int32_t num_tiles = 0;
  // Where more than one chunk is seen: [chunk - the row's first][row - row_base][head] of head_dim
  // sums, and of two floats (largest score, sum of exponentials).
  float* chunk_sums = nullptr;
  float* chunk_totals = nullptr;
  int32_t num_chunks = 1;  // most that a row has
};
// Tensor cores: q and the pages in bf16, head_dim at most kAttendTensorDim.
inline constexpr int32_t kAttendTensorDim = 128;
int LaunchAttendTensor(const AttendTask& task, void* stream);
// Any element, head_dim up to 1024; a block a row and head.
int LaunchAttendPlain(const AttendTask& task, void* stream);

// --- Experts

struct RouteTask {
  MatrixView logits;
  int32_t num_rows = 0;
  int32_t num_experts = 0;
  int32_t experts_per_row = 0;
  bool softmax = true;
  const float* bias = nullptr;
  bool bias_counts = false;
  int32_t num_groups = 1;
  int32_t groups_kept = 1;
  bool renormalize = false;
  float scale = 1.0F;
  const float* expert_scales = nullptr;
  int32_t* experts = nullptr;
  float* weights = nullptr;
};
int LaunchRoute(const RouteTask& task, void* stream);

// Places (row, slot) grouped by expert; inside an expert in any order, which no result depends on.
struct GroupTask {
  const int32_t* experts = nullptr;  // [num_places]
  int32_t num_places = 0;
  int32_t num_experts = 0;
  int32_t tile_rows = 0;
  int32_t* begins = nullptr;       // [num_experts + 1]: first place of each in `places`
  int32_t* tile_begins = nullptr;  // [num_experts + 1]: first tile of each
  int32_t* places = nullptr;       // [num_places]
  int32_t* where = nullptr;        // [num_places]: places[where[p]] = p
};
int LaunchGroup(const GroupTask& task, void* stream);

struct ExpertLinearTask {
  // Row r of expert e writes row begins[e] + r of out, and reads the same of x, or with x_by_place
  // row places[begins[e] + r] / experts_per_row.
  MatrixView x;
  bool x_by_place = false;
  int32_t experts_per_row = 1;
  const void* const* weights = nullptr;  // device, [num_experts]
  WeightView weight;                     // what all have in common; data is null
  int32_t num_experts = 0;
  const int32_t* begins = nullptr;
  const int32_t* tile_begins = nullptr;
  const int32_t* places = nullptr;
  int32_t num_tiles_max = 0;
  int32_t tile_rows = 16;
  Finish finish = Finish::kStore;
  MatrixView out;
  int32_t num_outputs = 0;
};
int LaunchExpertLinear(const ExpertLinearTask& task, void* stream);

// out[r] += sum over slots, in order, of weights[r, slot] * outputs[where the place lies]; without
// `add` what was there counts as 0.
struct CombineTask {
  bool add = true;
  const float* outputs = nullptr;  // [num_places, dim], in the order of `places`
  int64_t stride = 0;
  const int32_t* where = nullptr;
  const float* weights = nullptr;
  int32_t num_rows = 0;
  int32_t experts_per_row = 0;
  int32_t dim = 0;
  MatrixView out;
};
int LaunchCombine(const CombineTask& task, void* stream);

// --- Vocabulary

inline constexpr int32_t kVocabularyChunk = 128;  // ids whose sums are float32
inline constexpr int32_t kNoRow = -1;

struct DeviceRule {
  int32_t id = 0;
  float bias = 0.0F;
  int32_t counted = 1;
  int32_t pickable = 1;
};

enum class Pick : int32_t { kArgmax, kGumbel, kTweedie };

struct DeviceQuery {
  int32_t slot = 0;  // its row among the gathered; with guidance the next is the unconditional one
  int32_t guided = 0;
  float guidance = 0.0F;  // guidance_scale + 1
  Pick pick = Pick::kArgmax;
  float pick_scale = 0.0F;        // 1 / pick_temperature
  float temperature = 1.0F;       // of the statistics
  float statistics_scale = 0.0F;  // log2(e) / temperature
  int32_t top_k = 0;
  float top_p = 1.0F;
  int32_t top_p_inside = 0;  // the id that crosses top_p goes, too
  int32_t two_at_least = 0;  // of top_p
  int32_t top_k_first = 0;
  uint32_t seed_low = 0;
  uint32_t seed_high = 0;
  uint32_t position = 0;
  uint32_t step = 0;
  int32_t own_token = -1;
  float sigma_step = 0.0F;
  int32_t rules_begin = 0;
  int32_t num_rules = 0;
  int32_t num_pickable = 0;  // ids from here on are not picked
  int32_t want_top = 0;
};

// One chunk of one query; exponents d = (l - largest) * statistics_scale, in units of ln 2.
struct ChunkSummary {
  float largest;
  float second;
  float num_largest;
  float tail;   // sum of 2^d without those at `largest`
  float slope;  // sum of d 2^d
  float score;
  float pick_logit;
  int32_t pick_id;  // -1: none
  float top_logit;  // of the largest pickable, where a query wants it
  int32_t top_id;   // -1: none
  int32_t finite;
};

struct DeviceAnswer {
  int32_t token;
  float token_logit;
  double probability;
  double margin;
  double entropy;
  double log_sum_exp;
  double top_probability;
  int32_t top_token;
  int32_t finite;
};

struct VocabularyTask {
  MatrixView hidden;
  const float* x_scales = nullptr;        // kE4m3
  const int32_t* slot_rows = nullptr;     // [num_slots]: hidden row; null: as the slots lie
  const int32_t* slot_queries = nullptr;  // [num_slots]: the query whose slot it is; kNoRow
  int32_t num_slots = 0;
  WeightView weight;
  const float* bias = nullptr;
  float cap = 0.0F;  // as in LinearTask
  const DeviceQuery* queries = nullptr;
  const DeviceRule* rules = nullptr;
  int32_t num_queries = 0;
  int32_t tile_rows = 32;
  ChunkSummary* summaries = nullptr;  // [num_queries][chunks]
  DeviceAnswer* answers = nullptr;    // [num_queries]
};
// Fused: product, summary of each chunk, merge. Queries without filters, not Tweedie.
int LaunchVocabulary(const VocabularyTask& task, void* stream);

// Whole rows: filters and Tweedie steps. Row `slot` of `logits` (bias included) is overwritten.
struct SelectTask {
  float* logits = nullptr;
  int64_t stride = 0;
  int32_t vocabulary = 0;
  const DeviceQuery* queries = nullptr;
  const DeviceRule* rules = nullptr;
  int32_t num_queries = 0;
  DeviceAnswer* answers = nullptr;
};
int LaunchSelect(const SelectTask& task, void* stream);

// --- Soft embeddings

// Sums over the vocabulary are made in parts, and in a part chunk after chunk: soft_embed.cu.
inline constexpr int32_t kSoftChunk = 256;
inline constexpr int32_t kSoftPartsMax = 16;

struct SoftEmbedTask {
  MatrixView hidden;
  int32_t num_rows = 0;
  WeightView weight;
  float cap = 0.0F;
  float exponent_scale = 0.0F;  // log2(e) / temperature
  float temperature = 1.0F;
  const void* table = nullptr;
  Element table_element = Element::kF32;
  int64_t table_row_bytes = 0;
  int32_t dim = 0;
  float scale = 1.0F;
  MatrixView out;
  int32_t num_parts = 1;
  float* logits = nullptr;  // [parts][rows][kSoftChunk]: of one chunk of each part
  // The exponentials in bf16, for tensor cores, in the same shape; null: in the place of the
  // logits.
  uint16_t* probabilities = nullptr;
  float* tops = nullptr;     // [parts][rows]: largest logit so far
  float* masses = nullptr;   // [parts][rows]: sum of exponentials relative to it
  float* factors = nullptr;  // [parts][rows]: what sums of the chunks before are multiplied by
  float* sums = nullptr;     // [parts][rows][dim]
};
int LaunchSoftEmbed(const SoftEmbedTask& task, void* stream);

// --- Transfers

enum class Score : int32_t { kProbability, kMargin, kNegativeEntropy };

struct DeviceCandidate {
  int32_t answer = 0;
  int32_t target = 0;
};

struct DeviceSelection {
  int32_t candidates_begin = 0;
  int32_t candidates_end = 0;
  Score score = Score::kProbability;
  int32_t count = 0;
  double threshold = 0.0;
  int64_t inclusive = 0;
};

// ids[target] = token, for the candidates that are taken.
struct TransferTask {
  const DeviceAnswer* answers = nullptr;
  const DeviceCandidate* candidates = nullptr;
  const DeviceSelection* selections = nullptr;
  int32_t num_selections = 0;
  int32_t* ids = nullptr;
};
int LaunchTransfers(const TransferTask& task, void* stream);

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_LAUNCH_H_
