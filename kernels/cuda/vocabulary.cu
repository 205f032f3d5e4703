// The vocabulary head: which token, and the statistics of its distribution, without keeping logits.
//
// Fused path (no filters): a block makes a tile of logits, 128 ids by 32 or 128 slots, in shared
// memory, and a warp each turns a query's 128 logits into a ChunkSummary of 36 bytes; a warp a
// query then merges its summaries in double. Device memory sees the weight once for all slots, and
// 36 bytes for each query and 128 ids. Whole rows (top-k, top-p, Tweedie): a bounded number of rows
// of logits at a time, then a block each.
//
// Every sum has an order that depends on the vocabulary alone, or is of integers; a query reads its
// own slots only. So an answer's bits do not depend on the other queries.
// Philox counters, Gumbel numbers and 2^d are the CPU's (math.h), bit for bit.
#include "kernels/cuda/block_product.cuh"
#include "kernels/cuda/hopper_product.cuh"
#include "kernels/cuda/launch.h"

namespace cinnabar::cuda {
namespace {

constexpr int32_t kNoId = 0x7FFFFFFF;

// A candidate for the token.
struct Best {
  float score;
  float logit;
  int32_t id;  // kNoId: none
};

CINNABAR_DEVICE void Take(Best& best, const Best& other) {
  if (other.id == kNoId) return;
  if (best.id != kNoId &&
      !(other.score > best.score || (other.score == best.score && other.id < best.id))) {
    return;
  }
  best = other;
}

CINNABAR_DEVICE Best WarpBest(Best best) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const Best other = {ShuffleXor(best.score, mask), ShuffleXor(best.logit, mask),
                        ShuffleXor(best.id, mask)};
    Take(best, other);
  }
  return best;
}

// Scratch: one Best a warp.
CINNABAR_DEVICE Best BlockBest(Best best, Best* scratch) {
  best = WarpBest(best);
  if (ThreadIndex() % 32 == 0) scratch[ThreadIndex() / 32] = best;
  BlockBarrier();
  best = scratch[0];
  for (int warp = 1; warp < NumThreads() / 32; ++warp) Take(best, scratch[warp]);
  BlockBarrier();
  return best;
}

// One of four words without an index into registers, which would put them into memory.
CINNABAR_DEVICE uint32_t WordOf(const PhiloxWords& words, int index) {
  return index == 0   ? words.word[0]
         : index == 1 ? words.word[1]
         : index == 2 ? words.word[2]
                      : words.word[3];
}

CINNABAR_DEVICE PhiloxWords NoiseBlock(const DeviceQuery& query, uint32_t block) {
  return Philox4x32(
      {{block, query.position, query.step, static_cast<uint32_t>(NoiseStream::kToken)}},
      query.seed_low, query.seed_high);
}

// --- Fused

