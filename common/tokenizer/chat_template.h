// Chat templates: the `chat_template` of a Hugging Face tokenizer, a program in a subset of Jinja,
// run on messages. Whitespace rules, `tojson` and the loop controls are those transformers gives
// Jinja.
//
// What is there: for (filter, else, unpacking, loop.*), if, set (names, namespace attributes,
// blocks), macro, filter blocks, generation, raw, break, continue; every operator of Jinja's
// expressions; the filters and tests that chat templates use; the common methods of str, list and
// dict; namespace(), range(), dict(), raise_exception(), strftime_now(). Anything else is an
// Unimplemented error with its line. Differences from Python: integers have 64 bits (overflow is an
// error), upper() and lower() map character by character, JSON numbers beyond int64 become floats.
#ifndef CINNABAR_COMMON_TOKENIZER_CHAT_TEMPLATE_H_
#define CINNABAR_COMMON_TOKENIZER_CHAT_TEMPLATE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "common/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

// What the template sees. ordered_json: `tojson` prints keys in the order the request had them.
struct ChatInput {
  nlohmann::ordered_json messages = nlohmann::ordered_json::array();
  nlohmann::ordered_json tools;      // null: none given
  nlohmann::ordered_json documents;  // null: none given
  bool add_generation_prompt = true;
  // "bos_token" and so on: Tokenizer::special_tokens().
  std::map<std::string, std::string> special_tokens;
  // Any further variable (enable_thinking): an object, or null. It may not redefine the above.
  nlohmann::ordered_json extra;
  // The local time strftime_now() tells; absent: calling it is an error, so that renders repeat.
  std::optional<absl::Time> now;
};

struct ChatLimits {
  int64_t steps_max = 2'000'000;       // evaluated expressions and statements, values walked
  int64_t made_bytes_max = 256 << 20;  // text made on the way, the output included
  int64_t output_bytes_max = 16 << 20;
};

struct RenderedChat {
  std::string text;
  // Ascending, disjoint: the bytes that came from the request (message contents, roles, tool names,
  // extra strings) and not from the template or special_tokens. As EncodeOptions::plain_ranges they
  // keep a user from writing the model's special tokens.
  std::vector<TextRange> input_ranges;
};

// Immutable; safe from any thread. Copies share the parsed template.
class ChatTemplate {
 public:
  // InvalidArgument (not a template) or Unimplemented (a tag outside the subset), with the line.
  static absl::StatusOr<ChatTemplate> Parse(absl::string_view source);

  // InvalidArgument: what the template raised with raise_exception, or an operation that has no
  // result, with the line. Unimplemented: a filter, test or method outside the subset.
  // ResourceExhausted: a limit.
  absl::StatusOr<RenderedChat> Render(const ChatInput& input, const ChatLimits& limits = {}) const;

 private:
  struct Tree;
  explicit ChatTemplate(std::shared_ptr<const Tree> tree) : tree_(std::move(tree)) {}
  std::shared_ptr<const Tree> tree_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_CHAT_TEMPLATE_H_
