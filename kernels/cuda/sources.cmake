# The files of this folder by what they need, for cuda.cmake, and for tests/support, which compiles them for
# its emulator.
set(cuda_dir "${CMAKE_CURRENT_LIST_DIR}")
# Neither a device nor its runtime.
set(cuda_host_sources ${cuda_dir}/page_pool.cc ${cuda_dir}/plan.cc ${cuda_dir}/query_batch.cc)
# What runtime.h declares.
set(cuda_backend_sources
  ${cuda_dir}/blocks.cc ${cuda_dir}/cuda_backend.cc ${cuda_dir}/device.cc ${cuda_dir}/errors.cc
  ${cuda_dir}/expert_tables.cc ${cuda_dir}/geometry.cc ${cuda_dir}/paged_kv.cc ${cuda_dir}/step_graphs.cc
  ${cuda_dir}/steps.cc ${cuda_dir}/weights.cc)
# A device, or an emulated one.
set(cuda_kernel_sources
  ${cuda_dir}/attention.cu ${cuda_dir}/experts.cu ${cuda_dir}/linear.cu ${cuda_dir}/rows.cu
  ${cuda_dir}/soft_embed.cu ${cuda_dir}/transfers.cu ${cuda_dir}/vocabulary.cu)
