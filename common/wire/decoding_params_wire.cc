#include "common/wire/decoding_params_wire.h"

#include "absl/strings/str_cat.h"

namespace cinnabar {

absl::StatusOr<DecodingParams> FromWire(const v1::DecodingParams& wire) {
  if (wire.forbidden_ids_size() > kForbiddenIdsMax) {
    return absl::InvalidArgumentError(absl::StrCat("forbidden_ids has ", wire.forbidden_ids_size(),
                                                   " ids; at most ", kForbiddenIdsMax,
                                                   " are taken"));
  }
  DecodingParams params;
  params.sampler = wire.sampler();
  params.num_steps = wire.num_steps();
  params.block_length = wire.block_length();
  params.temperature = wire.temperature();
  if (wire.has_top_p()) params.top_p = wire.top_p();
  params.top_k = wire.top_k();
  if (wire.has_threshold()) params.threshold = wire.threshold();
  if (wire.has_factor()) params.factor = wire.factor();
  if (wire.has_entropy_bound()) params.entropy_bound = wire.entropy_bound();
  params.alg_temp = wire.alg_temp();
  if (wire.has_eps()) params.eps = wire.eps();
  params.cfg_scale = wire.cfg_scale();
  params.logits_eos_inf = wire.logits_eos_inf();
  params.confidence_eos_eot_inf = wire.confidence_eos_eot_inf();
  params.eos_penalty = wire.eos_penalty();
  params.forbidden_ids.assign(wire.forbidden_ids().begin(), wire.forbidden_ids().end());
  params.pickable_ids = wire.pickable_ids();
  params.seed = wire.seed();
  params.sub_block_length = wire.sub_block_length();
  switch (wire.kv_reuse()) {
    case v1::KV_REUSE_EXACT:
      break;
    case v1::KV_REUSE_PREFIX:
      params.kv_reuse = KvReuse::kPrefix;
      break;
    case v1::KV_REUSE_DUAL:
      params.kv_reuse = KvReuse::kDual;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("kv_reuse: ", wire.kv_reuse(), " is none of exact, prefix, dual"));
  }
  if (wire.has_eta()) params.eta = wire.eta();
  if (wire.has_t_on()) params.t_on = wire.t_on();
  if (wire.has_t_off()) params.t_off = wire.t_off();
  if (wire.has_alpha_on()) params.alpha_on = wire.alpha_on();
  if (wire.has_edit_threshold()) params.edit_threshold = wire.edit_threshold();
  if (wire.has_edit_steps()) params.edit_steps = wire.edit_steps();
  params.repeat_penalty = wire.repeat_penalty();
  if (wire.has_low_threshold()) params.low_threshold = wire.low_threshold();
  params.eos_early_stop = wire.eos_early_stop();
  if (wire.has_temperature_start()) params.temperature_start = wire.temperature_start();
  if (wire.has_temperature_end()) params.temperature_end = wire.temperature_end();
  if (wire.has_stable_steps()) params.stable_steps = wire.stable_steps();
  if (wire.has_confident_entropy()) params.confident_entropy = wire.confident_entropy();
  return params;
}

v1::DecodingParams ToWire(const DecodingParams& params) {
  v1::DecodingParams wire;
  wire.set_sampler(params.sampler);
  wire.set_num_steps(params.num_steps);
  wire.set_block_length(params.block_length);
  wire.set_temperature(params.temperature);
  wire.set_top_p(params.top_p);
  wire.set_top_k(params.top_k);
  wire.set_threshold(params.threshold);
  wire.set_factor(params.factor);
  wire.set_entropy_bound(params.entropy_bound);
  wire.set_alg_temp(params.alg_temp);
  wire.set_eps(params.eps);
  wire.set_cfg_scale(params.cfg_scale);
  wire.set_logits_eos_inf(params.logits_eos_inf);
  wire.set_confidence_eos_eot_inf(params.confidence_eos_eot_inf);
  wire.set_eos_penalty(params.eos_penalty);
  wire.mutable_forbidden_ids()->Assign(params.forbidden_ids.begin(), params.forbidden_ids.end());
  wire.set_pickable_ids(params.pickable_ids);
  wire.set_seed(params.seed);
  wire.set_sub_block_length(params.sub_block_length);
  wire.set_kv_reuse(static_cast<v1::KvReuse>(params.kv_reuse));
  wire.set_eta(params.eta);
  wire.set_t_on(params.t_on);
  wire.set_t_off(params.t_off);
  wire.set_alpha_on(params.alpha_on);
  wire.set_edit_threshold(params.edit_threshold);
  wire.set_edit_steps(params.edit_steps);
  wire.set_repeat_penalty(params.repeat_penalty);
  wire.set_low_threshold(params.low_threshold);
  wire.set_eos_early_stop(params.eos_early_stop);
  wire.set_temperature_start(params.temperature_start);
  wire.set_temperature_end(params.temperature_end);
  wire.set_stable_steps(params.stable_steps);
  wire.set_confident_entropy(params.confident_entropy);
  return wire;
}

}  // namespace cinnabar
