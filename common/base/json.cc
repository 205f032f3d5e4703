#include "common/base/json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

// Passes events on while it watches the depth; what goes wrong is kept as a message.
class DepthGuard : public nlohmann::json_sax<json> {
 public:
  DepthGuard(nlohmann::json_sax<json>& next, int depth_max) : next_(next), depth_max_(depth_max) {}
  const std::string& error() const { return error_; }

  bool null() override { return next_.null(); }
  bool boolean(bool value) override { return next_.boolean(value); }
  bool number_integer(number_integer_t value) override { return next_.number_integer(value); }
  bool number_unsigned(number_unsigned_t value) override { return next_.number_unsigned(value); }
  bool number_float(number_float_t value, const string_t& text) override {
    if (!std::isfinite(value)) {
      error_ = "a number is too large";
      return false;
    }
    return next_.number_float(value, text);
  }
  bool string(string_t& value) override { return next_.string(value); }
  bool binary(binary_t& value) override { return next_.binary(value); }
  bool start_object(size_t size) override { return Enter() && next_.start_object(size); }
  bool key(string_t& value) override { return next_.key(value); }
  bool end_object() override { return Leave() && next_.end_object(); }
  bool start_array(size_t size) override { return Enter() && next_.start_array(size); }
  bool end_array() override { return Leave() && next_.end_array(); }
  bool parse_error(size_t position, const std::string& /*token*/,
                   const json::exception& error) override {
    // The library's own message quotes the input, which may be anything.
    constexpr int kNumberOverflow = 406;
    error_ = error.id == kNumberOverflow ? absl::StrCat("a number is too large at byte ", position)
                                         : absl::StrCat("not JSON at byte ", position);
    return false;
  }

 private:
  bool Enter() {
    if (++depth_ <= depth_max_) return true;
    error_ = absl::StrCat("nested deeper than ", depth_max_);
    return false;
  }
  bool Leave() {
    --depth_;
    return true;
  }

  nlohmann::json_sax<json>& next_;
  const int depth_max_;
  int depth_ = 0;
  std::string error_;
};

// Builds the tree, a json or an ordered_json. Recursion below is bounded by DepthGuard.
template <typename Tree>
class TreeBuilder : public nlohmann::json_sax<json> {
 public:
  Tree Take() { return std::move(root_); }
  const std::string& error() const { return error_; }

  bool null() override { return Add(Tree(nullptr)) != nullptr; }
  bool boolean(bool value) override { return Add(Tree(value)) != nullptr; }
  bool number_integer(number_integer_t value) override { return Add(Tree(value)) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return Add(Tree(value)) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override {
    return Add(Tree(value)) != nullptr;
  }
  bool string(string_t& value) override { return Add(Tree(std::move(value))) != nullptr; }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override {
    open_.push_back({Add(Tree::object()), {}});
    return true;
  }
  bool start_array(size_t) override {
    open_.push_back({Add(Tree::array()), {}});
    return true;
  }
  bool key(string_t& value) override {
    if (!IsNewKey(value)) {
      error_ = absl::StrCat("the key \"", value.substr(0, 100), "\" appears twice in one object");
      return false;
    }
    key_ = std::move(value);
    return true;
  }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool parse_error(size_t, const std::string&, const json::exception&) override { return false; }

 private:
  struct Open {
    Tree* value;
    // Keys of a large ordered object: asking it would take as long as it has keys.
    std::set<std::string> keys;
  };

  bool IsNewKey(const std::string& key) {
    if constexpr (std::is_same_v<Tree, ordered_json>) {
      constexpr size_t kFewKeys = 16;
      Open& open = open_.back();
      if (open.value->size() >= kFewKeys) {
        if (open.keys.empty()) {
          for (const auto& entry : open.value->items()) open.keys.insert(entry.key());
        }
        return open.keys.insert(key).second;
      }
    }
    return !open_.back().value->contains(key);
  }

  // Pointers to open containers stay valid: a container grows only while it is the innermost.
  Tree* Add(Tree value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Tree& parent = *open_.back().value;
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    if constexpr (std::is_same_v<Tree, ordered_json>) {
      // The key is known to be new: no need to look for it again.
      auto& entries = parent.template get_ref<typename Tree::object_t&>();
      static_cast<typename Tree::object_t::Container&>(entries).emplace_back(key_,
                                                                             std::move(value));
      return &entries.back().second;
    } else {
      return &(parent[key_] = std::move(value));
    }
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  Tree root_;
  std::vector<Open> open_;
  std::string key_;
  std::string error_;
};

absl::Status Visit(absl::string_view text, absl::string_view what,
                   nlohmann::json_sax<json>& visitor, int depth_max) {
  DepthGuard guard(visitor, depth_max);
  if (!json::sax_parse(text.begin(), text.end(), &guard) && !guard.error().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": ", guard.error()));
  }
  return absl::OkStatus();
}

template <typename Tree>
absl::StatusOr<Tree> Parse(absl::string_view text, absl::string_view what, int depth_max) {
  TreeBuilder<Tree> builder;
  CINNABAR_RETURN_IF_ERROR(Visit(text, what, builder, depth_max));
  if (!builder.error().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": ", builder.error()));
  }
  return builder.Take();
}

const json& EmptyObject() {
  static const json empty = json::object();
  return empty;
}

}  // namespace

absl::Status VisitJson(absl::string_view text, absl::string_view what,
                       nlohmann::json_sax<json>& visitor) {
  return Visit(text, what, visitor, kJsonDepthMax);
}

