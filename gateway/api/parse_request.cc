#include "gateway/api/parse_request.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "common/base/json.h"
#include "common/request/sampler_catalog.h"

namespace cinnabar {
namespace {

using Json = nlohmann::ordered_json;
using Endpoint = GenerationRequest::Endpoint;

constexpr int kBodyDepthMax = 32;
constexpr double kNumberMax = 1e9;  // of knobs without a natural bound; far below float's range
constexpr absl::string_view kContinueNoSuffix = "<|endoftext|>";

std::string TypeOf(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::boolean:
      return value.get<bool>() ? "true" : "false";
    case Json::value_t::string:
      return "a string";
    case Json::value_t::array:
      return "an array";
    case Json::value_t::object:
      return "an object";
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned:
      return "an integer";
    case Json::value_t::number_float:
      return "a number with a fraction, or too large";
    case Json::value_t::binary:
    case Json::value_t::discarded:
      break;
  }
  return "something else";
}

// null, false, 0, "", [] and {}: a field that is there and asks for nothing.
bool IsNeutral(const Json& value) {
  if (value.is_null()) return true;
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number()) return value.get<double>() == 0;
  return value.is_string() ? value.get_ref<const std::string&>().empty() : value.empty();
}

// Reads the fields of one object. Keeps the first error; reads after it give fallbacks. A null
// field counts as absent. Borrows the object.
class Reader {
 public:
  Reader(const Json& object, std::string prefix) : prefix_(std::move(prefix)) { Index(object); }

  bool failed() const { return error_.has_value(); }
  ApiError TakeError() { return *std::move(error_); }
  void Fail(ApiError error) {
    if (!failed()) error_ = std::move(error);
  }
  std::string Path(absl::string_view key) const { return absl::StrCat(prefix_, key); }

  // Takes the fields of `extra` as its own; those of both are an error.
  void Merge(const Json& extra, absl::string_view name) {
    for (const auto& entry : extra.items()) {
      if (fields_.contains(entry.key())) {
        const std::string param = absl::StrCat(name, ".", entry.key());
        Fail(InvalidValue(param, absl::StrCat(param, ": this field is given outside ", name,
                                              " as well; keep one of the two.")));
        return;
      }
    }
    Index(extra);
  }

  const Json* Find(absl::string_view key) const {
    const auto found = fields_.find(key);
    return found == fields_.end() || found->second->is_null() ? nullptr : found->second;
  }
  const absl::flat_hash_map<absl::string_view, const Json*>& fields() const { return fields_; }

  // `wanted` and `fix` complete "expected ..., found a string; ...".
  void FailType(absl::string_view key, const Json& value, absl::string_view wanted,
                absl::string_view fix = "") {
    std::string message = absl::StrCat(Path(key), ": expected ", wanted, ", found ", TypeOf(value));
    if (!fix.empty()) absl::StrAppend(&message, "; ", fix);
    Fail(InvalidType(Path(key), absl::StrCat(message, ".")));
  }

  std::optional<bool> Bool(absl::string_view key) {
    const Json* value = Find(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_boolean()) {
      FailType(key, *value, "true or false", "send it without quotes");
      return std::nullopt;
    }
    return value->get<bool>();
  }

  std::optional<int64_t> Int(absl::string_view key, int64_t least, int64_t most) {
    const Json* value = Find(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number_integer()) {
      FailType(key, *value, absl::StrCat("an integer from ", least, " to ", most),
               value->is_string() ? "send it without quotes" : "");
      return std::nullopt;
    }
    const bool beyond =
        value->is_number_unsigned() &&
        value->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    const int64_t number = beyond ? 0 : value->get<int64_t>();
    if (beyond || number < least || number > most) {
      Fail(InvalidValue(Path(key), absl::StrCat(Path(key), ": ", value->dump(),
                                                " is out of range; send an integer from ", least,
                                                " to ", most, ".")));
      return std::nullopt;
    }
    return number;
  }

  std::optional<double> Number(absl::string_view key, double least, double most,
                               bool without_least = false) {
    const Json* value = Find(key);
    if (value == nullptr) return std::nullopt;
    const std::string range =
        absl::StrCat("a number ", without_least ? "above " : "from ", least, " to ", most);
    if (!value->is_number()) {
      FailType(key, *value, range, value->is_string() ? "send it without quotes" : "");
      return std::nullopt;
    }
    const double number = value->get<double>();
    if (!(number >= least && number <= most) || (without_least && number == least)) {
      Fail(InvalidValue(Path(key), absl::StrCat(Path(key), ": ", value->dump(),
                                                " is out of range; send ", range, ".")));
      return std::nullopt;
    }
    return number;
  }