// One query's logits of one chunk, in shared memory: lane l has ids 4 l .. 4 l + 3 of it.
template <class Product>
CINNABAR_DEVICE ChunkSummary Summarise(const VocabularyTask& task, const FinishTask& scaling,
                                       const float* sums, int row, int first_id,
                                       const DeviceQuery& query) {
  const int lane = ThreadIndex() % 32;
  const int vocabulary = task.weight.rows;
  float l[4];
  bool counted[4];
  bool pickable[4];
  bool bad = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = 4 * lane + i;
    const int id = first_id + column;
    counted[i] = id < vocabulary;
    pickable[i] = id < query.num_pickable;
    l[i] = -kInfinityF;
    if (counted[i]) {
      l[i] = Scaled(scaling, sums[row * Product::kSumStride + column], row, column, id);
      if (query.guided != 0) {
        const float u =
            Scaled(scaling, sums[(row + 1) * Product::kSumStride + column], row + 1, column, id);
        l[i] = fmaf(query.guidance, l[i] - u, u);
      }
    }
  }
  for (int r = 0; r < query.num_rules; ++r) {
    const DeviceRule rule = task.rules[query.rules_begin + r];
    const int mine = rule.id - first_id - 4 * lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (mine == i) {
        l[i] += rule.bias;
        counted[i] = rule.counted != 0;
        pickable[i] = pickable[i] && rule.pickable != 0;
      }
    }
  }
  ChunkSummary summary;
  float largest = -kInfinityF;
  float second = -kInfinityF;
  float c[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bad = bad || !(l[i] < kInfinityF);  // where there is no id, l is -inf
    c[i] = counted[i] ? l[i] : -kInfinityF;
    second = fmaxf(second, fminf(largest, c[i]));
    largest = fmaxf(largest, c[i]);
  }
  summary.finite = Ballot(bad) == 0 ? 1 : 0;
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other_largest = ShuffleXor(largest, mask);
    const float other_second = ShuffleXor(second, mask);
    second = fmaxf(fmaxf(second, other_second), fminf(largest, other_largest));
    largest = fmaxf(largest, other_largest);
  }
  float count = 0.0F;
  float tail = 0.0F;
  float slope = 0.0F;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (c[i] == -kInfinityF) continue;
    const float difference = c[i] - largest;
    const float d = fmaxf(difference * query.statistics_scale, -126.0F);
    const float e = Exp2(d);
    if (difference == 0.0F) {
      count += 1.0F;
    } else {
      tail += e;
    }
    slope = fmaf(d, e, slope);
  }
  summary.largest = largest;
  summary.second = second;
  summary.num_largest = WarpSum(count);
  summary.tail = WarpSum(tail);
  summary.slope = WarpSum(slope);
  // Exponents below -126 each left 2^-126: together nothing.
  if (summary.tail < 1e-35F) summary.tail = summary.slope = 0.0F;

  PhiloxWords words = {};
  if (query.pick == Pick::kGumbel) {
    words = NoiseBlock(query, static_cast<uint32_t>(first_id / 4 + lane));
  }
  Best best = {0.0F, 0.0F, kNoId};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!pickable[i] || l[i] == -kInfinityF) continue;
    const float score =
        query.pick == Pick::kGumbel ? fmaf(l[i], query.pick_scale, Gumbel(words.word[i])) : l[i];
    Take(best, {score, l[i], first_id + 4 * lane + i});
  }
  best = WarpBest(best);
  summary.score = best.score;
  summary.pick_logit = best.logit;
  summary.pick_id = best.id == kNoId ? -1 : best.id;
  summary.top_logit = 0.0F;
  summary.top_id = -1;
  if (query.want_top != 0) {
    Best top = {0.0F, 0.0F, kNoId};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!pickable[i] || l[i] == -kInfinityF) continue;
      Take(top, {l[i], l[i], first_id + 4 * lane + i});
    }
    top = WarpBest(top);
    summary.top_logit = top.logit;
    summary.top_id = top.id == kNoId ? -1 : top.id;
  }
  return summary;
}

// Blocks: [slot tiles] x [chunks].
template <class Product>
CINNABAR_KERNEL(Product::kThreads, Product::kBlocks)
VocabularyKernel(VocabularyTask task) {
  static_assert(Product::kOutputs == kVocabularyChunk, "");
  unsigned char* shared = SharedBytes();
  const int row_begin = BlockX() * Product::kRows;
  const int first_id = BlockY() * kVocabularyChunk;
  const int num_rows =
      task.num_slots - row_begin < Product::kRows ? task.num_slots - row_begin : Product::kRows;
  ProductOperands operands;
  operands.weight =
      static_cast<const unsigned char*>(task.weight.data) + first_id * task.weight.row_bytes;
  operands.weight_row_bytes = task.weight.row_bytes;
  operands.weight_element = task.weight.element;
  operands.weight_tiled = task.weight.tiled;
  operands.x = static_cast<const unsigned char*>(task.hidden.data);
  operands.x_element = task.hidden.element;
  operands.x_row_bytes = task.hidden.stride * (task.hidden.element == Element::kF32    ? 4
                                               : task.hidden.element == Element::kE4m3 ? 1
                                                                                       : 2);
  operands.x_index = task.slot_rows == nullptr ? nullptr : task.slot_rows + row_begin;
  operands.x_first = row_begin;
  operands.num_rows = num_rows;
  operands.cols = task.weight.cols;
  operands.k_end = task.weight.k_bytes;
  operands.segment_bytes = task.weight.segment_bytes;
  const float* sums = Product::Run(operands, shared);

  FinishTask scaling = {};
  scaling.bias = task.bias;
  scaling.cap = task.cap;
  scaling.weight_scales = Product::kIsFp8 ? task.weight.scales + first_id : nullptr;
  scaling.x_scales = Product::kIsFp8 ? task.x_scales + row_begin : nullptr;
  const int num_chunks = (task.weight.rows + kVocabularyChunk - 1) / kVocabularyChunk;
  for (int row = ThreadIndex() / 32; row < num_rows; row += Product::kThreads / 32) {
    const int query_index = task.slot_queries[row_begin + row];
    if (query_index == kNoRow) continue;
    const DeviceQuery query = task.queries[query_index];
    const ChunkSummary summary = Summarise<Product>(task, scaling, sums, row, first_id, query);
    if (ThreadIndex() % 32 == 0) {
      task.summaries[static_cast<int64_t>(query_index) * num_chunks + BlockY()] = summary;
    }
  }
}

