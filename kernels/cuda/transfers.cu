// Which answers are taken, before the host has seen them: kernels/backend.h, SelectTransfers. A
// block a sequence; a candidate counts those before it, which is exact in any order, and a few
// thousand candidates are a few microseconds.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/simt.cuh"

namespace cinnabar::cuda {
namespace {

constexpr int kTransferThreads = 256;

CINNABAR_DEVICE double ScoreOf(const DeviceAnswer& answer, Score score) {
  return score == Score::kProbability ? answer.probability
         : score == Score::kMargin    ? answer.margin
                                      : -answer.entropy;
}

CINNABAR_KERNEL(kTransferThreads, 4)
TransferKernel(TransferTask task) {
  double* scores = reinterpret_cast<double*>(SharedBytes());
  const DeviceSelection selection = task.selections[BlockX()];
  const DeviceCandidate* candidates = task.candidates + selection.candidates_begin;
  const int num = selection.candidates_end - selection.candidates_begin;
  const bool ranked = selection.count > 0 && selection.count < num;
  for (int first = 0; first < num; first += kTransferThreads) {
    const int mine = first + ThreadIndex();
    const DeviceAnswer answer = task.answers[candidates[mine < num ? mine : 0].answer];
    const double score = ScoreOf(answer, selection.score);
    int num_before = 0;
    for (int begin = 0; ranked && begin < num; begin += kTransferThreads) {
      const int loaded = begin + ThreadIndex();
      BlockBarrier();
      if (loaded < num) {
        scores[ThreadIndex()] = ScoreOf(task.answers[candidates[loaded].answer], selection.score);
      }
      BlockBarrier();
      const int end = num - begin < kTransferThreads ? num - begin : kTransferThreads;
      for (int i = 0; i < end; ++i) {
        if (scores[i] > score || (scores[i] == score && begin + i < mine)) ++num_before;
      }
    }
    const bool above =
        selection.inclusive != 0 ? score >= selection.threshold : score > selection.threshold;
    const bool taken = num_before < selection.count || above;
    if (mine < num && taken && answer.finite != 0 && answer.token >= 0) {
      task.ids[candidates[mine].target] = answer.token;
    }
  }
}

}  // namespace

int LaunchTransfers(const TransferTask& task, void* stream) {
  return Launch(TransferKernel,
                {task.num_selections, 1, 1, kTransferThreads,
                 kTransferThreads * static_cast<int64_t>(sizeof(double)), stream},
                task);
}

}  // namespace cinnabar::cuda