  // Points into the body.
  const std::string* String(absl::string_view key, absl::string_view fix = "") {
    const Json* value = Find(key);
    if (value == nullptr) return nullptr;
    if (!value->is_string()) {
      FailType(key, *value, "a string", fix);
      return nullptr;
    }
    return &value->get_ref<const std::string&>();
  }

  // One of `names`, its index.
  std::optional<size_t> OneOf(absl::string_view key, absl::Span<const absl::string_view> names) {
    const std::string list = absl::StrCat("one of ", absl::StrJoin(names, ", "));
    const Json* value = Find(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_string()) {
      FailType(key, *value, list);
      return std::nullopt;
    }
    const std::string& text = value->get_ref<const std::string&>();
    const auto found = std::find(names.begin(), names.end(), text);
    if (found == names.end()) {
      Fail(InvalidValue(Path(key), absl::StrCat(Path(key), ": \"", text.substr(0, 50),
                                                "\" is not known; send ", list, ".")));
      return std::nullopt;
    }
    return found - names.begin();
  }

  const Json* Object(absl::string_view key) {
    const Json* value = Find(key);
    if (value == nullptr || value->is_object()) return value;
    FailType(key, *value, "an object");
    return nullptr;
  }

  const Json* Array(absl::string_view key) {
    const Json* value = Find(key);
    if (value == nullptr || value->is_array()) return value;
    FailType(key, *value, "an array");
    return nullptr;
  }

 private:
  void Index(const Json& object) {
    for (const auto& [key, value] : object.get_ref<const Json::object_t&>()) {
      fields_.emplace(key, &value);
    }
  }

  const std::string prefix_;
  absl::flat_hash_map<absl::string_view, const Json*> fields_;
  std::optional<ApiError> error_;
};

// ---- The diffusion contract ----

constexpr std::array<absl::string_view, 33> kDiffusionFields = {
    "sampler",
    "steps",
    "block_length",
    "threshold",
    "factor",
    "entropy_bound",
    "alg_temp",
    "eps",
    "temperature_start",
    "temperature_end",
    "stable_steps",
    "confident_entropy",
    "cfg_scale",
    "eos_penalty",
    "logits_eos_inf",
    "confidence_eos_eot_inf",
    "steps_min",
    "may_degrade",
    "deadline_seconds",
    "canvas_tokens",
    "frames",
    "eta",
    "t_on",
    "t_off",
    "alpha_on",
    "edit_threshold",
    "edit_steps",
    "repeat_penalty",
    "low_threshold",
    "eos_early_stop",
    "sub_block_length",
    "kv_reuse",
    "num_steps"};  // the last is a name to recognise, not to take

constexpr absl::string_view kTopLevelFields[] = {"temperature", "top_p",  "top_k",   "seed",
                                                 "max_tokens",  "stop",   "stream",  "diffusing",
                                                 "n",           "suffix", "priority"};

absl::Span<const absl::string_view> DiffusionFields() {
  return absl::MakeConstSpan(kDiffusionFields).first(kDiffusionFields.size() - 1);
}

// Levenshtein's distance; both are short.
size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

ApiError UnknownDiffusionField(absl::string_view key) {
  const absl::string_view shown = key.substr(0, 64);
  const std::string param = absl::StrCat("diffusion.", shown);
  for (const absl::string_view name : kTopLevelFields) {
    if (key == name) {
      return UnknownParameter(param, absl::StrCat(param,
                                                  ": this one goes to the top level of the "
                                                  "body, next to `diffusion`."));
    }
  }
  absl::string_view nearest;
  size_t least = std::numeric_limits<size_t>::max();
  for (const absl::string_view name : kDiffusionFields) {
    const size_t distance = EditDistance(shown, name);
    if (distance < least) {
      least = distance;
      nearest = name;
    }
  }
  if (nearest == "num_steps") nearest = "steps";
  return UnknownParameter(
      param, absl::StrCat(param, ": there is no such field; did you mean `", nearest,
                          "`? There are ", absl::StrJoin(DiffusionFields(), ", "), "."));
}

class Parser {
 public:
  Parser(Endpoint endpoint, const Json& body, const RequestLimits& limits)
      : limits_(limits), body_(body, "") {
    request_.endpoint = endpoint;
  }

  ApiResult<GenerationRequest> Parse();

 private:
  bool chat() const { return request_.endpoint == Endpoint::kChat; }
  bool fim() const { return request_.endpoint == Endpoint::kFim; }
  void Warn(std::string text) { request_.warnings.push_back(std::move(text)); }

  void ReadExtraBody();
  void ReadModel();
  void RefuseUnsupported();
  void RefuseTools();
  void ReadLengths();
  void ReadChoices();
  void ReadSampling();
  void ReadIgnoredPenalties();
  void ReadStop();
  void ReadStreaming();
  void ReadPriority();
  void ReadDiffusion();
  void ReadPrompts();
  std::optional<PromptIds> ReadIds(const Json& list, const std::string& param);
  void ReadMessages();
  void ReadMessage(const Json& message, size_t index, Json& messages);
  std::optional<std::string> ReadParts(const Json& parts, const std::string& param);
  void ReadToolCalls(const Json& calls, const std::string& param, Json& message);

