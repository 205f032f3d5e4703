#include "worker/model/fingerprint.h"

#include <openssl/evp.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/mapped_file.h"
#include "common/base/status.h"
#include "common/gguf/gguf.h"

namespace cinnabar {
namespace {

constexpr size_t kHeadBytes = size_t{1} << 20;  // holds the header of a usual file
constexpr size_t kPageBytes = 4096;
constexpr size_t kPages = 256;

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    CINNABAR_CHECK(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }
  void Add(absl::string_view bytes) {
    CINNABAR_CHECK(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1);
  }
  std::string Hex(size_t num_bytes) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    CINNABAR_CHECK(EVP_DigestFinal_ex(context_.get(), digest, nullptr) == 1);
    return absl::BytesToHexString(
        absl::string_view(reinterpret_cast<const char*>(digest), num_bytes));
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

}  // namespace

absl::StatusOr<std::string> ModelFingerprint(const std::string& directory,
                                             absl::string_view variant) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<fs::path> files;
  if (HasGgufEnding(directory)) {
    files.emplace_back(directory);
  } else {
    for (fs::directory_iterator it(directory, error), end; !error && it != end;
         it.increment(error)) {
      const fs::path extension = it->path().extension();
      if (it->path().filename() == "config.json" || extension == ".safetensors" ||
          extension == ".gguf" || extension == ".bin" || extension == ".pth" ||
          extension == ".pt" || extension == ".ckpt") {
        files.push_back(it->path());
      }
    }
    if (error) return absl::NotFoundError(absl::StrCat(directory, ": ", error.message()));
    if (files.size() < 2) return absl::NotFoundError(absl::StrCat(directory, ": holds no weights"));
  }
  std::sort(files.begin(), files.end());
  Sha256 digest;
  digest.Add(variant);
  for (const fs::path& path : files) {
    CINNABAR_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path.string()));
    const absl::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()),
                                  file.bytes().size());
    digest.Add(absl::StrCat("\n", path.filename().string(), " ", bytes.size(), "\n"));
    digest.Add(bytes.substr(0, kHeadBytes));
    if (bytes.size() <= kHeadBytes) continue;
    const size_t stride = std::max((bytes.size() - kHeadBytes) / kPages, kPageBytes);
    for (size_t at = kHeadBytes; at < bytes.size(); at += stride) {
      digest.Add(bytes.substr(at, kPageBytes));
    }
  }
  return digest.Hex(16);
}

}  // namespace cinnabar
