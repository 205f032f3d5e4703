"""The list of cases: which sampler runs on which model, input and options, and what a case must show.

Inputs are drawn with a seed; seeds are tried in order until no decision of the run is closer than float32
can tell apart and the case shows what it is there for.
"""
import numpy as np

from . import gemma, models, samplers


def parse_layout(layout):
    """"g4 m5 g3" -> (given flags, gen_length); a trailing "+16" is a canvas appended after the input."""
    given, appended = [], 0
    for part in layout.split():
        if part[0] == "+":
            appended = int(part[1:])
        else:
            given += [part[0] == "g"] * int(part[1:])
    return given, appended


def effect(**other):
    """The options matter: with `other` in their place the run takes another course."""
    def shows(result, model, ids, given, options):
        changed = {k: v for k, v in {**options, **other}.items() if v is not None}
        try:
            plain = samplers.generate(model, ids, given, changed)
        except samplers.TooClose:
            return False
        return plain.trace != result.trace or plain.tokens != result.tokens
    return shows


def float32_decides(result, model, ids, given, options):
    """With shares in whole numbers other tokens come out."""
    in_float32 = samplers.float32_share
    samplers.float32_share = lambda count, rate: int(round(count * rate, 6))
    try:
        return samplers.generate(model, ids, given, options).tokens != result.tokens
    except samplers.TooClose:
        return False
    finally:
        samplers.float32_share = in_float32


def events(*names):
    return lambda result, *_: set(names) <= result.events


def both(*conditions):
    return lambda *args: all(c(*args) for c in conditions)


def eos_used(result, model, ids, given, options):
    special = (*model.traits.eos_tokens, model.traits.eot_token)
    return any(t in special for t, g in zip(result.tokens, given) if not g)


SAMPLERS = ("low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy", "threshold", "factor",
            "entropy_bounded", "fast_dllm_v2", "block_static", "block_dynamic", "block_sequential", "p2", "p2_open", "rnd1",
            "rnd1_entropy_bounded", "joint_threshold", "joint_threshold_indel",
            "hierarchical", "hierarchical_remask", "credit")
HOLES = "g4 m5 g3 m4 g1 m2 g3"  # a canvas of 15 positions, 11 of them masked