  const RequestLimits& limits_;
  Reader body_;
  GenerationRequest request_;
};

void Parser::ReadExtraBody() {
  // The OpenAI SDKs merge `extra_body` into the body; Mercury takes the literal field too.
  if (const Json* extra = body_.Object("extra_body")) body_.Merge(*extra, "extra_body");
}

void Parser::ReadModel() {
  const std::string* model = body_.String("model");
  if (body_.failed()) return;
  if (model == nullptr || model->empty()) {
    body_.Fail(MissingParameter(
        "model", "model: name the model to use; GET /v1/models lists those that there are."));
  } else if (model->size() > limits_.model_bytes_max) {
    body_.Fail(InvalidValue("model",
                            absl::StrCat("model: the name has ", model->size(), " bytes; at most ",
                                         limits_.model_bytes_max, " are taken.")));
  } else {
    request_.model = *model;
  }
}

// Fields that would change the answer and that nothing here can honour: silence would be a lie.
struct UnsupportedField {
  absl::string_view name;
  absl::string_view why;
};
constexpr UnsupportedField kUnsupported[] = {
    {"logit_bias", "token biases are not supported; leave it out"},
    {"logprobs", "log probabilities are not supported yet; leave it out"},
    {"top_logprobs", "log probabilities are not supported yet; leave it out"},
    {"prompt_logprobs", "log probabilities are not supported yet; leave it out"},
    {"audio", "only text is generated; leave it out"},
    {"web_search_options", "the server fetches nothing from the web; leave it out"},
    {"min_tokens", "not supported; diffusion.eos_penalty makes answers longer"},
    {"ignore_eos", "not supported; diffusion.logits_eos_inf keeps the end of text away"},
    {"stop_token_ids", "not supported; use stop strings (`stop`)"},
    {"bad_words", "not supported; leave it out"},
    {"allowed_token_ids", "not supported; leave it out"},
    {"use_beam_search", "a diffusion model has no beams; leave it out"},
    {"guided_json", "constrained output is not supported yet; leave it out"},
    {"guided_regex", "constrained output is not supported yet; leave it out"},
    {"guided_choice", "constrained output is not supported yet; leave it out"},
    {"guided_grammar", "constrained output is not supported yet; leave it out"},
    {"structured_outputs", "constrained output is not supported yet; leave it out"},
    {"grammar", "constrained output is not supported yet; leave it out"},
    {"chat_template", "the model's own template is used; leave it out"},
    {"continue_final_message", "not supported; use /v1/completions to continue a text"},
    {"documents", "not supported; put the text into a message"},
};

void Parser::RefuseUnsupported() {
  for (const UnsupportedField& field : kUnsupported) {
    const Json* value = body_.Find(field.name);
    if (value == nullptr) continue;
    // logprobs: 0 of /v1/completions asks for the chosen token's probability.
    const bool counts = field.name == "logprobs" && value->is_number();
    if (!IsNeutral(*value) || counts) {
      body_.Fail(UnsupportedParameter(field.name, absl::StrCat(field.name, ": ", field.why, ".")));
    }
  }
  if (const Json* format = body_.Object("response_format")) {
    const auto type = format->find("type");
    if (type == format->end() || *type != "text") {
      body_.Fail(UnsupportedParameter(
          "response_format",
          "response_format: only {\"type\": \"text\"} is supported yet; ask for JSON in the "
          "prompt, or leave it out."));
    }
  }
  if (const Json* modalities = body_.Array("modalities")) {
    for (const Json& modality : *modalities) {
      if (modality != "text") {
        body_.Fail(UnsupportedParameter("modalities",
                                        "modalities: only \"text\" is generated; leave it out."));
      }
    }
  }
  if (body_.Bool("echo").value_or(false) && request_.endpoint != Endpoint::kCompletion) {
    body_.Fail(UnsupportedParameter("echo", "echo: only /v1/completions has it; leave it out."));
  }
  const Json* generation_prompt = body_.Find("add_generation_prompt");
  if (generation_prompt != nullptr && *generation_prompt != true) {
    body_.Fail(UnsupportedParameter("add_generation_prompt",
                                    "add_generation_prompt: always true here; leave it out."));
  }
}

