#include "common/tokenizer/chat_template.h"

#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <deque>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/tokenizer/normalizer.h"
#include "common/tokenizer/template_parser.h"
#include "common/tokenizer/template_value.h"
#include "common/tokenizer/utf8.h"

namespace cinnabar {
namespace {

using namespace chat;  // NOLINT(google-build-using-namespace): this file is its evaluator

constexpr int kEvalDepthMax = 350;  // expressions inside expressions, bodies inside bodies, macros
constexpr int64_t kRangeMax = 100'000;  // as Jinja's sandbox has it
constexpr int64_t kIndentMax = 64;

using Body = std::vector<NodePtr>;

absl::Status Wrong(absl::string_view what) { return absl::InvalidArgumentError(what); }
absl::Status Missing(absl::string_view what) {
  return absl::UnimplementedError(absl::StrCat(what, " is not supported"));
}
absl::Status IsUndefined(const Value& value) {
  return Wrong(absl::StrCat(*value.As<Undefined>()->what, " is undefined"));
}

// Python's str.isspace, the set that strip() and split() know.
bool IsPythonSpace(char32_t c) { return IsWhitespace(c) || (c >= 0x1C && c <= 0x1F); }

// Byte offsets of the characters, the end included.
std::vector<size_t> CharOffsets(absl::string_view text) {
  std::vector<size_t> offsets;
  for (size_t at = 0; at < text.size(); at += ReadUtf8(text, at).num_bytes) offsets.push_back(at);
  offsets.push_back(text.size());
  return offsets;
}

size_t NumChars(absl::string_view text) {
  size_t count = 0;
  for (size_t at = 0; at < text.size(); at += ReadUtf8(text, at).num_bytes) ++count;
  return count;
}

size_t LastCharBegin(absl::string_view text) {
  size_t at = text.size() - 1;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

// str.strip: of whitespace, or of the characters in `*chars`.
MarkedText Strip(const MarkedText& text, const std::string* chars, bool left, bool right) {
  const auto goes = [&](absl::string_view c) {
    if (chars == nullptr) return IsPythonSpace(ReadUtf8(c, 0).code_point);
    return absl::StrContains(*chars, c);
  };
  absl::string_view rest = text.bytes();
  size_t begin = 0;
  while (left && !rest.empty()) {
    const size_t num_bytes = ReadUtf8(rest, 0).num_bytes;
    if (!goes(rest.substr(0, num_bytes))) break;
    rest.remove_prefix(num_bytes);
    begin += num_bytes;
  }
  while (right && !rest.empty()) {
    const size_t last = LastCharBegin(rest);
    if (!goes(rest.substr(last))) break;
    rest = rest.substr(0, last);
  }
  return text.Substring(begin, begin + rest.size());
}

// Applies `map(code_point, index of the character)` to every character.
template <typename Map>
MarkedText MapChars(const MarkedText& text, const Map& map) {
  MarkedText out;
  size_t index = 0;
  size_t range = 0;
  for (size_t at = 0; at < text.size(); ++index) {
    const Utf8Char c = ReadUtf8(text.bytes(), at);
    const auto& ranges = text.input_ranges();
    while (range < ranges.size() && ranges[range].end <= at) ++range;
    const bool is_input = range < ranges.size() && ranges[range].begin <= at;
    at += c.num_bytes;
    std::string mapped;
    AppendUtf8(map(c.code_point, index), &mapped);
    out.Append(mapped, is_input);
  }
  return out;
}

char32_t Upper(char32_t c) {
  return static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c)));
}
char32_t Lower(char32_t c) {
  return static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c)));
}
bool IsLetter(char32_t c) {
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}

MarkedText ToUpper(const MarkedText& text) {
  return MapChars(text, [](char32_t c, size_t) { return Upper(c); });
}
MarkedText ToLower(const MarkedText& text) {
  return MapChars(text, [](char32_t c, size_t) { return Lower(c); });
}
MarkedText Capitalize(const MarkedText& text) {
  return MapChars(text, [](char32_t c, size_t index) { return index == 0 ? Upper(c) : Lower(c); });
}
// str.title: upper case after everything but a letter. Jinja's filter: after space, - ( { [ <.
MarkedText Title(const MarkedText& text, bool is_filter) {
  bool begins = true;
  return MapChars(text, [&](char32_t c, size_t) {
    const char32_t mapped = begins ? Upper(c) : Lower(c);
    begins = is_filter ? IsPythonSpace(c) ||
                             (c < 0x80 &&
                              absl::StrContains("-({[<", std::string(1, static_cast<char>(c))))
                       : !IsLetter(c);
    return mapped;
  });
}

MarkedText Replace(const MarkedText& text, const std::string& from, const MarkedText& to,
                   int64_t count_max) {
  MarkedText out;
  const std::string& bytes = text.bytes();
  size_t copied = 0;
  int64_t count = 0;
  if (from.empty()) {
    // Python puts `to` before every character and at the end.
    const std::vector<size_t> offsets = CharOffsets(bytes);
    for (size_t i = 0; i < offsets.size(); ++i) {
      if (count_max < 0 || count++ < count_max) out.Append(to);
      if (i + 1 < offsets.size()) out.Append(text.Substring(offsets[i], offsets[i + 1]));
    }
    return out;
  }
  for (size_t at = bytes.find(from); at != std::string::npos; at = bytes.find(from, copied)) {
    if (count_max >= 0 && count++ >= count_max) break;
    out.Append(text.Substring(copied, at));
    out.Append(to);
    copied = at + from.size();
  }
  out.Append(text.Substring(copied, bytes.size()));
  return out;
}

// str.split(None, limit): at runs of whitespace.
std::vector<MarkedText> SplitSpace(const MarkedText& text, int64_t limit) {
  std::vector<MarkedText> parts;
  const std::string& bytes = text.bytes();
  size_t at = 0;
  const auto skip = [&](bool spaces) {
    while (at < bytes.size()) {
      const Utf8Char c = ReadUtf8(bytes, at);
      if (IsPythonSpace(c.code_point) != spaces) break;
      at += c.num_bytes;
    }
  };
  skip(true);
  while (at < bytes.size()) {
    if (limit >= 0 && static_cast<int64_t>(parts.size()) >= limit) {
      parts.push_back(Strip(text.Substring(at, bytes.size()), nullptr, false, true));
      break;
    }
    const size_t begin = at;
    skip(false);
    parts.push_back(text.Substring(begin, at));
    skip(true);
  }
  return parts;
}

std::vector<MarkedText> SplitAt(const MarkedText& text, const std::string& separator, int64_t limit,
                                bool from_right) {
  std::vector<MarkedText> parts;
  const std::string& bytes = text.bytes();
  if (!from_right) {
    size_t begin = 0;
    size_t at = bytes.find(separator);
    while (at != std::string::npos && (limit < 0 || static_cast<int64_t>(parts.size()) < limit)) {
      parts.push_back(text.Substring(begin, at));
      begin = at + separator.size();
      at = bytes.find(separator, begin);
    }
    parts.push_back(text.Substring(begin, bytes.size()));
    return parts;
  }
  size_t end = bytes.size();
  while (limit < 0 || static_cast<int64_t>(parts.size()) < limit) {
    if (end < separator.size()) break;
    const size_t at = bytes.rfind(separator, end - separator.size());
    if (at == std::string::npos) break;
    parts.push_back(text.Substring(at + separator.size(), end));
    end = at;
  }
  parts.push_back(text.Substring(0, end));
  std::reverse(parts.begin(), parts.end());
  return parts;
}

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // The argument in that place or of that name; nullptr when not given.
  const Value* Find(size_t place, absl::string_view name) const {
    if (place < positional.size()) return &positional[place];
    for (const auto& [given, value] : named) {
      if (given == name) return &value;
    }
    return nullptr;
  }
  size_t size() const { return positional.size() + named.size(); }
};

enum class Flow { kNormal, kBreak, kContinue };

class Evaluator {
 public:
  Evaluator(const ChatInput& input, const ChatLimits& limits) : input_(input), limits_(limits) {
    budget_.steps = limits.steps_max;
    budget_.bytes = limits.made_bytes_max;
    scopes_.emplace_back();
  }

  absl::Status DefineInput();
  absl::StatusOr<RenderedChat> Run(const Body& body);

 private:
  using Scope = std::vector<std::pair<std::string, Value>>;

  struct DepthGuard {
    explicit DepthGuard(int* depth) : depth_(depth) { ++*depth_; }
    ~DepthGuard() { --*depth_; }
    int* depth_;
  };
  absl::Status Enter(const Node& node) {
    if (depth_ > kEvalDepthMax) return absl::ResourceExhaustedError("nested too deeply");
    (void)node;
    return budget_.Step();
  }
  // Puts the line in front of a message, once: the innermost place is the useful one.
  absl::Status AtLine(const Node& node, const absl::Status& status) const {
    if (status.ok() || absl::StartsWith(status.message(), "chat template line ")) return status;
    return absl::Status(status.code(),
                        absl::StrCat("chat template line ", node.line, ": ", status.message()));
  }

  void Set(const std::string& name, Value value);
  Value Lookup(const std::string& name) const;
  absl::Status Assign(const Node& target, Value value);

  absl::StatusOr<Flow> RunBody(const Body& body);
  absl::StatusOr<Flow> RunNode(const Node& node);
  absl::StatusOr<Flow> RunIf(const Node& node);
  absl::StatusOr<Flow> RunFor(const Node& node);
  absl::Status RunSet(const Node& node);
  absl::Status RunCaptured(const Node& node);
  absl::StatusOr<Flow> Capture(const Body& body, MarkedText* text);
  absl::Status Print(const Value& value);

