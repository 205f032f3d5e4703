#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/model/family.h"

// One line a family; each is defined in the family_*.cc of its name.
#define CINNABAR_FAMILIES(REGISTER) \
  REGISTER(A2d)                     \
  REGISTER(Bd3lm)                   \
  REGISTER(DiffusionGemma)          \
  REGISTER(Dream)                   \
  REGISTER(DreamReasoner)           \
  REGISTER(FastDllmV2)              \
  REGISTER(Llada)                   \
  REGISTER(Llada2)                  \
  REGISTER(LladaMoe)                \
  REGISTER(Mdlm)                    \
  REGISTER(OpenDcoder)              \
  REGISTER(Rnd1)                    \
  REGISTER(Sdar)                    \
  REGISTER(SdarMoe)                 \
  REGISTER(Sedd)

namespace cinnabar {

#define CINNABAR_DECLARE_FAMILY(name) Family Make##name##Family();
CINNABAR_FAMILIES(CINNABAR_DECLARE_FAMILY)
#undef CINNABAR_DECLARE_FAMILY

namespace {

const Family* FindFamily(const CheckpointFacts& facts) {
  for (const std::string& architecture : facts.architectures) {
    for (const Family* family : Families()) {
      if (std::find(family->architectures.begin(), family->architectures.end(), architecture) !=
          family->architectures.end()) {
        return family;
      }
    }
  }
  if (!facts.architectures.empty()) return nullptr;
  for (const Family* family : Families()) {
    if (family->claims != nullptr && family->claims(facts)) return family;
  }
  return nullptr;
}

absl::Status NoFamily(const CheckpointFacts& facts) {
  if (facts.architectures.empty()) {
    return absl::UnimplementedError(absl::StrCat(
        facts.config_path, ": names no architecture, and looks like none of the supported models"));
  }
  const std::string& name = facts.architectures[0];
  std::vector<absl::string_view> supported;
  for (const Family* family : Families()) {
    supported.insert(supported.end(), family->architectures.begin(), family->architectures.end());
  }
  return absl::UnimplementedError(absl::StrCat(
      facts.config_path, ": architecture ", name.substr(0, 100),
      " is not supported; supported are ", absl::StrJoin(supported, ", "), " and SEDD"));
}

}  // namespace

const std::vector<const Family*>& Families() {
  static const std::vector<const Family*>* const families = [] {
    auto* list = new std::vector<const Family*>;
#define CINNABAR_ADD_FAMILY(name) list->push_back(new Family(Make##name##Family()));
    CINNABAR_FAMILIES(CINNABAR_ADD_FAMILY)
#undef CINNABAR_ADD_FAMILY
    return list;
  }();
  return *families;
}

absl::StatusOr<ModelSpec> ReadModelSpec(const CheckpointFacts& facts) {
  const Family* family = FindFamily(facts);
  if (family == nullptr) return NoFamily(facts);
  CINNABAR_ASSIGN_OR_RETURN(ModelSpec spec, family->read(facts));
  spec.architecture = facts.architectures.empty() ? "" : facts.architectures[0];
  ModelTraits& traits = spec.traits;
  if (traits.family.empty()) traits.family = std::string(family->name);
  traits.tokenizer_size = std::min(facts.tokenizer.size, traits.vocab_size);
  if (traits.mask_token >= traits.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(facts.config_path, ": mask token ",
                                                   traits.mask_token, " is not below the ",
                                                   traits.vocab_size, " rows of the vocabulary"));
  }
  // An id without a row can never be generated.
  const auto out_of_range = [&](TokenId id) { return id < 0 || id >= traits.vocab_size; };
  traits.eos_tokens.erase(
      std::remove_if(traits.eos_tokens.begin(), traits.eos_tokens.end(), out_of_range),
      traits.eos_tokens.end());
  if (out_of_range(traits.eot_token)) traits.eot_token = -1;
  CINNABAR_CHECK(spec.num_kv_heads > 0 && spec.num_heads % spec.num_kv_heads == 0 &&
                 spec.head_dim % 2 == 0 && !traits.default_sampler.empty())
      << "the family " << traits.family << " left its spec incomplete";
  return spec;
}

}  // namespace cinnabar
