// gRPC messages to the gateway's typed request. Pure.
#ifndef CINNABAR_GATEWAY_GRPC_GRPC_REQUEST_H_
#define CINNABAR_GATEWAY_GRPC_GRPC_REQUEST_H_

#include "cinnabar/v1/generation.pb.h"
#include "gateway/api/api_error.h"
#include "gateway/api/parse_request.h"

namespace cinnabar {

// The same checks as of a JSON body. Errors name the field of the message.
ApiResult<GenerationRequest> FromGrpc(const v1::GenerateRequest& wire, const RequestLimits& limits);

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_GRPC_GRPC_REQUEST_H_
