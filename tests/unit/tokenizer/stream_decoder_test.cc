#include "common/tokenizer/stream_decoder.h"

#include <gtest/gtest.h>

#include <random>

#include "common/tokenizer/utf8.h"
#include "tests/unit/tokenizer/golden_files.h"

namespace cinnabar {
namespace {

Tokenizer Golden() {
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::FromJson(ReadGolden("tokenizers/bailing.json"));
  CINNABAR_CHECK(tokenizer.ok()) << tokenizer.status().ToString();
  return *tokenizer;
}

TEST(StreamDecoderTest, ACharacterComesWithItsLastByte) {
  const Tokenizer tokenizer = Golden();
  StreamDecoder decoder(tokenizer);
  const auto push = [&](const char* byte) { return decoder.Push(*tokenizer.IdOf(byte)); };
  EXPECT_EQ(push("\xF0"), "");
  EXPECT_EQ(push("\x9F"), "");
  EXPECT_EQ(push("\xA6"), "");
  EXPECT_EQ(push("\x99"), "🦙");
  EXPECT_EQ(push("a"), "a");
  EXPECT_EQ(push("\xC3"), "");
  EXPECT_EQ(push("b"), "\uFFFDb");  // now it cannot be completed
  EXPECT_EQ(push("\xFF"), "\uFFFD");
  EXPECT_EQ(decoder.Flush(), "");
  EXPECT_EQ(push("\xE4"), "");
  EXPECT_EQ(push("\xBD"), "");
  EXPECT_EQ(decoder.Flush(), "\uFFFD");
  EXPECT_EQ(decoder.Flush(), "");
  EXPECT_EQ(push("z"), "z");
}

TEST(StreamDecoderTest, AllPartsTogetherAreDecodeText) {
  const Tokenizer tokenizer = Golden();
  std::mt19937 random(9);
  for (int round = 0; round < 500; ++round) {
    std::vector<int32_t> ids;
    for (size_t i = random() % 60; i > 0; --i) {
      // Byte symbols often, so that characters are cut everywhere.
      const std::string byte(1, static_cast<char>(random()));
      ids.push_back(random() % 2 == 0
                        ? *tokenizer.IdOf(byte)
                        : static_cast<int32_t>(random() % (tokenizer.vocab_size() + 2)));
    }
    for (const bool skip_special : {false, true}) {
      StreamDecoder decoder(tokenizer, {.skip_special = skip_special});
      std::string text;
      for (const int32_t id : ids) {
        const std::string part = decoder.Push(id);
        ASSERT_EQ(ValidUtf8End(part, 0), part.size());
        text += part;
      }
      text += decoder.Flush();
      ASSERT_EQ(text, tokenizer.DecodeText(ids, {.skip_special = skip_special}));
    }
  }
}

TEST(StreamDecoderTest, ASkippedSpecialTokenDoesNotCutACharacter) {
  const Tokenizer tokenizer = Golden();
  StreamDecoder decoder(tokenizer, {.skip_special = true});
  EXPECT_EQ(decoder.Push(*tokenizer.IdOf("\xC3")), "");
  EXPECT_EQ(decoder.Push(*tokenizer.IdOf("<|mask|>")), "");
  EXPECT_EQ(decoder.Push(*tokenizer.IdOf("\xA9")), "é");
}

}  // namespace
}  // namespace cinnabar
