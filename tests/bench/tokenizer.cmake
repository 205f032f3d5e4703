add_executable(tokenizer_bench tokenizer_bench.cc)
target_include_directories(tokenizer_bench PRIVATE "${PROJECT_SOURCE_DIR}")
target_link_libraries(tokenizer_bench PRIVATE common_tokenizer benchmark::benchmark)
