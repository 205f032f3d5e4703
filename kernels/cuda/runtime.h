// The part of the CUDA runtime that the backend uses, as plain functions: so its host code needs no
// CUDA header, and the tests can put a host implementation in their place. Every function returns a
// cudaError_t as an int; 0 is success. One thread at a time.
#ifndef CINNABAR_KERNELS_CUDA_RUNTIME_H_
#define CINNABAR_KERNELS_CUDA_RUNTIME_H_

#include <cstdint>

namespace cinnabar::cuda {

inline constexpr int kSuccess = 0;
inline constexpr int kOutOfMemory = 2;  // cudaErrorMemoryAllocation

struct DeviceFacts {
  char name[256] = {};
  char pci_address[32] = {};       // "0000:4b:00.0"; empty: no PCI device
  int32_t compute_capability = 0;  // 10 * major + minor
  int32_t num_multiprocessors = 0;
  int64_t shared_bytes_max = 0;  // of one block, opted in
  int64_t memory_bytes = 0;
};

int CountDevices(int* count);
int OpenDevice(int index, DeviceFacts* facts);
int UseDevice(int index);  // in calls of this thread, from now on
int FreeMemory(int64_t* free_bytes);

int CreateStream(void** stream);
void DestroyStream(void* stream);
int SynchronizeStream(void* stream);

int AllocateDevice(int64_t bytes, void** memory);
void FreeDevice(void* memory);
int AllocatePinned(int64_t bytes, void** memory);  // host memory that copies may read on their own
void FreePinned(void* memory);

// A point of the stream that the host can wait for; two that are `timed` tell the time between.
int CreateEvent(bool timed, void** event);
void DestroyEvent(void* event);
int RecordEvent(void* event, void* stream);
int SynchronizeEvent(void* event);
int ElapsedSeconds(void* from, void* to, double* seconds);  // both have been reached

int ClearAsync(void* device, int64_t bytes, void* stream);
int CopyToDevice(void* device, const void* host, int64_t bytes, void* stream);
int CopyOnDevice(void* to, const void* from, int64_t bytes, void* stream);
int CopyToHost(void* host, const void* device, int64_t bytes, void* stream);

// What the stream is given between the two is kept instead of run.
int BeginCapture(void* stream);
int EndCapture(void* stream, void** graph);
void DestroyGraph(void* graph);
int InstantiateGraph(void* graph, void** executable);
// Puts the arguments of `graph` into an executable of the same shape; *updated says whether it had.
int UpdateGraph(void* executable, void* graph, bool* updated);
int LaunchGraph(void* executable, void* stream);
void DestroyExecutable(void* executable);

const char* NameOfError(int error);  // "cudaErrorLaunchFailure"
const char* TextOfError(int error);

}  // namespace cinnabar::cuda

#endif  // CINNABAR_KERNELS_CUDA_RUNTIME_H_
