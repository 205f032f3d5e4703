#include "common/tokenizer/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/tokenizer/bpe.h"
#include "common/tokenizer/normalizer.h"
#include "common/tokenizer/regex.h"
#include "common/tokenizer/utf8.h"
#include "tests/unit/tokenizer/golden_files.h"

namespace cinnabar {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::ordered_json;
using Ids = std::vector<int32_t>;

constexpr const char* kNames[] = {"gpt2",
                                  "qwen2",
                                  "bailing",
                                  "flags",
                                  "split_removed",
                                  "split_merged_with_previous",
                                  "split_merged_with_next",
                                  "split_contiguous",
                                  "inverted"};

Tokenizer LoadGolden(const std::string& name, const std::string& config = "",
                     const TokenizerOptions& options = {}) {
  absl::StatusOr<Tokenizer> tokenizer =
      Tokenizer::FromJson(ReadGolden("tokenizers/" + name + ".json"), config, options);
  CINNABAR_CHECK(tokenizer.ok()) << tokenizer.status().ToString();
  return *tokenizer;
}

// The golden tokenizer's file with one value changed.
absl::Status LoadChanged(const std::string& name, const std::string& pointer, const Json& value) {
  Json json = ReadGoldenJson("tokenizers/" + name + ".json");
  json[Json::json_pointer(pointer)] = value;
  return Tokenizer::FromJson(json.dump()).status();
}

std::string RandomBytes(std::mt19937& random) {
  static const std::string kSpecials[] = {"<|im_end|>", "<|mask|>", "<think>", " ", "é", "世界"};
  std::string bytes;
  const size_t num_parts = random() % 40;
  for (size_t i = 0; i < num_parts; ++i) {
    switch (random() % 4) {
      case 0:
        bytes += static_cast<char>(random());
        break;
      case 1:
        bytes += kSpecials[random() % std::size(kSpecials)];
        break;
      case 2:
        bytes += static_cast<char>(' ' + random() % 95);
        break;
      case 3:
        AppendUtf8(static_cast<char32_t>(0x80 + random() % 0x2000), &bytes);
        break;
    }
  }
  return bytes;
}

class GoldenTest : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenTest, AgreesWithTheReferenceImplementation) {
  const Tokenizer tokenizer = LoadGolden(GetParam());
  const Json cases = ReadGoldenJson(absl::StrCat("tokenizers/", GetParam(), ".cases.json"));
  ASSERT_GT(cases.size(), 100U);
  for (const Json& c : cases) {
    const std::string text = c["text"];
    SCOPED_TRACE(c["text"].dump());
    const Ids ids = c["ids"];
    EXPECT_EQ(tokenizer.Encode(text, {.parse_special = true}), ids);
    EXPECT_EQ(tokenizer.Encode(text), c.value("ids_plain", ids));
    EXPECT_EQ(tokenizer.Encode(text, {.parse_special = true, .add_special_tokens = true}),
              c.value("ids_special", ids));
    const std::string decoded = c.value("decoded", text);
    EXPECT_EQ(tokenizer.DecodeText(ids), decoded);
    EXPECT_EQ(tokenizer.DecodeText(ids, {.skip_special = true}), c.value("skipped", decoded));
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest, ::testing::ValuesIn(kNames),
                         [](const auto& info) { return std::string(info.param); });

TEST(TokenizerTest, EveryByteStringComesBackExactly) {
  std::mt19937 random(11);
  for (const char* name : {"gpt2", "bailing"}) {  // those without a normalizer
    const Tokenizer tokenizer = LoadGolden(name);
    for (int i = 0; i < 3000; ++i) {
      const std::string bytes = RandomBytes(random);
      for (const bool parse_special : {false, true}) {
        const Ids ids = tokenizer.Encode(bytes, {.parse_special = parse_special});
        ASSERT_EQ(tokenizer.Decode(ids), bytes) << name;
        ASSERT_EQ(tokenizer.DecodeText(ids), ReplaceInvalidUtf8(bytes)) << name;
      }
    }
  }
}

TEST(TokenizerTest, AnInvalidByteIsAPieceOfItsOwn) {
  const Tokenizer tokenizer = LoadGolden("gpt2");
  Ids want = tokenizer.Encode("the");
  for (const char* byte : {"\xFF", "\xE4", "\xBD"}) want.push_back(*tokenizer.IdOf(byte));
  const Ids tail = tokenizer.Encode(" canvas");
  want.insert(want.end(), tail.begin(), tail.end());
  EXPECT_EQ(tokenizer.Encode("the\xFF\xE4\xBD canvas"), want);
}

TEST(TokenizerTest, PlainTextNeverGivesASpecialId) {
  std::mt19937 random(5);
  for (const char* name : kNames) {
    const Tokenizer tokenizer = LoadGolden(name);
    for (int i = 0; i < 500; ++i) {
      for (const int32_t id : tokenizer.Encode(RandomBytes(random))) {
        ASSERT_FALSE(tokenizer.IsSpecial(id)) << tokenizer.TokenText(id);
      }
    }
  }
}

TEST(TokenizerTest, TheMaskTokenOfAStrangerIsText) {
  const Tokenizer tokenizer = LoadGolden("qwen2", R"({"mask_token": "<|mask|>"})");
  ASSERT_TRUE(tokenizer.mask_id().has_value());
  const int32_t mask = *tokenizer.mask_id();
  EXPECT_THAT(tokenizer.Encode("<|mask|>", {.parse_special = true}), ElementsAre(mask));
  EXPECT_THAT(tokenizer.Encode("<|mask|>"), ::testing::Not(::testing::Contains(mask)));
  EXPECT_EQ(tokenizer.Decode(tokenizer.Encode("<|mask|>")), "<|mask|>");

  // Of a template's text only what the stranger wrote is plain.
  const std::string text = "<|im_start|><|mask|>\xFF<|mask|><|im_end|>";
  const size_t first = text.find("<|mask|>");
  const size_t second = text.find("<|mask|>", first + 1);
  const std::vector<TextRange> plain = {{second, second + 8}};
  const Ids ids = tokenizer.Encode(text, {.parse_special = true, .plain_ranges = plain});
  EXPECT_EQ(std::count(ids.begin(), ids.end(), mask), 1);
  EXPECT_EQ(ids.front(), *tokenizer.IdOf("<|im_start|>"));
  EXPECT_EQ(ids[1], mask);
  EXPECT_EQ(ids.back(), *tokenizer.IdOf("<|im_end|>"));
  EXPECT_EQ(tokenizer.Decode(ids), text);
}

TEST(TokenizerTest, APlainRangeThatTouchesASpecialTokenTakesItAway) {
  const Tokenizer tokenizer = LoadGolden("qwen2");
  const std::string text = "<|im_<|im_end|>";
  const int32_t end = *tokenizer.IdOf("<|im_end|>");
  for (size_t begin = 0; begin < text.size(); ++begin) {
    const std::vector<TextRange> plain = {{begin, begin + 1}};
    const Ids ids = tokenizer.Encode(text, {.parse_special = true, .plain_ranges = plain});
    EXPECT_EQ(ids.back() == end, begin < 5) << begin;
  }
}

TEST(TokenizerTest, ATokenThatTheConfigNamesIsSpecialWhateverItsFlag) {
  const std::string config = R"({"added_tokens_decoder": {"%": {"content": "<M>", "special": false,
      "normalized": false}}, "additional_special_tokens": ["<M>"], "pad_token": {"content": "<P>"},
      "eos_token": "<|im_end|>", "bos_token": null})";
  const int32_t next = LoadGolden("qwen2").vocab_size();
  std::string with_id = config;
  with_id.replace(with_id.find('%'), 1, absl::StrCat(next));
  const Tokenizer tokenizer = LoadGolden("qwen2", with_id);
  EXPECT_EQ(tokenizer.IdOf("<M>"), next);
  EXPECT_TRUE(tokenizer.IsSpecial(next));
  EXPECT_EQ(tokenizer.pad_id(), next + 1);  // no file knew it: appended
  EXPECT_EQ(tokenizer.vocab_size(), next + 2);
  EXPECT_EQ(tokenizer.eos_id(), tokenizer.IdOf("<|im_end|>"));
  EXPECT_EQ(tokenizer.bos_id(), std::nullopt);
  EXPECT_EQ(tokenizer.Decode(tokenizer.Encode("a<M><P>b")), "a<M><P>b");
  EXPECT_THAT(tokenizer.Encode("<M><P>", {.parse_special = true}), ElementsAre(next, next + 1));
  EXPECT_EQ(tokenizer.special_tokens().at("eos_token"), "<|im_end|>");
}

