// `cinnabar generate --url`: asks a running gateway.
#ifndef CINNABAR_CLI_REMOTE_GENERATE_H_
#define CINNABAR_CLI_REMOTE_GENERATE_H_

#include <string>

#include "absl/status/status.h"
#include "cli/api_client.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

struct RemoteGeneration {
  std::string url;
  std::string api_key_file;  // empty: no key
  std::string ca_file;       // empty: the system's certificates
  ApiEndpoint endpoint = ApiEndpoint::kCompletion;
  nlohmann::json body;  // without "model": the first that the gateway lists
  std::string prompt;   // shown around the canvas
  std::string suffix;
  double timeout_seconds = 600.0;
  bool json = false;
  bool watch = false;
};

// Prints the answer to stdout: text as it becomes certain, with `json` the gateway's reply, with
// `watch` on a terminal the canvas while it is denoised. Errors say what to do.
absl::Status GenerateRemotely(RemoteGeneration generation);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_REMOTE_GENERATE_H_
