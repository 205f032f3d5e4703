#include "common/tokenizer/template_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/status.h"
#include "common/tokenizer/utf8.h"

namespace cinnabar::chat {
namespace {

absl::Status TooDeep() {
  return absl::InvalidArgumentError(
      absl::StrCat("a value nests more than ", kValueDepthMax, " levels deep"));
}

// Python's repr of a string, all of it marked when any of it is input.
void AppendTextRepr(const MarkedText& text, MarkedText* out) {
  const std::string& bytes = text.bytes();
  const bool has_single = bytes.find('\'') != std::string::npos;
  const bool has_double = bytes.find('"') != std::string::npos;
  const char quote = has_single && !has_double ? '"' : '\'';
  std::string repr(1, quote);
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Char c = ReadUtf8(bytes, at);
    const absl::string_view raw = absl::string_view(bytes).substr(at, c.num_bytes);
    at += c.num_bytes;
    if (c.code_point == static_cast<char32_t>(quote) || c.code_point == '\\') {
      absl::StrAppend(&repr, "\\", raw);
    } else if (c.code_point == '\n') {
      repr += "\\n";
    } else if (c.code_point == '\r') {
      repr += "\\r";
    } else if (c.code_point == '\t') {
      repr += "\\t";
    } else if (c.code_point < 0x20 || (c.code_point >= 0x7F && c.code_point <= 0xA0) ||
               c.code_point == 0xAD) {
      absl::StrAppendFormat(&repr, "\\x%02x", static_cast<unsigned>(c.code_point));
    } else {
      absl::StrAppend(&repr, raw);
    }
  }
  repr += quote;
  out->Append(repr, text.has_input());
}

absl::Status AppendRepr(const Value& value, Budget* budget, MarkedText* out) {
  CINNABAR_RETURN_IF_ERROR(budget->Step());
  const size_t size_before = out->size();
  if (const MarkedText* text = value.text()) {
    AppendTextRepr(*text, out);
  } else if (const ListValue* list = value.list()) {
    out->Append(list->is_tuple ? "(" : "[", false);
    for (size_t i = 0; i < list->items.size(); ++i) {
      if (i > 0) out->Append(", ", false);
      CINNABAR_RETURN_IF_ERROR(AppendRepr(list->items[i], budget, out));
    }
    out->Append(!list->is_tuple ? "]" : list->items.size() == 1 ? ",)" : ")", false);
    return absl::OkStatus();
  } else if (const DictValue* dict = value.dict()) {
    out->Append("{", false);
    for (size_t i = 0; i < dict->entries.size(); ++i) {
      if (i > 0) out->Append(", ", false);
      AppendTextRepr(*dict->entries[i].first, out);
      out->Append(": ", false);
      CINNABAR_RETURN_IF_ERROR(AppendRepr(dict->entries[i].second, budget, out));
    }
    out->Append("}", false);
    return absl::OkStatus();
  } else if (value.Is<Undefined>()) {
    out->Append("Undefined", false);
  } else {
    CINNABAR_ASSIGN_OR_RETURN(const MarkedText text, ToText(value, budget));
    out->Append(text);
  }
  return budget->Bytes(out->size() - size_before);
}

void AppendJsonString(const MarkedText& text, bool ensure_ascii, MarkedText* out) {
  std::string json = "\"";
  const std::string& bytes = text.bytes();
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Char c = ReadUtf8(bytes, at);
    const absl::string_view raw = absl::string_view(bytes).substr(at, c.num_bytes);
    at += c.num_bytes;
    switch (c.code_point) {
      case '"':
        json += "\\\"";
        continue;
      case '\\':
        json += "\\\\";
        continue;
      case '\n':
        json += "\\n";
        continue;
      case '\r':
        json += "\\r";
        continue;
      case '\t':
        json += "\\t";
        continue;
      case '\f':
        json += "\\f";
        continue;
      case '\b':
        json += "\\b";
        continue;
      default:
        break;
    }
    const auto point = static_cast<unsigned>(c.code_point);
    if (point < 0x20 || (ensure_ascii && point >= 0x7F && point < 0x10000 && point != 0x7F)) {
      absl::StrAppendFormat(&json, "\\u%04x", point);
    } else if (ensure_ascii && point >= 0x10000) {
      absl::StrAppendFormat(&json, "\\u%04x\\u%04x", 0xD800 + ((point - 0x10000) >> 10),
                            0xDC00 + ((point - 0x10000) & 0x3FF));
    } else {
      absl::StrAppend(&json, raw);
    }
  }
  json += '"';
  out->Append(json, text.has_input());
}

