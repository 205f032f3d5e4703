add_executable(queue_bench "${CMAKE_CURRENT_LIST_DIR}/queue_bench.cc")
target_link_libraries(queue_bench PRIVATE common_queue test_support)