  absl::StatusOr<Value> Eval(const Node& node);
  absl::StatusOr<Value> EvalKind(const Node& node);
  absl::StatusOr<Value> EvalDict(const Node& node);
  absl::StatusOr<Value> EvalCompare(const Node& node);
  absl::StatusOr<Value> EvalConcat(const Node& node);
  absl::StatusOr<Value> EvalSlice(const Node& node);
  absl::StatusOr<Value> EvalCall(const Node& node);
  absl::StatusOr<Value> EvalFilter(const Node& node, std::optional<Value> block);
  absl::StatusOr<Arguments> EvalArguments(const Node& node, size_t from);
  absl::StatusOr<Value> Arithmetic(const std::string& op, const Value& left, const Value& right);
  absl::StatusOr<Value> IntegerArithmetic(const std::string& op, int64_t left, int64_t right);
  absl::StatusOr<bool> Compare(const std::string& op, const Value& left, const Value& right);
  absl::StatusOr<bool> Contains(const Value& container, const Value& item);

  absl::StatusOr<Value> Attribute(const Value& object, const std::string& name);
  absl::StatusOr<Value> LoopAttribute(const LoopPtr& loop, const std::string& name);
  absl::StatusOr<Value> Item(const Value& object, const Value& key);
  absl::StatusOr<Value> PathItem(const Value& object, const Value& path);
  absl::StatusOr<std::vector<Value>> Items(const Value& value);
  absl::StatusOr<int64_t> Length(const Value& value);

  absl::StatusOr<Value> CallFunction(const std::string& name, const Arguments& arguments);
  absl::StatusOr<Value> CallMacro(const Node& macro, const Arguments& arguments);
  absl::StatusOr<Value> CallMethod(const Value& self, const std::string& name,
                                   const Arguments& arguments);
  absl::StatusOr<Value> CallTextMethod(const MarkedText& self, const std::string& name,
                                       const Arguments& arguments);
  absl::StatusOr<Value> CallSplit(const MarkedText& self, const std::string& name,
                                  const Arguments& arguments);
  absl::StatusOr<Value> ApplyFilter(const std::string& name, const Value& value,
                                    const Arguments& arguments);
  absl::StatusOr<Value> ApplyTextFilter(const std::string& name, const Value& value,
                                        const Arguments& arguments);
  absl::StatusOr<Value> ApplyNumberFilter(const std::string& name, const Value& value,
                                          const Arguments& arguments);
  absl::StatusOr<Value> ApplyListFilter(const std::string& name, const Value& value,
                                        const Arguments& arguments);
  absl::StatusOr<Value> FilterSelect(const std::string& name, const Value& value,
                                     const Arguments& arguments);
  absl::StatusOr<Value> FilterMap(const Value& value, const Arguments& arguments);
  absl::StatusOr<Value> FilterSort(const std::string& name, const Value& value,
                                   const Arguments& arguments);
  absl::StatusOr<Value> FilterToJson(const Value& value, const Arguments& arguments);
  absl::StatusOr<Value> FilterJoin(const Value& value, const Arguments& arguments);
  absl::StatusOr<bool> ApplyTest(const std::string& name, const Value& value,
                                 const Arguments& arguments);

  absl::StatusOr<Value> NewText(MarkedText text) {
    CINNABAR_RETURN_IF_ERROR(budget_.Bytes(text.size()));
    return MakeText(std::move(text));
  }
  absl::StatusOr<Value> NewList(std::vector<Value> items, bool is_tuple = false) {
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(items.size())));
    return MakeList(std::move(items), is_tuple);
  }
  absl::StatusOr<Value> NewTextList(std::vector<MarkedText> parts) {
    std::vector<Value> items;
    for (MarkedText& part : parts) {
      CINNABAR_ASSIGN_OR_RETURN(Value item, NewText(std::move(part)));
      items.push_back(std::move(item));
    }
    return NewList(std::move(items));
  }

  const ChatInput& input_;
  const ChatLimits limits_;
  Budget budget_;
  int depth_ = 0;
  std::vector<Scope> scopes_;  // [0] is the template's own
  size_t scope_floor_ = 0;     // scopes below it, but [0], are not seen: those of a macro's caller
  std::deque<NamespaceValue> namespaces_;
  MarkedText output_;
};

// ---- variables
// ------------------------------------------------------------------------------------

absl::Status Evaluator::DefineInput() {
  const auto define = [this](const std::string& name, const nlohmann::ordered_json& json) {
    absl::StatusOr<Value> value = FromJson(json, /*is_input=*/true);
    if (!value.ok()) return internal::Annotate(value.status(), name);
    Set(name, *std::move(value));
    return absl::OkStatus();
  };
  for (const auto& [name, text] : input_.special_tokens) Set(name, MakeText(text));
  if (!input_.extra.is_null()) {
    if (!input_.extra.is_object()) return Wrong("chat input: extra is not an object");
    for (auto entry = input_.extra.begin(); entry != input_.extra.end(); ++entry) {
      CINNABAR_RETURN_IF_ERROR(define(entry.key(), entry.value()));
    }
  }
  // Set last, so that extra cannot replace them.
  for (const auto& [name, text] : input_.special_tokens) Set(name, MakeText(text));
  CINNABAR_RETURN_IF_ERROR(define("messages", input_.messages));
  CINNABAR_RETURN_IF_ERROR(define("tools", input_.tools));
  CINNABAR_RETURN_IF_ERROR(define("documents", input_.documents));
  Set("add_generation_prompt", Value(input_.add_generation_prompt));
  return absl::OkStatus();
}

void Evaluator::Set(const std::string& name, Value value) {
  for (auto& [known, held] : scopes_.back()) {
    if (known == name) {
      held = std::move(value);
      return;
    }
  }
  scopes_.back().emplace_back(name, std::move(value));
}

Value Evaluator::Lookup(const std::string& name) const {
  for (size_t i = scopes_.size(); i-- > 0;) {
    if (i > 0 && i < scope_floor_) continue;
    for (const auto& [known, value] : scopes_[i]) {
      if (known == name) return value;
    }
  }
  for (const char* function : {"namespace", "range", "dict", "raise_exception", "strftime_now"}) {
    if (name == function) {
      auto callable = std::make_shared<CallableValue>();
      callable->name = name;
      return Value(CallablePtr(std::move(callable)));
    }
  }
  return MakeUndefined(absl::StrCat("'", name, "'"));
}

absl::Status Evaluator::Assign(const Node& target, Value value) {
  if (target.kind == NodeKind::kName) {
    Set(target.name, std::move(value));
    return absl::OkStatus();
  }
  if (target.kind == NodeKind::kAttribute) {
    CINNABAR_ASSIGN_OR_RETURN(const Value object, Eval(*target.children[0]));
    NamespaceValue* const* held = object.As<NamespaceValue*>();
    if (held == nullptr) {
      return Wrong(
          absl::StrCat("set: only a namespace has attributes to set, not a ", object.TypeName()));
    }
    for (auto& [known, old] : (*held)->entries) {
      if (known == target.name) {
        old = std::move(value);
        return absl::OkStatus();
      }
    }
    (*held)->entries.emplace_back(target.name, std::move(value));
    return budget_.Step(static_cast<int64_t>((*held)->entries.size()));
  }
  CINNABAR_CHECK(target.kind == NodeKind::kTuple);
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Value> items, Items(value));
  if (items.size() != target.children.size()) {
    return Wrong(absl::StrCat("cannot unpack ", items.size(), " values into ",
                              target.children.size(), " names"));
  }
  for (size_t i = 0; i < items.size(); ++i) {
    CINNABAR_RETURN_IF_ERROR(Assign(*target.children[i], std::move(items[i])));
  }
  return absl::OkStatus();
}

// ---- statements
// -----------------------------------------------------------------------------------

absl::StatusOr<RenderedChat> Evaluator::Run(const Body& body) {
  CINNABAR_RETURN_IF_ERROR(RunBody(body).status());
  if (static_cast<int64_t>(output_.size()) > limits_.output_bytes_max) {
    return absl::ResourceExhaustedError("the rendered chat is too long");
  }
  return RenderedChat{output_.bytes(), output_.input_ranges()};
}

absl::Status Evaluator::Print(const Value& value) {
  CINNABAR_ASSIGN_OR_RETURN(const MarkedText text, ToText(value, &budget_));
  CINNABAR_RETURN_IF_ERROR(budget_.Bytes(text.size()));
  output_.Append(text);
  if (static_cast<int64_t>(output_.size()) > limits_.output_bytes_max) {
    return absl::ResourceExhaustedError("the rendered chat is too long");
  }
  return absl::OkStatus();
}

absl::StatusOr<Flow> Evaluator::RunBody(const Body& body) {
  for (const NodePtr& node : body) {
    absl::StatusOr<Flow> flow = RunNode(*node);
    if (!flow.ok()) return AtLine(*node, flow.status());
    if (*flow != Flow::kNormal) return flow;
  }
  return Flow::kNormal;
}

absl::StatusOr<Flow> Evaluator::RunNode(const Node& node) {
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(Enter(node));
  switch (node.kind) {
    case NodeKind::kText:
      CINNABAR_RETURN_IF_ERROR(Print(node.constant));
      return Flow::kNormal;
    case NodeKind::kOutput: {
      CINNABAR_ASSIGN_OR_RETURN(const Value value, Eval(*node.children[0]));
      CINNABAR_RETURN_IF_ERROR(Print(value));
      return Flow::kNormal;
    }
    case NodeKind::kIf:
      return RunIf(node);
    case NodeKind::kFor:
      return RunFor(node);
    case NodeKind::kSet:
      CINNABAR_RETURN_IF_ERROR(RunSet(node));
      return Flow::kNormal;
    case NodeKind::kSetBlock:
    case NodeKind::kFilterBlock:
      CINNABAR_RETURN_IF_ERROR(RunCaptured(node));
      return Flow::kNormal;
    case NodeKind::kBody:
      return RunBody(node.bodies[0]);
    case NodeKind::kMacro: {
      auto callable = std::make_shared<CallableValue>();
      callable->kind = CallableValue::Kind::kMacro;
      callable->name = node.name;
      callable->macro = &node;
      Set(node.name, Value(CallablePtr(std::move(callable))));
      return Flow::kNormal;
    }
    case NodeKind::kBreak:
      return Flow::kBreak;
    case NodeKind::kContinue:
      return Flow::kContinue;
    default:
      break;
  }
  CINNABAR_CHECK(false) << "not a statement: " << static_cast<int>(node.kind);
  return Flow::kNormal;
}

