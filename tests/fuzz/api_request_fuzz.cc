// A hostile body, from JSON to work. Input: a byte that chooses the endpoint ('c', 'f', else chat),
// then the body.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/json.h"
#include "common/tokenizer/utf8.h"
#include "gateway/api/build_work.h"
#include "gateway/api/render.h"

namespace cinnabar {
namespace {

using Endpoint = GenerationRequest::Endpoint;

// One token a byte, <mask> and <eos>; the alphabet is GPT-2's.
Tokenizer ByteTokenizer() {
  nlohmann::json vocab = nlohmann::json::object();
  char32_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool is_printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    std::string symbol;
    AppendUtf8(is_printable ? static_cast<char32_t>(byte) : next++, &symbol);
    vocab[symbol] = byte + 2;
  }
  nlohmann::json json;
  json["model"] = {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}};
  json["pre_tokenizer"] = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  json["added_tokens"] = {{{"id", 0}, {"content", "<mask>"}, {"special", true}},
                          {{"id", 1}, {"content", "<eos>"}, {"special", true}}};
  absl::StatusOr<Tokenizer> tokenizer =
      Tokenizer::FromJson(json.dump(), R"({"mask_token": "<mask>", "eos_token": "<eos>"})");
  CINNABAR_CHECK(tokenizer.ok()) << tokenizer.status().ToString();
  return *std::move(tokenizer);
}

const ServedModel& Model() {
  static const ServedModel* model = [] {
    auto* made = new ServedModel{.name = "m", .tokenizer = ByteTokenizer()};
    absl::StatusOr<ChatTemplate> chat = ChatTemplate::Parse(
        "{% for m in messages %}<eos>{{ m.role }}: {{ m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}<eos>");
    CINNABAR_CHECK(chat.ok()) << chat.status().ToString();
    made->chat_template = *std::move(chat);
    made->traits.vocab_size = 258;
    made->traits.mask_token = 0;
    made->traits.eos_tokens = {1};
    made->traits.positions_max = 512;
    made->traits.default_sampler = "low_confidence";
    CINNABAR_CHECK(CheckServedModel(*made).ok());
    return made;
  }();
  return *model;
}

void CheckError(const ApiError& error) {
  CINNABAR_CHECK(error.http_status == 400) << error.message;
  CINNABAR_CHECK(!error.code.empty() && !error.message.empty());
  CINNABAR_CHECK(error.message.size() < 4096) << error.message.size();
  CINNABAR_CHECK(ParseJson(ErrorBody(error), "error").ok()) << ErrorBody(error);
}

void CheckRequest(const GenerationRequest& request, Endpoint endpoint) {
  const RequestLimits limits;
  CINNABAR_CHECK(request.endpoint == endpoint);
  CINNABAR_CHECK(!request.model.empty());
  CINNABAR_CHECK(!request.prompts.empty());
  CINNABAR_CHECK(request.n >= 1 && request.num_choices() <= limits.choices_max);
  CINNABAR_CHECK(request.stop.size() <= static_cast<size_t>(limits.stop_max));
  for (const std::string& stop : request.stop) {
    CINNABAR_CHECK(!stop.empty() && stop.size() <= limits.stop_bytes_max);
    CINNABAR_CHECK(ValidUtf8End(stop, 0) == stop.size());
  }
  CINNABAR_CHECK(request.params.temperature >= 0 && request.params.temperature <= 2);
  CINNABAR_CHECK(request.params.top_p > 0 && request.params.top_p <= 1);
  CINNABAR_CHECK(!request.canvas_tokens.has_value() || !request.max_tokens.has_value() ||
                 *request.canvas_tokens <= *request.max_tokens);
  for (const Prompt& prompt : request.prompts) {
    CINNABAR_CHECK(std::holds_alternative<ChatPrompt>(prompt) == (endpoint == Endpoint::kChat));
  }
}

void CheckWork(const Work& work) {
  const v1::WorkItem& item = work.item;
  CINNABAR_CHECK(item.ids_size() <= 512);
  CINNABAR_CHECK(item.undecided_size() == 1);
  CINNABAR_CHECK(work.canvas_tokens >= 1 && work.steps_max >= 1 && work.cost >= 1);
  for (int32_t i = 0; i < item.ids_size(); ++i) {
    // The text of the mask token is never the mask token.
    const bool undecided = i >= item.undecided(0).begin() && i < item.undecided(0).end();
    CINNABAR_CHECK((item.ids(i) == 0) == undecided) << i;
  }
  TextAssembler assembler(Model().tokenizer, work.text);
  std::vector<TokenId> tokens;
  for (int32_t i = work.text.begin; i < work.text.end; ++i) tokens.push_back(2 + i * 31 % 256);
  const absl::StatusOr<std::string> text = assembler.AddResult(tokens);
  CINNABAR_CHECK(text.ok() && assembler.done());
  CINNABAR_CHECK(ValidUtf8End(*text, 0) == text->size());
}

}  // namespace
}  // namespace cinnabar

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using cinnabar::Endpoint;
  if (size == 0) return 0;
  const absl::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  const Endpoint endpoint = data[0] == 'c'   ? Endpoint::kCompletion
                            : data[0] == 'f' ? Endpoint::kFim
                                             : Endpoint::kChat;
  const cinnabar::ApiResult<cinnabar::GenerationRequest> request =
      cinnabar::ParseGenerationRequest(endpoint, body);
  if (!request.ok()) {
    cinnabar::CheckError(request.error());
    return 0;
  }
  cinnabar::CheckRequest(*request, endpoint);
  const cinnabar::ApiResult<std::vector<cinnabar::Work>> all =
      cinnabar::BuildAllWork(*request, cinnabar::Model(), 1);
  if (!all.ok()) {
    cinnabar::CheckError(all.error());
    return 0;
  }
  CINNABAR_CHECK(all->size() == static_cast<size_t>(request->num_choices()));
  cinnabar::CheckWork(all->back());
  return 0;
}
