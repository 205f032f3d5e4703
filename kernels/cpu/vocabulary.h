// The fused vocabulary head of the CPU backend: one pass over the weight answers every query, and no more
// than kVocabularyChunk logits of a strip of rows exist at a time.
#ifndef CINNABAR_KERNELS_CPU_VOCABULARY_H_
#define CINNABAR_KERNELS_CPU_VOCABULARY_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "kernels/backend.h"
// PRIMITIVES

namespace cinnabar::cpu {

// Scratch of AnswerVocabularyCpu, taken once.
class VocabularyWorkspace {
 public:
  VocabularyWorkspace();
  ~VocabularyWorkspace();

  // What Reserve(shape, num_threads) takes.
  static int64_t Bytes(const WorkspaceShape& shape, int32_t num_threads);
  // ResourceExhausted when the memory cannot be had. Keeps what it has when that is enough.
  absl::Status Reserve(const WorkspaceShape& shape, int32_t num_threads);

  struct Arrays;  // vocabulary.cc
  const Arrays& arrays() const { return *arrays_; }

 private:
  std::unique_ptr<Arrays> arrays_;
};

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_VOCABULARY_H_
