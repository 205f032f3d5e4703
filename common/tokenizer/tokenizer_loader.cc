// Reads the files of a tokenizer into Tokenizer::State.
#include <algorithm>
#include <array>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"
#include "common/gguf/gguf.h"
#include "common/tokenizer/tokenizer.h"
#include "common/tokenizer/tokenizer_state.h"
#include "common/tokenizer/utf8.h"
#include "nlohmann/json.hpp"

namespace cinnabar {
namespace {

using Json = nlohmann::json;
using State = Tokenizer::State;

constexpr size_t kFileBytesMax = 256 << 20;
constexpr int64_t kTokenIdMax = (1 << 21) - 1;
constexpr int kNestingMax = 8;    // of Sequence in Sequence
constexpr size_t kStepsMax = 32;  // of one normalizer or pre-tokenizer
constexpr size_t kWholePieceBytesMax = 64;
constexpr size_t kAddedBytesMax = 1 << 20;  // of all added tokens

constexpr absl::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr absl::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// Where in the files a value stands; for messages.
struct Place {
  std::string name;
  Place Field(absl::string_view field) const { return {absl::StrCat(name, ".", field)}; }
  Place Item(size_t index) const { return {absl::StrCat(name, "[", index, "]")}; }
};

absl::Status Bad(const Place& place, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(place.name, ": ", what));
}

absl::Status Unsupported(const Place& place, absl::string_view what) {
  return absl::UnimplementedError(absl::StrCat(place.name, ": ", what, " is not supported"));
}

absl::StatusOr<Json> ParseJson(absl::string_view text, const Place& place) {
  Json json = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return Bad(place, "not valid JSON");
  return json;
}

// The field, or nullptr when absent or null. Safe on any value.
const Json* Find(const Json& json, const char* field) {
  if (!json.is_object()) return nullptr;
  const auto found = json.find(field);
  return found == json.end() || found->is_null() ? nullptr : &*found;
}

absl::StatusOr<bool> GetBool(const Json& json, const char* field, bool if_absent,
                             const Place& place) {
  const Json* value = Find(json, field);
  if (value == nullptr) return if_absent;
  if (!value->is_boolean()) return Bad(place.Field(field), "not true or false");
  return value->get<bool>();
}

absl::StatusOr<std::string> GetString(const Json& json, const char* field, const Place& place) {
  const Json* value = Find(json, field);
  if (value == nullptr || !value->is_string()) return Bad(place.Field(field), "not a string");
  return value->get<std::string>();
}

absl::StatusOr<int32_t> GetId(const Json& value, const Place& place) {
  if (!value.is_number_integer()) return Bad(place, "not a token id");
  const int64_t id = value.get<int64_t>();
  if (id < 0 || id > kTokenIdMax) {
    return Bad(place, absl::StrCat("token id ", id, " is not in 0..", kTokenIdMax));
  }
  return static_cast<int32_t>(id);
}

// GPT-2's table: printable bytes stand for themselves, the other 68 for U+0100 and up.
struct ByteAlphabet {
  ByteAlphabet() {
    byte_of.fill(-1);
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool is_printable =
          (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      byte_of[is_printable ? static_cast<char32_t>(byte) : next++] = byte;
    }
  }
  std::array<int, 0x144> byte_of;
};

// The bytes a vocabulary entry stands for; nothing when it has a character outside the alphabet.
std::optional<std::string> UnmapBytes(absl::string_view text) {
  static const ByteAlphabet* const alphabet = new ByteAlphabet;
  std::string bytes;
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = ReadUtf8(text, at);
    at += c.num_bytes;
    if (!c.is_valid || c.code_point >= alphabet->byte_of.size()) return std::nullopt;
    const int byte = alphabet->byte_of[c.code_point];
    if (byte < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte));
  }
  return bytes;
}

// ---- normalizer
// -----------------------------------------------------------------------------------

