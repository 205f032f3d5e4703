#include "cli/api_client.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "cli/terminal.h"
#include "common/base/json.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

using Json = nlohmann::json;

constexpr int32_t kCanvasTokensMax = 1 << 20;
constexpr size_t kMessageBytesMax = 500;

// Null, a missing field and a field of another type are alike: the fallback.
const Json& Field(const Json& object, const char* name) {
  static const Json kNothing;
  if (!object.is_object()) return kNothing;
  const auto found = object.find(name);
  return found == object.end() ? kNothing : *found;
}
std::string Text(const Json& value) {
  return value.is_string() ? value.get<std::string>() : std::string();
}
int64_t Whole(const Json& value) {
  if (value.is_number_float()) {
    return static_cast<int64_t>(std::clamp(value.get<double>(), -9e15, 9e15));
  }
  return value.is_number() ? value.get<int64_t>() : 0;
}
double Number(const Json& value) { return value.is_number() ? value.get<double>() : 0.0; }

const Json& FirstChoice(const Json& reply) {
  static const Json kNothing;
  const Json& choices = Field(reply, "choices");
  return choices.is_array() && !choices.empty() ? choices[0] : kNothing;
}

// The server's words are shown on a terminal.
std::string Shown(std::string message) {
  if (message.size() > kMessageBytesMax) message.resize(kMessageBytesMax);
  return Printable(message);
}

absl::StatusCode CodeOf(int32_t http_status) {
  switch (http_status) {
    case 400:
    case 404:
    case 405:
    case 413:
    case 415:
    case 422:
      return absl::StatusCode::kInvalidArgument;
    case 401:
    case 403:
      return absl::StatusCode::kUnauthenticated;
    case 402:
    case 429:
      return absl::StatusCode::kResourceExhausted;
    case 503:
      return absl::StatusCode::kUnavailable;
    case 408:
    case 504:
      return absl::StatusCode::kDeadlineExceeded;
    default:
      return absl::StatusCode::kInternal;
  }
}

std::string MessageOf(const Json& error) {
  std::string message = Shown(Text(Field(error, "message")));
  const std::string param = Text(Field(error, "param"));
  if (!param.empty() && message.find(param) == std::string::npos) {
    message = absl::StrCat(Shown(param), ": ", message);
  }
  return message;
}

}  // namespace

absl::string_view EndpointPath(ApiEndpoint endpoint) {
  switch (endpoint) {
    case ApiEndpoint::kCompletion:
      return "/completions";
    case ApiEndpoint::kFim:
      return "/fim/completions";
    case ApiEndpoint::kChat:
      return "/chat/completions";
  }
  return "";
}

ClientRequest MakeApiRequest(const HttpUrl& url, ApiEndpoint endpoint, const std::string& api_key,
                             const Json& body) {
  ClientRequest request;
  request.method = "POST";
  request.target = ApiPath(url, EndpointPath(endpoint));
  request.headers = {{"Content-Type", "application/json"}, {"Accept", "*/*"}};
  if (!api_key.empty()) request.headers.emplace_back("Authorization", "Bearer " + api_key);
  request.body = body.dump(-1, ' ', false, Json::error_handler_t::replace);
  return request;
}

absl::StatusOr<std::vector<std::string>> FindApiKeys(const std::string& file) {
  std::vector<std::string> keys;
  if (file.empty()) {
    const char* key = std::getenv("CINNABAR_API_KEY");
    if (key != nullptr && *key != '\0') keys.emplace_back(key);
  } else {
    std::ifstream lines(file);
    if (!lines) return absl::NotFoundError(absl::StrCat("cannot read the API key file ", file));
    for (std::string line; std::getline(lines, line);) {
      const absl::string_view key = absl::StripAsciiWhitespace(line);
      if (!key.empty() && key[0] != '#') keys.emplace_back(key);
    }
    if (keys.empty()) return absl::InvalidArgumentError(absl::StrCat(file, " holds no API key"));
  }
  for (const std::string& key : keys) {
    // Anything else would end the header that carries it.
    if (!std::all_of(key.begin(), key.end(),
                     [](unsigned char c) { return absl::ascii_isgraph(c); })) {
      return absl::InvalidArgumentError(absl::StrCat(file.empty() ? "CINNABAR_API_KEY" : file,
                                                     ": an API key has no spaces; one key a line"));
    }
  }
  return keys;
}

absl::Status WithHint(const absl::Status& status, const HttpUrl& url) {
  if (!absl::IsUnavailable(status) || !url.loopback()) return status;
  return absl::UnavailableError(absl::StrCat(
      status.message(), "; is the gateway running? `cinnabar up` starts a cluster here"));
}

absl::StatusOr<std::string> FindFirstModel(HttpClient& client, const std::string& api_key) {
  ClientRequest request{.method = "GET", .target = ApiPath(client.url(), "/models")};
  if (!api_key.empty()) request.headers.emplace_back("Authorization", "Bearer " + api_key);
  const absl::StatusOr<HttpReply> reply = client.Fetch(std::move(request), absl::Seconds(30));
  if (!reply.ok()) return WithHint(reply.status(), client.url());
  if (reply->head.status != 200) return ReadFailure(reply->head, reply->body).status;
  CINNABAR_ASSIGN_OR_RETURN(const Json json, ParseJson(reply->body, "list of models"));
  const Json& data = Field(json, "data");
  const std::string id =
      data.is_array() && !data.empty() ? Text(Field(data[0], "id")) : std::string();
  if (id.empty()) {
    return absl::UnavailableError("the gateway lists no model yet; name one with --model");
  }
  return id;
}

