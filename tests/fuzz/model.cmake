cinnabar_fuzz(safetensors_fuzz SOURCES safetensors_fuzz.cc DEPS worker_model)
cinnabar_fuzz(model_config_fuzz SOURCES model_config_fuzz.cc DEPS worker_model)
cinnabar_fuzz(gguf_fuzz SOURCES gguf_fuzz.cc DEPS common_gguf worker_model)
cinnabar_fuzz(torch_file_fuzz SOURCES torch_file_fuzz.cc DEPS worker_model)