// The model could write calls, but nobody here would find them in its text.
void Parser::RefuseTools() {
  for (const auto& [list, choice] :
       {std::pair<absl::string_view, absl::string_view>{"tools", "tool_choice"},
        {"functions", "function_call"}}) {
    const Json* chosen = body_.Find(choice);
    const bool none = chosen != nullptr && *chosen == "none";
    if (chosen != nullptr && !none && *chosen != "auto") {
      body_.Fail(UnsupportedParameter(
          choice, absl::StrCat(choice,
                               ": tool calls are not supported yet; send \"none\" or "
                               "leave it out.")));
    }
    const Json* tools = body_.Find(list);
    if (tools != nullptr && !none && !IsNeutral(*tools)) {
      body_.Fail(UnsupportedParameter(
          list, absl::StrCat(list, ": tool calls are not supported yet; leave it out or send ",
                             choice, ": \"none\".")));
    }
  }
}

void Parser::ReadLengths() {
  const auto max_tokens = body_.Int("max_tokens", 1, limits_.max_tokens_max);
  const auto completion = body_.Int("max_completion_tokens", 1, limits_.max_tokens_max);
  if (max_tokens.has_value() && completion.has_value() && *max_tokens != *completion) {
    body_.Fail(InvalidValue(
        "max_completion_tokens",
        absl::StrCat("max_completion_tokens: ", *completion,
                     " contradicts max_tokens: ", *max_tokens, "; send one of the two.")));
  }
  const auto either = max_tokens.has_value() ? max_tokens : completion;
  if (either.has_value()) request_.max_tokens = static_cast<int32_t>(*either);
}

void Parser::ReadChoices() {
  request_.n = static_cast<int32_t>(body_.Int("n", 1, limits_.choices_max).value_or(1));
  const auto best_of = body_.Int("best_of", 1, std::numeric_limits<int32_t>::max());
  if (best_of.has_value() && *best_of != request_.n) {
    body_.Fail(UnsupportedParameter(
        "best_of", absl::StrCat("best_of: choosing the best of several answers is not supported; "
                                "leave it out or send n: ",
                                request_.n, ".")));
  }
}

void Parser::ReadSampling() {
  DecodingParams& params = request_.params;
  if (const auto temperature = body_.Number("temperature", 0, 2)) {
    params.temperature = static_cast<float>(*temperature);
    request_.params_set.insert("temperature");
  }
  if (const auto top_p = body_.Number("top_p", 0, 1, /*without_least=*/true)) {
    params.top_p = static_cast<float>(*top_p);
    request_.params_set.insert("top_p");
  }
  if (const auto top_k = body_.Int("top_k", -1, std::numeric_limits<int32_t>::max())) {
    params.top_k = static_cast<int32_t>(std::max<int64_t>(*top_k, 0));  // -1 is off, as 0
    request_.params_set.insert("top_k");
  }
  if (const Json* seed = body_.Find("seed")) {
    if (!seed->is_number_integer()) {
      body_.FailType("seed", *seed, "an integer of 64 bits",
                     seed->is_string() ? "send it without quotes" : "");
    } else {
      // OpenAI's seeds are signed: a negative one is its two's complement.
      request_.seed = seed->is_number_unsigned() ? seed->get<uint64_t>()
                                                 : static_cast<uint64_t>(seed->get<int64_t>());
    }
  }
  ReadIgnoredPenalties();
}

void Parser::ReadIgnoredPenalties() {
  struct Penalty {
    absl::string_view name;
    double least, most, neutral;
    bool without_least;
  };
  static constexpr Penalty kPenalties[] = {{"frequency_penalty", -2, 2, 0, false},
                                           {"presence_penalty", -2, 2, 0, false},
                                           {"repetition_penalty", 0, 1000, 1, true},
                                           {"min_p", 0, 1, 0, false}};
  for (const Penalty& penalty : kPenalties) {
    const auto value =
        body_.Number(penalty.name, penalty.least, penalty.most, penalty.without_least);
    if (value.has_value() && *value != penalty.neutral) {
      Warn(absl::StrCat(penalty.name, " is not supported and was ignored"));
    }
  }
  if (const std::string* effort = body_.String("reasoning_effort")) {
    if (*effort != "none" && *effort != "instant" && *effort != "minimal") {
      Warn("reasoning_effort has no effect: the model does not reason before it answers");
    }
  }
  body_.Bool("reasoning_summary");
  body_.Bool("reasoning_summary_wait");
}