absl::StatusOr<Flow> Evaluator::RunIf(const Node& node) {
  for (size_t i = 0; i < node.children.size(); ++i) {
    CINNABAR_ASSIGN_OR_RETURN(const Value condition, Eval(*node.children[i]));
    if (IsTrue(condition)) return RunBody(node.bodies[i]);
  }
  if (node.bodies.size() > node.children.size()) return RunBody(node.bodies.back());
  return Flow::kNormal;
}

absl::StatusOr<Flow> Evaluator::RunFor(const Node& node) {
  CINNABAR_ASSIGN_OR_RETURN(const Value iterable, Eval(*node.children[1]));
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Value> items, Items(iterable));
  const Node& target = *node.children[0];
  auto loop = std::make_shared<LoopValue>();
  if (node.children[2] == nullptr) {
    loop->items = std::move(items);
  } else {
    for (Value& item : items) {
      scopes_.emplace_back();
      absl::Status assigned = Assign(target, item);
      absl::StatusOr<Value> keeps = assigned.ok() ? Eval(*node.children[2]) : assigned;
      scopes_.pop_back();
      CINNABAR_RETURN_IF_ERROR(keeps.status());
      if (IsTrue(*keeps)) loop->items.push_back(std::move(item));
    }
  }
  if (loop->items.empty()) return RunBody(node.bodies[1]);
  for (const Value& item : loop->items) {
    loop->value_depth = std::max(loop->value_depth, 1 + DepthOf(item));
  }
  if (loop->value_depth > kValueDepthMax) return Wrong("a loop's items nest too deeply");
  absl::StatusOr<Flow> flow = Flow::kNormal;
  for (loop->index = 0; loop->index < loop->items.size(); ++loop->index) {
    scopes_.emplace_back();
    Set("loop", Value(loop));
    absl::Status assigned = budget_.Step();
    if (assigned.ok()) assigned = Assign(target, loop->items[loop->index]);
    flow = assigned.ok() ? RunBody(node.bodies[0]) : absl::StatusOr<Flow>(assigned);
    scopes_.pop_back();
    if (!flow.ok() || *flow == Flow::kBreak) break;
  }
  CINNABAR_RETURN_IF_ERROR(flow.status());
  return Flow::kNormal;
}

absl::Status Evaluator::RunSet(const Node& node) {
  CINNABAR_ASSIGN_OR_RETURN(Value value, Eval(*node.children[1]));
  return Assign(*node.children[0], std::move(value));
}

absl::StatusOr<Flow> Evaluator::Capture(const Body& body, MarkedText* text) {
  MarkedText outer = std::exchange(output_, MarkedText());
  absl::StatusOr<Flow> flow = RunBody(body);
  *text = std::exchange(output_, std::move(outer));
  return flow;
}

// The body of a set or filter block has a scope of its own.
absl::Status Evaluator::RunCaptured(const Node& node) {
  MarkedText text;
  scopes_.emplace_back();
  const absl::StatusOr<Flow> flow = Capture(node.bodies[0], &text);
  scopes_.pop_back();
  CINNABAR_RETURN_IF_ERROR(flow.status());
  if (*flow != Flow::kNormal) return Missing("break or continue out of a block");
  Value value = MakeText(std::move(text));
  const Node* filter =
      node.kind == NodeKind::kSetBlock ? node.children[1].get() : node.children[0].get();
  if (filter != nullptr) {
    CINNABAR_ASSIGN_OR_RETURN(value, EvalFilter(*filter, value));
  }
  if (node.kind == NodeKind::kFilterBlock) return Print(value);
  return Assign(*node.children[0], std::move(value));
}

// ---- expressions
// ----------------------------------------------------------------------------------

absl::StatusOr<Value> Evaluator::Eval(const Node& node) {
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(Enter(node));
  absl::StatusOr<Value> value = EvalKind(node);
  if (!value.ok()) return AtLine(node, value.status());
  return value;
}

absl::StatusOr<Value> Evaluator::EvalKind(const Node& node) {
  switch (node.kind) {
    case NodeKind::kConstant:
      return node.constant;
    case NodeKind::kName:
      return Lookup(node.name);
    case NodeKind::kAttribute: {
      CINNABAR_ASSIGN_OR_RETURN(const Value object, Eval(*node.children[0]));
      return Attribute(object, node.name);
    }
    case NodeKind::kItem: {
      CINNABAR_ASSIGN_OR_RETURN(const Value object, Eval(*node.children[0]));
      CINNABAR_ASSIGN_OR_RETURN(const Value key, Eval(*node.children[1]));
      return Item(object, key);
    }
    case NodeKind::kSlice:
      return EvalSlice(node);
    case NodeKind::kCall:
      return EvalCall(node);
    case NodeKind::kFilter:
      return EvalFilter(node, std::nullopt);
    case NodeKind::kTest: {
      CINNABAR_ASSIGN_OR_RETURN(const Value value, Eval(*node.children[0]));
      CINNABAR_ASSIGN_OR_RETURN(const Arguments arguments, EvalArguments(node, 1));
      CINNABAR_ASSIGN_OR_RETURN(const bool holds, ApplyTest(node.name, value, arguments));
      return Value(holds);
    }
    case NodeKind::kNegate:
    case NodeKind::kPlus: {
      CINNABAR_ASSIGN_OR_RETURN(const Value value, Eval(*node.children[0]));
      if (node.kind == NodeKind::kPlus && value.IsNumber()) return value;
      if (value.Integer().has_value()) return IntegerArithmetic("-", 0, *value.Integer());
      if (value.Number().has_value()) return Value(-*value.Number());
      return Wrong(absl::StrCat("a ", value.TypeName(), " has no sign"));
    }
    case NodeKind::kNot: {
      CINNABAR_ASSIGN_OR_RETURN(const Value value, Eval(*node.children[0]));
      return Value(!IsTrue(value));
    }
    case NodeKind::kAnd:
    case NodeKind::kOr: {
      CINNABAR_ASSIGN_OR_RETURN(Value left, Eval(*node.children[0]));
      if (IsTrue(left) == (node.kind == NodeKind::kOr)) return left;
      return Eval(*node.children[1]);
    }
    case NodeKind::kArithmetic: {
      CINNABAR_ASSIGN_OR_RETURN(const Value left, Eval(*node.children[0]));
      CINNABAR_ASSIGN_OR_RETURN(const Value right, Eval(*node.children[1]));
      return Arithmetic(node.name, left, right);
    }
    case NodeKind::kConcat:
      return EvalConcat(node);
    case NodeKind::kCompare:
      return EvalCompare(node);
    case NodeKind::kConditional: {
      CINNABAR_ASSIGN_OR_RETURN(const Value condition, Eval(*node.children[1]));
      if (IsTrue(condition)) return Eval(*node.children[0]);
      if (node.children[2] != nullptr) return Eval(*node.children[2]);
      return MakeUndefined("the value of an inline if without else");
    }
    case NodeKind::kList:
    case NodeKind::kTuple: {
      std::vector<Value> items;
      for (const NodePtr& child : node.children) {
        CINNABAR_ASSIGN_OR_RETURN(Value item, Eval(*child));
        items.push_back(std::move(item));
      }
      return NewList(std::move(items), node.kind == NodeKind::kTuple);
    }
    case NodeKind::kDict:
      return EvalDict(node);
    default:
      break;
  }
  CINNABAR_CHECK(false) << "not an expression: " << static_cast<int>(node.kind);
  return Value();
}

absl::StatusOr<Value> Evaluator::EvalDict(const Node& node) {
  std::vector<std::pair<TextPtr, Value>> entries;
  for (size_t i = 0; i < node.children.size(); i += 2) {
    CINNABAR_ASSIGN_OR_RETURN(const Value key, Eval(*node.children[i]));
    CINNABAR_ASSIGN_OR_RETURN(Value value, Eval(*node.children[i + 1]));
    if (key.text() == nullptr) return Missing("a dict key that is not a string");
    const auto same = std::find_if(entries.begin(), entries.end(), [&](const auto& entry) {
      return entry.first->bytes() == key.text()->bytes();
    });
    if (same != entries.end()) {
      same->second = std::move(value);
    } else {
      entries.emplace_back(*key.As<TextPtr>(), std::move(value));
    }
  }
  return MakeDict(std::move(entries));
}

absl::StatusOr<Value> Evaluator::EvalConcat(const Node& node) {
  MarkedText out;
  for (const NodePtr& child : node.children) {
    CINNABAR_ASSIGN_OR_RETURN(const Value part, Eval(*child));
    CINNABAR_ASSIGN_OR_RETURN(const MarkedText text, ToText(part, &budget_));
    CINNABAR_RETURN_IF_ERROR(budget_.Bytes(text.size()));
    out.Append(text);
  }
  return MakeText(std::move(out));
}

absl::StatusOr<Value> Evaluator::EvalCompare(const Node& node) {
  CINNABAR_ASSIGN_OR_RETURN(Value left, Eval(*node.children[0]));
  for (size_t i = 0; i < node.operators.size(); ++i) {
    CINNABAR_ASSIGN_OR_RETURN(Value right, Eval(*node.children[i + 1]));
    CINNABAR_ASSIGN_OR_RETURN(const bool holds, Compare(node.operators[i], left, right));
    if (!holds) return Value(false);
    left = std::move(right);
  }
  return Value(true);
}

absl::StatusOr<bool> Evaluator::Compare(const std::string& op, const Value& left,
                                        const Value& right) {
  if (op == "==" || op == "!=") {
    CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(left, right, &budget_));
    return same == (op == "==");
  }
  if (op == "in" || op == "not in") {
    CINNABAR_ASSIGN_OR_RETURN(const bool inside, Contains(right, left));
    return inside == (op == "in");
  }
  for (const Value* side : {&left, &right}) {
    if (side->Is<Undefined>()) return IsUndefined(*side);
  }
  if (op == "<") return IsLess(left, right, &budget_);
  if (op == ">") return IsLess(right, left, &budget_);
  // <= is "less or equal", not "not greater": NaN is neither.
  CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(left, right, &budget_));
  CINNABAR_ASSIGN_OR_RETURN(
      const bool less, op == "<=" ? IsLess(left, right, &budget_) : IsLess(right, left, &budget_));
  return same || less;
}