// Totals over the counted (or kept) ids of a row, relative to `largest`.
struct Totals {
  float largest;
  float second;
  double rest;   // sum of exp(d) without the first id at d = 0: the mass is 1 + rest
  double slope;  // sum of d exp(d)
};

CINNABAR_DEVICE double Exponent(float logit, float largest, float temperature) {
  return (static_cast<double>(logit) - static_cast<double>(largest)) /
         static_cast<double>(temperature);
}

// `top`: what want_top asks for; kNoId where nothing does.
CINNABAR_DEVICE DeviceAnswer AnswerFrom(const Totals& totals, const Best& best, const Best& top,
                                        const DeviceQuery& query) {
  DeviceAnswer answer = {};
  answer.finite = 1;
  answer.token = best.id == kNoId ? -1 : best.id;
  answer.token_logit = best.id == kNoId ? 0.0F : best.logit;
  answer.top_token = top.id == kNoId ? -1 : top.id;
  if (totals.largest == -kInfinityF) {
    answer.log_sum_exp = -static_cast<double>(kInfinityF);
    return answer;
  }
  const double mass = 1.0 + totals.rest;
  answer.log_sum_exp =
      static_cast<double>(totals.largest) / static_cast<double>(query.temperature) +
      log1p(totals.rest);
  answer.margin = 1.0 / mass;
  if (totals.second > -kInfinityF) {
    answer.margin = -expm1(Exponent(totals.second, totals.largest, query.temperature)) / mass;
  }
  answer.entropy = fmax(0.0, log1p(totals.rest) - totals.slope / mass);
  const auto probability = [&](const Best& of) {
    if (of.id == kNoId) return 0.0;
    return fmin(1.0, exp(Exponent(of.logit, totals.largest, query.temperature)) / mass);
  };
  answer.probability = probability(best);
  answer.top_probability = probability(top);
  return answer;
}

constexpr int kMergeThreads = 128;