absl::Status AddNormalizers(const Json& json, const Place& place, int depth,
                            std::vector<NormalizerStep>* steps) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string type, GetString(json, "type", place));
  if (depth > kNestingMax || steps->size() >= kStepsMax) return Bad(place, "too many steps");
  NormalizerStep step;
  if (type == "Sequence") {
    const Json* list = Find(json, "normalizers");
    if (list == nullptr || !list->is_array()) return Bad(place.Field("normalizers"), "not a list");
    for (size_t i = 0; i < list->size(); ++i) {
      CINNABAR_RETURN_IF_ERROR(
          AddNormalizers((*list)[i], place.Field("normalizers").Item(i), depth + 1, steps));
    }
    return absl::OkStatus();
  }
  if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    step.kind = NormalizerStep::Kind::kUnicode;
    step.form = type == "NFC"    ? UnicodeForm::kNfc
                : type == "NFD"  ? UnicodeForm::kNfd
                : type == "NFKC" ? UnicodeForm::kNfkc
                                 : UnicodeForm::kNfkd;
  } else if (type == "Lowercase") {
    step.kind = NormalizerStep::Kind::kLowercase;
  } else if (type == "Prepend") {
    step.kind = NormalizerStep::Kind::kPrepend;
    CINNABAR_ASSIGN_OR_RETURN(step.content, GetString(json, "prepend", place));
  } else if (type == "Strip") {
    step.kind = NormalizerStep::Kind::kStrip;
    CINNABAR_ASSIGN_OR_RETURN(step.strip_left, GetBool(json, "strip_left", true, place));
    CINNABAR_ASSIGN_OR_RETURN(step.strip_right, GetBool(json, "strip_right", true, place));
  } else if (type == "Replace") {
    CINNABAR_ASSIGN_OR_RETURN(step.content, GetString(json, "content", place));
    const Json* pattern = Find(json, "pattern");
    if (pattern == nullptr) return Bad(place.Field("pattern"), "missing");
    if (Find(*pattern, "String") != nullptr) {
      step.kind = NormalizerStep::Kind::kReplaceString;
      CINNABAR_ASSIGN_OR_RETURN(step.pattern,
                                GetString(*pattern, "String", place.Field("pattern")));
      if (step.pattern.empty()) return Bad(place.Field("pattern.String"), "empty");
    } else {
      step.kind = NormalizerStep::Kind::kReplaceRegex;
      CINNABAR_ASSIGN_OR_RETURN(const std::string regex,
                                GetString(*pattern, "Regex", place.Field("pattern")));
      CINNABAR_ASSIGN_OR_RETURN(Regex compiled, Regex::Compile(regex),
                                place.Field("pattern.Regex").name);
      step.regex = std::move(compiled);
    }
  } else {
    return Unsupported(place, absl::StrCat("type ", type));
  }
  steps->push_back(std::move(step));
  return absl::OkStatus();
}

// ---- pre-tokenizer
// --------------------------------------------------------------------------------

absl::StatusOr<SplitStep> RegexSplit(absl::string_view pattern, SplitBehavior behavior,
                                     const Place& place) {
  SplitStep step;
  CINNABAR_ASSIGN_OR_RETURN(Regex regex, Regex::Compile(pattern), place.name);
  step.regex = std::move(regex);
  step.behavior = behavior;
  return step;
}

absl::Status AddPreTokenizers(const Json& json, const Place& place, int depth, State* state,
                              bool* has_byte_level) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string type, GetString(json, "type", place));
  if (depth > kNestingMax || state->splits.size() >= kStepsMax) return Bad(place, "too many steps");
  if (type == "Sequence") {
    const Json* list = Find(json, "pretokenizers");
    if (list == nullptr || !list->is_array())
      return Bad(place.Field("pretokenizers"), "not a list");
    for (size_t i = 0; i < list->size(); ++i) {
      CINNABAR_RETURN_IF_ERROR(AddPreTokenizers((*list)[i], place.Field("pretokenizers").Item(i),
                                                depth + 1, state, has_byte_level));
    }
    return absl::OkStatus();
  }
  // What follows ByteLevel would see its stand-in characters, not the text.
  if (*has_byte_level) return Unsupported(place, absl::StrCat("type ", type, " after ByteLevel"));
  if (type == "ByteLevel") {
    *has_byte_level = true;
    CINNABAR_ASSIGN_OR_RETURN(state->add_prefix_space,
                              GetBool(json, "add_prefix_space", true, place));
    CINNABAR_ASSIGN_OR_RETURN(const bool use_regex, GetBool(json, "use_regex", true, place));
    if (use_regex) {
      CINNABAR_ASSIGN_OR_RETURN(SplitStep step,
                                RegexSplit(kGpt2Pattern, SplitBehavior::kIsolated, place));
      state->splits_after_prefix.push_back(std::move(step));
    }
    return absl::OkStatus();
  }
  if (type == "Digits") {
    CINNABAR_ASSIGN_OR_RETURN(const bool individual,
                              GetBool(json, "individual_digits", false, place));
    CINNABAR_ASSIGN_OR_RETURN(
        SplitStep step,
        RegexSplit("\\p{N}", individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous,
                   place));
    state->splits.push_back(std::move(step));
    return absl::OkStatus();
  }
  if (type != "Split") return Unsupported(place, absl::StrCat("type ", type));
  SplitStep step;
  CINNABAR_ASSIGN_OR_RETURN(const std::string behavior, GetString(json, "behavior", place));
  CINNABAR_ASSIGN_OR_RETURN(step.invert, GetBool(json, "invert", false, place));
  if (behavior == "Isolated") {
    step.behavior = SplitBehavior::kIsolated;
  } else if (behavior == "Removed") {
    step.behavior = SplitBehavior::kRemoved;
  } else if (behavior == "MergedWithPrevious") {
    step.behavior = SplitBehavior::kMergedWithPrevious;
  } else if (behavior == "MergedWithNext") {
    step.behavior = SplitBehavior::kMergedWithNext;
  } else if (behavior == "Contiguous") {
    step.behavior = SplitBehavior::kContiguous;
  } else {
    return Unsupported(place.Field("behavior"), behavior);
  }
  const Json* pattern = Find(json, "pattern");
  if (pattern == nullptr) return Bad(place.Field("pattern"), "missing");
  const Place pattern_place = place.Field("pattern");
  if (Find(*pattern, "String") != nullptr) {
    CINNABAR_ASSIGN_OR_RETURN(step.literal, GetString(*pattern, "String", pattern_place));
    if (step.literal.empty()) return Bad(pattern_place.Field("String"), "empty");
  } else {
    CINNABAR_ASSIGN_OR_RETURN(const std::string regex, GetString(*pattern, "Regex", pattern_place));
    CINNABAR_ASSIGN_OR_RETURN(Regex compiled, Regex::Compile(regex), pattern_place.name);
    step.regex = std::move(compiled);
  }
  state->splits.push_back(std::move(step));
  return absl::OkStatus();
}

