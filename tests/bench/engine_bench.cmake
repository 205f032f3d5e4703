add_executable(engine_bench ${CMAKE_CURRENT_LIST_DIR}/engine_bench.cc ${CMAKE_CURRENT_LIST_DIR}/peak.cc)
target_link_libraries(engine_bench PRIVATE worker_engine kernels random_checkpoint)