// A warp a query; lane l has chunks l, l + 32 ..
CINNABAR_KERNEL(kMergeThreads, 4)
MergeSummariesKernel(VocabularyTask task) {
  constexpr double kLn2 = 0.693147180559945309417232121458;
  const int lane = ThreadIndex() % 32;
  const int query_index = BlockX() * (kMergeThreads / 32) + ThreadIndex() / 32;
  if (query_index >= task.num_queries) return;  // the whole warp
  const DeviceQuery query = task.queries[query_index];
  const int num_chunks = (task.weight.rows + kVocabularyChunk - 1) / kVocabularyChunk;
  const ChunkSummary* summaries = task.summaries + static_cast<int64_t>(query_index) * num_chunks;

  Totals totals = {-kInfinityF, -kInfinityF, 0.0, 0.0};
  Best best = {0.0F, 0.0F, kNoId};
  Best top = {0.0F, 0.0F, kNoId};
  bool bad = false;
  for (int chunk = lane; chunk < num_chunks; chunk += 32) {
    const ChunkSummary& summary = summaries[chunk];
    bad = bad || summary.finite == 0;
    totals.second =
        fmaxf(fmaxf(totals.second, summary.second), fminf(totals.largest, summary.largest));
    totals.largest = fmaxf(totals.largest, summary.largest);
    if (summary.pick_id >= 0) Take(best, {summary.score, summary.pick_logit, summary.pick_id});
    if (summary.top_id >= 0) Take(top, {summary.top_logit, summary.top_logit, summary.top_id});
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other_largest = ShuffleXor(totals.largest, mask);
    const float other_second = ShuffleXor(totals.second, mask);
    totals.second = fmaxf(fmaxf(totals.second, other_second), fminf(totals.largest, other_largest));
    totals.largest = fmaxf(totals.largest, other_largest);
  }
  best = WarpBest(best);
  top = WarpBest(top);
  bad = Ballot(bad) != 0;

  // The first chunk that holds the largest logit leaves its 1 out of the sum: next to a one-hot
  // distribution the rest is what the entropy is made of.
  int first = num_chunks;
  for (int chunk = lane; chunk < num_chunks && first == num_chunks; chunk += 32) {
    if (summaries[chunk].largest == totals.largest) first = chunk;
  }
  first = -WarpMax(-first);
  for (int chunk = lane; chunk < num_chunks; chunk += 32) {
    const ChunkSummary& summary = summaries[chunk];
    if (summary.largest == -kInfinityF) continue;
    const double d = Exponent(summary.largest, totals.largest, query.temperature);
    const double mass =
        static_cast<double>(summary.num_largest) + static_cast<double>(summary.tail);
    const double others = chunk == first ? static_cast<double>(summary.num_largest - 1.0F) +
                                               static_cast<double>(summary.tail)
                                         : mass;
    const double scale = exp(d);
    totals.rest += scale * others;
    // exp underflows long before d overflows.
    if (scale > 0.0) {
      totals.slope += scale * (d * mass + kLn2 * static_cast<double>(summary.slope));
    }
  }
  totals.rest = WarpSum(totals.rest);
  totals.slope = WarpSum(totals.slope);
  if (lane != 0) return;
  DeviceAnswer answer = AnswerFrom(totals, best, top, query);
  answer.finite = bad ? 0 : 1;
  task.answers[query_index] = answer;
}

// --- Whole rows

constexpr int kSelectThreads = 512;
constexpr double kMassUnit = 1099511627776.0;  // 2^40: masses are integers, their sums exact

struct SelectShared {
  double sums[kSelectThreads / 32];
  float floats[kSelectThreads / 32];
  int ints[kSelectThreads / 32];
  Best best[kSelectThreads / 32];
  uint64_t masses[256];
  uint32_t counts[256];
  // What thread 0 found.
  uint64_t mass_above;
  uint32_t count_above;
  uint64_t mass_at;
  uint32_t count_at;
  int32_t bin;
  int32_t cutoff;
};

// The key at which a descending walk over the row's ids stops, and what lies above and at it. By
// count: the key that holds rank `rank`. By mass: the first key with (mass above) + (its mass) >
// limit. key 0: the walk never stops.
struct Stop {
  uint32_t key;
  uint64_t mass_above;
  uint32_t count_above;
  uint64_t mass_at;
  uint32_t count_at;
};

struct Row {
  const float* l;
  int32_t vocabulary;
  float largest;
  float temperature;

  CINNABAR_DEVICE uint64_t Mass(float logit) const {
    return static_cast<uint64_t>(exp(Exponent(logit, largest, temperature)) * kMassUnit + 0.5);
  }
};

