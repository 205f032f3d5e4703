// A file mapped read-only into memory.
#ifndef CINNABAR_COMMON_BASE_MAPPED_FILE_H_
#define CINNABAR_COMMON_BASE_MAPPED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace cinnabar {

// Movable owner of one mapping. The bytes stay readable for the owner's life; another process that
// truncates the file meanwhile makes reads fault, as with every mapping.
class MappedFile {
 public:
  // NotFound, PermissionDenied or FailedPrecondition (not a regular file), naming the path. An
  // empty file maps to an empty span.
  static absl::StatusOr<MappedFile> Open(const std::string& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::string& path() const { return path_; }
  absl::Span<const uint8_t> bytes() const { return {data_, size_}; }

  // Tells the kernel that these bytes will not be read again soon: their pages may go. `data` must
  // lie in the mapping; reading them later is still correct.
  void Release(const void* data, size_t num_bytes) const;

 private:
  MappedFile(std::string path, const uint8_t* data, size_t size);
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Reads a whole small file. ResourceExhausted when it is larger than `bytes_max`.
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t bytes_max);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_BASE_MAPPED_FILE_H_
