// Names of requests: 128 random bits, so that nobody guesses another's.
#ifndef CINNABAR_COMMON_HTTP_REQUEST_ID_H_
#define CINNABAR_COMMON_HTTP_REQUEST_ID_H_

#include <string>

namespace cinnabar {

// "req_" and 32 hexadecimal digits. From any thread.
std::string NewRequestId();

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_HTTP_REQUEST_ID_H_
