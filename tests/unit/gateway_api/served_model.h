// A served model for tests: the tokenizer of models/cinnabar-tiny with hand-made traits.
#ifndef CINNABAR_TESTS_UNIT_GATEWAY_API_SERVED_MODEL_H_
#define CINNABAR_TESTS_UNIT_GATEWAY_API_SERVED_MODEL_H_

#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "gateway/api/build_work.h"

namespace cinnabar {

inline constexpr TokenId kTinyMask = 0;
inline constexpr TokenId kTinyEos = 1;
inline constexpr TokenId kTinyBos = 2;

inline const Tokenizer& TinyTokenizer() {
  static const Tokenizer* tokenizer = [] {
    const char* source_dir = std::getenv("CINNABAR_SOURCE_DIR");
    absl::StatusOr<Tokenizer> loaded = Tokenizer::Load(
        absl::StrCat(source_dir == nullptr ? "." : source_dir, "/models/cinnabar-tiny"));
    CINNABAR_CHECK(loaded.ok()) << loaded.status().ToString();
    return new Tokenizer(*std::move(loaded));
  }();
  return *tokenizer;
}

inline ServedModel TinyModel() {
  ServedModel model{.name = "tiny", .aliases = {"mercury-coder"}, .tokenizer = TinyTokenizer()};
  model.traits.family = "a2d";
  model.traits.vocab_size = 2048;
  model.traits.mask_token = kTinyMask;
  model.traits.eos_tokens = {kTinyEos};
  model.traits.positions_max = 192;
  model.traits.default_sampler = "low_confidence";
  model.fingerprint = "fp-1";
  model.default_canvas_tokens = 64;
  model.canvas_tokens_max = 128;
  model.prices = {.input_dollars_per_million = 0.25, .output_dollars_per_million = 1.5};
  return model;
}

}  // namespace cinnabar

#endif  // CINNABAR_TESTS_UNIT_GATEWAY_API_SERVED_MODEL_H_
