// What the small files of a Hugging Face folder say: config.json, generation_config.json and the
// parts of the tokenizer files that matter to a model (how many ids have text, which ids are
// special).
#ifndef CINNABAR_WORKER_MODEL_CHECKPOINT_FACTS_H_
#define CINNABAR_WORKER_MODEL_CHECKPOINT_FACTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/request/decoding_params.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

struct TokenizerFacts {
  int32_t size = 0;                                 // largest id with text, plus 1; 0: no tokenizer
  absl::flat_hash_map<std::string, TokenId> added;  // added tokens by their text
  std::string mask_text;  // what tokenizer_config.json calls the mask token
};

struct CheckpointFacts {
  std::string config_path;                 // names config.json in errors
  nlohmann::json config;                   // an object
  std::vector<std::string> architectures;  // of config; empty: it names none
  std::vector<TokenId> eos_tokens;  // generation_config.json's, then config.json's; no duplicates
  TokenizerFacts tokenizer;
};

// The files as text; an empty one is absent.
struct CheckpointTexts {
  std::string config = {};             // config.json
  std::string generation_config = {};  // generation_config.json
  std::string tokenizer = {};          // tokenizer.json
  std::string tokenizer_config = {};   // tokenizer_config.json
  std::string vocab = {};              // vocab.json
  std::string added_tokens = {};       // added_tokens.json
};

// InvalidArgument names the file ("`directory`/config.json: ...") and the field.
absl::StatusOr<CheckpointFacts> ReadCheckpointFacts(const CheckpointTexts& texts,
                                                    absl::string_view directory);

// Reads the files of `directory`, or what a GGUF file (a path that ends in .gguf) says instead of
// them. NotFound without a config.json.
absl::StatusOr<CheckpointFacts> ReadCheckpointFacts(const std::string& directory);

// Id of the added token with the first of these texts that there is; -1: none.
TokenId AddedToken(const TokenizerFacts& tokenizer, absl::Span<const absl::string_view> texts);

// Id of the mask token as the tokenizer files tell it: the one tokenizer_config.json names, else an
// added token with a text that is known to mean it ("<|mask|>", "<M>", ...); -1: none.
TokenId TokenizerMask(const TokenizerFacts& tokenizer);

}  // namespace cinnabar

#endif  // CINNABAR_WORKER_MODEL_CHECKPOINT_FACTS_H_
