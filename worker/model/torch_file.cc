#include "worker/model/torch_file.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace cinnabar {
namespace {

constexpr size_t kPickleBytesMax = size_t{256} << 20;
constexpr size_t kNameBytesMax = 1024;

std::string Shorten(absl::string_view text) {
  return text.size() <= 100 ? std::string(text) : absl::StrCat(text.substr(0, 100), "...");
}

template <typename Word>
Word LoadWord(absl::string_view bytes, size_t at) {
  Word word;
  std::memcpy(&word, bytes.data() + at, sizeof(word));
  return word;
}

// --- The archive
// -------------------------------------------------------------------------------------------

struct ZipEntry {
  uint64_t begin_byte = 0;  // of its data, in the file
  uint64_t bytes = 0;
};

class ZipReader {
 public:
  ZipReader(absl::string_view file, absl::string_view what) : file_(file), what_(what) {}

  absl::StatusOr<absl::flat_hash_map<std::string, ZipEntry>> Read() {
    CINNABAR_RETURN_IF_ERROR(FindDirectory());
    absl::flat_hash_map<std::string, ZipEntry> entries;
    uint64_t at = directory_;
    for (uint64_t i = 0; i < num_entries_; ++i) {
      constexpr uint64_t kHead = 46;
      if (!Fits(at, kHead) || LoadWord<uint32_t>(file_, at) != 0x02014B50U) {
        return Broken("its directory is cut");
      }
      const uint64_t name_bytes = LoadWord<uint16_t>(file_, at + 28);
      const uint64_t extra_bytes = LoadWord<uint16_t>(file_, at + 30);
      const uint64_t comment_bytes = LoadWord<uint16_t>(file_, at + 32);
      if (!Fits(at + kHead, name_bytes + extra_bytes + comment_bytes)) {
        return Broken("its directory is cut");
      }
      const std::string name(file_.substr(at + kHead, name_bytes));
      CINNABAR_ASSIGN_OR_RETURN(
          const ZipEntry entry,
          ReadEntry(name, at, file_.substr(at + kHead + name_bytes, extra_bytes)));
      if (!entries.emplace(name, entry).second) {
        return Broken(absl::StrCat("entry ", Shorten(name), " appears twice"));
      }
      at += kHead + name_bytes + extra_bytes + comment_bytes;
    }
    return entries;
  }

