cinnabar_fuzz(api_request_fuzz SOURCES api_request_fuzz.cc DEPS gateway_api)
