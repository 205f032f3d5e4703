// The gateway over gRPC (proto/cinnabar/v1/generation.proto), with health and reflection. The same
// sessions as HTTP, on the same event loop.
#ifndef CINNABAR_GATEWAY_GRPC_GRPC_SERVER_H_
#define CINNABAR_GATEWAY_GRPC_GRPC_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/http/asio.h"
#include "gateway/service/authenticator.h"
#include "gateway/service/generation_session.h"

namespace cinnabar {

struct GrpcServerOptions {
  std::string listen = "127.0.0.1:0";
  // PEM files; both or none. Debian's gRPC gets no fixes of its HTTP/2 stack: a listener that
  // others than this machine reach needs them, and `client_ca` so that only known clients connect.
  std::string certificate_file, key_file, client_ca_file;
  int32_t message_bytes_max = 1 << 20;
  int32_t streams_max = 100;  // of one connection
  RequestLimits limits;
};

class GrpcServer {
 public:
  // Starts listening. Sessions run on `io`; `context`, `authenticator` and `wait_estimate` (for
  // Retry-After) are borrowed and outlive it. InvalidArgument: the files; Unavailable: the address.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(
      const GrpcServerOptions& options, asio::any_io_executor io, const SessionContext& context,
      const Authenticator& authenticator, std::function<absl::Duration()> wait_estimate);
  ~GrpcServer();

  int port() const;
  // What health says from now on.
  void SetServing(bool serving);
  // Takes no new calls; those that run have `grace` to end.
  void Drain(absl::Duration grace);

 private:
  struct Impl;
  explicit GrpcServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_GRPC_GRPC_SERVER_H_
