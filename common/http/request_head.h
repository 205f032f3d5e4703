// The head of a request, byte by byte: what RFC 9112 leaves no room for is refused before anything
// interprets it, because two programs that read the same bytes differently is how requests are
// smuggled.
#ifndef CINNABAR_COMMON_HTTP_REQUEST_HEAD_H_
#define CINNABAR_COMMON_HTTP_REQUEST_HEAD_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace cinnabar {

struct RequestHead {
  std::string method;
  std::string path;  // percent-decoded, without the query
  std::string query;
  int minor = 1;                                             // HTTP/1.minor
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case
  bool chunked = false;
  std::optional<uint64_t> content_length;
  bool keep_alive = true;
  bool expects_continue = false;
};

// What is wrong with a head: the status to answer with, and words for a person.
struct HeadError {
  int status = 400;
  std::string message;
};

// `head` ends with the empty line. 400: framing or syntax. 415: a content-encoding. 417: an
// expectation. 414: a long URL. 431: more than headers_max headers. 501: a transfer-encoding other
// than chunked. 505: a version other than 1.0 and 1.1. Pure; linear.
std::optional<HeadError> ParseRequestHead(absl::string_view head, int32_t headers_max,
                                          RequestHead& parsed);

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_HTTP_REQUEST_HEAD_H_
