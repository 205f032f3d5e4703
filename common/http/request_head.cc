#include "common/http/request_head.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace cinnabar {
namespace {

constexpr size_t kMethodMax = 32;
constexpr size_t kTargetMax = 8192;

bool IsTokenCharacter(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
         absl::string_view("!#$%&'*+-.^_`|~").find(c) != absl::string_view::npos;
}

bool IsToken(absl::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), IsTokenCharacter);
}

// Visible characters, blanks, and bytes above ASCII.
bool IsValueCharacter(char c) {
  const auto byte = static_cast<unsigned char>(c);
  return byte == '\t' || (byte >= 0x20 && byte != 0x7F);
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// False for a broken escape or one that hides a control character.
bool PercentDecode(absl::string_view text, std::string& decoded) {
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      decoded.push_back(text[i]);
      continue;
    }
    if (i + 2 >= text.size()) return false;
    const int high = HexDigit(text[i + 1]);
    const int low = HexDigit(text[i + 2]);
    if (high < 0 || low < 0) return false;
    const char byte = static_cast<char>(high * 16 + low);
    if (absl::ascii_iscntrl(static_cast<unsigned char>(byte))) return false;
    decoded.push_back(byte);
    i += 2;
  }
  return true;
}

HeadError Bad(absl::string_view message) { return {400, std::string(message)}; }

std::optional<HeadError> ParseRequestLine(absl::string_view line, RequestHead& parsed) {
  const std::vector<absl::string_view> parts = absl::StrSplit(line, ' ');
  if (parts.size() != 3) return Bad("the request line is not: method, target, version");
  if (!IsToken(parts[0]) || parts[0].size() > kMethodMax) return Bad("not a method");
  const absl::string_view version = parts[2];
  if (version.size() != 8 || !absl::StartsWith(version, "HTTP/") ||
      !absl::ascii_isdigit(static_cast<unsigned char>(version[5])) || version[6] != '.' ||
      !absl::ascii_isdigit(static_cast<unsigned char>(version[7]))) {
    return Bad("not a version of HTTP");
  }
  if (version != "HTTP/1.1" && version != "HTTP/1.0") {
    return HeadError{505, "only HTTP/1.1 and HTTP/1.0 are spoken here"};
  }
  parsed.minor = version[7] - '0';
  parsed.method = std::string(parts[0]);
  absl::string_view target = parts[1];
  if (target.size() > kTargetMax) return HeadError{414, "the URL is too long"};
  const bool printable =
      std::all_of(target.begin(), target.end(), [](char c) { return c > 0x20 && c < 0x7F; });
  // A proxy's form ("http://host/path") is accepted, its host is not looked at.
  for (const absl::string_view scheme : {"http://", "https://"}) {
    if (absl::StartsWithIgnoreCase(target, scheme)) {
      target.remove_prefix(scheme.size());
      const size_t slash = target.find('/');
      target = slash == absl::string_view::npos ? "/" : target.substr(slash);
    }
  }
  if (!printable || target.empty() || (target[0] != '/' && target != "*")) {
    return Bad("not a URL path");
  }
  if (target.find('#') != absl::string_view::npos)
    return Bad("a fragment does not belong in a URL");
  const size_t question = target.find('?');
  if (question != absl::string_view::npos) {
    parsed.query = std::string(target.substr(question + 1));
    target = target.substr(0, question);
  }
  if (!PercentDecode(target, parsed.path)) return Bad("a broken percent escape in the URL");
  return std::nullopt;
}

std::optional<HeadError> ParseHeader(absl::string_view line, RequestHead& parsed) {
  if (line[0] == ' ' || line[0] == '\t') return Bad("a header continues on the next line");
  const size_t colon = line.find(':');
  if (colon == absl::string_view::npos) return Bad("a header without a colon");
  const absl::string_view name = line.substr(0, colon);
  if (!IsToken(name)) return Bad("not a header name, or a blank before its colon");
  const absl::string_view raw = line.substr(colon + 1);
  if (!std::all_of(raw.begin(), raw.end(), IsValueCharacter)) {
    return Bad("a control character in a header");
  }
  const absl::string_view value = absl::StripAsciiWhitespace(raw);
  parsed.headers.emplace_back(absl::AsciiStrToLower(name), value);
  return std::nullopt;
}