absl::Status AppendJson(const Value& value, const JsonStyle& style, int level, Budget* budget,
                        MarkedText* out) {
  CINNABAR_RETURN_IF_ERROR(budget->Step());
  const size_t size_before = out->size();
  const auto new_line = [&](int at_level) {
    if (!style.indent.has_value()) return;
    out->Append("\n", false);
    out->Append(std::string(static_cast<size_t>(*style.indent * at_level), ' '), false);
  };
  if (const MarkedText* text = value.text()) {
    AppendJsonString(*text, style.ensure_ascii, out);
  } else if (const ListValue* list = value.list()) {
    out->Append("[", false);
    for (size_t i = 0; i < list->items.size(); ++i) {
      if (i > 0) out->Append(style.item_separator, false);
      new_line(level + 1);
      CINNABAR_RETURN_IF_ERROR(AppendJson(list->items[i], style, level + 1, budget, out));
    }
    if (!list->items.empty()) new_line(level);
    out->Append("]", false);
    return budget->Bytes(2);
  } else if (const DictValue* dict = value.dict()) {
    std::vector<const std::pair<TextPtr, Value>*> entries;
    for (const auto& entry : dict->entries) entries.push_back(&entry);
    if (style.sort_keys) {
      std::sort(entries.begin(), entries.end(),
                [](const auto* a, const auto* b) { return a->first->bytes() < b->first->bytes(); });
    }
    out->Append("{", false);
    for (size_t i = 0; i < entries.size(); ++i) {
      if (i > 0) out->Append(style.item_separator, false);
      new_line(level + 1);
      AppendJsonString(*entries[i]->first, style.ensure_ascii, out);
      out->Append(style.key_separator, false);
      CINNABAR_RETURN_IF_ERROR(AppendJson(entries[i]->second, style, level + 1, budget, out));
    }
    if (!entries.empty()) new_line(level);
    out->Append("}", false);
    return budget->Bytes(2);
  } else if (value.Is<None>()) {
    out->Append("null", false);
  } else if (const bool* boolean = value.As<bool>()) {
    out->Append(*boolean ? "true" : "false", false);
  } else if (const int64_t* integer = value.As<int64_t>()) {
    out->Append(absl::StrCat(*integer), false);
  } else if (const double* number = value.As<double>()) {
    out->Append(std::isnan(*number)   ? "NaN"
                : std::isinf(*number) ? (*number > 0 ? "Infinity" : "-Infinity")
                                      : FloatText(*number),
                false);
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("tojson: ", value.TypeName(), " has no JSON form"));
  }
  return budget->Bytes(out->size() - size_before);
}

}  // namespace

// ---- MarkedText
// -----------------------------------------------------------------------------------

MarkedText::MarkedText(std::string bytes, bool is_input) : bytes_(std::move(bytes)) {
  if (is_input) AppendRange(0, bytes_.size());
}

void MarkedText::AppendRange(size_t begin, size_t end) {
  if (begin == end) return;
  if (!input_.empty() && input_.back().end == begin) {
    input_.back().end = end;
  } else {
    input_.push_back({begin, end});
  }
}

void MarkedText::Append(const MarkedText& other) {
  const size_t offset = bytes_.size();
  bytes_ += other.bytes_;
  for (const TextRange& range : other.input_) AppendRange(offset + range.begin, offset + range.end);
}

void MarkedText::Append(absl::string_view bytes, bool is_input) {
  const size_t offset = bytes_.size();
  bytes_.append(bytes.data(), bytes.size());
  if (is_input) AppendRange(offset, bytes_.size());
}

MarkedText MarkedText::Substring(size_t begin, size_t end) const {
  MarkedText part;
  if (begin >= end) return part;
  part.bytes_ = bytes_.substr(begin, end - begin);
  for (const TextRange& range : input_) {
    const size_t from = std::max(range.begin, begin);
    const size_t to = std::min(range.end, end);
    if (from < to) part.AppendRange(from - begin, to - begin);
  }
  return part;
}

// ---- Value
// ----------------------------------------------------------------------------------------

std::optional<int64_t> Value::Integer() const {
  if (const bool* boolean = As<bool>()) return *boolean ? 1 : 0;
  if (const int64_t* integer = As<int64_t>()) return *integer;
  return std::nullopt;
}

std::optional<double> Value::Number() const {
  if (const double* number = As<double>()) return *number;
  if (const std::optional<int64_t> integer = Integer()) return static_cast<double>(*integer);
  return std::nullopt;
}

const char* Value::TypeName() const {
  if (Is<Undefined>()) return "undefined";
  if (Is<None>()) return "none";
  if (Is<bool>()) return "bool";
  if (Is<int64_t>()) return "int";
  if (Is<double>()) return "float";
  if (Is<TextPtr>()) return "string";
  if (Is<ListPtr>()) return list()->is_tuple ? "tuple" : "list";
  if (Is<DictPtr>()) return "dict";
  if (Is<NamespaceValue*>()) return "namespace";
  if (Is<LoopPtr>()) return "loop";
  return "function";
}

