// The models a gateway answers for: tokenizer and chat template from the configured folder, the
// rest (what the network is, which weights) from the workers that serve it now.
#ifndef CINNABAR_GATEWAY_SERVICE_MODEL_DIRECTORY_H_
#define CINNABAR_GATEWAY_SERVICE_MODEL_DIRECTORY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "cinnabar/v1/work.pb.h"
#include "common/base/mutex.h"
#include "gateway/api/build_work.h"

namespace cinnabar {

// One configured model.
struct ModelSource {
  std::string path;  // folder with tokenizer.json
  std::string name;
  std::vector<std::string> aliases;
  int32_t default_canvas_tokens = 128;
  int32_t canvas_tokens_max = 4096;
  int32_t context_tokens_max = 0;  // 0: what the network takes
  Prices prices;
};

// Thread-safe.
class ModelDirectory {
 public:
  // Reads the tokenizers. Errors name the folder; InvalidArgument for two models of one name.
  static absl::StatusOr<std::unique_ptr<ModelDirectory>> Load(std::vector<ModelSource> sources);

  // Takes the workers that are alive. A model that is served with several weights at once is
  // answered with those that most workers have (ties: the lower fingerprint): a request stays with
  // the weights that it was checked against.
  void Update(absl::Span<const v1::WorkerStatus> workers);

  struct Entry {
    // Null until a worker has been seen: what the network takes is not known before.
    std::shared_ptr<const ServedModel> model;
    int32_t num_workers = 0;  // that serve it now and take work
  };
  // By name or alias. NotFound: not configured.
  absl::StatusOr<Entry> Find(absl::string_view name) const;
  // In the order of the configuration; those never served are left out.
  std::vector<Entry> List() const;
  // Whether every configured model has a worker.
  bool AllServed() const;

 private:
  explicit ModelDirectory(std::vector<ServedModel> configured);

  mutable Mutex mu_;                                 // leaf
  const std::vector<ServedModel> configured_;        // without traits and fingerprint
  std::vector<Entry> entries_ ABSL_GUARDED_BY(mu_);  // as configured_
};

}  // namespace cinnabar

#endif  // CINNABAR_GATEWAY_SERVICE_MODEL_DIRECTORY_H_
