// Macros over absl::Status: return early, and say what was being done.
//   CINNABAR_RETURN_IF_ERROR(file.Read(...), "read the header of ", path);
//   CINNABAR_ASSIGN_OR_RETURN(const Lease lease, store.Reserve(...), "reserve for ", worker);
// The words after the expression are put before the message: "reserve for w-3: connection lost".
#ifndef CINNABAR_COMMON_BASE_STATUS_H_
#define CINNABAR_COMMON_BASE_STATUS_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace cinnabar::internal {

// Returns `status` with the context in front of its message; the code stays.
absl::Status WithContext(const absl::Status& status, const std::string& context);

template <typename... Words>
absl::Status Annotate(const absl::Status& status, const Words&... words) {
  if constexpr (sizeof...(words) == 0) {
    return status;
  } else {
    return WithContext(status, absl::StrCat(words...));
  }
}

}  // namespace cinnabar::internal

#define CINNABAR_STATUS_JOIN2(a, b) a##b
#define CINNABAR_STATUS_JOIN(a, b) CINNABAR_STATUS_JOIN2(a, b)

#define CINNABAR_RETURN_IF_ERROR(expression, ...)                                        \
  do {                                                                                   \
    const absl::Status cinnabar_status = (expression);                                   \
    if (!cinnabar_status.ok()) {                                                         \
      return ::cinnabar::internal::Annotate(cinnabar_status __VA_OPT__(, ) __VA_ARGS__); \
    }                                                                                    \
  } while (false)

#define CINNABAR_ASSIGN_OR_RETURN(target, expression, ...)                                   \
  CINNABAR_ASSIGN_OR_RETURN_IMPL(CINNABAR_STATUS_JOIN(cinnabar_statusor_, __LINE__), target, \
                                 expression __VA_OPT__(, ) __VA_ARGS__)
#define CINNABAR_ASSIGN_OR_RETURN_IMPL(result, target, expression, ...)                \
  auto result = (expression);                                                          \
  if (!result.ok()) {                                                                  \
    return ::cinnabar::internal::Annotate(result.status() __VA_OPT__(, ) __VA_ARGS__); \
  }                                                                                    \
  target = *std::move(result)

#endif  // CINNABAR_COMMON_BASE_STATUS_H_