// Radix search, a byte of the key a pass, from the highest.
template <bool kByMass>
CINNABAR_DEVICE Stop Walk(const Row& row, uint64_t limit, uint32_t rank, SelectShared* shared) {
  Stop stop = {0, 0, 0, 0, 0};
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = ThreadIndex(); bin < 256; bin += kSelectThreads) {
      shared->counts[bin] = 0;
      shared->masses[bin] = 0;
    }
    BlockBarrier();
    for (int id = ThreadIndex(); id < row.vocabulary; id += kSelectThreads) {
      const float logit = row.l[id];
      if (logit == -kInfinityF) continue;
      const uint32_t key = OrderedKey(logit);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      const uint32_t bin = key >> shift & 0xFFU;
      AtomicAdd(shared->counts + bin, 1U);
      AtomicAdd(shared->masses + bin, row.Mass(logit));
    }
    BlockBarrier();
    if (ThreadIndex() == 0) {
      uint64_t mass = stop.mass_above;
      uint32_t count = stop.count_above;
      int bin = 255;
      for (; bin >= 0; --bin) {
        if (kByMass ? mass + shared->masses[bin] > limit : count + shared->counts[bin] > rank)
          break;
        mass += shared->masses[bin];
        count += shared->counts[bin];
      }
      shared->bin = bin;
      shared->mass_above = mass;
      shared->count_above = count;
      shared->mass_at = bin < 0 ? 0 : shared->masses[bin];
      shared->count_at = bin < 0 ? 0 : shared->counts[bin];
    }
    BlockBarrier();
    stop.mass_above = shared->mass_above;
    stop.count_above = shared->count_above;
    stop.mass_at = shared->mass_at;
    stop.count_at = shared->count_at;
    const int bin = shared->bin;
    BlockBarrier();
    if (bin < 0) return stop;
    prefix = prefix << 8 | static_cast<uint32_t>(bin);
  }
  stop.key = prefix;
  return stop;
}

CINNABAR_DEVICE bool IsPickable(const SelectTask& task, const DeviceQuery& query, int id) {
  if (id >= query.num_pickable) return false;
  for (int r = 0; r < query.num_rules; ++r) {
    const DeviceRule rule = task.rules[query.rules_begin + r];
    if (rule.id == id) return rule.pickable != 0;
  }
  return true;
}

CINNABAR_DEVICE bool IsCounted(const SelectTask& task, const DeviceQuery& query, int id) {
  for (int r = 0; r < query.num_rules; ++r) {
    const DeviceRule rule = task.rules[query.rules_begin + r];
    if (rule.id == id) return rule.counted != 0;
  }
  return true;
}

// Totals over the ids for which kept(id) holds and l is above -inf.
template <typename Kept>
CINNABAR_DEVICE Totals SumRow(const Row& row, const Kept& kept, SelectShared* shared) {
  Totals totals = {-kInfinityF, -kInfinityF, 0.0, 0.0};
  for (int id = ThreadIndex(); id < row.vocabulary; id += kSelectThreads) {
    if (kept(id)) totals.largest = fmaxf(totals.largest, row.l[id]);
  }
  totals.largest = BlockMax(totals.largest, shared->floats);
  if (totals.largest == -kInfinityF) return totals;
  int first = kNoId;
  for (int id = ThreadIndex(); id < row.vocabulary && first == kNoId; id += kSelectThreads) {
    if (kept(id) && row.l[id] == totals.largest) first = id;
  }
  first = -BlockMax(-first, shared->ints);
  for (int id = ThreadIndex(); id < row.vocabulary; id += kSelectThreads) {
    if (id == first || !kept(id) || row.l[id] == -kInfinityF) continue;
    totals.second = fmaxf(totals.second, row.l[id]);
    const double d = Exponent(row.l[id], totals.largest, row.temperature);
    const double e = exp(d);
    totals.rest += e;
    if (e > 0.0) totals.slope += d * e;
  }
  totals.second = BlockMax(totals.second, shared->floats);
  totals.rest = BlockSum(totals.rest, shared->sums);
  totals.slope = BlockSum(totals.slope, shared->sums);
  return totals;
}

