// Text to token ids and back: the byte-level BPE tokenizers of Hugging Face folders. Everything is
// taken from the files; what a file asks for and this library cannot do is an Unimplemented error
// naming it.
//
// Sources: the file format and the order of operations are those of the Hugging Face `tokenizers`
// library; which files count, and which tokens are special, those of `transformers`.
#ifndef CINNABAR_COMMON_TOKENIZER_TOKENIZER_H_
#define CINNABAR_COMMON_TOKENIZER_TOKENIZER_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace cinnabar {

// Bytes [begin, end) of a text.
struct TextRange {
  size_t begin = 0;
  size_t end = 0;
  bool operator==(const TextRange&) const = default;
};

struct ExtraSpecialToken {
  std::string text;           // not empty
  std::optional<int32_t> id;  // absent: the id the files give this text, else one past the largest
};

struct TokenizerOptions {
  // Tokens the model has and its files do not name. A text the files know keeps its id and becomes
  // special; with another id it is an error.
  std::vector<ExtraSpecialToken> extra_special_tokens;
  // Overrides the mask token of tokenizer_config.json. Not empty: the text is made special as
  // above.
  ExtraSpecialToken mask_token;
};

struct EncodeOptions {
  // false: the text of a special token is plain text, and no special id comes out. "Special" is
  // what the files flag so and every token they name as bos, eos, unk, sep, pad, cls, mask or
  // additional. Other added tokens (<think>) match either way, as in the tokenizers library.
  bool parse_special = false;
  // Adds what the file's post-processor adds around one text (bos, eos).
  bool add_special_tokens = false;
  // With parse_special: ascending, disjoint ranges of the text that came from a stranger. A special
  // token that touches one is plain text there.
  absl::Span<const TextRange> plain_ranges;
};

struct DecodeOptions {
  bool skip_special = false;
};

// Immutable, safe from any thread; copies are cheap and share the tables.
//
// Bytes: Encode takes any byte string. Each byte that is not part of a valid UTF-8 character is a
// piece of its own, never normalized, so without a normalizer Decode(Encode(x)) == x for every x.
class Tokenizer {
 public:
  // Reads a GGUF file (a path that ends in .gguf), or a Hugging Face folder: tokenizer.json, or
  // vocab.json + merges.txt of a GPT-2 or Qwen2 class tokenizer; with them tokenizer_config.json,
  // chat_template.jinja and, where tokenizer_config.json has no added_tokens_decoder,
  // special_tokens_map.json and added_tokens.json. NotFound: no tokenizer there. InvalidArgument: a
  // file contradicts itself or does not parse. Unimplemented: names the file, the field and the
  // type that is not supported.
  static absl::StatusOr<Tokenizer> Load(const std::string& directory,
                                        const TokenizerOptions& options = {});

  // As Load, from the texts of tokenizer.json and tokenizer_config.json ("" for none).
  static absl::StatusOr<Tokenizer> FromJson(absl::string_view tokenizer_json,
                                            absl::string_view tokenizer_config_json = "",
                                            const TokenizerOptions& options = {});

  // Linear in the text (n log n within one piece). Where the file's pattern backtracks without
  // bound, the rest of that text is one piece. With parse_special off, or inside a plain range, no
  // special id comes out, whatever the text, except of a special token that is the symbol of a
  // single byte (a mask token that is one does not load).
  std::vector<int32_t> Encode(absl::string_view text, const EncodeOptions& options = {}) const;

  // The exact bytes; an id without text gives none. The bytes of a cut sequence need not be valid
  // UTF-8.
  std::string Decode(absl::Span<const int32_t> ids, const DecodeOptions& options = {}) const;
  // Valid UTF-8: Decode with U+FFFD for each maximal invalid part.
  std::string DecodeText(absl::Span<const int32_t> ids, const DecodeOptions& options = {}) const;

  // The bytes one id stands for; empty for an id out of range or without text.
  absl::string_view TokenBytes(int32_t id) const;
  // TokenBytes as valid UTF-8, for people.
  std::string TokenText(int32_t id) const;
  // The id of an added token's text, else of the vocabulary entry with exactly these bytes.
  std::optional<int32_t> IdOf(absl::string_view token_bytes) const;
  bool IsSpecial(int32_t id) const;
  // Whether the id was given as an added token (special or not).
  bool IsAdded(int32_t id) const;

  // One past the largest id, added tokens included. A model may have more rows.
  int32_t vocab_size() const;
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  std::optional<int32_t> pad_id() const;
  std::optional<int32_t> mask_id() const;
  // "bos_token" -> its text, for each of bos, eos, unk, sep, pad, cls, mask that the files name.
  const std::map<std::string, std::string>& special_tokens() const;
  // By name; the unnamed one is "default". chat_template.jinja comes before tokenizer_config.json.
  const std::map<std::string, std::string>& chat_templates() const;

  struct State;  // of the implementation

 private:
  explicit Tokenizer(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_TOKENIZER_TOKENIZER_H_
