// The body of a generation request, from JSON to a typed request. What is accepted, ignored and
// refused, and why, is the table in README.md of this folder. Checks everything that needs no
// model; BuildWork (build_work.h) does the rest.
#ifndef CINNABAR_GATEWAY_API_PARSE_REQUEST_H_
#define CINNABAR_GATEWAY_API_PARSE_REQUEST_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/request/decoding_params.h"
#include "gateway/api/api_error.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

struct RequestLimits {
  int32_t prompts_max = 16;          // prompts of one body
  int32_t choices_max = 16;          // n times prompts
  int32_t messages_max = 2048;       // of a chat
  int32_t prompt_ids_max = 1 << 20;  // token ids of one prompt
  int32_t max_tokens_max = 1 << 20;
  int32_t num_steps_max = 1 << 16;
  int32_t stop_max = 4;
  size_t stop_bytes_max = 256;  // of one stop string
  size_t model_bytes_max = 256;
  absl::Duration deadline_max = absl::Hours(1);
};

// In the order of RequestClass (common/queue).
enum class PriorityClass { kInteractive, kStandard, kBatch };

// Messages as the chat template is to see them: objects with role (developer is system by now),
// content (a string, or null beside tool_calls), name, tool_calls, tool_call_id where given.
struct ChatPrompt {
  nlohmann::ordered_json messages = nlohmann::ordered_json::array();
  nlohmann::ordered_json tools;               // null: none
  nlohmann::ordered_json template_arguments;  // chat_template_kwargs; null: none
};

using PromptIds = std::vector<TokenId>;
using Prompt = std::variant<std::string, PromptIds, ChatPrompt>;

struct GenerationRequest {
  enum class Endpoint { kCompletion, kFim, kChat };

  Endpoint endpoint = Endpoint::kCompletion;
  std::string model;
  // At least one; kChat: exactly one, a ChatPrompt; kFim: exactly one, a string.
  std::vector<Prompt> prompts;
  std::optional<std::string> suffix;  // text after the canvas; not with kChat
  int32_t n = 1;                      // answers to each prompt
  std::optional<int32_t> max_tokens;  // >= 1
  std::optional<int32_t>
      canvas_tokens;              // >= 1, <= max_tokens: the canvas where it is to be shorter
  std::vector<std::string> stop;  // none empty
  bool echo = false;              // kCompletion only: the answer begins with the prompt
  std::optional<uint64_t> seed;

  bool stream = false;
  bool include_usage = false;     // a last chunk with the usage; read with `stream`
  bool diffusing = false;         // chunks hold the whole text so far, not what is new
  bool diffusion_frames = false;  // typed frames between the chunks

  // As asked for; what is not in `params_set` has its default and means the model's.
  DecodingParams params;
  std::set<std::string> params_set;  // names of DecodingParams' fields: "num_steps"
  bool may_degrade = false;
  int32_t steps_min = 0;                   // with may_degrade; 0: the server's choice
  std::optional<absl::Duration> deadline;  // from now
  PriorityClass priority = PriorityClass::kStandard;
  std::string service_tier;  // as asked, to be echoed; empty: not given

  std::vector<std::string> warnings;  // what was ignored although it was meant to do something

  // Answers of the request: choice i is answer i % n to prompt i / n.
  int32_t num_choices() const { return n * static_cast<int32_t>(prompts.size()); }
};

// `body` is bounded by the caller. Any bytes are a request or an error of status 400 that names the
// field, what was found and what to send. Linear in the body but for sorting keys. Pure.
ApiResult<GenerationRequest> ParseGenerationRequest(GenerationRequest::Endpoint endpoint,
                                                    absl::string_view body,
                                                    const RequestLimits& limits = {});

// The name by which the body calls a field of DecodingParams: "num_steps" -> "diffusion.steps".
std::string RequestFieldName(absl::string_view params_field);

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_API_PARSE_REQUEST_H_