 private:
  absl::Status Broken(absl::string_view problem) const {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": zip archive: ", problem));
  }
  bool Fits(uint64_t at, uint64_t bytes) const {
    return at <= file_.size() && bytes <= file_.size() - at;
  }

  // The end record is the last thing in the file but for a comment of at most 64 KiB.
  absl::Status FindDirectory() {
    constexpr uint64_t kEnd = 22;
    if (file_.size() < kEnd) return Broken("shorter than its end record");
    const uint64_t least = file_.size() - std::min<uint64_t>(file_.size(), kEnd + 0xFFFF);
    uint64_t at = file_.size() - kEnd;
    while (LoadWord<uint32_t>(file_, at) != 0x06054B50U) {
      if (at == least) return Broken("has no end record");
      --at;
    }
    num_entries_ = LoadWord<uint16_t>(file_, at + 10);
    directory_ = LoadWord<uint32_t>(file_, at + 16);
    // Where numbers do not fit, a wider record lies before.
    if (at >= 20 && LoadWord<uint32_t>(file_, at - 20) == 0x07064B50U) {
      const uint64_t wide = LoadWord<uint64_t>(file_, at - 20 + 8);
      if (!Fits(wide, 56) || LoadWord<uint32_t>(file_, wide) != 0x06064B50U) {
        return Broken("has no wide end record");
      }
      num_entries_ = LoadWord<uint64_t>(file_, wide + 32);
      directory_ = LoadWord<uint64_t>(file_, wide + 48);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<ZipEntry> ReadEntry(const std::string& name, uint64_t at,
                                     absl::string_view extra) const {
    if ((LoadWord<uint16_t>(file_, at + 8) & 1U) != 0 || LoadWord<uint16_t>(file_, at + 10) != 0) {
      return absl::UnimplementedError(
          absl::StrCat(what_, ": zip archive: entry ", Shorten(name),
                       " is compressed or encrypted; torch.save stores entries as they are"));
    }
    uint64_t stored = LoadWord<uint32_t>(file_, at + 20),
             bytes = LoadWord<uint32_t>(file_, at + 24);
    uint64_t local = LoadWord<uint32_t>(file_, at + 42);
    CINNABAR_RETURN_IF_ERROR(ReadWide(name, extra, {&bytes, &stored, &local}));
    constexpr uint64_t kLocalHead = 30;
    if (stored != bytes || !Fits(local, kLocalHead) ||
        LoadWord<uint32_t>(file_, local) != 0x04034B50U) {
      return Broken(absl::StrCat("entry ", Shorten(name), " is not where its directory says"));
    }
    const uint64_t begin = local + kLocalHead + LoadWord<uint16_t>(file_, local + 26) +
                           LoadWord<uint16_t>(file_, local + 28);
    if (!Fits(begin, bytes)) {
      return Broken(absl::StrCat("entry ", Shorten(name), " ends beyond the file"));
    }
    return ZipEntry{.begin_byte = begin, .bytes = bytes};
  }

  // Replaces those of the numbers, in their order, that are all ones.
  absl::Status ReadWide(const std::string& name, absl::string_view extra,
                        std::initializer_list<uint64_t*> numbers) const {
    absl::string_view wide;
    while (extra.size() >= 4) {
      const uint64_t bytes = LoadWord<uint16_t>(extra, 2);
      if (bytes > extra.size() - 4) break;
      if (LoadWord<uint16_t>(extra, 0) == 1) wide = extra.substr(4, bytes);
      extra.remove_prefix(4 + bytes);
    }
    for (uint64_t* number : numbers) {
      if (*number != 0xFFFFFFFFU) continue;
      if (wide.size() < 8) {
        return Broken(absl::StrCat("entry ", Shorten(name), " lacks its wide numbers"));
      }
      *number = LoadWord<uint64_t>(wide, 0);
      wide.remove_prefix(8);
    }
    return absl::OkStatus();
  }

  absl::string_view file_;
  std::string what_;
  uint64_t num_entries_ = 0;
  uint64_t directory_ = 0;
};

// --- The pickle
// --------------------------------------------------------------------------------------------

struct StorageType {
  absl::string_view global;
  absl::string_view dtype;  // as safetensors writes it
  int64_t bytes;
};
constexpr StorageType kStorageTypes[] = {
    {"torch FloatStorage", "F32", 4},     {"torch HalfStorage", "F16", 2},
    {"torch BFloat16Storage", "BF16", 2}, {"torch DoubleStorage", "F64", 8},
    {"torch LongStorage", "I64", 8},      {"torch IntStorage", "I32", 4},
    {"torch ShortStorage", "I16", 2},     {"torch CharStorage", "I8", 1},
    {"torch ByteStorage", "U8", 1},       {"torch BoolStorage", "BOOL", 1}};

// The globals that are known; nothing else can be named.
constexpr absl::string_view kRebuildTensor = "torch._utils _rebuild_tensor_v2";
constexpr absl::string_view kRebuildParameter = "torch._utils _rebuild_parameter";
constexpr absl::string_view kOrderedDict = "collections OrderedDict";

const StorageType* FindStorageType(absl::string_view global) {
  const auto* found = std::find_if(std::begin(kStorageTypes), std::end(kStorageTypes),
                                   [&](const StorageType& t) { return t.global == global; });
  return found == std::end(kStorageTypes) ? nullptr : found;
}

enum class Kind : uint8_t {
  kOther,  // None, a float, bytes: nothing looks at it
  kInt,    // and bools
  kText,
  kTuple,
  kList,
  kDict,     // items: key, value, key, value, ...
  kGlobal,   // text: "module name"
  kStorage,  // text: key, type, number: elements
  kTensor,   // items: storage, shape tuple, stride tuple; number: offset in elements
};

struct Value {
  Kind kind = Kind::kOther;
  int64_t number = 0;
  absl::string_view text;
  const StorageType* type = nullptr;
  std::vector<uint32_t> items;
};

// Runs a pickle to its one result. Values are numbered; containers hold numbers, so a pickle that
// puts a list into itself makes no trouble until somebody follows it without end, and nobody does.
class PickleMachine {
 public:
  PickleMachine(absl::string_view pickle, absl::string_view what) : rest_(pickle), what_(what) {}

  const Value& at(uint32_t index) const { return values_[index]; }

  absl::StatusOr<uint32_t> Run() {
    while (true) {
      CINNABAR_ASSIGN_OR_RETURN(const uint8_t opcode, Take<uint8_t>());
      if (opcode == '.') break;
      CINNABAR_RETURN_IF_ERROR(Step(opcode));
    }
    if (stack_.size() != 1 || !marks_.empty()) return Broken("ends with other than one value");
    return stack_[0];
  }

 private:
  absl::Status Broken(absl::string_view problem) const {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": pickle: ", problem));
  }
  absl::Status Refused(absl::string_view problem) const {
    return absl::UnimplementedError(absl::StrCat(what_, ": pickle: ", problem));
  }

  absl::StatusOr<absl::string_view> TakeBytes(uint64_t count) {
    if (count > rest_.size()) return Broken("is cut");
    const absl::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }
  template <typename Word>
  absl::StatusOr<Word> Take() {
    CINNABAR_ASSIGN_OR_RETURN(const absl::string_view bytes, TakeBytes(sizeof(Word)));
    return LoadWord<Word>(bytes, 0);
  }
  absl::StatusOr<absl::string_view> TakeLine() {
    const size_t end = rest_.find('\n');
    if (end == absl::string_view::npos) return Broken("is cut");
    const absl::string_view line = rest_.substr(0, end);
    rest_.remove_prefix(end + 1);
    return line;
  }

  absl::Status Push(Value value) {
    values_.push_back(std::move(value));
    stack_.push_back(static_cast<uint32_t>(values_.size() - 1));
    return absl::OkStatus();
  }
  absl::Status PushInt(int64_t number) { return Push({.kind = Kind::kInt, .number = number}); }
  absl::Status PushText(absl::string_view text) {
    return Push({.kind = Kind::kText, .text = text});
  }
  // How far down the stack may be taken: to the last mark.
  size_t Floor() const { return marks_.empty() ? 0 : marks_.back(); }
  absl::StatusOr<uint32_t> Pop() {
    if (stack_.size() <= Floor()) return Broken("takes from an empty stack");
    const uint32_t top = stack_.back();
    stack_.pop_back();
    return top;
  }
  absl::StatusOr<std::vector<uint32_t>> PopToMark() {
    if (marks_.empty()) return Broken("has no mark");
    std::vector<uint32_t> items(stack_.begin() + static_cast<int64_t>(marks_.back()), stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }
  absl::StatusOr<Value*> Top(Kind kind, absl::string_view problem) {
    if (stack_.size() <= Floor() || values_[stack_.back()].kind != kind) return Broken(problem);
    return &values_[stack_.back()];
  }
  absl::Status Tuple(size_t count) {
    std::vector<uint32_t> items(count);
    for (size_t i = count; i-- > 0;) {
      CINNABAR_ASSIGN_OR_RETURN(items[i], Pop());
    }
    return Push({.kind = Kind::kTuple, .items = std::move(items)});
  }
  absl::Status Add(Kind kind, const std::vector<uint32_t>& items) {
    if (kind == Kind::kDict && items.size() % 2 != 0) return Broken("sets half an item");
    CINNABAR_ASSIGN_OR_RETURN(Value * into, Top(kind, "adds to what is no list or dictionary"));
    into->items.insert(into->items.end(), items.begin(), items.end());
    return absl::OkStatus();
  }

  absl::Status Memoize(uint64_t index) {
    if (stack_.size() <= Floor()) return Broken("takes from an empty stack");
    memo_[index] = stack_.back();
    return absl::OkStatus();
  }
  absl::Status Recall(uint64_t index) {
    const auto found = memo_.find(index);
    if (found == memo_.end()) return Broken("recalls what it never kept");
    stack_.push_back(found->second);
    // A recall adds no value, but a list of recalls must not outgrow its pickle by much either:
    // each costs two bytes of it and four of memory.
    return absl::OkStatus();
  }

  absl::Status Global(absl::string_view module, absl::string_view name) {
    const std::string full = absl::StrCat(module, " ", name);
    for (const absl::string_view known : {kRebuildTensor, kRebuildParameter, kOrderedDict}) {
      if (full == known) return Push({.kind = Kind::kGlobal, .text = known});
    }
    if (const StorageType* type = FindStorageType(full)) {
      return Push({.kind = Kind::kGlobal, .text = type->global, .type = type});
    }
    return Refused(absl::StrCat("names ", Shorten(module), ".", Shorten(name),
                                ", which is none of those that make tensors; nothing is run"));
  }

  // What a call of a known global would give.
  absl::Status Reduce() {
    CINNABAR_ASSIGN_OR_RETURN(const uint32_t arguments_index, Pop());
    CINNABAR_ASSIGN_OR_RETURN(const uint32_t callee_index, Pop());
    const Value& callee = values_[callee_index];
    const Value& arguments = values_[arguments_index];
    if (callee.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) {
      return Broken("calls what is no global");
    }
    const std::vector<uint32_t>& items = arguments.items;
    if (callee.text == kOrderedDict) {
      if (!items.empty()) return Refused("an OrderedDict with arguments");
      return Push({.kind = Kind::kDict});
    }
    if (callee.text == kRebuildParameter) {
      if (items.empty() || values_[items[0]].kind != Kind::kTensor) {
        return Broken("a parameter without a tensor");
      }
      stack_.push_back(items[0]);
      return absl::OkStatus();
    }
    if (callee.text != kRebuildTensor) return Refused("calls a storage type");
    if (items.size() < 4 || values_[items[0]].kind != Kind::kStorage ||
        values_[items[1]].kind != Kind::kInt || values_[items[2]].kind != Kind::kTuple ||
        values_[items[3]].kind != Kind::kTuple) {
      return Broken("a tensor is not rebuilt from storage, offset, shape and stride");
    }
    const int64_t offset = values_[items[1]].number;
    return Push({.kind = Kind::kTensor, .number = offset, .items = {items[0], items[2], items[3]}});
  }

  // ("storage", type, key, device, elements)
  absl::Status PersistentId() {
    CINNABAR_ASSIGN_OR_RETURN(const uint32_t index, Pop());
    const std::vector<uint32_t>& items = values_[index].items;
    if (values_[index].kind != Kind::kTuple || items.size() < 5 ||
        values_[items[0]].text != "storage" || values_[items[1]].type == nullptr ||
        values_[items[2]].kind != Kind::kText || values_[items[4]].kind != Kind::kInt) {
      return Refused("refers to what is no storage of a known type");
    }
    return Push({.kind = Kind::kStorage,
                 .number = values_[items[4]].number,
                 .text = values_[items[2]].text,
                 .type = values_[items[1]].type});
  }

  absl::Status LongInt() {
    CINNABAR_ASSIGN_OR_RETURN(const uint8_t size, Take<uint8_t>());
    CINNABAR_ASSIGN_OR_RETURN(const absl::string_view bytes, TakeBytes(size));
    if (size > 8) return Push({});  // a number that no tensor has
    uint64_t number = 0;
    for (size_t i = 0; i < size; ++i) {
      number |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
    }
    const bool negative = size > 0 && (static_cast<uint8_t>(bytes[size - 1]) & 0x80U) != 0;
    if (negative && size < 8) number |= ~uint64_t{0} << (8 * size);
    return PushInt(static_cast<int64_t>(number));
  }

  template <typename Length>
  absl::Status Text() {
    CINNABAR_ASSIGN_OR_RETURN(const Length length, Take<Length>());
    CINNABAR_ASSIGN_OR_RETURN(const absl::string_view text, TakeBytes(length));
    return PushText(text);
  }
  template <typename Length>
  absl::Status Skip() {
    CINNABAR_ASSIGN_OR_RETURN(const Length length, Take<Length>());
    CINNABAR_RETURN_IF_ERROR(TakeBytes(length).status());
    return Push({});
  }
  template <typename Index>
  absl::Status Keep() {
    CINNABAR_ASSIGN_OR_RETURN(const Index index, Take<Index>());
    return Memoize(index);
  }
  template <typename Index>
  absl::Status Again() {
    CINNABAR_ASSIGN_OR_RETURN(const Index index, Take<Index>());
    return Recall(index);
  }
  template <typename Number>
  absl::Status Int() {
    CINNABAR_ASSIGN_OR_RETURN(const Number number, Take<Number>());
    return PushInt(number);
  }

  absl::Status Step(uint8_t opcode) {
    switch (opcode) {
      case 0x80:  // PROTO
        return Take<uint8_t>().status();
      case 0x95:  // FRAME
        return Take<uint64_t>().status();
      case '(':
        marks_.push_back(stack_.size());
        return absl::OkStatus();
      case '0':
        return Pop().status();
      case '1':
        return PopToMark().status();
      case 'N':
        return Push({});
      case 0x88:
      case 0x89:
        return PushInt(opcode == 0x88 ? 1 : 0);
      case 'J':
        return Int<int32_t>();
      case 'K':
        return Int<uint8_t>();
      case 'M':
        return Int<uint16_t>();
      case 0x8A:
        return LongInt();
      case 'G':
        CINNABAR_RETURN_IF_ERROR(TakeBytes(8).status());
        return Push({});
      case 'X':
        return Text<uint32_t>();
      case 0x8C:
        return Text<uint8_t>();
      case 0x8D:
        return Text<uint64_t>();
      case 'U':
        return Text<uint8_t>();
      case 'T':
        return Text<uint32_t>();
      case 'B':
        return Skip<uint32_t>();
      case 'C':
        return Skip<uint8_t>();
      case ')':
        return Tuple(0);
      case 0x85:
        return Tuple(1);
      case 0x86:
        return Tuple(2);
      case 0x87:
        return Tuple(3);
      case 't': {
        CINNABAR_ASSIGN_OR_RETURN(std::vector<uint32_t> items, PopToMark());
        return Push({.kind = Kind::kTuple, .items = std::move(items)});
      }
      case ']':
        return Push({.kind = Kind::kList});
      case 'a': {
        CINNABAR_ASSIGN_OR_RETURN(const uint32_t item, Pop());
        return Add(Kind::kList, {item});
      }
      case 'e': {
        CINNABAR_ASSIGN_OR_RETURN(const std::vector<uint32_t> items, PopToMark());
        return Add(Kind::kList, items);
      }
      case '}':
        return Push({.kind = Kind::kDict});
      case 's': {
        CINNABAR_ASSIGN_OR_RETURN(const uint32_t value, Pop());
        CINNABAR_ASSIGN_OR_RETURN(const uint32_t key, Pop());
        return Add(Kind::kDict, {key, value});
      }
      case 'u': {
        CINNABAR_ASSIGN_OR_RETURN(const std::vector<uint32_t> items, PopToMark());
        return Add(Kind::kDict, items);
      }
      case 'c': {
        CINNABAR_ASSIGN_OR_RETURN(const absl::string_view module, TakeLine());
        CINNABAR_ASSIGN_OR_RETURN(const absl::string_view name, TakeLine());
        return Global(module, name);
      }
      case 0x93: {
        CINNABAR_ASSIGN_OR_RETURN(const uint32_t name, Pop());
        CINNABAR_ASSIGN_OR_RETURN(const uint32_t module, Pop());
        return Global(values_[module].text, values_[name].text);
      }
      case 'R':
        return Reduce();
      case 'b': {  // attributes of a state dict (_metadata): not looked at
        CINNABAR_RETURN_IF_ERROR(Pop().status());
        return Top(Kind::kDict, "sets attributes of what is no dictionary").status();
      }
      case 'Q':
        return PersistentId();
      case 'q':
        return Keep<uint8_t>();
      case 'r':
        return Keep<uint32_t>();
      case 0x94:
        return Memoize(memo_.size());
      case 'h':
        return Again<uint8_t>();
      case 'j':
        return Again<uint32_t>();
      default:
        return Refused(absl::StrCat("operation ", opcode, " is not read"));
    }
  }

  absl::string_view rest_;
  std::string what_;
  std::vector<Value> values_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  absl::flat_hash_map<uint64_t, uint32_t> memo_;
};

