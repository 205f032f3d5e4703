add_executable(vocabulary_bench ${CMAKE_CURRENT_LIST_DIR}/vocabulary_bench.cc)
target_link_libraries(vocabulary_bench PRIVATE kernels)
