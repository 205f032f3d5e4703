# The CUDA backend in two libraries: host code that needs no device and no CUDA (tested everywhere), and
# where nvcc is, the kernels with the backend.
cinnabar_library(kernels_cuda_host
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/page_pool.cc ${CMAKE_CURRENT_LIST_DIR}/plan.cc
  DEPS common_base absl::span absl::status absl::statusor absl::strings)

if(CINNABAR_HAS_CUDA)
  cinnabar_library(kernels_cuda
    SOURCES ${CMAKE_CURRENT_LIST_DIR}/blocks.cc ${CMAKE_CURRENT_LIST_DIR}/cuda_backend.cc
            ${CMAKE_CURRENT_LIST_DIR}/device.cc ${CMAKE_CURRENT_LIST_DIR}/errors.cc
            ${CMAKE_CURRENT_LIST_DIR}/attention.cu ${CMAKE_CURRENT_LIST_DIR}/experts.cu
            ${CMAKE_CURRENT_LIST_DIR}/linear.cu ${CMAKE_CURRENT_LIST_DIR}/rows.cu
            ${CMAKE_CURRENT_LIST_DIR}/runtime.cu ${CMAKE_CURRENT_LIST_DIR}/soft_embed.cu
            ${CMAKE_CURRENT_LIST_DIR}/transfers.cu ${CMAKE_CURRENT_LIST_DIR}/vocabulary.cu
    DEPS kernels_cuda_host kernels_quantized common_base absl::span absl::status absl::statusor absl::strings)
  # Products are fused only where the source says so: see math.h. The runtime is linked in, and looks for
  # the driver when it is first called: programs start without one.
  target_compile_options(kernels_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;-lineinfo;-Xptxas=-v;-Xcompiler=-Wall,-Wno-unknown-pragmas>")
  set_target_properties(kernels_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endif()
