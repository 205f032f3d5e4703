// JSON that somebody else wrote: parsed without exceptions, bounded in depth, read field by field
// with types and ranges. Every error names the file and the field.
#ifndef CINNABAR_COMMON_BASE_JSON_H_
#define CINNABAR_COMMON_BASE_JSON_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "nlohmann/json.hpp"

namespace cinnabar {

inline constexpr int kJsonDepthMax = 64;

// InvalidArgument, starting with `what` (a path): not JSON, nested deeper than kJsonDepthMax, or an
// object with the same key twice. A number that no double holds is not JSON either.
absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text, absl::string_view what);

// The same for what strangers send: keys keep their order, and the depth has its own limit, at most
// kJsonDepthMax. Strings are valid UTF-8 without lone surrogates. n log n in the text, also for
// objects with very many keys; reading a key of such an object is linear in its size.
absl::StatusOr<nlohmann::ordered_json> ParseOrderedJson(absl::string_view text,
                                                        absl::string_view what, int depth_max);

// ReadFile and ParseJson.
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::string& path, size_t bytes_max);

// The same without building a tree, for files of which little is wanted: `visitor` sees every event
// as it comes. InvalidArgument as above, but keys may repeat; a visitor that returns false stops
// the parse without an error.
absl::Status VisitJson(absl::string_view text, absl::string_view what,
                       nlohmann::json_sax<nlohmann::json>& visitor);

// Reads the fields of one object. The first error is kept and every read after it gives its
// fallback (or the low end of the range), so a run of reads needs one look at status() at its end.
// A field that is null counts as absent. Borrows the object.
class JsonFields {
 public:
  // `where` names the object in errors: "models/x/config.json" or "models/x/config.json: model".
  JsonFields(const nlohmann::json& object, std::string where);

  const absl::Status& status() const { return status_; }
  const std::string& where() const { return where_; }
  const nlohmann::json& object() const { return *object_; }

  bool Has(absl::string_view key) const;  // present and not null

  // Required fields.
  int64_t Int(absl::string_view key, int64_t least, int64_t most);
  double Number(absl::string_view key, double least, double most);
  bool Bool(absl::string_view key);
  std::string String(absl::string_view key);
  JsonFields Object(absl::string_view key);  // an absent one reads as empty; the error is kept here

  // Optional fields.
  int64_t Int(absl::string_view key, int64_t least, int64_t most, int64_t fallback);
  double Number(absl::string_view key, double least, double most, double fallback);
  bool Bool(absl::string_view key, bool fallback);
  std::string String(absl::string_view key, absl::string_view fallback);
  // One integer or a list of them.
  std::vector<int64_t> Ints(absl::string_view key, int64_t least, int64_t most);
  // One string or a list of them.
  std::vector<std::string> Strings(absl::string_view key);

  // Keeps `status` as the error if it is the first, "where: key: message".
  void Fail(absl::StatusCode code, absl::string_view key, absl::string_view message);

 private:
  const nlohmann::json* Find(absl::string_view key) const;
  int64_t ReadInt(const nlohmann::json& value, absl::string_view key, int64_t least, int64_t most,
                  int64_t fallback);

  const nlohmann::json* object_;
  std::string where_;
  absl::Status status_;
};

}  // namespace cinnabar

#endif  // CINNABAR_COMMON_BASE_JSON_H_
