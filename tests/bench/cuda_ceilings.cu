#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "tests/bench/cuda_ceilings.h"

namespace cinnabar::bench {
namespace {

constexpr int64_t kCopyBytes = int64_t{4} << 30;
constexpr int64_t kSize = 8192;  // of the products
constexpr size_t kWorkspaceBytes = size_t{64} << 20;

// The first thing that went wrong; what follows it is not measured.
std::string first_error;

bool Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess && first_error.empty()) {
    first_error = std::string(what) + ": " + cudaGetErrorString(error);
  }
  return first_error.empty();
}

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { Check(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

// 16 bytes a thread and turn, several in flight; the sum keeps the reads.
__global__ void ReadAll(const uint4* data, int64_t count, unsigned int* sink) {
  unsigned int sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = data[i], b = data[i + stride], c = data[i + 2 * stride],
                d = data[i + 3 * stride];
    sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
    sum += c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < count; i += stride) sum += data[i].x;
  if (sum == 0x12345678U) *sink = sum;  // hardly ever
}

// Random bits that are a small number in every dtype: products of zeros draw less power, and the
// clock then rises above what weights would see.
template <typename T>
__global__ void FillRandom(T* data, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    uint64_t x = static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15ULL + 1;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
    x ^= x >> 27;
    data[i] = T(static_cast<float>(x & 0xFFFF) / 32768.0F - 1.0F);
  }
}

// Seconds of one `launch`: the median over ten rounds of about a tenth of a second each; infinite
// after an error.
double SecondsOf(const std::function<void()>& launch) {
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  const auto timed = [&](int repeats) {
    Check(cudaEventRecord(begin), "event");
    for (int i = 0; i < repeats && first_error.empty(); ++i) launch();
    Check(cudaEventRecord(end), "event");
    Check(cudaEventSynchronize(end), "launch");
    float milliseconds = 0;
    const bool known = Check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    return known ? static_cast<double>(milliseconds) * 1e-3 / repeats
                 : std::numeric_limits<double>::infinity();
  };
  timed(3);
  const double once = timed(3);
  const int repeats = std::max(1, static_cast<int>(std::min(0.1 / once, 1e5)));
  std::vector<double> rounds;
  for (int i = 0; i < 10; ++i) rounds.push_back(timed(repeats));
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(rounds.begin(), rounds.end());
  return rounds[rounds.size() / 2];
}

// y = x W^T for row-major x and W, as the engine has them: cuBLASLt's column-major TN, which is
// also the only form of FP8. 0 when the library has no algorithm for it.
double MatrixFlops(cublasLtHandle_t handle, cudaDataType_t in, cudaDataType_t out,
                   cublasComputeType_t compute, const void* a, const void* b, void* c,
                   void* workspace) {
  cublasLtMatmulDesc_t product;
  cublasLtMatrixLayout_t layout_a, layout_b, layout_c;
  cublasLtMatmulPreference_t preference;
  cublasLtMatmulDescCreate(&product, compute, CUDA_R_32F);
  const cublasOperation_t transposed = CUBLAS_OP_T;
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                 sizeof(transposed));
  cublasLtMatrixLayoutCreate(&layout_a, in, kSize, kSize, kSize);
  cublasLtMatrixLayoutCreate(&layout_b, in, kSize, kSize, kSize);
  cublasLtMatrixLayoutCreate(&layout_c, out, kSize, kSize, kSize);
  cublasLtMatmulPreferenceCreate(&preference);
  const size_t workspace_bytes = kWorkspaceBytes;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                       &workspace_bytes, sizeof(workspace_bytes));
  cublasLtMatmulHeuristicResult_t found[8];
  int num_found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle, product, layout_a, layout_b, layout_c, layout_c, preference, 8, found, &num_found);
  double best = 0;
  const float one = 1.0F, zero = 0.0F;
  for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < std::min(num_found, 3); ++i) {
    bool failed = false;
    const auto launch = [&] {
      failed = cublasLtMatmul(handle, product, &one, a, layout_a, b, layout_b, &zero, c, layout_c,
                              c, layout_c, &found[i].algo, workspace, kWorkspaceBytes,
                              nullptr) != CUBLAS_STATUS_SUCCESS ||
               failed;
    };
    const double seconds = SecondsOf(launch);
    const double size = static_cast<double>(kSize);
    if (!failed) best = std::max(best, 2 * size * size * size / seconds);
  }
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(layout_c);
  cublasLtMatrixLayoutDestroy(layout_b);
  cublasLtMatrixLayoutDestroy(layout_a);
  cublasLtMatmulDescDestroy(product);
  return best;
}

void MeasureMemory(CudaCeilingsResult& result, int num_processors) {
  const DeviceMemory from(kCopyBytes), to(kCopyBytes);
  Check(cudaMemset(from.get(), 1, kCopyBytes), "memset");
  const double bytes = static_cast<double>(kCopyBytes);
  const double copy = SecondsOf([&] {
    Check(cudaMemcpyAsync(to.get(), from.get(), kCopyBytes, cudaMemcpyDeviceToDevice), "copy");
  });
  result.copy_bytes_per_second = 2 * bytes / copy;
  const double read = SecondsOf([&] {
    ReadAll<<<num_processors * 8, 256>>>(static_cast<const uint4*>(from.get()),
                                         kCopyBytes / sizeof(uint4),
                                         static_cast<unsigned int*>(to.get()));
    Check(cudaGetLastError(), "read");
  });
  result.read_bytes_per_second = bytes / read;
}

void MeasureProducts(CudaCeilingsResult& result) {
  cublasLtHandle_t handle;
  if (!first_error.empty()) return;
  if (cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS) {
    first_error = "cuBLASLt does not start";
    return;
  }
  constexpr int64_t kCount = kSize * kSize;
  const DeviceMemory a(kCount * 4), b(kCount * 4), c(kCount * 4), workspace(kWorkspaceBytes);
  const auto fill = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    FillRandom<<<1024, 256>>>(static_cast<T*>(a.get()), kCount);
    FillRandom<<<1024, 256>>>(static_cast<T*>(b.get()), kCount);
    Check(cudaGetLastError(), "fill");
  };
  const auto measure = [&](cudaDataType_t in, cudaDataType_t out, cublasComputeType_t compute) {
    return MatrixFlops(handle, in, out, compute, a.get(), b.get(), c.get(), workspace.get());
  };
  fill(static_cast<__nv_bfloat16*>(nullptr));
  result.bf16_flops = measure(CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F);
  fill(static_cast<__nv_fp8_e4m3*>(nullptr));
  result.fp8_flops = measure(CUDA_R_8F_E4M3, CUDA_R_16BF, CUBLAS_COMPUTE_32F);
  fill(static_cast<float*>(nullptr));
  result.f32_flops = measure(CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F);
  result.tf32_flops = measure(CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32);
  cublasLtDestroy(handle);
}

}  // namespace

std::string MeasureCudaCeilings(int device_index, CudaCeilingsResult& result) {
  first_error.clear();
  cudaDeviceProp properties;
  if (!Check(cudaSetDevice(device_index), "device") ||
      !Check(cudaGetDeviceProperties(&properties, device_index), "properties")) {
    return first_error;
  }
  result.device = std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
                  std::to_string(properties.minor) + ", " +
                  std::to_string(properties.multiProcessorCount) + " processors";
  MeasureMemory(result, properties.multiProcessorCount);
  MeasureProducts(result);
  return first_error;
}

}  // namespace cinnabar::bench
