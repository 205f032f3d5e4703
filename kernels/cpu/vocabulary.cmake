# The vocabulary head: a library of its own, for it needs nothing of the backend but VocabularyMachine.
cinnabar_library(kernels_cpu_vocabulary
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/vocabulary.cc
          ${CMAKE_CURRENT_LIST_DIR}/vocabulary_avx2.cc
          ${CMAKE_CURRENT_LIST_DIR}/vocabulary_avx512.cc
          ${CMAKE_CURRENT_LIST_DIR}/vocabulary_generic.cc
  DEPS common_base absl::function_ref absl::span absl::status absl::statusor absl::strings)
# g++ 12 takes the undefined pass-through operands of its own AVX-512 headers for uninitialised ones.
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/vocabulary_avx512.cc PROPERTIES COMPILE_OPTIONS
  "-mavx512f;-mavx512dq;-mavx512bw;-mavx512vl;-mfma;-Wno-uninitialized;-Wno-maybe-uninitialized")
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/vocabulary_avx2.cc PROPERTIES COMPILE_OPTIONS
  "-mavx2;-mfma")
