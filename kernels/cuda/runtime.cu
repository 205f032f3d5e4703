#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/runtime.h"

namespace cinnabar::cuda {
namespace {

cudaStream_t Stream(void* stream) { return static_cast<cudaStream_t>(stream); }

int Attribute(cudaDeviceAttr attribute, int device, int64_t* value) {
  int number = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&number, attribute, device);
  *value = number;
  return error;
}

}  // namespace

int CountDevices(int* count) {
  // Kernels are loaded with the context: a capture cannot wait for one, and neither should a step.
  (void)setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  (void)cudaGetLastError();  // a missing driver is no error of what comes later
  return error;
}

int UseDevice(int index) { return cudaSetDevice(index); }

int OpenDevice(int index, DeviceFacts* facts) {
  cudaError_t error = cudaSetDevice(index);
  if (error != cudaSuccess) return error;
  int64_t major = 0, minor = 0, multiprocessors = 0;
  if (int e = Attribute(cudaDevAttrComputeCapabilityMajor, index, &major)) return e;
  if (int e = Attribute(cudaDevAttrComputeCapabilityMinor, index, &minor)) return e;
  if (int e = Attribute(cudaDevAttrMultiProcessorCount, index, &multiprocessors)) return e;
  if (int e = Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index, &facts->shared_bytes_max)) {
    return e;
  }
  cudaDeviceProp properties;
  error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) return error;
  std::snprintf(facts->name, sizeof(facts->name), "%s", properties.name);
  error = cudaDeviceGetPCIBusId(facts->pci_address, sizeof(facts->pci_address), index);
  if (error != cudaSuccess) facts->pci_address[0] = '\0';
  (void)cudaGetLastError();
  facts->compute_capability = static_cast<int32_t>(10 * major + minor);
  facts->num_multiprocessors = static_cast<int32_t>(multiprocessors);
  facts->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return cudaSuccess;
}

int FreeMemory(int64_t* free_bytes) {
  size_t free = 0, total = 0;
  const cudaError_t error = cudaMemGetInfo(&free, &total);
  *free_bytes = static_cast<int64_t>(free);
  return error;
}

int CreateStream(void** stream) {
  cudaStream_t created = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking);
  *stream = created;
  return error;
}
void DestroyStream(void* stream) { (void)cudaStreamDestroy(Stream(stream)); }
int SynchronizeStream(void* stream) { return cudaStreamSynchronize(Stream(stream)); }

int AllocateDevice(int64_t bytes, void** memory) {
  const cudaError_t error = cudaMalloc(memory, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) (void)cudaGetLastError();  // not sticky
  return error;
}
void FreeDevice(void* memory) { (void)cudaFree(memory); }
int AllocatePinned(int64_t bytes, void** memory) {
  const cudaError_t error = cudaMallocHost(memory, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) (void)cudaGetLastError();
  return error;
}
void FreePinned(void* memory) { (void)cudaFreeHost(memory); }

int CreateEvent(bool timed, void** event) {
  cudaEvent_t created = nullptr;
  const cudaError_t error =
      cudaEventCreateWithFlags(&created, timed ? cudaEventDefault : cudaEventDisableTiming);
  *event = created;
  return error;
}
void DestroyEvent(void* event) { (void)cudaEventDestroy(static_cast<cudaEvent_t>(event)); }
int RecordEvent(void* event, void* stream) {
  return cudaEventRecord(static_cast<cudaEvent_t>(event), Stream(stream));
}
int SynchronizeEvent(void* event) { return cudaEventSynchronize(static_cast<cudaEvent_t>(event)); }
int ElapsedSeconds(void* from, void* to, double* seconds) {
  float milliseconds = 0.0F;
  const cudaError_t error = cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(from),
                                                 static_cast<cudaEvent_t>(to));
  *seconds = milliseconds * 1e-3;
  return error;
}

int ClearAsync(void* device, int64_t bytes, void* stream) {
  return cudaMemsetAsync(device, 0, static_cast<size_t>(bytes), Stream(stream));
}
int CopyToDevice(void* device, const void* host, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                         Stream(stream));
}
int CopyOnDevice(void* to, const void* from, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                         Stream(stream));
}
int CopyToHost(void* host, const void* device, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost,
                         Stream(stream));
}
int BeginCapture(void* stream) {
  return cudaStreamBeginCapture(Stream(stream), cudaStreamCaptureModeThreadLocal);
}
int EndCapture(void* stream, void** graph) {
  cudaGraph_t captured = nullptr;
  const cudaError_t error = cudaStreamEndCapture(Stream(stream), &captured);
  *graph = captured;
  return error;
}
void DestroyGraph(void* graph) { (void)cudaGraphDestroy(static_cast<cudaGraph_t>(graph)); }
int InstantiateGraph(void* graph, void** executable) {
  cudaGraphExec_t created = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&created, static_cast<cudaGraph_t>(graph), 0);
  *executable = created;
  return error;
}
int UpdateGraph(void* executable, void* graph, bool* updated) {
  cudaGraphExecUpdateResultInfo info = {};
  const cudaError_t error = cudaGraphExecUpdate(static_cast<cudaGraphExec_t>(executable),
                                                static_cast<cudaGraph_t>(graph), &info);
  *updated = error == cudaSuccess;
  if (error != cudaErrorGraphExecUpdateFailure) return error;
  (void)cudaGetLastError();  // another shape: the caller makes a new executable
  return cudaSuccess;
}
int LaunchGraph(void* executable, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable), Stream(stream));
}
void DestroyExecutable(void* executable) {
  (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable));
}

const char* NameOfError(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* TextOfError(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cinnabar::cuda