// What the headers say about framing.
std::optional<HeadError> Interpret(RequestHead& parsed) {
  int num_hosts = 0;
  int num_lengths = 0;
  int num_encodings = 0;
  bool closes = false;  // wins over keep-alive, whatever their order
  parsed.keep_alive = parsed.minor == 1;
  for (const auto& [name, value] : parsed.headers) {
    if (name == "host") {
      ++num_hosts;
      if (value.find_first_of(" /\\@,") != std::string::npos) return Bad("not a host");
    } else if (name == "content-length") {
      ++num_lengths;
      uint64_t length = 0;
      const bool digits = !value.empty() && value.size() <= 18 &&
                          std::all_of(value.begin(), value.end(), [](char c) {
                            return absl::ascii_isdigit(static_cast<unsigned char>(c));
                          });
      if (!digits || !absl::SimpleAtoi(value, &length)) return Bad("content-length is no number");
      parsed.content_length = length;
    } else if (name == "transfer-encoding") {
      ++num_encodings;
      if (!absl::EqualsIgnoreCase(value, "chunked")) {
        return HeadError{501, "transfer-encoding: only chunked is understood"};
      }
      parsed.chunked = true;
    } else if (name == "content-encoding") {
      if (!absl::EqualsIgnoreCase(value, "identity")) {
        return HeadError{415, "send the body uncompressed"};
      }
    } else if (name == "expect") {
      if (!absl::EqualsIgnoreCase(value, "100-continue")) {
        return HeadError{417, "only 100-continue can be expected"};
      }
      parsed.expects_continue = parsed.minor == 1;  // an older client waits for nothing
    } else if (name == "connection") {
      for (const absl::string_view option : absl::StrSplit(value, ',')) {
        const absl::string_view word = absl::StripAsciiWhitespace(option);
        if (absl::EqualsIgnoreCase(word, "close")) closes = true;
        if (absl::EqualsIgnoreCase(word, "keep-alive")) parsed.keep_alive = true;
      }
    }
  }
  if (closes) parsed.keep_alive = false;
  if (num_hosts > 1) return Bad("more than one host");
  if (num_hosts == 0 && parsed.minor == 1) return Bad("the host header is missing");
  if (num_lengths > 1) return Bad("more than one content-length");
  if (num_encodings > 1) return Bad("more than one transfer-encoding");
  if (num_encodings > 0 && num_lengths > 0) {
    return Bad("content-length and transfer-encoding exclude each other");
  }
  if (parsed.chunked && parsed.minor == 0) return Bad("HTTP/1.0 knows no transfer-encoding");
  return std::nullopt;
}

}  // namespace

std::optional<HeadError> ParseRequestHead(absl::string_view head, int32_t headers_max,
                                          RequestHead& parsed) {
  if (!absl::ConsumeSuffix(&head, "\r\n\r\n")) return Bad("the head does not end");
  bool first = true;
  int32_t num_headers = 0;
  for (const absl::string_view line : absl::StrSplit(head, "\r\n")) {
    // Whatever is left of CR and LF stands alone.
    if (line.find_first_of(absl::string_view("\r\n\0", 3)) != absl::string_view::npos) {
      return Bad("a line end that is not CR LF, or a NUL");
    }
    if (line.empty()) return Bad("an empty line in the head");
    std::optional<HeadError> error;
    if (first) {
      error = ParseRequestLine(line, parsed);
      first = false;
    } else {
      if (++num_headers > headers_max) return HeadError{431, "too many headers"};
      error = ParseHeader(line, parsed);
    }
    if (error.has_value()) return error;
  }
  return Interpret(parsed);
}

}  // namespace cinnabar
