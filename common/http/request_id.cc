#include "common/http/request_id.h"

#include <openssl/rand.h>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {

std::string NewRequestId() {
  unsigned char bits[16];
  CINNABAR_CHECK(RAND_bytes(bits, sizeof(bits)) == 1) << "no random bits";
  return absl::StrCat("req_", absl::BytesToHexString(absl::string_view(
                                  reinterpret_cast<const char*>(bits), sizeof(bits))));
}

}  // namespace cinnabar
