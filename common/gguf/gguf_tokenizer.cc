#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/gguf/gguf.h"

namespace cinnabar {
namespace {

using Json = nlohmann::json;

constexpr size_t kTokensMax = size_t{1} << 22;

// tokenizer.ggml.token_type
constexpr int64_t kControl = 3;
constexpr int64_t kUserDefined = 4;
constexpr int64_t kUnused = 5;

constexpr absl::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr absl::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr absl::string_view kBailingPattern =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|)"
    R"(\s*[\r\n]|\s+(?!\S)|\s+)";

// The pattern of a tokenizer.ggml.pre; empty: not known.
absl::string_view PatternOf(absl::string_view pre) {
  if (pre == "gpt-2") return kGpt2Pattern;
  if (pre == "qwen2") return kQwen2Pattern;
  if (pre == "bailingmoe" || pre == "bailingmoe2" || pre == "llada-moe") return kBailingPattern;
  return "";
}

Json SplitOf(absl::string_view pre) {
  const absl::string_view pattern = PatternOf(pre);
  if (pattern.empty()) return {{"type", absl::StrCat("tokenizer.ggml.pre ", pre)}};
  const Json split = {{"type", "Split"},
                      {"pattern", {{"Regex", std::string(pattern)}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  const Json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  return {{"type", "Sequence"}, {"pretokenizers", Json::array({split, bytes})}};
}

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

absl::StatusOr<GgufTokenizer> ReadGgufTokenizer(const GgufHeader& header) {
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<absl::string_view> tokens,
                            header.Strings("tokenizer.ggml.tokens"));
  if (tokens.empty()) return GgufTokenizer();
  const auto wrong = [&](absl::string_view field, absl::string_view problem) {
    return absl::InvalidArgumentError(
        absl::StrCat(header.what(), ": field tokenizer.ggml.", field, ": ", problem));
  };
  if (tokens.size() > kTokensMax) return wrong("tokens", absl::StrCat(tokens.size(), " tokens"));
  CINNABAR_ASSIGN_OR_RETURN(const std::string model, header.String("tokenizer.ggml.model"));
  if (model != "gpt2") {
    return absl::UnimplementedError(absl::StrCat(header.what(), ": field tokenizer.ggml.model: \"",
                                                 model.substr(0, 40),
                                                 "\"; byte-level BPE, \"gpt2\", is read"));
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::string pre, header.String("tokenizer.ggml.pre", "gpt-2"));
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<int64_t> types,
                            header.Naturals("tokenizer.ggml.token_type"));
  if (!types.empty() && types.size() != tokens.size()) {
    return wrong("token_type", absl::StrCat(types.size(), " for ", tokens.size(), " tokens"));
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::vector<absl::string_view> merges,
                            header.Strings("tokenizer.ggml.merges"));

  Json vocabulary = Json::object(), added = Json::array(), merge_list = Json::array();
  for (size_t id = 0; id < tokens.size(); ++id) {
    const int64_t type = types.empty() ? 1 : types[id];
    const std::string text(tokens[id]);
    if (type == kControl || type == kUserDefined) {
      added.push_back({{"id", id},
                       {"content", text},
                       {"single_word", false},
                       {"lstrip", false},
                       {"rstrip", false},
                       {"normalized", false},
                       {"special", type == kControl}});
    } else if (type != kUnused && !vocabulary.emplace(text, id).second) {
      return wrong("tokens", absl::StrCat("the text of token ", id, " appears twice"));
    }
  }
  for (const absl::string_view merge : merges) merge_list.push_back(std::string(merge));

  Json tokenizer = {{"version", "1.0"}, {"added_tokens", std::move(added)}};
  tokenizer["normalizer"] = pre == "qwen2" ? Json{{"type", "NFC"}} : Json();
  tokenizer["pre_tokenizer"] = SplitOf(pre);
  tokenizer["decoder"] = {{"type", "ByteLevel"}};
  tokenizer["model"] = {{"type", "BPE"}};
  tokenizer["model"]["vocab"] = std::move(vocabulary);
  tokenizer["model"]["merges"] = std::move(merge_list);

  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}};
  const std::pair<absl::string_view, const char*> named[] = {{"bos_token_id", "bos_token"},
                                                             {"eos_token_id", "eos_token"},
                                                             {"padding_token_id", "pad_token"},
                                                             {"mask_token_id", "mask_token"}};
  for (const auto& [field, name] : named) {
    CINNABAR_ASSIGN_OR_RETURN(const std::optional<int64_t> id,
                              header.Natural(absl::StrCat("tokenizer.ggml.", field)));
    if (!id.has_value()) continue;
    const auto index = static_cast<size_t>(*id);
    if (index < tokens.size() && (types.empty() || types[index] != kUnused)) {
      config[name] = std::string(tokens[index]);
    }
  }
  CINNABAR_ASSIGN_OR_RETURN(const std::string chat, header.String("tokenizer.chat_template"));
  if (!chat.empty()) config["chat_template"] = chat;
  return GgufTokenizer{.tokenizer = Dump(tokenizer), .tokenizer_config = Dump(config)};
}

}  // namespace cinnabar
