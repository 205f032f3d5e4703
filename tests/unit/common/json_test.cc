#include "common/base/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;

std::string Error(absl::string_view text, int depth_max = 32) {
  const auto json = ParseOrderedJson(text, "body", depth_max);
  return json.ok() ? "ok" : std::string(json.status().message());
}

TEST(OrderedJsonTest, KeysKeepTheirOrder) {
  const std::string text = R"({"b":1,"a":{"z":[1,-2,2.5,"x",true,null],"y":{}},"c":[[]]})";
  EXPECT_EQ(ParseOrderedJson(text, "body", 32)->dump(), text);
  EXPECT_EQ(ParseOrderedJson("18446744073709551615", "body", 32)->dump(), "18446744073709551615");
  EXPECT_EQ(ParseOrderedJson(" \"x\" ", "body", 1)->dump(), "\"x\"");
}

TEST(OrderedJsonTest, TheDepthHasItsOwnLimit) {
  EXPECT_EQ(Error("[[1]]", 2), "ok");
  EXPECT_EQ(Error("[[[]]]", 2), "body: nested deeper than 2");
  EXPECT_EQ(Error(R"({"a":{"b":{}}})", 2), "body: nested deeper than 2");
  const std::string deep = std::string(65, '[') + std::string(65, ']');
  EXPECT_EQ(Error(deep, 1000), "body: nested deeper than 64");
}

TEST(OrderedJsonTest, AKeyMayNotAppearTwiceHoweverManyThereAre) {
  for (const int num_keys : {1, 2, 15, 16, 17, 18, 1000}) {
    std::string object = "{";
    for (int i = 0; i < num_keys; ++i) absl::StrAppend(&object, i > 0 ? "," : "", "\"k", i, "\":0");
    EXPECT_EQ(Error(object + "}"), "ok") << num_keys;
    for (const int twice : {0, num_keys / 2, num_keys - 1}) {
      EXPECT_THAT(Error(absl::StrCat(object, ",\"k", twice, "\":1}")),
                  HasSubstr(absl::StrCat("\"k", twice, "\" appears twice")));
    }
    // Of an object inside, and the one around it goes on afterwards.
    EXPECT_EQ(Error(absl::StrCat(object, ",\"in\":{\"k0\":1,\"in\":2},\"after\":0}")), "ok");
    EXPECT_THAT(Error(absl::StrCat(object, ",\"in\":{\"k0\":1},\"in\":0}")),
                HasSubstr("\"in\" appears twice"));
  }
}

TEST(OrderedJsonTest, WhatIsNotJson) {
  for (const char* text :
       {"", "{", "[1,]", "{\"a\"}", "\"\\ud800\"", "\"\\udc00\"", "\"\xff\"", "\"\xc0\x80\"",
        "\"\xed\xa0\x80\"", "01", "+1", "NaN", "1 2", "// x\n1"}) {
    EXPECT_THAT(Error(text), HasSubstr("not JSON at byte")) << text;
  }
  EXPECT_THAT(Error("[1e400]"), HasSubstr("a number is too large at byte"));
}

TEST(JsonTest, TheSameReaderWithoutOrder) {
  EXPECT_EQ(ParseJson(R"({"b":1,"a":[2]})", "f")->dump(), R"({"a":[2],"b":1})");
  EXPECT_THAT(std::string(ParseJson(R"({"b":1,"b":2})", "f").status().message()),
              HasSubstr("f: the key \"b\" appears twice"));
  EXPECT_FALSE(ParseJson(std::string(65, '[') + std::string(65, ']'), "f").ok());
  EXPECT_TRUE(ParseJson(std::string(64, '[') + std::string(64, ']'), "f").ok());
}

}  // namespace
}  // namespace cinnabar
