// The configuration file of the three programs: read strictly, completed with defaults, checked,
// and printed. The fields and their defaults are described in proto/cinnabar/v1/config.proto.
#ifndef CINNABAR_COMMON_CONFIG_CONFIG_H_
#define CINNABAR_COMMON_CONFIG_CONFIG_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "cinnabar/v1/config.pb.h"
#include "common/redis/client.h"

namespace cinnabar {

// ReadFile, ParseConfig with relative paths taken from the file's folder, ValidateConfig. Every
// error starts with the path; InvalidArgument for what the file says.
absl::StatusOr<v1::ClusterConfig> LoadConfig(const std::string& path);

// Text protobuf to a message; neither completed nor checked. InvalidArgument as
// "WHERE:LINE:COLUMN: field: what is wrong", lines and columns from 1; an unknown field names the
// one that was meant. Pure.
absl::StatusOr<v1::ClusterConfig> ParseConfig(absl::string_view text, absl::string_view where);

// Sets every absent field that has a default; what is there stays. The only place where defaults
// are written. Idempotent, pure.
void FillDefaults(v1::ClusterConfig* config);

// A cluster on this machine without a file: the defaults and no model.
v1::ClusterConfig DefaultConfig();

// The first thing that is wrong, as InvalidArgument "gateway.deadline_max_seconds: 30 is below ...;
// raise it". For a completed message. Looks at no file and no network.
absl::Status ValidateConfig(const v1::ClusterConfig& config);

// All that is in force, as text protobuf, for the start of a program: it holds no secret, for
// secrets are in files whose names it gives.
std::string DescribeConfig(const v1::ClusterConfig& config);

// The client settings of a completed config. Reads the password files: FailedPrecondition when
// others may read or change one, naming it.
absl::StatusOr<RedisOptions> MakeRedisOptions(const v1::RedisConfig& config,
                                              std::string client_name);

// "host:port", "[v6]:port"; InvalidArgument says what it should look like. Pure.
struct HostPort {
  std::string host;
  int port = 0;  // [0, 65535]
};
absl::StatusOr<HostPort> ParseHostPort(absl::string_view text);
// "host:port" or the path of a Unix socket. Port 0 is an error.
absl::StatusOr<RedisAddress> ParseRedisAddress(absl::string_view text);
// Whether only this machine reaches a listener there: 127.x.x.x, ::1 or localhost. Pure.
bool IsLoopback(absl::string_view host);

// The file's text without white space at its end, for passwords and peppers. FailedPrecondition
// when others than owner and group may read it, or any but the owner may write it; InvalidArgument
// when it is empty.
absl::StatusOr<std::string> ReadSecretFile(const std::string& path);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_CONFIG_CONFIG_H_