void Parser::ReadStop() {
  const Json* stop = body_.Find("stop");
  if (stop == nullptr) {
    // Mercury's defaults: code to fill in ends at a blank line.
    if (fim()) request_.stop = {"\n\n", "\n \n"};
    return;
  }
  if (!stop->is_string() && !stop->is_array()) {
    body_.FailType("stop", *stop,
                   absl::StrCat("a string or an array of at most ", limits_.stop_max, " strings"));
    return;
  }
  const auto add = [&](const Json& entry, const std::string& param) {
    if (!entry.is_string()) {
      body_.FailType(param, entry, "a string");
      return;
    }
    const std::string& text = entry.get_ref<const std::string&>();
    if (text.empty()) {
      body_.Fail(InvalidValue(param, absl::StrCat(param,
                                                  ": an empty string stops nothing; leave "
                                                  "it out.")));
    } else if (text.size() > limits_.stop_bytes_max) {
      body_.Fail(InvalidValue(
          param, absl::StrCat(param, ": ", text.size(), " bytes; a stop string has at most ",
                              limits_.stop_bytes_max, ".")));
    } else {
      request_.stop.push_back(text);
    }
  };
  if (stop->is_string()) {
    add(*stop, "stop");
    return;
  }
  if (stop->size() > static_cast<size_t>(limits_.stop_max)) {
    body_.Fail(InvalidValue("stop", absl::StrCat("stop: ", stop->size(), " strings; send at most ",
                                                 limits_.stop_max, ".")));
    return;
  }
  for (size_t i = 0; i < stop->size(); ++i) add((*stop)[i], absl::StrCat("stop[", i, "]"));
}

void Parser::ReadStreaming() {
  request_.stream = body_.Bool("stream").value_or(false);
  if (const Json* object = body_.Object("stream_options")) {
    Reader options(*object, "stream_options.");
    request_.include_usage = options.Bool("include_usage").value_or(false);
    if (options.failed()) body_.Fail(options.TakeError());
  }
  request_.diffusing = body_.Bool("diffusing").value_or(false);
  if (request_.diffusing && !request_.stream) {
    Warn("diffusing has no effect without stream: true");
  }
}

void Parser::ReadPriority() {
  request_.priority = fim() ? PriorityClass::kInteractive : PriorityClass::kStandard;
  if (body_.Bool("realtime").value_or(false)) request_.priority = PriorityClass::kInteractive;
  static constexpr absl::string_view kTiers[] = {"auto",  "default",  "standard", "flex",
                                                 "scale", "priority", "fast"};
  if (const auto tier = body_.OneOf("service_tier", kTiers)) {
    request_.service_tier = std::string(*tier == 0 ? "default" : kTiers[*tier]);
    if (*tier == 3) request_.priority = PriorityClass::kBatch;
    if (*tier > 3) request_.priority = PriorityClass::kInteractive;
  }
  static constexpr absl::string_view kClasses[] = {"interactive", "standard", "batch"};
  if (const auto priority = body_.OneOf("priority", kClasses)) {
    request_.priority = static_cast<PriorityClass>(*priority);
  }
}