const Value* DictValue::Find(absl::string_view key) const {
  for (const auto& [name, value] : entries) {
    if (name->bytes() == key) return &value;
  }
  return nullptr;
}

absl::Status Budget::Step(int64_t count) {
  steps -= count;
  if (steps < 0) return absl::ResourceExhaustedError("too many evaluation steps");
  return absl::OkStatus();
}

absl::Status Budget::Bytes(size_t count) {
  bytes -= static_cast<int64_t>(count);
  if (bytes < 0) return absl::ResourceExhaustedError("too much text");
  return absl::OkStatus();
}

// Deep values would overflow the stack where they are walked or destroyed.
int DepthOf(const Value& value) {
  if (const ListValue* list = value.list()) return list->depth;
  if (const DictValue* dict = value.dict()) return dict->depth;
  if (const LoopPtr* loop = value.As<LoopPtr>()) return (*loop)->value_depth;
  if (const CallablePtr* callable = value.As<CallablePtr>()) return DepthOf((*callable)->self);
  return 0;
}

Value MakeText(std::string bytes, bool is_input) {
  return Value(TextPtr(std::make_shared<const MarkedText>(std::move(bytes), is_input)));
}

Value MakeText(MarkedText text) {
  return Value(TextPtr(std::make_shared<const MarkedText>(std::move(text))));
}

absl::StatusOr<Value> MakeList(std::vector<Value> items, bool is_tuple) {
  auto list = std::make_shared<ListValue>();
  for (const Value& item : items) list->depth = std::max(list->depth, 1 + DepthOf(item));
  if (list->depth > kValueDepthMax) return TooDeep();
  list->items = std::move(items);
  list->is_tuple = is_tuple;
  return Value(ListPtr(std::move(list)));
}

absl::StatusOr<Value> MakeDict(std::vector<std::pair<TextPtr, Value>> entries) {
  auto dict = std::make_shared<DictValue>();
  for (const auto& entry : entries) dict->depth = std::max(dict->depth, 1 + DepthOf(entry.second));
  if (dict->depth > kValueDepthMax) return TooDeep();
  dict->entries = std::move(entries);
  return Value(DictPtr(std::move(dict)));
}

Value MakeUndefined(absl::string_view what) {
  return Value(Undefined{std::make_shared<const std::string>(what)});
}

absl::StatusOr<Value> FromJson(const nlohmann::ordered_json& json, bool is_input, int depth) {
  if (depth > kValueDepthMax) return TooDeep();
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::null:
      return Value(None{});
    case nlohmann::ordered_json::value_t::boolean:
      return Value(json.get<bool>());
    case nlohmann::ordered_json::value_t::number_integer:
      return Value(json.get<int64_t>());
    case nlohmann::ordered_json::value_t::number_unsigned: {
      const auto number = json.get<uint64_t>();
      if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Value(static_cast<double>(number));
      }
      return Value(static_cast<int64_t>(number));
    }
    case nlohmann::ordered_json::value_t::number_float:
      return Value(json.get<double>());
    case nlohmann::ordered_json::value_t::string:
      return MakeText(json.get<std::string>(), is_input);
    case nlohmann::ordered_json::value_t::array: {
      std::vector<Value> items;
      for (const auto& item : json) {
        CINNABAR_ASSIGN_OR_RETURN(Value value, FromJson(item, is_input, depth + 1));
        items.push_back(std::move(value));
      }
      return MakeList(std::move(items));
    }
    case nlohmann::ordered_json::value_t::object: {
      std::vector<std::pair<TextPtr, Value>> entries;
      for (auto entry = json.begin(); entry != json.end(); ++entry) {
        CINNABAR_ASSIGN_OR_RETURN(Value value, FromJson(entry.value(), is_input, depth + 1));
        entries.emplace_back(std::make_shared<const MarkedText>(entry.key(), is_input),
                             std::move(value));
      }
      return MakeDict(std::move(entries));
    }
    case nlohmann::ordered_json::value_t::binary:
    case nlohmann::ordered_json::value_t::discarded:
      break;
  }
  return absl::InvalidArgumentError("a template variable is not plain JSON");
}

bool IsTrue(const Value& value) {
  if (const bool* boolean = value.As<bool>()) return *boolean;
  if (const int64_t* integer = value.As<int64_t>()) return *integer != 0;
  if (const double* number = value.As<double>()) return *number != 0;
  if (const MarkedText* text = value.text()) return text->size() > 0;
  if (const ListValue* list = value.list()) return !list->items.empty();
  if (const DictValue* dict = value.dict()) return !dict->entries.empty();
  return !value.Is<Undefined>() && !value.Is<None>();
}