// SEDD's step on the uniform graph: see PickRule::kUniformTweedie. The largest ln weight + g is the
// largest weight / e of exponential numbers e = -ln u.
CINNABAR_DEVICE Best PickTweedie(const SelectTask& task, const DeviceQuery& query, const float* l,
                                 SelectShared* shared) {
  const double n = task.vocabulary;
  const double q = exp(-static_cast<double>(query.sigma_step));
  const double one_minus_q = -expm1(-static_cast<double>(query.sigma_step));
  const double move = one_minus_q / n;
  const double stay = 1.0 - (n - 1.0) * one_minus_q / n;
  double sum = 0.0;
  for (int id = ThreadIndex(); id < task.vocabulary; id += kSelectThreads) {
    sum += id == query.own_token ? 1.0 : exp(static_cast<double>(l[id]));
  }
  sum = BlockSum(sum, shared->sums);
  const double shift = -one_minus_q / (n * q) * sum;
  double best_ratio = 0.0;
  int best_id = kNoId;
  for (int id = ThreadIndex(); id < task.vocabulary; id += kSelectThreads) {
    const bool own = id == query.own_token;
    const double s = own ? 1.0 : exp(static_cast<double>(l[id]));
    const double weight = (shift + s / q) * (own ? stay : move);
    if (!(weight > 0.0)) continue;
    const uint32_t word = WordOf(NoiseBlock(query, static_cast<uint32_t>(id) / 4), id % 4);
    const double one_minus_u = 1.0 - UniformFromWord(word);
    const double ratio = weight / -log1p(-one_minus_u);
    if (!(ratio > best_ratio) || !IsPickable(task, query, id)) continue;
    best_ratio = ratio;
    best_id = id;
  }
  const double winner = BlockMax(best_ratio, shared->sums);
  const int id =
      -BlockMax(best_id != kNoId && best_ratio == winner ? -best_id : -kNoId, shared->ints);
  return {0.0F, id == kNoId ? 0.0F : l[id], id};
}

