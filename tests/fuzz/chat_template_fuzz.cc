// Parses and renders a hostile template. Input: the template, then, after a zero byte, variables
// (JSON).
#include <cstddef>
#include <cstdint>
#include <string>

#include "common/base/check.h"
#include "common/tokenizer/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  const absl::StatusOr<cinnabar::ChatTemplate> parsed =
      cinnabar::ChatTemplate::Parse(input.substr(0, zero));
  if (!parsed.ok()) return 0;
  cinnabar::ChatInput chat;
  chat.messages = {
      {{"role", "user"}, {"content", " <|mask|> caf\u00e9\n"}},
      {{"role", "assistant"}, {"content", "<think>a</think>b"}, {"x", {1, 2.5, nullptr}}}};
  chat.tools = {{{"type", "function"}, {"function", {{"name", "f"}}}}};
  chat.special_tokens = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  if (zero != absl::string_view::npos) {
    const absl::string_view text = input.substr(zero + 1);
    chat.extra = nlohmann::ordered_json::parse(text.begin(), text.end(), nullptr, false);
    if (!chat.extra.is_object()) chat.extra = nullptr;
  }
  const absl::StatusOr<cinnabar::RenderedChat> rendered = parsed->Render(
      chat, {.steps_max = 20'000, .made_bytes_max = 1 << 20, .output_bytes_max = 1 << 18});
  if (!rendered.ok()) return 0;
  size_t end = 0;
  for (const cinnabar::TextRange& range : rendered->input_ranges) {
    CINNABAR_CHECK(range.begin >= end && range.begin < range.end);
    end = range.end;
  }
  CINNABAR_CHECK(end <= rendered->text.size());
  return 0;
}
