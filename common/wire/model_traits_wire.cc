#include "common/wire/model_traits_wire.h"

#include "absl/strings/str_cat.h"
#include "common/base/check.h"

namespace cinnabar {
namespace {

v1::ModelTraits::Parameterization ToWire(Parameterization parameterization) {
  switch (parameterization) {
    case Parameterization::kMaskPrediction:
      return v1::ModelTraits::MASK_PREDICTION;
    case Parameterization::kAbsorbScore:
      return v1::ModelTraits::ABSORB_SCORE;
    case Parameterization::kUniformScore:
      return v1::ModelTraits::UNIFORM_SCORE;
    case Parameterization::kUniformPrediction:
      return v1::ModelTraits::UNIFORM_PREDICTION;
  }
  CINNABAR_CHECK(false) << "not a parameterization: " << static_cast<int>(parameterization);
}

}  // namespace

absl::StatusOr<ModelTraits> FromWire(const v1::ModelTraits& wire) {
  ModelTraits traits;
  traits.family = wire.family();
  traits.vocab_size = wire.vocab_size();
  traits.tokenizer_size = wire.tokenizer_size();
  traits.mask_token = wire.mask_token();
  traits.eos_tokens.assign(wire.eos_tokens().begin(), wire.eos_tokens().end());
  traits.eot_token = wire.eot_token();
  if (wire.has_delete_token()) traits.delete_token = wire.delete_token();
  if (wire.has_split_token()) traits.split_token = wire.split_token();
  traits.shift_logits = wire.shift_logits();
  traits.causal_block_length = wire.causal_block_length();
  traits.causal_encoder = wire.causal_encoder();
  traits.conditioned_on_sigma = wire.conditioned_on_sigma();
  traits.sigma_min = wire.sigma_min();
  traits.sigma_max = wire.sigma_max();
  traits.positions_max = wire.positions_max();
  traits.default_sampler = wire.default_sampler();
  switch (wire.parameterization()) {
    case v1::ModelTraits::MASK_PREDICTION:
      traits.parameterization = Parameterization::kMaskPrediction;
      return traits;
    case v1::ModelTraits::ABSORB_SCORE:
      traits.parameterization = Parameterization::kAbsorbScore;
      return traits;
    case v1::ModelTraits::UNIFORM_SCORE:
      traits.parameterization = Parameterization::kUniformScore;
      return traits;
    case v1::ModelTraits::UNIFORM_PREDICTION:
      traits.parameterization = Parameterization::kUniformPrediction;
      return traits;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("parameterization ", static_cast<int>(wire.parameterization()),
                       " is not known: the worker is newer than this program"));
  }
}

v1::ModelTraits ToWire(const ModelTraits& traits) {
  v1::ModelTraits wire;
  wire.set_family(traits.family);
  wire.set_vocab_size(traits.vocab_size);
  wire.set_tokenizer_size(traits.tokenizer_size);
  wire.set_mask_token(traits.mask_token);
  wire.mutable_eos_tokens()->Assign(traits.eos_tokens.begin(), traits.eos_tokens.end());
  wire.set_eot_token(traits.eot_token);
  if (traits.delete_token >= 0) wire.set_delete_token(traits.delete_token);
  if (traits.split_token >= 0) wire.set_split_token(traits.split_token);
  wire.set_shift_logits(traits.shift_logits);
  wire.set_causal_block_length(traits.causal_block_length);
  wire.set_causal_encoder(traits.causal_encoder);
  wire.set_parameterization(ToWire(traits.parameterization));
  wire.set_conditioned_on_sigma(traits.conditioned_on_sigma);
  wire.set_sigma_min(traits.sigma_min);
  wire.set_sigma_max(traits.sigma_max);
  wire.set_positions_max(traits.positions_max);
  wire.set_default_sampler(traits.default_sampler);
  return wire;
}

}  // namespace cinnabar