void Parser::ReadDiffusion() {
  const Json* object = body_.Object("diffusion");
  if (object == nullptr) return;
  Reader reader(*object, "diffusion.");
  // In the order of the body, so that the same body always names the same field.
  for (const auto& entry : object->items()) {
    const auto known = DiffusionFields();
    if (std::find(known.begin(), known.end(), entry.key()) == known.end()) {
      body_.Fail(UnknownDiffusionField(entry.key()));
      return;
    }
  }
  DecodingParams& params = request_.params;
  const auto was_set = [&](absl::string_view field) {
    request_.params_set.insert(std::string(field));
  };
  const auto number = [&](absl::string_view key, double least, double most, bool without_least,
                          float DecodingParams::*field) {
    if (const auto value = reader.Number(key, least, most, without_least)) {
      params.*field = static_cast<float>(*value);
      was_set(key);
    }
  };
  const auto flag = [&](absl::string_view key, bool DecodingParams::*field) {
    if (const auto value = reader.Bool(key)) {
      params.*field = *value;
      was_set(key);
    }
  };
  const auto integer = [&](absl::string_view key, int64_t least, int64_t most) {
    const auto value = reader.Int(key, least, most);
    return value.has_value() ? std::optional<int32_t>(static_cast<int32_t>(*value)) : std::nullopt;
  };

  if (const std::string* sampler = reader.String("sampler")) {
    const absl::StatusOr<const SamplerEntry*> found = FindSampler(sampler->substr(0, 64));
    if (!found.ok()) {
      reader.Fail(InvalidValue("diffusion.sampler",
                               absl::StrCat("diffusion.sampler: ", found.status().message(), ".")));
    } else {
      params.sampler = std::string((*found)->name);
      was_set("sampler");
    }
  }
  if (const auto steps = integer("steps", 1, limits_.num_steps_max)) {
    params.num_steps = *steps;
    was_set("num_steps");
  }
  if (const auto block_length = integer("block_length", 1, limits_.max_tokens_max)) {
    params.block_length = *block_length;
    was_set("block_length");
  }
  if (const auto sub_block_length = integer("sub_block_length", 1, limits_.max_tokens_max)) {
    params.sub_block_length = *sub_block_length;
    was_set("sub_block_length");
  }
  if (const std::string* kv_reuse = reader.String("kv_reuse")) {
    const absl::StatusOr<KvReuse> found = ParseKvReuse(*kv_reuse);
    if (!found.ok()) {
      reader.Fail(InvalidValue("diffusion.kv_reuse", absl::StrCat("diffusion.kv_reuse: ",
                                                                  found.status().message(), ".")));
    } else {
      params.kv_reuse = *found;
      was_set("kv_reuse");
    }
  }
  number("threshold", 0, 1, false, &DecodingParams::threshold);
  number("factor", 0, kNumberMax, true, &DecodingParams::factor);
  number("entropy_bound", 0, kNumberMax, false, &DecodingParams::entropy_bound);
  number("alg_temp", 0, kNumberMax, false, &DecodingParams::alg_temp);
  number("eps", 0, 1, true, &DecodingParams::eps);
  number("temperature_start", 0, kNumberMax, true, &DecodingParams::temperature_start);
  number("temperature_end", 0, kNumberMax, true, &DecodingParams::temperature_end);
  if (const auto stable = integer("stable_steps", 0, limits_.num_steps_max)) {
    params.stable_steps = *stable;
    was_set("stable_steps");
  }
  number("confident_entropy", 0, kNumberMax, false, &DecodingParams::confident_entropy);
  number("cfg_scale", 0, kNumberMax, false, &DecodingParams::cfg_scale);
  number("eos_penalty", -kNumberMax, kNumberMax, false, &DecodingParams::eos_penalty);
  flag("logits_eos_inf", &DecodingParams::logits_eos_inf);
  flag("confidence_eos_eot_inf", &DecodingParams::confidence_eos_eot_inf);
  number("eta", 0, kNumberMax, false, &DecodingParams::eta);
  number("t_on", 0, 1, true, &DecodingParams::t_on);
  number("t_off", 0, 1, true, &DecodingParams::t_off);
  number("alpha_on", 0, 1, true, &DecodingParams::alpha_on);
  number("edit_threshold", 0, 1, false, &DecodingParams::edit_threshold);
  if (const auto edit_steps = integer("edit_steps", 0, limits_.num_steps_max)) {
    params.edit_steps = *edit_steps;
    was_set("edit_steps");
  }
  number("repeat_penalty", 0, kNumberMax, false, &DecodingParams::repeat_penalty);
  number("low_threshold", 0, 1, false, &DecodingParams::low_threshold);
  flag("eos_early_stop", &DecodingParams::eos_early_stop);

  const auto may_degrade = reader.Bool("may_degrade");
  if (const auto steps_min = integer("steps_min", 1, limits_.num_steps_max)) {
    request_.steps_min = *steps_min;
    if (may_degrade.has_value() && !*may_degrade) {
      reader.Fail(InvalidValue("diffusion.steps_min",
                               "diffusion.steps_min: it says how far the steps may be lowered, but "
                               "may_degrade is false; leave one of them out."));
    }
    if (params.num_steps > 0 && *steps_min > params.num_steps) {
      reader.Fail(InvalidValue("diffusion.steps_min",
                               absl::StrCat("diffusion.steps_min: ", *steps_min,
                                            " is above diffusion.steps: ", params.num_steps, ".")));
    }
  }
  request_.may_degrade = may_degrade.value_or(request_.steps_min > 0);
  if (const auto seconds =
          reader.Number("deadline_seconds", 0, absl::ToDoubleSeconds(limits_.deadline_max),
                        /*without_least=*/true)) {
    request_.deadline = absl::Seconds(*seconds);
  }
  if (const auto canvas = integer("canvas_tokens", 1, limits_.max_tokens_max)) {
    request_.canvas_tokens = *canvas;
    if (request_.max_tokens.has_value() && *canvas > *request_.max_tokens) {
      reader.Fail(InvalidValue("diffusion.canvas_tokens",
                               absl::StrCat("diffusion.canvas_tokens: ", *canvas,
                                            " is above max_tokens: ", *request_.max_tokens, ".")));
    }
  }
  request_.diffusion_frames = reader.Bool("frames").value_or(false);
  if (request_.diffusion_frames && !request_.stream) {
    Warn("diffusion.frames has no effect without stream: true");
  }
  if (reader.failed()) body_.Fail(reader.TakeError());
}

std::optional<PromptIds> Parser::ReadIds(const Json& list, const std::string& param) {
  if (list.size() > static_cast<size_t>(limits_.prompt_ids_max)) {
    body_.Fail(InvalidValue("prompt", absl::StrCat(param, ": ", list.size(), " token ids; at most ",
                                                   limits_.prompt_ids_max, " are taken.")));
    return std::nullopt;
  }
  PromptIds ids;
  ids.reserve(list.size());
  for (const Json& id : list) {
    if (!id.is_number_integer()) {
      body_.FailType(absl::StrCat(param, "[", ids.size(), "]"), id, "a token id",
                     "an array holds either strings or token ids");
      return std::nullopt;
    }
    if (!id.is_number_unsigned() ||
        id.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<TokenId>::max())) {
      const std::string where = absl::StrCat(param, "[", ids.size(), "]");
      body_.Fail(InvalidValue(where, absl::StrCat(where, ": ", id.dump(), " is no token id.")));
      return std::nullopt;
    }
    ids.push_back(id.get<TokenId>());
  }
  return ids;
}