// ---- the loader
// -----------------------------------------------------------------------------------

class Loader {
 public:
  explicit Loader(const TokenizerOptions& options) : options_(options) {}

  absl::Status ReadTokenizer(const Json& json, const Place& place);
  absl::Status ReadConfig(const Json& config, const Place& place);
  absl::Status ReadLegacyTokens(const Json* special_map, const Json* added_tokens);
  void AddChatTemplate(const std::string& name, std::string text) {
    state_.chat_templates[name] = std::move(text);
  }
  absl::StatusOr<std::shared_ptr<const State>> Finish();

 private:
  absl::Status ReadModel(const Json& model, const Place& place);
  absl::Status ReadMerges(const Json& merges, const Place& place);
  absl::Status ReadPostProcessor(const Json& json, const Place& place, int depth);
  absl::Status CheckDecoder(const Json& json, const Place& place);
  absl::StatusOr<AddedToken> ReadAddedToken(const Json& json, const Place& place);
  // Adds or, when the text is known, updates an added token. token.id < 0: the known or the next
  // id.
  absl::Status Add(AddedToken token, const Place& place);
  absl::Status NameSpecials(const Json& json, const Place& place);
  absl::Status MakeSpecial(const std::string& text, std::optional<int32_t> id, const Place& place);
  std::optional<int32_t> KnownId(const std::string& text) const;
  int32_t NextId() const;
  absl::Status Build();

  TokenizerOptions options_;
  State state_;
  absl::flat_hash_map<std::string, int32_t> vocab_;  // as written in the file
  std::vector<BpeMerge> merges_;
  std::map<int32_t, std::string> added_by_id_;
  absl::flat_hash_map<std::string, size_t> added_index_;
  std::vector<std::string> named_specials_;  // in the order transformers appends the missing ones
  int32_t largest_id_ = -1;
  bool ignore_merges_ = false;
  size_t added_bytes_ = 0;
};

absl::Status Loader::ReadTokenizer(const Json& json, const Place& place) {
  if (!json.is_object()) return Bad(place, "not an object");
  const Json* model = Find(json, "model");
  if (model == nullptr) return Bad(place.Field("model"), "missing");
  CINNABAR_RETURN_IF_ERROR(ReadModel(*model, place.Field("model")));
  if (const Json* normalizer = Find(json, "normalizer")) {
    std::vector<NormalizerStep> steps;
    CINNABAR_RETURN_IF_ERROR(AddNormalizers(*normalizer, place.Field("normalizer"), 0, &steps));
    state_.normalizer = Normalizer(std::move(steps));
  }
  bool has_byte_level = false;
  if (const Json* pre_tokenizer = Find(json, "pre_tokenizer")) {
    CINNABAR_RETURN_IF_ERROR(AddPreTokenizers(*pre_tokenizer, place.Field("pre_tokenizer"), 0,
                                              &state_, &has_byte_level));
  }
  if (!has_byte_level) {
    return Unsupported(place.Field("pre_tokenizer"),
                       "a model that is not byte-level (no ByteLevel)");
  }
  if (const Json* decoder = Find(json, "decoder")) {
    CINNABAR_RETURN_IF_ERROR(CheckDecoder(*decoder, place.Field("decoder")));
  }
  if (const Json* added = Find(json, "added_tokens")) {
    if (!added->is_array()) return Bad(place.Field("added_tokens"), "not a list");
    for (size_t i = 0; i < added->size(); ++i) {
      const Place token_place = place.Field("added_tokens").Item(i);
      CINNABAR_ASSIGN_OR_RETURN(AddedToken token, ReadAddedToken((*added)[i], token_place));
      const Json* id = Find((*added)[i], "id");
      if (id == nullptr) return Bad(token_place.Field("id"), "missing");
      CINNABAR_ASSIGN_OR_RETURN(token.id, GetId(*id, token_place.Field("id")));
      CINNABAR_RETURN_IF_ERROR(Add(std::move(token), token_place));
    }
  }
  if (const Json* post = Find(json, "post_processor")) {
    CINNABAR_RETURN_IF_ERROR(ReadPostProcessor(*post, place.Field("post_processor"), 0));
  }
  return absl::OkStatus();
}