// --- The checkpoint
// -----------------------------------------------------------------------------------------

class TorchReader {
 public:
  TorchReader(absl::string_view file, absl::string_view what,
              absl::flat_hash_map<std::string, ZipEntry> entries)
      : file_(file), what_(what), entries_(std::move(entries)) {}

  absl::StatusOr<std::vector<TensorEntry>> Read() {
    CINNABAR_RETURN_IF_ERROR(FindPickle());
    PickleMachine machine(pickle_, what_);
    CINNABAR_ASSIGN_OR_RETURN(const uint32_t root, machine.Run());
    machine_ = &machine;
    const Value* saved = &machine.at(root);
    if (saved->kind != Kind::kDict) return Broken("what is saved is no dictionary");
    const Value* ema = Item(*saved, "ema");
    for (const absl::string_view key : {"model", "state_dict"}) {
      const Value* inner = Item(*saved, key);
      if (inner != nullptr && inner->kind == Kind::kDict) {
        saved = inner;
        break;
      }
    }
    std::vector<std::pair<std::string, const Value*>> tensors;
    for (size_t i = 0; i + 1 < saved->items.size(); i += 2) {
      const Value& key = machine.at(saved->items[i]);
      const Value& value = machine.at(saved->items[i + 1]);
      if (key.kind != Kind::kText || value.kind != Kind::kTensor) continue;
      absl::string_view name = key.text;
      if (absl::StartsWith(name, "module.")) name.remove_prefix(7);
      if (name.empty() || name.size() > kNameBytesMax) return Broken("a tensor has no name");
      tensors.emplace_back(name, &value);
    }
    if (tensors.empty()) return Broken("holds no tensors by name");
    if (ema != nullptr) CINNABAR_RETURN_IF_ERROR(TakeAverages(*ema, tensors));
    std::vector<TensorEntry> result;
    for (const auto& [name, tensor] : tensors) {
      CINNABAR_ASSIGN_OR_RETURN(TensorEntry entry, EntryOf(name, *tensor));
      result.push_back(std::move(entry));
    }
    std::sort(result.begin(), result.end(), [](const TensorEntry& a, const TensorEntry& b) {
      return std::tie(a.begin_byte, a.name) < std::tie(b.begin_byte, b.name);
    });
    return result;
  }