absl::StatusOr<bool> Evaluator::Contains(const Value& container, const Value& item) {
  if (const MarkedText* text = container.text()) {
    if (item.text() == nullptr) {
      return Wrong(absl::StrCat("in: a ", item.TypeName(), " is not part of a string"));
    }
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(text->size() / 64)));
    return absl::StrContains(text->bytes(), item.text()->bytes());
  }
  if (const DictValue* dict = container.dict()) {
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(dict->entries.size())));
    return item.text() != nullptr && dict->Find(item.text()->bytes()) != nullptr;
  }
  if (const ListValue* list = container.list()) {
    for (const Value& element : list->items) {
      CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(element, item, &budget_));
      if (same) return true;
    }
    return false;
  }
  if (container.Is<Undefined>()) return false;
  return Wrong(absl::StrCat("in: a ", container.TypeName(), " contains nothing"));
}

absl::StatusOr<Value> Evaluator::Arithmetic(const std::string& op, const Value& left,
                                            const Value& right) {
  for (const Value* side : {&left, &right}) {
    if (side->Is<Undefined>()) return IsUndefined(*side);
  }
  if (op == "+" && left.text() != nullptr && right.text() != nullptr) {
    MarkedText out = *left.text();
    out.Append(*right.text());
    return NewText(std::move(out));
  }
  if (op == "+" && left.list() != nullptr && right.list() != nullptr &&
      left.list()->is_tuple == right.list()->is_tuple) {
    std::vector<Value> items = left.list()->items;
    items.insert(items.end(), right.list()->items.begin(), right.list()->items.end());
    return NewList(std::move(items), left.list()->is_tuple);
  }
  if (op == "*") {
    const Value& many = left.Integer().has_value() ? right : left;
    const std::optional<int64_t> count =
        left.Integer().has_value() ? left.Integer() : right.Integer();
    if (count.has_value() && (many.text() != nullptr || many.list() != nullptr)) {
      MarkedText text;
      std::vector<Value> items;
      for (int64_t i = 0; i < *count; ++i) {
        CINNABAR_RETURN_IF_ERROR(budget_.Step());
        if (many.text() != nullptr) {
          CINNABAR_RETURN_IF_ERROR(budget_.Bytes(many.text()->size()));
          text.Append(*many.text());
        } else {
          CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(many.list()->items.size())));
          items.insert(items.end(), many.list()->items.begin(), many.list()->items.end());
        }
      }
      if (many.text() != nullptr) return MakeText(std::move(text));
      return NewList(std::move(items), many.list()->is_tuple);
    }
  }
  if (!left.IsNumber() || !right.IsNumber()) {
    return Wrong(absl::StrCat("'", op, "' does not work between ", left.TypeName(), " and ",
                              right.TypeName()));
  }
  if (left.Integer().has_value() && right.Integer().has_value() && op != "/") {
    return IntegerArithmetic(op, *left.Integer(), *right.Integer());
  }
  const double a = *left.Number();
  const double b = *right.Number();
  if (op == "+") return Value(a + b);
  if (op == "-") return Value(a - b);
  if (op == "*") return Value(a * b);
  if (op == "**") return Value(std::pow(a, b));
  if (b == 0) return Wrong("division by zero");
  if (op == "/") return Value(a / b);
  if (op == "//") return Value(std::floor(a / b));
  const double rest = std::fmod(a, b);
  return Value(rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest);
}

absl::StatusOr<Value> Evaluator::IntegerArithmetic(const std::string& op, int64_t left,
                                                   int64_t right) {
  int64_t result = 0;
  bool overflows = false;
  if (op == "+") {
    overflows = __builtin_add_overflow(left, right, &result);
  } else if (op == "-") {
    overflows = __builtin_sub_overflow(left, right, &result);
  } else if (op == "*") {
    overflows = __builtin_mul_overflow(left, right, &result);
  } else if (op == "**") {
    if (right < 0) return Value(std::pow(static_cast<double>(left), static_cast<double>(right)));
    result = 1;
    // A base of -1, 0 or 1 never overflows: its power depends on the exponent's parity only.
    if (left >= -1 && left <= 1) right = right == 0 ? 0 : 2 - right % 2;
    for (int64_t i = 0; i < right && !overflows; ++i) {
      overflows = __builtin_mul_overflow(result, left, &result);
    }
  } else {
    if (right == 0) return Wrong("division by zero");
    if (right == -1) {
      if (op == "%") return Value(int64_t{0});
      overflows = __builtin_sub_overflow(int64_t{0}, left, &result);
    } else {
      // Python rounds towards minus infinity.
      const bool rounds = left % right != 0 && (left % right < 0) != (right < 0);
      result = op == "//" ? left / right - (rounds ? 1 : 0) : left % right + (rounds ? right : 0);
    }
  }
  if (overflows) return Wrong(absl::StrCat("'", op, "' overflows 64 bits"));
  return Value(result);
}

absl::StatusOr<Value> Evaluator::EvalSlice(const Node& node) {
  CINNABAR_ASSIGN_OR_RETURN(const Value object, Eval(*node.children[0]));
  std::optional<int64_t> bounds[3];
  for (int i = 0; i < 3; ++i) {
    if (node.children[i + 1] == nullptr) continue;
    CINNABAR_ASSIGN_OR_RETURN(const Value bound, Eval(*node.children[i + 1]));
    if (bound.Is<None>()) continue;
    bounds[i] = bound.Integer();
    if (!bounds[i].has_value()) {
      return Wrong(absl::StrCat("a slice needs integers, not a ", bound.TypeName()));
    }
  }
  const int64_t step = bounds[2].value_or(1);
  if (step == 0) return Wrong("slice step is zero");
  std::vector<size_t> offsets;
  int64_t size = 0;
  if (object.text() != nullptr) {
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(object.text()->size() / 16)));
    offsets = CharOffsets(object.text()->bytes());
    size = static_cast<int64_t>(offsets.size()) - 1;
  } else if (object.list() != nullptr) {
    size = static_cast<int64_t>(object.list()->items.size());
  } else if (object.Is<Undefined>()) {
    return IsUndefined(object);
  } else {
    return Wrong(absl::StrCat("a ", object.TypeName(), " has no slices"));
  }
  // As Python's slice.indices().
  const int64_t low = step > 0 ? 0 : -1;
  const int64_t high = step > 0 ? size : size - 1;
  const auto place = [&](std::optional<int64_t> bound, int64_t if_absent) {
    if (!bound.has_value()) return if_absent;
    if (*bound < 0) return *bound < -size ? low : std::max(low, *bound + size);
    return std::min(high, *bound);
  };
  const int64_t start = place(bounds[0], step > 0 ? low : high);
  const int64_t stop = place(bounds[1], step > 0 ? high : low);
  if (object.text() != nullptr && step == 1) {
    if (start >= stop) return MakeText("");
    return NewText(object.text()->Substring(offsets[start], offsets[stop]));
  }
  MarkedText text;
  std::vector<Value> items;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    CINNABAR_RETURN_IF_ERROR(budget_.Step());
    if (object.text() != nullptr) {
      text.Append(object.text()->Substring(offsets[i], offsets[i + 1]));
    } else {
      items.push_back(object.list()->items[i]);
    }
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  if (object.text() != nullptr) return NewText(std::move(text));
  return NewList(std::move(items), object.list()->is_tuple);
}

absl::StatusOr<Arguments> Evaluator::EvalArguments(const Node& node, size_t from) {
  Arguments arguments;
  for (size_t i = from; i < node.children.size(); ++i) {
    CINNABAR_ASSIGN_OR_RETURN(Value value, Eval(*node.children[i]));
    arguments.positional.push_back(std::move(value));
  }
  for (const auto& [name, child] : node.named) {
    CINNABAR_ASSIGN_OR_RETURN(Value value, Eval(*child));
    arguments.named.emplace_back(name, std::move(value));
  }
  return arguments;
}

absl::StatusOr<Value> Evaluator::EvalFilter(const Node& node, std::optional<Value> block) {
  const DepthGuard guard(&depth_);
  CINNABAR_RETURN_IF_ERROR(Enter(node));
  Value value;
  const Node* inner = node.children[0].get();
  if (inner == nullptr) {
    CINNABAR_CHECK(block.has_value());
    value = *std::move(block);
  } else if (block.has_value() && inner->kind == NodeKind::kFilter) {
    CINNABAR_ASSIGN_OR_RETURN(value, EvalFilter(*inner, std::move(block)));
  } else {
    CINNABAR_ASSIGN_OR_RETURN(value, Eval(*inner));
  }
  CINNABAR_ASSIGN_OR_RETURN(const Arguments arguments, EvalArguments(node, 1));
  absl::StatusOr<Value> filtered = ApplyFilter(node.name, value, arguments);
  if (!filtered.ok()) return AtLine(node, filtered.status());
  return filtered;
}

absl::StatusOr<Value> Evaluator::EvalCall(const Node& node) {
  CINNABAR_ASSIGN_OR_RETURN(const Value callee, Eval(*node.children[0]));
  if (callee.Is<Undefined>()) return IsUndefined(callee);
  const CallablePtr* held = callee.As<CallablePtr>();
  if (held == nullptr) return Wrong(absl::StrCat("a ", callee.TypeName(), " cannot be called"));
  CINNABAR_ASSIGN_OR_RETURN(const Arguments arguments, EvalArguments(node, 1));
  const CallableValue& callable = **held;
  switch (callable.kind) {
    case CallableValue::Kind::kFunction:
      return CallFunction(callable.name, arguments);
    case CallableValue::Kind::kMethod:
      return CallMethod(callable.self, callable.name, arguments);
    case CallableValue::Kind::kMacro:
      return CallMacro(*static_cast<const Node*>(callable.macro), arguments);
  }
  CINNABAR_CHECK(false) << "not a callable";
  return Value();
}

// ---- access
// ---------------------------------------------------------------------------------------

