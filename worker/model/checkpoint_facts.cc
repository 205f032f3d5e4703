#include "worker/model/checkpoint_facts.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/base/json.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"
#include "common/gguf/gguf.h"
#include "worker/model/gguf_model.h"

namespace cinnabar {
namespace {

using nlohmann::json;

constexpr size_t kConfigBytesMax = 4U << 20;
constexpr size_t kTokenizerBytesMax = 256U << 20;
constexpr int64_t kTokenIdMax = std::numeric_limits<int32_t>::max() - 1;

// Texts under which checkpoints keep their mask token.
constexpr absl::string_view kMaskTexts[] = {"<|mask|>", "<|MASK|>", "<|mdm_mask|>", "<M>",
                                            "[MASK]",   "<MASK>",   "<mask>"};

void AddToken(absl::string_view text, int64_t id, TokenizerFacts& facts) {
  facts.size = std::max(facts.size, static_cast<int32_t>(id + 1));
  facts.added.emplace(text, static_cast<TokenId>(id));
}

// Walks a tokenizer file without keeping its vocabulary, which can have hundreds of thousands of
// entries.
class TokenVisitor : public nlohmann::json_sax<json> {
 public:
  // kTokenizer: tokenizer.json (added_tokens, model.vocab). kVocabulary: an object text -> id.
  // kAdded: the same for added tokens.
  enum class File { kTokenizer, kVocabulary, kAdded };
  TokenVisitor(File file, TokenizerFacts& facts) : file_(file), facts_(facts) {}
  const std::string& error() const { return error_; }

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t value) override { return Number(value); }
  bool number_unsigned(number_unsigned_t value) override {
    return Number(value > static_cast<uint64_t>(kTokenIdMax) ? kTokenIdMax + 1
                                                             : static_cast<int64_t>(value));
  }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t& value) override {
    if (InAddedToken() && path_[2] == "content") content_ = value;
    return true;
  }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override {
    path_.emplace_back();
    if (InAddedToken()) {
      content_.clear();
      id_ = -1;
    }
    return true;
  }
  bool end_object() override {
    if (InAddedToken() && id_ >= 0) AddToken(content_, id_, facts_);
    path_.pop_back();
    return true;
  }
  bool key(string_t& value) override {
    path_.back() = value;
    return true;
  }
  bool start_array(size_t) override {
    path_.emplace_back("[]");
    return true;
  }
  bool end_array() override {
    path_.pop_back();
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception&) override { return false; }

 private:
  // Inside an object of the list added_tokens.
  bool InAddedToken() const {
    return file_ == File::kTokenizer && path_.size() == 3 && path_[0] == "added_tokens" &&
           path_[1] == "[]";
  }
  bool InVocabulary() const {
    if (file_ != File::kTokenizer) return path_.size() == 1;
    return path_.size() == 3 && path_[0] == "model" && path_[1] == "vocab" && path_[2] != "[]";
  }
  bool Number(int64_t value) {
    const bool is_id = InVocabulary() || (InAddedToken() && path_[2] == "id");
    if (!is_id) return true;
    if (value < 0 || value > kTokenIdMax) {
      error_ = "a token id is out of range";
      return false;
    }
    if (file_ == File::kAdded) {
      AddToken(path_.back(), value, facts_);
    } else if (InVocabulary()) {
      facts_.size = std::max(facts_.size, static_cast<int32_t>(value + 1));
    } else {
      id_ = value;
    }
    return true;
  }

  File file_;
  TokenizerFacts& facts_;
  std::vector<std::string> path_;  // the key being read in each open container
  std::string content_;
  int64_t id_ = -1;
  std::string error_;
};

absl::Status Visit(absl::string_view text, const std::string& path, TokenVisitor::File file,
                   TokenizerFacts& facts) {
  if (text.empty()) return absl::OkStatus();
  TokenVisitor visitor(file, facts);
  CINNABAR_RETURN_IF_ERROR(VisitJson(text, path, visitor));
  if (!visitor.error().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", visitor.error()));
  }
  return absl::OkStatus();
}

// mask_token and added_tokens_decoder.
absl::Status ReadTokenizerConfig(absl::string_view text, const std::string& path,
                                 TokenizerFacts& facts) {
  if (text.empty()) return absl::OkStatus();
  CINNABAR_ASSIGN_OR_RETURN(const json config, ParseJson(text, path));
  JsonFields fields(config, path);
  CINNABAR_RETURN_IF_ERROR(fields.status());
  if (fields.Has("mask_token")) {  // a string, or an object with its text as `content`
    const json& mask = config["mask_token"];
    facts.mask_text = mask.is_object() ? fields.Object("mask_token").String("content", "")
                                       : fields.String("mask_token", "");
  }
  if (fields.Has("added_tokens_decoder")) {
    const JsonFields decoder = fields.Object("added_tokens_decoder");
    for (const auto& [id_text, token] : decoder.object().items()) {
      int32_t id = 0;
      const auto content = token.is_object() ? token.find("content") : token.end();
      if (!absl::SimpleAtoi(id_text, &id) || id < 0 || id > kTokenIdMax || !token.is_object() ||
          content == token.end() || !content->is_string()) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": added_tokens_decoder: an entry is not an id with its content"));
      }
      AddToken(content->get<std::string>(), id, facts);
    }
  }
  return fields.status();
}

