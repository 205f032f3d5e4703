// Reading and writing GGUF files: memory-mapped, validated before any number is believed. Versions
// 2 and 3, little-endian. Format: ggml-org/ggml, docs/gguf.md.
#ifndef CINNABAR_COMMON_GGUF_GGUF_H_
#define CINNABAR_COMMON_GGUF_GGUF_H_

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/mapped_file.h"

namespace cinnabar {

// The numbers are the format's.
enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

// A value where it lies in the file.
struct GgufValue {
  GgufType type = GgufType::kU8;
  GgufType element = GgufType::kU8;  // kArray: of its elements, never kArray
  uint64_t count = 1;                // kArray: how many
  absl::string_view bytes;           // of the value; of an array's elements one after another
};

struct GgufTensor {
  std::string name;
  std::string dtype;           // "F32", "Q4_K", ...: always one whose size is known
  std::vector<int64_t> shape;  // outermost first, as PyTorch writes it; the last is whole blocks
  int64_t num_elements = 1;
  int64_t begin_byte = 0;  // in the file
  int64_t end_byte = 0;
};

// What a file says before its data. Views point into the bytes it was read from.
class GgufHeader {
 public:
  // `bytes` is the whole file, `what` its name in errors. InvalidArgument for every deviation from
  // the format: a magic, version or type that is not known, a length that does not fit, a key or a
  // tensor named twice, an array of arrays, a product of dimensions that overflows, rows that are
  // not whole blocks, data that is misaligned, overlaps or ends beyond the file. Takes memory in
  // proportion to the tensors and keys that are there, never to what a number claims. Tensors come
  // in file order.
  static absl::StatusOr<GgufHeader> Read(absl::Span<const uint8_t> bytes, absl::string_view what);

  absl::Span<const GgufTensor> tensors() const { return tensors_; }
  const GgufTensor* FindTensor(absl::string_view name) const;  // nullptr: none
  const GgufValue* Find(absl::string_view key) const;          // nullptr: none
  const std::string& what() const { return what_; }

  // Fields by key. Without it: nothing, or the fallback. InvalidArgument, naming the key, when it
  // is of another kind. Numbers: any integer type that is not negative; any number. A bool may be
  // written as the string "true" or "false".
  absl::StatusOr<std::optional<int64_t>> Natural(absl::string_view key) const;
  absl::StatusOr<std::optional<double>> Number(absl::string_view key) const;
  absl::StatusOr<std::optional<bool>> Bool(absl::string_view key) const;
  absl::StatusOr<std::string> String(absl::string_view key, absl::string_view fallback = "") const;
  absl::StatusOr<std::vector<absl::string_view>> Strings(absl::string_view key) const;
  absl::StatusOr<std::vector<int64_t>> Naturals(absl::string_view key) const;

 private:
  std::string what_;
  std::vector<GgufTensor> tensors_;
  absl::flat_hash_map<std::string, GgufValue> fields_;
  absl::flat_hash_map<std::string, size_t> tensor_index_;
};

// A tensor to be written: `bytes` of a dtype the format knows (CINNABAR_CHECK), shape as in
// GgufTensor.
struct GgufOutput {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t bytes = 0;
};

// Writes a file front to back: header, then the tensors' bytes in their order, padded where the
// format wants it. Errors name the path; a file that was not finished is of no use.
class GgufWriter {
 public:
  static absl::StatusOr<GgufWriter> Create(const std::string& path, absl::string_view architecture,
                                           std::vector<GgufOutput> tensors);

  // The next bytes of the tensor that is being written; one tensor at a time (CINNABAR_CHECK).
  absl::Status Append(absl::Span<const uint8_t> bytes);
  // After the last byte of the last tensor (CINNABAR_CHECK).
  absl::Status Finish();

 private:
  struct CloseFile {
    void operator()(FILE* file) const;
  };

  absl::Status Write(absl::string_view bytes);

  std::string path_;
  std::vector<GgufOutput> tensors_;
  std::unique_ptr<FILE, CloseFile> file_;
  size_t tensor_ = 0;
  int64_t written_ = 0;  // of that tensor
};

// Whether a path names a GGUF file by its ending.
bool HasGgufEnding(absl::string_view path);

// What a Hugging Face folder keeps in two files, made from tokenizer.ggml.* and
// tokenizer.chat_template: byte-level BPE whose split tokenizer.ggml.pre names (gpt-2, qwen2,
// bailingmoe, bailingmoe2, llada-moe; another one is written as it is, so that whoever splits text
// refuses it, naming it). Both empty without tokens. Tokens of type unused have no text.
// add_bos_token is not read: converters set it where the tokenizer adds none, and chat templates
// write the token themselves.
struct GgufTokenizer {
  std::string tokenizer;         // tokenizer.json
  std::string tokenizer_config;  // tokenizer_config.json
};
absl::StatusOr<GgufTokenizer> ReadGgufTokenizer(const GgufHeader& header);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_GGUF_GGUF_H_
