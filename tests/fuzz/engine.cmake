cinnabar_fuzz(sequence_state_fuzz SOURCES ${CMAKE_CURRENT_LIST_DIR}/sequence_state_fuzz.cc DEPS worker_engine)