// A block a query; its logits lie in the second-level cache, for another kernel has just written
// them. Some twelve passes over them; double exponentials.
CINNABAR_KERNEL(kSelectThreads, 1)
SelectKernel(SelectTask task) {
  auto* shared = reinterpret_cast<SelectShared*>(SharedBytes());
  const DeviceQuery query = task.queries[BlockX()];
  float* l = task.logits + query.slot * task.stride;
  if (query.guided != 0) {
    const float* unconditional = l + task.stride;
    for (int id = ThreadIndex(); id < task.vocabulary; id += kSelectThreads) {
      const float u = unconditional[id];
      l[id] = fmaf(query.guidance, l[id] - u, u);
    }
    BlockBarrier();
  }
  if (ThreadIndex() < query.num_rules) {
    const DeviceRule rule = task.rules[query.rules_begin + ThreadIndex()];
    l[rule.id] += rule.bias;
  }
  BlockBarrier();
  int bad = 0;
  for (int id = ThreadIndex(); id < task.vocabulary; id += kSelectThreads) {
    if (!(l[id] < kInfinityF)) bad = 1;
  }
  if (BlockMax(bad, shared->ints) != 0) {
    if (ThreadIndex() == 0) {
      task.answers[BlockX()] = {};
      task.answers[BlockX()].token = -1;
    }
    return;
  }
  Row row = {l, task.vocabulary, 0.0F, query.temperature};
  if (query.pick == Pick::kTweedie) {
    const Totals totals = SumRow(
        row, [&](int id) { return IsCounted(task, query, id); }, shared);
    const Best best = PickTweedie(task, query, l, shared);
    Best top = {0.0F, 0.0F, kNoId};
    for (int id = ThreadIndex(); query.want_top != 0 && id < task.vocabulary;
         id += kSelectThreads) {
      if (l[id] > -kInfinityF && IsPickable(task, query, id)) Take(top, {l[id], l[id], id});
    }
    top = BlockBest(top, shared->best);
    if (ThreadIndex() == 0) task.answers[BlockX()] = AnswerFrom(totals, best, top, query);
    return;
  }

  // An id that is not counted is in no kept set.
  if (ThreadIndex() < query.num_rules) {
    const DeviceRule rule = task.rules[query.rules_begin + ThreadIndex()];
    if (rule.counted == 0) l[rule.id] = -kInfinityF;
  }
  BlockBarrier();
  const Totals all = SumRow(
      row, [](int) { return true; }, shared);
  if (all.largest == -kInfinityF) {
    if (ThreadIndex() == 0) {
      task.answers[BlockX()] = AnswerFrom(all, {0.0F, 0.0F, kNoId}, {0.0F, 0.0F, kNoId}, query);
    }
    return;
  }
  row.largest = all.largest;

  // Kept: ids with a larger key than `threshold`, and the first `ties` of those at it.
  uint32_t threshold = 0;
  uint32_t ties = 0xFFFFFFFFU;
  uint64_t kept_mass = 0;
  bool by_k = false;
  if (query.top_k > 0) {
    const Stop stop = Walk<false>(row, 0, static_cast<uint32_t>(query.top_k) - 1, shared);
    threshold = stop.key;
    kept_mass = stop.mass_above + stop.mass_at;
    by_k = true;
  }
  if (query.top_p < 1.0F) {
    uint64_t total = kept_mass;
    if (!by_k || query.top_k_first == 0) {
      total = Walk<true>(row, ~uint64_t{0}, 0, shared).mass_above;
    }
    const auto limit =
        static_cast<uint64_t>(static_cast<double>(query.top_p) * static_cast<double>(total));
    const Stop stop = Walk<true>(row, limit, 0, shared);
    if (stop.key >= threshold && stop.key != 0) {
      // At least the first of the ties has no more than the limit before it.
      const uint64_t each = stop.mass_at / stop.count_at;
      const uint64_t more = (limit - stop.mass_above) / each;
      // Inside of the limit alone there may be none of them; the largest id stays all the same.
      const bool largest = stop.mass_above == 0;
      const uint64_t kept_ties =
          query.top_p_inside == 0 || (largest && more == 0) ? more + 1 : more;
      const uint32_t last = threshold;  // of top_k
      threshold = kept_ties > 0 ? stop.key : stop.key + 1;
      ties = kept_ties > 0 && kept_ties < stop.count_at ? static_cast<uint32_t>(kept_ties)
                                                        : 0xFFFFFFFFU;
      if (query.two_at_least != 0 && largest && kept_ties == 1) {
        const Stop second = Walk<false>(row, 0, 1, shared);
        if (second.key >= last && second.key != 0) {
          const uint32_t wanted = 2 - second.count_above;
          threshold = second.key;
          ties = wanted < second.count_at ? wanted : 0xFFFFFFFFU;
        }
      }
    }
  }
  int32_t cutoff = kNoId;
  if (ties != 0xFFFFFFFFU) {
    // The id of the last tie that is kept: ids in order, a block's width at a time.
    uint32_t seen = 0;
    for (int begin = 0; begin < task.vocabulary; begin += kSelectThreads) {
      const int id = begin + ThreadIndex();
      const bool at = id < task.vocabulary && l[id] > -kInfinityF && OrderedKey(l[id]) == threshold;
      const uint32_t votes = Ballot(at);
      if (ThreadIndex() % 32 == 0) shared->ints[ThreadIndex() / 32] = CountBits(votes);
      BlockBarrier();
      uint32_t before = seen;
      for (int warp = 0; warp < kSelectThreads / 32; ++warp) {
        if (warp < ThreadIndex() / 32) before += static_cast<uint32_t>(shared->ints[warp]);
        seen += static_cast<uint32_t>(shared->ints[warp]);
      }
      before += static_cast<uint32_t>(CountBits(votes & ((1U << (ThreadIndex() % 32)) - 1U)));
      if (at && before == ties - 1) shared->cutoff = id;
      BlockBarrier();
      if (seen >= ties) break;
    }
    cutoff = shared->cutoff;
  }
  const auto kept = [&](int id) {
    const float logit = l[id];
    if (logit == -kInfinityF) return false;
    const uint32_t key = OrderedKey(logit);
    return key > threshold || (key == threshold && id <= cutoff);
  };
  const Totals totals = SumRow(row, kept, shared);
  Best best = {0.0F, 0.0F, kNoId};
  for (int id = ThreadIndex(); id < task.vocabulary; id += kSelectThreads) {
    if (!kept(id) || !IsPickable(task, query, id)) continue;
    float score = l[id];
    if (query.pick == Pick::kGumbel) {
      const uint32_t word = WordOf(NoiseBlock(query, static_cast<uint32_t>(id) / 4), id % 4);
      score = fmaf(l[id], query.pick_scale, Gumbel(word));
    }
    Take(best, {score, l[id], id});
  }
  best = BlockBest(best, shared->best);
  if (ThreadIndex() == 0) {
    DeviceAnswer answer = AnswerFrom(totals, best, {0.0F, 0.0F, kNoId}, query);
    // Of every counted id, kept or not.
    answer.log_sum_exp =
        static_cast<double>(all.largest) / static_cast<double>(query.temperature) + log1p(all.rest);
    task.answers[BlockX()] = answer;
  }
}

