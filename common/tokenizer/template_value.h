// The values of chat templates: immutable, Python-like. Private to this folder.
#ifndef CINNABAR_COMMON_TOKENIZER_TEMPLATE_VALUE_H_
#define CINNABAR_COMMON_TOKENIZER_TEMPLATE_VALUE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"

namespace cinnabar::chat {

// A string that remembers which of its bytes came from the request ("input") and not from the
// template.
class MarkedText {
 public:
  MarkedText() = default;
  explicit MarkedText(std::string bytes, bool is_input = false);

  const std::string& bytes() const { return bytes_; }
  // Ascending, disjoint, not empty, never touching each other.
  const std::vector<TextRange>& input_ranges() const { return input_; }
  bool has_input() const { return !input_.empty(); }
  size_t size() const { return bytes_.size(); }

  void Append(const MarkedText& other);
  void Append(absl::string_view bytes, bool is_input);
  MarkedText Substring(size_t begin, size_t end) const;

 private:
  void AppendRange(size_t begin, size_t end);
  std::string bytes_;
  std::vector<TextRange> input_;
};

class Value;
struct ListValue;
struct DictValue;
struct NamespaceValue;
struct CallableValue;
struct LoopValue;

struct Undefined {
  std::shared_ptr<const std::string> what;  // for messages
};
struct None {};

using TextPtr = std::shared_ptr<const MarkedText>;
using ListPtr = std::shared_ptr<const ListValue>;
using DictPtr = std::shared_ptr<const DictValue>;
using CallablePtr = std::shared_ptr<const CallableValue>;
using LoopPtr = std::shared_ptr<LoopValue>;

class Value {
 public:
  // A namespace is borrowed from the render that made it: a namespace may hold itself.
  using Storage = std::variant<Undefined, None, bool, int64_t, double, TextPtr, ListPtr, DictPtr,
                               NamespaceValue*, CallablePtr, LoopPtr>;
  Value() = default;
  template <typename T>
  requires std::is_constructible_v<Storage, T&&> &&
      (!std::is_same_v<std::decay_t<T>, Value>)Value(T&& held)
      : held_(std::forward<T>(held)) {}  // NOLINT(google-explicit-constructor)

  template <typename T>
  const T* As() const {
    return std::get_if<T>(&held_);
  }
  template <typename T>
  bool Is() const {
    return std::holds_alternative<T>(held_);
  }
  const MarkedText* text() const {
    const TextPtr* held = As<TextPtr>();
    return held == nullptr ? nullptr : held->get();
  }
  const ListValue* list() const {
    const ListPtr* held = As<ListPtr>();
    return held == nullptr ? nullptr : held->get();
  }
  const DictValue* dict() const {
    const DictPtr* held = As<DictPtr>();
    return held == nullptr ? nullptr : held->get();
  }
  bool IsNumber() const { return Is<bool>() || Is<int64_t>() || Is<double>(); }
  // bool and int as an integer.
  std::optional<int64_t> Integer() const;
  std::optional<double> Number() const;
  // What Python calls the type, for messages.
  const char* TypeName() const;

 private:
  Storage held_;
};

struct ListValue {
  std::vector<Value> items;
  bool is_tuple = false;
  int depth = 1;
};

struct DictValue {
  std::vector<std::pair<TextPtr, Value>> entries;  // in order of insertion; keys differ
  int depth = 1;
  const Value* Find(absl::string_view key) const;
};

struct NamespaceValue {
  std::vector<std::pair<std::string, Value>> entries;
};

struct CallableValue {
  enum class Kind { kFunction, kMethod, kMacro };
  Kind kind = Kind::kFunction;
  std::string name;
  Value self;                   // kMethod
  const void* macro = nullptr;  // kMacro: its node, of the parsed template
};

struct LoopValue {
  std::vector<Value> items;
  size_t index = 0;
  int value_depth = 1;  // as ListValue::depth
};

// How deeply a value nests; 0 for one that holds no others.
int DepthOf(const Value& value);
inline constexpr int kValueDepthMax = 100;

// What one render may still spend. Each walk over values takes from it, so a small template cannot
// unfold a small value into a large one.
struct Budget {
  int64_t steps = 0;
  int64_t bytes = 0;
  absl::Status Step(int64_t count = 1);
  absl::Status Bytes(size_t count);
};

Value MakeText(std::string bytes, bool is_input = false);
Value MakeText(MarkedText text);
// InvalidArgument when the value would nest too deeply.
absl::StatusOr<Value> MakeList(std::vector<Value> items, bool is_tuple = false);
absl::StatusOr<Value> MakeDict(std::vector<std::pair<TextPtr, Value>> entries);
Value MakeUndefined(absl::string_view what);
// Strings and keys are marked as input when `is_input`.
absl::StatusOr<Value> FromJson(const nlohmann::ordered_json& json, bool is_input, int depth = 0);

bool IsTrue(const Value& value);
absl::StatusOr<bool> AreEqual(const Value& a, const Value& b, Budget* budget);
// Python's <; an error for what Python does not order.
absl::StatusOr<bool> IsLess(const Value& a, const Value& b, Budget* budget);

// str(value): what {{ value }} prints.
absl::StatusOr<MarkedText> ToText(const Value& value, Budget* budget);

struct JsonStyle {
  std::optional<int64_t> indent;
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
  bool ensure_ascii = false;
};
// json.dumps(value).
absl::StatusOr<MarkedText> ToJson(const Value& value, const JsonStyle& style, Budget* budget);

// repr(number) of Python: shortest digits that read back, exponent outside 1e-4 .. 1e16.
std::string FloatText(double number);

}  // namespace cinnabar::chat

#endif  // CINNABAR_COMMON_TOKENIZER_TEMPLATE_VALUE_H_