TEST(TokenizerTest, TokensTheFilesLackCanBeAdded) {
  const int32_t next = LoadGolden("gpt2").vocab_size();
  const Tokenizer tokenizer = LoadGolden("gpt2", "", {.mask_token = {"[MASK]", next}});
  EXPECT_EQ(tokenizer.mask_id(), next);
  EXPECT_EQ(tokenizer.Decode(Ids{next}), "[MASK]");
  // A token that asks for an id comes before those that take the next free one.
  const Tokenizer more =
      LoadGolden("gpt2", "",
                 {.extra_special_tokens = {{"<x>", std::nullopt}, {"<|endoftext|>", std::nullopt}},
                  .mask_token = {"[MASK]", next}});
  EXPECT_EQ(more.mask_id(), next);
  EXPECT_EQ(more.IdOf("<x>"), next + 1);
  EXPECT_EQ(more.vocab_size(), next + 2);
  const absl::StatusOr<Tokenizer> other = Tokenizer::FromJson(
      ReadGolden("tokenizers/gpt2.json"), "", {.mask_token = {"<|endoftext|>", next}});
  EXPECT_THAT(other.status().message(), HasSubstr("<|endoftext|>"));
  const absl::StatusOr<Tokenizer> byte =
      Tokenizer::FromJson(ReadGolden("tokenizers/gpt2.json"), "", {.mask_token = {"!", {}}});
  EXPECT_THAT(byte.status().message(), HasSubstr("symbol of a byte"));
}

