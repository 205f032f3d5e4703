// A backend with nothing but a vocabulary head: what the tests of the head need until kernels/cpu
// brings MakeBackend. Weights are kept as float32, rounded to their dtype.
#include "kernels/backend.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/vocabulary.h"
#include "tests/unit/kernels/stand_in/product.h"

namespace cinnabar {
const char* NameOf(DType dtype) {
  return dtype == DType::kF32 ? "F32" : dtype == DType::kF16 ? "F16" : "BF16";
}
namespace stand_in {
namespace {

class HostBuffer : public Buffer {
 public:
  explicit HostBuffer(int64_t size) : Buffer(std::aligned_alloc(64, (size + 127) / 64 * 64), size) {
    std::memset(data(), 0, size);
  }
  ~HostBuffer() override { std::free(data()); }
};

class PackedWeight : public Weight {
 public:
  PackedWeight(const HostMatrix& m, DType dtype)
      : Weight(m.rows, m.cols, RowOrder::kStacked, dtype),
        panels_(((m.rows + 31) / 32 * 32 * m.cols) * 4) {
    const float* source = static_cast<const float*>(m.data);
    for (int64_t row = 0; row < m.rows; ++row) {
      for (int64_t k = 0; k < m.cols; ++k) {
        float value = source[row * m.cols + k];
        if (dtype == DType::kBf16) {
          uint32_t bits;
          std::memcpy(&bits, &value, 4);
          bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000U;
          std::memcpy(&value, &bits, 4);
        }
        panels()[(row / 32 * m.cols + k) * 32 + row % 32] = value;
      }
    }
  }
  int64_t memory_bytes() const override { return panels_.size_bytes(); }
  float* panels() const { return static_cast<float*>(panels_.data()); }

