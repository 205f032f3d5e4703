// CINNABAR_CHECK: for what only a bug of ours can make false. Prints the condition, the place and
// the streamed message on stderr and aborts. Active in every build.
#ifndef CINNABAR_COMMON_BASE_CHECK_H_
#define CINNABAR_COMMON_BASE_CHECK_H_

#include <sstream>

namespace cinnabar::internal {

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  [[noreturn]] ~CheckFailure();
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

// Makes `stream << ...` a void expression, so that both arms of the ternary below agree.
struct Voidify {
  void operator&(std::ostream&) {}
};

}  // namespace cinnabar::internal

#define CINNABAR_CHECK(condition)                     \
  (__builtin_expect(static_cast<bool>(condition), 1)) \
      ? static_cast<void>(0)                          \
      : ::cinnabar::internal::Voidify() &             \
            ::cinnabar::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()

#endif  // CINNABAR_COMMON_BASE_CHECK_H_