TEST(TokenizerTest, BytesAndTextOfATokenAreTold) {
  const Tokenizer tokenizer = LoadGolden("gpt2");
  EXPECT_EQ(tokenizer.TokenBytes(*tokenizer.IdOf(" the")), " the");
  EXPECT_EQ(tokenizer.TokenBytes(*tokenizer.IdOf("\xE4")), "\xE4");
  EXPECT_EQ(tokenizer.TokenText(*tokenizer.IdOf("\xE4")), "\uFFFD");
  EXPECT_EQ(tokenizer.IdOf("no such token"), std::nullopt);
  for (const int32_t id : {-1, tokenizer.vocab_size(), INT32_MAX}) {
    EXPECT_EQ(tokenizer.TokenBytes(id), "");
    EXPECT_FALSE(tokenizer.IsSpecial(id));
    EXPECT_EQ(tokenizer.Decode(Ids{id}), "");
  }
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    EXPECT_EQ(tokenizer.IdOf(tokenizer.TokenBytes(id)), id);
  }
}

TEST(TokenizerTest, ChatTemplatesAreFound) {
  EXPECT_EQ(LoadGolden("gpt2", R"({"chat_template": "x"})").chat_templates().at("default"), "x");
  const Tokenizer named = LoadGolden("gpt2", R"({"chat_template": [
      {"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]})");
  EXPECT_EQ(named.chat_templates().at("tool_use"), "t");
  EXPECT_EQ(named.chat_templates().size(), 2U);
}

TEST(TokenizerTest, BothFormsOfMergesAreRead) {
  Json json = ReadGoldenJson("tokenizers/qwen2.json");
  const Tokenizer pairs = *Tokenizer::FromJson(json.dump());
  for (Json& merge : json["model"]["merges"]) {
    if (merge.is_array()) {
      merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    } else {
      const std::vector<std::string> parts = absl::StrSplit(merge.get<std::string>(), ' ');
      merge = parts;
    }
  }
  const absl::StatusOr<Tokenizer> other = Tokenizer::FromJson(json.dump());
  ASSERT_TRUE(other.ok()) << other.status();
  const std::string text = "the canvas holds masked positions, naïve café 你好";
  EXPECT_EQ(other->Encode(text), pairs.Encode(text));
}

TEST(TokenizerTest, WhatIsNotSupportedIsNamed) {
  struct Case {
    const char* pointer;
    Json value;
    const char* words;
    absl::StatusCode code = absl::StatusCode::kUnimplemented;
  };
  const absl::StatusCode bad = absl::StatusCode::kInvalidArgument;
  const Json byte_level = {{"type", "ByteLevel"}};
  const Case cases[] = {
      {"/normalizer",
       {{"type", "BertNormalizer"}},
       "tokenizer.json.normalizer: type BertNormalizer"},
      {"/pre_tokenizer", {{"type", "Metaspace"}}, "tokenizer.json.pre_tokenizer: type Metaspace"},
      {"/pre_tokenizer", nullptr, "not byte-level"},
      {"/pre_tokenizer",
       {{"type", "Sequence"}, {"pretokenizers", {byte_level, byte_level}}},
       "pretokenizers[1]: type ByteLevel after ByteLevel"},
      {"/pre_tokenizer/pretokenizers/0/behavior", "Sideways", "behavior"},
      {"/pre_tokenizer/pretokenizers/0/pattern", {{"Regex", "\\bx"}}, "\\b"},
      {"/pre_tokenizer/pretokenizers/0/pattern", {{"Regex", "[a&&b]"}}, "&&"},
      {"/pre_tokenizer/pretokenizers/0/pattern", {{"Regex", "\\p{N}{1,3}+"}}, "}+"},
      {"/pre_tokenizer/pretokenizers/0/pattern", {{"Regex", "(a"}}, "(a", bad},
      {"/model/type", "Unigram", "model.type: Unigram"},
      {"/model/byte_fallback", true, "byte_fallback"},
      {"/model/end_of_word_suffix", "</w>", "end_of_word_suffix"},
      {"/model/dropout", 0.5, "dropout"},
      {"/decoder", {{"type", "WordPiece"}}, "decoder: type WordPiece"},
      {"/post_processor", {{"type", "Odd"}}, "post_processor: type Odd"},
      {"/model/vocab", Json::object(), "merge", bad},
      {"/model/merges/0", "a b c", "merges[0]", bad},
      {"/model/merges/0", {"a", "nothing"}, "merges[0]", bad},
      {"/model/vocab/!", -1, "-1", bad},
      {"/model/vocab/!", 1 << 30, "not in 0..", bad},
      {"/added_tokens/0/id", 3, "another vocabulary entry", bad},
      {"/added_tokens/0/id", ReadGoldenJson("tokenizers/qwen2.json")["added_tokens"][1]["id"],
       "is both", bad},
      {"/added_tokens/0/special", "yes", "added_tokens[0].special", bad},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(absl::StrCat(c.pointer, " = ", c.value.dump()));
    const absl::Status status = LoadChanged("qwen2", c.pointer, c.value);
    EXPECT_EQ(status.code(), c.code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.words));
  }
  EXPECT_THAT(std::string(Tokenizer::FromJson("{").status().message()),
              HasSubstr("not valid JSON"));
  Json no_byte = ReadGoldenJson("tokenizers/inverted.json");
  no_byte["model"]["vocab"].erase("Q");
  EXPECT_THAT(std::string(Tokenizer::FromJson(no_byte.dump()).status().message()),
              HasSubstr("no symbol for byte 81"));
}