 private:
  HostBuffer panels_;
};

class StandIn : public Backend {
 public:
  StandIn(const BackendOptions& options, const cpu::VocabularyKernels* kernels, Product product)
      : num_threads_(options.num_threads == 0 ? 2 : options.num_threads),
        kernels_(kernels),
        product_(product) {}
  std::string Describe() const override { return "stand-in"; }
  DType activation_dtype() const override { return DType::kF32; }
  absl::StatusOr<std::unique_ptr<Buffer>> Allocate(int64_t size) override {
    return std::make_unique<HostBuffer>(size);
  }
  absl::StatusOr<std::unique_ptr<KvMemory>> AllocateKv(const KvShape&) override { return No(); }
  int64_t KvBytes(const KvShape&) const override { return 0; }
  absl::Status Reserve(const WorkspaceShape& shape) override {
    return workspace_.Reserve(shape, num_threads_, kStripRows);
  }
  int64_t WorkspaceBytes(const WorkspaceShape& shape) const override {
    return cpu::VocabularyWorkspace::Bytes(shape, num_threads_, kStripRows);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadWeight(absl::Span<const HostMatrix> parts, RowOrder,
                                                     DType dtype) override {
    return std::make_unique<PackedWeight>(parts[0], dtype);
  }
  absl::StatusOr<std::unique_ptr<Weight>> LoadEmbedding(const HostMatrix&) override { return No(); }
  absl::StatusOr<std::unique_ptr<Buffer>> LoadVector(const HostMatrix&) override { return No(); }
  absl::Status Upload(absl::Span<const float> host, void* device) override {
    std::memcpy(device, host.data(), host.size() * 4);
    return absl::OkStatus();
  }
  absl::Status Download(const void* device, absl::Span<float> host) override {
    std::memcpy(host.data(), device, host.size() * 4);
    return absl::OkStatus();
  }
  absl::Status Embed(const Weight&, absl::Span<const int32_t>, float, const Rows&) override {
    return No();
  }
  absl::Status Linear(const LinearArgs&) override { return No(); }
  absl::Status RmsNorm(const RmsNormArgs&) override { return No(); }
  absl::Status LayerNormModulate(const LayerNormModulateArgs&) override { return No(); }
  absl::Status PrepareHeads(const PrepareHeadsArgs&) override { return No(); }
  absl::Status Attend(const AttendArgs&) override { return No(); }

  absl::Status AnswerVocabulary(const VocabularyArgs& args) override {
    const auto* weight = static_cast<const PackedWeight*>(args.weight);
    const Machine machine(*this, *weight);
    cpu::AnswerVocabularyCpu(args, machine, workspace_);
    return absl::OkStatus();
  }

  // Panels outer, strips inner: the bare product that the head is measured against.
  absl::Status Logits(const LogitsArgs& args) override {
    const auto* weight = static_cast<const PackedWeight*>(args.weight);
    const int64_t num_panels = (weight->rows() + 31) / 32;
    ParallelFor((num_panels + 7) / 8, [&](int64_t item, int32_t) {
      alignas(64) float tile[kStripRows * 256];
      const int32_t panels = static_cast<int32_t>(std::min<int64_t>(8, num_panels - 8 * item));
      for (int64_t row = 0; row < args.num_rows; row += kStripRows) {
        const int32_t rows =
            static_cast<int32_t>(std::min<int64_t>(kStripRows, args.num_rows - row));
        product_(args.hidden.f32() + row * args.hidden.stride, args.hidden.stride, rows,
                 weight->panels() + item * 256 * weight->cols(), weight->cols(), panels, tile, 256);
        if (args.out.data == nullptr) continue;  // benchmark: the product alone
        for (int32_t r = 0; r < rows; ++r) {
          for (int64_t id = item * 256; id < std::min(item * 256 + 256, weight->rows()); ++id) {
            float value = tile[r * 256 + id - item * 256];
            if (args.bias != nullptr) value += args.bias[id];
            args.out.f32()[(row + r) * args.out.stride + id] = value;
          }
        }
      }
    });
    return absl::OkStatus();
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

 private:
  class Machine : public cpu::VocabularyMachine {
   public:
    Machine(const StandIn& backend, const PackedWeight& weight)
        : VocabularyMachine(*backend.kernels_, backend.num_threads_, kStripRows),
          backend_(backend),
          weight_(weight) {}
    void Multiply(const float* x, int64_t x_stride, int32_t num_rows, int32_t first_id,
                  int32_t num_ids, float* out, int64_t out_stride) const override {
      backend_.product_(x, x_stride, num_rows, weight_.panels() + first_id * weight_.cols(),
                        weight_.cols(), (num_ids + 31) / 32, out, out_stride);
    }
    void ParallelFor(int64_t num_items,
                     absl::FunctionRef<void(int64_t, int32_t)> body) const override {
      backend_.ParallelFor(num_items, body);
    }

   private:
    const StandIn& backend_;
    const PackedWeight& weight_;
  };

  static absl::Status No() { return absl::UnimplementedError("stand-in"); }

  void ParallelFor(int64_t num_items, absl::FunctionRef<void(int64_t, int32_t)> body) const {
    std::atomic<int64_t> next = 0;
    auto work = [&](int32_t thread) {
      for (int64_t item; (item = next++) < num_items;) body(item, thread);
    };
    std::vector<std::thread> threads;
    for (int32_t thread = 1; thread < num_threads_; ++thread) threads.emplace_back(work, thread);
    work(0);
    for (std::thread& thread : threads) thread.join();
  }

  const int32_t num_threads_;
  const cpu::VocabularyKernels* kernels_;
  const Product product_;
  cpu::VocabularyWorkspace workspace_;
};

}  // namespace
}  // namespace stand_in

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(BackendKind, const BackendOptions& options) {
  using namespace stand_in;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  if (options.isa == "generic") {
    return std::make_unique<StandIn>(options, &cpu::kVocabularyGeneric, kProductGeneric);
  }
  if (options.isa == "avx2" || (options.isa == "auto" && !avx512)) {
    return std::make_unique<StandIn>(options, &cpu::kVocabularyAvx2, kProductAvx2);
  }
  if (!avx512) return absl::UnavailableError("no AVX-512");
  return std::make_unique<StandIn>(options, &cpu::kVocabularyAvx512, kProductAvx512);
}

}  // namespace cinnabar