template <class Product>
int LaunchChunks(const VocabularyTask& task, void* stream) {
  return Launch(
      VocabularyKernel<Product>,
      {(task.num_slots + Product::kRows - 1) / Product::kRows,
       (task.weight.rows + kVocabularyChunk - 1) / kVocabularyChunk, 1, Product::kThreads,
       task.weight.num_segments > 1 ? Product::kFoldBytes : Product::kSharedBytes, stream},
      task);
}

template <bool kFold, bool kFp8>
int LaunchTensorChunks(const VocabularyTask& task, void* stream) {
  if (task.tile_rows == 32) {
    return LaunchChunks<TensorProduct<128, 32, 4, 1, 3, kFold, kFp8>>(task, stream);
  }
  if constexpr (!kFp8) {
    return LaunchChunks<TensorProduct<128, 128, 4, 2, 3, kFold, false>>(task, stream);
  }
  return 1;  // cudaErrorInvalidValue: the planner gives none such
}

template <bool kFold>
int LaunchBlockChunks(const VocabularyTask& task, void* stream) {
  if (task.tile_rows == 32) {
    return LaunchChunks<BlockProduct<128, 32, 4, 1, 3, kFold>>(task, stream);
  }
  return LaunchChunks<BlockProduct<128, 128, 4, 2, 3, kFold>>(task, stream);
}

template <bool kFp8>
int LaunchHopperChunks(const VocabularyTask& task, void* stream) {
  return task.tile_rows == 32 ? LaunchChunks<HopperProduct<32, kFp8>>(task, stream)
                              : LaunchChunks<HopperProduct<128, kFp8>>(task, stream);
}

}  // namespace

int LaunchVocabulary(const VocabularyTask& task, void* stream) {
  const bool fold = task.weight.num_segments > 1;
  int error = 0;
  if (task.weight.segment_bytes == 0) {
    error = LaunchChunks<PlainProduct>(task, stream);
  } else if (IsBlocks(task.weight.element)) {
    error = fold ? LaunchBlockChunks<true>(task, stream) : LaunchBlockChunks<false>(task, stream);
  } else if (task.weight.tiled) {
    error = task.hidden.element == Element::kE4m3 ? LaunchHopperChunks<true>(task, stream)
                                                  : LaunchHopperChunks<false>(task, stream);
  } else if (task.hidden.element == Element::kE4m3) {
    error = fold ? LaunchTensorChunks<true, true>(task, stream)
                 : LaunchTensorChunks<false, true>(task, stream);
  } else {
    error = fold ? LaunchTensorChunks<true, false>(task, stream)
                 : LaunchTensorChunks<false, false>(task, stream);
  }
  if (error != 0) return error;
  constexpr int kQueries = kMergeThreads / 32;
  return Launch(MergeSummariesKernel,
                {(task.num_queries + kQueries - 1) / kQueries, 1, 1, kMergeThreads, 0, stream},
                task);
}

int LaunchSelect(const SelectTask& task, void* stream) {
  return Launch(
      SelectKernel,
      {task.num_queries, 1, 1, kSelectThreads, static_cast<int64_t>(sizeof(SelectShared)), stream},
      task);
}

}  // namespace cinnabar::cuda
