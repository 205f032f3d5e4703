// The fused vocabulary head of the CPU backend: one pass over the weight answers every query of a
// group, and no more than kVocabularyChunk logits of a band of rows exist at a time. Rows whose
// pick cannot be made in passing (wide nuclei, the Tweedie step) are computed once more as whole
// rows, a few at a time.
#ifndef CINNABAR_KERNELS_CPU_VOCABULARY_H_
#define CINNABAR_KERNELS_CPU_VOCABULARY_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/vocabulary_kernels.h"

namespace cinnabar::cpu {

// Rows of one product at most: enough to share one widening of the weight, few enough that their
// logits for a chunk stay in the second-level cache. Whole strips of every instruction set.
inline constexpr int32_t kBandRows = 84;

// What the head needs from the rest of the backend.
class VocabularyMachine {
 public:
  VocabularyMachine(const VocabularyKernels& kernels, int32_t num_threads)
      : kernels(&kernels), num_threads(num_threads) {}
  virtual ~VocabularyMachine() = default;

  // Writes rows `rows` of hidden, at most kBandRows, as Multiply() reads them; `packed` has room
  // for rows.size() x cols floats. From any thread.
  virtual void Pack(const Rows& hidden, absl::Span<const int32_t> rows, float* packed) const = 0;
  // The product of num_rows rows, packed together, with the ids [first_id, first_id + num_ids):
  // out[r * out_stride + i]. first_id is a multiple of kVocabularyChunk, num_ids at most that;
  // `out` has room for num_ids rounded up to 32. A logit's bits depend on its row and id alone.
  // `thread` is the caller's, as ParallelFor() told it.
  virtual void Multiply(const float* packed, int32_t num_rows, int32_t first_id, int32_t num_ids,
                        float* out, int64_t out_stride, int32_t thread) const = 0;
  // Calls body(item, thread) once for each item, thread in [0, num_threads); returns when all are
  // done.
  virtual void ParallelFor(int64_t num_items,
                           absl::FunctionRef<void(int64_t item, int32_t thread)> body) const = 0;

  const VocabularyKernels* const kernels;  // of the backend's instruction set
  const int32_t num_threads;
};

// Scratch of AnswerVocabulary, taken once.
class VocabularyWorkspace {
 public:
  // What Reserve takes; depends on cols_max, vocabulary and queries_max.
  static int64_t Bytes(const WorkspaceShape& shape, int32_t num_threads);
  // ResourceExhausted when the memory cannot be had. A smaller shape than an earlier one changes
  // nothing.
  absl::Status Reserve(const WorkspaceShape& shape, int32_t num_threads);

  struct FreeAligned {
    void operator()(std::byte* memory) const;
  };
  std::byte* memory() const { return memory_.get(); }
  const WorkspaceShape& shape() const { return shape_; }

 private:
  std::unique_ptr<std::byte, FreeAligned> memory_;
  int64_t size_bytes_ = 0;
  WorkspaceShape shape_;
};

// Backend::AnswerVocabulary. The workspace was reserved for this machine's threads and at
// least these shapes.
void AnswerVocabularyCpu(const VocabularyArgs& args, const VocabularyMachine& machine,
                         const VocabularyWorkspace& workspace);

}  // namespace cinnabar::cpu

#endif  // CINNABAR_KERNELS_CPU_VOCABULARY_H_
