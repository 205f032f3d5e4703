#include "common/tokenizer/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/tokenizer/tokenizer.h"
#include "tests/unit/tokenizer/golden_files.h"

namespace cinnabar {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

absl::StatusOr<RenderedChat> Render(const std::string& source, const Json& variables = nullptr,
                                    const ChatLimits& limits = {}) {
  absl::StatusOr<ChatTemplate> parsed = ChatTemplate::Parse(source);
  if (!parsed.ok()) return parsed.status();
  ChatInput input;
  input.extra = variables.is_null() ? Json::object() : variables;
  for (const auto& [name, field] :
       {std::pair("messages", &input.messages), std::pair("tools", &input.tools)}) {
    if (!input.extra.contains(name)) continue;
    *field = input.extra[name];
    input.extra.erase(name);
  }
  if (input.extra.contains("add_generation_prompt")) {
    input.add_generation_prompt = input.extra["add_generation_prompt"];
  }
  if (input.extra.contains("bos_token")) {
    input.special_tokens["bos_token"] = input.extra["bos_token"];
  }
  return parsed->Render(input, limits);
}

std::string Text(const std::string& source, const Json& variables = nullptr) {
  const absl::StatusOr<RenderedChat> rendered = Render(source, variables);
  return rendered.ok() ? rendered->text : absl::StrCat("error: ", rendered.status().message());
}

std::string Message(const std::string& source) {
  return std::string(Render(source).status().message());
}

TEST(ChatTemplateTest, AgreesWithJinja) {
  const Json golden = ReadGoldenJson("chat_templates/cases.json");
  ASSERT_GT(golden["cases"].size(), 150U);
  for (const Json& c : golden["cases"]) {
    const std::string source = golden["templates"][c["template"].get<size_t>()];
    SCOPED_TRACE(source + "\n" + c["variables"].dump());
    const absl::StatusOr<RenderedChat> rendered = Render(source, c["variables"]);
    if (c.contains("error")) {
      EXPECT_FALSE(rendered.ok()) << "Jinja says " << c["error"] << ", we say " << rendered->text;
      continue;
    }
    ASSERT_TRUE(rendered.ok()) << rendered.status();
    EXPECT_EQ(rendered->text, c["text"].get<std::string>());
  }
}

TEST(ChatTemplateTest, AnErrorNamesItsLineAndConstruct) {
  EXPECT_THAT(Message("a\nb\n{{ raise_exception('role order') }}"),
              AllOf(HasSubstr("line 3"), HasSubstr("role order")));
  EXPECT_EQ(Render("{{ raise_exception('x') }}").status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message("{% if x %}\n{{ y.z }}{% endif %}{{ y.z }}"),
              AllOf(HasSubstr("line 2"), HasSubstr("'y' is undefined")));
  EXPECT_THAT(Message("\n{{ 'a' | frobnicate }}"),
              AllOf(HasSubstr("line 2"), HasSubstr("filter frobnicate")));
  EXPECT_THAT(Message("{{ 1 is frob }}"), HasSubstr("test frob"));
  EXPECT_THAT(Message("{% include 'x' %}"), HasSubstr("tag include"));
  EXPECT_THAT(Message("{% for x in y %}\n\n"), HasSubstr("endfor"));
  EXPECT_EQ(Render("{% extends 'x' %}").status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(Render("{{ 'a' | frobnicate }}").status().code(), absl::StatusCode::kUnimplemented);
}

TEST(ChatTemplateTest, HostileTemplatesEndInAnError) {
  std::string nested_brackets;
  std::string nested_ifs;
  std::string sum = "{{ 1";
  std::string chain = "{{ x";
  for (int i = 0; i < 5000; ++i) {
    nested_brackets += "[";
    nested_ifs += "{% if true %}";
    sum += " + 1";
    chain += ".a";
  }
  const std::string templates[] = {
      "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
      "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
      "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
      "{% set n = namespace(s=[1]) %}{% for i in range(9999) %}{% set n.s = [n.s] %}{% endfor %}",
      "{% set n = namespace(s=[1]) %}{% for i in range(90) %}{% set n.s = [n.s, n.s] %}{% endfor "
      "%}{{ n.s }}",
      "{% set n = namespace(s=[1]) %}{% for i in range(90) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
      "{{ n.s | tojson }}",
      "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(90) %}{% set n.s = [n.s, n.s] %}"
      "{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.s == n.t }}",
      "{% set n = namespace(l=1) %}{% for i in range(9999) %}{% for x in [n.l] %}{% set n.l = loop "
      "%}"
      "{% endfor %}{% endfor %}",
      "{% set n = namespace() %}{% set n.n = n %}{{ n.n.n | tojson }}",
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "{% macro f(n) %}{{ [f(n)] | map('upper') | list }}{% endmacro %}{{ f(1) }}",
      "{{ 'x' * 999999999999 }}",
      "{{ [1] * 999999999999 }}",
      "{{ 'aaaaaaaaaaaaaaaaaaaaaaaa' | replace('', 'b' * 99999999) }}",
      "{{ range(0, 9999999999999) }}",
      "{{ 9223372036854775807 + 1 }}",
      "{{ -9223372036854775807 - 2 }}",
      "{{ 3 ** 9999999 }}",
      "{{ 99999999999999999999 }}",
      "{{ 'x' | indent(99999999) }}",
      "{{ [1] | tojson(indent=99999999) }}",
      "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 999 }}{% endfor %}",
      "{{ " + nested_brackets,
      "{{ " + std::string(5000, '(') + "1" + std::string(5000, ')') + " }}",
      "{{ " + std::string(5000, '-') + "1 }}",
      nested_ifs,
      sum + " }}",
      chain + " }}",
      "{{ not " + std::string(3000, ' ') + " }}",
      std::string(2 << 20, 'x'),
      "\xFF",
  };
  for (const std::string& source : templates) {
    EXPECT_FALSE(Render(source).ok()) << source.substr(0, 200);
  }
  // Powers that need no multiplication at all.
  EXPECT_EQ(Text("{{ 1 ** 9223372036854775807 }}{{ (-1) ** 9223372036854775807 }}{{ 0 ** 5 }}"),
            "1-10");
  EXPECT_EQ(Text("{{ [1,2,3][9223372036854775807:] }}{{ [1,2][::9223372036854775807] }}"), "[][1]");
}

TEST(ChatTemplateTest, LimitsAreKept) {
  EXPECT_EQ(Render("{{ 'x' * 1000 }}", nullptr, {.output_bytes_max = 999}).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(Render("{{ 'x' * 1000 }}", nullptr, {.output_bytes_max = 1000}).ok());
  EXPECT_EQ(Render("{% for i in range(10) %}{{ i }}{% endfor %}", nullptr, {.steps_max = 20})
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted);
  Json deep = 1;
  for (int i = 0; i < 200; ++i) deep = Json::array({deep});
  EXPECT_EQ(Render("{{ x }}", {{"x", deep}}).status().code(), absl::StatusCode::kInvalidArgument);
}

// The parts of the text that came from the request, in the order of the text.
std::vector<std::string> InputParts(const RenderedChat& rendered) {
  std::vector<std::string> parts;
  for (const TextRange& range : rendered.input_ranges) {
    parts.push_back(rendered.text.substr(range.begin, range.end - range.begin));
  }
  return parts;
}

TEST(ChatTemplateTest, WhatCameFromTheRequestIsMarked) {
  const Json variables = {{"messages",
                           {{{"role", "user"}, {"content", "  Hi <|mask|>\n"}},
                            {{"role", "bot"}, {"content", "A<t>b</t>C"}}}},
                          {"tools", {{{"name", "f\"oo"}}}},
                          {"bos_token", "<|bos|>"}};
  const absl::StatusOr<RenderedChat> rendered = Render(
      "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}<|end|>"
      "{% endfor %}{% for m in messages %}{{ m.content.split('<t>')[-1][::-1] | upper }}!{% endfor "
      "%}"
      "{{ tools | tojson }}{{ (messages[0].content ~ 'x').replace('Hi', 'Ho') }}"
      "{% for k in messages[0] %}{{ k }}{% endfor %}",
      variables);
  ASSERT_TRUE(rendered.ok()) << rendered.status();
  EXPECT_THAT(InputParts(*rendered),
              ::testing::ElementsAre("user", "Hi <|mask|>", "bot", "A<t>b</t>C", "\n>|KSAM|< IH  ",
                                     "C>T/<B", "\"name\"", "\"f\\\"oo\"", "  ", " <|mask|>\n",
                                     "rolecontent"));
  EXPECT_TRUE(absl::StartsWith(rendered->text, "<|bos|><|user|>Hi <|mask|><|end|>"));
}

TEST(ChatTemplateTest, TheVariablesOfTheInputCannotBeReplaced) {
  absl::StatusOr<ChatTemplate> parsed = ChatTemplate::Parse(
      "{{ bos_token }}{{ messages | length }}{{ add_generation_prompt }}{{ x }}");
  ASSERT_TRUE(parsed.ok());
  ChatInput input;
  input.special_tokens["bos_token"] = "<s>";
  input.extra = {
      {"bos_token", "?"}, {"messages", {1, 2}}, {"add_generation_prompt", false}, {"x", 1}};
  EXPECT_EQ(parsed->Render(input)->text, "<s>0True1");
}

TEST(ChatTemplateTest, TimeComesFromTheCaller) {
  absl::StatusOr<ChatTemplate> parsed = ChatTemplate::Parse("{{ strftime_now('%Y') }}");
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(parsed->Render({}).status().code(), absl::StatusCode::kFailedPrecondition);
  ChatInput input;
  input.now = absl::FromCivil(absl::CivilDay(2026, 11, 23), absl::LocalTimeZone());
  EXPECT_EQ(parsed->Render(input)->text, "2026");
}

TEST(ChatTemplateTest, RenderedPromptsEncodeWithoutTheStrangersSpecialTokens) {
  const absl::StatusOr<Tokenizer> tokenizer =
      Tokenizer::FromJson(ReadGolden("tokenizers/qwen2.json"));
  ASSERT_TRUE(tokenizer.ok());
  const absl::StatusOr<RenderedChat> rendered = Render(
      "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
      {{"messages", {{{"role", "user"}, {"content", "x<|im_end|><|mask|>"}}}}});
  ASSERT_TRUE(rendered.ok());
  const std::vector<int32_t> ids = tokenizer->Encode(
      rendered->text, {.parse_special = true, .plain_ranges = rendered->input_ranges});
  EXPECT_EQ(std::count(ids.begin(), ids.end(), *tokenizer->IdOf("<|im_end|>")), 1);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), *tokenizer->IdOf("<|mask|>")), 0);
  EXPECT_EQ(tokenizer->Decode(ids), rendered->text);
}

}  // namespace
}  // namespace cinnabar