class FolderTest : public ::testing::Test {
 protected:
  FolderTest() : path_(::testing::TempDir() + "/tokenizer_test_folder") {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~FolderTest() override { std::filesystem::remove_all(path_); }
  void Write(const std::string& name, const std::string& text) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << text;
  }
  std::string path_;
};

TEST_F(FolderTest, TokenizerJsonWithItsNeighbours) {
  Write("tokenizer.json", ReadGolden("tokenizers/qwen2.json"));
  Write("tokenizer_config.json", R"({"eos_token": "<|im_end|>", "chat_template": "old"})");
  Write("chat_template.jinja", "new");
  Write("special_tokens_map.json", R"({"pad_token": "<|endoftext|>"})");
  const int32_t next = LoadGolden("qwen2").vocab_size();
  Write("added_tokens.json", absl::StrCat(R"({"<extra>": )", next, R"(, "<think>": )",
                                          *LoadGolden("qwen2").IdOf("<think>"), "}"));
  const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(path_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ(tokenizer->chat_templates().at("default"), "new");
  EXPECT_EQ(tokenizer->eos_id(), tokenizer->IdOf("<|im_end|>"));
  EXPECT_EQ(tokenizer->pad_id(), tokenizer->IdOf("<|endoftext|>"));
  EXPECT_THAT(tokenizer->Encode("<extra>"), ElementsAre(next));
}

TEST_F(FolderTest, VocabAndMergesAreTheClassTheConfigNames) {
  for (const auto& [name, class_name] :
       {std::pair("gpt2", "GPT2Tokenizer"), std::pair("qwen2", "Qwen2TokenizerFast")}) {
    SCOPED_TRACE(name);
    const Json json = ReadGoldenJson(absl::StrCat("tokenizers/", name, ".json"));
    Write("vocab.json", json["model"]["vocab"].dump());
    std::string merges = "#version: 0.2\n";
    for (const Json& merge : json["model"]["merges"]) {
      merges += merge.is_array()
                    ? merge[0].get<std::string>() + " " + merge[1].get<std::string>() + "\n"
                    : merge.get<std::string>() + "\n";
    }
    Write("merges.txt", merges);
    Json config = {{"tokenizer_class", class_name}, {"added_tokens_decoder", Json::object()}};
    for (const Json& token : json["added_tokens"]) {
      config["added_tokens_decoder"][absl::StrCat(token["id"].get<int>())] = token;
    }
    Write("tokenizer_config.json", config.dump());
    const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(path_);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    for (const Json& c : ReadGoldenJson(absl::StrCat("tokenizers/", name, ".cases.json"))) {
      EXPECT_EQ(tokenizer->Encode(c["text"].get<std::string>(), {.parse_special = true}),
                c["ids"].get<Ids>());
    }
  }
  Write("tokenizer_config.json", R"({"tokenizer_class": "LlamaTokenizer"})");
  EXPECT_EQ(Tokenizer::Load(path_).status().code(), absl::StatusCode::kUnimplemented);
}

TEST_F(FolderTest, AnEmptyFolderHasNoTokenizer) {
  EXPECT_EQ(Tokenizer::Load(path_).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(Tokenizer::Load(path_).status().message()), HasSubstr(path_));
}

// GPT-2's own loop, in the plainest form: the pair of lowest rank, leftmost first.
Ids PlainBpe(absl::string_view piece, const std::vector<BpeMerge>& merges,
             const std::array<int32_t, 256>& byte_ids) {
  Ids ids;
  for (const char c : piece) ids.push_back(byte_ids[static_cast<uint8_t>(c)]);
  while (true) {
    size_t best_rank = merges.size();
    size_t best = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].left == ids[i] && merges[rank].right == ids[i + 1]) {
          best_rank = rank;
          best = i;
        }
      }
    }
    if (best_rank == merges.size()) return ids;
    ids[best] = merges[best_rank].result;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best) + 1);
  }
}

