# Until a library brings MakeBackend, the vocabulary head is tested on a backend that has nothing else.
if(TARGET kernels)
  set(CINNABAR_VOCABULARY_BACKEND kernels CACHE INTERNAL "")
else()
  set(folder ${CMAKE_CURRENT_LIST_DIR}/stand_in)
  cinnabar_library(kernels_stand_in
    SOURCES ${folder}/backend.cc ${folder}/product_avx2.cc ${folder}/product_avx512.cc
            ${folder}/product_generic.cc
    DEPS kernels_cpu_vocabulary Threads::Threads)
  set_source_files_properties(${folder}/product_avx512.cc PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512dq;-mavx512bw;-mavx512vl;-mfma;-Wno-uninitialized;-Wno-maybe-uninitialized")
  set_source_files_properties(${folder}/product_avx2.cc PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma")
  set(CINNABAR_VOCABULARY_BACKEND kernels_stand_in CACHE INTERNAL "")
endif()
cinnabar_test(vocabulary_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/vocabulary_test.cc
              DEPS ${CINNABAR_VOCABULARY_BACKEND})
cinnabar_test(vocabulary_noise_test SOURCES ${CMAKE_CURRENT_LIST_DIR}/vocabulary_noise_test.cc
              DEPS kernels_cpu_vocabulary)
