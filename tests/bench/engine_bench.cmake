cinnabar_library(bench_support
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/peak.cc ${CMAKE_CURRENT_LIST_DIR}/shape_bench.cc ${CMAKE_CURRENT_LIST_DIR}/step_cost.cc
  DEPS common_base kernels random_checkpoint worker_model nlohmann_json::nlohmann_json)
add_executable(engine_bench ${CMAKE_CURRENT_LIST_DIR}/engine_bench.cc)
target_link_libraries(engine_bench PRIVATE bench_support common_config worker_engine kernels random_checkpoint)
