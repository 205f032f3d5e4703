#include "kernels/cpu/vocabulary.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "common/base/check.h"

namespace cinnabar::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLog2E = 1.44269504088896340735992468100;

// Candidates that one thread keeps of one row: when 2 * keep are exceeded, the `keep` largest stay.
// Enough for the nuclei of trained models; a wider one costs its row a second product.
constexpr int32_t kKeepMax = 256;
constexpr int32_t kCandidateRoom = 2 * kKeepMax + kVocabularyChunk;
// Rows that share one reading of the weight. Past this the product is bound by arithmetic, and the
// partial results (per row and chunk) would only grow.
constexpr int32_t kGroupRows = 256;
// Workers of the last stage; each may need room for a whole row of candidates.
constexpr int32_t kFinishersMax = 8;

int32_t GroupRows(const WorkspaceShape& shape, int32_t num_threads) {
  // The candidates are kept per thread and row: many threads share fewer rows.
  const int64_t rows = std::clamp<int64_t>(4096 / num_threads, 32, kGroupRows);
  return static_cast<int32_t>(std::clamp<int64_t>(shape.queries_max, 1, rows));
}

int32_t NumChunks(int64_t vocabulary) {
  return static_cast<int32_t>((vocabulary + kVocabularyChunk - 1) / kVocabularyChunk);
}

// What the threads tell each other about a row while the chunks pass. Both only rise, and say no
// more than what any thread has already made sure of, so it does not matter who reads them when.
struct RowFloors {
  std::atomic<float> pick = kNegativeInfinity;  // a score that was reached
  std::atomic<float> dropped =
      kNegativeInfinity;  // no logit above this was dropped from the candidates
};