absl::Status Loader::ReadModel(const Json& model, const Place& place) {
  if (const Json* type = Find(model, "type"); type != nullptr && *type != "BPE") {
    return Unsupported(place.Field("type"), type->is_string() ? type->get<std::string>() : "this");
  }
  for (const char* field : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (const Json* value = Find(model, field); value != nullptr && *value != "") {
      return Unsupported(place.Field(field), "a value");
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(const bool byte_fallback,
                            GetBool(model, "byte_fallback", false, place));
  if (byte_fallback) return Unsupported(place.Field("byte_fallback"), "true");
  if (const Json* dropout = Find(model, "dropout"); dropout != nullptr && *dropout != 0.0) {
    return Unsupported(place.Field("dropout"), "a value");
  }
  // unk_token and fuse_unk have no effect: every byte has its symbol, which Build() checks.
  CINNABAR_ASSIGN_OR_RETURN(ignore_merges_, GetBool(model, "ignore_merges", false, place));
  const Json* vocab = Find(model, "vocab");
  if (vocab == nullptr || !vocab->is_object()) return Bad(place.Field("vocab"), "not an object");
  vocab_.reserve(vocab->size());
  for (auto entry = vocab->begin(); entry != vocab->end(); ++entry) {
    CINNABAR_ASSIGN_OR_RETURN(const int32_t id, GetId(entry.value(), place.Field("vocab")),
                              "entry ", entry.key());
    vocab_[entry.key()] = id;
    largest_id_ = std::max(largest_id_, id);
  }
  const Json* merges = Find(model, "merges");
  if (merges == nullptr || !merges->is_array()) return Bad(place.Field("merges"), "not a list");
  return ReadMerges(*merges, place.Field("merges"));
}

absl::Status Loader::ReadMerges(const Json& merges, const Place& place) {
  merges_.reserve(merges.size());
  std::string joined;
  for (size_t i = 0; i < merges.size(); ++i) {
    const Json& merge = merges[i];
    std::string left;
    std::string right;
    if (merge.is_string()) {
      const std::vector<std::string> parts =
          absl::StrSplit(merge.get_ref<const std::string&>(), ' ');
      if (parts.size() != 2) return Bad(place.Item(i), "not two symbols");
      left = parts[0];
      right = parts[1];
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
               merge[1].is_string()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else {
      return Bad(place.Item(i), "neither \"a b\" nor [\"a\", \"b\"]");
    }
    joined = left + right;
    const auto left_id = vocab_.find(left);
    const auto right_id = vocab_.find(right);
    const auto result = vocab_.find(joined);
    if (left_id == vocab_.end() || right_id == vocab_.end() || result == vocab_.end()) {
      return Bad(place.Item(i), "a symbol of the merge is not in the vocabulary");
    }
    merges_.push_back({left_id->second, right_id->second, result->second});
  }
  return absl::OkStatus();
}

absl::Status Loader::ReadPostProcessor(const Json& json, const Place& place, int depth) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string type, GetString(json, "type", place));
  if (depth > kNestingMax) return Bad(place, "too deeply nested");
  if (type == "ByteLevel") return absl::OkStatus();  // moves offsets only
  if (type == "Sequence") {
    const Json* list = Find(json, "processors");
    if (list == nullptr || !list->is_array()) return Bad(place.Field("processors"), "not a list");
    for (size_t i = 0; i < list->size(); ++i) {
      CINNABAR_RETURN_IF_ERROR(
          ReadPostProcessor((*list)[i], place.Field("processors").Item(i), depth + 1));
    }
    return absl::OkStatus();
  }
  std::vector<int32_t> prefix;
  std::vector<int32_t> suffix;
  if (type == "BertProcessing" || type == "RobertaProcessing") {
    for (const char* field : {"cls", "sep"}) {
      const Json* pair = Find(json, field);
      if (pair == nullptr || !pair->is_array() || pair->size() != 2) {
        return Bad(place.Field(field), "not [text, id]");
      }
      CINNABAR_ASSIGN_OR_RETURN(const int32_t id, GetId((*pair)[1], place.Field(field)));
      (*field == 'c' ? prefix : suffix).push_back(id);
    }
  } else if (type == "TemplateProcessing") {
    const Json* single = Find(json, "single");
    if (single == nullptr || !single->is_array()) return Bad(place.Field("single"), "not a list");
    int num_sequences = 0;
    for (size_t i = 0; i < single->size(); ++i) {
      const Place item_place = place.Field("single").Item(i);
      const Json& item = (*single)[i];
      if (Find(item, "Sequence") != nullptr) {
        ++num_sequences;
        continue;
      }
      const Json* special = Find(item, "SpecialToken");
      if (special == nullptr) return Bad(item_place, "neither SpecialToken nor Sequence");
      CINNABAR_ASSIGN_OR_RETURN(const std::string name, GetString(*special, "id", item_place));
      const Json* tokens = Find(json, "special_tokens");
      const Json* token = tokens == nullptr ? nullptr : Find(*tokens, name.c_str());
      const Json* ids = token == nullptr ? nullptr : Find(*token, "ids");
      if (ids == nullptr || !ids->is_array()) {
        return Bad(item_place, absl::StrCat("special_tokens has no ids for ", name));
      }
      for (const Json& value : *ids) {
        CINNABAR_ASSIGN_OR_RETURN(const int32_t id, GetId(value, item_place));
        (num_sequences == 0 ? prefix : suffix).push_back(id);
      }
    }
    if (num_sequences != 1) return Unsupported(place.Field("single"), "not exactly one Sequence");
  } else {
    return Unsupported(place, absl::StrCat("type ", type));
  }
  // Processors of a sequence wrap one around the other.
  state_.prefix_ids.insert(state_.prefix_ids.begin(), prefix.begin(), prefix.end());
  state_.suffix_ids.insert(state_.suffix_ids.end(), suffix.begin(), suffix.end());
  for (const std::vector<int32_t>* ids : {&prefix, &suffix}) {
    for (const int32_t id : *ids) {
      if (id > largest_id_) return Bad(place, absl::StrCat("id ", id, " is no token"));
    }
  }
  return absl::OkStatus();
}

absl::Status Loader::CheckDecoder(const Json& json, const Place& place) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string type, GetString(json, "type", place));
  if (type == "ByteLevel") return absl::OkStatus();
  const Json* list = Find(json, "decoders");
  if (type == "Sequence" && list != nullptr && list->is_array() && list->size() == 1 &&
      Find((*list)[0], "type") != nullptr && (*list)[0]["type"] == "ByteLevel") {
    return absl::OkStatus();
  }
  return Unsupported(place, absl::StrCat("type ", type));
}