absl::StatusOr<bool> AreEqual(const Value& a, const Value& b, Budget* budget) {
  CINNABAR_RETURN_IF_ERROR(budget->Step());
  if (a.IsNumber() && b.IsNumber()) {
    if (a.Integer().has_value() && b.Integer().has_value()) return *a.Integer() == *b.Integer();
    return *a.Number() == *b.Number();
  }
  if (a.text() != nullptr && b.text() != nullptr) {
    if (a.text()->size() != b.text()->size()) return false;
    CINNABAR_RETURN_IF_ERROR(budget->Step(static_cast<int64_t>(a.text()->size() / 64)));
    return a.text()->bytes() == b.text()->bytes();
  }
  if (a.list() != nullptr && b.list() != nullptr) {
    const ListValue& left = *a.list();
    const ListValue& right = *b.list();
    if (left.is_tuple != right.is_tuple || left.items.size() != right.items.size()) return false;
    for (size_t i = 0; i < left.items.size(); ++i) {
      CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(left.items[i], right.items[i], budget));
      if (!same) return false;
    }
    return true;
  }
  if (a.dict() != nullptr && b.dict() != nullptr) {
    if (a.dict()->entries.size() != b.dict()->entries.size()) return false;
    for (const auto& [key, value] : a.dict()->entries) {
      CINNABAR_RETURN_IF_ERROR(budget->Step(static_cast<int64_t>(b.dict()->entries.size())));
      const Value* other = b.dict()->Find(key->bytes());
      if (other == nullptr) return false;
      CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(value, *other, budget));
      if (!same) return false;
    }
    return true;
  }
  if (a.Is<Undefined>() && b.Is<Undefined>()) return true;
  if (a.Is<None>() && b.Is<None>()) return true;
  const auto* left = a.As<NamespaceValue*>();
  const auto* right = b.As<NamespaceValue*>();
  return left != nullptr && right != nullptr && *left == *right;
}

absl::StatusOr<bool> IsLess(const Value& a, const Value& b, Budget* budget) {
  CINNABAR_RETURN_IF_ERROR(budget->Step());
  if (a.IsNumber() && b.IsNumber()) {
    if (a.Integer().has_value() && b.Integer().has_value()) return *a.Integer() < *b.Integer();
    return *a.Number() < *b.Number();
  }
  // UTF-8 keeps the order of code points.
  if (a.text() != nullptr && b.text() != nullptr) return a.text()->bytes() < b.text()->bytes();
  if (a.list() != nullptr && b.list() != nullptr && a.list()->is_tuple == b.list()->is_tuple) {
    const auto& left = a.list()->items;
    const auto& right = b.list()->items;
    for (size_t i = 0; i < std::min(left.size(), right.size()); ++i) {
      CINNABAR_ASSIGN_OR_RETURN(const bool same, AreEqual(left[i], right[i], budget));
      if (!same) return IsLess(left[i], right[i], budget);
    }
    return left.size() < right.size();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("cannot order ", a.TypeName(), " and ", b.TypeName()));
}

absl::StatusOr<MarkedText> ToText(const Value& value, Budget* budget) {
  if (const MarkedText* text = value.text()) return *text;
  if (value.Is<Undefined>()) return MarkedText();
  if (value.Is<None>()) return MarkedText("None");
  if (const bool* boolean = value.As<bool>()) return MarkedText(*boolean ? "True" : "False");
  if (const int64_t* integer = value.As<int64_t>()) return MarkedText(absl::StrCat(*integer));
  if (const double* number = value.As<double>()) return MarkedText(FloatText(*number));
  if (value.list() != nullptr || value.dict() != nullptr) {
    MarkedText out;
    CINNABAR_RETURN_IF_ERROR(AppendRepr(value, budget, &out));
    return out;
  }
  return absl::InvalidArgumentError(absl::StrCat("a ", value.TypeName(), " cannot be printed"));
}

absl::StatusOr<MarkedText> ToJson(const Value& value, const JsonStyle& style, Budget* budget) {
  MarkedText out;
  CINNABAR_RETURN_IF_ERROR(AppendJson(value, style, 0, budget, &out));
  return out;
}

std::string FloatText(double number) {
  if (std::isnan(number)) return "nan";
  if (std::isinf(number)) return number > 0 ? "inf" : "-inf";
  char digits[64];
  const double size = std::fabs(number);
  const bool is_plain = number == 0 || (size >= 1e-4 && size < 1e16);
  const auto format = is_plain ? std::chars_format::fixed : std::chars_format::scientific;
  const std::to_chars_result end = std::to_chars(digits, digits + sizeof(digits), number, format);
  std::string text(digits, end.ptr);
  if (is_plain && text.find('.') == std::string::npos) text += ".0";
  return text;
}

}  // namespace cinnabar::chat