absl::StatusOr<Value> Evaluator::Attribute(const Value& object, const std::string& name) {
  if (object.Is<Undefined>()) return IsUndefined(object);
  const auto method = [&] {
    auto callable = std::make_shared<CallableValue>();
    callable->kind = CallableValue::Kind::kMethod;
    callable->name = name;
    callable->self = object;
    return Value(CallablePtr(std::move(callable)));
  };
  const auto is_one_of = [&](std::initializer_list<absl::string_view> names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (const DictValue* dict = object.dict()) {
    // Python finds a dict's methods before its keys.
    if (is_one_of({"items", "keys", "values", "get"})) return method();
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(dict->entries.size() / 8)));
    if (const Value* value = dict->Find(name)) return *value;
  } else if (NamespaceValue* const* held = object.As<NamespaceValue*>()) {
    for (const auto& [known, value] : (*held)->entries) {
      if (known == name) return value;
    }
  } else if (const LoopPtr* loop = object.As<LoopPtr>()) {
    return LoopAttribute(*loop, name);
  } else if (object.text() != nullptr) {
    if (is_one_of({"startswith",   "endswith",    "split",   "rsplit",  "splitlines",
                   "strip",        "lstrip",      "rstrip",  "upper",   "lower",
                   "title",        "capitalize",  "replace", "find",    "rfind",
                   "count",        "join",        "isdigit", "isalpha", "isspace",
                   "removeprefix", "removesuffix"})) {
      return method();
    }
  } else if (object.list() != nullptr && is_one_of({"index", "count"})) {
    return method();
  }
  return MakeUndefined(
      absl::StrCat("'", object.TypeName(), " object' has no attribute '", name, "', which"));
}

absl::StatusOr<Value> Evaluator::LoopAttribute(const LoopPtr& loop, const std::string& name) {
  const auto index = static_cast<int64_t>(loop->index);
  const auto size = static_cast<int64_t>(loop->items.size());
  if (name == "index") return Value(index + 1);
  if (name == "index0") return Value(index);
  if (name == "revindex") return Value(size - index);
  if (name == "revindex0") return Value(size - index - 1);
  if (name == "first") return Value(index == 0);
  if (name == "last") return Value(index + 1 == size);
  if (name == "length") return Value(size);
  // Jinja counts the levels of recursive loops only.
  if (name == "depth") return Value(int64_t{1});
  if (name == "depth0") return Value(int64_t{0});
  if (name == "previtem") {
    return index > 0 ? loop->items[index - 1] : MakeUndefined("loop.previtem");
  }
  if (name == "nextitem") {
    return index + 1 < size ? loop->items[index + 1] : MakeUndefined("loop.nextitem");
  }
  if (name == "cycle") {
    auto callable = std::make_shared<CallableValue>();
    callable->kind = CallableValue::Kind::kMethod;
    callable->name = name;
    callable->self = Value(loop);
    return Value(CallablePtr(std::move(callable)));
  }
  if (name == "changed") return Missing("loop.changed");
  return MakeUndefined(absl::StrCat("loop.", name));
}

absl::StatusOr<Value> Evaluator::Item(const Value& object, const Value& key) {
  if (object.Is<Undefined>()) return IsUndefined(object);
  if (const MarkedText* name = key.text()) {
    if (const DictValue* dict = object.dict()) {
      CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(dict->entries.size() / 8)));
      if (const Value* value = dict->Find(name->bytes())) return *value;
      // Jinja falls back to the attribute.
    }
    return Attribute(object, name->bytes());
  }
  if (key.Integer().has_value()) {
    int64_t index = *key.Integer();
    if (const ListValue* list = object.list()) {
      const auto size = static_cast<int64_t>(list->items.size());
      if (index < 0) index += size;
      if (index >= 0 && index < size) return list->items[index];
    } else if (const MarkedText* text = object.text()) {
      CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(text->size() / 16)));
      const std::vector<size_t> offsets = CharOffsets(text->bytes());
      const auto size = static_cast<int64_t>(offsets.size()) - 1;
      if (index < 0) index += size;
      if (index >= 0 && index < size) {
        return NewText(text->Substring(offsets[index], offsets[index + 1]));
      }
    }
    return MakeUndefined(absl::StrCat("item ", *key.Integer(), " of a ", object.TypeName()));
  }
  return MakeUndefined(absl::StrCat("item of a ", object.TypeName(), " by a ", key.TypeName()));
}

// "a.b.0" or a number, as the attribute argument of map, selectattr, sort and join has it.
absl::StatusOr<Value> Evaluator::PathItem(const Value& object, const Value& path) {
  if (path.text() == nullptr) return Item(object, path);
  Value value = object;
  for (const MarkedText& part : SplitAt(*path.text(), ".", -1, false)) {
    int64_t index = 0;
    const std::string& name = part.bytes();
    const auto read = std::from_chars(name.data(), name.data() + name.size(), index);
    const bool is_index = read.ec == std::errc() && read.ptr == name.data() + name.size();
    CINNABAR_ASSIGN_OR_RETURN(value, Item(value, is_index ? Value(index) : MakeText(name)));
  }
  return value;
}

absl::StatusOr<std::vector<Value>> Evaluator::Items(const Value& value) {
  std::vector<Value> items;
  if (const ListValue* list = value.list()) {
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(list->items.size())));
    return list->items;
  }
  if (const DictValue* dict = value.dict()) {
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(dict->entries.size())));
    for (const auto& entry : dict->entries) items.emplace_back(entry.first);
    return items;
  }
  if (const MarkedText* text = value.text()) {
    const std::vector<size_t> offsets = CharOffsets(text->bytes());
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(offsets.size())));
    for (size_t i = 0; i + 1 < offsets.size(); ++i) {
      items.push_back(MakeText(text->Substring(offsets[i], offsets[i + 1])));
    }
    return items;
  }
  if (value.Is<Undefined>()) return items;
  return Wrong(absl::StrCat("a ", value.TypeName(), " cannot be iterated"));
}

absl::StatusOr<int64_t> Evaluator::Length(const Value& value) {
  if (const ListValue* list = value.list()) return static_cast<int64_t>(list->items.size());
  if (const DictValue* dict = value.dict()) return static_cast<int64_t>(dict->entries.size());
  if (const MarkedText* text = value.text()) {
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(text->size() / 16)));
    return static_cast<int64_t>(NumChars(text->bytes()));
  }
  if (value.Is<Undefined>()) return 0;
  return Wrong(absl::StrCat("a ", value.TypeName(), " has no length"));
}

// ---- calls
// ----------------------------------------------------------------------------------------

absl::StatusOr<Value> Evaluator::CallFunction(const std::string& name, const Arguments& arguments) {
  if (name == "namespace" || name == "dict") {
    std::vector<std::pair<TextPtr, Value>> entries;
    const auto put = [&](TextPtr key, Value value) {
      for (auto& [known, held] : entries) {
        if (known->bytes() == key->bytes()) {
          held = std::move(value);
          return;
        }
      }
      entries.emplace_back(std::move(key), std::move(value));
    };
    if (!arguments.positional.empty()) {
      const DictValue* dict = arguments.positional[0].dict();
      if (dict == nullptr) return Missing(absl::StrCat(name, "() of something but a dict"));
      CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(dict->entries.size())));
      entries = dict->entries;
    }
    for (const auto& [key, value] : arguments.named) {
      CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(entries.size())));
      put(std::make_shared<const MarkedText>(key), value);
    }
    if (name == "dict") return MakeDict(std::move(entries));
    NamespaceValue made;
    for (auto& [key, value] : entries) made.entries.emplace_back(key->bytes(), std::move(value));
    namespaces_.push_back(std::move(made));
    return Value(&namespaces_.back());
  }
  if (name == "range") {
    int64_t bounds[3] = {0, 0, 1};
    const size_t count = arguments.positional.size();
    if (count < 1 || count > 3) return Wrong("range() takes one to three integers");
    for (size_t i = 0; i < count; ++i) {
      const std::optional<int64_t> bound = arguments.positional[i].Integer();
      if (!bound.has_value()) return Wrong("range() takes integers");
      bounds[count == 1 ? 1 : i] = *bound;
    }
    if (bounds[2] == 0) return Wrong("range() with a step of zero");
    std::vector<Value> items;
    for (int64_t i = bounds[0]; bounds[2] > 0 ? i < bounds[1] : i > bounds[1];) {
      if (static_cast<int64_t>(items.size()) >= kRangeMax) {
        return absl::ResourceExhaustedError(
            absl::StrCat("range() of more than ", kRangeMax, " numbers"));
      }
      items.emplace_back(i);
      if (__builtin_add_overflow(i, bounds[2], &i)) break;
    }
    return NewList(std::move(items));
  }
  if (name == "raise_exception") {
    MarkedText message;
    if (const Value* given = arguments.Find(0, "message")) {
      CINNABAR_ASSIGN_OR_RETURN(message, ToText(*given, &budget_));
    }
    return Wrong(message.bytes());
  }
  CINNABAR_CHECK(name == "strftime_now") << name;
  if (!input_.now.has_value()) {
    return absl::FailedPreconditionError("strftime_now(): no time was given to the render");
  }
  const Value* format = arguments.Find(0, "format");
  if (format == nullptr || format->text() == nullptr) return Wrong("strftime_now() takes a format");
  if (format->text()->size() > 256) return Wrong("strftime_now(): the format is too long");
  return NewText(
      MarkedText(absl::FormatTime(format->text()->bytes(), *input_.now, absl::LocalTimeZone())));
}