TEST(BpeTest, ShortAndLongPiecesAgreeWithThePlainLoop) {
  std::array<int32_t, 256> byte_ids;
  for (int i = 0; i < 256; ++i) byte_ids[i] = i;
  std::mt19937 random(3);
  for (int round = 0; round < 40; ++round) {
    // Random merges over three letters: many ties, many chains.
    std::vector<BpeMerge> merges;
    int32_t next = 256;
    for (int i = 0; i < 25; ++i) {
      const auto symbol = [&] {
        return random() % 2 == 0 || next == 256
                   ? static_cast<int32_t>('a' + random() % 3)
                   : 256 + static_cast<int32_t>(random() % (next - 256));
      };
      const int32_t left = symbol();
      const int32_t right = symbol();
      const bool is_known = std::any_of(merges.begin(), merges.end(), [&](const BpeMerge& m) {
        return m.left == left && m.right == right;
      });
      if (!is_known) merges.push_back({left, right, next++});
    }
    std::shuffle(merges.begin(), merges.end(), random);
    const BpeModel model(byte_ids, merges);
    for (const size_t length : {0, 1, 2, 5, 30, 48, 49, 50, 120}) {
      std::string piece(length, 'a');
      for (char& c : piece) c = static_cast<char>('a' + random() % 3);
      Ids ids;
      model.Encode(piece, &ids);
      ASSERT_EQ(ids, PlainBpe(piece, merges, byte_ids)) << piece;
    }
  }
}

