# The CUDA backend in two libraries: host code that needs no device and no CUDA (tested everywhere), and
# where nvcc is, the kernels with the backend.
include("${CMAKE_CURRENT_LIST_DIR}/sources.cmake")

cinnabar_library(kernels_cuda_host
  SOURCES ${cuda_host_sources}
  DEPS common_base absl::span absl::status absl::statusor absl::strings)

if(CINNABAR_HAS_CUDA)
  cinnabar_library(kernels_cuda
    SOURCES ${cuda_backend_sources} ${cuda_kernel_sources} ${cuda_dir}/runtime.cu
    DEPS kernels_cuda_host kernels_quantized common_base absl::span absl::status absl::statusor absl::strings)
  # Products are fused only where the source says so: see math.h. The runtime is linked in, and looks for
  # the driver when it is first called: programs start without one.
  target_compile_options(kernels_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;-lineinfo;-Xptxas=-v;-Xcompiler=-Wall,-Wno-unknown-pragmas>")
  set_target_properties(kernels_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endif()
