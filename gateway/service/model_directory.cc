#include "gateway/service/model_directory.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/wire/model_traits_wire.h"

namespace cinnabar {

ModelDirectory::ModelDirectory(std::vector<ServedModel> configured)
    : configured_(std::move(configured)), entries_(configured_.size()) {}

absl::StatusOr<std::unique_ptr<ModelDirectory>> ModelDirectory::Load(
    std::vector<ModelSource> sources) {
  std::set<std::string> names;
  std::vector<ServedModel> configured;
  for (const ModelSource& source : sources) {
    std::vector<std::string> called = source.aliases;
    called.push_back(source.name);
    for (const std::string& name : called) {
      if (!names.insert(name).second) {
        return absl::InvalidArgumentError(
            absl::StrCat("two models are called \"", name, "\"; rename one"));
      }
    }
    CINNABAR_ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(source.path), "model ",
                              source.name);
    std::optional<ChatTemplate> chat_template;
    const auto& templates = tokenizer.chat_templates();
    if (const auto found = templates.find("default"); found != templates.end()) {
      CINNABAR_ASSIGN_OR_RETURN(chat_template, ChatTemplate::Parse(found->second), "model ",
                                source.name, ": chat template");
    }
    configured.push_back({.name = source.name,
                          .aliases = source.aliases,
                          .tokenizer = std::move(tokenizer),
                          .chat_template = std::move(chat_template),
                          .traits = {},
                          .fingerprint = "",
                          .default_canvas_tokens = source.default_canvas_tokens,
                          .canvas_tokens_max = source.canvas_tokens_max,
                          .context_tokens_max = source.context_tokens_max,
                          .prices = source.prices,
                          .created = absl::Now()});
  }
  return std::unique_ptr<ModelDirectory>(new ModelDirectory(std::move(configured)));
}

void ModelDirectory::Update(absl::Span<const v1::WorkerStatus> workers) {
  MutexLock lock(mu_);
  for (size_t i = 0; i < configured_.size(); ++i) {
    const ServedModel& configured = configured_[i];
    std::map<std::string, std::pair<int32_t, const v1::WorkerStatus*>> by_fingerprint;
    for (const v1::WorkerStatus& worker : workers) {
      if (worker.model() != configured.name) continue;
      auto& [count, one] = by_fingerprint[worker.model_fingerprint()];
      count += worker.draining() ? 0 : 1;
      one = &worker;
    }
    const auto most = std::max_element(
        by_fingerprint.begin(), by_fingerprint.end(),
        [](const auto& a, const auto& b) { return a.second.first < b.second.first; });
    Entry& entry = entries_[i];
    if (most == by_fingerprint.end()) {
      entry.num_workers = 0;
      continue;
    }
    entry.num_workers = most->second.first;
    if (entry.model != nullptr && entry.model->fingerprint == most->first) continue;
    absl::StatusOr<ModelTraits> traits = FromWire(most->second.second->traits());
    if (!traits.ok()) {  // a newer worker than we understand serves nothing that we could check
      entry.num_workers = 0;
      continue;
    }
    ServedModel model = configured;
    model.traits = *std::move(traits);
    model.fingerprint = most->first;
    entry.model = std::make_shared<const ServedModel>(std::move(model));
  }
}

absl::StatusOr<ModelDirectory::Entry> ModelDirectory::Find(absl::string_view name) const {
  MutexLock lock(mu_);
  for (size_t i = 0; i < configured_.size(); ++i) {
    if (IsCalled(configured_[i], name)) return entries_[i];
  }
  return absl::NotFoundError(absl::StrCat("no model ", name));
}

std::vector<ModelDirectory::Entry> ModelDirectory::List() const {
  MutexLock lock(mu_);
  std::vector<Entry> served;
  for (const Entry& entry : entries_) {
    if (entry.model != nullptr) served.push_back(entry);
  }
  return served;
}

bool ModelDirectory::AllServed() const {
  MutexLock lock(mu_);
  return std::all_of(entries_.begin(), entries_.end(),
                     [](const Entry& entry) { return entry.num_workers > 0; });
}

}  // namespace cinnabar