absl::StatusOr<AddedToken> Loader::ReadAddedToken(const Json& json, const Place& place) {
  AddedToken token;
  CINNABAR_ASSIGN_OR_RETURN(token.content, GetString(json, "content", place));
  CINNABAR_ASSIGN_OR_RETURN(token.special, GetBool(json, "special", false, place));
  CINNABAR_ASSIGN_OR_RETURN(token.single_word, GetBool(json, "single_word", false, place));
  CINNABAR_ASSIGN_OR_RETURN(token.lstrip, GetBool(json, "lstrip", false, place));
  CINNABAR_ASSIGN_OR_RETURN(token.rstrip, GetBool(json, "rstrip", false, place));
  CINNABAR_ASSIGN_OR_RETURN(token.normalized, GetBool(json, "normalized", !token.special, place));
  return token;
}

std::optional<int32_t> Loader::KnownId(const std::string& text) const {
  const auto added = added_index_.find(text);
  if (added != added_index_.end()) return state_.added[added->second].id;
  const auto entry = vocab_.find(text);
  if (entry != vocab_.end()) return entry->second;
  return std::nullopt;
}

int32_t Loader::NextId() const { return largest_id_ + 1; }

absl::Status Loader::Add(AddedToken token, const Place& place) {
  if (token.content.empty()) return absl::OkStatus();  // the tokenizers library ignores these too
  const std::optional<int32_t> known = KnownId(token.content);
  if (token.id < 0) token.id = known.value_or(NextId());
  if (token.id > kTokenIdMax) return Bad(place, "too many tokens");
  if (known.has_value() && *known != token.id) {
    return Bad(place, absl::StrCat(token.content, " has id ", token.id, " here and ", *known,
                                   " elsewhere"));
  }
  const auto [same_id, is_new] = added_by_id_.emplace(token.id, token.content);
  if (!is_new && same_id->second != token.content) {
    return Bad(place,
               absl::StrCat("id ", token.id, " is both ", same_id->second, " and ", token.content));
  }
  largest_id_ = std::max(largest_id_, token.id);
  const auto found = added_index_.find(token.content);
  if (found != added_index_.end()) {
    token.special = token.special || state_.added[found->second].special;
    state_.added[found->second] = std::move(token);
    return absl::OkStatus();
  }
  added_bytes_ += token.content.size();
  if (added_bytes_ > kAddedBytesMax) return Bad(place, "the added tokens' texts are too long");
  added_index_[token.content] = state_.added.size();
  state_.added.push_back(std::move(token));
  return absl::OkStatus();
}

absl::Status Loader::MakeSpecial(const std::string& text, std::optional<int32_t> id,
                                 const Place& place) {
  if (text.empty()) return absl::OkStatus();
  if (ValidUtf8End(text, 0) != text.size()) return Bad(place, "token text is not valid UTF-8");
  const auto found = added_index_.find(text);
  AddedToken token;
  if (found != added_index_.end()) {
    token = state_.added[found->second];
    if (id.has_value() && *id != token.id) {
      return Bad(place, absl::StrCat(text, " has id ", token.id, ", not ", *id));
    }
  } else {
    if (id.has_value() && *id > kTokenIdMax) return Bad(place, "the id is too large");
    token.id = id.value_or(-1);
    token.content = text;
  }
  token.special = true;
  return Add(std::move(token), place);
}

constexpr const char* kSpecialRoles[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                         "pad_token", "cls_token", "mask_token"};

// A token is named by its text, or by an object with its flags.
std::string NamedText(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (const Json* content = Find(value, "content"); content != nullptr && content->is_string()) {
    return content->get<std::string>();
  }
  return "";
}

absl::Status Loader::NameSpecials(const Json& json, const Place& place) {
  for (const char* role : kSpecialRoles) {
    const Json* value = Find(json, role);
    if (value == nullptr) continue;
    const std::string text = NamedText(*value);
    if (text.empty()) continue;
    state_.special_tokens[role] = text;
  }
  if (const Json* list = Find(json, "additional_special_tokens")) {
    if (!list->is_array()) return Bad(place.Field("additional_special_tokens"), "not a list");
    for (const Json& value : *list) named_specials_.push_back(NamedText(value));
  }
  return absl::OkStatus();
}