absl::StatusOr<Value> Evaluator::CallMacro(const Node& macro, const Arguments& arguments) {
  if (arguments.positional.size() > macro.parameters.size()) {
    return Wrong(
        absl::StrCat("macro ", macro.name, " takes ", macro.parameters.size(), " arguments"));
  }
  for (const auto& argument : arguments.named) {
    if (std::find(macro.parameters.begin(), macro.parameters.end(), argument.first) ==
        macro.parameters.end()) {
      return Wrong(absl::StrCat("macro ", macro.name, " has no parameter ", argument.first));
    }
  }
  const size_t floor = std::exchange(scope_floor_, scopes_.size());
  scopes_.emplace_back();
  const size_t first_default = macro.parameters.size() - macro.children.size();
  absl::Status status;
  for (size_t i = 0; i < macro.parameters.size() && status.ok(); ++i) {
    if (const Value* given = arguments.Find(i, macro.parameters[i])) {
      Set(macro.parameters[i], *given);
    } else if (i >= first_default) {
      absl::StatusOr<Value> value = Eval(*macro.children[i - first_default]);
      status = value.status();
      if (status.ok()) Set(macro.parameters[i], *std::move(value));
    } else {
      Set(macro.parameters[i],
          MakeUndefined(absl::StrCat("parameter '", macro.parameters[i], "'")));
    }
  }
  MarkedText text;
  if (status.ok()) status = Capture(macro.bodies[0], &text).status();
  scopes_.pop_back();
  scope_floor_ = floor;
  CINNABAR_RETURN_IF_ERROR(status);
  return MakeText(std::move(text));
}

absl::StatusOr<Value> Evaluator::CallMethod(const Value& self, const std::string& name,
                                            const Arguments& arguments) {
  if (const MarkedText* text = self.text()) return CallTextMethod(*text, name, arguments);
  if (const LoopPtr* loop = self.As<LoopPtr>()) {
    if (arguments.positional.empty()) return Wrong("loop.cycle() takes values");
    return arguments.positional[(*loop)->index % arguments.positional.size()];
  }
  if (const ListValue* list = self.list()) {
    const Value* wanted = arguments.Find(0, "value");
    if (wanted == nullptr) return Wrong(absl::StrCat(name, "() takes a value"));
    int64_t count = 0;
    for (size_t i = 0; i < list->items.size(); ++i) {
      CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(list->items[i], *wanted, &budget_));
      if (same && name == "index") return Value(static_cast<int64_t>(i));
      if (same) ++count;
    }
    if (name == "index") return Wrong("index(): the value is not in the list");
    return Value(count);
  }
  const DictValue* dict = self.dict();
  CINNABAR_CHECK(dict != nullptr) << "method " << name << " of a " << self.TypeName();
  if (name == "get") {
    const Value* key = arguments.Find(0, "key");
    if (key == nullptr) return Wrong("get() takes a key");
    CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(dict->entries.size() / 8)));
    const Value* value = key->text() == nullptr ? nullptr : dict->Find(key->text()->bytes());
    if (value != nullptr) return *value;
    const Value* otherwise = arguments.Find(1, "default");
    return otherwise == nullptr ? Value(None{}) : *otherwise;
  }
  std::vector<Value> items;
  for (const auto& [key, value] : dict->entries) {
    if (name == "keys") {
      items.emplace_back(key);
    } else if (name == "values") {
      items.push_back(value);
    } else {
      CINNABAR_ASSIGN_OR_RETURN(Value pair, NewList({Value(key), value}, /*is_tuple=*/true));
      items.push_back(std::move(pair));
    }
  }
  return NewList(std::move(items));
}

absl::StatusOr<Value> Evaluator::CallSplit(const MarkedText& self, const std::string& name,
                                           const Arguments& arguments) {
  int64_t limit = -1;
  if (const Value* given = arguments.Find(1, "maxsplit")) {
    if (!given->Integer().has_value()) return Wrong("split(): maxsplit is not an integer");
    limit = *given->Integer();
  }
  CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(self.size() / 16)));
  const Value* separator = arguments.Find(0, "sep");
  if (separator == nullptr || separator->Is<None>()) {
    if (name == "rsplit" && limit >= 0) return Missing("rsplit() of whitespace with a limit");
    return NewTextList(SplitSpace(self, limit));
  }
  if (separator->text() == nullptr) return Wrong("split(): the separator is not a string");
  if (separator->text()->size() == 0) return Wrong("split(): the separator is empty");
  return NewTextList(SplitAt(self, separator->text()->bytes(), limit, name == "rsplit"));
}

absl::StatusOr<Value> Evaluator::CallTextMethod(const MarkedText& self, const std::string& name,
                                                const Arguments& arguments) {
  CINNABAR_RETURN_IF_ERROR(budget_.Step(static_cast<int64_t>(self.size() / 64)));
  const Value* first = arguments.Find(0, "");
  const MarkedText* text = first == nullptr ? nullptr : first->text();
  const auto takes_text = [&] { return Wrong(absl::StrCat(name, "() takes a string")); };
  if (name == "split" || name == "rsplit") return CallSplit(self, name, arguments);
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    if (first != nullptr && text == nullptr && !first->Is<None>()) return takes_text();
    return NewText(Strip(self, text == nullptr ? nullptr : &text->bytes(), name != "rstrip",
                         name != "lstrip"));
  }
  if (name == "upper") return NewText(ToUpper(self));
  if (name == "lower") return NewText(ToLower(self));
  if (name == "title") return NewText(Title(self, /*is_filter=*/false));
  if (name == "capitalize") return NewText(Capitalize(self));
  if (name == "startswith" || name == "endswith") {
    std::vector<Value> options;
    if (first != nullptr && first->list() != nullptr && first->list()->is_tuple) {
      options = first->list()->items;
    } else if (first != nullptr) {
      options.push_back(*first);
    }
    if (options.empty() && first == nullptr) return takes_text();
    for (const Value& option : options) {
      if (option.text() == nullptr) return takes_text();
      const std::string& affix = option.text()->bytes();
      if (name == "startswith" ? absl::StartsWith(self.bytes(), affix)
                               : absl::EndsWith(self.bytes(), affix)) {
        return Value(true);
      }
    }
    return Value(false);
  }
  if (name == "splitlines") {
    std::vector<MarkedText> lines;
    size_t begin = 0;
    for (size_t at = 0; at < self.size(); ++at) {
      const char c = self.bytes()[at];
      if (c != '\n' && c != '\r') continue;
      lines.push_back(self.Substring(begin, at));
      if (c == '\r' && at + 1 < self.size() && self.bytes()[at + 1] == '\n') ++at;
      begin = at + 1;
    }
    if (begin < self.size()) lines.push_back(self.Substring(begin, self.size()));
    return NewTextList(std::move(lines));
  }
  if (name == "isdigit" || name == "isalpha" || name == "isspace") {
    bool holds = self.size() > 0;
    for (size_t at = 0; at < self.size() && holds;) {
      const Utf8Char c = ReadUtf8(self.bytes(), at);
      at += c.num_bytes;
      holds = name == "isalpha" ? IsLetter(c.code_point)
              : name == "isspace"
                  ? IsPythonSpace(c.code_point)
                  : utf8proc_category(static_cast<utf8proc_int32_t>(c.code_point)) ==
                        UTF8PROC_CATEGORY_ND;
    }
    return Value(holds);
  }
  if (name == "join") {
    if (first == nullptr) return Wrong("join() takes a list");
    CINNABAR_ASSIGN_OR_RETURN(const std::vector<Value> items, Items(*first));
    MarkedText out;
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].text() == nullptr) return Wrong("join() takes a list of strings");
      CINNABAR_RETURN_IF_ERROR(budget_.Bytes(items[i].text()->size() + self.size()));
      if (i > 0) out.Append(self);
      out.Append(*items[i].text());
    }
    return MakeText(std::move(out));
  }
  if (text == nullptr) return takes_text();
  if (name == "removeprefix") {
    return NewText(absl::StartsWith(self.bytes(), text->bytes())
                       ? self.Substring(text->size(), self.size())
                       : self);
  }
  if (name == "removesuffix") {
    return NewText(absl::EndsWith(self.bytes(), text->bytes())
                       ? self.Substring(0, self.size() - text->size())
                       : self);
  }
  if (name == "find" || name == "rfind") {
    const size_t at =
        name == "find" ? self.bytes().find(text->bytes()) : self.bytes().rfind(text->bytes());
    if (at == std::string::npos) return Value(int64_t{-1});
    return Value(static_cast<int64_t>(NumChars(absl::string_view(self.bytes()).substr(0, at))));
  }
  if (name == "count") {
    if (text->size() == 0) return Value(static_cast<int64_t>(NumChars(self.bytes())) + 1);
    int64_t count = 0;
    for (size_t at = self.bytes().find(text->bytes()); at != std::string::npos;
         at = self.bytes().find(text->bytes(), at + text->size())) {
      ++count;
    }
    return Value(count);
  }
  CINNABAR_CHECK(name == "replace") << name;
  const Value* to = arguments.Find(1, "new");
  if (to == nullptr || to->text() == nullptr) return takes_text();
  const Value* count = arguments.Find(2, "count");
  const int64_t count_max = count == nullptr ? -1 : count->Integer().value_or(-1);
  // A short text may grow by the replacement at every character; that is paid for before it is
  // made.
  CINNABAR_RETURN_IF_ERROR(
      budget_.Bytes(self.size() / std::max<size_t>(1, text->size()) * to->text()->size() / 8));
  return NewText(Replace(self, text->bytes(), *to->text(), count_max));
}

// ---- filters
// --------------------------------------------------------------------------------------