// A stranger's megabyte of one character, or of the worst for each stage, must not take quadratic
// time. The bound is loose for sanitizers; quadratic would be hours.
TEST(TokenizerTest, HostileRunsTakeLinearTime) {
  constexpr size_t kBytes = 1 << 20;
  std::vector<std::string> texts;
  for (const char* unit : {"a", " ", "\n", "=", "\t ", "e", "\xFF", "<|im_", "<|mask|>", "é",
                           "\r\n ", "ab", "'", "'l", "\u0301\u0316", "7", " \u00a0"}) {
    std::string text;
    while (text.size() < kBytes) text += unit;
    texts.push_back(std::move(text));
  }
  texts.push_back(std::string(kBytes, ' ') + "x");
  for (const char* name : {"qwen2", "bailing", "gpt2", "flags"}) {
    const Tokenizer tokenizer = LoadGolden(name);
    for (const std::string& text : texts) {
      const auto begin = std::chrono::steady_clock::now();
      const Ids ids = tokenizer.Encode(text);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      EXPECT_LT(seconds.count(), 15.0) << name << " " << text.substr(0, 10);
      if (std::string(name) == "gpt2") {
        EXPECT_EQ(tokenizer.Decode(ids), text);
      }
    }
  }
}

TEST(TokenizerTest, ManyThreadsShareOneTokenizer) {
  const Tokenizer tokenizer = LoadGolden("qwen2");
  const std::string text = "the canvas holds masked positions, naïve café 你好 <|mask|> 12345\n\n";
  const Ids want = tokenizer.Encode(text);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        ASSERT_EQ(tokenizer.Encode(text), want);
        ASSERT_EQ(tokenizer.Decode(want), text);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(RegexTest, WhitespaceIsUnicodesNotPcres) {
  const Regex regex = *Regex::Compile("\\s");
  size_t begin = 0;
  size_t end = 0;
  for (char32_t c = 1; c < 0x3100; ++c) {
    std::string text;
    AppendUtf8(c, &text);
    EXPECT_EQ(regex.Find(text, 0, &begin, &end) == Regex::Outcome::kMatch, IsWhitespace(c))
        << static_cast<uint32_t>(c);
  }
}

TEST(RegexTest, APatternWithoutBoundGivesUp) {
  const Regex regex = *Regex::Compile("(?:a|aa|aaa)*[bc]");
  size_t begin = 0;
  size_t end = 0;
  const std::string text(200, 'a');
  EXPECT_EQ(regex.Find(text, 0, &begin, &end), Regex::Outcome::kGaveUp);
}

TEST(NormalizerTest, MarksAreOrderedAndComposed) {
  EXPECT_EQ(NormalizeUnicode("e\u0301", UnicodeForm::kNfc), "é");
  EXPECT_EQ(NormalizeUnicode("xe\u0301 é\u0323", UnicodeForm::kNfc), "xé ẹ\u0301");
  EXPECT_EQ(NormalizeUnicode("é", UnicodeForm::kNfd), "e\u0301");
  EXPECT_EQ(NormalizeUnicode("ﬁＡ", UnicodeForm::kNfkc), "fiA");
  EXPECT_EQ(NormalizeUnicode("\u1100\u1161\u11a8", UnicodeForm::kNfc), "각");
  EXPECT_EQ(LowercaseUnicode("ÀΣİ"), "àσi\u0307");
}

TEST(Utf8Test, MaximalSubpartsBecomeOneReplacement) {
  EXPECT_EQ(ReplaceInvalidUtf8("a\xF0\x9F\x92z"), "a\uFFFDz");
  EXPECT_EQ(ReplaceInvalidUtf8("\xE0\x80\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(ReplaceInvalidUtf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(ReplaceInvalidUtf8("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(ReplaceInvalidUtf8("\xC0\xAF\xFE"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(ReplaceInvalidUtf8("\xE4\xBD"), "\uFFFD");
}

// The published vectors of llama.cpp (models/ggml-vocab-*.gguf.inp and .out): texts between lines
// "__ggml_vocab_test__", and one line of ids each (46 at the commit read). The vocabularies and
// vectors are not part of this repository; a variable names a Hugging Face folder that also holds
// vectors.inp and vectors.out.
class PublishedVectorsTest : public ::testing::TestWithParam<const char*> {};

TEST_P(PublishedVectorsTest, AllAgree) {
  const char* folder = std::getenv(GetParam());
  if (folder == nullptr) {
    GTEST_SKIP() << "set " << GetParam() << " to a folder with the tokenizer and its vectors";
  }
  const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(folder);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto read = [&](const char* name) {
    std::ifstream in(absl::StrCat(folder, "/", name), std::ios::binary);
    return std::string((std::istreambuf_iterator<char>(in)), {});
  };
  std::vector<std::string> texts = absl::StrSplit(read("vectors.inp"), "\n__ggml_vocab_test__\n");
  std::vector<std::string> lines = absl::StrSplit(read("vectors.out"), '\n');
  while (!texts.empty() && texts.back().empty()) texts.pop_back();
  while (!lines.empty() && lines.back().empty()) lines.pop_back();
  ASSERT_EQ(texts.size(), lines.size());
  ASSERT_FALSE(texts.empty());
  size_t num_equal = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    Ids want;
    for (const absl::string_view id : absl::StrSplit(lines[i], ' ', absl::SkipEmpty())) {
      want.push_back(std::stoi(std::string(id)));
    }
    const Ids got = tokenizer->Encode(texts[i]);
    EXPECT_EQ(got, want) << texts[i];
    num_equal += got == want ? 1 : 0;
  }
  std::cout << GetParam() << ": " << num_equal << "/" << texts.size() << " vectors\n";
}

INSTANTIATE_TEST_SUITE_P(All, PublishedVectorsTest,
                         ::testing::Values("CINNABAR_QWEN2_TOKENIZER", "CINNABAR_GPT2_TOKENIZER"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace cinnabar