void Parser::ReadPrompts() {
  request_.echo = body_.Bool("echo").value_or(false);
  if (const std::string* suffix = body_.String("suffix")) {
    // An editor plug-in sends this for "nothing follows".
    const bool nothing = fim() && *suffix == kContinueNoSuffix;
    request_.suffix = nothing ? "" : *suffix;
  }
  const Json* prompt = body_.Find("prompt");
  if (prompt == nullptr) {
    body_.Fail(MissingParameter("prompt", "prompt: the text to continue is missing."));
    return;
  }
  if (prompt->is_string()) {
    request_.prompts.emplace_back(prompt->get_ref<const std::string&>());
    return;
  }
  if (fim() || !prompt->is_array()) {
    body_.FailType("prompt", *prompt,
                   fim() ? "a string" : "a string, an array of strings, or token ids");
    return;
  }
  if (prompt->empty()) {
    body_.Fail(InvalidValue("prompt", "prompt: the array is empty; send at least one prompt."));
    return;
  }
  if (prompt->front().is_number()) {
    if (auto ids = ReadIds(*prompt, "prompt")) request_.prompts.emplace_back(*std::move(ids));
    return;
  }
  if (prompt->size() > static_cast<size_t>(limits_.prompts_max)) {
    body_.Fail(
        InvalidValue("prompt", absl::StrCat("prompt: ", prompt->size(), " prompts; send at most ",
                                            limits_.prompts_max, " in one body.")));
    return;
  }
  for (size_t i = 0; i < prompt->size() && !body_.failed(); ++i) {
    const Json& entry = (*prompt)[i];
    const std::string param = absl::StrCat("prompt[", i, "]");
    if (entry.is_string()) {
      request_.prompts.emplace_back(entry.get_ref<const std::string&>());
    } else if (entry.is_array()) {
      if (auto ids = ReadIds(entry, param)) request_.prompts.emplace_back(*std::move(ids));
    } else {
      body_.FailType(param, entry, "a string or an array of token ids");
    }
  }
}

std::optional<std::string> Parser::ReadParts(const Json& parts, const std::string& param) {
  std::string text;
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string where = absl::StrCat(param, "[", i, "]");
    if (!parts[i].is_object()) {
      body_.FailType(where, parts[i], "an object like {\"type\": \"text\", \"text\": ...}");
      return std::nullopt;
    }
    Reader part(parts[i], where + ".");
    const std::string* type = part.String("type");
    if (!part.failed() && (type == nullptr || *type != "text")) {
      part.Fail(UnsupportedParameter(
          where + ".type",
          absl::StrCat(where,
                       ".type: only \"text\" parts are supported; this server takes no "
                       "images, audio or files.")));
    }
    const std::string* piece = part.String("text");
    if (piece == nullptr && !part.failed()) {
      part.Fail(MissingParameter(where + ".text", where + ".text: the text is missing."));
    }
    if (part.failed()) {
      body_.Fail(part.TakeError());
      return std::nullopt;
    }
    if (i > 0) text += '\n';
    text += *piece;
  }
  return text;
}

void Parser::ReadToolCalls(const Json& calls, const std::string& param, Json& message) {
  Json copies = Json::array();
  for (size_t i = 0; i < calls.size(); ++i) {
    if (!calls[i].is_object()) {
      body_.FailType(absl::StrCat(param, "[", i, "]"), calls[i], "an object");
      return;
    }
    Json copy = calls[i];
    const auto function = copy.find("function");
    if (function != copy.end() && function->is_object()) {
      const auto arguments = function->find("arguments");
      if (arguments != function->end() && arguments->is_string()) {
        // OpenAI sends the arguments as the text of an object; templates print an object.
        absl::StatusOr<Json> parsed =
            ParseOrderedJson(arguments->get_ref<const std::string&>(), "arguments", kBodyDepthMax);
        if (parsed.ok() && parsed->is_object()) *arguments = *std::move(parsed);
      }
    }
    copies.push_back(std::move(copy));
  }
  message["tool_calls"] = std::move(copies);
}