absl::StatusOr<Value> Evaluator::ApplyFilter(const std::string& name, const Value& value,
                                             const Arguments& arguments) {
  CINNABAR_RETURN_IF_ERROR(budget_.Step());
  const auto is_one_of = [&](std::initializer_list<absl::string_view> names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (name == "default" || name == "d") {
    const Value* otherwise = arguments.Find(0, "default_value");
    const Value* also_false = arguments.Find(1, "boolean");
    if (value.Is<Undefined>() || (also_false != nullptr && IsTrue(*also_false) && !IsTrue(value))) {
      return otherwise == nullptr ? MakeText("") : *otherwise;
    }
    return value;
  }
  if (name == "tojson") return FilterToJson(value, arguments);
  if (name == "join") return FilterJoin(value, arguments);
  if (name == "length" || name == "count") {
    CINNABAR_ASSIGN_OR_RETURN(const int64_t length, Length(value));
    return Value(length);
  }
  if (name == "safe") return value;
  if (name == "attr") {
    const Value* attribute = arguments.Find(0, "name");
    if (attribute == nullptr || attribute->text() == nullptr) return Wrong("attr takes a name");
    return Attribute(value, attribute->text()->bytes());
  }
  if (is_one_of({"trim", "upper", "lower", "capitalize", "title", "string", "replace", "indent"})) {
    return ApplyTextFilter(name, value, arguments);
  }
  if (is_one_of({"int", "float", "abs", "round"})) {
    return ApplyNumberFilter(name, value, arguments);
  }
  if (is_one_of({"select", "reject", "selectattr", "rejectattr"})) {
    return FilterSelect(name, value, arguments);
  }
  if (name == "map") return FilterMap(value, arguments);
  if (is_one_of({"sort", "min", "max", "unique"})) return FilterSort(name, value, arguments);
  if (is_one_of({"first", "last", "list", "items", "dictsort", "reverse", "sum"})) {
    return ApplyListFilter(name, value, arguments);
  }
  return Missing(absl::StrCat("filter ", name));
}

absl::StatusOr<Value> Evaluator::ApplyTextFilter(const std::string& name, const Value& value,
                                                 const Arguments& arguments) {
  CINNABAR_ASSIGN_OR_RETURN(const MarkedText text, ToText(value, &budget_));
  if (name == "string") return NewText(text);
  if (name == "trim") {
    const Value* chars = arguments.Find(0, "chars");
    const bool is_given = chars != nullptr && chars->text() != nullptr;
    return NewText(Strip(text, is_given ? &chars->text()->bytes() : nullptr, true, true));
  }
  if (name == "upper") return NewText(ToUpper(text));
  if (name == "lower") return NewText(ToLower(text));
  if (name == "capitalize") return NewText(Capitalize(text));
  if (name == "title") return NewText(Title(text, /*is_filter=*/true));
  if (name == "replace") {
    const Value* from = arguments.Find(0, "old");
    const Value* to = arguments.Find(1, "new");
    if (from == nullptr || from->text() == nullptr || to == nullptr || to->text() == nullptr) {
      return Wrong("replace takes two strings");
    }
    const Value* count = arguments.Find(2, "count");
    const int64_t count_max = count == nullptr ? -1 : count->Integer().value_or(-1);
    CINNABAR_RETURN_IF_ERROR(budget_.Bytes(text.size() / std::max<size_t>(1, from->text()->size()) *
                                           to->text()->size() / 8));
    return NewText(Replace(text, from->text()->bytes(), *to->text(), count_max));
  }
  // indent(width=4, first=false, blank=false)
  const Value* width = arguments.Find(0, "width");
  const Value* first = arguments.Find(1, "first");
  const Value* blank = arguments.Find(2, "blank");
  MarkedText margin(std::string(4, ' '));
  if (width != nullptr && width->text() != nullptr) {
    margin = *width->text();
  } else if (width != nullptr) {
    const int64_t size = width->Integer().value_or(-1);
    if (size < 0 || size > kIndentMax) return Wrong("indent: bad width");
    margin = MarkedText(std::string(static_cast<size_t>(size), ' '));
  }
  MarkedText out;
  bool is_first = true;
  for (const MarkedText& line : SplitAt(text, "\n", -1, false)) {
    CINNABAR_RETURN_IF_ERROR(budget_.Bytes(line.size() + margin.size() + 1));
    if (!is_first) out.Append("\n", false);
    const bool is_wanted = is_first ? first != nullptr && IsTrue(*first)
                                    : line.size() > 0 || (blank != nullptr && IsTrue(*blank));
    if (is_wanted) out.Append(margin);
    out.Append(line);
    is_first = false;
  }
  return MakeText(std::move(out));
}

absl::StatusOr<Value> Evaluator::ApplyNumberFilter(const std::string& name, const Value& value,
                                                   const Arguments& arguments) {
  if (name == "abs") {
    if (value.Integer().has_value() && *value.Integer() >= 0) return Value(*value.Integer());
    if (value.Integer().has_value()) return IntegerArithmetic("-", 0, *value.Integer());
    if (value.Number().has_value()) return Value(std::fabs(*value.Number()));
    return Wrong(absl::StrCat("abs of a ", value.TypeName()));
  }
  if (name == "round") {
    if (!value.Number().has_value()) return Wrong(absl::StrCat("round of a ", value.TypeName()));
    const Value* precision = arguments.Find(0, "precision");
    const int64_t places = precision == nullptr ? 0 : precision->Integer().value_or(0);
    if (arguments.Find(1, "method") != nullptr) return Missing("round with a method");
    if (places < 0 || places > 15) return Missing("round to that precision");
    const double scale = std::pow(10.0, static_cast<double>(places));
    return Value(std::nearbyint(*value.Number() * scale) / scale);
  }
  std::optional<double> number = value.Number();
  const Value* otherwise = arguments.Find(0, "default");
  if (const MarkedText* text = value.text()) {
    const MarkedText trimmed = Strip(*text, nullptr, true, true);
    const char* begin = trimmed.bytes().data();
    const char* end = begin + trimmed.size();
    int64_t integer = 0;
    const auto whole = std::from_chars(begin, end, integer);
    if (name == "int" && whole.ec == std::errc() && whole.ptr == end && begin != end) {
      return Value(integer);
    }
    double read = 0;
    const auto real = std::from_chars(begin, end, read);
    if (real.ec == std::errc() && real.ptr == end && begin != end) number = read;
  }
  if (!number.has_value()) {
    if (otherwise != nullptr) return *otherwise;
    if (name == "int") return Value(int64_t{0});
    return Value(0.0);
  }
  if (name == "float") return Value(*number);
  if (value.Integer().has_value()) return Value(*value.Integer());
  if (!(std::fabs(*number) < 9.2e18)) return Wrong("int: the number does not fit 64 bits");
  return Value(static_cast<int64_t>(*number));
}

absl::StatusOr<Value> Evaluator::FilterToJson(const Value& value, const Arguments& arguments) {
  if (!arguments.positional.empty()) return Missing("tojson with a positional argument");
  JsonStyle style;
  for (const auto& [name, given] : arguments.named) {
    if (name == "indent") {
      if (given.Is<None>()) continue;
      style.indent = given.Integer();
      if (!style.indent.has_value() || *style.indent < 0 || *style.indent > kIndentMax) {
        return Wrong("tojson: bad indent");
      }
      style.item_separator.assign(1, ',');
    } else if (name == "ensure_ascii") {
      style.ensure_ascii = IsTrue(given);
    } else if (name == "sort_keys") {
      style.sort_keys = IsTrue(given);
    } else if (name != "separators") {
      return Missing(absl::StrCat("tojson with ", name));
    }
  }
  const Value* separators = arguments.Find(SIZE_MAX, "separators");
  if (separators != nullptr && !separators->Is<None>()) {
    const ListValue* pair = separators->list();
    if (pair == nullptr || pair->items.size() != 2 || pair->items[0].text() == nullptr ||
        pair->items[1].text() == nullptr) {
      return Wrong("tojson: separators are not two strings");
    }
    style.item_separator = pair->items[0].text()->bytes();
    style.key_separator = pair->items[1].text()->bytes();
  }
  CINNABAR_ASSIGN_OR_RETURN(MarkedText json, ToJson(value, style, &budget_));
  return NewText(std::move(json));
}

absl::StatusOr<Value> Evaluator::FilterJoin(const Value& value, const Arguments& arguments) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Value> items, Items(value));
  MarkedText separator;
  if (const Value* given = arguments.Find(0, "d")) {
    CINNABAR_ASSIGN_OR_RETURN(separator, ToText(*given, &budget_));
  }
  const Value* attribute = arguments.Find(1, "attribute");
  MarkedText out;
  for (size_t i = 0; i < items.size(); ++i) {
    if (attribute != nullptr) {
      CINNABAR_ASSIGN_OR_RETURN(items[i], PathItem(items[i], *attribute));
    }
    CINNABAR_ASSIGN_OR_RETURN(const MarkedText text, ToText(items[i], &budget_));
    CINNABAR_RETURN_IF_ERROR(budget_.Bytes(text.size() + separator.size()));
    if (i > 0) out.Append(separator);
    out.Append(text);
  }
  return MakeText(std::move(out));
}

absl::StatusOr<Value> Evaluator::FilterSelect(const std::string& name, const Value& value,
                                              const Arguments& arguments) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Value> items, Items(value));
  const bool by_attribute = absl::EndsWith(name, "attr");
  const bool keeps = absl::StartsWith(name, "select");
  const size_t test_place = by_attribute ? 1 : 0;
  if (by_attribute && arguments.positional.empty()) {
    return Wrong(absl::StrCat(name, " takes an attribute"));
  }
  std::string test;
  Arguments test_arguments;
  if (arguments.positional.size() > test_place) {
    const MarkedText* text = arguments.positional[test_place].text();
    if (text == nullptr) return Wrong(absl::StrCat(name, ": the test is not a name"));
    test = text->bytes();
    test_arguments.positional.assign(
        arguments.positional.begin() + static_cast<ptrdiff_t>(test_place) + 1,
        arguments.positional.end());
  }
  std::vector<Value> kept;
  for (Value& item : items) {
    Value subject = item;
    if (by_attribute) {
      CINNABAR_ASSIGN_OR_RETURN(subject, PathItem(item, arguments.positional[0]));
    }
    bool holds = IsTrue(subject);
    if (!test.empty()) {
      CINNABAR_ASSIGN_OR_RETURN(holds, ApplyTest(test, subject, test_arguments));
    }
    if (holds == keeps) kept.push_back(std::move(item));
  }
  return NewList(std::move(kept));
}