void RaiseTo(std::atomic<float>& floor, float value) {
  float seen = floor.load(std::memory_order_relaxed);
  while (seen < value && !floor.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

// Rows that are held whole at a time: enough to be bound by arithmetic, within 16 MiB.
int32_t WholeRows(const WorkspaceShape& shape) {
  const int64_t row_bytes = int64_t{NumChunks(shape.vocabulary)} * kVocabularyChunk * 4;
  return std::clamp(static_cast<int32_t>((int64_t{16} << 20) / row_bytes), 6, 48);
}

// A run of queries whose rows (one each, two with guidance) are multiplied together: at most
// kBandRows.
struct Band {
  int32_t query_begin = 0;
  int32_t query_end = 0;
  int32_t slot_begin = 0;
  int32_t slot_end = 0;
};

// One query of the group, in the terms of the chunks.
struct RowPlan {
  int32_t slot = 0;  // of its row in x; the unconditional row is next
  int32_t num_rules = 0;
  ChunkPick pick = ChunkPick::kNone;  // kNone: made in the last stage
  bool filtered = false;
  int32_t keep = 0;        // candidates wanted; 0: none are collected
  bool whole_row = false;  // the answer needs all its logits at once
  float statistics_scale = 0.0F;
  float pick_scale = 0.0F;
};

// Totals of one row over the counted ids; exponents relative to `largest`.
struct RowTotals {
  bool finite = true;
  float largest = kNegativeInfinity;
  float second = kNegativeInfinity;
  double rest = 0.0;   // sum of exp(d) without the first id at d = 0: the mass is 1 + rest
  double slope = 0.0;  // sum of d exp(d)
};

struct Arrays {
  int32_t* slots = nullptr;           // [2 * group rows]: the hidden row of each slot
  float* x = nullptr;                 // [2 * group rows, cols]: slots, packed by band
  Band* bands = nullptr;              // [group rows]
  RowPlan* plans = nullptr;           // [group rows]
  RowTotals* totals = nullptr;        // [group rows]
  ChunkRule* rules = nullptr;         // [group rows, kVocabularyRulesMax], by id
  ChunkSummary* summaries = nullptr;  // [group rows, chunks]
  RowFloors* floors = nullptr;        // [group rows]
  int32_t* counts = nullptr;          // [threads, group rows]: candidates held
  Candidate* candidates = nullptr;    // [threads, group rows, kCandidateRoom]
  float* tiles = nullptr;             // [threads, kBandRows, kVocabularyChunk]
  int32_t* whole_rows = nullptr;      // [group rows]: queries that need whole rows
  float* whole_logits = nullptr;      // [WholeRows(), chunks * kVocabularyChunk]
  Candidate* sorted = nullptr;        // [finishers, vocabulary]
  int64_t size_bytes = 0;
};

// Lays the arrays out from `memory` on; with null only the size is meant.
Arrays LayOut(std::byte* memory, const WorkspaceShape& shape, int32_t num_threads) {
  Arrays arrays;
  auto take = [&](auto*& array, int64_t count) {
    using Element = std::remove_reference_t<decltype(*array)>;
    if (memory != nullptr) array = reinterpret_cast<Element*>(memory + arrays.size_bytes);
    arrays.size_bytes += (count * static_cast<int64_t>(sizeof(Element)) + 63) / 64 * 64;
  };
  const int64_t rows = GroupRows(shape, num_threads);
  const int64_t chunks = NumChunks(shape.vocabulary);
  take(arrays.slots, 2 * rows);
  take(arrays.x, std::max<int64_t>(2 * rows, WholeRows(shape)) * shape.cols_max);
  take(arrays.bands, rows);
  take(arrays.plans, rows);
  take(arrays.totals, rows);
  take(arrays.rules, rows * kVocabularyRulesMax);
  take(arrays.summaries, rows * chunks);
  take(arrays.floors, rows);
  take(arrays.counts, num_threads * rows);
  take(arrays.candidates, num_threads * rows * kCandidateRoom);
  take(arrays.tiles, int64_t{num_threads} * kBandRows * kVocabularyChunk);
  take(arrays.whole_rows, rows);
  take(arrays.whole_logits, WholeRows(shape) * chunks * kVocabularyChunk);
  take(arrays.sorted, std::min(num_threads, kFinishersMax) * shape.vocabulary);
  return arrays;
}

bool IsPickable(const VocabularyQuery& query, absl::Span<const ChunkRule> rules, int32_t id) {
  if (query.pickable_ids > 0 && id >= query.pickable_ids) return false;
  for (const ChunkRule& rule : rules) {
    if (rule.id == id) return rule.pickable;
  }
  return true;
}

// exp of every exponent is taken relative to the largest logit, in double.
double Exponent(float logit, float largest, float temperature) {
  return (static_cast<double>(logit) - static_cast<double>(largest)) /
         static_cast<double>(temperature);
}

// How many of the ids a row's filters keep. `sorted` are the `known` largest of them in order;
// `all` says that there are no others. `mass` is that of every counted id, relative to the largest.
// Returns -1 when the known ones do not decide it. The result does not depend on how many are
// known.
int64_t CountKept(const Candidate* sorted, int64_t known, bool all, const VocabularyQuery& query,
                  double mass) {
  if (known == 0) return all ? 0 : -1;
  const float largest = LogitOf(sorted[0]);
  const bool has_top_p = query.top_p < 1.0F;
  // The first `kept_by_k` survive top_k.
  int64_t kept_by_k = -1;
  if (query.top_k <= 0) {
    if (all) kept_by_k = known;
  } else if (query.top_k <= known) {
    kept_by_k = query.top_k;
    while (kept_by_k < known && LogitOf(sorted[kept_by_k]) == LogitOf(sorted[query.top_k - 1])) {
      ++kept_by_k;
    }
    // An equal one may follow among the unknown.
    if (kept_by_k == known && !all) kept_by_k = -1;
  } else if (all) {
    kept_by_k = known;
  }
  if (!has_top_p) return kept_by_k;
  double total = mass;
  if (query.filter_order == FilterOrder::kTopKThenTopP && query.top_k > 0) {
    if (kept_by_k < 0) return -1;
    total = 0.0;
    for (int64_t rank = 0; rank < kept_by_k; ++rank) {
      total += std::exp(Exponent(LogitOf(sorted[rank]), largest, query.statistics_temperature));
    }
  }
  const double limit = static_cast<double>(query.top_p) * total;
  const int64_t end = kept_by_k < 0 ? known : kept_by_k;
  const int64_t least = query.top_p_rule == TopPRule::kCrossingTwoAtLeast ? 2 : 1;
  double before = 0.0;
  for (int64_t rank = 0; rank < end; ++rank) {
    if (before > limit && rank >= least) return rank;
    before += std::exp(Exponent(LogitOf(sorted[rank]), largest, query.statistics_temperature));
    if (query.top_p_rule == TopPRule::kInside && rank > 0 && before > limit) return rank;
  }
  if (kept_by_k >= 0) return kept_by_k;
  return before > limit ? end : -1;
}

class GroupAnswerer {
 public:
  GroupAnswerer(const VocabularyArgs& args, const VocabularyMachine& machine, const Arrays& arrays,
                int32_t group_rows, int32_t whole_rows, absl::Span<const VocabularyQuery> queries,
                absl::Span<VocabularyAnswer> answers)
      : args_(args),
        machine_(machine),
        arrays_(arrays),
        group_rows_(group_rows),
        whole_rows_(whole_rows),
        queries_(queries),
        answers_(answers),
        vocabulary_(static_cast<int32_t>(args.weight->rows())),
        dim_(args.weight->cols()),
        num_chunks_(NumChunks(vocabulary_)) {}

  void Run() {
    Plan();
    SummariseChunks();
    const int64_t num_finishers = std::min(machine_.num_threads, kFinishersMax);
    machine_.ParallelFor(num_finishers, [&](int64_t finisher, int32_t /*thread*/) {
      for (int64_t row = finisher; row < num_rows(); row += num_finishers) {
        Finish(row, arrays_.sorted + finisher * vocabulary_);
      }
    });
    AnswerWholeRows();
  }

 private:
  int64_t num_rows() const { return static_cast<int64_t>(queries_.size()); }

  absl::Span<const ChunkRule> RulesOf(int64_t row) const {
    return {arrays_.rules + row * kVocabularyRulesMax,
            static_cast<size_t>(arrays_.plans[row].num_rules)};
  }

  // The query's rows become slots `slot` and on; returns how many.
  int32_t TakeSlots(const VocabularyQuery& query, int32_t slot) {
    CINNABAR_CHECK(query.hidden_row >= 0);
    arrays_.slots[slot] = query.hidden_row;
    if (query.unconditional_row < 0) return 1;
    arrays_.slots[slot + 1] = query.unconditional_row;
    return 2;
  }

  void Plan() {
    num_bands_ = 0;
    Band band;
    int32_t slot = 0;
    for (int32_t row = 0; row < num_rows(); ++row) {
      const VocabularyQuery& query = queries_[row];
      CINNABAR_CHECK(query.statistics_temperature > 1e-30F) << query.statistics_temperature;
      CINNABAR_CHECK(query.pick_temperature == 0.0F || query.pick_temperature > 1e-30F);
      CINNABAR_CHECK(query.top_k >= 0 && query.top_p >= 0.0F);
      RowPlan& plan = arrays_.plans[row];
      plan = RowPlan();
      PlanRules(row);
      plan.statistics_scale =
          static_cast<float>(kLog2E / static_cast<double>(query.statistics_temperature));
      plan.filtered = query.top_k > 0 || query.top_p < 1.0F;
      CINNABAR_CHECK(!query.want_top || !plan.filtered) << "want_top does not go with filters";
      CINNABAR_CHECK(args_.logit_cap == 0.0F ||
                     (args_.bias == nullptr && query.unconditional_row < 0))
          << "a cap goes with neither bias nor guidance";
      if (query.pick == PickRule::kUniformTweedie) {
        CINNABAR_CHECK(!plan.filtered) << "a Tweedie step has no filters";
        CINNABAR_CHECK(query.own_token >= 0 && query.own_token < vocabulary_);
        CINNABAR_CHECK(query.sigma_step >= 0.0F);
        plan.whole_row = true;
      } else {
        if (query.pick_temperature > 0.0F) {
          plan.pick_scale = static_cast<float>(1.0 / static_cast<double>(query.pick_temperature));
        }
        if (plan.filtered) {
          plan.keep = query.top_k > 0 ? std::clamp(query.top_k + 16, 64, kKeepMax) : kKeepMax;
        } else {
          plan.pick = query.pick_temperature > 0.0F ? ChunkPick::kGumbel : ChunkPick::kArgmax;
        }
      }
      // A pair must share a band.
      if (slot + (query.unconditional_row >= 0 ? 2 : 1) - band.slot_begin > kBandRows) {
        arrays_.bands[num_bands_++] = band;
        band = {row, row, slot, slot};
      }
      plan.slot = slot;
      slot += TakeSlots(query, slot);
      band.query_end = row + 1;
      band.slot_end = slot;
    }
    arrays_.bands[num_bands_++] = band;
    machine_.ParallelFor(num_bands_, [&](int64_t index, int32_t /*thread*/) {
      const Band& each = arrays_.bands[index];
      PackSlots(each.slot_begin, each.slot_end);
    });
    const int64_t num_states = int64_t{machine_.num_threads} * group_rows_;
    std::fill_n(arrays_.counts, num_states, 0);
    for (int64_t row = 0; row < num_rows(); ++row) new (&arrays_.floors[row]) RowFloors;
  }

  void PackSlots(int32_t begin, int32_t end) {
    machine_.Pack(args_.hidden, absl::MakeConstSpan(arrays_.slots + begin, end - begin),
                  arrays_.x + begin * dim_);
  }

  void PlanRules(int32_t row) {
    const absl::Span<const VocabularyRule> wanted = queries_[row].rules;
    CINNABAR_CHECK(wanted.size() <= kVocabularyRulesMax) << wanted.size() << " rules";
    ChunkRule* rules = arrays_.rules + row * kVocabularyRulesMax;
    for (size_t index = 0; index < wanted.size(); ++index) {
      const VocabularyRule& rule = wanted[index];
      CINNABAR_CHECK(rule.id >= 0 && rule.id < vocabulary_) << "rule for id " << rule.id;
      rules[index] = {rule.id, rule.bias, rule.counted, rule.pickable};
    }
    std::sort(rules, rules + wanted.size(),
              [](const ChunkRule& a, const ChunkRule& b) { return a.id < b.id; });
    for (size_t index = 1; index < wanted.size(); ++index) {
      CINNABAR_CHECK(rules[index - 1].id < rules[index].id) << "two rules for " << rules[index].id;
    }
    arrays_.plans[row].num_rules = static_cast<int32_t>(wanted.size());
  }

  // The one pass over the weight. Chunks are the outer loop: a chunk of the weight stays in the
  // cache while all bands pass. A vocabulary of few chunks is shared out by bands as well.
  void SummariseChunks() {
    const int64_t shares = std::clamp<int64_t>(
        (4 * int64_t{machine_.num_threads} + num_chunks_ - 1) / num_chunks_, 1, num_bands_);
    machine_.ParallelFor(num_chunks_ * shares, [&](int64_t item, int32_t thread) {
      const int32_t chunk = static_cast<int32_t>(item / shares);
      const int64_t share = item % shares;
      for (int64_t band = share * num_bands_ / shares; band < (share + 1) * num_bands_ / shares;
           ++band) {
        SummariseBand(arrays_.bands[band], chunk, thread);
      }
    });
  }

  void SummariseBand(const Band& band, int32_t chunk, int32_t thread) {
    float* tile = arrays_.tiles + int64_t{thread} * kBandRows * kVocabularyChunk;
    const int32_t first_id = chunk * kVocabularyChunk;
    const int32_t num_ids = std::min(vocabulary_ - first_id, kVocabularyChunk);
    machine_.Multiply(arrays_.x + band.slot_begin * dim_, band.slot_end - band.slot_begin, first_id,
                      num_ids, tile, kVocabularyChunk, thread);
    for (int32_t row = band.query_begin; row < band.query_end; ++row) {
      const VocabularyQuery& query = queries_[row];
      const RowPlan& plan = arrays_.plans[row];
      const int64_t state_index = int64_t{thread} * group_rows_ + row;
      float* logits = tile + (plan.slot - band.slot_begin) * kVocabularyChunk;
      ChunkTask task = {};
      task.logits = logits;
      task.unconditional = query.unconditional_row >= 0 ? logits + kVocabularyChunk : nullptr;
      task.guidance = query.guidance_scale + 1.0F;
      task.bias = args_.bias == nullptr ? nullptr : args_.bias + first_id;
      task.logit_cap = args_.logit_cap;
      task.first_id = first_id;
      task.num_ids = num_ids;
      const ChunkRule* rule = arrays_.rules + int64_t{row} * kVocabularyRulesMax;
      const ChunkRule* rules_end = rule + plan.num_rules;
      while (rule != rules_end && rule->id < first_id) ++rule;
      task.rules = rule;
      while (rule != rules_end && rule->id < first_id + num_ids) ++rule;
      task.num_rules = static_cast<int32_t>(rule - task.rules);
      task.statistics_scale = plan.statistics_scale;
      task.pick = plan.pick;
      task.num_pickable =
          query.pickable_ids == 0 ? num_ids : std::max(query.pickable_ids - first_id, 0);
      task.pick_scale = plan.pick_scale;
      task.want_top = query.want_top;
      task.noise = query.noise;
      RowFloors& floors = arrays_.floors[row];
      task.pick_floor = floors.pick.load(std::memory_order_relaxed);
      int32_t& count = arrays_.counts[state_index];
      Candidate* candidates = arrays_.candidates + state_index * kCandidateRoom;
      if (plan.keep > 0) {
        task.candidates = candidates + count;
        task.candidate_floor = floors.dropped.load(std::memory_order_relaxed);
      }
      ChunkSummary& summary = arrays_.summaries[int64_t{row} * num_chunks_ + chunk];
      machine_.kernels->summarise(task, &summary);
      if (summary.pick_id >= 0) RaiseTo(floors.pick, summary.score);
      count += summary.num_candidates;
      if (count > 2 * plan.keep) {
        std::nth_element(candidates, candidates + plan.keep, candidates + count);
        RaiseTo(floors.dropped, LogitOf(candidates[plan.keep]));  // the largest of those that go
        count = plan.keep;
      }
    }
  }

  // Merges the chunks of a row in their order, and answers what does not need the whole row.
  void Finish(int64_t row, Candidate* sorted) {
    const VocabularyQuery& query = queries_[row];
    RowPlan& plan = arrays_.plans[row];
    VocabularyAnswer& answer = answers_[row];
    answer = VocabularyAnswer();
    const ChunkSummary* summaries = arrays_.summaries + row * num_chunks_;
    RowTotals& totals = arrays_.totals[row];
    totals = Merge(summaries, query.statistics_temperature);
    answer.finite = totals.finite;
    if (!totals.finite) {
      plan.whole_row = false;
      return;
    }
    if (totals.largest == kNegativeInfinity) {
      answer.log_sum_exp = -kInfinity;
    } else {
      answer.log_sum_exp = static_cast<double>(totals.largest) / query.statistics_temperature +
                           std::log1p(totals.rest);
    }
    if (plan.filtered) {
      if (!AnswerFromCandidates(row, sorted)) plan.whole_row = true;
      return;
    }
    SetStatistics(totals, query, answer);
    float top = kNegativeInfinity;
    for (int32_t chunk = 0; query.want_top && chunk < num_chunks_; ++chunk) {
      if (summaries[chunk].top_id < 0 || !(summaries[chunk].top_logit > top)) continue;
      top = summaries[chunk].top_logit;
      answer.top_token = summaries[chunk].top_id;
    }
    answer.top_probability = ProbabilityOf(answer.top_token, top, totals, query);
    if (plan.pick == ChunkPick::kNone) return;
    float score = kNegativeInfinity;
    for (int32_t chunk = 0; chunk < num_chunks_; ++chunk) {
      const ChunkSummary& summary = summaries[chunk];
      if (summary.pick_id < 0 || !(summary.score > score)) continue;
      score = summary.score;
      answer.token = summary.pick_id;
      answer.token_logit = summary.pick_logit;
    }
    SetProbability(totals, query, answer);
  }

  RowTotals Merge(const ChunkSummary* summaries, float temperature) const {
    RowTotals totals;
    for (int32_t chunk = 0; chunk < num_chunks_; ++chunk) {
      const ChunkSummary& summary = summaries[chunk];
      totals.finite = totals.finite && summary.finite;
      if (summary.largest > totals.largest) {
        totals.second = std::max(totals.largest, summary.second);
        totals.largest = summary.largest;
      } else {
        totals.second = std::max(totals.second, summary.largest);
      }
    }
    if (!totals.finite || totals.largest == kNegativeInfinity) return totals;
    bool first = true;
    for (int32_t chunk = 0; chunk < num_chunks_; ++chunk) {
      const ChunkSummary& summary = summaries[chunk];
      if (summary.largest == kNegativeInfinity) continue;
      const double d = Exponent(summary.largest, totals.largest, temperature);
      double others = static_cast<double>(summary.num_largest) + static_cast<double>(summary.tail);
      const double mass = others;
      if (d == 0.0 && first) {
        // Leaves the 1 of the largest id out of the sum: next to a one-hot distribution the rest is
        // what the entropy is made of.
        others =
            static_cast<double>(summary.num_largest - 1.0F) + static_cast<double>(summary.tail);
        first = false;
      }
      const double scale = std::exp(d);
      totals.rest += scale * others;
      // exp underflows long before d overflows.
      if (scale > 0.0) {
        totals.slope += scale * (d * mass + kLn2 * static_cast<double>(summary.slope));
      }
    }
    return totals;
  }

  static void SetStatistics(const RowTotals& totals, const VocabularyQuery& query,
                            VocabularyAnswer& answer) {
    if (totals.largest == kNegativeInfinity) return;
    const double mass = 1.0 + totals.rest;
    answer.margin = 1.0 / mass;
    if (totals.second > kNegativeInfinity) {
      answer.margin =
          -std::expm1(Exponent(totals.second, totals.largest, query.statistics_temperature)) / mass;
    }
    answer.entropy = std::max(0.0, std::log1p(totals.rest) - totals.slope / mass);
  }

  static double ProbabilityOf(int32_t token, float logit, const RowTotals& totals,
                              const VocabularyQuery& query) {
    if (token < 0 || totals.largest == kNegativeInfinity) return 0.0;
    const double d = Exponent(logit, totals.largest, query.statistics_temperature);
    return std::min(1.0, std::exp(d) / (1.0 + totals.rest));
  }

  static void SetProbability(const RowTotals& totals, const VocabularyQuery& query,
                             VocabularyAnswer& answer) {
    answer.probability = ProbabilityOf(answer.token, answer.token_logit, totals, query);
  }

  // Filters, statistics and pick from the candidates that the threads have collected; false when
  // they do not decide the filters.
  bool AnswerFromCandidates(int64_t row, Candidate* sorted) {
    const float dropped = arrays_.floors[row].dropped.load(std::memory_order_relaxed);
    // Above `dropped` nothing is missing; what lies below is of no use.
    int64_t known = 0;
    for (int32_t thread = 0; thread < machine_.num_threads; ++thread) {
      const int64_t state_index = int64_t{thread} * group_rows_ + row;
      const Candidate* candidates = arrays_.candidates + state_index * kCandidateRoom;
      for (int32_t index = 0; index < arrays_.counts[state_index]; ++index) {
        if (LogitOf(candidates[index]) > dropped) sorted[known++] = candidates[index];
      }
    }
    std::sort(sorted, sorted + known);
    const bool all = dropped == kNegativeInfinity;
    const int64_t kept =
        CountKept(sorted, known, all, queries_[row], 1.0 + arrays_.totals[row].rest);
    if (kept < 0) return false;
    AnswerFromKept(row, {sorted, static_cast<size_t>(kept)});
    return true;
  }

  void AnswerFromKept(int64_t row, absl::Span<const Candidate> kept) {
    if (kept.empty()) return;
    const VocabularyQuery& query = queries_[row];
    VocabularyAnswer& answer = answers_[row];
    RowTotals totals;
    totals.largest = LogitOf(kept[0]);
    if (kept.size() > 1) totals.second = LogitOf(kept[1]);
    for (size_t rank = 1; rank < kept.size(); ++rank) {
      const double d = Exponent(LogitOf(kept[rank]), totals.largest, query.statistics_temperature);
      const double e = std::exp(d);
      totals.rest += e;
      if (e > 0.0) totals.slope += d * e;
    }
    SetStatistics(totals, query, answer);
    const absl::Span<const ChunkRule> rules = RulesOf(row);
    if (query.pick_temperature == 0.0F) {
      for (const Candidate candidate : kept) {
        if (!IsPickable(query, rules, IdOf(candidate))) continue;
        answer.token = IdOf(candidate);
        answer.token_logit = LogitOf(candidate);
        break;
      }
    } else {
      float best = kNegativeInfinity;
      for (size_t begin = 0; begin < kept.size(); begin += 16) {
        const size_t count = std::min<size_t>(16, kept.size() - begin);
        alignas(64) uint32_t words[16] = {};
        alignas(64) float noise[16];
        for (size_t index = 0; index < count; ++index) {
          words[index] = NoiseWord(query.noise, NoiseStream::kToken,
                                   static_cast<uint32_t>(IdOf(kept[begin + index])));
        }
        machine_.kernels->gumbel(words, noise);
        for (size_t index = 0; index < count; ++index) {
          const int32_t id = IdOf(kept[begin + index]);
          const float logit = LogitOf(kept[begin + index]);
          const float score = std::fma(logit, arrays_.plans[row].pick_scale, noise[index]);
          if (score < best || (score == best && id > answer.token)) continue;
          if (!IsPickable(query, rules, id)) continue;
          best = score;
          answer.token = id;
          answer.token_logit = logit;
        }
      }
    }
    SetProbability(totals, query, answer);
  }

  // --- Whole rows ---

  void AnswerWholeRows() {
    int32_t num_whole = 0;
    for (int32_t row = 0; row < num_rows(); ++row) {
      if (arrays_.plans[row].whole_row) arrays_.whole_rows[num_whole++] = row;
    }
    for (int32_t begin = 0; begin < num_whole;) {
      // In the place of the group's rows in x: nobody reads those any more.
      int32_t end = begin;
      int32_t slots = 0;
      for (; end < num_whole; ++end) {
        const int32_t row = arrays_.whole_rows[end];
        if (slots + (queries_[row].unconditional_row >= 0 ? 2 : 1) > whole_rows_) break;
        arrays_.plans[row].slot = slots;
        slots += TakeSlots(queries_[row], slots);
      }
      PackSlots(0, slots);
      const int64_t stride = int64_t{num_chunks_} * kVocabularyChunk;
      machine_.ParallelFor(num_chunks_, [&](int64_t chunk, int32_t thread) {
        const int32_t first_id = static_cast<int32_t>(chunk) * kVocabularyChunk;
        const int32_t num_ids = std::min(vocabulary_ - first_id, kVocabularyChunk);
        machine_.Multiply(arrays_.x, slots, first_id, num_ids, arrays_.whole_logits + first_id,
                          stride, thread);
      });
      const int64_t num_finishers = std::min(machine_.num_threads, kFinishersMax);
      machine_.ParallelFor(num_finishers, [&](int64_t finisher, int32_t /*thread*/) {
        for (int64_t index = begin + finisher; index < end; index += num_finishers) {
          AnswerWholeRow(arrays_.whole_rows[index], arrays_.sorted + finisher * vocabulary_);
        }
      });
      begin = end;
    }
  }

  void AnswerWholeRow(int64_t row, Candidate* sorted) {
    const VocabularyQuery& query = queries_[row];
    const int64_t stride = int64_t{num_chunks_} * kVocabularyChunk;
    float* logits = arrays_.whole_logits + arrays_.plans[row].slot * stride;
    if (args_.logit_cap > 0.0F) machine_.kernels->soft_cap(logits, args_.logit_cap, vocabulary_);
    machine_.kernels->combine(logits, query.unconditional_row >= 0 ? logits + stride : nullptr,
                              query.guidance_scale + 1.0F, args_.bias, vocabulary_);
    for (const ChunkRule& rule : RulesOf(row)) logits[rule.id] += rule.bias;
    if (query.pick == PickRule::kUniformTweedie) {
      PickTweedie(row, logits);
      return;
    }
    for (const ChunkRule& rule : RulesOf(row)) {
      if (!rule.counted) logits[rule.id] = kNegativeInfinity;
    }
    int64_t count = 0;
    for (int32_t id = 0; id < vocabulary_; ++id) {
      if (logits[id] > kNegativeInfinity) sorted[count++] = MakeCandidate(logits[id], id);
    }
    // Sorts no more than the filters ask for.
    int64_t known = 0;
    int64_t kept = -1;
    for (int64_t wanted = 2048; kept < 0; wanted *= 8) {
      const int64_t next = std::min(wanted, count);
      if (next < count) std::nth_element(sorted + known, sorted + next, sorted + count);
      std::sort(sorted + known, sorted + next);
      known = next;
      kept = CountKept(sorted, known, known == count, query, 1.0 + arrays_.totals[row].rest);
    }
    AnswerFromKept(row, {sorted, static_cast<size_t>(kept)});
  }

  // See PickRule::kUniformTweedie. `logits` holds l of every id. In double, for the weights are
  // differences of nearly equal numbers where a token is unlikely. The largest ln weight + g is the
  // largest weight / e of exponential numbers e = -ln u, and e >= 1 - u spares most ids their
  // logarithm.
  void PickTweedie(int64_t row, const float* logits) {
    const VocabularyQuery& query = queries_[row];
    VocabularyAnswer& answer = answers_[row];
    const double n = vocabulary_;
    const double q = std::exp(-static_cast<double>(query.sigma_step));
    const double one_minus_q = -std::expm1(-static_cast<double>(query.sigma_step));
    const double move = one_minus_q / n;
    const double stay = 1.0 - (n - 1.0) * one_minus_q / n;
    double sum = 1.0;
    for (int32_t id = 0; id < vocabulary_; ++id) {
      if (id != query.own_token) sum += std::exp(static_cast<double>(logits[id]));
    }
    const double shift = -one_minus_q / (n * q) * sum;
    const absl::Span<const ChunkRule> rules = RulesOf(row);
    double best = 0.0;
    uint32_t words[64];
    for (int32_t id = 0; id < vocabulary_; ++id) {
      if (id % 64 == 0) machine_.kernels->noise_words(query.noise, id / 64, words);
      const bool own = id == query.own_token;
      const double s = own ? 1.0 : std::exp(static_cast<double>(logits[id]));
      const double weight = (shift + s / q) * (own ? stay : move);
      const double one_minus_u = 1.0 - UniformFromWord(words[id % 64]);
      if (!(weight > best * one_minus_u)) continue;
      const double ratio = weight / -std::log1p(-one_minus_u);
      if (!(ratio > best) || !IsPickable(query, rules, id)) continue;
      best = ratio;
      answer.token = id;
      answer.token_logit = logits[id];
    }
    SetProbability(arrays_.totals[row], query, answer);
  }

  const VocabularyArgs& args_;
  const VocabularyMachine& machine_;
  const Arrays& arrays_;
  const int32_t group_rows_;
  const int32_t whole_rows_;
  const absl::Span<const VocabularyQuery> queries_;
  const absl::Span<VocabularyAnswer> answers_;
  const int32_t vocabulary_;
  const int64_t dim_;
  const int32_t num_chunks_;
  int32_t num_bands_ = 0;
};

}  // namespace

int64_t VocabularyWorkspace::Bytes(const WorkspaceShape& shape, int32_t num_threads) {
  if (shape.vocabulary == 0 || shape.queries_max == 0) return 0;
  return LayOut(nullptr, shape, num_threads).size_bytes;
}

void VocabularyWorkspace::FreeAligned::operator()(std::byte* memory) const { std::free(memory); }

absl::Status VocabularyWorkspace::Reserve(const WorkspaceShape& shape, int32_t num_threads) {
  WorkspaceShape wanted = shape_;
  wanted.cols_max = std::max(wanted.cols_max, shape.cols_max);
  wanted.vocabulary = std::max(wanted.vocabulary, shape.vocabulary);
  wanted.queries_max = std::max(wanted.queries_max, shape.queries_max);
  const int64_t size_bytes = Bytes(wanted, num_threads);
  if (size_bytes > size_bytes_) {
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(64, static_cast<size_t>(size_bytes)));
    if (memory == nullptr) {
      return absl::ResourceExhaustedError(
          absl::StrCat(size_bytes, " bytes of scratch for the vocabulary head"));
    }
    memory_.reset(memory);
    size_bytes_ = size_bytes;
  }
  shape_ = wanted;
  return absl::OkStatus();
}

void AnswerVocabularyCpu(const VocabularyArgs& args, const VocabularyMachine& machine,
                         const VocabularyWorkspace& workspace) {
  CINNABAR_CHECK(args.answers.size() == args.queries.size());
  if (args.queries.empty()) return;
  const WorkspaceShape& shape = workspace.shape();
  CINNABAR_CHECK(args.weight->rows() >= 1 && args.weight->rows() <= shape.vocabulary);
  CINNABAR_CHECK(args.weight->cols() <= shape.cols_max);
  CINNABAR_CHECK(args.hidden.dtype == DType::kF32);
  const Arrays arrays = LayOut(workspace.memory(), shape, machine.num_threads);
  const int32_t group_rows = GroupRows(shape, machine.num_threads);
  const int32_t whole_rows = WholeRows(shape);
  for (size_t begin = 0; begin < args.queries.size(); begin += group_rows) {
    GroupAnswerer(args, machine, arrays, group_rows, whole_rows,
                  args.queries.subspan(begin, group_rows), args.answers.subspan(begin, group_rows))
        .Run();
  }
}

}  // namespace cinnabar::cpu
