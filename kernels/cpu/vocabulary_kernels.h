// What vocabulary.cc hands to the per-ISA code of the vocabulary head, and what it gets back. Plain
// structs and raw pointers only: this header is compiled once per instruction set.
#ifndef CINNABAR_KERNELS_CPU_VOCABULARY_KERNELS_H_
#define CINNABAR_KERNELS_CPU_VOCABULARY_KERNELS_H_

#include <cstdint>

#include "common/base/philox.h"

namespace cinnabar::cpu {

// Ids of one chunk: the unit of partial sums. Part of the numerics (a chunk's sums run in float32,
// chunks are merged in double), so the same for every shape, thread count and instruction set. A
// multiple of 64 (one block of noise) and of the panel width.
inline constexpr int32_t kVocabularyChunk = 256;

// VocabularyRule without its absl neighbours.
struct ChunkRule {
  int32_t id;
  float bias;
  bool counted;
  bool pickable;
};

// An id that may survive the filters of its row, as one number: ascending keys are descending
// logits, and equal logits ascending ids. The logit's bits are made to order like integers, then
// inverted.
using Candidate = uint64_t;

inline __attribute__((always_inline)) Candidate MakeCandidate(float logit, int32_t id) {
  const float no_negative_zero = logit + 0.0F;
  uint32_t bits;
  __builtin_memcpy(&bits, &no_negative_zero, sizeof(bits));
  const uint32_t inverted = (bits >> 31) != 0 ? bits : bits ^ 0x7FFFFFFFU;
  return static_cast<uint64_t>(inverted) << 32 | static_cast<uint32_t>(id);
}
inline __attribute__((always_inline)) float LogitOf(Candidate candidate) {
  const uint32_t inverted = static_cast<uint32_t>(candidate >> 32);
  const uint32_t bits = (inverted >> 31) != 0 ? inverted : inverted ^ 0x7FFFFFFFU;
  float logit;
  __builtin_memcpy(&logit, &bits, sizeof(logit));
  return logit;
}
inline __attribute__((always_inline)) int32_t IdOf(Candidate candidate) {
  return static_cast<int32_t>(candidate & 0xFFFFFFFFU);
}

enum class ChunkPick : uint8_t { kNone, kArgmax, kGumbel };

// One row of one chunk, still to be summarised.
struct ChunkTask {
  float* logits;               // [kVocabularyChunk], 64-byte aligned; overwritten
  const float* unconditional;  // the same of the unconditional row, or null
  float guidance;              // guidance_scale + 1
  const float* bias;           // of first_id on, or null
  float logit_cap;             // 0: none; else there is neither bias nor unconditional row
  int32_t first_id;            // multiple of kVocabularyChunk
  int32_t num_ids;             // 1 .. kVocabularyChunk
  const ChunkRule* rules;      // those of this chunk
  int32_t num_rules;
  float statistics_scale;  // log2(e) / statistics_temperature
  ChunkPick pick;
  int32_t num_pickable;  // ids at or beyond first_id + num_pickable are not picked
  float pick_scale;      // 1 / pick_temperature
  bool want_top;         // the largest pickable logit, beside the pick
  NoiseKey noise;
  float pick_floor;       // a score this row has already reached: lower ones need not be found
  Candidate* candidates;  // room for kVocabularyChunk more; null: no filter
  float candidate_floor;  // logits <= this are no candidates
};

// The partial result of one row over one chunk. Exponents are d = (l - largest) * statistics_scale,
// in units of log 2.
struct ChunkSummary {
  float largest;      // counted logits; -inf when there is none
  float second;       // equal to `largest` when that is reached twice
  float num_largest;  // ids at `largest`; their exp is exactly 1, and stays out of `tail`
  float tail;         // sum of 2^d over the other counted ids
  float slope;        // sum of d 2^d over them
  float score;        // of the pick, when it is not below pick_floor
  float pick_logit;
  int32_t pick_id;  // -1: none, or none that could win
  float top_logit;
  int32_t top_id;  // -1: none, or not wanted
  int32_t num_candidates;
  bool finite;  // false: NaN or +inf; all else is undefined
};

// The per-ISA functions; one table an instruction set.
struct VocabularyKernels {
  void (*summarise)(const ChunkTask& task, ChunkSummary* summary);
  // First step of `summarise` alone: guidance and bias, in place.
  void (*combine)(float* logits, const float* unconditional, float guidance, const float* bias,
                  int32_t num_ids);
  // logits[i] = cap * tanh(logits[i] / cap), i < count
  void (*soft_cap)(float* logits, float cap, int64_t count);
  // In place: logits[i] = 2^((logits[i] - largest) * scale), 0 where that is below 2^-126; their
  // sum.
  float (*exponentials)(float* logits, float largest, float scale, int32_t count);
  // Words `64 * block .. 64 * block + 63` of (key, kToken), and their Gumbel numbers.
  void (*noise_words)(const NoiseKey& key, uint32_t block, uint32_t* words);
  void (*gumbel)(const uint32_t* words, float* numbers);  // 16 of each
  // What `summarise` takes for a bound of `gumbel`; here for the tests.
  void (*gumbel_bound)(const uint32_t* words, float* bounds);  // 16 of each
};

// The AVX tables are there on x86-64 only, and may only be called where the processor has them.
extern const VocabularyKernels kVocabularyAvx512;
extern const VocabularyKernels kVocabularyAvx2;
extern const VocabularyKernels kVocabularyGeneric;

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_VOCABULARY_KERNELS_H_