absl::StatusOr<Value> Evaluator::FilterMap(const Value& value, const Arguments& arguments) {
  const DepthGuard guard(&depth_);
  if (depth_ > kEvalDepthMax) return absl::ResourceExhaustedError("nested too deeply");
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Value> items, Items(value));
  const Value* attribute = arguments.Find(SIZE_MAX, "attribute");
  const Value* otherwise = arguments.Find(SIZE_MAX, "default");
  if (attribute == nullptr &&
      (arguments.positional.empty() || arguments.positional[0].text() == nullptr)) {
    return Wrong("map takes a filter's name or attribute=");
  }
  Arguments filter_arguments;
  if (attribute == nullptr) {
    filter_arguments.positional.assign(arguments.positional.begin() + 1,
                                       arguments.positional.end());
    filter_arguments.named = arguments.named;
  }
  for (Value& item : items) {
    if (attribute != nullptr) {
      CINNABAR_ASSIGN_OR_RETURN(item, PathItem(item, *attribute));
      if (item.Is<Undefined>() && otherwise != nullptr) item = *otherwise;
    } else {
      CINNABAR_ASSIGN_OR_RETURN(
          item, ApplyFilter(arguments.positional[0].text()->bytes(), item, filter_arguments));
    }
  }
  return NewList(std::move(items));
}

// sort, min, max and unique: by an attribute, strings without regard to case unless asked.
absl::StatusOr<Value> Evaluator::FilterSort(const std::string& name, const Value& value,
                                            const Arguments& arguments) {
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Value> items, Items(value));
  const bool is_sort = name == "sort";
  const Value* reverse = is_sort ? arguments.Find(0, "reverse") : nullptr;
  const Value* with_case = arguments.Find(is_sort ? 1 : 0, "case_sensitive");
  const Value* attribute = arguments.Find(is_sort ? 2 : 1, "attribute");
  std::vector<std::pair<Value, size_t>> keys;
  for (size_t i = 0; i < items.size(); ++i) {
    Value key = items[i];
    if (attribute != nullptr) {
      CINNABAR_ASSIGN_OR_RETURN(key, PathItem(key, *attribute));
    }
    if (key.text() != nullptr && (with_case == nullptr || !IsTrue(*with_case))) {
      CINNABAR_ASSIGN_OR_RETURN(key, NewText(ToLower(*key.text())));
    }
    keys.emplace_back(std::move(key), i);
  }
  if (name == "unique") {
    std::vector<Value> kept;
    std::vector<const Value*> seen;
    for (const auto& [key, index] : keys) {
      bool is_new = true;
      for (const Value* other : seen) {
        CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(key, *other, &budget_));
        is_new = is_new && !same;
      }
      if (!is_new) continue;
      seen.push_back(&key);
      kept.push_back(items[index]);
    }
    return NewList(std::move(kept));
  }
  // A merge sort of our own: a comparison may fail, and std::sort must not be told nonsense then.
  const auto less = [&](size_t a, size_t b) {
    return IsLess(keys[a].first, keys[b].first, &budget_);
  };
  if (name == "min" || name == "max") {
    if (items.empty()) return MakeUndefined("the least of no items");
    size_t best = 0;
    for (size_t i = 1; i < items.size(); ++i) {
      CINNABAR_ASSIGN_OR_RETURN(const bool better, name == "min" ? less(i, best) : less(best, i));
      if (better) best = i;
    }
    return items[best];
  }
  const bool is_reversed = reverse != nullptr && IsTrue(*reverse);
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::vector<size_t> merged(order.size());
  for (size_t width = 1; width < order.size(); width *= 2) {
    for (size_t begin = 0; begin < order.size(); begin += 2 * width) {
      const size_t middle = std::min(begin + width, order.size());
      const size_t end = std::min(begin + 2 * width, order.size());
      size_t left = begin;
      size_t right = middle;
      for (size_t out = begin; out < end; ++out) {
        bool takes_right = left == middle;
        if (left < middle && right < end) {
          CINNABAR_ASSIGN_OR_RETURN(takes_right, is_reversed ? less(order[left], order[right])
                                                             : less(order[right], order[left]));
        }
        merged[out] = takes_right ? order[right++] : order[left++];
      }
    }
    std::swap(order, merged);
  }
  std::vector<Value> sorted;
  for (const size_t index : order) sorted.push_back(items[index]);
  return NewList(std::move(sorted));
}

absl::StatusOr<Value> Evaluator::ApplyListFilter(const std::string& name, const Value& value,
                                                 const Arguments& arguments) {
  if (name == "items") {
    if (value.Is<Undefined>()) return NewList({});
    if (value.dict() == nullptr) return Wrong("items takes a dict");
    return CallMethod(value, "items", {});
  }
  if (name == "dictsort") {
    if (value.dict() == nullptr) return Wrong("dictsort takes a dict");
    if (arguments.size() > 0) return Missing("dictsort with arguments");
    CINNABAR_ASSIGN_OR_RETURN(const Value pairs, CallMethod(value, "items", {}));
    Arguments by_key;
    by_key.named.emplace_back("attribute", Value(int64_t{0}));
    return FilterSort("sort", pairs, by_key);
  }
  CINNABAR_ASSIGN_OR_RETURN(std::vector<Value> items, Items(value));
  if (name == "list") return NewList(std::move(items));
  if (name == "first" || name == "last") {
    if (items.empty()) return MakeUndefined(absl::StrCat("the ", name, " of no items"));
    return name == "first" ? items.front() : items.back();
  }
  if (name == "reverse") {
    std::reverse(items.begin(), items.end());
    if (value.text() == nullptr) return NewList(std::move(items));
    MarkedText out;
    for (const Value& item : items) out.Append(*item.text());
    return NewText(std::move(out));
  }
  CINNABAR_CHECK(name == "sum") << name;
  const Value* attribute = arguments.Find(0, "attribute");
  const Value* start = arguments.Find(1, "start");
  Value total = start == nullptr ? Value(int64_t{0}) : *start;
  for (const Value& item : items) {
    Value part = item;
    if (attribute != nullptr && !attribute->Is<None>()) {
      CINNABAR_ASSIGN_OR_RETURN(part, PathItem(item, *attribute));
    }
    CINNABAR_ASSIGN_OR_RETURN(total, Arithmetic("+", total, part));
  }
  return total;
}

// ---- tests
// ----------------------------------------------------------------------------------------

absl::StatusOr<bool> Evaluator::ApplyTest(const std::string& name, const Value& value,
                                          const Arguments& arguments) {
  CINNABAR_RETURN_IF_ERROR(budget_.Step());
  if (name == "defined") return !value.Is<Undefined>();
  if (name == "undefined") return value.Is<Undefined>();
  if (name == "none") return value.Is<None>();
  if (name == "string") return value.text() != nullptr;
  if (name == "mapping") return value.dict() != nullptr;
  if (name == "sequence") {
    return value.list() != nullptr || value.text() != nullptr || value.dict() != nullptr ||
           value.Is<Undefined>();
  }
  if (name == "iterable") {
    return value.list() != nullptr || value.text() != nullptr || value.dict() != nullptr ||
           value.Is<Undefined>() || value.Is<LoopPtr>();
  }
  if (name == "number") return value.IsNumber();
  if (name == "integer") return value.Is<int64_t>();
  if (name == "float") return value.Is<double>();
  if (name == "boolean") return value.Is<bool>();
  if (name == "true") return value.Is<bool>() && IsTrue(value);
  if (name == "false") return value.Is<bool>() && !IsTrue(value);
  if (name == "callable") return value.Is<CallablePtr>();
  if (name == "lower" || name == "upper") {
    CINNABAR_ASSIGN_OR_RETURN(const MarkedText text, ToText(value, &budget_));
    bool has_case = false;
    for (size_t at = 0; at < text.size();) {
      const Utf8Char c = ReadUtf8(text.bytes(), at);
      at += c.num_bytes;
      const char32_t mapped = name == "lower" ? Lower(c.code_point) : Upper(c.code_point);
      if (mapped != c.code_point) return false;
      has_case = has_case || Lower(c.code_point) != Upper(c.code_point);
    }
    return has_case;
  }
  if (name == "odd" || name == "even") {
    if (!value.Integer().has_value()) return Wrong(absl::StrCat(name, " takes an integer"));
    return (*value.Integer() % 2 != 0) == (name == "odd");
  }
  const Value* other = arguments.Find(0, "other");
  static constexpr std::pair<absl::string_view, absl::string_view> kComparisons[] = {
      {"eq", "=="},         {"equalto", "=="}, {"==", "=="},      {"ne", "!="},
      {"!=", "!="},         {"lt", "<"},       {"lessthan", "<"}, {"<", "<"},
      {"le", "<="},         {"<=", "<="},      {"gt", ">"},       {">", ">"},
      {"greaterthan", ">"}, {"ge", ">="},      {">=", ">="},      {"in", "in"}};
  for (const auto& [test, op] : kComparisons) {
    if (name != test) continue;
    if (other == nullptr) return Wrong(absl::StrCat("test ", name, " takes a value"));
    return Compare(std::string(op), value, *other);
  }
  if (name == "sameas") {
    if (other == nullptr) return Wrong("test sameas takes a value");
    if (value.IsNumber() && std::string(value.TypeName()) != other->TypeName()) return false;
    return AreEqual(value, *other, &budget_);
  }
  if (name == "divisibleby") {
    if (other == nullptr || !other->Integer().has_value() || !value.Integer().has_value()) {
      return Wrong("test divisibleby takes integers");
    }
    CINNABAR_ASSIGN_OR_RETURN(const Value rest,
                              IntegerArithmetic("%", *value.Integer(), *other->Integer()));
    return *rest.Integer() == 0;
  }
  return Missing(absl::StrCat("test ", name));
}

}  // namespace

struct ChatTemplate::Tree {
  std::vector<chat::NodePtr> body;
};

absl::StatusOr<ChatTemplate> ChatTemplate::Parse(absl::string_view source) {
  auto tree = std::make_shared<Tree>();
  CINNABAR_ASSIGN_OR_RETURN(tree->body, chat::ParseTemplate(source));
  return ChatTemplate(std::move(tree));
}

absl::StatusOr<RenderedChat> ChatTemplate::Render(const ChatInput& input,
                                                  const ChatLimits& limits) const {
  Evaluator evaluator(input, limits);
  CINNABAR_RETURN_IF_ERROR(evaluator.DefineInput());
  return evaluator.Run(tree_->body);
}

}  // namespace cinnabar
