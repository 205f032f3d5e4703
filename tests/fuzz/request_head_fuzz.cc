// A hostile head. What is accepted must be what it says, and a second parser (Boost.Beast, which
// takes the body out of the bytes) must agree about where the body ends: two that disagree are how
// requests are smuggled. Input: the bytes of the head.
#include <boost/asio/buffer.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/parser.hpp>
#include <cstddef>
#include <cstdint>

#include "absl/strings/ascii.h"
#include "absl/strings/string_view.h"
#include "common/base/check.h"
#include "common/http/request_head.h"

namespace {

namespace http = boost::beast::http;
constexpr int32_t kHeadersMax = 16;

void CheckAgainstBeast(absl::string_view head, const cinnabar::RequestHead& parsed) {
  http::request_parser<http::empty_body> beast;
  beast.header_limit(64 << 10);
  boost::system::error_code error;
  beast.put(boost::asio::buffer(head.data(), head.size()), error);
  if (error || !beast.is_header_done()) return;  // the server answers 400
  CINNABAR_CHECK(beast.chunked() == parsed.chunked);
  const bool has_length = beast.content_length().has_value();
  CINNABAR_CHECK(has_length == parsed.content_length.has_value());
  if (has_length) CINNABAR_CHECK(*beast.content_length() == *parsed.content_length);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view head(reinterpret_cast<const char*>(data), size);
  cinnabar::RequestHead parsed;
  const auto error = cinnabar::ParseRequestHead(head, kHeadersMax, parsed);
  if (error.has_value()) {
    CINNABAR_CHECK(error->status >= 400 && error->status < 600 && !error->message.empty());
    return 0;
  }
  CINNABAR_CHECK(!parsed.method.empty());
  CINNABAR_CHECK(parsed.path == "*" || (!parsed.path.empty() && parsed.path[0] == '/'));
  CINNABAR_CHECK(parsed.headers.size() <= static_cast<size_t>(kHeadersMax));
  CINNABAR_CHECK(!(parsed.chunked && parsed.content_length.has_value()));
  for (const char c : parsed.path) CINNABAR_CHECK(!absl::ascii_iscntrl(static_cast<uint8_t>(c)));
  for (const auto& [name, value] : parsed.headers) {
    CINNABAR_CHECK(!name.empty() && absl::AsciiStrToLower(name) == name);
    for (const char c : value) {
      CINNABAR_CHECK(c == '\t' || !absl::ascii_iscntrl(static_cast<uint8_t>(c)));
    }
  }
  CheckAgainstBeast(head, parsed);
  return 0;
}
