// Counter-based randomness: the only source of random numbers in decoding. A draw is a pure
// function of (seed, stream, position, step, index), so it does not matter in which order, on which
// thread, in which batch or on which backend it is made; a resumed sequence draws the same numbers.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the
// constants and the round count of the Random123 library). Header-only and free of the standard
// library's templates, so that CUDA and the per-ISA kernel files include it.
#ifndef CINNABAR_COMMON_BASE_PHILOX_H_
#define CINNABAR_COMMON_BASE_PHILOX_H_

#include <cstdint>

#ifdef __CUDACC__
#define CINNABAR_HOST_DEVICE __host__ __device__
#else
#define CINNABAR_HOST_DEVICE
#endif

namespace cinnabar {

struct PhiloxWords {
  uint32_t word[4];
};

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53U;
inline constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57U;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9U;
inline constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85U;
inline constexpr int kPhiloxRounds = 10;

CINNABAR_HOST_DEVICE inline PhiloxWords Philox4x32(PhiloxWords counter, uint32_t key0,
                                                   uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// What a draw is for. Streams never share numbers.
enum class NoiseStream : uint32_t {
  kToken = 0,       // Gumbel noise of each vocabulary id: which token
  kTransfer = 1,    // whether, or in which order, a position is transferred
  kConfidence = 2,  // random confidence (remasking `random`)
  kInitial = 3,     // the first canvas of a model without a mask token
  kRenoise = 4,     // what a position of such a model becomes when its token is not kept
};

// Everything that names a draw but its index. `position` is absolute in the sequence; `step` is the
// sequence's denoising step, counted from 0 over its whole life.
struct NoiseKey {
  uint64_t seed = 0;
  uint32_t position = 0;
  uint32_t step = 0;
};

// Random word `index` of (key, stream): word index % 4 of the Philox block with the counter
// (index / 4, position, step, stream) and the key (low, high half of the seed).
CINNABAR_HOST_DEVICE inline uint32_t NoiseWord(const NoiseKey& key, NoiseStream stream,
                                               uint32_t index) {
  const PhiloxWords words =
      Philox4x32({{index / 4, key.position, key.step, static_cast<uint32_t>(stream)}},
                 static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  return words.word[index % 4];
}

// A uniform number in (0, 1), never 0 nor 1: (word + 0.5) / 2^32, exact in double.
CINNABAR_HOST_DEVICE inline double UniformFromWord(uint32_t word) {
  return (static_cast<double>(word) + 0.5) * (1.0 / 4294967296.0);
}

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_BASE_PHILOX_H_