absl::Status Loader::ReadConfig(const Json& config, const Place& place) {
  if (!config.is_object()) return Bad(place, "not an object");
  if (const Json* decoder = Find(config, "added_tokens_decoder")) {
    if (!decoder->is_object()) return Bad(place.Field("added_tokens_decoder"), "not an object");
    for (auto entry = decoder->begin(); entry != decoder->end(); ++entry) {
      const Place token_place = place.Field("added_tokens_decoder").Field(entry.key());
      CINNABAR_ASSIGN_OR_RETURN(AddedToken token, ReadAddedToken(entry.value(), token_place));
      const Json id = Json::parse(entry.key(), nullptr, false);
      CINNABAR_ASSIGN_OR_RETURN(token.id, GetId(id, token_place));
      CINNABAR_RETURN_IF_ERROR(Add(std::move(token), token_place));
    }
  }
  CINNABAR_RETURN_IF_ERROR(NameSpecials(config, place));
  if (const Json* chat = Find(config, "chat_template")) {
    if (chat->is_string()) {
      AddChatTemplate("default", chat->get<std::string>());
    } else if (chat->is_array()) {
      for (size_t i = 0; i < chat->size(); ++i) {
        const Place item = place.Field("chat_template").Item(i);
        CINNABAR_ASSIGN_OR_RETURN(const std::string name, GetString((*chat)[i], "name", item));
        CINNABAR_ASSIGN_OR_RETURN(std::string text, GetString((*chat)[i], "template", item));
        AddChatTemplate(name, std::move(text));
      }
    } else {
      return Bad(place.Field("chat_template"), "neither a string nor a list");
    }
  }
  return absl::OkStatus();
}