void Append(const std::vector<int64_t>& ids, std::vector<TokenId>& tokens) {
  for (const int64_t id : ids) {
    if (std::find(tokens.begin(), tokens.end(), id) == tokens.end()) {
      tokens.push_back(static_cast<TokenId>(id));
    }
  }
}

// An absent file reads as empty.
absl::StatusOr<std::string> ReadOptional(const std::string& path, size_t bytes_max) {
  absl::StatusOr<std::string> text = ReadFile(path, bytes_max);
  if (absl::IsNotFound(text.status())) return std::string();
  return text;
}

}  // namespace

absl::StatusOr<CheckpointFacts> ReadCheckpointFacts(const CheckpointTexts& texts,
                                                    absl::string_view directory) {
  const auto path = [&](absl::string_view name) { return absl::StrCat(directory, "/", name); };
  CheckpointFacts facts;
  facts.config_path = path("config.json");
  CINNABAR_ASSIGN_OR_RETURN(facts.config, ParseJson(texts.config, facts.config_path));
  JsonFields config(facts.config, facts.config_path);
  facts.architectures = config.Strings("architectures");
  if (!texts.generation_config.empty()) {
    CINNABAR_ASSIGN_OR_RETURN(const json generation,
                              ParseJson(texts.generation_config, path("generation_config.json")));
    JsonFields fields(generation, path("generation_config.json"));
    Append(fields.Ints("eos_token_id", 0, kTokenIdMax), facts.eos_tokens);
    CINNABAR_RETURN_IF_ERROR(fields.status());
  }
  Append(config.Ints("eos_token_id", 0, kTokenIdMax), facts.eos_tokens);
  CINNABAR_RETURN_IF_ERROR(config.status());

  using enum TokenVisitor::File;
  TokenizerFacts& tokenizer = facts.tokenizer;
  CINNABAR_RETURN_IF_ERROR(Visit(texts.tokenizer, path("tokenizer.json"), kTokenizer, tokenizer));
  if (texts.tokenizer.empty()) {
    CINNABAR_RETURN_IF_ERROR(Visit(texts.vocab, path("vocab.json"), kVocabulary, tokenizer));
    CINNABAR_RETURN_IF_ERROR(
        Visit(texts.added_tokens, path("added_tokens.json"), kAdded, tokenizer));
  }
  CINNABAR_RETURN_IF_ERROR(
      ReadTokenizerConfig(texts.tokenizer_config, path("tokenizer_config.json"), tokenizer));
  return facts;
}

absl::StatusOr<CheckpointFacts> ReadCheckpointFacts(const std::string& directory) {
  CheckpointTexts texts;
  if (HasGgufEnding(directory)) {
    CINNABAR_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(directory));
    CINNABAR_ASSIGN_OR_RETURN(const GgufHeader header, GgufHeader::Read(file.bytes(), directory));
    CINNABAR_ASSIGN_OR_RETURN(texts, GgufTexts(header));
    return ReadCheckpointFacts(texts, directory);
  }
  const std::string config_path = absl::StrCat(directory, "/config.json");
  CINNABAR_ASSIGN_OR_RETURN(texts.config, ReadFile(config_path, kConfigBytesMax));
  const std::tuple<std::string*, absl::string_view, size_t> files[] = {
      {&texts.generation_config, "generation_config.json", kConfigBytesMax},
      {&texts.tokenizer, "tokenizer.json", kTokenizerBytesMax},
      {&texts.tokenizer_config, "tokenizer_config.json", kTokenizerBytesMax},
      {&texts.vocab, "vocab.json", kTokenizerBytesMax},
      {&texts.added_tokens, "added_tokens.json", kTokenizerBytesMax}};
  for (const auto& [text, name, bytes_max] : files) {
    CINNABAR_ASSIGN_OR_RETURN(*text, ReadOptional(absl::StrCat(directory, "/", name), bytes_max));
  }
  return ReadCheckpointFacts(texts, directory);
}

TokenId AddedToken(const TokenizerFacts& tokenizer, absl::Span<const absl::string_view> texts) {
  for (const absl::string_view text : texts) {
    const auto found = tokenizer.added.find(text);
    if (found != tokenizer.added.end()) return found->second;
  }
  return -1;
}

TokenId TokenizerMask(const TokenizerFacts& tokenizer) {
  if (!tokenizer.mask_text.empty()) {
    const TokenId named = AddedToken(tokenizer, {tokenizer.mask_text});
    if (named >= 0) return named;
  }
  return AddedToken(tokenizer, kMaskTexts);
}

}  // namespace cinnabar
