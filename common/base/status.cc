#include "common/base/status.h"

namespace cinnabar::internal {

absl::Status WithContext(const absl::Status& status, const std::string& context) {
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

}  // namespace cinnabar::internal