absl::Status Loader::ReadLegacyTokens(const Json* special_map, const Json* added_tokens) {
  if (added_tokens != nullptr) {
    const Place place{"added_tokens.json"};
    if (!added_tokens->is_object()) return Bad(place, "not an object");
    for (auto entry = added_tokens->begin(); entry != added_tokens->end(); ++entry) {
      AddedToken token;
      token.content = entry.key();
      token.normalized = true;
      // Only what no other file describes: those have the flags.
      if (added_index_.contains(token.content)) continue;
      CINNABAR_ASSIGN_OR_RETURN(token.id, GetId(entry.value(), place), token.content);
      CINNABAR_RETURN_IF_ERROR(Add(std::move(token), place));
    }
  }
  if (special_map != nullptr) {
    CINNABAR_RETURN_IF_ERROR(NameSpecials(*special_map, {"special_tokens_map.json"}));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const State>> Loader::Finish() {
  // transformers appends named special tokens that no file gives an id, in this order.
  for (const char* role : kSpecialRoles) {
    const auto named = state_.special_tokens.find(role);
    if (named == state_.special_tokens.end()) continue;
    if (std::string(role) == "mask_token" && !options_.mask_token.text.empty()) continue;
    CINNABAR_RETURN_IF_ERROR(MakeSpecial(named->second, std::nullopt, {role}));
  }
  for (const std::string& text : named_specials_) {
    CINNABAR_RETURN_IF_ERROR(MakeSpecial(text, std::nullopt, {"additional_special_tokens"}));
  }
  std::vector<ExtraSpecialToken> extra = options_.extra_special_tokens;
  if (!options_.mask_token.text.empty()) {
    extra.push_back(options_.mask_token);
    state_.special_tokens["mask_token"] = options_.mask_token.text;
  }
  // Those that ask for an id first: the others take what is free.
  std::stable_partition(extra.begin(), extra.end(),
                        [](const ExtraSpecialToken& token) { return token.id.has_value(); });
  for (const ExtraSpecialToken& token : extra) {
    CINNABAR_RETURN_IF_ERROR(MakeSpecial(token.text, token.id, {"extra special token"}));
  }
  CINNABAR_RETURN_IF_ERROR(Build());
  return std::make_shared<const State>(std::move(state_));
}

absl::Status Loader::Build() {
  const auto id_of_role = [&](const char* role) -> std::optional<int32_t> {
    const auto named = state_.special_tokens.find(role);
    return named == state_.special_tokens.end() ? std::nullopt : KnownId(named->second);
  };
  state_.bos_id = id_of_role("bos_token");
  state_.eos_id = id_of_role("eos_token");
  state_.pad_id = id_of_role("pad_token");
  state_.mask_id = id_of_role("mask_token");

  std::vector<State::TokenEntry>& entries = state_.entries;
  entries.resize(static_cast<size_t>(largest_id_) + 1);
  const auto set_bytes = [&](int32_t id, absl::string_view bytes) {
    entries[id].begin = static_cast<uint32_t>(state_.bytes.size());
    entries[id].num_bytes = static_cast<uint32_t>(bytes.size());
    state_.bytes.append(bytes.data(), bytes.size());
  };
  size_t num_bytes = 0;
  for (const auto& [text, id] : vocab_) num_bytes += text.size();
  state_.bytes.reserve(num_bytes + added_bytes_);

  std::array<int32_t, 256> byte_ids;
  byte_ids.fill(-1);
  // A vocabulary entry with characters outside the alphabet cannot come out of the merges; it still
  // decodes, to its own text.
  std::vector<int32_t> reachable;
  std::vector<bool> has_text(entries.size());
  for (const auto& [text, id] : vocab_) {
    if (text.empty()) continue;
    if (has_text[id]) {
      return Bad({"model.vocab"}, absl::StrCat("id ", id, " is given twice, once to ", text));
    }
    has_text[id] = true;
    const std::optional<std::string> bytes = UnmapBytes(text);
    set_bytes(id, bytes.has_value() ? *bytes : text);
    if (!bytes.has_value()) continue;
    reachable.push_back(id);
    if (bytes->size() == 1) byte_ids[static_cast<uint8_t>((*bytes)[0])] = id;
  }
  for (int byte = 0; byte < 256; ++byte) {
    if (byte_ids[byte] < 0) {
      return Bad({"model.vocab"}, absl::StrCat("no symbol for byte ", byte,
                                               "; only complete byte-level vocabularies work"));
    }
  }
  for (size_t i = 0; i < state_.added.size(); ++i) {
    const AddedToken& token = state_.added[i];
    if (token.id == state_.mask_id &&
        std::find(byte_ids.begin(), byte_ids.end(), token.id) != byte_ids.end()) {
      return Bad({"mask_token"}, "the mask token is the symbol of a byte");
    }
    if (has_text[token.id] && !vocab_.contains(token.content)) {
      return Bad({"added_tokens"}, absl::StrCat("id ", token.id, " of ", token.content,
                                                " is that of another vocabulary entry"));
    }
    // Added tokens stand for their text as it is, not for what the byte table makes of it; of a
    // normalized one the text that it matches.
    const std::string text =
        token.normalized ? state_.normalizer.Apply(token.content) : token.content;
    set_bytes(token.id, text);
    entries[token.id].is_added = true;
    entries[token.id].is_special = token.special;
    if (text.empty()) continue;
    (token.normalized ? state_.normalized_added : state_.raw_added)
        .Add(text, static_cast<int32_t>(i));
  }
  // The promise that plain text gives no special id: no merge may make one.
  std::vector<BpeMerge> merges;
  merges.reserve(merges_.size());
  for (const BpeMerge& merge : merges_) {
    if (!entries[merge.result].is_special) merges.push_back(merge);
  }
  state_.bpe = BpeModel(byte_ids, merges);

  for (const int32_t id : reachable) {
    const absl::string_view bytes = state_.BytesOf(id);
    if (!entries[id].is_added) state_.ids.emplace(bytes, id);
    if (entries[id].is_special || bytes.size() < 2) continue;
    if (!ignore_merges_) {
      if (bytes.size() > kWholePieceBytesMax) continue;
      std::vector<int32_t> ids;
      state_.bpe.Encode(bytes, &ids);
      if (ids.size() != 1 || ids[0] != id) continue;
    }
    state_.whole_pieces.emplace(bytes, id);
  }
  for (const AddedToken& token : state_.added) {
    state_.ids.insert_or_assign(token.content, token.id);
  }
  return absl::OkStatus();
}

// tokenizer.json as the fast class of the same name would write it.
absl::StatusOr<Json> FromVocabAndMerges(const std::string& directory, const Json& config) {
  const Json* class_json = Find(config, "tokenizer_class");
  std::string name = class_json != nullptr && class_json->is_string()
                         ? class_json->get<std::string>()
                         : std::string();
  if (absl::EndsWith(name, "Fast")) name.resize(name.size() - 4);
  const Place config_place{"tokenizer_config.json"};
  CINNABAR_ASSIGN_OR_RETURN(const bool add_prefix_space,
                            GetBool(config, "add_prefix_space", false, config_place));
  Json json;
  if (name == "GPT2Tokenizer") {
    json["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", add_prefix_space}};
  } else if (name == "Qwen2Tokenizer" || name == "DreamTokenizer") {
    json["normalizer"] = {{"type", "NFC"}};
    const Json split = {{"type", "Split"},
                        {"pattern", {{"Regex", std::string(kQwen2Pattern)}}},
                        {"behavior", "Isolated"}};
    const Json byte_level = {
        {"type", "ByteLevel"}, {"add_prefix_space", add_prefix_space}, {"use_regex", false}};
    json["pre_tokenizer"] = {{"type", "Sequence"},
                             {"pretokenizers", Json::array({split, byte_level})}};
  } else {
    return absl::UnimplementedError(absl::StrCat(
        "tokenizer_config.json.tokenizer_class: ", name.empty() ? "no class" : name,
        " without tokenizer.json is not supported (GPT2Tokenizer and Qwen2Tokenizer are)"));
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::string vocab_text,
                            ReadFile(directory + "/vocab.json", kFileBytesMax));
  CINNABAR_ASSIGN_OR_RETURN(Json vocab, ParseJson(vocab_text, {"vocab.json"}));
  CINNABAR_ASSIGN_OR_RETURN(const std::string merges_text,
                            ReadFile(directory + "/merges.txt", kFileBytesMax));
  Json merges = Json::array();
  bool is_first = true;
  for (absl::string_view line : absl::StrSplit(merges_text, '\n')) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (!line.empty() && !(is_first && absl::StartsWith(line, "#version"))) {
      merges.push_back(std::string(line));
    }
    is_first = false;
  }
  json["model"] = {{"type", "BPE"}};
  json["model"]["vocab"] = std::move(vocab);
  json["model"]["merges"] = std::move(merges);
  return json;
}