# name, model, layout, options, condition
GREEDY = [
    # LLaDA's low-confidence remasking.
    ("low_confidence_llada", "llada", "g9 +16", dict(steps=16, block_length=8), None),
    ("low_confidence_llada_quota", "llada", "g7 +15", dict(steps=6), None),
    ("low_confidence_llada_one_step", "llada", "g5 +7", dict(steps=1), None),
    ("low_confidence_llada_short_last_block", "llada", "g6 +13", dict(steps=9, block_length=5), None),
    ("low_confidence_llada_infill", "llada", HOLES, dict(steps=6, block_length=6), None),
    ("low_confidence_llada_hole_first", "llada", "m3 g4 m6 g2", dict(steps=9), None),
    ("low_confidence_llada_one_given", "llada", "g1 +11", dict(steps=11), None),
    ("low_confidence_llada_given_block", "llada", "g3 m4 g9 m3 g2", dict(steps=8, block_length=4), None),
    ("low_confidence_llada_cfg", "llada", "g8 +12", dict(steps=12, block_length=6, cfg_scale=1.5),
     effect(cfg_scale=0)),
    ("low_confidence_llada_cfg_infill", "llada", HOLES, dict(steps=5, cfg_scale=0.75), effect(cfg_scale=0)),
    ("low_confidence_llada_logits_eos_inf", "llada", "g8 +14", dict(steps=14, logits_eos_inf=True),
     effect(logits_eos_inf=False)),
    ("low_confidence_llada_confidence_eos_eot_inf", "llada", "g8 +14",
     dict(steps=7, confidence_eos_eot_inf=True), both(effect(confidence_eos_eot_inf=False), eos_used)),
    ("low_confidence_llada_eos_switches_infill", "llada", HOLES,
     dict(steps=11, confidence_eos_eot_inf=True, logits_eos_inf=True),
     effect(confidence_eos_eot_inf=False, logits_eos_inf=False)),
    ("low_confidence_llada_gqa_mask_is_best", "llada_gqa", "g9 +14", dict(steps=7), events("mask is best")),
    ("low_confidence_llada_gqa_infill", "llada_gqa", HOLES, dict(steps=8, block_length=8),
     events("mask is best")),
    ("low_confidence_dream", "dream", "g7 +12", dict(steps=6, block_length=6), None),
    ("low_confidence_dream_masked_start", "dream", "m4 g5 m5 g1", dict(steps=9), None),
    ("low_confidence_open_dcoder_infill", "open_dcoder", HOLES, dict(steps=11), None),
    ("low_confidence_a2d_qwen3", "a2d_qwen3", "g6 +14", dict(steps=7, block_length=14), None),
    ("low_confidence_a2d_qwen2_infill", "a2d_qwen2", HOLES, dict(steps=4, block_length=8), None),
    ("low_confidence_a2d_llama", "a2d_llama", "g11 +10", dict(steps=10, block_length=5), None),
    # LLaDA's random remasking where chance has no say.
    ("random_sequential", "llada", "g6 +9", dict(steps=9, block_length=1), None),
    ("random_one_step_infill", "llada", HOLES, dict(steps=3, block_length=6), None),
    # Dream.
    ("origin_one_step", "dream", "g6 +9", dict(steps=1), None),
    ("origin_one_step_infill", "dream", HOLES, dict(steps=1), None),
    ("maskgit_plus_dream", "dream", "g9 +15", dict(steps=8), None),
    ("maskgit_plus_dream_step_per_mask", "dream", "g5 +8", dict(steps=8), None),
    ("maskgit_plus_dream_infill", "dream", HOLES, dict(steps=5), None),
    ("maskgit_plus_dream_top_p", "dream", "g9 +13", dict(steps=6, top_p=0.7), effect(top_p=1.0)),
    ("maskgit_plus_dream_top_k", "dream", "g9 +13", dict(steps=6, top_k=4), effect(top_k=0)),
    ("maskgit_plus_a2d_llama", "a2d_llama", "g8 +12", dict(steps=5, eps=0.5), effect(eps=0.001)),
    ("topk_margin_dream", "dream", "g8 +14", dict(steps=7), None),
    ("topk_margin_dream_infill", "dream", HOLES, dict(steps=6), None),
    ("topk_margin_open_dcoder_top_p", "open_dcoder", "g9 +12", dict(steps=6, top_p=0.95), None),
    ("entropy_dream", "dream", "g7 +16", dict(steps=9), None),
    ("entropy_dream_more_steps_than_masks", "dream", "g7 +6", dict(steps=10), None),
    ("entropy_dream_infill", "dream", HOLES, dict(steps=11), None),
    ("entropy_dream_top_p", "dream", "g9 +14", dict(steps=7, top_p=0.95), effect(top_p=1.0)),
    ("entropy_dream_top_p_top_k_infill", "dream", HOLES, dict(steps=6, top_p=0.9, top_k=5),
     effect(top_p=1.0, top_k=0)),
    ("entropy_open_dcoder", "open_dcoder", "g9 +16", dict(steps=8), None),
    ("entropy_open_dcoder_infill", "open_dcoder", "g6 m9 g5", dict(steps=5), None),
    ("entropy_dream_bf16", "dream_bf16", "g8 +12", dict(steps=6), None),
    ("entropy_llada", "llada", "g8 +12", dict(steps=6), None),
    # Fast-dLLM.
    ("threshold_llada", "llada", "g9 +16", dict(threshold=0.6, block_length=8), events("above", "fallback")),
    ("threshold_llada_default", "llada", "g5 +9", dict(), None),
    ("threshold_llada_infill", "llada", HOLES, dict(threshold=0.45, block_length=6), events("above")),
    ("threshold_llada_zero", "llada", "g4 +6", dict(threshold=0.0), events("above")),
    ("threshold_llada_gqa_mask_is_best", "llada_gqa", "g8 +12", dict(threshold=0.5),
     events("mask is best", "above")),
    ("threshold_dream", "dream", "g8 +12", dict(threshold=0.5, block_length=4), events("above", "fallback")),
    ("threshold_dream_bf16_infill", "dream_bf16", HOLES, dict(threshold=0.5), events("above", "fallback")),
    ("threshold_a2d_qwen2", "a2d_qwen2", "g6 +13", dict(threshold=0.55, block_length=5),
     events("above", "fallback")),
    ("factor_llada", "llada", "g9 +15", dict(factor=1.0, block_length=5), events("several")),
    ("factor_llada_wide", "llada", "g9 +12", dict(factor=1.6), events("several")),
    ("factor_llada_infill", "llada", HOLES, dict(factor=1.25, block_length=8), events("several")),
    ("factor_llada_last_rank_fails", "llada", "g7 +9", dict(factor=1.0, block_length=3),
     events("last rank fails")),
    ("factor_a2d_qwen3", "a2d_qwen3", "g7 +12", dict(factor=1.4, block_length=6), events("several")),
    # Entropy-bounded.
    ("entropy_bounded_llada", "llada", "g9 +14", dict(entropy_bound=2.5), events("several", "one")),
    ("entropy_bounded_llada_zero", "llada", "g6 +7", dict(entropy_bound=0.0), events("one")),
    ("entropy_bounded_llada_wide_blocks", "llada", "g6 +12", dict(entropy_bound=40.0, block_length=6),
     events("all")),
    ("entropy_bounded_dream_infill", "dream", HOLES, dict(entropy_bound=3.0), events("several")),
    ("entropy_bounded_a2d_llama", "a2d_llama", "g7 +12", dict(entropy_bound=2.0, block_length=6),
     events("several")),
    ("entropy_bounded_sdar_b8", "sdar_b8", "g5 +19", dict(entropy_bound=2.0), events("several")),
    # SDAR: steps are for all blocks, those of the prompt's tail included.
    ("block_static_sdar_b4", "sdar_b4", "g9 +15", dict(steps=8), None),
    ("block_static_sdar_b4_full_steps", "sdar_b4", "g8 +12", dict(steps=12), None),
    ("block_static_sdar_b4_tail", "sdar_b4", "g7 +9", dict(steps=6), events("quota above masks")),
    ("block_static_sdar_b4_filtered", "sdar_b4", "g6 +14", dict(steps=12, top_k=9, top_p=0.9),
     effect(top_k=0, top_p=1.0)),
    ("block_static_sdar_b8_infill", "sdar_b8", HOLES + " g3", dict(steps=9), None),
    ("block_static_sdar_b4_given_block", "sdar_b4", "g3 m4 g9 m3 g1", dict(steps=10), None),
    ("block_static_sdar_b4_short_last_block", "sdar_b4", "g6 +9", dict(steps=12), None),
    ("block_static_sdar_b4_f16", "sdar_b4_f16", "g9 +11", dict(steps=6), None),
    ("block_dynamic_sdar_b4", "sdar_b4", "g9 +15", dict(steps=16, threshold=0.45),
     events("above quota", "fallback")),
    ("block_dynamic_sdar_b4_quota", "sdar_b4", "g6 +14", dict(steps=8, threshold=0.3),
     events("quota above masks", "fallback")),
    ("block_dynamic_sdar_b4_infill", "sdar_b4", HOLES + " g2", dict(steps=16, threshold=0.4),
     events("above quota", "fallback")),
    ("block_dynamic_sdar_b8", "sdar_b8", "g13 +19", dict(steps=24, threshold=0.5),
     events("above quota", "fallback")),
    ("block_dynamic_sdar_b8_one_given", "sdar_b8", "g1 +15", dict(steps=6, threshold=0.6), None),
    ("block_dynamic_sdar_b4_f16", "sdar_b4_f16", "g6 +10", dict(steps=12, threshold=0.5),
     events("above quota")),
    # Reused keys and values: Fast-dLLM's prefix and dual caches, and v2's inside a block.
    ("threshold_llada_prefix", "llada", "g9 +24", dict(threshold=0.6, block_length=8, kv_reuse="prefix"),
     both(effect(kv_reuse="exact"), events("reused", "above", "fallback"))),
    ("threshold_llada_dual", "llada", "g9 +24", dict(threshold=0.6, block_length=8, kv_reuse="dual"),
     both(effect(kv_reuse="exact"), effect(kv_reuse="prefix"), events("reused"))),
    ("threshold_llada_dual_infill", "llada", HOLES, dict(threshold=0.45, block_length=6, kv_reuse="dual"),
     effect(kv_reuse="exact")),
    ("threshold_dream_prefix", "dream", "g8 +16", dict(threshold=0.5, block_length=8, kv_reuse="prefix"),
     both(effect(kv_reuse="exact"), events("reused"))),
    ("threshold_dream_dual_infill", "dream", HOLES, dict(threshold=0.5, block_length=5, kv_reuse="dual"),
     both(effect(kv_reuse="prefix"), events("reused"))),
    ("factor_llada_dual", "llada", "g9 +20", dict(factor=1.25, block_length=10, kv_reuse="dual"),
     effect(kv_reuse="exact")),
    ("low_confidence_llada_prefix", "llada", "g7 +18", dict(steps=12, block_length=9, kv_reuse="prefix"),
     effect(kv_reuse="exact")),
    ("threshold_a2d_qwen2_dual", "a2d_qwen2", "g6 +16", dict(threshold=0.55, block_length=8, kv_reuse="dual"),
     effect(kv_reuse="exact")),
    ("fast_dllm_v2_default", "fast_dllm_v2", "g9 +39", dict(), None),
    ("fast_dllm_v2_sub_blocks", "fast_dllm_v2", "g16 +32", dict(threshold=0.5, sub_block_length=4),
     both(effect(sub_block_length=8), events("above", "fallback"))),
    ("fast_dllm_v2_one_at_a_time", "fast_dllm_v2", "g21 +16", dict(threshold=1.0), None),
    ("fast_dllm_v2_dual", "fast_dllm_v2", "g9 +39", dict(threshold=0.5, kv_reuse="dual"),
     both(effect(kv_reuse="exact"), events("reused", "above"))),
    ("fast_dllm_v2_dual_infill", "fast_dllm_v2", HOLES + " g4 m5 g2", dict(threshold=0.6, kv_reuse="dual"), None),
    ("fast_dllm_v2_sdar_b8", "sdar_b8", "g5 +19", dict(threshold=0.5, sub_block_length=4), events("above")),
    ("block_dynamic_fast_dllm_v2", "fast_dllm_v2", "g9 +23", dict(steps=32, threshold=0.45),
     events("above quota", "fallback")),
    ("entropy_bounded_fast_dllm_v2_infill", "fast_dllm_v2", HOLES + " g2", dict(entropy_bound=2.0), None),
    # BD3-LM.
    ("block_dynamic_bd3lm", "bd3lm", "g9 +23", dict(steps=24, threshold=0.45), events("above quota", "fallback")),
    ("block_static_bd3lm_infill", "bd3lm", HOLES + " g2", dict(steps=9), None),
    # Mixtures of experts.
    ("block_static_sdar_moe", "sdar_moe", "g9 +11", dict(steps=9), None),
    ("block_dynamic_sdar_moe_infill", "sdar_moe", HOLES + " g2", dict(steps=16, threshold=0.4), None),
    ("entropy_rnd1", "rnd1", "g8 +12", dict(steps=6), None),
    ("entropy_rnd1_bf16_infill", "rnd1_bf16", HOLES, dict(steps=5), None),
    ("low_confidence_llada_moe", "llada_moe", "g8 +14", dict(steps=14, block_length=7), None),
    ("threshold_llada_moe_infill", "llada_moe", HOLES, dict(threshold=0.5), None),
    ("block_dynamic_llada2", "llada2", "g11 +13", dict(steps=24, threshold=0.5), None),
    ("block_static_llada2_infill", "llada2", HOLES + " g2", dict(steps=12), None),
    # Path planning.
    ("p2_llada", "llada", "g8 +12", dict(steps=6), events("masked again")),
    ("p2_llada_float32_share", "llada", "g6 +22", dict(steps=22), float32_decides),
    ("p2_llada_eta", "llada", "g6 +14", dict(steps=10, eta=2.0), both(events("masked again"), effect(eta=1.0))),
    ("p2_llada_eta_zero", "llada", "g6 +10", dict(steps=5, eta=0.0), effect(eta=1.0)),
    ("p2_dream_infill", "dream", HOLES, dict(steps=6, block_length=8), events("masked again")),
    ("p2_open_open_dcoder", "open_dcoder", "g9 +12", dict(steps=7), events("masked again")),
    ("p2_open_open_dcoder_infill", "open_dcoder", HOLES, dict(steps=6, top_p=0.9, top_k=6),
     both(events("masked again"), effect(top_p=1.0, top_k=0))),
    # RND1.
    ("rnd1_rnd1", "rnd1", "g8 +12", dict(steps=5), None),
    ("rnd1_rnd1_infill", "rnd1", HOLES, dict(steps=15, top_k=7, top_p=0.9), effect(top_k=0, top_p=1.0)),
    ("rnd1_rnd1_float32_share", "rnd1", "g8 +22", dict(steps=22), float32_decides),
    ("rnd1_rnd1_narrow_top_p", "rnd1", "g8 +12", dict(steps=6, top_p=0.3), effect(top_p=1.0)),
    ("rnd1_entropy_bounded_rnd1", "rnd1", "g8 +12", dict(entropy_bound=1.5), events("several")),
    ("rnd1_entropy_bounded_llada_infill", "llada", HOLES, dict(entropy_bound=2.0, top_k=8), events("several")),
    # LLaDA2.1.
    ("joint_threshold_llada2", "llada2", "g11 +13", dict(threshold=0.5, edit_threshold=0.3), events("edited")),
    ("joint_threshold_llada2_budget", "llada2", "g9 +15", dict(threshold=0.4, edit_threshold=0.0, edit_steps=2),
     events("edited", "edit budget")),
    ("joint_threshold_llada2_no_edit_steps", "llada2", "g10 +14", dict(threshold=0.4, edit_threshold=0.1, edit_steps=0),
     events("edited")),
    ("joint_threshold_llada2_penalty", "llada2", HOLES + " g2",
     dict(threshold=0.5, edit_threshold=0.4, repeat_penalty=3.0), both(events("edited"), effect(repeat_penalty=0))),
    ("joint_threshold_llada", "llada", "g9 +12", dict(threshold=0.5, edit_threshold=0.4, block_length=6, top_k=9,
                                                      top_p=0.95), events("edited")),
    # LLaDA2.x with insertion and deletion.
    ("joint_threshold_indel_llada2", "llada2_indel", "g11 +13", dict(threshold=0.5, edit_threshold=0.3),
     events("delete", "split", "token cut", "filled up", "mask written", "mask stays", "cleaned up")),
    ("joint_threshold_indel_llada2_circle", "llada2_indel", "g11 +13",
     dict(threshold=0.4, edit_threshold=0.0, edit_steps=6), events("left a circle", "mask was best")),
    ("joint_threshold_indel_llada2_steps_spent", "llada2_indel", "g9 +15",
     dict(threshold=0.5, edit_threshold=0.3, edit_steps=4), events("steps spent", "cleaned up")),
    ("joint_threshold_indel_llada2_no_edit_steps", "llada2_indel", "g10 +14",
     dict(threshold=0.4, edit_threshold=0.1, edit_steps=0), events("last originals", "cleaned up", "delete")),
    ("joint_threshold_indel_llada2_agrees", "llada2_indel", "g8 +8", dict(threshold=0.6, edit_threshold=0.9),
     events("nothing to do", "delete")),
    ("joint_threshold_indel_llada2_infill", "llada2_indel", HOLES + " g2",
     dict(threshold=0.5, edit_threshold=0.2, edit_steps=5), events("delete", "split", "token cut", "filled up")),
    # dInfer.
    ("hierarchical_llada", "llada", "g9 +16", dict(threshold=0.6, low_threshold=0.2, block_length=8),
     events("several", "fallback")),
    ("hierarchical_llada_infill", "llada", HOLES, dict(threshold=0.8, low_threshold=0.15), events("several")),
    ("hierarchical_remask_llada", "llada", "g9 +14", dict(threshold=0.7, low_threshold=0.2),
     events("several", "masked again")),
    ("hierarchical_remask_llada_infill", "llada", HOLES, dict(threshold=0.6, low_threshold=0.3, block_length=8),
     events("masked again")),
    ("credit_llada", "llada", "g9 +16", dict(threshold=0.6, block_length=8), both(events("above", "fallback"),
                                                                                  effect(sampler="threshold"))),
    ("credit_llada_decides", "llada", "g7 +12", dict(threshold=0.95), events("credit decides")),
    ("credit_dream_infill", "dream", HOLES, dict(threshold=0.7, cfg_scale=0.5), events("above")),
    ("credit_sdar_b8", "sdar_b8", "g5 +19", dict(threshold=0.9), None),
    # An end of text that is final ends the run.
    ("block_dynamic_llada2_early_stop", "llada2", "g9 +31", dict(steps=40, threshold=0.5, eos_early_stop=True),
     events("stopped early")),
    ("block_sequential_sdar_b4_early_stop", "sdar_b4", "g9 +31", dict(steps=40, eos_early_stop=True),
     events("stopped early")),
    ("joint_threshold_llada2_early_stop", "llada2", "g9 +31",
     dict(threshold=0.5, edit_threshold=0.4, eos_early_stop=True), events("stopped early")),
    ("joint_threshold_indel_llada2_early_stop", "llada2_indel", "g9 +31",
     dict(threshold=0.5, edit_threshold=0.4, edit_steps=6, eos_early_stop=True), events("stopped early")),
    ("block_sequential_sdar_b4", "sdar_b4", "g9 +11", dict(steps=9), None),
    ("block_sequential_sdar_b4_tail", "sdar_b4", "g6 +10", dict(steps=3), None),
    ("block_sequential_sdar_b8_infill", "sdar_b8", HOLES + " g2", dict(steps=9), None),
]