 private:
  absl::Status Broken(absl::string_view problem) const {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": ", problem));
  }

  absl::Status FindPickle() {
    for (const auto& [name, entry] : entries_) {
      if (name != "data.pkl" && !absl::EndsWith(name, "/data.pkl")) continue;
      if (!pickle_.empty()) return Broken("holds two data.pkl");
      prefix_ = name.substr(0, name.size() - 8);
      if (entry.bytes > kPickleBytesMax) {
        return Broken(absl::StrCat("a pickle of ", entry.bytes, " bytes"));
      }
      pickle_ = file_.substr(entry.begin_byte, entry.bytes);
    }
    if (pickle_.empty()) return Broken("holds no data.pkl: not made by torch.save");
    const auto order = entries_.find(prefix_ + "byteorder");
    if (order != entries_.end() &&
        file_.substr(order->second.begin_byte, order->second.bytes) != "little") {
      return absl::UnimplementedError(absl::StrCat(what_, ": storages are not little-endian"));
    }
    return absl::OkStatus();
  }

  const Value* Item(const Value& dict, absl::string_view key) const {
    for (size_t i = 0; i + 1 < dict.items.size(); i += 2) {
      const Value& name = machine_->at(dict.items[i]);
      if (name.kind == Kind::kText && name.text == key) return &machine_->at(dict.items[i + 1]);
    }
    return nullptr;
  }

  // Averages are kept without names, for parameters alone, in their order.
  absl::Status TakeAverages(const Value& ema,
                            std::vector<std::pair<std::string, const Value*>>& tensors) const {
    const Value* shadows = ema.kind == Kind::kDict ? Item(ema, "shadow_params") : nullptr;
    if (shadows == nullptr) return Broken("its ema has no shadow_params");
    size_t next = 0;
    for (auto& [name, tensor] : tensors) {
      if (absl::EndsWith(name, "inv_freq")) continue;  // a buffer
      if (next == shadows->items.size()) return Broken("its ema has fewer tensors than the model");
      const Value& shadow = machine_->at(shadows->items[next++]);
      if (shadow.kind != Kind::kTensor || Sizes(shadow, 1) != Sizes(*tensor, 1)) {
        return Broken(absl::StrCat("its ema has no tensor of the shape of ", Shorten(name)));
      }
      tensor = &shadow;
    }
    if (next != shadows->items.size()) return Broken("its ema has more tensors than the model");
    return absl::OkStatus();
  }

  // The shape (1) or the strides (2) of a tensor; nothing where one is not a natural number.
  std::optional<std::vector<int64_t>> Sizes(const Value& tensor, size_t item) const {
    std::vector<int64_t> sizes;
    for (const uint32_t index : machine_->at(tensor.items[item]).items) {
      const Value& size = machine_->at(index);
      if (size.kind != Kind::kInt || size.number < 0) return std::nullopt;
      sizes.push_back(size.number);
    }
    return sizes;
  }

  absl::StatusOr<TensorEntry> EntryOf(const std::string& name, const Value& tensor) const {
    const auto wrong = [&](absl::string_view problem) {
      return Broken(absl::StrCat("tensor ", Shorten(name), ": ", problem));
    };
    const Value& storage = machine_->at(tensor.items[0]);
    TensorEntry entry{.name = name, .dtype = std::string(storage.type->dtype)};
    const auto shape = Sizes(tensor, 1), strides = Sizes(tensor, 2);
    if (!shape.has_value() || !strides.has_value() || shape->size() != strides->size() ||
        tensor.number < 0 || storage.number < 0) {
      return wrong("shape, stride or offset is no natural number");
    }
    entry.shape = *shape;
    int64_t contiguous = 1;
    for (size_t i = shape->size(); i-- > 0;) {
      if ((*shape)[i] != 1 && (*strides)[i] != contiguous) {
        return absl::UnimplementedError(absl::StrCat(
            what_, ": tensor ", Shorten(name), ": is not contiguous; save .contiguous() tensors"));
      }
      if ((*shape)[i] == 0 || __builtin_mul_overflow(contiguous, (*shape)[i], &contiguous)) {
        return wrong("a dimension is 0 or their product overflows");
      }
    }
    entry.num_elements = contiguous;
    const auto found = entries_.find(absl::StrCat(prefix_, "data/", storage.text));
    if (found == entries_.end()) return wrong("its storage is missing");
    const int64_t size = storage.type->bytes;
    const auto stored = static_cast<int64_t>(found->second.bytes) / size;
    if (storage.number > stored || tensor.number > storage.number ||
        contiguous > storage.number - tensor.number) {
      return wrong("lies outside its storage");
    }
    entry.begin_byte = static_cast<int64_t>(found->second.begin_byte) + tensor.number * size;
    entry.end_byte = entry.begin_byte + contiguous * size;
    return entry;
  }

  absl::string_view file_;
  std::string what_;
  absl::flat_hash_map<std::string, ZipEntry> entries_;
  std::string prefix_;
  absl::string_view pickle_;
  const PickleMachine* machine_ = nullptr;
};

}  // namespace

bool IsZip(absl::Span<const uint8_t> bytes) {
  return bytes.size() >= 4 && std::memcmp(bytes.data(), "PK\x03\x04", 4) == 0;
}

absl::StatusOr<std::vector<TensorEntry>> ReadTorchFile(absl::Span<const uint8_t> bytes,
                                                       absl::string_view what) {
  if (!IsZip(bytes)) {
    return absl::UnimplementedError(absl::StrCat(
        what, ": no zip archive, as torch.save writes since PyTorch 1.6; save it again with that"));
  }
  const absl::string_view file(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  CINNABAR_ASSIGN_OR_RETURN(auto entries, ZipReader(file, what).Read());
  return TorchReader(file, what, std::move(entries)).Read();
}

}  // namespace cinnabar