// The file's text, nothing when there is no such file.
absl::StatusOr<std::optional<std::string>> ReadOptional(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path, kFileBytesMax);
  if (text.ok()) return std::optional<std::string>(*std::move(text));
  if (absl::IsNotFound(text.status())) return std::optional<std::string>();
  return text.status();
}

absl::StatusOr<Json> ReadOptionalJson(const std::string& directory, const std::string& file) {
  CINNABAR_ASSIGN_OR_RETURN(const std::optional<std::string> text,
                            ReadOptional(directory + "/" + file));
  if (!text.has_value()) return Json();
  return ParseJson(*text, {file});
}

absl::StatusOr<Tokenizer> LoadGguf(const std::string& path, const TokenizerOptions& options) {
  CINNABAR_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  CINNABAR_ASSIGN_OR_RETURN(const GgufHeader header, GgufHeader::Read(file.bytes(), path));
  CINNABAR_ASSIGN_OR_RETURN(const GgufTokenizer texts, ReadGgufTokenizer(header));
  if (texts.tokenizer.empty()) {
    return absl::NotFoundError(absl::StrCat(path, " has no tokenizer.ggml.tokens"));
  }
  CINNABAR_ASSIGN_OR_RETURN(Tokenizer tokenizer,
                            Tokenizer::FromJson(texts.tokenizer, texts.tokenizer_config, options),
                            path);
  return tokenizer;
}

}  // namespace

absl::StatusOr<Tokenizer> Tokenizer::Load(const std::string& directory,
                                          const TokenizerOptions& options) {
  if (HasGgufEnding(directory)) return LoadGguf(directory, options);
  CINNABAR_ASSIGN_OR_RETURN(Json config, ReadOptionalJson(directory, "tokenizer_config.json"),
                            directory);
  if (config.is_null()) config = Json::object();
  CINNABAR_ASSIGN_OR_RETURN(Json json, ReadOptionalJson(directory, "tokenizer.json"), directory);
  Place place{"tokenizer.json"};
  const bool is_split = json.is_null();
  if (is_split) {
    place.name = "vocab.json and merges.txt";
    if (!std::filesystem::exists(directory + "/vocab.json")) {
      return absl::NotFoundError(
          absl::StrCat(directory, " has neither tokenizer.json nor vocab.json"));
    }
    CINNABAR_ASSIGN_OR_RETURN(json, FromVocabAndMerges(directory, config), directory);
  }
  Loader loader(options);
  CINNABAR_RETURN_IF_ERROR(loader.ReadTokenizer(json, place), directory);
  json = nullptr;  // as large as the tables; not needed beside them
  CINNABAR_RETURN_IF_ERROR(loader.ReadConfig(config, {"tokenizer_config.json"}), directory);
  if (Find(config, "added_tokens_decoder") == nullptr) {
    CINNABAR_ASSIGN_OR_RETURN(const Json special_map,
                              ReadOptionalJson(directory, "special_tokens_map.json"), directory);
    CINNABAR_ASSIGN_OR_RETURN(const Json added, ReadOptionalJson(directory, "added_tokens.json"),
                              directory);
    CINNABAR_RETURN_IF_ERROR(loader.ReadLegacyTokens(special_map.is_null() ? nullptr : &special_map,
                                                     added.is_null() ? nullptr : &added),
                             directory);
  }
  CINNABAR_ASSIGN_OR_RETURN(std::optional<std::string> chat,
                            ReadOptional(directory + "/chat_template.jinja"));
  if (chat.has_value()) loader.AddChatTemplate("default", *std::move(chat));
  CINNABAR_ASSIGN_OR_RETURN(std::shared_ptr<const State> state, loader.Finish(), directory);
  return Tokenizer(std::move(state));
}

absl::StatusOr<Tokenizer> Tokenizer::FromJson(absl::string_view tokenizer_json,
                                              absl::string_view tokenizer_config_json,
                                              const TokenizerOptions& options) {
  CINNABAR_ASSIGN_OR_RETURN(Json json, ParseJson(tokenizer_json, {"tokenizer.json"}));
  Loader loader(options);
  CINNABAR_RETURN_IF_ERROR(loader.ReadTokenizer(json, {"tokenizer.json"}));
  if (!tokenizer_config_json.empty()) {
    const Place place{"tokenizer_config.json"};
    CINNABAR_ASSIGN_OR_RETURN(const Json config, ParseJson(tokenizer_config_json, place));
    CINNABAR_RETURN_IF_ERROR(loader.ReadConfig(config, place));
  }
  CINNABAR_ASSIGN_OR_RETURN(std::shared_ptr<const State> state, loader.Finish());
  return Tokenizer(std::move(state));
}

}  // namespace cinnabar