ApiFailure ReadFailure(const HttpHead& head, absl::string_view body) {
  ApiFailure failure;
  std::string message;
  const absl::StatusOr<Json> json = ParseJson(body, "reply");
  if (json.ok()) {
    const Json& error = Field(*json, "error");
    message = MessageOf(error);
    failure.code = Text(Field(error, "code"));
  }
  if (message.empty()) message = absl::StrCat("the server answers ", head.status);
  const absl::StatusCode code = CodeOf(head.status);
  if (head.status == 401) {
    absl::StrAppend(&message, " (give an API key: --key-file FILE, or CINNABAR_API_KEY)");
  }
  const absl::string_view retry_after = head.Find("retry-after");
  if (!retry_after.empty()) {
    absl::StrAppend(&message, " (try again in ", Shown(std::string(retry_after)), " s)");
  }
  const absl::string_view request_id = head.Find("x-request-id");
  if (code == absl::StatusCode::kInternal && !request_id.empty()) {
    absl::StrAppend(&message, " (request ", Shown(std::string(request_id)), ")");
  }
  failure.status = absl::Status(code, message);
  return failure;
}

ApiFailure ReadStreamError(const Json& error) {
  ApiFailure failure;
  failure.code = Text(Field(error, "code"));
  std::string message = error.is_string() ? Shown(error.get<std::string>()) : MessageOf(error);
  if (message.empty()) message = "the server ended the stream with an error";
  const bool late = failure.code == "deadline_exceeded";
  failure.status = absl::Status(
      late ? absl::StatusCode::kDeadlineExceeded : absl::StatusCode::kInternal, message);
  return failure;
}

std::optional<ApiUsage> ReadUsage(const Json& reply) {
  const Json& json = Field(reply, "usage");
  if (!json.is_object()) return std::nullopt;
  ApiUsage usage;
  usage.prompt_tokens = Whole(Field(json, "prompt_tokens"));
  usage.completion_tokens = Whole(Field(json, "completion_tokens"));
  const Json& diffusion = Field(json, "diffusion");
  usage.steps = Whole(Field(diffusion, "steps"));
  usage.forwards = Whole(Field(diffusion, "forwards"));
  usage.tokens_per_forward = Number(Field(diffusion, "tokens_per_forward"));
  usage.queue_seconds = Number(Field(diffusion, "queue_seconds"));
  usage.device_seconds = Number(Field(diffusion, "device_seconds"));
  usage.price_dollars = Number(Field(diffusion, "price_dollars"));
  return usage;
}

std::string ReadText(const Json& reply) {
  const Json& choice = FirstChoice(reply);
  const Json& message = Field(choice, "message");
  return message.is_object() ? Text(Field(message, "content")) : Text(Field(choice, "text"));
}

absl::StatusOr<ApiChunk> ReadChunk(absl::string_view data) {
  ApiChunk chunk;
  if (absl::StartsWith(data, "[DONE]")) {
    chunk.done = true;
    return chunk;
  }
  CINNABAR_ASSIGN_OR_RETURN(const Json json, ParseJson(data, "chunk"));
  const Json& error = Field(json, "error");
  if (!error.is_null()) {
    chunk.failure = ReadStreamError(error);
    return chunk;
  }
  const Json& choice = FirstChoice(json);
  if (Whole(Field(choice, "index")) == 0) {
    const Json& delta = Field(choice, "delta");
    chunk.text = delta.is_object() ? Text(Field(delta, "content")) : Text(Field(choice, "text"));
    chunk.finish_reason = Text(Field(choice, "finish_reason"));
    const Json& diffusion = Field(json, "diffusion");
    if (diffusion.is_object()) {
      ApiFrame frame;
      frame.step = static_cast<int32_t>(Whole(Field(diffusion, "step")));
      frame.canvas_tokens = static_cast<int32_t>(
          std::clamp<int64_t>(Whole(Field(diffusion, "canvas_tokens")), 0, kCanvasTokensMax));
      const Json& positions = Field(diffusion, "positions");
      const Json& tokens = Field(diffusion, "tokens");
      const Json& texts = Field(diffusion, "texts");
      const Json& confidences = Field(diffusion, "confidence");
      for (size_t i = 0; positions.is_array() && i < positions.size(); ++i) {
        frame.positions.push_back(static_cast<int32_t>(Whole(positions[i])));
        frame.texts.push_back(texts.is_array() && i < texts.size() ? Text(texts[i]) : "?");
        frame.masked_again.push_back(tokens.is_array() && i < tokens.size() &&
                                     tokens[i].is_number_integer() && tokens[i].get<int64_t>() < 0);
        if (confidences.is_array() && i < confidences.size()) {
          frame.confidences.push_back(Number(confidences[i]));
        }
      }
      if (frame.confidences.size() != frame.positions.size()) frame.confidences.clear();
      chunk.frame = std::move(frame);
    }
  }
  chunk.usage = ReadUsage(json);
  return chunk;
}

}  // namespace cinnabar