void Parser::ReadMessage(const Json& message, size_t index, Json& messages) {
  const std::string where = absl::StrCat("messages[", index, "]");
  if (!message.is_object()) {
    body_.FailType(where, message, "an object like {\"role\": \"user\", \"content\": ...}");
    return;
  }
  Reader reader(message, where + ".");
  static constexpr absl::string_view kRoles[] = {"system",    "developer", "user",
                                                 "assistant", "tool",      "function"};
  const auto role = reader.OneOf("role", kRoles);
  if (!role.has_value() && !reader.failed()) {
    reader.Fail(MissingParameter(
        where + ".role",
        absl::StrCat(where, ".role: say who speaks: one of ", absl::StrJoin(kRoles, ", "), ".")));
  }
  Json copy;
  // Templates know no developer.
  if (role.has_value()) copy["role"] = *role == 1 ? "system" : std::string(kRoles[*role]);
  const bool is_assistant = role.has_value() && kRoles[*role] == "assistant";

  const Json* calls = is_assistant ? reader.Array("tool_calls") : nullptr;
  const bool has_calls = calls != nullptr && !calls->empty();
  const Json* content = reader.Find("content");
  if (content == nullptr) {
    if (!is_assistant) {
      reader.Fail(MissingParameter(where + ".content",
                                   absl::StrCat(where,
                                                ".content: the text of the message is missing; "
                                                "send a string.")));
    }
    copy["content"] = has_calls ? Json() : Json("");
  } else if (content->is_string()) {
    copy["content"] = *content;
  } else if (content->is_array()) {
    const std::optional<std::string> text = ReadParts(*content, where + ".content");
    copy["content"] = text.value_or("");
  } else {
    reader.FailType("content", *content, "a string or an array of text parts");
  }
  for (const absl::string_view key : {"audio", "function_call"}) {
    const Json* value = reader.Find(key);
    if (value != nullptr && !IsNeutral(*value)) {
      reader.Fail(UnsupportedParameter(
          reader.Path(key), absl::StrCat(reader.Path(key), ": not supported; leave it out",
                                         key == "audio" ? "." : " or send tool_calls.")));
    }
  }
  for (const absl::string_view key : {"name", "tool_call_id"}) {
    if (const std::string* text = reader.String(key)) copy[std::string(key)] = *text;
  }
  if (reader.failed()) {
    body_.Fail(reader.TakeError());
    return;
  }
  if (has_calls) ReadToolCalls(*calls, where + ".tool_calls", copy);
  messages.push_back(std::move(copy));
}

void Parser::ReadMessages() {
  const Json* list = body_.Array("messages");
  if (body_.failed()) return;
  if (list == nullptr || list->empty()) {
    body_.Fail(MissingParameter("messages",
                                "messages: send at least one message, like {\"role\": \"user\", "
                                "\"content\": ...}."));
    return;
  }
  if (list->size() > static_cast<size_t>(limits_.messages_max)) {
    body_.Fail(InvalidValue("messages",
                            absl::StrCat("messages: ", list->size(), " messages; send at most ",
                                         limits_.messages_max, ".")));
    return;
  }
  ChatPrompt chat;
  for (size_t i = 0; i < list->size() && !body_.failed(); ++i) {
    ReadMessage((*list)[i], i, chat.messages);
  }
  if (const Json* arguments = body_.Object("chat_template_kwargs")) {
    chat.template_arguments = *arguments;
  }
  request_.prompts.emplace_back(std::move(chat));
}

ApiResult<GenerationRequest> Parser::Parse() {
  ReadExtraBody();
  ReadModel();
  RefuseUnsupported();
  RefuseTools();
  ReadLengths();
  ReadChoices();
  ReadSampling();
  ReadStop();
  ReadStreaming();
  ReadPriority();
  ReadDiffusion();
  if (!body_.failed()) {
    if (chat()) {
      ReadMessages();
    } else {
      ReadPrompts();
    }
  }
  if (!body_.failed() && request_.num_choices() > limits_.choices_max) {
    body_.Fail(InvalidValue(
        "n", absl::StrCat("n: ", request_.n, " answers to ", request_.prompts.size(),
                          " prompts are ", request_.num_choices(), "; ask for at most ",
                          limits_.choices_max, " in one body.")));
  }
  if (body_.failed()) return body_.TakeError();
  return std::move(request_);
}

}  // namespace

ApiResult<GenerationRequest> ParseGenerationRequest(Endpoint endpoint, absl::string_view body,
                                                    const RequestLimits& limits) {
  const absl::StatusOr<Json> json = ParseOrderedJson(body, "The body", kBodyDepthMax);
  if (!json.ok()) {
    return InvalidJson(absl::StrCat(json.status().message(), "."));
  }
  if (!json->is_object()) {
    return InvalidJson(absl::StrCat("The body must be a JSON object, found ", TypeOf(*json), "."));
  }
  return Parser(endpoint, *json, limits).Parse();
}

std::string RequestFieldName(absl::string_view params_field) {
  if (params_field == "num_steps") return "diffusion.steps";
  const auto known = DiffusionFields();
  if (std::find(known.begin(), known.end(), params_field) != known.end()) {
    return absl::StrCat("diffusion.", params_field);
  }
  return std::string(params_field);
}

}  // namespace cinnabar