absl::StatusOr<json> ParseJson(absl::string_view text, absl::string_view what) {
  return Parse<json>(text, what, kJsonDepthMax);
}

absl::StatusOr<ordered_json> ParseOrderedJson(absl::string_view text, absl::string_view what,
                                              int depth_max) {
  return Parse<ordered_json>(text, what, std::min(depth_max, kJsonDepthMax));
}

absl::StatusOr<json> ReadJsonFile(const std::string& path, size_t bytes_max) {
  CINNABAR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, bytes_max));
  return ParseJson(text, path);
}

JsonFields::JsonFields(const json& object, std::string where)
    : object_(&object), where_(std::move(where)) {
  if (!object.is_object()) {
    object_ = &EmptyObject();
    status_ = absl::InvalidArgumentError(absl::StrCat(where_, ": not an object"));
  }
}

void JsonFields::Fail(absl::StatusCode code, absl::string_view key, absl::string_view message) {
  if (!status_.ok()) return;
  status_ = absl::Status(code, absl::StrCat(where_, ": ", key, ": ", message));
}

const json* JsonFields::Find(absl::string_view key) const {
  const auto found = object_->find(std::string(key));
  return found == object_->end() || found->is_null() ? nullptr : &*found;
}

bool JsonFields::Has(absl::string_view key) const { return Find(key) != nullptr; }

int64_t JsonFields::ReadInt(const json& value, absl::string_view key, int64_t least, int64_t most,
                            int64_t fallback) {
  int64_t number = 0;
  if (value.is_number_unsigned()) {
    const uint64_t wide = value.get<uint64_t>();
    number = wide > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())
                 ? std::numeric_limits<int64_t>::max()
                 : static_cast<int64_t>(wide);
  } else if (value.is_number_integer()) {
    number = value.get<int64_t>();
  } else {
    Fail(absl::StatusCode::kInvalidArgument, key, "not an integer");
    return fallback;
  }
  if (number < least || number > most) {
    Fail(absl::StatusCode::kInvalidArgument, key,
         absl::StrCat(number, " is not in [", least, ", ", most, "]"));
    return fallback;
  }
  return number;
}

int64_t JsonFields::Int(absl::string_view key, int64_t least, int64_t most) {
  const json* value = Find(key);
  if (value == nullptr) {
    Fail(absl::StatusCode::kInvalidArgument, key, "missing");
    return least;
  }
  return ReadInt(*value, key, least, most, least);
}

int64_t JsonFields::Int(absl::string_view key, int64_t least, int64_t most, int64_t fallback) {
  const json* value = Find(key);
  return value == nullptr ? fallback : ReadInt(*value, key, least, most, fallback);
}

double JsonFields::Number(absl::string_view key, double least, double most) {
  if (!Has(key)) Fail(absl::StatusCode::kInvalidArgument, key, "missing");
  return Number(key, least, most, least);
}

double JsonFields::Number(absl::string_view key, double least, double most, double fallback) {
  const json* value = Find(key);
  if (value == nullptr) return fallback;
  if (!value->is_number()) {
    Fail(absl::StatusCode::kInvalidArgument, key, "not a number");
    return fallback;
  }
  const double number = value->get<double>();
  if (!(number >= least && number <= most)) {
    Fail(absl::StatusCode::kInvalidArgument, key,
         absl::StrCat(number, " is not in [", least, ", ", most, "]"));
    return fallback;
  }
  return number;
}

bool JsonFields::Bool(absl::string_view key) {
  if (!Has(key)) Fail(absl::StatusCode::kInvalidArgument, key, "missing");
  return Bool(key, false);
}

bool JsonFields::Bool(absl::string_view key, bool fallback) {
  const json* value = Find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) {
    Fail(absl::StatusCode::kInvalidArgument, key, "not true or false");
    return fallback;
  }
  return value->get<bool>();
}

std::string JsonFields::String(absl::string_view key) {
  if (!Has(key)) Fail(absl::StatusCode::kInvalidArgument, key, "missing");
  return String(key, "");
}

std::string JsonFields::String(absl::string_view key, absl::string_view fallback) {
  const json* value = Find(key);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) {
    Fail(absl::StatusCode::kInvalidArgument, key, "not a string");
    return std::string(fallback);
  }
  return value->get<std::string>();
}

JsonFields JsonFields::Object(absl::string_view key) {
  const json* value = Find(key);
  const std::string where = absl::StrCat(where_, ": ", key);
  if (value == nullptr) Fail(absl::StatusCode::kInvalidArgument, key, "missing");
  if (value != nullptr && !value->is_object()) {
    Fail(absl::StatusCode::kInvalidArgument, key, "not an object");
  }
  return JsonFields(value != nullptr && value->is_object() ? *value : EmptyObject(), where);
}

std::vector<int64_t> JsonFields::Ints(absl::string_view key, int64_t least, int64_t most) {
  const json* value = Find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) return {ReadInt(*value, key, least, most, least)};
  std::vector<int64_t> numbers;
  for (const json& entry : *value) numbers.push_back(ReadInt(entry, key, least, most, least));
  return numbers;
}

std::vector<std::string> JsonFields::Strings(absl::string_view key) {
  const json* value = Find(key);
  if (value == nullptr) return {};
  std::vector<std::string> strings;
  const json single = value->is_array() ? json() : json::array({*value});
  for (const json& entry : value->is_array() ? *value : single) {
    if (entry.is_string()) {
      strings.push_back(entry.get<std::string>());
    } else {
      Fail(absl::StatusCode::kInvalidArgument, key, "not a string");
    }
  }
  return strings;
}

}  // namespace cinnabar