def draw_input(model, name, layout, seed, text_ids):
    given, appended = parse_layout(layout)
    ids = np.random.RandomState(seed).randint(0, text_ids(name), len(given))
    ids[~np.array(given, dtype=bool)] = 0  # what stands at a position to fill is ignored
    return ids.tolist(), given, appended


def token_cases(loaded, text_ids):
    """(name, case) of every token golden."""
    for name, model_name, layout, options, condition in GREEDY:
        model = loaded[model_name]
        sampler = max((s for s in SAMPLERS if name.startswith(s + "_")), key=len)
        options = {"sampler": sampler, **options}
        for seed in range(2000):
            ids, given, appended = draw_input(model, model_name, layout, seed, text_ids)
            whole_ids, whole_given = ids + [0] * appended, given + [False] * appended
            try:
                result = samplers.generate(model, whole_ids, whole_given, options)
            except samplers.TooClose:
                continue
            filled = [t for t, g in zip(result.tokens, whole_given) if not g]
            if len(set(filled)) < min(4, len(filled) // 2):
                continue
            if condition is None or condition(result, model, whole_ids, whole_given, options):
                break
        else:
            raise AssertionError(f"{name}: no input shows it with safe margins")
        if appended:
            options["gen_length"] = appended
        case = {"model": f"models/{model_name}", "input": {"ids": ids, "given": given},
                "options": {**options, "temperature": 0}, "expected": {"ids": result.tokens, "trace": result.trace}}
        if result.nfe_min == result.nfe:
            case["expected"]["nfe"] = result.nfe
        else:
            case["expected"].update(nfe_min=result.nfe_min, nfe_max=result.nfe)
        yield name, case


# DiffusionGemma's sampler is random, and reproducible to the token all the same (gemma.py).
GEMMA = [
    ("gemma_renoise", "diffusion_gemma", 3, 13, 8, dict(steps=12, entropy_bound=0.4), {"several", "drawn is not the best"}),
    ("gemma_renoise_two_blocks", "diffusion_gemma", 4, 7, 16, dict(steps=14, entropy_bound=1.5),
     {"several", "drawn is not the best"}),
    ("gemma_renoise_stops_early", "diffusion_gemma", 28, 5, 13,
     dict(steps=40, entropy_bound=1.0, confident_entropy=0.2), {"stopped early", "several"}),
    ("gemma_renoise_needs_two_stable_steps", "diffusion_gemma", 4, 6, 8,
     dict(steps=20, entropy_bound=2.0, stable_steps=2, confident_entropy=0.3, temperature_start=0.6,
          temperature_end=0.3), {"stopped early"}),
    ("gemma_renoise_one_given", "diffusion_gemma", 1, 1, 8, dict(steps=6, entropy_bound=0.0), {"one"}),
    ("gemma_renoise_bf16", "diffusion_gemma_bf16", 0, 9, 8, dict(steps=8, entropy_bound=0.6), {"several"}),
]


def gemma_cases(loaded):
    for name, model_name, first_seed, prompt, canvas, options, wanted in GEMMA:
        model = loaded[model_name]
        for seed in range(first_seed, 2000):  # those before were seen to be too close
            ids = np.random.RandomState(seed).randint(0, 97, prompt).tolist()
            options = {"sampler": "gemma_renoise", **options, "seed": (seed << 33) + seed}
            whole, given = ids + [0] * canvas, [True] * prompt + [False] * canvas
            try:
                tokens, passes, events = gemma.generate(model, whole, given, options)
            except samplers.TooClose:
                continue
            if wanted <= events:
                break
        else:
            raise AssertionError(f"{name}: no input shows it with safe margins")
        yield name, {"model": f"models/{model_name}", "input": {"ids": ids, "given": given[:prompt]},
                     "options": {**options, "gen_length": canvas},
                     "expected": {"ids": tokens[:prompt + canvas], "nfe": passes}}


# --- random steps ------------------------------------------------------------------------------------------

# Schedules of one random run each: enough to test the sampler's loop through seeds.
RANDOM_RUNS = [
    ("sedd_euler_absorb", "sedd_absorb", "g5 +12", dict(sampler="sedd_euler", steps=16, temperature=1)),
    ("sedd_analytic_absorb_infill", "sedd_absorb", HOLES, dict(sampler="sedd_analytic", steps=8, temperature=1)),
    ("sedd_euler_uniform", "sedd_uniform", "g5 +9", dict(sampler="sedd_euler", steps=24, temperature=1)),
    ("sedd_analytic_uniform_infill", "sedd_uniform", HOLES,
     dict(sampler="sedd_analytic", steps=8, temperature=1)),
    ("mdlm_ancestral", "mdlm", "g5 +12", dict(sampler="mdlm_ancestral", steps=16, temperature=1)),
    ("mdlm_ancestral_infill", "mdlm", HOLES, dict(sampler="mdlm_ancestral", steps=6, temperature=1)),
    ("random_llada", "llada", "g5 +12", dict(sampler="random", steps=6, block_length=6)),
    ("origin_dream_infill", "dream", HOLES, dict(sampler="origin", steps=6, temperature=0.7, top_p=0.95)),
    ("entropy_dream_warm", "dream", "g6 +12",
     dict(sampler="entropy", steps=6, temperature=0.4, top_p=0.95, alg_temp=0.3)),
    ("low_confidence_llada_warm", "llada", HOLES, dict(sampler="low_confidence", steps=11, temperature=0.8)),
    ("block_dynamic_sdar_warm", "sdar_b4", "g6 +14",
     dict(sampler="block_dynamic", steps=16, temperature=0.6, top_k=20, top_p=0.95, threshold=0.5)),
    ("remdm_cap", "mdlm", "g5 +12", dict(sampler="remdm_cap", steps=16, temperature=1, eta=0.2, top_p=0.9)),
    ("remdm_rescale_infill", "mdlm", HOLES, dict(sampler="remdm_rescale", steps=12, temperature=1, eta=0.1)),
    ("remdm_conf", "mdlm", "g5 +12", dict(sampler="remdm_conf", steps=16, temperature=1, top_p=0.9)),
    ("remdm_loop_llada", "llada", HOLES, dict(sampler="remdm_loop", steps=20, eta=0.1, temperature=0.8)),
    ("dfm_corrector", "mdlm", HOLES, dict(sampler="dfm_corrector", steps=10, temperature=1)),
    ("p2_random_llada", "llada", "g6 +12", dict(sampler="p2_random", steps=8, eta=1)),
    ("p2_llada_warm", "llada", HOLES, dict(sampler="p2", steps=6, temperature=0.7)),
    ("joint_threshold_llada2_warm", "llada2", "g9 +15",
     dict(sampler="joint_threshold", threshold=0.4, edit_threshold=0.2, edit_steps=4, temperature=0.8, top_k=20)),
    ("bd3lm_first_hitting_sdar", "sdar_b4", "g6 +14", dict(sampler="bd3lm_first_hitting", temperature=1, top_p=0.9)),
    ("credit_llada_warm", "llada", HOLES, dict(sampler="credit", threshold=0.7, temperature=0.8)),
    ("bd3lm_scheduled_sdar_infill", "sdar_b8", HOLES + " g3",
     dict(sampler="bd3lm_scheduled", steps=12, temperature=0.8)),
    ("joint_threshold_indel_llada2_warm", "llada2_indel", HOLES + " g2",
     dict(sampler="joint_threshold_indel", threshold=0.4, edit_threshold=0.2, edit_steps=4, temperature=0.8)),
]


def random_run_cases(loaded, text_ids):
    """Runs without expected tokens: whatever comes out, the given positions are unchanged, everything is filled,
    and the same seed gives the same again."""
    for number, (name, model_name, layout, options) in enumerate(RANDOM_RUNS):
        ids, given, appended = draw_input(loaded[model_name], model_name, layout, 900 + number, text_ids)
        if appended:
            options = {**options, "gen_length": appended}
        yield name, {"model": f"models/{model_name}", "input": {"ids": ids, "given": given},
                     "options": {**options, "seed": 1234 + number},
                     "properties": {"length": len(ids) + appended, "mask_token": loaded[model_name].traits.mask_token}}


def listed(array):
    return np.asarray(array, dtype=np.float64).tolist()


def random_rows(seed, rows, vocabulary, spread):
    """Logits of moderate spread, exactly representable in float32 so that both sides read the same numbers."""
    uniforms = np.random.RandomState(seed).random_sample((4, rows, vocabulary))
    return np.round((uniforms.sum(axis=0) - 2) * spread * 256) / 256


def probability_cases(loaded, text_ids):
    """(name, case): exact distributions of single random draws and steps."""
    # One token. V = 19, the mask token is id 17, in row 1 it is the best one.
    logits = random_rows(1, 3, 19, 3.0)
    logits[1, 17] = 4.0
    filters = [dict(temperature=1.0), dict(temperature=0.5), dict(temperature=1.7),
               dict(temperature=1.0, top_p=0.8), dict(temperature=0.8, top_k=4),
               dict(temperature=1.3, top_p=0.75, top_k=5),
               dict(temperature=1.3, top_p=0.75, top_k=5, top_k_first=True),
               dict(temperature=0.6, top_p=0.92, top_k=7, top_k_first=True)]
    draws = []
    for options in filters:
        rows = [samplers.categorical(row, 17, **options) for row in logits]
        top_k_first = options.pop("top_k_first", False)
        draws.append({**options, "filter_order": "top_k_then_top_p" if top_k_first else "top_p_then_top_k",
                      "probabilities": [listed(p) for p, _ in rows], "confidence": [listed(c) for _, c in rows]})
    yield "categorical", {"kind": "categorical", "mask_token": 17, "logits": listed(logits), "draws": draws}

    # Dream: which positions.
    yield "origin_schedule", {"kind": "origin", "schedules": [
        {"steps": steps, "eps": eps, "probabilities": [samplers.origin_probability(i, steps, eps) for i in range(steps)]}
        for steps, eps in ((1, 1e-3), (5, 1e-3), (8, 1e-3), (6, 0.2))]}
    confidence = [0.83, 0.31, 0.57, 0.12, 0.95, 0.44]
    yield "alg_temp", {"kind": "alg_temp", "confidence": confidence, "draws": [
        {"alg_temp": t, "count": count, "inclusion": listed(samplers.without_replacement(
            models.softmax(np.array(confidence) / t), count))} for t, count in ((0.1, 1), (0.1, 2), (0.4, 3), (1.0, 5))]}

    # SEDD: one predictor step from inline log-scores, then from the tiny networks.
    graphs = {"absorb": ("loglinear", 0.0, 0.0), "uniform": ("geometric", 1e-4, 20.0)}
    for graph, (noise, sigma_min, sigma_max) in graphs.items():
        schedule = {"noise": noise, "sigma_min": sigma_min, "sigma_max": sigma_max}
        n = 13
        ids = [n - 1, 4, n - 1, 0] if graph == "absorb" else [3, 0, 12, 7]
        log_score = random_rows(5, len(ids), n, 1.5) - (2.0 if graph == "absorb" else 1.0)
        log_score[np.arange(len(ids)), ids] = 0
        cases = []
        for steps, step in ((10, 0), (10, 6), (3, 2), (200, 150)):
            t, dt = samplers.step_time(step, steps)
            cases += [{"sampler": name, "steps": steps, "step": step, "t": t, "dt": dt,
                       "sigma": samplers.noise_at(t, **schedule)[0],
                       "sigma_step": samplers.noise_at(t, **schedule)[0] - samplers.noise_at(t - dt, **schedule)[0],
                       "rate": samplers.noise_at(t, **schedule)[1],
                       "probabilities": listed(rule(log_score, ids, t, dt, graph, schedule))}
                      for name, rule in (("sedd_euler", samplers.sedd_euler),
                                         ("sedd_analytic", samplers.sedd_analytic))]
        t = samplers.step_time(10, 10)[0]
        cases.append({"sampler": "denoise", "steps": 10, "step": 10, "t": t,
                      "sigma": samplers.noise_at(t, **schedule)[0],
                      "probabilities": listed(samplers.sedd_denoise(log_score, ids, t, graph, schedule))})
        yield f"sedd_{graph}_rows", {"kind": "sedd", "graph": graph, **schedule, "ids": ids,
                                     "log_score": listed(log_score), "draws": cases}

        name = f"sedd_{graph}"
        model = loaded[name]
        random = np.random.RandomState(77)
        ids = random.randint(0, text_ids(name), 9)
        given = np.array([True, True, False, False, True, False, False, True, False])
        if graph == "absorb":
            ids[~given] = model.traits.mask_token
        traits = model.traits
        schedule = {"noise": traits.noise, "sigma_min": traits.sigma_min, "sigma_max": traits.sigma_max}
        cases = []
        for steps, step in ((6, 1), (6, 5)):
            t, dt = samplers.step_time(step, steps)
            log_score = model.logits(ids, samplers.noise_at(t, **schedule)[0])
            for sampler, rule in (("sedd_euler", samplers.sedd_euler), ("sedd_analytic", samplers.sedd_analytic)):
                p = rule(log_score, ids, t, dt, graph, schedule)
                cases.append({"sampler": sampler, "steps": steps, "step": step, "t": t, "dt": dt,
                              "positions": np.flatnonzero(~given).tolist(), "probabilities": listed(p[~given])})
        yield f"sedd_{graph}_model", {"kind": "sedd_model", "model": f"models/{name}",
                                      "input": {"ids": ids.tolist(), "given": given.tolist()}, "draws": cases}

    # MDLM: one ancestral step from inline logits, then from the tiny network.
    n, mask = 15, 14
    logits, ids = random_rows(9, 3, n, 2.0), [mask, 6, mask]
    logits[0, mask] = 3.0
    draws = []
    for steps, step, temperature in ((10, 0, 1.0), (10, 7, 1.0), (4, 3, 1.0), (10, 4, 0.5), (10, 4, 0)):
        t, dt = samplers.step_time(step, steps)
        draws.append({"steps": steps, "step": step, "t": t, "dt": dt, "temperature": temperature, "probabilities":
                      listed(samplers.mdlm_posterior(logits, ids, mask, t, dt, temperature))})
    yield "mdlm_rows", {"kind": "mdlm", "mask_token": mask, "ids": ids, "logits": listed(logits), "draws": draws}
    # BD3-LM: one step of a block, from the same logits.
    draws = []
    for name, options in (("bd3lm_first_hitting", {}), ("bd3lm_first_hitting", dict(top_p=0.75)),
                          ("bd3lm_scheduled", dict(steps=5, step=0)), ("bd3lm_scheduled", dict(steps=5, step=3)),
                          ("bd3lm_scheduled", dict(steps=5, step=4, top_p=0.5)),
                          ("bd3lm_scheduled", dict(steps=9, step=4, temperature=0.5)),
                          ("bd3lm_scheduled", dict(steps=1, step=0))):
        p = samplers.bd3lm_posterior(name, logits, ids, mask, **options)
        draws.append({"sampler": name, "options": options, "probabilities": listed(p)})
    yield "bd3lm_rows", {"kind": "bd3lm", "mask_token": mask, "ids": ids, "logits": listed(logits), "draws": draws}

    # ReMDM and the DFM corrector: one step from inline logits. Positions 1, 3 and 4 are committed.
    logits, ids = random_rows(10, 6, n, 2.0), [mask, 6, mask, 2, 9, mask]
    logits[0, mask] = 3.0
    confidences = [0.0, 0.875, 0.0, 0.125, 0.5, 0.0]
    draws = []
    for name, steps, step, options in (
            ("remdm_cap", 10, 0, dict(eta=0.3)), ("remdm_cap", 10, 4, dict(eta=0.3)),
            ("remdm_cap", 10, 9, dict(eta=0.3, top_p=0.75)), ("remdm_cap", 10, 5, dict(eta=0.0)),
            ("remdm_rescale", 10, 3, dict(eta=0.4)), ("remdm_rescale", 10, 8, dict(eta=0.4, temperature=0.5)),
            ("remdm_conf", 10, 3, {}), ("remdm_conf", 10, 8, dict(top_p=0.5)),
            ("remdm_loop", 10, 2, dict(eta=0.1)), ("remdm_loop", 10, 6, dict(eta=0.1, top_p=0.9)),
            ("remdm_loop", 20, 18, dict(eta=0.2, t_on=0.7, t_off=0.25, alpha_on=0.6)),
            ("remdm_loop", 20, 10, dict(eta=0.2, t_on=0.7, t_off=0.25, alpha_on=0.6)),
            ("dfm_corrector", 10, 0, {}), ("dfm_corrector", 10, 3, dict(top_p=0.75)), ("dfm_corrector", 10, 16, {}),
            ("dfm_corrector", 64, 40, {})):
        p = samplers.remdm_posterior(name, logits, ids, mask, steps, step, confidences=confidences, **options)
        draws.append({"sampler": name, "steps": steps, "step": step, "options": options, "probabilities": listed(p)})
    yield "remdm_rows", {"kind": "remdm", "mask_token": mask, "ids": ids, "logits": listed(logits),
                         "confidences": confidences, "draws": draws}
    model = loaded["mdlm"]
    mask = model.traits.mask_token
    ids = np.random.RandomState(78).randint(0, text_ids("mdlm"), 9)
    given = np.array([True, False, False, True, True, False, True, False, False])
    ids[~given] = mask
    draws = []
    for steps, step in ((6, 0), (6, 4)):
        t, dt = samplers.step_time(step, steps)
        p = samplers.mdlm_posterior(model.logits(ids), ids, mask, t, dt)
        draws.append({"steps": steps, "step": step, "t": t, "dt": dt, "temperature": 1.0,
                      "positions": np.flatnonzero(~given).tolist(), "probabilities": listed(p[~given])})
    yield "mdlm_model", {"kind": "mdlm_model", "model": "models/mdlm",
                         "input": {"ids": ids.tolist(), "given": given.tolist()}, "draws": draws}
