// The gateway's API as its clients read it: bodies, errors, chunks of a stream. What a field means
// is said in gateway/api; here unknown fields are skipped and missing ones have a default, so that
// other servers with OpenAI's interface can be asked as well.
#ifndef CINNABAR_CLI_API_CLIENT_H_
#define CINNABAR_CLI_API_CLIENT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "cli/http_client.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

enum class ApiEndpoint { kCompletion, kFim, kChat };
// "/completions", "/fim/completions", "/chat/completions".
absl::string_view EndpointPath(ApiEndpoint endpoint);

// A POST of `body` to `endpoint`. `api_key` may be empty.
ClientRequest MakeApiRequest(const HttpUrl& url, ApiEndpoint endpoint, const std::string& api_key,
                             const nlohmann::json& body);

// The keys of `file`, one a line; empty lines and lines that begin with '#' do not count. Without a
// file: that of the environment's CINNABAR_API_KEY, or none. NotFound, InvalidArgument when the
// file holds none; neither shows what it holds.
absl::StatusOr<std::vector<std::string>> FindApiKeys(const std::string& file);

// `status` with the advice to start a cluster, where nobody answers at a URL of this machine.
absl::Status WithHint(const absl::Status& status, const HttpUrl& url);

// The first model of the gateway's list.
absl::StatusOr<std::string> FindFirstModel(HttpClient& client, const std::string& api_key);

// What a refusal says, for people and for exit statuses:
//   InvalidArgument  the request is wrong (400, 404, 405, 413, 415, 422)
//   Unauthenticated  401, 403, with how to give a key
//   ResourceExhausted, Unavailable, DeadlineExceeded   429, 503, 504 and 408, with when to try
//   again Internal         the rest, with the request's id
struct ApiFailure {
  absl::Status status;
  std::string code;  // for machines: "rate_limit_exceeded"; empty: the body has none
};
ApiFailure ReadFailure(const HttpHead& head, absl::string_view body);
// The same from the `error` object of an event in a stream.
ApiFailure ReadStreamError(const nlohmann::json& error);

struct ApiUsage {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  // Vendor counters; 0 where the server has none.
  int64_t steps = 0;
  int64_t forwards = 0;
  double tokens_per_forward = 0.0;
  double queue_seconds = 0.0;
  double device_seconds = 0.0;
  double price_dollars = 0.0;
};
// Of a whole reply or of a chunk; nullopt when it has none.
std::optional<ApiUsage> ReadUsage(const nlohmann::json& reply);
// Text of the first choice of a whole reply.
std::string ReadText(const nlohmann::json& reply);

// One denoising step of the first choice.
struct ApiFrame {
  int32_t step = 0;
  int32_t canvas_tokens = 0;
  std::vector<int32_t> positions;  // of the canvas; equal in length to texts
  std::vector<std::string> texts;
  std::vector<bool> masked_again;  // as long as positions, or empty: no token stands there any more
  std::vector<double> confidences;  // as long as positions, or empty
};

struct ApiChunk {
  bool done = false;                  // the end mark of the stream
  std::optional<ApiFailure> failure;  // the stream broke
  std::string text;                   // new text of the first choice, or all of it (`diffusing`)
  std::string finish_reason;          // empty: goes on
  std::optional<ApiUsage> usage;
  std::optional<ApiFrame> frame;
};
// From an event's data. InvalidArgument: neither JSON nor the end mark.
absl::StatusOr<ApiChunk> ReadChunk(absl::string_view data);

}  // namespace cinnabar

#endif  // CINNABAR_CLI_API_CLIENT_H_
